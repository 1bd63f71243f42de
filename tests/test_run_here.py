"""The page that runs the model shows what Keras computes, and does what it is told."""

import base64
import contextlib
import functools
import http.server
import io
import json
import re

import numpy as np
import pytest
from conftest import serving
from keras import ops
from PIL import Image

from gcvit import GCViT, explain, explorer
from gcvit.images import normalize
from gcvit.weights import save_safetensors


def write(path, piece):
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}<title>t</title></head><body>{piece}'
        "</body></html>",
        encoding="utf-8",
    )


SEEN = 64
CLASSES = ["ant", "bee", "cow", "</script><b>&amp;", "elk", "fox"]


@pytest.fixture(scope="module")
def small():
    """A model with random weights large enough for switches to show in the answer."""
    config = {
        "window_size": (4, 4, 8, 4),
        "embed_dim": 8,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 2, 4),
        "num_classes": len(CLASSES),
    }
    model = GCViT(**config)
    model.build((None, SEEN, SEEN, 3))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.ndim > 1:
            spread = 1 if "table" in variable.path else 2 / np.prod(variable.shape[:-1]) ** 0.5
            variable.assign(spread * rng.normal(size=variable.shape))
    return model, config


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):
    model, config = small
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    notes = {"config": json.dumps(config), "classes": json.dumps(CLASSES), "crop": "0.875"}
    save_safetensors(model, path, metadata={**notes, "image_size": str(SEEN)})
    return path


@pytest.fixture(scope="module")
def examples():
    rocks = np.random.default_rng(0).integers(0, 256, (90, 70, 3))
    return {"cat": explain.photograph(200)[:150], "</script>": rocks}


@pytest.fixture(scope="module")
def run_here(checkpoint, examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write(path, explorer.run_here(checkpoint, examples).html)
    return path


def decoded(html, name):
    """Return an example photograph as the page has it."""
    written = re.search(r'<script type="application/json">(.*?)</script>', html, re.S).group(1)
    image = next(x["image"] for x in json.loads(written)["examples"] if x["name"] == name)
    return Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).convert("RGB")


def as_seen(photo, size=(SEEN, SEEN)):
    """Return what the model is given of a photograph."""
    (height, width), bicubic = size, Image.Resampling.BICUBIC
    share = 0.875 * min(photo.height / height, photo.width / width)
    across, down = (
        (side - share * of) / 2 for side, of in ((photo.width, width), (photo.height, height))
    )
    box = (across, 0, across + share * width, photo.height)
    wide = photo.resize((width, photo.height), bicubic, box=box)
    seen = wide.resize((width, height), bicubic, box=(0, down, width, down + share * height))
    return normalize(np.asarray(seen, "float32"))[None]


def assert_answers(page, probabilities, where=".answers"):
    """Assert that the page shows the five most probable classes of these probabilities."""
    order = np.argsort(-probabilities)[:5]
    shown = page.eval_on_selector_all(
        f"{where} li",
        "x => x.map(y => [...y.querySelectorAll('.answer > span')].map(z => z.textContent))",
    )
    assert [name for name, _ in shown] == [CLASSES[i] for i in order]
    percent = [float(share.rstrip("%")) for _, share in shown]
    np.testing.assert_allclose(percent, 100 * probabilities[order], atol=0.051)


def predict(model, images):
    return ops.convert_to_numpy(model(images))[0]


def wait_for_run(page):
    page.wait_for_function("document.querySelector('.said').textContent.includes('computed in')")


def change(page, action):
    """Do something that makes the page compute again, and wait until it has."""
    page.evaluate("document.querySelector('.said').textContent = ''")
    action()
    wait_for_run(page)


def open_and_run(open_page, file, **options):
    page = open_page(file, **options)
    assert page.is_hidden(".running")
    page.click("text=Run it here")
    wait_for_run(page)
    return page


def test_the_page_gives_the_answers_of_keras(open_page, run_here, small):
    html, (model, _) = run_here.read_text(), small
    page = open_and_run(open_page, run_here)
    for name in ("cat", "</script>"):
        images = as_seen(decoded(html, name))
        if name != "cat":
            change(page, lambda: page.click(".examples label:nth-of-type(2)"))
        assert_answers(page, predict(model, images))
        assert page.inner_text(".said").startswith(f"{name}: ")


@pytest.mark.parametrize("scripts", [True, False])
def test_before_the_model_is_loaded_its_answer_is_there(
    open_page, run_here, small, examples, scripts
):
    html, (model, _) = run_here.read_text(), small
    assert np.array_equal(explorer.as_stored(examples["cat"]), decoded(html, "cat"))
    page = open_page(run_here, java_script_enabled=scripts)
    assert page.is_visible(".stored img") and page.is_visible(".stored ol")
    assert page.is_visible("text=Scripts do not run here") != scripts
    assert page.is_visible("text=Run it here") == scripts
    assert_answers(page, predict(model, as_seen(decoded(html, "cat"))), ".stored")
    if scripts:
        page.click("text=Run it here")
        wait_for_run(page)
        assert page.is_hidden(".stored")


