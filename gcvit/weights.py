"""Chapter 7: a model's weights under the names of three checkpoints, read and written whole.

Three kinds of names are understood: those of the Keras release archive, of the official
PyTorch repository and of timm. Each is derived from the attribute path of a variable in
the model, so that a file's tensors and the model's variables can be compared one by one,
all of them before the first is assigned.
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from keras import layers, ops

from gcvit import readers
from gcvit.fetch import fetch
from gcvit.global_tokens import bicubic_matrix
from gcvit.readers import CheckpointError

FORMATS = (".safetensors", ".weights.h5", ".keras")
"""What is written, by the ending of the file's name."""

PACKAGED = Path(__file__).parent / "checkpoints"
"""Folder of the checkpoints that ship with the package."""


@dataclasses.dataclass
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        naming: "release", "official" or "timm".
        loaded: number of tensors assigned.
        resized: names of the position tables that were resized to other windows.
        skipped: names of the head's tensors that were left as they were.
        recolored: name of the first kernel, where it was changed to other colors.
    """

    naming: str
    loaded: int = 0
    resized: list = dataclasses.field(default_factory=list)
    skipped: list = dataclasses.field(default_factory=list)
    recolored: str | None = None


@dataclasses.dataclass
class WeightSpec:
    """A variable of the model, and what each kind of checkpoint calls and how it lays it out.

    Attributes:
        variable: the variable.
        names: its name in each kind of checkpoint: {"release", "official", "timm"}.
        kind: "dense", "conv", "depthwise", "table" (of positions) or "vector".
        layer: the layer that it belongs to.
    """

    variable: object
    names: dict
    kind: str
    layer: object

    @property
    def is_head(self):
        return self.names["official"].startswith("head.")

    @property
    def is_first_kernel(self):
        return self.names["official"] == "patch_embed.proj.weight"

    @property
    def adapted(self):
        """Whether the layer adds a LoRA adapter to this variable."""
        return self.kind in ("dense", "conv") and getattr(self.layer, "lora_enabled", False)

    @property
    def value(self):
        """What the layer computes with, as an array: a LoRA adapter is merged."""
        return ops.convert_to_numpy(self.layer.kernel if self.adapted else self.variable)

    def assign(self, value):
        """Set the variable; a LoRA adapter starts from there, and adds nothing yet."""
        self.variable.assign(value)
        if self.adapted:
            self.layer.lora_kernel_b.assign(ops.zeros_like(self.layer.lora_kernel_b))

    def to_torch(self, value, naming):
        """Lay a value out as PyTorch does: (out, in) and (out, in, height, width)."""
        if self.kind == "dense":
            value = value.T
            if naming == "timm" and ".se." in self.names["timm"]:
                value = value[:, :, None, None]
        elif self.kind == "conv":
            value = value.transpose(3, 2, 0, 1)
        elif self.kind == "depthwise":
            value = value.transpose(2, 3, 0, 1)
        return value

    def from_torch(self, value):
        """Undo `to_torch`."""
        if self.kind == "dense":
            return value.reshape(value.shape[:2]).T
        if self.kind == "conv":
            return value.transpose(2, 3, 1, 0)
        if self.kind == "depthwise":
            return value.transpose(2, 3, 0, 1)
        return value

    def shape_in(self, naming):
        """Return the shape that the tensor must have in a file."""
        shape = tuple(self.variable.shape)
        if naming == "release":
            return shape
        return self.to_torch(np.broadcast_to(np.float32(0), shape), naming).shape


def _snake_case(name):
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _numbered(sublayers):
    """Name the members of a list as Keras's archives do: class name and counter."""
    seen = {}
    for layer in sublayers:
        name = _snake_case(type(layer).__name__)
        count = seen[name] = seen.get(name, -1) + 1
        yield f"{name}_{count}" if count else name, layer


