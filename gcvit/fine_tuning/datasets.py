"""Photographs with labels: the flowers, the embedded ones, and a folder of one's own."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import math
import os
import re
import stat
from pathlib import Path

import numpy as np
import tensorflow as tf

from gcvit.checks import pair
from gcvit.fetch import FetchError, fetch
from gcvit.images import DatasetError, read_photograph
from gcvit.readers import CheckpointError
from gcvit.weights import FORMATS, read_tensors

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


@dataclasses.dataclass
class Photographs:
    """Photographs with labels, in parts that share none.

    Attributes:
        train: `tf.data.Dataset` of (image, label): (height, width, 3) uint8, and an integer.
        validation: the same, of other photographs: what is chosen is chosen by them.
        train_labels: `tf.data.Dataset` of the labels in `train`, for which none is decoded.
        class_names: name of each label.
        train_size: number of photographs in `train`.
        validation_size: number of photographs in `validation`.
        source: one sentence that says what they are and why these.
        name: "tf_flowers", "scikit-image", or the name of a folder.
        test: as `validation`, of other photographs again, which are looked at once, at the
            end; `None` where there are too few for a third part.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    train_labels: tf.data.Dataset
    class_names: list
    train_size: int
    validation_size: int
    source: str
    name: str = ""
    test: tf.data.Dataset | None = None

    def take(self, train_size=None, validation_size=None):
        """Return the first so many to train on and to validate on; `None` keeps all."""
        train_size = min(train_size or self.train_size, self.train_size)
        validation_size = min(validation_size or self.validation_size, self.validation_size)
        return dataclasses.replace(
            self,
            train=self.train.take(train_size),
            validation=self.validation.take(validation_size),
            train_labels=self.train_labels.take(train_size),
            train_size=train_size,
            validation_size=validation_size,
        )


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
    """Return `tf_flowers`, eight tenths to train on, one to validate on, and the last to test.

    It comes in one part, in a random order, by which it is cut.

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
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=archive and archive.parent)
    builder = tfds.builder("tf_flowers", data_dir=flowers_folder(data_dir).parents[1])
    try:
        builder.download_and_prepare(download_config=config)
    except OSError as error:  # also what a download that breaks off raises
        raise FetchError(f"tf_flowers cannot be prepared: {error}") from error
    splits = ["train[:80%]", "train[80%:90%]", "train[90%:]"]
    train, validation, test = builder.as_dataset(splits, as_supervised=True)
    encoded = builder.as_dataset(
        splits[0], as_supervised=True, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return Photographs(
        train,
        validation,
        encoded.map(lambda image, label: label),
        builder.info.features["label"].names,
        *(builder.info.splits[split].num_examples for split in splits[:2]),
        "The photographs are tf_flowers: five kinds of flowers from Flickr.",
        "tf_flowers",
        test,
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
        sets["train"].map(lambda image, label: label),
        list(_EMBEDDED.values()),
        len(parts["train"][1]),
        len(parts["validation"][1]),
        "The photographs are patches of the pictures that come with scikit-image, cut from "
        "different parts of each picture for training and for validation.",
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
        embedded = embedded_photographs()
        embedded.source = embedded.source.replace(
            "The photographs", "tf_flowers is not available here, so the photographs"
        )
        return embedded


# What operating systems and network drives leave in folders; not photographs.
JUNK_FILES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("__macosx", "icon\r", "network trash folder", "temporary items"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found"),
}


def is_junk(path):
    return path.name.startswith(".") or path.name.lower() in JUNK_FILES


def _is_output(path, is_folder):
    """Tell whether this package has written this: a model, or the backup of a training."""
    if is_folder:
        return path.suffix == ".backup" and {each.name for each in _entries(path)} <= {"run.npz"}
    if not path.name.endswith(FORMATS):
        return False
    try:
        _, tensors = read_tensors(path)
    except CheckpointError:
        return False
    return any(re.match(r"(layers/)?patch_embed[./]|stem\.conv1\.", name) for name in tensors)


SHORT_SIDE = 320
"""Pixels that photographs' shorter side keeps at least: more than a 224 px image needs, and
little enough to be shuffled in memory."""


def short_side_for(image_size, crop=1.0):
    """Return the `short_side` that photographs are read with for a model's images."""
    return max(SHORT_SIDE, math.ceil(max(pair("image_size", image_size)) / crop))


def _digest(path):
    """Return the hash of a photograph's file, or the error if it is damaged."""
    try:
        read_photograph(path, SHORT_SIDE)  # reads all of it, though at a fraction
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (DatasetError, OSError) as error:
        return error


def _entries(folder):
    """Return {path: whether it is a folder} of what lies in a folder, in order.

    Junk is left out, and so is what `gcvit train` writes, or it could not be run twice there.

    Raises:
        DatasetError: if something in it cannot be opened, or is neither file nor folder.
    """
    entries = {}
    try:
        for path in sorted(folder.iterdir()):
            if is_junk(path):
                continue
            mode = path.stat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise DatasetError(f"{path} is neither a file nor a folder. Move it elsewhere.")
            if not _is_output(path, stat.S_ISDIR(mode)):
                entries[path] = stat.S_ISDIR(mode)
    except OSError as error:
        raise DatasetError(
            f"{error.filename or folder} cannot be opened ({error.strerror}). Fix it, or move it "
            "out of the folder."
        ) from error
    return entries


