import keras
import numpy as np
import pytest
from conftest import to_numpy

from gcvit import Block, window_partition, window_reverse
from gcvit.block import drop_path

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


def test_config_round_trip():
    block = Block((3, 4), 2, True, layer_scale=0.1, path_drop=0.2)
    assert Block.from_config(block.get_config()).get_config() == block.get_config()
