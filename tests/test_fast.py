"""The faster ways give what Keras's own layers give: outputs, and gradients by all they take."""

import contextlib
from unittest import mock

import keras
import numpy as np
import pytest
from conftest import to_numpy
from keras import layers

from gcvit import MLP, GCViT, PatchEmbed, WindowAttention, fast
from gcvit.unit_blocks import run

pytestmark = pytest.mark.numerics
RNG = np.random.default_rng(3)
PAIRS = {
    "depthwise": (fast.DepthwiseConv2D, layers.DepthwiseConv2D, (3,), {"use_bias": False}),
    "1x1": (fast.Conv2D, layers.Conv2D, (5, 1), {"use_bias": False}),
    "3x3, stride 2": (fast.Conv2D, layers.Conv2D, (5, 3), {"strides": 2}),
    "dense": (fast.Dense, layers.Dense, (5,), {"activation": "tanh"}),
    "dense, no bias": (fast.Dense, layers.Dense, (5,), {"use_bias": False}),
    "pooling": (fast.MaxPooling2D, layers.MaxPooling2D, (3,), {"strides": 2}),
    "layer normalization": (fast.LayerNormalization, layers.LayerNormalization, (), {}),
    "gelu": (fast.Activation, layers.Activation, ("gelu",), {}),
}


def output_and_gradients(layer, x, upstream, static=True):
    """Return the output, and the gradients of its product with `upstream` by input and weights.

    As in training, compiled where the backend compiles; on TensorFlow for inputs of one shape, or
    (`static=False`) for batches of any size.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        def in_training(given):
            weights = [v.value for v in layer.weights]
            with tf.GradientTape() as tape:
                tape.watch(given)
                y = layer(given, training=True)
                total = tf.reduce_sum(y * upstream)
            return [y, *tape.gradient(total, [given, *weights])]

        shape = x.shape if static else (None, *x.shape[1:])
        signature = [tf.TensorSpec(shape)]
        return tf.function(in_training, input_signature=signature, autograph=False)(x)
    if backend == "torch":
        import torch

        given = torch.tensor(x, requires_grad=True)
        y = layer(given)
        total = (y * torch.tensor(upstream)).sum()
        return [y, *torch.autograd.grad(total, [given, *(v.value for v in layer.weights)])]
    import jax

    def total(x, weights):
        y, _ = layer.stateless_call(weights, [], x)
        return (y * upstream).sum(), y

    weights = [v.value for v in layer.weights]
    (_, y), found = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, weights)
    return [y, found[0], *found[1]]


def assert_same(found, wanted):
    """Hold outputs and gradients to those wanted, none of which may be all zeros."""
    for a, b in zip(found, wanted, strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-5)


@pytest.mark.parametrize(("size", "static"), [((9, 12), True), ((3, 4), False)])
@pytest.mark.parametrize("name", PAIRS)
def test_the_fast_way_gives_the_same(name, size, static):
    faster, plain, given, options = PAIRS[name]
    x = RNG.normal(size=(2, *size, 6)).astype("float32")
    pair = [kind(*given, **options) for kind in (faster, plain)]
    for layer in pair:
        layer.build(x.shape)
    for ours, keras_own in zip(pair[0].weights, pair[1].weights, strict=True):
        values = RNG.normal(size=ours.shape)
        ours.assign(values)
        keras_own.assign(values)
    upstream = RNG.normal(size=pair[1].compute_output_shape(x.shape)).astype("float32")
    found, wanted = (
        [to_numpy(value) for value in output_and_gradients(layer, x, upstream, static)]
        for layer in pair
    )
    assert_same(found, wanted)


class Bordered(layers.Layer):
    """A map with a border around it, and a layer behind."""

    def __init__(self, layer, border):
        super().__init__()
        self.layer, self.border = layer, border

    def build(self, shape):
        batch, height, width, channels = shape
        self.layer.build((batch, height + 2, width + 2, channels))

    def call(self, x):
        sides = ((0, 0), (1, 1), (1, 1), (0, 0))
        return self.layer(keras.ops.pad(x, sides, constant_values=self.border))


@pytest.mark.parametrize(
    ("name", "border"), [("depthwise", 0), ("3x3, stride 2", 0), ("pooling", -np.inf)]
)
def test_a_layers_own_border_is_that_of_a_padded_map(name, border):
    faster, plain, given, options = PAIRS[name]
    x = RNG.normal(size=(2, 7, 8, 6)).astype("float32")
    pair = faster(*given, pad=1, **options), Bordered(plain(*given, **options), border)
    for layer in pair:
        layer.build(x.shape)
    pair[1].set_weights(pair[0].get_weights())
    upstream = RNG.normal(size=pair[0].compute_output_shape(x.shape)).astype("float32")
    ours, keras_own = (
        [to_numpy(value) for value in output_and_gradients(layer, x, upstream)] for layer in pair
    )
    assert_same(ours, keras_own)


@pytest.mark.parametrize("global_query", [False, True])
def test_attention_mixes_what_its_weights_say(global_query):
    """On PyTorch in one operation, where no gradients are wanted, as in `predict`."""
    attention = WindowAttention((3, 4), 2, global_query)
    x = RNG.normal(size=(6, 12, 8)).astype("float32")  # two images of three windows
    given = [x, RNG.normal(size=(2, 3, 4, 8)).astype("float32")][: 1 + global_query]
    attention(*given)
    for weight in attention.weights:
        weight.assign(RNG.normal(size=weight.shape))
    weights = mock.Mock(wraps=fast.attention_weights)
    with without_gradients(), mock.patch.object(fast, "attention_weights", weights):
        mixed = to_numpy(attention(*given))
    assert weights.called != on_the_cpu("torch")
    np.testing.assert_allclose(mixed, to_numpy(attention(*given)), atol=1e-5)


def test_attention_leaves_dropout_in():
    attention = WindowAttention((2, 2), 1, global_query=False, attention_dropout=0.9)
    x = RNG.normal(size=(50, 4, 8)).astype("float32")
    with without_gradients():
        usual, dropped = (to_numpy(attention(x, training=flag)) for flag in (False, True))
    assert np.abs(usual - dropped).max() > 0


def on_the_cpu(backend):
    """Tell whether this is the backend, and its kernels are in use."""
    return keras.backend.backend() == backend and fast.kernels() is not None


def without_gradients():
    """Return what turns gradients off on PyTorch; the other backends take none unless asked."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


