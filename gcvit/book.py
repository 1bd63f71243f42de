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
    """What chapter 8 trains, on how much, and why.

    Attributes:
        name: "quick", "full" or "brief".
        preset: the model, a name in `gcvit.PRESETS`, which has its image size and crop.
        weights: its weights, as `GCViT.from_preset` takes them.
        train_size: photographs to train on; `None` for all.
        validation_size: photographs to validate on; `None` for all.
        epochs: passes over them.
        batch_size: images a step.
        recipe: name of one of `fine_tuning.RECIPES`.
        notes: sentences that say why, and what is left out.
    """

    name: str
    preset: str
    weights: str
    train_size: int | None
    validation_size: int | None
    epochs: int
    batch_size: int
    recipe: str
    notes: tuple


def train_config(photos):
    """Return the `TrainConfig` that the environment variable `GCVIT_RUN` asks for.

    "full" trains on all photographs by the original recipe; "quick" takes about a minute
    on two CPU cores; "auto", which stands where nothing is set, is full on an accelerator
    and quick on a CPU. "brief" is quick with a single epoch, for tests.

    Args:
        photos: `Photographs` to be trained on.

    Raises:
        ValueError: if `GCVIT_RUN` holds something else.
    """
    setting, device, imagenet = run_setting(), accelerator(), imagenet_weights()
    full = setting == "full" or (setting == "auto" and device is not None)
    name = "full" if full else "quick" if setting == "auto" else setting
    if full:
        train_size, validation_size, epochs, batch_size = None, None, 5, 32
    elif imagenet:
        train_size, validation_size, epochs, batch_size = 128, 64, 3, 16
    else:
        train_size, validation_size, epochs, batch_size = 256, 128, 3, 32
    notes = [
        f"GCVIT_RUN is {setting}, and there is {'a ' + device if device else 'no accelerator'}: "
        f"this is the {name} run.",
    ]
    used = photos.take(train_size, validation_size)
    if used.train_size < photos.train_size or used.validation_size < photos.validation_size:
        notes.append(
            f"Left out: {photos.train_size - used.train_size} of {photos.train_size} training "
            f"photographs and {photos.validation_size - used.validation_size} of "
            f"{photos.validation_size} for validation. GCVIT_RUN=full takes them all."
        )
    return TrainConfig(
        name,
        *(("gcvit_xxtiny", "imagenet") if imagenet else ("gcvit_nano", "tiny_imagenet")),
        train_size,
        validation_size,
        1 if name == "brief" else epochs,
        batch_size,
        "original" if full else "finetune",
        tuple(notes),
    )


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
