"""From photographs to batches: resize, augment, shuffle.

An epoch's order and all its draws follow from two integers, the seed and the epoch, and from
nothing that is kept: a run that is cut off goes on with what it would have been given.
"""

import keras
import tensorflow as tf

from gcvit.checks import pair
from gcvit.images import normalize, resize

if keras.backend.backend() != "tensorflow":
    # TensorFlow only feeds: the GPU's memory is for the backend that computes.
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:  # it has been started already, by someone who may need it
        pass


def resized(image, image_size, crop=1.0, box=None):
    """Do `gcvit.images.resize` as an operation of a pipeline; a box is four numbers."""
    if box is None:
        result = tf.numpy_function(lambda x: resize(x, image_size, crop), [image], tf.uint8)
    else:
        result = tf.numpy_function(
            lambda x, edges: resize(x, image_size, box=edges.tolist()), [image, box], tf.uint8
        )
    return tf.ensure_shape(result, (*pair("image_size", image_size), 3))


def random_box(image, seed, smallest):
    """Draw a part of an image: (left, upper, right, lower), float32.

    Args:
        image: (height, width, 3).
        seed: two integers.
        smallest: least share of the image's area; the part's sides are as 3 to 4 at most.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros((1, 0, 4)),
        seed,
        area_range=(smallest, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        use_image_if_no_bounding_boxes=True,
    )
    upper_left, size = begin[1::-1], extent[1::-1]
    return tf.cast(tf.concat([upper_left, upper_left + size], axis=0), "float32")


def flip(image, seed):
    """Mirror half of the images: the original notebook's augmentation.

    Args:
        image: (height, width, 3) float32, 0 to 255, of the model's size.
        seed: two integers.
    """
    return tf.image.stateless_random_flip_left_right(image, seed)


def _seeds(*numbers):
    return tf.stack([tf.cast(number, tf.int64) for number in numbers])


def make_dataset(
    photos,
    image_size,
    batch_size=32,
    train=False,
    augment=flip,
    seed=0,
    epoch=0,
    crop=1.0,
    smallest=None,
):
    """Turn photographs into batches that a model takes: one pass over them.

    Args:
        photos: `tf.data.Dataset` of (image, label), images as in `Photographs`, the classes
            mixed: training shuffles within ten batches, which does not mix what comes class
            by class.
        image_size: side of the images in pixels, or (height, width).
        batch_size: images a batch; default 32.
        train: whether to shuffle and augment; default `False`.
        augment: function of (image, two random integers) that changes an image; default
            `flip`.
        seed: seed of order and augmentation; default 0.
        epoch: number of the pass, an integer or a scalar tensor: each has draws of its own;
            default 0.
        crop: share of the photograph that is looked at, see `gcvit.images.center_box`;
            default 1.
        smallest: least share of the area of a photograph that training looks at, a
            `random_box` of it; default `None`: training looks at what the evaluation does.

    Returns:
        `tf.data.Dataset` of ((batch, height, width, 3) float32, normalized; (batch,) labels).
    """

    def shuffled(seeds):
        # This function's own; TensorFlow's global seed would be mixed in, and fails if it is 0.
        tf.compat.v1.set_random_seed(1)
        number = tf.random.stateless_uniform([], seeds, dtype=tf.int64, minval=None, maxval=None)
        order = photos.shuffle(10 * batch_size, seed=number, reshuffle_each_iteration=False)
        return order.enumerate().map(lambda i, photo: (*photo, _fold(seeds, i)))

    def prepare(image, label, seed=None):
        if seed is None:
            return normalize(tf.cast(resized(image, image_size, crop), "float32")), label
        box = None if smallest is None else random_box(image, _fold(seed, -1), smallest)
        image = tf.cast(resized(image, image_size, crop, box), "float32")
        return normalize(augment(image, seed)), label

    one_pass = photos
    if train:
        one_pass = tf.data.Dataset.from_tensors(_seeds(seed, epoch)).flat_map(shuffled)
    images = one_pass.map(prepare, num_parallel_calls=tf.data.AUTOTUNE)
    return without_autotune(images.batch(batch_size).prefetch(tf.data.AUTOTUNE))


def every_epoch(batches, first, last):
    """Return the batches of one epoch after another.

    Args:
        batches: function of an epoch's number that returns its batches.
        first: number of the first epoch.
        last: number of the epoch after the last one.
    """
    epochs = tf.data.Dataset.range(first, last).flat_map(batches)
    return without_autotune(epochs.prefetch(tf.data.AUTOTUNE))


def _fold(seed, number):
    return tf.random.experimental.stateless_fold_in(seed, number)


def without_autotune(dataset):
    """Return a `tf.data.Dataset` that ends when its last element is taken.

    TensorFlow tunes a pipeline in a background thread. The thread sleeps for longer and longer
    periods, and a pass can end only when it wakes. The returned dataset has no such thread: what
    TensorFlow would tune is fixed.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def one_hot(batches, classes):
    """Turn the labels of batches into rows of `classes` numbers, a 1 among 0s."""
    return batches.map(lambda images, labels: (images, tf.one_hot(labels, classes)))


def pad_last_batch(batches, batch_size, count):
    """Fill the last batch up, without a change to any mean over all of them.

    Args:
        batches: `tf.data.Dataset` of (images, labels), full but for the last one.
        batch_size: images in a full batch.
        count: images in all of them.

    Returns:
        `tf.data.Dataset` of (images, labels, weights). What was added, the batch's first
        image again, has the weight 0; all others have the same weight, by which a mean
        over full batches becomes the mean over `count` images.
    """
    weight = -(-count // batch_size) * batch_size / count

    def fill(images, labels):
        missing = batch_size - tf.shape(images)[0]
        weights = tf.pad(tf.fill([batch_size - missing], weight), [[0, missing]])
        full = [
            tf.ensure_shape(
                tf.concat([part, tf.repeat(part[:1], missing, axis=0)], axis=0),
                (batch_size, *part.shape[1:]),
            )
            for part in (images, labels)
        ]
        return (*full, tf.ensure_shape(weights, [batch_size]))

    return batches.map(fill)
