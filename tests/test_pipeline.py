"""From photographs to batches: what is drawn, and what a batch holds."""

import keras
import numpy as np
import tensorflow as tf
from skimage import data

from gcvit import fine_tuning
from gcvit.fine_tuning import pipeline
from gcvit.images import denormalize, normalize, resize


def test_half_of_the_images_are_mirrored_and_each_epoch_draws_anew():
    image = np.tile(np.arange(8, dtype="uint8")[None, :, None], (8, 1, 3))
    photos = tf.data.Dataset.from_tensors((image, 0)).repeat(400)
    draws = []
    for epoch in range(2):
        batches = fine_tuning.make_dataset(photos, 8, 50, train=True, epoch=epoch)
        rows = denormalize(np.concatenate([images for images, _ in batches]))[:, 0, :, 0]
        mirrored = (rows == np.arange(8)[::-1]).all(axis=1)
        assert (mirrored | (rows == np.arange(8)).all(axis=1)).all()
        assert 150 < mirrored.sum() < 250
        draws.append(mirrored)
    assert (draws[0] != draws[1]).any()


def test_validation_batches_are_the_resized_normalized_photographs_in_order():
    photos = fine_tuning.embedded_photographs(per_class=4)
    (images, labels), *_ = fine_tuning.make_dataset(photos.validation, 32, 4, crop=0.875)
    for image, label, (photo, true) in zip(images, labels, photos.validation, strict=False):
        np.testing.assert_allclose(image, normalize(resize(photo, 32, 0.875)), atol=1e-6)
        assert label == true


def test_random_boxes_hold_their_share_and_lie_inside():
    image = tf.zeros((60, 80, 3), tf.uint8)
    boxes = np.array([pipeline.random_box(image, (0, i), 0.35) for i in range(100)])
    left, upper, right, lower = boxes.T
    assert boxes.min() >= 0 and right.max() <= 80 and lower.max() <= 60
    shares = (right - left) * (lower - upper) / (60 * 80)
    assert 0.3 < shares.min() < 0.5 < shares.max() <= 1
    assert len({tuple(box) for box in boxes}) > 90
    # And the pipeline looks at them: a bright left half is seen in other shares.
    half = np.zeros((60, 80, 3), "uint8")
    half[:, :40] = 255
    photos = tf.data.Dataset.from_tensors((half, 0)).repeat(32)
    batches = fine_tuning.make_dataset(photos, 16, 32, train=True, smallest=0.2)
    means = denormalize(next(iter(batches))[0]).mean(axis=(1, 2, 3))
    assert means.std() > 10


def test_no_pass_waits_for_a_thread_that_tunes_the_pipeline():
    """Also where more is put behind it: the option goes through."""
    photos = tf.data.Dataset.from_tensors((data.chelsea(), 0)).repeat(4)
    batches = fine_tuning.make_dataset(photos, 32, 2, train=True)
    for later in (batches, fine_tuning.one_hot(batches, 3), batches.repeat(2)):
        assert later.options().autotune.enabled is False


def test_what_an_epoch_draws_follows_from_its_number_and_the_seed():
    photos = fine_tuning.embedded_photographs(per_class=4)

    def drawn(first, last=2, seed=0):
        def one_pass(epoch):
            return fine_tuning.make_dataset(photos.train, 32, 8, True, seed=seed, epoch=epoch)

        batches = fine_tuning.every_epoch(one_pass, first, last)
        return [images.numpy().tobytes() for images, _ in batches]

    keras.utils.set_random_seed(0)
    both = drawn(0)
    assert len(set(both)) == 8
    # From a later epoch on it is the same, whatever else was drawn.
    keras.utils.set_random_seed(1)
    assert drawn(1) == both[4:]
    assert not set(drawn(0, 1, seed=1)) & set(both)


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
