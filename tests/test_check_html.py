"""The check of the built pages catches each fault, and nothing on a clean site."""

import nbformat
import pytest
import yaml
from check_html import LOG_LINE, faults, repository_files, table_of_contents

PAGE = """<html><body>
<nav class="bd-links">
<a class="reference internal" href="{home}">A book</a>
<a class="reference internal" href="{chapter}">A chapter</a>
<a class="reference internal" href="{notes}">Notes</a>
</nav>
<article>{article}</article>
</body></html>"""

CHAPTER = """
<h1 id="top">A chapter</h1>
<p>See <a href="notes.html#shapes">shapes</a>, <a href="#top">above</a> and
<a href="https://github.com/someone/book/blob/main/_toc.yml">the list</a>.</p>
<p>A set is <code>{a}</code>, an equation <span class="math">$$x_{a}$$</span>.</p>
<pre>``` :::{note} [text](address)</pre>
<div class="cell"><div class="cell_input"><pre>draw()</pre></div>
<div class="cell_output">
<div class="output stream"><pre>loss 0.5 WARNINGS 0</pre></div>
<figure id="fig-01-line"><img src="_images/line.svg" alt="A line that rises."></figure>
</div></div>"""


def edited(site, old, new, page="01-chapter"):
    path = site / "html" / f"{page}.html"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def site(tmp_path):
    html = tmp_path / "html"
    (html / "_sources").mkdir(parents=True)
    (html / "_images").mkdir()
    links = {"home": "index.html", "chapter": "01-chapter.html", "notes": "notes.html"}
    for name, own, article in (
        ("index", "home", '<a href="01-chapter.html">Begin</a> <a href="gcvit-book.pdf">PDF</a>'),
        ("01-chapter", "chapter", CHAPTER),
        ("notes", "notes", '<h2 id="shapes">Shapes</h2>'),
    ):
        text = PAGE.format(**{**links, own: "#"}, article=article)
        (html / f"{name}.html").write_text(text)
    (html / "search.html").write_text("<html><body></body></html>")
    (html / "_images" / "line.svg").write_text("<svg></svg>")
    figure = {"mystnb": {"figure": {"name": "fig-01-line"}}}
    cell = nbformat.v4.new_code_cell("draw()", metadata=figure)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, html / "_sources" / "01-chapter.ipynb")
    chapters = [{"file": "01-chapter"}, {"file": "notes"}]
    toc = {"format": "jb-book", "root": "index", "parts": [{"chapters": chapters}]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    return tmp_path


def found(site):
    config = {"repository": {"url": "https://github.com/someone/book", "branch": "main"}}
    return faults(site / "html", site / "_toc.yml", repository_files(config, site))


def test_a_clean_site_passes(site):
    assert found(site) == []


OUTPUT = "loss 0.5"
FIRST = "<h1"
CDN = "https://cdn.org"


WAYS_TO_LOAD = [
    f'<link rel="preconnect" href="{CDN}/x">',
    f'<link rel="alternate stylesheet" href="{CDN}/x">',
    f'<link rel="preload" as="image" imagesrcset="a 1x, {CDN}/x 2x">',
    f'<svg aria-hidden="true"><use href="{CDN}/x"></use></svg>',
    f'<svg aria-hidden="true"><image xlink:href="{CDN}/x"></image></svg>',
    f'<video poster="{CDN}/x"></video>',
    f'<iframe src=" {CDN}/x"></iframe>',
    f'<iframe srcdoc="&lt;img src={CDN}/x&gt;"></iframe>',
    f'<meta http-equiv="refresh" content="0; url={CDN}/x">',
    f'<style>p {{ background: image-set("a" 1x, "{CDN}/x" 2x) }}</style>',
    f"<style>p {{ background: URL( {CDN}/x ) }}</style>",
    f'<script type="module">import {{ a }} from "{CDN}/x"</script>',
    f'<script type="module">import "{CDN}/x"</script>',
    f"<script>import('{CDN}/x')</script>",
    f'<script>fetch( "{CDN}/x")</script>',
    f"<script>new Worker(`{CDN}/x`)</script>",
    f'<script>new Image().src = "{CDN}/x"</script>',
    f'<script>image.setAttribute("src", "{CDN}/x")</script>',
    f'<script type="importmap">{{"imports": {{"a": "{CDN}/x"}}}}</script>',
]


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ('class="cell_output"', 'class="hidden"', "has no executed output"),
        ('id="fig-01-line"', "", "lacks the figure fig-01-line"),
        ("_images/line.svg", "_images/other.svg", "lacks the image _images/other.svg"),
        (OUTPUT, "Traceback (most recent call last)\nE: no", "shows a traceback: 'E: no"),
        ('"output stream"', '"output traceback"', "shows a traceback"),
        ('"output stream"', '"output stderr"', "wrote to stderr"),
        (OUTPUT, "W0000 00:00:17.1 2 gpu.cc:3] no GPU", "shows a log line: 'W0000"),
        (OUTPUT, "a.py:3: FutureWarning: soon", "shows a log line: 'a.py:3: FutureWarning"),
        ("A set is", ":::{note} A set is", "shows raw Markdown: ':::{note}"),
        ("A set is", "```{note} A set is", "shows raw Markdown: '```{note}"),
        ("is <code>", "is {numref}<code>", "shows raw Markdown: 'A set is {numref}"),
        ("A set is", "{ref}`a` A set is", "shows raw Markdown: '{ref}`a`"),
        ("A set is", ".. note:: A set is", "shows raw Markdown: '.. note::"),
        ("A set is", "[a](b) A set is", "shows raw Markdown: '[a](b)"),
        ("A set is", "$$x$$ A set is", "shows raw Markdown: '$$x$$"),
        ("notes.html#shapes", "gone.html", "has a dead link: gone.html"),
        ("notes.html#shapes", "notes.html#gone", "anchor that is not there: notes.html#gone"),
        ('"#top"', '"#gone"', "anchor that is not there: #gone"),
        ("main/_toc.yml", "main/gone.py", "the repository lacks: https://github.com/someone/book"),
        (' alt="A line that rises."', "", "without alt text: _images/line.svg"),
        ("A line that rises.", " ", "without alt text"),
        ("A line that rises.", "_images/line.svg", "without alt text"),
        ("A line that rises.", "line.svg", "without alt text"),
        ("<figure", "<svg></svg><figure", "a drawing (svg) without a title"),
        (OUTPUT, "x" * 1_500_000, "weighs 1,5"),
        (FIRST, f'<script src="{CDN}/x.js"></script>', f"loads {CDN}/x.js from elsewhere"),
        (FIRST, '<script src="//cdn.org/x.js"></script>', "loads //cdn.org/x.js from elsewhere"),
        (FIRST, f'<link rel="stylesheet" href="{CDN}/x.css">', f"loads {CDN}/x.css"),
        (FIRST, f'<img alt="A cat." src="{CDN}/x.png">', f"loads {CDN}/x.png"),
        (FIRST, f'<img alt="A." src="data:," srcset="a 1x, {CDN}/x.png 2x">', f"{CDN}/x.png"),
        (FIRST, f"<style>@import '{CDN}/x.css';</style>", f"loads {CDN}/x.css"),
        (FIRST, f'<p style="background: url({CDN}/x.png)"></p>', f"loads {CDN}/x.png"),
        *((FIRST, piece, f"loads {CDN}/x from elsewhere") for piece in WAYS_TO_LOAD),
        (FIRST, '<header class="bd-header"></header>', "has the theme's header"),
        (FIRST, '<button class="search-button-field"></button>' * 2, "more than one search box"),
    ],
)
def test_each_fault_is_caught_and_its_page_named(site, old, new, fault):
    edited(site, old, new + old if old == FIRST else new)
    lines = found(site)
    assert any(line.startswith("01-chapter.html ") and fault in line for line in lines), lines
    if "class=" not in old:
        assert len(lines) == 1, lines


