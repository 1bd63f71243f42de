"""What the chapters draw with: one palette, one type size, one way to show a photograph.

Every function draws values that it is given. Blue stands for local, orange for global,
green for what has been checked or chosen, gray for what is only there to orient.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path

LOCAL = "#0072B2"
GLOBAL = "#D55E00"
CHOSEN = "#009E73"
THIRD = "#CC79A7"
NEUTRAL = "#595959"
PALETTE = [LOCAL, GLOBAL, CHOSEN, THIRD, "#E69F00", "#56B4E9", "#000000"]
"""Okabe and Ito's colors, which the color-blind can tell apart."""

HEAT = "cividis"
"""Color map of amounts: even in lightness, and the same to the color-blind."""

SIGNED = "RdBu_r"
"""Color map of values around zero, which is white."""


def use_style():
    """Set the book's style for matplotlib: sizes, colors, a white ground."""
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "font.size": 10,
            "image.cmap": HEAT,
            "image.interpolation": "nearest",
            "legend.frameon": False,
            "savefig.facecolor": "white",
            "svg.hashsalt": "gcvit",
        }
    )


def panels(columns, rows=1, width=2.4, height=None):
    """Return a figure and its axes, a flat list, row by row.

    Args:
        columns: panels side by side.
        rows: rows of panels; default 1.
        width: width of a panel in inches; default 2.4.
        height: height of a panel in inches; default: the width and room for a title.
    """
    height = height or width + 0.35
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False
    )
    return figure, list(axes.ravel())


def show_image(ax, image, title=None):
    """Show an image, or one channel of a map, without axes.

    Args:
        ax: the axes.
        image: (height, width, 3) in 0 to 255 or 0 to 1, or (height, width).
        title: what stands above it.
    """
    image = np.asarray(image)
    if image.ndim == 3 and image.dtype != np.uint8:
        image = np.clip(image / 255 if image.max() > 1.5 else image, 0, 1)
    shown = ax.imshow(image)
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return shown


def show_signed(ax, values, title=None):
    """Show a (height, width) array whose zero is white; return what a color bar needs."""
    values = np.asarray(values)
    limit = np.abs(values).max() or 1.0
    shown = ax.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit)
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return shown


def show_numbers(ax, values, title=None, size=10):
    """Write each number of a small (rows, columns) array into its cell, shaded by value."""
    values = np.asarray(values)
    finite = np.where(np.isfinite(values), values, np.nan)
    limit = np.nanmax(np.abs(finite)) or 1.0
    ax.imshow(finite, cmap=SIGNED, vmin=-limit, vmax=limit, alpha=0.45)
    for (i, j), value in np.ndenumerate(values):
        text = f"{value:g}".replace("inf", "∞").replace("-", "−")
        ax.text(j, i, text, ha="center", va="center", size=size)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)


def overlay(ax, image, values, title=None, strength=0.65):
    """Lay a map of amounts over an image, stretched to its size.

    Args:
        ax: the axes.
        image: (height, width, 3).
        values: (rows, columns), not negative.
        title: what stands above it.
        strength: opacity of the map; default 0.65.
    """
    height, width = np.asarray(image).shape[:2]
    show_image(ax, image, title)
    ax.imshow(values, alpha=strength, extent=(-0.5, width - 0.5, height - 0.5, -0.5))


def draw_grid(ax, size, cells, color="white", width=0.8):
    """Draw the lines between windows or patches over an image.

    Args:
        ax: the axes that show the image.
        size: (height, width) of what is shown.
        cells: (rows, columns) of windows.
        color: color of the lines; default white.
        width: width of the lines in points; default 0.8.
    """
    height, width_px = size
    for i in range(1, cells[0]):
        ax.axhline(i * height / cells[0] - 0.5, color=color, linewidth=width)
    for j in range(1, cells[1]):
        ax.axvline(j * width_px / cells[1] - 0.5, color=color, linewidth=width)


def mark(ax, size, cells, place, color=GLOBAL, width=2.0):
    """Frame one window or patch of a grid.

    Args:
        ax: the axes that show the image.
        size: (height, width) of what is shown.
        cells: (rows, columns) of the grid.
        place: (row, column) of the one to frame.
        color: color of the frame.
        width: width of the frame in points.
    """
    high, wide = size[0] / cells[0], size[1] / cells[1]
    corner = (place[1] * wide - 0.5, place[0] * high - 0.5)
    ax.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=color, linewidth=width))


