"""Chapter 12: what a layer and a whole model cost, counted by formula and measured.

Counted are the multiply-adds of matrix products and convolutions: one multiplication with
the addition that follows it. Norms, activations, softmax, biases, gates and pooling are not
counted: they take a few operations a number, where a matrix takes as many as there are
channels.
"""

import ctypes
import dataclasses
import time
from pathlib import Path

import keras
from keras import ops

from gcvit.checks import pair
from gcvit.model import SMALLEST_IMAGE
from gcvit.unit_blocks import halved


@dataclasses.dataclass(frozen=True)
class Part:
    """The cost of one part of a model.

    Attributes:
        place: "stem", "level 1" to "level 4", or "head".
        kind: "stem", "generator", "local attention", "global attention", "MLP",
            "downsampling" or "head".
        multiply_adds: multiply-adds for one image.
    """

    place: str
    kind: str
    multiply_adds: int


def attention(tokens, channels, window_tokens=None, global_query=False):
    """Return the multiply-adds of attention: input matrix, scores, mixing, output matrix.

    The number of heads makes no difference.

    Args:
        tokens: tokens of the map, n, those of its padding included.
        channels: channels, C.
        window_tokens: tokens of a window, N; default `None`: one window of all tokens,
            which is full attention.
        global_query: whether the query comes ready-made; default `False`.

    Returns:
        4nC² + 2nNC, or 3nC² + 2nNC with a global query.

    Source: Liu et al. 2021 (Swin), equations 1 and 2.
    """
    matrices = 3 if global_query else 4
    m = window_tokens or tokens
    return matrices * tokens * channels**2 + 2 * tokens * m * channels


def score_bytes(tokens, heads, window_tokens=None, bytes_each=4):
    """Return the bytes of an attention layer's scores: one for each pair of tokens and head.

    Args:
        tokens: tokens of the map.
        heads: attention heads; each has scores of its own.
        window_tokens: see `attention`.
        bytes_each: bytes of a number; default 4, float32.
    """
    return tokens * (window_tokens or tokens) * heads * bytes_each


def mlp(tokens, channels, ratio):
    """Return the multiply-adds of an `MLP` with `ratio` times as many hidden units, 2nC·rC."""
    return 2 * tokens * channels * int(channels * ratio)


def fused_mbconv(tokens, channels):
    """Return the multiply-adds of a fused MBConv.

    A depthwise 3x3 convolution, 9nC; the two matrices of squeeze-and-excitation, C·C/4 each
    and once for the whole map; a 1x1 convolution, nC².
    """
    hidden = int(channels * 0.25)
    return 9 * tokens * channels + 2 * channels * hidden + tokens * channels**2


def reduce_size(height, width, channels, channels_out):
    """Return the multiply-adds of a `ReduceSize` on a map of height x width tokens."""
    rows, columns = _half(height, width)
    reduction = 9 * rows * columns * channels * channels_out
    return fused_mbconv(height * width, channels) + reduction


def stem(height, width, channels_in, channels):
    """Return the multiply-adds of a `PatchEmbed` on an image of height x width pixels."""
    rows, columns = _half(height, width)
    projection = 9 * rows * columns * channels_in * channels
    return projection + reduce_size(rows, columns, channels, channels)


def generator(height, width, channels, keepdims, window):
    """Return the multiply-adds of a `GlobalQueryGenerator`, and of resizing what it makes.

    Args:
        height: height of the map, in tokens.
        width: width of the map.
        channels: channels.
        keepdims: the generator's flags; each `False` halves the map.
        window: (height, width) that the query must have. Where it comes out in another
            size, rows and columns are resized by a matrix each, in the cheaper order.
    """
    made = 0
    for keep in keepdims:
        made += fused_mbconv(height * width, channels)
        height, width = (height, width) if keep else _half(height, width)
    if (height, width) == tuple(window):
        return made
    h, w = window
    return made + channels * min(
        h * height * width + h * width * w, height * width * w + h * height * w
    )


