"""Chapter 9: a small experiment that tells what a part of the model buys."""

from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from scipy import stats

from gcvit.attention import WindowAttention
from gcvit.fine_tuning import warmup_cosine, without_autotune
from gcvit.fine_tuning.training import assign, make_variables, values_of
from gcvit.global_tokens import FeatureExtraction
from gcvit.model import GCViT
from gcvit.unit_blocks import SqueezeAndExcitation, reinit_glorot, run

# The faults of the original Keras notebook.


def flat_gather(attention):
    """Return the position bias as the original Keras notebook reads it, (1, tokens, tokens).

    The table is taken for one flat list, so that every head gets the same bias, from
    cells of other offsets and other heads. It stands in for
    `WindowAttention.relative_position_bias`.
    """
    index = attention.position_index
    return ops.take(attention.relative_position_bias_table, index)[None]  # no axis=0


def zero_padding(extraction, x):
    """Return maps halved as the original Keras notebook halves them.

    The border is padded with zeros, which win wherever all the values they stand beside
    are negative. It stands in for `FeatureExtraction.halve`.
    """
    with_border = ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
    pool = extraction.pool
    return ops.max_pool(with_border, pool.pool_size, pool.strides, data_format="channels_last")


FAULTS = {"flat_gather": flat_gather, "zero_padding": zero_padding}

# The pathways from one end of the map to the other, and what closes them.

PATHWAYS = ("query", "gates", "late")
"""The global query, the gates of squeeze-and-excitation, the windows of the last level."""


def constant_query(level, x):
    """Return the query that a map of ones gives: learned, but the same for every image."""
    return type(level).q_global(level, ops.ones_like(x[:1]))


def gates_of_each_place(layer, x):
    """Return gates that each place computes from its own channels, not from averages."""
    return run(layer.fc, x)


def block_mask(side, part):
    """Return what keeps the parts of a window from seeing each other, added to its scores.

    Args:
        side: side of the window in tokens.
        part: side of a part in tokens.

    Returns:
        (tokens, tokens): 0 where two tokens share a part, else -1e9.
    """
    row, column = np.divmod(np.arange(side**2), side)
    at = row // part * side + column // part
    return np.where(at[:, None] == at[None], 0, -1e9).astype("float32")


