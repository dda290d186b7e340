"""Which tiles there are: decision grid, masks, visit orders, and the map of tile states.

Everything here is integer geometry; no score is looked at.  The words are those of the
glossary in the README: a *vote group* is a run of consecutive query rows that decide
together, a *tile* (i, j) is the scores of vote group i against key tile j.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MASKED, COMPUTED, SKIPPED = 0, 1, 2
"""States of a tile: no row of the group sees a key of it; computed; skipped."""

ORDERS = ("ascending", "descending", "ends_first")
"""Visit orders.  NVIDIA's kernels visit in ``ascending`` order; ours in ``ends_first``."""

MAX_LENGTH = 1 << 24


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not 1 <= value <= MAX_LENGTH:
        raise ValueError(f"{name} must be between 1 and {MAX_LENGTH}, got {value}")
    return int(value)


@dataclass(frozen=True)
class Grid:
    """The decision grid: which rows vote together, on which keys, under which mask.

    Parameters
    ----------
    tile : (int, int)
        Vote rows × keys of a tile.
    lq, lk : int
        Query rows and keys.
    causal : bool
        Bottom-right aligned: query i sees keys ≤ i + lk − lq.  Otherwise every row sees all keys.
    window : int, optional
        Sliding window: of those keys a query sees the last ``window`` only.  Needs ``causal``.

    Raises
    ------
    ValueError
        If a length, the window or a side of the tile is not a positive integer, or a window is
        given without the causal mask.

    Examples
    --------
    >>> grid = Grid(tile=(64, 128), lq=300, lk=300, causal=True)
    >>> grid.groups, grid.key_tiles
    (5, 3)
    >>> grid.visited().tolist()
    [1, 1, 2, 2, 3]
    """

    tile: tuple[int, int]
    lq: int
    lk: int
    causal: bool
    window: int | None = None

    def __post_init__(self) -> None:
        try:
            rows, keys = self.tile
        except (TypeError, ValueError):
            raise ValueError(f"tile must be (vote rows, keys), got {self.tile!r}") from None
        tile = (_positive_int("tile rows", rows), _positive_int("tile keys", keys))
        object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "lq", _positive_int("query length", self.lq))
        object.__setattr__(self, "lk", _positive_int("key length", self.lk))
        object.__setattr__(self, "causal", bool(self.causal))
        if self.window is not None:
            object.__setattr__(self, "window", _positive_int("window", self.window))
            if not self.causal:
                raise ValueError("a window needs the causal mask")

    @property
    def rows(self) -> int:
        """Query rows of a vote group (the last group may have fewer)."""
        return self.tile[0]

    @property
    def keys(self) -> int:
        """Keys of a tile (the last tile may have fewer)."""
        return self.tile[1]

    @property
    def groups(self) -> int:
        """Number of vote groups."""
        return -(-self.lq // self.rows)

    @property
    def key_tiles(self) -> int:
        """Number of key tiles."""
        return -(-self.lk // self.keys)

    def group_rows(self, i: int) -> slice:
        """Query rows of vote group ``i``."""
        return slice(i * self.rows, min((i + 1) * self.rows, self.lq))

    def tile_keys(self, j: int) -> slice:
        """Keys of key tile ``j``."""
        return slice(j * self.keys, min((j + 1) * self.keys, self.lk))

    def visible(self) -> NDArray[np.int64]:
        """First key that each row does *not* see any more: it sees keys hidden() … visible() − 1.

        Returns
        -------
        ndarray, shape [lq], int64, read-only
        """
        return self._visible

    @cached_property
    def _visible(self) -> NDArray[np.int64]:
        visible = np.full(self.lq, self.lk, np.int64)
        if self.causal:
            visible = np.clip(np.arange(self.lq) + 1 + self.lk - self.lq, 0, self.lk)
        visible.flags.writeable = False
        return visible

    def hidden(self) -> NDArray[np.int64]:
        """Keys before the first one that each row sees: 0 without a window.

        Returns
        -------
        ndarray, shape [lq], int64
        """
        if self.window is None:
            return np.zeros(self.lq, np.int64)
        return np.maximum(self.visible() - self.window, 0)

    def first_tile(self) -> NDArray[np.int64]:
        """First key tile that each vote group visits: 0 without a window.

        Returns
        -------
        ndarray, shape [groups], int64
        """
        return self.hidden()[:: self.rows] // self.keys  # the first row sees furthest back

    def visited(self) -> NDArray[np.int64]:
        """Key tiles each vote group visits: n of them from ``first_tile()`` on.

        Returns
        -------
        ndarray, shape [groups], int64
            0 for a group none of whose rows sees a key.
        """
        last_rows = np.minimum((np.arange(self.groups) + 1) * self.rows, self.lq) - 1
        end = -(-self.visible()[last_rows] // self.keys)  # the last row sees furthest ahead
        return np.maximum(end - self.first_tile(), 0)

    def visited_tiles(self) -> NDArray[np.bool_]:
        """Whether a tile is visited.

        Returns
        -------
        ndarray, shape [groups, key_tiles], bool
        """
        step = np.arange(self.key_tiles) - self.first_tile()[:, None]
        return (step >= 0) & (step < self.visited()[:, None])

    def visit(self, order: str, i: int) -> NDArray[np.int64]:
        """Key tiles of vote group ``i`` in the order in which it visits them."""
        return visit_order(order, int(self.visited()[i]), int(self.first_tile()[i]))

    def visible_keys(self, rows: slice = slice(None)) -> NDArray[np.int64]:
        """Keys each row sees in each tile.

        Parameters
        ----------
        rows : slice
            Which query rows; default all.

        Returns
        -------
        ndarray, shape [rows, key_tiles], int64
        """
        start = np.arange(self.key_tiles) * self.keys
        seen_before = np.clip(self.hidden()[rows, None] - start, 0, self.keys)
        return np.clip(self.visible()[rows, None] - start, 0, self.keys) - seen_before

    def pairs(self) -> NDArray[np.int64]:
        """Visible (query, key) pairs of each tile.

        Returns
        -------
        ndarray, shape [groups, key_tiles], int64
        """
        groups = [self.visible_keys(self.group_rows(i)).sum(axis=0) for i in range(self.groups)]
        return np.stack(groups)


def visit_order(order: str, n: int, first: int = 0) -> NDArray[np.int64]:
    """Key tiles first … first + n − 1 in the order in which a vote group visits them.

    Parameters
    ----------
    order : {"ascending", "descending", "ends_first"}
        ``ends_first`` is the last tile, then tile 0, then last−1 → 1; where a window hides
        tile 0, descending.
    n : int
        Tiles that the group visits.
    first : int
        The first of them.

    Returns
    -------
    ndarray, shape [n], int64

    Raises
    ------
    ValueError
        If the order has no such name.

    Examples
    --------
    >>> visit_order("ends_first", 5).tolist()
    [4, 0, 3, 2, 1]
    """
    check_order(order)
    ascending = np.arange(first, first + n)
    if order == "ascending":
        return ascending
    if order == "descending" or n < 2 or first > 0:
        return ascending[::-1]
    return np.concatenate([[n - 1, 0], ascending[-2:0:-1]])


def check_order(order: str) -> None:
    """Raise ValueError unless ``order`` names a visit order."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


@dataclass(frozen=True)
class TileMap:
    """The state of every tile: the one object for "which tiles".

    Parameters
    ----------
    state : ndarray, shape [Hq, groups, key_tiles], uint8
        MASKED (0), COMPUTED (1) or SKIPPED (2), indexed by key tile, not by visit step.
        Kernels put a batch axis in front of it, and of ``threshold``.
    grid : Grid
    order : str
    threshold : ndarray, shape [Hq], float64
        The λ each head was decided with; 0 where it was computed densely.

    Examples
    --------
    >>> grid = Grid(tile=(1, 1), lq=2, lk=2, causal=True)
    >>> tiles = TileMap(np.array([[[1, 0], [2, 1]]], np.uint8), grid, "ascending", np.array([0.5]))
    >>> tiles.sparsity
    array([0.33333333])
    """

    state: NDArray[np.uint8]
    grid: Grid
    order: str
    threshold: NDArray[np.float64]

    @cached_property
    def visited(self) -> NDArray[np.bool_]:
        """Whether a tile is visited, [Hq, groups, key_tiles] bool."""
        return self.state != MASKED

    @cached_property
    def skipped(self) -> NDArray[np.bool_]:
        """Whether a tile is skipped, [Hq, groups, key_tiles] bool."""
        return self.state == SKIPPED

    @property
    def sparsity(self) -> NDArray[np.float64]:
        """Skipped ÷ visited tiles per head, [Hq] float64; first tiles count as visited."""
        visited = np.count_nonzero(self.visited, axis=(-2, -1))
        return np.count_nonzero(self.skipped, axis=(-2, -1)) / np.maximum(visited, 1)
