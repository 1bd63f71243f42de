"""Chapter 7: checkpoints, read whole and checked before anything is assigned.

Three kinds of names are understood: those of the Keras release archive, of the official
PyTorch repository and of timm. Each is derived from the attribute path of a variable in
the model, so that a file's tensors and the model's variables can be compared one by one.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
from keras import layers, ops

from gcvit.fetch import fetch
from gcvit.global_tokens import bicubic_matrix

PACKAGED = Path(__file__).parent / "checkpoints"
"""Folder of the checkpoints that ship with the package."""


class CheckpointError(ValueError):
    """A file is not a whole and valid checkpoint of the model; the model is unchanged."""


@dataclasses.dataclass
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        naming: "release", "official" or "timm".
        loaded: number of tensors assigned.
        resized: names of the position tables that were resized to other windows.
        skipped: names of the head's tensors that were left as they were.
    """

    naming: str
    loaded: int
    resized: list
    skipped: list


@dataclasses.dataclass
class WeightSpec:
    """A variable of the model, and what each kind of checkpoint calls and how it lays it out.

    A position table also knows its `window`, (height, width) in tokens.
    """

    variable: object
    names: dict
    kind: str
    window: tuple = None

    @property
    def is_head(self):
        return self.names["official"].startswith("head.")

    @property
    def is_position_table(self):
        return self.kind == "table"

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


def _walk_model(model):
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
        names = [("weight", "vector", layer.gamma), ("bias", "vector", layer.beta)]
    elif isinstance(layer, (layers.Dense, layers.Conv2D, layers.DepthwiseConv2D)):
        kind = "dense" if isinstance(layer, layers.Dense) else "conv"
        kind = "depthwise" if isinstance(layer, layers.DepthwiseConv2D) else kind
        names = [("weight", kind, layer.kernel)]
        if layer.use_bias:
            names.append(("bias", "vector", layer.bias))
    elif hasattr(layer, "relative_position_bias_table"):
        table = layer.relative_position_bias_table
        names = [("relative_position_bias_table", "table", table)]
    elif getattr(layer, "gamma1", None) is not None:
        names = [("gamma1", "vector", layer.gamma1), ("gamma2", "vector", layer.gamma2)]
    else:
        names = []
    for position, (name, kind, variable) in enumerate(names):
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


def slots(model):
    """Return a `WeightSpec` for every weight of a built model.

    Args:
        model: a `GCViT`.

    Raises:
        ValueError: if the model is not built yet.
    """
    if not model.built:
        raise ValueError("Build the model before its weights are read or written.")
    found = []
    for attribute, archive, layer in _walk_model(model):
        for position, name, kind, variable in _own_variables(layer):
            official = f"{attribute}.{name}".replace(".down.", ".downsample.")
            names = {
                "release": f"{archive}/vars/{position}",
                "official": official,
                "timm": _timm_name(official, len(model.levels) - 1),
            }
            window = layer.window_size if kind == "table" else None
            found.append(WeightSpec(variable, names, kind, window))
    return found


# Reading: each reader returns {name: a thing with .shape, and a function that reads it}.


@dataclasses.dataclass
class _Tensor:
    shape: tuple
    read: object


def _is_state_of_training(name):
    """Tell whether an entry belongs to an optimizer, a metric or a random seed."""
    return name.startswith(("optimizer/", "metrics/")) or "/seed/" in name or "seed_gen" in name


def _read_h5(stream, limit):
    import h5py

    tensors = {}

    def visit(group, prefix):
        for key in group:
            path = f"{prefix}{key}"
            # A soft or external link could lead out of the file.
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise CheckpointError(f"{path} is a link; a checkpoint holds its tensors itself.")
            item = group[key]
            if isinstance(item, h5py.Group):
                if path.count("/") > 32:
                    raise CheckpointError(f"{path[:80]}… is nested too deeply for a checkpoint.")
                visit(item, f"{path}/")
            elif not _is_state_of_training(path):
                if item.external or item.is_virtual:
                    raise CheckpointError(f"{path} keeps its values in another file.")
                if item.dtype.kind != "f" or item.nbytes > limit:
                    raise CheckpointError(
                        f"{path} should hold at most {limit:,} bytes of floating-point numbers; "
                        f"it says {item.dtype} {item.shape}."
                    )
                tensors[path] = _Tensor(item.shape, lambda item=item: item[()])

    visit(h5py.File(stream, "r"), "")
    return tensors


def _check_size(what, size, limit):
    if size > limit:
        raise CheckpointError(f"{what} {size:,} bytes; at most {limit:,} can belong to this model.")


