"""The two recipes of the chapter, and what they are made of."""

from pathlib import Path

import keras
import numpy as np

from gcvit.checks import labels_within
from gcvit.fine_tuning.pipeline import (
    every_epoch,
    flip,
    make_dataset,
    mix,
    one_hot,
    pad_last_batch,
    rand_augment,
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


def layer_rates(model, decay=0.75):
    """Return a factor for the learning rate of each part of a model, by its name.

    The head and the last norm have 1, the last level `decay`, and each part before it
    `decay` times the next one's.

    Args:
        model: a `GCViT`.
        decay: the factor from part to part; default 0.75.
    """
    parts = ["patch_embed", *(level.name for level in model.levels)]
    return {part: decay ** (len(parts) - i) for i, part in enumerate(parts)}


@keras.saving.register_keras_serializable(package="gcvit")
class LayerwiseAdamW(keras.optimizers.AdamW):
    """AdamW with a learning rate for each part of the model.

    The weight decay is that of `keras.optimizers.AdamW`: it goes by the rate of the
    schedule, not by the part's.

    Args:
        learning_rate: a number or a schedule.
        rates: {name: factor}; a variable whose path holds the name learns at the factor
            times the rate. Default: none.
        **kwargs: what `keras.optimizers.AdamW` takes.
    """

    def __init__(self, learning_rate=1e-3, rates=None, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.rates = dict(rates or {})

    def build(self, variables):
        super().build(variables)
        self.variable_rates = [self.rate_of(variable) for variable in variables]

    def rate_of(self, variable):
        """Return the factor that a variable's learning rate gets."""
        names = set(variable.path.split("/"))
        return next((rate for name, rate in self.rates.items() if name in names), 1.0)

    def update_step(self, gradient, variable, learning_rate):
        # TensorFlow passes its own variable, which has lost its path but not its place.
        rate = self.variable_rates[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * rate)

    def get_config(self):
        return {**super().get_config(), "rates": self.rates}


def adamw(learning_rate, weight_decay=0.05, rates=None, **kwargs):
    """Return AdamW whose decay spares biases, norms, factors and the position tables.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: decay of the matrices; default 0.05.
        rates: see `LayerwiseAdamW`; default `None`: the same rate for all.
        **kwargs: what `keras.optimizers.AdamW` takes.
    """
    kwargs = {"learning_rate": learning_rate, "weight_decay": weight_decay, **kwargs}
    optimizer = LayerwiseAdamW(rates=rates, **kwargs) if rates else keras.optimizers.AdamW(**kwargs)
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


def _epochs(photos, settings, augment=flip):
    """Return what gives the batches of all epochs from one on, by its number."""
    names = ("image_size", "batch_size", "seed", "crop")
    options = {"train": True, "augment": augment, "smallest": settings.get("smallest")}
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
    peak=1e-3, layer_decay=0.75, smallest=None, strength=0.2, mixing=True, averaging=True,
    patience=3,
):  # fmt: skip
    """Prepare a recipe that holds on to what the pretrained model knows.

    AdamW with warmup and cosine, lower rates for the earlier layers, RandAugment, MixUp and
    CutMix, smoothed labels, averaged weights, and the best epoch's weights kept.

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
        layer_decay: see `layer_rates`; default 0.75. From random weights there is nothing
            to hold on to: 1.
        smallest: see `make_dataset`; default `None`.
        strength: see `rand_augment`; default 0.2; 0: photographs are mirrored, no more.
        mixing: whether to `mix` the batches; default `True`.
        averaging: whether to average the weights; default `True`.
        patience: epochs without a lower validation loss after which it stops; default 3;
            `None`: it does not.

    Returns:
        See `original`. Labels are one-hot here.
    """
    settings = {"recipe": "finetune", "image_size": image_size, "epochs": epochs}
    settings |= {"batch_size": batch_size, "crop": crop, "seed": seed}
    settings |= {"peak": peak, "layer_decay": layer_decay, "smallest": smallest}
    settings |= {"strength": strength, "mixing": mixing, "averaging": averaging}
    classes = len(photos.class_names)
    steps = _steps(photos, batch_size)
    tenth = epochs * steps / 10
    optimizer = adamw(
        warmup_cosine(peak, int(tenth), epochs * steps),
        rates=layer_rates(model, layer_decay),
        global_clipnorm=1.0,
        use_ema=averaging,
        ema_momentum=1 - 1 / max(tenth, 2),  # the average spans a tenth of the run
    )
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    make_variables(model, np.zeros((1, classes)), classes)
    passes = _epochs(photos, settings, rand_augment(strength) if strength else flip)

    def batches(first):
        labeled = one_hot(passes(first), classes)
        return mix(labeled, seed, first * steps) if mixing else labeled

    validation = make_dataset(photos.validation, image_size, batch_size, crop=crop)
    validation = one_hot(validation, classes)
    return _run(model, photos, batches, validation, settings, backup, patience=patience)


RECIPES = {"original": original, "finetune": finetune}
"""The recipes by name."""
