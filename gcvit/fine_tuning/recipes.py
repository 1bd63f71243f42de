"""The two recipes of the chapter, and what they are made of."""

import dataclasses
from pathlib import Path

import keras
import numpy as np

from gcvit.fine_tuning.pipeline import (
    make_dataset,
    mix,
    one_hot,
    pad_last_batch,
    rand_augment,
)
from gcvit.fine_tuning.training import Run, TrainingState, jit_compile, make_variables


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of the chapter consists of.

    Attributes:
        name: "quick", "full" or "brief".
        preset: the model, a name in `gcvit.PRESETS`.
        weights: its weights, as `GCViT.from_preset` takes them.
        image_size: side of the images in pixels.
        train_size: photographs to train on; `None` for all.
        validation_size: photographs to validate on; `None` for all.
        epochs: passes over them.
        batch_size: images a step.
        dtype: what it is computed in: "float32", or a mixed precision.
        recipe: name of one of `RECIPES`.
        notes: sentences that say why, and what is left out.
    """

    name: str
    preset: str
    weights: str
    image_size: int
    train_size: int | None
    validation_size: int | None
    epochs: int
    batch_size: int
    dtype: str
    recipe: str
    notes: tuple


@keras.saving.register_keras_serializable(package="gcvit")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Raise the learning rate evenly, then lower it along half a cosine to 0.

    Args:
        peak: highest learning rate.
        warmup_steps: steps from 0 to the peak.
        total_steps: steps after which the rate is 0.
    """

    def __init__(self, peak, warmup_steps, total_steps):
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        ops = keras.ops
        step = ops.cast(step, "float32")
        warmup = (step + 1) / max(self.warmup_steps, 1)
        rest = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + ops.cos(np.pi * ops.clip(rest, 0.0, 1.0)))
        return self.peak * ops.minimum(warmup, cosine)

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


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


def _described(model, photos, plan, recipe, **settings):
    """Return what two runs share of which one can go on from the other's backup."""
    described = {
        "recipe": recipe,
        "classes": list(photos.class_names),
        "photographs": [photos.train_size, photos.validation_size],
        "weights' shapes": [list(variable.shape) for variable in model.weights],
    }
    for name in ("image_size", "epochs", "batch_size", "dtype"):
        described[name] = getattr(plan, name)
    return {**described, **settings}


def _distributed():
    """Tell whether a `keras.distribution` is set, which wants batches that can be shared out."""
    return keras.distribution.distribution() is not None


def _steps_an_epoch(photos, plan):
    whole, rest = divmod(photos.train_size, plan.batch_size)
    return whole + (rest > 0 and not _distributed())


def _run(train, validation, photos, plan, keeper):
    """Return the `Run`. Where batches are shared out among devices all of them are full."""
    if _distributed():
        train = train.take(_steps_an_epoch(photos, plan))
        validation = pad_last_batch(validation, plan.batch_size, photos.validation_size)
    return Run(train, validation, plan.epochs, keeper)


def original(model, photos, plan, backup=None, seed=0):
    """Prepare the recipe of the original notebook: flips, Adam at 1e-3, nothing else.

    Under a `keras.distribution` an epoch's last batch is left out if it is not full, and the
    validation's last one is `pad_last_batch`: devices take equal parts.

    Args:
        model: a `GCViT` that gives probabilities; it is compiled.
        photos: `Photographs`.
        plan: the `Plan`, for the image size, the batch size and the epochs.
        backup: folder to keep the state of a training run in that is cut off; default
            `None`: it is not kept.
        seed: seed of the photographs' order and of all that is done to them; default 0.

    Returns:
        A `Run`, for `fit`.
    """
    size = plan.image_size, plan.batch_size
    model.compile(
        keras.optimizers.Adam(1e-3),
        "sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    make_variables(model, np.zeros(1), len(photos.class_names))
    described = _described(model, photos, plan, "original", seed=seed)
    keeper = TrainingState(model, described, backup and Path(backup) / "run.npz", leave_best=False)
    train = make_dataset(photos.train, *size, train=True, seed=seed, epoch=keeper.pass_number)
    return _run(train, make_dataset(photos.validation, *size), photos, plan, keeper)


def finetune(
    model, photos, plan, backup=None, seed=0, peak=1e-3, layer_decay=0.75, strength=0.2, patience=3
):
    """Prepare a recipe that holds on to what the pretrained model knows.

    AdamW with warmup and cosine, lower rates for the earlier layers, RandAugment, MixUp and
    CutMix, smoothed labels, averaged weights, and the best epoch's weights kept.

    Args:
        model: see `original`.
        photos: see `original`.
        plan: see `original`.
        backup: see `original`.
        seed: see `original`.
        peak: highest learning rate; default 1e-3.
        layer_decay: see `layer_rates`; default 0.75. From random weights there is nothing
            to hold on to: 1.
        strength: see `rand_augment`; default 0.2.
        patience: epochs without a lower validation loss after which it stops; default 3;
            `None`: it does not.

    Returns:
        See `original`. Labels are one-hot here.
    """
    classes, size = len(photos.class_names), (plan.image_size, plan.batch_size)
    steps = plan.epochs * _steps_an_epoch(photos, plan)
    model.compile(
        adamw(
            WarmupCosine(peak, steps // 10, steps),
            rates=layer_rates(model, layer_decay),
            global_clipnorm=1.0,
            use_ema=True,
            ema_momentum=1 - 1 / max(steps / 10, 2),  # the average spans a tenth of the run
        ),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    make_variables(model, np.zeros((1, classes)), classes)
    settings = {"peak": peak, "layer_decay": layer_decay, "strength": strength}
    described = _described(model, photos, plan, "finetune", seed=seed, **settings)
    keeper = TrainingState(model, described, backup and Path(backup) / "run.npz", patience)
    train = make_dataset(
        photos.train,
        *size,
        train=True,
        augment=rand_augment(strength),
        seed=seed,
        epoch=keeper.pass_number,
    )
    train = mix(one_hot(train, classes), seed, keeper.pass_number)
    validation = one_hot(make_dataset(photos.validation, *size), classes)
    return _run(train, validation, photos, plan, keeper)


RECIPES = {"original": original, "finetune": finetune}
"""The recipes by name."""
