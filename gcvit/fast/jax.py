"""Kernels for JAX on the CPU: what XLA compiles badly there, in a way that it compiles well.

What each kernel does, `gcvit.fast` says.
"""

import math

import jax
from jax import lax
from jax import numpy as jnp
from keras import ops

from gcvit.fast import conv_taps, depthwise_by_taps, normal_cdf, pad_sides, several_large

PIXELS_FOR_PARTS = 96**2
"""From how many pixels an image has on, `map_images` saves more in the stem than it costs."""


def custom_kernel_vjp(function, kernel_gradient, input_gradient=None, split=lambda maps: maps):
    """Give a function of maps and a kernel a kernel gradient that is summed up in parts.

    XLA computes the kernel's gradient of a convolution as another convolution, whose window is
    the whole map. For a matrix product, it writes a transposed copy of the incoming gradient. To
    make this copy, it computes that gradient, a sum over the later blocks, again in every block.

    Args:
        function: (maps, kernel) to new maps.
        kernel_gradient: (a part of the maps, the upstream gradient of that part's output) to
            this part's share of the kernel's gradient.
        input_gradient: (maps, kernel, upstream gradient) to the maps' gradient; default:
            JAX's own.
        split: splits maps into parts along the first axis; default: each image is a part.
    """

    @jax.custom_vjp
    def call(x, kernel):
        return function(x, kernel)

    def forward(x, kernel):
        return function(x, kernel), (x, kernel)

    def backward(inputs, upstream):
        x, kernel = inputs
        if input_gradient is None:
            _, transposed = jax.vjp(lambda x: function(x, kernel), x)
            (by_x,) = transposed(upstream)
        else:
            by_x = input_gradient(x, kernel, upstream)

        def add(total, part):
            share = kernel_gradient(*part).reshape(kernel.shape)
            return total + share.astype("float32"), None

        # One part after the other: copies of all of them would fill memory at once.
        parts = split(x), split(upstream)
        by_kernel, _ = lax.scan(add, jnp.zeros(kernel.shape), parts)
        return by_x, by_kernel.astype(kernel.dtype)

    call.defvjp(forward, backward)
    return call


def product(x, kernel):
    """Return `x @ kernel`; the kernel's gradient is summed up in up to 64 parts."""

    def split(maps):
        rows = math.prod(maps.shape[:-1])
        return maps.reshape(math.gcd(rows, 64), -1, maps.shape[-1])

    def kernel_gradient(x, upstream):
        return x.T @ upstream

    return custom_kernel_vjp(jnp.matmul, kernel_gradient, split=split)(x, kernel)


def bias_add(maps, bias):
    """Return `maps + bias`: one and the same bias for each of the maps, or `None` for none.

    The bias's gradient, a sum over all maps, is a product with a row of ones, which takes
    XLA a fraction of the time of its own sums.
    """
    if bias is None:
        return maps

    @jax.custom_vjp
    def add(maps, bias):
        return maps + bias

    def backward(_, upstream):
        rows = upstream.reshape(-1, bias.size)
        total = jnp.ones((1, len(rows)), rows.dtype) @ rows
        return upstream, total.reshape(bias.shape)

    add.defvjp(lambda maps, bias: (maps + bias, None), backward)
    return add(maps, bias)


def depthwise_conv2d(x, kernel, pad):
    """Add up nine maps times their weights; the kernel's gradient is nine sums an image."""

    def kernel_gradient(x, upstream):
        taps = conv_taps(x, upstream.shape[:2])
        return jnp.stack([jnp.sum(tap * upstream, (0, 1)) for tap in taps])

    return custom_kernel_vjp(depthwise_by_taps, kernel_gradient)(pad_sides(x, pad), kernel)


def conv2d(x, kernel, bias, strides, pad):
    """Convolve: 1x1 as a matrix product, 3x3 with gradients of products and shifted maps."""
    x = pad_sides(x, pad)
    if kernel.shape[:2] == (1, 1) and strides == (1, 1):
        return bias_add(product(x, kernel[0, 0]), bias)
    if kernel.shape[:2] != (3, 3):
        return NotImplemented

    def convolve(x, kernel):
        return ops.conv(x, kernel, strides, "valid", "channels_last")

    def kernel_gradient(x, upstream):
        columns = jnp.concatenate(list(conv_taps(x, upstream.shape[:2], strides)), -1)
        return jnp.tensordot(columns, upstream, ((0, 1), (0, 1)))

    def input_gradient(x, kernel, upstream):
        # Each of the nine taps sends its share back to the places that it met.
        shares = jnp.split(upstream @ kernel.reshape(-1, kernel.shape[-1]).T, 9, axis=-1)
        total = 0
        for at, share in enumerate(shares):
            gaps = [(0, 0, 0)]
            for side, new, begin, step in zip(
                x.shape[1:3], upstream.shape[1:3], divmod(at, 3), strides, strict=True
            ):
                gaps.append((begin, side - begin - step * (new - 1) - 1, step - 1))
            total += lax.pad(share, share.dtype.type(0), [*gaps, (0, 0, 0)])
        return total

    y = custom_kernel_vjp(convolve, kernel_gradient, input_gradient)(x, kernel)
    return bias_add(y, bias)


def max_pool2d(x, pool_size, strides, pad):
    """Take the largest of three maps down, then of three to the right.

    XLA's own pooling has a gradient that takes many times as long.
    """
    if pool_size != (3, 3) or strides != (2, 2):
        return NotImplemented
    x = pad_sides(x, pad, -jnp.inf)
    height, width = ((side - 1) // 2 for side in x.shape[1:3])
    a, b, c = (x[:, i : i + 2 * height - 1 : 2] for i in range(3))
    x = jnp.maximum(jnp.maximum(a, b), c)
    a, b, c = (x[:, :, i : i + 2 * width - 1 : 2] for i in range(3))
    return jnp.maximum(jnp.maximum(a, b), c)


def dense(x, kernel, bias):
    """Return `x @ kernel + bias`, with the gradients of `product` and `bias_add`."""
    return bias_add(product(x, kernel), bias)


def gelu(x, training):
    """Return the exact GELU, x·Φ(x), in float32."""
    return x * normal_cdf(x) if x.dtype == "float32" else NotImplemented


def map_images(x, function):
    """Pass one image at a time, in a loop; for gradients, its maps are computed once more."""
    # In eager mode, JAX would compile the loop anew in each call.
    if not isinstance(x, jax.core.Tracer) or not several_large(x, PIXELS_FOR_PARTS):
        return NotImplemented
    return lax.map(jax.checkpoint(lambda image: function(image[None])[0]), x)
