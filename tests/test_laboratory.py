"""The laboratory: a switch closes one way and nothing else, and a run can be run again."""

import keras
import numpy as np
import pytest
from conftest import run, slow_on_jax, to_numpy

from gcvit import GCViT, WindowAttention, laboratory
from gcvit.global_tokens import FeatureExtraction

# Maps of 8 x 8 and 4 x 4 tokens, cut into windows of 2 x 2 and 4 x 4, as in the chapter.
MAPS = {
    "window_size": (2, 4),
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "include_top": False,
    "pooling": None,
}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 32, 32, 3)).astype("float32")
IMAGES[1, :, :-3] = IMAGES[0, :, :-3]  # the second differs in the stripe on the right


def with_larger_weights(model):
    """Build a model and fill it so that attention is uneven and tables show in the output."""
    model.build((None, 32, 32, 3))
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * (0.5 if variable.ndim > 1 else 1))
    return model


@pytest.fixture(scope="module")
def plain():
    return with_larger_weights(GCViT(**MAPS))


@pytest.fixture(scope="module")
def switched():
    return with_larger_weights(laboratory.Switched(**MAPS))


@pytest.fixture(autouse=True)
def untouched(switched):
    switched.switch()


@pytest.mark.numerics
def test_with_its_switches_as_they_are_it_is_the_model(plain, switched):
    assert plain.count_params() == switched.count_params() - len(switched.switches)
    assert len(plain.trainable_variables) == len(switched.trainable_variables)
    np.testing.assert_allclose(run(switched, IMAGES), run(plain, IMAGES), rtol=1e-5, atol=1e-6)


def change_on_the_left(model):
    """Return how much the left half of the map changes with the stripe on the right."""
    first, second = run(model, IMAGES)[:, :, :2]
    return np.abs(first - second).max()


@pytest.mark.numerics
def test_each_way_alone_lets_through_what_is_far(switched):
    switched.switch(())
    assert change_on_the_left(switched) == 0
    for way in laboratory.PATHWAYS:
        switched.switch([way])
        assert change_on_the_left(switched) > 1e-4, way


@pytest.mark.numerics
@slow_on_jax
def test_a_closed_query_is_the_same_for_every_image(switched):
    x = RNG.normal(size=(2, 8, 8, 8)).astype("float32")
    switched.switch(["gates", "late"])
    first, second = to_numpy(switched.levels[0].q_global(x))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first).max() > 0
    switched.switch()
    assert np.abs(np.diff(to_numpy(switched.levels[0].q_global(x)), axis=0)).max() > 1e-3


def test_windows_fall_apart_into_parts():
    tokens = np.arange(16).reshape(4, 4)
    mask = laboratory.block_mask(4, 2)
    for i in (0, 1):
        for j in (0, 1):
            part = tokens[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].ravel()
            np.testing.assert_array_equal(np.where(mask[part[0]] == 0)[0], np.sort(part))
    assert not laboratory.block_mask(2, 2).any()


@pytest.mark.numerics
@slow_on_jax
def test_the_faults_by_hand():
    attention = WindowAttention(2, 3, global_query=False)
    attention.build((None, 4, 6))
    table = RNG.normal(size=(9, 3)).astype("float32")
    attention.relative_position_bias_table.assign(table)
    flat = [[table.ravel()[cell] for cell in row] for row in attention.position_index]
    np.testing.assert_array_equal(to_numpy(laboratory.flat_gather(attention)), [flat])

    extraction = FeatureExtraction()
    extraction.build((None, 4, 4, 4))
    below_zero = -1 - RNG.random((1, 4, 4, 4)).astype("float32")
    halved = to_numpy(laboratory.zero_padding(extraction, below_zero))[0]
    assert not halved[0].any() and not halved[:, 0].any()
    np.testing.assert_array_equal(halved[1, 1], below_zero[0, 1:, 1:].max(axis=(0, 1)))


