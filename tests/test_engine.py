"""The model in plain JavaScript: it computes what Keras computes, number by number."""

import base64
import contextlib
import functools
import http.server
import json
import queue
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import once, serving, to_numpy
from keras import ops
from PIL import Image

from gcvit import GCViT, SqueezeAndExcitation, explain, laboratory
from gcvit.weights import PACKAGED, save_safetensors

FOLDER = Path(laboratory.__file__).parent / "explorer"
FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
MODULES = ("engine.js", "images.js", "explain.js")
RNG = np.random.default_rng(0)

pytestmark = once
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node to run engine.js")

# What is asked of the engine: a list of calls to its exports, arrays written as base64.
ASK = """
const KINDS = { float32: Float32Array, uint8: Uint8Array };
const isArray = (value) => ArrayBuffer.isView(value);
function read(value) {
  if (Array.isArray(value)) return value.map(read);
  if (typeof value !== "object" || !value) return value;
  if (value.base64 === undefined) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, read(item)]));
  }
  const bytes = Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0));
  return new KINDS[value.dtype](bytes.buffer);
}
function write(value) {
  if (isArray(value)) {
    const bytes = new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
    let letters = "";
    for (const byte of bytes) letters += String.fromCharCode(byte);
    const dtype = value.constructor.name.replace(/Clamped|Array/g, "").toLowerCase();
    return { base64: btoa(letters), dtype };
  }
  if (Array.isArray(value)) return value.map(write);
  if (typeof value !== "object" || !value) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, write(item)]));
}
async function load(folder) {
  const modules = MODULES.map((name) => import(`${folder}/${name}`));
  return Object.assign({}, ...await Promise.all(modules));
}
function ask(engine, calls) {
  let model, run;
  const answers = [];
  for (const [name, ...args] of read(calls)) {
    try {
      if (name === "createModel") {
        model = engine.createModel(engine.readSafetensors(args[0].buffer), args[1]);
        const { classes, imageSize, crop, mean, std } = model;
        answers.push({ classes, imageSize, crop, mean, std });
      } else if (name === "run") {
        answers.push(run = model.run(...args));
      } else if (name === "classActivation") {
        answers.push(engine.classActivation(model, run.tensors, ...args));
      } else if (name === "explainWeight") {
        answers.push(engine.explainWeight(model, run.tensors, ...args));
      } else if (name === "readSafetensors") {
        answers.push(engine.readSafetensors(args[0].buffer));
      } else {
        answers.push(engine[name](...args));
      }
    } catch (error) {
      answers.push({ error: error.message });
    }
  }
  return JSON.stringify(write(answers));
}
""".replace("MODULES", json.dumps(MODULES))


def encode(value):
    if isinstance(value, np.ndarray):
        text = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"base64": text, "dtype": value.dtype.name}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value


def decode(value):
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "base64" in value:
        return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"])
    value = {key: decode(item) for key, item in value.items()}
    return value["data"].reshape(value["shape"]) if set(value) == {"data", "shape"} else value


def ask(*calls):
    """Return what Node answers to calls of the engine's functions."""
    script = f"{ASK}\nconst engine = await load({json.dumps(FOLDER.as_uri())});\n" + (
        "let text = ''; for await (const part of process.stdin) text += part;\n"
        "console.log(ask(engine, JSON.parse(text)));"
    )
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script],
        input=json.dumps(encode(calls)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return decode(json.loads(done.stdout))


def ask_chromium(browser, *calls):
    """Return what Chromium answers to the same."""
    script = f"async (calls) => {{ {ASK} return ask(await load(location.origin), calls); }}"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=FOLDER)
    with serving(handler) as server, contextlib.closing(browser.new_page()) as page:
        page.goto(f"{server.url}/engine.js")
        return decode(json.loads(page.evaluate(script, encode(calls))))


