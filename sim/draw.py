"""A tile map as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim.geometry import SKIPPED, TileMap

if TYPE_CHECKING:
    from PIL.Image import Image

PALETTE = {"masked": "#EEEEEE", "computed": "#0072B2", "skipped": "#E69F00"}
"""Okabe and Ito's colours: told apart by every kind of colour vision, and in grey."""


def tile_map_image(tiles: TileMap, head: int = 0, cell: int = 8) -> Image:
    """Draw one head's tile map: vote groups down, key tiles across.

    Parameters
    ----------
    tiles : TileMap
    head : int
    cell : int
        Pixels per side of a tile's longer edge unit: a tile of 64 × 128 is ``cell`` high and
        2 · ``cell`` wide, so that the picture is square where queries and keys are as many.
        From 6 pixels up, skipped tiles also carry a diagonal stroke.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    ValueError
        If there is no such head or the cell is smaller than a pixel.

    Examples
    --------
    >>> from sim import scan, workloads
    >>> work = workloads.columns(1024, heads=1, sparsity=0.3)
    >>> tile_map_image(scan(work.q, work.k).decide(0.01)).size
    (128, 128)
    """
    from PIL import Image

    if not 0 <= head < tiles.state.shape[0]:
        raise ValueError(f"head must be between 0 and {tiles.state.shape[0] - 1}, got {head}")
    if cell < 1:
        raise ValueError(f"cell must be at least 1 pixel, got {cell}")
    rows, keys = tiles.grid.tile
    unit = min(rows, keys)
    height, width = max(cell * rows // unit, 1), max(cell * keys // unit, 1)
    colours = np.array(
        [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in PALETTE.values()], np.uint8
    )
    state = tiles.state[head].repeat(height, axis=0).repeat(width, axis=1)
    pixels = colours[state]
    if cell >= 6:
        y, x = np.indices(state.shape)
        stroke = (state == SKIPPED) & ((x + y) % cell == cell // 2)
        pixels[stroke] = colours[SKIPPED] // 2
    return Image.fromarray(pixels)
