"""Use the package as people do, at random, and count what comes of it.

    python tools/reproduce/properties.py --minutes 60

Hypothesis draws folders of photographs, gray levels, foreign checkpoints, orders of calls on a
model, and command lines. What is asked of each is that nothing is lost, altered or left out
without a word: it works and gives the right numbers, or the package says in a sentence of its own
why not, and all is as it was. `tests/test_properties.py` runs a few of each, always the same.
"""

import argparse
import collections
import contextlib
import gc
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import keras
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image

import gcvit
from gcvit import fine_tuning
from gcvit.images import DatasetError, read_photograph
from gcvit.weights import save_safetensors, sublayers, weight_specs

COUNTS = collections.Counter()
"""How often each property ended in which way: {(property, outcome): times}."""

NAMES = ("a", "a b", "-x", "花", "Čeština", "%s{0}", "it's", 'q"', "new\nline", "caf\udce9", "a,b")
NAMES += ("0", "x.backup", "m.safetensors", "CON", "@home", "a.b.c", "e\u0301")
"""Names that people, and other systems, give to files and folders."""


def is_own(error):
    """Tell whether the package itself has raised an error, with a sentence."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    package = Path(gcvit.__file__).parent
    return raised_in.is_relative_to(package) and str(error).rstrip().endswith((".", ")"))


@contextlib.contextmanager
def workplace():
    """Yield an empty folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def snapshot(folder):
    """Return what lies in a folder: {path: bytes, target of the link, or kind}."""
    there = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            there[path] = os.readlink(path)
        else:
            there[path] = path.read_bytes() if path.is_file() else "else"
    return there


# Photographs: files of every kind, written from a picture that is known.

MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "mpo": ("RGB",),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "gif": ("L", "P", "RGB"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB"),
    "ppm": ("1", "L", "RGB"),
    "tga": ("L", "P", "RGB", "RGBA"),
}
LOSSY = ("jpg", "mpo", "webp")
WITH_EXIF = ("png", "jpg", "webp", "tif")
STORED_FOR = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270", 2: "FLIP_LEFT_RIGHT"}
STORED_FOR |= {4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 7: "TRANSVERSE"}
"""How a camera that says this orientation has turned what was to be seen."""


@st.composite
def photos(draw):
    """Draw how a photograph is stored."""
    ending = draw(st.sampled_from(sorted(MODES)))
    return {
        "ending": ending,
        "mode": draw(st.sampled_from(MODES[ending])),
        "orientation": draw(st.integers(1, 8)) if ending in WITH_EXIF else 1,
        "pictures": draw(st.integers(1, 2)) if ending in ("gif", "webp", "png", "mpo") else 1,
        "seed": draw(st.integers(0, 10**6)),
    }


def write_photo(path, photo):
    """Write a photograph; return what is to be seen on it, and how far off it may be read."""
    draw = np.random.default_rng(photo["seed"])
    ends = draw.integers(0, 256, (2, 2, 3)).astype("uint8")
    ends[0, 0], ends[1, 1] = 0, 255
    seen = Image.fromarray(ends).resize((40, 24), Image.Resampling.BILINEAR)
    mode, deep = photo["mode"], photo["mode"] in ("I;16", "I", "F")
    gray = np.asarray(seen.convert("L"))
    if mode in ("LA", "RGBA"):
        seen.putalpha(Image.fromarray(gray[::-1]))
    seen = seen.convert("L" if deep else mode)
    if "A" in mode:
        rgba = np.asarray(seen.convert("RGBA")).astype(float)
        expected = 255 + (rgba[..., :3] - 255) * rgba[..., 3:] / 255
    else:
        expected = np.asarray(seen.convert("RGB")).astype(float)
    options = {}
    if photo["orientation"] > 1:
        exif = Image.Exif()
        exif[0x0112] = photo["orientation"]
        options["exif"] = exif
        seen = seen.transpose(Image.Transpose[STORED_FOR[photo["orientation"]]])
    if deep:
        levels = np.asarray(seen).astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
        seen = Image.fromarray(levels * 257 if mode == "I;16" else levels)
    if photo["pictures"] > 1:
        options |= {"save_all": True, "append_images": [Image.new(seen.mode, seen.size)]}
    if photo["ending"] == "webp":
        options["quality"] = 95
    seen.save(path, Image.registered_extensions()[f".{photo['ending']}"], **options)
    return expected, 12 if photo["ending"] in LOSSY + ("gif",) else 1


