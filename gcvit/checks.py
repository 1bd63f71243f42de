"""Checks that layers, models and recipes share, with errors that name the numbers."""

import math

import numpy as np


def feature_map_shape(layer, shape):
    """Return the `(height, width, channels)` of a feature map's shape.

    Args:
        layer: the layer that asks, named in the error.
        shape: a shape that should read (batch, height, width, channels).

    Raises:
        ValueError: if the rank is not 4 or the channels are unknown.
    """
    if len(shape) != 4:
        raise ValueError(
            f"{type(layer).__name__} wants a feature map of shape (batch, height, width, "
            f"channels), rank 4; got shape {tuple(shape)}, rank {len(shape)}."
        )
    if shape[-1] is None:
        raise ValueError(
            f"{type(layer).__name__} must know the number of channels when it is built; "
            f"got shape {tuple(shape)}."
        )
    return tuple(shape[1:])


def pair(name, value):
    """Return a side length, or a (height, width) pair of them, as a pair.

    Args:
        name: what the value is called, for the error.
        value: a positive integer, or a pair of positive integers.

    Raises:
        ValueError: if the value is neither.
    """
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or not all(is_whole(side) and side > 0 for side in sides):
        raise ValueError(
            f"{name} must be a positive integer or a (height, width) pair of them; got {value!r}."
        )
    return tuple(int(side) for side in sides)


def is_whole(value):
    """Tell whether a value is an integer, NumPy's integers included and booleans not."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def positive_whole(name, value):
    """Return a positive integer, or raise a `ValueError` that names the argument."""
    if not is_whole(value) or value <= 0:
        raise ValueError(f"{name} must be a positive integer; got {value!r}.")
    return int(value)


def fraction(name, value):
    """Return a rate in [0, 1), or raise a `ValueError` that names the argument."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number in [0, 1); got {value!r}.")
    if not math.isfinite(float(value)) or not 0 <= float(value) < 1:
        raise ValueError(f"{name} must be in [0, 1); got {value!r}.")
    return float(value)


def heads_divide(channels, num_heads):
    """Raise a `ValueError` unless the channels can be dealt out evenly to the heads."""
    if channels % num_heads:
        raise ValueError(
            f"num_heads must divide the channels, so that each head gets the same number; "
            f"got {channels} channels and {num_heads} heads, remainder {channels % num_heads}."
        )


def labels_within(labels, classes):
    """Raise a `ValueError` unless all labels are whole numbers from 0 to `classes` - 1."""
    labels = np.asarray(labels)
    outside = labels[~((labels >= 0) & (labels < classes) & (labels == np.floor(labels)))]
    if outside.size:
        raise ValueError(
            f"The label {outside[0]} is outside the {classes} classes, 0 to {classes - 1}."
        )


def not_normalized(images):
    """Return a sentence on an array of images whose numbers are hardly a model's, or `None`.

    Raises:
        ValueError: if some of the numbers are not finite.
    """
    largest = np.abs(images).max(initial=0)
    if not np.isfinite(largest):
        raise ValueError("Some numbers of the images are not finite: look for NaN in the data.")
    way_out = "Pass photographs of 0 to 255 through gcvit.images.normalize."
    if largest > 20:  # normalized ones stay below 3
        return f"The images are not normalized: their numbers go up to {largest:g}. {way_out}"
    if 0 < largest <= 1 and np.min(images) >= 0:  # those of a photograph have a mean of about 0
        return f"The images are not normalized: their numbers are 0 to 1. {way_out}"
    return None
