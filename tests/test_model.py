import contextlib
import errno
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import once, run, run_features, slow_on_jax, small_model, to_numpy

import gcvit
from gcvit import PRESETS, GCViT, load_checkpoint
from gcvit.pretrained import scaled_windows
from gcvit.unit_blocks import reinit_glorot

pytestmark = pytest.mark.numerics
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def model(timm_file):
    model = small_model()
    load_checkpoint(model, timm_file)
    return model


def test_logits_agree_with_timm(model, timm_small, small_images):
    logits = run(model, small_images)
    np.testing.assert_allclose(logits, timm_small["logits"], atol=2e-5)
    np.testing.assert_allclose(
        model.predict(small_images, verbose=0), timm_small["logits"], atol=2e-5
    )


def test_maps_of_the_stages_agree_with_timm(model, timm_small, small_images):
    maps = run_features(model, small_images)
    for i in (1, 2, 3):
        np.testing.assert_allclose(maps[f"stage_{i}"], timm_small[f"features/stage_{i}"], atol=2e-5)


def test_layer_scale_agrees_with_timm(tmp_path, small_images):
    from conftest import FIXTURES, state_of, write_safetensors

    fixture = np.load(FIXTURES / "timm_small_layer_scale.npz")
    write_safetensors(tmp_path / "m.safetensors", state_of(fixture))
    model = small_model(layer_scale=0.5)
    load_checkpoint(model, tmp_path / "m.safetensors")
    np.testing.assert_allclose(run(model, small_images), fixture["logits"], atol=2e-5)


def test_a_picture_does_not_depend_on_its_batch(model, small_images):
    both = run(model, small_images)
    turned = run(model, small_images[::-1])[::-1]
    alone = np.concatenate([run(model, small_images[i : i + 1]) for i in (0, 1)])
    np.testing.assert_allclose(both, turned, atol=5e-6)
    np.testing.assert_allclose(both, alone, atol=5e-6)


