import errno
import io
import json
import os
import zipfile

import h5py
import keras
import ml_dtypes
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

from gcvit import PRESETS, CheckpointError, GCViT, load_checkpoint, readers
from gcvit.fine_tuning.training import write_whole
from gcvit.readers import training_notes
from gcvit.weights import PACKAGED, save_safetensors, sublayers, weight_specs

RELEASE = FIXTURES / "release_layout_small.keras"


@pytest.fixture(scope="module")
def release():
    return np.load(FIXTURES / "release_layout_small.npz")


@pytest.mark.numerics
@pytest.mark.parametrize("load", [load_checkpoint, lambda model, path: model.load_weights(path)])
def test_release_archive_gives_its_probabilities(load, release, fresh_model):
    load(fresh_model, RELEASE)
    logits = run(fresh_model, release["input"].astype("float32"))
    probabilities = to_numpy(keras.ops.softmax(logits))
    np.testing.assert_allclose(probabilities, release["probabilities"], atol=1e-5)


def test_layout_is_the_published_archives(xxtiny_layout):
    """Every dataset of the published file has its variable, with the same shape."""
    model = GCViT.from_preset("gcvit_xxtiny", weights=None)
    ours = {s.names["release"]: list(s.variable.shape) for s in weight_specs(model)}
    assert ours == xxtiny_layout


def test_keras_writes_the_names_that_are_read_here(tmp_path):
    model = small_model(layer_scale=0.5)
    before = weights_of(model)
    model.save_weights(tmp_path / "m.weights.h5")
    model.set_weights([1 + value for value in before])
    report = load_checkpoint(model, tmp_path / "m.weights.h5")
    assert report.naming == "release" and report.loaded == len(weight_specs(model))
    assert same_weights(model, before)


def test_official_names_round_trip(official_file, timm_small, small_images, fresh_model):
    report = load_checkpoint(fresh_model, official_file)
    assert report.naming == "official"
    logits = to_numpy(fresh_model(small_images))
    np.testing.assert_allclose(logits, timm_small["logits"], atol=2e-5)


