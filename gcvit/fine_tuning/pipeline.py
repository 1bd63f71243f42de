"""From photographs to batches: resize, augment, shuffle, mix."""

import keras
import tensorflow as tf

from gcvit.images import normalize


def resize(image, image_size):
    """Resize an image bicubically, antialiased, as the checkpoints were trained with.

    Args:
        image: (height, width, 3), 0 to 255.
        image_size: side of the square that comes out, in pixels, or (height, width).
    """
    size = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    image = tf.image.resize(image, size, method="bicubic", antialias=True)
    return tf.clip_by_value(image, 0.0, 255.0)


def flip(image, image_size, seed):
    """Resize, and mirror half of the images: the original notebook's augmentation."""
    return tf.image.stateless_random_flip_left_right(resize(image, image_size), seed)


def crop_and_color(image, image_size, seed, smallest=0.35):
    """Crop at random, resize, mirror, and vary brightness, contrast and saturation.

    Args:
        image: (height, width, 3), 0 to 255.
        image_size: side of the square that comes out, in pixels.
        seed: two integers.
        smallest: least share of the image's area that a crop keeps; default 0.35.
    """
    seeds = tf.random.split(seed, 5)
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros((1, 0, 4)),
        seeds[0],
        area_range=(smallest, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        use_image_if_no_bounding_boxes=True,
    )
    image = resize(tf.slice(image, begin, extent), image_size)
    image = tf.image.stateless_random_flip_left_right(image, seeds[1]) / 255.0
    image = tf.image.stateless_random_brightness(image, 0.2, seeds[2])
    image = tf.image.stateless_random_contrast(image, 0.7, 1.3, seeds[3])
    image = tf.image.stateless_random_saturation(image, 0.7, 1.3, seeds[4])
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


def _for_pipelines(layer):
    """Have a preprocessing layer of Keras compute with TensorFlow, whatever the model uses.

    Called as a layer it does so itself in a `tf.data` pipeline; its parts, called one by one,
    do not.
    """
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
        layers.RandomShear(strength, strength),
        layers.RandomTranslation(strength, strength),
        layers.RandomRotation(strength / 4),  # a factor of 1 is a full turn
        layers.RandomBrightness(strength, amounts),
        layers.RandomColorDegeneration(strength, amounts),
        layers.RandomContrast(strength, amounts),
        # 0.5 leaves an image as it is; less blurs it, more sharpens it.
        layers.RandomSharpness((0.5 - strength / 2, 0.5 + strength / 2), amounts),
        layers.RandomPosterization(max(1, round(8 - 4 * strength)), amounts),
        layers.AutoContrast(amounts),
        _Equalization(amounts),
    ]
    choices = [_for_pipelines(layer) for layer in choices]

    def apply(layer, image, seed):
        # As a layer does when it is called, but with a seed of the image's own; and as a
        # batch of one, which all of them take.
        draw = layer.get_random_transformation(image[None], training=True, seed=_Drawn(seed))
        return layer.transform_images(image[None], draw, training=True)[0]

    def augment(image, image_size, seed):
        image = flip(image, image_size, seed)
        shape = image.shape
        for drawn in tf.unstack(tf.random.split(seed, operations), operations):
            which = tf.random.stateless_uniform([], drawn, 0, len(choices), tf.int32)
            # Each branch is bound to the image now, not when it is called.
            branches = [
                lambda image=image, layer=layer, drawn=drawn: apply(layer, image, drawn)
                for layer in choices
            ]
            image = tf.ensure_shape(tf.switch_case(which, branches), shape)
        return image

    return augment


def _pass(seed, epoch):
    """Return a dataset of one element, two integers that are others in each pass."""
    if epoch is None:
        numbers = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(1)
    else:
        numbers = tf.data.Dataset.from_tensors(0).map(lambda _: epoch.read_value())
    return numbers.map(lambda number: tf.stack([tf.cast(seed, tf.int64), number]))


def _fold(seed, number):
    return tf.random.experimental.stateless_fold_in(seed, number)


