"""The rule: scan → gap map → decide → attend.

``scan`` forms Q·Kᵀ once, strip by strip, and keeps the *gap* of every tile: how far its row
maxima lie above (or below) the running maxima, for the row of the vote group where that is
largest.  A tile is skipped iff gap < ln λ.  For λ ≤ 1 a skipped tile cannot raise a running
maximum, so the gaps do not depend on λ: one scan decides every threshold.
Source: BLASST, arXiv 2512.12087, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.curve import Curve, curve_of
from sim.geometry import COMPUTED, MASKED, SKIPPED, Grid, TileMap, check_order
from sim.scores import (
    check_qk,
    check_scale,
    check_tensor,
    chunk_scores,
    finite_or_zero,
    strip_tiles,
    strips,
    tile_maxima_and_sums,
)
from sim.threshold import for_target_sparsity, ln_threshold, resolve

BOUND_SAFETY = 1.01  # makes the certified bound cover approximate exponentials, as in the kernels

Progress = bool | Callable[[float], None]


@dataclass(frozen=True)
class Scan:
    """What one pass over Q·Kᵀ tells about every tile, for every threshold.

    Made by :func:`scan`; all arrays are indexed by key tile, not by visit step.

    Parameters
    ----------
    gap : ndarray, shape [Hq, groups, key_tiles], float32
        Natural-log units, after the scale; +inf for the first visited tile, −inf where masked.
    grid : Grid
    order : str
        Visit order.
    softmax_scale : float
    row_max : ndarray, shape [Hq, Lq, key_tiles], float32, or None
        Maximum score of each row in each tile, −inf where it sees none of its keys.
    mass : ndarray, shape [Hq, Lq, key_tiles], float32, or None
        True softmax probability of each row in each tile.
    lse : ndarray, shape [Hq, Lq], float32, or None
        Dense log-sum-exp; with ``mass``.
    """

    gap: NDArray[np.float32]
    grid: Grid
    order: str
    softmax_scale: float
    row_max: NDArray[np.float32] | None = None
    mass: NDArray[np.float32] | None = None
    lse: NDArray[np.float32] | None = None

    def decide(
        self,
        threshold: ArrayLike | None = None,
        *,
        threshold_scale_factor: ArrayLike | None = None,
        target_sparsity: float | None = None,
        per_head: bool = False,
        short_context: str = "dense",
    ) -> TileMap:
        """Say which tiles are skipped.

        Parameters
        ----------
        threshold : float or array [Hq], optional
            λ.  Larger skips more.
        threshold_scale_factor : float or array [Hq], optional
            λ = factor / key length.
        target_sparsity : float, optional
            The λ that skips at most this share of visited tiles: one for all heads together,
            or with ``per_head`` one for each.
        per_head : bool
        short_context : {"dense", "allow"}
            What happens where factor / length exceeds 1.

        Returns
        -------
        TileMap

        Raises
        ------
        ValueError
            If not exactly one of the three is given, if a value is out of range, or if λ > 1 is
            to be simulated and the row maxima were not kept.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> q, k = rng.standard_normal((2, 1, 512, 64))
        >>> tiles = scan(4 * q, k).decide(threshold=0.01)
        >>> tiles.state.shape
        (1, 8, 4)
        """
        heads = self.gap.shape[0]
        if target_sparsity is not None:
            if threshold is not None or threshold_scale_factor is not None:
                raise ValueError(
                    "give threshold, threshold_scale_factor or target_sparsity, only one"
                )
            if per_head:
                lam = np.array([for_target_sparsity(gap, target_sparsity) for gap in self.gap])
            else:
                lam = np.asarray(for_target_sparsity(self.gap, target_sparsity))
        elif threshold is None and threshold_scale_factor is None:
            raise ValueError("give threshold, threshold_scale_factor or target_sparsity")
        else:
            lam = resolve(threshold, threshold_scale_factor, self.grid.lk, short_context)
        if lam.shape not in ((), (heads,)):
            raise ValueError(
                f"one threshold, or one for each of {heads} heads; got shape {lam.shape}"
            )
        lam = np.broadcast_to(lam, heads).copy()
        skip = self.gap < ln_threshold(lam)[:, None, None]
        for h in np.flatnonzero(lam > 1).tolist():
            skip[h] = self._decide_in_sequence(h, float(ln_threshold(lam[h])))
        visited = self.grid.visited_tiles()
        state = np.where(skip, SKIPPED, COMPUTED).astype(np.uint8)
        state[:, ~visited] = MASKED
        return TileMap(state, self.grid, self.order, lam)

    def _decide_in_sequence(self, head: int, ln_lam: float) -> NDArray[np.bool_]:
        """Skips of one head for λ > 1, where a skipped tile may hide a row's maximum."""
        grid, row_max = self.grid, self._need_row_max("λ > 1")[head]
        skip = np.zeros((grid.groups, grid.key_tiles), bool)
        for i in range(grid.groups):
            tile_max = row_max[grid.group_rows(i)]
            m = np.full(tile_max.shape[0], -np.inf, np.float32)
            for j in grid.visit(self.order, i):
                skip[i, j] = _row_gap(tile_max[:, j], m).max() < ln_lam
                if not skip[i, j]:
                    m = np.maximum(m, tile_max[:, j])
        return skip

    def curve(self, head: int | None = None) -> Curve:
        """Sparsity, and dropped mass if scanned with ``mass=True``, for every threshold ≤ 1.

        Parameters
        ----------
        head : int, optional
            One head; default all heads together.

        Returns
        -------
        Curve
        """
        heads = slice(None) if head is None else [head]
        mass = None if self.mass is None else self.mass[heads]
        return curve_of(self.gap[heads], self.grid, mass)

    def running_max(self, head: int) -> NDArray[np.float32]:
        """Maximum of each row over the tiles visited *before* each tile, for λ ≤ 1.

        Returns
        -------
        ndarray, shape [Lq, key_tiles], float32
            −inf for the first visited tile.
        """
        row_max = self._need_row_max("the running maximum")[head]
        return _running_max_before(row_max.T, _last_tile(self.grid), self.order).T

    def deciding_row(self, head: int) -> NDArray[np.int64]:
        """Row of each vote group whose tile max lies highest above its running max.

        Returns
        -------
        ndarray, shape [groups, key_tiles], int64
            Query row; the first of several that tie.  The row's ``row_max`` minus its
            ``running_max`` is the tile's gap.
        """
        row_gap = _row_gap(self._need_row_max("the deciding row")[head], self.running_max(head))
        groups = [self.grid.group_rows(i) for i in range(self.grid.groups)]
        return np.stack([rows.start + row_gap[rows].argmax(axis=0) for rows in groups])

    def heads(self, indices: list[int]) -> Scan:
        """Give the scan of some heads only."""

        def pick(array: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
            return None if array is None else array[indices]

        return replace(
            self,
            gap=self.gap[indices],
            row_max=pick(self.row_max),
            mass=pick(self.mass),
            lse=pick(self.lse),
        )

    def crop(self, length: int) -> Scan:
        """Scan of the first ``length`` tokens, with no new product.

        Parameters
        ----------
        length : int
            1 … Lq.  Needs a causal mask and as many queries as keys: then what a row sees
            does not depend on what follows.

        Returns
        -------
        Scan

        Raises
        ------
        ValueError
            If the mask is not causal, Lq ≠ Lk, the length is out of range, or the row maxima
            were not kept.
        """
        grid = self.grid
        if not grid.causal or grid.lq != grid.lk:
            raise ValueError("crop needs a causal mask and as many queries as keys")
        if not 1 <= length <= grid.lq:
            raise ValueError(f"length must be between 1 and {grid.lq}, got {length}")
        return self._rebuild(replace(grid, lq=length, lk=length), self.order, 1)

    def replay(self, *, order: str | None = None, tile: tuple[int, int] | None = None) -> Scan:
        """Scan in another visit order or on another decision grid, with no new product.

        Parameters
        ----------
        order : str, optional
        tile : (int, int), optional
            Any vote rows; keys must be a multiple of the keys scanned with.

        Returns
        -------
        Scan

        Raises
        ------
        ValueError
            If the order is unknown, the keys do not fit, or the row maxima were not kept.
        """
        grid = self.grid if tile is None else replace(self.grid, tile=tile)
        if grid.keys % self.grid.keys:
            raise ValueError(
                f"tile keys must be a multiple of {self.grid.keys}, as scanned, got {grid.keys}"
            )
        return self._rebuild(
            grid, self.order if order is None else order, grid.keys // self.grid.keys
        )

    def _rebuild(self, grid: Grid, order: str, merge: int) -> Scan:
        check_order(order)
        starts = np.arange(0, grid.key_tiles * merge, merge)
        row_max = self._need_row_max("replaying")[:, : grid.lq, : grid.key_tiles * merge]
        row_max = np.maximum.reduceat(row_max, starts, axis=2)
        mass, lse = self.mass, self.lse
        if mass is not None and lse is not None:
            mass = mass[:, : grid.lq, : grid.key_tiles * merge]
            mass, lse = np.add.reduceat(mass, starts, axis=2), lse[:, : grid.lq]
        last = _last_tile(grid)
        gap = np.stack([_gap(one.T, last, grid.rows, order).T for one in row_max])
        return Scan(gap, grid, order, self.softmax_scale, row_max, mass, lse)

    def _need_row_max(self, purpose: str) -> NDArray[np.float32]:
        if self.row_max is None:
            raise ValueError(f"{purpose} needs the row maxima: scan with keep_row_max=True")
        return self.row_max


def scan(
    q: NDArray,
    k: NDArray,
    *,
    tile: tuple[int, int] = (64, 128),
    causal: bool = True,
    window: int | None = None,
    order: str = "ends_first",
    softmax_scale: float | None = None,
    mass: bool = False,
    keep_row_max: bool = True,
    progress: Progress = False,
) -> Scan:
    """Form Q·Kᵀ once and keep the gap of every tile.

    Parameters
    ----------
    q : ndarray, shape [Hq, Lq, D], any float dtype
        Computed in float32.
    k : ndarray, shape [Hkv, Lk, D], any float dtype
        Query head h uses KV head h // (Hq / Hkv).
    tile : (int, int)
        Vote rows × keys of a tile.
    causal : bool
        Bottom-right aligned: query i sees keys ≤ i + Lk − Lq.
    window : int, optional
        Sliding window: of those keys a query sees the last ``window`` only.
    order : {"ends_first", "ascending", "descending"}
        Visit order.
    softmax_scale : float, optional
        Default D ** −0.5.
    mass : bool
        Also keep each row's true softmax probability per tile; takes about twice as long.
    keep_row_max : bool
        Keep the row maxima (4 bytes × Hq × Lq × key tiles), which cropping, replaying, λ > 1
        and the app's inspector need.  Without them, memory is that of the gaps and one strip.
    progress : bool or callable
        True: a progress bar on stderr.  A callable is given the share done, in (0, 1].

    Returns
    -------
    Scan

    Raises
    ------
    ValueError
        If shapes do not fit, values are not finite, or scores overflow float32.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((2, 2, 300, 64))
    >>> one = scan(q, k)
    >>> one.gap.shape, float(one.gap[0, 0, 0])
    ((2, 5, 3), inf)
    """
    check_qk(q, k)
    check_order(order)
    heads, lq, head_dim = q.shape
    grid = Grid(tile, lq, k.shape[1], causal, window)
    scale = check_scale(softmax_scale, head_dim)
    gap = np.empty((heads, grid.groups, grid.key_tiles), np.float32)
    kept = np.empty((heads, lq, grid.key_tiles), np.float32) if keep_row_max else None
    masses = np.empty((heads, lq, grid.key_tiles), np.float32) if mass else None
    lse = np.empty((heads, lq), np.float32) if mass else None
    last, share = _last_tile(grid), heads // k.shape[0]
    work = np.cumsum(grid.visible() - grid.hidden())
    with _reporter(progress) as report:
        for h in range(heads):
            if h % share == 0:
                keys = np.ascontiguousarray(k[h // share], np.float32)
            for rows in strips(grid):
                queries = q[h, rows].astype(np.float32) * np.float32(scale)
                tile_max, tile_sum = tile_maxima_and_sums(queries, keys, grid, rows, sums=mass)
                if not (tile_max < np.inf).all():
                    raise ValueError("scores overflow float32: scale q or k down")
                strip_gap = _gap(tile_max, last[rows], grid.rows, order)  # [nk, groups]
                first = rows.start // grid.rows
                gap[h, first : first + strip_gap.shape[1]] = strip_gap.T
                if kept is not None:
                    kept[h, rows] = tile_max.T
                if masses is not None and lse is not None and tile_sum is not None:
                    probability, lse[h, rows] = _probabilities(tile_max, tile_sum)
                    masses[h, rows] = probability.T
                report((h + work[rows.stop - 1] / max(work[-1], 1)) / heads)
    return Scan(gap, grid, order, scale, kept, masses, lse)


class Attended(NamedTuple):
    """What :func:`attend` returns.

    ``output`` [Hq, Lq, Dv]; ``lse`` [Hq, Lq], natural log, over kept keys only;
    ``dropped_mass`` δ [Hq, Lq], the true softmax probability that fell into skipped tiles;
    ``dropped_mass_bound`` [Hq, Lq] ≥ δ, what a kernel can know without computing δ.
    """

    output: NDArray
    lse: NDArray
    dropped_mass: NDArray
    dropped_mass_bound: NDArray


def attend(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    tiles: TileMap,
    *,
    softmax_scale: float | None = None,
    progress: Progress = False,
) -> Attended:
    """Attention over the keys of computed tiles, and what leaving the others out has cost.

    Parameters
    ----------
    q : ndarray, shape [Hq, Lq, D]
    k : ndarray, shape [Hkv, Lk, D]
    v : ndarray, shape [Hkv, Lk, Dv]
    tiles : TileMap
        From :meth:`Scan.decide`.
    softmax_scale : float, optional
        Default D ** −0.5.
    progress : bool or callable
        As in :func:`scan`.

    Returns
    -------
    Attended
        float64 if q is, else float32.  A row that sees no key has output 0, lse −inf, bound 0.

    Raises
    ------
    ValueError
        If shapes do not fit each other or the tile map, or values are not finite.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 512, 64))
    >>> out = attend(4 * q, k, v, scan(4 * q, k).decide(threshold=0.01))
    >>> bool((out.dropped_mass <= out.dropped_mass_bound).all())
    True
    """
    check_qk(q, k)
    check_tensor("v", v)
    heads, lq, head_dim = q.shape
    grid = tiles.grid
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"k and v must share heads and length, got {k.shape} and {v.shape}")
    if tiles.state.shape[0] != heads or (grid.lq, grid.lk) != (lq, k.shape[1]):
        raise ValueError(
            f"the tile map is for {tiles.state.shape[0]} heads of {grid.lq} × {grid.lk}, "
            f"but q and k are {heads} heads of {lq} × {k.shape[1]}"
        )
    scale = check_scale(softmax_scale, head_dim)
    dtype = np.result_type(q.dtype, np.float32)
    output = np.zeros((heads, lq, v.shape[2]), dtype)
    lse, dropped, bound = (np.empty((heads, lq), dtype) for _ in range(3))
    share = heads // k.shape[0]
    with _reporter(progress) as report:
        for h in range(heads):
            if h % share == 0:
                keys = np.ascontiguousarray(k[h // share], dtype)
                values = np.ascontiguousarray(v[h // share], dtype)
            for rows in strips(grid):
                span = strip_tiles(grid, rows)
                queries = q[h, rows].astype(dtype) * dtype.type(scale)
                scores = chunk_scores(queries, keys, grid, rows, span)  # [tiles, keys, rows]
                skipped = tiles.skipped[h, np.arange(rows.start, rows.stop) // grid.rows, span].T
                tile_max = scores.max(axis=1)  # [n, rows]
                m = np.where(skipped, -np.inf, tile_max).max(axis=0, initial=-np.inf)
                lost = np.where(skipped, tile_max, -np.inf).max(axis=0, initial=-np.inf)
                scores -= finite_or_zero(np.where(skipped, lost, m).astype(dtype))[:, None]
                p = np.exp(scores, out=scores)
                tile_sum = p.sum(axis=1)
                l = np.where(skipped, 0, tile_sum).sum(axis=0)
                l_lost = np.where(skipped, tile_sum, 0).sum(axis=0)
                p *= ~skipped[:, None]
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    seen = values[span.start * grid.keys : span.stop * grid.keys]
                    acc = p.reshape(-1, p.shape[2])[: len(seen)].T @ seen
                    output[h, rows] = np.where(l[:, None] > 0, acc / l[:, None], 0)
                    lse[h, rows] = np.where(l > 0, m + np.log(l), -np.inf)
                    # δ = l_lost / (l_lost + l), each relative to its own maximum
                    dropped[h, rows] = np.where(
                        l_lost > 0, 1 / (1 + l / l_lost * np.exp(m - lost)), 0
                    )
                    weight = grid.visible_keys(rows)[:, span].T * np.exp(tile_max - m)
                    u = BOUND_SAFETY * np.where(skipped & (tile_max > -np.inf), weight, 0).sum(
                        axis=0
                    )
                    bound[h, rows] = np.where(u > 0, 1 / (1 + l / u), 0)
                report((h + rows.stop / lq) / heads)
    return Attended(output, lse, dropped, bound)


def _last_tile(grid: Grid) -> NDArray[np.int64]:
    """Last key tile that each row's vote group visits, [Lq]; −1 where it visits none."""
    return (grid.first_tile() + grid.visited() - 1).repeat(grid.rows)[: grid.lq]


def _running_max_before(tile_max: NDArray, last: NDArray[np.int64], order: str) -> NDArray:
    """Maximum of each row over the tiles visited before each tile, [key_tiles, rows]."""
    before = np.full_like(tile_max, -np.inf)
    steps = range(1, tile_max.shape[0])  # a loop: maximum.accumulate is four times slower here
    if order == "ascending":
        for j in steps:
            np.maximum(before[j - 1], tile_max[j - 1], out=before[j])
        return before
    for j in reversed(steps):
        np.maximum(before[j], tile_max[j], out=before[j - 1])
    if order == "ends_first":
        row = np.arange(tile_max.shape[1])
        np.maximum(before, tile_max[0], out=before)
        before[0] = tile_max[last, row]
        before[last, row] = -np.inf
    return before


def _row_gap(tile_max: NDArray, before: NDArray) -> NDArray:
    """Tile row max − running max: −inf where the row sees nothing, +inf where it sees its first."""
    with np.errstate(invalid="ignore"):
        row_gap = tile_max - before
    row_gap[tile_max == -np.inf] = -np.inf
    return row_gap


def _gap(tile_max: NDArray, last: NDArray[np.int64], rows: int, order: str) -> NDArray:
    """Gap of every tile from its row maxima: the largest of each group, [key_tiles, groups]."""
    row_gap = _row_gap(tile_max, _running_max_before(tile_max, last, order))
    return np.maximum.reduceat(row_gap, np.arange(0, tile_max.shape[1], rows), axis=1)


def _probabilities(tile_max: NDArray, tile_sum: NDArray) -> tuple[NDArray, NDArray]:
    """True softmax probability of each tile, [key_tiles, rows], and the dense lse, [rows]."""
    m = tile_max.max(axis=0)
    weight = tile_sum * np.exp(tile_max - finite_or_zero(m))
    l = weight.sum(axis=0)
    with np.errstate(divide="ignore"):
        return weight / np.maximum(l, np.finfo(l.dtype).tiny), m + np.log(l)


@contextmanager
def _reporter(progress: Progress) -> Iterator[Callable[[float], None]]:
    """Turn ``progress`` into a function of the share done."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda share: None
    else:
        from tqdm import tqdm

        with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
            yield lambda share: bar.update(100 * share - bar.n)
