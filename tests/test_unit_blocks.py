import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import run, tiny_model, to_numpy
from keras import ops

from gcvit import MLP, GCViT, ReduceSize, SqueezeAndExcitation
from gcvit.unit_blocks import reinit_glorot

pytestmark = pytest.mark.numerics
RNG = np.random.default_rng(0)


def exact_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_squeeze_and_excitation_by_hand():
    x = RNG.normal(size=(2, 5, 6, 8)).astype("float32")
    layer = SqueezeAndExcitation()
    y = to_numpy(layer(x))
    first, second = (to_numpy(w) for w in layer.weights)
    hidden = exact_gelu(x.mean(axis=(1, 2)) @ first)
    gates = 1 / (1 + np.exp(-(hidden @ second)))
    np.testing.assert_allclose(y, x * gates[:, None, None], atol=1e-6)
    assert first.shape == (8, 2)


def test_squeeze_and_excitation_gates_lie_between_0_and_1():
    layer = SqueezeAndExcitation()
    gates = to_numpy(layer.gates(_built(layer, (2, 3, 3, 8))))
    assert gates.shape == (2, 1, 1, 8)
    assert (gates > 0).all() and (gates < 1).all()


def _built(layer, shape):
    x = RNG.normal(size=shape).astype("float32")
    layer(x)
    return x


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2)])
def test_reduce_size_halves_rounding_up(keepdims, size):
    layer = ReduceSize(keepdims=keepdims)
    y = layer(np.zeros((2, *size, 4), "float32"))
    channels = 4 if keepdims else 8
    assert tuple(y.shape) == (2, -(-size[0] // 2), -(-size[1] // 2), channels)
    assert tuple(y.shape) == layer.compute_output_shape((2, *size, 4))


def test_reduce_size_normalizes_last():
    y = to_numpy(ReduceSize()(RNG.normal(size=(2, 8, 8, 16)).astype("float32")))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-2)


def test_norms_have_pytorchs_epsilon():
    layer = ReduceSize()
    layer.build((None, 8, 8, 4))
    assert layer.norm1.epsilon == layer.norm2.epsilon == 1e-5


def test_mlp_by_hand():
    x = RNG.normal(size=(2, 3, 6)).astype("float32")
    layer = MLP(hidden_features=12)
    y = to_numpy(layer(x))
    w1, b1, w2, b2 = (to_numpy(w) for w in layer.weights)
    np.testing.assert_allclose(y, exact_gelu(x @ w1 + b1) @ w2 + b2, atol=1e-5)


def test_gelu_is_the_exact_one():
    layer = MLP()
    layer.build((None, 4))
    x = np.linspace(-3, 3, 50, dtype="float32")
    exact, tanh = (to_numpy(ops.gelu(x, approximate=a)) for a in (False, True))
    np.testing.assert_allclose(to_numpy(layer.act(x)), exact, atol=1e-6)
    assert np.abs(exact - tanh).max() > 1e-4


@pytest.mark.parametrize("layer", [SqueezeAndExcitation(), ReduceSize()])
def test_a_shape_that_is_no_map_is_refused(layer):
    with pytest.raises(ValueError, match=r"rank 4; got shape \(2, 49, 8\), rank 3"):
        layer.build((2, 49, 8))


def test_too_few_channels_for_a_hidden_unit():
    with pytest.raises(ValueError, match=r"2 channels times expansion 0.25 make 0"):
        SqueezeAndExcitation().build((None, 4, 4, 2))


def test_random_weights_start_as_in_the_official_code():
    """Each convolution as PyTorch's own of that shape; each dense layer with deviation 0.02."""
    torch = pytest.importorskip("torch")
    down = ReduceSize(keepdims=True)
    down.build((1, 8, 8, 64))
    depthwise, _, _, pointwise = down.conv
    for ours, official in (
        (depthwise, torch.nn.Conv2d(64, 64, 3, groups=64)),
        (pointwise, torch.nn.Conv2d(64, 64, 1)),
        (down.reduction, torch.nn.Conv2d(64, 64, 3)),
    ):
        found, wanted = to_numpy(ours.kernel), official.weight.detach().cpu().numpy()
        np.testing.assert_allclose(found.std(), wanted.std(), rtol=0.1)
        np.testing.assert_allclose(np.abs(found).max(), np.abs(wanted).max(), rtol=0.02)
    mlp = MLP(192)
    mlp.build((1, 4, 64))
    for layer in (mlp.fc1, mlp.fc2):
        kernel = to_numpy(layer.kernel)
        np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.02], atol=1e-3)
        assert not to_numpy(layer.bias).any()


def test_a_wide_start_is_that_of_keras_and_follows_from_the_seed():
    def started():
        keras.utils.set_random_seed(3)
        model = GCViT((2,), 8, (2,), (2,), num_classes=3)
        model.build((None, 32, 32, 3))
        narrow = to_numpy(model.levels[0].blocks[0].mlp.fc1.kernel)
        reinit_glorot(model)
        return narrow, to_numpy(model.levels[0].blocks[0].mlp.fc1.kernel)

    (narrow, wide), (_, again) = started(), started()
    limit = np.sqrt(6 / sum(wide.shape))
    assert 0.9 * limit < np.abs(wide).max() <= limit and narrow.std() < 0.1 * wide.std()
    np.testing.assert_array_equal(wide, again)


CHANNELS_FIRST = """
import sys
import keras
import numpy as np
from conftest import tiny_model
from test_unit_blocks import filled_output

assert keras.config.image_data_format() == "channels_first"
np.save(sys.argv[1], filled_output(tiny_model()))
"""


def filled_output(model):
    draw = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(0.3 * draw.normal(size=variable.shape))
    return run(model, draw.normal(size=(1, 32, 32, 3)).astype("float32"))


def test_channels_are_last_whatever_keras_json_says(tmp_path):
    """A user's settings are for the user's own layers."""
    settings = {"image_data_format": "channels_first", "backend": keras.backend.backend()}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    environment = {**os.environ, "KERAS_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # as pytest has set it
    out = str(tmp_path / "out.npy")
    script = [sys.executable, "-c", CHANNELS_FIRST, out]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(out), filled_output(tiny_model()), atol=1e-6)
