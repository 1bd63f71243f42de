"""From a file to what a model takes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from skimage import data

from gcvit import images
from gcvit.images import center_box, denormalize, normalize, read_photograph, resize

RNG = np.random.default_rng(0)


def test_the_box_by_hand():
    assert center_box(100, 200, 10) == (50, 0, 150, 100)
    assert center_box(100, 200, 10, crop=0.5) == (75, 25, 125, 75)
    assert center_box(100, 200, (10, 40)) == (0, 25, 200, 75)
    for height, width, crop in RNG.uniform(1, 5000, (200, 3)).astype(int):
        left, upper, right, lower = center_box(height, width, (7, 11), crop=(crop % 10 + 1) / 10)
        assert 0 <= left < right <= width + 1e-9 and 0 <= upper < lower <= height + 1e-9
        assert (right - left) / (lower - upper) == pytest.approx(11 / 7)


def cubic(x):
    """Keys's kernel with a = -0.5."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights_along(start, stop, pixels, size):
    """Return what each of `size` new pixels takes of `pixels` old ones: (size, pixels)."""
    scale = (stop - start) / size
    centers = start + (np.arange(size)[:, None] + 0.5) * scale
    weights = cubic((np.arange(pixels) + 0.5 - centers) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("crop", [1.0, 0.875])
@pytest.mark.parametrize("size", [64, (32, 96), 400])
def test_resize_is_two_matrices_and_a_box(size, crop):
    """Cropped and resized in one pass, bicubic and antialiased, as written down here."""
    image = data.chelsea()
    resized = resize(image, size, crop)
    rows, columns = resized.shape[:2]
    assert resized.dtype == "uint8" and (size in (rows, (rows, columns)))
    left, upper, right, lower = center_box(*image.shape[:2], size, crop)
    down = weights_along(upper, lower, image.shape[0], rows)
    across = weights_along(left, right, image.shape[1], columns)
    expected = np.clip(
        np.einsum("rh,hwc,kw->rkc", down, image.astype("float64"), across, optimize=True), 0, 255
    )
    assert np.abs(resized - expected).max() <= 2
    np.testing.assert_array_equal(resize(image.astype("float32"), size, crop), resized)


def test_what_has_the_size_already_is_not_changed():
    image = data.chelsea()
    np.testing.assert_array_equal(resize(image, image.shape[:2]), image)


def test_normalize_by_hand_and_back():
    image = data.chelsea()
    by_hand = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(image), by_hand, atol=1e-5)
    np.testing.assert_array_equal(denormalize(normalize(image)), image)


def test_images_do_without_tensorflow():
    lines = "import sys, types; sys.modules['gcvit'] = types.ModuleType('gcvit')"
    lines += f"; sys.modules['gcvit'].__path__ = [{str(Path(images.__file__).parent)!r}]"
    lines += "; import gcvit.images; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", lines], check=True)


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


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_large_photographs_are_reduced_by_a_whole_factor(tmp_path, kind):
    path = tmp_path / f"large.{kind}"
    picture(size=(400, 300)).resize((1200, 900)).save(path)
    for short_side, height in ((None, 900), (1000, 900), (500, 900), (400, 450), (225, 225)):
        read = read_photograph(path, short_side)
        assert read.shape == (height, 4 * height // 3, 3), short_side
        # What comes of it is what comes of all pixels.
        whole = resize(read_photograph(path), 50)
        assert np.abs(resize(read, 50).astype(int) - whole).mean() < 4
