"""Measure what pretraining is worth on the flowers, and what each part of the recipe is.

    TFDS_DATA_DIR=... python tools/reproduce/transfer.py

Three ways to train `gcvit_nano` are compared, against the number of photographs of each class:
from scratch, a linear head on the frozen backbone, and full fine-tuning. The first and the last
see the same random crops, mirrored or not, for as many steps. The frozen backbone sees each
photograph once, as the evaluation does, and the head is trained on what it makes of them. Of the
flowers' three parts, one is to train on, one to choose by (learning rates, the recipe's parts,
the epoch that is kept), and one is looked at once by each run, at its end.

Each finished run is written to the results file and skipped next time; one that is cut off goes
on from its backup.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from results import command, hardware, versions, write

from gcvit import GCViT
from gcvit.book import verbosity
from gcvit.fine_tuning import (
    evaluate,
    finetune,
    fit,
    flowers,
    head_accuracy,
    linear_head,
    make_dataset,
    pooled_features,
)
from gcvit.laboratory import interval
from gcvit.unit_blocks import reinit_glorot

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results" / "transfer.json"
SIZE, BATCH, PILOT_SEED, SEEDS = 128, 32, 100, (0, 1, 2)
BUDGET = {5: 4, 20: 8, 80: 16, None: 10}
"""Epochs by photographs of each class. An epoch is a pass over all of them, or as many passes
as make thirty batches."""
WAYS = ("scratch", "frozen", "full")
PEAKS = {"scratch": (1e-3, 3e-3), "full": (3e-4, 1e-3)}
"""Highest learning rates to choose from, at 20 photographs of each class."""
PLAIN = {"layer_decay": 1.0, "smallest": 0.35, "strength": 0, "mixing": False, "averaging": False}
MORE_SEEDS = (3, 4, 5)
"""For a part whose test accuracy rose in all of the first three."""
PARTS = {
    "plain": {},
    "lower rates for earlier layers": {"layer_decay": 0.75},
    "MixUp and CutMix": {"mixing": True},
    "RandAugment in place of crops": {"strength": 0.2, "smallest": None},
    "averaged weights": {"averaging": True},
}
"""What is added to plain crops, one part at a time, at 80 photographs of each class."""
PARTS_EPOCHS = 8
"""Epochs by which the parts are compared: as many as the pilots', by which rates are chosen."""


def arrays(part):
    """Return the photographs of a part, and their labels."""
    photos, labels = zip(*part.as_numpy_iterator(), strict=True)
    return photos, np.array(labels)


