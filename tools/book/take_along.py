"""Make the book to take along from the built pages: one EPUB or one PDF, without scripts.

    python tools/book/take_along.py epub
    python tools/book/take_along.py pdf

Nothing is executed: what `make book` wrote to _build/html is read, freed of what needs a
browser, and packed or printed. Chromium sets the formulas with the MathJax of the pages.
"""

import argparse
import contextlib
import html
import re
import sys
import tempfile
import uuid
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import chromium
import pikepdf
import yaml
from bs4 import BeautifulSoup
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "_build"
STYLE, PAPER = (Path(__file__).with_name(f"take_along{part}.css") for part in ("", "_paper"))
COVER = {"width": 800, "height": 1200}
NEEDS_A_BROWSER = "script, style, button, summary, .headerlink, .toctree-wrapper"
INTERACTIVE = ".cell_output > .output:has(script, canvas, iframe), .gcvit-page:not(.cell_output *)"
WRAPPERS = (
    "details, .pst-scrollable-table-container, a.image-reference, "
    "pre .n, pre .nn, pre .p, pre .w"  # what is as black as the rest of the code
)
LIGHT = 'html[data-theme="light"] '
NUMBER = re.compile(r"\\tag\{([^}]*)\}")
INTERNAL = re.compile(r' data-mjx-[\w-]+="[^"]*"')
MATHJAX_SETTINGS = """{
  options: {ignoreHtmlClass: "book", processHtmlClass: "math", enableMenu: false},
  tex: {packages: {"[-]": ["noundefined"]}},  // an unknown command is a fault, not red text
}"""
FAULTY_FORMULA = ".math:has(mjx-merror), .math:not(:has(mjx-container))"
MEDIA_TYPES = {
    ".css": "text/css",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".xhtml": "application/xhtml+xml",
}
CONTAINER = """<?xml version="1.0" encoding="UTF-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="book/package.opf" media-type="application/oebps-package+xml"/>
</rootfiles></container>
"""
PACKAGE = """<?xml version="1.0" encoding="UTF-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id" xml:lang="en">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">urn:uuid:{identifier}</dc:identifier>
<dc:title>{title}: {subtitle}</dc:title>
<dc:creator>{author}</dc:creator>
<dc:language>en</dc:language>
<dc:source>{address}</dc:source>
<dc:rights>{licenses}</dc:rights>
<meta property="dcterms:modified">{changed:%Y-%m-%dT%H:%M:%SZ}</meta>
<meta property="schema:accessMode">textual</meta>
<meta property="schema:accessMode">visual</meta>
<meta property="schema:accessModeSufficient">textual</meta>
<meta property="schema:accessibilityFeature">alternativeText</meta>
<meta property="schema:accessibilityFeature">MathML</meta>
<meta property="schema:accessibilityFeature">structuralNavigation</meta>
<meta property="schema:accessibilityFeature">tableOfContents</meta>
<meta property="schema:accessibilityHazard">none</meta>
</metadata>
<manifest>
{manifest}
</manifest>
<spine>
{spine}
</spine>
</package>
"""


@dataclass
class Book:
    """A built book.

    Attributes:
        about: what CITATION.cff says.
        licenses: a sentence on the licenses.
        parts: pairs of a caption, empty for the first page, and the names of pages.
        articles: maps the name of each page to what a reader reads of it, parsed.
        changed: when the pages were built.
        colors: CSS, the colors of code.
        mathjax: address of the MathJax that the pages load; empty if they have no formula.
    """

    about: dict
    licenses: str
    parts: list
    articles: dict
    changed: datetime
    colors: str
    mathjax: str

    @property
    def texts(self):
        """What is said of the book, escaped: title, subtitle, author, address, licenses."""
        title, subtitle = self.about["title"].split(": ", 1)
        authors = ", ".join(author["name"] for author in self.about["authors"])
        texts = {"title": title, "subtitle": subtitle, "author": authors}
        texts |= {"address": self.about["url"], "licenses": self.licenses}
        return {name: html.escape(text.strip()) for name, text in texts.items()}


