"""From a file to what a model takes: read, resize, normalize. The same on every backend."""

import numpy as np

MEAN = 255 * np.array([0.485, 0.456, 0.406], dtype="float32")
"""Mean of ImageNet's red, green and blue, on a scale of 0 to 255."""


STD = 255 * np.array([0.229, 0.224, 0.225], dtype="float32")
"""Standard deviation of ImageNet's red, green and blue, on a scale of 0 to 255."""


class DatasetError(ValueError):
    """A folder of data is not whole; the message names the file and the way out."""


def normalize(images):
    """Bring images from 0 to 255 to ImageNet's mean 0 and deviation 1, channel by channel."""
    return (images - MEAN) / STD


def denormalize(images):
    """Undo `normalize`, clip, and round: uint8 images that can be shown."""
    return np.clip(np.round(np.asarray(images) * STD + MEAN), 0, 255).astype("uint8")


def read_photograph(path, short_side=None):
    """Read a photograph as it is meant to be seen, whatever its file holds.

    Grayscale, 16 bits, palettes and CMYK become RGB, transparent parts become white, the
    camera's orientation (EXIF) is applied, and of an animation the first picture is taken.

    Args:
        path: the file.
        short_side: pixels that the shorter side is reduced to, if it is longer; default
            `None`: all pixels are kept.

    Returns:
        (height, width, 3) uint8.

    Raises:
        DatasetError: if it cannot be read whole; the message names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            size = image.size
            if short_side and short_side < min(size):
                size = [round(side * short_side / min(size)) for side in size]
                image.draft(None, tuple(size))  # lets a JPEG be decoded at a fraction
            image = ImageOps.exif_transpose(image)
            # The decoding may have left one pixel more or less; the orientation may turn.
            size = sorted(size, reverse=image.width > image.height)
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                image = Image.fromarray((np.asarray(image) / 257).astype("uint8"))
            elif image.mode == "F":
                raise ValueError("its pixels have no fixed range")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB")
            if image.size != tuple(size):
                image = image.resize(size, Image.Resampling.BICUBIC)
            return np.array(image)
    except Exception as error:  # whatever the decoders raise on a damaged file
        raise DatasetError(
            f"{path} cannot be read as a photograph ({error}). Mend it, or move it out of the "
            "folder."
        ) from error