def montage(ax, tiles, columns, title=None, gap=6):
    """Show small images side by side with white gaps, numbered in their order.

    Args:
        ax: the axes.
        tiles: (tiles, height, width, 3), 0 to 255.
        columns: tiles in a row.
        title: what stands above them.
        gap: pixels between two tiles; default 6.
    """
    tiles = np.asarray(tiles)
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255.0)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = tile
        ax.text(
            left + 2,
            top + 2,
            str(i),
            size=8,
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
        )
    show_image(ax, sheet, title)


def _box(ax, x, y, half, name, text, color, up=1):
    """Draw a box about (x, y) with a name and, where there is one, a text below it.

    `half` is half its width and height; `up` is -1 where the axis runs downwards.
    """
    (w, h), style = half, "round,pad=0,rounding_size=0.06"
    ax.add_patch(
        FancyBboxPatch(
            (x - w, y - h),
            2 * w,
            2 * h,
            boxstyle=style,
            facecolor=color + "22",
            edgecolor=color,
            linewidth=1.4,
        )
    )
    middle = {"ha": "center", "va": "center"}
    ax.text(x, y + up * (0.12 if text else 0), name, weight="bold", size=8.5, **middle)
    ax.text(x, y - up * 0.14, text, size=8, **middle)


def flow(steps, colors=None, width=1.75, per_row=5):
    """Draw boxes joined by arrows: the layers that a tensor passes, with its shapes.

    Args:
        steps: (name, text) pairs in order, the text being what stands below the name,
            such as a shape taken from the tensor itself.
        colors: a color for each box; default: all neutral.
        width: width of a box's place in inches; default 1.75.
        per_row: boxes in a row; default 5.

    Returns:
        The figure.
    """
    colors = colors or [NEUTRAL] * len(steps)
    columns = min(per_row, len(steps))
    rows = -(-len(steps) // columns)
    figure, ax = plt.subplots(figsize=(columns * width, rows * 1.0))
    ax.set_xlim(0, columns)
    ax.set_ylim(-rows, 0)
    ax.set_axis_off()
    for i, ((name, text), color) in enumerate(zip(steps, colors, strict=True)):
        row, column = divmod(i, columns)
        x, y = column + 0.46, -row - 0.5
        _box(ax, x, y, (0.4, 0.3), name, text, color)
        if column + 1 < columns and i + 1 < len(steps):
            _arrow(ax, (x + 0.42, y), (x + 0.59, y))
        elif i + 1 < len(steps):
            _arrow(ax, (x, y - 0.32), (0.46, y - 0.68))
    return figure


def diagram(boxes, arrows, width=1.05, height=0.95):
    """Draw boxes on a grid and arrows between them: tensors that branch and meet again.

    Args:
        boxes: for each key, (column, row, name, text, color); rows count downwards and
            may be fractions. Text is what stands below the name; an empty one leaves the
            name alone in a small box, as for a sum.
        arrows: (key, key) pairs, or (key, key, lift): the arrow leaves at the top, runs
            `lift` rows above the first box and comes down on the second, as a residual
            connection does; below and up again where `lift` is negative.
        width: width of a column in inches; default 1.05.
        height: height of a row in inches; default 0.95.

    Returns:
        The figure.
    """
    columns = 1 + max(box[0] for box in boxes.values())
    lifts = [boxes[arrow[0]][1] - arrow[2] for arrow in arrows if len(arrow) > 2]
    top = min([box[1] - 0.35 for box in boxes.values()] + lifts) - 0.05
    bottom = max([box[1] + 0.35 for box in boxes.values()] + lifts) + 0.05
    figure, ax = plt.subplots(figsize=(columns * width, (bottom - top) * height))
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(bottom, top)
    ax.set_axis_off()
    half = {}
    for key, (x, y, name, text, color) in boxes.items():
        half[key] = (0.42, 0.3) if text else (0.16, 0.16 * width / height)
        _box(ax, x, y, half[key], name, text, color, up=-1)
    for first, second, *lift in arrows:
        (x, y), (to_x, to_y) = boxes[first][:2], boxes[second][:2]
        (w, h), (to_w, to_h) = half[first], half[second]
        if lift:
            side = 1 if lift[0] > 0 else -1
            level = y - lift[0]
            points = [(x, y - side * h), (x, level), (to_x, level), (to_x, to_y - side * to_h)]
        elif y == to_y:
            points = [(x + w, y), (to_x - to_w, y)]
        elif x == to_x:
            side = 1 if to_y > y else -1
            points = [(x, y + side * h), (x, to_y - side * to_h)]
        else:
            points = [(x + w, y), (to_x, y), (to_x, to_y + (to_h if y > to_y else -to_h))]
        ax.add_patch(
            FancyArrowPatch(
                path=Path(points),
                arrowstyle="-|>",
                mutation_scale=9,
                color=NEUTRAL,
                linewidth=1.2,
                joinstyle="miter",
            )
        )
    return figure


def footprints(ax, masks, colors, title=None):
    """Draw a grid of positions, those in a mask in its color; where masks overlap, both.

    Args:
        ax: the axes.
        masks: (rows, columns) arrays of booleans.
        colors: a color for each mask.
        title: what stands above it.
    """
    rows, columns = masks[0].shape
    for mask, color in zip(masks, colors, strict=True):
        shade = np.zeros((rows, columns, 4))
        shade[mask] = to_rgba(color, 0.6)
        ax.imshow(shade)
    ax.set_xticks(np.arange(-0.5, columns))
    ax.set_yticks(np.arange(-0.5, rows))
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    ax.grid(color="0.75", linewidth=0.5)
    ax.spines[:].set(visible=True, color="0.75")
    if title:
        ax.set_title(title)


def bars(ax, names, values, color=LOCAL, highlight=None, fmt="%.2f"):
    """Draw horizontal bars with their values, the first on top.

    Args:
        ax: the axes.
        names: a name for each bar.
        values: a value for each bar.
        color: color of the bars.
        highlight: index of a bar to draw in the color of the chosen; default: none.
        fmt: how to write the values; default: two decimals.
    """
    colors = [CHOSEN if i == highlight else color for i in range(len(values))]
    drawn = ax.barh(range(len(values)), values, color=colors)
    ax.set_yticks(range(len(values)), names)
    ax.invert_yaxis()
    ax.bar_label(drawn, fmt=fmt, padding=3)
    ax.margins(x=0.15)


# Heights in inches in `architecture`: the line that maps move along, the floor of the
# levels, and where the global queries stand.
_AXIS, _FLOOR, _ROOF = 1.85, 0.95, 2.8
_SMALL = {"ha": "center", "size": 8, "linespacing": 1.25}


def _written(shape):
    return " × ".join(str(size) for size in shape)


def _bar(ax, x, height, color, width=0.15):
    corner = (x - width / 2, _AXIS - height / 2)
    ax.add_patch(Rectangle(corner, width, height, facecolor=color, linewidth=0))


def _rounded(ax, x, y, width, height, color, fill):
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 1.2}
    ax.add_patch(FancyBboxPatch((x, y), width, height, facecolor=fill, edgecolor=color, **style))


