"""Build the book: drop stale results from the execution cache, then run Jupyter Book.

A chapter's result is stale when its code changes (Jupyter Book sees that itself), or when
what it imports from gcvit/, the installed versions or the data it finds change.
"""

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from jupyter_cache import get_cache
from notebooks import without_magics

ROOT = Path(__file__).resolve().parent.parent
BOOK, PACKAGE, BUILD = ROOT / "book", ROOT / "gcvit", ROOT / "_build"
CACHE, STATES = BUILD / ".jupyter_cache", BUILD / "chapter_states.json"
SETTINGS = ("GCVIT_RUN", "TFDS_DATA_DIR", "KERAS_BACKEND", "KERAS_HOME")


def imported_modules(code, exports):
    """Return the modules of gcvit that a piece of code imports, by file name."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gcvit":
            parts = node.module.split(".")
            names = parts[1:2] or [exports.get(alias.name, alias.name) for alias in node.names]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gcvit.")
            )
    return {name for name in found if (PACKAGE / f"{name}.py").is_file()}


def package_imports():
    """Return which modules each module of gcvit imports, and where each export stands."""
    init = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    exports = {
        alias.name: node.module.split(".")[1]
        for node in init.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    imports = {
        path.stem: imported_modules(path.read_text(encoding="utf-8"), exports)
        for path in PACKAGE.glob("*.py")
        if path.stem != "__init__"
    }
    return imports, exports


def closure(modules, imports):
    """Return modules with all that they import, directly or not."""
    found, queue = set(), list(modules)
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += imports[name]
    return found


def chapter_states():
    """Return a hash for each chapter of everything its results depend on but its own code."""
    imports, exports = package_imports()
    states = {}
    for path in sorted(BOOK.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(without_magics(c.source) for c in cells if c.cell_type == "code")
        modules = closure(imported_modules(code, exports), imports)
        files = [PACKAGE / f"{name}.py" for name in sorted(modules)]
        if "weights" in modules:
            files += sorted((PACKAGE / "checkpoints").glob("*"))
        files.append(ROOT / "requirements.lock")
        digest = hashlib.sha256(repr([os.environ.get(name) for name in SETTINGS]).encode())
        for file in files:
            digest.update(file.read_bytes())
        states[path.name] = digest.hexdigest()
    return states


def drop_stale(states):
    """Remove the cached results of chapters whose state is not the recorded one."""
    known = json.loads(STATES.read_text()) if STATES.is_file() else {}
    if CACHE.is_dir():
        cache = get_cache(str(CACHE))
        for record in cache.list_cache_records():
            name = Path(record.uri).name
            if states.get(name) != known.get(name):
                cache.remove_cache(record.pk)
                print(f"{name} will be executed again: what it depends on has changed.")
    BUILD.mkdir(exist_ok=True)
    STATES.write_text(json.dumps(states, indent=1))


def configuration(executed):
    """Return the path of the configuration, one that executes nothing if that is asked for."""
    path = ROOT / "_config.yml"
    if not executed:
        return path
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["execute"]["execute_notebooks"] = "off"
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "executed_config.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--executed", action="store_true", help="the notebooks hold their outputs: execute nothing"
    )
    executed = parser.parse_args().executed
    if not executed:
        drop_stale(chapter_states())
    command = [Path(sys.executable).with_name("jupyter-book"), "build", str(BOOK)]
    options = ["--path-output", str(ROOT), "--config", str(configuration(executed))]
    options += ["--toc", str(ROOT / "_toc.yml"), "--warningiserror", "--keep-going"]
    result = subprocess.run(command + options, check=False)
    if result.returncode:
        # A page that was not written anew must not pass for the new book.
        (BUILD / "html" / "index.html").unlink(missing_ok=True)
        sys.exit(result.returncode)
    print(f"The book is at {BUILD / 'html' / 'index.html'}. To read it: make serve")


if __name__ == "__main__":
    main()