def test_training_drops_paths_sample_by_sample():
    """The step that `fit` runs drops paths; the one that `evaluate` runs does not."""
    model = GCViT((7,), 8, (2,), (1,), path_drop=0.5, num_classes=3, mlp_ratio=1.0)
    model.build((None, 32, 32, 3))
    compiled = keras.backend.backend() == "jax"  # op by op it takes half a minute there
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(model.trainable_variables)  # else TensorFlow traces the step twice
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=compiled)
    image = RNG.normal(size=(1, 32, 32, 3)).astype("float32")
    batch, labels = np.repeat(image, 8, axis=0), np.zeros(8, int)
    assert len({float(model.train_on_batch(batch, labels)) for _ in range(4)}) > 1
    assert len({float(model.test_on_batch(batch, labels)) for _ in range(2)}) == 1
    if keras.backend.backend() == "jax":
        return  # the steps above have shown it
    trained = to_numpy(model(batch, training=True))
    assert np.abs(trained - trained[0]).max() > 1e-6  # one image, eight different outcomes
    assert np.ptp(run(model, batch), axis=0).max() < 1e-6


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((32, 32), marks=slow_on_jax),
        (97, 61),
        pytest.param((224, 320), marks=slow_on_jax),
    ],
)
def test_any_size_from_32_px(model, size):
    images = RNG.normal(size=(1, *size, 3)).astype("float32")
    assert run(model, images).shape == (1, 10)
    sides = [[-(-side // stride) for side in size] for stride in (4, 8, 16, 32)]
    maps = run_features(model, images)
    assert [list(value.shape[1:3]) for value in maps.values()] == sides


@slow_on_jax
def test_sizes_unknown_when_built_give_the_same():
    known = tiny_model()
    reinit_glorot(known)  # so that its answers depend on the image
    unknown = GCViT.from_config(known.get_config())
    unknown.build((None, None, None, 3))
    unknown.set_weights(known.get_weights())
    graph = unknown.build_graph((None, None, 3))
    for size in (64, 45):
        images = RNG.normal(size=(2, size, size, 3)).astype("float32")
        wanted = run(known, images)
        assert np.ptp(wanted, axis=0).max() > 1e-3
        np.testing.assert_array_equal(run(unknown, images), wanted)
        np.testing.assert_allclose(graph.predict(images, verbose=0), wanted, atol=2e-5)


@once
def test_windows_scaled_to_224_px_are_the_presets(model, small_images):
    windows = scaled_windows(224)
    assert windows == ((7, 7), (7, 7), (14, 14), (7, 7))
    scaled = small_model(window_size=windows)
    scaled.set_weights(model.get_weights())
    np.testing.assert_array_equal(run(scaled, small_images), run(model, small_images))
    preset = GCViT.from_preset("gcvit_nano", weights=None, image_size=224)
    assert preset.window_size == windows
    assert scaled_windows((384, 512)) == ((12, 16), (12, 16), (24, 32), (12, 16))
    with pytest.raises(ValueError, match="multiples of 32; got 230 x 230 px"):
        scaled_windows(230)


@once
def test_summary_is_the_published_table():
    model = GCViT.from_preset("gcvit_xxtiny", weights=None)
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        model.summary(print_fn=lambda line: print(line))
    table = lines.getvalue()
    rows = {
        "patch_embed": ("(None, 56, 56, 64)", "45,632"),
        "levels_0": ("(None, 28, 28, 128)", "180,964"),
        "levels_1": ("(None, 14, 14, 256)", "688,456"),
        "levels_2": ("(None, 7, 7, 512)", "5,170,608"),
        "levels_3": ("(None, 7, 7, 512)", "5,395,744"),
        "norm": ("(None, 7, 7, 512)", "1,024"),
        "pool": ("(None, 512)", "0"),
        "head": ("(None, 1000)", "513,000"),
    }
    for name, cells in rows.items():
        row = next(line for line in table.splitlines() if f" {name} " in line)
        assert all(cell in row for cell in cells), row
    assert "11,995,428" in table


@once
@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_the_presets(name, monkeypatch):
    # Two hundred million random numbers take longer than the rest, and are not counted.
    for kind in ("RandomNormal", "RandomUniform", "VarianceScaling"):
        monkeypatch.setattr(
            getattr(keras.initializers, kind),
            "__call__",
            lambda self, shape, dtype=None: keras.ops.zeros(shape, dtype),
        )
    assert GCViT.from_preset(name, weights=None).count_params() == PRESETS[name]["parameters"]


@once
def test_every_layer_is_built_and_used():
    model = GCViT((2, 4), 8, (2, 2), (1, 2), num_classes=3)
    model.build((None, 32, 32, 3))
    assert all(layer.built for layer in model._flatten_layers())
    made = {id(layer) for layer in model._flatten_layers()}
    called = set()
    call = keras.layers.Layer.__call__

    def noted(self, *args, **kwargs):
        called.add(id(self))
        return call(self, *args, **kwargs)

    keras.layers.Layer.__call__ = noted
    try:
        model(np.zeros((1, 32, 32, 3)))
    finally:
        keras.layers.Layer.__call__ = call
    assert made <= called


@slow_on_jax
def test_exported_file_gives_the_same(tmp_path):
    """Each backend writes a form of its own, which is run without Keras."""
    model = tiny_model()
    images = RNG.normal(size=(3, 32, 32, 3)).astype("float32")
    if keras.backend.backend() == "torch":
        import torch

        path = tmp_path / "m.pt2"
        batch = {0: torch.export.Dim("batch")}
        model.export(path, format="torch", dynamic_shapes=batch, verbose=False)
        given = torch.from_numpy(images)
        exported = torch.export.load(path).module()(given).detach().numpy()
    else:
        import tensorflow as tf

        model.export(tmp_path / "m", verbose=False)
        archive = tf.saved_model.load(tmp_path / "m")
        exported = archive.serve(images).numpy()
    np.testing.assert_allclose(exported, run(model, images), atol=1e-6)


def test_onnx_gives_the_same_or_says_what_it_needs(tmp_path):
    model = tiny_model()
    if keras.backend.backend() != "torch":
        with pytest.raises(ValueError, match="on PyTorch only, and the backend is"):
            model.export(tmp_path / "m.onnx", format="onnx")
        return
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model.export(tmp_path / "m.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for batch in (1, 3):
        images = RNG.normal(size=(batch, 32, 32, 3)).astype("float32")
        (exported,) = session.run(None, {session.get_inputs()[0].name: images})
        np.testing.assert_allclose(exported, run(model, images), atol=1e-6)


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=slow_on_jax)]
)
def test_half_precision_stays_near(model, small_images, policy, timm_file):
    half = small_model(dtype=policy)
    load_checkpoint(half, timm_file)
    images = small_images[:, :64, :64]
    logits = run(half, images)
    assert logits.dtype == np.float32
    exact = run(model, images)
    limit = 0.1 if policy == "mixed_bfloat16" else 0.02
    assert np.abs(logits - exact).max() < limit * np.abs(exact).max()


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_float16", "mixed_bfloat16"])
@slow_on_jax
def test_half_precision_trains_a_step(policy):
    model = GCViT((7,), 16, (2,), (2,), num_classes=3, dtype=policy)
    # Not Adam: its beta_2 of 0.999 is 1 in bfloat16, and a step then has the length 0.
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy", run_eagerly=True)
    model.build((None, 32, 32, 3))
    reinit_glorot(model)  # from the narrow start, gradients are too small for bfloat16's steps
    images = RNG.normal(size=(4, 32, 32, 3)).astype("float32")
    before = [to_numpy(v).astype("float32") for v in model.trainable_variables]
    losses = [float(model.train_on_batch(images, np.array([0, 1, 2, 0]))) for _ in range(3)]
    after = [to_numpy(v).astype("float32") for v in model.trainable_variables]
    assert np.isfinite(losses).all()
    assert all(np.isfinite(values).all() for values in after)
    # The loss itself may stand still: bfloat16 has three digits.
    moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert np.mean(moved) > 0.7, np.mean(moved)


@once
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(np.zeros((1, 31, 224, 3))), "at least 32 px a side; got height 31"),
        (lambda m: m(np.zeros((224, 224, 3))), r"rank 4; got shape \(224, 224, 3\), rank 3"),
        (lambda m: m(np.zeros((1, 3, 224, 224))), r"3 channels in the last axis; got 224"),
        (lambda m: m(np.zeros((1, 224, 224, 1))), r"3 channels in the last axis; got 1"),
        (lambda m: m.features(np.zeros((1, 16, 16, 3))), "at least 32 px"),
        (lambda m: small_model(num_heads=(1, 2, 4)), "'num_heads': 3"),
        (lambda m: small_model(depths=2), "depths must list a value for each level; got 2"),
        (lambda m: small_model(num_heads=(3, 2, 4, 8)), "16 channels and 3 heads"),
        (lambda m: small_model(num_classes=0), "num_classes must be a positive integer; got 0"),
        (lambda m: small_model(pooling="max"), 'pooling must be "avg" or None'),
        (lambda m: small_model(window_size=(7, 7, 14, 0)), "window_size must be a positive"),
        (lambda m: small_model(path_drop=1.0), r"path_drop must be in \[0, 1\)"),
        (lambda m: GCViT.from_preset("gcvit_xxtny"), "Nearest: gcvit_xxtiny"),
        (lambda m: GCViT.from_preset("gcvit_nano", "tiny_imagenets"), "Nearest: tiny_imagenet"),
    ],
)
def test_what_does_not_fit_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@once
def test_the_shipped_checkpoint_loads_without_a_network(nano):
    probabilities = run(nano, np.zeros((1, 128, 128, 3), "float32"))
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-5)


