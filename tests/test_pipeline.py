"""From photographs to batches: what is drawn, and what a batch holds."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from skimage import data

from gcvit import fine_tuning
from gcvit.images import denormalize, normalize


def test_half_of_the_images_are_mirrored_and_each_pass_draws_anew():
    image = np.tile(np.arange(8, dtype="uint8")[None, :, None], (8, 1, 3))
    photos = tf.data.Dataset.from_tensors((image, 0)).repeat(400)
    batches = fine_tuning.make_dataset(photos, 8, batch_size=50, train=True)
    passes = []
    for _ in range(2):
        images = np.concatenate([images for images, _ in batches])
        rows = denormalize(images)[:, 0, :, 0]
        mirrored = (rows == np.arange(8)[::-1]).all(axis=1)
        assert (mirrored | (rows == np.arange(8)).all(axis=1)).all()
        assert 150 < mirrored.sum() < 250
        passes.append(mirrored)
    assert (passes[0] != passes[1]).any()


def test_validation_batches_are_the_resized_normalized_photographs_in_order():
    photos = fine_tuning.embedded_photographs(per_class=4)
    (images, labels), *_ = fine_tuning.make_dataset(photos.validation, 32, batch_size=4)
    for image, label, (photo, true) in zip(images, labels, photos.validation, strict=False):
        resized = fine_tuning.resize(photo, 32).numpy()
        by_hand = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(image, by_hand, atol=1e-5)
        assert label == true
    np.testing.assert_array_equal(denormalize(normalize(np.float32(photo))), photo)


@pytest.mark.numerics  # Keras's layers in it must not compute with the model's backend
def test_rand_augment_keeps_shape_and_range_and_draws_for_each_image():
    photos = tf.data.Dataset.from_tensors((data.chelsea(), 0)).repeat(24)
    batches = fine_tuning.make_dataset(
        photos, 32, batch_size=24, train=True, augment=fine_tuning.rand_augment(0.5)
    )
    images = denormalize(next(iter(batches))[0])
    assert images.shape == (24, 32, 32, 3)
    assert len({image.tobytes() for image in images}) > 18


def test_no_pass_waits_for_a_thread_that_tunes_the_pipeline():
    """Also where more is put behind it: the option goes through."""
    photos = tf.data.Dataset.from_tensors((data.chelsea(), 0)).repeat(4)
    batches = fine_tuning.make_dataset(photos, 32, 2, train=True)
    for later in (batches, fine_tuning.mix(fine_tuning.one_hot(batches, 3)), batches.repeat(2)):
        assert later.options().autotune.enabled is False


def test_what_a_pass_draws_follows_from_the_epoch():
    photos = fine_tuning.embedded_photographs(per_class=4)
    epoch = tf.Variable(0, dtype="int64")

    def drawn(seed=0):
        batches = fine_tuning.make_dataset(
            photos.train, 32, 8, True, fine_tuning.rand_augment(), seed, epoch
        )
        mixed = fine_tuning.mix(fine_tuning.one_hot(batches, 7), seed, epoch)
        assert mixed.cardinality() == 4
        return np.concatenate([images for images, _ in mixed]).tobytes()

    keras.utils.set_random_seed(0)
    first = drawn()
    keras.utils.set_random_seed(1)
    assert drawn() == first and drawn(seed=1) != first
    epoch.assign(1)
    assert drawn() != first


def test_stored_photographs_are_the_resized_ones():
    photos = fine_tuning.embedded_photographs(per_class=4)
    stored = photos.stored(32)
    for (image, label), (small, same) in zip(photos.train, stored.train, strict=True):
        assert small.shape == (32, 32, 3) and small.dtype == tf.uint8 and label == same
        assert np.abs(fine_tuning.resize(image, 32) - tf.cast(small, "float32")).max() <= 0.5


@pytest.mark.numerics  # Keras's layers in it must not compute with the model's backend
def test_mixing_blends_labels_as_it_blends_pixels():
    # Class k is an image full of k, so the mean of a blend says what its label must be.
    labels = np.arange(24) % 4
    images = np.ones((24, 16, 16, 3)) * labels[:, None, None, None]
    batches = tf.data.Dataset.from_tensor_slices((np.float32(images), labels)).batch(8)
    mixed = list(fine_tuning.mix(fine_tuning.one_hot(batches, 4)))
    for number, (blended, rows) in enumerate(mixed):
        np.testing.assert_allclose(rows.numpy().sum(axis=1), 1, atol=1e-5)
        means = blended.numpy().mean(axis=(1, 2, 3))
        # CutMix cuts whole pixels: a rectangle may miss up to one row and one column.
        atol = 3 * 2 / 16 if number == 1 else 1e-4
        np.testing.assert_allclose(means, rows.numpy() @ np.arange(4), atol=atol)
        assert (rows.numpy().max(axis=1) < 1).any() == (number != 2)
    np.testing.assert_array_equal(mixed[2][0], images[16:])


def test_padding_changes_no_mean():
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3, "softmax")])
    loss = "sparse_categorical_crossentropy"
    model.compile("sgd", loss, weighted_metrics=["accuracy"])
    images, labels = np.random.default_rng(0).normal(size=(11, 2, 2, 3)), np.arange(11) % 3
    batches = tf.data.Dataset.from_tensor_slices((np.float32(images), labels)).batch(4)
    full = fine_tuning.pad_last_batch(batches, 4, 11)
    assert [len(images) for images, _, _ in full] == [4, 4, 4]
    np.testing.assert_allclose(
        model.evaluate(full, verbose=0), model.evaluate(batches, verbose=0), rtol=1e-5
    )
