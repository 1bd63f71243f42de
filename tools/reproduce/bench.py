"""Measure how fast the model is, beside timm where that is installed, in one sitting.

    python tools/reproduce/bench.py            # xxtiny, batches of 1 and 16, 224 and 448 px
    python tools/reproduce/bench.py --list     # the contestants that are installed here
    python tools/reproduce/bench.py --limits   # what the machine can do at most, by PyTorch
    python tools/reproduce/bench.py --precisions float32 bfloat16 --batches 1 32 256 --at-once 300

A case is a task (a forward pass or a training step) at one batch, image size, precision and
preset. Each contestant of a case has a process of its own, which is warmed up and then waits
until it is asked for one timed repetition: the contestants take turns, round after round, so
that what disturbs the machine disturbs all of them. Only one process works at a time; but with
--at-once, those of all cases prepare and compile side by side before the first turn, which suits a
machine with many cores that is lent by the minute. Compile times then say little.

Each finished case is written to the results and skipped next time, so that a sitting can be
cut off; --again measures the chosen cases anew. A contestant that fails is recorded with its
error. Writes gcvit/results/bench.json and, beside it, the table bench.md.
"""

import argparse
import contextlib
import datetime
import fnmatch
import functools
import importlib.machinery
import importlib.metadata
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

from results import processor, write

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results" / "bench.json"
PACKAGES = ("gcvit-book", "keras", "tensorflow", "jax", "torch", "timm", "numpy")
FORWARD = ("predict", "predict_on_batch")
STEP = ("fit", "fit_remat", "train_on_batch")
COMPILED = {
    "tensorflow": ("graph", "xla"),
    "jax": ("jit",),
    "torch": ("compile",),
    "timm": ("compile",),
}
FRAMEWORKS = {
    "tensorflow": ("tensorflow",),
    "jax": ("jax", "tensorflow"),
    "torch": ("torch", "tensorflow"),
    "timm": ("timm", "torch"),
}
"""What an installation for one library holds. keras-cv needs TensorFlow on every backend."""

REFERENCE = "timm eager"
BATCHES_A_CALL = 4
"""Batches that one call of `predict` or `fit` is given, as a user would give it several."""

LONG_ENOUGH = 0.4
"""Seconds that a repetition lasts at least: a short call is repeated within it."""


def contestants(task):
    """Return the names of what can be measured here: "library mode"."""
    through_keras = FORWARD if task == "forward" else STEP
    found = []
    for library, compiled in COMPILED.items():
        if importlib.util.find_spec(library) is None or (
            library == "timm" and importlib.util.find_spec("torch") is None
        ):
            continue
        found += [f"{library} {mode}" for mode in ("eager", *compiled)]
        if library != "timm":
            found += [f"{library} {mode}" for mode in through_keras]
    return found


# What runs in a contestant's process. Each function returns `call` and `images`: call() runs
# the task once, to its end, on that many images.


def data(case, batches=1):
    """Return images and labels, the same for everyone."""
    import numpy as np

    draw = np.random.default_rng(0)
    count, size = batches * case["batch"], case["size"]
    images = draw.normal(size=(count, size, size, 3)).astype("float32")
    return images, draw.integers(0, 1000, count).astype("int32")


def timm_call(case, mode):
    """Return what calls timm's model."""
    import timm
    import torch

    same_precision()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(case["preset"], img_size=case["size"], drop_path_rate=0.2)
    model = model.to(device).train(case["task"] == "step")
    images, labels = data(case)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    y = torch.from_numpy(labels).long().to(device)
    half = torch.autocast(device, torch.bfloat16, enabled=case["precision"] == "bfloat16")
    run = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def forward():
        with torch.inference_mode(), half:
            return run(x)

    def step():
        optimizer.zero_grad()
        with half:
            loss = torch.nn.functional.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return torch_synchronized(step if case["task"] == "step" else forward), len(x)


