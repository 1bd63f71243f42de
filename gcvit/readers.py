"""Chapter 7: the file formats of checkpoints, each read as names and tensors.

Nothing here knows a model: `read` tells which format a file has, and returns its tensors
under the names that the file gives them. Nothing is executed, and nothing is unpacked that is
larger than the caller allows.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path

import ml_dtypes

FORMATS_READ = (
    ".keras, .weights.h5, .weights.json, .safetensors, .safetensors.index.json, and PyTorch's "
    ".pt, .pth and .bin"
)
"""The kinds of files that are read, for messages."""

# The format has no checksum, so that a changed bit would be taken for a weight. Files that are
# written here carry one under this name.
_DIGEST = "payload_sha256"

# What training scripts call the weights in their files, and the averaged ones, in the order in
# which they are looked for.
_CONTAINERS = ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights")
_CONTAINERS += ("params", "state_dict_ema", "model_ema", "ema_state_dict", "ema")


# A checkpoint's file in the folder that holds it.
_FILES = ("model.weights.h5", "model.safetensors", "model.safetensors.index.json")
_FILES += ("pytorch_model.bin",)


class CheckpointError(ValueError):
    """A file is not a whole and valid checkpoint of the model; the model is unchanged."""


@dataclasses.dataclass
class Tensor:
    """A tensor of a file, whose values are read only when asked for.

    Attributes:
        shape: its shape in the file.
        read: a function that returns its values as an array.
    """

    shape: tuple
    read: object


def read(path, limit=None):
    """Return a checkpoint's tensors, {name: `Tensor`}.

    Args:
        path: a `.keras` archive, a `.weights.h5`, `.safetensors` or PyTorch file, the index
            of one that was written in parts (`.weights.json`, `.safetensors.index.json`), or
            the folder that one of these is unpacked in.
        limit: bytes that the file may unpack to. Default `None`: four times its own. Weights
            hardly compress: what unpacks to far more is no checkpoint.

    Raises:
        CheckpointError: if the file is damaged, of no kind that is read, or larger than the
            limit.
        FileNotFoundError: if there is no such file.
    """
    path = _file_in(os.fspath(path))
    with naming_the_file(path):
        with open(path, "rb") as file:
            start = file.read(9)
        if start.startswith(b"{") and start[8:9] != b"{":
            return _read_index(path, limit)
        return _read_whole(path, start, limit)


def _read_whole(path, start, limit):
    """Read a file that holds its tensors itself, by the bytes that it starts with."""
    limit = limit or 4 * os.path.getsize(path) + 2_000_000
    if start.startswith(b"PK"):
        return _read_zip(path, limit)
    if start.startswith(b"\x89HDF"):
        _check_size(f"{path} takes", os.path.getsize(path), limit)
        return _read_h5(io.BytesIO(Path(path).read_bytes()), limit)
    if start[8:9] == b"{":
        _check_size(f"{path} takes", os.path.getsize(path), limit)
        return _read_safetensors(path)
    if not start:
        raise CheckpointError(f"{path} is damaged: it is empty. Fetch or write it again.")
    if start == b"version h":
        raise CheckpointError(
            f"{path} is not the checkpoint, but what Git LFS keeps in its place: fetch it with "
            "`git lfs pull`."
        )
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint: open its address in a browser to see what "
            "the server says, then fetch the file itself."
        )
    if start.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a pickle, a kind that is not supported: if PyTorch wrote it, read it "
            "there and save its state dict again, with PyTorch 1.6 or later."
        )
    raise CheckpointError(
        f"{path} is of a kind that is not supported: it starts with {start.decode('latin-1')!r}. "
        f"Supported formats: {FORMATS_READ}."
    )


def _file_in(path):
    """Return the checkpoint's file, where `path` is the folder that holds it."""
    if os.path.isdir(path):
        for name in _FILES:
            if os.path.isfile(os.path.join(path, name)):
                return os.path.join(path, name)
        raise CheckpointError(
            f"{path} is a folder without model.weights.h5 or model.safetensors in it: give the "
            f"checkpoint's file. Supported formats: {FORMATS_READ}."
        )
    if "://" in path:
        raise FileNotFoundError(f"{path} is an address: fetch the file, and give its path.")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no checkpoint file at {path}. Check the name: a relative one starts in "
            f"{os.getcwd()}."
        )
    return path


@contextlib.contextmanager
def naming_the_file(path):
    """Turn whatever the parsers raise on a damaged file into an error that names the file."""
    try:
        yield
    except (CheckpointError, FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}). It is "
            "damaged, perhaps by an interrupted download: delete it and download it again."
        ) from error


def check_hash(path, sha256):
    """Raise a `CheckpointError` unless a file has this hash."""
    with open(_file_in(os.fspath(path)), "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise CheckpointError(
            f"{path} has the hash {actual}; {sha256} was expected. Delete it and fetch it again."
        )


def _check_size(what, size, limit):
    if size > limit:
        raise CheckpointError(f"{what} {size:,} bytes; at most {limit:,} can belong to this model.")


# HDF5: what Keras writes.


def _is_state_of_training(name):
    """Tell whether an entry belongs to an optimizer, a metric, a random seed or an adapter."""
    of_keras = name.startswith(("optimizer/", "metrics/")) or "/seed/" in name
    return of_keras or "seed_gen" in name or "/vars/lora_" in name


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
                tensors[path] = Tensor(item.shape, _h5_values(path, item, limit))

    visit(h5py.File(stream, "r"), "")
    return tensors


def _h5_values(path, item, limit):
    """Return a function that reads a dataset, checked beforehand."""
    if item.external or item.is_virtual:
        raise CheckpointError(f"{path} keeps its values in another file.")
    # HDF5 has no bfloat16: Keras writes two opaque bytes, and beside them what they are.
    bfloat16 = item.dtype == "V2" and item.attrs.get("dtype") == "bfloat16"
    if item.dtype.kind == "i" and path.endswith("/vars/0"):
        raise CheckpointError(
            f"{path} holds {item.dtype}: the weights are quantized. Read them as a model with "
            "keras.saving.load_model, or save the weights before they are quantized."
        )
    if (item.dtype.kind != "f" and not bfloat16) or item.nbytes > limit:
        raise CheckpointError(
            f"{path} should hold at most {limit:,} bytes of floating-point numbers; it says "
            f"{item.dtype} {item.shape}."
        )
    return lambda: item[()].view(ml_dtypes.bfloat16) if bfloat16 else item[()]


def optimizer_shapes(path):
    """Return the shapes of the optimizer's variables in a `.weights.h5`, none if there are none."""
    import h5py

    if not os.fspath(path).endswith(".weights.h5") or not h5py.is_hdf5(path):
        return []
    with h5py.File(path, "r") as file:
        variables = file.get("optimizer/vars", {})
        return [variables[str(i)].shape for i in range(len(variables))]


# Zip archives: Keras's and PyTorch's.


def _read_zip(path, limit):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "model.weights.h5" in names:
            info = archive.getinfo("model.weights.h5")
            _check_size(f"{info.filename} in {path} unpacks to", info.file_size, limit)
            # zipfile checks the CRC as it reads.
            return _read_h5(io.BytesIO(archive.read(info)), limit)
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(
                f"{path} is a TorchScript program, a kind that is not supported: save the state "
                "dict of the model that it was made from."
            )
        if any(name.endswith("/data.pkl") for name in names):
            return _read_torch(path, archive, limit)
    raise CheckpointError(
        f"{path} is of a kind that is not supported: a zip file with "
        f"{', '.join(names[:3]) or 'nothing'} in it. Supported formats: {FORMATS_READ}."
    )


def model_config(path):
    """Return what a file of this package says of its model's arguments, as a dict.

    A `.keras` archive does, and the `.safetensors` of a classifier; the dict is empty for others.
    """
    path = _file_in(os.fspath(path))
    with naming_the_file(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if "config.json" not in archive.namelist():
                    return {}
                told = json.loads(archive.read("config.json"))
                told = told["config"] if told.get("registered_name") == "gcvit>GCViT" else {}
        else:
            said = metadata(path).get("config", "{}") if is_safetensors(path) else "{}"
            told = json.loads(said)
    return told if isinstance(told, dict) else {}


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
    try:
        # weights_only=True refuses a pickle that would run code. Training scripts leave their
        # arguments, a Namespace of plain values, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch's own text advises to switch the safety off.
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is None:
            raise CheckpointError(
                f"{path} is damaged: PyTorch cannot read it. Delete it and fetch it again."
            ) from error
        raise CheckpointError(
            f"{path} holds more than tensors and plain values ({foreign[1]}), which is not "
            "unpacked, because that can run code. Save the state dict alone where the file was "
            "made: torch.save(model.state_dict(), path)."
        ) from error
    state = _state_dict(state)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f"{path} is of a kind that is not supported: it holds no state dict, neither by itself "
            f"nor as one of {', '.join(_CONTAINERS)}."
        )
    strangers = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise CheckpointError(
            f"{path} is of a kind that is not supported: {strangers[0]!r} in its state dict is no "
            "tensor. Save the weights alone: torch.save(model.state_dict(), path)."
        )
    return {
        name: Tensor(tuple(value.shape), lambda value=value: _torch_values(value))
        for name, value in state.items()
    }


def _state_dict(state):
    """Return the weights in what a training script saved: the first of its containers."""
    if not isinstance(state, dict):
        return state
    inner = (state[name] for name in _CONTAINERS if isinstance(state.get(name), dict))
    inner = next(inner, None)
    return state if inner is None else _state_dict(inner)


def _torch_values(value):
    # NumPy has no bfloat16.
    value = value.detach().to_dense() if value.is_sparse else value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()


# safetensors.


def _read_safetensors(path):
    from safetensors import safe_open

    digest = metadata(path).get(_DIGEST)
    if digest is not None and digest != _payload_digest(Path(path).read_bytes()):
        raise CheckpointError(f"{path} is damaged: its values are not those that were written.")
    file = safe_open(path, "numpy")

    def values(name):
        kind = file.get_slice(name).get_dtype()
        if kind.startswith("F8"):
            raise CheckpointError(
                f"{name} in {path} is of a kind that is not supported, {kind}: write it in float16."
            )
        return file.get_tensor(name)

    return {
        name: Tensor(tuple(file.get_slice(name).get_shape()), functools.partial(values, name))
        for name in file.keys()  # noqa: SIM118, it is no dict
    }


def is_safetensors(path):
    """Tell whether a file begins as `.safetensors` does: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def metadata(path):
    """Return the texts in the header of a `.safetensors` file, {name: text}."""
    from safetensors import safe_open

    with naming_the_file(path), safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _payload_digest(data):
    header = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[header:]).hexdigest()


def training_notes(path):
    """Return what a `.safetensors` checkpoint says of its own making, as a dict."""
    return {name: text for name, text in metadata(path).items() if name != _DIGEST}


def parsed_json(text):
    """Return what a text of JSON holds, or the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def class_names(path):
    """Return the names of the classes that a `.safetensors` checkpoint tells apart, or `None`."""
    return parsed_json(training_notes(path).get("classes", "null"))


def with_digest(tensors, metadata=None):
    """Return the bytes of a `.safetensors` file that carries a checksum of its values.

    Args:
        tensors: a dict of arrays.
        metadata: a dict of strings for the header, or `None`.
    """
    from safetensors.numpy import save

    digest = _payload_digest(save(tensors))
    return save(tensors, {**(metadata or {}), _DIGEST: digest})


# Checkpoints in parts: an index, in JSON, that says which file holds which tensors.


def _read_index(path, limit):
    _check_size(f"{path} takes", os.path.getsize(path), limit or 100_000_000)
    index = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise CheckpointError(
            f"{path} is of a kind that is not supported: JSON without the weight_map that an index "
            f"has. Supported formats: {FORMATS_READ}."
        )
    files = [part if isinstance(part, list) else [part] for part in index["weight_map"].values()]
    tensors, total = {}, 0
    for name in sorted(set(sum(files, []))):
        if os.path.basename(name) != name:
            raise CheckpointError(f"{path} leads out of its folder, to {name}.")
        part = os.path.join(os.path.dirname(path), name)
        if not os.path.isfile(part):
            raise CheckpointError(
                f"{path} lists {name}, which is not beside it: fetch or copy all of the "
                "checkpoint's files into one folder."
            )
        total += os.path.getsize(part)
        _check_size(f"{path} and its parts take", total, limit or total)
        with naming_the_file(part), open(part, "rb") as file:
            tensors |= _read_whole(part, file.read(9), limit)
    return tensors
