"""The explorer: weights survive the packing, and the page shows them where one points."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from gcvit import PRESETS, GCViT, explain, explorer
from gcvit.images import normalize

SIDES = (64, 96)  # neither the image nor its windows are square
POINT = (0.3, 0.7)
PLACES = {"corner": (1, 1), "</script><b>&amp;": (0, 0.5)}


def step_of(weights, bits):
    """Return the distance between two codes, row by row."""
    return (weights.max(axis=-1, keepdims=True) + 1 / 65535) / (2**bits - 1)


@pytest.fixture(scope="module")
def model():
    depths = (2, 2, 4, 2)
    model = GCViT.from_preset("gcvit_nano", weights=None, image_size=SIDES, depths=depths)
    for level in model.levels:
        for block in level.blocks:
            # Fresh weights attend almost evenly, and then no key could be told from another.
            block.attn.relative_position_bias_table.assign(
                np.random.default_rng(block.num_heads).normal(
                    size=block.attn.relative_position_bias_table.shape
                )
            )
            block.attn.qkv.kernel.assign(8 * block.attn.qkv.kernel)
    return model


@pytest.fixture(scope="module")
def image():
    return explain.photograph(SIDES[1])[: SIDES[0]]


@pytest.fixture(scope="module")
def data(model, image):
    return explorer.export(model, image)


def test_packed_bytes_by_hand():
    packed = explorer.pack(np.array([[1.0, 0.2, 0.0], [0.5, 0.5, 0.1]]))
    assert base64.b64decode(packed["codes"]) == bytes([255, 51, 0, 255, 255, 51])
    assert base64.b64decode(packed["scales"]) == bytes([0xFF, 0xFF, 0x00, 0x80])
    packed = explorer.pack(np.array([[1.0, 0.2, 0.0]]), bits=4)
    assert base64.b64decode(packed["codes"]) == bytes([15 | 3 << 4, 0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (2, 196)])
def test_weights_come_back_within_half_a_step(bits, shape):
    scores = 5 * np.random.default_rng(0).normal(size=shape)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    back = explorer.unpack(explorer.pack(weights, bits), shape)
    assert np.all(np.abs(back - weights) <= step_of(weights, bits) / 2 + 1e-12)
    assert np.array_equal(back.max(axis=-1) > 0, np.ones(shape[:-1], bool))


def test_pack_refuses_what_is_no_weight():
    with pytest.raises(ValueError, match="between 0 and 1; got -0.5 to 0.5"):
        explorer.pack(np.array([[-0.5, 0.5]]))
    with pytest.raises(ValueError, match="to 2"):
        explorer.pack(np.array([[2.0, 0.5]]))
    with pytest.raises(ValueError, match="nan"):
        explorer.pack(np.array([[np.nan, 0.5]]))
    with pytest.raises(ValueError, match="bits must be 4 or 8; got 5"):
        explorer.pack(np.array([[1.0]]), bits=5)


def test_export_holds_every_layer_of_a_small_model(model, image, data):
    layers = data["layers"]
    assert [(x["level"], x["block"]) for x in layers] == [
        (i, j) for i, level in enumerate(model.levels) for j in range(len(level.blocks))
    ]
    assert json.loads(json.dumps(data)) == data
    for layer in layers[::3]:
        want = explain.attention_weights(
            model, normalize(image)[None], layer["level"], layer["block"]
        )[0].astype("float64")
        got = explorer.weights_of(layer)
        assert got.shape == want.shape
        # Two runs of the model differ in the last bit, which can tip a rounding.
        assert np.all(np.abs(got - want) <= step_of(want, 8) / 2 + 1e-6)


def test_the_estimate_of_the_size_is_the_size(model, data):
    choice = explorer.choose(model, SIDES)
    assert choice["bytes"] == sum(len(x["codes"]) + len(x["scales"]) for x in data["layers"])


def test_larger_models_give_up_layers_then_bits_then_heads():
    def chosen(preset):
        found = PRESETS[preset]
        return explorer.choose(GCViT(**found["config"]), found["image_size"])

    nano, xxtiny = chosen("gcvit_nano"), chosen("gcvit_xxtiny")
    assert nano["bits"] == 8 and len(nano["layers"]) == 12
    assert xxtiny["bits"] == 4
    assert [(x["level"], x["block"], x["heads"]) for x in xxtiny["layers"]] == [
        (level, block, heads)
        for level, last, heads in ((0, 1, 2), (1, 1, 4), (2, 5, 4), (3, 1, 4))
        for block in (last - 1, last)
    ]
    for choice in (nano, xxtiny):
        assert choice["bytes"] + explorer.FRAME <= explorer.LIMIT


def test_the_frame_has_room_for_a_photograph_of_224_pixels(monkeypatch, data):
    page = explorer.show(data).html.encode()
    weights = sum(len(x["codes"]) + len(x["scales"]) for x in data["layers"])
    monkeypatch.setattr(explorer.explorer, "choose", lambda *given: {"layers": [], "bits": 8})
    photo = explorer.export(None, explain.photograph(224))["image"]
    assert len(page) - weights - len(data["image"]) + len(photo) < explorer.FRAME


def test_export_refuses_what_it_cannot_show(model, image):
    with pytest.raises(ValueError, match=r"\(height, width, 3\); got shape \(64, 96\)"):
        explorer.export(model, image[..., 0])
    with pytest.raises(ValueError, match="from 0 to 255; got 0"):
        explorer.export(model, image / 255)
    with pytest.raises(ValueError, match="from 0 to 255"):
        explorer.export(model, image - 200)
    with pytest.raises(
        ValueError, match="level 1 has a map of 16 x 23 tokens and windows of 2 x 3"
    ):
        explorer.export(model, image[:, :92])
    with pytest.raises(ValueError, match="may weigh 80,000 bytes"):
        explorer.export(model, image, limit=80_000)


def test_show_refuses_a_heavy_page_and_places_outside(data):
    with pytest.raises(ValueError, match="50,000 is the limit"):
        explorer.show(data, limit=50_000)
    with pytest.raises(ValueError, match="'sky' is at"):
        explorer.show(data, places={"sky": (-0.1, 0.5)})


def test_explore_is_export_and_show(monkeypatch, data):
    given = []
    monkeypatch.setattr(
        explorer.explorer, "export", lambda *arguments: given.append(arguments) or data
    )
    page = explorer.explore("model", "image", PLACES, POINT, 300_000)
    assert given == [("model", "image", 300_000)]
    assert page._repr_html_() == page.html == explorer.show(data, PLACES, POINT).html
    assert len(repr(page)) < 40


def test_the_page_loads_nothing_and_its_data_cannot_end_the_script(data):
    html = explorer.show(data, PLACES, POINT).html
    assert not re.search(r"https?:|//cdn|\bsrc=|@import|url\(", html)
    written = re.search(r'<script type="application/json">(.*?)</script>', html, re.S).group(1)
    assert json.loads(written)["places"][1][0] == "</script><b>&amp;"
    assert html.count("</script>") == 2


def test_token_at_counts_windows_and_places():
    layer = {"windows": [4, 4], "window": [2, 3]}  # a map of 8 x 12 tokens
    assert explorer.token_at(layer, (0, 0)) == ((0, 0), (0, 0))
    assert explorer.token_at(layer, (1, 1)) == ((3, 3), (1, 2))
    assert explorer.token_at(layer, (0.3, 0.7)) == ((1, 2), (0, 2))  # row 2, column 8


def expected(data, point, level, local=(0, None), asking=(1, None)):
    """Return the weights of the token's window, local and global, and those everywhere.

    `local` and `asking` are a block and a head, `None` for the mean over the heads.
    """
    tables = []
    for block, head in (local, asking):
        layer = next(x for x in data["layers"] if (x["level"], x["block"]) == (level, block))
        window, place = explorer.token_at(layer, point)
        query = place[0] * layer["window"][1] + place[1]
        weights = explorer.weights_of(layer)[:, :, :, query]
        weights = weights.mean(axis=2) if head is None else weights[:, :, head]
        tables.append((weights[window], weights))
    return tables[0][0], tables[1][0], tables[1][1]


def test_picture_shows_what_was_exported(data):
    figure = explorer.picture(data, POINT)
    assert len(figure.axes) == 12
    for level in range(4):
        local, _, everywhere = expected(data, POINT, level)
        drawn = [ax.images[-1].get_array() for ax in figure.axes[3 * level + 1 : 3 * level + 3]]
        np.testing.assert_allclose(drawn[0].ravel(), local)
        windows = everywhere.shape[:2]
        h, w = drawn[0].shape
        for row, column in np.ndindex(windows):
            part = drawn[1][row * h : (row + 1) * h, column * w : (column + 1) * w]
            np.testing.assert_allclose(part.ravel(), everywhere[row, column])


# In a browser.

READ = """
(() => {
  const root = document.querySelectorAll(".gcvit-explorer")[WHICH];
  const texts = (selector) => [...root.querySelectorAll(selector)].map((x) => x.textContent);
  return {
    said: texts(".said span"),
    tops: texts(".scale span").map(Number),
    tables: [...root.querySelectorAll("table")].map(
      (table) => [...table.querySelectorAll(".weight")].map((cell) => Number(cell.textContent))),
    drawn: [...root.querySelectorAll("canvas")].map((canvas) => canvas.toDataURL()),
  };
})()
"""
CHOOSE = """
(() => {
  const root = document.querySelector(".gcvit-explorer");
  const select = root.querySelectorAll("select.KIND")[SIDE];
  select.value = VALUE;
  select.dispatchEvent(new Event("change"));
})()
"""


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    write(path, explorer.show(data, PLACES, POINT).html)
    return path


def write(path, *pieces):
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "".join(f"<div>{piece}</div>" for piece in pieces)
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}<title>t</title></head><body>{body}'
        '<p id="below">below</p></body></html>',
        encoding="utf-8",
    )


def settle(page):
    """Wait until the page has drawn what it was told to."""
    frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    page.evaluate(f"{frame}.then(() => 0)")


def read(page, which=0):
    settle(page)
    return page.evaluate(READ.replace("WHICH", str(which)))


def choose(page, kind, side, value):
    script = CHOOSE.replace("KIND", kind).replace("SIDE", str(side))
    page.evaluate(script.replace("VALUE", str(value)))


def middle(page, selector, across=0.5, down=0.5):
    """Return a place in an element, in the viewport's coordinates, after scrolling to it."""
    box = page.evaluate(
        f"(() => {{ const x = document.querySelector('{selector}'); x.scrollIntoView();"
        "const r = x.getBoundingClientRect(); return [r.left, r.top, r.width, r.height] })()"
    )
    return box[0] + across * box[2], box[1] + down * box[3]


