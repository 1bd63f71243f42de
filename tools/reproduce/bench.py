"""Measure how fast the model is, beside timm where that is installed, in one sitting.

    python tools/reproduce/bench.py            # xxtiny, batches of 1 and 16, 224 and 448 px
    python tools/reproduce/bench.py --list     # the contestants that are installed here
    python tools/reproduce/bench.py --precisions float32 bfloat16 --batches 1 32 --side-by-side

A case is a task (a forward pass or a training step) at one batch, image size, precision and
preset. Each contestant of a case has a process of its own, which is warmed up and then waits
until it is asked for one timed repetition. They take turns, round after round, so that what
disturbs the machine disturbs all of them. With --side-by-side they compile together, which
suits a machine with many cores that is lent by the minute; compile times then say little.

Each finished case is written to gcvit/results/bench.json and, as a table, to bench.md, and is
skipped next time; --again measures it anew. A contestant that fails is recorded with its error.
"""

import argparse
import contextlib
import datetime
import fnmatch
import importlib.util
import itertools
import json
import os
import re
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import hardware, versions, write

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results" / "bench.json"
PACKAGES = ("gcvit-book", "keras", "tensorflow", "jax", "torch", "timm", "numpy")
CASE = ("task", "preset", "precision", "windows", "batch", "size", "cores")
MODES = {
    "tensorflow": {"graph": {"jit_compile": False}, "xla": {"jit_compile": True}},
    "jax": {"jit": {"jit_compile": True}},
    "torch": {"eager": {"jit_compile": False}, "compile": {"jit_compile": True}},
    "timm": {"eager": {}, "compile": {}},
}
"""How one batch on the device is computed: what Keras's `compile` is told for it."""

LOOPS = {"forward": "predict", "step": "fit"}
"""What a user of this package calls, on arrays and with nothing set."""

REFERENCE = "timm eager"
BATCHES_A_CALL = 4  # of `predict` and `fit`, as a user would give them several
LONG_ENOUGH = 0.4  # seconds that a repetition lasts: a short call is repeated within it
ENVIRONMENT = ("XLA_FLAGS", "GLIBC_TUNABLES", "LD_PRELOAD")  # change the times: recorded


def contestants(task, patterns=("*",)):
    """Return the names, "library mode", of what is installed here and fits one of the patterns."""
    names = []
    for library, modes in MODES.items():
        needed = ("timm", "torch") if library == "timm" else (library,)
        if all(map(importlib.util.find_spec, needed)):
            loop = () if library == "timm" else (LOOPS[task],)
            names += [f"{library} {mode}" for mode in (*modes, *loop)]
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


# What runs in a contestant's process. A call runs the task once, to its end.


def data(case, batches=1):
    """Return images and labels, the same for everyone."""
    import numpy as np

    draw = np.random.default_rng(0)
    count, size = batches * case["batch"], case["size"]
    images = draw.normal(size=(count, size, size, 3)).astype("float32")
    return images, draw.integers(0, 2, count).astype("int32")  # a class of every preset


def timm_call(case, mode):
    """Return what calls timm's model, and how many images that is."""
    import torch
    from torchvision_stand_in import import_timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    training = case["task"] == "step"
    options = {"img_size": case["size"], "drop_path_rate": 0.2}
    model = import_timm().create_model(case["preset"], **options).to(device).train(training)
    images, labels = data(case)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    y = torch.from_numpy(labels).long().to(device)
    run = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    half = {"dtype": torch.bfloat16, "enabled": case["precision"] == "bfloat16"}

    def call():
        with torch.inference_mode(not training), torch.autocast(device, **half):
            logits = run(x)
        if training:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.float(), y).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return call, len(x)