def test_the_page_shows_the_weights_of_keras(open_page, run_here, small):
    html, (model, _) = run_here.read_text(), small
    images = as_seen(decoded(html, "cat"))
    page = open_and_run(open_page, run_here)
    page.focus(".view.who")
    for key in ("ArrowUp", "Shift+ArrowRight"):  # from row 8, column 8, of 16 x 16 tokens
        page.keyboard.press(key)
    wanted = "row 7, column 12"
    page.wait_for_function(
        "x => document.querySelector('.said').textContent.includes(x)", arg=wanted
    )
    local, every = (explain.attention_weights(model, images, 0, block)[0] for block in (0, 1))
    row = local[1, 3, :, 12].mean(axis=0)  # window (1, 3), token (3, 0)
    i, j = divmod(int(row.argmax()), 4)
    label = page.get_attribute("canvas.local", "aria-label")
    assert f"most to row {4 + i}, column {12 + j}, weight {row.max():.3f}" in label
    rows = every[:, :, :, 12].mean(axis=2)
    r, c, key = np.unravel_index(rows.argmax(), rows.shape)
    label = page.get_attribute("canvas.global", "aria-label")
    assert f"row {4 * r + key // 4}, column {4 * c + key % 4}, weight {rows.max():.3f}" in label

    # Behind the strongest weight of the mean: the head that has most of it.
    page.click(".levels label:nth-of-type(2)")
    page.wait_for_function("document.querySelector('.said').textContent.includes('column 6.')")
    weights = explain.attention_weights(model, images, 1, 0)[0][0, 1, :, 3 * 4 + 2]  # (3, 6)
    key = weights.mean(axis=0).argmax()
    told = page.text_content(".arithmetic p >> nth=0")
    assert told.endswith(f"weight {weights[:, key].max():.3f}")

    # Behind the strongest weight of each head: its score, its bias, and the weight again.
    for head in (0, 1):
        page.select_option("select.head >> nth=0", str(head))
        page.wait_for_function(
            "x => document.querySelector('caption').textContent.includes(x)",
            arg=f"head {head}, key {weights[head].argmax()} ",
        )
        told = page.text_content(".arithmetic p >> nth=0")
        assert told.endswith(f"weight {weights[head].max():.3f}")


def test_switches_change_the_answer_as_in_keras(open_page, run_here, small):
    html, (model, _) = run_here.read_text(), small
    images = as_seen(decoded(html, "cat"))
    page = open_and_run(open_page, run_here)
    usual = predict(model, images)
    with pytest.MonkeyPatch.context() as patch:
        level = model.levels[1]
        zeros = ops.zeros((1, 4, 4, 16))
        patch.setattr(level, "q_global", lambda x: zeros)
        without = predict(model, images)
    assert np.abs(usual - without).max() > 0.01
    # Each change is waited for: the message of one run must not pass for that of the next.
    change(page, lambda: page.select_option("[name=level]", "levels.1"))
    change(page, lambda: page.select_option("[name=query]", "zero"))
    assert_answers(page, without)
    # What the second level's query does not reach is not computed again.
    assert "11 of 17 steps" in page.inner_text(".said")
    change(page, lambda: page.click("text=All as trained"))
    assert_answers(page, usual)

    with pytest.MonkeyPatch.context() as patch:
        attention = model.levels[2].blocks[1].attn
        original = attention.query_key_value

        def without_head(*args):
            q, k, v = original(*args)
            return q, k, v * np.float32([1, 0])[:, None, None]

        patch.setattr(attention, "query_key_value", without_head)
        beheaded = predict(model, images)
    page.click(".levels label:nth-of-type(3)")
    page.select_option("select.head >> nth=1", "1")
    change(page, lambda: page.check(".off-head >> nth=1"))
    assert_answers(page, beheaded)


def test_the_query_of_the_photograph_before(open_page, run_here, small):
    html, (model, _) = run_here.read_text(), small
    page = open_and_run(open_page, run_here)
    other = list(queries(model, as_seen(decoded(html, "cat"))))
    change(page, lambda: page.click(".examples label:nth-of-type(2)"))
    with pytest.MonkeyPatch.context() as patch:
        for level, query in zip(model.levels, other, strict=True):
            patch.setattr(level, "q_global", lambda x, query=query: query)
        wanted = predict(model, as_seen(decoded(html, "</script>")))
    change(page, lambda: page.select_option("[name=query]", "other"))
    assert_answers(page, wanted)