@pytest.mark.numerics
@slow_on_jax
@pytest.mark.parametrize(
    "name, owner, method",
    [
        ("flat_gather", WindowAttention, "relative_position_bias"),
        ("zero_padding", FeatureExtraction, "halve"),
    ],
)
def test_a_fault_that_is_switched_on_is_the_fault(
    plain, switched, monkeypatch, name, owner, method
):
    right = run(plain, IMAGES)
    monkeypatch.setattr(owner, method, laboratory.FAULTS[name])
    # Keras would go on with what it has compiled without the fault.
    faulty = with_larger_weights(GCViT(**MAPS))
    wrong = run(faulty, IMAGES)
    monkeypatch.undo()
    switched.switch(faults=[name])
    np.testing.assert_allclose(run(switched, IMAGES), wrong, rtol=1e-5, atol=1e-5)
    assert np.abs(wrong - right).max() > 1e-3


def test_a_switch_that_there_is_not(switched):
    with pytest.raises(ValueError, match="query, gates, late, flat_gather, zero_padding"):
        switched.switch(["mlp"])


def test_each_background_comes_with_every_pair():
    images, labels = laboratory.all_pairs(3, np.random.default_rng(0))
    assert labels.tolist() == [1, 0, 0, 1] * 3
    width = laboratory.WIDTH
    images = images.reshape(3, 4, 32, 32, 3)
    np.testing.assert_array_equal(images[:, 0, :, width:-width], images[:, 3, :, width:-width])
    assert np.abs(images[0, 0, :, width:-width] - images[1, 0, :, width:-width]).max() > 0
    left, right = (
        images[:, :, :, :width, 0].mean((2, 3)) > 0,
        images[..., -width:, 0].mean((2, 3)) > 0,
    )
    np.testing.assert_array_equal(left, [[True, True, False, False]] * 3)
    np.testing.assert_array_equal(right, [[True, False, True, False]] * 3)


def test_the_label_cannot_be_told_from_one_stripe():
    images, labels = laboratory.examples(4000, np.random.default_rng(0))
    left = images[:, :, : laboratory.WIDTH, 0].mean(axis=(1, 2)) > 0
    right = images[:, :, -laboratory.WIDTH :, 0].mean(axis=(1, 2)) > 0
    np.testing.assert_array_equal(labels, left == right)
    # Five standard errors of a share of 2,000 or so.
    for chosen in (left, ~left, right, ~right):
        assert abs(labels[chosen].mean() - 0.5) < 5 * 0.5 / np.sqrt(chosen.sum())


def test_a_run_can_be_run_again():
    keras.utils.set_random_seed(5)
    design = laboratory.Design(steps=2, batch=1, warmup=1, every=1, backgrounds=1)
    bench = laboratory.Experiment(
        design, window_size=(2,), depths=(2,), num_heads=(2,), embed_dim=8
    )
    bench.model.run_eagerly = True  # tracing takes longer than a few steps
    first = bench.train(0)
    other = bench.train(1, pathways=())
    assert len(first.curve) == 2 and other.curve != first.curve
    again = bench.train(0)
    np.testing.assert_allclose(again.curve, first.curve, rtol=1e-4)
    np.testing.assert_allclose(
        (again.accuracy, again.bits), (first.accuracy, first.bits), atol=1e-3
    )


def test_what_the_runs_say():
    mean, half = laboratory.interval([0.1, 0.2, 0.3])
    assert np.isclose(mean, 0.2) and np.isclose(half, 4.3027 * 0.1 / 3**0.5, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 2 values.*got 1"):
        laboratory.interval([0.5])
    assert laboratory.verdict([0.9, 0.95, 0.92]) == "more"
    assert laboratory.verdict([-0.9, -0.95, -0.92]) == "less"
    assert laboratory.verdict([0.01, -0.01, 0.0]) == "no difference that matters"
    assert laboratory.verdict([1.0, 0.0, 1.0]) == "cannot tell"
    outcome = laboratory.Outcome(curve=(0.7, 0.5, 0.3, 0.1), accuracy=1.0, bits=0.9)
    assert laboratory.steps_to_learn(outcome) == 30
    assert laboratory.steps_to_learn(outcome, bits=0.99) is None


def test_a_model_that_is_built_again_is_switched_once():
    model = laboratory.Switched(**MAPS)
    model.build((None, 32, 32, 3))
    before = [vars(level).get("q_global") for level in model.levels]
    model.build((None, 64, 64, 3))
    assert [vars(level).get("q_global") for level in model.levels] == before and before[0]
