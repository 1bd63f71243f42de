"""Chapter 10: the model in the page, and a figure of what it shows."""

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from gcvit import figures
from gcvit.checks import pair
from gcvit.explain import attention_weights
from gcvit.fine_tuning import load_classifier
from gcvit.images import normalize
from gcvit.readers import training_notes

WORKER = (
    *("tensors.js", "engine.js", "laboratory.js", "model.js"),
    *("readers.js", "images.js", "explain.js", "worker.js", "numbers.js"),
)
"""Files that the worker is put together from, which runs the model."""

PAGE = ("drawing.js", "loading.js", "panels.js", "attention.js", "switches.js", "explorer.js")
"""Files that the script of the page is put together from."""

BOOK = "https://gcvit-book.github.io/gcvit-book/"
"""Where the chapters are, for a page that does not lie beside them."""

EXAMPLE_SIDE = 256
"""Pixels that the shorter side of an example photograph is reduced to."""


def token_at(windows, window, point):
    """Return which token of a level's map covers a point of the image.

    Args:
        windows: number of windows, (rows, columns).
        window: the window's size in tokens, (height, width).
        point: (down, right) from the top left corner, each 0 to 1.

    Returns:
        The window, (row, column), and the token's place in it, (row, column).
    """
    sides = [count * side for count, side in zip(windows, window, strict=True)]
    token = [min(int(part * side), side - 1) for part, side in zip(point, sides, strict=True)]
    at, place = zip(*map(divmod, token, window), strict=True)
    return at, place


def picture(model, image, point=(0.5, 0.5)):
    """Draw for one token what the page shows first: a row for each level.

    Args:
        model: a built `GCViT`.
        image: what the model is given, (height, width, 3), from 0 to 255. Windows must divide
            the maps.
        point: (down, right) of the token, 0 to 1; default: the middle.

    Returns:
        A matplotlib figure of three columns: who asks; the weights, averaged over the
        heads, of the level's first local block; those of its first global one.
    """
    size = image.shape[:2]
    figure, axes = figures.panels(3, rows=len(model.levels), width=1.9)
    for i, level in enumerate(model.levels):
        asks, own, every = axes[3 * i : 3 * i + 3]
        local, everywhere = (
            attention_weights(model, normalize(image)[None], i, block)[0].mean(axis=2)
            for block in (0, 1)
        )
        windows, (h, w) = local.shape[:2], level.window_size
        at, place = token_at(windows, (h, w), point)
        query = place[0] * w + place[1]
        cells = (windows[0] * h, windows[1] * w)
        token = (at[0] * h + place[0], at[1] * w + place[1])
        everywhere = everywhere[:, :, query].reshape(*windows, h, w).transpose(0, 2, 1, 3)
        high, wide = size[0] / windows[0], size[1] / windows[1]
        part = image[
            round(at[0] * high) : round((at[0] + 1) * high),
            round(at[1] * wide) : round((at[1] + 1) * wide),
        ]
        figures.show_image(asks, image, f"Level {i + 1}: who asks")
        figures.overlay(own, part, local[at][query].reshape(h, w), "Local: its window", 0.8)
        figures.overlay(every, image, everywhere.reshape(cells), "Global: all windows", 0.8)
        for ax in (own, every):
            ax.images[-1].set_clim(vmin=0)
        for ax in (asks, every):
            figures.draw_grid(ax, size, windows, width=0.5)
            if windows != (1, 1):
                figures.mark(ax, size, windows, at, figures.LOCAL, 1)
        figures.mark(asks, size, (h, w), place, figures.GLOBAL, 4)
        figures.mark(asks, size, cells, token, figures.LOCAL, 2)
        figures.mark(own, part.shape[:2], (h, w), place, figures.LOCAL, 2)
    return figure


def checkpoint_script(path):
    """Return a checkpoint as a script, which pages load from one place that they share.

    A page that was opened as a file may load scripts, and nothing else.

    Args:
        path: a `.safetensors` file whose header has the model's `config`.
    """
    path = Path(path)
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'(globalThis.gcvitCheckpoints ??= {{}})["{path.name}"]="{content}";\n'


def checkpoint_address(path):
    """Return where the book's pages find a checkpoint's script, relative to themselves.

    No `.js` at its end: Jupyter Book would load that on every page.

    Args:
        path: see `checkpoint_script`.
    """
    return f"checkpoints/{Path(path).stem}.txt"


