"""The tool that counts what switches change computes what the layers do."""

import functools
import json
import sys

import keras
import numpy as np
import pytest
import query_flips
from conftest import to_numpy
from PIL import Image

from gcvit import GCViT, laboratory
from gcvit.fine_tuning import load_classifier, save_classifier

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the tool runs on TensorFlow"
)
WNIDS = [f"n{i}" for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images as Tiny ImageNet keeps them."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "val" / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(7):
        pixels = rng.integers(0, 256, (4, 4, 3), "uint8").repeat(16, 0).repeat(16, 1)
        Image.fromarray(pixels).save(folder / "val" / "images" / f"val_{i}.png")
        rows.append(f"val_{i}.png\t{WNIDS[i % 6]}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of two levels whose weights are large enough for switches to show."""
    config = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 6}
    model = GCViT(window_size=(2, 4), **config)
    model.build((None, 64, 64, 3))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.ndim > 1:
            spread = 1 if "table" in variable.path else 2 / np.prod(variable.shape[:-1]) ** 0.5
            variable.assign(spread * rng.normal(size=variable.shape))
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_classifier(path, model, WNIDS, 64, wnids=WNIDS)
    return path


def test_each_arm_is_what_the_stand_ins_compute(folder, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "switches.json"
    given = [str(folder), "--heads", "--checkpoint", str(checkpoint), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["query_flips.py", *given])
    monkeypatch.setattr(query_flips, "BATCH", 4)
    answers = {}
    switched = query_flips.Switched.switched

    def recorded(model, arm, maps, others):
        answer = switched(model, arm, maps, others)
        answers.setdefault((arm.switch, str(arm.value), arm.part), []).append(answer)
        return answer

    monkeypatch.setattr(query_flips.Switched, "switched", recorded)
    query_flips.main()

    classifier = load_classifier(checkpoint)
    model = classifier.model
    files, labels = query_flips.validation_files(folder, WNIDS)
    images = np.stack([classifier.image(file) for file in files]).astype("float32")
    usual = to_numpy(model(images))
    result = json.loads(out.read_text())
    assert result["images"] == 7
    assert result["as_trained"]["accuracy"] == round((usual.argmax(-1) == labels).mean(), 4)
    names = [(row["switch"], str(row["value"]), row["part"]) for row in result["switched"]]
    # Of two levels and of both: three queries, no bias, three of faults; gates in three ways,
    # which the stem has too; the second level's windows; six heads in two blocks each.
    assert len(set(names)) == len(names) == 3 * (3 + 1 + 3) + 3 * 4 + 1 + 12
    assert set(names) == set(answers)
    for row, name in zip(result["switched"], names, strict=True):
        probabilities = np.concatenate(answers[name])
        assert row["flips"] == round((probabilities.argmax(-1) != usual.argmax(-1)).mean(), 4)
        assert np.abs(probabilities - usual).max() > 1e-5, name

    first, second = model.levels
    queries = to_numpy(second.q_global(first(model.patch_embed(images[:4]))))
    attention = second.blocks[0].attn

    def without_a_head(*given):
        q, k, v = type(attention).query_key_value(attention, *given)
        return q, k, v * np.float32([1, 0, 1, 1])[:, None, None]

    def in_parts(attn):
        bias = type(attn).relative_position_bias(attn)
        return bias + laboratory.block_mask(4, 2)

    windows = [
        (block.attn, "relative_position_bias", functools.partial(in_parts, block.attn))
        for block in second.blocks
    ]
    before = [(second, "q_global", lambda x: np.roll(queries, 1, axis=0))]
    cases = {
        ("query", "of the image before", "levels.1"): before,
        ("part", "2", "levels.1"): windows,
        ("headsOff", "[1]", "levels.1.blocks.0"): [(attention, "query_key_value", without_a_head)],
    }
    for name, patches in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            for layer, method, stand_in in patches:
                patch.setattr(layer, method, stand_in)
            want = to_numpy(model(images[:4]))
        np.testing.assert_allclose(answers[name][0], want, atol=1e-5, err_msg=str(name))