def test_official_pickle(tmp_path, official_file, timm_small, small_images, fresh_model):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file

    state = {name: torch.from_numpy(value) for name, value in load_file(official_file).items()}
    state["levels.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "m.pth.tar")
    load_checkpoint(fresh_model, tmp_path / "m.pth.tar")
    logits = to_numpy(fresh_model(small_images))
    np.testing.assert_allclose(logits, timm_small["logits"], atol=2e-5)


def test_head_of_another_size_is_skipped_when_asked_for(official_file):
    model = small_model(num_classes=5)
    before = weights_of(model)
    with pytest.raises(CheckpointError, match=r"head.weight .* has shape \(10, 128\)"):
        load_checkpoint(model, official_file)
    assert same_weights(model, before)
    report = load_checkpoint(model, official_file, skip_head_mismatch=True)
    assert report.skipped == ["head.bias", "head.weight"]
    assert not same_weights(model, before)


def test_model_without_top_takes_a_checkpoint_with_one(official_file, fresh_model):
    report = load_checkpoint(small_model(include_top=False), official_file)
    assert report.loaded == len(weight_specs(fresh_model)) - 2


def test_position_tables_are_resized_to_other_windows(official_file, fresh_model):
    model = small_model(window_size=(12, 12, 24, 12))
    report = load_checkpoint(model, official_file)
    assert len(report.resized) == 8
    table = to_numpy(model.levels[0].blocks[0].attn.relative_position_bias_table)
    assert table.shape == (23 * 23, 1)
    load_checkpoint(fresh_model, official_file)
    before = to_numpy(fresh_model.levels[0].blocks[0].attn.relative_position_bias_table)
    # The middle, the offset of a token to itself, stays the middle.
    np.testing.assert_allclose(table[23 * 23 // 2], before[13 * 13 // 2], atol=1e-5)


def test_position_tables_are_resized_to_windows_that_are_not_square(
    official_file, tmp_path, fresh_model
):
    """As PyTorch resizes them; the way back is refused: 77 rows may be 7 x 11 or 11 x 7."""
    torch = pytest.importorskip("torch")
    square, wide = fresh_model, small_model(window_size=((4, 6), 7, 14, 7))
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
def test_damaged_archive_is_refused_and_nothing_changes(kind, tmp_path, fresh_model):
    before = weights_of(fresh_model)
    with pytest.raises(CheckpointError, match=kind):
        load_checkpoint(fresh_model, damaged(kind, RELEASE, tmp_path))
    assert same_weights(fresh_model, before)


@pytest.mark.parametrize("kind", ["truncated", "empty"])
def test_damaged_safetensors_is_refused(kind, tmp_path, official_file, fresh_model):
    before = weights_of(fresh_model)
    with pytest.raises(CheckpointError):
        load_checkpoint(fresh_model, damaged(kind, official_file, tmp_path))
    assert same_weights(fresh_model, before)


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
def test_every_tensor_is_accounted_for(change, message, tmp_path, timm_small, fresh_model):
    state = state_of(timm_small)
    change(state)
    write_safetensors(tmp_path / "m.safetensors", state)
    before = weights_of(fresh_model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(fresh_model, tmp_path / "m.safetensors")
    assert same_weights(fresh_model, before)


def test_checkpoint_of_another_variant_is_refused(nano):
    with pytest.raises(CheckpointError, match="not a checkpoint of this model"):
        load_checkpoint(nano, RELEASE)


def test_links_out_of_the_file_are_refused(tmp_path, fresh_model):
    with zipfile.ZipFile(RELEASE) as archive:
        stream = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(stream, "r+") as file:
        del file["head/vars/0"]
        file["head/vars/0"] = h5py.ExternalLink("/etc/passwd", "/x")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("model.weights.h5", stream.getvalue())
    with pytest.raises(CheckpointError, match="head/vars/0 is a link"):
        load_checkpoint(fresh_model, tmp_path / "m.keras")


def test_zip_bomb_is_refused_before_it_unpacks(tmp_path, fresh_model):
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", b"\0" * 50_000_000)
    with pytest.raises(CheckpointError, match="unpacks to 50,000,000 bytes"):
        load_checkpoint(fresh_model, tmp_path / "m.keras")


def test_no_such_file(fresh_model):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file at nowhere.keras"):
        load_checkpoint(fresh_model, "nowhere.keras")


def test_an_address_is_no_file():
    with pytest.raises(FileNotFoundError, match="m.safetensors is an address: fetch the file"):
        GCViT.from_preset("gcvit_nano", "https://example.org/m.safetensors")


def test_a_path_is_taken_for_weights(nano):
    model = GCViT.from_preset(
        "gcvit_nano", weights=str(PACKAGED / "gcvit_nano-tiny_imagenet.safetensors")
    )
    assert same_weights(model, weights_of(nano))


def test_half_precision_file_is_half_the_size(tmp_path, fresh_model):
    for dtype in ("float32", "float16"):
        path = tmp_path / f"{dtype}.safetensors"
        save_safetensors(fresh_model, path, dtype=dtype, metadata={"made": "here"})
    sizes = [os.path.getsize(tmp_path / f"{each}.safetensors") for each in ("float16", "float32")]
    assert sizes[0] < 0.6 * sizes[1]
    assert training_notes(tmp_path / "float16.safetensors") == {"made": "here"}
    assert sorted(os.listdir(tmp_path)) == ["float16.safetensors", "float32.safetensors"]


def test_shipped_checkpoint_is_the_one_that_the_preset_names():
    import hashlib

    for preset in PRESETS.values():
        for entry in preset["weights"].values():
            if "file" in entry:
                data = (PACKAGED / entry["file"]).read_bytes()
                assert len(data) == entry["size"] <= 4_000_000
                assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def test_keras_load_weights_refuses_what_load_checkpoint_refuses(tmp_path, fresh_model):
    before = weights_of(fresh_model)
    with pytest.raises(CheckpointError):
        fresh_model.load_weights(damaged("truncated", RELEASE, tmp_path))
    assert same_weights(fresh_model, before)


def test_weights_saved_in_training_are_read_back(tmp_path, other):
    model = tiny_model(path_drop=0.3)
    model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", run_eagerly=True)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    model.fit(images, np.array([0, 1]), verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_allclose(to_numpy(other(images)), to_numpy(model(images)), atol=1e-6)


def tiny_model(in_channels=3, **options):
    """A model of two levels with random weights, which all show."""
    model = GCViT((2, 4), 8, (2, 1), (1, 2), num_classes=3, in_channels=in_channels, **options)
    model.build((None, 32, 32, in_channels))
    draw = np.random.default_rng(len(options))
    for spec in weight_specs(model):
        spec.assign(draw.normal(size=spec.variable.shape))
    return model


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture(scope="module")
def tiny_state(tiny):
    return {
        spec.names["official"]: np.ascontiguousarray(spec.to_torch(spec.value, "official"))
        for spec in weight_specs(tiny)
    }


@pytest.fixture
def other(tiny):
    """The tiny model with other weights; what it had comes back afterwards."""
    before = weights_of(tiny)
    for variable in tiny.weights:
        variable.assign(keras.ops.ones_like(variable))
    yield tiny
    for variable, value in zip(tiny.weights, before, strict=True):
        variable.assign(value)


def has_state(model, state):
    return all(
        np.array_equal(spec.to_torch(spec.value, "official"), state[spec.names["official"]])
        for spec in weight_specs(model)
    )


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module.", "backbone."])
def test_names_that_a_wrapper_lengthened_are_known(prefix, tmp_path, tiny_state, other):
    outside = "head." if prefix == "backbone." else ()  # as detectors have it
    state = {n if n.startswith(outside) else prefix + n: v for n, v in tiny_state.items()}
    write_safetensors(tmp_path / "m.safetensors", state)
    load_checkpoint(other, tmp_path / "m.safetensors")
    assert has_state(other, tiny_state)


def test_two_models_in_one_file_are_refused(tmp_path, tiny_state, other):
    state = {f"{who}.{n}": v for n, v in tiny_state.items() for who in ("student", "teacher")}
    write_safetensors(tmp_path / "m.safetensors", state)
    with pytest.raises(CheckpointError, match=r"several models \(student., teacher.\)"):
        load_checkpoint(other, tmp_path / "m.safetensors")


def test_a_checkpoint_in_parts_is_read_by_its_index(tmp_path, tiny_state, other):
    names = sorted(tiny_state)
    places = {name: f"m-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        write_safetensors(tmp_path / part, {n: tiny_state[n] for n in names if places[n] == part})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (index, tmp_path):  # a folder stands for the file in it
        load_checkpoint(other, path)
        assert has_state(other, tiny_state)
    (tmp_path / "m-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lists m-1.safetensors, which is not beside it"):
        load_checkpoint(other, index)
    index.write_text(json.dumps({"weight_map": {"a": "../m-0.safetensors"}}))
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        load_checkpoint(other, index)
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(CheckpointError, match="of a kind that is not supported"):
        load_checkpoint(other, index)


def test_bfloat16_is_read(tmp_path, tiny_state, other):
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny_state.items()}
    write_safetensors(tmp_path / "m.safetensors", half)
    load_checkpoint(other, tmp_path / "m.safetensors")
    assert has_state(other, {name: value.astype("float32") for name, value in half.items()})


@pytest.mark.parametrize("container", readers._CONTAINERS)
def test_containers_of_training_scripts_are_known(container, tmp_path, tiny_state, other):
    torch = pytest.importorskip("torch")
    state = {f"module.{n}": torch.from_numpy(v) for n, v in tiny_state.items()}
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, container: state}, tmp_path / "m.pth")
    load_checkpoint(other, tmp_path / "m.pth")
    assert has_state(other, tiny_state)


def test_the_count_beside_averaged_weights_is_no_weight(tmp_path, tiny_state, other):
    torch = pytest.importorskip("torch")
    state = {f"module.{n}": torch.from_numpy(v) for n, v in tiny_state.items()}
    torch.save({"n_averaged": torch.tensor(7), **state}, tmp_path / "m.pth")
    load_checkpoint(other, tmp_path / "m.pth")
    assert has_state(other, tiny_state)


def in_layers(state, name):
    return {n.replace("levels.", f"levels.{name}.", 1): v for n, v in state.items()}


@pytest.mark.parametrize(
    "form",
    [
        lambda torch, state: {n: torch.nn.Parameter(v) for n, v in state.items()},
        lambda torch, state: {n: v.to_sparse() if v.ndim > 1 else v for n, v in state.items()},
        lambda torch, state: {"model": {"module": state}, "epoch": 3},
        lambda torch, state: in_layers(in_layers(state, "_orig_mod"), "_fsdp_wrapped_module"),
    ],
    ids=["parameters", "sparse", "nested", "wrapped inside"],
)
def test_what_else_training_scripts_leave_is_read(form, tmp_path, tiny_state, other):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(value) for name, value in tiny_state.items()}
    torch.save(form(torch, state), tmp_path / "pytorch_model.bin")
    load_checkpoint(other, tmp_path)  # a folder stands for the file in it
    assert has_state(other, tiny_state)


def test_numbers_of_eight_bits_are_refused_by_name(tmp_path, tiny_state, other):
    from safetensors.numpy import save_file

    state = {n: np.float32(v).astype(ml_dtypes.float8_e4m3fn) for n, v in tiny_state.items()}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="of a kind that is not supported, F8_E4M3: write"):
        load_checkpoint(other, tmp_path / "m.safetensors")