def chosen(labels, each, seed):
    """Return places of `each` photographs of every class, drawn anew for every seed."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if each is None:
        return order
    kept = np.concatenate([np.flatnonzero(labels[order] == c)[:each] for c in np.unique(labels)])
    return order[np.sort(kept)]  # not class by class: the pipeline's buffer mixes some hundreds


def dataset(photos, labels, places, passes=1):
    """Return `tf.data.Dataset` of (image, label) of those places."""
    signature = tf.TensorSpec((None, None, 3), "uint8"), tf.TensorSpec((), "int64")
    return tf.data.Dataset.from_generator(
        lambda: ((photos[i], labels[i]) for _ in range(passes) for i in places),
        output_signature=signature,
    )


class Flowers:
    """The three parts, in memory."""

    def __init__(self):
        self.whole = flowers()
        self.train = arrays(self.whole.train)
        self.validation = arrays(self.whole.validation)
        self.test = arrays(self.whole.test)

    def drawn(self, each, seed):
        """Return `Photographs` with so many of each class to train on."""
        photos, labels = self.train
        places = chosen(labels, each, seed)
        passes = -(-30 * BATCH // len(places))
        everything = len(self.validation[1])
        return dataclasses.replace(
            self.whole,
            train=dataset(photos, labels, places, passes),
            train_labels=tf.data.Dataset.from_tensor_slices(np.tile(labels[places], passes)),
            train_size=passes * len(places),
            validation=dataset(*self.validation, range(everything)),
            validation_size=everything,
        )


def train_head(data, each, seed, arguments):
    """Train a linear head on the frozen backbone; return what is written of it."""
    model = GCViT.from_preset("gcvit_nano", arguments.weights)

    places = chosen(data.train[1], each, seed)
    parts = [dataset(*data.train, places)]
    parts += [dataset(*part, range(len(part[1]))) for part in (data.validation, data.test)]
    train, validation, test = pooled_features(
        model, *(make_dataset(part, SIZE, 250) for part in parts)
    )
    head = linear_head(train, validation, len(data.whole.class_names))
    return {
        "steps": int(head.optimizer.iterations),
        "validation_accuracy": head_accuracy(head, *validation),
        "test_accuracy": head_accuracy(head, *test),
    }


def train_model(data, way, each, seed, epochs, settings, arguments):
    """Train all weights; return what is written of it."""
    keras.utils.set_random_seed(seed)
    weights = None if way == "scratch" else arguments.weights
    model = GCViT.from_preset("gcvit_nano", weights, num_classes=len(data.whole.class_names))
    if way == "scratch":
        reinit_glorot(model)
    name = "-".join(map(str, [way, each or "all", seed, epochs, *settings.values()]))
    photos = data.drawn(each, seed)
    run = finetune(
        model, photos, SIZE, epochs, BATCH, seed=seed, backup=arguments.work / name,
        patience=None, **settings,
    )  # fmt: skip
    history = fit(model, run, verbose=verbosity())
    if run.state.interrupted:
        raise SystemExit(130)
    test = make_dataset(dataset(*data.test, range(len(data.test[1]))), SIZE, 250)
    best = int(np.argmin(history["val_loss"]))
    return {
        "steps": epochs * run.steps,
        "best_epoch": best + 1,
        "validation_accuracy": history["val_accuracy"][best],
        "test_accuracy": evaluate(model, test, photos.class_names)["accuracy"],
    }


def mean_of(runs, key, **where):
    """Return mean, standard deviation and count of the runs that fit."""
    values = [run[key] for run in runs if all(run[k] == v for k, v in where.items())]
    return float(np.mean(values)), float(np.std(values, ddof=1)), len(values)


def table(results):
    """Return the results as Markdown."""
    runs, parts = results["runs"], results["parts"]
    sizes = [each for each in BUDGET if any(run["each"] == each for run in runs)]
    lines = ["| photographs of each class | steps | " + " | ".join(WAYS) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(WAYS)]
    for each in sizes:
        steps = next(r["steps"] for r in runs if r["each"] == each and r["way"] != "frozen")
        cells = [mean_of(runs, "test_accuracy", each=each, way=way) for way in WAYS]
        row = " | ".join(f"{mean:.3f} ± {sd:.3f}" for mean, sd, _ in cells)
        lines.append(f"| {each or 'all'} | {steps} | {row} |")
    lines += ["", "| recipe | validation accuracy | beyond plain (95 % interval) |"]
    lines += ["| --- | --- | --- |"]
    for part in PARTS:
        mean, sd, _ = mean_of(parts, "validation_accuracy", part=part)
        cell = "" if part == "plain" else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain(parts, part))
        lines.append(f"| {part} | {mean:.3f} ± {sd:.3f} | {cell} |")
    lines += ["", f"Made by `{results['command']}` on {results['hardware']}.", ""]
    return "\n".join(lines)


def gain(parts, part):
    """Return by how much a part gains, seed by seed: mean, and both ends of its interval."""
    by_seed = {
        name: {run["seed"]: run["validation_accuracy"] for run in parts if run["part"] == name}
        for name in (part, "plain")
    }
    mean, half = interval([by_seed[part][s] - by_seed["plain"][s] for s in by_seed[part]])
    return mean, mean - half, mean + half


def save(results, path):
    """Write the results as a whole."""
    write({path: json.dumps(results, indent=1) + "\n"})


def measure(data, arguments, results):
    """Run what the results lack yet, and write each run as it is finished."""

    def complete(where, way, each, seed, settings, epochs=None, **notes):
        same = {"way": way, "each": each, "seed": seed, "settings": settings, **notes}
        if not any(same.items() <= run.items() for run in results[where]):
            print({"experiment": where, **same}, flush=True)
            if way == "frozen":
                run = train_head(data, each, seed, arguments)
            else:
                epochs = epochs or BUDGET[each]
                run = train_model(data, way, each, seed, epochs, settings, arguments)
            results[where].append({**same, **run})
            save(results, arguments.out)

    for way, peaks in PEAKS.items():
        for peak in peaks:
            complete("pilot", way, 20, PILOT_SEED, {"peak": peak, **PLAIN})
    peak = {
        way: max(
            (run for run in results["pilot"] if run["way"] == way),
            key=lambda run: run["validation_accuracy"],
        )["settings"]["peak"]
        for way in PEAKS
    }
    for part, change in PARTS.items():
        for seed in SEEDS + MORE_SEEDS * (part in ("plain", "lower rates for earlier layers")):
            settings = {"peak": peak["full"], **PLAIN, **change}
            complete("parts", "full", 80, seed, settings, PARTS_EPOCHS, part=part)
    for each in BUDGET:
        for seed in SEEDS:
            complete("runs", "frozen", each, seed, {})
            for way in PEAKS:
                complete("runs", way, each, seed, {"peak": peak[way], **PLAIN})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("_build/transfer"))
    parser.add_argument("--weights", default="default", help="a checkpoint of gcvit_nano")
    arguments = parser.parse_args()
    results = {"pilot": [], "parts": [], "runs": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    results |= {
        "command": command(Path(__file__).name),
        "hardware": hardware(),
        "versions": versions(("keras", "tensorflow", "numpy")),
        "photographs": "tf_flowers: eight tenths, a tenth, a tenth",
        "image_size": SIZE,
        "batch_size": BATCH,
        "epochs": {str(each or "all"): epochs for each, epochs in BUDGET.items()},
        "parts_epochs": PARTS_EPOCHS,
    }
    measure(Flowers(), arguments, results)
    save(results, arguments.out)
    write({arguments.out.with_suffix(".md"): table(results)})
    shutil.rmtree(arguments.work, ignore_errors=True)
    print(table(results))


if __name__ == "__main__":
    main()
