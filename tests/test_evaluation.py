"""The numbers that judge a model."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import same_weights, weights_of

from gcvit import fine_tuning
from gcvit.fine_tuning import evaluation


def test_precision_and_recall_by_hand():
    matrix = [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    precision, recall = fine_tuning.precision_and_recall(matrix)
    np.testing.assert_allclose(precision, [2 / 4, 1 / 2, np.nan, np.nan])
    np.testing.assert_allclose(recall, [2 / 3, 1 / 2, 0, np.nan])


def test_an_evaluation_reads_the_photographs_once():
    reads = []
    answers = np.eye(3, dtype="float32")[[0, 1, 1, 2, 0]]
    labels = [0, 1, 2, 2, 1]

    def read(i):
        reads.append(int(i))
        return answers[i], np.int64(labels[i])

    def element(i):
        answer, label = tf.numpy_function(read, [i], (tf.float32, tf.int64))
        return tf.ensure_shape(answer, 3), tf.ensure_shape(label, ())

    model = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    model.compile()
    batches = tf.data.Dataset.range(5).map(element).batch(2)
    report = fine_tuning.evaluate(model, batches, ["a", "b", "c"])
    assert sorted(reads) == list(range(5))
    assert report["accuracy"] == pytest.approx(3 / 5)
    assert report["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert report["per_class"]["a"] == {"precision": 0.5, "recall": 1.0, "photographs": 1}


def test_timing_leaves_a_model_as_it_is_even_if_it_fails(monkeypatch):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    batches = tf.data.Dataset.from_tensors((np.ones((4, 3)), np.ones((4, 2))))
    model.fit(batches, shuffle=False, verbose=0)
    before = weights_of(model)
    assert fine_tuning.training_speed(model, batches, steps=2) > 0
    assert same_weights(model, before)
    monkeypatch.setattr(evaluation._Stopwatch, "on_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fine_tuning.training_speed(model, batches, steps=2)
    assert same_weights(model, before)


def interrupt(*args):
    raise KeyboardInterrupt


def test_calibration_error_by_hand():
    confident = [0.95, 0.95, 0.65, 0.65]
    probabilities = np.stack([confident, 1 - np.array(confident)], axis=1)
    report = fine_tuning.calibration([0, 0, 0, 1], probabilities)
    np.testing.assert_allclose(report.confidence, [0.65, 0.95])
    np.testing.assert_allclose(report.accuracy, [0.5, 1.0])
    assert report.count.tolist() == [2, 2]
    assert report.error == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)
    sure = fine_tuning.calibration([0, 1], np.eye(2))
    assert sure.error == 0 and sure.count.tolist() == [2]


def test_pipeline_speed_counts_images():
    def slow(image, label):
        return tf.numpy_function(lambda x: (time.sleep(0.01), x)[1], [image], tf.float32), label

    photos = tf.data.Dataset.from_tensors((np.zeros((4, 4, 3), "float32"), 0)).repeat(60)
    speed = fine_tuning.pipeline_speed(photos.map(slow).batch(10))
    assert 40 < speed < 110
