"""For Sphinx: what book/api.md needs beyond autodoc."""

import argparse
import inspect

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
    """Give a class the arguments of its `__init__`: Keras's `__new__` takes any."""
    if what != "class":
        return None
    whole = inspect.signature(obj.__init__)
    own = [p for p in whole.parameters.values() if p.name not in ("self", "kwargs")]
    return str(whole.replace(parameters=own, return_annotation=whole.empty)), None


def setup(app):
    app.add_directive("command-line", CommandLine)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