def gcvit_call(case, library, mode):
    """Return what calls this package's model, and how many images that is."""
    import keras

    from gcvit import GCViT

    model = GCViT.from_preset(
        case["preset"],
        weights=None,
        image_size=case["size"] if case["windows"] == "scaled" else None,
        head_activation=None,
        path_drop=0.2,
        dtype="mixed_bfloat16" if case["precision"] == "bfloat16" else "float32",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss, **MODES[library].get(mode, {}))
    batch = case["batch"]
    if mode in LOOPS.values():
        images, labels = data(case, BATCHES_A_CALL)
        if mode == "fit":
            return lambda: model.fit(images, labels, batch, verbose=0), len(images)
        return lambda: model.predict(images, batch, verbose=0), len(images)
    x, y = map(keras.ops.convert_to_tensor, data(case))
    if case["task"] == "step":
        return lambda: float(model.train_on_batch(x, y)), batch
    return lambda: model.predict_on_batch(x), batch


def accelerator(library):
    """Return the name of the accelerator in use, and the most bytes held; on a CPU no name.

    There the bytes are the process's, its libraries included; None without Linux's /proc.
    """
    if library == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            return device.device_kind, device.memory_stats()["peak_bytes_in_use"]
    elif library == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            name = tf.config.experimental.get_device_details(gpu)["device_name"]
            return name, tf.config.experimental.get_memory_info("GPU:0")["peak"]
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return None, peak and 1024 * int(peak[1])


def machine_busy():
    """Return the processor seconds that all programs have used since the start; 0 if unknown."""
    stat = Path("/proc/stat")
    ticks = list(map(int, stat.read_text().split()[1:9])) if stat.exists() else [0] * 8
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # not idle, not waiting


def work(case, contestant, answer):
    """Prepare a contestant, then time one repetition for each line on stdin, until "end"."""
    library, mode = contestant.split()
    if hasattr(os, "sched_setaffinity"):  # before the libraries count the cores
        os.sched_setaffinity(0, range(case["cores"]))
    if library in ("timm", "torch"):
        import torch  # before TensorFlow: after it, PyTorch's triton crashes

        # Float32's products in TensorFloat-32, as JAX takes them on an accelerator.
        torch.set_float32_matmul_precision("high")
    call, images = timm_call(case, mode) if library == "timm" else gcvit_call(case, library, mode)
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    began = time.perf_counter()
    call()
    calls = max(1, round(LONG_ENOUGH / (time.perf_counter() - began)))
    answer(images_a_call=images, first_call_s=first)
    while sys.stdin.readline().strip() == "repeat":
        call()  # brings back what the others have put out of the caches
        began, busy, own = time.perf_counter(), machine_busy(), time.process_time()
        for _ in range(calls):
            call()
        took, own = time.perf_counter() - began, time.process_time() - own
        others = max(0.0, machine_busy() - busy - own) / took / os.cpu_count()
        answer(seconds=took / calls, cpu_seconds=own / calls, others=others)
    name, peak = accelerator(library)
    answer(accelerator=name, peak_bytes=peak)


# What runs in the sitting's own process.


class Contestant:
    """A process that prepares, then waits for what it is asked."""

    def __init__(self, name, case):
        self.name, self.began = name, time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps([case, name])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={
                **os.environ,
                "KERAS_BACKEND": name.split()[0].replace("timm", "torch"),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                # On an accelerator, JAX takes three quarters of the memory otherwise.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
        )
        self.repetitions, self.facts, self.error = [], {}, None

    def prepare(self, seconds):
        """Wait until it is ready, that long at most since its start."""
        left = max(0.0, self.began + seconds - time.perf_counter())
        if select.select([self.process.stdout], [], [], left)[0]:
            self.facts |= self.hear()
        else:
            self.process.kill()
            self.error = f"not ready after {seconds:.0f} s"
        waited = time.perf_counter() - self.began
        print(f"  {self.name}: {self.error or 'ready'} after {waited:.1f} s", flush=True)

    def ask(self, what):
        """Return what it answers, {} where it has failed, now or before: `error` says why."""
        if self.error:
            return {}
        with contextlib.suppress(BrokenPipeError):  # of one that has ended: `hear` says why
            print(what, file=self.process.stdin, flush=True)
        return self.hear()

    def hear(self):
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.log.seek(0)
        words = self.log.read().strip().splitlines()
        self.error = words[-1][:300] if words else f"ended with {self.process.returncode}"
        return {}