def test_what_pytorch_will_not_unpack_is_said_in_words_of_our_own(tmp_path, tiny_state, other):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(value) for name, value in tiny_state.items()}
    torch.save({"model": state, "best": np.float64(0.9)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(other, tmp_path / "m.pth")
    assert "torch.save(model.state_dict(), path)" in str(refused.value)
    assert "weights_only" not in str(refused.value) and "numpy" in str(refused.value)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="TorchScript program, a kind that is not supported"):
        load_checkpoint(other, tmp_path / "m.pt")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is damaged: it is empty"),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 99, "is damaged, perhaps by an interrupted download"),
        (b"ONNX and others", "of a kind that is not supported: it starts with 'ONNX and '"),
        (b"\x80\x02}q\x00.", "is a pickle, a kind that is not supported"),
        (b"<html>Log in</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "what Git LFS keeps in its place: fetch"),
        (b'{"epoch": 3}', "not supported: JSON without the weight_map"),
        (None, "There is no checkpoint file at .* a relative one starts in"),
    ],
)
def test_each_way_not_to_be_a_checkpoint_has_a_sentence(data, message, tmp_path, other):
    if data is not None:
        (tmp_path / "m").write_bytes(data)
    before = weights_of(other)
    with pytest.raises(FileNotFoundError if data is None else CheckpointError, match=message):
        load_checkpoint(other, tmp_path / "m")
    assert same_weights(other, before)


