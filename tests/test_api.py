"""The reference names everything public, chapter by chapter, and leads there and back."""

import importlib
import inspect
import re
from pathlib import Path

import nbformat
import pytest
from reference import help_texts

import gcvit
from gcvit import fine_tuning, images
from gcvit.__main__ import COMMANDS, parser

BOOK = Path(__file__).resolve().parent.parent / "book"
PAGE = (BOOK / "api.md").read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in re.split(r"^## ", PAGE, flags=re.M)[1:])


def resolved(name):
    """Return what a directive documents, by the name in it."""
    module, attribute = name, None
    while module:
        try:
            thing = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
        else:
            return thing if attribute is None else getattr(thing, attribute)
    raise AssertionError(f"{name} is nothing that can be imported")


def documented(text):
    """Return what the directives of a part of the page document."""
    return [resolved(name) for name in re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M)]


@pytest.mark.parametrize(
    "module, names",
    [
        (gcvit, gcvit.__all__),
        (fine_tuning, fine_tuning.__all__),
        (
            images,
            [
                name
                for name, thing in inspect.getmembers(images)
                if name[0] != "_" and getattr(thing, "__module__", None) == images.__name__
            ],
        ),
    ],
    ids=["gcvit", "fine_tuning", "images"],
)
def test_everything_public_is_in_the_reference_once_and_says_what_it_is(module, names):
    assert names
    listed = [id(thing) for thing in documented(PAGE)]
    for name in names:
        thing = getattr(module, name)
        assert listed.count(id(thing)) == 1, f"{module.__name__}.{name}"
        if not isinstance(thing, dict):  # whose docstring is Python's
            assert vars(thing).get("__doc__") or inspect.isfunction(thing) and thing.__doc__, name


def test_each_part_leads_to_its_chapter_and_back():
    for heading, text in SECTIONS.items():
        chapters = set(re.findall(r"\]\(([\w-]+\.ipynb)\)", text))
        assert chapters, heading
        if heading == "The command line":
            continue
        assert documented(text), heading
        (chapter,) = chapters
        anchor = re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))
        recap = nbformat.read(BOOK / chapter, as_version=4).cells[-1].source
        assert recap.startswith("## Recap") and f"](api.md#{anchor})" in recap, chapter
        number = re.match(r"(?:Chapter|Appendix) (\w+):", heading)[1].lower()
        assert chapter.split("-")[0].lstrip("0") == number, chapter


def test_a_chapter_that_has_a_module_is_in_the_reference():
    """Its module says so: "Chapter 4: attention inside a window, ..."."""
    chapters = {
        re.match(r"Chapter (\d+)", resolved(f"gcvit.{path.stem}").__doc__ or "")
        for path in Path(gcvit.__file__).parent.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.stem[0] != "_"
    }
    numbers = {match[1] for match in chapters if match}
    assert {"1", "8"} < numbers
    assert numbers <= {heading.split(":")[0].removeprefix("Chapter ") for heading in SECTIONS}


def test_the_command_line_is_shown_command_by_command():
    texts = dict(help_texts(parser()))
    assert list(texts) == [parser().prog, *(f"{parser().prog} {name}" for name, *_ in COMMANDS)]
    assert "--validation-split" in texts["python -m gcvit train"]
    assert "```{command-line}" in SECTIONS["The command line"]
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= 76