@keras.saving.register_keras_serializable(package="gcvit")
class Switched(GCViT):
    """A `GCViT` whose pathways and faults are switched by weights: one compiled model for all arms.

    At first the `PATHWAYS` are open and the `FAULTS` absent, and the model computes exactly
    what a `GCViT` does. A pathway that is closed is replaced by something with the same
    parameters that sees nothing far: a constant query, gates of each place, windows of
    the last level that fall apart into windows of the first level's size.

    Args: those of `GCViT`. The windows of the first and of the last level must be square.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.switches = {
            name: self.add_weight(
                name=name,
                shape=(),
                initializer="ones" if name in PATHWAYS else "zeros",
                trainable=False,
            )
            for name in (*PATHWAYS, *FAULTS)
        }

    def switch(self, pathways=PATHWAYS, faults=()):
        """Open the pathways and put in the faults that are named, and no others.

        Raises:
            ValueError: for a name that is not in `PATHWAYS` or `FAULTS`.
        """
        wanted = {*pathways, *faults}
        if not wanted <= set(self.switches):
            raise ValueError(f"The switches are {', '.join(self.switches)}; got {sorted(wanted)}.")
        for name, variable in self.switches.items():
            variable.assign(float(name in wanted))

    def build(self, input_shape):
        built = self.built
        super().build(input_shape)
        if built:  # the switches are in their places
            return
        for layer in self._flatten_layers():
            if isinstance(layer, SqueezeAndExcitation):
                self._lead("gates", layer, "gates", closed=gates_of_each_place)
            elif isinstance(layer, WindowAttention):
                self._lead("flat_gather", layer, "relative_position_bias", opened=flat_gather)
            elif isinstance(layer, FeatureExtraction) and not layer.keepdims:
                self._lead("zero_padding", layer, "halve", opened=zero_padding)
        for level in self.levels:
            self._lead("query", level, "q_global", closed=constant_query)
        mask = block_mask(self.window_size[-1][0], self.window_size[0][0])
        for block in self.levels[-1].blocks:
            bias = block.attn.relative_position_bias
            self._lead(
                "late",
                block.attn,
                "relative_position_bias",
                closed=lambda _, bias=bias: ops.add(bias(), mask),
            )

    def _lead(self, name, layer, method, opened=None, closed=None):
        """Let a switch lead from a layer's method to what stands in for it.

        With a switch of exactly 0 or 1, the sum is exactly one of its two terms.
        """
        switch, usual = self.switches[name], getattr(layer, method)

        def chosen(*args):
            one = opened(layer, *args) if opened else usual(*args)
            other = closed(layer, *args) if closed else usual(*args)
            return switch * one + (1 - switch) * other

        setattr(layer, method, chosen)


# The task: are the two ends of the image of one color?

SIDE, WIDTH = 32, 3
"""Side of the image and width of its two stripes, in pixels."""

COLORS = np.array([[1, 0, -1], [-1, 0, 1]], "float32")
"""What a stripe adds to red, green and blue: one of two colors."""


def paint(backgrounds, colors):
    """Return backgrounds with a stripe at the left and one at the right edge.

    Args:
        backgrounds: (count, height, width, 3).
        colors: (count, 2), 0 or 1: the colors of the left and of the right stripe.
    """
    images = backgrounds.copy()
    images[:, :, :WIDTH] += COLORS[colors[:, 0], None, None]
    images[:, :, -WIDTH:] += COLORS[colors[:, 1], None, None]
    return images


def noise(count, rng):
    """Return backgrounds, (count, height, width, 3), uniform between -0.2 and 0.2."""
    return rng.uniform(-0.2, 0.2, (count, SIDE, SIDE, 3)).astype("float32")


def examples(count, rng):
    """Return images with stripes drawn at random, and labels: 1 for one color, else 0."""
    colors = rng.integers(2, size=(count, 2))
    return paint(noise(count, rng), colors), np.int32(colors[:, 0] == colors[:, 1])


def all_pairs(backgrounds, rng):
    """Return each of some backgrounds with all four pairs of stripes, and the labels."""
    colors = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (backgrounds, 1))
    images = paint(np.repeat(noise(backgrounds, rng), 4, axis=0), colors)
    return images, np.int32(colors[:, 0] == colors[:, 1])


def in_batches(images, labels, batch):
    """Return a `tf.data.Dataset` of batches, which Keras would make with autotuning."""
    return without_autotune(tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch))


# The runs.


@dataclass(frozen=True)
class Design:
    """What every run has in common: Adam, a rate that rises and falls, fresh images.

    Attributes:
        steps: training steps; default 120.
        batch: images in a step; default 32.
        rate: highest learning rate; default 0.004.
        warmup: steps from 0 to that rate; default 20.
        every: steps that one number of the learning curve is the mean of; default 10.
        backgrounds: backgrounds of the test set; default 128.
    """

    steps: int = 120
    batch: int = 32
    rate: float = 4e-3
    warmup: int = 20
    every: int = 10
    backgrounds: int = 128


BRIEF = Design(steps=4, warmup=1, every=1, backgrounds=16)
"""A design that settles nothing, for tests."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        curve: training loss, the mean of each `Design.every` steps, in nats.
        accuracy: share of the test set that is right.
        bits: what the model knows of a test label: 1 minus its cross-entropy in bits. A
            guess gives 0, certainty 1.
    """

    curve: tuple
    accuracy: float
    bits: float


class _Curve(keras.callbacks.Callback):
    """Keep the mean loss of each execution; Keras shows that of the epoch so far."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))
        self.model.reset_metrics()