def same_precision():
    """Let PyTorch take float32's products in TensorFloat-32 on an accelerator, as JAX does."""
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def torch_synchronized(function):
    """Let a call last until the accelerator has done its work."""
    import torch

    def call():
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def gcvit_call(case, backend, mode):
    """Return what calls this package's model."""
    import keras

    from gcvit import PRESETS, GCViT

    scope = contextlib.nullcontext()
    if mode == "fit_remat":
        depths = PRESETS[case["preset"]]["config"]["depths"]
        blocks = [f"levels_{i}_blocks_{j}" for i, depth in enumerate(depths) for j in range(depth)]
        scope = keras.RematScope("list_of_layers", layer_names=["patch_embed", *blocks])
    with scope:
        model = GCViT.from_preset(
            case["preset"],
            weights=None,
            image_size=case["size"] if case["windows"] == "scaled" else None,
            head_activation=None,
            path_drop=0.2,
            dtype="mixed_bfloat16" if case["precision"] == "bfloat16" else "float32",
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.AdamW(1e-3)
    if mode in FORWARD + STEP:
        return through_keras(case, model, loss, optimizer, mode)
    optimizer.build(model.trainable_variables)
    images, labels = data(case)
    by_backend = {"tensorflow": tensorflow_call, "jax": jax_call, "torch": torch_call}
    return by_backend[backend](case, mode, model, loss, optimizer, images, labels), len(images)


def through_keras(case, model, loss, optimizer, mode):
    """Return what calls the model as a user does, with nothing set but optimizer and loss.

    On TensorFlow, `predict` and `fit` get what the book's pipelines give them. Keras's own, for
    arrays, often waits at its end: see `gcvit.fine_tuning.without_autotune`.
    """
    import keras

    model.compile(optimizer, loss)
    batch = case["batch"]
    images, labels = data(case, 1 if mode.endswith("_on_batch") else BATCHES_A_CALL)
    to_predict, to_fit = (images, batch), (images, labels, batch)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        from gcvit.fine_tuning import without_autotune

        batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch).prefetch(1)
        to_predict = to_fit = (without_autotune(batches),)
    calls = {
        "predict": lambda: model.predict(*to_predict, verbose=0),
        "predict_on_batch": lambda: model.predict_on_batch(images),
        "fit": lambda: model.fit(*to_fit, verbose=0),
        "train_on_batch": lambda: float(model.train_on_batch(images, labels)),
    }
    return calls[mode.removesuffix("_remat")], len(images)


def tensorflow_call(case, mode, model, loss, optimizer, images, labels):
    import tensorflow as tf

    x, y = tf.constant(images), tf.constant(labels)
    weights = [v.value for v in model.trainable_variables]

    def forward(x, y):
        return model(x, training=False)

    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, weights), model.trainable_variables)
        return value

    function = step if case["task"] == "step" else forward
    if mode != "eager":
        function = tf.function(function, jit_compile=mode == "xla")
    return lambda: function(x, y).numpy()


def jax_call(case, mode, model, loss, optimizer, images, labels):
    import jax

    x, y = jax.numpy.asarray(images), jax.numpy.asarray(labels)
    state = [
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]
    if case["task"] == "forward":
        forward = Program(lambda a, b, x: model.stateless_call(a, b, x, training=False)[0], mode)
        return Counted(lambda: forward(*state[:2], x).block_until_ready(), forward)

    def loss_and_state(weights, rest, x, y):
        logits, rest = model.stateless_call(weights, rest, x, training=True)
        return loss(y, logits), rest

    def step(state, x, y):
        weights, rest, slots = state
        (value, rest), gradients = jax.value_and_grad(loss_and_state, has_aux=True)(
            weights, rest, x, y
        )
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return [weights, rest, slots], value

    # As Keras does: the old weights' memory is given to the new ones.
    program = Program(step, mode, donate_argnums=0)

    def call():
        state[:], _ = jax.block_until_ready(program(state, x, y))

    return Counted(call, program)


class Program:
    """A function that JAX compiles at its first call, or runs as it stands in mode "eager"."""

    def __init__(self, function, mode, **options):
        self.function, self.mode, self.options = function, mode, options
        self.compiled = None

    def __call__(self, *args):
        import jax

        if self.mode == "eager":
            return self.function(*args)
        if self.compiled is None:
            self.compiled = jax.jit(self.function, **self.options).lower(*args).compile()
        return self.compiled(*args)

    def bytes_moved(self):
        """Return what all its operations read and write, as XLA counts; None if not compiled."""
        return self.compiled.cost_analysis()["bytes accessed"] if self.compiled else None


class Counted:
    """A call, and the program that it runs."""

    def __init__(self, call, program):
        self.call, self.bytes_moved = call, program.bytes_moved

    def __call__(self):
        return self.call()


