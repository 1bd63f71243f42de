"""Switch parts of a trained model off, and count how often its first answer changes.

    python tools/reproduce/query_flips.py FOLDER [--checkpoint FILE] [--limit N] [--heads]

FOLDER is the unpacked tiny-imagenet-200, whose 10,000 validation images are looked at. Written
to gcvit/results/switches.json: the accuracy and the mean probability of the right class of the
model as it was trained and with each switch of the page that runs it, in the stem, each level, and
all of the model: the global query constant, zero or that of the image before; gates open, shut, or
computed by each place alone; large windows split; no position bias; both faults of the original
notebook; and, with --heads, each head off. Keras computes all of it, with the laboratory's
functions in place of the model's own. What lies before a switch is computed once.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import tensorflow as tf
from keras import ops
from results import command, hardware, versions, write

from gcvit import laboratory
from gcvit.checks import pair
from gcvit.fine_tuning import load_classifier
from gcvit.global_tokens import FeatureExtraction
from gcvit.level import Level
from gcvit.unit_blocks import SqueezeAndExcitation
from gcvit.weights import PACKAGED

RESULTS = Path(__file__).resolve().parents[2] / "gcvit" / "results" / "switches.json"
BATCH = 100


class Piece:
    """The stem or a level: what is compiled at once, as it is or with parts of it replaced.

    Args:
        name: its name in the checkpoint.
        layer: a `PatchEmbed` or a `Level`.
        shape: of the maps that enter, (None, height, width, channels).
    """

    def __init__(self, name, layer, shape):
        self.name, self.layer, self.shape = name, layer, shape
        self.attentions = [block.attn for block in getattr(layer, "blocks", ())]
        self.all_heads = tf.ones((len(self.attentions), getattr(layer, "num_heads", 0)))
        self.query_shape = (None, *getattr(layer, "window_size", ()), shape[-1])
        self.query = tf.function(
            # The stem has none: it is given what it does not look at.
            getattr(layer, "q_global", lambda x: x[:, 0, 0]),
            input_signature=[tf.TensorSpec(shape, "float32")],
        )

    def of(self, kind):
        """Return the layers of a class that it is made of."""
        return [layer for layer in self.layer._flatten_layers() if isinstance(layer, kind)]

    def compiled(self, replaced=lambda piece, other, heads: []):
        """Return a function from maps, another image's query, and (blocks, heads) to maps.

        Args:
            replaced: takes the piece and the function's two further arguments; returns
                (layer, method, stand-in), a stand-in taking the layer and the method's arguments.
        """

        def run(x, other, heads):
            with contextlib.ExitStack() as stack:
                for layer, method, stand_in in replaced(self, other, heads):
                    bound = functools.partial(stand_in, layer)
                    stack.enter_context(mock.patch.object(layer, method, bound))
                return self.layer(x)

        shapes = (self.shape, self.query_shape, self.all_heads.shape)
        specs = [tf.TensorSpec(shape, "float32") for shape in shapes]
        return tf.function(run, input_signature=specs).get_concrete_function()


def on_query(stand_in):
    """Return what replaces a level's global query by what `stand_in` returns."""
    return lambda piece, *_: [(level, "q_global", stand_in) for level in piece.of(Level)]


def on_gates(stand_in):
    return lambda piece, *_: [(x, "gates", stand_in) for x in piece.of(SqueezeAndExcitation)]


def on_bias(stand_in):
    return lambda piece, *_: [(x, "relative_position_bias", stand_in) for x in piece.attentions]


def on_pooling(stand_in):
    def replaced(piece, *_):
        return [(x, "halve", stand_in) for x in piece.of(FeatureExtraction) if not x.keepdims]

    return replaced


def other_query(piece, other, heads):
    return [(level, "q_global", lambda *_: other) for level in piece.of(Level)]


def some_heads(piece, other, heads):
    """Replace queries, keys and values so that heads whose factor is 0 say nothing."""

    def masked(block, attention, *args):
        q, k, v = type(attention).query_key_value(attention, *args)
        return q, k, v * heads[block][:, None, None]

    return [
        (attention, "query_key_value", functools.partial(masked, block))
        for block, attention in enumerate(piece.attentions)
    ]


