"""Open the built pages and say what is wrong with them.

    python tools/book/check_html.py _build/html

A build may end well although a page is broken: a chapter that was not executed, an image
that was not copied, a directive that no one understood. `faults` finds what a reader would.
"""

import argparse
import posixpath
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
HEAVIEST_PAGE = 1_500_000
"""Bytes of a page with its own images, without what all pages share."""
HEAVIEST_BOOK = 25_000_000
"""Bytes of all that is published."""

FEWEST_QUESTIONS = 12
"""Questions with choices from which on their answers may not be guessed by their place."""

MADE_BY_SPHINX = {"genindex", "search"}
TAKEN_ALONG = {"gcvit-book.epub", "gcvit-book.pdf"}
"""Files that make epub and make pdf make of the pages, and publish.yml puts beside them."""

LOG_LINE = re.compile(
    r"^(?:[IWEF]\d{4} \d\d:\d\d|WARNING\b|(?:ERROR|INFO|DEBUG):"
    r"|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.,]\d+|\[IPKernelApp\])"
    r"|\b[A-Z]\w*Warning: |\babsl::|XLA service",
    re.M,
)
RAW_MARKDOWN = re.compile(
    r":::|`{3}|^\.\. [\w-]+::|\{[a-z][\w:-]*\}$|\{[a-z][\w:-]*\}`|\]\(|\$\$", re.M
)
ELSEWHERE = re.compile(r"\s*(?:[a-z]+:)?[/\\]{2}", re.I)
CSS_STRING = re.compile(r"""url\(\s*([^"'\s)][^)]*)|"([^"]*)"|'([^']*)'""", re.I)
SCRIPT_ADDRESS = re.compile(
    r"""(?:\b(?:import|from|fetch|importScripts|Worker|EventSource|WebSocket|sendBeacon)\b\s*\(?"""
    r"""|\.(?:src|href)\s*=|["'](?:src|href)["']\s*,)\s*["'`]([^"'`]*)"""
)
SCRIPT_TYPES = {"", "module", "text/javascript", "application/javascript"}
NAMES_ONLY = {"canonical", "author", "license", "next", "prev", "index", "search", "alternate"}
"""Relations of a link whose address the browser does not ask for."""

NOT_PROSE = "pre, code, script, style, .math, svg, textarea, template"


class Page:
    """A built page, parsed, and the local files that it shows."""

    def __init__(self, path):
        self.name = path.name
        self.size = path.stat().st_size
        self.soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        self.article = self.soup.find("article") or self.soup
        self.ids = {tag["id"] for tag in self.soup.find_all(id=True)}
        self.ids |= {tag["name"] for tag in self.soup.find_all("a", attrs={"name": True})}


def local(reference):
    """Return the path and the fragment of a reference inside the book, or nothing."""
    parts = urlsplit(reference)
    if parts.scheme or parts.netloc:
        return None
    return unquote(parts.path), unquote(parts.fragment)


def images_of(page):
    """Yield the references of the images and other media that a page shows."""
    for tag in page.soup.find_all(["img", "source", "video", "audio", "embed", "iframe"]):
        if tag.get("src"):
            yield tag["src"]
    for tag in page.soup.find_all("object", data=True):
        yield tag["data"]


def table_of_contents(path):
    """Return the names of the pages that a `_toc.yml` lists, in order."""
    toc = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    groups = toc.get("parts", [toc])
    return [toc["root"], *(c["file"] for part in groups for c in part["chapters"])]


def chapter_list_faults(pages, listed):
    """Compare the pages, and what each shows at its side, with the table of contents."""
    for name in listed:
        if name not in pages:
            yield f"{name}.html", "is in _toc.yml and was not built"
    for name in sorted(set(pages) - set(listed) - MADE_BY_SPHINX):
        yield f"{name}.html", "was built and is not in _toc.yml"
    for name in set(listed) & set(pages):
        shown = [
            name if a["href"] == "#" else a["href"].removesuffix(".html")
            for a in pages[name].soup.select("nav.bd-links a.reference.internal")
        ]
        if shown != listed:
            yield f"{name}.html", f"lists the chapters {shown}; _toc.yml has {listed}"


def execution_faults(page, source):
    """Compare a chapter's page with its notebook."""
    if not page.article.select(".cell_output"):
        yield "has no executed output"
    for cell in nbformat.read(source, as_version=4).cells:
        figure = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        if figure and figure not in page.ids:
            yield f"lacks the figure {figure}"


