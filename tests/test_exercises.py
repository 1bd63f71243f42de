"""Each exercise fails as it stands and passes when solved.

`pytest --nbmake book` runs the solutions. Here each chapter's code runs once more, without
the cells tagged `long`, and each unsolved exercise must fail where its solution follows.
"""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebooks import without_magics

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "book").glob("*.ipynb"))

RUNNER = """
import sys, json, matplotlib
matplotlib.use("Agg")
import warnings; warnings.simplefilter("ignore")
space, unsolved = {"__name__": "__main__"}, []
for tags, code in json.load(open(sys.argv[1])):
    if "exercise" in tags:
        try:
            exec(compile(code, "exercise", "exec"), dict(space))
        except AssertionError:
            unsolved.append("fails")
        else:
            unsolved.append("passes")
    else:
        exec(compile(code, "cell", "exec"), space)
print(json.dumps(unsolved))
"""


def cells_of(path):
    """Return (tags, code) of the code cells, without magics and without long cells."""
    cells = []
    for cell in nbformat.read(path, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "long" in tags:
            continue
        cells.append((tags, without_magics(cell.source)))
    return cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_fail_until_they_are_solved(path, tmp_path):
    import json

    cells = cells_of(path)
    exercises = [i for i, (tags, _) in enumerate(cells) if "exercise" in tags]
    assert len(exercises) >= 3
    for i in exercises:
        assert "solution" in cells[i + 1][0], "a solution must follow its exercise"
        assert "assert" in cells[i][1]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path / "cells.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=path.parent,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == ["fails"] * len(exercises)
