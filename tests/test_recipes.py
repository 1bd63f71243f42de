"""The recipes and the optimizers that they are made of."""

import keras
import numpy as np
import pytest
from conftest import (
    plain_model,
    tiny_model,
    to_numpy,
    weights_of,
)

from gcvit import GCViT, fine_tuning


def test_warmup_cosine_by_hand():
    schedule = fine_tuning.warmup_cosine(1.0, 4, 12)
    rates = [float(schedule(step)) for step in (0, 1, 4, 6, 8, 12, 99)]
    cosine = 0.5 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(rates, [0, 0.25, 1, cosine, 0.5, 0, 0], atol=1e-6)
    assert float(fine_tuning.warmup_cosine(1.0, 0, 0)(0)) == 1.0


def test_weight_decay_spares_biases_norms_factors_and_tables():
    model = tiny_model(layer_scale=0.1)
    optimizer = fine_tuning.adamw(1.0, weight_decay=0.5)
    variables = model.trainable_variables
    before = weights_of(model)
    for variable in variables:  # so that each would be seen to shrink
        variable.assign(np.ones(variable.shape))
    optimizer.apply([np.zeros(variable.shape, "float32") for variable in variables], variables)
    shrunk = {variable.path for variable in variables if to_numpy(variable).mean() < 0.9}
    spared = {variable.path for variable in variables} - shrunk
    assert shrunk == {v.path for v in variables if v.path.endswith("kernel")}
    endings = {path.rsplit("/", 1)[1] for path in spared}
    assert endings == {
        "bias", "gamma", "beta", "gamma1", "gamma2", "relative_position_bias_table"
    }  # fmt: skip
    assert len(before) == len(model.weights)


@pytest.mark.parametrize("recipe", fine_tuning.RECIPES.values())
def test_a_model_without_weights_is_refused(recipe):
    photos = fine_tuning.embedded_photographs(per_class=4)
    with pytest.raises(ValueError, match="Build it first"):
        recipe(GCViT((4, 2), 8, (1, 1), (1, 2), num_classes=7), photos, 32)


def test_a_model_of_logits_is_refused(two_classes):
    with pytest.raises(ValueError, match="this one gives logits: build it with head_activation"):
        fine_tuning.original(tiny_model(head_activation=None), two_classes[0], 32)


@pytest.mark.parametrize(
    ("recipe", "build", "dtype"),
    [("original", plain_model, "float32"), ("finetune", tiny_model, "mixed_float16")],
)
def test_a_recipe_trains_a_model_in_its_precision(two_classes, recipe, build, dtype):
    photos, _ = two_classes
    keras.utils.set_random_seed(0)
    model = build() if dtype == "float32" else build(dtype=dtype)
    before = weights_of(model)
    run = fine_tuning.RECIPES[recipe](model, photos, 32, epochs=1, batch_size=8)
    fine_tuning.fit(model, run, verbose=0)
    after = weights_of(model)
    assert all(np.isfinite(value).all() for value in after)
    assert any((now != then).any() for now, then in zip(after, before, strict=True))
