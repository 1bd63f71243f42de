"""Feed hostile checkpoints to each reader, and count what comes of it.

    python tools/fuzz.py --count 2000

Every file is made from a seed. It must be refused with a documented exception and leave the
model as it was, or give exactly the right weights. A worker process reads them, so that one
that hangs or crashes is seen and counted. Two formats have no checksum: there, changed values
in a file whose structure is whole cannot be noticed, unless its hash is known. Such files are
counted apart, and must be refused when the hash is given.
"""

import argparse
import collections
import hashlib
import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np

READERS = ("keras", "weights.h5", "safetensors", "plain safetensors", "pth.tar")
WITHOUT_CHECKSUM = ("weights.h5", "plain safetensors")
SECONDS = 30
"""Time after which a file is said to hang the reader."""

MODEL = {
    "window_size": (4,),
    "embed_dim": 8,
    "depths": (2,),
    "num_heads": (2,),
    "mlp_ratio": 1.0,
    "num_classes": 3,
}


class Runs:
    """Unpickling this makes a file: proof that a checkpoint ran code."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


# Mutations of bytes, for every format.


def _place(draw, data):
    return int(draw.integers(0, len(data)))


def truncate(draw, data):
    return data[: _place(draw, data)]


def flip_bits(draw, data):
    data = bytearray(data)
    for _ in range(int(draw.integers(1, 9))):
        data[_place(draw, data)] ^= 1 << int(draw.integers(0, 8))
    return bytes(data)


def flip_early(draw, data):
    """Flip a bit in the first part, where headers are."""
    head = min(len(data), 2048)
    return flip_bits(draw, data[:head]) + data[head:]


def overwrite(draw, data):
    start, length = _place(draw, data), int(draw.integers(1, 65))
    junk = draw.bytes(length) if draw.random() < 0.5 else bytes(length)
    return data[:start] + junk + data[start + length :]


def remove(draw, data):
    start, length = _place(draw, data), int(draw.integers(1, 65))
    return data[:start] + data[start + length :]


def insert(draw, data):
    start = _place(draw, data)
    return data[:start] + draw.bytes(int(draw.integers(1, 65))) + data[start:]


def append(draw, data):
    return data + draw.bytes(int(draw.integers(1, 4096)))


BYTES = (truncate, flip_bits, flip_bits, flip_early, overwrite, remove, insert, append)


# Mutations of the tensors, for every format: a state dict in, a state dict out.


def _name(draw, state):
    return sorted(state)[int(draw.integers(0, len(state)))]


def missing(draw, state):
    state = dict(state)
    del state[_name(draw, state)]
    return state


def renamed(draw, state):
    state = dict(state)
    name = _name(draw, state)
    state[name + "_"] = state.pop(name)
    return state


def unexpected(draw, state):
    return {**state, f"{_name(draw, state)}.more": np.ones(3, "float32")}


def swapped_shapes(draw, state):
    name = next(n for n in draw.permutation(sorted(state)) if state[n].ndim > 1)
    value = state[name]
    turned = value.T if value.shape != value.shape[::-1] else value.reshape(-1)
    return {**state, name: np.ascontiguousarray(turned)}


def not_finite(draw, state):
    name = _name(draw, state)
    value = state[name].copy()
    value.flat[int(draw.integers(0, value.size))] = draw.choice([np.nan, np.inf, -np.inf])
    return {**state, name: value}


def whole_numbers(draw, state):
    name = _name(draw, state)
    return {**state, name: state[name].astype("int32")}


def empty(draw, state):
    return {}


STATES = (missing, renamed, unexpected, swapped_shapes, not_finite, whole_numbers, empty)


# Mutations of an archive's members: a list of (name, bytes) in, bytes of a zip file out.


def _zipped(members, compression=zipfile.ZIP_STORED, link=None):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            if name == link:
                info.external_attr = 0o120777 << 16
            archive.writestr(info, data)
    return stream.getvalue()


def member_missing(draw, members):
    gone = int(draw.integers(0, len(members)))
    return _zipped([m for i, m in enumerate(members) if i != gone])


def member_renamed(draw, members):
    i = int(draw.integers(0, len(members)))
    name = members[i][0]
    new = draw.choice([f"../{name}", f"/tmp/{name}", f"x/{name}", name.upper(), f"{name}\\..\\x"])
    return _zipped([(str(new), d) if j == i else (n, d) for j, (n, d) in enumerate(members)])


def member_emptied(draw, members):
    i = int(draw.integers(0, len(members)))
    return _zipped([(n, b"" if j == i else d) for j, (n, d) in enumerate(members)])


def member_a_link(draw, members):
    name = members[int(draw.integers(0, len(members)))][0]
    return _zipped([(n, b"/etc/passwd" if n == name else d) for n, d in members], link=name)


def bomb(draw, members):
    i, size = int(draw.integers(0, len(members))), int(draw.integers(8, 65)) << 20
    return _zipped(
        [(n, bytes(size) if j == i else d) for j, (n, d) in enumerate(members)],
        zipfile.ZIP_DEFLATED,
    )


def false_size(draw, data):
    """Let the directory of an archive tell sizes that are not so."""
    at = data.rfind(b"PK\x01\x02")
    size = int(draw.choice([0, 1, 2**31 - 1, 2**32 - 2])).to_bytes(4, "little")
    return data[: at + 24] + size + data[at + 28 :]


ARCHIVES = (member_missing, member_renamed, member_emptied, member_a_link, bomb)


# Mutations of an HDF5 file: an open file, changed in place.


def _dataset(draw, file):
    import h5py

    names = []
    file.visititems(lambda n, item: names.append(n) if isinstance(item, h5py.Dataset) else None)
    return names[int(draw.integers(0, len(names)))]


def h5_link(draw, file):
    import h5py

    name = _dataset(draw, file)
    del file[name]
    links = [h5py.SoftLink("/"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("/etc/passwd", "/")]
    file[name] = links[int(draw.integers(0, 3))]


def h5_elsewhere(draw, file):
    name = _dataset(draw, file)
    shape = file[name].shape
    del file[name]
    outside = [("/etc/passwd", 0, int(np.prod(shape)) * 4)]
    file.create_dataset(name, shape, "float32", external=outside)


def h5_huge(draw, file):
    name = _dataset(draw, file)
    del file[name]
    file.create_dataset(name, (2**20, 2**20), "float32", chunks=(64, 64), fillvalue=1.0)


def h5_deep(draw, file):
    group = file
    for _ in range(200):
        group = group.create_group("g")


def h5_loop(draw, file):
    """Make a group its own member."""
    name = _dataset(draw, file).rsplit("/", 1)[0]
    file[f"{name}/loop"] = file[name]


H5 = (h5_link, h5_elsewhere, h5_huge, h5_deep, h5_loop)


# Mutations of a .safetensors header: a dict in, a dict out.


def header_offsets(draw, header):
    name = _name(draw, header)
    start, end = header[name]["data_offsets"]
    pairs = [(start + 4, end + 4), (end, start), (start, 2**40), (-4, end), (start, end - 4)]
    header[name]["data_offsets"] = list(pairs[int(draw.integers(0, len(pairs)))])
    return header


def header_shape(draw, header):
    name = _name(draw, header)
    shapes = [[2**31, 2**31], [-1], [0], header[name]["shape"] + [1], [2**63]]
    header[name]["shape"] = shapes[int(draw.integers(0, len(shapes)))]
    return header


def header_dtype(draw, header):
    name = _name(draw, header)
    header[name]["dtype"] = str(draw.choice(["F64", "I32", "BOOL", "BF16", "F8_E4M3", "X", ""]))
    return header


def header_same_place(draw, header):
    first, second = _name(draw, header), _name(draw, header)
    header[first]["data_offsets"] = header[second]["data_offsets"]
    return header


HEADERS = (header_offsets, header_shape, header_dtype, header_same_place)


class Corpus:
    """The files: whole ones of a model's weights, and what mutations make of them.

    Args:
        reader: one of `READERS`.
        model: the model whose weights the whole files hold.
        folder: where to write.
        marker: a file that hostile pickles would make.
        seed: a whole number; file `i` of a seed and reader is always the same.
    """

    def __init__(self, reader, model, folder, marker, seed):
        from gcvit.weights import weight_specs

        self.reader, self.model, self.folder = reader, model, folder
        self.marker, self.seed = marker, seed
        naming = {"keras": "release", "weights.h5": "release", "plain safetensors": "timm"}
        naming = naming.get(reader, "official")
        self.state = {
            s.names[naming]: np.array(
                s.variable if naming == "release" else s.to_torch(np.array(s.variable), naming)
            )
            for s in weight_specs(model)
        }
        self.whole = self.written(self.state)

    def written(self, state):
        """Return the bytes of a file with these tensors."""
        if self.reader == "weights.h5":
            return self._h5(state)
        if self.reader == "keras":
            return _zipped(self._members(self._h5(state)))
        if self.reader == "pth.tar":
            return self._torch({k: v for k, v in state.items()})
        from safetensors.numpy import save

        from gcvit.readers import with_digest

        state = {name: np.ascontiguousarray(value) for name, value in state.items()}
        return with_digest(state) if self.reader == "safetensors" else save(state)

    def _h5(self, state, change=None):
        import h5py

        stream = io.BytesIO()
        with h5py.File(stream, "w") as file:
            for name, value in state.items():
                file.create_dataset(name, data=value)
            if change is not None:
                change(file)
        return stream.getvalue()

    def _members(self, h5):
        return [
            ("metadata.json", b'{"keras_version": "3.0.5"}'),
            ("config.json", b"{}"),
            ("model.weights.h5", h5),
        ]

    def _torch(self, state, **more):
        import torch

        tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        stream = io.BytesIO()
        torch.save({"epoch": 1, "state_dict": tensors, **more}, stream)
        return stream.getvalue()

    def _of_its_format(self, draw):
        """Return the bytes of a file that breaks the format's own rules, and what was done."""
        if self.reader in ("keras", "weights.h5") and (
            self.reader == "weights.h5" or draw.random() < 0.3
        ):
            change = H5[int(draw.integers(0, len(H5)))]
            data = self._h5(self.state, lambda file: change(draw, file))
            data = data if self.reader == "weights.h5" else _zipped(self._members(data))
            return change.__name__, data
        if self.reader == "keras":
            if draw.random() < 0.2:
                return "false_size", false_size(draw, self.whole)
            change = ARCHIVES[int(draw.integers(0, len(ARCHIVES)))]
            return change.__name__, change(draw, self._members(self._h5(self.state)))
        if self.reader == "pth.tar":
            if draw.random() < 0.3:
                return "code", self._torch(self.state, args=Runs(self.marker))
            if draw.random() < 0.2:
                return "false_size", false_size(draw, self.whole)
            change = ARCHIVES[int(draw.integers(0, len(ARCHIVES)))]
            with zipfile.ZipFile(io.BytesIO(self.whole)) as archive:
                members = [(name, archive.read(name)) for name in archive.namelist()]
            return change.__name__, change(draw, members)
        start = 8 + int.from_bytes(self.whole[:8], "little")
        header = json.loads(self.whole[8:start])
        metadata = header.pop("__metadata__", None)
        change = HEADERS[int(draw.integers(0, len(HEADERS)))]
        header = change(draw, header)
        if metadata is not None:
            header["__metadata__"] = metadata
        text = json.dumps(header).encode()
        length = len(text) if draw.random() < 0.8 else int(draw.choice([0, 2**40, 2**63 - 1]))
        return change.__name__, length.to_bytes(8, "little") + text + self.whole[start:]

    def case(self, i):
        """Return what was done to file `i`, and its bytes. Nothing is done to the first one."""
        if i == 0:
            return "untouched", self.whole
        draw = np.random.default_rng([self.seed, READERS.index(self.reader), i])
        kind = draw.random()
        if kind < 0.5:
            change = BYTES[int(draw.integers(0, len(BYTES)))]
            return change.__name__, change(draw, self.whole)
        if kind < 0.75:
            change = STATES[int(draw.integers(0, len(STATES)))]
            return change.__name__, self.written(change(draw, self.state))
        return self._of_its_format(draw)