def _walk(layer, attribute, archive):
    """Yield each layer below `layer` with its attribute path and its archive path."""
    yield attribute, archive, layer
    # With PyTorch a layer is a torch module, which keeps its sub-layers in `_modules`.
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}
    for name, value in sorted(attributes.items()):
        if name.startswith("_"):
            continue
        if isinstance(value, layers.Layer):
            yield from _walk(value, f"{attribute}.{name}", f"{archive}/{name}")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, layers.Layer) for v in value):
            for i, (member, sub) in enumerate(_numbered(value)):
                yield from _walk(sub, f"{attribute}.{name}.{i}", f"{archive}/{name}/{member}")


def sublayers(model):
    """Yield each layer of a model that can hold weights, parents first.

    Yields:
        Its attribute path, such as "levels.0.blocks.1.attn"; its path in Keras's archives;
        and the layer.
    """
    paths = {id(model.patch_embed): "patch_embed", id(model.norm): "norm"}
    paths |= {id(level): f"levels.{i}" for i, level in enumerate(model.levels)}
    if model.include_top:
        paths[id(model.head)] = "head"
    for member, layer in _numbered(model.layers):
        if id(layer) in paths:
            attribute = paths[id(layer)]
            yield from _walk(
                layer, attribute, "head" if attribute == "head" else f"layers/{member}"
            )


def _own_variables(layer):
    """Yield a layer's own variables as (position, name in a state dict, kind, variable)."""
    if isinstance(layer, layers.LayerNormalization):
        own = [("weight", "vector", layer.gamma), ("bias", "vector", layer.beta)]
    elif isinstance(layer, (layers.Dense, layers.Conv2D, layers.DepthwiseConv2D)):
        kind = "dense" if isinstance(layer, layers.Dense) else "conv"
        kind = "depthwise" if isinstance(layer, layers.DepthwiseConv2D) else kind
        # `kernel` of a layer with a LoRA adapter is a sum, and no variable.
        own = [("weight", kind, getattr(layer, "_kernel", layer.kernel))]
        if layer.use_bias:
            own.append(("bias", "vector", layer.bias))
    elif hasattr(layer, "relative_position_bias_table"):
        table = layer.relative_position_bias_table
        own = [("relative_position_bias_table", "table", table)]
    elif getattr(layer, "gamma1", None) is not None:
        own = [("gamma1", "vector", layer.gamma1), ("gamma2", "vector", layer.gamma2)]
    else:
        own = []
    for position, (name, kind, variable) in enumerate(own):
        yield position, name, kind, variable


_TIMM_NAMES = (
    (r"^patch_embed\.proj", "stem.conv1"),
    (r"^patch_embed\.conv_down", "stem.down"),
    (r"^levels\.", "stages."),
    (r"(stem\.down|downsample)\.conv\.", r"\1.conv_block.conv."),
    (r"conv\.0\.", "conv_dw."),
    (r"conv\.2\.fc\.0", "se.fc1"),
    (r"conv\.2\.fc\.2", "se.fc2"),
    (r"conv\.3\.", "conv_pw."),
    (r"attn\.relative_position", "attn.rel_pos.relative_position"),
    (r"gamma([12])$", r"ls\1.gamma"),
    (r"^head\.", "head.fc."),
)


def _timm_name(official, last_level):
    name = official
    for pattern, new in _TIMM_NAMES:
        name = re.sub(pattern, new, name)
    # timm downsamples at the start of the next stage, and counts the generator from 1.
    name = re.sub(
        r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name
    )
    name = re.sub(
        r"q_global_gen\.to_q_global\.(\d+)",
        lambda m: f"global_block.blocks.conv{int(m[1]) + 1}",
        name,
    )
    return re.sub(r"^norm\.", f"stages.{last_level}.norm.", name)


def weight_specs(model):
    """Return a `WeightSpec` for every weight of a built model.

    Args:
        model: a `GCViT`.

    Raises:
        ValueError: if the model is not built yet.
        CheckpointError: if it is quantized: its numbers are no longer those of a checkpoint.
    """
    if not model.built:
        raise ValueError("Build the model before its weights are read or written.")
    specs = []
    for attribute, archive, layer in sublayers(model):
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None:
            raise CheckpointError(
                f"The model is quantized ({attribute} is {mode}), but a checkpoint holds floating-"
                "point weights. Read it before you quantize; to write the quantized model, use "
                'model.save("model.keras").'
            )
        for position, name, kind, variable in _own_variables(layer):
            official = f"{attribute}.{name}".replace(".down.", ".downsample.")
            names = {
                "release": f"{archive}/vars/{position}",
                "official": official,
                "timm": _timm_name(official, len(model.levels) - 1),
            }
            specs.append(WeightSpec(variable, names, kind, layer))
    return specs


