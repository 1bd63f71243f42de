import keras
import numpy as np
import pytest
from conftest import small_model

from gcvit import PRESETS, GCViT, GlobalQueryGenerator, WindowAttention, cost
from gcvit.pretrained import scaled_windows
from gcvit.stem import PatchEmbed
from gcvit.unit_blocks import MLP, ReduceSize

# Three of the published numbers are what a count without the products of attention gives;
# chapter 12 tells.
WITHOUT_PRODUCTS = ("gcvit_xtiny", "gcvit_tiny2", "gcvit_small2")


def matrix_flops(function, shape):
    """Return the operations of matrix products and convolutions that the backend counts.

    Neither TensorFlow's profiler nor PyTorch's counter knows of `gcvit.cost`: they look at
    the graph, or at the operations as they run. A multiply-add is two operations.
    """
    if keras.backend.backend() == "torch":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            function(np.zeros(shape, "float32"))
        return counter.get_total_flops()
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    traced = tf.function(function).get_concrete_function(tf.TensorSpec(shape))
    options = tf.compat.v1.profiler.ProfileOptionBuilder
    options = options(options.float_operation()).with_empty_output().build()
    profile = tf.compat.v1.profiler.profile(traced.graph, cmd="op", options=options)
    flops, queue = 0, [profile]
    while queue:
        node = queue.pop()
        queue += node.children
        if node.name in ("MatMul", "BatchMatMulV2", "Conv2D", "DepthwiseConv2dNative"):
            flops += node.float_ops
    return flops


not_on_jax = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="XLA counts all operations together"
)


def loops(tokens, channels, window_tokens, global_query):
    """Count attention's multiply-adds one by one."""
    done = 0
    for _ in range(tokens):
        for _matrix in range(2 if global_query else 3):  # query, key, value
            for _out in range(channels):
                for _into in range(channels):
                    done += 1
        for _key in range(window_tokens):
            done += channels  # a score
            done += channels  # its value, mixed in
        done += channels * channels  # the output matrix
    return done


@pytest.mark.parametrize("global_query", [False, True])
@pytest.mark.parametrize("window_tokens", [4, 16])
def test_attention_one_by_one(window_tokens, global_query):
    counted = cost.attention(16, 6, window_tokens, global_query)
    assert counted == loops(16, 6, window_tokens, global_query)


def test_full_attention_is_one_window_of_all_tokens():
    assert cost.attention(49, 8) == cost.attention(49, 8, 49)
    assert cost.score_bytes(49, 2) == cost.score_bytes(49, 2, 49)


def test_score_bytes_are_those_of_the_weights():
    layer = WindowAttention(4, 3, global_query=False)
    x = np.zeros((6, 16, 12), "float32")
    layer(x)
    weights = keras.ops.convert_to_numpy(layer.attention_weights(x))
    assert cost.score_bytes(6 * 16, 3, 16) == weights.nbytes


@pytest.mark.numerics
@not_on_jax
@pytest.mark.parametrize(
    "layer, shape, counted",
    [
        (ReduceSize(), (10, 7, 8), cost.reduce_size(10, 7, 8, 16)),
        (PatchEmbed(8), (33, 40, 3), cost.stem(33, 40, 3, 8)),
        (MLP(20), (5, 6, 8), cost.mlp(30, 8, 2.5)),
        (
            GlobalQueryGenerator((False, True, False)),
            (9, 12, 8),
            cost.generator(9, 12, 8, (False, True, False), (3, 3)),
        ),
    ],
)
def test_layers_as_the_backend_counts_them(layer, shape, counted):
    layer.build((1, *shape))
    assert matrix_flops(layer, (1, *shape)) == 2 * counted


@pytest.mark.numerics
@not_on_jax
@pytest.mark.parametrize("size", [(224, 224), (97, 61)])
def test_a_model_as_the_backend_counts_it(size):
    """To the last one, but for the resized query: TensorFlow's profiler skips einsum."""
    model = small_model()
    counted = 2 * cost.total(cost.count(model, size))
    # In training: in predictions of one image, TensorFlow leaves it to XLA, out of sight.
    measured = matrix_flops(lambda images: model(images, training=True), (1, *size, 3))
    if keras.backend.backend() == "tensorflow" and size != (224, 224):
        assert 0.995 * counted < measured < counted
    else:
        assert measured == counted