class StemByParts(layers.Layer):
    """A stem that takes its images through `map_images`, as the model does."""

    def __init__(self):
        super().__init__()
        self.stem = PatchEmbed(8)

    def build(self, shape):
        self.stem.build(shape)

    def call(self, x):
        return fast.map_images(self.stem, x)


def test_images_in_parts_give_what_they_give_together(monkeypatch):
    if fast.kernels() is not None:
        monkeypatch.setattr(fast.kernels(), "PIXELS_FOR_PARTS", 0)
    # The other backends know the sizes of what they are given.
    sizes_known = (True, False) if keras.backend.backend() == "tensorflow" else (True,)
    x = RNG.normal(size=(6, 8, 12, 3)).astype("float32")
    by_parts = StemByParts()
    by_parts.build(x.shape)
    upstream = RNG.normal(size=(6, 2, 3, 8)).astype("float32")
    both = []
    for layer in (by_parts, by_parts.stem):
        with without_gradients():
            values = [layer(x)]
        for static in sizes_known:
            values += output_and_gradients(layer, x, upstream, static)
        both.append([to_numpy(value) for value in values])
    assert_same(*both)


@pytest.mark.parametrize(("images", "side"), [(6, 192), (1, 192), (6, 64)])
def test_large_images_are_taken_in_parts_on_the_cpu(images, side):
    """A loop in what JAX and TensorFlow trace; four images at a time on PyTorch."""
    backend = keras.backend.backend()
    stem = StemByParts()
    x = np.zeros((images, side, side, 3), "float32")
    stem.build(x.shape)
    parts = images > 1 and side > 64 and on_the_cpu(backend)
    if backend == "tensorflow":
        import tensorflow as tf

        graph = tf.function(stem).get_concrete_function(tf.TensorSpec(x.shape)).graph
        assert parts == any("While" in operation.type for operation in graph.get_operations())
    elif backend == "jax":
        import jax

        weights = [v.value for v in stem.weights]
        text = str(jax.make_jaxpr(lambda x: stem.stateless_call(weights, [], x)[0])(x))
        assert parts == ("scan" in text)
    else:
        sizes = []
        stem.stem.proj.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        with without_gradients():
            stem(x)
        stem(x)
        assert sizes == ([4, 2, 6] if parts else [images] * 2)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="a gradient of JAX's kernels")
