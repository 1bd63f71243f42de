"""Chapter 8: photographs in, recipes, and what to look at afterwards."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import inspect
import json
import os
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from gcvit.checks import pair
from gcvit.fast import device_kinds
from gcvit.fetch import FetchError, fetch
from gcvit.model import GCViT
from gcvit.presets import PRESETS
from gcvit.readers import CheckpointError, training_notes
from gcvit.weights import load_checkpoint, locate, save_safetensors

# Photographs.

MEAN = 255 * np.array([0.485, 0.456, 0.406], dtype="float32")
"""Mean of ImageNet's red, green and blue, on a scale of 0 to 255."""

STD = 255 * np.array([0.229, 0.224, 0.225], dtype="float32")
"""Standard deviation of ImageNet's red, green and blue, on a scale of 0 to 255."""

FLOWERS_URL = "http://download.tensorflow.org/example_images/flower_photos.tgz"
"""Where tensorflow-datasets gets `tf_flowers` from."""

FLOWERS_ARCHIVE = {
    "size": 228_813_984,
    "sha256": "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
}
"""What must be there, as tensorflow-datasets has it registered too."""

PATCH = 128
"""Side in pixels of the patches that the embedded photographs are cut into."""

TRAINING_SHARE = 0.6
"""Share of an embedded photograph's width, from the left, that training patches come from."""


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
        name: "tf_flowers", "scikit-image", or the name of a folder.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    class_names: list
    train_size: int
    validation_size: int
    source: str
    name: str = ""

    def take(self, train_size=None, validation_size=None):
        """Return the first so many of each part; `None` keeps all."""
        train_size = min(train_size or self.train_size, self.train_size)
        validation_size = min(validation_size or self.validation_size, self.validation_size)
        return dataclasses.replace(
            self,
            train=self.train.take(train_size),
            validation=self.validation.take(validation_size),
            train_size=train_size,
            validation_size=validation_size,
        )

    def stored(self, side):
        """Return the photographs resized to squares of `side` px and kept in memory.

        The first pass decodes and resizes them; each later one is spared that.
        """

        def kept(part):
            small = part.map(
                lambda image, label: (tf.cast(tf.round(resize(image, side)), tf.uint8), label),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
            return small.cache()

        return dataclasses.replace(self, train=kept(self.train), validation=kept(self.validation))


def normalize(images):
    """Bring images from 0 to 255 to ImageNet's mean 0 and deviation 1, channel by channel."""
    return (images - MEAN) / STD


def denormalize(images):
    """Undo `normalize`, clip, and round: uint8 images that can be shown."""
    return np.clip(np.round(np.asarray(images) * STD + MEAN), 0, 255).astype("uint8")


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

    archive = None
    if not flowers_are_here(data_dir):
        # tensorflow-datasets has no timeout and no limit on the size, and with no network gives
        # up after minutes. It takes an archive that it finds, and prepares it.
        try:
            archive = fetch(FLOWERS_URL, **FLOWERS_ARCHIVE, folder="datasets")
        except FetchError as error:
            raise FetchError(
                f"tf_flowers is not prepared in {flowers_folder(data_dir)}, and {error}"
            ) from error
    if not is_interactive():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=archive and archive.parent)
    try:
        (train, validation), info = tfds.load(
            "tf_flowers",
            split=["train[:90%]", "train[90%:]"],
            data_dir=flowers_folder(data_dir).parents[1],
            as_supervised=True,
            try_gcs=False,
            with_info=True,
            download_and_prepare_kwargs={"download_config": config},
        )
    except OSError as error:  # also what a download that breaks off raises
        raise FetchError(f"tf_flowers cannot be prepared: {error}") from error
    return Photographs(
        train,
        validation,
        info.features["label"].names,
        info.splits["train[:90%]"].num_examples,
        info.splits["train[90%:]"].num_examples,
        "The photographs are tf_flowers: five kinds of flowers from Flickr.",
        "tf_flowers",
    )


# The photographs in color that scikit-image installs, and what they show.
_EMBEDDED = {
    "astronaut": "astronaut",
    "chelsea": "cat",
    "coffee": "coffee",
    "hubble_deep_field": "galaxies",
    "retina": "retina",
    "rocket": "rocket",
    "immunohistochemistry": "tissue",
}


def embedded_regions(name):
    """Return the parts of a photograph that training and validation patches are cut from.

    Args:
        name: name of the function in `skimage.data`.

    Returns:
        A dict of "train" and "validation" to arrays (height, width, 3) that share no column.
    """
    from skimage import data

    photograph = getattr(data, name)()
    border = int(TRAINING_SHARE * photograph.shape[1])
    return {"train": photograph[:, :border], "validation": photograph[:, border:]}


