"""Feed hostile checkpoints to each reader, and count what comes of it.

    python tools/reproduce/fuzz.py --count 2000

Every file is made from a seed. It must be refused with a documented exception and leave the
model as it was, or give exactly the right weights. A worker process reads them, so that one
that hangs or crashes is seen and counted. Two formats have no checksum: there, changed values
in a file whose structure is whole cannot be noticed, unless its hash is known. Such files are
counted apart, and must be refused when the hash is given.
"""

import argparse
import collections
import faulthandler
import hashlib
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import save

# The formats, and whose names the weights have in each.
READERS = {"keras": "release", "weights.h5": "release", "safetensors": "official"}
READERS |= {"plain safetensors": "timm", "pth.tar": "official"}
WITHOUT_CHECKSUM = ("weights.h5", "plain safetensors")
LINK, SECONDS = "link to ", 30  # after so many, a file is said to hang the reader
MODEL = {"window_size": (4,), "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
MODEL |= {"mlp_ratio": 1.0, "num_classes": 3}


def pick(draw, choices):
    return choices[int(draw.integers(len(choices)))]


def without(items, name):
    return {key: value for key, value in items.items() if key != name}


def flip_bits(draw, data):
    data = bytearray(data)
    for _ in range(draw.integers(1, 9)):
        data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
    return bytes(data)


def splice(draw, data):
    """Put junk in the place of some bytes, or remove them, or add to them."""
    start, old, new = draw.integers(len(data)), draw.integers(65), draw.integers(65)
    junk = draw.bytes(new) if draw.random() < 0.5 else bytes(new)
    return data[:start] + junk + data[start + old :]


def false_size(draw, data):
    """Let the directory of an archive tell sizes that are not so."""
    at = data.rfind(b"PK\x01\x02")
    size = pick(draw, (0, 1, 2**31 - 1, 2**32 - 2)).to_bytes(4, "little")
    return data[: at + 24] + size + data[at + 28 :]


def turned(value):
    return np.ascontiguousarray(value.T if value.shape != value.shape[::-1] else value.ravel())


def not_finite(draw, value):
    value = value.copy()
    value.flat[draw.integers(value.size)] = pick(draw, (np.nan, np.inf, -np.inf))
    return value


def another_dataset(draw, file, name):
    """Put a link in the place of a dataset, one whose data lie outside, or a huge one."""
    links = (h5py.SoftLink("/"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("/etc/passwd", "/"))
    outside = {"external": [("/etc/passwd", 0, 4 * int(np.prod(file[name].shape)))]}
    huge = {"shape": (2**20, 2**20), "chunks": (64, 64), "fillvalue": 1.0}
    kind, shape = draw.integers(3), file[name].shape
    del file[name]
    if kind == 0:
        file[name] = pick(draw, links)
    else:
        options = {"shape": shape, **(outside if kind == 1 else huge)}
        file.create_dataset(name, dtype="float32", **options)


BYTES = {
    "truncated": lambda draw, data: data[: draw.integers(len(data))],
    "bits flipped": flip_bits,
    "bits of the header flipped": lambda draw, data: flip_bits(draw, data[:2048]) + data[2048:],
    "spliced": splice,
    "more at the end": lambda draw, data: data + draw.bytes(draw.integers(1, 4096)),
}
"""For every format: the bytes of a whole file in, those of another out."""

STATES = {
    "missing": lambda draw, state, name: without(state, name),
    "renamed": lambda draw, state, name: {**without(state, name), f"{name}_": state[name]},
    "unexpected": lambda draw, state, name: {**state, f"{name}.b": np.ones(3, "float32")},
    "shape": lambda draw, state, name: {**state, name: turned(state[name])},
    "not finite": lambda draw, state, name: {**state, name: not_finite(draw, state[name])},
    "integers": lambda draw, state, name: {**state, name: state[name].astype("int32")},
    "empty": lambda draw, state, name: {},
}
"""For every format: the arrays and the name of a matrix in, other arrays out."""

NAMES = ("../x", "/tmp/x", "x/x", "X", "x\\..\\x")
ARCHIVES = {
    "missing member": lambda draw, files, name: without(files, name),
    "renamed member": lambda draw, files, name: {
        **without(files, name),
        pick(draw, NAMES): files[name],
    },
    "empty member": lambda draw, files, name: {**files, name: b""},
    "link": lambda draw, files, name: {**without(files, name), LINK + name: b"/etc/passwd"},
    "bomb": lambda draw, files, name: {**files, name: bytes(int(draw.integers(8, 65)) << 20)},
}
"""The members of an archive and the name of one in, other members out."""

H5 = {
    "another dataset": another_dataset,
    "deep": lambda draw, file, name: file.create_group("/".join("g" * 200)),
    "loop": lambda draw, file, name: file[name].parent.__setitem__("loop", file[name].parent),
}
"""An open HDF5 file, changed in place, and the name of a dataset."""

HEADERS = {
    "offsets": lambda start, end, shape: ((start + 4, end + 4), (end, start), (-4, end)),
    "end": lambda start, end, shape: ((start, 2**40), (start, end - 4)),
    "shape": lambda start, end, shape: ([2**31, 2**31], [-1], [0], [*shape, 1], [2**63]),
    "dtype": lambda start, end, shape: ("F64", "I32", "BOOL", "BF16", "F8_E4M3", "X", ""),
}
"""A tensor's place and shape in a .safetensors file in, what its header may say instead out."""


def zipped(members):
    """Return an archive; a member whose name begins with `LINK` is a symbolic link."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name.removeprefix(LINK))
            info.external_attr = 0o120777 << 16 if name.startswith(LINK) else 0
            method = zipfile.ZIP_DEFLATED if len(data) > 1 << 22 else zipfile.ZIP_STORED
            archive.writestr(info, data, method)
    return stream.getvalue()


class Runs:
    """Unpickling this makes a file: proof that a checkpoint ran code."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


class Corpus:
    """The files: a whole one, and what mutations make of it. Hostile pickles make `marker`."""

    def __init__(self, reader, model, marker, seed):
        from gcvit.weights import weight_specs

        self.reader, self.marker, self.seed = reader, marker, seed
        naming, self.state = READERS[reader], {}
        for slot in weight_specs(model):
            value = np.array(slot.variable)
            turned = value if naming == "release" else slot.to_torch(value, naming)
            self.state[slot.names[naming]] = np.ascontiguousarray(turned)
        self.whole = self.written(self.state)

    def written(self, state, change=lambda file: None, **more):
        """Return a file with these tensors; `change` is called with an open HDF5 file."""
        if "safetensors" in self.reader:
            from gcvit.readers import with_digest

            return with_digest(state) if self.reader == "safetensors" else save(state)
        stream = io.BytesIO()
        if self.reader == "pth.tar":
            import torch

            tensors = {name: torch.from_numpy(value) for name, value in state.items()}
            torch.save({"epoch": 1, "state_dict": tensors, **more}, stream)
            return stream.getvalue()
        with h5py.File(stream, "w") as file:
            for name, value in state.items():
                file.create_dataset(name, data=value)
            change(file)
        if self.reader == "weights.h5":
            return stream.getvalue()
        about = {"metadata.json": b'{"keras_version": "3.0.5"}', "config.json": b"{}"}
        return zipped({**about, "model.weights.h5": stream.getvalue()})

    def of_its_format(self, draw):
        """Return what was done, and a file that breaks the format's own rules."""
        kind, name = draw.random(), pick(draw, sorted(self.state))
        if self.reader == "weights.h5" or (self.reader == "keras" and kind < 0.3):
            done = pick(draw, list(H5))
            return done, self.written(self.state, lambda file: H5[done](draw, file, name))
        if self.reader == "pth.tar" and kind < 0.3:
            return "code", self.written(self.state, args=Runs(self.marker))
        if self.reader in ("keras", "pth.tar"):
            if kind < 0.45:
                return "false size", false_size(draw, self.whole)
            with zipfile.ZipFile(io.BytesIO(self.whole)) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            done = pick(draw, list(ARCHIVES))
            return done, zipped(ARCHIVES[done](draw, members, pick(draw, list(members))))
        start = 8 + int.from_bytes(self.whole[:8], "little")
        header = json.loads(self.whole[8:start])
        done = pick(draw, list(HEADERS))
        values = HEADERS[done](*header[name]["data_offsets"], header[name]["shape"])
        header[name][done if done in ("shape", "dtype") else "data_offsets"] = pick(draw, values)
        text = json.dumps(header).encode()
        length = len(text) if kind < 0.8 else pick(draw, (0, 2**40, 2**63 - 1))
        return done, length.to_bytes(8, "little") + text + self.whole[start:]

    def case(self, i):
        """Return what was done to file `i`, and its bytes. Nothing is done to the first one."""
        draw = np.random.default_rng([self.seed, list(READERS).index(self.reader), i])
        kind = draw.random()
        if i == 0:
            return "untouched", self.whole
        if kind < 0.5:
            done = pick(draw, list(BYTES))
            return done, BYTES[done](draw, self.whole)
        if kind < 0.75:
            matrices = [name for name, value in self.state.items() if value.ndim > 1]
            done = pick(draw, list(STATES))
            return done, self.written(STATES[done](draw, self.state, pick(draw, matrices)))
        return self.of_its_format(draw)


def outcome(model, before, right, path, corpus):
    """Read a file; return "refused", "right", "unnoticed" or what is wrong."""
    from gcvit import CheckpointError, load_checkpoint

    def holds(weights):
        return all(map(np.array_equal, map(np.array, model.weights), weights))

    try:
        load_checkpoint(model, path)
    except CheckpointError:
        return "refused" if holds(before) else "WRONG: refused, and the model is changed"
    is_right = holds(right)
    for variable, value in zip(model.weights, before, strict=True):
        variable.assign(value)
    if is_right:
        return "right"
    if corpus.reader not in WITHOUT_CHECKSUM:
        return "WRONG: taken, with other weights"
    try:
        load_checkpoint(model, path, sha256=hashlib.sha256(corpus.whole).hexdigest())
    except CheckpointError:
        return "unnoticed"
    return "WRONG: taken, with other weights, though its hash was given"


def work(readers, count, seed):
    """Read the files of each reader; print a line of JSON before and after each."""
    import keras

    from gcvit import GCViT

    models = []
    for i in range(2):
        keras.utils.set_random_seed(i)
        models.append(GCViT(**MODEL))
        models[-1].build((None, 32, 32, 3))
        for variable in models[-1].weights:  # zeros and ones would hide a mix-up
            variable.assign(keras.random.normal(variable.shape, stddev=0.1))
    right, before = ([np.array(v) for v in model.weights] for model in models)
    with tempfile.TemporaryDirectory() as folder:
        marker, path = Path(folder) / "code_ran", Path(folder) / "checkpoint"
        corpora = [Corpus(reader, models[0], marker, seed) for reader in readers]
        for corpus, i in itertools.product(corpora, range(count)):
            kind, data = corpus.case(i)
            path.write_bytes(data)
            line = {"reader": corpus.reader, "file": i, "kind": kind}
            print(json.dumps({**line, "outcome": "WRONG: crashes, or hangs"}), flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                line["outcome"] = outcome(models[1], before, right, path, corpus)
            except Exception as error:  # an exception that is not documented is what is sought
                line["outcome"] = f"WRONG: {type(error).__name__}: {error}"
            faulthandler.cancel_dump_traceback_later()
            if marker.exists():
                line["outcome"] = "WRONG: code ran"
            print(json.dumps(line), flush=True)


def fuzz(count, seed=0):
    """Feed `count` files to each reader that this machine has, in a process of their own.

    One that crashes the process, or hangs it, is the last.

    Returns:
        A Counter of outcomes for each, and a list of what went wrong, dicts of reader, file, kind
        and outcome.
    """
    command = [sys.executable, __file__, "--work", "--count", str(count), "--seed", str(seed)]
    worker = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in worker.stdout.splitlines() if line.startswith("{")]
    if worker.returncode:
        why = f"exit code {worker.returncode}: {worker.stderr[-2000:]}"
        if not lines:
            raise RuntimeError(f"The worker did not start, {why}")
        lines[-1]["outcome"] += f", {why}"
    # Before a file the worker says what is so unless it says more.
    last = {(line["reader"], line["file"]): line for line in lines}.values()
    counts = {reader: collections.Counter() for reader in available()}
    for line in last:
        counts[line["reader"]][line["outcome"].split(":")[0]] += 1
    return counts, [line for line in last if line["outcome"].startswith("WRONG")]


def available():
    """Return the formats for which this machine has what their reader needs."""
    return [r for r in READERS if r != "pth.tar" or importlib.util.find_spec("torch") is not None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if arguments.work:
        return work(available(), arguments.count, arguments.seed)
    counts, faults = fuzz(arguments.count, arguments.seed)
    print(f"{'reader':20}{'files':>8}{'refused':>9}{'right':>7}{'unnoticed':>11}{'wrong':>7}")
    for reader, outcomes in counts.items():
        shown = [outcomes[name] for name in ("refused", "right", "unnoticed", "WRONG")]
        print("{:20}{:>8}{:>9}{:>7}{:>11}{:>7}".format(reader, sum(shown), *shown))
    if "pth.tar" not in counts:
        print("pth.tar: not run, PyTorch is not installed")
    for fault in faults:
        print("{reader}, file {file} ({kind}): {outcome}".format(**fault))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
