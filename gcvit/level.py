"""Chapter 6: blocks that take turns, local and global, at one resolution."""

import keras
from keras import layers

from gcvit.block import Block
from gcvit.checks import feature_map_shape, pair, positive_whole
from gcvit.global_tokens import GlobalQueryGenerator, resize_bicubic
from gcvit.unit_blocks import ReduceSize


@keras.saving.register_keras_serializable(package="gcvit")
class Level(layers.Layer):
    """A stage of the model: a global query, blocks in turn local and global, downsampling.

    Even blocks attend with local queries, odd ones with the global query, which is made
    once from the map that enters. Where it does not come out in the size of the window,
    it is resized bicubically, as the official detection code does.

    Shapes: (batch, height, width, channels) in; out (batch, ⌈height/2⌉, ⌈width/2⌉,
    2·channels), or the shape of the input where `downsample` is `False`.

    Args:
        depth: number of blocks.
        num_heads: attention heads of each block.
        window_size: side of the window in tokens, or its (height, width).
        keepdims: flags of the `GlobalQueryGenerator`.
        downsample: whether to end with a `ReduceSize`; default `True`.
        mlp_ratio: see `Block`; default 4.
        qkv_bias: see `WindowAttention`; default `True`.
        qk_scale: see `WindowAttention`; default `None`.
        dropout: see `Block`; default 0.
        attention_dropout: see `WindowAttention`; default 0.
        path_drop: drop-path rate, or a list of `depth` of them; default 0.
        layer_scale: see `Block`; default `None`.

    Raises:
        ValueError: if there is not one drop-path rate for each block, or for what a
            block refuses.

    Source: paper, section 3; official `gc_vit.py`, `GCViTLayer`.
    """

    def __init__(
        self,
        depth,
        num_heads,
        window_size,
        keepdims,
        downsample=True,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        dropout=0.0,
        attention_dropout=0.0,
        path_drop=0.0,
        layer_scale=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.depth = positive_whole("depth", depth)
        self.num_heads = num_heads
        self.window_size = pair("window_size", window_size)
        self.downsample = bool(downsample)
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.qk_scale = qk_scale
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.layer_scale = layer_scale
        listed = isinstance(path_drop, (tuple, list))
        self.path_drop = list(path_drop) if listed else [path_drop] * depth
        if len(self.path_drop) != depth:
            raise ValueError(
                f"path_drop must be one rate or one for each of the {depth} blocks; "
                f"got {len(self.path_drop)} rates."
            )
        dtype = self.dtype_policy
        # A functional model of the stages' maps needs names that no other level has.
        self.q_global_gen = GlobalQueryGenerator(
            keepdims, dtype=dtype, name=f"{self.name}_q_global_gen"
        )
        self.keepdims = self.q_global_gen.keepdims
        self.blocks = [
            Block(
                window_size,
                num_heads,
                global_query=bool(i % 2),
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                dropout=dropout,
                attention_dropout=attention_dropout,
                path_drop=rate,
                layer_scale=layer_scale,
                dtype=dtype,
                name=f"{self.name}_blocks_{i}",
            )
            for i, rate in enumerate(self.path_drop)
        ]
        if self.downsample:
            self.down = ReduceSize(dtype=dtype, name=f"{self.name}_downsample")

    def build(self, input_shape):
        channels = feature_map_shape(self, input_shape)[-1]
        self.q_global_gen.build(input_shape)
        for block in self.blocks:
            block.build(input_shape, (input_shape[0], *self.window_size, channels))
        if self.downsample:
            self.down.build(input_shape)

    def q_global(self, x):
        """Return the global query of maps, (batch, window height, window width, channels)."""
        return resize_bicubic(self.q_global_gen(x), self.window_size)

    def attend(self, x):
        """Pass maps through the blocks, without the downsampling: shape in, shape out."""
        q_global = self.q_global(x) if self.depth > 1 else None
        for block in self.blocks:
            x = block(x, q_global) if block.global_query else block(x)
        return x

    def call(self, x):
        x = self.attend(x)
        return self.down(x) if self.downsample else x

    def compute_output_shape(self, input_shape):
        return self.down.compute_output_shape(input_shape) if self.downsample else input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "depth": self.depth,
            "num_heads": self.num_heads,
            "window_size": self.window_size,
            "keepdims": self.keepdims,
            "downsample": self.downsample,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "qk_scale": self.qk_scale,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "path_drop": self.path_drop,
            "layer_scale": self.layer_scale,
        }
