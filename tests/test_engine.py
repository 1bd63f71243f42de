"""The model in plain JavaScript: it computes what Keras computes, number by number."""

import base64
import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import slow_on_jax, to_numpy
from keras import ops
from PIL import Image

from gcvit import GCViT, SqueezeAndExcitation, explain, laboratory
from gcvit.global_tokens import FeatureExtraction
from gcvit.weights import PACKAGED, save_safetensors

ENGINE = Path(laboratory.__file__).parent / "explorer" / "engine.js"
RNG = np.random.default_rng(0)

pytestmark = slow_on_jax
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
async function ask(engine, calls) {
  let model, run;
  const answers = [];
  for (const [name, ...args] of read(calls)) {
    try {
      if (name === "createModel") {
        model = engine.createModel(engine.readSafetensors(args[0].buffer), args[1]);
        const { classes, imageSize, crop, mean, std } = model;
        answers.push({ classes, imageSize, crop, mean, std });
      } else if (name === "run") {
        answers.push(run = await model.run(...args));
      } else if (name === "classActivation") {
        answers.push(engine.classActivation(model, run.tensors, ...args));
      } else if (name === "explainWeight") {
        answers.push(engine.explainWeight(model, run.tensors, ...args));
      } else {
        answers.push(engine[name](...args));
      }
    } catch (error) {
      answers.push({ error: error.message });
    }
  }
  return JSON.stringify(write(answers));
}
"""


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
    script = f"import * as engine from {json.dumps(ENGINE.as_uri())};\n{ASK}\n" + (
        "let text = ''; for await (const part of process.stdin) text += part;\n"
        "console.log(await ask(engine, JSON.parse(text)));"
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


def ask_chromium(*calls):
    """Return what Chromium answers to the same."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium to run engine.js in a page")
    address = "data:text/javascript;base64," + base64.b64encode(ENGINE.read_bytes()).decode()
    script = f"async (calls) => {{ const engine = await import('{address}'); {ASK}"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        with contextlib.closing(browser):
            answer = browser.new_page().evaluate(script + "return ask(engine, calls); }", encode(calls))
    return decode(json.loads(answer))


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
LAST = "other depths, padded windows, no head"


def filled(name):
    """Build one of the models."""
    config = {"num_classes": 5, "head_activation": None, **CONFIGS[name]}
    model = GCViT(**config)
    model.build((None, 64, 64, 3))
    rng = np.random.default_rng(1)
    for variable in model.weights:
        values = rng.normal(size=variable.shape)
        if variable.ndim > 1 and "table" not in variable.path:
            values *= 1.5 / np.sqrt(np.prod(variable.shape[:-1]))
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
                    f"{at}.attn.weights": attn.weights_of(q, k),
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
@pytest.mark.numerics
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_that_of_keras(name, tmp_path):
    model, config = model_of(name)
    images = [picture_of(image) for image in IMAGES]
    calls = [["createModel", file_of(model, config, tmp_path)]]
    calls += [["run", image.ravel(), *image.shape[:2]] for image in images]
    _, *answers = ask(*calls)
    for image, answer in zip(images, answers, strict=True):
        compare(answer, intermediates(model, image))


def test_chromium_computes_the_same(tmp_path):
    name = "windows that are not square"
    model, config = model_of(name)
    image = picture_of("not square")
    _, answer = ask_chromium(
        ["createModel", file_of(model, config, tmp_path)],
        ["run", image.ravel(), *image.shape[:2]],
    )
    compare(answer, intermediates(model, image))
