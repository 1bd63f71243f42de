"""A linear head on a frozen backbone."""

import numpy as np
import pytest
from conftest import same_weights, tiny_model, to_numpy, weights_of

from gcvit import fine_tuning


@pytest.mark.numerics
def test_the_features_are_what_enters_the_head(two_classes):
    photos, _ = two_classes
    model = tiny_model(head_activation=None)
    batches = fine_tuning.make_dataset(photos.validation, 32, 6)  # the last one is not full
    before = weights_of(model)
    (labels, features), (_, few) = fine_tuning.pooled_features(model, batches, batches.take(1))
    assert features.shape == (16, 8) and same_weights(model, before)
    np.testing.assert_allclose(few, features[:6], atol=1e-5)
    logits = features @ to_numpy(model.head.kernel) + to_numpy(model.head.bias)
    expected_labels, expected = fine_tuning.predict(model, batches)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def two_clouds(count, seed, distance=6.0):
    """Return labels and features of two classes, as far apart as so many deviations."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    features = rng.normal(size=(count, 4))
    features[:, 0] += distance * labels
    return labels, np.float32(features)


def test_a_head_tells_apart_what_a_plane_divides():
    head = fine_tuning.linear_head(two_clouds(40, 0), two_clouds(40, 1), 2)
    assert fine_tuning.head_accuracy(head, *two_clouds(200, 2)) > 0.98
    again = fine_tuning.linear_head(two_clouds(40, 0), two_clouds(40, 1), 2)
    assert same_weights(again, weights_of(head))  # nothing is drawn at random


def test_a_head_stops_where_the_validation_photographs_say_so():
    train = two_clouds(40, 0)
    contrary = 1 - train[0], train[1]
    (kernel, _), (stopped, _) = (
        fine_tuning.linear_head(train, validation, 2).get_weights()
        for validation in (train, contrary)
    )
    assert np.abs(stopped).max() < 0.2 < np.abs(kernel).max()


def test_rare_classes_can_count_as_much_as_common_ones():
    labels, features = two_clouds(400, 0, distance=1.0)
    some = np.flatnonzero((labels == 0) | (np.arange(400) % 10 == 1))
    train = labels[some], features[some]
    weights = fine_tuning.class_weights(np.bincount(train[0]))
    recall = []
    for class_weight in (None, weights):
        head = fine_tuning.linear_head(train, two_clouds(100, 1, 1.0), 2, class_weight)
        recall.append(fine_tuning.head_accuracy(head, labels[labels == 1], features[labels == 1]))
    assert recall[0] + 0.1 < recall[1]