def looks_like(image, expected, tolerance):
    return image.shape == expected.shape and np.abs(image - expected).mean() <= tolerance


# Folders of photographs.

JUNK = ("Thumbs.db", ".DS_Store", "desktop.ini", "._1.jpg", "@eaDir", "__MACOSX", ".hidden")
EXTRAS = ("photo", "subfolder", "junk", "link", "link to a folder", "circle", "output", "copy")
FAULTS = ("damaged", "text", "broken link", "unreadable", "unreadable folder", "pipe", "loose")
FAULTS += ("of another class", "empty class", "alone in its class")


@st.composite
def folders(draw):
    """Draw a folder of two classes, each with two photographs, and what else lies in it."""
    kinds = st.sampled_from(EXTRAS) | st.sampled_from(FAULTS)
    extra = st.tuples(kinds, photos(), st.sampled_from(NAMES), st.integers(0, 1))
    return {
        "classes": draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True)),
        "photos": draw(st.lists(photos(), min_size=4, max_size=4)),
        "extras": draw(st.lists(extra, max_size=3)),
    }


class Folder:
    """A folder as it was drawn, with what is to come of it.

    Attributes:
        expected: (class, what is to be seen, how far off) for each photograph.
        faults: paths of which the message must name one.
        unreadable: paths that may not be opened.
    """

    def __init__(self, place, case, output):
        self.place, self.root = place, place / "ph"
        self.outside, self.output = place / "elsewhere", output
        self.expected, self.faults, self.unreadable, self.count = [], [], set(), 0
        self.outside.mkdir()
        for k, name in enumerate(case["classes"]):
            (self.root / name).mkdir(parents=True)
            for photo in case["photos"][2 * k : 2 * k + 2]:
                self.photo(self.root / name, photo, name, str(k))
        for kind, photo, name, k in case["extras"]:
            self.count += 1
            self.add(kind, photo, name, case["classes"], k)

    def photo(self, folder, photo, of_class, name=""):
        """Write a photograph that is expected; no two are the same."""
        self.count += 1
        path = folder / f"{name}{self.count}.{photo['ending']}"
        photo = {**photo, "seed": 100 * photo["seed"] + self.count}
        self.expected.append((of_class, *write_photo(path, photo)))
        return path

    def add(self, kind, photo, name, classes, k):
        of_class, folder, n = classes[k], self.root / classes[k], self.count
        path = folder / f"{name}{n}"
        if kind == "photo":
            self.photo(folder, photo, of_class, name)
        elif kind == "subfolder":
            path.mkdir()
            self.photo(path, photo, of_class, name)
        elif kind == "junk":
            (folder / JUNK[n % len(JUNK)]).write_bytes(b"\0")
        elif kind == "link":
            path.symlink_to(self.photo(self.outside, photo, of_class))
        elif kind == "link to a folder":
            (self.outside / str(n)).mkdir()
            self.photo(self.outside / str(n), photo, of_class)
            path.symlink_to(self.outside / str(n))
        elif kind == "circle":
            path.symlink_to(folder)
        elif kind == "output":
            shutil.copy(self.output, self.root / f"{name}{n}.safetensors")
            (self.root / f"{name}{n}.safetensors.backup").mkdir()
        elif kind == "copy":
            whole = self.photo(folder, photo, of_class)
            shutil.copy(whole, path)
            self.expected.append(self.expected[-1])
        else:
            self.faults.append(self.add_fault(kind, photo, path, classes, k))

    def add_fault(self, kind, photo, path, classes, k):
        if kind == "damaged":
            whole = write_photo(path, {**photo, "ending": "png", "mode": "RGB", "pictures": 1})
            path.write_bytes(path.read_bytes()[: len(whole[0]) * 3])
        elif kind == "text":
            path.write_text("three dogs")
        elif kind == "broken link":
            path.symlink_to("nowhere")
        elif kind == "unreadable":
            write_photo(path, {**photo, "ending": "png", "mode": "RGB", "pictures": 1})
            self.unreadable.add(os.fspath(path))
        elif kind == "unreadable folder":
            path.mkdir()
            self.unreadable.add(os.fspath(path))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "loose":
            path = self.root / f"{path.name}.{photo['ending']}"
            write_photo(path, photo)
        elif kind == "of another class":
            other = sorted((self.root / classes[1 - k]).iterdir())
            whole = next(each for each in other if each.is_file())
            shutil.copy(whole, path)
        else:
            path = self.root / f"few{self.count}"
            path.mkdir()
            if kind == "alone in its class":
                write_photo(path / "only.png", {**photo, "ending": "png", "mode": "RGB"})
        return path

    @contextlib.contextmanager
    def permissions(self):
        """Forbid what may not be opened; by hand, since nothing is forbidden to root."""

        def guarded(usual):
            def opened(path, *args, **options):
                if not isinstance(path, int) and os.fspath(path) in self.unreadable:
                    raise PermissionError(13, "Permission denied", os.fspath(path))
                return usual(path, *args, **options)

            return opened

        with contextlib.ExitStack() as stack:
            for name in ("builtins.open", "io.open", "os.listdir", "os.scandir"):
                module, attribute = name.split(".")
                usual = getattr(sys.modules[module], attribute)
                stack.enter_context(mock.patch(name, guarded(usual)))
            yield


