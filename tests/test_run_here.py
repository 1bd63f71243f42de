"""The page that runs the model shows what Keras computes, and does what it is told."""

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import serving, tiny_model
from keras import ops
from PIL import Image

from gcvit import GCViT, SqueezeAndExcitation, explain, explorer
from gcvit.fine_tuning import load_classifier, save_classifier
from gcvit.images import normalize, read_photograph, resize
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
    write(path, explorer.run_here(checkpoint, examples))
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


def numbers_of(texts):
    """Return what the page writes with a true minus sign as numbers."""
    return [float(re.sub("[%+]", "", text).replace("−", "-")) for text in texts]


def assert_answers(page, probabilities, where=".answers", classes=CLASSES):
    """Assert that the page shows the five most probable classes of these probabilities."""
    order = np.argsort(-probabilities)[:5]
    shown = page.eval_on_selector_all(
        f"{where} li",
        "x => x.map(y => [...y.querySelectorAll('.answer > span')].map(z => z.textContent))",
    )
    assert [name for name, _ in shown] == [classes[i] for i in order]
    percent = numbers_of(share for _, share in shown)
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


def in_view(page, level, row, column):
    """Choose a level, and a token of it, and wait until the page shows what it attends to."""
    page.click(f".levels label:nth-of-type({level + 1})")
    page.wait_for_function("document.querySelector('.said').textContent.startsWith('Token')")
    page.evaluate("document.querySelector('.said').textContent = ''")
    view = page.locator(".view.who")
    box = view.bounding_box()
    share = [(place + 0.5) * 2**level / (SEEN // 4) for place in (column, row)]
    view.click(position={"x": share[0] * box["width"], "y": share[1] * box["height"]})
    page.wait_for_function(
        "x => document.querySelector('.said').textContent.startsWith(x)",
        arg=f"Token at row {row}, column {column}.",
    )


@pytest.mark.parametrize("kind", ["local", "global"])
def test_the_arithmetic_of_any_cell_is_that_of_keras(open_page, run_here, small, kind):
    html, (model, _) = run_here.read_text(), small
    images = as_seen(decoded(html, "cat"))
    page = open_and_run(open_page, run_here)
    in_view(page, 1, 2, 5)  # window (0, 1), token (2, 1)
    page.click(".arithmetic summary")
    block = int(kind == "global")
    page.click(f".kind label:nth-of-type({block + 1})")
    page.select_option(f"select.head >> nth={block}", "1")
    query = 2 * 4 + 1

    maps, q_global = explain.block_inputs(model, images, level=1)
    layer = model.levels[1].blocks[block]
    tokens, _ = layer.windows(layer.norm1(maps[block]))
    given = (q_global,) if kind == "global" else ()
    # (image, windows, heads, tokens, channels); a global query has one window.
    q, k, v = (ops.convert_to_numpy(x)[0] for x in layer.attn.query_key_value(tokens, *given))
    q, k, v = q[1 - block, 1], k[1, 1], v[1, 1]
    weights = explain.attention_weights(model, images, 1, block)[0][0, 1, 1, query]
    bias = ops.convert_to_numpy(layer.attn.relative_position_bias())[1, query]

    page.wait_for_function(
        "document.querySelector('.sums caption')?.textContent.includes('head 1')"
    )
    lines = page.eval_on_selector_all(
        ".lines tbody tr", "x => x.map(y => [...y.cells].map(z => z.textContent))"
    )
    assert [line[0] for line in lines] == [f"{i}, {j}" for i in range(4) for j in range(4)]
    np.testing.assert_allclose(numbers_of(x[1] for x in lines), k @ q[query], atol=1e-3)
    np.testing.assert_allclose(numbers_of(x[4] for x in lines), bias, atol=1e-3)
    np.testing.assert_allclose(numbers_of(x[7] for x in lines), weights, atol=1e-3)
    assert lines[0][3] == "2 up, 1 left" and lines[query][3] == "same place"
    # At first the strongest key is lit; then those that the keyboard and the pointer go to.
    lit = "[...document.querySelectorAll('.lines tbody tr')].findIndex(x => x.matches('.lit'))"
    assert page.evaluate(lit) == weights.argmax()
    page.focus(".cells .lit")
    page.keyboard.press("ArrowUp" if weights.argmax() >= 4 else "ArrowDown")
    assert page.evaluate(lit) == weights.argmax() + (-4 if weights.argmax() >= 4 else 4)
    page.hover(".cells [role=gridcell] >> nth=11")
    assert page.evaluate(lit) == 11
    rows = page.eval_on_selector_all(
        ".sums tr", "x => x.map(y => [...y.querySelectorAll('td')].map(z => z.textContent))"
    )
    wanted = [q[query], k[11], q[query] * k[11], v[11], weights[11] * v[11], weights @ v]
    for row, values in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(numbers_of(row), values, atol=6e-3)
    assert page.inner_text(".sums p").endswith(f"= weight {weights[11]:.3f}")


def test_the_arithmetic_of_a_gate_is_that_of_keras(open_page, run_here, small):
    html, (model, _) = run_here.read_text(), small
    page = open_and_run(open_page, run_here)
    gates, original = [], SqueezeAndExcitation.gates
    with pytest.MonkeyPatch.context() as patch:

        def recorded(layer, x):
            gates.append((layer, ops.convert_to_numpy(original(layer, x))[0, 0, 0]))
            return ops.convert_to_tensor(gates[-1][1][None, None, None])

        patch.setattr(SqueezeAndExcitation, "gates", recorded)
        predict(model, as_seen(decoded(html, "cat")))
    which, channel = 5, 3
    wanted = gates[which][1][channel]
    page.click(".gate-arithmetic summary")
    page.select_option("select.gate-of", index=which)
    page.fill("input.gate-channel", str(channel))
    page.wait_for_function(
        "x => document.querySelector('.gate-sums p')?.textContent.includes(x)",
        arg=f"= gate {wanted:.3f}.",
    )
    products = page.eval_on_selector_all(
        ".gate-sums tr:has(td)", "x => x.map(y => y.lastChild.textContent)"
    )
    total = float(np.log(wanted / (1 - wanted)))
    assert abs(sum(numbers_of(products)) - total) < 1e-3 * (1 + len(products))


@pytest.mark.parametrize("shown", ["length", "channel", "directions"])
def test_the_maps_are_those_of_keras(open_page, run_here, small, shown):
    html, (model, _) = run_here.read_text(), small
    x = model.patch_embed(as_seen(decoded(html, "cat")))
    q_global = model.levels[0].q_global(x)
    for block in model.levels[0].blocks:
        x = block(x, q_global) if block.global_query else block(x)
    want = ops.convert_to_numpy(x)[0]
    page = open_and_run(open_page, run_here)
    page.select_option("select.as", shown)
    if shown == "directions":
        page.wait_for_selector(".maps canvas.pixels")
        pixels = page.evaluate(
            "(() => { const x = document.querySelector('.maps canvas');"
            "return [...x.getContext('2d').getImageData(0, 0, x.width, x.height).data] })()"
        )
        pixels = np.reshape(pixels, (*want.shape[:2], 4))[..., :3]
        flat = want.reshape(-1, want.shape[-1])
        _, vectors = np.linalg.eigh(np.cov(flat.T))
        for color, vector in enumerate(vectors.T[:-4:-1]):
            along = (flat - flat.mean(axis=0)) @ vector * np.sign(vector[np.abs(vector).argmax()])
            along = 255 * (along - along.min()) / np.ptp(along)
            np.testing.assert_allclose(pixels[..., color].ravel(), along, atol=2)
        return
    if shown == "channel":
        page.fill("input.channel", "5")
        page.wait_for_selector(".maps figcaption >> text=channel 5")
    values = want[..., 5] if shown == "channel" else np.sqrt((want**2).mean(axis=-1))
    caption = page.inner_text(".maps figcaption >> nth=0")
    numbers = numbers_of(re.search(r"from (\S+) to (\S+)", caption).groups())
    np.testing.assert_allclose(numbers, [values.min(), values.max()], atol=2e-3)


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
    changes = numbers_of(page.locator(".answers .change").all_inner_texts())
    order = np.argsort(-without)[:5]
    np.testing.assert_allclose(changes, 100 * (without - usual)[order], atol=0.11)
    shift = np.log(without) - np.log(usual)  # of the logits, up to what all have in common
    first, most = usual.argmax(), page.inner_text(".effect")
    changed = re.search(r"logit: (.+) (\S+); the first class: (.+) (\S+)\.$", most)
    assert changed[3] == CLASSES[first]
    largest, of_first = numbers_of([changed[2], changed[4]])
    between = shift[CLASSES.index(changed[1])] - shift[first]
    assert abs(largest - of_first - between) < 0.02
    # What lies before the second level's query is not computed again.
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


OUTCOMES = ("stays first, within one point", "stays first and gains", "stays first and loses")


def test_the_reader_predicts_before_a_switch_is_thrown(open_page, run_here, small):
    html, (model, _) = run_here.read_text(), small
    images = as_seen(decoded(html, "cat"))
    page = open_and_run(open_page, run_here)
    usual = predict(model, images)
    page.check(".predict")
    page.select_option("[name=query]", "zero")
    page.wait_for_selector(".question:not([hidden])")
    assert_answers(page, usual)  # nothing is thrown yet
    page.click("text=Put the switch back")
    assert page.input_value("[name=query]") == "own" and page.is_hidden(".question")

    with pytest.MonkeyPatch.context() as patch:
        for level in model.levels:
            shape = model_query_shape(level)
            patch.setattr(level, "q_global", lambda x, shape=shape: ops.zeros(shape))
        without = predict(model, images)
    first, best = usual.argmax(), without.argmax()
    gain = without[first] - usual[first]
    truth = "another class wins"
    if best == first:
        truth = f"{CLASSES[first]} {OUTCOMES[0 if abs(gain) < 0.01 else 1 if gain > 0 else 2]}"
    for n, is_right in enumerate((False, True)):
        page.select_option("[name=query]", "zero")
        page.wait_for_selector(".question:not([hidden])")
        buttons = page.locator(".outcomes button").all_inner_texts()
        assert len(buttons) == 4 and truth in buttons
        chosen = truth if is_right else next(text for text in buttons if text != truth)
        change(page, lambda chosen=chosen: page.click(f".outcomes button >> text={chosen}"))
        assert_answers(page, without)
        page.wait_for_selector(f".verdict >> text=Your score: {n} of {n + 1}.")
        verdict = page.inner_text(".verdict")
        assert verdict.startswith("Right: " if is_right else "No: ")
        assert f"{usual[first]:.1%}, now {without[first]:.1%}" in verdict
        change(page, lambda: page.click("text=All as trained"))


def model_query_shape(level):
    return (1, *level.window_size, level.blocks[0].attn.proj.kernel.shape[-1])


def test_all_classes_can_be_searched(open_page, run_here, small):
    html, (model, _) = run_here.read_text(), small
    usual = predict(model, as_seen(decoded(html, "cat")))
    page = open_and_run(open_page, run_here)
    assert page.is_visible(".unsure") == (usual.max() < 0.5)
    page.click(".classes summary")
    names = page.locator(".all-classes .answer > :first-child").all_inner_texts()
    assert names == CLASSES
    shares = numbers_of(page.locator(".all-classes .share").all_inner_texts())
    np.testing.assert_allclose(shares, 100 * usual, atol=0.051)
    page.fill(".search", "E")
    assert page.locator(".all-classes li:visible").all_inner_texts()[0].startswith("bee")
    assert page.inner_text(".count") == "2 of 6 classes"
    page.click(".all-classes >> text=elk")
    page.wait_for_selector(".activation >> text=what each place adds to elk")


OWN = ["hammer", "<b>", "saw"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What `gcvit train` leaves, of a model with other depths, sizes and classes."""
    model = GCViT(
        window_size=(4, 8),
        embed_dim=12,
        depths=(1, 3),
        num_heads=(1, 3),
        num_classes=len(OWN),
        layer_scale=0.5,
    )
    model.build((None, 48, 64, 3))
    rng = np.random.default_rng(3)
    for variable in model.weights:
        if variable.ndim > 1:
            variable.assign(rng.normal(size=variable.shape) / np.prod(variable.shape[:-1]) ** 0.5)
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    scale = {"mean": [100.0, 110.0, 120.0], "std": [50.0, 60.0, 70.0]}
    save_classifier(path, model, OWN, [48, 64], crop=0.9, **scale)
    return path


def opened(page):
    page.wait_for_function("document.querySelector('.model').textContent.startsWith('own')")
    wait_for_run(page)


@pytest.mark.parametrize("by", ["button", "drop"])
def test_the_readers_own_checkpoint(open_page, run_here, own, small, by):
    html, (model, _) = run_here.read_text(), small
    classifier = load_classifier(own)
    wanted = {
        name: predict(classifier.model, classifier.prepare(np.asarray(decoded(html, name)))[None])
        for name in ("cat", "</script>")
    }
    page = open_and_run(open_page, run_here)
    if by == "button":
        change(page, lambda: page.click(".examples label:nth-of-type(2)"))
        change(page, lambda: page.check("[name=bias]"))
        page.set_input_files("input[accept='.safetensors']", own)
        opened(page)
        assert_answers(page, wanted["</script>"], classes=OWN)  # and no switch is left
        change(page, lambda: page.click(".examples label:nth-of-type(1)"))
    else:
        drop(page, own)
        opened(page)
    assert_answers(page, wanted["cat"], classes=OWN)
    assert page.inner_text(".model") == "own.safetensors: 3 classes, images of 48 × 64 px."
    assert page.locator(".levels label").count() == 2
    page.click(".levels label:nth-of-type(1)")  # a level of a single block: none is global
    page.wait_for_selector("canvas.global[aria-label='This level has no global block.']")
    change(page, lambda: page.click("text=Back to the book's model"))
    assert_answers(page, predict(model, as_seen(decoded(html, "cat"))))


def test_a_checkpoint_that_takes_shades_of_gray(open_page, run_here, tmp_path):
    model = tiny_model(len(OWN), in_channels=1)
    save_classifier(tmp_path / "own.safetensors", model, OWN, 32)
    classifier = load_classifier(tmp_path / "own.safetensors")
    image = classifier.prepare(np.asarray(decoded(run_here.read_text(), "cat")))
    page = open_page(run_here)
    drop(page, tmp_path / "own.safetensors")  # in place of the book's model
    opened(page)
    assert_answers(page, predict(classifier.model, image[None]), classes=OWN)


def drop(page, path):
    """Drop a file on the page."""
    transfer = page.evaluate_handle(
        "([name, data]) => { const x = new DataTransfer();"
        "x.items.add(new File([Uint8Array.from(data)], name)); return x; }",
        [path.name, list(path.read_bytes())],
    )
    page.dispatch_event(".gcvit-page", "drop", {"dataTransfer": transfer})


def test_what_is_no_checkpoint_is_refused_in_a_sentence(open_page, run_here, own, small, tmp_path):
    content = own.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    headless = {**header, "__metadata__": {"config": header["__metadata__"]["config"]}}
    written = json.dumps(headless).encode()
    files = {
        "text": (b"I am a text, and no checkpoint.", "No .safetensors file"),
        "empty": (b"", "No .safetensors file"),
        "half": (content[: len(content) // 2], "numbers; the file has"),
        "unsized": (
            len(written).to_bytes(8, "little") + written + content[8 + length :],
            "Its header does not say how large its images are.",
        ),
    }
    html, (model, _) = run_here.read_text(), small
    page = open_and_run(open_page, run_here)
    for name, (data, why) in files.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        page.set_input_files("input[accept='.safetensors']", path)
        page.wait_for_selector(f".trouble >> text={name}.safetensors is no checkpoint that can be")
        assert why in page.inner_text(".trouble")
    change(page, lambda: page.check("[name=zeroPadding]"))
    change(page, lambda: page.uncheck("[name=zeroPadding]"))
    assert_answers(page, predict(model, as_seen(decoded(html, "cat"))))
    assert page.inner_text(".trouble") == ""


RECORD = """
() => {
  window.Worker = class extends Worker {
    constructor(...given) {
      super(...given);
      this.addEventListener("message", ({ data }) => {
        if (data.answer?.pixels) window.seen = [...data.answer.pixels];
      });
    }
  };
}
"""


BLANK = """
(canvases) => {
  const probe = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
  const context = probe.getContext("2d", { willReadFrequently: true });
  return canvases.filter((canvas) => {
    context.clearRect(0, 0, 8, 8);
    context.drawImage(canvas, 0, 0, 8, 8);
    return context.getImageData(0, 0, 8, 8).data.every((value) => value === 0 || value === 255);
  }).length;
}
"""


def unreadable(folder, cat):
    (folder / "text.jpg").write_text("This is a text.")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    cat.save(folder / "scan.tiff")
    cat.save(folder / "half.jpg")
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 3])
    return ["text.jpg", "empty.jpg", "drawing.svg", "scan.tiff", "half.jpg"]


def readable(folder, cat):
    """Write photographs of many kinds; return the mean difference that each may have."""
    rng = np.random.default_rng(0)
    turned, mirrored = Image.Exif(), Image.Exif()
    turned[0x0112], mirrored[0x0112] = 6, 5
    see_through = cat.convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(cat.size))
    upside_down = cat.transpose(Image.Transpose.ROTATE_180)
    gray, few = cat.convert("L"), cat.quantize(64)
    noise = Image.fromarray(rng.integers(0, 256, (3000, 1, 3), "uint8"))
    files = {
        "plain.jpg": (cat, {}, 1),
        "forty-megapixels.jpg": (cat.resize((8000, 5000)), {"quality": 60}, 1),
        "upright-line.png": (noise, {}, 0),
        "flat-line.png": (noise.transpose(Image.Transpose.ROTATE_90), {}, 0),
        "pixel.png": (cat.resize((1, 1)), {}, 0),
        "cmyk.jpg": (cat.convert("CMYK"), {}, 1),
        "gray.jpg": (gray, {}, 1),
        "see-through.png": (see_through, {}, 0.5),
        "palette.png": (few, {}, 0),
        "animated.gif": (few, {"save_all": True, "append_images": [upside_down.quantize(64)]}, 0),
        "animated.webp": (cat, {"save_all": True, "append_images": [upside_down]}, 1),
        "turned.jpg": (cat, {"exif": turned}, 1),
        "mirrored.png": (cat, {"exif": mirrored}, 0),
        "deep.png": (Image.fromarray(np.asarray(gray).astype("uint16") * 257), {}, 0),
        "bits.bmp": (cat, {}, 0),
        "progressive.jpg": (cat, {"progressive": True}, 1),
    }
    for name, (image, options, _) in files.items():
        image.save(folder / name, **options)
    return {name: most for name, (_, _, most) in files.items()}


def renderer_memory(browser):
    """Return the bytes that the browser's renderers hold, in all."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    pages = [
        int(Path(f"/proc/{process['id']}/statm").read_text().split()[1])
        for process in processes
        if process["type"] == "renderer"
    ]
    session.detach()
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads a process's memory from /proc")
def test_twenty_photographs_in_a_row(browser, open_page, run_here, tmp_path):
    cat = Image.fromarray(explain.photograph(300)[:200].astype("uint8"))
    differences, refused = readable(tmp_path, cat), unreadable(tmp_path, cat)
    assert len(differences) + len(refused) > 20
    page = open_page(run_here)
    page.evaluate(RECORD)
    page.click("text=Run it here")
    wait_for_run(page)
    collector = page.context.new_cdp_session(page)
    upload = page.locator("input[type=file] >> nth=0")

    def memory():
        # What a browser keeps while memory is plenty is no leak.
        collector.send("HeapProfiler.collectGarbage")
        collector.send("Memory.simulatePressureNotification", {"level": "critical"})
        page.wait_for_timeout(2000)
        return renderer_memory(browser)

    before = memory()
    for i, (name, most) in enumerate(differences.items()):
        change(page, lambda name=name: upload.set_input_files(tmp_path / name))
        wanted = resize(read_photograph(tmp_path / name), SEEN, 0.875)
        seen = np.reshape(page.evaluate("window.seen"), wanted.shape)
        assert np.abs(seen - wanted.astype("int")).mean() <= most, name
        blank = page.eval_on_selector_all(".gcvit-page canvas", BLANK)
        assert blank == 0, name
        if i < len(refused):
            upload.set_input_files(tmp_path / refused[i])
            page.wait_for_selector(
                f".trouble >> text=This browser cannot read {refused[i]} as a photograph."
            )
    assert memory() - before < 100e6


def test_a_photograph_is_pasted_or_dropped_before_the_model_is_there(
    open_page, run_here, small, examples, tmp_path
):
    path = tmp_path / "dropped.png"
    photo = Image.fromarray(examples["cat"].astype("uint8")).rotate(90)
    photo.save(path)
    wanted = predict(small[0], as_seen(photo))
    page = open_page(run_here)
    drop(page, path)
    wait_for_run(page)
    assert_answers(page, wanted)
    change(page, lambda: page.click(".examples label:nth-of-type(2)"))
    paste = """
    (data) => {
      const clipboardData = new DataTransfer();
      const file = new File([Uint8Array.from(data)], "image.png", { type: "image/png" });
      clipboardData.items.add(file);
      document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
    }"""
    change(page, lambda: page.evaluate(paste, list(path.read_bytes())))
    assert_answers(page, wanted)
    assert page.inner_text(".said").startswith("image.png: ")


@pytest.mark.parametrize("scripts", [True, False])
def test_the_small_page(open_page, checkpoint, examples, small, tmp_path, scripts):
    html = explorer.run_here(checkpoint, examples, small=True)
    write(tmp_path / "page.html", html)
    wanted = predict(small[0], as_seen(decoded(html, "cat")))
    page = open_page(tmp_path / "page.html", width=390, java_script_enabled=scripts)
    assert_answers(page, wanted, ".stored")
    if not scripts:
        return
    page.click("text=Run it here")
    wait_for_run(page)
    assert_answers(page, wanted)
    assert "global query of level 3" in page.inner_text(".looks")
    weights = explain.attention_weights(small[0], as_seen(decoded(html, "cat")), 2, 1)
    most = weights.mean(axis=(0, 1, 2, 3, 4)).max()
    assert f"to {most:.3f}" in page.inner_text(".looks")
    link = page.get_attribute(".gcvit-page a", "href")
    assert link == explorer.explorer.BOOK + "10-explorer.html"


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
    write(tmp_path / "page.html", page)
    assert len(page) < 200_000
    (tmp_path / "shared.txt").write_text(explorer.checkpoint_script(checkpoint))
    wanted = predict(small[0], as_seen(decoded(page, "cat")))
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
    html = explorer.run_here(checkpoint, examples, address="shared.txt")
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
    write(tmp_path / "page.html", page)
    wanted = predict(small[0], as_seen(decoded(page, "cat"), (48, 80)))
    assert_answers(open_and_run(open_page, tmp_path / "page.html"), wanted)
