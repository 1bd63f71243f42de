"""The book is built from results that are new where what they depend on is."""

import shutil
import subprocess
import sys
from pathlib import Path

import build_book
import nbformat
import pytest

from gcvit import explorer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A package and a lock of no length, and where the results of chapters are kept."""
    for name in ("gcvit/fine_tuning/recipes.py", "gcvit/results/bench.json", "lock.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name, part in (
        ("ROOT", "."),
        ("PACKAGE", "gcvit"),
        ("LOCK", "lock.txt"),
        ("BUILD", "_build"),
        ("CACHE", "_build/.jupyter_cache"),
        ("STATE", "_build/state.txt"),
    ):
        monkeypatch.setattr(build_book, name, tmp_path / part)
    return tmp_path


def is_executed_again(book):
    """Tell whether the results at hand are dropped, with those of an unknown state first."""
    build_book.CACHE.mkdir(parents=True, exist_ok=True)
    build_book.drop_stale(build_book.state())
    return not build_book.CACHE.is_dir()


def test_chapters_are_executed_again_when_what_they_stand_on_changes(book, monkeypatch):
    assert is_executed_again(book)  # nobody knows what state these results are of
    assert not is_executed_again(book)
    for name in ("gcvit/fine_tuning/recipes.py", "gcvit/results/bench.json", "lock.txt"):
        (book / name).write_text("1")
        assert is_executed_again(book), name
        assert not is_executed_again(book), name
    (book / "gcvit/level.py").write_text("")
    assert is_executed_again(book)
    monkeypatch.setenv("GCVIT_RUN", "another")
    assert is_executed_again(book)
    (book / "gcvit" / "__pycache__").mkdir()
    (book / "gcvit" / "__pycache__" / "level.pyc").write_text("compiled")
    (book / "README.md").write_text("other words")
    assert not is_executed_again(book)


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


def test_the_pages_find_the_checkpoint_beside_them(book):
    (book / "gcvit" / "checkpoints").mkdir()
    (book / "gcvit" / "checkpoints" / "nano.safetensors").write_bytes(b"\x00weights")
    (book / "html").mkdir()
    build_book.share_checkpoints(book / "html")
    shared = book / "html" / explorer.checkpoint_address("nano.safetensors")
    assert '["nano.safetensors"]="AHdlaWdodHM=";' in shared.read_text()


def test_the_opening_page_runs_the_model_in_small(book):
    source = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    place = build_book.PLACE_OF_MODEL.search(source)[0]
    (book / "html").mkdir()
    index = book / "html" / "index.html"
    index.write_text(f"<p>before</p>{place}<p>after</p>", encoding="utf-8")
    build_book.show_model(book / "html")
    text = index.read_text(encoding="utf-8")
    assert text.startswith("<p>before</p>") and text.endswith("<p>after</p>")
    assert text.count('class="gcvit-page"') == 1 and 'href="10-explorer.html"' in text
    build_book.show_model(book / "html")  # the page is not written anew by each build
    assert index.read_text(encoding="utf-8") == text
    index.write_text("no place", encoding="utf-8")
    with pytest.raises(ValueError, match="index.html has 0 places for the model, not one"):
        build_book.show_model(book / "html")


def test_an_error_names_the_chapter_and_the_cell(tmp_path):
    result = project(tmp_path, good="1 / 1", bad="1 / x", dead="import os\nos.kill(os.getpid(), 9)")
    assert result.returncode == 1
    assert "good.ipynb executed in" in result.stdout
    assert "book/bad.ipynb failed in code cell 2" in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "book/dead.ipynb failed in code cell 2" in result.stderr
    assert "Kernel died" in result.stderr
    assert not (tmp_path / "_build" / "html" / "index.html").exists()