def _arrow(ax, start, end, color=NEUTRAL):
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=color, linewidth=1.1, **style))


def _draw_level(ax, level, name, x, width, tall):
    """Draw one level of `architecture` between x and x + width."""
    middle, height = x + width / 2, tall(level["map"])
    _rounded(ax, x, _FLOOR, width, 2.5, "#D0D0D0", "#F7F7F7")
    ax.text(middle, 3.32, name, va="center", weight="bold", **_SMALL)
    _arrow(ax, (x - 0.15, _AXIS), (x + 0.17, _AXIS))

    # The global query is made of the map that enters, and falls into every second block.
    _rounded(ax, x + 0.05, _ROOF, width - 0.1, 0.38, GLOBAL, "white")
    query = f"global query\n{_written(level['q_global'])}"
    ax.text(middle, _ROOF + 0.18, query, va="center", **_SMALL)
    _arrow(ax, (x + 0.09, _AXIS), (x + 0.09, _ROOF), GLOBAL)
    count = len(level["global_query"])
    pitch = min(0.24, (width - 0.5) / count)
    places = x + 0.17 + pitch * (np.arange(count) + 0.4)
    for place, is_global in zip(places, level["global_query"], strict=True):
        _bar(ax, place, height, GLOBAL if is_global else LOCAL, 0.65 * pitch)
        if is_global:
            _arrow(ax, (place, _ROOF), (place, _AXIS + height / 2), GLOBAL)

    # Downsampling leads from one height to the next.
    if level["out"] != level["map"]:
        start, end, low = places[-1] + 0.14, x + width - 0.06, tall(level["out"])
        corners = [(start, height / 2), (end, low / 2), (end, -low / 2), (start, -height / 2)]
        ax.add_patch(Polygon(np.add(corners, (0, _AXIS)), facecolor="#A6A6A6", linewidth=0))
    many = f"{level['windows']} window" + "s" * (level["windows"] > 1)
    label = f"{_written(level['map'])}\n{many}\nof {_written(level['window'])}"
    ax.text(middle, _FLOOR - 0.06, label, va="top", **_SMALL)