def in_parts(side):
    """Return what splits windows that are larger into parts of a side."""

    def masked(attention):
        mask = laboratory.block_mask(attention.window_size[0], side)
        return type(attention).relative_position_bias(attention) + ops.convert_to_tensor(mask)

    def replaced(piece, *_):
        larger = [x for x in piece.attentions if x.window_size[0] > side]
        return [(x, "relative_position_bias", masked) for x in larger]

    return replaced


def both_faults(piece, *_):
    return [*FLAT_GATHER(piece), *ZERO_PADDING(piece)]


FLAT_GATHER, ZERO_PADDING = on_bias(laboratory.flat_gather), on_pooling(laboratory.zero_padding)
SWITCHES = {
    ("query", "constant"): on_query(laboratory.constant_query),
    ("query", "zero"): on_query(lambda level, x: ops.zeros_like(type(level).q_global(level, x))),
    ("query", "of the image before"): other_query,
    ("gates", "place"): on_gates(laboratory.gates_of_each_place),
    ("gates", "open"): on_gates(lambda layer, x: 1.0),
    ("gates", "shut"): on_gates(lambda layer, x: 0.0),
    ("bias", "off"): on_bias(lambda x: ops.zeros_like(type(x).relative_position_bias(x))),
    ("flatGather", True): FLAT_GATHER,
    ("zeroPadding", True): ZERO_PADDING,
    ("flatGather and zeroPadding", True): both_faults,
}
"""What each switch of engine.js replaces, at its values other than as trained."""


@dataclasses.dataclass
class Arm:
    """A switch at a value.

    Attributes:
        switch: its name in engine.js.
        value: what it is switched to.
        part: the name of the part of the model that is switched, or "all".
        functions: {index of a piece: its compiled function} for the pieces that are switched.
        heads: (blocks, heads), 0 for a head that is off; default `None`: all are on.
    """

    switch: str
    value: object
    part: str
    functions: dict
    heads: tf.Tensor | None = None


class Switched:
    """A model whose pieces can be replaced, one by one.

    Args:
        model: a built `GCViT`.
        size: (height, width) of its images in pixels.
    """

    def __init__(self, model, size):
        self.model = model
        layers = {"patch_embed": model.patch_embed}
        layers |= {f"levels.{i}": level for i, level in enumerate(model.levels)}
        shape, self.pieces = (None, *size, model.in_channels), []
        for name, layer in layers.items():
            self.pieces.append(Piece(name, layer, shape))
            shape = layer.compute_output_shape(shape)
        self.usual = [piece.compiled() for piece in self.pieces]
        self.finish = tf.function(
            lambda x: model.head(model.pool(model.norm(x))),
            input_signature=[tf.TensorSpec(shape, "float32")],
        )

    def as_trained(self, images):
        """Return the maps that enter the pieces, the levels' global queries, and probabilities."""
        maps, queries = [tf.constant(images)], []
        for piece, function in zip(self.pieces, self.usual, strict=True):
            queries.append(piece.query(maps[-1]))
            maps.append(function(maps[-1], queries[-1], piece.all_heads))
        return maps[:-1], queries, self.finish(maps[-1]).numpy()

    def switched(self, arm, maps, others):
        """Return probabilities from the maps that enter the pieces, and other images' queries."""
        start = min(arm.functions)
        x = maps[start]
        for i, piece in enumerate(self.pieces[start:], start):
            heads = arm.heads if i in arm.functions else None
            function = arm.functions.get(i, self.usual[i])
            x = function(x, others[i], piece.all_heads if heads is None else heads)
        return self.finish(x).numpy()

    def arms(self, heads=False):
        """Yield an `Arm` for each switch, of one piece and of all; with `heads`, for each head."""
        side = self.model.levels[0].window_size[0]
        for (switch, value), replaced in {**SWITCHES, ("part", side): in_parts(side)}.items():
            functions = {
                i: piece.compiled(replaced)
                for i, piece in enumerate(self.pieces)
                if replaced(piece, None, None)
            }
            for i, function in functions.items():
                yield Arm(switch, value, self.pieces[i].name, {i: function})
            if len(functions) > 1:
                yield Arm(switch, value, "all", functions)
        for i, piece in enumerate(self.pieces if heads else ()):
            function = piece.compiled(some_heads) if piece.attentions else None
            for block, head in np.ndindex(*piece.all_heads.shape):
                others = piece.all_heads.numpy()
                others[block, head] = 0
                part, off = f"{piece.name}.blocks.{block}", tf.constant(others)
                yield Arm("headsOff", [head], part, {i: function}, off)