def output_faults(page):
    """Look for tracebacks and log lines in what cells printed."""
    for output in page.article.select(".cell_output"):
        text = output.get_text()
        if output.select_one(".traceback") or "Traceback (most recent call last)" in text:
            yield f"shows a traceback: {text.strip().splitlines()[-1][:100]!r}"
        if output.select_one(".stderr"):
            yield f"shows what a cell wrote to stderr: {text.strip()[:100]!r}"
        for line in text.splitlines():
            if LOG_LINE.search(line):
                yield f"shows a log line: {line.strip()[:100]!r}"


def raw_markdown_faults(page):
    """Look for directives and roles that were not understood, in the text around the code."""
    for piece in page.article.find_all(string=True):
        raw = RAW_MARKDOWN.search(piece)
        if raw and not any(parent.css.match(NOT_PROSE) for parent in piece.parents):
            # A role shows as {name} right before the code that was its content.
            if raw[0].endswith("}") and getattr(piece.next_sibling, "name", None) != "code":
                continue
            yield f"shows raw Markdown: {' '.join(piece.split())[:100]!r}"


def image_faults(page, html):
    for reference in images_of(page):
        target = local(reference)
        if target and not (html / target[0]).is_file():
            yield f"lacks the image {reference}"
    for image in page.soup.find_all("img"):
        alt = (image.get("alt") or "").strip()
        source = image.get("src", "")
        # Sphinx writes the file's name where an image has no text.
        if not alt or alt == source or alt == posixpath.basename(source):
            yield f"has an image without alt text: {source[:100]}"
    for drawing in page.article.find_all("svg"):
        named = drawing.get("aria-label") or drawing.get("aria-labeledby") or drawing.find("title")
        if not named and drawing.get("aria-hidden") != "true":
            yield "has a drawing (svg) without a title or an aria-label"


def loaded_by_css(text):
    """Yield the strings of a style sheet, addresses among them: `url()` is not all that loads."""
    for strings in CSS_STRING.findall(re.sub(r"/\*.*?\*/", "", text, flags=re.S)):
        yield "".join(strings)


def loaded_by_tag(tag):
    """Yield the addresses that one tag makes the browser ask for, whatever the reader does."""
    for name in ("src", "poster", "background"):
        yield tag.get(name)
    for name in ("srcset", "imagesrcset"):
        yield from (part.split()[0] for part in tag.get(name, "").split(",") if part.strip())
    if tag.name == "object":
        yield tag.get("data")
    names_only = tag.name == "link" and set(tag.get("rel", ())) <= NAMES_ONLY
    if tag.name not in ("a", "area") and not names_only:
        yield tag.get("href")
        yield tag.get("xlink:href")
    if tag.name == "meta" and tag.get("http-equiv", "").lower() == "refresh":
        yield tag.get("content", "").partition("=")[2].strip(" '\"")


def loaded(soup):
    """Yield the addresses that a page makes the browser ask for, as far as its text tells."""
    for tag in soup.find_all(True):
        yield from loaded_by_tag(tag)
        yield from loaded_by_css(tag.get("style", ""))
        if tag.name == "style":
            yield from loaded_by_css(tag.text)
        elif tag.name == "script" and tag.get("type", "") in SCRIPT_TYPES:
            yield from SCRIPT_ADDRESS.findall(tag.text)
        elif tag.name == "script" and tag["type"] == "importmap":
            yield from re.findall('"([^"]*)"', tag.text)
        if tag.get("srcdoc"):
            yield from loaded(BeautifulSoup(tag["srcdoc"], "html.parser"))


def elsewhere_faults(page):
    """Look for what is loaded from other places: without a network it would be missing."""
    for reference in loaded(page.soup):
        if reference and ELSEWHERE.match(reference):
            yield f"loads {reference.strip()[:100]} from elsewhere"


def shared_file_faults(html):
    """Look for the same in the style sheets and the scripts."""
    for pattern, addresses in (("*.css", loaded_by_css), ("*.js", SCRIPT_ADDRESS.findall)):
        for path in sorted(html.rglob(pattern)):
            for reference in addresses(path.read_text(encoding="utf-8")):
                if ELSEWHERE.match(reference):
                    yield f"{path.relative_to(html)} loads {reference[:100]} from elsewhere"


def header_faults(page):
    """Look for a second search box, or a second bar, above the page's own."""
    if page.soup.select("header.bd-header"):
        yield "has the theme's header above its own"
    # Those in a dialog are hidden until the reader asks for them.
    if (
        len([b for b in page.soup.select(".search-button-field") if not b.find_parent("dialog")])
        > 1
    ):
        yield "has more than one search box"