def check(shown, data, point, level, **layers):
    """Compare tables, scales and words with the exported weights."""
    local, here, everywhere = expected(data, point, level, **layers)
    for table, values in zip(shown["tables"], (local, here), strict=True):
        np.testing.assert_allclose(table, values, atol=5.1e-4)
    np.testing.assert_allclose(shown["tops"], [local.max(), everywhere.max()], atol=5.1e-4)
    layer = next(x for x in data["layers"] if x["level"] == level)
    (window, place), (h, w) = explorer.token_at(layer, point), layer["window"]
    row, column = window[0] * h + place[0], window[1] * w + place[1]
    assert shown["said"][0] == (
        f"Level {level + 1}: token at row {row}, column {column}, "
        f"in the window at row {window[0]}, column {window[1]}."
    )
    best = divmod(int(local.argmax()), w)
    assert (
        f"strongest key at row {window[0] * h + best[0]}, column {window[1] * w + best[1]}, "
        f"weight {local.max():.3f}." in shown["said"][1]
    )
    top = np.unravel_index(everywhere.argmax(), everywhere.shape)
    key = divmod(int(top[2]), w)
    assert (
        f"of all windows at row {top[0] * h + key[0]}, column {top[1] * w + key[1]}, "
        f"weight {everywhere.max():.3f}." in shown["said"][2]
    )


