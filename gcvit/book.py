"""What knows that a notebook is looking: how much to run, and how much to show."""

import os
import sys

from gcvit.fetch import FetchError
from gcvit.fine_tuning.recipes import Plan
from gcvit.fine_tuning.training import accelerator, precision
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


def run_plan(photos):
    """Return the `Plan` that the environment variable `GCVIT_RUN` asks for.

    "full" trains on all photographs by the original recipe; "quick" takes about a minute
    on two CPU cores; "auto", which stands where nothing is set, is full on an accelerator
    and quick on a CPU. "brief" is quick with a single epoch, for tests.

    Args:
        photos: `Photographs` to be trained on.

    Raises:
        ValueError: if `GCVIT_RUN` holds something else.
    """
    setting = run_setting()
    device, imagenet = accelerator(), imagenet_weights()
    full = setting == "full" or (setting == "auto" and device is not None)
    name = "full" if full else "quick" if setting == "auto" else setting
    notes = [
        f"GCVIT_RUN is {setting}, and there is {'a ' + device if device else 'no accelerator'}: "
        f"this is the {name} run."
    ]
    if imagenet:
        model = {"preset": "gcvit_xxtiny", "weights": "imagenet", "image_size": 224}
    else:
        model = {"preset": "gcvit_nano", "weights": "flowers", "image_size": 128}
        notes.append(
            "The ImageNet weights cannot be had here, so the model is gcvit_nano, which ships "
            "with the book."
        )
        if photos.name == "tf_flowers":
            notes.append(
                "It was trained on the training split of these very flowers: with a new head "
                "it relearns the head, and that is no test of transfer to new data."
            )
        else:
            notes.append("It was trained on flowers, so what follows is transfer to new data.")
    if full:
        sizes = {"train_size": None, "validation_size": None, "epochs": 5, "batch_size": 32}
    elif imagenet:
        sizes = {"train_size": 128, "validation_size": 64, "epochs": 3, "batch_size": 16}
    else:
        sizes = {"train_size": 256, "validation_size": 128, "epochs": 3, "batch_size": 32}
    if name == "brief":
        sizes["epochs"] = 1
    used = photos.take(sizes["train_size"], sizes["validation_size"])
    if used.train_size < photos.train_size or used.validation_size < photos.validation_size:
        notes.append(
            f"Left out: {photos.train_size - used.train_size} of {photos.train_size} training "
            f"photographs and {photos.validation_size - used.validation_size} of "
            f"{photos.validation_size} for validation. GCVIT_RUN=full takes them all."
        )
    recipe = "original" if full else "finetune"
    return Plan(
        name,
        **model,
        **sizes,
        dtype=precision(),
        recipe=recipe,
        notes=tuple(notes),
    )
