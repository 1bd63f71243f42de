"""Train the checkpoint that ships: `gcvit_nano` on Tiny ImageNet, from random weights.

    python tools/reproduce/train_nano.py FOLDER              # goes on where it was cut off
    python tools/reproduce/train_nano.py FOLDER --finish     # look at the validation images; write

FOLDER is the unpacked tiny-imagenet-200: `train/<wnid>/images/*.JPEG`, `val/images` and
`val/val_annotations.txt`. Every phase hands on nothing but averaged weights, a file of the size
of a checkpoint, so that a phase can be run on another day or machine. It can be killed at any
moment.

To choose by, 25 training images of each class are held out. The 10,000 validation images are
read by `--finish` alone.

On Linux, tcmalloc spares half of the time: LD_PRELOAD=.../libtcmalloc_minimal.so.4 python ...
"""

import argparse
import concurrent.futures
import hashlib
import json
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from gcvit import PRESETS, GCViT, images, load_checkpoint
from gcvit.fine_tuning.training import assign, jit_compile, values_of, write_whole
from gcvit.readers import training_notes
from gcvit.unit_blocks import reinit_glorot
from gcvit.weights import PACKAGED, save_safetensors

PHASES = {
    # From 64 px on: two thirds of a 128 px step would be spent on pixels that were made up.
    "64px-a": {"image_size": 64, "steps": 4800, "rates": (2e-3, 1.5e-3), "schedule": 7400},
    "64px-b": {"image_size": 64, "steps": 6800, "rates": (1.65e-3, 8e-4), "schedule": 14800},
    "128px-a": {"image_size": 128, "steps": 3000, "rates": (8e-4, 0.0), "schedule": 3000},
    "128px-b": {
        "image_size": 128,
        "steps": 1600,
        "rates": (7e-4, 0.0),
        "schedule": 1600,
        "mixed": 0.5,
        "seed": 1,
    },
}
"""What is trained, in order, in batches of 128: 742 steps see all images once. `rates`: the highest
learning rate, after a warm-up, and the one that it falls to within `schedule` steps. A phase may
end before that. `mixed`: how many of the images get a rectangle of another one, and its label in
proportion (CutMix). `seed`: for other crops than those of the phase before at the same size. Each
takes at most two hours on two cores. Of the checkpoint that ships, the first 400 steps of
`128px-a` were taken while its schedule was 4,000 steps long."""

AVERAGED = "128px-a", "128px-b"
"""The phases whose mean weights ship. Of the images held out, the mean gets half a percent more
right than either of them."""

WINDOWS = {64: (4, 4, 4, 2), 128: (4, 4, 8, 4)}
"""Windows at each image size. At 64 px those of the preset would not fit the last two levels."""

BATCH, WARMUP, SEED, SIDE, CLASSES, EACH = 128, 200, 0, 64, 200, 500
HELD_OUT, SMALLEST_CROP = 25, 0.35
SAVE_EVERY = 200
"""Steps between two states on disk."""


