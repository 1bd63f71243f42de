"""Kernels for TensorFlow on the CPU: what its graph optimizer finds, and what XLA compiles.

What each kernel does, `gcvit.fast` says.
"""

import contextvars
import functools
import math

import tensorflow as tf
from keras import ops

from gcvit.fast import depthwise_by_taps, normal_cdf, pad_sides, several_large

PIXELS_FOR_PARTS = 192**2
"""From how many pixels an image has on, `map_images` saves more in the stem than it costs."""

SMALL_BATCH = 2
"""Up to how many images `compile_small_batch` compiles. Of more, XLA gains less or nothing."""

PIXELS_FOR_XLA = 256**2
"""Up to how many pixels of an image XLA computes a forward pass faster than TensorFlow."""

_under_xla = contextvars.ContextVar("under_xla", default=False)


def compile_small_batch(images, function):
    """Compile a forward pass with XLA where a graph knows that the batch is small.

    TensorFlow hands each small operation to its other threads, which costs more than it saves;
    XLA makes fewer and larger ones. XLA takes seconds for each shape, and is slower for many
    images, so larger batches are left to TensorFlow, and those whose size is not known.
    """
    batch, *sides = images.shape[:3]
    small = batch is not None and batch <= SMALL_BATCH
    small = small and None not in sides and math.prod(sides) <= PIXELS_FOR_XLA
    if not small or images.dtype != "float32" or tf.executing_eagerly():
        return NotImplemented
    before = _under_xla.set(True)
    try:
        return tf.function(function, autograph=False, jit_compile=True)(images)
    finally:
        _under_xla.reset(before)


def compiled(function, *tensors):
    """Return `function` of the tensors, which XLA compiles into few loops or one.

    XLA takes a tenth of a second for each shape. So where nothing else is compiled, in eager
    mode, this is not compiled either.
    """
    if tf.executing_eagerly():
        return function(*tensors)
    return _compiled(function, *(tf.TensorSpec(x.shape, x.dtype) for x in tensors))(*tensors)


@functools.cache
def _compiled(function, *specs):
    return tf.function(function, input_signature=specs, autograph=False, jit_compile=True)


def as_rows(x):
    """Return (..., channels) as a matrix, (rows, channels)."""
    return tf.reshape(x, (-1, x.shape[-1]))


def as_maps(rows, x):
    """Return (rows, channels) in the shape of `x`, (..., any number of channels)."""
    if len(x.shape) == 2:  # a reshape would part a bias from a GELU behind it
        return rows
    return tf.reshape(rows, (*ops.shape(x)[:-1], rows.shape[-1]))


def depthwise_conv2d(x, kernel, pad):
    """Add up nine maps times their weights under XLA; TensorFlow has a good way of its own."""
    if not _under_xla.get():
        return NotImplemented
    return depthwise_by_taps(pad_sides(x, pad), kernel)


def dense(x, kernel, bias):
    """Return `x @ kernel + bias` as a product of two matrices and a sum behind it.

    The graph's optimizer makes one operation of both, and of a GELU behind them.
    """
    y = tf.matmul(as_rows(x), kernel)
    if bias is not None:
        y = tf.nn.bias_add(y, bias)
    return as_maps(y, x)


def gelu(x, training):
    """Return the exact GELU in float32; in training, XLA compiles it and its gradient."""
    if x.dtype != "float32":
        return NotImplemented
    if not training:
        return _gelu(x)

    @tf.custom_gradient
    def trained(x):
        return compiled(_gelu, x), functools.partial(compiled, gelu_gradient, x)

    return trained(x)


def _gelu(x):
    return x * normal_cdf(x)


def gelu_gradient(x, upstream):
    """Return the gradient of GELU by `x`: Φ(x) + x·φ(x), times what comes from above."""
    density = tf.exp(-0.5 * tf.square(x) - 0.5 * math.log(2 * math.pi))
    return upstream * (normal_cdf(x) + x * density)


def layer_normalization(x, gamma, beta, epsilon):
    """Normalize in float32 by oneDNN's one operation; XLA compiles the gradient.

    The gradient keeps only the input, where TensorFlow would keep a map for each step of the
    formula.
    """
    if x.dtype != "float32":
        return NotImplemented

    @tf.custom_gradient
    def normalized(x, gamma, beta):
        def gradient(upstream):
            by_x, by_gamma = compiled(
                normalization_gradients, x, gamma, tf.constant(epsilon), upstream
            )
            ones = tf.ones((1, tf.shape(x)[0]))
            return by_x, (ones @ by_gamma)[0], (ones @ upstream)[0]

        return standardize_rows(x, epsilon) * gamma + beta, gradient

    # Gradients of one's own are for tensors; what Keras calls one may be a variable.
    y = normalized(as_rows(x), tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta))
    return tf.reshape(y, tf.shape(x))


def standardize_rows(x, epsilon):
    """Standardize each of (rows, channels), spelled as TensorFlow's graph optimizer wants it.

    The optimizer replaces a batch normalization of one image whose channels are the rows,
    multiplied by gamma, plus beta, with one layer normalization. It finds this pattern only if it
    does not know the number of rows beforehand: hence the placeholders.
    """
    unknown, none = tf.compat.v1.placeholder_with_default, tf.zeros(0)
    x = unknown(x, (None, x.shape[-1]))
    rows = unknown(tf.shape(x)[:1], (1,))
    standard, *_ = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, (1, -1, x.shape[-1], 1)),
        scale=tf.fill(rows, 1.0),
        offset=tf.fill(rows, 0.0),
        mean=none,
        variance=none,
        epsilon=epsilon,
        data_format="NCHW",
    )
    return tf.reshape(standard, tf.shape(x))


def normalization_gradients(x, gamma, epsilon, upstream):
    """Return a layer norm's gradient with respect to its input, and each row's share of gamma's.

    Args:
        x: (rows, channels).
        gamma: (channels,).
        epsilon: a tensor of one number.
        upstream: (rows, channels).
    """
    # Products with a column of equal numbers: XLA's own sums take twice as long.
    mean = tf.fill((x.shape[-1], 1), 1 / x.shape[-1])
    centered = x - x @ mean
    scale = tf.math.rsqrt(tf.square(centered) @ mean + epsilon)
    standard, weighted = centered * scale, upstream * gamma
    by_x = weighted - weighted @ mean - standard * ((weighted * standard) @ mean)
    return by_x * scale, upstream * standard


def map_images(x, function):
    """Pass two images at a time, in a loop of the graph."""
    # In eager mode, TensorFlow would trace the loop anew in each call.
    if tf.executing_eagerly() or _under_xla.get() or not several_large(x, PIXELS_FOR_PARTS):
        return NotImplemented
    return tf.map_fn(lambda image: function(image[None])[0], x, parallel_iterations=2)