def test_a_quantized_model_takes_and_gives_no_plain_weights(tmp_path, tiny):
    model = tiny_model()
    tiny.save_weights(tmp_path / "plain.weights.h5")
    model.quantize("int8")
    before = weights_of(model)
    with pytest.raises(CheckpointError, match="The model is quantized .* before you quantize"):
        model.load_weights(tmp_path / "plain.weights.h5")
    assert same_weights(model, before)
    model.save(tmp_path / "m.keras")
    with pytest.raises(CheckpointError, match="the weights are quantized"):
        tiny.load_weights(tmp_path / "m.keras")


def test_an_adapter_starts_anew_on_what_is_read(tmp_path, tiny_state, other):
    write_safetensors(tmp_path / "m.safetensors", tiny_state)
    model = tiny_model()
    layers = [layer for path, _, layer in sublayers(model) if path.endswith("qkv")]
    for layer in layers:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(1.0 + layer.lora_kernel_b)
    assert not has_state(model, tiny_state)
    load_checkpoint(model, tmp_path / "m.safetensors")
    assert has_state(model, tiny_state)
    assert all(np.any(to_numpy(layer.lora_kernel_a)) for layer in layers)  # it can learn


def test_the_state_of_another_optimizer_is_refused_before_anything_is_assigned(tmp_path, other):
    model = tiny_model()
    model.levels[0].trainable = False
    for m in (model, other):
        m.compile("adam", "mse")
        m.optimizer.build(m.trainable_variables)
    model.save_weights(tmp_path / "m.weights.h5")
    before = weights_of(other)
    with pytest.raises(CheckpointError, match="optimizer that does not fit this model's: it has"):
        other.load_weights(tmp_path / "m.weights.h5")
    assert same_weights(other, before)


