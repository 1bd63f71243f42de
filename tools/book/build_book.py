"""Build the book: execute the chapters whose results are stale, run Jupyter Book, check the pages.

A chapter's result is stale when its code changes, or when the package, the lock or a setting
does. Results are kept in jupyter-cache, where Jupyter Book looks for them. Jupyter Book would
fill that cache one chapter after the other; here as many chapters run at once as there are
processor cores.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
import yaml
from check_html import MADE_BY_SPHINX, project_faults, table_of_contents
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from kernels import talk_through_files
from notebooks import tidied, what_failed, written

ROOT = Path(__file__).resolve().parents[2]
BOOK, PACKAGE, BUILD = ROOT / "book", ROOT / "gcvit", ROOT / "_build"
CACHE, STATE = BUILD / ".jupyter_cache", BUILD / "state.txt"
LOCK = ROOT / "requirements-lock.txt"
DOCTREES = BUILD / ".doctrees"
KERNEL_LOG = BUILD / "kernels.log"
PLACE_OF_MODEL = re.compile("(<!-- model -->).*(<!-- end of model -->)", re.S)
"""Where the opening page runs the model: two comments, and what an earlier build put there."""

CONFIG, TOC, HTML = ROOT / "_config.yml", ROOT / "_toc.yml", BUILD / "html"
SETTINGS = ("GCVIT_RUN", "TFDS_DATA_DIR", "KERAS_BACKEND", "KERAS_HOME")


def state():
    """Return a hash of everything that the chapters' results depend on but their own code."""
    digest = hashlib.sha256(repr([os.environ.get(name) for name in SETTINGS]).encode())
    for path in [LOCK, *sorted(PACKAGE.rglob("*"))]:
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def drop_stale(state):
    """Remove the cached results of another state."""
    if CACHE.is_dir() and (not STATE.is_file() or STATE.read_text() != state):
        shutil.rmtree(CACHE)
        print("The package, the lock or a setting has changed: every chapter is executed again.")
    BUILD.mkdir(exist_ok=True)
    STATE.write_text(state)


def stated_seconds(notebook):
    """Return how long a chapter says that it runs; one that does not say is taken for long."""
    stated = re.search(r"It runs in\D*(\d+) (s|min)", notebook.cells[0].source)
    return int(stated[1]) * (60 if stated[2] == "min" else 1) if stated else float("inf")


