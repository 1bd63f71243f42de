"""Chapter 3: the whole map, made small enough to be a window."""

import keras
from keras import layers, ops

from gcvit import fast
from gcvit.checks import feature_map_shape
from gcvit.unit_blocks import fused_mbconv, halved, run


def bicubic_matrix(size_in, size_out):
    """Return the (size_out, size_in) matrix that resizes a line of samples.

    Keys' cubic kernel with a = -0.75, half-pixel centers, borders repeated, no
    antialiasing: what PyTorch's `interpolate(mode="bicubic")` does, and so what the
    official code resizes queries and position tables with. Keras's own bicubic resize
    has a = -0.5 on TensorFlow and JAX.

    Args:
        size_in: samples given; an integer, or a scalar tensor where it is not known yet.
        size_out: samples wanted.

    Source: official detection code, `gc_vit.py`; Keys 1981.
    """
    a = -0.75
    scale = ops.cast(size_in, "float32") / size_out
    center = (ops.arange(size_out, dtype="float32") + 0.5) * scale - 0.5
    columns = ops.arange(size_in, dtype="int32")
    first = ops.floor(center)
    matrix = 0.0
    for tap in (-1, 0, 1, 2):
        d = ops.abs(center - first - tap)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weight = ops.where(d <= 1, near, far)
        column = ops.clip(ops.cast(first, "int32") + tap, 0, size_in - 1)
        matrix = matrix + weight[:, None] * ops.cast(column[:, None] == columns, "float32")
    return matrix


def resize_bicubic(x, size):
    """Resize a map, (batch, height, width, channels), to `size`, (height, width)."""
    if isinstance(x, keras.KerasTensor):
        # A map of a functional model: its sides may not be known before an image comes.
        return ResizeBicubic(size).symbolic_call(x)
    sides = ops.shape(x)[1:3]
    if all(isinstance(side, int) for side in sides) and tuple(sides) == tuple(size):
        return x
    rows, columns = (
        ops.cast(bicubic_matrix(a, b), x.dtype) for a, b in zip(sides, size, strict=True)
    )
    # In two steps: an exporter would fix the batch while it looks for the order of three.
    return ops.einsum("qw,bpwc->bpqc", columns, ops.einsum("ph,bhwc->bpwc", rows, x))


@keras.saving.register_keras_serializable(package="gcvit")
class ResizeBicubic(keras.Operation):
    """`resize_bicubic` as a step of a functional model.

    Args:
        size: (height, width) wanted.
    """

    def __init__(self, size):
        super().__init__()
        self.size = tuple(size)

    def call(self, x):
        return resize_bicubic(x, self.size)

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], *self.size, x.shape[-1]), dtype=x.dtype)


@keras.saving.register_keras_serializable(package="gcvit")
class FeatureExtraction(layers.Layer):
    """Refine a map with a fused MBConv, then halve it by max pooling.

    The pooling is 3x3 with stride 2 and pads with minus infinity, so that the border
    never wins: zeros would, wherever all the values they stand beside are negative.

    Shapes: (batch, height, width, channels) in, (batch, ⌈height/2⌉, ⌈width/2⌉,
    channels) out.

    Args:
        keepdims: leave the pooling out, so that height and width stay; default `False`.

    Raises:
        ValueError: for an input that is not a feature map.

    Source: paper, section 3.1; official `gc_vit.py`, `FeatExtract`.
    """

    def __init__(self, keepdims=False, **kwargs):
        super().__init__(**kwargs)
        self.keepdims = bool(keepdims)

    def build(self, input_shape):
        channels = feature_map_shape(self, input_shape)[-1]
        dtype = self.dtype_policy
        self.conv = fused_mbconv(channels, dtype)
        for layer in self.conv:
            layer.build(input_shape)
        if not self.keepdims:
            self.pool = fast.MaxPooling2D(3, strides=2, pad=1, dtype=dtype, name="pool")
            self.pool.build(input_shape)

    def call(self, x):
        x = x + run(self.conv, x)
        return x if self.keepdims else self.halve(x)

    def halve(self, x):
        """Return the maximum of 3 x 3 positions, at every second position."""
        return self.pool(x)

    def compute_output_shape(self, input_shape):
        if self.keepdims:
            return tuple(input_shape)
        return halved(input_shape, input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "keepdims": self.keepdims}


@keras.saving.register_keras_serializable(package="gcvit")
class GlobalQueryGenerator(layers.Layer):
    """Make the global query: the whole map in the size of one window.

    Shapes: (batch, height, width, channels) in; out, each side halved (rounding up) once
    for every `False` in `keepdims`. Reaching the window's size takes K = log2(height / window)
    of them.

    Args:
        keepdims: one flag for each `FeatureExtraction`, `True` where it keeps the size.
            For a map of 56 and a window of 7, three times `False`.

    Raises:
        ValueError: for no flags at all, or an input that is not a feature map.

    Source: paper, section 3.1 and its token-generation figure; official `gc_vit.py`,
    `GlobalQueryGen`.
    """

    def __init__(self, keepdims=(True,), **kwargs):
        super().__init__(**kwargs)
        if not isinstance(keepdims, (tuple, list)) or not keepdims:
            raise ValueError(
                "keepdims must be a tuple of flags, one for each FeatureExtraction; "
                f"got {keepdims!r}."
            )
        self.keepdims = tuple(bool(flag) for flag in keepdims)
        self.to_q_global = [
            FeatureExtraction(flag, dtype=self.dtype_policy, name=f"to_q_global_{i}")
            for i, flag in enumerate(self.keepdims)
        ]

    def build(self, input_shape):
        shape = input_shape
        for layer in self.to_q_global:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, x):
        return run(self.to_q_global, x)

    def compute_output_shape(self, input_shape):
        shape = tuple(input_shape)
        for layer in self.to_q_global:
            shape = layer.compute_output_shape(shape)
        return shape

    def get_config(self):
        return {**super().get_config(), "keepdims": self.keepdims}
