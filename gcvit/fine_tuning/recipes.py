"""The two recipes of the chapter, and what they are made of."""

from pathlib import Path

import keras
import numpy as np

from gcvit.checks import labels_within
from gcvit.fine_tuning.pipeline import (
    every_epoch,
    make_dataset,
    one_hot,
    pad_last_batch,
)
from gcvit.fine_tuning.training import (
    Run,
    TrainingState,
    jit_compile,
    make_variables,
)


def warmup_cosine(peak, warmup_steps, steps):
    """Return a schedule that rises evenly from 0, then falls along half a cosine to 0.

    Args:
        peak: highest learning rate.
        warmup_steps: steps from 0 to the peak.
        steps: all steps, those of the warm-up included.
    """
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(steps - warmup_steps, 1), warmup_target=peak, warmup_steps=warmup_steps
    )


def adamw(learning_rate, weight_decay=0.05, **kwargs):
    """Return AdamW whose decay spares biases, norms, factors and the position tables.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: decay of the matrices; default 0.05.
        **kwargs: what `keras.optimizers.AdamW` takes.
    """
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay, **kwargs)
    # "bias" is part of the position tables' name too.
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def _distributed():
    """Tell whether a `keras.distribution` is set, which wants batches that can be shared out."""
    return keras.distribution.distribution() is not None


def _steps(photos, batch_size):
    """Return the steps of an epoch; where they are shared out, all batches are full."""
    whole, rest = divmod(photos.train_size, batch_size)
    return whole + (rest > 0 and not _distributed())


def _epochs(photos, settings):
    """Return what gives the batches of all epochs from one on, by its number."""
    names = ("image_size", "batch_size", "seed", "crop")
    options = {"train": True, "smallest": settings.get("smallest")}
    options |= {name: settings[name] for name in names}

    def one_pass(epoch):
        batches = make_dataset(photos.train, epoch=epoch, **options)
        return batches.take(_steps(photos, settings["batch_size"]))

    return lambda first: every_epoch(one_pass, first, settings["epochs"])


def _run(model, photos, batches, validation, settings, backup, **keeping):
    """Return the `Run`.

    A run that goes on from a backup must have the same `settings`; `keeping` is for its
    `TrainingState`.
    """
    activation = keras.activations.get(getattr(model, "head_activation", "softmax"))
    if activation is keras.activations.linear:
        raise ValueError(
            "The recipes train a model that gives probabilities, and this one gives logits: build "
            'it with head_activation="softmax".'
        )
    # None of them is decoded for this, and the losses would take other labels without a word.
    labels_within(list(photos.train_labels.as_numpy_iterator()), len(photos.class_names))
    batch_size = settings["batch_size"]
    if _distributed():
        validation = pad_last_batch(validation, batch_size, photos.validation_size)
    described = {
        "classes": list(photos.class_names),
        "photographs": [photos.train_size, photos.validation_size],
        "dtype": model.dtype_policy.name,
        **settings,
    }
    state = TrainingState(model, described, backup and Path(backup) / "run.npz", **keeping)
    return Run(batches, validation, settings["epochs"], _steps(photos, batch_size), state)


def original(model, photos, image_size, epochs=5, batch_size=32, crop=1.0, backup=None, seed=0):
    """Prepare the recipe of the original notebook: flips, Adam at 1e-3, nothing else.

    Under a `keras.distribution` an epoch's last batch is left out if it is not full, and the
    validation's last one is filled by `pad_last_batch`: devices take equal parts.

    Args:
        model: a `GCViT` that gives probabilities; it is compiled.
        photos: `Photographs`.
        image_size: side of the model's images in pixels, or (height, width).
        epochs: passes over the photographs; default 5.
        batch_size: photographs a step; default 32.
        crop: see `gcvit.images.center_box`; default 1. The preset names its own.
        backup: folder to keep the state of a training run in that is cut off; default
            `None`: it is not kept.
        seed: seed of the photographs' order and of all that is done to them; default 0.

    Returns:
        A `Run`, for `fit`.
    """
    settings = {"recipe": "original", "image_size": image_size, "epochs": epochs}
    settings |= {"batch_size": batch_size, "crop": crop, "seed": seed}
    model.compile(
        keras.optimizers.Adam(1e-3),
        "sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    make_variables(model, np.zeros(1), len(photos.class_names))
    batches = _epochs(photos, settings)
    validation = make_dataset(photos.validation, image_size, batch_size, crop=crop)
    return _run(model, photos, batches, validation, settings, backup, leave_best=False)


def finetune(
    model, photos, image_size, epochs=5, batch_size=32, crop=1.0, backup=None, seed=0,
    peak=1e-3, smallest=0.35, patience=3,
):  # fmt: skip
    """Prepare a recipe that holds on to what the pretrained model knows.

    AdamW with warm-up and cosine, random parts of the photographs, half of them mirrored,
    smoothed labels, and the best epoch's weights kept.

    Args:
        model: see `original`.
        photos: see `original`.
        image_size: see `original`.
        epochs: see `original`.
        batch_size: see `original`.
        crop: see `original`.
        backup: see `original`.
        seed: see `original`.
        peak: highest learning rate; default 1e-3.
        smallest: see `make_dataset`; default 0.35.
        patience: epochs without a lower validation loss after which it stops; default 3;
            `None`: it does not.

    Returns:
        See `original`. Labels are one-hot here.
    """
    settings = {"recipe": "finetune", "image_size": image_size, "epochs": epochs}
    settings |= {"batch_size": batch_size, "crop": crop, "seed": seed}
    settings |= {"peak": peak, "smallest": smallest}
    classes = len(photos.class_names)
    steps = epochs * _steps(photos, batch_size)
    model.compile(
        adamw(warmup_cosine(peak, steps // 10, steps), global_clipnorm=1.0),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    make_variables(model, np.zeros((1, classes)), classes)
    passes = _epochs(photos, settings)

    def batches(first):
        return one_hot(passes(first), classes)

    validation = make_dataset(photos.validation, image_size, batch_size, crop=crop)
    validation = one_hot(validation, classes)
    return _run(model, photos, batches, validation, settings, backup, patience=patience)


RECIPES = {"original": original, "finetune": finetune}
"""The recipes by name."""
