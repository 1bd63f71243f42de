"""Use the package as people do, at random, and count what comes of it.

    python tools/reproduce/properties.py --minutes 60

Hypothesis draws folders of photographs, foreign checkpoints, orders of calls on a model, and
command lines. What is asked of each is that nothing is lost, altered or left out
without a word: it works and gives the right numbers, or the package says in a sentence of its own
why not, and all is as it was. `tests/test_properties.py` runs a few of each, always the same.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import pickle
import pkgutil
import re
import shutil
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import keras
import ml_dtypes
import numpy as np
from hypothesis import stateful
from hypothesis import strategies as st
from PIL import Image

import gcvit
from gcvit import GCViT, fine_tuning
from gcvit.images import DatasetError
from gcvit.weights import save_safetensors, sublayers, weight_specs

COUNTS = collections.Counter()
"""How often each property ended in which way: {(property, outcome): times}."""
TORCH = find_spec("torch") is not None  # its files are made with it

# Hypothesis begins with the first of each list. What is ordinary stands there: a fault in it would
# hide all others.
NAMES = ("a", "a b", "-x", "花", "Čeština", "%s{0}", "it's", 'q"', "new\nline", "caf\udce9", "a,b")
NAMES += ("0", "x.backup", "m.safetensors", "CON", "@home", "a.b.c", "e\u0301")


def check_sentence(error, names=("",)):
    """Assert that an error is a sentence of the package's own, and names one of these."""
    text, raised_in = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
    own = Path(raised_in).is_relative_to(Path(gcvit.__file__).parent) and text.endswith((".", ")"))
    assert own and "weights_only" not in text, f"a foreign {type(error).__name__}: {text}"
    assert any(os.fspath(name) in text for name in names), f"{text} names none of {names}"


