"""Measure what pretraining is worth on the flowers.

    TFDS_DATA_DIR=... python tools/reproduce/transfer.py

Three ways to train `gcvit_nano` are compared, against the number of photographs of each class:
from scratch, a linear head on the frozen backbone, and full fine-tuning. All three see the same
random crops, mirrored or not, in as many passes. The frozen backbone sees them before the head is
trained, whose steps take all of them at once. Of the flowers' three parts, one is to train on, one
to choose by (learning rates, the epoch or step that is kept), and one is looked at once by each
run, at its end.

Each finished run is written to the results file and skipped next time; one that is cut off goes
on from its backup. Under "parts", the file keeps what four more parts of a recipe changed, by this
tool at the commit that stands there: the recipe has lost them since. The pilot's runs in the file
are older than the random order in which `chosen` returns the photographs.
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
    every_epoch,
    finetune,
    fit,
    flowers,
    head_accuracy,
    linear_head,
    make_dataset,
    pooled_features,
)
from gcvit.unit_blocks import reinit_glorot

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results" / "transfer.json"
SIZE, BATCH, LEAST, PILOT_SEED, SEEDS = 128, 32, 0.35, 100, (0, 1, 2)
BUDGET = {None: 8, 80: 8, 20: 8, 5: 4}
"""Epochs by photographs of each class. An epoch is a pass over all of them, or as many passes
as make thirty batches."""
WAYS = ("scratch", "frozen", "full")
PEAKS = {"scratch": (1e-3, 3e-3), "full": (3e-4, 1e-3)}
"""Highest learning rates to choose from, at 20 photographs of each class."""


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


def all_of(part):
    """Return `tf.data.Dataset` of (image, label) of a whole part."""
    return dataset(*part, range(len(part[1])))


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
        return dataclasses.replace(
            self.whole,
            train=dataset(photos, labels, places, passes),
            train_labels=tf.data.Dataset.from_tensor_slices(np.tile(labels[places], passes)),
            train_size=passes * len(places),
            validation=all_of(self.validation),
            validation_size=len(self.validation[1]),
        )


def train_head(data, each, seed, arguments):
    """Train a linear head on the frozen backbone; return what is written of it."""
    model = GCViT.from_preset("gcvit_nano", arguments.weights)
    photos = data.drawn(each, seed)

    def crops(epoch):
        return make_dataset(photos.train, SIZE, BATCH, True, seed=seed, epoch=epoch, smallest=LEAST)

    train, validation, test = pooled_features(
        model,
        every_epoch(crops, 0, BUDGET[each]),
        *(make_dataset(all_of(part), SIZE, 250) for part in (data.validation, data.test)),
    )
    head = linear_head(train, validation, len(data.whole.class_names))
    return {
        "steps": int(head.optimizer.iterations),
        "validation_accuracy": head_accuracy(head, *validation),
        "test_accuracy": head_accuracy(head, *test),
    }


def train_model(data, way, each, seed, peak, arguments):
    """Train all weights; return what is written of it."""
    keras.utils.set_random_seed(seed)
    weights = None if way == "scratch" else arguments.weights
    model = GCViT.from_preset("gcvit_nano", weights, num_classes=len(data.whole.class_names))
    if way == "scratch":
        reinit_glorot(model)
    name = "-".join(map(str, [way, each or "all", seed, peak]))
    epochs = BUDGET[each]
    photos = data.drawn(each, seed)
    run = finetune(
        model, photos, SIZE, epochs, BATCH, seed=seed, backup=arguments.work / name,
        peak=peak, smallest=LEAST, patience=None,
    )  # fmt: skip
    history = fit(model, run, verbose=verbosity())
    if run.state.interrupted:
        raise SystemExit(130)
    test = make_dataset(all_of(data.test), SIZE, 250)
    best = int(np.argmin(history["val_loss"]))
    return {
        "steps": epochs * run.steps,
        "best_epoch": best + 1,
        "validation_accuracy": history["val_accuracy"][best],
        "test_accuracy": evaluate(model, test, photos.class_names)["accuracy"],
    }


def save(results, path):
    """Write the results as a whole."""
    write({path: json.dumps(results, indent=1) + "\n"})


def measure(data, arguments, results):
    """Run what the results lack yet, and write each run as it is finished."""

    def complete(where, way, each, seed, peak=None):
        same = {"way": way, "each": each, "seed": seed, "peak": peak}
        if not any(same.items() <= run.items() for run in results[where]):
            print({"experiment": where, **same}, flush=True)
            if way == "frozen":
                run = train_head(data, each, seed, arguments)
            else:
                run = train_model(data, way, each, seed, peak, arguments)
            results[where].append({**same, **run})
            save(results, arguments.out)

    for way, rates in PEAKS.items():
        for peak in rates:
            complete("pilot", way, 20, PILOT_SEED, peak)
    peaks = {
        way: max(
            (run for run in results["pilot"] if run["way"] == way),
            key=lambda run: run["validation_accuracy"],
        )["peak"]
        for way in PEAKS
    }
    for seed in SEEDS:
        for each in BUDGET:
            for way in WAYS:
                complete("runs", way, each, seed, peaks.get(way))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("_build/transfer"))
    parser.add_argument("--weights", default="default", help="a checkpoint of gcvit_nano")
    arguments = parser.parse_args()
    results = {"pilot": [], "runs": []}
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
    }
    data = Flowers()
    results["train_size"] = len(data.train[1])
    measure(data, arguments, results)
    save(results, arguments.out)
    shutil.rmtree(arguments.work, ignore_errors=True)


if __name__ == "__main__":
    main()
