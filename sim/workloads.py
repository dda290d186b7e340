"""Synthetic Q, K, V: four patterns that attention heads show, and two of prescribed sparsity.

All are causal, float32, drawn from a seeded generator; query heads share one KV head and
differ in how sharp the pattern is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.geometry import COMPUTED, MASKED, SKIPPED, Grid, check_order

HEADS = 3
CLASSES = 32  # reserved dimensions of `scattered`; vote group g belongs to class g mod 32
QUERY_LEVEL = 8.0
DROP = 22.0  # how far, in natural-log units, a shifted tile lies below its neighbours


class Workload(NamedTuple):
    """Inputs and what to expect of them.

    ``q`` [Hq, L, D], ``k`` [1, L, D], ``v`` [1, L, D], float32; ``softmax_scale`` is D ** −0.5.
    ``shifted`` [groups, key_tiles] bool says which tiles were made skippable, on ``grid``;
    both are None where no sparsity is prescribed.
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    softmax_scale: float
    description: str
    grid: Grid | None = None
    shifted: NDArray[np.bool_] | None = None


def _noise(length: int, head_dim: int, heads: int, seed: int) -> tuple[NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    return tuple(
        rng.standard_normal((n, length, head_dim), dtype=np.float32) for n in (heads, 1, 1)
    )  # type: ignore[return-value]


def _sharpness(heads: int) -> NDArray[np.float32]:
    """Strength of the pattern in each query head, 0.75 … 1.25, [heads, 1]."""
    return np.linspace(0.75, 1.25, heads, dtype=np.float32)[:, None]


def random(length: int = 4096, head_dim: int = 64, heads: int = HEADS, seed: int = 0) -> Workload:
    """N(0, 1) everywhere: every tile holds some row's maximum, so next to nothing is skipped."""
    q, k, v = _noise(length, head_dim, heads, seed)
    return Workload(q, k, v, head_dim**-0.5, "N(0, 1) everywhere: no pattern to exploit")


def sink(length: int = 4096, head_dim: int = 64, heads: int = HEADS, seed: int = 0) -> Workload:
    """First keys draw every query, in spells: the attention sink of trained models."""
    q, k, v = _noise(length, head_dim, heads, seed)
    spell = 0.5 + 0.5 * np.cos(np.arange(length, dtype=np.float32) * 2 * np.pi / 1024)
    k[:, :, 0], k[:, :4, 0] = 0, 4
    q[:, :, 0] = _sharpness(heads) * (4 + 8 * spell) * head_dim**0.5 / 4
    return Workload(q, k, v, head_dim**-0.5, "the first four keys draw every query, in spells")


def local_band(
    length: int = 4096, head_dim: int = 64, heads: int = HEADS, seed: int = 0
) -> Workload:
    """Queries look at recent keys: rotary embeddings of one vector, plus noise."""
    q, k, v = _noise(length, head_dim, heads, seed)
    pairs = head_dim // 4  # half of the dimensions carry position, the rest noise
    frequency = np.geomspace(1 / 2, 1 / 4096, pairs)
    angle = np.arange(length)[:, None] * frequency
    position = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    k[:, :, : 2 * pairs] = position
    q[:, :, : 2 * pairs] = 14 * _sharpness(heads)[..., None] * position * head_dim**0.5 / pairs
    return Workload(q, k, v, head_dim**-0.5, "scores fall with distance, as rotary embeddings do")


def vertical_stripes(
    length: int = 4096, head_dim: int = 64, heads: int = HEADS, seed: int = 0
) -> Workload:
    """A few runs of keys matter to every later query, wherever it stands."""
    q, k, v = _noise(length, head_dim, heads, seed)
    rng = np.random.default_rng(seed + 1)
    runs = rng.choice(-(-length // 16), size=max(length // 512, 1), replace=False)
    k[:, :, 0] = 0
    for start in np.append(runs, 0) * 16:
        k[:, start : start + 16, 0] = rng.uniform(3, 4)
    q[:, :, 0] = 9 * _sharpness(heads) * head_dim**0.5 / 4
    return Workload(q, k, v, head_dim**-0.5, "a few runs of keys matter to every later query")


def columns(
    length: int = 4096,
    head_dim: int = 128,
    heads: int = HEADS,
    seed: int = 0,
    *,
    sparsity: float = 0.5,
    tile: tuple[int, int] = (64, 128),
    causal: bool = True,
) -> Workload:
    """Whole key tiles lie 22 below the rest, so every row of every group agrees to skip them.

    Parameters
    ----------
    length, head_dim, heads, seed : int
    sparsity : float
        Skipped ÷ visited tiles at λ = 0.01 in ``ends_first`` order, met as nearly as whole
        columns allow.
    tile : (int, int)
        Decision grid that it holds on.
    causal : bool

    Returns
    -------
    Workload

    Raises
    ------
    ValueError
        If the sparsity is out of reach: first visited tiles and tile 0 are never skipped.

    Examples
    --------
    >>> from sim.skip_softmax import scan
    >>> work = columns(2048, heads=1, sparsity=0.5)
    >>> tiles = scan(work.q, work.k).decide(0.01)
    >>> bool(abs(tiles.sparsity[0] - 0.5) < 0.01)
    True
    """
    return _prescribed(length, head_dim, heads, seed, sparsity, tile, causal, classes=1)


def scattered(
    length: int = 4096,
    head_dim: int = 128,
    heads: int = HEADS,
    seed: int = 0,
    *,
    sparsity: float = 0.5,
    tile: tuple[int, int] = (64, 128),
    causal: bool = True,
) -> Workload:
    """Prescribe sparsity as :func:`columns` does, but neighbouring vote groups disagree.

    32 dimensions are reserved: each vote group has one of them set, and the keys of a tile
    hold a large negative value in the dimensions of the groups that must skip it.
    """
    return _prescribed(length, head_dim, heads, seed, sparsity, tile, causal, classes=CLASSES)


def _prescribed(
    length: int,
    head_dim: int,
    heads: int,
    seed: int,
    sparsity: float,
    tile: tuple[int, int],
    causal: bool,
    classes: int,
) -> Workload:
    if head_dim <= classes:
        raise ValueError(f"head_dim must be above {classes} here, got {head_dim}")
    grid = Grid(tile, length, length, causal)
    class_of = np.arange(grid.groups) % classes
    skips = _pattern(grid, class_of, classes, sparsity, np.random.default_rng(seed + 1))
    q, k, v = _noise(length, head_dim, heads, seed)
    q[:, :, :classes] = 0
    row_class = class_of.repeat(grid.rows)[:length]
    q[:, np.arange(length), row_class] = QUERY_LEVEL
    low = DROP / QUERY_LEVEL * head_dim**0.5
    k[0, :, :classes] = -low * skips.T.repeat(grid.keys, axis=0)[:length]
    what = "the same for every row" if classes == 1 else "different for neighbouring groups"
    description = f"{sparsity:.0%} of tiles skippable at λ = 0.01, {what}"
    return Workload(q, k, v, head_dim**-0.5, description, grid, skips[class_of])


def _pattern(
    grid: Grid, class_of: NDArray[np.int64], classes: int, sparsity: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose (class, key tile) pairs at random until the prescribed share is skipped."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity!r}")
    eligible = grid.visited_tiles()
    visited = int(eligible.sum())
    eligible[np.arange(grid.groups), np.maximum(grid.visited() - 1, 0)] = False  # first visited
    eligible[:, 0] = False
    gain = np.zeros((classes, grid.key_tiles), np.int64)
    np.add.at(gain, class_of, eligible)
    missing = round(sparsity * visited)
    if missing > gain.sum():
        raise ValueError(
            f"sparsity {sparsity:g} is out of reach: at most {gain.sum() / visited:.3f} of these "
            "tiles can be skipped, as first visited tiles and tile 0 are always computed"
        )
    best, least = np.zeros(gain.shape, bool), missing
    for _ in range(200):  # whole columns are coarse: draw until the share is met closely
        skips, left = np.zeros(gain.shape, bool), missing
        for pair in rng.permutation(gain.size):
            if 0 < gain.flat[pair] <= left:
                skips.flat[pair] = True
                left -= int(gain.flat[pair])
        if left < least:
            best, least = skips, left
        if least <= visited // 1000:
            break
    return best


def expected_state(workload: Workload, order: str) -> NDArray[np.uint8]:
    """Tile states that a workload of prescribed sparsity must give at λ = 0.01.

    Parameters
    ----------
    workload : Workload
        From :func:`columns` or :func:`scattered`.
    order : {"ends_first", "ascending"}

    Returns
    -------
    ndarray, shape [groups, key_tiles], uint8

    Raises
    ------
    ValueError
        If nothing is prescribed for this workload or order.
    """
    check_order(order)
    if workload.grid is None or workload.shifted is None or order == "descending":
        raise ValueError(
            "sparsity is prescribed for columns and scattered, not in descending order"
        )
    grid = workload.grid
    state = np.where(workload.shifted, SKIPPED, COMPUTED).astype(np.uint8)
    first = grid.visited() - 1 if order == "ends_first" else np.zeros(grid.groups, np.int64)
    state[np.arange(grid.groups), np.maximum(first, 0)] = COMPUTED
    state[~grid.visited_tiles()] = MASKED
    return state


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "sink": sink,
    "local band": local_band,
    "vertical stripes": vertical_stripes,
    "random": random,
    "columns": columns,
    "scattered": scattered,
}
"""Every workload by the name that people see."""