def _read_torch(path, archive, limit):
    total = sum(info.file_size for info in archive.infolist())
    _check_size(f"{path} unpacks to", total, limit)
    broken = archive.testzip()
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: {broken} in it is not what was written.")
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a PyTorch checkpoint, which only PyTorch can read: pip install torch."
        ) from error
    # weights_only=True refuses a pickle that would run code. Training scripts leave their
    # arguments, a Namespace of plain values, beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors.")
    return {
        name: _Tensor(
            tuple(value.shape),
            # NumPy has no bfloat16.
            lambda value=value: (value.float() if value.is_floating_point() else value).numpy(),
        )
        for name, value in state.items()
    }


def _read_safetensors(path):
    from safetensors.numpy import load

    data = Path(path).read_bytes()
    digest = _header_of(data).get(_DIGEST)
    if digest is not None and digest != _payload_digest(data):
        raise CheckpointError(f"{path} is damaged: its values are not those that were written.")
    return {
        name: _Tensor(value.shape, lambda value=value: value) for name, value in load(data).items()
    }


# The format has no checksum. Files that are written here carry one under this name.
_DIGEST = "payload_sha256"


def _payload_start(data):
    return 8 + int.from_bytes(data[:8], "little")


def _header_of(data):
    """Return the metadata in the header of a `.safetensors` file, given its bytes."""
    return json.loads(data[8 : _payload_start(data)]).get("__metadata__", {})


def _payload_digest(data):
    return hashlib.sha256(memoryview(data)[_payload_start(data) :]).hexdigest()


def _read_archive(path, limit):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "model.weights.h5" in names:
            info = archive.getinfo("model.weights.h5")
            _check_size(f"{info.filename} in {path} unpacks to", info.file_size, limit)
            # zipfile checks the CRC as it reads.
            return _read_h5(io.BytesIO(archive.read(info)), limit)
        if any(name.endswith("/data.pkl") for name in names):
            return _read_torch(path, archive, limit)
    raise CheckpointError(
        f"{path} is a zip file, but neither a Keras archive nor a PyTorch checkpoint; it "
        f"holds {', '.join(names[:3]) or 'nothing'}."
    )


def _read(path, limit):
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        return _read_archive(path, limit)
    if start.startswith(b"\x89HDF"):
        _check_size(f"{path} takes", os.path.getsize(path), limit)
        return _read_h5(io.BytesIO(Path(path).read_bytes()), limit)
    if start[8:9] == b"{":
        _check_size(f"{path} takes", os.path.getsize(path), limit)
        return _read_safetensors(path)
    shown = repr(start.decode("latin-1")) if start else "nothing: it is empty"
    raise CheckpointError(
        f"{path} is no checkpoint that is known here (.keras, .weights.h5, .safetensors, "
        f".pth.tar); it starts with {shown}."
    )


def _naming_of(names):
    if any(name.startswith("stem.") for name in names):
        return "timm"
    if any("/vars/" in name for name in names):
        return "release"
    return "official"


def _resized_table(table, window):
    """Resize a square window's position table, (rows, heads), to another window, bicubically."""
    old = math.isqrt(len(table))
    rows, columns = (ops.convert_to_numpy(bicubic_matrix(old, 2 * side - 1)) for side in window)
    grid = table.reshape(old, old, -1)
    return np.einsum("pi,ijh,qj->pqh", rows, grid, columns).reshape(-1, table.shape[1])


def _fits_by_resizing(slot, shape):
    """Tell whether a tensor is a table of the same heads for a square window.

    The rows of a table tell its window only where that is square, as all published ones are.
    """
    if not slot.is_position_table or len(shape) != 2:
        return False
    return shape[1] == slot.variable.shape[1] and math.isqrt(shape[0]) ** 2 == shape[0]


