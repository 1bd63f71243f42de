"""The numbers that judge a model."""

import time

import numpy as np
import pytest
import tensorflow as tf

from gcvit import fine_tuning


def test_confusion_precision_and_recall_by_hand():
    matrix = fine_tuning.confusion_matrix([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0], 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    precision, recall = fine_tuning.precision_and_recall(matrix)
    np.testing.assert_allclose(precision, [2 / 4, 1 / 2, np.nan, np.nan])
    np.testing.assert_allclose(recall, [2 / 3, 1 / 2, 0, np.nan])


def test_calibration_error_by_hand():
    confident = [0.95, 0.95, 0.65, 0.65]
    probabilities = np.stack([confident, 1 - np.array(confident)], axis=1)
    found = fine_tuning.calibration([0, 0, 0, 1], probabilities)
    np.testing.assert_allclose(found.confidence, [0.65, 0.95])
    np.testing.assert_allclose(found.accuracy, [0.5, 1.0])
    assert found.count.tolist() == [2, 2]
    assert found.error == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)
    sure = fine_tuning.calibration([0, 1], np.eye(2))
    assert sure.error == 0 and sure.count.tolist() == [2]


def test_pipeline_speed_counts_images():
    def slow(image, label):
        return tf.numpy_function(lambda x: (time.sleep(0.01), x)[1], [image], tf.float32), label

    photos = tf.data.Dataset.from_tensors((np.zeros((4, 4, 3), "float32"), 0)).repeat(60)
    speed = fine_tuning.pipeline_speed(photos.map(slow).batch(10))
    assert 40 < speed < 110