def ask_firefox(folder, *calls):
    """Return what Firefox answers: it opens a page that asks the engine, and sends this back.

    Playwright cannot drive Debian's: version 1.65 tells each page its color scheme by a command
    that Firefox 153 does not know.
    """
    page = (
        f"<!doctype html><title>t</title><script type=module>{ASK} let answer;"
        "try { answer = ask(await load(location.origin), await (await fetch('calls')).json()); }"
        "catch (error) { answer = JSON.stringify(String(error)); }"
        "await fetch('answer', { method: 'POST', body: answer });</script>"
    )
    texts = {"/": ("text/html", page), "/calls": ("application/json", json.dumps(encode(calls)))}
    answers = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path not in texts:
                return super().do_GET()
            kind, text = texts[self.path]
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

    (folder / "user.js").write_text(
        'user_pref("datareporting.policy.dataSubmissionEnabled", false);\n'
        'user_pref("browser.aboutwelcome.enabled", false);\n'
    )
    with serving(functools.partial(Handler, directory=FOLDER)) as server:
        command = [FIREFOX, "--headless", "--no-remote", "--profile", str(folder), server.url]
        firefox = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return decode(json.loads(answers.get(timeout=180)))
        finally:
            firefox.terminate()
            firefox.wait()


# Three models whose random weights are large enough for every part to show in the output.

CONFIGS = {
    "layer scale": {
        "window_size": (4, 4, 8, 4),
        "embed_dim": 8,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 2, 4),
        "layer_scale": 0.5,
    },
    "other depths, padded windows, no head": {
        "window_size": (3, 5, 3, 7),
        "embed_dim": 4,
        "depths": (3, 1, 2, 4),
        "num_heads": (2, 2, 4, 8),
        "mlp_ratio": 2.5,
        "qkv_bias": False,
        "include_top": False,
    },
    "windows that are not square": {
        "window_size": ((2, 3), (4, 3), (3, 1)),
        "embed_dim": 8,
        "depths": (2, 2, 2),
        "num_heads": (2, 4, 8),
        "qk_scale": 0.3,
    },
}


def filled(name):
    """Build one of the models."""
    config = {"num_classes": 5, "head_activation": None, **CONFIGS[name]}
    model = GCViT(**config)
    model.build((None, 64, 64, 3))
    rng = np.random.default_rng(1)
    for variable in model.weights:
        values = rng.normal(size=variable.shape)
        if variable.ndim > 1 and "table" not in variable.path:
            values *= 2 / np.sqrt(np.prod(variable.shape[:-1]))
        elif variable.ndim == 1:
            values = 0.3 * values + ("gamma" in variable.path)
        variable.assign(values)
    return model, {name: value for name, value in config.items() if name != "head_activation"}


def photograph():
    return explain.photograph(64)


IMAGES = {
    "photograph": lambda: (photograph() - 120) / 60,
    "noise": lambda: RNG.normal(size=(64, 64, 3)),
    "constant": lambda: np.full((64, 64, 3), -0.7),
    "not square": lambda: RNG.normal(size=(48, 91, 3)),
}
MODELS, PICTURES = {}, {}


def model_of(name):
    if name not in MODELS:
        MODELS[name] = filled(name)
    return MODELS[name]


def picture_of(name):
    if name not in PICTURES:
        PICTURES[name] = IMAGES[name]().astype("float32")
    return PICTURES[name]


def file_of(model, config, folder, dtype="float32", **metadata):
    path = folder / "model.safetensors"
    save_safetensors(model, path, dtype, {"config": json.dumps(config), **metadata})
    return np.frombuffer(path.read_bytes(), "uint8")


def gated_layers(model):
    """Yield the name of each squeeze-and-excitation in a checkpoint, and the layer."""
    yield "patch_embed.conv_down.conv.2", model.patch_embed.conv_down.conv[2]
    for i, level in enumerate(model.levels):
        for k, extraction in enumerate(level.q_global_gen.to_q_global):
            yield f"levels.{i}.q_global_gen.to_q_global.{k}.conv.2", extraction.conv[2]
        if level.downsample:
            yield f"levels.{i}.downsample.conv.2", level.down.conv[2]


