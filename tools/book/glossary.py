"""Link each glossary term where a chapter first uses it.

python tools/book/glossary.py link    # write the links
python tools/book/glossary.py check   # say which are missing; exit 1 if any
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from notebooks import BOOK, written

# Where a term is not read as prose: code, links, formulas, raw HTML, and headings.
SKIPPED = re.compile(
    r"```.*?```|`[^`]*`|!?\[[^\]]*\]\([^)]*\)|\$\$.*?\$\$|\$[^$\n]*\$|<[^>]+>|^(?:#+ |\|)[^\n]*$",
    re.S | re.M,
)


def slug(term):
    """Return the anchor of a heading, as MyST and GitHub make it."""
    return re.sub(r"[^\w-]", "", term.lower().replace(" ", "-"))


def terms():
    """Return {term: the forms it appears in}, longest form first."""
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        name = part.splitlines()[0]
        also = re.search(r"<!-- also: (.*?) -->", part)
        forms = [name, *(also[1].split(", ") if also else [])]
        found[name] = sorted(forms, key=len, reverse=True)
    return found


def pattern_of(forms):
    words = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in forms)
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.I)


def first_use(sources, forms):
    """Return (cell, start, end) of a term's first use in prose, or `None`.

    A longer term that contains this one, such as "attention head", is not a use of it.
    """
    longer = [f for other in terms().values() for f in other if any(len(f) > len(g) for g in forms)]
    longer = [f for f in longer if f not in forms and any(g.lower() in f.lower() for g in forms)]
    hidden = pattern_of(longer) if longer else None
    for number, source in enumerate(sources):
        blank = SKIPPED.sub(lambda m: " " * len(m[0]), source)
        if hidden is not None:
            blank = hidden.sub(lambda m: " " * len(m[0]), blank)
        match = pattern_of(forms).search(blank)
        if match:
            return number, match.start(), match.end()
    return None


def linked(sources, name):
    """Tell whether a term is linked somewhere, and where first (cell, place)."""
    target = f"](glossary.md#{slug(name)})"
    for number, source in enumerate(sources):
        if target in source:
            return number, source.index(target)
    return None


def missing(sources):
    """Yield (term, place) for each term whose first use is not linked."""
    for name, forms in terms().items():
        use, link = first_use(sources, forms), linked(sources, name)
        if use is not None and (link is None or link > use[:2]):
            yield name, use


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["link", "check"])
    action = parser.parse_args().action
    wrong = []
    for path in sorted(BOOK.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        for name, (cell, start, end) in list(missing([c.source for c in prose])):
            wrong.append((path.name, name))
            if action == "link":
                source = prose[cell].source
                # Other links of this round may have moved it: look again.
                found = first_use([source], terms()[name])
                if found is None:
                    continue
                _, start, end = found
                link = f"[{source[start:end]}](glossary.md#{slug(name)})"
                prose[cell].source = source[:start] + link + source[end:]
        if action == "link":
            Path(path).write_text(written(notebook), encoding="utf-8")
    if action == "check":
        for chapter, name in wrong:
            print(f"{chapter}: the first use of '{name}' is not linked to the glossary")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
