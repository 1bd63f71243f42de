"""What is written is read back in a fresh process, the same numbers, or refused when written."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import gcvit
from gcvit.weights import load_checkpoint, save_safetensors, sublayers, weight_specs


def adapted(model):
    for path, _, layer in sublayers(model):
        if path.endswith(("qkv", "fc1")):
            layer.enable_lora(2)
            layer.lora_kernel_b.assign(0.2 + layer.lora_kernel_b)


def frozen(model):
    model.levels[0].blocks[0].trainable = False


def trained(model):
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    train_a_step(model)


def train_a_step(model):
    images = images_for(model)
    model.train_on_batch(images, np.zeros(model.compute_output_shape(images.shape)))


def quantized(model):
    model.quantize("int8")


CASES = {
    "as it is": ({},),
    "one channel": ({"in_channels": 1},),
    "four channels": ({"in_channels": 4},),
    "bfloat16": ({"dtype": "bfloat16"},),
    "mixed_float16": ({"dtype": "mixed_float16"},),
    "no top": ({"include_top": False},),
    "no pooling": ({"include_top": False, "pooling": None},),
    "layer scale": ({"layer_scale": 0.5, "qk_scale": 0.1, "qkv_bias": False},),
    "logits": ({"head_activation": None, "drop_rate": 0.2},),
    "windows": ({"window_size": ((3, 5),)},),
    "LoRA": ({}, adapted),
    "LoRA trained": ({}, adapted, trained),
    "frozen": ({}, frozen, trained),
    "trained": ({}, trained),
    "int8": ({}, quantized),
    "int8, LoRA": ({}, quantized, adapted, trained),
    "LoRA, int8": ({}, adapted, quantized, trained),
}
"""What a user can set, and do to a model after it is built."""

EIGHT_BITS = ("int8", "int8, LoRA", "LoRA, int8")
REFUSED = {(c, form) for c in EIGHT_BITS for form in ("h5", "shards", "safetensors", "classifier")}


def images_for(model):
    shape = (2, 32, 48, model.in_channels)
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def output_of(model):
    return keras.ops.convert_to_numpy(model(images_for(model))).astype("float32")


def training_of(model):
    """Return the state of a model's optimizer, and the output after one more step."""
    if not model.compiled:
        return []
    state = [keras.ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
    train_a_step(model)
    return [*state, output_of(model)]


def built(config, seed=0):
    model = gcvit.GCViT.from_config(config)
    model.build((None, 32, 48, model.in_channels))
    draw = np.random.default_rng(seed)
    for spec in weight_specs(model):  # zeros and ones would not show a mix-up
        spec.assign(draw.normal(size=spec.variable.shape) * 0.3)
    return model


# A form: the ending of its files, how to write it, and how to read it; `model` is a new one.


def write_classifier(model, path):
    from gcvit.fine_tuning import save_classifier

    save_classifier(path, model, ["a", "b", "c"], (32, 48))


def read_classifier(path, _):
    from gcvit.fine_tuning import load_classifier

    return load_classifier(path).model


def read_weights(path, model):
    model.load_weights(path)
    return model


def read_checkpoint(path, model):
    load_checkpoint(model, path)
    return model


FORMS = {
    "h5": (".weights.h5", lambda m, path: m.save_weights(path), read_weights),
    "shards": (
        ".weights.json",
        lambda m, path: m.save_weights(path, max_shard_size=2e-5),
        read_weights,
    ),
    "keras": (
        ".keras",
        lambda m, path: m.save(path),
        lambda path, _: keras.models.load_model(path),
    ),
    "safetensors": (".safetensors", save_safetensors, read_checkpoint),
    "classifier": (".classifier.safetensors", write_classifier, read_classifier),
}


def applies(case, form):
    """A classifier has a head."""
    return form != "classifier" or case not in ("no top", "no pooling")


def read_all(folder):
    """Run in a fresh process: read every file of the folder, write what its model computes."""
    cases = json.loads((folder / "cases.json").read_text())
    for case, files in cases["files"].items():
        model = built(cases["configs"][case], seed=1)  # other weights than those written
        for form, name in files.items():
            read = FORMS[form][2](folder / name, model)
            output, more = output_of(read), training_of(read) if form == "keras" else []
            np.savez(folder / f"{name}.npz", output, *more)


def in_a_fresh_process(folder):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path;"
        f" import test_round_trips; test_round_trips.read_all(Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_form_of_every_model_is_read_back_or_refused_when_written(tmp_path):
    files, configs, expected, refused = {}, {}, {}, {}
    for case, (options, *changes) in CASES.items():
        options = {"window_size": (4,), "path_drop": 0.0, **options}
        config = {"embed_dim": 8, "depths": (2,), "num_heads": (2,), "num_classes": 3}
        model = built({**config, **options})
        configs[case], files[case] = model.get_config(), {}
        for change in changes:
            change(model)
        output = output_of(model)
        for form, (ending, write, _) in FORMS.items():
            if not applies(case, form):
                continue
            name = case.replace(" ", "-") + ending
            try:
                write(model, tmp_path / name)
                files[case][form] = name
            except ValueError as error:
                refused[case, form] = str(error)
                assert not any(path.name.startswith(name) for path in tmp_path.iterdir())
        expected[case] = [output, *training_of(model)]
    (tmp_path / "cases.json").write_text(json.dumps({"files": files, "configs": configs}))
    in_a_fresh_process(tmp_path)
    for case, named in files.items():
        for form, name in named.items():
            given = np.load(tmp_path / f"{name}.npz")
            wanted = expected[case] if form == "keras" else expected[case][:1]
            for key, value in zip(given.files, wanted, strict=True):
                np.testing.assert_allclose(given[key], value, atol=1e-6, err_msg=name)
        row = ("equal" if f in named else "refused" * ((case, f) in refused) for f in FORMS)
        print(f"{case:15}", *(f"{cell or '-':12}" for cell in row))
    assert set(refused) == REFUSED
    assert all("quantized" in text for text in refused.values())


LEAVING = ("one channel", "bfloat16", "LoRA", "int8")
RUNNERS = {
    "tensorflow": """
import tensorflow as tf
def run(path, images):
    model = tf.saved_model.load(path)  # what it gives does not keep it
    return model.serve(images).numpy()
""",
    "torch": """
import onnxruntime
def run(path, images):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: images})[0]
""",
}
"""What runs an exported file without Keras, by the backend that writes it."""

RUN_ALL = """
import pathlib, sys, numpy as np
sys.modules["gcvit"] = None  # whatever needs it fails
for given in pathlib.Path(sys.argv[1]).glob("*.images.npy"):
    path = str(given).removesuffix(".images.npy")
    np.save(path + ".output.npy", run(path, np.load(given)))
"""


@pytest.mark.numerics
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="exports by way of TensorFlow")
def test_what_leaves_keras_gives_the_same_or_is_refused_before_it_is_written(tmp_path):
    """SavedModel on TensorFlow, ONNX on PyTorch."""
    backend = keras.backend.backend()
    if backend == "torch":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    expected = {}
    for case in LEAVING:
        options, *changes = CASES[case]
        config = {"embed_dim": 8, "depths": (1,), "num_heads": (2,), "num_classes": 3}
        model = built({**config, "window_size": (4,), "path_drop": 0.0, **options})
        for change in changes:
            change(model)
        path = tmp_path / case.replace(" ", "-")
        form = {"tensorflow": "tf_saved_model", "torch": "onnx"}[backend]
        try:
            model.export(path, format=form, verbose=False)
        except ValueError as error:
            assert "cannot write some part of this model as ONNX" in str(error)
            assert not path.exists() and case in ("bfloat16", "int8")
            continue
        np.save(f"{path}.images.npy", images_for(model))
        expected[f"{path}.output.npy"] = output_of(model)
    command = [sys.executable, "-c", RUNNERS[backend] + RUN_ALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(expected) >= 2
    for path, output in expected.items():
        tolerance = 0.02 if "bfloat16" in path else 1e-5
        np.testing.assert_allclose(np.load(path), output, atol=tolerance, err_msg=path)