def outcome(model, before, right, path, whole, reader):
    """Read a file; return "refused", "right", "unnoticed" or what is wrong."""
    from gcvit import CheckpointError, load_checkpoint

    def now():
        return [np.array(v) for v in model.weights]

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    try:
        load_checkpoint(model, path)
    except CheckpointError:
        return "refused" if same(now(), before) else "WRONG: refused, and the model is changed"
    found = now()
    for variable, value in zip(model.weights, before, strict=True):
        variable.assign(value)
    if same(found, right):
        return "right"
    if reader not in WITHOUT_CHECKSUM:
        return "WRONG: taken, with other weights"
    try:
        load_checkpoint(model, path, sha256=hashlib.sha256(whole).hexdigest())
    except CheckpointError:
        return "unnoticed"
    return "WRONG: taken, with other weights, though its hash was given"


def work(readers, start, count, seed):
    """Read the files of each reader, from the `start`-th on; print a line of JSON for each."""
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
        corpora = {r: Corpus(r, models[0], Path(folder), marker, seed) for r in readers}
        for number in range(start, len(readers) * count):
            reader, i = readers[number // count], number % count
            kind, data = corpora[reader].case(i)
            path.write_bytes(data)
            line = {"number": number, "file": i, "reader": reader, "kind": kind}
            print(json.dumps(line), flush=True)
            try:
                found = outcome(models[1], before, right, path, corpora[reader].whole, reader)
            except Exception as error:  # an exception that is not documented is what is sought
                found = f"WRONG: {type(error).__name__}: {error}"
            if marker.exists():
                found = "WRONG: code ran"
            print(json.dumps({**line, "outcome": found}), flush=True)


def lines_of(process):
    """Yield a worker's lines as dicts; `None` when it says nothing for `SECONDS`."""
    lines = queue.Queue()

    def pump():
        for line in process.stdout:
            if line.startswith("{"):
                lines.put(json.loads(line))
        lines.put("end")

    threading.Thread(target=pump, daemon=True).start()
    started = False
    while True:
        try:
            line = lines.get(timeout=SECONDS if started else 300)
        except queue.Empty:
            yield None
            return
        if line == "end":
            return
        started = True
        yield line


def fuzz(readers, count, seed=0):
    """Feed `count` files to each reader.

    Returns:
        A dict from reader to a Counter of outcomes, and a list of what went wrong, each a
        dict of reader, file, kind of mutation and outcome.
    """
    counts, faults, number = {r: collections.Counter() for r in readers}, [], 0

    def noted(line, found):
        counts[line["reader"]][found.split(":")[0]] += 1
        if found.startswith("WRONG"):
            faults.append({**line, "outcome": found})

    while number < len(readers) * count:
        command = [sys.executable, __file__, "--count", str(count), "--seed", str(seed)]
        command += ["--worker", str(number)]
        for reader in readers:
            command += ["--reader", reader]
        unfinished, hangs = None, False
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            for line in lines_of(process):
                if line is None:
                    hangs = True
                    process.kill()
                elif "outcome" in line:
                    unfinished, number = None, line["number"] + 1
                    noted(line, line["outcome"])
                else:
                    unfinished = line
            code = process.wait()
            if unfinished is None and code:
                errors.seek(0)
                raise RuntimeError(f"The worker failed:\n{errors.read()[-3000:]}")
        if unfinished is not None:
            fault = "hangs" if hangs else f"crashes the process, exit code {code}"
            noted(unfinished, f"WRONG: {fault}")
            number = unfinished["number"] + 1
    return counts, faults


def available(reader):
    """Tell whether this machine has what a reader needs."""
    import importlib.util

    return reader != "pth.tar" or importlib.util.find_spec("torch") is not None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="default: all")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    wanted = arguments.reader or READERS
    readers = [reader for reader in wanted if available(reader)]
    if arguments.worker is not None:
        work(readers, arguments.worker, arguments.count, arguments.seed)
        return
    counts, faults = fuzz(readers, arguments.count, arguments.seed)
    print(f"{'reader':20}{'files':>8}{'refused':>9}{'right':>7}{'unnoticed':>11}{'wrong':>7}")
    for reader in wanted:
        if reader not in readers:
            print(f"{reader:20} not run: PyTorch is not installed")
            continue
        shown = [counts[reader][name] for name in ("refused", "right", "unnoticed", "WRONG")]
        print("{:20}{:>8}{:>9}{:>7}{:>11}{:>7}".format(reader, sum(shown), *shown))
    for fault in faults:
        print("{reader}, file {file} ({kind}): {outcome}".format(**fault))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