def prepare_kernels(threads):
    """Send what kernels write to the terminal to a file; keep their ports and threads apart.

    Args:
        threads: how many TensorFlow may split one operation over. With as many as there are
            cores for each of the kernels that run side by side, operations wait for each other.
    """
    os.dup2(os.open(KERNEL_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
    talk_through_files()


def execute(path, timeout):
    """Execute a chapter in its folder; return it, the seconds it took and what failed, if so."""
    notebook, began = nbformat.read(path, as_version=4), [None]

    def note(cell, cell_index):
        began.append(cell_index)

    try:
        result = single_nb_execution(
            notebook, str(path.parent), timeout, allow_errors=False, on_cell_execute=note
        )
    except Exception as error:  # the kernel died, or never began
        reason = what_failed(notebook, began[-1], error)
        return notebook, 0, f"{reason}\nIts last words are in {KERNEL_LOG}."
    failed = result.err and what_failed(notebook, began[-1], result.err)
    return notebook, result.time, failed


def fill_cache(timeout):
    """Execute the chapters that the cache does not hold, the longest first.

    Returns:
        What failed, a text for each chapter.
    """
    cache = get_cache(str(CACHE))
    missing = {}
    for path in sorted(BOOK.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        try:
            cache.match_cache_notebook(notebook)
        except KeyError:
            missing[path] = stated_seconds(notebook)
    if not missing:
        return []
    failures = []
    KERNEL_LOG.unlink(missing_ok=True)
    cores = os.cpu_count() or 1
    workers = min(len(missing), cores)
    share = cores // workers
    with ProcessPoolExecutor(workers, initializer=prepare_kernels, initargs=(share,)) as pool:
        ordered = sorted(missing, key=missing.get, reverse=True)
        running = {pool.submit(execute, path, timeout): path for path in ordered}
        for future in as_completed(running):
            path = running[future]
            notebook, seconds, failed = future.result()
            if failed:
                failures.append(f"{path.relative_to(ROOT)} failed in {failed}")
                continue
            print(f"{path.name} executed in {seconds:.0f} s", flush=True)
            bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
            # Sphinx reads a page again when its source changes, but not when its results do.
            (DOCTREES / f"{path.stem}.doctree").unlink(missing_ok=True)
    return failures


def configuration(executed):
    """Return the path of the configuration, one that executes nothing if that is asked for."""
    if not executed:
        return CONFIG
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["execute"]["execute_notebooks"] = "off"
    # Jupyter Book looks for them from where the configuration lies.
    extensions = config["sphinx"]["local_extensions"]
    config["sphinx"]["local_extensions"] = {n: str(ROOT / path) for n, path in extensions.items()}
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "executed_config.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def drop_leftovers():
    """Remove the pages and images of earlier builds, and other files that no page leads to."""
    pages = MADE_BY_SPHINX | set(table_of_contents(TOC))
    for path in HTML.glob("*.html"):
        if path.stem not in pages:
            path.unlink()
    shown = "".join(path.read_text(encoding="utf-8") for path in HTML.glob("*.html"))
    for path in (HTML / "_images").glob("*"):
        if path.name not in shown:
            path.unlink()
    for path in (HTML / "_static").rglob("*.map"):  # for those who debug the theme
        path.unlink()


def share_checkpoints(html):
    """Write the checkpoints that a page loads when a reader asks for the model, one for all."""
    from gcvit import explorer  # takes seconds, which --links need not wait for

    for path in (PACKAGE / "checkpoints").glob("*.safetensors"):
        shared = html / explorer.checkpoint_address(path)
        shared.parent.mkdir(exist_ok=True)
        shared.write_text(explorer.checkpoint_script(path), encoding="ascii")


def show_model(html):
    """Let the opening page run the model, in small.

    Raises:
        ValueError: if the page has no place for it.
    """
    from gcvit import PRESETS, explain, explorer
    from gcvit.weights import PACKAGED

    preset = PRESETS["gcvit_nano"]
    path = PACKAGED / next(iter(preset["weights"].values()))["file"]
    piece = explorer.run_here(
        path,
        {"cat": explain.photograph(256)},
        preset["image_size"],
        explorer.checkpoint_address(path),
        small=True,
    )
    index = html / "index.html"
    text, places = PLACE_OF_MODEL.subn(
        lambda place: place[1] + piece + place[2], index.read_text(encoding="utf-8")
    )
    if places != 1:
        raise ValueError(f"{index} has {places} places for the model, not one.")
    index.write_text(text, encoding="utf-8")


def fail(message):
    """End, and let no page of an earlier build pass for the new book."""
    (HTML / "index.html").unlink(missing_ok=True)
    # A warning is said when a page is read: without this the next run would not read it.
    shutil.rmtree(DOCTREES, ignore_errors=True)
    sys.exit(message)


def drop_outputs():
    """Take the outputs out of the notebooks that readers download: the page has them."""
    for path in (HTML / "_sources").glob("*.ipynb"):
        path.write_text(written(tidied(nbformat.read(path, as_version=4))), encoding="utf-8")


def jupyter_book(config, into, *options):
    """Run Jupyter Book; return whether it ended well."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", str(BOOK)]
    command += ["--path-output", str(into), "--config", str(config), "--toc", str(TOC), *options]
    return subprocess.run(command, check=False).returncode == 0


def main():
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--executed", action="store_true", help="the notebooks hold their outputs: execute nothing"
    )
    way.add_argument(
        "--links", action="store_true", help="build nothing; ask the addresses whether they answer"
    )
    chosen = parser.parse_args()
    config = configuration(chosen.executed or chosen.links)
    if chosen.links:
        answered = jupyter_book(config, BUILD / "links", "--builder", "linkcheck")
        sys.exit(None if answered else "Some addresses do not answer: see above.")
    if not chosen.executed:
        drop_stale(state())
        timeout = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["execute"]["timeout"]
        if failures := fill_cache(timeout):
            fail("\n\n".join(failures))
    if not jupyter_book(config, ROOT, "--warningiserror", "--keep-going"):
        fail("The book was not built: see the warnings above.")
    if chosen.executed:
        drop_outputs()
    drop_leftovers()
    share_checkpoints(HTML)
    show_model(HTML)
    if faults := project_faults(HTML):
        fail("\n".join(["The book was built, but some pages have problems:", *faults]))
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"The book is at {HTML / 'index.html'}, after {minutes} min {seconds} s.")
    print("To read it: make serve")


if __name__ == "__main__":
    main()