def link_faults(page, pages, html, in_repository):
    for tag in page.soup.find_all(["a", "link", "script"]):
        reference = tag.get("href") or tag.get("src")
        if not reference or reference == "#":
            continue
        here = in_repository(reference)
        if here is not None:
            if not here.exists():
                yield f"links to a file that the repository lacks: {reference}"
            continue
        target = local(reference)
        if target is None or target[0] in TAKEN_ALONG:
            continue
        path, fragment = target
        if path and not (html / path).exists():
            yield f"has a dead link: {reference}"
        elif fragment:
            other = pages.get(path.removesuffix(".html")) if path else page
            if other and fragment not in other.ids:
                yield f"has a link to an anchor that is not there: {reference}"


def weight_faults(page, html):
    shown = {target[0] for target in map(local, images_of(page)) if target}
    own = [html / path for path in shown if not path.startswith("_static/")]
    weight = page.size + sum(path.stat().st_size for path in own if path.is_file())
    if weight > HEAVIEST_PAGE:
        yield f"weighs {weight:,} bytes with its images; {HEAVIEST_PAGE:,} are allowed"


def question_faults(pages):
    """Look for what would give the right choices away: their length, or their place.

    A book of few questions cannot be judged.
    """
    questions = [q for page in pages for q in page.article.select(".check-yourself")]
    choices = [[len(item.get_text()) for item in q.select("summary")] for q in questions]
    right = [[*q.select("details")].index(q.select_one(".right")) for q in questions]
    if len(questions) < FEWEST_QUESTIONS:
        return
    longest = sum(
        all(sizes[at] > size for i, size in enumerate(sizes) if i != at)
        for sizes, at in zip(choices, right, strict=True)
    )
    if longest > 0.4 * len(questions):
        yield f"The longest choice is the right one in {longest} of {len(questions)} questions."
    for place in range(max(map(len, choices))):
        share = right.count(place) / len(questions)
        if not 0.15 <= share <= 0.4:
            right_in = f"{share:.0%} of {len(questions)} questions"
            yield f"Choice {place + 1} is the right one in {right_in}."


def repository_files(config, root):
    """Return what maps a link into this repository on GitHub or Colab to the file here."""
    address = config["repository"]["url"].removeprefix("https://")
    owner_and_name = address.removeprefix("github.com/")
    branch = config["repository"].get("branch", "main")
    prefix = re.compile(
        rf"https://(?:{re.escape(address)}|colab\.research\.google\.com/github/"
        rf"{re.escape(owner_and_name)})/(?:blob|tree|raw|edit)/{re.escape(branch)}/([^?#]*)"
    )

    def find(reference):
        match = prefix.match(reference)
        return root / unquote(match[1]) if match else None

    return find


def faults(html, toc, in_repository=lambda reference: None):
    """Return what is wrong with a built book, a line each, that names the page.

    Args:
        html: folder with the built pages.
        toc: the book's `_toc.yml`.
        in_repository: what returns, for a link to a file of this repository, the file's
            path, and `None` for any other link; by default no link is one.
    """
    html, listed = Path(html), table_of_contents(toc)
    pages = {path.stem: Page(path) for path in sorted(html.glob("*.html"))}
    lines = [f"{name} {fault}" for name, fault in chapter_list_faults(pages, listed)]
    for name, page in pages.items():
        notebook = html / "_sources" / f"{name}.ipynb"
        parts = [
            execution_faults(page, notebook) if notebook.is_file() else (),
            output_faults(page),
            raw_markdown_faults(page),
            image_faults(page, html),
            link_faults(page, pages, html, in_repository),
            weight_faults(page, html),
            elsewhere_faults(page),
            header_faults(page),
        ]
        lines += [f"{page.name} {fault}" for part in parts for fault in part]
    lines += shared_file_faults(html)
    lines += question_faults(pages.values())
    weight = sum(path.stat().st_size for path in html.rglob("*") if path.is_file())
    if weight > HEAVIEST_BOOK:
        lines.append(f"The book weighs {weight:,} bytes; {HEAVIEST_BOOK:,} are allowed.")
    return lines


def project_faults(html):
    """Return what is wrong with this project's book."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return faults(html, ROOT / "_toc.yml", repository_files(config, ROOT))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("html", type=Path, help="folder with the built pages")
    html = parser.parse_args().html
    if not (html / "index.html").is_file():
        sys.exit(f"There is no book in {html}: run make book first.")
    lines = project_faults(html)
    sys.exit("\n".join(lines) if lines else None)


if __name__ == "__main__":
    main()
