"""The package from a shell: exit codes, what is printed where, and what Ctrl-C leaves."""

import contextlib
import http.server
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import serving, tiny_model
from PIL import Image
from safetensors.numpy import save_file
from skimage import data

from gcvit import PRESETS, FetchError, GCViT, fine_tuning
from gcvit.__main__ import COMMANDS, _classes_in, main, parser
from gcvit.fine_tuning.classifier import json_text
from gcvit.images import MEAN, STD, normalize, resize
from gcvit.readers import CheckpointError, training_notes
from gcvit.weights import PACKAGED

NANO = PACKAGED / "gcvit_nano-tiny_imagenet.safetensors"


def write_classes(folder, names=("dark", "bright"), count=8):
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (40, 50, 3)) + 140 * k
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{i}.png")
    return folder


# The whole nano takes TensorFlow half a minute to trace, and these tests are not about it.
SMALLER = {"depths": (1,) * 4, "num_heads": (1,) * 4, "embed_dim": 8}
TRAIN = f"""
import sys
from gcvit import PRESETS
from gcvit.__main__ import main

PRESETS["gcvit_nano"]["config"].update({SMALLER})
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run `train --json` in a process of its own; return its result and its folder."""
    place = tmp_path_factory.mktemp("trained")
    write_classes(place / "photos")
    command = (
        "train photos --epochs 1 --image-size 32 --weights none --out model.safetensors --json"
    )
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *command.split()],
        capture_output=True,
        text=True,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done, place


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return what trains in this process, in `tmp_path`, op by op: to trace takes far longer."""
    for name, value in SMALLER.items():
        monkeypatch.setitem(PRESETS["gcvit_nano"]["config"], name, value)
    monkeypatch.chdir(tmp_path)
    fit = fine_tuning.fit

    def run(command, *callbacks):
        def fit_eagerly(model, *args, **kwargs):
            model.run_eagerly = True
            return fit(model, *args, callbacks=callbacks, **kwargs)

        monkeypatch.setattr(fine_tuning, "fit", fit_eagerly)
        quick = "--weights=none --recipe=original --epochs=1 --image-size=32"
        return main(["train", *quick.split(), *command.split()])

    return run


def test_train_prints_its_result_as_json_and_progress_elsewhere(trained):
    done, place = trained
    result = json.loads(done.stdout)
    assert result["classes"] == ["bright", "dark"] and result["epochs"] == 1
    assert set(result["per_class"]) == {"bright", "dark"} and not result["interrupted"]
    assert 0 <= result["accuracy"] <= 1 and "val_accuracy" in done.stderr
    assert result["frozen_head_accuracy"] is None and "frozen" not in done.stderr
    assert sorted(path.name for path in place.iterdir()) == ["model.safetensors", "photos"]


def test_predict_needs_nothing_but_the_file(trained, capsys):
    done, place = trained
    (place / "broken.jpg").write_bytes(b"no photograph")
    images = [
        place / "photos" / "dark" / "0.png",
        place / "broken.jpg",
        place / "photos" / "bright",
    ]
    code = main(
        ["predict", str(place / "model.safetensors"), *map(str, images), "--json", "--top=2"]
    )
    shown = capsys.readouterr()
    results = json.loads(shown.out)
    assert code == 1 and "broken.jpg cannot be read" in shown.err
    assert len(results) == 10 and [entry["file"] for entry in results[:2]] == [
        str(p) for p in images[:2]
    ]
    assert "error" in results[1] and "1 of 10 files" in shown.err
    classifier = fine_tuning.load_classifier(place / "model.safetensors")
    by_hand = normalize(resize(np.array(Image.open(images[0])), 32))
    expected = np.asarray(classifier.model(by_hand[None]))[0]
    assert classifier.class_names == ["bright", "dark"] and classifier.image_size == 32
    for k, name in enumerate(classifier.class_names):
        assert results[0]["classes"][name] == pytest.approx(expected[k], abs=1e-5)


def test_predict_with_the_model_that_ships(tmp_path, capsys):
    Image.new("CMYK", (60, 40)).save(tmp_path / "a.jpg")
    assert main(["predict", "gcvit_nano", str(tmp_path / "a.jpg")]) == 0
    line = capsys.readouterr().out
    names = json.loads(training_notes(NANO)["classes"])
    assert line.startswith(f"{tmp_path / 'a.jpg'}: ") and line.split()[1] in names


def spoiled(place):
    (place / "photos" / "dark" / "0.png").write_bytes(b"")
    (place / "photos" / "dark" / "1.png").write_bytes(b"")
    return "train photos", r"dark/0.png cannot be read .* 1 more cannot be read: .*dark/1.png"


def missing(place):
    return "train nowhere", "There is no folder nowhere"


def nowhere_to_write(place):
    return "train photos --out nowhere/model.safetensors", "There is no folder .*nowhere"


def no_model(place):
    return "predict nothing.safetensors photos", "There is no file nothing.safetensors"


def foreign_model(place):
    (place / "m.safetensors").write_bytes(b"PK what is this")
    return "predict m.safetensors photos", "m.safetensors cannot be read as a checkpoint .* damaged"


def no_classifier(place):
    save_file({"a": np.zeros(2)}, place / "m.safetensors")
    return "predict m.safetensors photos", "m.safetensors does not say what a classifier needs"


def no_image(place):
    return f"predict {NANO} nothing.jpg", "There is no file or folder nothing.jpg"


@pytest.mark.parametrize(
    "spoil", [spoiled, missing, nowhere_to_write, no_model, foreign_model, no_classifier, no_image]
)
def test_a_failure_is_one_sentence_and_exit_code_1(tmp_path, monkeypatch, capsys, spoil):
    import re

    write_classes(tmp_path / "photos", count=3)
    monkeypatch.chdir(tmp_path)
    command, message = spoil(tmp_path)
    assert main(command.split()) == 1
    shown = capsys.readouterr().err
    assert re.search(message, shown) and shown.startswith("gcvit: ") and "Traceback" not in shown


@pytest.mark.parametrize(
    "command",
    [
        "",
        "learn photos",
        "train",
        "train photos --preset gcvit_huge",
        "train photos --image-size 100",
        "train photos --image-size 32x32x32",
        "train photos --epochs 0",
        "train photos --validation-split 1.5",
        "predict model.safetensors",
    ],
)
def test_wrong_arguments_are_refused_with_exit_code_2(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], *([name] for name, _, _ in COMMANDS)])
def test_help_names_every_argument(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (["--json"] if command else ["train", "predict", "130"]))


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends


@pytest.fixture
def ctrl_c():
    """Let SIGINT interrupt: a shell's background job begins with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_the_best_weights_and_the_way_on(train, tmp_path, capsys):
    write_classes(tmp_path / "photos", count=4)
    assert train("photos --epochs=2", Interrupt()) == 130
    shown = capsys.readouterr()
    assert "Interrupted after 1 epochs; the weights are those of epoch 1" in shown.out
    assert (tmp_path / "photos.safetensors.backup" / "run.npz").is_file()
    assert "written: photos.safetensors" in shown.out and "Traceback" not in shown.err
    assert main(["predict", "photos.safetensors", "photos/dark"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_classifier_s_file_is_text_and_tensors(tmp_path):
    model = GCViT((8,), 8, (1,), (1,), num_classes=2)
    model.build((None, 32, 64, 3))
    fine_tuning.save_classifier(
        tmp_path / "m.safetensors", model, ["a", "b"], [32, 64], 0.875, epochs=3
    )
    again = fine_tuning.load_classifier(tmp_path / "m.safetensors")
    images = np.random.default_rng(0).normal(size=(2, 32, 64, 3)).astype("float32")
    np.testing.assert_allclose(again.model(images), model(images), atol=1e-6)
    assert again.notes == {"epochs": 3} and again.image_size == [32, 64]
    np.testing.assert_array_equal(again.mean, MEAN)
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    expected = normalize(resize(data.chelsea(), (32, 64), 0.875))
    np.testing.assert_allclose(again.image(tmp_path / "cat.png"), expected, atol=1e-6)
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        fine_tuning.load_classifier(tmp_path / "m.safetensors")


def test_convert_writes_reads_again_and_says_what_it_did(tmp_path, capsys):
    shipped = PACKAGED / "gcvit_nano-tiny_imagenet.safetensors"
    out = tmp_path / "nano.weights.h5"
    assert main(["convert", str(shipped), str(out)]) == 0
    shown = capsys.readouterr().out
    assert "1,673,236 parameters of gcvit_nano, official names" in shown and "step" in shown
    timm = str(tmp_path / "timm.safetensors")
    assert main(["convert", str(out), timm, "--naming=timm", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["naming"] == "release" and result["largest_error"] == 0


def test_convert_fails_in_one_sentence(tmp_path, capsys):
    (tmp_path / "page.keras").write_text("<html>")
    assert main(["convert", str(tmp_path / "page.keras"), str(tmp_path / "out.keras")]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("gcvit: ") and "is a web page, not a checkpoint" in shown.err
    assert not (tmp_path / "out.keras").exists()


class Weights(http.server.BaseHTTPRequestHandler):
    """Answers with 1,000 bytes for whatever is asked; what is called missing is not there."""

    def do_GET(self):
        self.server.requests.append(self.path)
        if "missing" in self.path:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(1000))

    def log_message(self, *args):
        pass


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Serve the weights of gcvit_xxtiny from here; yield the addresses that are asked for."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(fine_tuning, "flowers", lambda: server.requests.append("flowers"))
    with serving(Weights) as server:
        server.requests = []
        entries = {
            name: {"url": f"{server.url}/{name}", "name": name, "size": size, "sha256": None}
            for name, size in (("imagenet", 1000), ("official", None), ("missing", None))
        }
        monkeypatch.setitem(PRESETS["gcvit_xxtiny"], "weights", entries)
        yield server.requests


def test_prefetch_fetches_what_the_chapters_take_and_only_once(downloads, tmp_path, capsys):
    for _ in range(2):
        assert main(["prefetch"]) == 0
    assert downloads == ["/imagenet", "flowers", "flowers"]  # the second finds what is there
    shown = capsys.readouterr().out
    assert f"gcvit_xxtiny/imagenet is at {tmp_path / 'models' / 'imagenet'}" in shown
    assert "flowers: 229 MB" in shown and "1000/1000" in shown


def test_prefetch_takes_names_and_goes_on_after_a_failure(downloads, tmp_path, capsys):
    names = ["gcvit_xxtiny/missing", "gcvit_xxtiny/official", "gcvit_nano"]
    assert main(["prefetch", *names, "--json"]) == 1
    shown = capsys.readouterr()
    missing, official, nano = json.loads(shown.out)
    assert "Not Found" in missing["error"] and missing["error"] in shown.err
    assert official == {
        "name": "gcvit_xxtiny/official",
        "bytes": 1000,
        "path": str(tmp_path / "models" / "official"),
    }
    assert nano["path"] == str(NANO) and downloads == ["/missing", "/official"]


def test_prefetch_says_that_the_flowers_cannot_be_fetched(downloads, monkeypatch, capsys):
    def no_network():
        raise FetchError("no network")

    monkeypatch.setattr(fine_tuning, "flowers", no_network)
    assert main(["prefetch", "flowers"]) == 1
    assert capsys.readouterr().err == "gcvit: no network\n"


def test_prefetch_lists_what_there_is_and_fetches_nothing(downloads, capsys):
    assert main(["prefetch", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "gcvit_xxtiny/official: at least 48 MB" in lines and "flowers: 229 MB" in lines
    assert len(lines) == 1 + sum(len(preset["weights"]) for preset in PRESETS.values())
    assert downloads == []


def test_prefetch_all_takes_each_preset_s_first_weights(downloads, monkeypatch, tmp_path, capsys):
    first = PRESETS["gcvit_xxtiny"]["weights"]["imagenet"]
    for preset in set(PRESETS) - {"gcvit_nano"}:
        monkeypatch.setitem(PRESETS[preset], "weights", {"a": {**first, "name": preset}})
    assert main(["prefetch", "--all"]) == 0
    assert downloads == [*["/imagenet"] * (len(PRESETS) - 1), "flowers"]
    fetched = {path.name for path in (tmp_path / "models").iterdir()}
    assert fetched == set(PRESETS) - {"gcvit_nano"}


@pytest.mark.parametrize(
    "name, message",
    [("gcvit_huge", "none of gcvit_xxtiny, "), ("gcvit_nano/timm", "lists tiny_imagenet")],
)
def test_prefetch_names_what_it_knows(name, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["prefetch", name])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_example_in_the_readme_is_the_file_and_runs(tmp_path, monkeypatch, capsys):
    root = Path(__file__).resolve().parent.parent
    example = root / "examples" / "predict.py"
    text = example.read_text(encoding="utf-8")
    assert f"```python\n{text}```" in (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 30
    cat = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()).save(cat)
    monkeypatch.setattr(sys, "argv", [str(example), str(cat)])
    runpy.run_path(str(example), run_name="__main__")
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    classifier = fine_tuning.load_classifier(NANO)
    (probabilities,) = np.asarray(classifier.model(classifier.image(cat)[None]))
    names = json.loads(training_notes(NANO)["classes"])
    expected = sorted(zip(probabilities, names, strict=True), reverse=True)[:5]
    assert [name for _, name in rows] == [name for _, name in expected]
    for (shown, _), (probability, _) in zip(rows, expected, strict=True):
        assert float(shown) == pytest.approx(probability, abs=1e-3)


def printed(act):
    """Return what a successful run prints on a terminal of few letters."""
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    with contextlib.redirect_stdout(terminal):
        assert act() == 0
    terminal.flush()
    return terminal.buffer.getvalue()


def test_a_run_in_the_photographs_own_folder_can_be_run_again(train, tmp_path, monkeypatch):
    """Its files lie among the classes then, and names and output are of any letters."""
    photos = write_classes(tmp_path / "ph", ("花", "вишня"), 4)
    monkeypatch.chdir(photos)
    first = printed(lambda: train("."))
    assert rb"\u82b1" in first and b"starts from random weights." in first
    for left in (".x.part", "ph.safetensors.backup/.x.part"):  # by a run that was killed
        (photos / left).mkdir(parents=True)
        (photos / left / "run.npz").write_bytes(b"PK")
    again = printed(lambda: train(". --weights=ph.safetensors --out=m.safetensors"))
    assert b"the weights ph.safetensors, the head too" in again and b"at random" not in again
    assert again.count(b"A linear head on these weights, frozen: ") == 1
    assert b" (a head on the frozen weights alone: " in again
    predictions = printed(lambda: main(["predict", "m.safetensors", ".", "--top=2"])).splitlines()
    assert len(predictions) == 8 and all(rb"\u82b1 " in line for line in predictions)


def test_the_classes_of_the_weights_that_ship_are_known():
    preset = PRESETS["gcvit_nano"]
    assert _classes_in(preset, "tiny_imagenet") == json.loads(training_notes(NANO)["classes"])
    assert _classes_in(PRESETS["gcvit_xxtiny"], "imagenet") is None
    assert _classes_in(preset, "none") is None and _classes_in(preset, "m.keras") is None


class Spoil(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            bias = self.model.head.bias
            bias.assign(bias + float("nan"))


def test_a_training_that_diverges_is_a_failure(train, tmp_path, capsys):
    write_classes(tmp_path / "photos", count=3)
    assert train("photos --epochs=2 --json", Spoil()) == 1
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("gcvit: The training has diverged: in epoch 2 the loss is nan."), last
    assert last.endswith("They are in photos.safetensors.") and shown.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "photos.safetensors"]
    assert main(["predict", "photos.safetensors", "photos", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_json_has_no_numbers_that_are_not_finite():
    text = json_text({"a": [1.5, float("nan")], "b": (float("-inf"), None, "NaN", True)})
    assert text == '{"a": [1.5, null], "b": [null, null, "NaN", true]}'


@pytest.mark.parametrize(("text", "size"), [("64", 64), ("64x96", (64, 96)), ("32X32", (32, 32))])
def test_an_image_size_is_a_side_or_two(text, size):
    assert parser().parse_args(["train", "ph", "--image-size", text]).image_size == size


@pytest.mark.parametrize(("program", "shown"), [("/bin/gcvit", "gcvit"), ("m.py", "python -m")])
def test_the_help_names_the_command_as_it_was_called(monkeypatch, program, shown):
    monkeypatch.setattr(sys, "argv", [program])
    assert parser().format_usage().startswith(f"usage: {shown}")


def test_out_must_name_a_file(tmp_path, capsys):
    photos = write_classes(tmp_path / "photos", count=2)
    assert main(["train", str(photos), "--out", str(photos)]) == 1
    assert "photos is a folder; --out names a file" in capsys.readouterr().err


def test_a_classifier_of_one_channel_predicts_from_shades_of_gray(tmp_path):
    model = GCViT((8,), 8, (1,), (1,), num_classes=2, in_channels=1)
    model.build((None, 32, 32, 1))
    fine_tuning.save_classifier(tmp_path / "m.safetensors", model, ["a", "b"], 32)
    Image.fromarray(data.camera()).save(tmp_path / "a.png")
    classifier = fine_tuning.load_classifier(tmp_path / "m.safetensors")
    ((_, probabilities),) = classifier.predict([tmp_path / "a.png"])
    gray = resize(np.repeat(data.camera()[..., None], 3, axis=-1), 32)[..., :1]
    by_hand = (gray - MEAN.mean()) / STD.mean()
    expected = np.asarray(model(by_hand[None].astype("float32")))[0]
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_a_classifier_of_logits_gives_probabilities(tmp_path):
    model = tiny_model(head_activation=None)
    path = tmp_path / "m.safetensors"
    fine_tuning.save_classifier(path, model, np.array(["a", "b"]), np.int64(32))
    Image.fromarray(data.astronaut()).save(tmp_path / "a.png")
    classifier = fine_tuning.load_classifier(path)
    ((_, given),) = classifier.predict(tmp_path / "a.png")
    image = classifier.image(tmp_path / "a.png")[None].astype("float32")
    expected = keras.ops.convert_to_numpy(keras.ops.softmax(model(image)))[0]
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_a_classifier_has_a_name_for_each_class(tmp_path):
    for model, classes in ((tiny_model(), "2"), (tiny_model(include_top=False), "no")):
        with pytest.raises(ValueError, match=f"tells {classes} classes apart, and 1 names"):
            fine_tuning.save_classifier(tmp_path / "m.safetensors", model, ["a"], 32)
    assert not list(tmp_path.iterdir())


def test_what_is_no_classifier_is_said_in_the_words_of_its_kind(tmp_path):
    model, path = tiny_model(), tmp_path / "m.safetensors"
    model.save(tmp_path / "m.keras")
    fine_tuning.save_classifier(path, model, ["a", "b"], 32)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:9000])
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    said = {"m.keras": "holds weights alone", "cut": "damaged", "a.png": "kind that is not supp"}
    for name, message in said.items():
        with pytest.raises(CheckpointError, match=message):
            fine_tuning.load_classifier(tmp_path / name)


def test_a_classifier_of_four_channels_takes_no_photographs(tmp_path, capsys):
    model = GCViT((8,), 8, (1,), (1,), num_classes=2, in_channels=4)
    model.build((None, 32, 32, 4))
    path = str(tmp_path / "m.safetensors")
    fine_tuning.save_classifier(path, model, ["a", "b"], 32)
    Image.fromarray(data.camera()).save(tmp_path / "a.png")
    assert main(["predict", path, str(tmp_path / "a.png")]) == 1
    assert "takes images of 4 channels" in capsys.readouterr().err


def test_an_output_of_another_kind_is_refused_before_the_photographs_are_read(tmp_path, capsys):
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "m.keras")]) == 1
    assert "--out names a .safetensors file" in capsys.readouterr().err


def test_a_folder_without_photographs_is_named(tmp_path, capsys):
    assert main(["predict", str(NANO), str(tmp_path)]) == 1
    assert f"{tmp_path} holds no photographs." in capsys.readouterr().err


def test_an_error_of_the_system_becomes_a_sentence(tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", "m.safetensors")

    monkeypatch.setattr(fine_tuning, "load_classifier", refuse)
    assert main(["predict", str(NANO), str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert shown == "gcvit: m.safetensors cannot be used: Permission denied.\n"


def test_a_line_break_in_a_name_does_not_break_the_message(tmp_path, capsys):
    write_classes(tmp_path / "photos")
    (tmp_path / "photos" / "new\nline").mkdir()
    assert main(["train", str(tmp_path / "photos"), f"--out={tmp_path / 'm.safetensors'}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gcvit: ") and r"new\nline holds no photographs" in last
