"""Photographs with labels: whole, split so that the parts share none, refused by name."""

import errno
import hashlib
import http.server
import io
import json
import os
import socket
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    picture,
    serving,
    tiny_model,
)
from skimage import data

from gcvit import FetchError, fine_tuning
from gcvit.fine_tuning import (
    DatasetError,
    Photographs,
    datasets,
    from_folder,
)
from gcvit.weights import save_safetensors

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


def test_flowers_are_cut_into_three_parts_that_share_none(tmp_path):
    write_flowers(tmp_path)
    photos = fine_tuning.flowers(tmp_path)
    assert (photos.train_size, photos.validation_size) == (16, 2)
    values = [
        {int(np.median(image)) // 10 for image, _ in part}
        for part in (photos.train, photos.validation, photos.test)
    ]
    assert [len(part) for part in values] == [16, 2, 2] and len(set.union(*values)) == 20
    assert photos.class_names == CLASSES and photos.name == "tf_flowers"
    assert fine_tuning.class_counts(photos).sum() == 16
    assert [int(label) for label in photos.train_labels] == [int(k) for _, k in photos.train]


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
    monkeypatch.setattr(datasets, "FLOWERS_URL", f"http://127.0.0.1:{closed_port()}/x.tgz")
    began = time.monotonic()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    with pytest.raises(FetchError, match="is not prepared in .* cannot be fetched"):
        fine_tuning.flowers(tmp_path)
    photos = fine_tuning.photographs(tmp_path)
    assert time.monotonic() - began < 10
    assert photos.name == "scikit-image" and "is not available here" in photos.source
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
    monkeypatch.setattr(builder, "url_infos", {datasets.FLOWERS_URL: registered})
    monkeypatch.setattr(datasets, "FLOWERS_ARCHIVE", {**known, "size": 7})
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    with serving(_Flowers) as server:
        server.body = body
        monkeypatch.setattr(datasets, "FLOWERS_URL", f"{server.url}/flower_photos.tgz")
        with pytest.raises(FetchError, match="offers .* bytes; 7 were expected"):
            fine_tuning.flowers(tmp_path)
        monkeypatch.setattr(datasets, "FLOWERS_ARCHIVE", known)
        photos = fine_tuning.flowers(tmp_path)
    assert (photos.train_size, photos.validation_size) == (16, 2)
    assert fine_tuning.flowers_are_here(tmp_path)
    assert len(list(fine_tuning.flowers(tmp_path).train)) == 16


def test_the_archive_is_the_one_that_tensorflow_datasets_knows():
    import tensorflow_datasets as tfds

    known = tfds.builder_cls("tf_flowers").url_infos[datasets.FLOWERS_URL]
    assert {"size": known.size, "sha256": known.checksum} == datasets.FLOWERS_ARCHIVE
    assert datasets.FLOWERS_URL.endswith(f"/{known.filename}")


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
    names = list(datasets._EMBEDDED)
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
    assert [int(k) for k in few.train_labels] == [int(k) for _, k in few.train]
    assert photos.take(None, 10_000).validation_size == photos.validation_size == 7


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
    assert fine_tuning.class_counts(photos).tolist() == [8, 8]
    assert contents(from_folder(folder, 0.2)) == [train, validation]
    assert contents(from_folder(folder, 0.2, seed=1)) != [train, validation]
    images, labels = next(iter(fine_tuning.make_dataset(photos.train, 32, train=True)))
    assert images.shape == (16, 32, 32, 3) and sorted(labels.numpy()) == [0] * 8 + [1] * 8


def test_labels_are_known_without_decoding(folder):
    photos = from_folder(folder)
    for path in (folder / "cats").iterdir():
        path.write_bytes(b"gone")
    assert fine_tuning.class_counts(photos).tolist() == [9, 9]


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


def test_names_in_letters_of_another_system_are_read(folder):
    (folder / "cats").rename(folder / "caf\udce9")  # as a disk from elsewhere has them
    train, validation = contents(from_folder(folder))
    assert len(train) + len(validation) == 20


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
    return r"fish needs at least two different photographs.*only\.png"


def in_two_classes(folder):
    (folder / "dogs" / "cat.png").write_bytes((folder / "cats" / "1.png").read_bytes())
    return r"dogs/cat\.png is the same photograph as .*cats/1\.png"


def parts_of_a_set(folder):
    for part in ("Train", "val"):
        (folder / part).mkdir()
    (folder / "cats").rename(folder / "Train" / "cats")
    (folder / "dogs").rename(folder / "val" / "dogs")
    return r"pets holds the parts of a data set \(Train, val\), not its classes"


def one_class(folder):
    (folder / "dogs").rename(folder.parent / "elsewhere")
    return r"pets holds 1 class folder \(cats\)"


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
        parts_of_a_set,
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


def test_what_network_drives_leave_is_no_photograph(folder):
    for place in (folder, folder / "cats"):
        for name in ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"):
            (place / name).mkdir()
            picture(200).save(place / name / "0.jpg")
    photos = from_folder(folder)
    assert photos.class_names == ["cats", "dogs"]
    assert photos.train_size + photos.validation_size == 20


def test_models_in_any_form_are_no_photographs(folder):
    model = tiny_model()
    model.save(folder / "m.keras")
    model.save_weights(folder / "cats" / "m.weights.h5")
    save_safetensors(model, folder / "m.safetensors")
    photos = from_folder(folder)
    assert photos.class_names == ["cats", "dogs"]
    assert photos.train_size + photos.validation_size == 20


def test_links_are_followed_once(folder):
    elsewhere = folder.parent / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    for i in range(4):
        picture(300 + i).save(elsewhere / "deep" / f"{i}.png")
    (folder / "cats" / "more").symlink_to(elsewhere)
    (folder / "cats" / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "circle").symlink_to(elsewhere)
    (folder / "cats" / "up").symlink_to(folder)
    photos = from_folder(folder)
    assert photos.train_size + photos.validation_size == 24
    assert len(fine_tuning.photographs_in([folder])) == 24


def broken_link(folder, monkeypatch):
    (folder / "cats" / "lost.png").symlink_to(folder / "nowhere.png")
    return r"cats/lost\.png cannot be opened \(No such file"


def broken_link_to_a_class(folder, monkeypatch):
    (folder / "fish").symlink_to(folder / "nowhere")
    return r"pets/fish cannot be opened"


def circle_of_links(folder, monkeypatch):
    (folder / "cats" / "a").symlink_to(folder / "cats" / "a")
    return r"cats/a cannot be opened"


def without_permission(folder, monkeypatch):
    (folder / "cats" / "secret").mkdir()
    listing = Path.iterdir

    def refuse(path):
        if path.name == "secret":  # as for anyone but the superuser, who runs many a test
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    return r"cats/secret cannot be opened \(Permission denied\)"


def pipe(folder, monkeypatch):
    os.mkfifo(folder / "cats" / "pipe")
    return r"cats/pipe is neither a file nor a folder"


@pytest.mark.parametrize(
    "spoil",
    [broken_link, broken_link_to_a_class, circle_of_links, without_permission, pipe],
)
def test_what_cannot_be_opened_is_refused_by_name(folder, monkeypatch, spoil):
    message = spoil(folder, monkeypatch)
    with pytest.raises(DatasetError, match=message):
        from_folder(folder)


@pytest.mark.parametrize("share", [0, 1.0, 20])
def test_a_share_is_between_0_and_1(folder, share):
    with pytest.raises(ValueError, match=f"validation_split must be between 0 and 1; got {share}"):
        from_folder(folder, validation_split=share)


def test_class_weights_make_classes_count_the_same():
    assert fine_tuning.class_weights([10, 30]) == {0: 2.0, 1: pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="Class 1 has no photographs"):
        fine_tuning.class_weights([3, 0])
