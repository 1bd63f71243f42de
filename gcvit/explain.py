"""What the chapters look into a model with: its attention, its maps, its gradients."""

import inspect
import json
from importlib.resources import files

import keras
import numpy as np
from keras import ops

from gcvit.images import resize
from gcvit.model import GCViT
from gcvit.presets import PRESETS
from gcvit.readers import class_names
from gcvit.weights import locate

TRAINED = "gcvit_nano"


def photograph(size=224):
    """Return the book's photograph, Chelsea the cat, as a square.

    Args:
        size: side in pixels; default 224.

    Returns:
        (size, size, 3) float32, 0 to 255, whole numbers. The square is cut from the middle.
    """
    from skimage.data import chelsea

    return resize(chelsea(), size).astype("float32")


def trained_model():
    """Return the model that the chapters look into, and the side of its images in pixels.

    It is `gcvit_nano` with the weights that ship with the package: trained on Tiny ImageNet,
    200 classes, from random weights by `tools/reproduce/train_nano.py`.
    """
    return GCViT.from_preset(TRAINED), PRESETS[TRAINED]["image_size"]


def trained_classes():
    """Return the names of `trained_model`'s 200 classes, in the order of its probabilities."""
    return class_names(locate(next(iter(PRESETS[TRAINED]["weights"].values()))))


def recorded(name):
    """Return what a tool of `tools/reproduce` measured: `gcvit/results/<name>.json`, read."""
    return json.loads((files("gcvit") / "results" / f"{name}.json").read_text(encoding="utf-8"))


def source(thing):
    """Return the source of a class or function, as it is installed, as text."""
    return inspect.getsource(thing)


def block_inputs(model, images, level):
    """Return what each block of a level is given.

    Args:
        model: a built `GCViT`.
        images: (batch, height, width, channels), normalized.
        level: index of the level.

    Returns:
        The maps that enter the blocks, one for each block, and the global query.
    """
    x = model.patch_embed(images)
    for before in model.levels[:level]:
        x = before(x)
    stage = model.levels[level]
    q_global = stage.q_global(x)
    maps = []
    for block in stage.blocks:
        maps.append(x)
        x = block(x, q_global) if block.global_query else block(x)
    return maps, q_global


def attention_weights(model, images, level, block):
    """Return what the tokens of each window attend to in one block.

    Args:
        model: a built `GCViT`.
        images: (batch, height, width, channels), normalized.
        level: index of the level.
        block: index of the block; even ones are local, odd ones global.

    Returns:
        NumPy array (batch, window rows, window columns, heads, tokens, tokens): the last
        axis but one is the query token, the last the key token, and sums to 1.
    """
    maps, q_global = block_inputs(model, images, level)
    layer = model.levels[level].blocks[block]
    x = layer.norm1(maps[block])
    tokens, (height, width) = layer.windows(x)
    query = (q_global,) if layer.global_query else ()
    weights = ops.convert_to_numpy(layer.attn.attention_weights(tokens, *query))
    h, w = layer.window_size
    return weights.reshape(x.shape[0], height // h, width // w, *weights.shape[1:])


def input_gradient(function, x):
    """Return the gradient of a scalar function of an array, on any backend.

    Args:
        function: takes a tensor like `x`, returns a scalar tensor.
        x: an array.

    Returns:
        NumPy array of the shape of `x`.
    """
    backend = keras.backend.backend()
    x = ops.convert_to_tensor(x)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        gradient = tape.gradient(value, x)
    elif backend == "jax":
        import jax

        gradient = jax.grad(function)(x)
    else:
        x = x.detach().clone().requires_grad_(True)
        function(x).backward()
        gradient = x.grad
    return ops.convert_to_numpy(gradient)


def pixels_read(function, x, place):
    """Return how strongly one output position depends on each input position.

    Args:
        function: takes a tensor like `x`, returns a map, (1, rows, columns, channels).
        x: (1, height, width, channels).
        place: (row, column) of the output position.

    Returns:
        NumPy array (height, width): the size of the gradient, summed over the input's
        channels; 0 where nothing is read.
    """

    def mixture(tensor):
        # The plain sum of channels that leave a normalization is constant: mix them.
        channels = function(tensor)[0, place[0], place[1]]
        weights = np.random.default_rng(0).normal(size=channels.shape[-1])
        return ops.sum(channels * ops.cast(weights, channels.dtype))

    return np.abs(input_gradient(mixture, x)).sum(axis=(0, -1))


def trace(model, image_size):
    """Return the shapes that an image takes on its way through a model, layer by layer.

    Args:
        model: a built `GCViT` with pooling and head.
        image_size: side of the image in pixels, or its (height, width).

    Returns:
        A dict: "image", "stem", "norm", "pool" and "head" are shapes without the batch.
        "levels" lists a dict for each level: "map", the shape that its blocks keep;
        "q_global"; "global_query", a flag for each block; "window" and "windows", the
        window's size and number; "heads"; and "out", the shape that leaves the level.
    """
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size,) * 2
    images = keras.Input((*sides, model.in_channels), name="images")
    x = model.patch_embed(images)
    traced = {"image": images.shape[1:], "stem": x.shape[1:], "levels": []}
    for level in model.levels:
        _, padded = level.blocks[0].windows(x)
        (height, width), (h, w) = padded, level.window_size
        shapes = {
            "map": x.shape[1:],
            "q_global": level.q_global(x).shape[1:],
            "global_query": [block.global_query for block in level.blocks],
            "window": (h, w),
            "windows": (height // h) * (width // w),
            "heads": level.num_heads,
        }
        x = level(x)
        traced["levels"].append({**shapes, "out": x.shape[1:]})
    for name in ("norm", "pool", "head"):
        x = getattr(model, name)(x)
        traced[name] = x.shape[1:]
    return traced


def grad_cam(model, images, labels, level=-1):
    """Return from where in the images a class's score comes (Grad-CAM).

    The channels of a map are summed, each weighted with the mean gradient of the score
    over the map, and what is negative is cut off.

    Args:
        model: a built `GCViT` with its head.
        images: (batch, height, width, channels), normalized.
        labels: the class of each image whose score is asked about.
        level: index of the level whose last map is looked at; default -1, the last.

    Returns:
        NumPy array (batch, rows, columns), not negative.

    Source: Selvaraju et al. 2017.
    """
    level = range(len(model.levels))[level]
    maps = ops.cast(model.features(images)[f"stage_{level}"], "float32")
    chosen = ops.one_hot(labels, model.num_classes)

    def score(x):
        if level + 1 < len(model.levels):
            x = model.levels[level].down(x)
            for later in model.levels[level + 1 :]:
                x = later(x)
            x = model.norm(x)
        # The score is what enters the head's activation.
        pooled = ops.cast(model.pool(x), "float32")
        return ops.sum(chosen * (ops.matmul(pooled, model.head.kernel) + model.head.bias))

    weights = input_gradient(score, maps).mean(axis=(1, 2), keepdims=True)
    return np.maximum((weights * ops.convert_to_numpy(maps)).sum(axis=-1), 0)