def embedded_photographs(per_class=64, seed=0):
    """Return patches of the photographs that come with scikit-image.

    Each photograph is a class. Training patches come from its left part, validation
    patches from the rest, so that no pixel is in both.

    Args:
        per_class: training patches of each photograph; default 64. A quarter as many
            validation patches are cut.
        seed: seed of the patches' places; default 0.
    """
    rng = np.random.default_rng(seed)
    parts = {"train": ([], []), "validation": ([], [])}
    counts = {"train": per_class, "validation": per_class // 4}
    for label, name in enumerate(_EMBEDDED):
        for part, region in embedded_regions(name).items():
            for _ in range(counts[part]):
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
        "The photographs are patches of the pictures that come with scikit-image, those for "
        "validation from other parts of each picture than those for training.",
        "scikit-image",
    )


def photographs(data_dir=None):
    """Return the flowers where they can be had, else the embedded photographs.

    Args:
        data_dir: see `flowers`.

    Raises:
        DatasetError: if the flowers' folder is half-prepared.
    """
    try:
        return flowers(data_dir)
    except FetchError:
        found = embedded_photographs()
        found.source = found.source.replace(
            "The photographs", "tf_flowers cannot be had here, so the photographs"
        )
        return found


# What the operating systems and notebooks leave in folders; not photographs.
JUNK_FILES = {"thumbs.db", "desktop.ini", "__macosx"}


def is_junk(path):
    return path.name.startswith(".") or path.name.lower() in JUNK_FILES


def read_photograph(path, short_side=None):
    """Read a photograph as it is meant to be seen, whatever its file holds.

    Grayscale, 16 bits, palettes and CMYK become RGB, transparent parts become white, the
    camera's orientation (EXIF) is applied, and of an animation the first picture is taken.

    Args:
        path: the file.
        short_side: pixels that the shorter side is reduced to, if it is longer; default
            `None`: all pixels are kept.

    Returns:
        (height, width, 3) uint8.

    Raises:
        DatasetError: if it cannot be read whole; the message names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            size = image.size
            if short_side and short_side < min(size):
                size = [round(side * short_side / min(size)) for side in size]
                image.draft(None, tuple(size))  # lets a JPEG be decoded at a fraction
            image = ImageOps.exif_transpose(image)
            # The decoding may have left one pixel more or less; the orientation may turn.
            size = sorted(size, reverse=image.width > image.height)
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                image = Image.fromarray((np.asarray(image) / 257).astype("uint8"))
            elif image.mode == "F":
                raise ValueError("its pixels have no fixed range")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB")
            if image.size != tuple(size):
                image = image.resize(size, Image.Resampling.BICUBIC)
            return np.array(image)
    except Exception as error:  # whatever the decoders raise on a damaged file
        raise DatasetError(
            f"{path} cannot be read as a photograph ({error}). Mend it, or move it out of the "
            "folder."
        ) from error


def _examined(path):
    """Return the hash of a photograph's file, or the `DatasetError` it deserves."""
    try:
        read_photograph(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (DatasetError, OSError) as error:
        return error


def _files_in(folder):
    """Return all files in a folder and the folders in it, without litter."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(map(is_junk, [path, *path.relative_to(folder).parents[:-1]]))
    ]


def _files_by_class(folder):
    """Return {class name: its files}, or raise a `DatasetError` on what is out of place."""
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}.")
    entries = [path for path in sorted(folder.iterdir()) if not is_junk(path)]
    stray = [path for path in entries if not path.is_dir()]
    if stray:
        raise DatasetError(
            f"{stray[0]} is in no class: each photograph belongs into the folder of its class."
        )
    if len(entries) < 2:
        raise DatasetError(
            f"{folder} holds {len(entries)} class folders"
            + "".join(f" ({path.name})" for path in entries)
            + "; to tell classes apart takes at least two."
        )
    found = {}
    for entry in entries:
        found[entry.name] = _files_in(entry)
        if not found[entry.name]:
            raise DatasetError(f"{entry} holds no photographs. Fill it, or remove it.")
    return found


def _split(digests, share, rng):
    """Deal out a class's files; files of the same bytes stay together.

    Args:
        digests: {file: hash of its bytes}.
        share: share of them that is for validation.
        rng: NumPy's random generator.

    Returns:
        Two lists of files, the first for training.
    """
    alike = collections.defaultdict(list)
    for path, digest in digests.items():
        alike[digest].append(path)
    groups = list(alike.values())
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    parts = ([], [])
    for place, i in enumerate(rng.permutation(len(groups))):
        parts[place < count].extend(groups[i])
    return parts


def photographs_in(paths):
    """Return files, and the files in folders, in their order, without the systems' litter.

    Raises:
        DatasetError: if there is no such file or folder.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _files_in(path)
        elif path.exists():
            found.append(path)
        else:
            raise DatasetError(f"There is no file or folder {path}.")
    return found


def _listed(paths, most=20):
    names = [os.fspath(path) for path in paths[:most]]
    return ", ".join(names) + (f" and {len(paths) - most} others" if len(paths) > most else "")


SHORT_SIDE = 320
"""Pixels that photographs' shorter side is reduced to: more than a 224 px image needs, and
little enough to be shuffled in memory."""


def from_folder(folder, validation_split=0.1, seed=0, short_side=SHORT_SIDE):
    """Return the photographs of a folder that holds a folder for each class.

    Every file is decoded once before any is trained on, and none is left out: what cannot
    be read is refused by name. Hidden files, and what operating systems leave behind, are
    no photographs. Of each class the same share is for validation; files of the same bytes
    are in the same part.

    Args:
        folder: the folder; its class folders may have folders inside.
        validation_split: share of each class that is for validation, at least one;
            default 0.1.
        seed: seed of the split; default 0.
        short_side: see `read_photograph`; default `SHORT_SIDE`.

    Raises:
        DatasetError: if a file cannot be read, is in no class or in two, or if there are
            fewer than two classes, or fewer than two photographs in one. The message names
            them.
    """
    folder = Path(folder)
    files = _files_by_class(folder)
    listed = [path for paths in files.values() for path in paths]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        examined = dict(zip(listed, pool.map(_examined, listed), strict=True))
    errors = {path: error for path, error in examined.items() if isinstance(error, Exception)}
    if errors:
        first, *others = errors
        more = f" {len(others)} more cannot be read: {_listed(others)}." if others else ""
        raise DatasetError(f"{errors[first]}{more}")
    owners = {}
    for name, paths in files.items():
        for path in paths:
            other, first = owners.setdefault(examined[path], (name, path))
            if other != name:
                raise DatasetError(f"{path} is the same photograph as {first}, of another class.")
        if len({examined[path] for path in paths}) < 2:
            raise DatasetError(
                f"{folder / name} needs two different photographs at least, one to train on and "
                f"one to validate on; it holds {', '.join(path.name for path in paths)}."
            )

    def read(path, label):
        image = tf.numpy_function(
            lambda name: read_photograph(os.fsdecode(name), short_side), [path], tf.uint8
        )
        return tf.ensure_shape(image, (None, None, 3)), label

    rng = np.random.default_rng(seed)
    parts = ([], [])
    for label, paths in enumerate(files.values()):
        split = _split({path: examined[path] for path in paths}, validation_split, rng)
        for part, chosen in zip(parts, split, strict=True):
            part.extend((os.fspath(path), label) for path in chosen)
    sets = []
    for part in parts:
        # Class after class would leave the shuffling, which looks a few hundred ahead,
        # with batches of one class.
        paths, labels = zip(*[part[i] for i in rng.permutation(len(part))], strict=True)
        dataset = tf.data.Dataset.from_tensor_slices((list(paths), np.array(labels)))
        sets.append(dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE))
    return Photographs(
        *sets,
        list(files),
        *map(len, parts),
        f"The photographs are those of the folder {folder.name}.",
        folder.name,
    )


