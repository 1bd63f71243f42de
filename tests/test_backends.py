"""The backends give the same: a model saved on one is loaded on another, in a fresh process.

Everything starts on TensorFlow; the other backends run in processes of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from gcvit import GCViT

OTHERS = ("jax", "torch")
WEIGHTS = ("patch_embed/proj/kernel", "blocks_1/attn/relative_position_bias_table", "head/kernel")


def watched(model):
    """Return three weights by name: of the stem, of a global layer, of the head."""
    variables = model.trainable_variables
    return {name: next(v for v in variables if v.path.endswith(name)) for name in WEIGHTS}


def logits_and_gradients(model, images, weights_of_logits):
    """Return the logits, and d(their weighted sum) by the images and by the watched weights."""
    variables = list(watched(model).values())
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.Variable(images)
        with tf.GradientTape() as tape:
            logits = model(x, training=False)
            total = tf.reduce_sum(logits * weights_of_logits)
        found = tape.gradient(total, [x, *(v.value for v in variables)])
        return [tf.convert_to_tensor(value).numpy() for value in (logits, *found)]
    if keras.backend.backend() == "torch":
        import torch

        x = torch.tensor(images, requires_grad=True)
        logits = model(x, training=False)
        total = (logits * torch.tensor(weights_of_logits)).sum()
        found = torch.autograd.grad(total, [x, *(v.value for v in variables)])
        return [value.detach().numpy() for value in (logits, *found)]
    import jax

    places = [[id(v) for v in model.trainable_variables].index(id(v)) for v in variables]
    values = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]

    def total(x, few):
        every = list(values)
        for place, value in zip(places, few, strict=True):
            every[place] = value
        logits, _ = model.stateless_call(every, state, x, training=False)
        return (logits * weights_of_logits).sum(), logits

    both = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, logits), (by_x, by_few) = both(images, [values[place] for place in places])
    return [np.asarray(value) for value in (logits, by_x, *by_few)]


def report(model, given):
    """Return what the backends are compared by: logits and gradients, as a dict of arrays."""
    found = logits_and_gradients(model, given["images"], given["weights_of_logits"])
    return dict(zip(("logits", "images", *WEIGHTS), found, strict=True))


def load_and_report(folder):
    """Run in a fresh process: load the archive, write what this backend makes of it."""
    model = keras.saving.load_model(folder / "model.keras", safe_mode=True)
    backend = keras.backend.backend()
    np.savez(folder / f"{backend}.npz", **report(model, np.load(folder / "given.npz")))
    model.save(folder / f"{backend}.keras")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a saved model, and with what TensorFlow makes of it in this process.

    Two levels of the model are enough: they hold every kind of layer, a window that has to
    be padded and a query that has to be resized.
    """
    folder = tmp_path_factory.mktemp("backends")
    model = GCViT((7, 7), 16, (2, 2), (2, 4), num_classes=10, head_activation=None)
    model.build((None, 40, 48, 3))
    draw = np.random.default_rng(0)
    for variable in model.weights:  # zeros and ones would not show a mix-up
        variable.assign(draw.normal(size=variable.shape) * 0.3)
    model.save(folder / "model.keras")
    given = {
        "images": draw.normal(size=(2, 40, 48, 3)).astype("float32"),
        "weights_of_logits": draw.normal(size=(2, 10)).astype("float32"),
    }
    np.savez(folder / "given.npz", **given)
    np.savez(folder / "here.npz", **report(model, given))
    return folder


def in_a_fresh_process(backend, folder):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(here)!r}); from pathlib import Path; "
        f"import test_backends; test_backends.load_and_report(Path({str(folder)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / f"{backend}.npz")


@pytest.mark.parametrize("backend", OTHERS)
def test_saved_here_loaded_there(backend, folder):
    """Logits to the fixtures' tolerance, gradients to 1e-4 of their length, and back again."""
    there, here = in_a_fresh_process(backend, folder), np.load(folder / "here.npz")
    np.testing.assert_allclose(there["logits"], here["logits"], atol=2e-5)
    for name in ("images", *WEIGHTS):
        difference = np.linalg.norm(there[name] - here[name]) / np.linalg.norm(here[name])
        assert np.linalg.norm(here[name]) > 0 and difference < 1e-4, (name, difference)
    back = keras.saving.load_model(folder / f"{backend}.keras", safe_mode=True)
    images = np.load(folder / "given.npz")["images"]
    np.testing.assert_allclose(back(images), here["logits"], atol=2e-5)
