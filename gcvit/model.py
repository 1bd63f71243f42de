"""Chapter 7: the whole model, and the presets that build it."""

import difflib
import functools

import keras
import numpy as np
from keras import layers

from gcvit import fast
from gcvit import weights as checkpoints
from gcvit.checks import fraction, heads_divide, is_whole, pair, positive_whole
from gcvit.level import Level
from gcvit.presets import PRESETS
from gcvit.stem import PatchEmbed
from gcvit.unit_blocks import dense

SMALLEST_IMAGE = 32
"""Shortest side of an image in pixels: one token is left of it after the last level."""

# Times that each level's token generator halves the map, True standing for a
# FeatureExtraction that keeps the size. log2(56/7) = 3 at the first level, and so on;
# the last two levels are met at window size and refined once.
_KEEPDIMS = ((False, False, False), (False, False), (True,), (True,))

# Pixels of the image for each token of the window's side, level by level, where windows
# are scaled with the image: 224 px give windows of 7, 7, 14 and 7.
_WINDOW_RATIO = (32, 32, 16, 32)


def scaled_windows(image_size):
    """Return the windows of the four levels that grow and shrink with the image.

    Args:
        image_size: side of the image in pixels, or its (height, width); multiples of 32.

    Returns:
        Four (height, width) pairs.

    Raises:
        ValueError: if a side is not a multiple of 32.

    Source: timm, `gcvit.py`, `window_ratio`.
    """
    sides = pair("image_size", image_size)
    if any(side % 32 for side in sides):
        raise ValueError(
            "Windows can only be scaled to an image whose sides are multiples of 32; got "
            f"{sides[0]} x {sides[1]} px. For any other size, keep the preset's windows: "
            "leave image_size out and pass images of the size you have."
        )
    return tuple(tuple(side // ratio for side in sides) for ratio in _WINDOW_RATIO)


@keras.saving.register_keras_serializable(package="gcvit")
class GCViT(keras.Model):
    """The Global Context Vision Transformer.

    Shapes: (batch, height, width, `in_channels`) in, normalized as the weights want it;
    out (batch, `num_classes`). Any height and width from 32 px on.

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
        ValueError: for levels of different number, heads that do not divide the channels,
            images of another rank, with other channels, or smaller than 32 px.

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

        # Check the arguments.
        window_size, depths, num_heads = self._check_levels(window_size, depths, num_heads)
        positive_whole("embed_dim", embed_dim)
        positive_whole("in_channels", in_channels)
        for i, heads in enumerate(num_heads):
            heads_divide(embed_dim * 2**i, heads)
        if include_top:
            positive_whole("num_classes", num_classes)
        if pooling not in ("avg", None):
            raise ValueError(f'pooling must be "avg" or None; got {pooling!r}.')
        if include_top and pooling is None:
            raise ValueError("The head needs pooled features: pooling=None wants include_top=False")

        # Make the layers.
        dtype = self.dtype_policy
        self.patch_embed = PatchEmbed(embed_dim, dtype=dtype, name="patch_embed")
        self.pos_drop = layers.Dropout(drop_rate, dtype=dtype, name="pos_drop")
        rates = np.linspace(0.0, fraction("path_drop", path_drop), sum(depths)).tolist()
        self.levels = [
            Level(
                depth,
                num_heads[i],
                window_size[i],
                _KEEPDIMS[i],
                downsample=i < len(depths) - 1,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                dropout=drop_rate,
                attention_dropout=attention_dropout,
                path_drop=[rates.pop(0) for _ in range(depth)],
                layer_scale=layer_scale,
                dtype=dtype,
                name=f"levels_{i}",
            )
            for i, depth in enumerate(depths)
        ]
        self.norm = fast.LayerNormalization(epsilon=1e-5, dtype=dtype, name="norm")
        if pooling:
            self.pool = layers.GlobalAveragePooling2D(dtype=dtype, name="pool")
        if include_top:
            # Probabilities of a thousand classes need more digits than half precision has.
            half = dtype.compute_dtype in ("float16", "bfloat16")
            self.head = dense(
                num_classes,
                activation=head_activation,
                dtype="float32" if half else dtype,
                name="head",
            )

        # Keep the configuration.
        self.window_size = window_size
        self.embed_dim = embed_dim
        self.depths = depths
        self.num_heads = num_heads
        self.drop_rate = drop_rate
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.qk_scale = qk_scale
        self.attention_dropout = attention_dropout
        self.path_drop = path_drop
        self.layer_scale = layer_scale
        self.num_classes = num_classes
        self.head_activation = head_activation
        self.include_top = include_top
        self.pooling = pooling
        self.in_channels = in_channels

    @staticmethod
    def _check_levels(window_size, depths, num_heads):
        given = {"window_size": window_size, "depths": depths, "num_heads": num_heads}
        for name, values in given.items():
            if not isinstance(values, (tuple, list)):
                raise ValueError(f"{name} must list a value for each level; got {values!r}.")
        lengths = {name: len(values) for name, values in given.items()}
        if len(set(lengths.values())) != 1 or not 1 <= len(depths) <= len(_KEEPDIMS):
            raise ValueError(
                f"window_size, depths and num_heads must each have one value for each of 1 to "
                f"{len(_KEEPDIMS)} levels; got {lengths}."
            )
        windows = tuple(pair("window_size", window) for window in window_size)
        return (
            windows,
            tuple(positive_whole("depths", depth) for depth in depths),
            tuple(positive_whole("num_heads", heads) for heads in num_heads),
        )

    def _check_images(self, shape):
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

    def build(self, input_shape):
        self._check_images(input_shape)
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
        self._built_size = tuple(input_shape[1:3])

    def make_train_function(self, force=False):
        # Where the first step makes the optimizer's variables, TensorFlow traces and compiles it
        # twice: without this, xxtiny's takes 25 s, not 14, and training 0.4 GB more.
        if self.built and self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    # Keras's JAX trainer tells whether it trains only to a model whose call takes `training`.
    def call(self, images, training=None):
        self._check_images(images.shape)
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
        self._check_images(images.shape)
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

    def build_graph(self, input_shape=None):
        """Return the model as a functional `keras.Model`, which knows every output shape.

        Args:
            input_shape: (height, width, channels); default: the size the model was built
                for, or 224 px.
        """
        if input_shape is None:
            size = self._built_size if self.built else (224, 224)
            input_shape = (*size, self.in_channels)
        images = keras.Input(shape=input_shape)
        return keras.Model(images, self.call(images), name=self.name)

    def summary(self, input_shape=None, **kwargs):
        """Print a table of the layers with output shapes and parameters.

        Args:
            input_shape: see `build_graph`.
            **kwargs: what `keras.Model.summary` takes.
        """
        return self.build_graph(input_shape).summary(**kwargs)

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """Read a checkpoint, all of it or nothing. Keras's own loader can stop half-way.

        Args:
            filepath: see `gcvit.load_checkpoint`.
            skip_mismatch: leave a head of another size as it is; default `False`.
            **kwargs: none; taken so that an unknown one gets a `TypeError` by its name.

        Raises:
            gcvit.CheckpointError: if the file is not this model's; nothing is changed.
        """
        if kwargs:
            raise TypeError(f"GCViT.load_weights does not take {', '.join(kwargs)}.")
        checkpoints.load_checkpoint(self, filepath, skip_head_mismatch=skip_mismatch)
        # BackupAndRestore wants the optimizer's state back too, which Keras's own files hold.
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and optimizer.built and checkpoints.holds_optimizer(filepath):
            super().load_weights(filepath, skip_mismatch=skip_mismatch)

    def export(self, filepath, format="tf_saved_model", **kwargs):
        """Write the model for use without Keras: see `keras.Model.export`.

        ONNX is written by PyTorch's own exporter, for images of the size that the model was
        built for, in batches of any size: what Keras calls for it on TensorFlow lacks an
        operation of the exact GELU.

        Args:
            filepath: the file or folder to write.
            format: "tf_saved_model", the default, "onnx", or another that Keras knows.
            **kwargs: what `keras.Model.export` takes; for "onnx", what `torch.onnx.export` does.

        Raises:
            ValueError: for "onnx" on another backend than PyTorch.
        """
        if format != "onnx":
            # Keras would take the shape of the last call, and refuse where there was none.
            shape = (None, *self._built_size, self.in_channels)
            given = {"input_signature": [keras.InputSpec(shape=shape, dtype="float32")], **kwargs}
            return super().export(filepath, format=format, **given)
        if keras.backend.backend() != "torch":
            raise ValueError(
                "ONNX is written on PyTorch only, and the backend is "
                f"{keras.backend.backend()}. Save the weights, set KERAS_BACKEND=torch in a new "
                "process, read them and export there."
            )
        import torch

        height, width = (side or 224 for side in self._built_size)
        # Two images: a batch of one would be taken for a constant.
        images = torch.zeros((2, height, width, self.in_channels))
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(
            self.eval(), (images,), filepath, dynamo=True, dynamic_shapes=((batch,),), **kwargs
        )

    def get_config(self):
        return {
            **super().get_config(),
            "window_size": self.window_size,
            "embed_dim": self.embed_dim,
            "depths": self.depths,
            "num_heads": self.num_heads,
            "drop_rate": self.drop_rate,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "qk_scale": self.qk_scale,
            "attention_dropout": self.attention_dropout,
            "path_drop": self.path_drop,
            "layer_scale": self.layer_scale,
            "num_classes": self.num_classes,
            "head_activation": keras.activations.serialize(
                keras.activations.get(self.head_activation)
            ),
            "include_top": self.include_top,
            "pooling": self.pooling,
            "in_channels": self.in_channels,
        }

    @classmethod
    def from_preset(cls, preset, weights="imagenet", image_size=None, new_head=False, **overrides):
        """Build a published variant, with its weights.

        Args:
            preset: a name in `gcvit.PRESETS`.
            weights: a name that the preset lists (`PRESETS[preset]["weights"]`), which is
                fetched once into Keras's cache; a path to a file; or `None` for random
                weights. Default "imagenet".
            image_size: side in pixels, or (height, width), to scale the windows to.
                Default: the preset's windows are kept, and any image is taken.
            new_head: leave the head at random, even where the checkpoint's has as many
                classes; default `False`.
            **overrides: constructor arguments that replace the preset's. With another
                `num_classes`, the head starts at random and a line says so.

        Returns:
            A built `GCViT`.

        Raises:
            ValueError: for an unknown preset or weights, with the nearest names.
            gcvit.CheckpointError: for a file that is not this model's checkpoint.
            gcvit.FetchError: if the weights cannot be fetched.
        """
        found = _nearest("preset", preset, PRESETS)
        config = {**found["config"], **overrides}
        size = pair("image_size", image_size or found["image_size"])
        if image_size is not None:
            config["window_size"] = scaled_windows(size)
        # Found before the model is built, so that a network that fails is known of at once.
        source, sha256 = weights, None
        if isinstance(weights, str) and not checkpoints.looks_like_path(weights):
            entry = _nearest(f"weights of {preset}", weights, found["weights"])
            source, sha256 = checkpoints.locate(entry), entry["sha256"]
        model = cls(**config)
        model.build((None, *size, model.in_channels))
        if source is None:
            return model
        report = checkpoints.load_checkpoint(
            model,
            source,
            skip_head_mismatch="num_classes" in overrides,
            skip_head=new_head,
            sha256=sha256,
        )
        if report.skipped:
            print(f"The head, of {model.num_classes} classes, starts at random.")
        return model


def _nearest(kind, name, known):
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or list(known)
    raise ValueError(f"Unknown {kind}: {name!r}. Nearest: {', '.join(near) or 'none'}.")
