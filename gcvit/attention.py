"""Chapter 4: attention inside a window, with a local or with a global query."""

import keras
import numpy as np
from keras import layers, ops

from gcvit import fast
from gcvit.checks import fraction, heads_divide, pair, positive_whole
from gcvit.unit_blocks import dense


def relative_position_index(window_size):
    """Return which row of the position table belongs to each pair of tokens.

    A window of h x w tokens has (2h - 1)(2w - 1) different offsets between two tokens.
    Entry [i, j] is the row for the offset from token j to token i.

    Args:
        window_size: (height, width) of the window, in tokens.

    Returns:
        An integer array of shape (tokens, tokens).

    Source: Liu et al. 2021 (Swin), section 3.2.
    """
    height, width = window_size
    place = np.stack(np.indices((height, width)), axis=-1).reshape(-1, 2)
    offset = place[:, None] - place[None, :] + (height - 1, width - 1)
    return offset[..., 0] * (2 * width - 1) + offset[..., 1]


@keras.saving.register_keras_serializable(package="gcvit")
class WindowAttention(layers.Layer):
    """Multi-head attention among the tokens of a window.

    A local layer makes query, key and value from the window. A global layer makes only
    key and value from it; its query is the global query of the image, the same for each
    of the image's windows.

    Shapes: `x` is (batch · windows, tokens, channels), the windows of an image next to
    each other; `q_global` is (batch, window height, window width, channels) or (batch,
    tokens, channels). The output has the shape of `x`.

    Args:
        window_size: side of the window in tokens, or its (height, width).
        num_heads: attention heads; they share the channels evenly.
        global_query: whether the layer takes `q_global`.
        qkv_bias: whether query, key and value have a bias; default `True`.
        qk_scale: factor on the query; default `None`: one over the square root of a
            head's channels.
        attention_dropout: dropout rate on the attention weights; default 0.
        projection_dropout: dropout rate on the output; default 0.

    Raises:
        ValueError: if the heads do not divide the channels, the tokens do not fill the
            window, or `q_global` is missing, not wanted, or of another shape.

    Source: paper, section 3.2; official `gc_vit.py`, `WindowAttention` and
    `WindowAttentionGlobal`; positions after Liu et al. 2021 (Swin), section 3.2.
    """

    def __init__(
        self,
        window_size,
        num_heads,
        global_query,
        qkv_bias=True,
        qk_scale=None,
        attention_dropout=0.0,
        projection_dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.window_size = pair("window_size", window_size)
        self.num_heads = positive_whole("num_heads", num_heads)
        self.global_query = bool(global_query)
        self.qkv_bias = qkv_bias
        self.qk_scale = qk_scale
        self.attention_dropout = fraction("attention_dropout", attention_dropout)
        self.projection_dropout = fraction("projection_dropout", projection_dropout)
        self.qkv_size = 2 if self.global_query else 3
        self.position_index = relative_position_index(self.window_size)

    def build(self, x_shape, q_global_shape=None):
        if len(x_shape) != 3:
            raise ValueError(
                "WindowAttention wants windows of shape (batch * windows, tokens, channels), "
                f"rank 3; got shape {tuple(x_shape)}."
            )
        tokens, channels = x_shape[1:]
        height, width = self.window_size
        if tokens != height * width:
            raise ValueError(
                f"A window of {height} x {width} holds {height * width} tokens; "
                f"got {tokens} in shape {tuple(x_shape)}."
            )
        heads_divide(channels, self.num_heads)
        self.head_dim = channels // self.num_heads
        self.scale = self.head_dim**-0.5 if self.qk_scale is None else self.qk_scale
        dtype = self.dtype_policy
        self.qkv = dense(channels * self.qkv_size, use_bias=self.qkv_bias, dtype=dtype, name="qkv")
        self.relative_position_bias_table = self.add_weight(
            name="relative_position_bias_table",
            shape=((2 * height - 1) * (2 * width - 1), self.num_heads),
            initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        )
        self.attn_drop = layers.Dropout(self.attention_dropout, dtype=dtype, name="attn_drop")
        self.proj = dense(channels, dtype=dtype, name="proj")
        self.proj_drop = layers.Dropout(self.projection_dropout, dtype=dtype, name="proj_drop")
        self.qkv.build(x_shape)
        self.attn_drop.build((x_shape[0], self.num_heads, tokens, tokens))
        self.proj.build(x_shape)
        self.proj_drop.build(x_shape)

    def relative_position_bias(self):
        """Return the bias that is added to the scores, (heads, tokens, tokens)."""
        tokens = len(self.position_index)
        # axis=0 takes whole rows: one number for each head.
        rows = ops.take(self.relative_position_bias_table, self.position_index.ravel(), axis=0)
        return ops.transpose(ops.reshape(rows, (tokens, tokens, self.num_heads)), (2, 0, 1))

    def query_key_value(self, x, q_global=None):
        """Return query, key and value, each (batch, windows, heads, tokens, head channels).

        Without a global query, all windows count as one image's, and `batch` is 1. With
        one, the query has one window, which broadcasts over the image's windows.
        """
        self._check_query(q_global)
        batch = 1 if q_global is None else ops.shape(q_global)[0]
        tokens = len(self.position_index)
        split = (batch, -1, tokens, self.qkv_size, self.num_heads, self.head_dim)
        parts = ops.transpose(ops.reshape(self.qkv(x), split), (3, 0, 1, 4, 2, 5))
        # The gradient of unstack is one stack; that of three slices is three padded maps.
        parts = ops.unstack(parts, self.qkv_size, axis=0)
        if q_global is None:
            return tuple(parts)
        q = ops.reshape(q_global, (batch, 1, tokens, self.num_heads, self.head_dim))
        return ops.transpose(q, (0, 1, 3, 2, 4)), *parts

    def attention_weights(self, x, q_global=None):
        """Return what each token attends to, (batch · windows, heads, tokens, tokens).

        Row i holds the weights of the query token i over the window's tokens; it sums to 1.
        Takes what the layer takes.
        """
        q, k, _ = self.query_key_value(x, q_global)
        weights = fast.attention_weights(q, k, self.relative_position_bias(), self.scale)
        tokens = len(self.position_index)
        return ops.reshape(weights, (-1, self.num_heads, tokens, tokens))

    def call(self, x, q_global=None):
        q, k, v = self.query_key_value(x, q_global)
        mixed = fast.scaled_dot_product_attention(
            q, k, v, self.relative_position_bias(), self.scale, self.attn_drop
        )
        mixed = ops.transpose(mixed, (0, 1, 3, 2, 4))
        tokens = len(self.position_index)
        mixed = ops.reshape(mixed, (-1, tokens, self.num_heads * self.head_dim))
        return self.proj_drop(self.proj(mixed))

    def _check_query(self, q_global):
        if self.global_query != (q_global is not None):
            raise ValueError(
                "WindowAttention with global_query=True wants q_global, and only that one; got "
                f"global_query={self.global_query} and q_global "
                f"{'missing' if q_global is None else 'given'}."
            )
        if q_global is None:
            return
        height, width = self.window_size
        channels = self.num_heads * self.head_dim
        shape = tuple(q_global.shape)
        if shape[1:] not in ((height, width, channels), (height * width, channels)):
            raise ValueError(
                f"q_global must be (batch, {height}, {width}, {channels}), one window of the "
                f"keys' channels; got shape {shape}."
            )

    def compute_output_shape(self, x_shape, q_global_shape=None):
        return tuple(x_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "window_size": self.window_size,
            "num_heads": self.num_heads,
            "global_query": self.global_query,
            "qkv_bias": self.qkv_bias,
            "qk_scale": self.qk_scale,
            "attention_dropout": self.attention_dropout,
            "projection_dropout": self.projection_dropout,
        }