def read(path):
    """Return a photograph as (64, 64, 3) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def cached(path, files):
    """Return the photographs of files as one array, kept in `path`."""
    if not path.exists():
        with concurrent.futures.ThreadPoolExecutor() as pool:
            np.save(path, np.stack(list(pool.map(read, files))))
    return np.load(path)


def training_images(folder, work):
    """Return images and labels to train on, and those held out of them to choose by."""
    wnids = sorted(path.name for path in (folder / "train").iterdir())
    files = [file for wnid in wnids for file in sorted((folder / "train" / wnid).rglob("*.JPEG"))]
    pixels = cached(work / "train.npy", files)
    labels = np.repeat(np.arange(CLASSES, dtype="int32"), EACH)
    held = np.arange(len(labels)) % (EACH // HELD_OUT) == 0
    return (pixels[~held], labels[~held]), (pixels[held], labels[held])


def boxes(rng, count):
    """Draw crops as `tf.image.crop_and_resize` takes them; half of them are mirrored."""
    area = rng.uniform(SMALLEST_CROP, 1, count)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), count))
    height, width = np.minimum(np.sqrt(area / ratio), 1), np.minimum(np.sqrt(area * ratio), 1)
    top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
    right = left + width
    mirrored = rng.random(count) < 0.5
    sides = np.where(mirrored, right, left), np.where(mirrored, left, right)
    return np.stack([top, sides[0], top + height, sides[1]], axis=1).astype("float32")


def cuts(rng, mixed):
    """Draw rectangles, as shares of the side, that CutMix fills from another image."""
    side = np.sqrt(rng.uniform(0, 1, BATCH)) * (rng.random(BATCH) < mixed)
    centers = rng.uniform(0, 1, (2, BATCH))
    ends = np.clip([centers - side / 2, centers + side / 2], 0, 1)
    return np.stack([*ends[0], *ends[1]], axis=1).astype("float32")


def cutmix(x, labels, cut):
    """Fill rectangles from the image before; mix the labels by the areas."""
    size = x.shape[1]
    at = (tf.range(size, dtype="float32") + 0.5) / size
    top, left, bottom, right = tf.split(cut, 4, axis=1)
    rows, columns = (at > top) & (at < bottom), (at > left) & (at < right)
    inside = (rows[:, :, None] & columns[:, None, :])[..., None]
    share = tf.reduce_mean(tf.cast(inside, "float32"), axis=(1, 2))
    mixed = labels * (1 - share) + tf.roll(labels, 1, axis=0) * share
    return tf.where(inside, tf.roll(x, 1, axis=0), x), mixed


def batches(data, phase, first_step):
    """Return the batches of a phase from a step on; what a step sees follows from its number."""
    pixels, labels = data
    size, steps = phase["image_size"], len(labels) // BATCH

    def drawn():
        for epoch in range(first_step // steps, -(-phase["steps"] // steps)):
            rng = np.random.default_rng([phase.get("seed", SEED), size, epoch])
            order = rng.permutation(len(labels))
            for step in range(steps):
                box = boxes(rng, BATCH)
                light = rng.uniform((0.8, -0.1), (1.2, 0.1), (BATCH, 2)).astype("float32")
                cut = cuts(rng, phase["mixed"]) if "mixed" in phase else np.zeros((BATCH, 4), "f4")
                if epoch * steps + step >= first_step:
                    chosen = order[step * BATCH : (step + 1) * BATCH]
                    yield pixels[chosen], labels[chosen], box, light, cut

    def prepare(pixels, labels, box, light, cut):
        x = tf.image.crop_and_resize(tf.cast(pixels, "float32"), box, tf.range(BATCH), [size] * 2)
        contrast, brightness = tf.split(light[:, None, None], 2, axis=-1)
        mean = tf.reduce_mean(x, axis=(1, 2, 3), keepdims=True)
        x = tf.clip_by_value((x - mean) * contrast + mean + 255 * brightness, 0, 255)
        return cutmix(images.normalize(x), tf.one_hot(labels, CLASSES), cut)

    signature = [
        tf.TensorSpec((BATCH, SIDE, SIDE, 3), "uint8"),
        tf.TensorSpec((BATCH,), "int32"),
        tf.TensorSpec((BATCH, 4)),
        tf.TensorSpec((BATCH, 2)),
        tf.TensorSpec((BATCH, 4)),
    ]
    raw = tf.data.Dataset.from_generator(drawn, output_signature=tuple(signature))
    return raw.map(prepare, num_parallel_calls=1).prefetch(2)


def resized(pixels, size):
    """Return images as the checkpoint's users prepare theirs."""
    return images.normalize(np.stack([images.resize(x, size) for x in pixels]).astype("float32"))


def accuracy(model, data, size, most=(1, 5)):
    """Return the shares of images whose class is the first, and among the first five."""
    pixels, labels = data
    scores = [
        model.predict_on_batch(resized(pixels[i : i + 250], size))
        for i in range(0, len(labels), 250)
    ]
    order = np.argsort(-np.concatenate(scores), axis=-1)
    return [float((order[:, :k] == labels[:, None]).any(axis=-1).mean()) for k in most]


def optimizer(phase):
    """Return Muon for the matrices, AdamW for all else, averaging the weights.

    After as many steps at the same rate, AdamW alone is several times as far from the end.
    """
    peak, end = phase["rates"]
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        phase["schedule"] - WARMUP,
        alpha=end / peak,
        warmup_target=peak,
        warmup_steps=WARMUP,
    )
    made = keras.optimizers.Muon(
        rate,
        exclude_layers=["head", "relative_position"],
        weight_decay=0.05,
        adam_weight_decay=0.05,
        global_clipnorm=5.0,
        use_ema=True,
        ema_momentum=0.999,
    )
    made.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return made


class Saved(keras.callbacks.Callback):
    """Keeps a phase's state in one file; says how fast it goes."""

    def __init__(self, file, model, name, total):
        super().__init__()
        self.file, self.name, self.total = file, name, total
        self.state = [*model.variables, *model.optimizer.variables]
        self.done, self.curve = 0, []
        if file.exists():
            with np.load(file) as stored:
                assign(self.state, [stored[str(i)] for i in range(len(self.state))])
                self.done, self.curve = int(stored["done"]), json.loads(str(stored["curve"]))

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.time()

    def on_epoch_end(self, epoch, logs=None):
        self.done += SAVE_EVERY
        rate = SAVE_EVERY * BATCH / (time.time() - self.began)
        left = (self.total - self.done) * BATCH / rate / 60
        self.curve.append([self.done, round(logs["loss"], 4), round(logs["accuracy"], 4)])
        arrays = {str(i): value for i, value in enumerate(values_of(self.state))}
        write_whole(self.file, done=self.done, curve=json.dumps(self.curve), **arrays)
        print(
            f"{self.name}: step {self.done} of {self.total}, loss {logs['loss']:.3f}, accuracy "
            f"{logs['accuracy']:.3f}, {rate:.0f} images/s, {left:.0f} min left",
            flush=True,
        )


