"""Chapter 10: the model in the page, and its attention weights packed small."""

from gcvit.explorer.explorer import (
    FRAME,
    LIMIT,
    Page,
    checkpoint_script,
    choose,
    explore,
    export,
    pack,
    picture,
    run_here,
    show,
    token_at,
    unpack,
    weights_of,
)

__all__ = [
    "FRAME",
    "LIMIT",
    "Page",
    "checkpoint_script",
    "choose",
    "explore",
    "export",
    "pack",
    "picture",
    "run_here",
    "show",
    "token_at",
    "unpack",
    "weights_of",
]
