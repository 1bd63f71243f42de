"""Kernels for PyTorch on the CPU: fewer copies of maps. What each does, `gcvit.fast` says."""

import torch
from torch.nn import functional

from gcvit.fast import several_large

PIXELS_FOR_PARTS = 96**2
"""From how many pixels an image has on, `map_images` saves more in the stem than it costs."""


def in_nchw(function, x, *args, **kwargs):
    """Apply a function of PyTorch for maps with channels first to maps with channels last.

    PyTorch reads the maps where they lie in memory. Keras copies them into the other order
    first, and back.

    Args:
        function: takes (batch, channels, height, width), and what else is given.
        x: (batch, height, width, channels).
        *args: what `function` takes besides.
        **kwargs: what it takes by name.
    """
    return function(x.permute(0, 3, 1, 2), *args, **kwargs).permute(0, 2, 3, 1)


def depthwise_conv2d(x, kernel, pad):
    """Convolve each channel; PyTorch adds the border while it reads, without a copy."""
    kernel = kernel.permute(2, 3, 0, 1)
    return in_nchw(functional.conv2d, x, kernel, padding=pad, groups=len(kernel))


def conv2d(x, kernel, bias, strides, pad):
    """Convolve; PyTorch adds the border while it reads, without a copy."""
    kernel = kernel.permute(3, 2, 0, 1)
    return in_nchw(functional.conv2d, x, kernel, bias, stride=strides, padding=pad)


def max_pool2d(x, pool_size, strides, pad):
    """Take maxima; PyTorch's border, too, is minus infinity."""
    return in_nchw(functional.max_pool2d, x, pool_size, stride=strides, padding=pad)


def dense(x, kernel, bias):
    """Return `x @ kernel + bias`. PyTorch's own layer copies the bias to each row first."""
    y = x @ kernel
    if bias is not None:
        y += bias
    return y


def scaled_dot_product_attention(q, k, v, bias, scale):
    """Mix values in PyTorch's one operation, which copies no k or v and keeps no scores.

    It has no gradient for the bias. Where gradients are wanted, PyTorch falls back to several
    operations, which are slower than Keras's.
    """
    if torch.is_grad_enabled():
        return NotImplemented
    windows = (part.flatten(0, 1) for part in (q.expand_as(k), k, v))
    mixed = functional.scaled_dot_product_attention(*windows, attn_mask=bias[None], scale=scale)
    return mixed.unflatten(0, k.shape[:2])


def map_images(x, function):
    """Pass four images at a time, where no gradients are wanted."""
    # A traced graph must not depend on the number of images.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return NotImplemented
    if not several_large(x, PIXELS_FOR_PARTS):
        return NotImplemented
    return torch.cat([function(part) for part in x.split(4)])
