"""From a file to what a model takes."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageOps
from skimage import data
from skimage.io import imsave

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
    for mode in ("L", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.tif"
        rgb.convert(mode).save(path)
        expected = np.array(rgb.convert(mode).convert("RGB"))
        np.testing.assert_array_equal(read_photograph(path), expected)


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


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_plain_tiff_is_turned_upright(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture().convert("L" if mode == "I;16" else mode)
    expected = np.array(
        ImageOps.exif_transpose(_with_orientation(stored, orientation)).convert("RGB")
    )
    if mode == "I;16":
        stored = Image.fromarray(257 * np.asarray(stored).astype("uint16"))
    stored.save(tmp_path / "turned.tif", exif=exif)
    np.testing.assert_allclose(read_photograph(tmp_path / "turned.tif"), expected, atol=1)


def _with_orientation(image, orientation):
    image = image.copy()
    image.getexif()[0x0112] = orientation
    return image


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


def test_resizing_goes_along_the_rows_first():
    """In one call, versions of Pillow differ in the last bit where the height shrinks more."""
    image = data.chelsea()[:, :100]
    resized = resize(image, (30, 90), box=(1.5, 2.5, 98.0, 290.0))
    rows = Image.fromarray(image).resize((90, 300), Image.BICUBIC, (1.5, 0, 98, 300))
    expected = rows.resize((90, 30), Image.BICUBIC, (0, 2.5, 90, 290))
    np.testing.assert_array_equal(resized, expected)


RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)

DEEP = {
    "bytes in floats": ((255 * RAMP).astype("float32"), 0, 255),
    "shares": (RAMP.astype("float32"), 0, 255),
    "CT": ((4000 * RAMP - 1000).astype("int32"), 0, 255),
    "CT in floats": ((4000 * RAMP - 1000).astype("float32"), 0, 255),
    "below zero": ((100 * RAMP - 500).astype("float32"), 0, 255),
    "ten bits": ((1023 * RAMP).astype("uint16"), 0, 255),
    "twelve bits": ((4095 * RAMP).astype("uint16"), 0, 255),
    "sixteen bits": ((65535 * RAMP).astype("uint16"), 0, 255),
    "dark sixteen bits": ((30_000 * RAMP).astype("uint16"), 0, 117),
    "more": ((1_000_000 * RAMP).astype("int32"), 0, 255),
    "one level": (np.full((30, 40), -7, "int32"), 0, 0),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_become_eight_in_order(tmp_path, kind):
    pixels, darkest, brightest = DEEP[kind]
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    read = read_photograph(tmp_path / "deep.tif")[..., 0]
    assert (read.min(), read.max()) == (darkest, brightest)
    assert (np.diff(read.ravel().astype(int)) >= 0).all()
    if pixels.dtype == "uint16":
        Image.fromarray(pixels).save(tmp_path / "deep.png")
        np.testing.assert_array_equal(read_photograph(tmp_path / "deep.png")[..., 0], read)


def test_bytes_in_floats_stay_as_they_are(tmp_path):
    gray = np.asarray(picture().convert("L"))
    Image.fromarray(gray.astype("float32")).save(tmp_path / "gray.tif")
    np.testing.assert_array_equal(read_photograph(tmp_path / "gray.tif")[..., 0], gray)


def test_32_bits_without_a_sign_stay_in_order(tmp_path):
    levels = np.linspace(0, 2**32 - 1, 32 * 32).astype("uint32").reshape(32, 32)
    imsave(tmp_path / "a.tif", levels)
    read = read_photograph(tmp_path / "a.tif")[..., 0].ravel()
    assert (np.diff(read.astype(int)) >= 0).all() and (read[0], read[-1]) == (0, 255)


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, "float32")).save(tmp_path / "nan.tif")
    with pytest.raises(images.DatasetError, match=r"nan\.tif .* not finite"):
        read_photograph(tmp_path / "nan.tif")


@pytest.mark.parametrize("bits", [12, 16])
def test_colors_of_16_bits_are_read_where_they_use_them(tmp_path, bits):
    levels = ((2**bits - 1) * RAMP[..., None] * [1, 0.5, 0.2]).astype("uint16")

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in levels)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))
    if bits == 12:
        with pytest.raises(images.DatasetError, match=r"deep\.png .* upper two are empty"):
            read_photograph(path)
    else:
        assert np.abs(read_photograph(path) - levels / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_broken_tag_beside_the_orientation_does_no_harm(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x0131] = "some camera"
    picture(size=(64, 40)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        upright = np.array(ImageOps.exif_transpose(image))
    whole = (tmp_path / "a.jpg").read_bytes()
    # The name of the software becomes the horizontal resolution, which is no text.
    tags = {b"MM": (b"\x01\x31\x00\x02", b"\x01\x1a\x00\x02")}
    tags[b"II"] = tuple(tag[1::-1] + tag[:1:-1] for tag in tags[b"MM"])
    before, after = tags[whole[whole.index(b"Exif\0\0") + 6 :][:2]]
    assert whole.count(before) == 1
    (tmp_path / "a.jpg").write_bytes(whole.replace(before, after))
    np.testing.assert_array_equal(read_photograph(tmp_path / "a.jpg"), upright)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4)), r"\(height, width, 3\), in RGB; got shape \(4, 4\)"),
        (np.zeros((4, 4, 4), "uint8"), r"got shape \(4, 4, 4\)"),
        (np.full((4, 4, 3), 0.5), r"got 0 to 1\. Multiply by 255"),
        (np.full((4, 4, 3), 40_000, "uint16"), "got 40000 to 40000"),
        (np.full((4, 4, 3), np.nan), "got nan to nan"),
    ],
)
def test_arrays_that_are_no_photographs_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        resize(image, 32)