def read_book(built, root):
    """Read a built book, without what needs a browser.

    Args:
        built: folder with the built pages.
        root: folder with `_toc.yml`, `_config.yml` and `CITATION.cff`.

    Raises:
        FileNotFoundError: if a page was not built.
    """
    about, config, toc = (
        yaml.safe_load((root / name).read_text(encoding="utf-8"))
        for name in ("CITATION.cff", "_config.yml", "_toc.yml")
    )
    parts = [("", [toc["root"]])]
    parts += [
        (part.get("caption", ""), [page["file"] for page in part["chapters"]])
        for part in toc["parts"]
    ]
    articles, mathjax, listings = {}, "", set()
    for name in (name for _, names in parts for name in names):
        path = built.resolve() / f"{name}.html"
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}: run make book first.")
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        articles[name] = without_browser(soup.article, urljoin(about["url"], path.name), listings)
        for tag in soup.article.find_all("img"):
            tag["src"] = urljoin(path.as_uri(), tag["src"])
        if script := soup.find("script", src=re.compile("mathjax", re.I)):
            mathjax = urljoin(path.as_uri(), script["src"])
    rules = (built / "_static" / "pygments.css").read_text(encoding="utf-8").splitlines()
    colors = "\n".join(rule.removeprefix(LIGHT) for rule in rules if rule.startswith(LIGHT))
    changed = datetime.fromtimestamp((built / f"{toc['root']}.html").stat().st_mtime, UTC)
    return Book(about, config["html"]["extra_footer"], parts, articles, changed, colors, mathjax)


def without_browser(article, address, listings):
    """Return an article unfolded, without controls and scripts.

    Args:
        article: the page's article; it is changed.
        address: where the page is online.
        listings: set of the folded code of earlier pages, which is left out here, as is the
            cell with which every chapter begins. It grows.
    """
    for output in article.select(INTERACTIVE):
        note = (
            f'<p class="online">This is interactive <a href="{address}">in the online book</a>.</p>'
        )
        output.replace_with(BeautifulSoup(note, "html.parser"))
    for tag in article.select(NEEDS_A_BROWSER):
        tag.decompose()
    for cell in article.select(".tag_hide-input:not(:has(.cell_output))"):
        if (listing := cell.get_text()) in listings:
            cell.decompose()
        listings.add(listing)
    for tag in article.select(WRAPPERS):
        tag.unwrap()
    return article


def place(page, fragment=""):
    """Return the id of a page or of a place in it, in a document that holds all pages."""
    return f"p-{page}-{fragment}" if fragment else f"p-{page}"


def bind(book, page_file):
    """Lead the links between pages to places in the book, and those to other files online.

    Args:
        book: a `Book`; its articles are changed.
        page_file: maps the name of a page to the file that holds it.
    """
    for name, article in book.articles.items():
        for tag in article.find_all("a", href=True):
            address = urlsplit(tag["href"])
            page = address.path.removesuffix(".html") or name
            if address.scheme or address.netloc or page not in book.articles:
                tag["href"] = urljoin(book.about["url"], tag["href"])
            else:
                tag["href"] = f"{page_file(page)}#{place(page, unquote(address.fragment))}"
        for tag in article.find_all(id=True):
            tag["id"] = place(name, tag["id"])
        article.name, article["id"] = "section", place(name)


def heading(article):
    return html.escape(article.h1.get_text())


def contents(book, entry):
    """Return the table of contents: nested lists, with what `entry` makes of a page's name."""
    lines = ["<nav epub:type='toc'><h1>Contents</h1><ol>"]
    for caption, names in book.parts:
        pages = [f"<li>{entry(name)}</li>" for name in names]
        part = [f"<li><span>{html.escape(caption)}</span><ol>", *pages, "</ol></li>"]
        lines += part if caption else pages
    return "\n".join([*lines, "</ol></nav>"])


