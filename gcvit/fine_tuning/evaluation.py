"""What to look at afterwards: mistakes, calibration, speed."""

import dataclasses
import time

import keras
import numpy as np
import tensorflow as tf

from gcvit.fine_tuning.training import assign, values_of


def predict(model, batches):
    """Return the labels of photographs and a model's answers, from one pass over them.

    Args:
        model: a model that gives probabilities.
        batches: `tf.data.Dataset` of (images, labels).

    Returns:
        NumPy arrays: (photographs,) labels and (photographs, classes) probabilities.
    """
    parts = [(labels, model.predict_on_batch(x)) for x, labels in batches.as_numpy_iterator()]
    labels, probabilities = zip(*parts, strict=True)
    return np.concatenate(labels), np.concatenate(probabilities)


def precision_and_recall(matrix):
    """Return each class's precision and recall from a confusion matrix.

    Precision is the share of right answers among those that name the class; recall is the
    share of the class that is found. Where there is nothing to divide by, NaN: Keras's metrics
    give one number for all classes and 0 there, and this is no reason to install another
    library.

    Args:
        matrix: (classes, classes), as `tf.math.confusion_matrix` returns it: how often each
            class, a row, was taken for each class, a column.
    """
    matrix = np.asarray(matrix)
    right = np.diag(matrix).astype(float)
    named, there = matrix.sum(axis=0), matrix.sum(axis=1)
    nothing = np.full_like(right, np.nan)
    return (
        np.divide(right, named, out=nothing.copy(), where=named > 0),
        np.divide(right, there, out=nothing.copy(), where=there > 0),
    )


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How sure a model is, and how often it is right, bin by bin of its confidence.

    Attributes:
        confidence: mean confidence of each bin that holds something.
        accuracy: share of right answers in it.
        count: photographs in it.
        error: expected calibration error: the mean distance of the two, weighted by count.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    error: float


def calibration(labels, probabilities, bins=10):
    """Compare confidence, the highest probability, with accuracy.

    Args:
        labels: true class of each photograph.
        probabilities: (photographs, classes).
        bins: number of bins that 0 to 1 is cut into; default 10.
    """
    confidence = np.max(probabilities, axis=-1)
    right = np.argmax(probabilities, axis=-1) == np.asarray(labels)
    # A bin holds its upper edge, so that 1 falls into the last.
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = count > 0
    mean_confidence = np.bincount(which, confidence, bins)[filled] / count[filled]
    accuracy = np.bincount(which, right, bins)[filled] / count[filled]
    error = np.sum(count[filled] * np.abs(mean_confidence - accuracy)) / len(confidence)
    return Calibration(mean_confidence, accuracy, count[filled], float(error))


def evaluate(model, batches, class_names):
    """Return how good a model is on photographs: plain numbers, as JSON takes them.

    Args:
        model: a model that gives probabilities.
        batches: `tf.data.Dataset` of (images, labels).
        class_names: name of each class.

    Returns:
        A dict: "accuracy", "calibration_error", "confusion_matrix", and "per_class", {name:
        {"precision", "recall", "photographs"}}, where `None` stands for 0 of 0.
    """
    labels, probabilities = predict(model, batches)
    classes = len(class_names)
    matrix = tf.math.confusion_matrix(labels, probabilities.argmax(-1), classes).numpy()
    rates = [
        [None if np.isnan(rate) else float(rate) for rate in rates]
        for rates in precision_and_recall(matrix)
    ]
    return {
        "accuracy": float(matrix.trace() / matrix.sum()),
        "calibration_error": calibration(labels, probabilities).error,
        "confusion_matrix": matrix.tolist(),
        "per_class": {
            name: {"precision": precise, "recall": recalled, "photographs": int(count)}
            for name, precise, recalled, count in zip(
                class_names, *rates, matrix.sum(axis=1), strict=True
            )
        },
    }


def pipeline_speed(batches, seconds=2.0):
    """Return how many images a second batches yield when nothing else is done.

    Args:
        batches: `tf.data.Dataset` of (images, labels).
        seconds: how long to look; default 2. It ends sooner where the batches do.
    """
    batches = iter(batches)
    next(batches)  # the first one also fills the shuffling
    began, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch[0])
        if time.perf_counter() - began > seconds:
            break
    return images / (time.perf_counter() - began)


def training_speed(model, batches, steps=4):
    """Return how many images a second a compiled model trains on, input aside.

    One batch is trained on again and again; afterwards the model and its optimizer are as
    they were.

    Args:
        model: a model that has been fitted to such batches.
        batches: `tf.data.Dataset` of (images, labels).
        steps: steps to time; default 4.
    """
    batch = batches.take(1).cache()
    size = len(next(iter(batch))[0])
    variables = [*model.variables, *model.optimizer.variables]
    values = values_of(variables)
    stopwatch = _Stopwatch()
    try:
        model.fit(
            batch.repeat(),
            steps_per_epoch=steps,
            verbose=0,
            shuffle=False,
            callbacks=[stopwatch],
        )
    finally:
        assign(variables, values)
    return size * (steps - 1) / stopwatch.seconds


class _Stopwatch(keras.callbacks.Callback):
    """Times the steps of an epoch after the first, which may have to be compiled."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.began