def architecture(trace, image=None):
    """Draw a whole model from left to right, with the shapes of its trace.

    A bar is a layer; its height grows with the square root of the map's side. Blue bars
    are local blocks, orange ones global blocks, gray shapes everything else.

    Args:
        trace: what `gcvit.explain.trace` returns.
        image: (height, width, 3), 0 to 255, to show as the input; default: an empty frame.

    Returns:
        The figure.
    """
    figure = plt.figure(figsize=(7.5, 3.55), layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 7.5), ylim=(0, 3.55))
    ax.set_axis_off()

    def tall(shape):
        return 1.5 * (shape[0] / trace["stem"][0]) ** 0.5

    # The image and the stem.
    left, low, side = 0.11, _AXIS - 0.36, 0.72
    if image is not None:
        shown = np.clip(np.asarray(image, "float32") / 255, 0, 1)
        ax.imshow(shown, extent=(left, left + side, low, low + side), aspect="auto")
    ax.add_patch(Rectangle((left, low), side, side, fill=False, edgecolor=NEUTRAL))
    ax.text(0.47, _FLOOR - 0.06, f"image\n{_written(trace['image'])}", va="top", **_SMALL)
    _arrow(ax, (left + side, _AXIS), (1.0, _AXIS))
    _bar(ax, 1.08, tall(trace["stem"]), NEUTRAL)
    ax.text(1.08, _AXIS + tall(trace["stem"]) / 2 + 0.05, "stem", va="bottom", **_SMALL)

    # The levels: room for the words in each, the rest shared out by the number of blocks.
    counts = [len(level["global_query"]) for level in trace["levels"]]
    words, gap, x, right = 0.98, 0.12, 1.3, 6.4
    spare = right - x - gap * (len(counts) - 1) - words * len(counts)
    for i, level in enumerate(trace["levels"]):
        width = words + spare * counts[i] / sum(counts)
        _draw_level(ax, level, f"level {i + 1}", x, width, tall)
        x += width + gap

    # Norm, pool and head.
    _arrow(ax, (right - 0.03, _AXIS), (right + 0.12, _AXIS))
    heights = {"norm": tall(trace["norm"]), "pool": 0.15, "head": 0.4}
    for i, (name, height) in enumerate(heights.items()):
        place = right + 0.2 + 0.36 * i
        _bar(ax, place, height, NEUTRAL)
        ax.text(place, _AXIS + height / 2 + 0.05, name, va="bottom", **_SMALL)
        if i:
            _arrow(ax, (place - 0.27, _AXIS), (place - 0.09, _AXIS))
            ax.text(place, _FLOOR - 0.06, _written(trace[name]), va="top", **_SMALL)

    key = {"local block": LOCAL, "global block": GLOBAL, "downsampling": "#A6A6A6"}
    for i, (name, color) in enumerate(key.items()):
        ax.add_patch(Rectangle((1.9 + 1.3 * i, 0.1), 0.14, 0.14, facecolor=color, linewidth=0))
        ax.text(2.1 + 1.3 * i, 0.17, name, va="center", size=8)
    return figure