def title_page(book):
    """Return the first page: title, author, license, and the book's first picture."""
    picture = next(iter(book.articles.values())).find("img") or ""
    version = f"Version {book.about['version']}, built on {book.changed:%Y-%m-%d}."
    return """<section class="title-page"><h1>{title}</h1>
<p class="subtitle">{subtitle}</p>
<p>{author}</p>
<p>{picture}</p>
<p class="imprint">{version} The book online: <a href="{address}">{address}</a><br/>
{licenses}</p></section>""".format(picture=picture, version=version, **book.texts)


def style(book):
    return f"{STYLE.read_text(encoding='utf-8')}\n{book.colors}\n"


def document(title, body, head):
    """Return a page that is HTML and XHTML."""
    return f"""<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops" lang="en">
<head><meta charset="utf-8"/><title>{title}</title>{head}</head>
<body class="book">{body}</body></html>
"""


@contextlib.contextmanager
def opened(book, *body, rules=""):
    """Open the book in Chromium as one document, and wait until MathJax has set its formulas.

    Args:
        book: a `Book`.
        body: pieces of the document.
        rules: CSS to add to the book's style.

    Raises:
        FileNotFoundError: if there is no Chromium.
        RuntimeError: if MathJax does not load, or a formula has a fault.
    """
    head = f"<style>{style(book)}{rules}</style><script>MathJax = {MATHJAX_SETTINGS}</script>"
    head += f'<script src="{html.escape(book.mathjax)}"></script>'
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "book.html")
        file.write_text(document(book.texts["title"], "\n".join(body), head), encoding="utf-8")
        with contextlib.closing(chromium.launch(playwright)) as browser:
            page = browser.new_page(viewport=COVER)
            page.goto(file.as_uri())
            if not page.evaluate("Boolean(MathJax.startup)"):
                raise RuntimeError(f"MathJax, which sets the formulas, is not at {book.mathjax}.")
            page.evaluate("MathJax.startup.promise.then(() => document.fonts.ready).then(() => 0)")
            faults = page.locator(FAULTY_FORMULA).all_text_contents()
            if faults:
                raise RuntimeError(f"MathJax does not understand: {'; '.join(faults)}")
            yield page


def write_pdf(book, path):
    """Print the book twice: first to see on which pages the chapters begin."""

    def entry(name):
        number = f'<span class="number" data-place="{place(name)}">000</span>'
        return f'<a href="#{place(name)}">{heading(book.articles[name])}{number}</a>'

    bind(book, page_file=lambda name: "")
    rules = [PAPER.read_text(encoding="utf-8")]
    for name, article in book.articles.items():
        head = re.sub(r'(["\\])', r"\\\1", article.h1.get_text())
        rules.append(f"#{place(name)} {{ page: {place(name)} }}")
        rules.append(f'@page {place(name)} {{ @top-left {{ content: "{head}" }} }}')
    body = [title_page(book), contents(book, entry), *map(str, book.articles.values())]
    options = {"path": path, "prefer_css_page_size": True, "print_background": True}
    options |= {"outline": True, "tagged": True}
    with opened(book, *body, rules="\n".join(rules)) as page:
        page.pdf(**options)
        page.locator("nav .number").evaluate_all(
            "(all, pages) => all.forEach(e => e.textContent = pages[e.dataset.place])",
            first_pages(path),
        )
        page.pdf(**options)
    with pikepdf.open(path, allow_overwriting_input=True) as pdf:
        pdf.docinfo["/Author"] = html.unescape(book.texts["author"])
        pdf.save(path, object_stream_mode=pikepdf.ObjectStreamMode.generate)


def first_pages(path):
    """Return the numbers of the pages on which the named places of a PDF are."""
    with pikepdf.open(path) as pdf:
        places = {name[1:]: pikepdf.Page(spot[0]) for name, spot in pdf.Root.Dests.items()}
        return {name: page.index + 1 for name, page in places.items()}


