"""Appendix B: checkpoints from one implementation's names to another's."""

import dataclasses
import json
import os
import re

import keras
import numpy as np

from gcvit import readers
from gcvit.checks import pair
from gcvit.model import GCViT
from gcvit.presets import PRESETS
from gcvit.pretrained import scaled_windows
from gcvit.readers import CheckpointError
from gcvit.weights import (
    FORMATS,
    load_checkpoint,
    read_tensors,
    save_safetensors,
    weight_specs,
)

# What tells a model's sizes, in the three kinds of names: a pattern for each, whose groups are
# the level and, where there is one, the block.
_TELLING = {
    "official": {
        "stem": r"patch_embed\.proj\.weight",
        "table": r"levels\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table",
        "hidden": r"levels\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.weight",
        "qkv_bias": r"levels\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.bias",
        "gamma": r"levels\.(\d+)\.blocks\.(\d+)\.gamma1",
        "head": r"head\.weight",
    },
    "timm": {
        "stem": r"stem\.conv1\.weight",
        "table": r"stages\.(\d+)\.blocks\.(\d+)\.attn\.rel_pos\.relative_position_bias_table",
        "hidden": r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.weight",
        "qkv_bias": r"stages\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.bias",
        "gamma": r"stages\.(\d+)\.blocks\.(\d+)\.ls1\.gamma",
        "head": r"head\.fc\.weight",
    },
    "release": {
        "stem": r"layers/patch_embed/proj/vars/0",
        "table": r"layers/level(?:_(\d+))?/blocks/block(?:_(\d+))?/attn/vars/0",
        "hidden": r"layers/level(?:_(\d+))?/blocks/block(?:_(\d+))?/mlp/fc1/vars/0",
        "qkv_bias": r"layers/level(?:_(\d+))?/blocks/block(?:_(\d+))?/attn/qkv/vars/1",
        "gamma": r"layers/level(?:_(\d+))?/blocks/block(?:_(\d+))?/vars/0",
        "head": r"head/vars/0",
    },
}


def _telling_shapes(shapes, naming):
    """Return {kind: {(level, block): shape}} for the tensors that tell the model's sizes."""
    telling = {kind: {} for kind in _TELLING[naming]}
    for name, shape in shapes.items():
        for kind, pattern in _TELLING[naming].items():
            match = re.fullmatch(pattern, name)
            if match:
                telling[kind][tuple(int(number or 0) for number in match.groups())] = shape
    return telling


def _square_window(rows):
    """Return the side of the window whose position table has so many rows: (2 side - 1)²."""
    side = round(rows**0.5)
    if side * side != rows or side % 2 == 0:
        raise CheckpointError(
            f"A position table of {rows} rows is not one of a square window, (2 side - 1)² rows."
        )
    return (side + 1) // 2


# The arguments that no tensor tells.
_TOLD = (
    "drop_rate",
    "qk_scale",
    "attention_dropout",
    "path_drop",
    "head_activation",
    "pooling",
)


def _windows(rows, told):
    """Return the windows of position tables with so many rows: those told, or square ones."""
    windows = [pair("window_size", window) for window in told.get("window_size", ())]
    if [(2 * height - 1) * (2 * width - 1) for height, width in windows] == rows:
        return tuple(h if h == w else (h, w) for h, w in windows)
    return tuple(map(_square_window, rows))


def architecture(path):
    """Read off a checkpoint which model it belongs to.

    Args:
        path: a file of any kind that `load_checkpoint` reads.

    Returns:
        The arguments that build the model with `GCViT(**arguments)`. The sizes follow from the
        shapes of the tensors. The rest, such as dropout rates and the activation of the head, is
        recorded only in files that this package wrote. `layer_scale` is 1e-5 where the file has
        such factors, for their first value does not matter once they are loaded.

    Raises:
        CheckpointError: if the file is damaged, is not a GCViT's, or is of a model whose
            windows are not square and does not record their size.
        FileNotFoundError: if there is no such file.
    """
    naming, tensors = read_tensors(path)
    telling = _telling_shapes({name: t.shape for name, t in tensors.items()}, naming)
    if (
        not telling["stem"]
        or not telling["table"]
        or len(telling["table"]) != len(telling["hidden"])
    ):
        raise CheckpointError(
            f"{path} does not hold a GCViT: a stem, and in each block a position table and an MLP."
        )
    levels = 1 + max(level for level, _ in telling["table"])
    depths = [sum(level == i for level, _ in telling["table"]) for i in range(levels)]
    first = [telling["table"].get((i, 0)) for i in range(levels)]
    if None in first or any(len(shape) != 2 for shape in first):
        raise CheckpointError(f"{path} lacks the position table of some level's first block.")
    with readers.naming_the_file(path):
        return _arguments(telling, naming, first, depths, readers.model_config(path))


