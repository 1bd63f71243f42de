"""The package from a shell: `python -m gcvit train`, `predict`, `convert` and `prefetch`.

Each command is a function of its parsed arguments that returns an exit code: 0 where all went
well, 1 where something failed and was said in one sentence, 130 after Ctrl-C. What is wrong
with the arguments themselves ends with 2.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
from pathlib import Path

import keras
import numpy as np

from gcvit import fine_tuning
from gcvit.convert import convert as convert_checkpoint
from gcvit.fine_tuning.classifier import json_text
from gcvit.fine_tuning.datasets import FLOWERS_ARCHIVE, flowers_folder, short_side_for
from gcvit.model import GCViT
from gcvit.presets import PRESETS
from gcvit.readers import class_names
from gcvit.weights import FORMATS, locate, looks_like_path

INTERRUPTED = 130
"""Exit code of a process that SIGINT ends, as shells know it."""


def _on_one_line(text):
    """Return a text with what a line cannot show, such as a line break in a name, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def _say(sentence):
    print(f"gcvit: {_on_one_line(sentence)}", file=sys.stderr)


# argparse names these functions where an argument is refused.


def positive_integer(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def image_size(text):
    """Return "64" as 64 and "64x96" as (64, 96): multiples of 32."""
    sides = tuple(positive_integer(side) for side in text.lower().split("x"))
    if len(sides) > 2 or any(side % 32 for side in sides):
        raise ValueError
    return sides if len(sides) == 2 else sides[0]


def share(text):
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def _progress_elsewhere(json_wanted):
    """Keep standard output for the result alone where that is to be JSON."""
    return contextlib.redirect_stdout(sys.stderr) if json_wanted else contextlib.nullcontext()


# Train.


def train_arguments(parser):
    """Add the arguments of `train`."""
    parser.description = (
        "Fine-tune a preset on your own photographs. Ctrl-C ends the training with the best "
        "weights so far; the same command again goes on from there, and also after a crash."
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder of a folder for each class"
    )
    parser.add_argument(
        "--preset",
        default="gcvit_nano",
        choices=PRESETS,
        metavar="PRESET",
        help=f"{', '.join(PRESETS)}; default: %(default)s",
    )
    parser.add_argument(
        "--weights",
        help="what to begin with: a name that the preset lists, a file, whose head is kept if "
        "it was trained on the same classes, or none for random weights; default: the first "
        "that the preset lists",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="what is written; default: DIR's name.safetensors"
    )
    parser.add_argument(
        "--recipe", default="finetune", choices=fine_tuning.RECIPES, help="default: %(default)s"
    )
    parser.add_argument("--epochs", type=positive_integer, default=5, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=positive_integer, default=32, help="default: %(default)s"
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="PIXELS",
        help="side, or HEIGHTxWIDTH, in multiples of 32; default: the preset's",
    )
    parser.add_argument(
        "--validation-split", type=share, default=0.1, metavar="SHARE",
        help="share of each class that is not trained on; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--balance", action="store_true", help="make rare classes count as much as common ones"
    )


def train(arguments):
    """Train on a folder of photographs, write the model and say how good it is."""
    out = arguments.out or Path(f"{arguments.folder.resolve().name}.safetensors")
    if not out.resolve().parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {out.resolve().parent} to write {out.name} to."
        )
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; --out names a file.")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out names a .safetensors file, which is what is written; got {out}.")
    if not os.access(out.resolve().parent, os.W_OK):
        raise PermissionError(f"Nothing may be written to {out.resolve().parent}; name another.")
    verbose = 1 if (sys.stderr if arguments.json else sys.stdout).isatty() else 2
    with _progress_elsewhere(arguments.json):
        result = _train(arguments, out, verbose)
    if result is None:
        return INTERRUPTED
    if arguments.json:
        print(json_text(result))
    else:
        _print_result(result)
    return INTERRUPTED if result["interrupted"] else 0


