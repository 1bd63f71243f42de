"""A trained model with what its use takes, in one file."""

import concurrent.futures
import dataclasses
import json
import math
import os
from pathlib import Path

import keras
import numpy as np
from PIL import Image

from gcvit.checks import pair
from gcvit.fine_tuning.datasets import short_side_for
from gcvit.fine_tuning.training import jit_compile
from gcvit.images import MEAN, STD, DatasetError, read_photograph, resize
from gcvit.model import ARGUMENTS, GCViT
from gcvit.presets import PRESETS
from gcvit.readers import (
    CheckpointError,
    is_safetensors,
    parsed_json,
    read,
    training_notes,
)
from gcvit.weights import load_checkpoint, save_safetensors


def _architecture(model):
    """Return the arguments that build a model like this one."""
    config = model.get_config()
    return {**{name: config[name] for name in ARGUMENTS}, "dtype": model.dtype_policy.name}


def save_classifier(path, model, class_names, image_size, crop=1.0, **notes):
    """Write a model and what its use takes into one `.safetensors` file.

    The file holds tensors and text, nothing that is run when it is read.

    Args:
        path: the file; it is replaced only when the new one is whole.
        model: a built `GCViT`.
        class_names: name of each class.
        image_size: side in pixels of the images that it was trained on, or (height, width).
        crop: see `gcvit.images.center_box`; default 1.
        **notes: what else is to be known of it, of JSON's types. `mean` and `std`, a number
            for each channel, stand for how its images were normalized; default: as
            `gcvit.images.normalize` does, and by the means of the three for one channel.

    Raises:
        ValueError: for a model without its top, and unless each class has a name; see also
            `gcvit.weights.save_safetensors`.
    """
    if not model.include_top or len(class_names) != model.num_classes:
        classes = model.num_classes if model.include_top else "no"
        raise ValueError(
            f"A classifier wants a name for each class: its model tells {classes} classes apart, "
            f"and {len(class_names)} names were given."
        )
    mean, std = MEAN, STD
    if model.in_channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    notes = {
        "config": _architecture(model),
        "classes": [str(name) for name in class_names],
        "image_size": image_size,
        "crop": crop,
        "mean": mean.tolist(),
        "std": std.tolist(),
        **notes,
    }
    save_safetensors(model, path, metadata={k: json_text(v) for k, v in notes.items()})


def json_text(value):
    """Return a value as JSON that every parser reads: a number that is not finite is null."""

    def strict(value):
        if hasattr(value, "tolist"):  # NumPy's
            value = value.tolist()
        if isinstance(value, dict):
            return {name: strict(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [strict(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(value), allow_nan=False)


@dataclasses.dataclass
class Classifier:
    """A trained model with what its use takes.

    Attributes:
        model: a `GCViT`; where it gives logits, `predict` turns them into probabilities.
        class_names: name of each class.
        image_size: side in pixels of the images that it takes, or (height, width).
        crop: share of a photograph that it looks at, see `gcvit.images.center_box`.
        mean: what is subtracted from each channel of 0 to 255.
        std: what it is divided by then.
        notes: what else the file says of the model.
    """

    model: GCViT
    class_names: list
    image_size: int | list
    crop: float
    mean: np.ndarray
    std: np.ndarray
    notes: dict

    def image(self, path):
        """Return the photograph of a file as the model takes it: see `prepare`.

        Raises:
            DatasetError: if it cannot be read.
            ValueError: see `prepare`.
        """
        return self.prepare(read_photograph(path, short_side_for(self.image_size, self.crop)))

    def prepare(self, photograph):
        """Return a photograph as the model takes it: (height, width, channels) float32.

        A model of one channel takes its shades of gray.

        Args:
            photograph: (height, width, 3), 0 to 255.

        Raises:
            ValueError: if the model takes neither one channel nor three.
        """
        channels = self.model.in_channels
        if channels not in (1, 3):
            raise ValueError(
                f"The model takes images of {channels} channels, and a photograph gives 3, or 1 "
                "of gray: call `classifier.model` with arrays of your own."
            )
        pixels = resize(photograph, self.image_size, self.crop)
        if channels == 1:
            pixels = np.array(Image.fromarray(pixels).convert("L"))[..., None]
        return (pixels - self.mean) / self.std

    def _probabilities(self, images):
        answers = self.model.predict_on_batch(images)
        if keras.activations.get(self.model.head_activation) is not keras.activations.linear:
            return answers
        shares = np.exp(answers - answers.max(axis=-1, keepdims=True))
        return shares / shares.sum(axis=-1, keepdims=True)

    def predict(self, paths, batch_size=32):
        """Yield (path, probabilities of the classes, or the `DatasetError`) for each path.

        Args:
            paths: files of photographs, or one, of which one batch is in memory at a time.
            batch_size: photographs that are predicted together; default 32.
        """
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)

        def attempt(path):
            try:
                return self.image(path)
            except DatasetError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for begin in range(0, len(paths), batch_size):
                some = paths[begin : begin + batch_size]
                read = list(pool.map(attempt, some))
                images = [image for image in read if isinstance(image, np.ndarray)]
                if images:
                    # Filled up, so that all batches have the shape that was compiled.
                    missing = min(batch_size, len(paths)) - len(images)
                    batch = np.stack(images + [images[0]] * missing)
                    rows = iter(self._probabilities(batch.astype("float32")))
                for path, image in zip(some, read, strict=True):
                    yield path, next(rows) if isinstance(image, np.ndarray) else image


def load_classifier(path, image_size=None):
    """Read what `save_classifier` wrote.

    Args:
        path: the file.
        image_size: side in pixels of the images to predict, or (height, width); default:
            what the file says.

    Returns:
        A `Classifier`.

    Raises:
        gcvit.CheckpointError: if the file is damaged, or does not say what its use takes.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    read(path)  # says what is wrong with one that is damaged, or no checkpoint at all
    if not is_safetensors(path):
        raise CheckpointError(
            f"{path} holds weights alone, and not what a classifier needs: its model, classes and "
            "image size. `python -m gcvit train` writes a .safetensors file that does."
        )
    try:
        notes = {name: parsed_json(text) for name, text in training_notes(path).items()}
        preset = PRESETS.get(notes.get("preset"), {})
        own_size = notes.pop("image_size", preset.get("image_size"))
        image_size = own_size if image_size is None else image_size
        crop = float(notes.pop("crop", preset.get("crop", 1.0)))
        config, class_names = notes.pop("config"), notes.pop("classes")
        model = GCViT(**config)
        model.build((None, *pair("image_size", image_size), model.in_channels))
    except Exception as error:  # whatever a foreign or damaged file leads to
        raise CheckpointError(
            f"{path} does not say what a classifier needs ({type(error).__name__}: {error}): its "
            "model, classes and image size. `python -m gcvit train` writes such a file."
        ) from error
    load_checkpoint(model, path)
    model.compile(jit_compile=jit_compile())
    scale = [np.float32(notes.pop(name, by)) for name, by in (("mean", MEAN), ("std", STD))]
    return Classifier(model, class_names, image_size, crop, *scale, notes)
