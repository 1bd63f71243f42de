"""The book is built from results that are new where what they depend on is."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from build_book import chapter_states
from dependencies import ALL, code_of, dependencies, package_modules

ROOT = Path(__file__).resolve().parent.parent

PACKAGE = {
    "__init__": "from gcvit.layers import Wide\nfrom gcvit.shapes import halved\n",
    "shapes": (
        "import math\n\nSIDE = 7\n\n\ndef halved(n):\n    return math.ceil(n / 2)\n\n\n"
        "def side():\n    return SIDE\n"
    ),
    "layers": (
        "from gcvit import shapes\nfrom gcvit.shapes import halved as half\n\n\n"
        "class Wide:\n    size = half(4)\n\n\ndef unused():\n    return shapes.side()\n\n\n"
        "def every():\n    return vars(shapes)\n"
    ),
}


def test_what_every_chapter_depends_on_can_be_told():
    assert len(set(chapter_states().values())) == len(list((ROOT / "book").glob("*.ipynb")))


@pytest.fixture
def package(tmp_path):
    for name, code in PACKAGE.items():
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


def names(package, code):
    found = dependencies(code, *package_modules(package))
    return {f"{module}.{name}" for module, name in found if not name.startswith("(")}


@pytest.mark.parametrize(
    "code, expected",
    [
        ("import math\nmath.sqrt(2)", set()),
        ("from gcvit import Wide\nWide()", {"layers.Wide", "shapes.halved"}),
        ("from gcvit import shapes\nshapes.side()", {"shapes.side", "shapes.SIDE"}),
        ("from gcvit.layers import unused", {"layers.unused", "shapes.side", "shapes.SIDE"}),
        # A module that is handed on may be asked for anything.
        (
            "from gcvit import shapes\nprint(shapes)",
            {f"shapes.{n}" for n in "side SIDE halved".split()},
        ),
        (
            "from gcvit.layers import every",
            {"layers.every", *(f"shapes.{n}" for n in "side SIDE halved".split())},
        ),
    ],
)
def test_a_chapter_depends_on_what_it_names_and_what_that_names(package, code, expected):
    assert names(package, code) == expected


def test_what_runs_on_import_counts_for_every_name(package):
    code = "from gcvit.shapes import halved"
    before = dependencies(code, *package_modules(package))
    path = package / "shapes.py"
    path.write_text(path.read_text().replace("import math", "import math\nmath.pi = 3"))
    assert dependencies(code, *package_modules(package)) != before


def test_an_import_that_is_not_followed_is_refused(package):
    with pytest.raises(ValueError, match="line 2: write `from gcvit import"):
        names(package, "import math\nimport gcvit.shapes")


def test_an_edit_makes_stale_what_it_reaches_and_nothing_else(tmp_path):
    folder = tmp_path / "gcvit"
    shutil.copytree(ROOT / "gcvit", folder)
    chapters = {path.stem: code_of(path) for path in (ROOT / "book").glob("0[1-8]*.ipynb")}

    def state():
        modules, exports = package_modules(folder)
        return {name: dependencies(code, modules, exports) for name, code in chapters.items()}

    def stale_after(file, old, new):
        before, path = state(), folder / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        after = state()
        return {name for name in chapters if before[name] != after[name]}

    room = "fine_tuning/evaluation.py"
    assert stale_after(room, "def calibration(", "def calibration(_=None, *, ") == {
        "08-fine-tuning"
    }
    assert stale_after("stem.py", "@keras.saving", "# a comment above\n@keras.saving") == set()
    assert stale_after("attention.py", "def call(self", "def call(self, *_") == set(chapters)


def test_every_module_of_the_package_is_understood():
    modules, exports = package_modules(ROOT / "gcvit")
    for name, (module, export) in exports.items():
        assert export in modules[module].texts, name
    for module in modules.values():
        for used in set().union(*module.uses.values()):
            assert used[0] in modules and used[1] in {
                ALL,
                *modules[used[0]].texts,
                *modules[used[0]].imported,
            }, used


def project(folder, **chapters):
    """Write a book of one-cell chapters, with an empty package, and return what builds it."""
    for part in ("tools/book", "book", "gcvit/checkpoints"):
        (folder / part).mkdir(parents=True)
    for tool in (ROOT / "tools" / "book").glob("*.py"):
        shutil.copy(tool, folder / "tools" / "book")
    (folder / "gcvit" / "__init__.py").write_text("")
    (folder / "requirements-lock.txt").write_text("")
    (folder / "_config.yml").write_text("title: a book\nexecute:\n  timeout: 30\n")
    for name, code in chapters.items():
        cells = [
            nbformat.v4.new_markdown_cell(f"# {name}"),
            nbformat.v4.new_code_cell("x = 0"),
            nbformat.v4.new_code_cell(code),
        ]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, folder / "book" / f"{name}.ipynb")
    return subprocess.run(
        [sys.executable, folder / "tools" / "book" / "build_book.py"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_error_names_the_chapter_and_the_cell(tmp_path):
    result = project(tmp_path, good="1 / 1", bad="1 / x", dead="import os\nos.kill(os.getpid(), 9)")
    assert result.returncode == 1
    assert "good.ipynb executed in" in result.stdout
    assert "book/bad.ipynb failed in code cell 2" in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "book/dead.ipynb failed in code cell 2" in result.stderr
    assert "Kernel died" in result.stderr
    assert not (tmp_path / "_build" / "html" / "index.html").exists()