def torch_call(case, mode, model, loss, optimizer, images, labels):
    import keras
    import torch

    same_precision()
    x = keras.ops.convert_to_tensor(images)
    y = keras.ops.convert_to_tensor(labels)
    weights = model.trainable_variables
    run = torch.compile(model) if mode == "compile" else model

    def forward():
        with torch.inference_mode():
            return run(x, training=False)

    def step():
        model.zero_grad()
        loss(y, run(x, training=True)).backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in weights], weights)

    return torch_synchronized(step if case["task"] == "step" else forward)


class Memory:
    """The most memory that was held while something ran: the accelerator's, or the process's.

    On a CPU it is the process's resident memory, its libraries included, and read from
    Linux's /proc; elsewhere it is not known.
    """

    def __init__(self, library):
        self.library = library
        if library == "jax":
            import jax

            self.on_device = jax.devices()[0].platform != "cpu"
        elif library == "tensorflow":
            import tensorflow as tf

            self.on_device = bool(tf.config.list_physical_devices("GPU"))
        else:
            import torch

            self.on_device = torch.cuda.is_available()

    def reset(self):
        if self.on_device and self.library == "tensorflow":
            import tensorflow as tf

            tf.config.experimental.reset_memory_stats("GPU:0")
        elif self.on_device and self.library != "jax":  # JAX counts from the process's start
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self):
        """Return the bytes, or None where they are not known."""
        if self.on_device and self.library == "tensorflow":
            import tensorflow as tf

            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
        if self.on_device and self.library == "jax":
            import jax

            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        if self.on_device:
            import torch

            return torch.cuda.max_memory_allocated()
        return process_memory("VmHWM")


def process_memory(field):
    """Return a field of this process's memory in bytes; None where Linux's /proc is not."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def machine_busy():
    """Return the processor seconds that all programs have used since the start; 0 if unknown."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def limits():
    """Return how many bytes a second a copy moves here, and operations a second products take.

    Bytes count as read and as written, a multiplication with its addition as two operations.
    Measured through PyTorch, in float32 (on an accelerator in TensorFloat-32) and bfloat16.
    """
    import torch

    same_precision()
    on_device = torch.cuda.is_available()
    device, numbers, side = ("cuda", 2**30, 8192) if on_device else ("cpu", 2**26, 2048)

    def seconds(function):
        call = torch_synchronized(function)
        call()
        took = []
        for _ in range(10):
            began = time.perf_counter()
            call()
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    x = torch.randn(numbers, device=device)
    copy = torch.empty_like(x)
    found = {"copy_bytes_per_s": 2 * x.nbytes / seconds(lambda: copy.copy_(x))}
    for name in ("float32", "bfloat16"):
        square = torch.randn(side, side, device=device, dtype=getattr(torch, name))
        took = seconds(lambda square=square: square @ square)
        found[f"{name}_operations_per_s"] = 2 * side**3 / took
    return found


def accelerator(library):
    """Return the name of the device that a library computes on, or None for a CPU."""
    if library == "jax":
        import jax

        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind
    if library == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_physical_devices("GPU")
        return tf.config.experimental.get_device_details(found[0])["device_name"] if found else None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def hide(packages):
    """Let this process find none of the packages, as if they were not installed."""

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, *args):
            return None if name.split(".")[0] in packages else super().find_spec(name, *args)

    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder


def work(case, contestant, answer):
    """Prepare a contestant, then do what is asked on stdin: "settle", "repeat", or "end"."""
    library, mode, *_ = contestant.split()
    # keras-cv and TensorFlow load each framework that they find, which would count as memory.
    hide(set(FRAMEWORKS).difference(FRAMEWORKS[library]))
    if hasattr(os, "sched_setaffinity"):  # before the libraries count the cores
        os.sched_setaffinity(0, range(case["cores"]))
    if library in ("timm", "torch"):
        import torch  # noqa: F401 - after TensorFlow, PyTorch's triton crashes
    began = time.perf_counter()
    call, images = timm_call(case, mode) if library == "timm" else gcvit_call(case, library, mode)
    prepared = time.perf_counter()
    call()
    first = time.perf_counter() - prepared
    answer(
        images_a_call=images,
        prepare_s=prepared - began,
        first_call_s=first,
        accelerator=accelerator(library),
        bytes_moved=call.bytes_moved() if isinstance(call, Counted) else None,
    )
    for line in sys.stdin:
        if line.strip() == "end":
            break
        if line.strip() == "settle":
            began = time.perf_counter()
            call()
            calls = max(1, round(LONG_ENOUGH / (time.perf_counter() - began)))
            memory = Memory(library)
            memory.reset()
            answer(calls_a_repetition=calls)
            continue
        # What the others have put out of the caches comes back, and memory from the system,
        # which takes a virtual machine as long again as the work.
        call()
        began, busy, own = time.perf_counter(), machine_busy(), time.process_time()
        for _ in range(calls):
            call()
        took, busy, own = (
            time.perf_counter() - began,
            machine_busy() - busy,
            time.process_time() - own,
        )
        others = max(0.0, busy - own) / took / os.cpu_count()
        answer(seconds=took / calls, cpu_seconds=own / calls, others=others)
    answer(peak_bytes=memory.peak())