def queries(model, images):
    x = model.patch_embed(images)
    for level in model.levels:
        yield level.q_global(x)
        x = level(x)


def test_the_readers_photograph_is_turned_as_the_camera_held_it(
    open_page, run_here, small, examples, tmp_path
):
    photo = Image.fromarray(examples["cat"].astype("uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo.save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "broken.png").write_bytes(b"no photograph")
    page = open_and_run(open_page, run_here)
    upload = page.locator("input[type=file] >> nth=0")
    change(page, lambda: upload.set_input_files(tmp_path / "turned.png"))
    assert_answers(page, predict(small[0], as_seen(photo.transpose(Image.Transpose.ROTATE_270))))
    upload.set_input_files(tmp_path / "broken.png")
    page.wait_for_selector(".trouble:not(:empty)")
    assert "cannot read broken.png as a photograph" in page.inner_text(".trouble")
    change(page, lambda: upload.set_input_files(tmp_path / "turned.png"))
    assert page.inner_text(".trouble") == ""


@pytest.mark.parametrize("over", ["file", "http"])
def test_pages_share_one_copy_of_the_checkpoint(
    browser, open_page, checkpoint, examples, small, tmp_path, over
):
    page = explorer.run_here(checkpoint, examples, address="shared.txt")
    write(tmp_path / "page.html", page.html)
    assert len(page.html) < 200_000
    (tmp_path / "shared.txt").write_text(explorer.checkpoint_script(checkpoint))
    wanted = predict(small[0], as_seen(decoded(page.html, "cat")))
    if over == "file":
        assert_answers(open_and_run(open_page, tmp_path / "page.html"), wanted)
        return
    handler = functools.partial(Quiet, directory=tmp_path)
    with serving(handler) as server, contextlib.closing(browser.new_page()) as page:
        page.goto(f"{server.url}/page.html")
        page.click("text=Run it here")
        wait_for_run(page)
        assert_answers(page, wanted)


@pytest.mark.parametrize("over", ["file", "http"])
def test_a_checkpoint_that_is_not_there_can_be_asked_for_again(
    browser, checkpoint, examples, tmp_path, over
):
    html = explorer.run_here(checkpoint, examples, address="shared.txt").html
    write(tmp_path / "page.html", html)
    handler = functools.partial(Quiet, directory=tmp_path)
    with serving(handler) as server, contextlib.closing(browser.new_page()) as page:
        page.goto(f"{tmp_path.as_uri() if over == 'file' else server.url}/page.html")
        page.click("text=Run it here")
        page.wait_for_selector(".trouble:not(:empty)")
        assert page.inner_text(".trouble").startswith("There is no shared.txt beside this page:")
        assert page.is_hidden(".running") and page.is_hidden("progress")
        (tmp_path / "shared.txt").write_text(explorer.checkpoint_script(checkpoint))
        page.click("text=Run it here")
        wait_for_run(page)
        assert page.inner_text(".trouble") == "" and page.is_hidden(".start")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_the_running_model_fits(open_page, run_here, theme):
    page = open_and_run(open_page, run_here, width=390, height=800, color_scheme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    color = page.evaluate("getComputedStyle(document.querySelector('.gcvit-page')).color")
    ink = sum(map(int, re.findall(r"\d+", color)[:3])) / 3
    assert (ink > 200) == (theme == "dark")
    smallest = page.eval_on_selector_all(
        ".gcvit-page button, .gcvit-page select, .gcvit-page .check",
        "x => Math.min(...x.map(y => y.getBoundingClientRect().height).filter(y => y))",
    )
    assert smallest >= 24


def test_run_here_refuses_what_it_cannot_run(checkpoint, small, tmp_path):
    with pytest.raises(ValueError, match="at least one example to begin with; got none"):
        explorer.run_here(checkpoint, {})
    save_safetensors(small[0], tmp_path / "bare.safetensors")
    bare, cat = tmp_path / "bare.safetensors", {"cat": np.zeros((9, 9, 3))}
    with pytest.raises(ValueError, match="bare.safetensors has no classes, config, image_size"):
        explorer.run_here(bare, cat)
    with pytest.raises(ValueError, match="bare.safetensors has no classes, config."):
        explorer.run_here(bare, cat, image_size=64)


def test_the_image_may_have_another_size(open_page, checkpoint, examples, small, tmp_path):
    page = explorer.run_here(checkpoint, examples, image_size=(48, 80))
    write(tmp_path / "page.html", page.html)
    wanted = predict(small[0], as_seen(decoded(page.html, "cat"), (48, 80)))
    assert_answers(open_and_run(open_page, tmp_path / "page.html"), wanted)