def measure(case, contestants, repetitions, seconds, ready_in=900):
    """Let the contestants of a case take turns; return a record for each.

    One is made ready, in `ready_in` seconds at most, before the iterable is asked for the next.
    """
    everyone = []
    for contestant in contestants:
        everyone.append(contestant)
        contestant.prepare(ready_in)
    began = time.perf_counter()
    for round_ in range(repetitions):
        if round_ >= 3 and time.perf_counter() - began > seconds:
            break
        for contestant in everyone:
            contestant.repetitions.append(contestant.ask("repeat"))
    for contestant in everyone:
        contestant.facts |= contestant.ask("end")
        contestant.process.communicate()
    return [record(case, contestant) for contestant in everyone]


def record(case, contestant):
    """Return a contestant's numbers, medians and quartiles of the seconds of a batch, or error."""
    known = {**case, "contestant": contestant.name, "date": datetime.date.today().isoformat()}
    if contestant.error:
        return {**known, "error": contestant.error}
    facts, answers = contestant.facts, contestant.repetitions
    batches = facts["images_a_call"] / case["batch"]

    def of_a_batch(field):
        values = [answer[field] / batches for answer in answers]
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return median, [low, high]

    median, quartiles = of_a_batch("seconds")
    cpu_median, cpu_quartiles = of_a_batch("cpu_seconds")
    return {
        **known,
        "repetitions": len(answers),
        "batches_a_call": batches,
        "median_s": median,
        "quartiles_s": quartiles,
        # Processor seconds of all threads: what others take of the machine is not in them.
        "cpu_median_s": cpu_median,
        "cpu_quartiles_s": cpu_quartiles,
        "images_per_s": case["batch"] / median,
        # The share of the processors that other programs took meanwhile.
        "others_share": statistics.median(answer["others"] for answer in answers),
        # What the first call took beyond a usual one: tracing and compiling.
        "compile_s": max(0.0, facts["first_call_s"] - median * batches),
        "peak_bytes": facts["peak_bytes"],
        "accelerator": facts["accelerator"],
    }


def case_of(record):
    return tuple(record[key] for key in CASE)


def with_ratios(records):
    """Add to each record how many times as fast as timm eager it was in the same case."""
    measured = [record for record in records if "error" not in record]
    twins = {case_of(r): r for r in measured if r["contestant"] == REFERENCE}
    for record in measured:
        if twin := twins.get(case_of(record)):
            record["times_timm_eager"] = twin["median_s"] / record["median_s"]
            record["times_timm_eager_cpu"] = twin["cpu_median_s"] / record["cpu_median_s"]
    return records


def title(case):
    task = "training step" if case["task"] == "step" else "forward"
    sizes = f"batch {case['batch']}, {case['size']} px, windows {case['windows']}"
    return f"{task}, {case['preset']}, {case['precision']}, {sizes}, cores: {case['cores']}"


COLUMNS = ("", "ms a batch", "images/s", "times timm", "processor ms", "times timm", "compile s")
COLUMNS += ("peak MiB", "others")


def row(record):
    """Return the cells of a record under `COLUMNS`."""
    if "error" in record:
        return [record["contestant"], f"failed: {record['error']}", *7 * [""]]
    cells = []
    for clock in ("", "cpu_"):
        low, high = (f"{1000 * value:.1f}" for value in record[f"{clock}quartiles_s"])
        ratio = record.get("times_timm_eager_cpu" if clock else "times_timm_eager")
        cells.append(f"{1000 * record[f'{clock}median_s']:.1f} ({low} to {high})")
        cells.append(f"{ratio:.2f}" if ratio else "")
    cells.insert(1, f"{record['images_per_s']:.1f}")
    peak = f"{record['peak_bytes'] / 2**20:.0f}" if record["peak_bytes"] else ""
    rest = (f"{record['compile_s']:.1f}", peak, f"{record['others_share']:.0%}")
    return [record["contestant"], *cells, *rest]


