import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import run, to_numpy

from gcvit import Block, GCViT, window_partition, window_reverse
from gcvit.block import DropPath, drop_path

pytestmark = pytest.mark.numerics
RNG = np.random.default_rng(3)


def test_window_partition_by_slices():
    x = RNG.normal(size=(2, 6, 8, 3)).astype("float32")
    expected = [x[n, i : i + 3, j : j + 4] for n in (0, 1) for i in (0, 3) for j in (0, 4)]
    np.testing.assert_array_equal(to_numpy(window_partition(x, (3, 4))), expected)


def test_window_reverse_undoes_it():
    x = RNG.normal(size=(2, 6, 8, 3)).astype("float32")
    np.testing.assert_array_equal(to_numpy(window_reverse(window_partition(x, 2), 2, 6, 8, 3)), x)


def test_partition_of_a_map_that_does_not_fit():
    with pytest.raises(ValueError, match="width 8 is not a multiple of 3"):
        window_partition(np.zeros((1, 6, 8, 3)), 3)


def built(shape=(2, 8, 8, 8), **kwargs):
    block = Block(4, 2, **{"global_query": False, **kwargs})
    x = RNG.normal(size=shape).astype("float32")
    query = (RNG.normal(size=(shape[0], 4, 4, 8)).astype("float32"),)
    query = query if block.global_query else ()
    block(x, *query)
    return block, x, query


@pytest.mark.parametrize("global_query", [False, True])
def test_block_is_its_two_equations(global_query):
    block, x, query = built(global_query=global_query)
    windows = window_partition(block.norm1(x), 4)
    attended = block.attn(keras.ops.reshape(windows, (-1, 16, 8)), *query)
    y = keras.ops.add(x, window_reverse(attended, 4, 8, 8, 8))
    y = y + block.mlp(block.norm2(y))
    np.testing.assert_allclose(to_numpy(block(x, *query)), to_numpy(y), atol=1e-6)


def test_padding_is_right_and_below_and_cropped():
    block, x, _ = built(shape=(1, 6, 7, 8))
    normed = np.pad(to_numpy(block.norm1(x)), ((0, 0), (0, 2), (0, 1), (0, 0)))
    attended = block.attn(keras.ops.reshape(window_partition(normed, 4), (-1, 16, 8)))
    y = x + to_numpy(window_reverse(attended, 4, 8, 8, 8))[:, :6, :7]
    y = y + to_numpy(block.mlp(block.norm2(y)))
    np.testing.assert_allclose(to_numpy(block(x)), y, atol=1e-6)


def test_layer_scale_multiplies_the_branches():
    block, x, _ = built(layer_scale=1e-5)
    np.testing.assert_allclose(to_numpy(block(x)), x, atol=1e-3)
    assert tuple(block.gamma1.shape) == (8,)
    for gamma in (block.gamma1, block.gamma2):
        gamma.assign(np.zeros(8))
    np.testing.assert_array_equal(to_numpy(block(x)), x)


def test_paths_are_dropped_sample_by_sample_in_training_only():
    keras.utils.set_random_seed(0)
    layer = drop_path(0.5)
    x = np.ones((64, 2, 2, 3), "float32")
    np.testing.assert_array_equal(to_numpy(layer(x, training=False)), x)
    y = to_numpy(layer(x, training=True)).reshape(64, -1)
    assert (y == y[:, :1]).all()  # a sample is dropped whole or not at all
    assert set(np.unique(y)) == {0.0, 2.0}  # what stays is scaled up
    assert 16 < (y[:, 0] == 0).sum() < 48


def test_keras_cv_still_works():
    """When this fails: see "The day keras-cv stops working" in CONTRIBUTING.md."""
    from keras_cv.layers import DropPath as theirs

    assert type(drop_path(0.5)) is theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stands_in_for_keras_cv_computes_the_same(dtype):
    from keras_cv.layers import DropPath as theirs

    x = RNG.normal(size=(16, 2, 3, 4)).astype("float32")
    both = [made(0.4, seed=7, dtype=dtype) for made in (theirs, DropPath)]
    for training in (True, True, False):
        expected, found = (to_numpy(layer(x, training=training)) for layer in both)
        np.testing.assert_array_equal(found, expected)
    assert both[1].get_config() == {**both[0].get_config(), "name": both[1].name}
    assert keras.saving.get_registered_name(DropPath) == keras.saving.get_registered_name(theirs)


DAY_WITHOUT_KERAS_CV = """
import sys
sys.modules["keras_cv"] = None  # importing it raises
import keras, numpy as np
from gcvit.block import DropPath
from conftest import run
from test_block import tiny_model
here = sys.argv[1]
there = keras.saving.load_model(f"{here}/with.keras")
block = there.levels[0].blocks[1]
assert type(block.drop_path1) is DropPath and block.path_drop == 0.5
x = np.load(f"{here}/x.npy")
y = keras.ops.convert_to_numpy(block.drop_path1(np.ones((64, 2, 2, 3)), training=True))
dropped = (y.reshape(64, -1) == 0).sum(axis=1)
assert set(dropped) == {0, 12}, dropped
model = tiny_model(seed=1)
model.save(f"{here}/without.keras")
outputs = [run(there, x), run(model, x)]
np.savez(f"{here}/outputs.npz", *outputs)
"""


def tiny_model(seed):
    keras.utils.set_random_seed(seed)
    sizes = {"window_size": (4,), "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    model = GCViT(**sizes, num_classes=3, path_drop=0.5)
    model.build((None, 32, 32, 3))
    return model


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="one backend is enough to show what an import does; the numbers are tested on each",
)
def test_the_day_keras_cv_cannot_be_imported(tmp_path):
    """In a process without it models are built and trained, and files go both ways."""
    x = RNG.normal(size=(2, 32, 32, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    model = tiny_model(seed=0)
    model.save(tmp_path / "with.keras")
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", DAY_WITHOUT_KERAS_CV, tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, other = np.load(tmp_path / "outputs.npz").values()
    np.testing.assert_allclose(loaded, run(model, x), rtol=1e-6)
    back = keras.saving.load_model(tmp_path / "without.keras")
    assert not isinstance(back.levels[0].blocks[1].drop_path1, DropPath)
    np.testing.assert_allclose(run(back, x), other, rtol=1e-6)
    assert np.abs(loaded - other).max() > 1e-4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Block(7, 3, False).build((None, 14, 14, 64)), "64 channels and 3 heads"),
        (lambda: Block(7, 2, False).build((None, 196, 64)), "rank 4; got shape"),
        (lambda: Block(7, 2, False, path_drop=-0.1), r"path_drop must be in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
