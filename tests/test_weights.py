import io
import os
import zipfile

import h5py
import keras
import numpy as np
import pytest
from conftest import (
    FIXTURES,
    run,
    same_weights,
    small_model,
    state_of,
    to_numpy,
    weights_of,
    write_safetensors,
)

from gcvit import PRESETS, CheckpointError, GCViT, load_checkpoint
from gcvit.readers import training_notes
from gcvit.weights import PACKAGED, save_safetensors, weight_specs

RELEASE = FIXTURES / "release_layout_small.keras"


@pytest.fixture(scope="module")
def release():
    return np.load(FIXTURES / "release_layout_small.npz")


@pytest.mark.numerics
@pytest.mark.parametrize("load", [load_checkpoint, lambda model, path: model.load_weights(path)])
def test_release_archive_gives_its_probabilities(load, release):
    model = small_model(head_activation="softmax")
    load(model, RELEASE)
    probabilities = run(model, release["input"].astype("float32"))
    np.testing.assert_allclose(probabilities, release["probabilities"], atol=1e-5)


def test_layout_is_the_published_archives(xxtiny_layout):
    """Every dataset of the published file has its variable, with the same shape."""
    model = GCViT.from_preset("gcvit_xxtiny", weights=None)
    ours = {s.names["release"]: list(s.variable.shape) for s in weight_specs(model)}
    assert ours == xxtiny_layout


def test_keras_writes_the_names_that_are_read_here(tmp_path):
    model = small_model(layer_scale=0.5)
    model.save_weights(tmp_path / "m.weights.h5")
    twin = small_model(layer_scale=0.5)
    report = load_checkpoint(twin, tmp_path / "m.weights.h5")
    assert report.naming == "release" and report.loaded == len(weight_specs(model))
    assert same_weights(twin, weights_of(model))


def test_official_names_round_trip(official_file, timm_small, small_images):
    model = small_model()
    report = load_checkpoint(model, official_file)
    assert report.naming == "official"
    np.testing.assert_allclose(to_numpy(model(small_images)), timm_small["logits"], atol=2e-5)


def test_official_pickle(tmp_path, official_file, timm_small, small_images):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file

    state = {name: torch.from_numpy(value) for name, value in load_file(official_file).items()}
    state["levels.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "m.pth.tar")
    model = small_model()
    load_checkpoint(model, tmp_path / "m.pth.tar")
    np.testing.assert_allclose(to_numpy(model(small_images)), timm_small["logits"], atol=2e-5)


def test_head_of_another_size_is_skipped_when_asked_for(official_file):
    model = small_model(num_classes=5)
    before = weights_of(model)
    with pytest.raises(CheckpointError, match=r"head.weight .* has shape \(10, 128\)"):
        load_checkpoint(model, official_file)
    assert same_weights(model, before)
    report = load_checkpoint(model, official_file, skip_head_mismatch=True)
    assert report.skipped == ["head.bias", "head.weight"]
    assert not same_weights(model, before)


def test_model_without_top_takes_a_checkpoint_with_one(official_file):
    report = load_checkpoint(small_model(include_top=False), official_file)
    assert report.loaded == len(weight_specs(small_model())) - 2


def test_position_tables_are_resized_to_other_windows(official_file):
    model = small_model(window_size=(12, 12, 24, 12))
    report = load_checkpoint(model, official_file)
    assert len(report.resized) == 8
    table = to_numpy(model.levels[0].blocks[0].attn.relative_position_bias_table)
    assert table.shape == (23 * 23, 1)
    small = small_model()
    load_checkpoint(small, official_file)
    before = to_numpy(small.levels[0].blocks[0].attn.relative_position_bias_table)
    # The middle, the offset of a token to itself, stays the middle.
    np.testing.assert_allclose(table[23 * 23 // 2], before[13 * 13 // 2], atol=1e-5)


def test_position_tables_are_resized_to_windows_that_are_not_square(official_file, tmp_path):
    """As PyTorch resizes them; the way back is refused: 77 rows may be 7 x 11 or 11 x 7."""
    torch = pytest.importorskip("torch")
    square, wide = small_model(), small_model(window_size=((4, 6), 7, 14, 7))
    load_checkpoint(square, official_file)
    assert len(load_checkpoint(wide, official_file).resized) == 2
    old, new = (
        to_numpy(model.levels[0].blocks[1].attn.relative_position_bias_table)
        for model in (square, wide)
    )
    grid = torch.from_numpy(old.reshape(1, 1, 13, 13))
    expected = torch.nn.functional.interpolate(grid, size=(7, 11), mode="bicubic")
    np.testing.assert_allclose(new.reshape(7, 11), expected[0, 0], atol=1e-6)
    save_safetensors(wide, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(77, 1\); this model wants \(169, 1\)"):
        load_checkpoint(square, tmp_path / "wide.safetensors")


def damaged(kind, path, tmp_path):
    """Write a damaged copy of a checkpoint file; return its path."""
    data = path.read_bytes()
    copy = tmp_path / f"{kind}{path.suffix}"
    if kind == "truncated":
        copy.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        copy.write_bytes(b"")
    elif kind == "web page":
        copy.write_bytes(b"<!doctype html><html><body>Log in</body></html>")
    elif kind == "flipped bit":
        middle = len(data) // 2
        copy.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    return copy


@pytest.mark.parametrize("kind", ["truncated", "empty", "web page", "flipped bit"])
def test_damaged_archive_is_refused_and_nothing_changes(kind, tmp_path):
    model = small_model()
    before = weights_of(model)
    with pytest.raises(CheckpointError, match=kind):
        load_checkpoint(model, damaged(kind, RELEASE, tmp_path))
    assert same_weights(model, before)


@pytest.mark.parametrize("kind", ["truncated", "empty"])
def test_damaged_safetensors_is_refused(kind, tmp_path, official_file):
    model = small_model()
    before = weights_of(model)
    with pytest.raises(CheckpointError):
        load_checkpoint(model, damaged(kind, official_file, tmp_path))
    assert same_weights(model, before)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("head.fc.bias"), "Missing: head.fc.bias"),
        (lambda s: s.update(extra=np.ones(3, "float32")), "Not expected: extra"),
        (
            lambda s: s.update({"stem.conv1.bias": np.ones(7, "float32")}),
            r"stem.conv1.bias .* has shape \(7,\); this model wants \(16,\)",
        ),
        (
            lambda s: s.update({"stem.conv1.bias": np.full(16, np.nan, "float32")}),
            "stem.conv1.bias .* not finite",
        ),
        (
            lambda s: s.update({"stem.conv1.bias": np.ones(16, "int32")}),
            "stem.conv1.bias .* holds int32, not floating point",
        ),
    ],
)
def test_every_tensor_is_accounted_for(change, message, tmp_path, timm_small):
    state = state_of(timm_small)
    change(state)
    write_safetensors(tmp_path / "m.safetensors", state)
    model = small_model()
    before = weights_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path / "m.safetensors")
    assert same_weights(model, before)