def class_counts(photos, classes):
    """Return how many photographs a dataset of (image, label) holds of each class."""
    labels = [int(label) for label in photos.map(lambda image, label: label)]
    return np.bincount(labels, minlength=classes)


def class_weights(counts):
    """Return the weight of each class that makes rare and common ones count the same.

    Args:
        counts: photographs of each class.

    Returns:
        {label: weight} for `Model.fit(class_weight=...)`; a photograph's weight is 1 on
        average.

    Raises:
        ValueError: if a class has none.
    """
    counts = np.asarray(counts)
    if (counts < 1).any():
        raise ValueError(f"Class {int(np.argmin(counts))} has no photographs to weigh.")
    weights = counts.sum() / (len(counts) * counts)
    return {label: float(weight) for label, weight in enumerate(weights)}


# From photographs to batches.


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


# How much is run.


def is_interactive():
    """Tell whether a person is looking at the output.

    A notebook that is executed for a page or for a test is run by a client that nobody can
    be asked through, and that says so with each cell (`allow_stdin` of the execute request
    in Jupyter's messaging protocol). Anywhere else, a terminal is watched and a file is not.
    """
    if "google.colab" in sys.modules:
        return True
    if "ipykernel" in sys.modules:
        from IPython import get_ipython

        kernel = getattr(get_ipython(), "kernel", None)
        if kernel is not None:
            return bool(kernel.get_parent().get("content", {}).get("allow_stdin"))
    return sys.stdout.isatty()


def verbosity():
    """Return `Model.fit`'s `verbose`: a moving bar (1) for a person, else a line an epoch (2)."""
    return 1 if is_interactive() else 2


def accelerator():
    """Return "gpu" or "tpu" where Keras's backend computes on one, else `None`."""
    kinds = device_kinds()
    return "tpu" if "tpu" in kinds else "gpu" if "gpu" in kinds else None