@slow_on_jax
def test_features_make_a_functional_model(model):
    given = keras.Input((64, 64, 3))
    images = RNG.normal(size=(2, 64, 64, 3)).astype("float32")
    maps = keras.Model(given, model.features(given)).predict_on_batch(images)
    for name, value in run_features(model, images).items():
        np.testing.assert_allclose(to_numpy(maps[name]), value, atol=2e-5)


@once
def test_a_new_head_is_new_even_with_as_many_classes(nano, capsys):
    new = GCViT.from_preset("gcvit_nano", new_head=True)
    assert "The head, of 200 classes, starts at random." in capsys.readouterr().out
    pairs = list(zip(nano.weights, new.weights, strict=True))
    same = [np.array_equal(to_numpy(a), to_numpy(b)) for a, b in pairs]
    assert [a.path.split("/")[-2:] for (a, _), s in zip(pairs, same, strict=True) if not s] == [
        ["head", "kernel"],
        ["head", "bias"],
    ]


@slow_on_jax
def test_features_of_a_size_not_known_yet_make_a_functional_model(model, tmp_path):
    given = keras.Input((None, None, 3))
    keras.Model(given, model.features(given)).save(tmp_path / "features.keras")
    read = keras.models.load_model(tmp_path / "features.keras")
    images = RNG.normal(size=(1, 75, 110, 3)).astype("float32")
    maps = read.predict_on_batch(images)
    for name, value in run_features(model, images).items():
        np.testing.assert_allclose(to_numpy(maps[name]), value, rtol=1e-4, atol=5e-5)