@contextlib.contextmanager
def workplace():
    """Yield the path of an empty folder, and remove it with what is in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def snapshot(folder):
    """Return what lies in a folder: {path: bytes, or target of the link, or nothing}."""
    read = {True: os.readlink, False: lambda path: path.is_file() and path.read_bytes()}
    return {path: read[path.is_symlink()](path) for path in folder.rglob("*")}


# Photographs: files of every kind, written from a picture that is known.

MODES = {"png": "RGB 1 L LA P RGBA I;16", "jpg": "RGB L CMYK", "mpo": "RGB", "gif": "RGB L P"}
MODES |= {"tif": "RGB 1 L LA P RGBA CMYK I;16 I F", "webp": "RGB RGBA", "bmp": "RGB 1 L P"}
MODES |= {"ppm": "RGB 1 L", "tga": "RGB L P RGBA"}
KINDS = [(ending, mode) for ending in MODES for mode in MODES[ending].split()]
STORED_FOR = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
"""How a camera that says the orientation 2, 3, ... 8 has turned what was to be seen."""
PHOTOS = st.tuples(st.sampled_from(KINDS), st.integers(1, 8), st.booleans(), st.integers(0, 10**6))
"""Ending and mode, orientation, whether there is a second picture, and the seed of the first."""


def write_photo(path, photo):
    """Write a photograph; return what is to be seen on it, and how far off it may be read."""
    (ending, mode), orientation, animated, seed = photo
    draw = np.random.default_rng(seed)
    ends = draw.integers(0, 256, (2, 2, 3)).astype("uint8")
    ends[0, 0], ends[1, 1] = 0, 255
    seen = Image.fromarray(ends).resize((40, 24), Image.Resampling.BILINEAR)
    options = {"quality": 95} if ending == "webp" else {}
    if mode in ("I;16", "I", "F"):
        levels = np.asarray(seen.convert("L")) * draw.choice([1, 4, 256 / 255, 16, 257, 4000])
        levels = levels if mode != "I;16" else levels.clip(0, 65535)
        levels = levels - draw.choice([0, 0, 1024]) * (mode != "I;16")
        levels = levels.astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
        seen, expected = Image.fromarray(levels), by_the_rule(levels)
    else:
        if "A" in mode:
            seen.putalpha(Image.fromarray(np.asarray(seen.convert("L"))[::-1]))
        seen = seen.convert(mode)
        expected = np.asarray(seen.convert("RGBA" if "A" in mode else "RGB")).astype(float)
        if "A" in mode:
            expected = 255 + (expected[..., :3] - 255) * expected[..., 3:] / 255
    if orientation > 1 and ending in ("png", "jpg", "webp", "tif"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
        turn = Image.Transpose[STORED_FOR.split()[orientation - 2]]
        seen = seen.transpose(turn)
    if animated and ending in ("gif", "webp", "png", "mpo"):
        options |= {"save_all": True, "append_images": [Image.new(seen.mode, seen.size)]}
    seen.save(path, Image.registered_extensions()[f".{ending}"], **options)
    return expected, 12 if ending in ("jpg", "mpo", "webp", "gif") else 1


def by_the_rule(levels):
    """Return the colors that gray levels of more than 8 bits are said to have."""
    low, high = min(levels.min(), 0), levels.max()
    if low == 0:
        high = next((2**n - 1 for n in (8, 10, 12, 14, 16) if 2**n > high), high)
    gray = (levels.astype(float) - low) / (high - low) * 255
    return np.repeat(gray[..., None], 3, axis=-1)


# Folders of photographs.

JUNK = ("Thumbs.db", ".DS_Store", "desktop.ini", "._1.jpg", "@eaDir", "__MACOSX", ".hidden")
EXTRAS = ("photo", "subfolder", "junk", "link", "linked folder", "circle", "output", "copy")
FAULTS = ("damaged", "text", "broken link", "unreadable", "unreadable folder", "pipe", "loose")
FAULTS += ("of another class", "empty class", "alone in its class")


def folders(kinds, most):
    """Draw the names of two classes, and what lies in them: two photographs in each, and more."""

    def things(kinds, k, least, most):
        thing = st.tuples(st.sampled_from(kinds), PHOTOS, st.sampled_from(NAMES), k)
        return st.lists(thing, min_size=least, max_size=most)

    names = st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True)
    of_each = (things(["photo"], st.just(k), 2, 2) for k in (0, 1))
    return st.tuples(names, *of_each, things(kinds, st.integers(0, 1), 0, most))


class Folder:
    """A folder as it was drawn: what is expected of it, its faults, and what may not be opened."""

    def __init__(self, place, case):
        self.classes, *things = case
        self.root, self.outside, self.count = place / "ph", place / "elsewhere", 0
        self.expected, self.faults, self.forbidden, self.first = [], [], set(), {}
        for kind, photo, name, k in sum(things, []):
            self.count += 1
            self.add(kind, photo, self.root / self.classes[k] / f"{name}{self.count}")

    def photo(self, folder, photo, of_class=None):
        """Write a photograph that is expected; no two are the same."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.stem}.{photo[0][0]}"
        seen = write_photo(path, (*photo[:3], 100 * photo[3] + self.count))
        self.expected.append((of_class or folder.name, *seen))
        self.first.setdefault(folder.name == self.classes[1], path)
        return path

    def add(self, kind, photo, path):
        """Put something into a class, or beside the classes."""
        self.stem, folder, beside = path.name, path.parent, self.root / f"{path.name} of no class"
        plain, of_class = (KINDS[0], 1, False, photo[3]), folder.name
        acts = {
            "photo": lambda: self.photo(folder, photo),
            "subfolder": lambda: self.photo(path, photo, of_class),
            "junk": lambda: (folder / JUNK[self.count % len(JUNK)]).write_bytes(b"\0"),
            "link": lambda: path.symlink_to(self.photo(self.outside, photo, of_class)),
            "linked folder": lambda: path.symlink_to(
                self.photo(self.outside / str(self.count), photo, of_class).parent
            ),
            "circle": lambda: path.symlink_to(folder),
            "output": lambda: (self.root / f"{path.name}.safetensors").write_bytes(output()),
            "copy": lambda: (
                shutil.copy(self.photo(folder, photo), path),
                self.expected.append(self.expected[-1]),
            ),
            "damaged": lambda: (write_photo(path, plain), os.truncate(path, 72)),
            "text": lambda: path.write_text("three dogs"),
            "broken link": lambda: path.symlink_to("nowhere"),
            "unreadable": lambda: write_photo(path, plain),
            "unreadable folder": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "loose": lambda: write_photo(beside, plain),
            "of another class": lambda: shutil.copy(self.first[self.classes[0] == of_class], path),
            "empty class": beside.mkdir,
            "alone in its class": lambda: (beside.mkdir(), write_photo(beside / "1.png", plain)),
        }
        acts[kind]()
        if kind in FAULTS:
            self.faults.append(beside if beside.exists() else path)
        if kind.startswith("unreadable"):
            self.forbidden.add(str(path))