def check_folder(case, output):
    """Every photograph of a folder is used as what it is, or the folder is refused by name."""
    with workplace() as place:
        folder = Folder(place, case, output)
        before = snapshot(place)
        try:
            with folder.permissions():
                taken = fine_tuning.from_folder(folder.root)
        except DatasetError as error:
            assert is_own(error), f"a foreign sentence: {error}"
            assert folder.faults, f"refused, though nothing is wrong: {error}"
            named = any(os.fspath(path) in str(error) for path in folder.faults)
            assert named, f"{error} names none of {folder.faults}"
            COUNTS["folder", "refused"] += 1
        else:
            assert not folder.faults, f"taken without a word: {folder.faults}"
            left = list(folder.expected)
            for image, label in [*taken.train, *taken.validation]:
                of_class, image = taken.class_names[int(label)], image.numpy().astype(float)
                same = (
                    each for each in left if each[0] == of_class and looks_like(image, *each[1:])
                )
                match = next(same, None)
                assert match is not None, f"a photograph of {of_class!r} is not what was written"
                left = [each for each in left if each is not match] + (
                    [match] * (sum(each is match for each in left) - 1)
                )
            assert not left, f"left out: {[each[0] for each in left]}"
            COUNTS["folder", "used"] += 1
        assert snapshot(place) == before, "the folder is changed"


# Gray levels of any depth.


@st.composite
def levels(draw):
    """Draw the range, type and file of a gray ramp."""
    ending, dtype = draw(
        st.sampled_from([("png", "uint16"), *(("tif", d) for d in ("uint16", "int32", "float32"))])
    )
    low = 0 if dtype == "uint16" else draw(st.integers(-5000, 5000) | st.just(0))
    top = 65535 if dtype == "uint16" else 10**6
    high = low + draw(st.integers(1, 4096) | st.integers(1, top))
    return {"ending": ending, "dtype": dtype, "low": low, "high": min(high, top)}


def check_levels(case):
    """Gray levels stay in order, and enough of them apart to tell what is there."""
    ramp = np.linspace(case["low"], case["high"], 32 * 32).reshape(32, 32).astype(case["dtype"])
    with workplace() as place:
        path = place / f"a.{case['ending']}"
        Image.fromarray(ramp).save(path)
        try:
            read = read_photograph(path)[..., 0].astype(int)
        except DatasetError as error:
            assert is_own(error) and os.fspath(path) in str(error), f"a foreign sentence: {error}"
            COUNTS["levels", "refused"] += 1
            return
    assert (np.diff(read.ravel()) >= 0).all(), "brighter became darker"
    span = case["high"] - min(case["low"], 0)
    # A quarter is left where the next depth just holds them; and bytes in floats stay bytes.
    seen = min(255 / 4, case["high"] - case["low"]) * (case["high"] - case["low"]) / span
    assert len(np.unique(read)) >= min(seen, len(np.unique(ramp))) * 0.9, "levels fell together"
    COUNTS["levels", "in order"] += 1


