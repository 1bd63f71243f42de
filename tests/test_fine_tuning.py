"""Chapter 8: the photographs, the recipes and the numbers that judge them."""

import hashlib
import http.server
import io
import json
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import same_weights, serving, to_numpy, weights_of
from PIL import Image
from skimage import data

from gcvit import FetchError, GCViT, explain, fine_tuning
from gcvit.fine_tuning import (
    BackupError,
    DatasetError,
    Photographs,
    from_folder,
    read_photograph,
)

CLASSES = ["dandelion", "daisy", "tulips", "sunflowers", "roses"]


def write_flowers(root, count=20):
    """Write a `tf_flowers` as tensorflow-datasets prepares it, of a few plain images."""
    import tensorflow_datasets as tfds

    folder = root / "tf_flowers" / "3.0.1"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
    )
    features.save_config(folder)
    (folder / "label.labels.txt").write_text("\n".join(CLASSES))
    name, size = "tf_flowers-train.tfrecord-00000-of-00001", 0
    with tf.io.TFRecordWriter(str(folder / name)) as writer:
        for i in range(count):
            image = np.full((40, 50, 3), 10 * i, dtype="uint8")
            features_of = {
                "image": tf.train.Feature(
                    bytes_list=tf.train.BytesList(value=[tf.io.encode_jpeg(image).numpy()])
                ),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[i % 5])),
            }
            record = tf.train.Example(features=tf.train.Features(feature=features_of))
            record = record.SerializeToString()
            writer.write(record)
            size += len(record)
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "numBytes": str(size),
        "shardLengths": [str(count)],
    }
    info = {"name": "tf_flowers", "version": "3.0.1", "fileFormat": "tfrecord", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder / name


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Photographs.


def test_flowers_are_split_90_to_10_and_share_none(tmp_path):
    write_flowers(tmp_path)
    photos = fine_tuning.flowers(tmp_path)
    assert (photos.train_size, photos.validation_size) == (18, 2)
    values = [
        {int(np.median(image)) // 10 for image, _ in part}
        for part in (photos.train, photos.validation)
    ]
    assert len(values[0]) == 18 and len(values[1]) == 2 and not values[0] & values[1]
    assert photos.class_names == CLASSES and photos.name == "tf_flowers"


def test_half_prepared_flowers_are_refused_with_the_folder_s_name(tmp_path):
    record = write_flowers(tmp_path)
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=rf"{record.parent} .*the end of {record.name}"):
        fine_tuning.photographs(tmp_path)
    record.unlink()
    with pytest.raises(DatasetError, match=rf"{record.parent} .*{record.name} is missing"):
        fine_tuning.photographs(tmp_path)
    (record.parent / "features.json").unlink()
    with pytest.raises(DatasetError, match=r"features\.json is missing"):
        fine_tuning.photographs(tmp_path)


def test_without_network_it_is_found_out_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "FLOWERS_URL", f"http://127.0.0.1:{closed_port()}/x.tgz")
    began = time.monotonic()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    with pytest.raises(FetchError, match="is not prepared in .* cannot be fetched"):
        fine_tuning.flowers(tmp_path)
    photos = fine_tuning.photographs(tmp_path)
    assert time.monotonic() - began < 10
    assert photos.name == "scikit-image" and "cannot be had here" in photos.source
    assert len(photos.source.split(". ")) == 1


class _Flowers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args):
        pass


