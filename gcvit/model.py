"""Chapter 7: the whole model."""

import functools
import inspect

import keras
import numpy as np
from keras import layers

from gcvit import fast
from gcvit.checks import fraction, heads_divide, is_whole, pair, positive_whole
from gcvit.level import Level
from gcvit.pretrained import PretrainedModel
from gcvit.stem import PatchEmbed
from gcvit.unit_blocks import dense

SMALLEST_IMAGE = 32
"""Shortest side of an image in pixels: one token is left of it after the last level."""

# Times that each level's token generator halves the map, True standing for a
# FeatureExtraction that keeps the size. log2(56/7) = 3 at the first level, and so on;
# the last two levels are met at window size and refined once.
_KEEPDIMS = ((False, False, False), (False, False), (True,), (True,))


@keras.saving.register_keras_serializable(package="gcvit")
class GCViT(PretrainedModel):
    """The Global Context Vision Transformer.

    Shapes: (batch, height, width, `in_channels`) in, normalized as the weights want it;
    out (batch, `num_classes`). Any height and width of at least 32 px.

    Args:
        window_size: each level's window: its side in tokens, or its (height, width).
        embed_dim: channels of the first level; each next level has twice as many.
        depths: blocks of each level.
        num_heads: attention heads of each level.
        drop_rate: dropout rate after the stem and in the blocks; default 0.
        mlp_ratio: see `Block`; default 3.
        qkv_bias: see `WindowAttention`; default `True`.
        qk_scale: see `WindowAttention`; default `None`.
        attention_dropout: see `WindowAttention`; default 0.
        path_drop: drop-path rate of the last block; it grows evenly from 0 at the first;
            default 0.1.
        layer_scale: see `Block`; default `None`.
        num_classes: units of the head; default 1000.
        head_activation: activation of the head; default "softmax"; `None` gives logits.
        include_top: whether the head is there; default `True`. Without it the pooled
            features come out, (batch, channels), or the last map where `pooling` is `None`.
        pooling: "avg", the default, or `None`, which needs `include_top=False`.
        in_channels: colors of the image; default 3.

    Raises:
        ValueError: if the arguments that have a value for each level differ in length, or the
            heads do not divide the channels; if images have another rank or other channels,
            are smaller than 32 px, or are integers.

    Source: paper, section 3 and its architecture figure; official `gc_vit.py`, `GCViT`.
    """

    def __init__(
        self,
        window_size,
        embed_dim,
        depths,
        num_heads,
        drop_rate=0.0,
        mlp_ratio=3.0,
        qkv_bias=True,
        qk_scale=None,
        attention_dropout=0.0,
        path_drop=0.1,
        layer_scale=None,
        num_classes=1000,
        head_activation="softmax",
        include_top=True,
        pooling="avg",
        in_channels=3,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.window_size, self.depths, self.num_heads = _each_level(
            window_size=window_size, depths=depths, num_heads=num_heads
        )
        self.embed_dim = positive_whole("embed_dim", embed_dim)
        for i, heads in enumerate(self.num_heads):
            heads_divide(embed_dim * 2**i, heads)
        self.drop_rate = drop_rate
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.qk_scale = qk_scale
        self.attention_dropout = attention_dropout
        self.path_drop = fraction("path_drop", path_drop)
        self.layer_scale = layer_scale
        self.num_classes = (
            positive_whole("num_classes", num_classes) if include_top else num_classes
        )
        self.head_activation = head_activation
        self.include_top = include_top
        self.pooling = _pooling(pooling, include_top)
        self.in_channels = positive_whole("in_channels", in_channels)
        self._make_layers()

    def _make_layers(self):
        dtype = self.dtype_policy
        self.patch_embed = PatchEmbed(self.embed_dim, dtype=dtype, name="patch_embed")
        self.pos_drop = layers.Dropout(self.drop_rate, dtype=dtype, name="pos_drop")
        rates = np.linspace(0.0, self.path_drop, sum(self.depths)).tolist()
        self.levels = [
            Level(
                depth,
                self.num_heads[i],
                self.window_size[i],
                _KEEPDIMS[i],
                downsample=i < len(self.depths) - 1,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                qk_scale=self.qk_scale,
                dropout=self.drop_rate,
                attention_dropout=self.attention_dropout,
                path_drop=[rates.pop(0) for _ in range(depth)],
                layer_scale=self.layer_scale,
                dtype=dtype,
                name=f"levels_{i}",
            )
            for i, depth in enumerate(self.depths)
        ]
        self.norm = fast.LayerNormalization(epsilon=1e-5, dtype=dtype, name="norm")
        if self.pooling:
            self.pool = layers.GlobalAveragePooling2D("channels_last", dtype=dtype, name="pool")
        if self.include_top:
            # Probabilities of a thousand classes need more digits than half precision has.
            half = dtype.compute_dtype in ("float16", "bfloat16")
            self.head = dense(
                self.num_classes,
                activation=self.head_activation,
                dtype="float32" if half else dtype,
                name="head",
            )

    def build(self, input_shape):
        self._check_images(input_shape)
        self.built_size = tuple(input_shape[1:3])
        if self.built:  # as from_preset leaves it: the weights do not depend on the size
            return
        self.patch_embed.build(input_shape)
        shape = self.patch_embed.compute_output_shape(input_shape)
        self.pos_drop.build(shape)
        for level in self.levels:
            level.build(shape)
            shape = level.compute_output_shape(shape)
        self.norm.build(shape)
        if self.pooling:
            self.pool.build(shape)
        if self.include_top:
            self.head.build((shape[0], shape[-1]))

    # Keras's JAX trainer passes `training` only to a model whose call takes it.
    def call(self, images, training=None):
        self._check_images(images.shape, images.dtype)
        run = functools.partial(self._run, training=training)
        return run(images) if training else fast.compile_small_batch(run, images)

    def _run(self, images, training):
        # The stem's maps are the largest.
        x = self.pos_drop(fast.map_images(self.patch_embed, images), training=training)
        for level in self.levels:
            x = level(x, training=training)
        x = self.norm(x)
        if self.pooling:
            x = self.pool(x)
        return self.head(x) if self.include_top else x

    def features(self, images):
        """Return the map that leaves the blocks of each level, before downsampling.

        Args:
            images: (batch, height, width, `in_channels`), or a `keras.Input` of that shape.

        Returns:
            A dict "stage_0" to "stage_3" of (batch, height/s, width/s, channels) with the
            strides s = 4, 8, 16, 32, rounded up. The last one has passed the final norm.
        """
        self._check_images(images.shape, images.dtype)
        x = self.pos_drop(self.patch_embed(images))
        maps = {}
        for i, level in enumerate(self.levels):
            x = level.attend(x)
            maps[f"stage_{i}"] = x
            if level.downsample:
                x = level.down(x)
        maps[f"stage_{i}"] = self.norm(x)
        return maps

    def compute_output_shape(self, input_shape):
        shape = self.patch_embed.compute_output_shape(input_shape)
        for level in self.levels:
            shape = level.compute_output_shape(shape)
        if self.include_top:
            return (shape[0], self.num_classes)
        return (shape[0], shape[-1]) if self.pooling else shape

    def get_config(self):
        config = {name: getattr(self, name) for name in ARGUMENTS}
        config["head_activation"] = keras.activations.serialize(
            keras.activations.get(self.head_activation)
        )
        return {**super().get_config(), **config}

    def _check_images(self, shape, dtype="float32"):
        shape = tuple(shape)
        if len(shape) != 4:
            raise ValueError(
                f"GCViT wants a batch of images, (batch, height, width, {self.in_channels}), "
                f"rank 4; got shape {shape}, rank {len(shape)}."
            )
        if shape[-1] != self.in_channels:
            raise ValueError(
                f"GCViT wants {self.in_channels} channels in the last axis; got {shape[-1]} in "
                f"shape {shape}."
            )
        for name, side in zip(("height", "width"), shape[1:3], strict=True):
            if is_whole(side) and side < SMALLEST_IMAGE:
                raise ValueError(
                    f"GCViT wants images of at least {SMALLEST_IMAGE} px a side; got {name} "
                    f"{side} in shape {shape}."
                )
        dtype = keras.backend.standardize_dtype(dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(
                f"GCViT wants normalized images, of floating-point numbers; got {dtype}. Pass "
                "photographs of 0 to 255 through gcvit.images.normalize."
            )


ARGUMENTS = tuple(
    name for name in inspect.signature(GCViT.__init__).parameters if name not in ("self", "kwargs")
)
"""Names of the arguments that tell one `GCViT` from another."""


def _each_level(**given):
    """Return the windows, depths and heads of the levels, one of each for each level."""
    for name, values in given.items():
        if not isinstance(values, (tuple, list)):
            raise ValueError(f"{name} must list a value for each level; got {values!r}.")
    lengths = {name: len(values) for name, values in given.items()}
    if len(set(lengths.values())) != 1 or not 1 <= lengths["depths"] <= len(_KEEPDIMS):
        raise ValueError(
            f"window_size, depths and num_heads must each have one value for each of 1 to "
            f"{len(_KEEPDIMS)} levels; got {lengths}."
        )
    checks = {"window_size": pair, "depths": positive_whole, "num_heads": positive_whole}
    for name, values in given.items():
        yield tuple(checks[name](name, value) for value in values)


def _pooling(pooling, include_top):
    if pooling not in ("avg", None):
        raise ValueError(f'pooling must be "avg" or None; got {pooling!r}.')
    if include_top and pooling is None:
        raise ValueError("The head needs pooled features: pooling=None wants include_top=False")
    return pooling