def test_a_bias_added_to_each_map_gets_the_sum_of_their_gradients():
    import jax

    from gcvit.fast.jax import bias_add

    x, upstream = RNG.normal(size=(2, 2, 3, 2, 4, 4)).astype("float32")
    bias = np.arange(32, dtype="float32").reshape(2, 4, 4)
    y, gradients = jax.vjp(bias_add, x, bias)
    by_x, by_bias = gradients(upstream)
    np.testing.assert_allclose(y, x + bias, atol=1e-6)
    np.testing.assert_array_equal(by_x, upstream)
    np.testing.assert_allclose(by_bias, upstream.sum((0, 1)), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_keras_gelu(dtype):
    x = keras.ops.convert_to_tensor(np.linspace(-4, 4, 33), dtype)
    ours, keras_own = (
        kind("gelu", dtype=dtype)(x) for kind in (fast.Activation, layers.Activation)
    )
    ours, keras_own = (to_numpy(keras.ops.cast(y, "float32")) for y in (ours, keras_own))
    np.testing.assert_array_equal(ours, keras_own)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's optimizer")
@pytest.mark.parametrize("batch", [2, None])
def test_tensorflow_finds_the_layer_norm_and_the_gelu_of_a_product(batch, tmp_path):
    import tensorflow as tf
    from jax.profiler import ProfileData

    sublayers = [fast.LayerNormalization(), MLP(hidden_features=32)]
    for layer in sublayers:
        layer.build((batch, 7, 7, 16))

    @tf.function(autograph=False, input_signature=[tf.TensorSpec((batch, 7, 7, 16))])
    def forward(x):
        return run(sublayers, x)

    x = tf.constant(RNG.normal(size=(2, 7, 7, 16)), "float32")
    forward(x)
    with tf.profiler.experimental.Profile(str(tmp_path)):
        forward(x)
    (path,) = tmp_path.glob("**/*.xplane.pb")
    events = (
        e for p in ProfileData.from_file(str(path)).planes for line in p.lines for e in line.events
    )
    operations = {event.name.rpartition(":")[2] for event in events}
    if not any(name.startswith("_Mkl") for name in operations):
        pytest.skip("TensorFlow runs without oneDNN here")
    assert "_MklLayerNorm" in operations
    assert not operations & {"Erf", "BiasAdd", "Mean"}


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="shows which way is taken on JAX")
def test_on_the_cpu_xla_is_given_no_depthwise_convolution():
    import jax

    layer = fast.DepthwiseConv2D(3, use_bias=False)
    layer.build((1, 8, 8, 4))
    weights = [v.value for v in layer.weights]
    step = jax.grad(lambda w, x: layer.stateless_call(w, [], x)[0].sum())
    text = str(jax.make_jaxpr(step)(weights, np.zeros((1, 8, 8, 4), "float32")))
    assert on_the_cpu("jax") == ("conv_general_dilated" not in text)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's graphs")
@pytest.mark.parametrize(
    ("known", "training", "dtype", "compiles"),
    [
        (1, False, "float32", True),
        (2, False, "float32", True),
        (3, False, "float32", False),
        (None, False, "float32", False),
        (1, True, "float32", False),
        (1, False, "mixed_bfloat16", False),
    ],
)
def test_xla_compiles_the_forward_pass_of_a_few_images(
    monkeypatch, known, training, dtype, compiles
):
    import tensorflow as tf

    monkeypatch.undo()  # the other tests do without
    model = GCViT((2,), 4, (2,), (1,), num_classes=3, mlp_ratio=1.0, path_drop=0, dtype=dtype)
    images = RNG.normal(size=(known or 2, 32, 40, 3)).astype("float32")
    eagerly = to_numpy(model(images, training=training))
    signature = [tf.TensorSpec((known, *images.shape[1:]))]
    graph = tf.function(lambda x: model(x, training=training), input_signature=signature)
    outside = graph.get_concrete_function().graph
    compiles = compiles and on_the_cpu("tensorflow")
    assert compiles == all(operation.type != "Conv2D" for operation in outside.get_operations())
    assert not compiles or "_XlaMustCompile" in str(outside.as_graph_def())
    atol = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(to_numpy(graph(images)), eagerly, atol=atol)
