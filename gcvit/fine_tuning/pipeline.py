"""From photographs to batches: resize, augment, shuffle, mix.

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


def flip_and_color(image, seed):
    """Mirror, and vary brightness, contrast and saturation. For the arguments see `flip`."""
    seeds = tf.random.split(seed, 4)
    image = flip(image, seeds[0]) / 255.0
    image = tf.image.stateless_random_brightness(image, 0.2, seeds[1])
    image = tf.image.stateless_random_contrast(image, 0.7, 1.3, seeds[2])
    image = tf.image.stateless_random_saturation(image, 0.7, 1.3, seeds[3])
    return 255.0 * tf.clip_by_value(image, 0.0, 1.0)


class _Drawn(keras.random.SeedGenerator):
    """Seeds for Keras's random layers that follow from two given integers.

    A generator with a state gives out seeds in the order of the calls, which in a parallel
    pipeline is another one each time.
    """

    def __init__(self, seed):
        self.drawn = tf.cast(seed, tf.int32)

    def next(self, ordered=True):
        self.drawn, seed = tf.unstack(tf.random.split(self.drawn))
        return seed


def _for_pipelines(layer, *args):
    """Make a preprocessing layer of Keras that computes with TensorFlow, channels last.

    Called as a layer it would use TensorFlow in a `tf.data` pipeline by itself, whatever the
    model uses; its parts, called one by one, do not.
    """
    layer = layer(*args, data_format="channels_last")
    layer.backend.set_backend("tensorflow")
    return layer


class _Equalization(keras.layers.Equalization):
    """Counts with TensorFlow: with JAX, Keras counts 256 values in 256 loops, minutes to trace."""

    def _custom_histogram_fixed_width(self, values, value_range, nbins):
        low, high = value_range
        bins = tf.cast((values - low) * (nbins - 1) / (high - low), tf.int32)
        bins = tf.clip_by_value(bins, 0, nbins - 1)
        return tf.math.bincount(tf.reshape(bins, [-1]), minlength=nbins)


def rand_augment(strength=0.2, operations=2):
    """Return an augmentation: `flip`, then a few operations drawn for each image.

    The operations are those of `keras.layers.RandAugment`, but for solarization, whose
    threshold cannot be kept from turning most of an image into its negative. That layer
    computes all of them for every image and draws the same few for a whole batch; here only
    those drawn are computed.

    Args:
        strength: how far they go, 0 to 1; default 0.2.
        operations: how many are applied to an image; default 2.

    Returns:
        A function for `make_dataset(augment=...)`.
    """
    layers, amounts = keras.layers, (0, 255)
    choices = [
        _for_pipelines(layers.RandomShear, strength, strength),
        _for_pipelines(layers.RandomTranslation, strength, strength),
        _for_pipelines(layers.RandomRotation, strength / 4),  # a factor of 1 is a full turn
        _for_pipelines(layers.RandomBrightness, strength, amounts),
        _for_pipelines(layers.RandomColorDegeneration, strength, amounts),
        _for_pipelines(layers.RandomContrast, strength, amounts),
        # 0.5 leaves an image as it is; less blurs it, more sharpens it.
        _for_pipelines(layers.RandomSharpness, (0.5 - strength / 2, 0.5 + strength / 2), amounts),
        _for_pipelines(layers.RandomPosterization, max(1, round(8 - 4 * strength)), amounts),
        _for_pipelines(layers.AutoContrast, amounts),
        _for_pipelines(_Equalization, amounts),
    ]

    def apply(layer, image, seed):
        # As a layer does when it is called, but with a seed of the image's own; and as a
        # batch of one, which all of them take.
        draw = layer.get_random_transformation(image[None], training=True, seed=_Drawn(seed))
        return layer.transform_images(image[None], draw, training=True)[0]

    def augment(image, seed):
        image = flip(image, seed)
        for drawn in tf.unstack(tf.random.split(seed, operations), operations):
            which = tf.random.stateless_uniform([], drawn, 0, len(choices), tf.int32)
            # Each branch is bound to the image now, not when it is called.
            branches = [
                lambda image=image, layer=layer, drawn=drawn: apply(layer, image, drawn)
                for layer in choices
            ]
            image = tf.ensure_shape(tf.switch_case(which, branches), image.shape)
        return image

    return augment


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
        photos: `tf.data.Dataset` of (image, label), images as in `Photographs`.
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

    TensorFlow tunes a pipeline in a thread that sleeps, each time longer, and the end of a pass
    waits until it wakes. This one has no such thread; where a number is to be tuned, TensorFlow
    takes a fixed one.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def one_hot(batches, classes):
    """Turn the labels of batches into rows of `classes` numbers, a 1 among 0s."""
    return batches.map(lambda images, labels: (images, tf.one_hot(labels, classes)))


def mix(batches, seed=0, first=0):
    """Blend the images of two batches in three, and their labels with them.

    By turns, a batch is blended pixel by pixel (MixUp), gets rectangles of its other images
    (CutMix), and is left alone.

    Args:
        batches: `tf.data.Dataset` of (images, one-hot labels).
        seed: seed of the blending; default 0.
        first: number of the first batch, from which and the seed its blending follows;
            default 0.
    """
    mixers = [_for_pipelines(keras.layers.MixUp, 0.2), _for_pipelines(keras.layers.CutMix, 1.0)]

    def apply(layer, images, labels, seed):
        data = {"images": images, "labels": labels}
        draw = layer.get_random_transformation(data, training=True, seed=_Drawn(seed))
        return layer.transform_images(images, draw), layer.transform_labels(labels, draw)

    def blend(number, batch):
        images, labels = batch
        drawn = _seeds(seed + 1, number)
        branches = [lambda layer=layer: apply(layer, images, labels, drawn) for layer in mixers]
        which = tf.cast(number % 3, tf.int32)
        mixed, shares = tf.switch_case(which, [*branches, lambda: (images, labels)])
        return tf.ensure_shape(mixed, images.shape), tf.ensure_shape(shares, labels.shape)

    return batches.enumerate(first).map(blend).prefetch(tf.data.AUTOTUNE)


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