def test_checkpoint_of_another_variant_is_refused():
    model = GCViT.from_preset("gcvit_nano", weights=None)
    with pytest.raises(CheckpointError, match="not a checkpoint of this model"):
        load_checkpoint(model, RELEASE)


def test_links_out_of_the_file_are_refused(tmp_path):
    with zipfile.ZipFile(RELEASE) as archive:
        stream = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(stream, "r+") as file:
        del file["head/vars/0"]
        file["head/vars/0"] = h5py.ExternalLink("/etc/passwd", "/x")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("model.weights.h5", stream.getvalue())
    with pytest.raises(CheckpointError, match="head/vars/0 is a link"):
        load_checkpoint(small_model(), tmp_path / "m.keras")


def test_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", b"\0" * 50_000_000)
    with pytest.raises(CheckpointError, match="unpacks to 50,000,000 bytes"):
        load_checkpoint(small_model(), tmp_path / "m.keras")


def test_no_such_file():
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file at nowhere.keras"):
        load_checkpoint(small_model(), "nowhere.keras")


def test_a_path_is_taken_for_weights(official_file):
    model = GCViT.from_preset(
        "gcvit_nano", weights=str(PACKAGED / "gcvit_nano-flowers.safetensors")
    )
    twin = GCViT.from_preset("gcvit_nano", weights="flowers")
    assert same_weights(model, weights_of(twin))


def test_half_precision_file_is_half_the_size(tmp_path):
    model = small_model()
    for dtype in ("float32", "float16"):
        save_safetensors(model, tmp_path / dtype, dtype=dtype, metadata={"made": "here"})
    sizes = [os.path.getsize(tmp_path / dtype) for dtype in ("float16", "float32")]
    assert sizes[0] < 0.6 * sizes[1]
    assert training_notes(tmp_path / "float16") == {"made": "here"}
    assert sorted(os.listdir(tmp_path)) == ["float16", "float32"]


def test_shipped_checkpoint_is_the_one_that_the_preset_names():
    import hashlib

    for preset in PRESETS.values():
        for entry in preset["weights"].values():
            if "file" in entry:
                data = (PACKAGED / entry["file"]).read_bytes()
                assert len(data) == entry["size"] <= 4_000_000
                assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def test_keras_load_weights_refuses_what_load_checkpoint_refuses(tmp_path):
    model = small_model()
    before = weights_of(model)
    with pytest.raises(CheckpointError):
        model.load_weights(damaged("truncated", RELEASE, tmp_path))
    assert same_weights(model, before)


def test_weights_saved_in_training_are_read_back(tmp_path, small_images):
    model = small_model(head_activation="softmax", path_drop=0.3)
    model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", run_eagerly=True)
    model.fit(small_images[:, :64, :64], np.array([0, 1]), verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    twin = small_model(head_activation="softmax", path_drop=0.3)
    twin.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_allclose(
        to_numpy(twin(small_images)), to_numpy(model(small_images)), atol=1e-6
    )