# Reading.


def _naming_of(names):
    if any(name.startswith("stem.") for name in names):
        return "timm"
    if any("/vars/" in name for name in names):
        return "release"
    return "official"


# What a wrapper puts before each name, as `module.` of DataParallel, `_orig_mod.` of
# torch.compile or `backbone.` of a detector, stands before the first convolution's too.
_FIRST_KERNEL = re.compile(r"(.*\.)(patch_embed\.proj|stem\.conv1)\.weight")


# And what wrappers of parts, as those that spare memory, put in the middle.
_INNER_WRAPPER = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def _unwrapped(tensors, path):
    """Return the tensors under their names without what wrappers have put into them."""
    tensors = {_INNER_WRAPPER.sub("", name): tensor for name, tensor in tensors.items()}
    prefixes = {match[1] for match in map(_FIRST_KERNEL.fullmatch, tensors) if match}
    if not prefixes:
        return tensors
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds several models ({', '.join(sorted(prefixes))}): save the one that you "
            "want in a file of its own."
        )
    (prefix,) = prefixes
    # Parts that a detector or a trainer adds may lack some of the prefix, as `head.` does
    # beside `backbone.`, or lie beside it.
    outer = prefix.removesuffix("backbone.")
    names = {name: name.removeprefix(prefix).removeprefix(outer) for name in tensors}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{path} holds some tensors twice, with and without {prefix}.")
    return {names[name]: tensor for name, tensor in tensors.items()}


def read_tensors(path, limit=None):
    """Read the names and shapes of a checkpoint's tensors, their values when asked for.

    Args:
        path: a file of any kind that `load_checkpoint` reads.
        limit: see `readers.read`.

    Returns:
        Whose names they are, "release", "official" or "timm", and a dict from name to a
        `readers.Tensor`. What wrappers put before the names is taken away.

    Raises:
        CheckpointError: if the file is damaged, of no kind that is read, or larger than the
            limit.
        FileNotFoundError: if there is no such file.
    """
    tensors = {
        name: tensor
        for name, tensor in _unwrapped(readers.read(path, limit), path).items()
        # A constant, and the count that PyTorch's AveragedModel adds: no weights.
        if not name.endswith("relative_position_index") and name != "n_averaged"
    }
    return _naming_of(tensors), tensors


def load_checkpoint(
    model, path, skip_head_mismatch=False, skip_head=False, sha256=None, recolor=False
):
    """Read a checkpoint into a model, all of it or nothing.

    Names that a wrapper has lengthened (`module.`, `model.`, `_orig_mod.`, `backbone.`) are
    understood, and of a training script's file the weights in `state_dict`, `model`,
    `model_state_dict`, `net`, `weights` or `params` are taken, the first of these, and the
    averaged ones (`state_dict_ema`, `model_ema`, `ema`) where there are no others. LoRA adapters
    start anew on the weights that are read.

    Args:
        model: a built `GCViT`.
        path: a `.keras` archive, a `.weights.h5`, `.safetensors` or PyTorch file, or the index
            of one in parts: see `readers.read`.
        skip_head_mismatch: leave the head as it is where the file's has another number
            of classes; default `False`.
        skip_head: leave the head as it is in any case; default `False`.
        sha256: the hash that the file must have; default `None`: not checked. Formats
            differ in what they notice themselves: `.keras`, `.pth.tar` and the
            `.safetensors` that `save_safetensors` writes carry checksums, `.weights.h5` and
            other `.safetensors` do not.
        recolor: fit the first kernel where the file's images have another number of
            channels; default `False`. For one channel the file's are summed, for more they
            are repeated and scaled so that their sum stays, as timm does.

    Returns:
        A `LoadReport`.

    Raises:
        CheckpointError: if the file is damaged or foreign, or a tensor is missing, not
            expected, of another shape or not finite, or if the model is quantized. The model
            is unchanged.
        FileNotFoundError: if there is no such file.
    """
    plan, report = plan_loading(
        model, path, skip_head_mismatch, skip_head=skip_head, sha256=sha256, recolor=recolor
    )
    for spec, value in plan:
        spec.assign(value)
    return report


