"""Every chapter has exercises, each with its solution, that fail until they are solved.

`pytest --nbmake book` runs the solutions, and by book/conftest.py the unsolved exercises too.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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


UNSOLVED = {
    "fails": "x = 2\nassert x == ..., 'not yet'",  # as it must, and changes no name
    "passes": "x = 2\nassert x == 2",
    "breaks": "assert y == 2",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run a chapter with each of the exercises by nbmake.

    Returns:
        {name: what is reported as its failure, or "", and the exercise's cell afterwards}.
    """
    folder = tmp_path_factory.mktemp("book")
    shutil.copy(BOOK / "conftest.py", folder)
    code, tags = nbformat.v4.new_code_cell, ["exercise", "skip-execution"]
    for name, exercise in UNSOLVED.items():
        cells = [code("x = 1"), code(exercise, metadata={"tags": tags}), code("assert x == 1")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "--junitxml=report.xml"]
    command += ["--override-ini", f"pythonpath={BOOK.parent / 'tools' / 'book'}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout
    reports = ElementTree.parse(folder / "report.xml").iter("testcase")
    failures = {case.get("classname"): case.findtext("failure", "") for case in reports}
    assert len(failures) == len(UNSOLVED)
    return {
        name: (
            failures[f"{name}.ipynb"],
            nbformat.read(folder / f"{name}.ipynb", as_version=4).cells[1],
        )
        for name in UNSOLVED
    }


def test_an_unsolved_exercise_must_fail_by_its_assert(outcomes):
    failure, cell = outcomes["fails"]
    assert failure == "" and cell.source == UNSOLVED["fails"]
    assert cell.outputs == []  # what --overwrite publishes
    assert "passes as it stands" in outcomes["passes"][0]
    assert "NameError" in outcomes["breaks"][0]