def _files_in(folder):
    """Return all files in a folder and the folders in it, links followed, without junk."""
    # A link to a folder that has been seen, or that this one lies in, leads in a circle.
    seen = {_identity(above) for above in folder.resolve().parents}

    def scan(folder):
        if _identity(folder) in seen:
            return
        seen.add(_identity(folder))
        for path, is_folder in _entries(folder).items():
            if is_folder:
                yield from scan(path)
            else:
                yield path

    return sorted(scan(folder))


def _identity(folder):
    status = folder.stat()
    return status.st_dev, status.st_ino


PARTS = {"train", "training", "val", "valid", "validation", "test"}
"""What people call the parts of a data set, each of which has a folder for each class."""


def _folders_in(folder):
    return [path for path, is_folder in _entries(folder).items() if is_folder]


def _files_by_class(folder):
    """Return {class name: its files}, or raise a `DatasetError` on what is out of place."""
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}.")
    entries = _entries(folder)
    stray = [path for path, is_folder in entries.items() if not is_folder]
    if stray:
        raise DatasetError(
            f"{stray[0]} is in no class: each photograph belongs in the folder of its class."
        )
    if len(entries) < 2:
        raise DatasetError(
            f"{folder} holds {len(entries)} class folder{'' if entries else 's'}"
            + "".join(f" ({path.name})" for path in entries)
            + "; at least two are needed."
        )
    if {path.name.lower() for path in entries} <= PARTS and any(map(_folders_in, entries)):
        raise DatasetError(
            f"{folder} holds the parts of a data set ({', '.join(path.name for path in entries)}), "
            "not its classes: give one part. The validation photographs are drawn from it."
        )
    files = {}
    for entry in entries:
        files[entry.name] = _files_in(entry)
        if not files[entry.name]:
            raise DatasetError(f"{entry} holds no photographs. Fill it, or remove it.")
    return files


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
    """Return files, and the files in folders, in their order, without junk.

    Raises:
        DatasetError: if there is no such file or folder, or one inside cannot be opened, or if
            a folder holds none.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = _files_in(path)
            if not inside:
                raise DatasetError(f"{path} holds no photographs.")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise DatasetError(f"There is no file or folder {path}.")
    return files


def _listed(paths, most=20):
    names = [os.fspath(path) for path in paths[:most]]
    return ", ".join(names) + (f" and {len(paths) - most} others" if len(paths) > most else "")


def from_folder(folder, validation_split=0.1, seed=0, short_side=SHORT_SIDE):
    """Return the photographs of a folder that holds a folder for each class.

    Every file is decoded once before any is trained on, and none is left out: what cannot
    be read is refused by name. Hidden files, what operating systems and network drives leave
    behind, and what `gcvit train` writes are no photographs. Links are followed, and one that
    leads in a circle ends. Of each class the same share is for validation; files of the same
    bytes are in the same part.

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
        ValueError: for a share that is not between 0 and 1.
    """
    if not 0 < validation_split < 1:
        raise ValueError(f"validation_split must be between 0 and 1; got {validation_split!r}.")
    files = _files_by_class(Path(folder))
    digests = _digests(files)

    def read(path, label):
        image = tf.numpy_function(
            lambda name: read_photograph(os.fsdecode(name), short_side), [path], tf.uint8
        )
        return tf.ensure_shape(image, (None, None, 3)), label

    rng = np.random.default_rng(seed)
    parts = ([], [])
    for label, paths in enumerate(files.values()):
        split = _split({path: digests[path] for path in paths}, validation_split, rng)
        for part, chosen in zip(parts, split, strict=True):
            # Bytes: TensorFlow takes no name whose letters are not of the system's encoding.
            part.extend((os.fsencode(path), label) for path in chosen)
    sets = []
    for part in parts:
        # Class after class would leave the shuffling, which looks a few hundred ahead,
        # with batches of one class.
        paths, labels = zip(*[part[i] for i in rng.permutation(len(part))], strict=True)
        sets.append(tf.data.Dataset.from_tensor_slices((list(paths), np.array(labels))))
    return Photographs(
        *(files.map(read, num_parallel_calls=tf.data.AUTOTUNE) for files in sets),
        sets[0].map(lambda path, label: label),
        list(files),
        *map(len, parts),
        f"The photographs are those of the folder {Path(folder).name}.",
        Path(folder).name,
    )


def _digests(files):
    """Return {file: hash of its bytes} of {class name: files}, or raise a `DatasetError`."""
    listed = [path for paths in files.values() for path in paths]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(listed, pool.map(_digest, listed), strict=True))
    errors = {path: error for path, error in digests.items() if isinstance(error, Exception)}
    if errors:
        first, *others = errors
        more = f" {len(others)} more cannot be read: {_listed(others)}." if others else ""
        raise DatasetError(f"{errors[first]}{more}")
    owners = {}
    for name, paths in files.items():
        for path in paths:
            owner, first = owners.setdefault(digests[path], (name, path))
            if owner != name:
                raise DatasetError(f"{path} is the same photograph as {first}, of another class.")
        if len({digests[path] for path in paths}) < 2:
            raise DatasetError(
                f"The class {name} needs at least two different photographs, one to train on and "
                f"one to validate on; it holds {', '.join(map(os.fspath, paths))}."
            )
    return digests


def class_counts(photos):
    """Return how many training photographs there are of each class: (classes,)."""
    labels = [int(label) for label in photos.train_labels]
    return np.bincount(labels, minlength=len(photos.class_names))


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
