import numpy as np
import pytest
from conftest import to_numpy

from gcvit import FeatureExtraction, GlobalQueryGenerator
from gcvit.global_tokens import bicubic_matrix, resize_bicubic

pytestmark = pytest.mark.numerics
RNG = np.random.default_rng(1)


def test_pooling_pads_with_minus_infinity():
    """Where all values are negative, a border of zeros would win; it must not be there."""
    layer = FeatureExtraction()
    x = -1 - RNG.random(size=(1, 6, 6, 4)).astype("float32")
    layer(x)
    for weight in layer.weights:
        weight.assign(np.zeros(weight.shape))  # the residual branch adds nothing
    y = to_numpy(layer(x))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = [[padded[0, i : i + 3, j : j + 3].max((0, 1)) for j in (0, 2, 4)] for i in (0, 2, 4)]
    np.testing.assert_allclose(y[0], expected, atol=1e-6)
    assert y.max() < 0


@pytest.mark.parametrize("size, steps, window", [(56, 3, 7), (28, 2, 7), (30, 2, 8), (1, 1, 1)])
def test_generator_halves_once_a_step(size, steps, window):
    layer = GlobalQueryGenerator((False,) * steps)
    y = layer(np.zeros((2, size, size, 4), "float32"))
    assert tuple(y.shape) == (2, window, window, 4)
    assert tuple(y.shape) == layer.compute_output_shape((2, size, size, 4))


def test_keepdims_keeps_the_map():
    assert tuple(GlobalQueryGenerator((True,))(np.zeros((1, 7, 7, 4))).shape) == (1, 7, 7, 4)


@pytest.mark.parametrize("keepdims", [(), False, None])
def test_generator_without_steps_is_refused(keepdims):
    with pytest.raises(ValueError, match="keepdims must be a tuple of flags"):
        GlobalQueryGenerator(keepdims)


def test_bicubic_matrix_of_one_size_is_the_identity():
    np.testing.assert_array_equal(to_numpy(bicubic_matrix(7, 7)), np.eye(7))


def test_bicubic_matrix_reproduces_lines_and_sums_to_one():
    matrix = to_numpy(bicubic_matrix(12, 7))
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    centers = (np.arange(7) + 0.5) * 12 / 7 - 0.5
    np.testing.assert_allclose(matrix @ np.arange(12.0), centers, atol=0.15)


def test_resize_bicubic_matches_pytorch():
    torch = pytest.importorskip("torch")
    x = RNG.normal(size=(2, 9, 13, 3)).astype("float32")
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), size=(7, 6), mode="bicubic"
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(to_numpy(resize_bicubic(x, (7, 6))), expected, atol=1e-5)


def test_resize_bicubic_by_known_numbers():
    """Halving 4 samples: PyTorch's weights at a half-way point, a = -0.75."""
    matrix = to_numpy(bicubic_matrix(4, 2))
    np.testing.assert_allclose(
        matrix, [[0.5, 0.59375, -0.09375, 0], [0, -0.09375, 0.59375, 0.5]], atol=1e-6
    )