@pytest.mark.numerics
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's cost analysis, on JAX")
def test_a_model_as_xla_counts_it():
    """XLA also counts what is done number by number: softmax, norms, GELU, biases.

    In the smallest channels of all models here, 16, that is a third more.
    """
    import jax

    model = small_model()
    variables = [[v.value for v in model.trainable_variables]]
    variables.append([v.value for v in model.non_trainable_variables])
    images = np.zeros((1, 224, 224, 3), "float32")
    lowered = jax.jit(lambda v, x: model.stateless_call(*v, x)[0]).lower(variables, images)
    counted = 2 * cost.total(cost.count(model, 224))
    assert counted < lowered.cost_analysis()["flops"] < 1.4 * counted


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name]["gflops"]])
def test_published_gflops(name):
    """The published numbers are multiply-adds, in units of 10⁹ and rounded to a tenth."""
    preset = PRESETS[name]
    model = GCViT(**preset["config"])
    counted = cost.total(cost.count(model, 224))
    if name in WITHOUT_PRODUCTS:
        assert counted / 1e9 > 1.07 * preset["gflops"]
        for i, level in enumerate(model.levels):
            tokens, window = (56 // 2**i) ** 2, level.window_size[0] ** 2
            channels = model.embed_dim * 2**i
            counted -= level.depth * 2 * tokens * window * channels
    assert counted / 1e9 == pytest.approx(preset["gflops"], rel=0.035)


def test_cost_is_linear_in_pixels_with_windows_kept_and_not_with_windows_scaled():
    config = PRESETS["gcvit_xxtiny"]["config"]
    fixed = GCViT(**config)
    per_pixel = [cost.total(cost.count(fixed, size)) / size**2 for size in (224, 448, 896, 1792)]
    np.testing.assert_allclose(per_pixel, per_pixel[0], rtol=2e-3)

    def scaled(size):
        windows = scaled_windows(size)
        return cost.total(cost.count(GCViT(**{**config, "window_size": windows}), size)) / size**2

    assert scaled(224) == per_pixel[0]
    assert scaled(448) > 1.2 * per_pixel[0]


def test_parts_name_what_they_count():
    parts = cost.count(GCViT(**PRESETS["gcvit_nano"]["config"]), (128, 160))
    kinds = [part.kind for part in parts]
    assert kinds[0] == "stem" and kinds[-1] == "head"
    assert kinds.count("local attention") == kinds.count("global attention") == 6
    assert kinds.count("MLP") == 12
    assert kinds.count("generator") == 4
    assert kinds.count("downsampling") == 3
    assert parts[-1].multiply_adds == 192 * 200


def test_a_level_without_a_global_block_makes_no_query():
    model = GCViT((7, 7), 8, depths=(1, 2), num_heads=(1, 1))
    kinds = [(part.place, part.kind) for part in cost.count(model, 64)]
    assert ("level 1", "generator") not in kinds
    assert ("level 2", "generator") in kinds


@pytest.mark.parametrize("size, message", [(31, "at least 32 px"), (64.5, "positive integer")])
def test_sizes_that_do_not_fit_are_refused(size, message):
    model = GCViT(**PRESETS["gcvit_nano"]["config"])
    with pytest.raises(ValueError, match=message):
        cost.count(model, size)


def test_seconds_is_the_shortest_call_and_not_the_first():
    import time

    naps = iter([0.2, 0.02, 0.01, 0.02])
    assert 0.01 <= cost.seconds(lambda: time.sleep(next(naps)), at_least=0.04) < 0.1


@pytest.mark.numerics
def test_seconds_waits_for_tensors(monkeypatch):
    """JAX returns at once what takes a while; only the wait is seen here, on every backend."""
    arrived = []
    monkeypatch.setattr(cost.ops, "convert_to_numpy", lambda x: arrived.append(x.shape))
    cost.seconds(lambda: {"a": keras.ops.ones((2, 3)), "b": [keras.ops.ones(4), 7]}, at_least=0)
    assert [tuple(shape) for shape in arrived] == [(2, 3), (4,)] * 3


def test_peak_memory_sees_what_is_freed_again():
    def take_and_free():
        np.ones(8_000_000)  # 64 MB, every page touched

    peak = cost.peak_memory(take_and_free)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60e6 < peak < 90e6


def test_peak_memory_is_none_where_the_system_does_not_tell(monkeypatch):
    called = []
    monkeypatch.setattr(cost, "Path", lambda path: _Missing())
    assert cost.peak_memory(lambda: called.append(1)) is None


class _Missing:
    def write_text(self, text):
        raise FileNotFoundError

    read_text = write_text