def jit_compile():
    """Return `Model.compile`'s `jit_compile`: off for TensorFlow on a CPU, else Keras's choice.

    There XLA, the compiler that it turns on, is slow at depthwise convolutions.
    """
    return "auto" if accelerator() or keras.backend.backend() != "tensorflow" else False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of the chapter consists of.

    Attributes:
        name: "quick", "full" or "brief".
        preset: the model, a name in `gcvit.PRESETS`.
        weights: its weights, as `GCViT.from_preset` takes them.
        image_size: side of the images in pixels.
        train_size: photographs to train on; `None` for all.
        validation_size: photographs to validate on; `None` for all.
        epochs: passes over them.
        batch_size: images a step.
        dtype: what it is computed in: "float32", or a mixed precision.
        recipe: name of one of `RECIPES`.
        notes: sentences that say why, and what is left out.
    """

    name: str
    preset: str
    weights: str
    image_size: int
    train_size: int | None
    validation_size: int | None
    epochs: int
    batch_size: int
    dtype: str
    recipe: str
    notes: tuple


def imagenet_weights():
    """Tell whether `gcvit_xxtiny`'s ImageNet weights are here, or could be fetched."""
    try:
        locate(PRESETS["gcvit_xxtiny"]["weights"]["imagenet"])
    except FetchError:
        return False
    return True


def precision():
    """Return what to compute in here: a mixed precision on an accelerator, else "float32"."""
    return {"gpu": "mixed_float16", "tpu": "mixed_bfloat16", None: "float32"}[accelerator()]


def run_setting():
    """Return what the environment variable `GCVIT_RUN` holds; "auto" where nothing is set.

    Raises:
        ValueError: if it is none of "auto", "quick", "full" and "brief".
    """
    setting = os.environ.get("GCVIT_RUN") or "auto"
    if setting not in ("auto", "quick", "full", "brief"):
        raise ValueError(f"GCVIT_RUN must be auto, quick, full or brief; got {setting!r}.")
    return setting


def run_plan(photos):
    """Return the `Plan` that the environment variable `GCVIT_RUN` asks for.

    "full" trains on all photographs by the original recipe; "quick" takes about a minute
    on two CPU cores; "auto", which stands where nothing is set, is full on an accelerator
    and quick on a CPU. "brief" is quick with a single epoch, for tests.

    Args:
        photos: `Photographs` to be trained on.

    Raises:
        ValueError: if `GCVIT_RUN` holds something else.
    """
    setting = run_setting()
    device, imagenet = accelerator(), imagenet_weights()
    full = setting == "full" or (setting == "auto" and device is not None)
    name = "full" if full else "quick" if setting == "auto" else setting
    notes = [
        f"GCVIT_RUN is {setting}, and there is {'a ' + device if device else 'no accelerator'}: "
        f"this is the {name} run."
    ]
    if imagenet:
        model = {"preset": "gcvit_xxtiny", "weights": "imagenet", "image_size": 224}
    else:
        model = {"preset": "gcvit_nano", "weights": "flowers", "image_size": 128}
        notes.append(
            "The ImageNet weights cannot be had here, so the model is gcvit_nano, which ships "
            "with the book."
        )
        if photos.name == "tf_flowers":
            notes.append(
                "It was trained on the training split of these very flowers: with a new head "
                "it relearns the head, and that is no test of transfer to new data."
            )
        else:
            notes.append("It was trained on flowers, so what follows is transfer to new data.")
    if full:
        sizes = {"train_size": None, "validation_size": None, "epochs": 5, "batch_size": 32}
    elif imagenet:
        sizes = {"train_size": 128, "validation_size": 64, "epochs": 3, "batch_size": 16}
    else:
        sizes = {"train_size": 256, "validation_size": 128, "epochs": 3, "batch_size": 32}
    if name == "brief":
        sizes["epochs"] = 1
    used = photos.take(sizes["train_size"], sizes["validation_size"])
    if used.train_size < photos.train_size or used.validation_size < photos.validation_size:
        notes.append(
            f"Left out: {photos.train_size - used.train_size} of {photos.train_size} training "
            f"photographs and {photos.validation_size - used.validation_size} of "
            f"{photos.validation_size} for validation. GCVIT_RUN=full takes them all."
        )
    recipe = "original" if full else "better"
    return Plan(
        name,
        **model,
        **sizes,
        dtype=precision(),
        recipe=recipe,
        notes=tuple(notes),
    )


# Recipes.


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


def layer_rates(model, decay=0.75):
    """Return a factor for the learning rate of each part of a model, by its name.

    The head and the last norm have 1, the last level `decay`, and each part before it
    `decay` times the next one's.

    Args:
        model: a `GCViT`.
        decay: the factor from part to part; default 0.75.
    """
    parts = ["patch_embed", *(level.name for level in model.levels)]
    return {part: decay ** (len(parts) - i) for i, part in enumerate(parts)}


