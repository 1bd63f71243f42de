"""From a file to what a model takes."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import picture
from PIL import Image
from skimage import data

from gcvit import fine_tuning
from gcvit.images import read_photograph


def test_resize_is_bicubic_and_antialiased_as_pillow_does_it():
    image = data.chelsea()
    expected = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    resized = fine_tuning.resize(image, 64).numpy()
    assert np.abs(resized - expected).max() <= 2
    aliased = tf.image.resize(image, (64, 64), method="bicubic").numpy()
    assert np.abs(aliased - expected).max() > 20
    assert fine_tuning.resize(image, (32, 96)).shape == (32, 96, 3)
    assert resized.min() >= 0 and resized.max() <= 255


def test_every_mode_becomes_rgb(tmp_path):
    rgb = picture()
    gray = rgb.convert("L")
    for mode in ("L", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.tif"
        rgb.convert(mode).save(path)
        expected = np.array(rgb.convert(mode).convert("RGB"))
        np.testing.assert_array_equal(read_photograph(path), expected)
    deep = np.asarray(gray).astype("uint16") * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(
        read_photograph(tmp_path / "deep.png"), np.array(gray.convert("RGB"))
    )


def test_cmyk_jpeg_has_the_colors_of_the_picture(tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).convert("CMYK").save(tmp_path / "red.jpg")
    red = read_photograph(tmp_path / "red.jpg")
    assert red.shape == (32, 32, 3) and np.abs(red.mean(axis=(0, 1)) - [200, 30, 30]).max() < 6


def test_transparent_parts_become_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    read = read_photograph(tmp_path / "a.png")
    assert read[0, 0].tolist() == [255, 255, 255] and read[1, 1].tolist() == [255, 0, 0]
    image.convert("LA").save(tmp_path / "la.png")
    assert read_photograph(tmp_path / "la.png")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("short_side", [None, 20])
def test_the_camera_s_orientation_is_applied(tmp_path, short_side):
    image = Image.new("RGB", (64, 40), "black")
    image.paste("white", (0, 0, 64, 20))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, turn it clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = read_photograph(tmp_path / "turned.jpg", short_side)
    assert read.shape == ((64, 40, 3) if short_side is None else (32, 20, 3))
    half = read.shape[1] // 2
    assert read[:, half + 4 :].mean() > 240 and read[:, : half - 4].mean() < 15


def test_large_photographs_are_reduced_and_small_ones_are_not(tmp_path):
    picture(size=(400, 300)).save(tmp_path / "large.jpg")
    assert read_photograph(tmp_path / "large.jpg", 100).shape == (100, 133, 3)
    assert read_photograph(tmp_path / "large.jpg", 500).shape == (300, 400, 3)
