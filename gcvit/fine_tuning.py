"""Chapter 8: photographs in, recipes, and what to look at afterwards."""

import dataclasses
import os
import urllib.error
import urllib.request
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

MEAN = 255 * np.array([0.485, 0.456, 0.406], dtype="float32")
"""Mean of ImageNet's red, green and blue, on a scale of 0 to 255."""

DEVIATION = 255 * np.array([0.229, 0.224, 0.225], dtype="float32")
"""Standard deviation of ImageNet's red, green and blue, on a scale of 0 to 255."""

FLOWERS_URL = "http://download.tensorflow.org/example_images/flower_photos.tgz"
"""Where tensorflow-datasets gets `tf_flowers` from."""

PATCH = 128
"""Side in pixels of the patches that the embedded photographs are cut into."""


class DatasetError(ValueError):
    """A folder of data is not whole; the message names the file and the way out."""


@dataclasses.dataclass
class Photographs:
    """Photographs with labels, in two parts that share none.

    Attributes:
        train: `tf.data.Dataset` of (image, label): (height, width, 3) uint8, and an integer.
        validation: the same, of other photographs.
        class_names: name of each label.
        train_size: number of photographs in `train`.
        validation_size: number of photographs in `validation`.
        source: one sentence that says what they are and why these.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    class_names: list
    train_size: int
    validation_size: int
    source: str


def normalize(images):
    """Bring images from 0 to 255 to ImageNet's mean 0 and deviation 1, channel by channel."""
    return (images - MEAN) / DEVIATION


def denormalize(images):
    """Undo `normalize`, clip, and round: uint8 images that can be shown."""
    return np.clip(np.round(np.asarray(images) * DEVIATION + MEAN), 0, 255).astype("uint8")


def flowers_folder(data_dir=None):
    """Return the folder that tensorflow-datasets prepares `tf_flowers` in."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser() / "tf_flowers" / "3.0.1"


def flowers_are_here(data_dir=None):
    """Tell whether `tf_flowers` has been prepared, whole.

    Args:
        data_dir: tensorflow-datasets' folder; default: `TFDS_DATA_DIR`, or
            `~/tensorflow_datasets`.

    Raises:
        DatasetError: if the folder is there but half-prepared.
    """
    import tensorflow_datasets as tfds

    folder = flowers_folder(data_dir)
    if not folder.exists():
        return False
    wanted = ["dataset_info.json", "features.json"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not missing:
        split = tfds.builder_from_directory(folder).info.splits["train"]
        files = [Path(file) for file in split.filepaths]
        missing = [file.name for file in files if not file.is_file()]
        # A TFRecord adds 16 bytes to each record.
        size = split.num_bytes + 16 * split.num_examples
        if not missing and sum(file.stat().st_size for file in files) < size:
            missing = [f"the end of {files[0].name}"]
    if missing:
        raise DatasetError(
            f"{folder} is only half prepared: {', '.join(missing)} is missing. Delete that "
            "folder, and the next run prepares it again."
        )
    return True


def reachable(url, timeout=5):
    """Tell within `timeout` seconds (default 5) whether an address answers."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=timeout
        ) as answer:
            return answer.status < 400
    except (OSError, ValueError):
        return False


def flowers(data_dir=None):
    """Return `tf_flowers`, split 90 to 10 as the official split goes.

    Args:
        data_dir: tensorflow-datasets' folder; default: `TFDS_DATA_DIR`, or
            `~/tensorflow_datasets`. The data are fetched and prepared there if need be.

    Raises:
        DatasetError: if the folder is half-prepared.
        gcvit.FetchError: if the data are not there and cannot be fetched; this is found
            out in seconds.
    """
    import tensorflow_datasets as tfds

    from gcvit.fetch import FetchError

    if not flowers_are_here(data_dir) and not reachable(FLOWERS_URL):
        raise FetchError(
            f"tf_flowers is not prepared in {flowers_folder(data_dir)}, and {FLOWERS_URL} does "
            "not answer."
        )
    (train, validation), info = tfds.load(
        "tf_flowers",
        split=["train[:90%]", "train[90%:]"],
        data_dir=flowers_folder(data_dir).parents[1],
        as_supervised=True,
        try_gcs=False,
        with_info=True,
    )
    return Photographs(
        train,
        validation,
        info.features["label"].names,
        info.splits["train[:90%]"].num_examples,
        info.splits["train[90%:]"].num_examples,
        "The photographs are tf_flowers: five kinds of flowers from Flickr.",
    )


