"""For Sphinx: what book/api.md needs beyond autodoc."""

import argparse
import inspect
import re

from docutils import nodes
from docutils.parsers.rst import Directive

WIDTH = 76
"""Columns of a help text: what a page shows without a scrollbar."""


def help_texts(parser):
    """Yield (name, help text) of a parser, then of each of its commands."""
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDTH)
    yield parser.prog, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from help_texts(command)


class CommandLine(Directive):
    """Show the help of `python -m gcvit` and of each of its commands."""

    def run(self):
        from gcvit.__main__ import parser

        shown = []
        for name, text in help_texts(parser()):
            section = nodes.section(ids=[nodes.make_id(name)])
            section += nodes.title("", "", nodes.literal("", name))
            section += nodes.literal_block(text, text, language="text")
            shown.append(section)
        return shown


def signature(app, what, name, obj, options, arguments, returned):
    """Give a class the arguments of its `__init__`, without types: Keras's `__new__` takes any."""
    if what != "class":
        return None
    own = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(obj.__init__).parameters.values()
        if parameter.name not in ("self", "kwargs")
    ]
    return str(inspect.Signature(own)), None


def docstring(app, what, name, obj, options, lines):
    """Make the label of a paragraph bold, as Napoleon does those of lists."""
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"^(Shapes|Source): ", r"**\1:** ", line)


def setup(app):
    app.add_directive("command-line", CommandLine)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True}
