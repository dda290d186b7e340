"""Decode: one query row per head against a KV cache that several CTAs may share.

A *step* is one new token of one request; its ``length`` counts the keys it sees, its own
included.  The vote group is the heads that share a KV head (or one head alone), the cache is cut
into key tiles, and the tiles are dealt out to *splits*, each with its own running maximum.  A
plain split never skips its first tile.  A seeded split starts at m = the larger row maximum of
tile 0 (the attention sink) and of the newest tile, and so needs no special first tile.
As in prefill, for λ ≤ 1 no gap depends on λ, so one scan decides every threshold.
Sources: BLASST, arXiv 2512.12087; the split and the vote are those of TensorRT-LLM's ``xqa``
(interleaved) and ``trtllm-gen`` (contiguous) kernels; the seed is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.geometry import COMPUTED, MASKED, SKIPPED, check_order, visit_order
from sim.scores import STRIP_KEYS, STRIP_ROWS, check_qk, check_scale, check_tensor, finite_or_zero
from sim.skip_softmax import BOUND_SAFETY
from sim.threshold import for_target_sparsity, ln_threshold, resolve

VOTES = ("head", "group")
"""Who decides: each query head alone, or the heads of one GQA group together."""

LAYOUTS = ("interleaved", "contiguous")
"""Which tiles a split gets: j, j + splits, j + 2 splits, …; or a run of neighbours."""


@dataclass(frozen=True, eq=False)
class DecodeGrid:
    """Which tiles there are at each step, who votes on them, and which split visits them when.

    Parameters
    ----------
    lengths : ndarray, shape [steps], int64
        Keys that each step sees, its own included.
    cache : int
        Keys of the whole cache, at least the longest length.
    heads, kv_heads : int
        Query heads and KV heads.
    keys : int
        Keys of a tile.
    order : str
        Visit order, within each split.
    vote : {"head", "group"}
    splits : int
        CTAs that share the cache.
    split_layout : {"interleaved", "contiguous"}
    seeded : bool

    Raises
    ------
    ValueError
        If a count is below 1, a length is out of range, heads do not divide, or a name is
        unknown.

    Examples
    --------
    >>> grid = DecodeGrid(np.array([300]), 512, heads=4, kv_heads=2, keys=64, splits=2)
    >>> grid.key_tiles, grid.votes, [lane.tolist() for lane in grid.lanes(5)]
    (8, 2, [[0, 2, 4], [1, 3]])
    """

    lengths: NDArray[np.int64]
    cache: int
    heads: int
    kv_heads: int
    keys: int = 64
    order: str = "ascending"
    vote: str = "group"
    splits: int = 1
    split_layout: str = "interleaved"
    seeded: bool = False

    def __post_init__(self) -> None:
        for name in ("cache", "heads", "kv_heads", "keys", "splits"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        lengths = np.asarray(self.lengths)
        if lengths.ndim != 1 or not lengths.size or lengths.dtype.kind not in "iu":
            raise ValueError(
                f"lengths must be integers [steps], got {lengths.dtype} of shape {lengths.shape}"
            )
        if lengths.min() < 1 or lengths.max() > self.cache:
            raise ValueError(
                f"lengths must lie between 1 and the {self.cache} keys of the cache, "
                f"got {lengths.min()} … {lengths.max()}"
            )
        object.__setattr__(self, "lengths", lengths.astype(np.int64))
        if self.heads % self.kv_heads:
            raise ValueError(
                f"query heads must be a multiple of KV heads, got {self.heads} and {self.kv_heads}"
            )
        check_order(self.order)
        _choice("vote", self.vote, VOTES)
        _choice("split_layout", self.split_layout, LAYOUTS)
        object.__setattr__(self, "seeded", bool(self.seeded))

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.lengths.size

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def votes(self) -> int:
        """Vote groups of a step: its KV heads, or its query heads where each votes alone."""
        return self.kv_heads if self.vote == "group" else self.heads

    @property
    def key_tiles(self) -> int:
        """Tiles of the whole cache."""
        return -(-self.cache // self.keys)

    def visited(self) -> NDArray[np.int64]:
        """Tiles that each step visits, [steps]."""
        return -(-self.lengths // self.keys)

    def visited_tiles(self) -> NDArray[np.bool_]:
        """Whether a step visits a tile, [steps, key_tiles]."""
        return np.arange(self.key_tiles) < self.visited()[:, None]

    def visible_keys(self) -> NDArray[np.int64]:
        """Keys that each step sees in each tile, [steps, key_tiles]."""
        return np.clip(self.lengths[:, None] - np.arange(self.key_tiles) * self.keys, 0, self.keys)

    def split_of(self, n: int) -> NDArray[np.int64]:
        """Split that visits each of a step's ``n`` tiles, [n].

        Contiguous split s has tiles ⌊s·n / splits⌋ … ⌊(s+1)·n / splits⌋ − 1: as even as whole
        tiles can be.
        """
        tile = np.arange(n)
        if self.split_layout == "interleaved":
            return tile % self.splits
        return ((tile + 1) * self.splits - 1) // n

    def lanes(self, n: int) -> list[NDArray[np.int64]]:
        """Tiles of each split in the order in which it visits them, for a step of ``n`` tiles.

        Orders are within the split: ``ends_first`` is its last tile, its first, then back.
        A split may be empty.
        """
        split_of = self.split_of(n)
        tiles = (np.flatnonzero(split_of == s) for s in range(self.splits))
        return [lane[visit_order(self.order, lane.size)] for lane in tiles]


@dataclass(frozen=True, eq=False)
class DecodeScan:
    """What one pass over Q·Kᵀ tells about every tile of every step, for every threshold ≤ 1.

    Made by :func:`scan_decode`; arrays are indexed by key tile, not by visit step.

    Parameters
    ----------
    gap : ndarray, shape [steps, votes, key_tiles], float32
        Natural-log units, after the scale; +inf for the first tile of a plain split, −inf for
        tiles not visited.
    grid : DecodeGrid
    softmax_scale : float
    mass : ndarray, shape [steps, Hq, key_tiles], float32, or None
        True softmax probability of each head in each tile.
    """

    gap: NDArray[np.float32]
    grid: DecodeGrid
    softmax_scale: float
    mass: NDArray[np.float32] | None = None

    @cached_property
    def visited(self) -> NDArray[np.bool_]:
        """Whether a tile is visited, [steps, votes, key_tiles] bool."""
        return np.broadcast_to(self.grid.visited_tiles()[:, None], self.gap.shape)

    def decide(
        self,
        threshold: ArrayLike | None = None,
        *,
        threshold_scale_factor: ArrayLike | None = None,
        target_sparsity: float | None = None,
    ) -> DecodeTiles:
        """Say which tiles are skipped.

        Parameters
        ----------
        threshold : float or array [votes], optional
            λ, at most 1.  Larger skips more.
        threshold_scale_factor : float or array [votes], optional
            λ = factor / length of each step.  Where that exceeds 1 the step is dense, and
            marked in :attr:`DecodeTiles.short_context`.
        target_sparsity : float, optional
            The one λ that skips at most this share of all visited tiles.

        Returns
        -------
        DecodeTiles

        Raises
        ------
        ValueError
            If not exactly one of the three is given, or a value is out of range.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> q, k = 4 * rng.standard_normal((1, 4, 64)), rng.standard_normal((2, 512, 64))
        >>> tiles = scan_decode(q, k, [500]).decide(threshold_scale_factor=5)
        >>> tiles.state.shape, float(tiles.threshold[0, 0])
        ((1, 2, 8), 0.01)
        """
        given = (threshold, threshold_scale_factor, target_sparsity)
        if sum(one is not None for one in given) != 1:
            raise ValueError("give threshold, threshold_scale_factor or target_sparsity, only one")
        if target_sparsity is not None:
            threshold = for_target_sparsity(self.gap, target_sparsity)
        lengths = self.grid.lengths.tolist()
        asked = np.stack([resolve(threshold, threshold_scale_factor, n, "allow") for n in lengths])
        if threshold_scale_factor is None and (asked > 1).any():
            raise ValueError(
                f"threshold must be at most 1 in decode, got {threshold!r}: above 1 a split may "
                "skip the tile that holds a row's maximum"
            )
        if asked.shape[1:] not in ((), (self.grid.votes,)):
            raise ValueError(
                f"one threshold, or one for each of {self.grid.votes} votes; "
                f"got shape {asked.shape[1:]}"
            )
        asked = np.broadcast_to(asked.reshape(self.grid.steps, -1), self.gap.shape[:2])
        short = asked > 1
        lam = np.where(short, 0.0, asked)
        skip = self.gap < ln_threshold(lam)[..., None]
        state = np.where(skip, SKIPPED, COMPUTED).astype(np.uint8)
        state[~self.visited] = MASKED
        return DecodeTiles(state, self.grid, lam, short)

    def dropped_mass(self, tiles: DecodeTiles) -> NDArray[np.float64]:
        """True softmax probability δ of each head that fell into skipped tiles.

        Parameters
        ----------
        tiles : DecodeTiles

        Returns
        -------
        ndarray, shape [steps, Hq], float64

        Raises
        ------
        ValueError
            If the scan has no masses.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> q, k = 4 * rng.standard_normal((1, 4, 64)), rng.standard_normal((2, 512, 64))
        >>> one = scan_decode(q, k, [500], mass=True)
        >>> one.dropped_mass(one.decide(0.0)).tolist()
        [[0.0, 0.0, 0.0, 0.0]]
        """
        if self.mass is None:
            raise ValueError("the dropped mass needs scan_decode(mass=True)")
        skipped = tiles.skipped.repeat(self.mass.shape[1] // tiles.skipped.shape[1], axis=1)
        return np.where(skipped, self.mass, 0).sum(axis=2, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class DecodeTiles:
    """The state of every tile of every step.

    Parameters
    ----------
    state : ndarray, shape [steps, votes, key_tiles], uint8
        MASKED (0, not visited), COMPUTED (1) or SKIPPED (2), indexed by key tile.
    grid : DecodeGrid
    threshold : ndarray, shape [steps, votes], float64
        The λ each step was decided with; 0 where it was computed densely.
    short_context : ndarray, shape [steps, votes], bool
        Whether it was computed densely because factor / length exceeds 1.
    """

    state: NDArray[np.uint8]
    grid: DecodeGrid
    threshold: NDArray[np.float64]
    short_context: NDArray[np.bool_]

    @cached_property
    def visited(self) -> NDArray[np.bool_]:
        """Whether a tile is visited, [steps, votes, key_tiles] bool."""
        return self.state != MASKED

    @cached_property
    def skipped(self) -> NDArray[np.bool_]:
        """Whether a tile is skipped, [steps, votes, key_tiles] bool."""
        return self.state == SKIPPED

    @property
    def sparsity(self) -> NDArray[np.float64]:
        """Skipped ÷ visited tiles per vote, [votes] float64; first tiles count as visited."""
        visited = np.count_nonzero(self.visited, axis=(0, 2))
        return np.count_nonzero(self.skipped, axis=(0, 2)) / visited


def scan_decode(
    q: NDArray,
    k: NDArray,
    lengths: ArrayLike,
    *,
    keys: int = 64,
    order: str = "ascending",
    vote: str = "group",
    splits: int = 1,
    split_layout: str = "interleaved",
    seeded: bool = False,
    softmax_scale: float | None = None,
    mass: bool = False,
) -> DecodeScan:
    """Form Q·Kᵀ of every step once and keep the gap of every tile.

    Parameters
    ----------
    q : ndarray, shape [steps, Hq, D], any float dtype
        One new token per step.  Computed in float32.
    k : ndarray, shape [Hkv, L, D], any float dtype
        The cache as it is after the last step.  Query head h uses KV head h // (Hq / Hkv).
    lengths : array of int, shape [steps]
        Keys that each step sees, its own included: 1 … L, in any order.
    keys : int
        Keys of a tile.
    order : {"ascending", "descending", "ends_first"}
        Visit order within each split.
    vote : {"group", "head"}
        All heads of a GQA group must agree, or each decides alone.  The running maxima are the
        same either way, so a group's gap is the largest of its heads' gaps.
    splits : int
        CTAs that share the cache; more than there are tiles leaves some of them empty.
    split_layout : {"interleaved", "contiguous"}
        Tile j goes to split j % splits, or each split gets a run of tiles, as even as possible.
    seeded : bool
        Start every split at the larger row maximum of tile 0 and of the newest tile, instead of
        never skipping its first tile.
    softmax_scale : float, optional
        Default D ** −0.5.
    mass : bool
        Also keep each head's true softmax probability per tile.

    Returns
    -------
    DecodeScan

    Raises
    ------
    ValueError
        If shapes do not fit, a length is out of range, values are not finite, or scores
        overflow float32.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((3, 4, 64)), rng.standard_normal((2, 200, 64))
    >>> one = scan_decode(q, k, [198, 199, 200], seeded=True)
    >>> one.gap.shape, float(one.gap.max()) < np.inf
    ((3, 2, 4), True)
    """
    _check_q(q, k)
    steps, heads, head_dim = q.shape
    grid = DecodeGrid(
        np.asarray(lengths),
        k.shape[1],
        heads,
        k.shape[0],
        keys,
        order,
        vote,
        splits,
        split_layout,
        seeded,
    )
    if grid.steps != steps:
        raise ValueError(f"lengths must have one entry a step, got {grid.steps} for {steps} steps")
    scale = check_scale(softmax_scale, head_dim)
    gap = np.full((steps, grid.votes, grid.key_tiles), -np.inf, np.float32)
    masses = np.zeros((steps, heads, grid.key_tiles), np.float32) if mass else None
    group, n_tiles = grid.group, grid.visited()
    strip = max(STRIP_ROWS // group, 1)
    for kv in range(grid.kv_heads):
        cache = np.ascontiguousarray(k[kv], np.float32)
        head = slice(kv * group, (kv + 1) * group)
        voter = slice(kv, kv + 1) if vote == "group" else head
        for n in np.unique(n_tiles):  # steps with as many tiles deal them out alike
            alike, lanes = np.flatnonzero(n_tiles == n), grid.lanes(int(n))
            for start in range(0, alike.size, strip):
                which = alike[start : start + strip]
                queries = q[which, head].reshape(-1, head_dim).astype(np.float32)
                queries *= np.float32(scale)
                seen = grid.lengths[which].repeat(group)
                tile_max, tile_sum = _maxima_and_sums(queries, cache, seen, grid.keys, sums=mass)
                if not (np.abs(tile_max) < np.inf).all():
                    raise ValueError("scores overflow float32: scale q or k down")
                row_gap = tile_max - _running_max_before(tile_max, lanes, grid.seeded)
                votes = row_gap.reshape(n, which.size, group)
                if vote == "group":
                    votes = votes.max(axis=2, keepdims=True)
                gap[which, voter, :n] = votes.transpose(1, 2, 0)
                if masses is not None and tile_sum is not None:
                    weight = tile_sum * np.exp(tile_max - tile_max.max(axis=0))
                    share = (weight / weight.sum(axis=0)).reshape(n, which.size, group)
                    masses[which, head, :n] = share.transpose(1, 2, 0)
    return DecodeScan(gap, grid, scale, masses)


class AttendedDecode(NamedTuple):
    """What :func:`attend_decode` returns.

    ``output`` [steps, Hq, Dv]; ``lse`` [steps, Hq], natural log, over kept keys only;
    ``dropped_mass`` δ [steps, Hq], the true softmax probability that fell into skipped tiles;
    ``dropped_mass_bound`` [steps, Hq] ≥ δ, what a kernel can know without computing δ;
    ``split_lse`` [steps, Hq, splits], −inf for a split that is empty or wholly skipped.
    """

    output: NDArray
    lse: NDArray
    dropped_mass: NDArray
    dropped_mass_bound: NDArray
    split_lse: NDArray


def attend_decode(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    tiles: DecodeTiles,
    *,
    softmax_scale: float | None = None,
) -> AttendedDecode:
    """Attention over the keys of computed tiles, split by split, merged by lse.

    Parameters
    ----------
    q : ndarray, shape [steps, Hq, D]
    k : ndarray, shape [Hkv, L, D]
    v : ndarray, shape [Hkv, L, Dv]
    tiles : DecodeTiles
        From :meth:`DecodeScan.decide`.
    softmax_scale : float, optional
        Default D ** −0.5.

    Returns
    -------
    AttendedDecode
        float64 if q is, else float32.

    Raises
    ------
    ValueError
        If shapes do not fit each other or the tiles, or values are not finite.

    Notes
    -----
    A wholly skipped split has weight 0 in output and lse, but what it left out still counts in
    the bound: a kernel's splits hand over u beside l, relative to the same m, not lse alone.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = 4 * rng.standard_normal((1, 2, 64)), *rng.standard_normal((2, 1, 512, 64))
    >>> tiles = scan_decode(q, k, [512], splits=4, seeded=True).decide(0.01)
    >>> out = attend_decode(q, k, v, tiles)
    >>> bool((out.dropped_mass <= out.dropped_mass_bound).all()), out.split_lse.shape
    (True, (1, 2, 4))
    """
    _check_q(q, k)
    check_tensor("v", v)
    grid = tiles.grid
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"k and v must share heads and length, got {k.shape} and {v.shape}")
    steps, heads, head_dim = q.shape
    if (grid.steps, grid.heads, grid.kv_heads, grid.cache) != (steps, heads, *k.shape[:2]):
        raise ValueError(
            f"the tiles are of {grid.steps} steps, {grid.heads} query and {grid.kv_heads} KV "
            f"heads and {grid.cache} keys, but q and k are of {steps}, {heads}, {k.shape[0]} "
            f"and {k.shape[1]}"
        )
    scale = check_scale(softmax_scale, head_dim)
    dtype = np.result_type(q.dtype, np.float32)
    output = np.empty((steps, heads, v.shape[2]), dtype)
    lse, dropped, bound = (np.empty((steps, heads), dtype) for _ in range(3))
    split_lse = np.empty((steps, heads, grid.splits), dtype)
    skipped = tiles.skipped.repeat(heads // grid.votes, axis=1)  # [steps, Hq, key_tiles]
    visible_keys = grid.visible_keys()
    values = np.zeros((grid.key_tiles, grid.keys, v.shape[2]), dtype)
    for kv in range(grid.kv_heads):
        head = slice(kv * grid.group, (kv + 1) * grid.group)
        cache = np.ascontiguousarray(k[kv], dtype)
        values.reshape(-1, v.shape[2])[: grid.cache] = v[kv]
        for t, (length, n) in enumerate(zip(grid.lengths, grid.visited(), strict=True)):
            queries = q[t, head].astype(dtype) * dtype.type(scale)
            scores = np.full((n, grid.keys, grid.group), -np.inf, dtype)
            np.matmul(cache[:length], queries.T, out=scores.reshape(-1, grid.group)[:length])
            skip = skipped[t, head, :n].T
            parts, part_lse, lost, u = _attend_splits(
                scores, values, skip, grid.lanes(n), visible_keys[t, :n]
            )
            whole = _log_sum(part_lse)
            weight = np.exp(part_lse - finite_or_zero(whole))  # 0 for a wholly skipped split
            output[t, head] = (parts * weight[..., None]).sum(axis=0)
            lse[t, head], split_lse[t, head] = whole, part_lse.T
            dropped[t, head], bound[t, head] = _share(lost, whole), _share(u, whole)
    return AttendedDecode(output, lse, dropped, bound, split_lse)


def _attend_splits(
    scores: NDArray,
    values: NDArray,
    skip: NDArray[np.bool_],
    lanes: list[NDArray[np.int64]],
    visible_keys: NDArray[np.int64],
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Attend one step of one KV head.

    ``scores`` [n, keys, rows] are overwritten, ``values`` are [≥ n, keys, Dv], ``skip`` [n, rows].
    Returns each split's output [splits, rows, Dv] and lse [splits, rows], and of the skipped
    tiles the lse [rows] and ln u [rows].  (A sum of u over the splits, each weighed as its l is,
    is the sum over all skipped tiles.)
    """
    tile_max = scores.max(axis=1)  # [n, rows]
    scores -= tile_max[:, None]
    p = np.exp(scores, out=scores)
    tile_sum = p.sum(axis=1)
    kept_max = np.where(skip, -np.inf, tile_max)
    outputs, lses = [], []
    for lane in lanes:
        m = kept_max[lane].max(axis=0, initial=-np.inf)
        weight = np.exp(kept_max[lane] - finite_or_zero(m))  # [tiles of the split, rows]
        l = (weight * tile_sum[lane]).sum(axis=0)
        weighted = (p[lane] * weight[:, None]).reshape(-1, l.size)  # [keys of the split, rows]
        acc = weighted.T @ values[lane].reshape(-1, values.shape[2])
        outputs.append(acc / np.where(l > 0, l, 1)[:, None])
        with np.errstate(divide="ignore"):
            lses.append(m + np.log(l))
    lost_max = np.where(skip, tile_max, -np.inf)
    u = lost_max + np.log(BOUND_SAFETY * visible_keys[:, None])
    return np.stack(outputs), np.stack(lses), _log_sum(lost_max + np.log(tile_sum)), _log_sum(u)


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that decode moves, summed over all steps.

    ``k`` and ``v`` as read, ``dense_v`` what V would be with nothing skipped, ``page_table`` as
    read, ``partials`` written once and read once by the merge.
    """

    k: int
    v: int
    dense_v: int
    page_table: int
    partials: int

    @property
    def total(self) -> int:
        """Bytes that are moved."""
        return self.dense - self.dense_v + self.v

    @property
    def dense(self) -> int:
        """Bytes that would be moved with nothing skipped."""
        return self.k + self.dense_v + self.page_table + self.partials


def decode_bytes(
    tiles: DecodeTiles,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    element_bytes: int = 2,
    page: int | None = None,
) -> DecodeBytes:
    """Count the bytes of some decode steps: K of every tile, V of kept tiles only.

    Parameters
    ----------
    tiles : DecodeTiles
        Where heads vote alone, V of a tile is read if any head of its group keeps it.
    head_dim : int
    v_head_dim : int, optional
        Default ``head_dim``.
    element_bytes : int
        Of K and V; 2 for fp16 and bf16.
    page : int, optional
        Tokens of a page.  Its 4-byte entry is read once per KV head, before any cache.

    Returns
    -------
    DecodeBytes
        With more than one split, each query head of each split leaves a partial result of
        float32: acc, and what the merge weighs l and u with, one number each.

    Raises
    ------
    ValueError
        If a size is below 1.

    Examples
    --------
    >>> q, k = np.ones((1, 4, 64)), np.ones((2, 512, 64))
    >>> tiles = scan_decode(q, k, [512]).decide(0.0)
    >>> decode_bytes(tiles, 64, page=16)
    DecodeBytes(k=131072, v=131072, dense_v=131072, page_table=256, partials=0)
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    sizes = {"head_dim": head_dim, "v_head_dim": v_head_dim, "element_bytes": element_bytes}
    for name, size in (sizes if page is None else sizes | {"page": page}).items():
        _count(name, size)
    grid = tiles.grid
    read = (tiles.state == COMPUTED).reshape(grid.steps, grid.kv_heads, -1, grid.key_tiles)
    kept_keys = int((read.any(axis=2) * grid.visible_keys()[:, None]).sum())
    all_keys = grid.kv_heads * int(grid.lengths.sum())
    entries = 0 if page is None else grid.kv_heads * int((-(-grid.lengths // page)).sum())
    partials = grid.steps * grid.heads * grid.splits if grid.splits > 1 else 0
    return DecodeBytes(
        k=element_bytes * head_dim * all_keys,
        v=element_bytes * v_head_dim * kept_keys,
        dense_v=element_bytes * v_head_dim * all_keys,
        page_table=4 * entries,
        partials=2 * 4 * (v_head_dim + 2) * partials,
    )


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_q(q: NDArray, k: NDArray) -> None:
    """Raise ValueError unless q [steps, Hq, D] and k [Hkv, L, D] fit each other."""
    if not isinstance(q, np.ndarray) or q.ndim != 3:
        got = f"shape {q.shape}" if isinstance(q, np.ndarray) else type(q).__name__
        raise ValueError(f"q must be an array [steps, heads, head_dim], got {got}")
    check_qk(q.swapaxes(0, 1), k)


def _maxima_and_sums(
    queries: NDArray, cache: NDArray, seen: NDArray[np.int64], keys: int, *, sums: bool
) -> tuple[NDArray, NDArray | None]:
    """Row maximum of every visited tile, and Σ exp(score − that maximum) if asked for.

    ``queries`` [rows, D] are already scaled; row r sees the first ``seen[r]`` keys of ``cache``,
    and all rows end in the same tile.  Returns [tiles, rows] each.
    """
    rows, n = queries.shape[0], -(-int(seen[0]) // keys)
    tile_max = np.empty((n, rows), queries.dtype)
    tile_sum = np.empty((n, rows), queries.dtype) if sums else None
    step = max(STRIP_KEYS // keys, 1)
    for first in range(0, n, step):
        last = min(first + step, n)
        start, stop = first * keys, min(last * keys, int(seen.max()))
        scores = np.full(((last - first) * keys, rows), -np.inf, queries.dtype)
        np.matmul(cache[start:stop], queries.T, out=scores[: stop - start])
        if last == n:
            scores[: stop - start][np.arange(start, stop)[:, None] >= seen] = -np.inf
        by_tile = scores.reshape(-1, keys, rows)
        np.maximum.reduce(by_tile, axis=1, out=tile_max[first:last])
        if tile_sum is not None:
            by_tile -= tile_max[first:last, None]
            np.exp(by_tile, out=by_tile)
            np.add.reduce(by_tile, axis=1, out=tile_sum[first:last])
    return tile_max, tile_sum


def _running_max_before(tile_max: NDArray, lanes: list[NDArray[np.int64]], seeded: bool) -> NDArray:
    """Running maximum of each row in its split before each tile, [tiles, rows], for λ ≤ 1."""
    before = np.full_like(tile_max, -np.inf)
    for lane in lanes:
        before[lane[1:]] = np.maximum.accumulate(tile_max[lane[:-1]], axis=0)
    return np.maximum(before, np.maximum(tile_max[0], tile_max[-1])) if seeded else before


def _log_sum(ln: NDArray) -> NDArray:
    """Ln of the sum of exponentials over the first axis; −inf where all are −inf."""
    m = ln.max(axis=0)
    with np.errstate(divide="ignore"):
        return m + np.log(np.exp(ln - finite_or_zero(m)).sum(axis=0))


def _share(ln_part: NDArray, ln_rest: NDArray) -> NDArray:
    """Part / (part + rest), each given as its logarithm; 0 where the part is."""
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(ln_rest - finite_or_zero(ln_part)))
    return np.where(ln_part > -np.inf, share, 0)