def test_pointing_switching_and_keys_show_the_exported_weights(open_page, file, data):
    page = open_page(file)
    first = read(page)
    check(first, data, POINT, 0)

    page.mouse.click(*middle(page, ".who canvas", 0.1, 0.9))
    clicked = read(page)
    check(clicked, data, (0.9, 0.1), 0)
    assert all(now != before for now, before in zip(clicked["drawn"], first["drawn"], strict=True))

    # The click has left the focus on the picture. Its map has 16 x 24 tokens in 8 x 8 windows.
    for key, row, column in (
        ("ArrowUp", 13, 2),
        ("ArrowRight", 13, 3),
        ("Shift+ArrowUp", 11, 3),
        ("Shift+ArrowRight", 11, 6),
        ("ArrowLeft", 11, 5),
        ("Shift+ArrowDown", 13, 5),
        ("Shift+ArrowDown", 15, 5),
        ("Shift+ArrowDown", 15, 5),  # the last row
    ):
        page.keyboard.press(key)
        check(read(page), data, ((row + 0.5) / 16, (column + 0.5) / 24), 0)
    assert page.evaluate("scrollY") == 0

    point = (15.5 / 16, 5.5 / 24)
    for level in (1, 3, 2):
        x, y = middle(page, f".levels label:nth-of-type({level + 1})")
        page.mouse.click(x, y)
        check(read(page), data, point, level)
    choose(page, "layer", 0, 2)
    choose(page, "layer", 1, 3)
    check(read(page), data, point, 2, local=(2, None), asking=(3, None))
    choose(page, "head", 0, 7)
    choose(page, "head", 1, 0)
    check(read(page), data, point, 2, local=(2, 7), asking=(3, 0))


