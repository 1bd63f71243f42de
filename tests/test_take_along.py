"""The book to take along holds what the pages hold, and works without them."""

import itertools
import posixpath
import re
import shutil
import subprocess
import textwrap
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chromium
import pikepdf
import pytest
import take_along
import yaml
from check_html import TAKEN_ALONG

MATHJAX = Path(__file__).parents[1] / "book" / "_extra" / "mathjax" / "tex-chtml.js"
EPUBCHECK = Path("/usr/share/java/epubcheck.jar")
SITE = "https://someone.github.io/book/"
HTML, MATHML = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/1998/Math/MathML}"
CODE = """def sign(x):
    if x < 0 and x != -1:  # "less" & different
        return (
            -1
        )

    return 1
"""
PAGE = """<html><head><script defer src="{mathjax}"></script></head><body>
<div class="sidebar">Search</div><article class="bd-article"><section id="top">{article}</section>
<script>kernelName = 'python3'</script></article></body></html>"""
SETUP = """<div class="cell tag_hide-input"><details><summary>Show code</summary>
<div class="cell_input"><pre>import setup</pre></div></details></div>"""
CHAPTER = """<h1>1. One &amp; "two"<a class="headerlink" href="#top">#</a></h1>
{setup}
<p>Half is <span class="math notranslate nohighlight">\\(\\frac{{1}}{{2}}\\)</span>. See
<a href="notes.html#shapes">shapes</a>, <a href="#top">above</a>, <a href="index.html">the
beginning</a>, <a href="genindex.html">the index</a> and <a href="https://keras.io/">Keras</a>.</p>
<div class="math notranslate nohighlight">
\\[ y = \\begin{{cases}} 1 &amp; x &lt; 1
\\cr \\sqrt{{x}} &amp; x \\ge 1 \\end{{cases}} \\tag{{1.1}} \\]</div>
<div class="cell"><div class="cell_input"><pre>{code}</pre></div><div class="cell_output">
<figure id="fig"><a class="image-reference" href="_images/line.svg"><img alt="A line that rises."
src="_images/line.svg"></a><figcaption>Fig. 1 A line</figcaption></figure></div></div>
<div class="cell"><div class="cell_input"><pre>show()</pre></div><div class="cell_output">
<div class="output text_html"><div>Level <canvas></canvas><script>draw()</script></div></div>
</div></div>
<div class="cell tag_solution tag_hide-cell"><details><summary>Show cell</summary>
<div class="cell_input"><pre>answer = 42</pre></div></details></div>"""
DRAWING = """<?xml version="1.0" encoding="utf-8" standalone="no"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><defs><path id="space"/></defs>
<g id="twice"/><g id="twice"/><path id="line" d="M 0 9 L 9 0"/>
<use xmlns:xlink="http://www.w3.org/1999/xlink" xlink:href="#line"/></svg>"""


def escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    built = root / "html"
    for folder in ("_images", "_static"):
        (built / folder).mkdir(parents=True)
    articles = {
        "index": "<h1>A book</h1>",
        "01-one": CHAPTER.format(setup=SETUP, code=escaped(CODE)),
        "02-two": f"<h1>2. Two</h1>{SETUP}",
        "notes": '<h1>Notes</h1><section id="shapes"><h2>Shapes</h2></section>',
    }
    for name, article in articles.items():
        text = PAGE.format(mathjax=MATHJAX.as_uri(), article=article)
        (built / f"{name}.html").write_text(text, encoding="utf-8")
    (built / "_images" / "line.svg").write_text(DRAWING)
    colors = 'html[data-theme="light"] .highlight .k { color: #6730C5 }\n.k { color: white }\n'
    (built / "_static" / "pygments.css").write_text(colors)
    parts = [
        {"caption": "Parts", "chapters": [{"file": "01-one"}, {"file": "02-two"}]},
        {"chapters": [{"file": "notes"}]},  # as the opening page's own part: no caption
    ]
    settings = {
        "_toc.yml": {"root": "index", "parts": parts},
        "_config.yml": {"html": {"extra_footer": "Text & code: free."}},
        "CITATION.cff": {
            "title": "A book: of two",
            "authors": [{"name": "Some & Others"}],
            "version": "1.2.3",
            "url": SITE,
        },
    }
    for name, content in settings.items():
        (root / name).write_text(yaml.safe_dump(content))
    return root


