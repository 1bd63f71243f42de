"""The messages on the troubleshooting page are those that the code gives."""

import ast
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book" / "troubleshooting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S)
QUOTED = [line for block in BLOCKS for line in block.replace("\n  ", " ").splitlines()]


def code():
    """Yield the source of all that a reader meets: package, tools, first cell, Makefile."""
    for folder in ("gcvit", "tools"):
        for path in (ROOT / folder).glob("**/*.py"):
            yield path.read_text(encoding="utf-8")
    notebook = nbformat.read(sorted((ROOT / "book").glob("*.ipynb"))[0], as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    yield re.sub("%pip .*", "pass", first.source)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    version = re.search(r"-c '(import sys; .*)'", makefile)[1]
    yield version.replace("$(PYTHON)", "{0}")  # make puts the name in
    yield "\n".join(map(repr, re.findall(r'echo "([^"]*)"', makefile)))


def pattern(node):
    """Return what a string, or an f-string with anything in its places, can read."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            ".*" if isinstance(part, ast.FormattedValue) else pattern(part) for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left) + pattern(node.right)
    return ".*"


def messages():
    """Return (exception's name or `None`, pattern) of each text in the code."""
    found = set()
    for source in code():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                found.add((name, pattern(node.exc.args[0])))
            elif isinstance(node, ast.Constant | ast.JoinedStr):
                found.add((None, pattern(node)))
    # A pattern of next to nothing but places would match anything.
    return [(name, text) for name, text in found if len(text.replace(".*", "")) >= 12]


def test_every_message_on_the_page_is_one_of_the_code():
    known = messages()
    for line in QUOTED:
        name, text = re.match(r"(?:(\w+Error): )?(.*)", line).groups()
        assert any(raised == name and re.fullmatch(template, text) for raised, template in known), (
            line
        )
    assert len(QUOTED) > 15


PEOPLE_MEET = {
    "gcvit/pretrained.py": ("ValueError", "readers.CheckpointError"),
    "gcvit/fine_tuning/training.py": ("BackupError", "DivergenceError"),
    "gcvit/fine_tuning/datasets.py": ("DatasetError",),
}
"""Where the exceptions come from that ordinary use leads to, and their names there."""

SAY_ALL_THEMSELVES = ("Windows can only be scaled", "Unknown .*: ", "There is no file or folder")
SAY_ALL_THEMSELVES += (".* holds no photographs.", "Build the model", "The model is quantized")
"""How the messages begin that need no page."""


def test_the_messages_that_people_meet_are_on_the_page():
    texts = [re.match(r"(?:\w+Error: )?(.*)", line)[1] for line in QUOTED]
    beginnings = tuple(pattern(ast.Constant(text)) for text in SAY_ALL_THEMSELVES)
    beginnings = tuple(text.replace(r"\.\*", ".*") for text in beginnings)
    for path, names in PEOPLE_MEET.items():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            template = pattern(node.exc.args[0]) if node.exc.args else ""
            if ast.unparse(node.exc.func) in names and not template.startswith(beginnings):
                assert any(re.fullmatch(template, text) for text in texts), template


def test_a_message_that_the_code_does_not_give_is_found_out():
    known = messages()
    for text in (
        "GCVIT_RUN must be quick or full; got 'fast'.",
        "There is no book: run make book.",
    ):
        assert not any(re.fullmatch(template, text) for _, template in known)
