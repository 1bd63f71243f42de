"""What knows that a notebook is looking: how much to run, and how much to show."""

import dataclasses
import html
import os
import sys

from gcvit.fetch import FetchError
from gcvit.fine_tuning.training import accelerator
from gcvit.presets import PRESETS
from gcvit.weights import locate


def is_interactive():
    """Tell whether a person is looking at the output.

    A notebook that is executed for a page or for a test is run by a client that nobody can
    be asked through, and that says so with each cell (`allow_stdin` of the execute request
    in Jupyter's messaging protocol). Anywhere else, a terminal is watched and a file is not.
    """
    if "google.colab" in sys.modules:
        return True
    if "ipykernel" in sys.modules:
        from IPython import get_ipython

        kernel = getattr(get_ipython(), "kernel", None)
        if kernel is not None:
            return bool(kernel.get_parent().get("content", {}).get("allow_stdin"))
    return sys.stdout.isatty()


def verbosity():
    """Return `Model.fit`'s `verbose`: a moving bar (1) for a person, else a line an epoch (2)."""
    return 1 if is_interactive() else 2


def imagenet_weights():
    """Tell whether `gcvit_xxtiny`'s ImageNet weights are here, or could be fetched."""
    try:
        locate(PRESETS["gcvit_xxtiny"]["weights"]["imagenet"])
    except FetchError:
        return False
    return True


def run_setting():
    """Return what the environment variable `GCVIT_RUN` holds; "auto" where nothing is set.

    Raises:
        ValueError: if it is none of "auto", "quick", "full" and "brief".
    """
    setting = os.environ.get("GCVIT_RUN") or "auto"
    if setting not in ("auto", "quick", "full", "brief"):
        raise ValueError(f"GCVIT_RUN must be auto, quick, full or brief; got {setting!r}.")
    return setting


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How much of chapter 8 is run.

    Attributes:
        train_size: photographs that the three ways of its live run train on.
        validation_size: photographs that they choose by.
        epochs: passes over them.
        original: whether the original notebook's run is made too.
    """

    train_size: int
    validation_size: int
    epochs: int
    original: bool


def train_config():
    """Return the `TrainConfig` that the environment variable `GCVIT_RUN` asks for.

    "brief" has fewer epochs, for tests. The original notebook's run is made where "full" asks
    for it, or by "auto", which stands where nothing is set, on an accelerator.

    Raises:
        ValueError: see `run_setting`.
    """
    setting = run_setting()
    original = setting == "full" or (setting == "auto" and accelerator() is not None)
    return TrainConfig(160, 96, 2 if setting == "brief" else 5, original)


def check_yourself(question, answer, choices):
    """Return a question with choices to click on, each of which opens what is to be said of it.

    It is plain HTML without a script, so that it works in a page, in a notebook and in an EPUB.

    Args:
        question: a sentence.
        answer: the right choice, as the chapter has computed it.
        choices: {choice: what is said to a reader who takes it}, in the order shown.

    Returns:
        `IPython.display.HTML`.

    Raises:
        ValueError: if the answer is not among the choices, or nothing is said of one.
    """
    from IPython.display import HTML

    if answer not in choices:
        raise ValueError(f"The answer, {answer!r}, is not among the choices {list(choices)}.")
    silent = [choice for choice, feedback in choices.items() if not feedback.strip()]
    if silent:
        raise ValueError(f"Nothing is said of the choices {silent}.")
    items = "".join(
        f'<details class="{"right" if choice == answer else "wrong"}">'
        f"<summary>{html.escape(str(choice))}</summary>"
        f"<p><b>{'Right.' if choice == answer else 'No.'}</b> {html.escape(feedback)}</p></details>"
        for choice, feedback in choices.items()
    )
    return HTML(f'<div class="check-yourself"><p>{html.escape(question)}</p>{items}</div>')
