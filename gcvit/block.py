"""Chapter 5: attention and MLP, each with its residual, on a map cut into windows."""

import functools
import warnings

import keras
from keras import layers, ops

from gcvit import fast
from gcvit.attention import WindowAttention
from gcvit.checks import feature_map_shape, fraction, heads_divide, pair
from gcvit.unit_blocks import MLP


def window_partition(x, window_size):
    """Cut maps into windows.

    Args:
        x: (batch, height, width, channels); the window's sides divide height and width.
        window_size: side of the window, or its (height, width).

    Returns:
        (batch · windows, window height, window width, channels): the first image's
        windows row by row, then the second's.

    Raises:
        ValueError: if the windows do not divide the map.
    """
    h, w = pair("window_size", window_size)
    _, height, width, channels = ops.shape(x)
    for name, side, window in (("height", height, h), ("width", width, w)):
        if isinstance(side, int) and side % window:
            raise ValueError(
                f"The window must divide the map: {name} {side} is not a multiple of {window}."
            )
    x = ops.reshape(x, (-1, height // h, h, width // w, w, channels))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, h, w, channels))


def window_reverse(windows, window_size, height, width, channels):
    """Put windows back together: the inverse of `window_partition`.

    Args:
        windows: (batch · windows, window height, window width, channels), or the same
            with the window's tokens in one axis.
        window_size: side of the window, or its (height, width).
        height: height of the map.
        width: width of the map.
        channels: channels of the map.

    Returns:
        (batch, height, width, channels).
    """
    h, w = pair("window_size", window_size)
    x = ops.reshape(windows, (-1, height // h, width // w, h, w, channels))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, height, width, channels))


@keras.saving.register_keras_serializable(package="keras_cv")
class DropPath(layers.Layer):
    """Drop samples of a residual branch in training; what stays is scaled up.

    It stands in for the layer of this name in keras_cv where that cannot be imported. Its
    arguments, registered name, attributes and random numbers are the same, so that a model
    saved with one loads with the other.

    Args:
        rate: share of the samples that is dropped; default 0.5.
        seed: a whole number for the random numbers; default `None`: another each time.

    Source: Huang et al. 2016 (stochastic depth).
    """

    def __init__(self, rate=0.5, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.given_seed = seed
        self.seed = keras.random.SeedGenerator(seed)

    def call(self, x, training=None):
        if self.rate == 0 or not training:
            return x
        one_each = (ops.shape(x)[0], *[1] * (len(x.shape) - 1))
        kept = keras.random.uniform(one_each, seed=self.seed) > self.rate
        return x / (1 - self.rate) * ops.cast(kept, x.dtype)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.given_seed}


@functools.cache
def _drop_path_class():
    """Return keras_cv's `DropPath`, or what stands in for it."""
    try:
        with warnings.catch_warnings():
            # Its data sets' progress bars, not used here, warn of missing widgets in a notebook.
            warnings.simplefilter("ignore")
            from keras_cv.layers import DropPath as found
    except Exception:  # it is no longer developed: whatever it raises on a newer Keras
        return DropPath
    return found


def drop_path(rate, dtype=None):
    """Make the layer that drops a residual branch, sample by sample, in training.

    The one place where keras_cv is imported, and not before it is needed: it takes
    longer to import than Keras does. Where it cannot be, `DropPath` stands in.

    Source: Huang et al. 2016 (stochastic depth).
    """
    return _drop_path_class()(rate, dtype=dtype)


def _scaled(gamma, x):
    return x if gamma is None else gamma * x


def _same(size, other):
    """Tell whether two sizes are known and equal; a side that is not known yet is a tensor."""
    known = all(isinstance(side, int) for side in (*size, *other))
    return known and tuple(size) == tuple(other)


@keras.saving.register_keras_serializable(package="gcvit")
class Block(layers.Layer):
    """One transformer block on windows: attention plus residual, MLP plus residual.

    A map whose sides the window does not divide is padded with zeros at the right and at
    the bottom for the attention, and cropped afterwards, as the official detection code
    does.

    Shapes: `x` is (batch, height, width, channels); `q_global` is (batch, window height,
    window width, channels). The output has the shape of `x`.

    Args:
        window_size: side of the window in tokens, or its (height, width).
        num_heads: attention heads.
        global_query: whether attention takes the global query.
        mlp_ratio: the MLP's hidden units as a multiple of the channels; default 4.
        qkv_bias: whether query, key and value have a bias; default `True`.
        qk_scale: factor on the query; default `None`: see `WindowAttention`.
        dropout: dropout rate in the MLP and after the projection; default 0.
        attention_dropout: dropout rate on the attention weights; default 0.
        path_drop: rate at which a residual branch is dropped in training; default 0.
        activation: the MLP's activation; default "gelu", the exact one.
        layer_scale: first value of the learned factors on both branches; default `None`:
            no factors.

    Raises:
        ValueError: if the heads do not divide the channels or the input is not a map.

    Source: paper, equations 1 and 2; official `gc_vit.py`, `GCViTBlock`.
    """

    def __init__(
        self,
        window_size,
        num_heads,
        global_query,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        dropout=0.0,
        attention_dropout=0.0,
        path_drop=0.0,
        activation="gelu",
        layer_scale=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.window_size = pair("window_size", window_size)
        self.num_heads = num_heads
        self.global_query = bool(global_query)
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.qk_scale = qk_scale
        self.dropout = fraction("dropout", dropout)
        self.attention_dropout = attention_dropout
        self.path_drop = fraction("path_drop", path_drop)
        self.activation = activation
        self.layer_scale = layer_scale
        dtype = self.dtype_policy
        self.norm1 = fast.LayerNormalization(epsilon=1e-5, dtype=dtype, name="norm1")
        self.attn = WindowAttention(
            window_size,
            num_heads,
            global_query,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attention_dropout=attention_dropout,
            projection_dropout=dropout,
            dtype=dtype,
            name="attn",
        )
        self.drop_path1 = drop_path(self.path_drop, dtype)
        self.norm2 = fast.LayerNormalization(epsilon=1e-5, dtype=dtype, name="norm2")
        self.drop_path2 = drop_path(self.path_drop, dtype)

    def build(self, x_shape, q_global_shape=None):
        height, width, channels = feature_map_shape(self, x_shape)
        heads_divide(channels, self.num_heads)
        h, w = self.window_size
        self.mlp = MLP(
            int(channels * self.mlp_ratio),
            activation=self.activation,
            dropout=self.dropout,
            dtype=self.dtype_policy,
            name="mlp",
        )
        for layer in (self.norm1, self.drop_path1, self.norm2, self.drop_path2, self.mlp):
            layer.build(x_shape)
        self.attn.build((None, h * w, channels), q_global_shape)
        self.gamma1 = self.gamma2 = None
        if self.layer_scale is not None:
            start = keras.initializers.Constant(self.layer_scale)
            self.gamma1 = self.add_weight(name="gamma1", shape=(channels,), initializer=start)
            self.gamma2 = self.add_weight(name="gamma2", shape=(channels,), initializer=start)

    def call(self, x, q_global=None):
        x = x + self.drop_path1(_scaled(self.gamma1, self._attend(self.norm1(x), q_global)))
        return x + self.drop_path2(_scaled(self.gamma2, self.mlp(self.norm2(x))))

    def windows(self, x):
        """Cut a normalized map into windows of tokens, padded where they do not fit.

        Returns:
            The windows, (batch · windows, tokens, channels), and the (height, width) of
            the map with its padding.
        """
        h, w = self.window_size
        _, height, width, channels = ops.shape(x)
        padded = (height + -height % h, width + -width % w)
        if not _same(padded, (height, width)):
            x = ops.pad(x, [[0, 0], [0, padded[0] - height], [0, padded[1] - width], [0, 0]])
        return ops.reshape(window_partition(x, (h, w)), (-1, h * w, channels)), padded

    def _attend(self, x, q_global):
        _, height, width, channels = ops.shape(x)
        tokens, padded = self.windows(x)
        tokens = self.attn(tokens, q_global) if self.global_query else self.attn(tokens)
        x = window_reverse(tokens, self.window_size, *padded, channels)
        return x if _same(padded, (height, width)) else x[:, :height, :width]

    def compute_output_shape(self, x_shape, q_global_shape=None):
        return tuple(x_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "window_size": self.window_size,
            "num_heads": self.num_heads,
            "global_query": self.global_query,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "qk_scale": self.qk_scale,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "path_drop": self.path_drop,
            "activation": keras.activations.serialize(keras.activations.get(self.activation)),
            "layer_scale": self.layer_scale,
        }