# The photographs in colour that scikit-image installs, and what they show.
_EMBEDDED = {
    "astronaut": "astronaut",
    "chelsea": "cat",
    "coffee": "coffee",
    "hubble_deep_field": "galaxies",
    "retina": "retina",
    "rocket": "rocket",
    "immunohistochemistry": "tissue",
}


def embedded_photographs(per_class=64, seed=0):
    """Return patches of the photographs that come with scikit-image.

    Each photograph is a class. Training patches come from its left 60 %, validation
    patches from the rest, so that no pixel is in both.

    Args:
        per_class: training patches of each photograph; default 64. A quarter as many
            validation patches are cut.
        seed: seed of the patches' places; default 0.
    """
    from skimage import data

    rng = np.random.default_rng(seed)
    parts = {"train": ([], []), "validation": ([], [])}
    for label, name in enumerate(_EMBEDDED):
        photograph = getattr(data, name)()
        border = int(0.6 * photograph.shape[1])
        sides = {
            "train": (photograph[:, :border], per_class),
            "validation": (photograph[:, border:], per_class // 4),
        }
        for part, (region, count) in sides.items():
            for _ in range(count):
                y, x = (rng.integers(side - PATCH + 1) for side in region.shape[:2])
                parts[part][0].append(region[y : y + PATCH, x : x + PATCH])
                parts[part][1].append(label)
    sets = {}
    for part, (images, labels) in parts.items():
        order = rng.permutation(len(labels))
        sets[part] = tf.data.Dataset.from_tensor_slices(
            (np.stack(images)[order], np.array(labels)[order])
        )
    return Photographs(
        sets["train"],
        sets["validation"],
        list(_EMBEDDED.values()),
        len(parts["train"][1]),
        len(parts["validation"][1]),
        "The photographs are patches of those that come with scikit-image: training and "
        "validation patches are cut from different parts of each.",
    )


def photographs(data_dir=None):
    """Return the flowers where they can be had, else the embedded photographs.

    Args:
        data_dir: see `flowers`.

    Raises:
        DatasetError: if the flowers' folder is half-prepared.
    """
    from gcvit.fetch import FetchError

    try:
        return flowers(data_dir)
    except FetchError:
        found = embedded_photographs()
        found.source = f"tf_flowers cannot be reached from here. {found.source}"
        return found


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
    """Resize, and mirror half of the images: the seed notebook's augmentation."""
    return tf.image.stateless_random_flip_left_right(resize(image, image_size), seed)


def crop_and_colour(image, image_size, seed, smallest=0.35):
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


def make_dataset(photos, image_size, batch_size=32, train=False, augment=flip, seed=0):
    """Turn photographs into batches that a model takes.

    Args:
        photos: `tf.data.Dataset` of (image, label), images as in `Photographs`.
        image_size: side of the images in pixels, or (height, width).
        batch_size: images a batch; default 32.
        train: whether to shuffle and augment; default `False`.
        augment: function of (image, image_size, two random integers) that returns an
            image of that size; default `flip`.
        seed: seed of order and augmentation; default 0. Each pass draws anew.

    Returns:
        `tf.data.Dataset` of ((batch, height, width, 3) float32, normalized; (batch,) labels).
    """
    if train:
        photos = photos.shuffle(10 * batch_size, seed=seed)
        draws = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(2)
        photos = tf.data.Dataset.zip(photos, draws)

    def prepare(image_and_label, draw=None):
        image, label = image_and_label
        image = augment(image, image_size, draw) if train else resize(image, image_size)
        return normalize(image), label

    if not train:
        photos = photos.map(lambda image, label: ((image, label),))
    photos = photos.map(prepare, num_parallel_calls=tf.data.AUTOTUNE)
    return photos.batch(batch_size).prefetch(tf.data.AUTOTUNE)


@keras.saving.register_keras_serializable(package="gcvit")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Raise the learning rate evenly, then lower it along half a cosine to 0.

    Args:
        peak: highest learning rate.
        warmup_steps: steps from 0 to the peak.
        total_steps: steps after which the rate is 0.
    """

    def __init__(self, peak, warmup_steps, total_steps):
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        ops = keras.ops
        step = ops.cast(step, "float32")
        warmup = (step + 1) / max(self.warmup_steps, 1)
        rest = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + ops.cos(np.pi * ops.clip(rest, 0.0, 1.0)))
        return self.peak * ops.minimum(warmup, cosine)

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


def adamw(learning_rate, weight_decay=0.05, **kwargs):
    """Return AdamW whose decay spares biases, norms, factors and the position tables.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: decay of the matrices; default 0.05.
        **kwargs: what `keras.optimizers.AdamW` takes.
    """
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay, **kwargs)
    # "bias" is part of the position tables' name too.
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer
