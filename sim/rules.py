"""When to skip: the maximum rule and two others, walked through one vote group tile by tile.

Only the maximum rule with λ ≤ 1 is decided from one gap map; every other rule looks at sums
that its own skips change, so it is simulated in visit order.  All numbers come from a scan with
``mass=True``: no product is formed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sim.geometry import COMPUTED, MASKED, SKIPPED, TileMap

if TYPE_CHECKING:
    from sim.skip_softmax import Scan


class Rule(Protocol):
    """A rule votes for each row: True where the row agrees to skip the tile."""

    def skip(self, tile_max: NDArray, m: NDArray, l: NDArray, u: NDArray) -> NDArray[np.bool_]:
        """Vote.

        Parameters
        ----------
        tile_max : ndarray, shape [rows]
            Row maxima of the tile; finite.
        m, l : ndarray, shape [rows]
            Running maximum and running sum over kept keys, before this tile; m is finite.
        u : ndarray, shape [rows]
            Bound on the weight left out, in the units of l, *if* this tile is skipped too.

        Returns
        -------
        ndarray, shape [rows], bool
        """
        ...


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


@dataclass(frozen=True)
class Maximum:
    """Skip Softmax: exp(tile max − m) < λ."""

    threshold: float

    def __post_init__(self) -> None:
        _positive("threshold", self.threshold)

    def skip(self, tile_max: NDArray, m: NDArray, l: NDArray, u: NDArray) -> NDArray[np.bool_]:
        """Vote; see :class:`Rule`."""
        with np.errstate(divide="ignore"):
            return tile_max - m < np.log(np.float32(self.threshold))


@dataclass(frozen=True)
class NormalisedMaximum:
    """Compare with the running sum: exp(tile max − m) < λ · l.

    Source: flash-sparse-attention, issue 343.  λ bounds the *probability* of the tile's best
    key among what was kept, and is therefore much smaller at equal effect.
    """

    threshold: float

    def __post_init__(self) -> None:
        _positive("threshold", self.threshold)

    def skip(self, tile_max: NDArray, m: NDArray, l: NDArray, u: NDArray) -> NDArray[np.bool_]:
        """Vote; see :class:`Rule`."""
        return np.exp(tile_max - m) < self.threshold * l


@dataclass(frozen=True)
class MassBudget:
    """Skip only while u ≤ ε · l, which guarantees every row δ ≤ ε."""

    budget: float

    def __post_init__(self) -> None:
        _positive("budget", self.budget)

    def skip(self, tile_max: NDArray, m: NDArray, l: NDArray, u: NDArray) -> NDArray[np.bool_]:
        """Vote; see :class:`Rule`."""
        return u <= self.budget * l


class Step(NamedTuple):
    """One tile of a vote group's visit; arrays are per row of the group, [rows].

    ``tile_max``, ``gap`` (tile max − running max before the tile) and ``vote`` (agrees to skip)
    are what the decision saw; ``m``, ``l``, ``u`` and ``alpha`` are as the tile left them.
    ``forced`` says that the caller overruled the vote.
    """

    j: int
    tile_max: NDArray[np.float32]
    gap: NDArray[np.float32]
    vote: NDArray[np.bool_]
    skipped: bool
    forced: bool
    m: NDArray[np.float32]
    l: NDArray[np.float64]
    u: NDArray[np.float64]
    alpha: NDArray[np.float64]


def walk(
    scan: Scan, head: int, group: int, rule: Rule, forced: Mapping[int, bool] | None = None
) -> Iterator[Step]:
    """Visit the tiles of one vote group as a kernel does.

    Parameters
    ----------
    scan : Scan
        Made with ``mass=True`` and the row maxima kept.
    head, group : int
    rule : Rule
    forced : mapping of key tile to bool, optional
        True skips the tile, False keeps it, whatever the vote.

    Yields
    ------
    Step

    Raises
    ------
    ValueError
        If the scan has no masses or no row maxima.

    Examples
    --------
    >>> from sim import scan, workloads
    >>> q, k, *_ = workloads.local_band(1024)
    >>> steps = list(walk(scan(q, k, mass=True), 0, 15, Maximum(0.01)))
    >>> [step.j for step in steps]
    [7, 0, 6, 5, 4, 3, 2, 1]
    """
    if scan.mass is None or scan.lse is None or scan.row_max is None:
        raise ValueError("walking needs scan(mass=True, keep_row_max=True)")
    forced = forced or {}
    rows = scan.grid.group_rows(group)
    row_max, lse = scan.row_max[head, rows], scan.lse[head, rows].astype(np.float64)
    tile_mass, n_keys = scan.mass[head, rows], scan.grid.visible_keys(rows)
    m = np.full(row_max.shape[0], -np.inf, np.float32)
    l, u = np.zeros(m.shape), np.zeros(m.shape)
    for j in scan.grid.visit(scan.order, group).tolist():
        tile_max = row_max[:, j]
        sees, started = tile_max > -np.inf, m > -np.inf
        compares = sees & started
        gap = np.where(sees, np.float32(np.inf), np.float32(-np.inf))
        gap[compares] = tile_max[compares] - m[compares]
        left_out = u.copy()
        with np.errstate(over="ignore"):
            left_out[compares] += n_keys[compares, j] * np.exp(gap[compares].astype(np.float64))
            vote = ~sees
            vote[compares] = rule.skip(
                tile_max[compares], m[compares], l[compares], left_out[compares]
            )
        skipped = forced.get(j, bool(vote.all()))
        alpha = np.ones(m.shape)
        if skipped:
            u = np.where(sees & ~started, np.inf, left_out)  # forced before anything was kept
        else:
            new = np.maximum(m, tile_max)
            with np.errstate(invalid="ignore"):
                alpha = np.where(
                    started, np.exp((m - new).astype(np.float64)), np.where(sees, 0, 1)
                )
                share = np.exp(lse - new) * tile_mass[:, j]
                l = np.where(sees, np.where(started, l * alpha, 0) + share, l)
                u = np.where(u > 0, u * np.where(started, alpha, 1), 0)
            m = new
        yield Step(j, tile_max, gap, vote, skipped, j in forced, m, l, u, alpha)


def decide(
    scan: Scan,
    rule: Rule,
    *,
    forced: Mapping[tuple[int, int, int], bool] | None = None,
    progress: Callable[[float], None] | None = None,
) -> TileMap:
    """Decide every tile by a rule, in sequence.

    Parameters
    ----------
    scan : Scan
        Made with ``mass=True`` and the row maxima kept.
    rule : Rule
    forced : mapping of (head, group, key tile) to bool, optional
        True skips the tile, False keeps it; what follows in its group sees the consequence.
    progress : callable, optional
        Given the share done, in (0, 1].

    Returns
    -------
    TileMap
        Its ``threshold`` is NaN for rules that have none.

    Examples
    --------
    >>> from sim import accuracy, scan, workloads
    >>> q, k, *_ = workloads.local_band(1024)
    >>> one = scan(q, k, mass=True)
    >>> tiles = decide(one, MassBudget(0.01))
    >>> bool(accuracy.dropped_mass(one.mass, tiles).max() <= 0.01)
    True
    """
    heads, grid = scan.gap.shape[0], scan.grid
    by_group: dict[tuple[int, int], dict[int, bool]] = {}
    for (h, i, j), skip in (forced or {}).items():
        if not (0 <= h < heads and 0 <= i < grid.groups and 0 <= j < grid.key_tiles):
            raise ValueError(f"there is no tile {(h, i, j)} to force")
        by_group.setdefault((h, i), {})[j] = skip
    state = np.full(scan.gap.shape, MASKED, np.uint8)
    for h in range(heads):
        for i in range(grid.groups):
            for step in walk(scan, h, i, rule, by_group.get((h, i))):
                state[h, i, step.j] = SKIPPED if step.skipped else COMPUTED
            if progress is not None:
                progress((h * grid.groups + i + 1) / (heads * grid.groups))
    lam = rule.threshold if isinstance(rule, Maximum) else np.nan
    return TileMap(state, grid, scan.order, np.full(heads, lam))