def validation_files(folder, wnids):
    """Return the validation images' files and their labels."""
    rows = (folder / "val" / "val_annotations.txt").read_text("utf-8").splitlines()
    rows = [row.split("\t")[:2] for row in rows]
    files = [folder / "val" / "images" / name for name, _ in rows]
    return files, np.array([wnids.index(wnid) for _, wnid in rows])


def summarize(probabilities, usual, labels):
    """Return what an arm's probabilities say, beside the usual ones."""
    first, before = probabilities.argmax(-1), usual.argmax(-1)
    right, was_right = first == labels, before == labels
    of_right = probabilities[np.arange(len(labels)), labels]
    return {
        "accuracy": round(float(right.mean()), 4),
        "mean_probability_of_right_class": round(float(of_right.mean()), 4),
        "flips": round(float((first != before).mean()), 4),
        "right_to_wrong": int((was_right & ~right).sum()),
        "wrong_to_right": int((right & ~was_right).sum()),
    }


def measure(classifier, files, labels, heads=False):
    """Return what each arm does to the answers to some files."""
    model = Switched(classifier.model, pair("image_size", classifier.image_size))
    arms = list(model.arms(heads))
    usual, switched = [], [[] for _ in arms]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), BATCH):
            images = np.stack(list(pool.map(classifier.image, files[start : start + BATCH])))
            maps, queries, probabilities = model.as_trained(images.astype("float32"))
            others = [tf.roll(query, 1, axis=0) for query in queries]
            usual.append(probabilities)
            for arm, parts in zip(arms, switched, strict=True):
                parts.append(model.switched(arm, maps, others))
            print(f"{min(start + BATCH, len(files))} of {len(files)} images", flush=True)
    usual = np.concatenate(usual)
    baseline = summarize(usual, usual, labels)
    return {
        "as_trained": {
            name: baseline[name] for name in ("accuracy", "mean_probability_of_right_class")
        },
        "switched": [
            {
                **{name: getattr(arm, name) for name in ("switch", "value", "part")},
                **summarize(np.concatenate(parts), usual, labels),
            }
            for arm, parts in zip(arms, switched, strict=True)
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    packaged = PACKAGED / "gcvit_nano-tiny_imagenet.safetensors"
    parser.add_argument("folder", type=Path, help="the unpacked tiny-imagenet-200")
    parser.add_argument("--checkpoint", type=Path, default=packaged)
    parser.add_argument("--limit", type=int, help="look at so many images; default: at all")
    parser.add_argument("--heads", action="store_true", help="also switch each head off by itself")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    classifier = load_classifier(given.checkpoint)
    files, labels = validation_files(given.folder, classifier.notes["wnids"])
    files, labels = files[: given.limit], labels[: given.limit]
    result = {
        "command": command(Path(__file__).name),
        "checkpoint": given.checkpoint.name,
        "sha256": hashlib.sha256(given.checkpoint.read_bytes()).hexdigest(),
        "image_px": classifier.image_size,
        "images": len(files),
        "hardware": hardware(),
        "versions": versions(("gcvit-book", "keras", "tensorflow", "numpy", "pillow")),
        **measure(classifier, files, labels, given.heads),
    }
    write({given.out: json.dumps(result, indent=1) + "\n"})
    for row in result["switched"]:
        if row["switch"] != "headsOff":
            print(
                f"{row['switch']} {row['value']}, {row['part']}: accuracy {row['accuracy']:.3f} "
                f"({result['as_trained']['accuracy']:.3f} as trained), flips {row['flips']:.3f}"
            )


if __name__ == "__main__":
    main()