class Contestant:
    """A process that prepares, then waits for what it is asked."""

    def __init__(self, name, case):
        self.name, self.began = name, time.perf_counter()
        library, _, *variables = name.split()
        self.log = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps([case, name])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={
                **os.environ,
                "KERAS_BACKEND": library.replace("timm", "torch"),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                # On an accelerator, JAX takes three quarters of the memory otherwise.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                **dict(variable.split("=", 1) for variable in variables),
            },
        )
        self.repetitions, self.found, self.error = [], {}, None

    def prepare(self, until=None):
        """Wait until it is ready, or has failed: then `error` says why.

        Args:
            until: the time, as `time.perf_counter` tells it, when it fails at the latest.
        """
        if self.found or self.error:
            return
        left = None if until is None else max(0.0, until - time.perf_counter())
        try:
            if not select.select([self.process.stdout], [], [], left)[0]:
                self.process.kill()
                self.process.wait()
                raise RuntimeError("not ready in time")
            self.found = self.hear()
        except RuntimeError as error:
            self.error = str(error)
        waited = time.perf_counter() - self.began
        print(f"  {self.name}: {self.error or 'ready'} after {waited:.1f} s", flush=True)

    def ask(self, what):
        """Return what it answers, {} where it has failed, now or before: `error` says why."""
        if self.error:
            return {}
        try:
            with contextlib.suppress(BrokenPipeError):  # of one that has ended: `hear` says why
                self.process.stdin.write(what + "\n")
                self.process.stdin.flush()
            return self.hear()
        except RuntimeError as error:
            self.error = str(error)
            return {}

    def settle(self):
        """Time a call, for the number of calls in a repetition."""
        self.found |= self.ask("settle")

    def repeat(self):
        """Time a repetition."""
        if found := self.ask("repeat"):
            self.repetitions.append(found)

    def hear(self):
        """Return what the process answers; raise RuntimeError where it has ended instead."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.log.seek(0)
        said = self.log.read().strip().splitlines()
        raise RuntimeError(said[-1][:300] if said else f"ended with {self.process.returncode}")

    def end(self):
        self.found |= self.ask("end")
        self.process.communicate()


def measure(case, contestants, repetitions, seconds):
    """Let the contestants of a case take turns; return a record for each.

    Args:
        case: what `CASE` names.
        contestants: an iterable. One is made ready before it is asked for the next.
        repetitions: of each, at most.
        seconds: after which a case ends with its third round or later.
    """
    everyone = []
    for contestant in contestants:
        everyone.append(contestant)
        contestant.prepare()
        contestant.settle()
    began = time.perf_counter()
    for round_ in range(repetitions):
        if round_ >= 3 and time.perf_counter() - began > seconds:
            break
        for contestant in everyone:
            contestant.repeat()
    for contestant in everyone:
        contestant.end()
    today = datetime.date.today().isoformat()
    return [{**record(case, contestant), "date": today} for contestant in everyone]


def record(case, contestant):
    """Return a contestant's numbers, medians and quartiles of the seconds of a batch, or error."""
    if contestant.error:
        return {**case, "contestant": contestant.name, "error": contestant.error}
    found = contestant.found
    batches = found["images_a_call"] / case["batch"]

    def of_a_batch(field):
        values = [answer[field] / batches for answer in contestant.repetitions]
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return median, [low, high]

    median, quartiles = of_a_batch("seconds")
    cpu_median, cpu_quartiles = of_a_batch("cpu_seconds")
    return {
        **case,
        "contestant": contestant.name,
        "repetitions": len(contestant.repetitions),
        "calls_a_repetition": found["calls_a_repetition"],
        "batches_a_call": batches,
        "median_s": median,
        "quartiles_s": quartiles,
        # Processor seconds of all threads: what others take of the machine is not in them.
        "cpu_median_s": cpu_median,
        "cpu_quartiles_s": cpu_quartiles,
        "images_per_s": case["batch"] / median,
        # The share of the processors that other programs took meanwhile.
        "others_share": statistics.median(a["others"] for a in contestant.repetitions),
        "first_call_s": found["first_call_s"],
        # What the first call took beyond a usual one: tracing and compiling.
        "compile_s": max(0.0, found["first_call_s"] - median * batches),
        "peak_bytes": found["peak_bytes"],
        "bytes_moved": found["bytes_moved"],
        "accelerator": found["accelerator"],
    }