# Models.

CONFIG = {"window_size": (4,), "embed_dim": 8, "depths": (1,), "num_heads": (2,)}
CONFIG |= {"num_classes": 3, "path_drop": 0.0, "mlp_ratio": 1.0}
IMAGES = np.random.default_rng(1).normal(size=(2, 32, 32, 4)).astype("float32")


def built(seed=0, **options):
    """Build a small model; zeros and ones among its weights would not show a mix-up."""
    model = gcvit.GCViT(**{**CONFIG, **options})
    model.build((None, 32, 32, model.in_channels))
    draw = np.random.default_rng(seed)
    for spec in weight_specs(model):
        spec.assign(draw.normal(size=spec.variable.shape) * 0.3)
    return model


def output_of(model):
    images = IMAGES[..., : model.in_channels]
    return keras.ops.convert_to_numpy(model(images)).astype("float32")


def weights_of(model):
    return [np.array(keras.ops.convert_to_numpy(v)).astype("float32") for v in model.weights]


def same(ours, theirs, tolerance=0.0):
    """Tell whether two lists of arrays hold the same numbers."""
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and np.allclose(a, b, atol=tolerance, rtol=0)
        for a, b in zip(ours, theirs, strict=True)
    )


# Checkpoints as other programs write them.

PREFIXES = ("", "module.", "model.", "_orig_mod.", "module.model.", "backbone.", "net.", "ema.")
CONTAINERS = (None, "state_dict", "model", "model_state_dict", "state_dict_ema", "net", "weights")
BESIDE = {
    "nothing": {},
    "a count": {"epoch": 3},
    "an optimizer": {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "arguments": {"args": argparse.Namespace(lr=0.1)},
    "a number of NumPy": {"best": np.float64(0.9)},
}
TYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}


@st.composite
def checkpoints(draw):
    """Draw how a checkpoint of the small model is written."""
    return {
        "form": draw(st.sampled_from(["safetensors", "parts", "torch"])),
        "naming": draw(st.sampled_from(["official", "timm"])),
        "prefix": draw(st.sampled_from(PREFIXES)),
        "container": draw(st.sampled_from(CONTAINERS)),
        "beside": draw(st.sampled_from(sorted(BESIDE))),
        "dtype": draw(st.sampled_from(sorted(TYPES))),
        "averaged": draw(st.booleans()),
    }


def write_checkpoint(path, state, case):
    from safetensors.numpy import save_file

    if case["form"] == "safetensors":
        save_file(state, path)
    elif case["form"] == "parts":
        places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
        for part in set(places.values()):
            some = {name: state[name] for name in state if places[name] == part}
            save_file(some, path.parent / part)
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        import torch

        state = {
            name: torch.from_numpy(value.astype("float32")).to(getattr(torch, case["dtype"]))
            for name, value in state.items()
        }
        if case["averaged"]:
            state["n_averaged"] = torch.tensor(7)  # what torch's AveragedModel adds
        whole = state if case["container"] is None else {case["container"]: state}
        torch.save({**whole, **(BESIDE[case["beside"]] if case["container"] else {})}, path)


def check_checkpoint(case, models):
    """A foreign checkpoint is read whole, or refused in a sentence, and nothing assigned."""
    source, target = models
    dtype = TYPES[case["dtype"]]
    state = {
        case["prefix"] + spec.names[case["naming"]]: np.ascontiguousarray(
            spec.to_torch(spec.value, case["naming"]).astype(dtype)
        )
        for spec in weight_specs(source)
    }
    before = weights_of(target)
    with workplace() as place:
        write_checkpoint(place / "checkpoint", state, case)
        try:
            gcvit.load_checkpoint(target, place / "checkpoint")
        except gcvit.CheckpointError as error:
            assert is_own(error) and "weights_only" not in str(error), f"foreign advice: {error}"
            assert case["form"] == "torch" and case["beside"] == "a number of NumPy", f"{error}"
            assert same(weights_of(target), before), "refused, and the model is changed"
            COUNTS["checkpoint", "refused"] += 1
        else:
            rounded = [value.astype(dtype).astype("float32") for value in weights_of(source)]
            assert same(weights_of(target), rounded), "read, and the weights are others"
            COUNTS["checkpoint", "read"] += 1
    for variable, value in zip(target.weights, before, strict=True):
        variable.assign(value)