def tables(results):
    """Return the results as Markdown: a table for each case."""
    installed = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    memory = "the accelerator's" if results["accelerator"] else "the process's, libraries included"
    lines = [
        f"Measured on {results['hardware']}, {results['accelerator'] or 'no accelerator'}, by "
        f"{', '.join(f'`{command}`' for command in results['commands'])}; {installed}. The ms are "
        "those of a batch: median and quartiles. Compile s is what the first call took beyond a "
        f"usual one, peak MiB {memory}. Times timm: how many times as fast as timm, run eagerly, "
        "by the clock and by the processor time of all threads. Others: the share of the "
        "processors that other programs took meanwhile; where it is not small, the clock says "
        "little."
    ]
    for _, group in itertools.groupby(results["records"], key=case_of):
        group = list(group)
        lines += ["", f"**{title(group[0]).capitalize()}, {group[0]['date']}**", ""]
        table = [COLUMNS, ["---"] * len(COLUMNS), *map(row, group)]
        lines += [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join(lines) + "\n"


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", help=argparse.SUPPRESS)
    add("--list", action="store_true", help="list the contestants and stop")
    add("--out", type=Path, default=RESULTS)
    add("--tasks", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    add("--presets", nargs="+", default=["gcvit_xxtiny"])
    add("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    add("--batches", nargs="+", type=int, default=[1, 16])
    add("--sizes", nargs="+", type=int, default=[224, 448], help="pixels a side")
    windows = "scaled with the image, as in timm, or the preset's kept"
    add("--windows", choices=["scaled", "kept"], default="scaled", help=windows)
    add("--cores", type=int, default=os.cpu_count(), help="of the processor to use; default: all")
    patterns = 'such as "jax *" "timm eager"; default: all installed'
    add("--contestants", nargs="+", default=["*"], metavar="PATTERN", help=patterns)
    add("--repetitions", type=int, default=15)
    add("--seconds", type=float, default=60, help="then a case ends with its third round or later")
    add("--ready-in", type=float, default=900, help="seconds; what takes longer is left out")
    add("--side-by-side", action="store_true", help="let all of a case compile together")
    add("--again", action="store_true", help="measure what is measured already")
    return parser.parse_args(arguments)


def described(records, earlier):
    """Return the results: the records, and what they were measured by and on."""
    command = shlex.join(["python", "tools/reproduce/bench.py", *sys.argv[1:]])
    return {
        "commands": list(dict.fromkeys([*earlier.get("commands", []), command])),
        "hardware": hardware(),
        "accelerator": next((r["accelerator"] for r in records if r.get("accelerator")), None),
        "versions": versions(PACKAGES),
        "settings": {"batches_a_call": BATCHES_A_CALL, "path_drop": 0.2, "optimizer": "AdamW"},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "records": with_ratios(records),
    }


def sitting(arguments, results):
    """Measure the cases that are asked for; yield the results after each."""
    given = (arguments.presets, arguments.precisions, [arguments.windows], arguments.batches)
    for values in itertools.product(arguments.tasks, *given, arguments.sizes, [arguments.cores]):
        case = dict(zip(CASE, values, strict=True))
        others = [r for r in results["records"] if case_of(r) != values]
        if len(others) < len(results["records"]) and not arguments.again:
            print(f"{title(case)}: in {arguments.out} already; --again measures it anew")
            continue
        print(title(case), flush=True)
        names = contestants(case["task"], arguments.contestants)
        starting = (Contestant(name, case) for name in names)
        if arguments.side_by_side:
            starting = list(starting)
        new = measure(case, starting, arguments.repetitions, arguments.seconds, arguments.ready_in)
        results = described([*others, *new], results)
        for record in new:
            print("  " + "  ".join(row(record)), flush=True)
        yield results


def main():
    arguments = parse()
    if arguments.work:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the libraries print must not come between the answers
        work(*json.loads(arguments.work), lambda **it: print(json.dumps(it), file=answers, flush=1))
    elif arguments.list:
        for task in arguments.tasks:
            print(f"{task}: {', '.join(contestants(task, arguments.contestants))}")
    else:
        earlier = {"records": []}
        if arguments.out.exists():
            earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        table = arguments.out.with_suffix(".md")
        for results in sitting(arguments, earlier):
            write({arguments.out: json.dumps(results, indent=1) + "\n", table: tables(results)})


if __name__ == "__main__":
    main()
