"""What the project says of itself in several places is said alike."""

import ast
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
ADDRESS = CONFIG["repository"]["url"]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
PAGES = [*NOTEBOOKS, *sorted((ROOT / "book").glob("*.md"))]


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def texts():
    """Yield each text file of the project that may name its address."""
    patterns = ["*.md", "*.toml", "*.yml", "*.cff", "*.txt", "book/*", ".github/**/*"]
    for pattern in (*patterns, "gcvit/*.py", "tools/**/*.py"):
        for path in ROOT.glob(pattern):
            if path.is_file():
                yield path, path.read_text(encoding="utf-8")


def test_the_address_stands_in_the_configuration_and_is_the_same_everywhere():
    owner, name = ADDRESS.removeprefix("https://github.com/").split("/")
    found = []
    for path, text in texts():
        for other in re.findall(r"github\.com/([\w.-]+/gcvit-book)", text):
            assert other == f"{owner}/{name}", path
            found.append(path.name)
        for other in re.findall(r"([\w-]+)\.github\.io/([\w-]+)", text):
            assert other == (owner, name), path
        for other in re.findall(
            r"(?:colab\.research\.google\.com/github|mybinder\.org/v2/gh)/([\w.-]+/[\w.-]+)/", text
        ):
            assert other == f"{owner}/{name}", path
    assert {"README.md", "pyproject.toml", "CITATION.cff", NOTEBOOKS[0].name} <= set(found)


def test_every_notebook_begins_with_the_same_cell():
    first = {code_cells(path)[0].source for path in NOTEBOOKS}
    assert len(first) == 1
    cell = first.pop()
    assert f'%pip install --quiet "gcvit-book[chapters] @ git+{ADDRESS}"' in cell


