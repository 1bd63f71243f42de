"""Each letter of the chapters' formulas stands in book/notation.md, once."""

import re
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
CODE = re.compile(r"```.*?```|`[^`]*`", re.S)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$", re.S)
GREEK = "alpha|beta|gamma|delta|varepsilon|epsilon|theta|lambda|mu|sigma|tau|phi|Phi|psi|omega"
TOKEN = re.compile(
    rf"""
    _(?:\{{(?P<braced>[^}}]*)\}}|(?P<bare>\\text\{{[^}}]*\}}|\w))
    | (?P<prime>')
    | (?P<letter>\\(?:hat|tilde|bar)\{{?\w\}}?|\\(?:{GREEK})(?![A-Za-z]))
    | \\(?:mathrm|operatorname|text|tag|begin|end)\{{[^}}]*\}} | \\[A-Za-z]+  # words
    | (?P<plain>[A-Za-z])
    """,
    re.X,
)


def formulas(text):
    for display, inline in FORMULA.findall(CODE.sub("", text)):
        yield display or inline


def symbols(formula):
    """Return a formula's symbols, each a letter with its prime, and its subscript or ""."""
    found, last = [], None
    for token in TOKEN.finditer(formula):
        subscript = token["braced"] or token["bare"]
        letter = token["letter"] or token["plain"]
        if letter:
            last = [letter, ""]
            found.append(last)
        elif token["prime"] and last:
            last[0] += "'"
        elif subscript and last:
            last[1] = subscript
        elif subscript:  # of a word, such as a sum
            found += symbols(subscript)
        else:
            last = None
    return found


def strays(formula, listed):
    """Return what stands in a formula and not in the list.

    A symbol is listed with its subscript, or without; then its subscript is an index, whose
    letters must be listed too.
    """
    missing = []
    for letter, subscript in symbols(formula):
        if f"{letter}_{subscript}" not in listed:
            missing += [letter] * (letter not in listed) + strays(subscript, listed)
    return missing


def entries():
    """Yield the symbols of the first column of the table."""
    rows = re.findall(r"^\* - (.*)$", (BOOK / "notation.md").read_text(encoding="utf-8"), re.M)
    for formula in (formula for row in rows for formula in formulas(row)):
        ((letter, subscript),) = symbols(formula)
        yield f"{letter}_{subscript}" if subscript else letter


LISTED = list(entries())


def chapters_formulas(path):
    cells = nbformat.read(path, as_version=4).cells
    return [f for cell in cells if cell.cell_type == "markdown" for f in formulas(cell.source)]


CHAPTERS = {path.stem: chapters_formulas(path) for path in sorted(BOOK.glob("*.ipynb"))}


def test_each_symbol_is_listed_once_and_used():
    assert sorted(set(LISTED)) == sorted(LISTED)
    used = {f"{a}_{b}" for fs in CHAPTERS.values() for f in fs for a, b in symbols(f)}
    used |= {a for fs in CHAPTERS.values() for f in fs for a, _ in symbols(f)}
    used |= {a for name in used for a, _ in symbols(name.partition("_")[2])}
    assert set(LISTED) - used == set()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_letters_of_a_chapter_are_listed(chapter):
    found = {formula: strays(formula, LISTED) for formula in CHAPTERS[chapter]}
    assert {formula: letters for formula, letters in found.items() if letters} == {}


@pytest.mark.parametrize(
    "formula, unlisted",
    [
        (r"\frac{1}{n} \sum_i r_i", ["r"]),
        (r"\sigma(x)", [r"\sigma"]),
        (r"x_{2i+u}", ["u"]),
        (r"\hat{q}", [r"\hat{q}"]),
        (r"\sum_u x", ["u"]),
        (r"\text{share}_u", ["u"]),
        (r"\text{share}_i \operatorname{GELU}(x) \tag{1.1}", []),
        (r"n_h hwC^2 + x_{i+i'}", []),
    ],
)
def test_a_letter_that_is_not_listed_is_found(formula, unlisted):
    assert strays(formula, LISTED) == unlisted