def intermediates(model, image):
    """Return every tensor between an image and the logits, by the engine's names."""
    tensors, gates = {}, {}
    layers = {id(layer): name for name, layer in gated_layers(model)}
    with pytest.MonkeyPatch.context() as patch:
        original = SqueezeAndExcitation.gates

        def recorded(layer, x):
            gates[f"{layers[id(layer)]}.means"] = ops.mean(x, axis=(1, 2), keepdims=True)
            gates[f"{layers[id(layer)]}.gates"] = result = original(layer, x)
            return result

        patch.setattr(SqueezeAndExcitation, "gates", recorded)
        x = tensors["patch_embed"] = model.patch_embed(ops.convert_to_tensor(image[None]))
        for i, level in enumerate(model.levels):
            name = f"levels.{i}"
            step = x
            for k, extraction in enumerate(level.q_global_gen.to_q_global):
                step = extraction(step)
                tensors[f"{name}.q_global_gen.to_q_global.{k}"] = step
            q_global = tensors[f"{name}.q_global"] = level.q_global(x)
            for j, block in enumerate(level.blocks):
                attn, at = block.attn, f"{name}.blocks.{j}"
                query = (q_global,) if block.global_query else ()
                tokens, _ = block.windows(block.norm1(x))
                q, k, v = attn.query_key_value(tokens, *query)
                tensors |= {
                    f"{at}.attn.q": q,
                    f"{at}.attn.k": k,
                    f"{at}.attn.v": v,
                    f"{at}.attn.scores": ops.matmul(q * attn.scale, ops.swapaxes(k, -2, -1)),
                    f"{at}.attn.bias": attn.relative_position_bias()[None],
                    f"{at}.attn.weights": attn.attention_weights(tokens, *query)[None],
                    f"{at}.attn.output": attn(tokens, *query)[None],
                }
                x = tensors[at] = block(x, *query)
            tensors[name] = x
            if level.downsample:
                x = tensors[f"{name}.downsample"] = level.down(x)
        x = tensors["norm"] = model.norm(x)
        x = tensors["pool"] = model.pool(x)
        if model.include_top:
            tensors["head"] = model.head(x)
    # A gate's map has one place, and the windows of one image count as one image's each.
    squeezed = {name: to_numpy(value)[0, 0, 0] for name, value in gates.items()}
    return squeezed | {name: to_numpy(value)[0] for name, value in tensors.items()}


def assert_close(got, want, name):
    assert got.shape == want.shape, f"{name}: {got.shape}, not {want.shape}"
    error = np.abs(got - want).max()
    assert error <= 1e-4 * np.abs(want).max(), f"{name} differs by {error}"


def compare(answer, want):
    """Assert that all tensors of a run are there and right."""
    assert "error" not in answer, answer
    assert set(answer["tensors"]) == set(want)
    for name, value in want.items():
        assert_close(answer["tensors"][name], value, name)
    if "head" in want:
        assert_close(answer["logits"], want["head"], "logits")
    else:
        assert answer["logits"] is None


@needs_node
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_that_of_keras(name, tmp_path):
    model, config = model_of(name)
    chosen = IMAGES if name == "layer scale" else ("noise", "not square")
    images = [picture_of(image) for image in chosen]
    calls = [["createModel", file_of(model, config, tmp_path)]]
    calls += [["run", image.ravel(), *image.shape[:2]] for image in images]
    _, *answers = ask(*calls)
    for image, answer in zip(images, answers, strict=True):
        compare(answer, intermediates(model, image))


def assert_computes_the_same(ask_it, folder):
    model, config = model_of("windows that are not square")
    image = picture_of("not square")
    file = file_of(model, config, folder)
    _, answer = ask_it(["createModel", file], ["run", image.ravel(), *image.shape[:2]])
    compare(answer, intermediates(model, image))


def test_chromium_computes_the_same(browser, tmp_path):
    assert_computes_the_same(functools.partial(ask_chromium, browser), tmp_path)


@pytest.mark.skipif(FIREFOX is None, reason="needs Firefox")
def test_firefox_computes_the_same(tmp_path):
    profile = tmp_path / "profile"
    profile.mkdir()
    assert_computes_the_same(functools.partial(ask_firefox, profile), tmp_path)


# Switches: what stands in for a part in Keras, and how the engine is told.

GIVEN = RNG.normal(size=(4, 4, 16)).astype("float32")


