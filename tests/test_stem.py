import numpy as np
import pytest
from conftest import to_numpy

from gcvit import PatchEmbed

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("size", [(224, 224), (96, 128), (33, 34)])
def test_sides_are_a_quarter_rounded_up(size):
    layer = PatchEmbed(8)
    y = layer(np.zeros((1, *size, 3), "float32"))
    halved = [-(-side // 2) for side in size]
    assert tuple(y.shape) == (1, *(-(-side // 2) for side in halved), 8)
    assert tuple(y.shape) == layer.compute_output_shape((1, *size, 3))


def test_neighboring_patches_overlap():
    """One pixel can reach two neighboring outputs of the first convolution."""
    layer = PatchEmbed(4)
    x = np.zeros((1, 32, 32, 3), "float32")
    layer(x)
    base = to_numpy(layer.proj(x))
    x[0, 7, 7] = 1
    changed = np.abs(to_numpy(layer.proj(x)) - base).sum((0, 3)) > 0
    assert np.argwhere(changed).tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]


def test_parameters_of_the_published_stem():
    layer = PatchEmbed(64)
    layer.build((None, 224, 224, 3))
    assert layer.count_params() == 45_632


def test_no_image_no_embedding():
    with pytest.raises(ValueError, match="rank 4; got shape"):
        PatchEmbed(8).build((224, 224, 3))
    with pytest.raises(ValueError, match="embed_dim must be a positive integer; got 0"):
        PatchEmbed(0)