def set_formulas(book):
    """Replace each formula by MathML, its number beside it; return a picture of the title page."""
    spots = [tag for article in book.articles.values() for tag in article.select(".math")]
    numbers = [NUMBER.search(spot.get_text()) for spot in spots]
    for spot in spots:
        spot.string = NUMBER.sub("", spot.get_text())
    with opened(book, title_page(book), *map(str, book.articles.values())) as page:
        cover = page.screenshot(type="jpeg", quality=90)
        formulas = page.evaluate(
            "Array.from(MathJax.startup.document.math, one => MathJax.startup.toMML(one.root))"
        )
    for spot, number, formula in zip(spots, numbers, formulas, strict=True):
        tex = html.escape(spot.get_text().strip()[2:-2].strip())
        formula = INTERNAL.sub("", formula).replace("<math", f'<math alttext="{tex}"', 1)
        beside = f'<span class="number">({number[1]})</span>' if number else ""
        spot["class"] = ["math", "equation"] if number else ["math"]
        spot.clear()
        spot.append(BeautifulSoup(formula + beside, "html.parser"))
    return cover


def strict_svg(text):
    """Return a drawing as EPUB wants it.

    Matplotlib's have a DOCTYPE, paths without an outline for spaces, and the same id for all
    copies of an image. Ids that nothing refers to go.
    """
    text = re.sub(r"<!DOCTYPE[^>]*>", "", text, count=1)
    named = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda id: id[0] if id[1] in named else "", text)
    return re.sub(r"<path\b(?![^>]*\bd=)", '<path d=""', text)


def write_epub(book, path):
    """Pack the book: a file for each page, its pictures, and what EPUB 3 asks for."""

    def entry(name):
        return f'<a href="{name}.xhtml">{heading(book.articles[name])}</a>'

    bind(book, page_file="{}.xhtml".format)
    files = {"cover.jpeg": set_formulas(book), "book.css": style(book)}
    for article in book.articles.values():
        for tag in article.find_all("img", src=re.compile("^file:")):
            picture = Path(unquote(urlsplit(tag["src"]).path))
            tag["src"] = f"images/{picture.name}"
            files[tag["src"]] = picture.read_bytes()
            if picture.suffix == ".svg":
                files[tag["src"]] = strict_svg(picture.read_text(encoding="utf-8"))
    pages = {"title": title_page(book), "contents": contents(book, entry)}
    pages |= {name: str(article) for name, article in book.articles.items()}
    properties = {"cover.jpeg": "cover-image", "contents.xhtml": "nav"}
    for name, body in pages.items():
        title = heading(book.articles[name]) if name in book.articles else book.texts["title"]
        link = '<link rel="stylesheet" type="text/css" href="book.css"/>'
        files[f"{name}.xhtml"] = document(title, body, link)
        if "<math" in body:
            properties[f"{name}.xhtml"] = "mathml"
    manifest = "\n".join(
        f'<item id="{re.sub("[^a-z0-9]", "-", f"file-{name}")}" href="{name}" '
        f'media-type="{MEDIA_TYPES[Path(name).suffix]}"'
        + (f' properties="{properties[name]}"/>' if name in properties else "/>")
        for name in files
    )
    spine = "\n".join(f'<itemref idref="file-{name}-xhtml"/>' for name in pages)
    package = PACKAGE.format(
        identifier=uuid.uuid5(uuid.NAMESPACE_URL, book.about["url"]),
        changed=book.changed,
        manifest=manifest,
        spine=spine,
        **book.texts,
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        packed.writestr("META-INF/container.xml", CONTAINER)
        packed.writestr("book/package.opf", package)
        for name, content in files.items():
            packed.writestr(f"book/{name}", content)


def main():
    writers = {"epub": write_epub, "pdf": write_pdf}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=writers)
    form = parser.parse_args().form
    path = BUILD / f"gcvit-book.{form}"
    if chromium.executable() is None:
        sys.exit("Chromium, which sets the formulas and prints, is missing: install it.")
    try:
        writers[form](read_book(BUILD / "html", ROOT), path)
    except (FileNotFoundError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"The book to take along is {path}, {path.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