def read(site):
    return take_along.read_book(site / "html", site)


needs_chromium = pytest.mark.skipif(chromium.executable() is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def epub(site):
    path = site / "book.epub"
    take_along.write_epub(read(site), path)
    return path


@pytest.fixture(scope="module")
def pages(epub):
    """Return the EPUB's pages by name, parsed as XML."""
    with zipfile.ZipFile(epub) as packed:
        names = [name for name in packed.namelist() if name.endswith(".xhtml")]
        return {posixpath.basename(name): ET.fromstring(packed.read(name)) for name in names}


@needs_chromium
def test_the_epub_keeps_code_to_the_last_space(pages):
    assert CODE in ["".join(pre.itertext()) for pre in pages["01-one.xhtml"].iter(f"{HTML}pre")]


@needs_chromium
def test_the_epub_is_unfolded_and_shows_the_first_cell_once(pages):
    first, second = ("".join(pages[f"{name}.xhtml"].itertext()) for name in ("01-one", "02-two"))
    assert "import setup" in first and "answer = 42" in first
    assert "import setup" not in second
    assert "Show" not in first and "Search" not in first


@needs_chromium
def test_the_epub_has_its_formulas_in_mathml_with_their_numbers(pages):
    inline, display = pages["01-one.xhtml"].iter(f"{MATHML}math")
    assert [part.text for part in inline.find(f".//{MATHML}mfrac")] == ["1", "2"]
    assert inline.get("alttext") == r"\frac{1}{2}"
    assert display.get("display") == "block" and display.find(f".//{MATHML}mtable") is not None
    assert display.find(f".//{MATHML}mlabeledtr") is None
    numbers = pages["01-one.xhtml"].findall(f".//{HTML}span[@class='number']")
    assert [number.text for number in numbers] == ["(1.1)"]


@needs_chromium
def test_the_epub_has_no_script_and_says_where_what_needs_one_is(pages):
    tags = {tag.tag for page in pages.values() for tag in page.iter()}
    assert not tags & {f"{HTML}{name}" for name in ("script", "canvas", "button", "details")}
    links = [link.get("href") for link in pages["01-one.xhtml"].iter(f"{HTML}a")]
    assert f"{SITE}01-one.html" in links


@needs_chromium
def test_the_links_of_the_epub_lead_to_a_place_in_it_or_online(pages):
    ids = {name: {tag.get("id") for tag in page.iter()} for name, page in pages.items()}
    outward = set()
    for name, page in pages.items():
        for link in page.iter(f"{HTML}a"):
            address = urlsplit(link.get("href"))
            if address.scheme:
                outward.add(link.get("href"))
                continue
            target = address.path or name
            assert not address.fragment or unquote(address.fragment) in ids[target], link.attrib
    assert {f"{SITE}genindex.html", "https://keras.io/"} <= outward
    shapes = [link for link in pages["01-one.xhtml"].iter(f"{HTML}a") if link.text == "shapes"]
    assert [link.get("href") for link in shapes] == ["notes.xhtml#p-notes-shapes"]


@needs_chromium
def test_the_epub_shows_its_pictures_with_their_texts(epub, pages):
    (picture,) = pages["01-one.xhtml"].iter(f"{HTML}img")
    assert picture.get("alt") == "A line that rises."
    with zipfile.ZipFile(epub) as packed:
        drawing = packed.read(f"book/{picture.get('src')}").decode()
    assert 'id="line" d="M 0 9 L 9 0"' in drawing
    assert "DOCTYPE" not in drawing and "twice" not in drawing and '<path d=""' in drawing


@needs_chromium
@pytest.mark.skipif(not EPUBCHECK.is_file(), reason="needs epubcheck")
def test_epubcheck_finds_nothing(epub):
    command = [shutil.which("java"), "-jar", EPUBCHECK, "--failonwarnings", epub]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def pdf(site):
    path = site / "book.pdf"
    take_along.write_pdf(read(site), path)
    return path


def texts(pdf, *options):
    """Return the text of each page of a PDF, laid out as on the page."""
    if not shutil.which("pdftotext"):
        pytest.skip("needs pdftotext")
    command = ["pdftotext", "-layout", *options, pdf, "-"]
    result = subprocess.run(command, capture_output=True, check=True)
    return result.stdout.decode().split("\f")


@needs_chromium
def test_the_pages_of_the_pdf_begin_with_title_contents_and_chapters(pdf):
    firsts = take_along.first_pages(pdf)
    starts = [firsts[f"p-{name}"] for name in ("index", "01-one", "02-two", "notes")]
    assert starts[0] == 3 and all(a < b for a, b in itertools.pairwise(starts))
    with pikepdf.open(pdf) as opened:
        assert opened.docinfo["/Author"] == "Some & Others"
        assert opened.docinfo["/Title"] == "A book"
        with opened.open_outline() as outline:
            titles = [item.title for item in outline.root]
    assert titles[-4:] == ["A book", '1. One & "two"', "2. Two", "Notes"]


@needs_chromium
def test_the_contents_of_the_pdf_name_the_pages_that_the_pages_bear(pdf):
    firsts = take_along.first_pages(pdf)
    title, contents, *pages = texts(pdf)
    assert "1.2.3" in title and "Text & code: free." in title
    for name, heading in (("01-one", '1. One & "two"'), ("02-two", "2. Two"), ("notes", "Notes")):
        number = firsts[f"p-{name}"]
        assert re.search(rf"{re.escape(heading)}\s+{number}\n", contents), contents
        page = pages[number - 3]
        # The heading stands at the head of the page too, and the number at its foot.
        assert page.count(heading) == 2 and page.split()[-1] == str(number)


@needs_chromium
def test_the_pdf_keeps_the_indentation_of_code(pdf):
    # pdftotext guesses columns, and is told here how wide a letter of 7.6 points is.
    text = "\n".join(texts(pdf, "-fixed", "4.58"))
    start, end = text.index("def sign"), text.index("return 1") + len("return 1\n")
    margin = start - text.rindex("\n", 0, start) - 1
    assert textwrap.dedent(" " * margin + text[start:end]) == CODE


@needs_chromium
def test_the_pdf_has_its_formulas_set_and_their_numbers(pdf):
    text = "\n".join(texts(pdf))
    assert "(1.1)" in text and "\\frac" not in text and "cases" not in text


def changed(site, tmp_path, page, old, new):
    """Return the book of a copy of the site with a change in one page."""
    copy = shutil.copytree(site / "html", tmp_path / "html")
    path = copy / f"{page}.html"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return take_along.read_book(copy, site)


def test_a_page_that_was_not_built_is_named(site, tmp_path):
    copy = shutil.copytree(site / "html", tmp_path / "html")
    (copy / "notes.html").unlink()
    with pytest.raises(FileNotFoundError, match=r"notes\.html: run make book first"):
        take_along.read_book(copy, site)


@needs_chromium
def test_without_mathjax_there_is_no_book(site, tmp_path):
    book = read(site)
    book.mathjax = (tmp_path / "gone.js").as_uri()
    with pytest.raises(RuntimeError, match="MathJax, which sets the formulas, is not at .*gone.js"):
        take_along.write_epub(book, tmp_path / "book.epub")


@needs_chromium
@pytest.mark.parametrize("fault", [r"\frac{1", r"\sqare{1}"])
def test_a_formula_that_mathjax_does_not_understand_is_named(site, tmp_path, fault):
    book = changed(site, tmp_path, "01-one", r"\frac{1}", fault)
    with pytest.raises(RuntimeError, match=f"does not understand: .*{re.escape(fault[:5])}"):
        take_along.write_pdf(book, tmp_path / "book.pdf")


def test_the_first_page_links_both():
    page = (Path(__file__).parents[1] / "book" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r'href="([^"/]+\.(?:epub|pdf))"', page)) == TAKEN_ALONG


def test_without_chromium_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(take_along.sys, "argv", ["take_along.py", "epub"])
    monkeypatch.setattr(chromium, "executable", lambda: None)
    with pytest.raises(SystemExit, match="Chromium, .*, is missing: install it"):
        take_along.main()
