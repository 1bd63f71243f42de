"""What the chapters look into a model with."""

import keras
import numpy as np
import pytest
from conftest import slow_on_jax, to_numpy

from gcvit import GCViT, explain

pytestmark = [pytest.mark.numerics, slow_on_jax]


def test_grad_cam_of_the_last_map_weighs_channels_with_the_head():
    keras.utils.set_random_seed(0)
    config = {"window_size": (4, 4), "depths": (2, 2), "num_heads": (1, 2)}
    model = GCViT(**config, embed_dim=8, num_classes=3)
    model.build((None, 64, 64, 3))
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    maps = to_numpy(model.features(images)["stage_1"])
    kernel = to_numpy(model.head.kernel)[:, [2, 0]].T
    by_hand = np.maximum((maps * kernel[:, None, None]).sum(-1), 0) / maps[0, ..., 0].size
    np.testing.assert_allclose(explain.grad_cam(model, images, [2, 0]), by_hand, atol=1e-6)
    earlier = explain.grad_cam(model, images, [2, 0], level=0)
    assert earlier.shape == (2, 16, 16) and earlier.min() >= 0 and earlier.max() > 0