# Orders of calls on a model.

SETTINGS = {
    "none": {},
    "channels first": {"image_data_format": "channels_first"},
    "floatx": {"floatx": "float64"},
    "policy": {"dtype_policy": "mixed_bfloat16"},
}
OPTIONS = ({}, {"in_channels": 1}, {"in_channels": 4}, {"dtype": "bfloat16"})
OPTIONS += ({"dtype": "mixed_float16"}, {"layer_scale": 0.5}, {"window_size": ((2, 3),)})
OPTIONS += ({"head_activation": None, "qk_scale": 0.2}, {"num_classes": 5})
PLACES = {"all": "", "stem": "patch_embed", "block": "levels.0.blocks.0", "head": "head"}


@contextlib.contextmanager
def keras_settings(**wanted):
    before = {name: getattr(keras.config, name)() for name in wanted}
    try:
        for name, value in wanted.items():
            getattr(keras.config, f"set_{name}")(value)
        yield
        for name, value in wanted.items():
            now = getattr(keras.config, name)()
            assert getattr(now, "name", now) == value, f"{name} was changed to {now}"
    finally:
        for name, value in before.items():
            getattr(keras.config, f"set_{name}")(value)


def read_keras(path, _):
    return keras.models.load_model(path)


def write_classifier(model, path):
    fine_tuning.save_classifier(path, model, [str(i) for i in range(model.num_classes)], 32)


def read_into(path, model):
    gcvit.load_checkpoint(model, path)
    return model


def load_into(path, model):
    model.load_weights(path)
    return model


FORMS = {
    "h5": (".weights.h5", lambda model, path: model.save_weights(path), load_into),
    "keras": (".keras", lambda model, path: model.save(path), read_keras),
    "safetensors": (".safetensors", save_safetensors, read_into),
    "classifier": (
        ".safetensors",
        write_classifier,
        lambda path, _: fine_tuning.load_classifier(path).model,
    ),
    "pickle": (
        ".pickle",
        lambda model, path: path.write_bytes(pickle.dumps(model)),
        lambda path, _: pickle.loads(path.read_bytes()),
    ),
}
"""The ending of a form's files, how it is written, and how it is read, perhaps into a model."""


