"""Appendix C: Keras's layers with a faster way to the same numbers, backend by backend.

Each class is Keras's of the same name, with its weights and its checkpoint paths. Two things
differ. Files keep a LoRA adapter. And `call` asks the backend's module of kernels
(`gcvit.fast.tensorflow`, `.jax` or `.torch`); where that has none for the case, Keras's own layer
computes.

On JAX on the CPU these gradients can be taken backwards only, as training does: `jax.grad` and
`jax.vjp` work, `jax.jvp` and `jax.jacfwd` do not.
"""

import functools
import importlib
import math

import keras
import numpy as np
from keras import layers, ops


def device_kinds():
    """Return the kinds of devices that Keras's backend computes on, such as {"cpu", "gpu"}."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return {device.device_type.lower() for device in tf.config.list_physical_devices()}
    if backend == "jax":
        import jax

        return {jax.default_backend()}
    import torch

    return {"gpu" if torch.cuda.is_available() else "cpu"}


@functools.cache
def kernels():
    """Return the module of kernels for Keras's backend; `None` where there is an accelerator.

    They were written for the CPU. What Keras calls on an accelerator is made for it.
    """
    if device_kinds() != {"cpu"}:
        return None
    return importlib.import_module(f"gcvit.fast.{keras.backend.backend()}")


def faster(name, x, *args):
    """Return what a kernel makes of `x`, or `NotImplemented` where there is none for the case.

    Args:
        name: the kernel's name in the module that `kernels` returns.
        x: a tensor. For a symbolic one, of a functional model, nothing is computed.
        *args: the kernel's other arguments. Variables are passed as tensors.
    """
    kernel = getattr(kernels(), name, None)
    if kernel is None or isinstance(x, keras.KerasTensor):
        return NotImplemented
    tensors = (ops.convert_to_tensor(a) if isinstance(a, keras.Variable) else a for a in args)
    return kernel(x, *tensors)


# What the kernels of several backends share.


def pad_sides(x, pad, value=0.0):
    """Return maps, (batch, height, width, channels), with `pad` pixels more on each side."""
    if not pad:
        return x
    return ops.pad(x, [[0, 0], [pad, pad], [pad, pad], [0, 0]], constant_values=value)


def conv_taps(x, size, strides=(1, 1)):
    """Yield nine shifted maps, one for each position in a 3x3 window, row by row.

    Args:
        x: (..., height, width, channels), padded already.
        size: (height, width) of each shifted map.
        strides: steps of the window, (down, right); default 1.
    """
    (height, width), (down, right) = size, strides
    for i in range(3):
        for j in range(3):
            rows = slice(i, i + down * (height - 1) + 1, down)
            yield x[..., rows, slice(j, j + right * (width - 1) + 1, right), :]


def depthwise_by_taps(x, kernel):
    """Return a 3x3 depthwise convolution as a sum: each tap's map times the tap's weights.

    XLA on the CPU makes one loop of it, and has no good way of its own.

    Args:
        x: (batch, height, width, channels), padded already.
        kernel: (3, 3, channels, 1).
    """
    taps = conv_taps(x, (x.shape[1] - 2, x.shape[2] - 2))
    weights = ops.unstack(ops.reshape(kernel, (9, -1)))
    return sum(tap * w for tap, w in zip(taps, weights, strict=True))


def normal_cdf(x):
    """Return Φ(x), the share of a normal distribution that lies below `x`, spelled with erf."""
    return 0.5 * (1 + ops.erf(x * 0.5**0.5))


def several_large(x, pixels):
    """Tell whether `x`, (batch, height, width, channels), is several images of so many pixels."""
    images, *sides = x.shape[:3]
    return images != 1 and None not in sides and math.prod(sides) >= pixels


# The layers.


class _Adapted:
    """What a layer with a kernel is whose files keep its LoRA adapter.

    Keras writes the sum of kernel and adapter, which anyone can read. Beside it stands what it is
    the sum of, so that a training goes on, and eight bits are not rounded anew.
    """

    def _parts(self):
        """Return the variables that make up an adapted kernel, by their names in a file."""
        if not self.lora_enabled:
            return {}
        names = {"lora_base": "_kernel", "lora_a": "lora_kernel_a", "lora_b": "lora_kernel_b"}
        if self.quantization_mode is not None:
            names["lora_scale"] = "kernel_scale"
        return {name: getattr(self, attribute) for name, attribute in names.items()}

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for name, variable in self._parts().items():
            store[name] = variable

    def load_own_variables(self, store):
        parts = self._parts()
        start = ops.copy(self.lora_kernel_a) if parts else None
        names = set(store.keys())
        super().load_own_variables({name: store[name] for name in names if "lora_" not in name})
        if parts:
            self.lora_kernel_a.assign(start)  # of zeros, as Keras leaves it, it would not learn
        if all(name in names and store[name].shape == v.shape for name, v in parts.items()):
            for name, variable in parts.items():
                variable.assign(store[name])


class _Padded:
    """What a window's layer is with a border of its own, as in PyTorch, of `pad` pixels.

    Keras's padding="same" would pad an even map on one side only where the stride is 2.
    Channels are last here, whatever Keras's settings say.
    """

    def __init__(self, *args, pad=0, **kwargs):
        super().__init__(*args, **{"data_format": "channels_last", **kwargs})
        self.pad = pad

    def compute_output_shape(self, input_shape):
        batch, *sides, channels = input_shape
        sides = (None if side is None else side + 2 * self.pad for side in sides)
        return super().compute_output_shape((batch, *sides, channels))

    def get_config(self):
        return {**super().get_config(), "pad": self.pad}


@keras.saving.register_keras_serializable(package="gcvit")
class DepthwiseConv2D(_Padded, layers.DepthwiseConv2D):
    """Keras's layer, for a window of 3x3, stride 1, without activation.

    Args:
        pad: pixels of zeros to put on each side of the map first; default 0.
        *args: see `keras.layers.DepthwiseConv2D`.
        **kwargs: likewise.
    """

    def call(self, x):
        y = NotImplemented
        if not self.use_bias:
            y = faster("depthwise_conv2d", x, self.kernel, self.pad)
        return super().call(pad_sides(x, self.pad)) if y is NotImplemented else y


@keras.saving.register_keras_serializable(package="gcvit")
class Conv2D(_Adapted, _Padded, layers.Conv2D):
    """Keras's layer, without activation, groups and dilation.

    Args:
        pad: pixels of zeros to put on each side of the map first; default 0.
        *args: see `keras.layers.Conv2D`.
        **kwargs: likewise.
    """

    def call(self, x):
        y = faster("conv2d", x, self.kernel, self.bias, self.strides, self.pad)
        return super().call(pad_sides(x, self.pad)) if y is NotImplemented else y


@keras.saving.register_keras_serializable(package="gcvit")
class MaxPooling2D(_Padded, layers.MaxPooling2D):
    """Keras's layer.

    Args:
        pad: pixels of minus infinity, which never win, to put on each side first; default 0.
        *args: see `keras.layers.MaxPooling2D`.
        **kwargs: likewise.
    """

    def call(self, x):
        y = faster("max_pool2d", x, self.pool_size, self.strides, self.pad)
        return super().call(pad_sides(x, self.pad, -np.inf)) if y is NotImplemented else y


@keras.saving.register_keras_serializable(package="gcvit")
class Dense(_Adapted, layers.Dense):
    """Keras's layer."""

    def call(self, x, training=None):
        y = faster("dense", x, self.kernel, self.bias)
        if y is NotImplemented:
            return super().call(x, training=training)
        return y if self.activation is None else self.activation(y)


