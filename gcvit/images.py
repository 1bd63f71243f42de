"""From a file to what a model takes: read, crop and resize, normalize. One way, on any backend."""

import numpy as np
from PIL import Image, ImageOps

from gcvit.checks import pair

MEAN = 255 * np.array([0.485, 0.456, 0.406], dtype="float32")
"""Mean of ImageNet's red, green and blue, on a scale of 0 to 255."""

STD = 255 * np.array([0.229, 0.224, 0.225], dtype="float32")
"""Standard deviation of ImageNet's red, green and blue, on a scale of 0 to 255."""


class DatasetError(ValueError):
    """A photograph or a folder of them cannot be used; the message names it and the way out."""


def normalize(images):
    """Bring images from 0 to 255 to ImageNet's mean 0 and deviation 1, channel by channel."""
    return (images - MEAN) / STD


def denormalize(images):
    """Undo `normalize`, clip, and round: uint8 images that can be shown."""
    return _to_uint8(np.asarray(images) * STD + MEAN)


def _to_uint8(images):
    images = np.asarray(images)
    return images if images.dtype == "uint8" else np.clip(np.rint(images), 0, 255).astype("uint8")


def center_box(height, width, image_size, crop=1.0):
    """Return the part of a photograph that an evaluation looks at.

    It is the largest centered rectangle that has the proportions of the model's images, both
    its sides times `crop`. Its edges may lie between pixels.

    Args:
        height: height of the photograph in pixels.
        width: its width in pixels.
        image_size: side of the model's images in pixels, or (height, width).
        crop: share of the rectangle's sides that is looked at; default 1: all.

    Returns:
        (left, upper, right, lower) as floats, in pixels from the upper left corner.
    """
    rows, columns = pair("image_size", image_size)
    scale = min(height / rows, width / columns)
    # Rounding must not carry the box over the edge.
    box_height, box_width = crop * min(scale * rows, height), crop * min(scale * columns, width)
    left, upper = (width - box_width) / 2, (height - box_height) / 2
    return left, upper, left + box_width, upper + box_height


def resize(image, image_size, crop=1.0, box=None):
    """Crop and resize an image in one pass: bicubic and antialiased, as Pillow does it.

    Args:
        image: (height, width, 3), 0 to 255.
        image_size: side of the square that comes out, in pixels, or (height, width).
        crop: see `center_box`; default 1. ImageNet's weights are evaluated with 0.875, which
            the presets name.
        box: (left, upper, right, lower), the part to resize; default `None`: the `center_box`.

    Returns:
        (height, width, 3) uint8.

    Source: timm's evaluation of these weights resizes bicubically and crops the center.
    """
    rows, columns = pair("image_size", image_size)
    image = _to_uint8(image)
    if box is None:
        box = center_box(*image.shape[:2], image_size, crop)
    resampled = Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC, box)
    return np.array(resampled)


def read_photograph(path, short_side=None):
    """Read a photograph as it is meant to be seen, whatever its file holds.

    Grayscale, 16 bits, palettes and CMYK become RGB, transparent parts become white, the
    camera's orientation (EXIF) is applied, and of an animation the first picture is taken.

    Args:
        path: the file.
        short_side: pixels that the shorter side keeps at least. A photograph with twice as
            many, or more, is reduced by a whole factor (each pixel the mean of a square of
            them; a JPEG is decoded so, which is cheap). Default `None`: all pixels are kept.

    Returns:
        (height, width, 3) uint8.

    Raises:
        DatasetError: if it cannot be read whole; the message names the file.
    """
    try:
        with Image.open(path) as image:
            if short_side:
                image.draft(None, _at_least(image.size, short_side))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                image = Image.fromarray((np.asarray(image) / 257).astype("uint8"))
            elif image.mode == "F":
                raise ValueError("its pixels have no fixed range")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB")
            if short_side:
                image = image.reduce(max(1, min(image.size) // short_side))
            return np.array(image)
    except Exception as error:  # whatever the decoders raise on a damaged file
        raise DatasetError(
            f"{path} cannot be read as a photograph ({error}). Mend it, or move it out of the "
            "folder."
        ) from error


def _at_least(size, short_side):
    """Return a size of the same proportions whose shorter side has so many pixels."""
    return tuple(side * short_side // min(size) for side in size)