def run_first_cell(monkeypatch, installed, colab, replaced=()):
    """Run the first cell on a host that is made up; return how often it called pip."""
    cell = code_cells(NOTEBOOKS[0])[0].source
    assert len(re.findall("%pip", cell)) == 1
    calls, versions = [], {"numpy": "2", "pip": "25"}

    def pip():
        calls.append("pip")
        versions.update(dict.fromkeys(replaced, "3"))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    owners = {"numpy": ["numpy"], "a_module_that_is_not_loaded": ["pip"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", object())
    exec(compile(re.sub("%pip .*", "pip()", cell), "cell", "exec"), {"pip": pip})
    return len(calls)


@pytest.mark.parametrize("colab", [False, True])
def test_the_first_cell_does_nothing_where_the_package_is(monkeypatch, colab):
    assert run_first_cell(monkeypatch, installed=True, colab=colab) == 0


def test_the_first_cell_installs_only_where_nothing_can_be_lost(monkeypatch):
    assert run_first_cell(monkeypatch, installed=False, colab=True) == 1
    with pytest.raises(ModuleNotFoundError, match=re.escape(sys.executable)):
        sys.modules.pop("google.colab")
        run_first_cell(monkeypatch, installed=False, colab=False)


def test_the_first_cell_asks_for_a_restart_only_when_it_must(monkeypatch):
    """That is when pip replaced a package that is loaded; another one does not matter."""
    assert run_first_cell(monkeypatch, installed=False, colab=True, replaced=["pip"]) == 1
    with pytest.raises(RuntimeError, match=r"Restart the runtime.*\['numpy'\] changed"):
        run_first_cell(monkeypatch, installed=False, colab=True, replaced=["numpy"])


def test_the_table_of_contents_lists_every_page():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"]] + [c["file"] for part in toc["parts"] for c in part["chapters"]]
    assert sorted(listed) == sorted(path.stem for path in PAGES)


def test_readme_lists_every_chapter():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"/blob/main/book/{path.name}" in readme, path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_reads_well_outside_the_book_too(path):
    """No MyST that Colab would show raw, and alt text and a caption for every figure."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"^(`{3,}|:{3,})\{|\{[a-z:]+\}`|^\([\w-]+\)=", cell.source, re.M)
            assert not re.search(r"!\[\s*\]\(", cell.source)
        elif "plt.show()" in cell.source or "figures.flow" in cell.source:
            drawn = cell.metadata.get("mystnb", {})
            solved = {"solution", "exercise"} & set(cell.metadata.get("tags", []))
            assert solved or drawn.get("image", {}).get("alt"), cell.source[:80]
            assert solved or drawn.get("figure", {}).get("caption"), cell.source[:80]


def test_citations_stand_in_the_bibliography():
    """A chapter cites by a link, [year](address); the bibliography has that work and year."""
    entries = (ROOT / "book" / "references.bib").read_text(encoding="utf-8").split("\n@")
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for year, url in re.findall(r"\[((?:19|20)\d\d)\]\((https?://[^)]+)\)", cell.source):
                assert any(url in entry and year in entry for entry in entries), (path.name, url)


def test_links_between_chapters_lead_somewhere():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([\w./-]+\.(?:ipynb|md))(?:#[\w-]*)?\)", text):
            assert (path.parent / target).is_file(), f"{path.name} links to {target}"


def test_keras_cv_is_imported_in_one_place():
    importing = []
    for path in (ROOT / "gcvit").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing += [path.name for name in names if name.startswith("keras_cv")]
    assert importing == ["block.py"]


def test_imports_run_one_way():
    """A module imports only from those before it, in the order of the chapters."""
    order = ["checks", "fetch", "presets", "images", "fast", "unit_blocks", "stem"]
    order += ["global_tokens", "attention", "block", "level", "readers", "weights"]
    order += ["pretrained", "model", "convert"]
    rooms = ["datasets", "pipeline", "training", "recipes", "classifier", "evaluation"]
    order += ["cost", *(f"fine_tuning.{room}" for room in rooms), "fine_tuning"]
    order += ["figures", "explain", "explorer", "laboratory", "book"]
    for path in (ROOT / "gcvit").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "gcvit").with_suffix("").parts)
        module = module.removesuffix(".__init__")
        if module in ("__init__", "__main__"):
            continue
        for name in re.findall(r"from gcvit\.([\w.]+) import", path.read_text(encoding="utf-8")):
            assert order.index(name) < order.index(module), f"{path.name} imports {name}"


def test_lock_names_no_address():
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    assert "http" not in lock and "--hash=sha256:" in lock
    assert not re.search(r"^torch==", lock, re.M)


def test_the_lock_lies_within_the_ranges():
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    for requirement in map(Requirement, wanted):
        pin = pins[re.sub(r"[._]", "-", requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement}: the lock has {pin}"


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_pinned_and_bounded(path):
    """Beyond what zizmor and actionlint see: every job ends, and states what it may do."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {} and workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 150 and job["permissions"], name
        for step in job["steps"]:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40))
            if "cache" in step.get("uses", "") or "cache" in step.get("with", {}):
                assert "requirements-lock.txt" in str(step["with"])


def test_hooks_mend_what_lint_checks():
    """pre-commit's hooks need nothing from elsewhere, and CI checks the same by make lint."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2]
    assert "make lint" in (ROOT / ".github" / "workflows" / "check.yml").read_text()
    checks = {
        ".venv/bin/python tools/book/notebooks.py format": "$(BIN)/python tools/book/notebooks.py check\n",
        ".venv/bin/ruff check --fix --force-exclude": "$(BIN)/ruff check .\n",
        ".venv/bin/ruff format --force-exclude": "$(BIN)/ruff format --check gcvit tests tools\n",
    }
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["entry"] for hook in hooks} == set(checks)
    for check in checks.values():
        assert check in recipe.partition("\n\n")[0]


def test_what_needs_a_network_has_a_marker_and_runs_weekly():
    weekly = (ROOT / ".github" / "workflows" / "weekly.yml").read_text(encoding="utf-8")
    assert "pytest -m network" in weekly
    marked = "pytestmark = pytest.mark.network" in (ROOT / "tests" / "test_network.py").read_text()
    assert marked


def test_jupyter_book_is_held_below_version_2():
    """Version 2 cannot read _config.yml."""
    dependabot = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())
    assert {"dependency-name": "jupyter-book", "versions": [">=2"]} in [
        rule for update in dependabot["updates"] for rule in update.get("ignore", [])
    ]
    assert re.search(r'"jupyter-book>=1[\d.a-z]*,<2"', (ROOT / "pyproject.toml").read_text())
    assert re.search(r"^jupyter-book==1\.", (ROOT / "requirements-lock.txt").read_text(), re.M)
