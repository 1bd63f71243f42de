import numpy as np
import pytest
from conftest import to_numpy

from gcvit import WindowAttention
from gcvit.attention import relative_position_index

pytestmark = pytest.mark.numerics
RNG = np.random.default_rng(2)


def layer_and_input(global_query, window=(2, 3), heads=2, channels=8, batch=2, windows=3):
    layer = WindowAttention(window, heads, global_query)
    x = RNG.normal(size=(batch * windows, window[0] * window[1], channels)).astype("float32")
    q = RNG.normal(size=(batch, *window, channels)).astype("float32")
    query = (q,) if global_query else ()
    layer(x, *query)
    for weight in layer.weights:
        weight.assign(RNG.normal(size=weight.shape) * 0.3)
    return layer, x, query


def by_hand(layer, x, query):
    """Attention window by window and head by head, with loops and nothing shared."""
    weights = {w.path.split("/", 1)[-1]: to_numpy(w) for w in layer.weights}
    kernel, bias = weights["qkv/kernel"], weights["qkv/bias"]
    table = weights["relative_position_bias_table"]
    heads, d = layer.num_heads, layer.head_dim
    height, width = layer.window_size
    places = [(i, j) for i in range(height) for j in range(width)]
    out = np.empty_like(x)
    windows_per_image = len(x) // len(query[0]) if query else None
    for n, tokens in enumerate(x):
        parts = np.split(tokens @ kernel + bias, layer.qkv_size, axis=-1)
        if query:
            parts = [query[0][n // windows_per_image].reshape(len(tokens), -1), *parts]
        mixed = []
        for h in range(heads):
            q, k, v = (part[:, h * d : (h + 1) * d] for part in parts)
            scores = q @ k.T * d**-0.5
            for a, (i, j) in enumerate(places):
                for b, (u, w) in enumerate(places):
                    row = (i - u + height - 1) * (2 * width - 1) + (j - w + width - 1)
                    scores[a, b] += table[row, h]
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(p / p.sum(-1, keepdims=True) @ v)
        out[n] = np.concatenate(mixed, -1) @ weights["proj/kernel"] + weights["proj/bias"]
    return out


@pytest.mark.parametrize("global_query", [False, True])
def test_attention_by_hand(global_query):
    layer, x, query = layer_and_input(global_query)
    np.testing.assert_allclose(to_numpy(layer(x, *query)), by_hand(layer, x, query), atol=2e-6)


def test_each_head_has_a_bias_of_its_own():
    layer, _, _ = layer_and_input(False)
    bias = to_numpy(layer.relative_position_bias())
    assert bias.shape == (2, 6, 6)
    assert np.abs(bias[0] - bias[1]).max() > 0.1


def test_global_query_serves_the_windows_of_its_own_image():
    layer, x, (q,) = layer_and_input(True)
    both = to_numpy(layer(x, q))
    alone = np.concatenate([to_numpy(layer(x[3 * i : 3 * i + 3], q[i : i + 1])) for i in (0, 1)])
    np.testing.assert_allclose(both, alone, atol=1e-6)


def test_attention_weights_sum_to_one():
    layer, x, query = layer_and_input(True)
    weights = to_numpy(layer.attention_weights(x, *query))
    assert weights.shape == (6, 2, 6, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_relative_position_index_of_a_2x2_window():
    assert relative_position_index((2, 2)).tolist() == [
        [4, 3, 1, 0],
        [5, 4, 2, 1],
        [7, 6, 4, 3],
        [8, 7, 5, 4],
    ]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: WindowAttention(7, 3, False).build((None, 49, 64)), "64 channels and 3 heads"),
        (lambda: WindowAttention(7, 2, False).build((None, 48, 64)), "holds 49 tokens; got 48"),
        (lambda: WindowAttention(7, 2, False).build((49, 64)), "rank 3; got shape"),
        (lambda: WindowAttention((7, 0), 2, False), "window_size must be a positive integer"),
        (lambda: WindowAttention(7, 2, False, attention_dropout=1.5), r"in \[0, 1\); got 1.5"),
        (lambda: WindowAttention(2, 2, True)(np.zeros((1, 4, 8))), "q_global missing"),
        (
            lambda: WindowAttention(2, 2, False)(np.zeros((1, 4, 8)), np.zeros((1, 2, 2, 8))),
            "q_global given",
        ),
        (
            lambda: WindowAttention(2, 2, True)(np.zeros((1, 4, 8)), np.zeros((1, 3, 3, 8))),
            r"must be \(batch, 2, 2, 8\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