def test_local_and_global_pictures_can_be_pointed_at(open_page, file, data):
    page = open_page(file)
    page.mouse.click(*middle(page, "canvas.global", 0.55, 0.05))
    check(read(page), data, (0.05, 0.55), 0)
    # The window is that at row 0, column 4; its last token is at row 1, column 14.
    page.mouse.click(*middle(page, "canvas.local", 0.9, 0.9))
    check(read(page), data, (1.5 / 16, 14.5 / 24), 0)


def test_it_is_drawn(open_page, file, data):
    """The cell of the strongest key is yellow in both pictures, that of the weakest blue."""
    page = open_page(file)
    local, _, everywhere = expected(data, POINT, 0)
    h, w = data["layers"][0]["window"]
    on_the_map = everywhere.reshape(8, 8, h, w).transpose(0, 2, 1, 3).reshape(8 * h, 8 * w)
    settle(page)
    for name, values in (("local", local.reshape(h, w)), ("global", on_the_map)):
        rows, columns = values.shape
        colors = page.evaluate(
            f"(() => {{ const {{width, height}} = document.querySelector('canvas.{name}');"
            f"const pixels = document.querySelector('canvas.{name}').getContext('2d')"
            ".getImageData(0, 0, width, height).data; const found = [];"
            f"for (let i = 0; i < {rows}; i++) for (let j = 0; j < {columns}; j++) {{"
            f"const at = 4 * (Math.floor((i + 0.5) * height / {rows}) * width"
            f" + Math.floor((j + 0.5) * width / {columns}));"
            "found.push([...pixels.slice(at, at + 4)]); } return found; })()"
        )
        yellow = np.array(colors)[:, 0] - np.array(colors)[:, 2]  # red less blue
        assert yellow[values.argmax()] > 100 and yellow[values.argmin()] < 20, name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_it_fits_answers_to_taps_and_follows_the_theme(open_page, file, data, theme):
    page = open_page(file, width=360, height=740, has_touch=True, color_scheme=theme)
    page.touchscreen.tap(*middle(page, ".who canvas", 0.8, 0.2))
    page.get_by_text("token at row 3, column 19").wait_for()
    check(read(page), data, (0.2, 0.8), 0)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.gcvit-explorer button,"
        " .gcvit-explorer select, .levels span')].map((x) => x.getBoundingClientRect().height))"
    )
    assert smallest >= 24

    def ink():
        color = "getComputedStyle(document.querySelector('.gcvit-explorer')).color"
        return sum(map(int, re.findall(r"\d+", page.evaluate(color))[:3])) / 3

    assert (ink() > 200) == (theme == "dark")  # as the system has it
    other = "light" if theme == "dark" else "dark"
    page.evaluate(f"document.documentElement.dataset.theme = '{other}'")
    assert (ink() > 200) == (other == "dark")  # the book's theme has the last word