def _jpeg(image):
    """Return a photograph, (height, width, 3) from 0 to 255, as the bytes of a small JPEG."""
    image = Image.fromarray(np.rint(np.asarray(image)).astype("uint8"))
    share = EXAMPLE_SIDE / min(image.size)
    if share < 1:
        size = [round(side * share) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def _data_address(jpeg):
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def as_stored(image):
    """Return an example photograph as the page stores it: smaller, and a JPEG.

    Args:
        image: (height, width, 3), from 0 to 255.

    Returns:
        (height, width, 3) uint8. What Keras says of these pixels is what the page says.
    """
    return np.asarray(Image.open(io.BytesIO(_jpeg(image))))


def _answers(classifier, image):
    """Return what Keras says of a photograph: the five likeliest classes, (name, probability)."""
    images = classifier.prepare(image)[None]
    probabilities = np.asarray(classifier.model.predict_on_batch(images)[0])
    names = classifier.class_names
    return [(names[i], float(probabilities[i])) for i in np.argsort(-probabilities)[:5]]


def _answer_item(name, probability):
    share = f"{probability:.1%}"
    return (
        f'<li><span class="answer" style="--share: {share}"><span>{html.escape(name)}</span>'
        f'<span class="share">{share}</span></span></li>'
    )


def _text(name):
    return Path(__file__).with_name(name).read_text("utf-8")


def _filled(template, pieces):
    """Put pieces into their places in a template; what has no piece stays a place."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda place: pieces.get(place[1], place[0]), template)


def as_plain_script(modules):
    """Return the text of modules, one behind the other, without imports and exports."""
    return re.sub(r"^(import |export \{).*\n|^export ", "", modules, flags=re.M)


def _scripts():
    """Return the worker's script and the page's, each as one text.

    A page that was opened as a file may start plain scripts as workers, and no modules.
    """
    worker = as_plain_script("\n".join(map(_text, WORKER)))
    # What one page declares must not meet what another one on the same page does.
    page = "\n".join(map(_text, PAGE))
    return worker, f'(() => {{\n"use strict";\n{page}}})();\n'


def run_here(path, examples, image_size=None, address=None, small=False):
    """Return a piece of a web page that runs a model itself, without a server.

    At once, and where scripts do not run, the page shows what the model says about the first
    example, as Keras computes it here. When a button is pressed the checkpoint is loaded, and
    the reader chooses a photograph, and sees the answer and every step to it: the maps of the
    levels, the global query, whom a token attends to, the gates, where the answer comes from,
    and the arithmetic behind each weight and each gate. Parts of the model can be switched,
    after a prediction if the reader likes. What `save_classifier` wrote can be opened in the
    checkpoint's place. No photograph and no checkpoint leaves the device.

    Args:
        path: the checkpoint, a `.safetensors` file whose header has the `config` and the
            `classes`.
        examples: photographs to begin with, a dict from a name to an array, (height,
            width, 3), from 0 to 255.
        image_size: side of the image that the model is given in pixels, or its (height,
            width); default: the header's `image_size`.
        address: where the page finds what `checkpoint_script` returned, relative to itself;
            default `None`: the checkpoint is part of the page. A page with an address lies
            beside the book's chapters, and links to them there.
        small: whether to show the answer and where the global query looks, and no more;
            default `False`.

    Returns:
        Text, HTML.

    Raises:
        ValueError: for a checkpoint whose header lacks something, or without an example.
    """
    path = Path(path)
    notes = training_notes(path)
    if image_size is not None:
        notes["image_size"] = json.dumps(pair("image_size", image_size))
    missing = {"config", "classes", "image_size"} - set(notes)
    if missing:
        raise ValueError(f"The header of {path} has no {', '.join(sorted(missing))}.")
    if not examples:
        raise ValueError("The page wants at least one example to begin with; got none.")
    script = checkpoint_script(path)
    checkpoint = {"name": path.name, "imageSize": json.loads(notes["image_size"])}
    if address is None:
        checkpoint["base64"] = script.split('"')[3]
    else:
        checkpoint |= {"address": address, "length": len(script)}
    heat = colormaps[figures.HEAT](np.linspace(0, 1, 33))
    addresses = {name: _data_address(_jpeg(image)) for name, image in examples.items()}
    settings = {
        "checkpoint": checkpoint,
        "examples": [{"name": name, "image": image} for name, image in addresses.items()],
        "local": figures.LOCAL,
        "global": figures.GLOBAL,
        "heat": [to_hex(color) for color in heat],
        "note": f"loads the model, {len(script) / 1e6:.1f} MB, and runs it on this device.",
    }
    first = next(iter(examples))
    classifier = load_classifier(path, checkpoint["imageSize"])
    worker, script = _scripts()
    pieces = {
        "css": _text("explorer.css"),
        "name": html.escape(first),
        "image": addresses[first],
        "answers": "".join(
            _answer_item(*answer) for answer in _answers(classifier, as_stored(examples[first]))
        ),
        "instead": "" if small else "; the figure below shows the same for one token",
        "panels": _text("small.html" if small else "full.html"),
        "book": BOOK if address is None else "",
        "settings": json.dumps(settings, separators=(",", ":")).replace("<", "\\u003c"),
        "worker": worker,
        "script": script,
    }
    page = _filled(_text("page.html"), {"panels": pieces.pop("panels")})
    return _filled(page, pieces)