class Experiment:
    """A model that is compiled once and trained many times, from any seed, in any arm.

    Args:
        design: a `Design`; default: its defaults.
        **config: arguments of `GCViT` to replace those of a small model of two levels.
    """

    def __init__(self, design=None, **config):
        self.design = design or Design()
        self.config = {
            "window_size": (2, 4),
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "mlp_ratio": 2.0,
            "path_drop": 0.0,
            "num_classes": 2,
            "head_activation": None,
            **config,
        }
        self.model = self._built(Switched)
        rate = warmup_cosine(self.design.rate, self.design.warmup, self.design.steps)
        self.model.compile(
            keras.optimizers.Adam(rate, global_clipnorm=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=self.design.every,
            jit_compile=False,
        )
        make_variables(self.model, np.zeros(1), self.config["num_classes"])
        self._rest = values_of(self.model.optimizer.variables)
        self._starts = {}
        self._test = in_batches(*all_pairs(self.design.backgrounds, np.random.default_rng(0)), 128)

    def _built(self, cls):
        model = cls(**self.config)
        model.build((None, SIDE, SIDE, 3))
        return model

    def start(self, seed):
        """Give the model new weights, which follow from the seed; forget all steps.

        It starts wide: from where a `GCViT` starts, the query alone does not find the answer
        in so few steps.
        """
        if seed not in self._starts:
            keras.utils.set_random_seed(seed)
            new = self._built(GCViT)
            reinit_glorot(new)
            self._starts[seed] = values_of(new.trainable_variables)
        assign(self.model.trainable_variables, self._starts[seed])
        assign(self.model.optimizer.variables, self._rest)

    def train(self, seed, pathways=PATHWAYS, faults=()):
        """Train from a seed, with some pathways open and some faults put in, and test.

        The seed decides the first weights and the images, so that arms of one seed differ
        in nothing but their switches.

        Returns:
            An `Outcome`.
        """
        self.start(seed)
        self.model.switch(pathways, faults)
        design, curve = self.design, _Curve()
        images, labels = examples(design.steps * design.batch, np.random.default_rng(seed + 1))
        batches = in_batches(images, labels, design.batch)
        self.model.fit(batches, shuffle=False, verbose=0, callbacks=[curve])
        return Outcome(tuple(curve.losses), *self.test(pathways, faults))

    def test(self, pathways=PATHWAYS, faults=()):
        """Return accuracy and bits on the test set, which is the same for every run."""
        self.model.switch(pathways, faults)
        numbers = self.model.evaluate(self._test, verbose=0, return_dict=True)
        return numbers["accuracy"], 1 - numbers["loss"] / np.log(2)


# What the runs say.


def steps_to_learn(outcome, every=10, bits=0.5):
    """Return after how many steps the training loss fell below 1 - `bits` bits, or `None`."""
    for i, loss in enumerate(outcome.curve):
        if loss < (1 - bits) * np.log(2):
            return (i + 1) * every
    return None


def interval(values):
    """Return the mean of some values and half the width of its 95 per cent t interval.

    Raises:
        ValueError: for fewer than two values, which have no spread.
    """
    if len(values) < 2:
        raise ValueError(f"interval wants at least 2 values, one for each seed; got {len(values)}.")
    t = stats.t.ppf(0.975, df=len(values) - 1)
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / len(values) ** 0.5)


def verdict(differences, matters=0.1):
    """Say what the differences between two arms, one for each seed, tell.

    Args:
        differences: bits of one arm minus bits of the other, from the same seed.
        matters: the smallest difference that matters, in bits; default 0.1.

    Returns:
        "more" or "less" where the whole t interval is beyond `matters`, "no difference
        that matters" where all of it is within, else "cannot tell".
    """
    mean, half = interval(differences)
    if abs(mean) + half < matters:
        return "no difference that matters"
    if abs(mean) - half > matters:
        return "more" if mean > 0 else "less"
    return "cannot tell"
