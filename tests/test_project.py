"""What the project says of itself in several places is said alike."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from notebooks import WIDTH, too_wide, without_magics
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
    for pattern in (*patterns, "gcvit/**/*.py", "tools/**/*.py"):
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
    assert f'repository = "git+{ADDRESS}"' in cell
    assert '%pip install --quiet "gcvit-book[chapters] @ {repository}"' in cell


def test_no_shown_line_is_cut_off():
    for path in NOTEBOOKS:
        assert list(too_wide(nbformat.read(path, as_version=4))) == [], path.name
    wide = nbformat.v4.new_code_cell("#" * (WIDTH + 1), id="wide")
    assert [name for name, _ in too_wide(nbformat.v4.new_notebook(cells=[wide]))] == ["wide"]


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
            chapter = path.stem.partition("-")[0]
            name = drawn.get("figure", {}).get("name", f"fig-{chapter}-")
            assert name.startswith(f"fig-{chapter}-"), name


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


def module_of(path):
    """Return the name that a file is imported by: "gcvit.fast", whether a module or a package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "gcvit").rglob("*.py"))
}
ROOMS = ["checks", "fetch", "presets", "images", "fast", "unit_blocks", "stem", "global_tokens"]
ROOMS += ["attention", "block", "level", "readers", "weights", "pretrained", "model", "convert"]
ROOMS += ["cost", "fine_tuning", "figures", "explain", "explorer", "laboratory", "book"]
"""The modules and packages of gcvit, in the order of the chapters."""


def imports(tree):
    """Yield the module of each import, wherever it stands; a module that is imported by name too.

    `from gcvit import stem` is an import of gcvit.stem, `from gcvit import GCViT` one of gcvit.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def imports_between(modules):
    """Return {module: the modules of the package that it imports}."""
    return {
        name: {module for module in imports(tree) if module.split(".")[0] == "gcvit"} - {name}
        for name, tree in modules.items()
    }


def wrong_ways(between):
    """Yield each import from a room to one that comes after it, or to the package's entrance."""
    for name, wanted in between.items():
        if name in ("gcvit", "gcvit.__main__"):
            continue
        place = ROOMS.index(name.split(".")[1])
        for module in wanted:
            if module == "gcvit":
                yield f"{name} imports from gcvit, which imports it; name the module"
            elif ROOMS.index(module.split(".")[1]) > place:
                yield f"{name} imports {module}"


def test_imports_run_one_way():
    between = imports_between(MODULES)
    assert list(wrong_ways(between)) == []
    list(graphlib.TopologicalSorter(between).static_order())  # raises on a circle in a package


@pytest.mark.parametrize(
    "name, code, fault",
    [
        ("gcvit.stem", "from gcvit import level", "gcvit.stem imports gcvit.level"),
        ("gcvit.stem", "from gcvit.level import Level", "gcvit.stem imports gcvit.level"),
        ("gcvit.stem", "import gcvit.level", "gcvit.stem imports gcvit.level"),
        ("gcvit.stem", "def f():\n    from gcvit import level", "gcvit.stem imports gcvit.level"),
        ("gcvit.fast.jax", "from gcvit import stem", "gcvit.fast.jax imports gcvit.stem"),
        ("gcvit.stem", "from gcvit import GCViT", "gcvit.stem imports from gcvit"),
    ],
)
def test_an_import_against_the_order_is_found(name, code, fault):
    (line,) = wrong_ways(imports_between({name: ast.parse(code)}))
    assert line.startswith(fault)


def test_keras_cv_is_imported_in_one_place():
    importing = [n for n, t in MODULES.items() for m in imports(t) if m.startswith("keras_cv")]
    assert importing == ["gcvit.block"]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
UNLOCKED = {"torch", "timm", "onnx", "onnxscript", "onnxruntime", "google", "gcvit-book"}
"""What is not in the lock: PyTorch and its friends, and Colab's own."""


def asked_for(*extras):
    """Return the names of the distributions that the package and its extras declare."""
    wanted, names = list(PROJECT["dependencies"]), set()
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        names.add(re.sub(r"[-._]+", "-", requirement.name).lower())
        if requirement.name == PROJECT["name"]:
            names |= asked_for(*requirement.extras)
    return names


def undeclared(trees, names):
    """Return the modules that are imported and that no distribution of `names` brings."""
    brought = importlib.metadata.packages_distributions()
    modules = {module.split(".")[0] for tree in trees for module in imports(tree)}
    modules -= {*sys.stdlib_module_names, "gcvit"}
    modules -= {path.stem for path in (*ROOT.glob("tools/*/*.py"), *ROOT.glob("tests/*.py"))}
    return {
        module
        for module in modules
        if names.isdisjoint(
            re.sub(r"[-._]+", "-", d).lower() for d in brought.get(module, [module])
        )
    }


def test_what_is_imported_is_declared():
    names = asked_for("chapters") | UNLOCKED
    assert undeclared(MODULES.values(), names | {"jax"}) == set()
    cells = [c for path in NOTEBOOKS for c in code_cells(path)]
    chapters = [ast.parse(without_magics(cell.source)) for cell in cells]
    assert undeclared(chapters, names | {"jax"}) == set()
    paths = (*ROOT.glob("tools/**/*.py"), *ROOT.glob("tests/*.py"))
    code = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    assert undeclared(code, asked_for("test") | UNLOCKED) == set()
    assert undeclared([ast.parse("import h5py, yaml")], asked_for()) == {"yaml"}


def test_the_package_alone_brings_what_the_model_needs_and_no_backend():
    rooms = ROOMS[: ROOMS.index("convert")]
    trees = [
        MODULES[name] for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in rooms
    ]
    backends = {"tensorflow", "jax", "torch"}
    assert undeclared(trees, asked_for() | backends) == set()
    assert asked_for().isdisjoint(backends)


def test_lock_names_no_address():
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    assert "http" not in lock and "--hash=sha256:" in lock
    assert not re.search(r"^torch==", lock, re.M)


def test_the_lock_lies_within_the_ranges():
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.M))
    wanted = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:  # an extra that another one takes in
            continue
        pin = pins[re.sub(r"[._]", "-", requirement.name).lower()]
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


def test_hooks_run_what_is_in_the_environment():
    """Nothing is fetched from elsewhere, and each command is there, with what it is given."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks and {repo["repo"] for repo in config["repos"]} == {"local"}
    for hook in hooks:
        program, *arguments = hook["entry"].split()
        assert shutil.which(Path(program).name, path=Path(sys.executable).parent), hook["entry"]
        assert all((ROOT / word).is_file() for word in arguments if word.endswith(".py")), hook


def test_jupyter_book_is_held_below_version_2():
    """Version 2 cannot read _config.yml."""
    dependabot = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())
    assert {"dependency-name": "jupyter-book", "versions": [">=2"]} in [
        rule for update in dependabot["updates"] for rule in update.get("ignore", [])
    ]
    (wanted,) = (
        requirement
        for requirement in map(Requirement, PROJECT["optional-dependencies"]["book"])
        if requirement.name == "jupyter-book"
    )
    assert wanted.specifier.contains("1.0.4.post1") and not wanted.specifier.contains("2.0")