def without_head(attn, x, q_global=None):
    q, k, v = type(attn).query_key_value(attn, x, q_global)
    kept = (np.arange(attn.num_heads) != 1)[:, None, None]
    return q, k, v * ops.convert_to_tensor(kept, "float32")


def in_parts(attn):
    mask = laboratory.block_mask(attn.window_size[0], 4)
    return type(attn).relative_position_bias(attn) + ops.convert_to_tensor(mask)


def levels(*indices):
    return lambda model: [model.levels[i] for i in indices or range(len(model.levels))]


def attentions(*indices):
    return lambda model: [block.attn for x in levels(*indices)(model) for block in x.blocks]


def gates(model):
    return [layer for _, layer in gated_layers(model)]


def extractions(model):
    return [x for level in model.levels for x in level.q_global_gen.to_q_global if not x.keepdims]


def zero_query(level, x):
    return ops.zeros_like(type(level).q_global(level, x))


SWITCHES = {
    "constant query": ({"query": "constant"}, levels(), "q_global", laboratory.constant_query),
    "zero query": ({"query": {"levels.0": "zero"}}, levels(0), "q_global", zero_query),
    "given query": (
        {"query": {"levels.1": {"shape": GIVEN.shape, "data": GIVEN.ravel()}}},
        levels(1),
        "q_global",
        lambda level, x: ops.convert_to_tensor(GIVEN[None]),
    ),
    "gates of each place": ({"gates": "place"}, gates, "gates", laboratory.gates_of_each_place),
    "open gates": ({"gates": "open"}, gates, "gates", lambda layer, x: 1.0),
    "shut gates": (
        {"gates": {"levels.1": "shut"}},
        lambda model: [
            layer for name, layer in gated_layers(model) if name.startswith("levels.1.")
        ],
        "gates",
        lambda layer, x: 0.0,
    ),
    "late windows in parts": (
        {"part": {"levels.2": 4}},
        attentions(2),
        "relative_position_bias",
        in_parts,
    ),
    "a head off": (
        {"headsOff": {"levels.1": [1], "levels.1.blocks.0": []}},
        lambda model: [model.levels[1].blocks[1].attn],
        "query_key_value",
        without_head,
    ),
    "position bias off": (
        {"bias": "off"},
        attentions(),
        "relative_position_bias",
        lambda attn: ops.zeros_like(type(attn).relative_position_bias(attn)),
    ),
    "flat gather": (
        {"flatGather": True},
        attentions(),
        "relative_position_bias",
        laboratory.flat_gather,
    ),
    "zero padding": ({"zeroPadding": True}, extractions, "halve", laboratory.zero_padding),
}


