"""Chapter 10: attention weights packed small, for a page that shows where they go."""

import base64
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
from keras import ops
from matplotlib import colormaps
from matplotlib.colors import to_hex

from gcvit import figures
from gcvit.checks import pair
from gcvit.explain import block_inputs
from gcvit.images import normalize
from gcvit.readers import training_notes

LIMIT = 1_000_000
"""Bytes that an explorer may weigh, its page, its photograph and its weights together."""

PIECES = ("page.html", "explorer.css", "explorer.js", "engine.js", "worker.js")
"""Files that the page that runs the model is put together from."""

FRAME = 70_000
"""Bytes set aside for what is not weights: the photograph, the markup and the script."""

# What to give up so that the weights fit, first to last: (every layer or one local and one
# global layer of each level, bits of a code, heads kept of each layer or None for all).
_RUNGS = (
    (True, 8, None),
    (False, 8, None),
    (False, 4, None),
    (False, 4, 4),
    (False, 4, 2),
)
_SCALES = 2**16 - 1


def _base64(array):
    return base64.b64encode(array.tobytes()).decode("ascii")


def pack(weights, bits=8):
    """Round attention weights to small whole numbers and write them as text.

    Each row, the weights of one query, is cut into 2^bits - 1 equal steps from 0 to its
    largest weight. A code counts steps. So a weight moves by at most half a step:
    (largest weight of its row + 1/65535) / 2 / (2^bits - 1).

    Args:
        weights: (..., keys), each 0 to 1.
        bits: 8, or 4, which puts two codes into a byte, the first one in the lower half.

    Returns:
        A dict: "bits"; "codes", the codes in the order of the array, one after the other;
        and "scales", each row's largest weight times 65535, rounded up, as little-endian
        uint16. Both are base64 texts.

    Raises:
        ValueError: for weights outside 0 to 1, or other bits.
    """
    weights = np.asarray(weights, "float64")
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8; got {bits!r}.")
    if not (weights.min() >= 0 and weights.max() <= 1 + 1e-6):
        raise ValueError(
            f"Attention weights lie between 0 and 1; got {weights.min():g} to {weights.max():g}."
        )
    largest = np.ceil(weights.max(axis=-1, keepdims=True) * _SCALES)
    scales = np.clip(largest, 1, _SCALES).astype("<u2")
    top = 2**bits - 1
    codes = np.rint(np.minimum(weights * _SCALES / scales, 1) * top).astype("uint8").ravel()
    if bits == 4:
        first, second = np.pad(codes, (0, codes.size % 2)).reshape(-1, 2).T
        codes = first | second << 4
    return {"bits": bits, "codes": _base64(codes), "scales": _base64(scales)}


def unpack(packed, shape):
    """Return the weights that `pack` has written, as they come out of the rounding.

    Args:
        packed: what `pack` returned.
        shape: shape of the array that was packed.

    Returns:
        A float64 array of that shape.
    """
    codes = np.frombuffer(base64.b64decode(packed["codes"]), "uint8")
    scales = np.frombuffer(base64.b64decode(packed["scales"]), "<u2")
    if packed["bits"] == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).ravel()
    codes = codes[: np.prod(shape, dtype=int)].reshape(shape)
    scales = scales.reshape(*shape[:-1], 1) / _SCALES
    return codes / (2 ** packed["bits"] - 1) * scales


