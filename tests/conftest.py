"""What several test files share: the fixtures' model and the numbers it must give."""

import contextlib
import http.server
import json
import os
import threading
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from gcvit import GCViT, fine_tuning, load_checkpoint
from gcvit.fine_tuning import Photographs
from gcvit.weights import save_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
LOUD, NEAR = ("error", "warning", "assert"), ("file:", "data:", "blob:")
SMALL = {
    "window_size": (7, 7, 14, 7),
    "embed_dim": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratio": 3.0,
    "num_classes": 10,
}


@contextlib.contextmanager
def serving(handler):
    """Run a local HTTP server while a block lasts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


def run(model, x):
    """Return a model's output in evaluation, compiled on JAX: op by op takes minutes there."""
    if keras.backend.backend() == "jax":
        return np.asarray(model.predict_on_batch(x))
    return to_numpy(model(x))


def run_features(model, images):
    """Return `model.features(images)` as arrays."""
    if keras.backend.backend() == "jax":
        given = keras.Input(images.shape[1:])
        return keras.Model(given, model.features(given)).predict_on_batch(images)
    return {name: to_numpy(value) for name, value in model.features(images).items()}


slow_on_jax = pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="compiles for long on JAX; TensorFlow and PyTorch run it",
)


once = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="does not depend on the backend; TensorFlow runs it",
)


@pytest.fixture(autouse=True)
def without_xla(monkeypatch):
    """Spare each prediction of one or two images XLA: it takes ten seconds over a whole model.

    test_fast lets it compile a smaller one.
    """
    if keras.backend.backend() == "tensorflow":
        monkeypatch.setattr("gcvit.fast.tensorflow.SMALL_BATCH", 0)


def small_model(**overrides):
    """Build the model that the fixtures were made with, at 224 px, with random weights."""
    model = GCViT(**{**SMALL, "head_activation": None, **overrides})
    model.build((None, 224, 224, 3))
    return model


def state_of(npz):
    return {name[6:]: npz[name] for name in npz.files if name.startswith("state/")}


def write_safetensors(path, state):
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path)


def weights_of(model):
    return [to_numpy(variable) for variable in model.weights]


def same_weights(model, before):
    return all(
        np.array_equal(to_numpy(now), then) for now, then in zip(model.weights, before, strict=True)
    )


# Of a module: while Playwright runs, nothing else in the process can use asyncio.
@pytest.fixture(scope="module")
def browser():
    # Here, since processes that tests start import this file without tools/ on their path.
    import chromium
    from playwright.sync_api import sync_playwright

    if chromium.executable() is None:
        pytest.skip(f"needs Chromium: none of {', '.join(chromium.NAMES)} is installed")
    with sync_playwright() as playwright, contextlib.closing(chromium.launch(playwright)) as found:
        yield found


@pytest.fixture
def open_page(browser):
    """Return what opens a file, at a width and a height, in a page of its own.

    In the end no page may have logged an error or a warning, or asked for anything elsewhere.
    """
    contexts, faults = [], []

    def opened(path, width=1280, height=900, **options):
        viewport = {"width": width, "height": height}
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda m: m.type in LOUD and faults.append(m.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: r.url.startswith(NEAR) or faults.append(r.url))
        page.goto(Path(path).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="session")
def timm_small():
    return np.load(FIXTURES / "timm_small.npz")


@pytest.fixture(scope="session")
def timm_file(timm_small, tmp_path_factory):
    """The fixture's state dict as the .safetensors file that timm publishes."""
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    write_safetensors(path, state_of(timm_small))
    return path


@pytest.fixture(scope="session")
def small_images(timm_small):
    return timm_small["input"].astype("float32")


@pytest.fixture(scope="session")
def built_once():
    """The fixtures' model, which takes a second to build, and the weights that it began with."""
    model = small_model()
    return model, model.get_weights()


@pytest.fixture
def fresh_model(built_once):
    """The same, for tests that load something into it."""
    model, start = built_once
    model.set_weights(start)
    return model


@pytest.fixture(scope="session")
def official_file(built_once, timm_file, tmp_path_factory):
    """The same weights under the official repository's names."""
    model, _ = built_once
    load_checkpoint(model, timm_file)
    path = tmp_path_factory.mktemp("official") / "official.safetensors"
    save_safetensors(model, path)
    return path


@pytest.fixture(scope="session")
def nano():
    """The model that ships."""
    return GCViT.from_preset("gcvit_nano")


@pytest.fixture(scope="session")
def xxtiny_layout():
    return json.loads((FIXTURES / "release_layout_xxtiny.json").read_text())


def picture(value=0, size=(40, 30)):
    rng = np.random.default_rng(value)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype="uint8"))


def tiny_model(classes=2, **overrides):
    """Build a model of one level, for images of 32 px."""
    config = {"window_size": (8,), "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    model = GCViT(**{**config, "num_classes": classes, "path_drop": 0.0, **overrides})
    model.build((None, 32, 32, model.in_channels))
    return model


class Eager(keras.Sequential):
    """A model that trains op by op: to trace a step takes longer than a few steps do."""

    def compile(self, *args, **kwargs):
        super().compile(*args, run_eagerly=True, **kwargs)


def plain_model(drop_rate=0.0):
    """Build a model without levels: what the callbacks do, they do to any, and faster."""
    layers = [keras.layers.AveragePooling2D(8), keras.layers.Flatten()]
    layers.append(keras.layers.Dropout(drop_rate))
    model = Eager([keras.Input((32, 32, 3)), *layers])
    model.add(keras.layers.Dense(2, activation="softmax"))
    model.levels = []
    return model


def dark_and_bright():
    """Return sixteen photographs, dark ones and bright ones."""
    rng = np.random.default_rng(0)
    labels = np.arange(16) % 2
    images = rng.integers(0, 128, (16, 32, 32, 3)) + 100 * labels[:, None, None, None]
    photos = tf.data.Dataset.from_tensor_slices((images.astype("uint8"), labels))
    of_labels = tf.data.Dataset.from_tensor_slices(labels)
    return Photographs(photos, photos, of_labels, ["dark", "bright"], 16, 16, "")


@pytest.fixture(scope="module")
def two_classes():
    """Dark and bright photographs, and the batches that they make."""
    photos = dark_and_bright()
    batches = fine_tuning.make_dataset(photos.validation, 32, 8)
    return photos, fine_tuning.one_hot(batches, 2)