@keras.saving.register_keras_serializable(package="gcvit")
class LayerwiseAdamW(keras.optimizers.AdamW):
    """AdamW with a learning rate for each part of the model.

    The weight decay is that of `keras.optimizers.AdamW`: it goes by the rate of the
    schedule, not by the part's.

    Args:
        learning_rate: a number or a schedule.
        rates: {name: factor}; a variable whose path holds the name learns at the factor
            times the rate. Default: none.
        **kwargs: what `keras.optimizers.AdamW` takes.
    """

    def __init__(self, learning_rate=1e-3, rates=None, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.rates = dict(rates or {})

    def build(self, variables):
        super().build(variables)
        self.variable_rates = [self.rate_of(variable) for variable in variables]

    def rate_of(self, variable):
        """Return the factor that a variable's learning rate gets."""
        names = set(variable.path.split("/"))
        return next((rate for name, rate in self.rates.items() if name in names), 1.0)

    def update_step(self, gradient, variable, learning_rate):
        # TensorFlow passes its own variable, which has lost its path but not its place.
        rate = self.variable_rates[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * rate)

    def get_config(self):
        return {**super().get_config(), "rates": self.rates}


def adamw(learning_rate, weight_decay=0.05, rates=None, **kwargs):
    """Return AdamW whose decay spares biases, norms, factors and the position tables.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: decay of the matrices; default 0.05.
        rates: see `LayerwiseAdamW`; default `None`: the same rate for all.
        **kwargs: what `keras.optimizers.AdamW` takes.
    """
    kwargs = {"learning_rate": learning_rate, "weight_decay": weight_decay, **kwargs}
    optimizer = LayerwiseAdamW(rates=rates, **kwargs) if rates else keras.optimizers.AdamW(**kwargs)
    # "bias" is part of the position tables' name too.
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


class BackupError(ValueError):
    """The state of a training run cannot be read, or is another run's."""


class TrainingState(keras.callbacks.Callback):
    """Keeps the best epoch's weights and, in a file, all that a run that is cut off needs.

    The file is replaced as a whole after each epoch: the weights, those of the best epoch,
    the optimizer's and the random generators' state, and the numbers so far. Where the
    optimizer averages the weights, the averages are what is validated and kept.

    Keras has a callback for each of the three. Together they lose the best weights when a
    run is cut off, and can be cut off themselves between two files.

    Args:
        model: a compiled model, whose optimizer is built.
        run: what must be the same for a run to go on: a dict of JSON's types.
        file: where the state is kept; default `None`: nowhere.
        patience: epochs without a lower validation loss after which the run ends; default
            `None`: it does not.
        leave_best: whether the model has the best epoch's weights at the end; default
            `True`; else the last epoch's.
    """

    def __init__(self, model, run, file=None, patience=None, leave_best=True):
        super().__init__()
        self.set_model(model)
        self.run = json.loads(json.dumps(run))
        self.file = Path(file) if file else None
        self.patience = patience
        self.leave_best = leave_best
        self.pass_number = tf.Variable(0, dtype="int64", trainable=False)
        self.logs = []
        self.best_epoch, self.best_weights = None, None
        self.trained = None  # the weights that are trained on, while averages stand in
        self.on_best = None  # called after an epoch that is the best so far
        self.interrupted = False

    @property
    def history(self):
        """The numbers of each epoch so far: {name: list}."""
        return {name: [logs[name] for logs in self.logs] for name in (self.logs or [{}])[0]}

    @property
    def ended(self):
        """Whether the patience is at its end."""
        waited = len(self.logs) - 1 - (self.best_epoch or 0)
        return self.patience is not None and waited >= self.patience

    def state(self):
        """Return the variables that a run goes on from."""
        return [*self.model.variables, *self.model.optimizer.variables]

    def resume(self):
        """Go on from the file, where there is one.

        Raises:
            BackupError: if the file is damaged or another run's.
        """
        if self.file is None or not self.file.exists():
            return
        way_out = "To start anew, delete it; to keep it, name another folder."
        try:
            with np.load(self.file) as kept:
                said = json.loads(str(kept["said"]))
                values = [kept[f"state{i}"] for i in range(said["states"])]
                best = [kept[f"best{i}"] for i in range(said["bests"])]
        except Exception as error:  # whatever a damaged file raises
            raise BackupError(f"{self.file} cannot be read ({error}). {way_out}") from error
        for name, here in self.run.items():
            if said["run"].get(name) != here:
                raise BackupError(
                    f"{self.file} is of another run: its {name} is {said['run'].get(name)}, here "
                    f"it is {here}. {way_out}"
                )
        for variable, value in zip(self.state(), values, strict=True):
            variable.assign(value)
        self.logs, self.best_epoch, self.best_weights = (
            said["logs"],
            said["best_epoch"],
            best or None,
        )

    def write(self):
        """Write what `resume` reads; the file is whole or the one before, never a part."""
        state = [keras.ops.convert_to_numpy(variable) for variable in self.state()]
        said = {"run": self.run, "logs": self.logs, "best_epoch": self.best_epoch}
        said |= {"states": len(state), "bests": len(self.best_weights or [])}
        arrays = {f"state{i}": value for i, value in enumerate(state)}
        arrays |= {f"best{i}": value for i, value in enumerate(self.best_weights or [])}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".part")
        with open(unfinished, "wb") as file:
            np.savez(file, said=json.dumps(said), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.file)

    def restore_best(self):
        """Give the model the best epoch's weights, if an epoch has been finished."""
        if self.best_weights is not None:
            self.model.set_weights(self.best_weights)

    def take_averages(self):
        """Have the averages stand in for the weights that are trained on, if there are any."""
        variables = self.model.trainable_variables
        self.trained = [keras.ops.convert_to_numpy(variable) for variable in variables]
        self.model.optimizer.finalize_variable_values(variables)

    def return_trained(self):
        """Undo `take_averages`."""
        if self.trained is not None:
            for variable, value in zip(self.model.trainable_variables, self.trained, strict=True):
                variable.assign(value)
            self.trained = None

    def on_epoch_begin(self, epoch, logs=None):
        self.pass_number.assign(epoch)

    def on_test_begin(self, logs=None):
        self.take_averages()

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append({name: float(value) for name, value in (logs or {}).items()})
        losses = self.history["val_loss"]
        if losses[-1] <= np.nanmin([*losses, np.inf]):  # never so for NaN
            self.best_epoch, self.best_weights = epoch, self.model.get_weights()
            if self.on_best:
                self.on_best()
        self.return_trained()
        if self.file:
            self.write()
        self.model.stop_training = self.ended

    def on_train_end(self, logs=None):
        if self.leave_best:
            self.restore_best()