class Orders(RuleBasedStateMachine):
    """Do things to a model in any order; after each, all is right, or refused and as before."""

    files, backups = Bundle("files"), Bundle("backups")

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.place = self.stack.enter_context(workplace())
        self.count = 0

    def teardown(self):
        self.stack.close()

    @initialize(options=st.sampled_from(OPTIONS), settings=st.sampled_from(sorted(SETTINGS)))
    def start(self, options, settings):
        self.stack.enter_context(keras_settings(**SETTINGS[settings]))
        self.options = options
        self.model = built(**options)
        output_of(self.model)

    @property
    def quantized(self):
        return any(getattr(layer, "quantization_mode", None) for layer in self.layers())

    def layers(self, place=""):
        return [layer for path, _, layer in sublayers(self.model) if path.startswith(place)]

    def state(self):
        """Return all that an attempt may not change unless it succeeds."""
        made = self.model.optimizer.variables if self.model.compiled else []
        values = [keras.ops.convert_to_numpy(v) for v in made]
        return weights_of(self.model) + values, self.training_of(self.model)

    @staticmethod
    def training_of(model):
        trainable = [layer.trainable for _, _, layer in sublayers(model)]
        return model.trainable, trainable, [v.trainable for v in model.weights]

    def attempt(self, what, act):
        """Do something; return what it gives, or `None` where it is refused and nothing changed."""
        values, training = self.state()
        try:
            result = act()
        except (ValueError, TypeError) as error:
            assert is_own(error), f"{what}: a foreign {type(error).__name__}: {error}"
            now, training_now = self.state()
            assert same(now, values), f"{what}: refused, and the weights are changed: {error}"
            assert training_now == training, f"{what}: refused, and other weights are trained"
            COUNTS["order", f"{what} refused"] += 1
            return None, str(error)
        COUNTS["order", what] += 1
        return result, None

    @rule(place=st.sampled_from(sorted(PLACES)), trainable=st.booleans())
    def freeze(self, place, trainable):
        if place == "all":
            self.model.trainable = trainable
        for layer in self.layers(PLACES[place])[:1]:
            layer.trainable = trainable

    @rule(part=st.sampled_from(["qkv", "fc1", "head"]))
    def adapt(self, part):
        for layer in self.layers():
            if layer.name == part and not layer.lora_enabled and not self.quantized:
                layer.enable_lora(2)
                layer.lora_kernel_b.assign(0.2 + layer.lora_kernel_b)

    @precondition(lambda self: not self.quantized)
    @rule()
    def quantize(self):
        before = output_of(self.model)
        done, refusal = self.attempt("quantize", lambda: self.model.quantize("int8") or True)
        if done:
            assert self.quantized, "quantize does nothing, without a word"
            near = np.abs(output_of(self.model) - before).max()
            assert near < 0.1 * max(np.abs(before).max(), 1), f"quantized, and off by {near}"

    @rule()
    def train(self):
        if not any(v.trainable for v in self.model.weights):
            return
        self.model.compile(keras.optimizers.Adam(1e-3), "mse", run_eagerly=True)
        images = IMAGES[..., : self.model.in_channels]
        self.model.train_on_batch(images, np.zeros((2, self.model.num_classes), "float32"))

    @rule(target=files, form=st.sampled_from(sorted(FORMS)))
    def save(self, form):
        self.count += 1
        ending, write, read = FORMS[form]
        path = self.place / f"{self.count}{ending}"
        before, output = self.state(), output_of(self.model)
        done, refusal = self.attempt(
            f"save {form}", lambda: (write(self.model, path), path.exists())
        )
        now = self.state()
        assert same(now[0], before[0]) and now[1] == before[1], "to save it changed the model"
        if done is None:
            assert self.quantized, f"refused: {refusal}"
            assert not list(self.place.glob(f"{self.count}.*")), "refused, and a file is left"
            return multiple()
        again = read(path, built(seed=1, **self.options))
        error = np.abs(output_of(again) - output).max()
        assert error < (1e-5 if "dtype" not in self.options else 1e-2), f"{form}: off by {error}"
        if form in ("keras", "pickle"):
            assert self.training_of(again) == self.training_of(self.model), (
                f"{form}: other weights are trained"
            )
            if self.model.compiled:
                made = (self.model.optimizer.variables, again.optimizer.variables)
                numbers = [[keras.ops.convert_to_numpy(v) for v in each] for each in made]
                assert same(*numbers, tolerance=1e-6), f"{form}: another state of the optimizer"
        return path, form, output

    @rule(file=files)
    def load(self, file):
        path, form, output = file
        if form == "pickle":
            return
        how = load_into if form in ("h5", "keras") else read_into
        done, refusal = self.attempt(f"load {form}", lambda: how(path, self.model))
        if done:
            error = np.abs(output_of(self.model) - output).max()
            assert error < (1e-5 if "dtype" not in self.options else 1e-2), f"off by {error}"
        else:
            assert "quantized" in refusal or "optimizer" in refusal, f"refused: {refusal}"

    def training_state(self, path):
        run = {"recipe": "none"}
        return fine_tuning.TrainingState(self.model, run, path)

    @precondition(lambda self: self.model.compiled)
    @rule(target=backups)
    def back_up(self):
        self.count += 1
        path = self.place / f"{self.count}.npz"
        self.training_state(path).write()
        return path, self.state()

    @precondition(lambda self: self.model.compiled)
    @rule(backup=backups)
    def resume(self, backup):
        path, (values, training) = backup
        done, _ = self.attempt("resume", lambda: self.training_state(path).resume() or True)
        if done:
            assert same(self.state()[0], values), "resumed, and the numbers are others"
            assert self.state()[1][2] == training[2], "resumed, and other weights are trained"
        else:
            assert self.state()[1][2] != training[2] or len(values) != len(self.state()[0])

    @rule()
    def start_again(self):
        """Throw the model away, as a new session does, and keep the files."""
        self.model = built(seed=self.count + 2, **self.options)


# Command lines.

