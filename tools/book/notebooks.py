"""Keep the chapter notebooks reviewable: no outputs, one format, stable cell ids.

    python tools/book/notebooks.py format   # rewrite what is not
    python tools/book/notebooks.py check    # say what is not; exit 1 if anything

A cell keeps its id for ever; a cell without one gets one. Lines that ruff cannot break to WIDTH
fail both.
"""

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat

BOOK = Path(__file__).resolve().parents[2] / "book"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_METADATA = ("tags", "mystnb")
WIDTH = 79  # a chapter's page cuts off longer lines


def is_magic(line):
    """Tell whether a line of a code cell is for IPython only."""
    return line.lstrip().startswith(("%", "!"))


def without_magics(source):
    """Return the Python of a code cell: `pass` stands in for each line of magic."""
    return "\n".join(
        line.replace(line.lstrip(), "pass") if is_magic(line) else line
        for line in source.splitlines()
    )


def tidy_code(source):
    """Format code with ruff, except for cells with magics, which are not Python."""
    if any(map(is_magic, source.splitlines())):
        return source.strip()
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--line-length", str(WIDTH), "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise ValueError(f"ruff cannot format this cell:\n{source}\n{result.stderr}")
    return result.stdout.strip()


def tidied(notebook):
    """Return the notebook as it should be committed."""
    seen = set()
    for cell in notebook.cells:
        cell.metadata = {k: cell.metadata[k] for k in KEPT_METADATA if k in cell.metadata}
        if cell.cell_type == "code":
            cell.source = tidy_code(cell.source)
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = cell.source.strip()
        name = cell.get("id")
        if not name or name in seen:
            name = hashlib.sha256(f"{len(seen)}{cell.source}".encode()).hexdigest()[:8]
            cell["id"] = name
        seen.add(name)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def too_wide(notebook):
    """Yield the id and text of each code line over WIDTH: ruff breaks no string and no comment."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for line in cell.source.splitlines():
                if len(line) > WIDTH:
                    yield cell.id, line


def written(notebook):
    """Return the text of a notebook's file."""
    return nbformat.writes(notebook, indent=1).rstrip() + "\n"


def what_failed(notebook, at, error):
    """Name the cell that ended a chapter, by its place among all its cells, and say why."""
    where = "its kernel's start"
    if at is not None:
        number = sum(cell.cell_type == "code" for cell in notebook.cells[: at + 1])
        where = f"code cell {number} (id {notebook.cells[at].get('id')})"
    reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{where}:\n{reason}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["format", "check"])
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    wrong, wide = [], 0
    for path in arguments.files or sorted(BOOK.glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        notebook = tidied(nbformat.reads(before, as_version=4))
        after = written(notebook)
        if before != after:
            wrong.append(path)
            if arguments.action == "format":
                path.write_text(after, encoding="utf-8")
        for name, line in too_wide(notebook):
            wide += 1
            print(f"{path}, cell {name}: {len(line)} characters, at most {WIDTH}: {line.strip()}")
    for path in wrong:
        print(f"{path}: {'formatted' if arguments.action == 'format' else 'needs formatting'}")
    sys.exit(bool(wide or (wrong and arguments.action == "check")))


if __name__ == "__main__":
    main()