def with_ratios(records):
    """Add to each record how many times as fast as timm eager it was in the same case."""
    done = []
    for record in records:
        record = {key: value for key, value in record.items() if not key.startswith("times_")}
        twin = next(
            (
                other
                for other in records
                if other["contestant"] == REFERENCE
                and case_of(other) == case_of(record)
                and "error" not in other
            ),
            None,
        )
        if twin and "error" not in record:
            record["times_timm_eager"] = twin["median_s"] / record["median_s"]
            record["times_timm_eager_cpu"] = twin["cpu_median_s"] / record["cpu_median_s"]
        done.append(record)
    return done


CASE = ("task", "preset", "precision", "windows", "batch", "size", "cores")


def case_of(record):
    return {key: record[key] for key in CASE}


def title(case):
    task = "training step" if case["task"] == "step" else "forward"
    windows = "" if case["windows"] == "scaled" else ", the preset's windows kept"
    return (
        f"{task}, {case['preset']}, {case['precision']}, batch {case['batch']}, "
        f"{case['size']} px{windows}, {case['cores']} core{'s' * (case['cores'] > 1)}"
    )


def tables(results):
    """Return the results as Markdown: a table for each case."""
    how = ", ".join(f"`{command}`" for command in results["commands"]) or results["note"]
    lines = [
        f"Measured on {results['hardware']}, {results['accelerator'] or 'no accelerator'}, "
        f"by {how}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ". Seconds are those of a batch: the median, and the quartiles in brackets. Compile "
        "time is what the first call took beyond a usual one. Peak memory is "
        + ("the accelerator's." if results["accelerator"] else "the process's, libraries included.")
        + " Times timm: how many times as fast as timm, run eagerly, by the clock and by the "
        "processor seconds of all threads. Others: the share of the processors that other "
        "programs took meanwhile; where it is not small, the clock says little."
    ]
    for _, group in itertools.groupby(results["records"], key=case_of):
        group = list(group)
        heading = f"{title(group[0])}, {group[0]['date']}"
        lines += ["", f"**{heading[0].upper()}{heading[1:]}**", ""]
        lines += [
            "| | ms a batch | images/s | times timm | processor ms | times timm | compile s "
            "| peak MB | others |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for record in group:
            if "error" in record:
                lines.append(
                    f"| {record['contestant']} | failed: {record['error']} | | | | | | | |"
                )
                continue
            low, high = (1000 * value for value in record["quartiles_s"])
            cpu_low, cpu_high = (1000 * value for value in record["cpu_quartiles_s"])
            peak, ratio = record["peak_bytes"], record.get("times_timm_eager")
            cpu_ratio = record.get("times_timm_eager_cpu")
            cells = [
                record["contestant"],
                f"{1000 * record['median_s']:.1f} ({low:.1f} to {high:.1f})",
                f"{record['images_per_s']:.1f}",
                f"{ratio:.2f}" if ratio else "",
                f"{1000 * record['cpu_median_s']:.1f} ({cpu_low:.1f} to {cpu_high:.1f})",
                f"{cpu_ratio:.2f}" if cpu_ratio else "",
                f"{record['compile_s']:.1f}",
                f"{peak / 2**20:.0f}" if peak else "",
                f"{record['others_share']:.0%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def hardware():
    """Return a few words about the machine's processor and memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} cores of {processor()}, {memory:.0f} GiB"


def save(results, path):
    """Write the results and the tables, each as a whole."""
    write({path: json.dumps(results, indent=1) + "\n", path.with_suffix(".md"): tables(results)})


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="list the contestants and stop")
    parser.add_argument("--limits", action="store_true",
                        help="print what the machine can do at most, and stop")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=["forward", "step"], metavar="TASK",
                        default=["forward", "step"])  # fmt: skip
    parser.add_argument("--presets", nargs="+", default=["gcvit_xxtiny"])
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"],
                        default=["float32"])  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448], help="pixels a side")
    parser.add_argument("--windows", choices=["scaled", "kept"], default="scaled",
                        help="scaled with the image, as in timm, or the preset's kept")  # fmt: skip
    parser.add_argument("--cores", type=int, default=os.cpu_count(),
                        help="of the processor to use; default: all. Where other work cannot be "
                        "kept away, 1, and compare processor seconds")  # fmt: skip
    parser.add_argument("--contestants", nargs="+", default=["*"], metavar="PATTERN",
                        help='such as "jax *" "timm eager"; default: all installed')  # fmt: skip
    parser.add_argument("--without", nargs="+", default=[], metavar="PATTERN")
    parser.add_argument("--variable", default="", metavar="NAME=VALUE",
                        help="of the environment: each takes part twice")  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60,
                        help="after these, a case ends with its third round or later")  # fmt: skip
    parser.add_argument("--at-once", type=float, metavar="SECONDS",
                        help="prepare the contestants of all cases at once, and leave out those "
                        "that are not ready after these")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    found = parser.parse_args(arguments)
    if found.variable and not re.fullmatch(r"\w+=\S+", found.variable):
        parser.error(f"--variable wants NAME=VALUE without spaces; got {found.variable!r}")
    return found


def chosen(names, arguments):
    """Return the names that a pattern of --contestants fits and none of --without.

    With --variable, a name stands alone and with that variable behind it.
    """
    return [
        f"{name} {variable}".strip()
        for name in names
        if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.contestants)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in arguments.without)
        for variable in dict.fromkeys(("", arguments.variable))
    ]


def main():
    arguments = parse()
    if arguments.work:
        # What the libraries print must not come between the answers.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

        def answer(**found):
            answers.write(json.dumps(found) + "\n")
            answers.flush()

        return work(*json.loads(arguments.work), answer)
    if arguments.list:
        for task in arguments.tasks:
            print(f"{task}: {', '.join(chosen(contestants(task), arguments))}")
        return None
    if arguments.limits:
        return print(json.dumps(limits()))
    command = shlex.join(["python", "tools/reproduce/bench.py", *sys.argv[1:]])
    if tunables := os.environ.get("GLIBC_TUNABLES"):  # how memory is handed over changes the times
        command = f"GLIBC_TUNABLES={shlex.quote(tunables)} {command}"
    results = {"records": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    sitting = []
    for task, preset, precision, batch, size in itertools.product(
        arguments.tasks,
        arguments.presets,
        arguments.precisions,
        arguments.batches,
        arguments.sizes,
    ):
        values = (task, preset, precision, arguments.windows, batch, size, arguments.cores)
        case = dict(zip(CASE, values, strict=True))
        if any(case_of(r) == case for r in results["records"]) and not arguments.again:
            print(f"{title(case)}: in {arguments.out} already; --again measures it anew")
            continue
        names = chosen(contestants(task), arguments)
        sitting.append((case, map(functools.partial(Contestant, case=case), names)))
    if arguments.at_once:
        sitting = [(case, list(starting)) for case, starting in sitting]
        until = time.perf_counter() + arguments.at_once
        for contestant in itertools.chain.from_iterable(started for _, started in sitting):
            contestant.prepare(until)
    for case, starting in sitting:
        print(title(case), flush=True)
        new = measure(case, starting, arguments.repetitions, arguments.seconds)
        others = [r for r in results["records"] if case_of(r) != case]
        results = {
            "commands": list(dict.fromkeys([*results.get("commands", []), command])),
            "hardware": hardware(),
            "accelerator": next(
                (r["accelerator"] for r in new if r.get("accelerator")), results.get("accelerator")
            ),
            "versions": {
                name: importlib.metadata.version(name)
                for name in PACKAGES
                if importlib.util.find_spec(name.replace("-book", ""))
            },
            "settings": {"batches_a_call": BATCHES_A_CALL, "path_drop": 0.2, "optimizer": "AdamW"},
            "records": with_ratios([*others, *new]),
        }
        save(results, arguments.out)
        for found in results["records"][-len(new) :]:
            if "error" not in found:
                print(
                    f"  {found['contestant']:28s} {1000 * found['median_s']:8.1f} ms "
                    f"{found['images_per_s']:7.1f} images/s "
                    f"{found.get('times_timm_eager', float('nan')):5.2f} x timm eager"
                    f"  cpu {1000 * found['cpu_median_s']:8.1f} ms "
                    f"{found.get('times_timm_eager_cpu', float('nan')):5.2f} x"
                    f"  {(found['peak_bytes'] or 0) / 2**20:6.0f} MB",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    main()