@dataclasses.dataclass
class Run:
    """A training run, ready for `fit`.

    Attributes:
        train: batches to train on.
        validation: batches to validate on.
        epochs: passes over them.
        keeper: its `TrainingState`.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    epochs: int
    keeper: TrainingState


def fit(model, run, verbose=None, callbacks=(), on_best=None, **kwargs):
    """Train a model, from where the run was cut off if it was.

    An interrupt (Ctrl-C, or the notebook's stop button) ends the run with the weights of
    the best epoch; the backup stays, and the next call goes on from it. A run that ends by
    itself removes its backup.

    Args:
        model: a model that a recipe has prepared.
        run: what the recipe returned: a `Run`.
        verbose: see `keras.Model.fit`; default: `verbosity()`.
        callbacks: more of them. What they add to the logs of an epoch is kept with the rest.
        on_best: function without arguments that is called after each epoch that is the best
            so far, with its weights in the model; default `None`.
        **kwargs: what else `keras.Model.fit` takes, such as `class_weight`.

    Returns:
        Loss and metrics after each epoch, those before a cut too: {name: list}.

    Raises:
        BackupError: if the backup is damaged or another run's.
    """
    keeper = run.keeper
    keeper.on_best, keeper.interrupted = on_best, False
    keeper.resume()
    done = len(keeper.logs)
    if done:
        print(f"Going on after epoch {done} of {run.epochs}.")
    try:
        if done < run.epochs and not keeper.ended:
            model.fit(
                run.train,
                validation_data=run.validation,
                epochs=run.epochs,
                initial_epoch=done,
                callbacks=[*callbacks, keeper],
                shuffle=False,  # the batches are shuffled already
                verbose=verbosity() if verbose is None else verbose,
                **kwargs,
            )
        else:
            keeper.on_train_end()
    except KeyboardInterrupt:
        keeper.interrupted = True
        keeper.restore_best()
        best = keeper.best_epoch
        has = "those it had then" if best is None else f"those of epoch {best + 1}"
        print(f"\nInterrupted after {len(keeper.logs)} epochs; the weights are {has}.")
    else:
        if keeper.file:
            keeper.file.unlink(missing_ok=True)
    return keeper.history


def make_variables(model, labels, classes):
    """Make the variables of a compiled model's optimizer and metrics.

    Made in the first step, as they are by default, they have TensorFlow trace it twice,
    which takes longer than many a step. A backup is read into them.

    Raises:
        ValueError: if the model has no weights yet to make them for.
    """
    if not model.built:
        raise ValueError(
            "The model has no weights yet, so nothing can be trained. Build it first: "
            "model.build((None, height, width, 3))."
        )
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, labels, np.zeros((1, classes), "float32"))
    model.reset_metrics()


def _described(model, photos, plan, recipe, **settings):
    """Return what two runs share of which one can go on from the other's backup."""
    described = {
        "recipe": recipe,
        "classes": list(photos.class_names),
        "photographs": [photos.train_size, photos.validation_size],
        "weights' shapes": [list(variable.shape) for variable in model.weights],
    }
    for name in ("image_size", "epochs", "batch_size", "dtype"):
        described[name] = getattr(plan, name)
    return {**described, **settings}


def _distributed():
    """Tell whether a `keras.distribution` is set, which wants batches that can be shared out."""
    return keras.distribution.distribution() is not None


def _steps_an_epoch(photos, plan):
    whole, rest = divmod(photos.train_size, plan.batch_size)
    return whole + (rest > 0 and not _distributed())


def padded(batches, batch_size, count):
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


def _run(train, validation, photos, plan, keeper):
    """Return the `Run`. Where batches are shared out among devices all of them are full."""
    if _distributed():
        train = train.take(_steps_an_epoch(photos, plan))
        validation = padded(validation, plan.batch_size, photos.validation_size)
    return Run(train, validation, plan.epochs, keeper)


def original(model, photos, plan, backup=None, seed=0):
    """Prepare the recipe of the original notebook: flips, Adam at 1e-3, nothing else.

    Under a `keras.distribution` an epoch's last batch is left out if it is not full, and the
    validation's last one is `padded`: devices take equal parts.

    Args:
        model: a `GCViT` that gives probabilities; it is compiled.
        photos: `Photographs`.
        plan: the `Plan`, for the image size, the batch size and the epochs.
        backup: folder to keep the state of a training run in that is cut off; default
            `None`: it is not kept.
        seed: seed of the photographs' order and of all that is done to them; default 0.

    Returns:
        A `Run`, for `fit`.
    """
    size = plan.image_size, plan.batch_size
    model.compile(
        keras.optimizers.Adam(1e-3),
        "sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    make_variables(model, np.zeros(1), len(photos.class_names))
    described = _described(model, photos, plan, "original", seed=seed)
    keeper = TrainingState(model, described, backup and Path(backup) / "run.npz", leave_best=False)
    train = make_dataset(photos.train, *size, train=True, seed=seed, epoch=keeper.pass_number)
    return _run(train, make_dataset(photos.validation, *size), photos, plan, keeper)


def better(
    model, photos, plan, backup=None, seed=0, peak=1e-3, layer_decay=0.75, strength=0.2, patience=3
):
    """Prepare a recipe that holds on to what the pretrained model knows.

    AdamW with warmup and cosine, lower rates for the earlier layers, RandAugment, MixUp and
    CutMix, smoothed labels, averaged weights, and the best epoch's weights kept.

    Args:
        model: see `original`.
        photos: see `original`.
        plan: see `original`.
        backup: see `original`.
        seed: see `original`.
        peak: highest learning rate; default 1e-3.
        layer_decay: see `layer_rates`; default 0.75. From random weights there is nothing
            to hold on to: 1.
        strength: see `rand_augment`; default 0.2.
        patience: epochs without a lower validation loss after which it stops; default 3;
            `None`: it does not.

    Returns:
        See `original`. Labels are one-hot here.
    """
    classes, size = len(photos.class_names), (plan.image_size, plan.batch_size)
    steps = plan.epochs * _steps_an_epoch(photos, plan)
    model.compile(
        adamw(
            WarmupCosine(peak, steps // 10, steps),
            rates=layer_rates(model, layer_decay),
            global_clipnorm=1.0,
            use_ema=True,
            ema_momentum=1 - 1 / max(steps / 10, 2),  # the average spans a tenth of the run
        ),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    make_variables(model, np.zeros((1, classes)), classes)
    settings = {"peak": peak, "layer_decay": layer_decay, "strength": strength}
    described = _described(model, photos, plan, "better", seed=seed, **settings)
    keeper = TrainingState(model, described, backup and Path(backup) / "run.npz", patience)
    train = make_dataset(
        photos.train,
        *size,
        train=True,
        augment=rand_augment(strength),
        seed=seed,
        epoch=keeper.pass_number,
    )
    train = mix(one_hot(train, classes), seed, keeper.pass_number)
    validation = one_hot(make_dataset(photos.validation, *size), classes)
    return _run(train, validation, photos, plan, keeper)


RECIPES = {"original": original, "better": better}
"""The recipes by name."""


# Afterwards.


def _architecture(model):
    """Return the arguments that build a model like this one, as JSON's types."""
    named = inspect.signature(GCViT.__init__).parameters
    config = json.loads(json.dumps(model.get_config()))
    arguments = {name: value for name, value in config.items() if name in named}
    return {**arguments, "dtype": model.dtype_policy.name}


def save_classifier(path, model, class_names, image_size, **notes):
    """Write a model and what its use takes into one `.safetensors` file.

    The file holds tensors and text, nothing that is run when it is read.

    Args:
        path: the file; it is replaced only when the new one is whole.
        model: a built `GCViT`.
        class_names: name of each class.
        image_size: side in pixels of the images that it was trained on, or (height, width).
        **notes: what else is to be known of it: of JSON's types.
    """
    notes = {
        "config": _architecture(model),
        "classes": list(class_names),
        "image_size": image_size,
        "mean": MEAN.tolist(),
        "deviation": STD.tolist(),
        **notes,
    }
    save_safetensors(model, path, metadata={k: json.dumps(v) for k, v in notes.items()})


@dataclasses.dataclass
class Classifier:
    """A trained model with what its use takes.

    Attributes:
        model: a `GCViT` that gives probabilities.
        class_names: name of each class.
        image_size: side in pixels of the images that it takes, or (height, width).
        mean: what is subtracted from red, green and blue, 0 to 255.
        deviation: what they are divided by then.
        notes: what else the file says of the model.
    """

    model: GCViT
    class_names: list
    image_size: int | list
    mean: np.ndarray
    deviation: np.ndarray
    notes: dict

    def image(self, path):
        """Return a photograph as the model takes it: (height, width, 3) float32."""
        photograph = read_photograph(path, max(SHORT_SIDE, np.max(self.image_size)))
        return (resize(photograph, self.image_size).numpy() - self.mean) / self.deviation

    def predict(self, paths, batch_size=32):
        """Yield (path, probabilities of the classes, or the `DatasetError`) for each path.

        Args:
            paths: files of photographs, of which one batch is in memory at a time.
            batch_size: photographs that are predicted together; default 32.
        """

        def attempt(path):
            try:
                return self.image(path)
            except DatasetError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for begin in range(0, len(paths), batch_size):
                some = paths[begin : begin + batch_size]
                found = list(pool.map(attempt, some))
                images = [image for image in found if isinstance(image, np.ndarray)]
                if images:
                    # Filled up, so that all batches have the shape that was compiled.
                    missing = min(batch_size, len(paths)) - len(images)
                    batch = np.stack(images + [images[0]] * missing)
                    rows = iter(self.model.predict_on_batch(batch.astype("float32")))
                for path, image in zip(some, found, strict=True):
                    yield path, next(rows) if isinstance(image, np.ndarray) else image


def load_classifier(path):
    """Read what `save_classifier` wrote.

    Args:
        path: the file.

    Returns:
        A `Classifier`.

    Raises:
        gcvit.CheckpointError: if the file is damaged, or does not say what its use takes.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        notes = {name: _parsed(text) for name, text in training_notes(path).items()}
        preset = PRESETS.get(notes.get("preset"), {})
        image_size = notes.pop("image_size", preset.get("image_size"))
        config, class_names = notes.pop("config"), notes.pop("classes")
        model = GCViT(**config)
        model.build((None, *pair("image_size", image_size), 3))
    except Exception as error:  # whatever a foreign or damaged file leads to
        raise CheckpointError(
            f"{path} does not say what a classifier needs ({type(error).__name__}: {error}): its "
            "model, classes and image size. `python -m gcvit train` writes such a file."
        ) from error
    load_checkpoint(model, path)
    model.compile(jit_compile=jit_compile())
    scale = [np.float32(notes.pop(name, by)) for name, by in (("mean", MEAN), ("deviation", STD))]
    return Classifier(model, class_names, image_size, *scale, notes)


def _parsed(text):
    """Return what a text of JSON holds, or the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def confusion_matrix(labels, predicted, classes):
    """Return how often each class, a row, was taken for each class, a column.

    Args:
        labels: true class of each photograph.
        predicted: predicted class of each photograph.
        classes: number of classes.
    """
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (np.asarray(labels), np.asarray(predicted)), 1)
    return matrix


def precision_and_recall(matrix):
    """Return each class's precision and recall from a confusion matrix.

    Precision is the share of right answers among those that name the class; recall is the
    share of the class that is found. Where there is nothing to divide by, NaN.
    """
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
    probabilities = model.predict(batches, verbose=0)
    labels = np.concatenate([labels for _, labels in batches])
    matrix = confusion_matrix(labels, probabilities.argmax(-1), len(class_names))
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
    kept = [keras.ops.convert_to_numpy(variable) for variable in variables]
    stopwatch = _Stopwatch()
    model.fit(batch.repeat(steps), verbose=0, shuffle=False, callbacks=[stopwatch])
    for variable, value in zip(variables, kept, strict=True):
        variable.assign(value)
    return size * (steps - 1) / stopwatch.seconds


class _Stopwatch(keras.callbacks.Callback):
    """Times the steps of an epoch after the first, which may have to be compiled."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.began
