"""Compare the two recipes from random weights: same photographs, split, size, epochs, seeds.

    TFDS_DATA_DIR=... python tools/reproduce/compare_recipes.py

Each finished run is written to the results file and skipped next time; one that is cut off
goes on from its backup. `finetune`'s highest learning rate is chosen beforehand, on a
tenth of the training split that its pilot runs are not trained on. The validation split
chooses nothing. The original recipe is taken as it was published.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path

import keras
import numpy as np
from results import processor, write

from gcvit import GCViT
from gcvit.book import verbosity
from gcvit.fine_tuning import RECIPES, fit, flowers, in_memory
from gcvit.laboratory import interval

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results" / "recipes.json"
PEAKS = (1e-3, 3e-3)
PILOT_SEED = 100
# From random weights no layer knows anything yet that lower rates could protect, and both
# recipes get all their epochs.
FROM_SCRATCH = {"layer_decay": 1.0, "patience": None}


class Clock(keras.callbacks.Callback):
    """Adds each epoch's wall-clock and processor seconds to what is kept of it."""

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self.began[0]
        logs["cpu_seconds"] = time.process_time() - self.began[1]


def hardware():
    """Return a sentence about the machine."""
    return f"{os.cpu_count()} cores of {processor()}, no accelerator, shared with other work"


def pilot_split(photos):
    """Return the training photographs alone, a tenth of them for validation."""
    count = photos.train_size // 10
    rest = photos.train_size - count
    return dataclasses.replace(
        photos.take(rest), validation=photos.train.skip(rest), validation_size=count
    )


def train(photos, recipe, seed, arguments, settings):
    """Train from random weights; return what is written of it."""
    keras.utils.set_random_seed(seed)
    model = GCViT.from_preset(arguments.preset, None, arguments.image_size)
    name = "-".join([recipe, str(photos.train_size), str(seed), *map(str, settings.values())])
    run = RECIPES[recipe](
        model,
        photos,
        arguments.image_size,
        arguments.epochs,
        backup=arguments.work / name,
        seed=seed,
        **settings,
    )
    history = fit(model, run, verbose=verbosity(), callbacks=[Clock()])
    if len(history["loss"]) < arguments.epochs:  # interrupted
        raise SystemExit(130)
    accuracy = history["val_accuracy"]
    return {
        "recipe": recipe,
        "seed": seed,
        "settings": settings,
        "accuracy_at_the_end": accuracy[-1],
        "best_accuracy": max(accuracy),
        "best_epoch": int(np.argmax(accuracy)) + 1,
        "seconds": sum(history["seconds"]),
        "cpu_seconds": sum(history["cpu_seconds"]),
        "history": {name: np.round(values, 4).tolist() for name, values in history.items()},
    }


def spread(values):
    """Return mean, standard deviation, and the 95 % interval of the mean by Student's t."""
    mean, half = interval(values)
    return {
        "mean": mean,
        "sd": float(np.std(values, ddof=1)),
        "interval": [mean - half, mean + half],
    }


def summary(runs):
    """Return means and spreads of each recipe, and of the differences seed by seed."""
    by_seed = {
        name: {run["seed"]: run for run in runs if run["recipe"] == name} for name in RECIPES
    }
    seeds = sorted(set.intersection(*map(set, by_seed.values())))
    if len(seeds) < 2:
        return {}
    means = {"seeds": seeds}
    for key in ("accuracy_at_the_end", "best_accuracy", "seconds", "cpu_seconds"):
        values = {name: [by_seed[name][seed][key] for seed in seeds] for name in RECIPES}
        means[key] = {name: spread(values[name]) for name in RECIPES}
        differences = np.subtract(values["finetune"], values["original"])
        means[key]["finetune - original"] = spread(differences)
    return means


def table(results):
    """Return the results as Markdown."""
    means, settings = results["summary"], results["settings"]
    rows = [
        "| | original | finetune | difference (95 % interval) |",
        "| --- | --- | --- | --- |",
    ]
    for key, label, digits in (
        ("accuracy_at_the_end", "validation accuracy after the last epoch", 3),
        ("best_accuracy", "validation accuracy of the best epoch", 3),
        ("cpu_seconds", "processor seconds", 0),
    ):
        cells = [
            f"{means[key][name]['mean']:.{digits}f} ± {means[key][name]['sd']:.{digits}f}"
            for name in ("original", "finetune")
        ]
        both = means[key]["finetune - original"]
        low, high = both["interval"]
        cells.append(f"{both['mean']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})")
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"{settings['preset']} from random weights, {settings['image_size']} px, "
            f"{settings['epochs']} epochs, seeds {', '.join(map(str, means['seeds']))}: mean ± "
            "standard deviation over the seeds; the difference is finetune minus original, seed by "
            "seed.",
            "",
            *rows,
            "",
            f"Made by `{results['command']}` on {results['hardware']}.",
            "",
        ]
    )


def save(results, path):
    """Write the results, and the table where there is enough for one, as a whole."""
    results["summary"] = summary(results["runs"])
    texts = {path: json.dumps(results, indent=1) + "\n"}
    if results["summary"]:
        texts[path.with_suffix(".md")] = table(results)
    write(texts)


def chosen_peak(pilot):
    """Return the highest learning rate of the pilot run that ended best."""
    return max(pilot, key=lambda run: run["accuracy_at_the_end"])["settings"]["peak"]


def compare(photos, arguments, results):
    """Run what the results lack yet, and write each run as it is finished."""

    def complete(runs, photos, recipe, seed, settings):
        done = {(run["recipe"], run["seed"], json.dumps(run["settings"])) for run in runs}
        if (recipe, seed, json.dumps(settings)) not in done:
            print(f"{recipe}, seed {seed}, {settings}", flush=True)
            runs.append(train(photos, recipe, seed, arguments, settings))
            save(results, arguments.out)

    pilot = pilot_split(photos)
    for peak in PEAKS:
        complete(results["pilot"], pilot, "finetune", PILOT_SEED, {"peak": peak, **FROM_SCRATCH})
    settings = {"original": {}, "finetune": {"peak": chosen_peak(results["pilot"]), **FROM_SCRATCH}}
    for seed in arguments.seeds:
        for recipe in RECIPES:
            complete(results["runs"], photos, recipe, seed, settings[recipe])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("_build/recipes"))
    parser.add_argument("--preset", default="gcvit_nano")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()

    settings = {
        "preset": arguments.preset,
        "image_size": arguments.image_size,
        "epochs": arguments.epochs,
        "batch_size": 32,
        "photographs": "tf_flowers, train[:90%] and train[90%:]",
        "weights": "random",
    }
    results = {"settings": settings, "pilot": [], "runs": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            parser.error(f"{arguments.out} holds results of other settings; move it away first.")
    packages = ("keras", "tensorflow", "numpy")
    results |= {
        "command": f"python tools/reproduce/compare_recipes.py --preset {arguments.preset} "
        f"--image-size {arguments.image_size} --epochs {arguments.epochs} --seeds "
        + " ".join(map(str, sorted({*arguments.seeds, *(run["seed"] for run in results["runs"])}))),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "backend": keras.backend.backend(),
    }
    compare(in_memory(flowers(), arguments.image_size), arguments, results)
    save(results, arguments.out)
    shutil.rmtree(arguments.work, ignore_errors=True)
    print(table(results))


if __name__ == "__main__":
    main()