def plan_loading(
    model, path, skip_head_mismatch=False, skip_head=False, sha256=None, recolor=False
):
    """Check what `load_checkpoint` would assign, and assign nothing.

    Args: those of `load_checkpoint`.

    Returns:
        Pairs of a `WeightSpec` and its new value, and the `LoadReport`.
    """
    path = os.fspath(path)
    specs = weight_specs(model)
    # Bytes that a file can have: the weights, an optimizer's two moments, an average of the
    # weights, each in 4-byte floats, and 2 MB for the names. Several containers of a training
    # script stay below that too.
    limit = 4 * 4 * sum(math.prod(spec.variable.shape) for spec in specs) + 2_000_000
    if sha256 is not None:
        readers.check_hash(path, sha256)
    naming, tensors = read_tensors(path, limit)
    by_name = {spec.names[naming]: spec for spec in specs}
    report = LoadReport(naming)
    head = {name for name, spec in by_name.items() if spec.is_head}
    if skip_head or (skip_head_mismatch and _differ(head, by_name, tensors, naming)):
        report.skipped = sorted(head)
    _check_names(by_name, tensors, head, report, path)
    plan = []
    with readers.naming_the_file(path):
        for name, spec in by_name.items():
            if name not in report.skipped:
                value = _fitted(name, spec, tensors[name], report, recolor, path)
                plan.append((spec, value))
    report.loaded = len(plan)
    return plan, report


def _differ(names, by_name, tensors, naming):
    """Tell whether some of these tensors are missing or have another shape."""
    return any(
        name not in tensors or tuple(tensors[name].shape) != by_name[name].shape_in(naming)
        for name in names
    )


def _check_names(by_name, tensors, head, report, path):
    """Raise an error unless the file has all of the model's tensors and no others."""
    missing = set(by_name) - set(tensors) - set(report.skipped)
    extra = set(tensors) - set(by_name)
    if not head:  # a model without its top takes a checkpoint with one
        extra = {name for name in extra if not name.startswith("head")}
    if missing or extra:
        lines = [f"{path} is not a checkpoint of this model ({report.naming} names)."]
        if missing:
            lines.append(f"Missing: {_few(missing)}.")
        if extra:
            lines.append(f"Not expected: {_few(extra)}.")
        lines.append("`gcvit.convert.architecture` tells which model a file belongs to.")
        raise CheckpointError(" ".join(lines))