SMALL = {"window_size": (1, 1, 2, 1), "depths": (1,) * 4, "num_heads": (1,) * 4, "embed_dim": 8}
SIZES = {"32": 0, "64x32": 0, "32X64": 0, "31": 2, "0": 2, "32x": 2, "a": 2, "32x32x32": 2}
OUTS = {None: 0, "m.safetensors": 0, "花 {0}.safetensors": 0, "ph/m.safetensors": 0}
OUTS |= {"nowhere/m.safetensors": 1, "ph": 1, "m.keras": 1, "a folder.safetensors": 1}
STARTS = {"none": 0, "nothing.safetensors": 1, "damaged.safetensors": 1, "text.keras": 1}
STARTS |= {"unknown": 1}


@st.composite
def command_lines(draw):
    """Draw a folder, the arguments of a training, and the terminal that it is typed at."""
    kinds = st.sampled_from(("photo", "junk", "output", "text", "loose", "damaged"))
    extra = st.tuples(kinds, photos(), st.sampled_from(NAMES), st.integers(0, 1))

    def often(values):
        """Mostly something that works."""
        fine = [value for value in values if not values[value]]
        return draw(st.sampled_from(fine) | st.sampled_from(fine) | st.sampled_from(list(values)))

    return {
        "classes": draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True)),
        "photos": draw(st.lists(photos(), min_size=4, max_size=4)),
        "extras": draw(st.lists(extra, max_size=1)),
        "inside": draw(st.booleans()),
        "out": often(OUTS),
        "size": often(SIZES),
        "weights": often(STARTS),
        "json": draw(st.booleans()),
        "encoding": draw(st.sampled_from(["utf-8", "cp1252", "ascii", "utf-16"])),
        "target": draw(
            st.sampled_from(["c.safetensors", "c.keras", "c.weights.h5", "c.bin", "n/c.keras"])
        ),
    }


def run_command(words, encoding, as_json):
    """Run a command line here; return its exit code and what it printed where."""
    from gcvit.__main__ import main

    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    if code == 1:
        last = err.rstrip("\n").splitlines()[-1]
        assert last.startswith("gcvit: "), f"no sentence of ours: {err[-300:]}"
        assert "[Errno" not in last and "codec" not in last, f"a foreign sentence: {last}"
    if code == 2:
        assert "usage:" in err
    if as_json and out:
        json.loads(out, parse_constant=lambda name: 1 / 0)
    COUNTS["command", f"{words[0]} {code}"] += 1
    return code, out, err


def one_step(model, run, on_best, **options):
    """Stand in for the training itself, which is not what is asked about."""
    on_best()
    return {"loss": [1.0], "val_loss": [1.0], "accuracy": [0.5], "val_accuracy": [0.5]}


@contextlib.contextmanager
def quick_commands(place):
    """Let commands run here in a moment: a small preset, operation by operation."""
    import tensorflow as tf

    preset = {**gcvit.PRESETS["gcvit_nano"]}
    preset["config"] = {**preset["config"], **SMALL}
    here, eager = os.getcwd(), tf.config.functions_run_eagerly()
    with (
        mock.patch.dict(gcvit.PRESETS, {"gcvit_nano": preset}),
        mock.patch.object(fine_tuning, "fit", one_step),
    ):
        try:
            os.chdir(place)
            tf.config.run_functions_eagerly(True)
            yield
        finally:
            os.chdir(here)
            tf.config.run_functions_eagerly(eager)


def check_command_line(case, output):
    """A command line works, also twice, and what it writes is read; or it fails in a sentence."""
    with workplace() as place:
        folder = Folder(place, case, output)
        (place / "damaged.safetensors").write_bytes(Path(output).read_bytes()[:5000])
        (place / "text.keras").write_text("weights")
        (place / "a folder.safetensors").mkdir()
        before = snapshot(place)
        cwd, name = (folder.root, ".") if case["inside"] else (place, "ph")
        words = ["train", name, "--recipe=original", "--epochs=1", f"--image-size={case['size']}"]
        words += [f"--weights={case['weights']}", *["--json"] * case["json"]]
        words += [] if case["out"] is None else [f"--out={case['out']}"]
        wanted = 2 if SIZES[case["size"]] else 0
        missing = case["inside"] and case["out"] in ("ph/m.safetensors", "a folder.safetensors")
        if not wanted and (
            folder.faults or STARTS[case["weights"]] or OUTS[case["out"]] or missing
        ):
            wanted = (
                0
                if case["inside"]
                and case["out"] == "a folder.safetensors"
                and not (folder.faults or STARTS[case["weights"]])
                else 1
            )
        policy = keras.config.dtype_policy().name
        with quick_commands(cwd):
            for _ in range(2):
                code, out, err = run_command(words, case["encoding"], case["json"])
                assert code == wanted, f"exit code {code}, not {wanted}: {err[-500:]}"
            now = snapshot(place)
            assert {path: now.get(path) for path in before} == before, "the input is changed"
            assert keras.config.dtype_policy().name == policy, "the process's dtype is changed"
            new = sorted(path for path in set(now) - set(before))
            if wanted:
                assert not new, f"failed, and left {new}"
                return
            assert len(new) == 1, f"written: {new}"
            check_what_was_written(new[0], folder, case)