def test_flowers_are_fetched_within_limits_and_prepared(tmp_path, monkeypatch):
    """tensorflow-datasets gets an archive that is fetched and checked here."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for i in range(20):
            photo = tf.io.encode_jpeg(np.full((40, 50, 3), 10 * i, dtype="uint8")).numpy()
            member = tarfile.TarInfo(f"flower_photos/{CLASSES[i % 5]}/{i}.jpg")
            member.size = len(photo)
            archive.addfile(member, io.BytesIO(photo))
    body = stream.getvalue()
    known = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    registered = UrlInfo(size=known["size"], checksum=known["sha256"], filename="flower_photos.tgz")
    builder = tfds.builder_cls("tf_flowers")
    monkeypatch.setattr(builder, "url_infos", {fine_tuning.FLOWERS_URL: registered})
    monkeypatch.setattr(fine_tuning, "FLOWERS_ARCHIVE", {**known, "size": 7})
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    with serving(_Flowers) as server:
        server.body = body
        monkeypatch.setattr(fine_tuning, "FLOWERS_URL", f"{server.url}/flower_photos.tgz")
        with pytest.raises(FetchError, match="offers .* bytes; 7 were expected"):
            fine_tuning.flowers(tmp_path)
        monkeypatch.setattr(fine_tuning, "FLOWERS_ARCHIVE", known)
        photos = fine_tuning.flowers(tmp_path)
    assert (photos.train_size, photos.validation_size) == (18, 2)
    assert fine_tuning.flowers_are_here(tmp_path)
    assert len(list(fine_tuning.flowers(tmp_path).train)) == 18


def test_the_archive_is_the_one_that_tensorflow_datasets_knows():
    import tensorflow_datasets as tfds

    known = tfds.builder_cls("tf_flowers").url_infos[fine_tuning.FLOWERS_URL]
    assert {"size": known.size, "sha256": known.checksum} == fine_tuning.FLOWERS_ARCHIVE
    assert fine_tuning.FLOWERS_URL.endswith(f"/{known.filename}")


def occurs(patch, region):
    """Tell whether a patch was cut from a region: all pixels, at some place."""
    side = len(patch)
    height, width = (extent - side + 1 for extent in region.shape[:2])
    fits = np.ones((height, width), dtype=bool)
    for y, x in ((0, 0), (0, side - 1), (side - 1, 0), (side // 2, side // 2)):
        fits &= (region[y : y + height, x : x + width] == patch[y, x]).all(axis=-1)
    return any(
        np.array_equal(region[y : y + side, x : x + side], patch) for y, x in np.argwhere(fits)
    )


def test_embedded_patches_come_from_disjoint_parts_of_the_photographs():
    photos = fine_tuning.embedded_photographs(per_class=4)
    assert (photos.train_size, photos.validation_size) == (28, 7)
    names = list(fine_tuning._EMBEDDED)
    for name in names:
        regions = fine_tuning.embedded_regions(name)
        together = np.concatenate([regions["train"], regions["validation"]], axis=1)
        np.testing.assert_array_equal(together, getattr(data, name)())
    for part, other in (("train", "validation"), ("validation", "train")):
        patches = list(getattr(photos, part).as_numpy_iterator())
        assert np.bincount([label for _, label in patches]).tolist() == [len(patches) // 7] * 7
        for patch, label in patches:
            regions = fine_tuning.embedded_regions(names[label])
            assert occurs(patch, regions[part])
            assert not occurs(patch, regions[other])


def test_take_keeps_the_first_and_counts_them():
    photos = fine_tuning.embedded_photographs(per_class=4)
    few = photos.take(5, 3)
    assert (few.train_size, few.validation_size) == (5, 3)
    assert len(list(few.train)) == 5 and len(list(few.validation)) == 3
    assert photos.take(None, 10_000).validation_size == photos.validation_size == 7


# From photographs to batches.


def test_half_of_the_images_are_mirrored_and_each_pass_draws_anew():
    image = np.tile(np.arange(8, dtype="uint8")[None, :, None], (8, 1, 3))
    photos = tf.data.Dataset.from_tensors((image, 0)).repeat(400)
    batches = fine_tuning.make_dataset(photos, 8, batch_size=50, train=True)
    passes = []
    for _ in range(2):
        images = np.concatenate([images for images, _ in batches])
        rows = fine_tuning.denormalize(images)[:, 0, :, 0]
        mirrored = (rows == np.arange(8)[::-1]).all(axis=1)
        assert (mirrored | (rows == np.arange(8)).all(axis=1)).all()
        assert 150 < mirrored.sum() < 250
        passes.append(mirrored)
    assert (passes[0] != passes[1]).any()


def test_resize_is_bicubic_and_antialiased_as_pillow_does_it():
    image = data.chelsea()
    expected = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    resized = fine_tuning.resize(image, 64).numpy()
    assert np.abs(resized - expected).max() <= 2
    aliased = tf.image.resize(image, (64, 64), method="bicubic").numpy()
    assert np.abs(aliased - expected).max() > 20
    assert fine_tuning.resize(image, (32, 96)).shape == (32, 96, 3)
    assert resized.min() >= 0 and resized.max() <= 255


def test_validation_batches_are_the_resized_normalized_photographs_in_order():
    photos = fine_tuning.embedded_photographs(per_class=4)
    (images, labels), *_ = fine_tuning.make_dataset(photos.validation, 32, batch_size=4)
    for image, label, (photo, true) in zip(images, labels, photos.validation, strict=False):
        resized = fine_tuning.resize(photo, 32).numpy()
        by_hand = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(image, by_hand, atol=1e-5)
        assert label == true
    np.testing.assert_array_equal(
        fine_tuning.denormalize(fine_tuning.normalize(np.float32(photo))), photo
    )


@pytest.mark.numerics  # Keras's layers in it must not compute with the model's backend
def test_rand_augment_keeps_shape_and_range_and_draws_for_each_image():
    photos = tf.data.Dataset.from_tensors((data.chelsea(), 0)).repeat(24)
    batches = fine_tuning.make_dataset(
        photos, 32, batch_size=24, train=True, augment=fine_tuning.rand_augment(0.5)
    )
    images = fine_tuning.denormalize(next(iter(batches))[0])
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


# A folder of one's own.


def picture(value=0, size=(40, 30)):
    rng = np.random.default_rng(value)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype="uint8"))


def test_padding_changes_no_mean():
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3, "softmax")])
    loss = "sparse_categorical_crossentropy"
    model.compile("sgd", loss, weighted_metrics=["accuracy"])
    images, labels = np.random.default_rng(0).normal(size=(11, 2, 2, 3)), np.arange(11) % 3
    batches = tf.data.Dataset.from_tensor_slices((np.float32(images), labels)).batch(4)
    full = fine_tuning.padded(batches, 4, 11)
    assert [len(images) for images, _, _ in full] == [4, 4, 4]
    np.testing.assert_allclose(
        model.evaluate(full, verbose=0), model.evaluate(batches, verbose=0), rtol=1e-5
    )


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten photographs each."""
    for k, name in enumerate(("cats", "dogs")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            picture(100 * k + i).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


def contents(photos):
    return [
        {(image.numpy().tobytes(), int(label)) for image, label in part}
        for part in (photos.train, photos.validation)
    ]


def test_a_folder_is_split_by_its_seed_into_parts_that_share_none(folder):
    photos = from_folder(folder, validation_split=0.2)
    assert isinstance(photos, Photographs)
    assert (photos.train_size, photos.validation_size) == (16, 4)
    assert photos.class_names == ["cats", "dogs"]
    train, validation = contents(photos)
    assert len(train) == 16 and len(validation) == 4 and not train & validation
    for part, count in ((photos.train, 8), (photos.validation, 2)):
        assert fine_tuning.class_counts(part, 2).tolist() == [count, count]
    assert contents(from_folder(folder, 0.2)) == [train, validation]
    assert contents(from_folder(folder, 0.2, seed=1)) != [train, validation]
    images, labels = next(iter(fine_tuning.make_dataset(photos.train, 32, train=True)))
    assert images.shape == (16, 32, 32, 3) and sorted(labels.numpy()) == [0] * 8 + [1] * 8


def test_training_photographs_do_not_come_class_after_class(folder):
    labels = [int(label) for _, label in from_folder(folder).train]
    assert labels != sorted(labels)


def test_files_of_the_same_bytes_stay_in_one_part(folder):
    for i in range(10):
        original = folder / "cats" / f"{i}.png"
        (folder / "cats" / f"copy of {i}.png").write_bytes(original.read_bytes())
    photos = from_folder(folder, 0.2)
    train, validation = contents(photos)
    assert not train & validation and photos.train_size + photos.validation_size == 30


def test_every_mode_becomes_rgb(tmp_path):
    rgb = picture()
    gray = rgb.convert("L")
    for mode in ("L", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.tif"
        rgb.convert(mode).save(path)
        expected = np.array(rgb.convert(mode).convert("RGB"))
        np.testing.assert_array_equal(read_photograph(path), expected)
    deep = np.asarray(gray).astype("uint16") * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(
        read_photograph(tmp_path / "deep.png"), np.array(gray.convert("RGB"))
    )


def test_cmyk_jpeg_has_the_colors_of_the_picture(tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).convert("CMYK").save(tmp_path / "red.jpg")
    red = read_photograph(tmp_path / "red.jpg")
    assert red.shape == (32, 32, 3) and np.abs(red.mean(axis=(0, 1)) - [200, 30, 30]).max() < 6


def test_transparent_parts_become_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    read = read_photograph(tmp_path / "a.png")
    assert read[0, 0].tolist() == [255, 255, 255] and read[1, 1].tolist() == [255, 0, 0]
    image.convert("LA").save(tmp_path / "la.png")
    assert read_photograph(tmp_path / "la.png")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("short_side", [None, 20])
def test_the_camera_s_orientation_is_applied(tmp_path, short_side):
    image = Image.new("RGB", (64, 40), "black")
    image.paste("white", (0, 0, 64, 20))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, turn it clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = read_photograph(tmp_path / "turned.jpg", short_side)
    assert read.shape == ((64, 40, 3) if short_side is None else (32, 20, 3))
    half = read.shape[1] // 2
    assert read[:, half + 4 :].mean() > 240 and read[:, : half - 4].mean() < 15


def test_large_photographs_are_reduced_and_small_ones_are_not(tmp_path):
    picture(size=(400, 300)).save(tmp_path / "large.jpg")
    assert read_photograph(tmp_path / "large.jpg", 100).shape == (100, 133, 3)
    assert read_photograph(tmp_path / "large.jpg", 500).shape == (300, 400, 3)


def corrupt(folder):
    whole = (folder / "cats" / "3.png").read_bytes()
    (folder / "cats" / "3.png").write_bytes(whole[: len(whole) // 2])
    return r"cats/3\.png cannot be read"


def corrupt_jpeg(folder):
    path = folder / "dogs" / "photo.jpg"
    picture(5, (300, 300)).save(path)
    path.write_bytes(path.read_bytes()[:9000])
    return r"dogs/photo\.jpg cannot be read"


def nothing_in_it(folder):
    (folder / "dogs" / "3.png").write_bytes(b"")
    return r"dogs/3\.png cannot be read"


def not_a_photograph(folder):
    (folder / "dogs" / "notes.txt").write_text("three dogs")
    return r"dogs/notes\.txt cannot be read"


def not_in_a_class(folder):
    picture(7).save(folder / "loose.png")
    return r"loose\.png is in no class"


def empty_class(folder):
    (folder / "fish").mkdir()
    (folder / "fish" / ".DS_Store").write_bytes(b"x")
    return r"fish holds no photographs"


def only_one_of_a_class(folder):
    (folder / "fish").mkdir()
    picture(777).save(folder / "fish" / "only.png")
    return r"fish needs two different photographs.*only\.png"


def in_two_classes(folder):
    (folder / "dogs" / "cat.png").write_bytes((folder / "cats" / "1.png").read_bytes())
    return r"dogs/cat\.png is the same photograph as .*cats/1\.png"


def one_class(folder):
    (folder / "dogs").rename(folder.parent / "elsewhere")
    return r"pets holds 1 class folders \(cats\)"


def no_folder(folder):
    folder.rename(folder.parent / "elsewhere")
    return r"no folder .*pets"


@pytest.mark.parametrize(
    "spoil",
    [
        corrupt,
        corrupt_jpeg,
        nothing_in_it,
        not_a_photograph,
        not_in_a_class,
        empty_class,
        only_one_of_a_class,
        in_two_classes,
        one_class,
        no_folder,
    ],
)
def test_what_cannot_be_used_is_refused_by_name(folder, spoil):
    message = spoil(folder)
    with pytest.raises(DatasetError, match=message):
        from_folder(folder)


def test_litter_is_no_photograph_and_folders_inside_a_class_are_read(folder):
    for name in (".DS_Store", "Thumbs.db", "._0.png"):
        (folder / "cats" / name).write_bytes(b"x")
    for name in (".ipynb_checkpoints", "cats/.ipynb_checkpoints", "cats/kittens"):
        (folder / name).mkdir()
        picture(50 + len(name)).save(folder / name / "one.png")
    photos = from_folder(folder)
    assert photos.class_names == ["cats", "dogs"]
    assert photos.train_size + photos.validation_size == 21


def test_class_weights_make_classes_count_the_same():
    assert fine_tuning.class_weights([10, 30]) == {0: 2.0, 1: pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="Class 1 has no photographs"):
        fine_tuning.class_weights([3, 0])


# How much is run.


@pytest.mark.parametrize("device", [None, "gpu", "tpu"])
@pytest.mark.parametrize("setting", [None, "auto", "quick", "full", "brief"])
@pytest.mark.parametrize("imagenet", [True, False])
def test_the_plan_follows_the_setting(monkeypatch, setting, device, imagenet):
    monkeypatch.setattr(fine_tuning, "accelerator", lambda: device)
    monkeypatch.setattr(fine_tuning, "imagenet_weights", lambda: imagenet)
    monkeypatch.delenv("GCVIT_RUN", raising=False)
    if setting:
        monkeypatch.setenv("GCVIT_RUN", setting)
    nothing = tf.data.Dataset.range(0)
    photos = Photographs(nothing, nothing, CLASSES, 3303, 367, "", "tf_flowers")
    plan = fine_tuning.run_plan(photos)
    full = setting == "full" or (setting in (None, "auto") and device is not None)
    assert plan.name == ("full" if full else "brief" if setting == "brief" else "quick")
    assert plan.name != "brief" or plan.epochs == 1
    assert (plan.preset, plan.weights, plan.image_size) == (
        ("gcvit_xxtiny", "imagenet", 224) if imagenet else ("gcvit_nano", "flowers", 128)
    )
    if full:
        assert (plan.train_size, plan.epochs, plan.batch_size) == (None, 5, 32)
        assert plan.recipe == "original"
    else:
        assert 0 < plan.train_size <= 480 and plan.validation_size < 367
    said = " ".join(plan.notes)
    assert ("Left out" in said) == (not full)
    assert ("no test of transfer" in said) == (not imagenet)
    expected = {None: "float32", "gpu": "mixed_float16", "tpu": "mixed_bfloat16"}[device]
    assert plan.dtype == expected


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("GCVIT_RUN", "fast")
    with pytest.raises(ValueError, match="auto, quick, full or brief; got 'fast'"):
        fine_tuning.run_plan(fine_tuning.embedded_photographs(per_class=4))


def test_nobody_watches_a_test():
    assert not fine_tuning.is_interactive() and fine_tuning.verbosity() == 2


# Recipes.


def tiny_model(classes=2, **overrides):
    """Build a model of one level, for images of 32 px."""
    config = {"window_size": (8,), "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    model = GCViT(**{**config, "num_classes": classes, "path_drop": 0.0, **overrides})
    model.build((None, 32, 32, 3))
    return model


def test_warmup_cosine_by_hand():
    schedule = fine_tuning.WarmupCosine(1.0, 4, 12)
    rates = [float(schedule(step)) for step in (0, 1, 3, 4, 6, 8, 12, 99)]
    cosine = 0.5 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(rates, [0.25, 0.5, 1, 1, cosine, 0.5, 0, 0], atol=1e-6)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert float(again(1)) == 0.5
    assert float(fine_tuning.WarmupCosine(1.0, 0, 0)(0)) == 1.0


def test_weight_decay_spares_biases_norms_factors_and_tables():
    model = tiny_model(layer_scale=0.1)
    optimizer = fine_tuning.adamw(1.0, weight_decay=0.5)
    variables = model.trainable_variables
    before = weights_of(model)
    for variable in variables:  # so that each would be seen to shrink
        variable.assign(np.ones(variable.shape))
    optimizer.apply([np.zeros(variable.shape, "float32") for variable in variables], variables)
    shrunk = {variable.path for variable in variables if to_numpy(variable).mean() < 0.9}
    spared = {variable.path for variable in variables} - shrunk
    assert shrunk == {v.path for v in variables if v.path.endswith("kernel")}
    endings = {path.rsplit("/", 1)[1] for path in spared}
    assert endings == {
        "bias", "gamma", "beta", "gamma1", "gamma2", "relative_position_bias_table"
    }  # fmt: skip
    assert len(before) == len(model.weights)


def test_earlier_layers_learn_at_lower_rates():
    config = {"window_size": (8, 4), "depths": (1, 1), "num_heads": (1, 2)}
    model = GCViT(**config, embed_dim=4, num_classes=2)
    model.build((None, 32, 32, 3))
    rates = fine_tuning.layer_rates(model, decay=0.5)
    assert rates == {"patch_embed": 0.125, "levels_0": 0.25, "levels_1": 0.5}
    optimizer = fine_tuning.adamw(0.1, weight_decay=0.0, rates=rates)
    variables = model.trainable_variables
    before = [to_numpy(variable) for variable in variables]
    # Adam's first step has the length of the learning rate, whatever the gradient.
    optimizer.apply([np.ones(variable.shape, "float32") for variable in variables], variables)
    for variable, value in zip(variables, before, strict=True):
        part = variable.path.split("/")[1]
        moved = value - to_numpy(variable)
        np.testing.assert_allclose(moved, 0.1 * rates.get(part, 1.0), rtol=1e-3)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.rates == rates


def plain_model(drop_rate=0.0):
    """Build a model without levels: what the callbacks do, they do to any, and faster."""
    layers = [keras.layers.AveragePooling2D(8), keras.layers.Flatten()]
    layers.append(keras.layers.Dropout(drop_rate))
    model = keras.Sequential([keras.Input((32, 32, 3)), *layers])
    model.add(keras.layers.Dense(2, activation="softmax"))
    model.levels = []
    return model


def plan_for(epochs, **overrides):
    plan = fine_tuning.Plan(
        "quick", "gcvit_nano", "flowers", 32, None, None, epochs, 8, "float32", "better", ()
    )
    return fine_tuning.dataclasses.replace(plan, **overrides)


def dark_and_bright():
    """Return sixteen photographs, dark ones and bright ones."""
    rng = np.random.default_rng(0)
    labels = np.arange(16) % 2
    images = rng.integers(0, 128, (16, 32, 32, 3)) + 100 * labels[:, None, None, None]
    photos = tf.data.Dataset.from_tensor_slices((images.astype("uint8"), labels))
    return Photographs(photos, photos, ["dark", "bright"], 16, 16, "")


@pytest.fixture(scope="module")
def two_classes():
    """Dark and bright photographs, and the batches that they make."""
    photos = dark_and_bright()
    batches = fine_tuning.make_dataset(photos.validation, 32, 8)
    return photos, fine_tuning.one_hot(batches, 2)


@pytest.fixture
def undistorted(monkeypatch):
    """Spare a run the augmentation, which takes TensorFlow a second to trace."""
    monkeypatch.setattr(fine_tuning, "rand_augment", lambda strength: fine_tuning.flip)
    monkeypatch.setattr(fine_tuning, "mix", lambda batches, seed, epoch: batches)


class At(keras.callbacks.Callback):
    """Does something in the middle of an epoch."""

    def __init__(self, epoch, act):
        super().__init__()
        self.wanted, self.act = epoch, act

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.wanted and batch == 0:
            self.act()


def interrupt():
    raise KeyboardInterrupt


DYING_RUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_fine_tuning import At, dark_and_bright, learning_model, prepared
from gcvit import fine_tuning

model = learning_model(0)
run = prepared(model, dark_and_bright(), sys.argv[1])
die = At(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
fine_tuning.fit(model, run, verbose=0, callbacks=[die])
"""


def learning_model(seed):
    """Build a model in whose training something is random: dropout, as drop path is."""
    keras.utils.set_random_seed(seed)
    return plain_model(drop_rate=0.3)


def prepared(model, photos, backup=None):
    return fine_tuning.better(model, photos, plan_for(4), backup=backup, peak=3e-3)


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    """SIGKILL in the middle of an epoch; then the same call again, in another process."""
    photos = dark_and_bright()
    script = [sys.executable, "-c", DYING_RUN, str(tmp_path), str(Path(__file__).parent)]
    died = subprocess.run(script, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]

    whole = learning_model(0)
    start = weights_of(whole)
    history = fine_tuning.fit(whole, prepared(whole, photos), verbose=0)
    assert not same_weights(whole, start)

    resumed = learning_model(1)
    run = prepared(resumed, photos, tmp_path)
    counted = []
    counter = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: counted.append(epoch)
    )
    later = fine_tuning.fit(resumed, run, verbose=0, callbacks=[counter])
    assert counted == [2, 3]
    for name, values in history.items():
        np.testing.assert_allclose(later[name], values, atol=1e-6, err_msg=name)
    for ours, theirs in zip(weights_of(resumed), weights_of(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert not list(tmp_path.iterdir())


def test_the_variables_of_a_gcvit_hold_its_random_generators():
    model = tiny_model(path_drop=0.5, drop_rate=0.1)
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype("float32")
    before = [to_numpy(variable) for variable in model.variables]
    first, second = (to_numpy(model(images, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(to_numpy(model(images, training=True)), first, atol=1e-6)


@pytest.mark.usefixtures("undistorted")
def test_the_averaged_weights_of_the_best_epoch_are_left(two_classes):
    photos, batches = two_classes
    keras.utils.set_random_seed(0)
    model = plain_model()
    run = fine_tuning.better(model, photos, plan_for(3))
    history = fine_tuning.fit(model, run, verbose=0)
    loss = model.evaluate(batches, verbose=0)[0]
    assert loss == pytest.approx(min(history["val_loss"]), rel=1e-4)

    # Timing its steps leaves the model as it is.
    before = weights_of(model), int(model.optimizer.iterations)
    assert fine_tuning.training_speed(model, batches, steps=2) > 0
    assert int(model.optimizer.iterations) == before[1]
    assert same_weights(model, before[0])


def worsening(photos):
    """Return photographs with a validation part on which each epoch does worse."""
    wrong = photos.validation.map(lambda image, label: (image, 1 - label))
    return fine_tuning.dataclasses.replace(photos, validation=wrong)


@pytest.mark.usefixtures("undistorted")
def test_a_run_remembers_its_best_epoch_and_patience_when_it_is_cut_off(two_classes, tmp_path):
    photos = worsening(two_classes[0])
    whole = plain_model()
    start = weights_of(whole)
    run = fine_tuning.better(whole, photos, plan_for(9), peak=3e-3, patience=3)
    history = fine_tuning.fit(whole, run, verbose=0)
    assert len(history["loss"]) < 9 and int(np.argmin(history["val_loss"])) == 0

    model = plain_model()
    model.set_weights(start)
    run = fine_tuning.better(model, photos, plan_for(9), tmp_path, peak=3e-3, patience=3)
    with pytest.raises(ZeroDivisionError):
        fine_tuning.fit(model, run, verbose=0, callbacks=[At(2, lambda: 1 / 0)])
    model = plain_model()
    run = fine_tuning.better(model, photos, plan_for(9), tmp_path, peak=3e-3, patience=3)
    later = fine_tuning.fit(model, run, verbose=0)
    assert later["val_loss"] == pytest.approx(history["val_loss"], rel=1e-5)
    for ours, theirs in zip(weights_of(model), weights_of(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("recipe", ["original", "better"])
@pytest.mark.usefixtures("undistorted")
def test_an_interrupt_leaves_the_best_weights_and_the_backup(two_classes, tmp_path, capsys, recipe):
    photos, _ = two_classes
    model = plain_model()
    run = fine_tuning.RECIPES[recipe](model, photos, plan_for(4), backup=tmp_path)
    history = fine_tuning.fit(model, run, verbose=0, callbacks=[At(2, interrupt)])
    assert len(history["loss"]) == 2
    best = int(np.argmin(history["val_loss"]))
    assert f"after 2 epochs; the weights are those of epoch {best + 1}" in capsys.readouterr().out
    loss = model.evaluate(run.validation, verbose=0)[0]
    assert loss == pytest.approx(history["val_loss"][best], rel=1e-4)
    again = fine_tuning.fit(model, run, verbose=0)
    assert len(again["loss"]) == 4 and again["loss"][:2] == history["loss"]


@pytest.mark.parametrize("recipe", fine_tuning.RECIPES.values())
def test_a_model_without_weights_is_refused(recipe):
    photos = fine_tuning.embedded_photographs(per_class=4)
    plan = fine_tuning.Plan("t", "", None, 32, None, None, 1, 8, "float32", "", ())
    with pytest.raises(ValueError, match="Build it first"):
        recipe(GCViT((4, 2), 8, (1, 1), (1, 2), num_classes=7), photos, plan)


@pytest.mark.usefixtures("undistorted")
def test_an_interrupt_in_the_first_epoch_leaves_a_usable_model(two_classes, capsys):
    photos, batches = two_classes
    model = plain_model()
    run = fine_tuning.better(model, photos, plan_for(2))
    assert fine_tuning.fit(model, run, verbose=0, callbacks=[At(0, interrupt)]) == {}
    assert "those it had then" in capsys.readouterr().out
    assert np.isfinite(model.evaluate(batches, verbose=0)[0])


@pytest.mark.usefixtures("undistorted")
def test_a_backup_of_another_run_or_a_damaged_one_is_refused(two_classes, tmp_path):
    photos, _ = two_classes

    def attempt(epochs=4, **settings):
        model = plain_model()
        run = fine_tuning.better(model, photos, plan_for(epochs), tmp_path, **settings)
        fine_tuning.fit(model, run, verbose=0, callbacks=[At(1, interrupt)])

    attempt()
    with pytest.raises(
        BackupError, match=r"run\.npz is of another run: its epochs is 4, here .* 5"
    ):
        attempt(5)
    with pytest.raises(BackupError, match=r"its peak is 0\.001, here it is 0\.1\. To start anew"):
        attempt(peak=0.1)
    whole = (tmp_path / "run.npz").read_bytes()
    (tmp_path / "run.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackupError, match=r"run\.npz cannot be read"):
        attempt()


def test_a_backup_of_a_gcvit_holds_the_state_of_its_optimizer(tmp_path):
    models = []
    for value in (1.0, 0.0):
        model = tiny_model()
        optimizer = fine_tuning.adamw(1e-3, rates=fine_tuning.layer_rates(model), use_ema=True)
        model.compile(optimizer, "categorical_crossentropy")
        optimizer.build(model.trainable_variables)
        for variable in optimizer.variables:
            variable.assign(np.full(variable.shape, value))
        models.append(model)
    models[0].save_weights(tmp_path / "latest.weights.h5")
    models[1].load_weights(tmp_path / "latest.weights.h5")
    assert same_weights(models[1], weights_of(models[0]))
    assert all((to_numpy(variable) == 1).all() for variable in models[1].optimizer.variables)


@pytest.mark.usefixtures("undistorted")
def test_early_stopping_leaves_the_best_epoch_s_averaged_weights(two_classes):
    photos = worsening(two_classes[0])
    keras.utils.set_random_seed(0)
    model = plain_model()
    run = fine_tuning.better(model, photos, plan_for(8), peak=3e-3, patience=1)
    history = fine_tuning.fit(model, run, verbose=0)
    assert len(history["loss"]) < 8
    best = min(history["val_loss"])
    assert best < history["val_loss"][-1]
    assert model.evaluate(run.validation, verbose=0)[0] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "build", "dtype"),
    [("original", plain_model, "float32"), ("better", tiny_model, "mixed_float16")],
)
def test_a_recipe_trains_a_model_in_its_precision(two_classes, recipe, build, dtype):
    photos, _ = two_classes
    keras.utils.set_random_seed(0)
    model = build() if dtype == "float32" else build(dtype=dtype)
    before = weights_of(model)
    plan = plan_for(1, dtype=dtype)
    fine_tuning.fit(model, fine_tuning.RECIPES[recipe](model, photos, plan), verbose=0)
    after = weights_of(model)
    assert all(np.isfinite(value).all() for value in after)
    assert any((now != then).any() for now, then in zip(after, before, strict=True))


# Afterwards.


def test_confusion_precision_and_recall_by_hand():
    matrix = fine_tuning.confusion_matrix([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0], 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    precision, recall = fine_tuning.precision_and_recall(matrix)
    np.testing.assert_allclose(precision, [2 / 4, 1 / 2, np.nan, np.nan])
    np.testing.assert_allclose(recall, [2 / 3, 1 / 2, 0, np.nan])


def test_calibration_error_by_hand():
    confident = [0.95, 0.95, 0.65, 0.65]
    probabilities = np.stack([confident, 1 - np.array(confident)], axis=1)
    found = fine_tuning.calibration([0, 0, 0, 1], probabilities)
    np.testing.assert_allclose(found.confidence, [0.65, 0.95])
    np.testing.assert_allclose(found.accuracy, [0.5, 1.0])
    assert found.count.tolist() == [2, 2]
    assert found.error == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)
    sure = fine_tuning.calibration([0, 1], np.eye(2))
    assert sure.error == 0 and sure.count.tolist() == [2]


def test_pipeline_speed_counts_images():
    def slow(image, label):
        return tf.numpy_function(lambda x: (time.sleep(0.01), x)[1], [image], tf.float32), label

    photos = tf.data.Dataset.from_tensors((np.zeros((4, 4, 3), "float32"), 0)).repeat(60)
    speed = fine_tuning.pipeline_speed(photos.map(slow).batch(10))
    assert 40 < speed < 110


def test_grad_cam_of_the_last_map_weighs_channels_with_the_head():
    keras.utils.set_random_seed(0)
    config = {"window_size": (4, 4), "depths": (2, 2), "num_heads": (1, 2)}
    model = GCViT(**config, embed_dim=8, num_classes=3)
    model.build((None, 64, 64, 3))
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    maps = to_numpy(model.features(images)["stage_1"])
    kernel = to_numpy(model.head.kernel)[:, [2, 0]].T
    by_hand = np.maximum((maps * kernel[:, None, None]).sum(-1), 0) / maps[0, ..., 0].size
    np.testing.assert_allclose(explain.grad_cam(model, images, [2, 0]), by_hand, atol=1e-6)
    earlier = explain.grad_cam(model, images, [2, 0], level=0)
    assert earlier.shape == (2, 16, 16) and earlier.min() >= 0 and earlier.max() > 0