def test_places_and_names_are_text(open_page, file, data):
    page = open_page(file)
    names = "[...document.querySelectorAll('.places button')].map((x) => x.textContent)"
    assert page.evaluate(names) == list(PLACES)
    for i, place in enumerate(PLACES.values()):
        page.evaluate(f"document.querySelectorAll('.places button')[{i}].click()")
        check(read(page), data, place, 0)
    assert page.evaluate("document.querySelectorAll('.gcvit-explorer b').length") == 3


def test_nothing_below_moves_when_the_reader_does(open_page, file):
    for width in (360, 1280):
        page = open_page(file, width=width)
        top = "document.querySelector('#below').getBoundingClientRect().top + scrollY"
        before = page.evaluate(top)
        for level in (3, 2, 1, 0):
            page.evaluate(f"document.querySelectorAll('.levels input')[{level}].click()")
            for i in range(len(PLACES)):
                page.evaluate(f"document.querySelectorAll('.places button')[{i}].click()")
                settle(page)
                assert page.evaluate(top) == before, (width, level)


def test_it_can_be_reached_and_understood_without_seeing(open_page, file):
    page = open_page(file)
    focused = []
    for _ in range(11):
        page.keyboard.press("Tab")
        focused.append(
            page.evaluate(
                "(() => { const x = document.activeElement; return [x.tagName, x.className,"
                " x.getAttribute('role') || '', x.getAttribute('aria-label') || ''] })()"
            )
        )
    names = [f"{tag}.{name}" for tag, name, *_ in focused]
    assert names[:4] == ["INPUT.", "BUTTON.", "BUTTON.", "DIV.view who"]
    assert focused[3][2] == "application" and "arrow keys" in focused[3][3]
    assert [label for *_, label in focused[4:8]] == [
        "Local layer",
        "Head of the local layer",
        "Global layer",
        "Head of the global layer",
    ]
    assert page.evaluate("document.querySelector('.said').getAttribute('aria-live')") == "polite"
    labels = "[...document.querySelectorAll('canvas[role=img]')].map((x) => x.ariaLabel)"
    assert all("strongest key at row" in label for label in page.evaluate(labels))


def test_two_explorers_on_a_page_and_four_bits(open_page, data, tmp_path):
    layers = [{**x, **explorer.pack(explorer.weights_of(x), bits=4)} for x in data["layers"]]
    coarse = {**data, "layers": layers}
    pages = [explorer.show(x, PLACES, POINT).html for x in (data, coarse)]
    write(tmp_path / "two.html", *pages)
    page = open_page(tmp_path / "two.html")
    check(read(page, 0), data, POINT, 0)
    check(read(page, 1), coarse, POINT, 0)
    page.evaluate("document.querySelectorAll('.gcvit-explorer input')[2].click()")
    check(read(page, 0), data, POINT, 2)
    check(read(page, 1), coarse, POINT, 0)  # the other one keeps its level
    assert page.evaluate("document.querySelectorAll('.levels input:checked').length") == 2
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((x) => x.id)")
    assert len(ids) == len(set(ids))


def test_without_scripts_it_says_where_to_look(open_page, file):
    page = open_page(file, java_script_enabled=False)
    shown = "document.querySelector('.gcvit-explorer').innerText"
    assert "the figure below shows the same" in page.evaluate(shown)
    assert page.evaluate("document.querySelector('.tool').offsetHeight") == 0


def test_the_photograph_is_the_photograph(data, image):
    stored = base64.b64decode(data["image"].partition(",")[2])
    stored = np.asarray(Image.open(io.BytesIO(stored)), "float32")
    assert stored.shape == image.shape and np.abs(stored - image).mean() < 4
