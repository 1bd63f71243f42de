"""Every layer and the model keep what Keras asks of a layer, by the test that Keras has for it.

That makes a layer, sends its configuration and the serialized layer there and back, builds it,
calls it on symbols and on numbers, trains it for a step, and computes in half precision.
"""

import keras
import numpy as np
import pytest
from conftest import run, slow_on_jax, to_numpy
from keras.src.testing import TestCase

import gcvit
from gcvit import fast

pytestmark = [pytest.mark.numerics, slow_on_jax]

MAP, WINDOWS, QUERY = (2, 8, 8, 8), (8, 16, 8), (2, 4, 4, 8)
ONE_LEVEL = {"window_size": (4,), "embed_dim": 8, "depths": (2,), "num_heads": (2,)}

# Class, arguments, shape of what it takes, shape of what it gives.
CASES = {
    "SqueezeAndExcitation": (gcvit.SqueezeAndExcitation, {}, MAP, MAP),
    "ReduceSize": (gcvit.ReduceSize, {}, (2, 7, 8, 8), (2, 4, 4, 16)),
    "MLP": (gcvit.MLP, {"hidden_features": 16, "out_features": 4}, MAP, (2, 8, 8, 4)),
    "PatchEmbed": (gcvit.PatchEmbed, {"embed_dim": 8}, (2, 31, 32, 3), (2, 8, 8, 8)),
    "FeatureExtraction": (gcvit.FeatureExtraction, {}, (2, 7, 8, 8), (2, 4, 4, 8)),
    "GlobalQueryGenerator": (
        gcvit.GlobalQueryGenerator,
        {"keepdims": (False, True)},
        MAP,
        (2, 4, 4, 8),
    ),
    "WindowAttention": (
        gcvit.WindowAttention,
        {"window_size": 4, "num_heads": 2, "global_query": False, "qk_scale": 0.5},
        WINDOWS,
        WINDOWS,
    ),
    "WindowAttention, global": (
        gcvit.WindowAttention,
        {"window_size": (4, 4), "num_heads": 2, "global_query": True},
        {"x_shape": WINDOWS, "q_global_shape": QUERY},
        WINDOWS,
    ),
    "Block": (
        gcvit.Block,
        {"window_size": (4, 3), "num_heads": 2, "global_query": False, "path_drop": 0.2},
        MAP,
        MAP,
    ),
    "Block, global": (
        gcvit.Block,
        {"window_size": 4, "num_heads": 2, "global_query": True, "layer_scale": 0.1},
        {"x_shape": MAP, "q_global_shape": QUERY},
        MAP,
    ),
    "Level": (
        gcvit.Level,
        {"depth": 2, "num_heads": 2, "window_size": 4, "keepdims": (False,), "path_drop": [0, 0.1]},
        MAP,
        (2, 4, 4, 16),
    ),
    "GCViT": (gcvit.GCViT, {**ONE_LEVEL, "num_classes": 3}, (2, 32, 40, 3), (2, 3)),
    "fast.Conv2D": (
        fast.Conv2D,
        {"filters": 4, "kernel_size": 3, "strides": 2, "pad": 1},
        (2, 7, 8, 8),
        (2, 4, 4, 4),
    ),
    "fast.DepthwiseConv2D": (fast.DepthwiseConv2D, {"kernel_size": 3, "pad": 1}, MAP, MAP),
    "fast.MaxPooling2D": (
        fast.MaxPooling2D,
        {"pool_size": 3, "strides": 2, "pad": 1},
        (2, 7, 8, 8),
        (2, 4, 4, 8),
    ),
    "fast.Dense": (fast.Dense, {"units": 4, "activation": "tanh"}, MAP, (2, 8, 8, 4)),
    "fast.LayerNormalization": (fast.LayerNormalization, {"epsilon": 1e-5}, MAP, MAP),
    "fast.Activation": (fast.Activation, {"activation": "gelu"}, MAP, MAP),
}


@pytest.mark.parametrize("name", CASES)
def test_keras_own_test_of_a_layer(name):
    kind, arguments, shape, output_shape = CASES[name]
    # The name under which files that were saved know the class.
    assert keras.saving.get_registered_name(kind) == f"gcvit>{kind.__name__}"
    TestCase().run_layer_test(
        kind,
        arguments,
        input_shape=shape,
        expected_output_shape=output_shape,
        run_training_check=False,  # it takes layers of one input only: see below
        # The head computes in float32, for which Keras's test has no word.
        run_mixed_precision_check=name != "GCViT",
    )


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_trained_and_saved(name, tmp_path):
    keras.utils.set_random_seed(0)  # it decides which paths are dropped
    kind, arguments, shape, output_shape = CASES[name]
    shapes = shape if isinstance(shape, dict) else {"x_shape": shape}
    draw = np.random.default_rng(0)
    inputs = [keras.Input(batch_shape=one) for one in shapes.values()]
    model = keras.Model(inputs, kind(**arguments)(*inputs))
    values = [draw.normal(size=one).astype("float32") for one in shapes.values()]
    target = draw.normal(size=output_shape).astype("float32")
    # Adam moves what has a gradient, however small. Only on JAX is it faster to compile.
    eagerly = keras.backend.backend() != "jax"
    model.compile(keras.optimizers.Adam(1e-3, epsilon=1e-12), "mse", run_eagerly=eagerly)
    before = [to_numpy(weight) for weight in model.trainable_weights]
    if before:
        assert np.isfinite(model.train_on_batch(values, target))
    for weight, start in zip(model.trainable_weights, before, strict=True):
        assert np.abs(to_numpy(weight) - start).max() > 0, weight.path

    model.save(tmp_path / "layer.keras")
    twin = keras.saving.load_model(tmp_path / "layer.keras")
    outputs = [run(either, values) for either in (model, twin)]
    assert np.abs(outputs[0]).max() > 0
    np.testing.assert_array_equal(*outputs)