def built(size, start):
    """Return the model for an image size, with the weights of a phase before or random ones."""
    model = GCViT.from_preset(
        "gcvit_nano",
        weights=None,
        window_size=WINDOWS[size],
        num_classes=CLASSES,
        path_drop=0.0,
    )
    if start is None:
        # From the official start, several times as narrow, small models hardly begin to learn.
        reinit_glorot(model)
    else:
        load_checkpoint(model, start)
    return model


def train(name, start, data, held, work):
    """Run a phase to its end; write its averaged weights, and what is known of them."""
    phase = PHASES[name]
    keras.utils.set_random_seed(SEED)
    model = built(phase["image_size"], start)
    total = phase["steps"]
    model.compile(
        optimizer(phase),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        metrics=["accuracy"],
        jit_compile=jit_compile(),
    )
    model.optimizer.build(model.trainable_variables)
    saved = Saved(work / f"{name}.state.npz", model, name, total)
    if saved.done < total:
        model.fit(
            batches(data, phase, saved.done),
            epochs=total // SAVE_EVERY,
            initial_epoch=saved.done // SAVE_EVERY,
            steps_per_epoch=SAVE_EVERY,
            callbacks=[saved],
            shuffle=False,
            verbose=0,
        )
    model.optimizer.finalize_variable_values(model.trainable_variables)
    top1, top5 = accuracy(model, held, phase["image_size"])
    print(f"{name}: of the images held out, top-1 {top1:.4f}, top-5 {top5:.4f}", flush=True)
    notes = {**phase, "held_out_top1": top1, "held_out_top5": top5}
    save_safetensors(
        model,
        work / f"{name}.safetensors",
        dtype="float16",
        metadata={"phase": json.dumps(notes)},
    )
    saved.file.unlink()


def finish(folder, work, out):
    """Look at the validation images, and write what ships: the mean of the last phases."""
    size = PHASES[AVERAGED[-1]]["image_size"]
    models = [built(size, work / f"{name}.safetensors") for name in AVERAGED]
    model = models[0]
    means = [np.mean(w, axis=0) for w in zip(*(values_of(m.weights) for m in models), strict=True)]
    assign(model.weights, means)
    wnids = sorted(path.name for path in (folder / "train").iterdir())
    words = dict(
        line.split("\t") for line in (folder / "words.txt").read_text("utf-8").splitlines()
    )
    rows = (folder / "val" / "val_annotations.txt").read_text("utf-8").splitlines()
    rows = [row.split("\t")[:2] for row in rows]
    pixels = cached(work / "val.npy", [folder / "val" / "images" / file for file, _ in rows])
    top1, top5 = accuracy(model, (pixels, np.array([wnids.index(w) for _, w in rows])), size)
    notes = {
        "preset": "gcvit_nano",
        "config": PRESETS["gcvit_nano"]["config"],
        "classes": [words[wnid].split(",")[0] for wnid in wnids],
        "wnids": wnids,
        "image_size": size,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": images.MEAN.tolist(),
        "std": images.STD.tolist(),
        "phases": {
            name: json.loads(training_notes(work / f"{name}.safetensors")["phase"])
            for name in PHASES
        },
        "averaged": AVERAGED,
        "seed": SEED,
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
        "top1": top1,
        "top5": top5,
        "trained_on": "Tiny ImageNet (200 classes of ImageNet, 95,000 images of 64 px); "
        "for non-commercial research and education",
    }
    notes = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in notes.items()
    }
    save_safetensors(model, out, dtype="float16", metadata=notes)
    content = out.read_bytes()
    print(f"top-1 {top1:.4f}, top-5 {top5:.4f} of {len(rows)} validation images")
    print(f"{out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the unpacked tiny-imagenet-200")
    parser.add_argument(
        "--work", type=Path, default=Path("_build/nano"), help="default: %(default)s"
    )
    parser.add_argument("--finish", action="store_true", help="write what ships")
    parser.add_argument(
        "--out", type=Path, default=PACKAGED / "gcvit_nano-tiny_imagenet.safetensors"
    )
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.finish:
        return finish(given.folder, given.work, given.out)
    data, held = training_images(given.folder, given.work)
    start = None
    for name in PHASES:
        weights = given.work / f"{name}.safetensors"
        if not weights.exists():
            train(name, start, data, held, given.work)
        start = weights


if __name__ == "__main__":
    main()
