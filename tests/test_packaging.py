"""The package as readers get it: an sdist that builds, a wheel that works on its own."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_SOURCE = ignore_patterns(".*", "_build", "build", "dist", "__pycache__", "*.egg-info")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")


def python(*arguments, cwd, **env):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "book"
    copytree(ROOT, source, ignore=NOT_SOURCE)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    python("-c", build, cwd=source)
    (path,) = (source / "dist").glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that the sdist builds, with nothing else at hand."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    python("-m", "pip", "wheel", "--quiet", *OFFLINE, "-w", folder, source, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", "--quiet", *OFFLINE, "--target", site, wheel, cwd=site)
    return site


def test_sdist_holds_the_licenses_and_the_readme(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT"} <= names


def test_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "gcvit").rglob("*") if path.is_file())
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert names == expected


def test_its_name_is_not_that_of_another_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "gcvit-book"  # PyPI's gcvit is another one
    licenses = {Path(name).name for name in metadata.get_all("License-File")}
    assert licenses == {"LICENSE", "LICENSE-TEXT"}


def test_it_works_where_it_is_installed(installed):
    """The model that ships, and both ways to call the command, all in one process."""
    code = """
import importlib.metadata, runpy, sys, gcvit, keras, numpy as np
print(gcvit.__file__)
print(importlib.metadata.version("gcvit-book"))
model = gcvit.GCViT.from_preset("gcvit_nano")
print(keras.ops.convert_to_numpy(model(np.zeros((1, 128, 128, 3), "float32"))).sum())
command = sys.argv[1]
for run, name in ((runpy.run_module, "gcvit"), (runpy.run_path, command)):
    sys.argv = [command, "--help"]
    try:
        run(name, run_name="__main__")
    except SystemExit as ended:
        print("exit code", ended.code)
"""
    command = installed / "bin" / "gcvit"
    out = python("-c", code, command, cwd=installed, PYTHONPATH=str(installed)).splitlines()
    assert Path(out[0]).parent.parent == installed
    assert out[1] == PROJECT["version"]
    assert float(out[2]) == pytest.approx(1, abs=1e-5)  # probabilities
    assert sum(line.startswith("usage:") for line in out) == 2 and out.count("exit code 0") == 2
    assert os.access(command, os.X_OK)
