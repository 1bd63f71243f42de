"""The figure of what the page shows: tokens are found, and their weights drawn in place."""

import numpy as np

from gcvit import GCViT, explain, explorer
from gcvit.images import normalize

SIDES = (64, 96)  # neither the image nor its windows are square
POINT = (0.3, 0.7)


def test_token_at_counts_windows_and_places():
    windows, window = (4, 4), (2, 3)  # a map of 8 x 12 tokens
    assert explorer.token_at(windows, window, (0, 0)) == ((0, 0), (0, 0))
    assert explorer.token_at(windows, window, (1, 1)) == ((3, 3), (1, 2))
    assert explorer.token_at(windows, window, POINT) == ((1, 2), (0, 2))  # row 2, column 8


def test_the_picture_shows_the_weights_of_the_token():
    model = GCViT.from_preset("gcvit_nano", weights=None, image_size=SIDES, depths=(2, 2, 2, 2))
    rng = np.random.default_rng(0)
    for level in model.levels:
        for block in level.blocks:
            # Fresh weights attend almost evenly, and then no key could be told from another.
            table = block.attn.relative_position_bias_table
            table.assign(rng.normal(size=table.shape))
    image = explain.photograph(SIDES[1])[: SIDES[0]]
    axes = explorer.picture(model, image, POINT).axes
    assert len(axes) == 12
    for i, level in enumerate(model.levels):
        local, every = (
            explain.attention_weights(model, normalize(image)[None], i, block)[0].mean(axis=2)
            for block in (0, 1)
        )
        own, everywhere = (ax.images[-1].get_array() for ax in axes[3 * i + 1 : 3 * i + 3])
        (h, w), windows = level.window_size, local.shape[:2]
        token = [int(part * n * side) for part, n, side in zip(POINT, windows, (h, w), strict=True)]
        query = token[0] % h * w + token[1] % w
        np.testing.assert_allclose(own.ravel(), local[token[0] // h, token[1] // w, query], 1e-4)
        for row, column in np.ndindex(windows):
            part = everywhere[row * h : (row + 1) * h, column * w : (column + 1) * w]
            np.testing.assert_allclose(part.ravel(), every[row, column, query], rtol=1e-4)