def test_addresses_that_nothing_asks_for_are_left_alone(site):
    links = (
        f'<link rel="canonical" href="{CDN}"><dialog><i class="search-button-field"></i></dialog>'
    )
    links += f'<script type="application/json">{{"from": "{CDN}"}}</script>'
    links += f'<script>const home = "{CDN}"; open(home)</script><style>/* url({CDN}) */</style>'
    edited(site, "<h1", f'{links}<a class="search-button-field" href="{CDN}">there</a><h1')
    assert found(site) == []


def test_a_style_sheet_that_loads_from_elsewhere(site):
    (site / "html" / "_static").mkdir()
    sheet = site / "html" / "_static" / "theme.css"
    sheet.write_text("a { background: url(near.png) } b { background: url(data:x) }")
    assert found(site) == []
    sheet.write_text(f"@font-face {{ src: url('{CDN}/x.woff') }}")
    assert found(site) == [f"_static/theme.css loads {CDN}/x.woff from elsewhere"]
    sheet.write_text(f"/* {CDN} */ a {{ background: url(data:image/svg+xml,<svg xmlns='{CDN}'>) }}")
    assert found(site) == []
    (site / "html" / "_static" / "page.js").write_text(f'// {CDN}\nimport "{CDN}/x.js"')
    assert found(site) == [f"_static/page.js loads {CDN}/x.js from elsewhere"]