def count(model, image_size):
    """Return what each part of a model costs for one image.

    Args:
        model: a `GCViT`. It need not be built: a large one is counted without its weights.
        image_size: side of the image in pixels, or its (height, width).

    Returns:
        A list of `Part`, in the order of the model, for a batch of one. Attention is
        counted on the padded map.

    Raises:
        ValueError: if a side is not a whole number of at least 32 px.
    """
    height, width = pair("image_size", image_size)
    if min(height, width) < SMALLEST_IMAGE:
        raise ValueError(
            f"GCViT wants images of at least {SMALLEST_IMAGE} px a side; got image_size "
            f"{height} x {width}."
        )
    channels = model.embed_dim
    parts = [Part("stem", "stem", stem(height, width, model.in_channels, channels))]
    height, width = _half(*_half(height, width))
    for i, level in enumerate(model.levels):
        parts += _level_parts(f"level {i + 1}", level, height, width, channels)
        if level.downsample:
            height, width = _half(height, width)
            channels *= 2
    if model.include_top:
        parts.append(Part("head", "head", channels * model.num_classes))
    return parts


def total(parts):
    """Return the multiply-adds of all parts together."""
    return sum(part.multiply_adds for part in parts)


def _level_parts(place, level, height, width, channels):
    parts = []
    if level.depth > 1:  # a level without a global block makes no query
        made = generator(height, width, channels, level.keepdims, level.window_size)
        parts.append(Part(place, "generator", made))
    h, w = level.window_size
    padded = (height + -height % h) * (width + -width % w)
    for block in level.blocks:
        kind = "global attention" if block.global_query else "local attention"
        attended = attention(padded, channels, h * w, block.global_query)
        parts.append(Part(place, kind, attended))
        parts.append(Part(place, "MLP", mlp(height * width, channels, block.mlp_ratio)))
    if level.downsample:
        reduced = reduce_size(height, width, channels, 2 * channels)
        parts.append(Part(place, "downsampling", reduced))
    return parts


def _half(height, width):
    return halved((None, height, width, None), None)[1:3]


def seconds(function, at_least=0.2):
    """Return the seconds that a call takes: the shortest of those that fit into a while.

    The shortest is the one least disturbed by whatever else the machine does.

    Args:
        function: takes nothing; its first call, which may compile, is not timed. Where it
            returns tensors, a call has ended when they have arrived in the CPU's memory: an
            accelerator, and JAX anywhere, returns them before they are computed.
        at_least: seconds to go on calling; default 0.2. It is called twice at least.
    """
    _finished(function())
    times, end = [], time.perf_counter() + at_least
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        _finished(function())
        times.append(time.perf_counter() - start)
    return min(times)


def _finished(results):
    for result in keras.tree.flatten(results):
        if ops.is_tensor(result):
            ops.convert_to_numpy(result)


def peak_memory(function):
    """Return by how many bytes a call raises the process's memory at its highest.

    What other threads of the process do in the meantime is in the number. What a library keeps
    in a pool of its own, to use it again, is not: TensorFlow does so on processors for which it
    takes oneDNN, unless `TF_ENABLE_ONEDNN_OPTS` is 0 when it is imported.

    Args:
        function: takes nothing. Call it once beforehand if its first call compiles.

    Returns:
        Bytes of the machine's memory, not of an accelerator's; `None` where the system does
        not tell: it is Linux that does.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def in_use(name):
        (line,) = (row for row in status.read_text().splitlines() if row.startswith(name))
        return 1024 * int(line.split()[1])

    try:
        # What was freed and kept for reuse would hide the call's own allocations.
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")  # makes the highest mark start anew
        before = in_use("VmRSS")
    except (AttributeError, OSError, ValueError):
        return None
    _finished(function())
    return max(0, in_use("VmHWM") - before)
