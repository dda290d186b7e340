"""Scores by strips: Q·Kᵀ for a few query rows at a time, reduced per key tile while in cache.

A strip is held transposed, [keys, rows]: the product is faster that way round, and a maximum
over the keys of a tile is then an elementwise maximum of contiguous rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sim.geometry import Grid

STRIP_ROWS = 512
STRIP_KEYS = 1024  # 2 MB of float32 scores


def check_qk(q: NDArray, k: NDArray) -> None:
    """Raise ValueError unless q [Hq, Lq, D] and k [Hkv, Lk, D] fit each other and are finite."""
    for name, array in (("q", q), ("k", k)):
        check_tensor(name, array)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must share head_dim, got {q.shape[2]} and {k.shape[2]}")
    if q.shape[0] % k.shape[0]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {q.shape[0]} and {k.shape[0]}"
        )


def check_tensor(name: str, array: NDArray) -> None:
    """Raise ValueError unless ``array`` is finite, floating, not empty, of rank 3."""
    if not isinstance(array, np.ndarray) or array.ndim != 3 or not array.size:
        got = f"shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be an array [heads, length, head_dim], got {got}")
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must have a float dtype, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, but holds NaN or infinity")


def check_scale(softmax_scale: float | None, head_dim: int) -> float:
    """Give the softmax scale, default head_dim ** −0.5; ValueError unless finite and > 0."""
    if softmax_scale is None:
        return head_dim**-0.5
    if not (np.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale must be finite and above 0, got {softmax_scale!r}")
    return float(softmax_scale)


def strips(grid: Grid) -> Iterator[slice]:
    """Query rows of each strip: whole vote groups, about STRIP_ROWS rows."""
    rows = max(STRIP_ROWS // grid.rows, 1) * grid.rows
    for start in range(0, grid.lq, rows):
        yield slice(start, min(start + rows, grid.lq))


def strip_tiles(grid: Grid, rows: slice) -> slice:
    """Key tiles that any row of a strip visits."""
    first = int(grid.hidden()[rows.start]) // grid.keys
    return slice(first, max(-(-int(grid.visible()[rows.stop - 1]) // grid.keys), first))


def chunks(grid: Grid, rows: slice) -> Iterator[slice]:
    """Key tiles of each chunk of a strip: about STRIP_KEYS keys, visited tiles only."""
    tiles = strip_tiles(grid, rows)
    step = max(STRIP_KEYS // grid.keys, 1)
    for start in range(tiles.start, tiles.stop, step):
        yield slice(start, min(start + step, tiles.stop))


def chunk_scores(queries: NDArray, keys: NDArray, grid: Grid, rows: slice, tiles: slice) -> NDArray:
    """Scores of some query rows against some key tiles, masked.

    Parameters
    ----------
    queries : ndarray, shape [rows, D]
        Already multiplied by the softmax scale.
    keys : ndarray, shape [Lk, D]
    grid : Grid
    rows, tiles : slice
        Which query rows and which key tiles.

    Returns
    -------
    ndarray, shape [tiles, tile keys, rows], dtype of ``queries``
        −inf where a row does not see a key, and beyond the last key.
    """
    start, stop = tiles.start * grid.keys, min(tiles.stop * grid.keys, grid.lk)
    height = (tiles.stop - tiles.start) * grid.keys
    scores = np.empty((height, queries.shape[0]), queries.dtype)
    np.matmul(keys[start:stop], queries.T, out=scores[: stop - start])
    scores[stop - start :] = -np.inf
    visible = grid.visible()[rows]
    first_hidden = max(int(visible[0]) - start, 0)
    if first_hidden < stop - start:
        hidden = np.arange(start + first_hidden, stop)[:, None] >= visible
        scores[first_hidden : stop - start][hidden] = -np.inf
    gone = grid.hidden()[rows]
    if gone[-1] > start:
        last_gone = min(int(gone[-1]), stop) - start
        scores[:last_gone][np.arange(start, start + last_gone)[:, None] < gone] = -np.inf
    return scores.reshape(-1, grid.keys, queries.shape[0])


def tile_maxima_and_sums(
    queries: NDArray, keys: NDArray, grid: Grid, rows: slice, *, sums: bool
) -> tuple[NDArray, NDArray | None]:
    """Row maximum of every tile, and Σ exp(score − that maximum) if asked for.

    Returns
    -------
    tile_max : ndarray, shape [key_tiles, rows]
        −inf where a row sees no key of the tile.
    tile_sum : ndarray, shape [key_tiles, rows], or None
    """
    shape = (grid.key_tiles, queries.shape[0])
    tile_max = np.full(shape, -np.inf, queries.dtype)
    tile_sum = np.zeros(shape, queries.dtype) if sums else None
    for tiles in chunks(grid, rows):
        scores = chunk_scores(queries, keys, grid, rows, tiles)  # [tiles, keys, rows]
        np.maximum.reduce(scores, axis=1, out=tile_max[tiles])
        if tile_sum is not None:
            scores -= finite_or_zero(tile_max[tiles])[:, None]
            np.exp(scores, out=scores)
            np.add.reduce(scores, axis=1, out=tile_sum[tiles])
    return tile_max, tile_sum


def finite_or_zero(m: NDArray) -> NDArray:
    """``m`` with −inf replaced by 0, so that −inf − m stays −inf."""
    return np.where(m == -np.inf, m.dtype.type(0), m)