def check_what_was_written(path, folder, case):
    """Predict with a model that `train` has written, and convert it and use that."""
    classifier = fine_tuning.load_classifier(path)
    assert classifier.class_names == sorted(case["classes"]), "other classes were written"
    words = ["predict", os.fspath(path), *(os.fspath(folder.root / c) for c in case["classes"])]
    code, out, err = run_command(words, case["encoding"], False)
    assert code == 0, err
    target = folder.place / case["target"]
    before = snapshot(folder.place)
    code, _, err = run_command(
        ["convert", os.fspath(path), os.fspath(target)], case["encoding"], False
    )
    refused = case["target"] in ("c.bin", "n/c.keras")
    assert code == (1 if refused else 0), err
    now = snapshot(folder.place)
    assert set(now) - set(before) == (set() if refused else {target}), "other files are written"
    if target.suffix == ".keras" and not refused:
        expected = weights_of(classifier.model)
        assert same(weights_of(keras.models.load_model(target)), expected), "other weights"


# The long run.

EXAMPLES = {"folder": 20, "levels": 50, "checkpoint": 20, "order": 8, "command": 4}
"""How many examples are drawn at a time: about as long for each."""


def make_output(place):
    """Write what `gcvit train` writes, and return its path."""
    path = Path(place) / "output.safetensors"
    write_classifier(built(), path)
    return path


def properties(place):
    """Return what runs a number of examples of each property, {name: function of settings}."""
    output, models = make_output(place), (built(0), built(1))
    gc.freeze()  # Keras collects garbage for each layer that it quantizes: a second for all of it

    def given(strategy, check, *more):
        def run(settings, seed=0):
            @hypothesis.seed(seed)
            @settings
            @hypothesis.given(strategy)
            def prove(case):
                check(case, *more)

            prove()

        return run

    def orders(settings, seed=0):
        run_state_machine_as_test(hypothesis.seed(seed)(Orders), settings=settings)

    return {
        "folder": given(folders(), check_folder, output),
        "levels": given(levels(), check_levels),
        "checkpoint": given(checkpoints(), check_checkpoint, models),
        "order": orders,
        "command": given(command_lines(), check_command_line, output),
    }


def settings(examples):
    """Return settings for a number of examples, of which a failing one is not made smaller."""
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
        stateful_step_count=8,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long; default: %(default)s")
    parser.add_argument("--only", help="the name of one property")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end, seed, faults = time.monotonic() + 60 * arguments.minutes, arguments.seed, {}
    with tempfile.TemporaryDirectory() as place:
        known = properties(place)
        while time.monotonic() < end:
            for name, run in known.items():
                if arguments.only in (None, name) and time.monotonic() < end:
                    try:
                        run(settings(EXAMPLES[name]), seed)
                    except Exception as error:  # of any kind: it is what is sought
                        text = f"{type(error).__name__}: {error}"
                        example = "\n".join(getattr(error, "__notes__", []))
                        kind = re.sub(r"\S*/\S*|\W", "", text)[:60]
                        faults.setdefault((name, kind), f"{text}\n{example}")
            seed += 1
    for (name, outcome), times in sorted(COUNTS.items()):
        print(f"{name:12}{outcome:32}{times:>8}")
    for (name, _), text in faults.items():
        print(f"\nFAULT, {name}:\n{text}")
    print(f"{len(faults)} faults, seeds {arguments.seed} to {seed - 1}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