def _packed_size(layer, bits):
    """Return the bytes of a layer's two base64 texts."""
    tokens = np.prod(layer["window"], dtype=int)
    rows = np.prod(layer["windows"], dtype=int) * layer["heads"] * tokens
    return sum(-(-size // 3) * 4 for size in (-(-rows * tokens * bits // 8), 2 * rows))


def _layers(model, image_size):
    """Yield each attention layer of a model: where it stands, its windows and its heads."""
    shape = (1, *pair("image_size", image_size), model.in_channels)
    shape = model.patch_embed.compute_output_shape(shape)
    for i, level in enumerate(model.levels):
        (rows, columns), (h, w) = shape[1:3], level.window_size
        if rows % h or columns % w:
            raise ValueError(
                f"The explorer wants windows that divide the map: level {i + 1} has a map of "
                f"{rows} x {columns} tokens and windows of {h} x {w}."
            )
        for j, block in enumerate(level.blocks):
            yield {
                "level": i,
                "block": j,
                "global": block.global_query,
                "windows": [rows // h, columns // w],
                "window": [h, w],
                "heads": level.num_heads,
                "heads_of_layer": level.num_heads,
            }
        shape = level.compute_output_shape(shape)


def choose(model, image_size, limit=LIMIT):
    """Decide which layers and heads an explorer shows and how finely, so that it fits.

    The first of these that fits is taken: every layer and head in 8 bits; the last local
    and the last global layer of each level, in 8 bits, then in 4; the same with at most
    the first four heads of each layer, then with the first two.

    Args:
        model: a `GCViT`.
        image_size: side of the image in pixels, or its (height, width).
        limit: bytes of the whole explorer; default `LIMIT`, one million.

    Returns:
        A dict: "bits" of a code; "bytes" of all weights as text; "layers", a list of dicts
        with "level" and "block", counted from 0, "global", "windows" (rows, columns),
        "window" (height, width), "heads" shown and "heads_of_layer".

    Raises:
        ValueError: if windows do not divide a map or nothing fits.
    """
    everything = list(_layers(model, image_size))
    last = {(layer["level"], layer["global"]): layer for layer in everything}
    for every, bits, heads in _RUNGS:
        layers = [
            {**layer, "heads": min(heads or layer["heads"], layer["heads"])}
            for layer in (everything if every else last.values())
        ]
        size = sum(_packed_size(layer, bits) for layer in layers)
        if size + FRAME <= limit:
            return {"bits": bits, "bytes": size, "layers": layers}
    raise ValueError(
        f"The explorer may weigh {limit:,} bytes, of which {FRAME:,} are for page and "
        f"photograph; the weights of two layers a level, two heads and 4 bits take {size:,}. "
        "A smaller image takes less."
    )


def export(model, image, limit=LIMIT):
    """Run a model on an image and return what an explorer shows of it.

    Args:
        model: a built `GCViT` with trained weights.
        image: (height, width, 3), 0 to 255.
        limit: bytes of the whole explorer; default `LIMIT`, one million.

    Returns:
        A dict that `json` can write: "image", a JPEG as a data address; "size", its height
        and width in pixels; and "layers", the dicts of `choose`, each with the "bits",
        "codes" and "scales" of `pack`. The packed array is (window rows, window columns,
        heads, query tokens, key tokens).

    Raises:
        ValueError: for an image of another shape or range, and for what `choose` refuses.
    """
    from PIL import Image

    image = np.asarray(image, "float32")
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"The image must be (height, width, 3); got shape {image.shape}.")
    if not (image.min() >= 0 and 1 < image.max() <= 255):
        raise ValueError(
            f"The image's values must run from 0 to 255; got {image.min():g} to {image.max():g}."
        )
    choice = choose(model, image.shape[:2], limit)
    layers = []
    for level, of_level in itertools.groupby(choice["layers"], key=lambda x: x["level"]):
        # All blocks of a level from one pass; `attention_weights` would make one for each.
        maps, q_global = block_inputs(model, normalize(image)[None], level)
        for layer in of_level:
            block = model.levels[level].blocks[layer["block"]]
            tokens, _ = block.windows(block.norm1(maps[layer["block"]]))
            query = (q_global,) if block.global_query else ()
            weights = block.attn.attention_weights(tokens, *query)[:, : layer["heads"]]
            layers.append({**layer, **pack(ops.convert_to_numpy(weights), choice["bits"])})
    jpeg = io.BytesIO()
    Image.fromarray(np.rint(image).astype("uint8")).save(jpeg, "JPEG", quality=90)
    address = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")
    return {"image": address, "size": list(image.shape[:2]), "layers": layers}


def weights_of(layer):
    """Return the weights of one of an export's layers, as the explorer shows them.

    Args:
        layer: a dict out of `export(...)["layers"]`.

    Returns:
        (window rows, window columns, heads, query tokens, key tokens), float64.
    """
    tokens = np.prod(layer["window"], dtype=int)
    return unpack(layer, (*layer["windows"], layer["heads"], tokens, tokens))


def token_at(layer, point):
    """Return which token of a layer's map covers a point of the image.

    Args:
        layer: a dict out of `choose(...)["layers"]` or `export(...)["layers"]`.
        point: (down, right) from the top left corner, each 0 to 1.

    Returns:
        The window, (row, column), and the token's place in it, (row, column).
    """
    sides = [count * side for count, side in zip(layer["windows"], layer["window"], strict=True)]
    token = [min(int(part * side), side - 1) for part, side in zip(point, sides, strict=True)]
    window, place = zip(*map(divmod, token, layer["window"]), strict=True)
    return window, place


def picture(data, point=(0.5, 0.5)):
    """Draw for one token what the explorer shows first: a row for each level.

    Args:
        data: what `export` returned.
        point: (down, right) of the token, 0 to 1; default: the middle.

    Returns:
        A matplotlib figure of three columns: who asks; the weights, averaged over the
        heads, of the first local layer that was exported; those of the first global one.
    """
    from PIL import Image

    image = base64.b64decode(data["image"].partition(",")[2])
    image = np.asarray(Image.open(io.BytesIO(image)))
    first = {}
    for layer in data["layers"]:
        first.setdefault((layer["level"], layer["global"]), layer)
    levels = sorted({level for level, _ in first})
    figure, axes = figures.panels(3, rows=len(levels), width=1.9)
    for row, level in enumerate(levels):
        local, (asks, own, every) = first[level, False], axes[3 * row : 3 * row + 3]
        window, place = token_at(local, point)
        (h, w), windows = local["window"], local["windows"]
        token = [at * side + spot for at, side, spot in zip(window, (h, w), place, strict=True)]
        query = place[0] * w + place[1]
        ours, theirs = (
            weights_of(first[level, kind]).mean(axis=2)[:, :, query] for kind in (False, True)
        )
        cells = [count * side for count, side in zip(windows, (h, w), strict=True)]
        everywhere = theirs.reshape(*windows, h, w).transpose(0, 2, 1, 3).reshape(cells)
        size = image.shape[:2]
        high, wide = size[0] / windows[0], size[1] / windows[1]
        part = image[
            round(window[0] * high) : round((window[0] + 1) * high),
            round(window[1] * wide) : round((window[1] + 1) * wide),
        ]
        figures.show_image(asks, image, f"Level {level + 1}: who asks")
        figures.overlay(own, part, ours[window].reshape(h, w), "Local: its window", 0.8)
        figures.overlay(every, image, everywhere, "Global: all windows", 0.8)
        for ax in (own, every):
            ax.images[-1].set_clim(vmin=0)
        for ax in (asks, every):
            figures.draw_grid(ax, size, windows, width=0.5)
            if windows != [1, 1]:
                figures.mark(ax, size, windows, window, figures.LOCAL, 1)
        figures.mark(asks, size, (h, w), place, figures.GLOBAL, 4)
        figures.mark(asks, size, cells, token, figures.LOCAL, 2)
        figures.mark(own, part.shape[:2], (h, w), place, figures.LOCAL, 2)
    return figure


class Page:
    """A piece of a web page that a notebook shows in place.

    Args:
        html: the piece, as text.
    """

    def __init__(self, html):
        self.html = html

    def _repr_html_(self):
        return self.html

    def __repr__(self):
        return f"Page of {len(self.html.encode()):,} bytes"


def show(data, places=None, point=(0.5, 0.5), limit=LIMIT):
    """Return the explorer of what was exported: one piece of a web page, and nothing beside.

    The reader points at a token of the image, by mouse, finger or arrow keys, and sees
    whom the token attends to in a local layer and in a global one, head by head, in every
    level. The page loads nothing. It follows the light or dark theme of the book, of
    Colab, or of the system.

    Args:
        data: what `export` returned.
        places: names of places in the image, each with its (down, right), 0 to 1: buttons
            that move the token there; default: none.
        point: (down, right) of the token to begin with; default: the middle.
        limit: bytes that the page may weigh; default `LIMIT`, one million.

    Returns:
        A `Page`, which a notebook shows.

    Raises:
        ValueError: if the page weighs more than `limit`, or a place is outside the image.
    """
    places = dict(places or {})
    for name, (down, right) in {**places, "point": point}.items():
        if not (0 <= down <= 1 and 0 <= right <= 1):
            raise ValueError(f"Places lie between 0 and 1; {name!r} is at ({down}, {right}).")
    heat = colormaps[figures.HEAT](np.linspace(0, 1, 33))
    settings = {
        "places": [[name, *place] for name, place in places.items()],
        "point": list(point),
        "local": figures.LOCAL,
        "global": figures.GLOBAL,
        "heat": [to_hex(color) for color in heat],
    }
    # Inside a script element only "</" and "<!--" could end the text: neither is left.
    written = json.dumps({**data, **settings}, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    html = template.replace("{{ data }}", written)
    size = len(html.encode())
    if size > limit:
        raise ValueError(f"The explorer weighs {size:,} bytes; {limit:,} is the limit.")
    return Page(html)


def explore(model, image, places=None, point=(0.5, 0.5), limit=LIMIT):
    """Run a model on an image and return the explorer of its attention.

    Args:
        model: see `export`.
        image: see `export`.
        places: see `show`.
        point: see `show`.
        limit: bytes that the explorer may weigh; default `LIMIT`, one million.

    Returns:
        A `Page`, which a notebook shows.

    Raises:
        ValueError: for what `export` or `show` refuses.
    """
    return show(export(model, image, limit), places, point, limit)


# The model in the page.

EXAMPLE_SIDE = 256
"""Pixels that the shorter side of an example photograph is reduced to."""


def checkpoint_script(path):
    """Return a checkpoint as a script, which pages load from one place that they share.

    A page that was opened as a file may load scripts, and nothing else.

    Args:
        path: a `.safetensors` file whose header has the model's `config`.
    """
    path = Path(path)
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'(globalThis.gcvitCheckpoints ??= {{}})["{path.name}"]="{content}";\n'


def _jpeg(image):
    """Return a photograph, (height, width, 3) from 0 to 255, as a JPEG's data address."""
    from PIL import Image

    image = Image.fromarray(np.rint(np.asarray(image)).astype("uint8"))
    share = EXAMPLE_SIDE / min(image.size)
    if share < 1:
        size = [round(side * share) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


def run_here(path, examples, image_size=None, address=None):
    """Return a piece of a web page that runs a model itself, without a server.

    The reader chooses a photograph, and sees the answer and every step to it: the maps of the
    levels, the global query, whom a token attends to, the gates, and where the answer comes
    from. Parts of the model can be switched. Nothing is computed or loaded before a button is
    pressed, and no photograph leaves the device.

    Args:
        path: the checkpoint, a `.safetensors` file whose header has the `config` and the
            `classes`.
        examples: photographs to begin with, a dict from a name to an array, (height,
            width, 3), from 0 to 255.
        image_size: side of the image that the model is given in pixels, or its (height,
            width); default: the header's `image_size`.
        address: where the page finds what `checkpoint_script` returned, relative to itself;
            default `None`: the checkpoint is part of the page.

    Returns:
        A `Page`, which a notebook shows.

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
    size = json.loads(notes["image_size"])
    checkpoint = {"name": path.name, "address": address, "imageSize": size}
    if address is None:
        checkpoint["base64"] = base64.b64encode(path.read_bytes()).decode("ascii")
    heat = colormaps[figures.HEAT](np.linspace(0, 1, 33))
    settings = {
        "checkpoint": checkpoint,
        "examples": [{"name": name, "image": _jpeg(image)} for name, image in examples.items()],
        "local": figures.LOCAL,
        "global": figures.GLOBAL,
        "heat": [to_hex(color) for color in heat],
        "note": f"The model, {path.stat().st_size / 1e6:.1f} MB, then runs on this device.",
    }
    texts = {name: Path(__file__).with_name(name).read_text("utf-8") for name in PIECES}
    pieces = {
        "css": texts["explorer.css"],
        "settings": json.dumps(settings, separators=(",", ":")).replace("<", "\\u003c"),
        # A page that was opened as a file may start plain scripts as workers, and no modules.
        "worker": re.sub("^export ", "", texts["engine.js"], flags=re.M) + texts["worker.js"],
        "script": texts["explorer.js"],
    }
    return Page(re.sub(r"\{\{ (\w+) \}\}", lambda match: pieces[match[1]], texts["page.html"]))