def _train(arguments, out, verbose):
    preset = PRESETS[arguments.preset]
    weights = arguments.weights or next(iter(preset["weights"]))
    image_size, crop = arguments.image_size or preset["image_size"], preset["crop"]
    print(f"Reading {arguments.folder}.", flush=True)
    photos = fine_tuning.from_folder(
        arguments.folder,
        arguments.validation_split,
        arguments.seed,
        short_side_for(image_size, crop),
    )
    print(
        f"{photos.train_size} photographs to train on, {photos.validation_size} to validate on, "
        f"of {len(photos.class_names)} classes: {', '.join(photos.class_names)}."
    )
    keras.utils.set_random_seed(arguments.seed)
    classes = len(photos.class_names)
    keeps_head = weights != "none" and _classes_in(preset, weights) == photos.class_names
    head = "the head too, for its classes are the same" if keeps_head else "but for the head"
    start = "random weights" if weights == "none" else f"the weights {weights}, {head}"
    print(f"{arguments.preset} starts from {start}.")
    model = GCViT.from_preset(
        arguments.preset,
        None if weights == "none" else weights,
        image_size,
        new_head=not keeps_head,
        num_classes=classes,
        dtype=fine_tuning.precision(),
    )
    weighed = {}
    if arguments.balance:
        weights_of_classes = fine_tuning.class_weights(fine_tuning.class_counts(photos))
        weighed = {"class_weight": weights_of_classes}
    validation = fine_tuning.make_dataset(
        photos.validation, image_size, arguments.batch_size, crop=crop
    )
    frozen = None
    if weights != "none":
        train = fine_tuning.make_dataset(photos.train, image_size, arguments.batch_size, crop=crop)
        features = fine_tuning.pooled_features(model, train, validation)
        head = fine_tuning.linear_head(*features, classes, **weighed)
        frozen = fine_tuning.head_accuracy(head, *features[1])
        print(
            f"A linear head on these weights, frozen: validation accuracy {frozen:.3f}.", flush=True
        )
    backup = out.with_name(out.name + ".backup")
    run = fine_tuning.RECIPES[arguments.recipe](
        model,
        photos,
        image_size,
        arguments.epochs,
        arguments.batch_size,
        crop,
        backup=backup,
        seed=arguments.seed,
    )
    run.state.run |= {"weights": weights, "balance": arguments.balance}
    notes = {"preset": arguments.preset, "weights": weights, "recipe": arguments.recipe}
    if weights != "none" and not looks_like_path(weights):
        notes["weights_license"] = preset["license"]

    def save(**more):
        fine_tuning.save_classifier(
            out, model, photos.class_names, image_size, crop, **notes, **more
        )

    try:
        history = fine_tuning.fit(model, run, verbose=verbose, on_best=save, **weighed)
    except fine_tuning.DivergenceError as error:
        shutil.rmtree(backup, ignore_errors=True)
        where = "Nothing is written." if run.state.best_epoch is None else f"They are in {out}."
        raise fine_tuning.DivergenceError(f"{error} {where}") from error
    if not history:
        print("No epoch was finished, so nothing is written.")
        return None
    interrupted = run.state.interrupted
    report = fine_tuning.evaluate(model, validation, photos.class_names)
    save(**report)
    if not interrupted:
        shutil.rmtree(backup, ignore_errors=True)
    return {
        "model": os.fspath(out),
        "classes": photos.class_names,
        "epochs": len(history["loss"]),
        "interrupted": interrupted,
        "history": history,
        "frozen_head_accuracy": frozen,
        **report,
    }


def _classes_in(preset, weights):
    """Return the names of the classes that a file of weights was trained on, or `None`."""
    entry = preset["weights"].get(weights, {})
    file = Path(weights if looks_like_path(weights) else locate(entry) if "file" in entry else "")
    if file.suffix != ".safetensors" or not file.is_file():  # only these say so
        return None
    return class_names(file)


def _print_result(result):
    width = max(map(len, result["classes"]))
    print(f"\n{'':{width}}  precision  recall  photographs")
    for name, numbers in result["per_class"].items():
        shown = [
            "-" if numbers[key] is None else f"{numbers[key]:.2f}"
            for key in ("precision", "recall")
        ]
        print(f"{name:{width}}  {shown[0]:>9}  {shown[1]:>6}  {numbers['photographs']:>11}")
    frozen = result["frozen_head_accuracy"]
    alone = "" if frozen is None else f" (a head on the frozen weights alone: {frozen:.3f})"
    print(
        f"validation accuracy {result['accuracy']:.3f}{alone}, expected calibration error "
        f"{result['calibration_error']:.3f}\nwritten: {result['model']}"
    )