@slow_on_jax
def test_without_top_come_the_last_map_and_its_mean(model, small_images):
    last = run_features(model, small_images)["stage_3"]
    for pooling, wanted in ((None, last), ("avg", last.mean(axis=(1, 2)))):
        headless = small_model(include_top=False, pooling=pooling)
        headless.set_weights(model.get_weights()[: len(headless.weights)])
        np.testing.assert_allclose(run(headless, small_images), wanted, atol=2e-5)


@slow_on_jax
def test_a_head_on_the_maps_of_a_frozen_backbone_trains():
    backbone = GCViT.from_preset("gcvit_nano")
    backbone.trainable = False
    before = backbone.get_weights()
    given = keras.Input((64, 64, 3))
    model = keras.Model(given, keras.layers.Dense(2)(backbone.features(given)["stage_0"]))
    assert len(model.trainable_weights) == 2
    images = RNG.normal(size=(4, 64, 64, 3)).astype("float32")
    images[:2, :, :32] *= 3  # noisier on the left, or on the right
    images[2:, :, 32:] *= 3
    truth = np.zeros((4, 16, 16), "int32")
    truth[:2, :, :8] = truth[2:, :, 8:] = 1
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss)
    losses = [float(model.train_on_batch(images, truth)) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
    for old, new in zip(before, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def tiny_model():
    model = GCViT((2, 4), 8, (2, 1), (1, 2), num_classes=3)
    model.build((None, 32, 32, 3))
    return model


@once
def test_a_photograph_that_is_not_normalized_is_refused_by_name():
    photograph = np.full((1, 32, 32, 3), 200, "uint8")
    with pytest.raises(ValueError, match="got uint8. .* gcvit.images.normalize"):
        tiny_model().predict(photograph, verbose=0)


@once
def test_to_build_what_is_built_changes_the_size_alone():
    model = tiny_model()
    before = model.weights
    model.build((None, 64, 48, 3))
    assert all(a is b for a, b in zip(before, model.weights, strict=True))
    assert model.build_graph().input_shape == (None, 64, 48, 3)


@slow_on_jax
def test_it_is_a_base_as_keras_applications_are():
    base = tiny_model()
    base.summary(print_fn=lambda text, **options: None)
    images = RNG.normal(size=(2, 32, 32, 3)).astype("float32")
    maps = keras.Model(base.inputs, base.get_layer("norm").output)
    assert len(run(maps, images).shape) == 4
    twin = keras.Model(base.inputs, base.outputs)
    np.testing.assert_allclose(run(twin, images), run(base, images), atol=1e-6)
    new = keras.Model(base.input, keras.layers.Dense(2)(base.output))
    assert run(new, images).shape == (2, 2)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        base.nothing  # noqa: B018


@once
@pytest.mark.parametrize("preset", ["gcvit_tiny", "gcvit_large_384", "gcvit_nano"])
def test_a_presets_first_weights_are_its_default(preset, monkeypatch):
    asked = []
    monkeypatch.setattr("gcvit.weights.locate", lambda entry: asked.append(entry) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        GCViT.from_preset(preset)
    assert asked == [next(iter(PRESETS[preset]["weights"].values()))]


@once
@pytest.mark.parametrize("channels, done", [(1, "summed"), (4, "repeated and scaled")])
def test_weights_of_three_colors_serve_others(channels, done, nano, capsys):
    model = GCViT.from_preset("gcvit_nano", in_channels=channels)
    assert f"kernel is {done} for images of {channels} channels." in capsys.readouterr().out
    first = to_numpy(model.patch_embed.proj.kernel)
    given = to_numpy(nano.patch_embed.proj.kernel)
    expected = given.sum(axis=2, keepdims=True)
    if channels == 4:  # the colors, the first one again, and each three quarters as strong
        expected = given[:, :, [0, 1, 2, 0]] * 0.75
    np.testing.assert_allclose(first, expected, atol=1e-6)


@slow_on_jax
def test_eight_bits_stay_near():
    model = GCViT.from_preset("gcvit_nano")
    images = RNG.normal(size=(4, 128, 128, 3)).astype("float32")
    exact = run(model, images)
    for wrong, message in (
        ({"mode": "float8"}, "got 'float8'"),
        ({"config": keras.quantizers.Int4QuantizationConfig()}, "got 'int4'"),
        ({"mode": "int8", "filters": "mpl"}, "No dense layer passes the filters 'mpl'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.quantize(**wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.quantize("int8")
    dense = [s for s in model._flatten_layers() if isinstance(s, keras.layers.Dense)]
    assert all(layer.quantization_mode == "int8" for layer in dense)
    assert 0 < np.abs(run(model, images) - exact).max() < 0.1


@once
def test_another_ending_is_refused_before_anything_is_written(tmp_path):
    for name in ("m.h5", "m"):
        with pytest.raises(ValueError, match=f"is saved as .keras.* got .*/{name}\\."):
            tiny_model().save(tmp_path / name)
        with pytest.raises(ValueError, match=f"saved as .weights.h5.* got .*/{name}\\."):
            tiny_model().save_weights(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, form", [("m.tflite", "litert"), ("m", "tf_saved_model")])
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="written on TensorFlow")
def test_an_export_that_breaks_off_leaves_what_was_there(name, form, model, tmp_path, monkeypatch):
    def breaks_off(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keras.Model, "export", breaks_off)
    (tmp_path / name).write_bytes(b"whole")
    with pytest.raises(OSError, match=f"{name} cannot be written .No space left on device"):
        model.export(tmp_path / name, format=form)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]
    with pytest.raises(ValueError, match=r"must end in \.tflite; got m\.keras"):
        model.export("m.keras", format="litert")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="written on TensorFlow")
def test_litert_gives_the_same(tmp_path):
    import tensorflow as tf

    model = tiny_model()
    images = RNG.normal(size=(1, 32, 32, 3)).astype("float32")
    model.export(tmp_path / "m.tflite", format="litert", verbose=False)
    reader = tf.lite.Interpreter(str(tmp_path / "m.tflite"))
    reader.allocate_tensors()
    reader.set_tensor(reader.get_input_details()[0]["index"], images)
    reader.invoke()
    (given,) = (reader.get_tensor(out["index"]) for out in reader.get_output_details())
    np.testing.assert_allclose(given, run(model, images), atol=1e-6)


FRESH = """
import sys, time
import keras
begin = time.process_time()
import gcvit
print(time.process_time() - begin, "tensorflow" in sys.modules)
print(*keras.saving.get_custom_objects())
model = keras.models.load_model(sys.argv[1])
print(len(model.optimizer.variables))
"""


@once
def test_importing_the_package_is_quick_and_enough_to_read_any_model(tmp_path):
    """It imports no TensorFlow on JAX, and knows every class that a saved model can name."""
    from gcvit.fine_tuning import adamw

    model = tiny_model()
    model.compile(adamw(1e-3), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "m.keras")
    imported, known, count = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "m.keras"],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    seconds, tensorflow = imported.split()
    assert tensorflow == "False" and float(seconds) < 0.3
    sources = (path.read_text() for path in Path(gcvit.__file__).parent.rglob("*.py"))
    registered = r'register_keras_serializable\(package="(\w+)"\)\nclass (\w+)'
    named = {">".join(pair) for source in sources for pair in re.findall(registered, source)}
    assert len(named) > 15 and named <= set(known.split())
    assert {name for name in known.split() if name.startswith("gcvit>")} <= named
    assert int(count) == len(model.optimizer.variables)


@once
@pytest.mark.parametrize("largest, said", [(255, "go up to 25"), (1, "are 0 to 1")])
def test_arrays_that_are_not_normalized_are_said(largest, said):
    model = tiny_model()
    images = largest * RNG.uniform(size=(2, 32, 32, 3)).astype("float32")
    model.compile("sgd", "mse", run_eagerly=True)
    for use in (model, model.predict, lambda x: model.evaluate(x, np.zeros((2, 3)), verbose=0)):
        with pytest.warns(UserWarning, match=f"not normalized: their numbers {said}"):
            use(images)


@once
def test_plain_fit_says_what_keras_passes_over():
    model = tiny_model()
    images, labels = RNG.normal(size=(4, 32, 32, 3)).astype("float32"), np.array([0, 1, 0, 1])
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.raises(ValueError, match="label 3 is outside the 3 classes"):
        model.fit(images, labels + 2, verbose=0)
    with pytest.raises(ValueError, match="not finite: look for NaN"):
        model.fit(images * np.nan, labels, verbose=0)
    model.norm.gamma.assign(np.full(16, np.nan))
    with pytest.warns(UserWarning) as warned:
        model.fit(100 * images, labels, verbose=0)
    said = " ".join(str(each.message) for each in warned)
    assert "The images are not normalized" in said and "In epoch 1 the loss is nan" in said
    end = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None)
    assert len(model.fit(images, labels, epochs=2, callbacks=end, verbose=0).epoch) == 2


@once
def test_a_frozen_model_is_read_back_frozen(tmp_path):
    model = tiny_model()
    model.trainable = False
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert not again.trainable and not again.trainable_weights


@once
@pytest.mark.parametrize("dtype", ["float16", "mixed_float16", "bfloat16"])
def test_to_quantize_half_precision_is_refused_with_the_way_out(dtype):
    model = GCViT((2,), 8, (1,), (1,), num_classes=3, dtype=dtype)
    model.build((None, 32, 32, 3))
    with pytest.raises(ValueError, match=r"quantized from float32; .* Build it without dtype"):
        model.quantize("int8")


@once
def test_a_model_is_quantized_once_and_after_it_is_built():
    model = GCViT((2,), 8, (1,), (1,), num_classes=3)
    with pytest.raises(ValueError, match="Build the model before"):
        model.quantize("int8")
    model.build((None, 32, 32, 3))
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize("int8")
