import json
import os

import keras
import numpy as np
import pytest
from conftest import (
    FIXTURES,
    SMALL,
    run,
    same_weights,
    state_of,
    weights_of,
    write_safetensors,
)

from gcvit import PRESETS, CheckpointError, GCViT, load_checkpoint
from gcvit.convert import architecture, convert, preset_of
from gcvit.readers import training_notes
from gcvit.weights import PACKAGED, read_tensors, save_safetensors, weight_specs

RELEASE = FIXTURES / "release_layout_small.keras"
ODD = {**SMALL, "mlp_ratio": 2.5, "num_heads": (2, 2, 4, 4), "depths": (1, 3, 2, 2)}


def sizes(arguments):
    return {name: arguments[name] for name in SMALL}


def test_sizes_are_read_off_each_kind_of_file(timm_file, official_file):
    for path in (timm_file, official_file, RELEASE):
        arguments = architecture(path)
        assert sizes(arguments) == SMALL
        assert (
            arguments["layer_scale"] is None and arguments["qkv_bias"] and arguments["include_top"]
        )
        assert arguments["in_channels"] == 3 and preset_of(arguments) is None


def test_unusual_sizes_are_read_off_too(tmp_path):
    model = GCViT(**ODD, layer_scale=0.5, qkv_bias=False, in_channels=1)
    model.build((None, 64, 64, 1))
    model.save_weights(tmp_path / "m.weights.h5")
    save_safetensors(model, tmp_path / "official.safetensors")
    save_safetensors(model, tmp_path / "timm.safetensors", naming="timm")
    for name in ("m.weights.h5", "official.safetensors", "timm.safetensors"):
        arguments = architecture(tmp_path / name)
        assert sizes(arguments) == ODD
        assert (
            arguments["layer_scale"] and not arguments["qkv_bias"] and arguments["in_channels"] == 1
        )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognized_by_their_sizes(name):
    config = {"qkv_bias": True, "in_channels": 3, **PRESETS[name]["config"]}
    del config["path_drop"]
    assert preset_of(config) == name
    assert preset_of({**config, "embed_dim": 7}) is None


def test_there_and_back_through_every_form(tmp_path, timm_file, timm_small, small_images):
    """timm -> archive -> weights -> official -> timm: the last file is the first."""
    chain = [timm_file, *(tmp_path / n for n in ("a.keras", "b.weights.h5", "c.safetensors"))]
    for source, target in zip(chain, chain[1:], strict=False):
        done = convert(source, target, progress=False)
        assert done.largest_error == 0 and done.bytes == os.path.getsize(target)
    convert(chain[-1], tmp_path / "d.safetensors", naming="timm", progress=False)
    naming, tensors = read_tensors(tmp_path / "d.safetensors", 10**8)
    first = state_of(timm_small)
    assert naming == "timm" and set(tensors) == set(first)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), first[name])
    archive = keras.models.load_model(tmp_path / "a.keras")
    logits = np.log(run(archive, small_images))  # of softmax: logits up to a constant
    logits -= logits.mean(axis=1, keepdims=True)
    expected = timm_small["logits"] - timm_small["logits"].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert sorted(os.listdir(tmp_path)) == [
        "a.keras",
        "b.weights.h5",
        "c.safetensors",
        "d.safetensors",
    ]


def test_half_precision_and_other_windows(tmp_path, official_file):
    done = convert(
        official_file, tmp_path / "m.safetensors", dtype="float16", image_size=384, progress=False
    )
    assert 0 < done.largest_error < 1e-2 and len(done.resized) == 8
    assert architecture(tmp_path / "m.safetensors")["window_size"] == (12, 12, 24, 12)


def test_the_shipped_checkpoint_is_a_nano(tmp_path, nano):
    source = PACKAGED / PRESETS["gcvit_nano"]["weights"]["tiny_imagenet"]["file"]
    done = convert(source, tmp_path / "nano.weights.h5", progress=False)
    assert done.preset == "gcvit_nano" and done.parameters == PRESETS["gcvit_nano"]["parameters"]
    twin = GCViT.from_preset("gcvit_nano", weights=str(tmp_path / "nano.weights.h5"))
    assert same_weights(twin, weights_of(nano))