def _sized(dataset, like):
    """Tell a dataset that it has as many elements as another, where that is known."""
    count = like.cardinality()
    return dataset if count < 0 else dataset.apply(tf.data.experimental.assert_cardinality(count))


def make_dataset(photos, image_size, batch_size=32, train=False, augment=flip, seed=0, epoch=None):
    """Turn photographs into batches that a model takes.

    Args:
        photos: `tf.data.Dataset` of (image, label), images as in `Photographs`.
        image_size: side of the images in pixels, or (height, width).
        batch_size: images a batch; default 32.
        train: whether to shuffle and augment; default `False`.
        augment: function of (image, image_size, two random integers) that returns an
            image of that size; default `flip`.
        seed: seed of order and augmentation; default 0.
        epoch: `tf.Variable`, int64, from whose value at the beginning of a pass the order
            and all draws of that pass follow. Default `None`: each pass draws anew.

    Returns:
        `tf.data.Dataset` of ((batch, height, width, 3) float32, normalized; (batch,) labels).
    """

    def shuffled(seed):
        # This function's own; TensorFlow's global seed would be mixed in, and fails if it is 0.
        tf.compat.v1.set_random_seed(1)
        order = photos.shuffle(10 * batch_size, seed=seed[1], reshuffle_each_iteration=False)
        return order.enumerate().map(lambda i, photo: (*photo, _fold(seed, i)))

    def prepare(image, label, seed=None):
        image = resize(image, image_size) if seed is None else augment(image, image_size, seed)
        return normalize(image), label

    found = photos
    if train:
        found = _sized(_pass(seed, epoch).flat_map(shuffled), photos)
    found = found.map(prepare, num_parallel_calls=tf.data.AUTOTUNE)
    return without_autotune(found.batch(batch_size).prefetch(tf.data.AUTOTUNE))


def without_autotune(dataset):
    """Return a `tf.data.Dataset` that ends when its last element is taken.

    TensorFlow tunes a pipeline in a thread that sleeps 10 ms, then twice as long each time. Often
    the end of a pass waits until that thread wakes: one of 1.5 s took 2.6 s. This one has no such
    thread; where a number is to be tuned, TensorFlow takes a fixed one.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def one_hot(batches, classes):
    """Turn the labels of batches into rows of `classes` numbers, a 1 among 0s."""
    return batches.map(lambda images, labels: (images, tf.one_hot(labels, classes)))


def mix(batches, seed=0, epoch=None):
    """Blend the images of two batches in three, and their labels with them.

    By turns, a batch is blended pixel by pixel (MixUp), gets rectangles of its other images
    (CutMix), and is left alone.

    Args:
        batches: `tf.data.Dataset` of (images, one-hot labels).
        seed: seed of the blending; default 0.
        epoch: see `make_dataset`.
    """
    mixers = [_for_pipelines(keras.layers.MixUp(0.2)), _for_pipelines(keras.layers.CutMix(1.0))]

    def apply(layer, images, labels, seed):
        data = {"images": images, "labels": labels}
        draw = layer.get_random_transformation(data, training=True, seed=_Drawn(seed))
        return layer.transform_images(images, draw), layer.transform_labels(labels, draw)

    def blend(number, batch, seed):
        images, labels = batch
        seed = _fold(seed, number)
        branches = [lambda layer=layer: apply(layer, images, labels, seed) for layer in mixers]
        which = tf.cast(number % 3, tf.int32)
        mixed, shares = tf.switch_case(which, [*branches, lambda: (images, labels)])
        return tf.ensure_shape(mixed, images.shape), tf.ensure_shape(shares, labels.shape)

    # A stream of its own: the same integers also draw the augmentation.
    seeds = _pass(seed + 1, epoch).flat_map(lambda one: tf.data.Dataset.from_tensors(one).repeat())
    numbered = tf.data.Dataset.zip(batches.enumerate(), seeds)
    mixed = numbered.map(lambda pair, seed: blend(*pair, seed))
    return _sized(mixed, batches).prefetch(tf.data.AUTOTUNE)


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