@keras.saving.register_keras_serializable(package="gcvit")
class LayerNormalization(layers.LayerNormalization):
    """Keras's layer, over the last axis."""

    def call(self, x):
        y = NotImplemented
        if self.compute_dtype == "float32":  # Keras does not cast what this layer is given
            y = faster("layer_normalization", x, self.gamma, self.beta, self.epsilon)
        return super().call(x) if y is NotImplemented else y


@keras.saving.register_keras_serializable(package="gcvit")
class Activation(layers.Activation):
    """Keras's layer.

    Keras spells the exact GELU with erfc, which keeps digits of values near zero that float32
    has no use for here; the kernels spell it with erf.
    """

    def call(self, x, training=None):
        exact = self.activation is keras.activations.gelu
        y = faster("gelu", x, training) if exact else NotImplemented
        return super().call(x) if y is NotImplemented else y


# Attention.


def attention_weights(q, k, bias, scale):
    """Return softmax(scale · q·kᵀ + bias), (batch, windows, heads, query tokens, key tokens).

    Args: see `scaled_dot_product_attention`.
    """
    scores = ops.matmul(q * scale, ops.swapaxes(k, -2, -1))
    biased = faster("bias_add", scores, bias)
    return ops.softmax(scores + bias if biased is NotImplemented else biased)


def scaled_dot_product_attention(q, k, v, bias, scale, dropout):
    """Return softmax(scale · q·kᵀ + bias)·v, for each query a weighted average of `v`.

    Args:
        q: (batch, windows or 1, heads, tokens, head channels); with 1, all windows share it.
        k: (batch, windows, heads, tokens, head channels).
        v: like `k`.
        bias: (heads, tokens, tokens), added to the scores of each window.
        scale: factor on the query.
        dropout: a `keras.layers.Dropout` for the attention weights.
    """
    y = NotImplemented
    if not dropout.rate:
        y = faster("scaled_dot_product_attention", q, k, v, bias, scale)
    if y is NotImplemented:
        y = ops.matmul(dropout(attention_weights(q, k, bias, scale)), v)
    return y


# The model.


def map_images(function, x):
    """Return `function` of maps, computed for a few large images at a time where that pays.

    Their maps stay in the processor's cache, and use the memory of those before them. Where JAX
    takes gradients, it computes the maps once more instead of keeping them.

    Args:
        function: takes (batch, height, width, channels); treats each image by itself.
        x: (batch, height, width, channels); all at once where height or width is not known.
    """
    y = faster("map_images", x, function)
    return function(x) if y is NotImplemented else y


def compile_small_batch(function, images):
    """Return `function(images)`, on TensorFlow compiled by XLA for one image or two.

    Args:
        function: takes the images, and trains nothing.
        images: (batch, height, width, channels).
    """
    y = faster("compile_small_batch", images, function)
    return function(images) if y is NotImplemented else y
