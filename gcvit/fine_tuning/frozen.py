"""A linear head on a frozen backbone: what a model gives without any fine-tuning."""

import keras
import numpy as np
import tensorflow as tf

from gcvit.fine_tuning.evaluation import predict
from gcvit.fine_tuning.training import jit_compile


def pooled_features(model, *parts):
    """Return what enters a model's head, and the labels, from one pass over some photographs.

    Args:
        model: a built `GCViT` that pools its features.
        *parts: each a `tf.data.Dataset` of (images, labels), of images of one size.

    Returns:
        A pair of NumPy arrays for each part: (photographs,) labels and (photographs, channels)
        float32 features.
    """
    images = keras.Input(parts[0].element_spec[0].shape[1:])
    *_, last = model.features(images).values()
    backbone = keras.Model(images, model.pool(last))
    backbone.compile(jit_compile=jit_compile())
    pairs = [predict(backbone, batches) for batches in parts]
    return [(labels, np.float32(features)) for labels, features in pairs]


def linear_head(train, validation, classes, class_weight=None, steps=600, rate=1e-2):
    """Train a softmax layer on features that are computed once.

    It starts at zero, and each step of Adam takes all features, so that nothing is drawn at
    random. Every ten steps the validation loss is looked at; the weights with the lowest one
    are kept, and it ends after fifty steps without a lower one.

    Args:
        train: (labels, features), as `pooled_features` returns them for each part.
        validation: the same, of other photographs.
        classes: number of classes.
        class_weight: see `class_weights`; default `None`: each photograph counts the same.
        steps: most steps; default 600.
        rate: learning rate; default 1e-2.

    Returns:
        A Keras model that turns (photographs, channels) into (photographs, classes)
        probabilities.
    """
    labels, features = train
    dense = keras.layers.Dense(classes, activation="softmax", kernel_initializer="zeros")
    head = keras.Sequential([keras.Input(features.shape[1:]), dense])
    loss = "sparse_categorical_crossentropy"
    head.compile(keras.optimizers.Adam(rate), loss, jit_compile=jit_compile())
    head.fit(
        tf.data.Dataset.from_tensors((features, labels)).repeat(),
        validation_data=tf.data.Dataset.from_tensors(validation[::-1]),
        steps_per_epoch=10,
        epochs=steps // 10,
        class_weight=class_weight,
        callbacks=[keras.callbacks.EarlyStopping(patience=5, restore_best_weights=True)],
        shuffle=False,
        verbose=0,
    )
    return head


def head_accuracy(head, labels, features):
    """Return the share of photographs whose class a head names.

    Args:
        head: what `linear_head` returns.
        labels: (photographs,), as `pooled_features` returns them.
        features: (photographs, channels), likewise.
    """
    answers = keras.ops.convert_to_numpy(head(features)).argmax(axis=-1)
    return float(np.mean(answers == labels))
