"""Run notebooks as Colab would: an empty folder, no clone, the first cell installs the package.

    python tools/book/colab_run.py                        # every chapter
    python tools/book/colab_run.py book/02-stem.ipynb

What is Colab's here: the module `google.colab` is loaded before the first cell; the packages
of the environment that runs this script are the host's, all but this one; no package of
theirs may be replaced; there is no accelerator. What is not: `pip install git+https://…`
runs as it is written, but git is told to find that address in a snapshot of this folder, and
pip to fetch nothing else, unless `--index` lets it.

`colab-YEAR-MONTH.txt` beside this file has the versions that Colab had when the chapters last
passed: `make test-colab` makes an environment of them. In any other, such as Colab's own image
of this week, the differences are named, because a failure is likely to be theirs.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from notebooks import what_failed

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/gcvit-book/gcvit-book"
NOT_SOURCE = shutil.ignore_patterns(".*", "_build", "build", "dist", "__pycache__", "*.egg-info")
OURS = ("gcvit", "__editable__")
(LAST_PASSED,) = Path(__file__).parent.glob("colab-*.txt")
TIMEOUT = 900
"""Seconds that a cell may take."""

WHERE = "import gcvit\nprint(gcvit.__file__)"


def run(*command, cwd):
    subprocess.run(list(map(str, command)), cwd=cwd, check=True, capture_output=True)


def snapshot(folder):
    """Put what stands in this folder into a git repository of its own; return its path."""
    path = folder / "snapshot"
    shutil.copytree(ROOT, path, ignore=NOT_SOURCE)
    run("git", "init", "--quiet", cwd=path)
    run("git", "config", "uploadpack.allowFilter", "true", cwd=path)
    run("git", "add", "--all", cwd=path)
    author = ("-c", "user.name=snapshot", "-c", "user.email=snapshot@localhost")
    run("git", *author, "commit", "--quiet", "--message=snapshot", cwd=path)
    return path


def host_packages(folder):
    """Link every package of this environment but this project's; return the folder."""
    path = folder / "host"
    path.mkdir()
    for site in dict.fromkeys((*sys.path, *map(sysconfig.get_path, ("purelib", "platlib")))):
        if Path(site).name not in ("site-packages", "dist-packages"):
            continue
        for entry in Path(site).iterdir():
            if not entry.name.startswith(OURS) and not (path / entry.name).exists():
                (path / entry.name).symlink_to(entry)
    return path


def colab_module(folder):
    """Write a `google.colab` that can be imported; return the folder it is in."""
    path = folder / "colab"
    (path / "google" / "colab").mkdir(parents=True)
    # JAX imports google.colab.output where it finds itself in Colab.
    for name in ("__init__", "output"):
        (path / "google" / "colab" / f"{name}.py").write_text("")
    return path


def new_runtime(folder, *packages):
    """Make an environment that finds packages elsewhere; return its Python and its own ones."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "host.pth").write_text("".join(f"{path}\n" for path in packages))
    return folder / "venv" / "bin" / "python", site


def environment(folder, source, index):
    """Return the variables of a runtime: its own home, no accelerator, the snapshot for GitHub."""
    passed_on = ("PATH", "LANG", "LC_ALL", "SSL_CERT_FILE", "PIP_INDEX_URL", "PIP_CONFIG_FILE")
    env = {n: os.environ[n] for n in (*passed_on, "GCVIT_RUN") if n in os.environ}
    env |= {
        "HOME": str(folder),
        "CUDA_VISIBLE_DEVICES": "-1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    if not index:
        # pip's own build environment would be fetched: the host's setuptools builds instead.
        env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    return env


def replaced_packages(site, host):
    """Return which packages of the host pip put another version beside."""

    def names(folder):
        infos = folder.glob("*.dist-info")
        return {info.name.split("-")[0].lower().replace(".", "_") for info in infos}

    return sorted(names(site) & names(host))


def version_differences(wanted, present):
    """Yield what stands in the place of each version that is not as wanted.

    Args:
        wanted: the text of a file of requirements, `name==version` a line, whose first line
            is "# Python" and a version to the second place.
        present: {normalized name: version} of what is there, "python" included.
    """
    pins = re.findall(r"^# (Python) (\S+)$|^([\w-]+)==(\S+)$", wanted, re.M)
    for python, release, name, version in pins:
        there = present.get((python or name).lower(), "none")
        if there != version and not (python and there.startswith(f"{release}.")):
            yield f"{python or name} {there} for {release or version}"


def host_versions():
    """Return {normalized name: version} of the packages of this environment, and of Python."""
    distributions = importlib.metadata.distributions()
    named = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in distributions}
    return {"python": platform.python_version(), **named}


def run_notebook(path, source, host, colab, index):
    """Run a notebook in a runtime made for it; return the seconds and what failed, if so."""
    with tempfile.TemporaryDirectory(prefix="colab-") as folder:
        folder = Path(folder)
        content = folder / "content"
        content.mkdir()
        python, site = new_runtime(folder, colab, host)
        manager = AsyncKernelManager()
        manager.kernel_spec.argv = [
            *(str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"),
            "--IPKernelApp.exec_lines=import google.colab",
        ]
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(WHERE))
        began = [None]
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=TIMEOUT,
            resources={"metadata": {"path": str(content)}},
            on_cell_execute=lambda cell, cell_index: began.append(cell_index),
        )
        start, log = time.time(), folder / "kernel.log"
        try:
            with open(log, "w") as out:
                client.execute(env=environment(folder, source, index), stdout=out, stderr=out)
        except Exception as error:  # a cell raised, took too long, or the kernel died
            failed = what_failed(notebook, began[-1], error)
            return time.time() - start, f"{failed}\nThe kernel's log:\n{log.read_text()[-2000:]}"
        seconds = time.time() - start
        where = notebook.cells[-1].outputs[0].text.strip()
        if not Path(where).is_relative_to(site):
            return seconds, f"the package came from {where}, not from what pip installed"
        if replaced := replaced_packages(site, host):
            return seconds, f"pip replaced packages of the host: {', '.join(replaced)}"
        return seconds, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="notebooks to run at once")
    parser.add_argument("--index", action="store_true", help="let pip fetch what the host lacks")
    arguments = parser.parse_args()
    notebooks = arguments.notebooks or sorted((ROOT / "book").glob("*.ipynb"))
    failures = 0
    with tempfile.TemporaryDirectory(prefix="colab-host-") as folder:
        folder = Path(folder)
        given = (snapshot(folder), host_packages(folder), colab_module(folder), arguments.index)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = pool.map(lambda path: run_notebook(path, *given), notebooks)
            for path, (seconds, failed) in zip(notebooks, results, strict=True):
                failures += failed is not None
                outcome = f"failed in {failed}" if failed else "passed"
                print(f"{path.name}: {outcome} ({seconds:.0f} s)", flush=True)
    differences = list(version_differences(LAST_PASSED.read_text("utf-8"), host_versions()))
    if differences:
        print(f"Other versions than {LAST_PASSED.name}: {', '.join(differences)}")
    else:
        print(f"The host's versions are those of {LAST_PASSED.name}.")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