# Predict.


def predict_arguments(parser):
    """Add the arguments of `predict`."""
    parser.description = (
        "Tell what is on photographs. A file that cannot be read is named, the others are "
        "predicted, and the exit code is 1."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a file that train has written, or gcvit_nano, which ships and knows 200 things",
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="photographs, or folders of them"
    )
    parser.add_argument(
        "--top",
        type=positive_integer,
        default=1,
        help="how many classes are named; default: %(default)s",
    )
    parser.add_argument(
        "--batch-size", type=positive_integer, default=32, help="default: %(default)s"
    )


def predict(arguments):
    """Print the most probable classes of each photograph."""
    classifier = fine_tuning.load_classifier(_model_file(arguments.model))
    paths = fine_tuning.photographs_in(arguments.images)
    failed, results = 0, []
    for path, answer in classifier.predict(paths, arguments.batch_size):
        if isinstance(answer, Exception):
            failed += 1
            _say(answer)
            results.append({"file": os.fspath(path), "error": str(answer)})
            continue
        order = np.argsort(-answer)[: arguments.top]
        classes = {classifier.class_names[k]: float(answer[k]) for k in order}
        results.append({"file": os.fspath(path), "classes": classes})
        if not arguments.json:
            named = ", ".join(f"{name} {share:.3f}" for name, share in classes.items())
            print(f"{_on_one_line(path)}: {named}", flush=True)
    if arguments.json:
        print(json_text(results))
    if failed:
        _say(f"{failed} of {len(paths)} files could not be read.")
    return 1 if failed else 0


def _model_file(name):
    packaged = PRESETS.get(name, {}).get("weights", {})
    shipped = [entry for entry in packaged.values() if "file" in entry]
    return locate(shipped[0]) if shipped else name


# Convert.


def convert_arguments(parser):
    """Add the arguments of `convert`."""
    parser.description = (
        "Read a checkpoint of any variant, in the Keras archive's, the official repository's or "
        "timm's names, write it in another form, and read it again to compare."
    )
    parser.add_argument("source", metavar="IN", help=".keras, .weights.h5, .safetensors, .pth.tar")
    parser.add_argument("target", metavar="OUT", help=f"ends in {', '.join(FORMATS)}")
    parser.add_argument(
        "--naming",
        default="official",
        choices=["official", "timm"],
        help="names in a .safetensors file; default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float16"],
        help="numbers in a .safetensors file; default: %(default)s",
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="PIXELS",
        help="scale the windows to images of this side, or HEIGHTxWIDTH, in multiples of 32, and "
        "resize their position tables",
    )


def convert(arguments):
    """Write a checkpoint in another form."""
    with _progress_elsewhere(arguments.json):
        done = convert_checkpoint(
            arguments.source,
            arguments.target,
            naming=arguments.naming,
            dtype=arguments.dtype,
            image_size=arguments.image_size,
        )
    if arguments.json:
        print(json_text({**dataclasses.asdict(done), "file": arguments.target}))
        return 0
    print(
        f"{done.tensors} tensors, {done.parameters:,} parameters of "
        f"{done.preset or 'a model that is no preset'}, {done.naming} names in {arguments.source}."
    )
    if done.resized:
        print(f"Resized to other windows: {len(done.resized)} position tables.")
    print(
        f"Written: {arguments.target}, {done.bytes:,} bytes. Read again, the largest difference "
        f"of a weight is {done.largest_error:g}."
    )
    return 0


# Prefetch.


