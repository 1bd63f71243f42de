import numpy as np
import pytest
from conftest import to_numpy

from gcvit import Level

pytestmark = pytest.mark.numerics
RNG = np.random.default_rng(4)


def built(size=(8, 8), depth=3, **kwargs):
    level = Level(depth, 2, 4, (False,), **kwargs)
    x = RNG.normal(size=(2, *size, 8)).astype("float32")
    level(x)
    return level, x


def test_level_by_hand():
    level, x = built()
    query = level.q_global_gen(x)
    y = level.blocks[2](level.blocks[1](level.blocks[0](x), query))
    np.testing.assert_allclose(to_numpy(level(x)), to_numpy(level.down(y)), atol=1e-6)


def test_blocks_take_turns():
    level, _ = built(depth=5)
    assert [block.global_query for block in level.blocks] == [False, True, False, True, False]


def test_the_last_level_keeps_size_and_makes_no_layer_that_it_does_not_use():
    level, x = built(downsample=False)
    assert level(x).shape == x.shape
    assert not hasattr(level, "down")


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 1), (12, 16)])
def test_any_size_of_map(size):
    level, x = built(size)
    shape = level.compute_output_shape(x.shape)
    assert tuple(level(x).shape) == tuple(shape) == (2, -(-size[0] // 2), -(-size[1] // 2), 16)
    assert tuple(level.q_global(x).shape) == (2, 4, 4, 8)


def test_one_rate_for_each_block():
    with pytest.raises(ValueError, match="each of the 3 blocks; got 2 rates"):
        Level(3, 2, 4, (False,), path_drop=[0.1, 0.2])
