"""Every chapter has exercises, each with its solution, that fail until they are solved.

`pytest --nbmake book` runs the solutions, and by book/conftest.py the unsolved exercises too.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_have_a_check_and_a_solution(path):
    assert "## Exercises" in path.read_text(encoding="utf-8")
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in cells]
    exercises = [i for i, names in enumerate(tags) if "exercise" in names]
    assert len(exercises) >= 3
    for i in exercises:
        assert "skip-execution" in tags[i] and "assert" in cells[i].source
        assert "solution" in tags[i + 1], "a solution must follow its exercise"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_are_numbered_from_one_everywhere(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    titles = re.findall(r"^### Exercise (\S+): ", prose, re.M)
    assert titles == [str(i) for i in range(1, len(titles) + 1)]
    assert len(titles) == len(re.findall(r"^#+ *Exercise\b(?!s)", prose, re.M))
    solutions = [c.source for c in cells if "solution" in c.metadata.get("tags", [])]
    assert [s.splitlines()[0] for s in solutions] == [f"# Solution {i}" for i in titles]


def outcome(folder, exercise):
    """Run a chapter with an exercise by nbmake; return its exit code and what it printed."""
    shutil.copy(BOOK / "conftest.py", folder)
    code, tags = nbformat.v4.new_code_cell, ["exercise", "skip-execution"]
    cells = [code("x = 1"), code(exercise, metadata={"tags": tags}), code("assert x == 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "chapter.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "chapter.ipynb"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = nbformat.read(folder / "chapter.ipynb", as_version=4)
    return result.returncode, result.stdout, after.cells[1]


@pytest.mark.parametrize(
    "exercise, said",
    [
        ("x = 2\nassert x == ..., 'not yet'", None),  # fails, as it must, and changes no name
        ("x = 2\nassert x == 2", "passes as it stands"),
        ("assert y == 2", "NameError"),
    ],
)
def test_an_unsolved_exercise_must_fail_by_its_assert(tmp_path, exercise, said):
    code, printed, cell = outcome(tmp_path, exercise)
    assert code == (said is not None), printed
    assert (said or "") in printed
    if said is None:
        assert cell.source == exercise and cell.outputs == []  # what --overwrite publishes