def _arguments(telling, naming, first, depths, told):
    """Return what `architecture` does, from the shapes of the tensors that tell it."""
    (stem,), (hidden, *_) = telling["stem"].values(), telling["hidden"].values()
    # Keras lays a convolution out as (height, width, in, out), PyTorch as (out, in, ...).
    in_channels, embed_dim = stem[2:] if naming == "release" else (stem[1], stem[0])
    level, _ = next(iter(telling["hidden"]))
    hidden_units = hidden[1] if naming == "release" else hidden[0]
    arguments = {
        **{name: told[name] for name in _TOLD if name in told},
        "window_size": _windows([shape[0] for shape in first], told),
        "embed_dim": embed_dim,
        "depths": tuple(depths),
        "num_heads": tuple(shape[1] for shape in first),
        "mlp_ratio": hidden_units / (embed_dim * 2**level),
        "qkv_bias": bool(telling["qkv_bias"]),
        "layer_scale": 1e-5 if telling["gamma"] else None,
        "in_channels": in_channels,
        "include_top": bool(telling["head"]),
    }
    for head in telling["head"].values():
        arguments["num_classes"] = head[-1] if naming == "release" else head[0]
    return arguments


def preset_of(arguments):
    """Return the name of the preset with these sizes, or `None`.

    Args:
        arguments: what `architecture` returns. Classes, colors, the top, and what only this
            package's files tell do not count.
    """
    own = ("num_classes", "in_channels", "include_top", *_TOLD)
    for name, preset in PRESETS.items():
        config = {"qkv_bias": True, **preset["config"]}
        if all(config[key] == value for key, value in arguments.items() if key not in own):
            return name
    return None


@dataclasses.dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        preset: name of the preset whose sizes the model has, or `None`.
        naming: whose names the tensors had: "release", "official" or "timm".
        tensors: number of tensors.
        parameters: number of values in them.
        resized: position tables that were resized, by name.
        largest_error: largest difference between a weight and what the new file holds; 0
            unless it was written in half precision.
        bytes: size of the new file.
    """

    preset: str | None
    naming: str
    tensors: int
    parameters: int
    resized: list
    largest_error: float
    bytes: int


def convert(source, target, naming="official", dtype="float32", image_size=None, progress=True):
    """Write a checkpoint in another form, and read it again to compare.

    Args:
        source: a `.keras`, `.weights.h5`, `.safetensors` or PyTorch file.
        target: the file to write; its ending, one of `FORMATS`, says in which form. A
            `.keras` file holds the whole model. It appears when it is whole. From one
            `.safetensors` file to another, what it says beside its weights, as of a
            classifier's classes, is kept.
        naming: names in a `.safetensors` file: "official", the default, or "timm".
        dtype: "float32", the default, or "float16", for a `.safetensors` file.
        image_size: side in pixels, or (height, width), to scale the windows to; their
            position tables are resized. Default `None`: windows stay.
        progress: whether to show a bar; default `True`.

    Returns:
        A `Conversion`.

    Raises:
        CheckpointError: if the source is not a whole and valid GCViT checkpoint.
        ValueError: for an ending, names or a number format that cannot be written.
        FileNotFoundError: if there is no such source.
        OSError: if the target cannot be written; what was there is unchanged.
    """
    source, target = os.fspath(source), os.fspath(target)
    ending = next((ending for ending in FORMATS if target.endswith(ending)), None)
    _check_choices(target, ending, naming, dtype)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise ValueError(f"{target} is the file to read; name another one to write.")
    arguments = architecture(source)
    preset = preset_of(arguments)
    if image_size is not None:
        arguments["window_size"] = scaled_windows(image_size)
    bar = keras.utils.Progbar(3, unit_name="step", verbose=int(progress))
    bar.update(0)
    model, twin = _built(arguments, source), _built(arguments, source)
    report = load_checkpoint(model, source)
    bar.update(1)
    _write(model, target, ending, naming, dtype, _notes(source, arguments, image_size))
    bar.update(2)
    load_checkpoint(twin, target)
    pairs = zip(weight_specs(model), weight_specs(twin), strict=True)
    difference = (
        np.abs(keras.ops.convert_to_numpy(a.variable - b.variable)).max() for a, b in pairs
    )
    error = float(max(difference))
    bar.update(3)
    return Conversion(
        preset=preset,
        naming=report.naming,
        tensors=report.loaded,
        parameters=model.count_params(),
        resized=report.resized,
        largest_error=error,
        bytes=os.path.getsize(target),
    )


def _check_choices(target, ending, naming, dtype):
    if ending is None:
        raise ValueError(f"The new file must end in one of {', '.join(FORMATS)}; got {target}.")
    for name, value, choices in (
        ("naming", naming, ("official", "timm")),
        ("dtype", dtype, ("float32", "float16")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        if value != choices[0] and ending != ".safetensors":
            raise ValueError(f"{name}={value!r} is for .safetensors files only; got {target}.")


def _notes(source, arguments, image_size):
    """Return what a `.safetensors` file says beside its weights: also what they do not tell."""
    from_same = source.endswith(".safetensors")
    notes = readers.training_notes(source) if from_same else {}
    told = readers.model_config(source) if from_same else {}
    notes["config"] = json.dumps({**arguments, **told, "window_size": arguments["window_size"]})
    if image_size is not None:
        notes["image_size"] = json.dumps(image_size)
    return notes


def _built(arguments, source):
    try:
        model = GCViT(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source} tells of a model that cannot be built: {error}") from error
    model.build((None, None, None, model.in_channels))
    return model


def _write(model, target, ending, naming, dtype, notes):
    if ending == ".safetensors":
        save_safetensors(model, target, dtype=dtype, metadata=notes, naming=naming)
    elif ending == ".keras":
        model.save(target)
    else:
        model.save_weights(target)
