"""Each exercise fails as it stands and passes when solved.

`pytest --nbmake book` runs the solutions. Here each chapter's code runs once more, without
the cells tagged `long`, and each unsolved exercise must fail where its solution follows.
"""

import warnings
from pathlib import Path

import keras
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from notebooks import without_magics

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "book").glob("*.ipynb"))


def cells_of(path):
    """Return (tags, code) of the code cells, without magics and without long cells."""
    cells = []
    for cell in nbformat.read(path, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "long" in tags:
            continue
        cells.append((tags, without_magics(cell.source)))
    return cells


def unsolved_outcomes(cells):
    """Run a chapter's cells in one namespace; return what came of each unsolved exercise."""
    space, outcomes = {"__name__": "__main__"}, []
    for tags, code in cells:
        if "exercise" not in tags:
            exec(compile(code, "cell", "exec"), space)
            continue
        try:
            exec(compile(code, "exercise", "exec"), dict(space))
        except AssertionError:
            outcomes.append("fails")
        else:
            outcomes.append("passes")
    return outcomes


@pytest.fixture
def as_in_a_notebook(monkeypatch):
    """The folder, the plots and the silence that a chapter's code finds in a notebook."""
    monkeypatch.chdir(NOTEBOOKS[0].parent)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    style = matplotlib.rcParams.copy()
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    plt.close("all")
    matplotlib.rcParams.update(style)
    keras.utils.clear_session()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_fail_until_they_are_solved(path, as_in_a_notebook):
    assert "## Exercises" in path.read_text(encoding="utf-8")
    cells = cells_of(path)
    exercises = [i for i, (tags, _) in enumerate(cells) if "exercise" in tags]
    assert len(exercises) >= 3
    for i in exercises:
        assert "solution" in cells[i + 1][0], "a solution must follow its exercise"
        assert "assert" in cells[i][1]
    assert unsolved_outcomes(cells) == ["fails"] * len(exercises)