def test_a_page_weighs_what_its_images_weigh(site):
    (site / "html" / "_images" / "line.svg").write_text("x" * 1_500_000)
    assert any(line.startswith("01-chapter.html weighs 1,50") for line in found(site))


def test_the_book_has_a_weight_too(site):
    (site / "html" / "_static").mkdir()
    (site / "html" / "_static" / "film.mp4").write_bytes(b"\0" * 25_000_001)
    (line,) = found(site)
    assert line.startswith("The book weighs 25,00")


def test_a_chapter_that_was_not_built(site):
    (site / "html" / "notes.html").unlink()
    lines = found(site)
    assert "notes.html is in _toc.yml and was not built" in lines
    assert "index.html has a dead link: notes.html" in lines


def test_a_page_of_an_earlier_build(site):
    path = site / "html" / "notes.html"
    (site / "html" / "old.html").write_text(path.read_text())
    assert "old.html was built and is not in _toc.yml" in found(site)


def test_a_table_of_contents_that_has_changed_since(site):
    path = site / "_toc.yml"
    toc = yaml.safe_load(path.read_text())
    toc["parts"][0]["chapters"].reverse()
    path.write_text(yaml.safe_dump(toc))
    assert table_of_contents(path) == ["index", "notes", "01-chapter"]
    assert sum("lists the chapters" in line for line in found(site)) == 3


@pytest.mark.parametrize(
    "line",
    [
        "W0000 00:00:1795578667.932789   10423 cudart_stub.cc:31] no GPU",
        "I0000 00:00:1795578667.932789   10423 cudart_stub.cc:31] no GPU",
        "2025-01-02 03:04:05.678901: I tensorflow/core/platform/cpu_feature_guard.cc:182] AVX",
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        "WARNING:tensorflow:5 out of the last 5 calls",
        "INFO:absl:Load dataset info",
        "/usr/lib/x.py:3: UserWarning: The given NumPy array is not writable",
        "DeprecationWarning: this will go",
    ],
)
def test_what_a_log_line_is(line):
    assert LOG_LINE.search(line)


@pytest.mark.parametrize("line", ["loss: 0.5", "It warns: no", "E 12", "I0 = 3", "warnings 0"])
def test_what_a_log_line_is_not(line):
    assert not LOG_LINE.search(line)


def with_questions(site, choices, places):
    """Put a question on the chapter's page for each place of the right one among the choices."""
    questions = ""
    for right in places:
        items = [
            f'<details class="{kind}"><summary>{choice}</summary></details>'
            for i, choice in enumerate(choices)
            for kind in ["right" if i == right else "wrong"]
        ]
        questions += f'<div class="check-yourself">{"".join(items)}</div>'
    edited(site, "</figure>", "</figure>" + questions)


@pytest.mark.parametrize(
    "choices, places, fault",
    [
        ("aaa", [0, 1, 2] * 4, None),
        ("aaa", [0, 0, 1] * 4, "Choice 1 is the right one in 67% of 12"),
        (["aaaa", "a", "a"], [0, 0, 1, 2] * 3, "The longest choice is the right one in 6 of 12"),
        ("aaa", [0] * 6, None),
    ],
)
def test_no_place_and_no_length_gives_the_right_choice_away(site, choices, places, fault):
    with_questions(site, choices, places)
    assert (fault is None and found(site) == []) or any(fault in line for line in found(site))
