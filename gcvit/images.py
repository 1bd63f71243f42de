"""From a file to what a model takes: read, crop and resize, normalize. One way, on any backend."""

import numpy as np
from PIL import Image

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
    """Crop and resize an image: bicubic and antialiased, as Pillow does it.

    Along the rows first, rounded to bytes, then down the columns: in one call, the order, and
    with it the last bit, would depend on Pillow's version.

    Args:
        image: (height, width, 3), 0 to 255.
        image_size: side of the square that comes out, in pixels, or (height, width).
        crop: see `center_box`; default 1. ImageNet's weights are evaluated with 0.875, which
            the presets name.
        box: (left, upper, right, lower), the part to resize; default `None`: the `center_box`.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: for another shape, and for numbers that are not finite, far from 0 to 255, or
            shares of 0 to 1.

    Source: timm's evaluation of these weights resizes bicubically and crops the center.
    """
    rows, columns = pair("image_size", image_size)
    image = _to_uint8(_checked(image))
    if box is None:
        box = center_box(*image.shape[:2], image_size, crop)
    left, upper, right, lower = box
    image, bicubic = Image.fromarray(image), Image.Resampling.BICUBIC
    image = image.resize((columns, image.height), bicubic, (left, 0, right, image.height))
    return np.array(image.resize((columns, rows), bicubic, (0, upper, columns, lower)))


def _checked(image):
    """Return an image that is (height, width, 3) with values from 0 to 255, or raise an error."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"An image is (height, width, 3), in RGB; got shape {image.shape}.")
    if image.dtype == "uint8":
        return image
    low, high = image.min(), image.max()
    if not (low > -64 and high < 320):  # what an augmentation can overshoot, and no NaN
        raise ValueError(f"An image wants values from 0 to 255; got {low:g} to {high:g}.")
    if image.dtype.kind == "b" or (high <= 1 and (image % 1).any()):
        raise ValueError("An image wants values from 0 to 255; got 0 to 1. Multiply by 255.")
    return image


SAMPLE_FORMAT = 339
"""The tag of a TIFF that says whether its numbers have a sign: 1 where they have none."""


def read_photograph(path, short_side=None):
    """Read a photograph as it is meant to be seen, whatever its file holds.

    Grayscale, palettes and CMYK become RGB, transparent parts become white, the camera's
    orientation (EXIF) is applied, and of an animation the first picture is taken. Gray levels
    of more than 8 bits are scaled evenly: what becomes white is the largest number of 8, 10,
    12, 14 or 16 bits, whichever is the first to hold the brightest pixel; 1.0, for floating
    point that is nowhere above it; and the brightest pixel itself, where that takes more than
    16 bits. 0 becomes black; where there are numbers below 0, as in a CT slice, the lowest
    becomes black and the highest white.

    Args:
        path: the file.
        short_side: pixels that the shorter side keeps at least. A photograph with twice as
            many, or more, is reduced by a whole factor (each pixel the mean of a square of
            them; a JPEG is decoded so, which is cheap). Default `None`: all pixels are kept.

    Returns:
        (height, width, 3) uint8.

    Raises:
        DatasetError: if it cannot be read whole, and for colors of 16 bits that use only the
            lower 14, of which Pillow reads too little; the message names the file.
    """
    try:
        with Image.open(path) as image:
            # Pillow maps a plain TIFF that its tag turns into memory with the sides swapped.
            image.filename = ""
            if short_side:
                image.draft(None, _at_least(image.size, short_side))
            # Pillow has no mode for 32 bits without a sign.
            unsigned = getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, (1,)) == (1,)
            deep = any(";16" in str(tile[3]) for tile in image.tile)
            image = _upright(image)
            if image.mode[0] in "IF":  # convert() would clip them
                levels = np.asarray(image)
                levels = levels.view("uint32") if unsigned and image.mode == "I" else levels
                image = Image.fromarray(_to_8_bits(levels))
            elif deep and max(high for _, high in image.convert("RGB").getextrema()) < 64:
                # Pillow reads the upper eight bits alone.
                raise ValueError("of its 16 bits a color, the upper two are empty: save it in 8")
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
            f"{path} cannot be read as a photograph ({error}). Fix it, or move it out of the "
            "folder."
        ) from error


# What undoes each value of EXIF's orientation.
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image):
    """Apply the camera's orientation. Pillow's own function fails on any other broken tag."""
    image.load()  # a TIFF is turned here, and its tag removed
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # whatever a damaged EXIF block raises; the pixels are whole
        orientation = None
    method = _ORIENTATIONS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_8_bits(pixels):
    """Scale gray levels of more than 8 bits as `read_photograph` says."""
    levels = pixels.astype("float64")
    low, high = min(levels.min(), 0), levels.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("some of its pixels are not finite")
    if low == 0:
        whites = [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
        if pixels.dtype.kind == "f":
            whites.insert(0, 1)
        high = next((white for white in whites if white >= high), high)
    return np.rint((levels - low) / (high - low or 1) * 255).astype("uint8")


def _at_least(size, short_side):
    """Return a size of the same proportions whose shorter side has so many pixels."""
    return tuple(side * short_side // min(size) for side in size)