@contextlib.contextmanager
def forbidden(paths):
    """Let paths not be opened; by hand, since nothing is forbidden to root."""

    def guarded(usual, path, *args, **options):
        if str(path) in paths:
            raise PermissionError(13, "Permission denied", path)
        return usual(path, *args, **options)

    with contextlib.ExitStack() as stack:
        for name in ("builtins.open", "io.open", "os.listdir", "os.scandir"):
            guard = functools.partial(guarded, pkgutil.resolve_name(name))
            stack.enter_context(mock.patch(name, guard))
        yield


def check_folder(case):
    """Every photograph of a folder is used as what it is, or the folder is refused by name."""
    with workplace() as place:
        folder = Folder(place, case)
        before, left = snapshot(place), list(folder.expected)
        try:
            with forbidden(folder.forbidden):
                taken = fine_tuning.from_folder(folder.root)
        except DatasetError as error:
            assert folder.faults, f"refused, though nothing is wrong: {error}"
            check_sentence(error, folder.faults)
        else:
            assert not folder.faults, f"taken without a word: {folder.faults}"
            for image, label in [*taken.train, *taken.validation]:
                of_class, image = taken.class_names[int(label)], image.numpy().astype(float)
                distances = {
                    np.abs(image - seen).mean() / off: i
                    for i, (owner, seen, off) in enumerate(left)
                    if (owner, seen.shape) == (of_class, image.shape)
                }
                nearest = min(distances, default=np.inf)
                assert nearest <= 1, f"a photograph of {of_class!r} is not what was written"
                del left[distances[nearest]]
            assert not left, f"left out: {[owner for owner, *_ in left]}"
        assert snapshot(place) == before, "the folder is changed"
    COUNTS["folder", "refused" if folder.faults else "used"] += 1


# Models.

CONFIG = {"window_size": (4,), "embed_dim": 8, "depths": (1,), "num_heads": (2,)}
CONFIG |= {"num_classes": 3, "path_drop": 0.0, "mlp_ratio": 1.0}
IMAGES = np.random.default_rng(1).normal(size=(2, 32, 32, 4)).astype("float32")


def built(seed=0, **options):
    """Build a small model; zeros and ones among its weights would not show a mix-up."""
    model = GCViT(**{**CONFIG, **options})
    model.build((None, 32, 32, model.in_channels))
    draw = np.random.default_rng(seed)
    for spec in weight_specs(model):
        spec.assign(draw.normal(size=spec.variable.shape) * 0.3)
    return model


def output_of(model):
    images = IMAGES[..., : model.in_channels]
    return keras.ops.convert_to_numpy(model(images)).astype("float32")


def values_of(variables):
    return [np.array(keras.ops.convert_to_numpy(v)).astype("float32") for v in variables]