@needs_node
def test_each_switch_does_what_its_stand_in_does_in_keras(tmp_path):
    model, config = model_of("layer scale")
    image = picture_of("photograph")
    calls = [["createModel", file_of(model, config, tmp_path)], ["run", image.ravel(), 64, 64, {}]]
    for switches, *_ in SWITCHES.values():
        calls.append(["run", image.ravel(), 64, 64, {"switches": switches, "keep": []}])
    _, plain, *answers = ask(*calls)
    for (name, (_, find, method, stand_in)), answer in zip(SWITCHES.items(), answers, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            for layer in find(model):
                patch.setattr(layer, method, functools.partial(stand_in, layer))
            want = to_numpy(model(image[None]))[0]
        assert "error" not in answer, (name, answer)
        assert_close(answer["logits"], want, name)
        assert np.abs(plain["logits"] - want).max() > 1e-3 * np.abs(want).max(), name


@needs_node
def test_a_switch_costs_only_what_lies_behind_it(tmp_path):
    model, config = model_of("layer scale")
    image, other = (picture_of(name).ravel() for name in ("photograph", "noise"))
    off = {"switches": {"headsOff": {"levels.2.blocks.1.attn": [0]}}}
    _, first, switched, again, plain, fresh, direct, everywhere = ask(
        ["createModel", file_of(model, config, tmp_path)],
        ["run", image, 64, 64, {}],
        ["run", image, 64, 64, off],
        ["run", image, 64, 64, off],
        ["run", image, 64, 64, {}],
        ["run", other, 64, 64, {}],
        ["run", image, 64, 64, off],
        ["run", image, 64, 64, {"switches": {"query": "constant"}}],
    )
    steps = first["computed"]
    behind = ["levels.2.blocks.1", "levels.2.downsample", "levels.3.q_global_gen"]
    behind += ["levels.3.blocks.0", "levels.3.blocks.1", "head"]
    assert switched["computed"] == plain["computed"] == behind
    assert again["computed"] == [] and fresh["computed"] == steps == direct["computed"]
    # The first block attends locally, to what comes before any query.
    wanted = [name for name in steps if name not in ("patch_embed", "levels.0.blocks.0")]
    assert everywhere["computed"] == wanted
    np.testing.assert_array_equal(again["logits"], direct["logits"])
    np.testing.assert_array_equal(plain["logits"], first["logits"])
    assert np.abs(fresh["logits"] - first["logits"]).max() > 1e-3


@needs_node
def test_what_was_computed_before_is_never_out_of_date(tmp_path):
    model, config = model_of("layer scale")
    image, other = (picture_of(name).ravel() for name in ("photograph", "noise"))
    alone = [switches for switches, *_ in SWITCHES.values()]
    two = [{**alone[i], **alone[j]} for i, j in RNG.integers(len(alone), size=(20, 2))]
    chosen = [
        {"switches": switches, "keep": ["norm"]}
        for one, both in zip(alone, two, strict=False)
        for switches in (one, both, {})
    ]
    in_turn = [["run", image, 64, 64, options] for options in chosen]
    afresh = [call for run in in_turn for call in (["run", other, 64, 64, {}], run)]
    _, *answers = ask(["createModel", file_of(model, config, tmp_path)], *in_turn, *afresh)
    used, wanted = answers[: len(chosen)], answers[len(chosen) + 1 :: 2]
    assert sum(len(answer["computed"]) for answer in used) < 0.9 * sum(
        len(answer["computed"]) for answer in wanted
    )
    for answer, want, options in zip(used, wanted, chosen, strict=True):
        np.testing.assert_array_equal(answer["logits"], want["logits"], err_msg=str(options))
        np.testing.assert_array_equal(answer["tensors"]["norm"], want["tensors"]["norm"])


@needs_node
def test_only_what_is_asked_for_is_kept(tmp_path):
    model, config = model_of("layer scale")
    image = picture_of("noise").ravel()
    _, some, none = ask(
        ["createModel", file_of(model, config, tmp_path)],
        ["run", image, 64, 64, {"keep": ["levels.1.blocks.*.attn.weights", "pool"]}],
        ["run", image, 64, 64, {"keep": []}],
    )
    weights = [f"levels.1.blocks.{j}.attn.weights" for j in range(2)]
    assert sorted(some["tensors"]) == [*weights, "pool"] and none["tensors"] == {}
    np.testing.assert_array_equal(some["logits"], none["logits"])


@needs_node
@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_shipped_weights_give_keras_answers(path):
    (preset, weights), size = path.stem.split("-"), 96
    model = GCViT.from_preset(preset, weights)
    model.head.activation = None
    image = ((explain.photograph(size) - 120) / 60).astype("float32")
    asked, answer, by_place = ask(
        ["createModel", np.frombuffer(path.read_bytes(), "uint8")],
        ["run", image.ravel(), size, size, {"keep": ["norm"]}],
        ["classActivation", 2],
    )
    assert len(asked["classes"]) == model.num_classes
    want = to_numpy(model(image[None]))[0]
    assert_close(answer["logits"], want, "logits")
    # What the places add, and the bias, is the logit; what they add is Grad-CAM before the cut.
    np.testing.assert_allclose(by_place.sum() + to_numpy(model.head.bias)[2], want[2], rtol=1e-4)
    cam = explain.grad_cam(model, image[None], [2])[0]
    assert_close(np.maximum(by_place, 0), cam, "class activation")


@needs_node
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_to_the_last_bit(dtype):
    import ml_dtypes
    from safetensors.numpy import save

    values = np.concatenate([RNG.normal(size=100) * 10.0 ** RNG.integers(-9, 4, 100), [0, -0.0]])
    halves = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    halves = halves[np.isfinite(halves.astype("float32"))]
    file = np.frombuffer(save({"x": halves}, {"a": "b"}), "uint8")
    (answer,) = ask(["readSafetensors", file])
    assert answer["metadata"] == {"a": "b"}
    np.testing.assert_array_equal(answer["tensors"]["x"], halves.astype("float32"))


@needs_node
def test_errors_name_what_was_given_and_what_was_wanted(tmp_path):
    from safetensors.numpy import load, save

    model, config = model_of("layer scale")
    file = file_of(model, config, tmp_path)
    tensors = load(file.tobytes())
    metadata = {"config": json.dumps(config)}

    def changed(**values):
        both = {**tensors, **{name.replace("__", "."): x for name, x in values.items()}}
        left = {name: x for name, x in both.items() if x is not None}
        return np.frombuffer(save(left, metadata), "uint8")

    image = picture_of("noise").ravel()
    answers = ask(
        ["createModel", file[:-4]],
        ["createModel", changed(norm__bias=None)],
        ["createModel", changed(norm__bias=np.zeros(3, "float32"))],
        ["createModel", changed(extra=np.zeros(3, "float32"))],
        ["createModel", changed(norm__bias=np.full(64, np.nan, "float32"))],
        ["createModel", changed(norm__bias=np.zeros(64, "int32"))],
        ["createModel", np.frombuffer(save(tensors), "uint8")],
        ["createModel", np.frombuffer(b"<html>not a checkpoint", "uint8")],
        ["createModel", file],
        ["run", image, 64, 63, {}],
        ["run", image[: 31 * 64 * 3], 31, 64, {}],
        ["run", image, 64, 64, {"switches": {"qwery": "zero"}}],
        ["run", image, 64, 64, {"switches": {"query": {"levels.7": "zero"}}}],
        ["run", image, 64, 64, {"switches": {"query": "none"}}],
        ["run", image, 64, 64, {"switches": {"gates": "ajar"}}],
        ["run", image, 64, 64, {"switches": {"bias": False}}],
        ["run", image, 64, 64, {"switches": {"query": {"shape": [1, 1, 8], "data": image[:8]}}}],
        ["resize", image[:100].astype("uint8"), 10, 20, [5, 5]],
    )
    wanted = [
        "should hold",
        "norm.bias of shape (64); the checkpoint has no such weight",
        "norm.bias of shape (64); the checkpoint has (3)",
        "no layer wants: extra",
        "norm.bias holds values that are not finite",
        "norm.bias holds I32; F32,BF16,F16 can be read",
        "window_size, depths and num_heads",
        "No .safetensors file",
        None,
        "64 x 63 px",
        "at least 32 px",
        "query, gates, part, headsOff, bias, flatGather, zeroPadding; got qwery",
        "no part levels.7",
        "query is one of own, constant, zero, object; got none for levels.0",
        "gates is one of own, place, open, shut; got ajar for patch_embed",
        "bias is one of on, off; got false",
        "shape 4,4,8; got one of 1,1,8",
        "3 or 4 bytes each; got 100 bytes",
    ]
    for answer, text in zip(answers, wanted, strict=True):
        assert (text is None) == ("error" not in answer), (text, answer)
        assert text is None or text in answer["error"]


# From a photograph to what the model takes.

BOXES = {
    "down": ((97, 131), (32, 32), 1),
    "down, cropped": ((131, 97), (64, 64), 0.875),
    "up": ((20, 30), (64, 96), 0.875),
    "up and down": ((20, 200), (48, 64), 1),
    "as it is": ((32, 48), (32, 48), 1),
}


def pillow_resize(pixels, size, box):
    """Resize along the rows, then down the columns.

    In one step Pillow 13 begins with the axis that shrinks the most, older ones with the rows.
    """
    (height, width), (left, top, right, bottom) = size, box
    image, bicubic = Image.fromarray(pixels), Image.Resampling.BICUBIC
    image = image.resize((width, image.height), bicubic, box=(left, 0, right, image.height))
    return np.array(image.resize((width, height), bicubic, box=(0, top, width, bottom)))


@needs_node
def test_resizing_is_pillows_to_the_last_bit():
    photos = {}
    for name, (shape, _, _) in BOXES.items():
        contrast = RNG.integers(0, 2, (*shape, 3)) * 255  # overshoots at every edge
        smooth = RNG.integers(0, 256, (*shape, 3))
        photos[name] = [contrast.astype("uint8"), smooth.astype("uint8")]
    boxes = ask(*(["centerBox", *shape, size, crop] for shape, size, crop in BOXES.values()))
    calls, wanted = [], []
    for (name, (shape, size, _)), box in zip(BOXES.items(), boxes, strict=True):
        assert np.isclose((box[2] - box[0]) / (box[3] - box[1]), size[1] / size[0])
        np.testing.assert_allclose([box[0] + box[2], box[1] + box[3]], shape[::-1])
        for pixels in photos[name]:
            wanted.append(pillow_resize(pixels, size, box))
            alpha = np.full((*shape, 1), 255, "uint8")
            for bytes_ in (pixels, np.concatenate([pixels, alpha], axis=-1)):
                calls.append(["resize", bytes_.ravel(), *shape, size, box])
    answers = ask(*calls)
    for i, want in enumerate(wanted):
        for answer in answers[2 * i : 2 * i + 2]:
            np.testing.assert_array_equal(answer.reshape(want.shape), want)


@needs_node
def test_an_image_is_prepared_as_its_checkpoint_says(tmp_path):
    model, config = model_of("layer scale")
    notes = {"image_size": "64", "mean": "[1, 2, 3]", "std": "[4, 5, 6]", "crop": "0.875"}
    file = file_of(model, config, tmp_path, classes='["a", "b", "c", "d", "e"]', **notes)
    pixels = RNG.integers(0, 256, (100, 80, 3)).astype("uint8")
    made = {"imageSize": 64, "crop": 0.875, "mean": [1, 2, 3], "std": [4, 5, 6]}
    said, box, prepared = ask(
        ["createModel", file],
        ["centerBox", 100, 80, [64, 64], 0.875],
        ["prepare", pixels.ravel(), 100, 80, made],
    )
    assert said == {**made, "classes": list("abcde")}
    want = pillow_resize(pixels, (64, 64), box)
    assert (prepared["height"], prepared["width"]) == (64, 64)
    np.testing.assert_array_equal(prepared["pixels"].reshape(want.shape), want)
    np.testing.assert_allclose(
        prepared["image"].reshape(want.shape), (want - [1.0, 2, 3]) / [4, 5, 6], rtol=1e-6
    )


@needs_node
def test_the_arithmetic_behind_a_weight_adds_up(tmp_path):
    model, config = model_of("layer scale")
    at = {"window": 3, "head": 1, "query": 5, "key": 9}
    _, answer, *explained = ask(
        ["createModel", file_of(model, config, tmp_path)],
        ["run", picture_of("noise").ravel(), 64, 64, {}],
        ["explainWeight", "levels.1.blocks.0", at],
        ["explainWeight", "levels.1.blocks.1", at],
    )
    for j, says in enumerate(explained):
        tensors = {
            part: answer["tensors"][f"levels.1.blocks.{j}.attn.{part}"]
            for part in ("q", "k", "bias", "weights")
        }
        q = tensors["q"][0 if j else 3, 1, 5]  # a global query has one window
        np.testing.assert_array_equal(says["q"], q)
        np.testing.assert_array_equal(says["k"], tensors["k"][3, 1, 9])
        np.testing.assert_allclose(says["products"], q * says["k"], rtol=1e-6)
        np.testing.assert_allclose(says["dot"], q @ says["k"], rtol=1e-4)
        np.testing.assert_allclose(says["score"], says["dot"] * says["scale"], rtol=1e-4)
        assert says["bias"] == tensors["bias"][1, 5, 9]
        weight = tensors["weights"][3, 1, 5, 9]
        np.testing.assert_allclose(says["exp"] / says["sum"], weight, rtol=1e-5)
        assert says["weight"] == weight
