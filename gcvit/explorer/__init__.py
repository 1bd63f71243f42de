"""Chapter 10: the model in the page, and a figure of what it shows."""

from gcvit.explorer.explorer import (
    as_stored,
    checkpoint_address,
    checkpoint_script,
    picture,
    run_here,
    token_at,
)

__all__ = [
    "as_stored",
    "checkpoint_address",
    "checkpoint_script",
    "picture",
    "run_here",
    "token_at",
]