def test_an_optimizer_that_has_not_trained_takes_the_state_or_it_is_said(tmp_path, tiny):
    model = tiny_model()
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        variable.assign(np.full(variable.shape, 3))
    model.save_weights(tmp_path / "m.weights.h5")
    twin = tiny_model()
    twin.compile("adam", "mse")
    twin.load_weights(tmp_path / "m.weights.h5")
    assert all((to_numpy(variable) == 3).all() for variable in twin.optimizer.variables)
    assert same_weights(twin, weights_of(model))
    twin.levels[0].trainable = False
    twin.compile("adam", "mse")
    with pytest.warns(UserWarning, match="does not fit this model: .* the training starts anew"):
        twin.load_weights(tmp_path / "m.weights.h5")
    assert not twin.optimizer.built


@pytest.mark.parametrize("value, message", [(np.nan, "not finite"), (1e5, "above 65504")])
def test_weights_that_a_file_cannot_hold_are_not_written(value, message, tmp_path, other):
    other.norm.gamma.assign(np.full(16, value))
    with pytest.raises(CheckpointError, match=f"norm.weight cannot be written .* {message}"):
        save_safetensors(other, tmp_path / "m.safetensors", dtype="float16")
    assert os.listdir(tmp_path) == []


def test_the_first_kernel_is_fitted_to_other_colors_when_asked_for(tmp_path, tiny_state):
    write_safetensors(tmp_path / "m.safetensors", tiny_state)
    gray = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype("float32")
    colors = {1: gray, 6: np.repeat(gray, 6, axis=-1)}
    expected = run(_with_state(tiny_model(), tmp_path), np.repeat(gray, 3, axis=-1))
    for channels, images in colors.items():
        model = tiny_model(in_channels=channels)
        with pytest.raises(CheckpointError, match=r"proj.weight .* recolor=True"):
            load_checkpoint(model, tmp_path / "m.safetensors")
        report = load_checkpoint(model, tmp_path / "m.safetensors", recolor=True)
        assert report.recolored == "patch_embed.proj.weight"
        np.testing.assert_allclose(run(model, images), expected, atol=1e-5)


def _with_state(model, folder):
    load_checkpoint(model, folder / "m.safetensors")
    return model


def breaks_off(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {
    "m.safetensors": (lambda m, p: save_safetensors(m, p), "gcvit.readers.with_digest"),
    "m.keras": (lambda m, p: m.save(p), "zipfile.ZipFile.close"),
    "m.weights.h5": (lambda m, p: m.save_weights(p), "h5py.File.close"),
    "run.npz": (lambda m, p: write_whole(p, a=np.zeros(9)), "numpy.savez"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_leaves_the_old_file(name, tmp_path, monkeypatch, tiny):
    write, last_step = WRITERS[name]
    write(tiny, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(last_step, breaks_off)
        with pytest.raises(OSError, match=f"{name} cannot be written .No space left on device"):
            write(tiny, tmp_path / name)
    assert (tmp_path / name).read_bytes() == whole and os.listdir(tmp_path) == [name]


def test_what_is_written_has_the_ending_of_its_kind_and_a_folder(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"must end in .safetensors; got .*m\.keras"):
        save_safetensors(tiny, tmp_path / "m.keras")
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere to write m.keras"):
        tiny.save(tmp_path / "nowhere" / "m.keras")
    assert os.listdir(tmp_path) == []