def prefetch_arguments(parser):
    """Add the arguments of `prefetch`."""
    parser.description = (
        "Fetch weights and photographs now, for work without a network later. What is already "
        "there is not fetched again; of what cannot be fetched, the exit code is 1."
    )
    parser.add_argument(
        "names",
        nargs="*",
        type=prefetchable,
        metavar="NAME",
        help="a preset, for the weights that it lists first, a preset and its weights, as "
        "gcvit_tiny/timm, or flowers, for the photographs of chapter 8; default: "
        + " ".join(PREFETCHED),
    )
    parser.add_argument("--all", action="store_true", help="every preset, and the flowers")
    parser.add_argument(
        "--list", action="store_true", help="say what there is and how large it is; fetch nothing"
    )


PREFETCHED = ("gcvit_xxtiny", "flowers")
"""What the chapters fetch where there is a network."""


def prefetchable(text):
    """Return (name, entry): an entry of a preset's weights, or `None` for the flowers."""
    if text == "flowers":
        return text, None
    preset, _, weights = text.partition("/")
    if preset not in PRESETS:
        known = ", ".join([*PRESETS, "flowers"])
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    listed = PRESETS[preset]["weights"]
    weights = weights or next(iter(listed))
    if weights not in listed:
        raise argparse.ArgumentTypeError(f"{preset} lists {', '.join(listed)}; got {weights!r}")
    return f"{preset}/{weights}", listed[weights]


def prefetch(arguments):
    """Fetch weights and photographs, for work without a network later."""
    names = arguments.names or map(prefetchable, PREFETCHED)
    if arguments.list:
        weights = [f"{preset}/{name}" for preset in PRESETS for name in PRESETS[preset]["weights"]]
        names = map(prefetchable, [*weights, "flowers"])
    elif arguments.all:
        names = map(prefetchable, [*PRESETS, "flowers"])
    results = []
    for name, entry in names:
        size = FLOWERS_ARCHIVE["size"] if entry is None else entry["size"]
        result = {"name": name, "bytes": size}
        results.append(result)
        with _progress_elsewhere(arguments.json):
            # A checkpoint whose size is not listed holds at least the weights, in four bytes each.
            least = size or 4 * PRESETS[name.partition("/")[0]]["parameters"]
            print(f"{name}: {'' if size else 'at least '}{least / 1e6:,.0f} MB", flush=True)
            if arguments.list:
                continue
            try:
                path = _fetched(entry)
            except (OSError, ValueError) as error:
                result["error"] = str(error)
                _say(error)
                continue
            result["path"] = os.fspath(path)
            result["bytes"] = size or path.stat().st_size
            print(f"{name} is at {path}, {result['bytes'] / 1e6:,.0f} MB", flush=True)
    if arguments.json:
        print(json_text(results))
    return 1 if any("error" in result for result in results) else 0


def _fetched(entry):
    """Return the path of weights, or, for no entry, of the flowers, fetched if need be."""
    if entry is not None:
        return locate(entry)
    fine_tuning.flowers()
    return flowers_folder()


# All commands: name, what adds its arguments, what runs it.
COMMANDS = (
    ("convert", convert_arguments, convert),
    ("train", train_arguments, train),
    ("predict", predict_arguments, predict),
    ("prefetch", prefetch_arguments, prefetch),
)


def parser():
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(
        prog="gcvit" if Path(sys.argv[0]).stem == "gcvit" else "python -m gcvit",
        description="The Global Context Vision Transformer from a shell.",
        epilog="Exit codes: 0 all went well, 1 something failed, 2 wrong arguments, 130 Ctrl-C.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add_arguments, run in COMMANDS:
        command = commands.add_parser(name, help=run.__doc__)
        add_arguments(command)
        command.add_argument(
            "--json", action="store_true", help="print the result as JSON, and nothing else"
        )
        command.set_defaults(run=run)
    return whole


def main(argv=None):
    """Run a command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name in letters that the terminal's encoding lacks must not end a run.
        if hasattr(stream, "reconfigure"):  # not so in a notebook
            stream.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        _say("interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # `... | head`
        sys.stdout = None
        return 1
    except (ValueError, OSError) as error:  # the package's own errors are among these
        if getattr(error, "strerror", None):  # the system's, which has numbers and no sentence
            error = f"{error.filename} cannot be used: {error.strerror}."
        _say(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