def training_of(model):
    """Return what decides how a model is trained on: flags, and the state of its optimizer."""
    layers = [layer for _, _, layer in sublayers(model)]
    flags = [each.trainable for each in (model, *layers, *model.weights)]
    return [np.array(flags), *values_of(model.optimizer.variables if model.compiled else [])]


def all_of(model):
    return values_of(model.weights) + training_of(model)


def same(ours, theirs, tolerance=0.0):
    """Tell whether two lists of arrays hold the same numbers."""
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and np.allclose(a, b, atol=tolerance, rtol=0)
        for a, b in zip(ours, theirs, strict=True)
    )


def write_classifier(model, path):
    fine_tuning.save_classifier(path, model, [str(i) for i in range(model.num_classes)], 32)


@functools.cache
def output():
    """Return the bytes of what `gcvit train` writes."""
    with workplace() as place:
        write_classifier(built(), place / "m.safetensors")
        return (place / "m.safetensors").read_bytes()


# Checkpoints as other programs write them, whole and not.

PREFIXES = ("", "module.", "model.", "_orig_mod.", "module.model.", "backbone.", "net.", "ema.")
CONTAINERS = (None, "state_dict", "model", "model_state_dict", "state_dict_ema", "net", "weights")
BESIDE = {"nothing": {}, "a count": {"epoch": 3}, "arguments": {"args": argparse.Namespace(lr=0.1)}}
BESIDE |= {"an optimizer": {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}}
BESIDE |= {"a number of NumPy": {"best": np.float64(0.9)}}
TYPES = {"float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
SPOILED = {"a shape": "has shape", "a number": "not finite", "missing": "Missing"}
SPOILED |= {"the end": "damaged"}
"""What may be wrong with a file or a tensor in its middle, and what must be said of it."""
CHECKPOINTS = st.fixed_dictionaries(
    {
        "form": st.sampled_from(["safetensors", "parts", *(["torch"] if TORCH else [])]),
        "naming": st.sampled_from(["official", "timm"]),
        "prefix": st.sampled_from(PREFIXES),
        "container": st.sampled_from(CONTAINERS),
        "beside": st.sampled_from(list(BESIDE)),
        "dtype": st.sampled_from(list(TYPES)),
        "averaged": st.booleans(),
        "spoiled": st.none() | st.sampled_from(list(SPOILED)),
    }
)


def write_checkpoint(path, state, case):
    """Write a checkpoint; return a file that holds tensors of it."""
    from safetensors.numpy import save_file

    if case["form"] == "safetensors":
        save_file(state, path)
    elif case["form"] == "parts":
        places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
        for part in set(places.values()):
            some = {name: state[name] for name in state if places[name] == part}
            save_file(some, path.parent / part)
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return path.parent / part
    else:
        import torch

        dtype = getattr(torch, case["dtype"])
        state = {n: torch.from_numpy(v.astype("float32")).to(dtype) for n, v in state.items()}
        if case["averaged"]:
            state["n_averaged"] = torch.tensor(7)  # what torch's AveragedModel adds
        held = {case["container"]: state, **BESIDE[case["beside"]]}
        torch.save(held if case["container"] else state, path)
    return path


@functools.cache
def two_models():
    return built(0), built(1)


def check_checkpoint(case):
    """A foreign checkpoint is read whole, or refused in a sentence, and nothing assigned."""
    (source, target), dtype, spoiled = two_models(), TYPES[case["dtype"]], case["spoiled"]
    state, naming = {}, case["naming"]
    for spec in weight_specs(source):
        value = spec.to_torch(spec.value, naming).astype(dtype)
        state[case["prefix"] + spec.names[naming]] = np.ascontiguousarray(value)
    middle = [name for name in state if state[name].ndim > 1][len(state) // 3]
    if spoiled == "a shape":
        state[middle] = np.ascontiguousarray(state[middle][..., :-1])
    elif spoiled == "a number":
        state[middle].flat[0] = np.nan
    elif spoiled == "missing":
        del state[middle]
    code = case["form"] == "torch" and case["container"] and case["beside"] == "a number of NumPy"
    before = values_of(target.weights)
    try:
        with workplace() as place:
            written = write_checkpoint(place / "checkpoint", state, case)
            if spoiled == "the end":
                os.truncate(written, written.stat().st_size * 3 // 4)
            gcvit.load_checkpoint(target, place / "checkpoint")
        assert not spoiled and not code, f"taken, though it is spoiled: {spoiled or 'code'}"
        rounded = [value.astype(dtype).astype("float32") for value in values_of(source.weights)]
        assert same(values_of(target.weights), rounded), "read, and the weights are others"
        COUNTS["checkpoint", "read"] += 1
    except gcvit.CheckpointError as error:
        said = [SPOILED[spoiled]] if spoiled else []
        check_sentence(error, said + ["can run code"] if code else said or ["?"])
        assert same(values_of(target.weights), before), "refused, and the model is changed"
        COUNTS["checkpoint", f"refused, {spoiled}"] += 1
    finally:
        for variable, value in zip(target.weights, before, strict=True):
            variable.assign(value)


# Orders of calls on a model.

SETTINGS = ({}, {"image_data_format": "channels_first"}, {"floatx": "float64"})
SETTINGS += ({"dtype_policy": "mixed_bfloat16"},)
OPTIONS = ({}, {"in_channels": 1}, {"in_channels": 4}, {"dtype": "bfloat16"}, {"num_classes": 5})
OPTIONS += ({"dtype": "mixed_float16"}, {"layer_scale": 0.5}, {"window_size": ((2, 3),)})
OPTIONS += ({"head_activation": None, "qk_scale": 0.2},)
PARTS = ("", "patch_embed", "levels.0.blocks.0", "levels.0.blocks.0.attn.qkv", "head")
WRITERS = {
    ".weights.h5": GCViT.save_weights,
    ".keras": GCViT.save,
    ".safetensors": save_safetensors,
    ".classifier.safetensors": write_classifier,
    ".pickle": lambda model, path: path.write_bytes(pickle.dumps(model)),
}
READERS = {
    ".keras": keras.models.load_model,
    ".classifier.safetensors": lambda path: fine_tuning.load_classifier(path).model,
    ".pickle": lambda path: pickle.loads(path.read_bytes()),
}
"""What reads a model from a file; of the other forms a model reads its weights."""


class Orders(stateful.RuleBasedStateMachine):
    """Do things to a model in any order; after each, all is right, or refused and as before."""

    files, backups = stateful.Bundle("files"), stateful.Bundle("backups")

    def __init__(self):
        super().__init__()
        self.count, self.stack, self.setting = 0, contextlib.ExitStack(), {}
        self.place = self.stack.enter_context(workplace())

    def teardown(self):
        self.stack.close()

    @stateful.initialize(options=st.sampled_from(OPTIONS), setting=st.sampled_from(SETTINGS))
    def start(self, options, setting):
        for name, value in setting.items():
            change = getattr(keras.config, f"set_{name}")
            self.stack.callback(change, getattr(keras.config, name)())
            change(value)
        self.setting, self.options = setting, options
        # Adapters are merged into the weights that are written, and half precision rounds those.
        self.near = 1e-2 if "dtype" in options or "dtype_policy" in setting else 1e-5
        self.start_again()

    @stateful.invariant()
    def the_setting_stays(self):
        for name, value in self.setting.items():
            now = getattr(keras.config, name)()
            assert getattr(now, "name", now) == value, f"{name} was changed to {now}"

    @stateful.rule()
    def start_again(self):
        """Throw the model away, as a new session does, and keep the files."""
        self.model = built(seed=self.count, **self.options)

    def layers(self, part=""):
        return [layer for path, _, layer in sublayers(self.model) if path.startswith(part)]

    @property
    def quantized(self):
        return any(getattr(layer, "quantization_mode", None) for layer in self.layers())

    def new_path(self, ending):
        self.count += 1
        return self.place / f"{self.count}{ending}"

    def refusal(self, what, act):
        """Do something; return `None`, or the sentence of a refusal that changed nothing."""
        before, text = all_of(self.model), None
        try:
            act()
        except (ValueError, TypeError) as error:
            check_sentence(error)
            text = str(error)
            assert same(all_of(self.model), before), f"{what}: refused, and changed: {text}"
        COUNTS["order", f"{what} refused" if text else what] += 1
        return text

    @stateful.rule(part=st.sampled_from(PARTS), trainable=st.booleans())
    def freeze(self, part, trainable):
        for layer in self.layers(part)[:1] if part else [self.model]:
            layer.trainable = trainable

    @stateful.rule(name=st.sampled_from(["qkv", "fc1", "head", "proj"]))
    def adapt(self, name):
        for layer in self.layers():
            if layer.name == name and not layer.lora_enabled:
                layer.enable_lora(2, lora_alpha=4)
                layer.lora_kernel_b.assign(0.2 + layer.lora_kernel_b)

    @stateful.precondition(lambda self: not self.quantized)
    @stateful.rule()
    def quantize(self):
        before = output_of(self.model)
        if not self.refusal("quantize", lambda: self.model.quantize("int8")):
            assert self.quantized, "quantize does nothing, without a word"
            error = np.abs(output_of(self.model) - before).max()
            assert error < 0.1 * max(np.abs(before).max(), 1), f"quantized, and off by {error}"

    @stateful.precondition(lambda self: any(v.trainable for v in self.model.weights))
    @stateful.rule()
    def train(self):
        self.model.compile(keras.optimizers.Adam(1e-3), "mse", run_eagerly=True)
        images = IMAGES[..., : self.model.in_channels]
        self.model.train_on_batch(images, np.zeros((2, self.model.num_classes), "float32"))

    @stateful.rule(target=files, ending=st.sampled_from(list(WRITERS)))
    def save(self, ending):
        path, before, expected = self.new_path(ending), all_of(self.model), output_of(self.model)
        refused = self.refusal(f"write {ending}", lambda: WRITERS[ending](self.model, path))
        assert same(all_of(self.model), before), "to save it changed the model"
        if refused:
            assert self.quantized, f"refused: {refused}"
            assert not list(self.place.glob(f"{self.count}.*")), "refused, and a file is left"
            return stateful.multiple()
        if ending in READERS:
            again = READERS[ending](path)
        else:
            again = built(seed=1, **self.options)
            again.load_weights(path)
        error = np.abs(output_of(again) - expected).max()
        assert error < self.near, f"{ending}: off by {error}"
        if ending in (".keras", ".pickle"):
            told = same(training_of(again), training_of(self.model), 1e-6)
            assert told, f"{ending}: it is not trained on in the same way"
        return path, expected

    @stateful.rule(file=files)
    def load(self, file):
        path, expected = file
        if path.suffix == ".pickle":
            return
        refused = self.refusal(f"read {path.suffix}", lambda: self.model.load_weights(path))
        if refused:
            assert "quantized" in refused or "optimizer" in refused, f"refused: {refused}"
        else:
            error = np.abs(output_of(self.model) - expected).max()
            assert error < self.near, f"{path.name}: loaded, and off by {error}"

    def run_in(self, path):
        return fine_tuning.TrainingState(self.model, {"recipe": "none"}, path)

    @stateful.precondition(lambda self: self.model.compiled)
    @stateful.rule(target=backups)
    def back_up(self):
        path = self.new_path(".npz")
        self.run_in(path).write()
        return path, all_of(self.model), training_of(self.model)[0]

    @stateful.precondition(lambda self: self.model.compiled)
    @stateful.rule(backup=backups)
    def resume(self, backup):
        path, before, flags = backup
        if not self.refusal("resume", lambda: self.run_in(path).resume()):
            assert same(all_of(self.model), before), "resumed, and other than it was"
        else:
            assert not same(training_of(self.model)[:1], [flags]), "its own, and refused"


# Command lines.

SMALL = {"window_size": (1, 1, 2, 1), "depths": (1,) * 4, "num_heads": (1,) * 4, "embed_dim": 8}
SIZES = {"32": 0, "64x32": 0, "32X64": 0, "31": 2, "0": 2, "32x": 2, "a": 2, "32x32x32": 2}
OUTS = {None: 0, "m.safetensors": 0, "花 {0}.safetensors": 0, "ph/m.safetensors": 0}
OUTS |= {"nowhere/m.safetensors": 1, "./ph": 1, "m.keras": 1, "a folder.safetensors": 1}
STARTS = {"none": 0, "unknown": 1, "nothing.safetensors": 1, "text.keras": 1, "cut.safetensors": 1}
TARGETS = {"c.safetensors": 0, "c.keras": 0, "c.weights.h5": 0, "c.bin": 1, "n/c.keras": 1}
"""Words of a command line, and the exit code that each leads to."""


def mostly(codes):
    """Draw a word, two times in three one that works."""
    fine = st.sampled_from([word for word in codes if not codes[word]])
    return fine | fine | st.sampled_from(list(codes))


COMMANDS = st.fixed_dictionaries(
    {
        "folder": folders(("photo", "junk", "output", "text", "loose", "damaged"), most=1),
        "inside": st.booleans(),
        "out": mostly(OUTS),
        "size": mostly(SIZES),
        "weights": mostly(STARTS),
        "target": mostly(TARGETS),
        "json": st.booleans(),
        "encoding": st.sampled_from(["utf-8", "cp1252", "ascii", "utf-16"]),
    }
)


def run_command(words, case, expected):
    """Run a command line here, which must end as expected, and in a sentence where it fails."""
    from gcvit.__main__ import main

    streams = [io.TextIOWrapper(io.BytesIO(), case["encoding"]) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = main([*map(os.fspath, words), *["--json"] * case["json"]])
        except SystemExit as ended:
            code = ended.code
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(case["encoding"]) for stream in streams)
    assert code == expected, f"{words}: exit code {code}, not {expected}: {err[-500:]}"
    if code == 1:
        last = err.rstrip("\n").splitlines()[-1]
        own = last.startswith("gcvit: ") and "[Errno" not in last and "codec" not in last
        assert own, f"no sentence of ours: {err[-300:]}"
    assert code != 2 or "usage:" in err
    if case["json"] and out:
        json.loads(out, parse_constant=lambda name: 1 / 0)
    COUNTS["command", f"{words[0]} {code}"] += 1


def one_epoch(model, run, on_best, **options):
    """Stand in for the training itself, which is not what is asked about."""
    on_best()
    return dict.fromkeys(("loss", "val_loss", "accuracy", "val_accuracy"), [0.5])


@contextlib.contextmanager
def quick_commands(place):
    """Let commands run in a folder in a moment: a small preset, operation by operation."""
    import tensorflow as tf

    nano, eager = gcvit.PRESETS["gcvit_nano"], tf.config.functions_run_eagerly()
    small = {"gcvit_nano": {**nano, "config": {**nano["config"], **SMALL}}}
    with (
        contextlib.chdir(place),
        mock.patch.dict(gcvit.PRESETS, small),
        mock.patch.object(fine_tuning, "fit", one_epoch),
    ):
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(eager)


def check_command(case):
    """A command line works, also twice, and what it writes is read; or it fails in a sentence."""
    with workplace() as place:
        folder = Folder(place, case["folder"])
        (place / "cut.safetensors").write_bytes(output()[:5000])
        (place / "text.keras").write_text("weights")
        (place / "a folder.safetensors").mkdir()
        before, policy = snapshot(place), keras.config.dtype_policy().name
        here = folder.root if case["inside"] else place

        def word(name):
            return name if name in ("none", "unknown") else os.path.relpath(place / name, here)

        words = ["train", word("ph"), "--recipe=original", "--epochs=1"]
        words += [f"--image-size={case['size']}", f"--weights={word(case['weights'])}"]
        words += [f"--out={word(case['out'])}"] if case["out"] else []
        fails = folder.faults or STARTS[case["weights"]] or OUTS[case["out"]]
        fails = fails or (case["out"] and (place / case["out"]).is_dir())  # a class of that name
        expected = SIZES[case["size"]] or int(bool(fails))
        with quick_commands(here):
            for _ in range(2):
                run_command(words, case, expected)
            now = snapshot(place)
            assert {path: now.get(path) for path in before} == before, "the input is changed"
            assert keras.config.dtype_policy().name == policy, "the process's dtype is changed"
            new = sorted(set(now) - set(before))
            assert len(new) == (expected == 0), f"exit code {expected}, and written: {new}"
            if new:
                check_written(new[0], place / case["target"], folder, case)


def check_written(path, target, folder, case):
    """Predict with a model that `train` has written, and convert it."""
    classifier, before = fine_tuning.load_classifier(path), set(path.parent.iterdir())
    assert classifier.class_names == sorted(folder.classes), "other classes were written"
    run_command(["predict", path, *(folder.root / each for each in folder.classes)], case, 0)
    run_command(["convert", path, target], case, TARGETS[case["target"]])
    assert set(path.parent.iterdir()) - before <= {target}, "other files are written"
    assert target.exists() != TARGETS[case["target"]], "not what the exit code says"
    if target.exists():
        twin = gcvit.GCViT.from_config(classifier.model.get_config())
        twin.build((None, 32, 32, 3))
        twin.load_weights(target)
        assert same(values_of(twin.weights), values_of(classifier.model.weights)), "other weights"


# The long run.

PROPERTIES = {
    "folder": (20, folders(EXTRAS + FAULTS, most=3), check_folder),
    "checkpoint": (20, CHECKPOINTS, check_checkpoint),
    "order": (8, None, Orders),
    "command": (4, COMMANDS, check_command),
}
"""Examples that are drawn at a time, about as long for each; how they are drawn; the check."""


def run(name, examples=None, seed=0):
    """Draw examples of a property; one that fails is raised, and not made smaller."""
    usual, strategy, check = PROPERTIES[name]
    settings = hypothesis.settings(
        hypothesis.settings.get_profile("ci"),
        max_examples=examples or usual,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
        stateful_step_count=8,
        derandomize=False,
    )
    if strategy is None:
        stateful.run_state_machine_as_test(hypothesis.seed(seed)(check), settings=settings)
    else:
        hypothesis.seed(seed)(settings(hypothesis.given(strategy)(check)))()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long; default: %(default)s")
    parser.add_argument("--only", choices=PROPERTIES, help="one property; default: all of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end, seed, faults = time.monotonic() + 60 * arguments.minutes, arguments.seed, {}
    while time.monotonic() < end:
        for name in [arguments.only] if arguments.only else PROPERTIES:
            try:
                run(name, seed=seed)
            except Exception as error:  # of any kind: it is what is sought
                text = f"{type(error).__name__}: {error}"
                kind = re.sub(r"\S*/\S*|\W", "", text)[:60]
                faults[name, kind] = "\n".join([text, *getattr(error, "__notes__", [])])
        seed += 1
    for (name, outcome), times in sorted(COUNTS.items()):
        print(f"{name:12}{outcome:32}{times:>8}")
    for (name, _), text in faults.items():
        print(f"\nFAULT, {name}:\n{text}")
    print(f"{len(faults)} faults, seeds {arguments.seed} to {seed - 1}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