@pytest.mark.parametrize(
    "target, more, message",
    [
        ("m.bin", {}, r"must end in one of .safetensors, .weights.h5, .keras; got .*m.bin"),
        ("m.safetensors", {"naming": "Timm"}, "naming must be one of official, timm; got 'Timm'"),
        ("m.keras", {"dtype": "float16"}, "dtype='float16' is for .safetensors files only"),
        ("m.keras", {"image_size": 100}, "multiples of 32; got 100 x 100 px"),
    ],
)
def test_what_cannot_be_written_is_said(target, more, message, tmp_path, official_file):
    with pytest.raises(ValueError, match=message):
        convert(official_file, tmp_path / target, progress=False, **more)
    assert os.listdir(tmp_path) == []


def test_what_is_read_is_not_written_over(official_file):
    with pytest.raises(ValueError, match="is the file to read; name another one to write"):
        convert(official_file, official_file, dtype="float16", progress=False)


def test_what_is_no_gcvit_is_refused(tmp_path, timm_small):
    from conftest import write_safetensors

    state = state_of(timm_small)
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"head.weight": np.ones((3, 3), "float32")})
    with pytest.raises(CheckpointError, match="does not hold a GCViT"):
        convert(path, tmp_path / "out.keras", progress=False)
    table = "stages.0.blocks.0.attn.rel_pos.relative_position_bias_table"
    write_safetensors(path, {**state, table: np.ones((15 * 13, 1), "float32")})
    with pytest.raises(CheckpointError, match="table of 195 rows is not one of a square window"):
        architecture(path)
    with pytest.raises(FileNotFoundError, match="nowhere.keras"):
        convert("nowhere.keras", tmp_path / "out.keras")


def test_a_hash_that_does_not_match_is_refused(official_file, fresh_model):
    before = weights_of(fresh_model)
    with pytest.raises(CheckpointError, match="00 was expected"):
        load_checkpoint(fresh_model, official_file, sha256="00")
    assert same_weights(fresh_model, before)


def test_what_only_the_file_tells_is_kept(tmp_path):
    """Windows that are not square, the head's activation, a classifier's notes."""
    options = {"window_size": ((2, 3), (4, 4)), "head_activation": None, "qk_scale": 0.1}
    model = GCViT(embed_dim=8, depths=(2, 1), num_heads=(1, 2), num_classes=3, **options)
    model.build((None, 32, 32, 3))
    model.save(tmp_path / "m.keras")
    arguments = architecture(tmp_path / "m.keras")
    assert arguments["window_size"] == ((2, 3), 4) and arguments["qk_scale"] == 0.1
    assert arguments["head_activation"] == "linear"
    config = {name: arguments[name] for name in ("window_size", "qk_scale")}
    notes = {"classes": "[1]", "config": json.dumps(config)}
    save_safetensors(model, tmp_path / "a.safetensors", metadata=notes)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", naming="timm", progress=False)
    written = training_notes(tmp_path / "b.safetensors")
    assert written["classes"] == notes["classes"]
    assert config.items() <= architecture(tmp_path / "b.safetensors").items()


def test_what_no_tensor_tells_survives_the_way_by_safetensors(tmp_path):
    arguments = {"window_size": ((2, 3),), "qk_scale": 0.3, "head_activation": "linear"}
    model = GCViT(embed_dim=8, depths=(1,), num_heads=(2,), num_classes=3, **arguments)
    model.build((None, 32, 48, 3))
    model.save(tmp_path / "a.keras")
    for source, target in (("a.keras", "b.safetensors"), ("b.safetensors", "c.keras")):
        convert(tmp_path / source, tmp_path / target, progress=False)
    again = keras.models.load_model(tmp_path / "c.keras")
    assert again.window_size == ((2, 3),) and again.qk_scale == 0.3
    images = np.random.default_rng(0).normal(size=(1, 32, 48, 3)).astype("float32")
    np.testing.assert_allclose(run(again, images), run(model, images), atol=1e-6)


def test_a_stem_of_no_known_shape_is_refused(tmp_path):
    model = GCViT((4,), 8, (1,), (2,), num_classes=3)
    model.build((None, 32, 32, 3))
    state = {s.names["official"]: s.to_torch(s.value, "official") for s in weight_specs(model)}
    state["patch_embed.proj.weight"] = np.zeros(8, "float32")
    write_safetensors(tmp_path / "m.safetensors", state)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        architecture(tmp_path / "m.safetensors")