def _few(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fitted(name, spec, tensor, report, recolor, path):
    """Return a tensor's value as the model's variable wants it, and note what was changed."""
    shape, expected = tuple(tensor.shape), spec.shape_in(report.naming)
    resize = shape != expected and _fits_by_resizing(spec, shape)
    colors = 2 if report.naming == "release" else 1  # the axis of the channels in
    new_colors = (
        spec.is_first_kernel
        and len(shape) == 4
        and np.delete(shape, colors).tolist() == np.delete(expected, colors).tolist()
        and shape != expected
    )
    if shape != expected and not resize and not (new_colors and recolor):
        hint = " For another number of classes, skip the head." if spec.is_head else ""
        if new_colors:
            hint = (
                " For another number of channels, pass recolor=True to load_checkpoint, or build "
                "the model with from_preset, which sums or repeats the file's."
            )
        raise CheckpointError(
            f"{name} in {path} has shape {shape}; this model wants {expected}.{hint}"
        )
    value = np.asarray(tensor.read())
    if value.dtype.kind != "f" and value.dtype != ml_dtypes.bfloat16:
        raise CheckpointError(f"{name} in {path} holds {value.dtype}, not floating point.")
    _check_range(value, spec.variable.dtype, f"{name} in {path} holds")
    value = value.astype("float32")
    if report.naming != "release":
        value = spec.from_torch(value)
    if resize:
        value = _resized_table(value, spec.layer.window_size)
        report.resized.append(name)
    if new_colors:
        value = _recolored(value, spec.variable.shape[2])
        report.recolored = name
    return value


def _check_range(value, dtype, holder):
    """Raise an error unless all numbers are finite, and stay so in another number format."""
    if not np.isfinite(value).all():
        raise CheckpointError(f"{holder} values that are not finite.")
    largest = float(ml_dtypes.finfo(dtype).max)
    if value.size and np.abs(value.astype("float64")).max() > largest:
        raise CheckpointError(f"{holder} values above {largest:.0f}, the largest {dtype}.")


def _resized_table(table, window):
    """Resize a square window's position table, (rows, heads), to another window, bicubically."""
    old = math.isqrt(len(table))
    rows, columns = (ops.convert_to_numpy(bicubic_matrix(old, 2 * side - 1)) for side in window)
    grid = table.reshape(old, old, -1)
    return np.einsum("pi,ijh,qj->pqh", rows, grid, columns).reshape(-1, table.shape[1])


def _fits_by_resizing(spec, shape):
    """Tell whether a tensor is a table of the same heads for a square window.

    The rows of a table tell its window only where that is square, as all published ones are.
    """
    if spec.kind != "table" or len(shape) != 2:
        return False
    return shape[1] == spec.variable.shape[1] and math.isqrt(shape[0]) ** 2 == shape[0]


def _recolored(kernel, channels):
    """Return the first kernel, (height, width, in, out), for images of other channels."""
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    given = kernel.shape[2]
    return kernel[:, :, np.arange(channels) % given] * (given / channels)


# Writing.


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to; what is written takes the place of `path` when it is whole.

    Args:
        path: the file to write, or a folder that is not there yet; what is written beside it
            under other names, as the parts of a checkpoint, is put there first.

    Raises:
        OSError: if it cannot be written; the message names it, and what was there is unchanged.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write.")
    folder = None
    try:
        # Hidden, and in the same folder: what is moved from there is never seen in part.
        folder = Path(tempfile.mkdtemp(".part", ".", path.parent))
        yield folder / path.name
        for written in sorted(folder.iterdir(), key=lambda each: each.name == path.name):
            if written.is_file():
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(written, path.parent / written.name)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}). What was there is unchanged."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def save_safetensors(model, path, dtype="float32", metadata=None, naming="official"):
    """Write a model's weights as `.safetensors`, with a checksum in the header.

    Args:
        model: a built `GCViT`. LoRA adapters are merged into the weights.
        path: the file to write; it is replaced only when the new one is whole.
        dtype: "float32", the default, or "float16", half the size.
        metadata: a dict of strings to keep in the file's header.
        naming: "official", the default, or "timm": whose names the tensors get.

    Raises:
        CheckpointError: for a quantized model, and for weights that are not finite, as after
            a training that diverged, or too large for float16. Nothing is written.
        ValueError: for a name of another ending, by which it would be taken for another kind.
        OSError: see `replacing`.
    """
    if not os.fspath(path).endswith(".safetensors"):
        raise ValueError(f"The file must end in .safetensors; got {path}.")
    tensors = {}
    for spec in weight_specs(model):
        name, value = spec.names[naming], spec.value
        _check_range(value, dtype, f"{name} cannot be written to {path}: it holds")
        tensors[name] = np.ascontiguousarray(spec.to_torch(value, naming).astype(dtype))
    with replacing(path) as unfinished:
        unfinished.write_bytes(readers.with_digest(tensors, metadata))


# Presets' files.


def looks_like_path(weights):
    """Tell whether `weights` names a file rather than an entry of a preset."""
    return os.path.dirname(weights) != "" or os.path.splitext(weights)[1] != ""


def locate(entry):
    """Return the path of a preset's checkpoint, fetching it where it does not ship.

    Args:
        entry: one of the entries of `PRESETS[...]["weights"]`.

    Raises:
        gcvit.FetchError: if it cannot be fetched.
    """
    if "file" in entry:
        return PACKAGED / entry["file"]
    return fetch(entry["url"], entry["size"], entry["sha256"], entry["name"])