def _few(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def with_digest(tensors, metadata=None):
    """Return the bytes of a `.safetensors` file that carries a checksum of its values.

    Args:
        tensors: a dict of arrays.
        metadata: a dict of strings for the header, or `None`.
    """
    from safetensors.numpy import save

    digest = _payload_digest(save(tensors))
    return save(tensors, {**(metadata or {}), _DIGEST: digest})


def load_checkpoint(model, path, skip_head_mismatch=False, skip_head=False, sha256=None):
    """Read a checkpoint into a model, all of it or nothing.

    Args:
        model: a built `GCViT`.
        path: a `.keras` archive, `.weights.h5`, `.safetensors` or PyTorch file.
        skip_head_mismatch: leave the head as it is where the file's has another number
            of classes; default `False`.
        skip_head: leave the head as it is in any case; default `False`.
        sha256: the hash that the file must have; default `None`: not checked. Formats
            differ in what they notice themselves: `.keras`, `.pth.tar` and the
            `.safetensors` that `save_safetensors` writes carry checksums, `.weights.h5` and
            other `.safetensors` do not.

    Returns:
        A `LoadReport`.

    Raises:
        CheckpointError: if the file is damaged or foreign, or a tensor is missing, not
            expected, of another shape or not finite. The model is unchanged.
        FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    wanted = slots(model)
    # Bytes that a file can have: the weights, an optimizer's two moments, an average of the
    # weights, each in 4-byte floats, and 2 MB for the names.
    limit = 4 * 4 * sum(int(np.prod(slot.variable.shape)) for slot in wanted) + 2_000_000
    with _named_errors(path):
        if sha256 is not None:
            _check_hash(path, sha256)
        naming, tensors = read_tensors(path, limit)
        plan, report = _plan(wanted, tensors, naming, skip_head_mismatch, skip_head, path)
    for slot, value in plan:
        slot.variable.assign(value)
    return report


@contextlib.contextmanager
def _named_errors(path):
    """Turn whatever the parsers raise on a damaged file into an error that names the file."""
    try:
        yield
    except (CheckpointError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}). It may be "
            "a download that broke off: delete it and fetch it again."
        ) from error


def read_tensors(path, limit):
    """Read the names and shapes of a checkpoint's tensors, their values when asked for.

    Args:
        path: a file of any kind that `load_checkpoint` reads.
        limit: bytes that the file may unpack to.

    Returns:
        Whose names they are, "release", "official" or "timm", and a dict from name to a
        thing with a `shape` and a function `read` that returns an array.

    Raises:
        CheckpointError: if the file is damaged, foreign or larger than the limit.
        FileNotFoundError: if there is no such file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint file at {path}.")
    with _named_errors(path):
        tensors = {
            name: tensor
            for name, tensor in _read(path, limit).items()
            if not name.endswith("relative_position_index")  # a constant, not a weight
        }
    return _naming_of(tensors), tensors


def _check_hash(path, sha256):
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{path} has the hash {found}; {sha256} was expected. Delete it and fetch it again."
        )


def _plan(wanted, tensors, naming, skip_head_mismatch, skip_head, path):
    by_name = {slot.names[naming]: slot for slot in wanted}
    head = {name for name, slot in by_name.items() if slot.is_head}
    report = LoadReport(naming, 0, [], [])
    differs = {
        name
        for name in head
        if name not in tensors or tuple(tensors[name].shape) != by_name[name].shape_in(naming)
    }
    if skip_head or (skip_head_mismatch and differs):
        report.skipped = sorted(head)
    missing = set(by_name) - set(tensors) - set(report.skipped)
    extra = set(tensors) - set(by_name)
    if not head:  # a model without its top takes a checkpoint with one
        extra = {name for name in extra if not name.startswith("head")}
    if missing or extra:
        lines = [f"{path} is not a checkpoint of this model ({naming} names)."]
        if missing:
            lines.append(f"Missing: {_few(missing)}.")
        if extra:
            lines.append(f"Not expected: {_few(extra)}.")
        raise CheckpointError(" ".join(lines))
    plan = []
    for name, slot in by_name.items():
        if name in report.skipped:
            continue
        shape, expected = tuple(tensors[name].shape), slot.shape_in(naming)
        resize = shape != expected and _fits_by_resizing(slot, shape)
        if shape != expected and not resize:
            hint = " For another number of classes, skip the head." if slot.is_head else ""
            raise CheckpointError(
                f"{name} in {path} has shape {shape}; this model wants {expected}.{hint}"
            )
        value = np.asarray(tensors[name].read())
        if value.dtype.kind != "f":
            raise CheckpointError(f"{name} in {path} holds {value.dtype}, not floating point.")
        value = value.astype("float32")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{name} in {path} holds values that are not finite.")
        if naming != "release":
            value = slot.from_torch(value)
        if resize:
            value = _resized_table(value, slot.window)
            report.resized.append(name)
        plan.append((slot, value))
    report.loaded = len(plan)
    return plan, report


def holds_optimizer(path):
    """Tell whether a file is one of Keras's `.weights.h5` with an optimizer's state in it."""
    import h5py

    if not os.fspath(path).endswith(".weights.h5") or not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return len(file.get("optimizer/vars", ())) > 0


def save_safetensors(model, path, dtype="float32", metadata=None, naming="official"):
    """Write a model's weights as `.safetensors`, with a checksum in the header.

    Args:
        model: a built `GCViT`.
        path: the file to write; it is replaced only when the new one is whole.
        dtype: "float32", the default, or "float16", half the size.
        metadata: a dict of strings to keep in the file's header.
        naming: "official", the default, or "timm": whose names the tensors get.
    """
    tensors = {
        slot.names[naming]: np.ascontiguousarray(
            slot.to_torch(ops.convert_to_numpy(slot.variable), naming).astype(dtype)
        )
        for slot in slots(model)
    }
    unfinished = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(with_digest(tensors, metadata))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


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


def training_notes(path):
    """Return what a `.safetensors` checkpoint says of its own making, as a dict."""
    notes = _header_of(Path(path).read_bytes())
    return {name: value for name, value in notes.items() if name != _DIGEST}
