"""The sparsity curve: what every threshold λ ≤ 1 skips, and what it costs, from one gap map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.geometry import Grid
from sim.threshold import ln_threshold


@dataclass(frozen=True)
class Curve:
    """Sparsity and dropped mass as step functions of λ.

    Entry c holds for ln λ in (gap[c], gap[c + 1]].

    Parameters
    ----------
    gap : ndarray, shape [n], float32
        Breakpoints in ascending order, natural-log units; the first is −inf.
    sparsity : ndarray, shape [n], float64
        Skipped ÷ visited tiles.
    pair_share : ndarray, shape [n], float64
        Share of visible (query, key) pairs that lie in skipped tiles: what P·V is spared.
    mean_dropped_mass, worst_dropped_mass : ndarray, shape [n], float64, or None
        True softmax probability that fell into skipped tiles: mean and maximum over rows.
        None unless scanned with ``mass=True``.
    """

    gap: NDArray[np.float32]
    sparsity: NDArray[np.float64]
    pair_share: NDArray[np.float64]
    mean_dropped_mass: NDArray[np.float64] | None
    worst_dropped_mass: NDArray[np.float64] | None

    @property
    def threshold(self) -> NDArray[np.float64]:
        """λ of each breakpoint, [n] float64."""
        return np.exp(self.gap.astype(np.float64))

    def at(self, thresholds: ArrayLike) -> Curve:
        """Sample the step functions.

        Parameters
        ----------
        thresholds : array, shape [n]
            λ values in [0, 1], in any order.

        Returns
        -------
        Curve
            Its ``gap`` is ln λ of each threshold.

        Raises
        ------
        ValueError
            If a threshold is outside [0, 1].
        """
        ln = np.atleast_1d(ln_threshold(thresholds))
        if (ln > 0).any():
            raise ValueError(f"a curve ends at threshold 1, got {np.max(thresholds)}")
        step = np.searchsorted(self.gap[1:], ln)

        def sample(values: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
            return None if values is None else values[step]

        return Curve(
            ln,
            self.sparsity[step],
            self.pair_share[step],
            sample(self.mean_dropped_mass),
            sample(self.worst_dropped_mass),
        )


def curve_of(gap: NDArray[np.float32], grid: Grid, mass: NDArray[np.float32] | None) -> Curve:
    """Build the curve of some heads together.

    Parameters
    ----------
    gap : ndarray, shape [H, groups, key_tiles], float32
    grid : Grid
    mass : ndarray, shape [H, Lq, key_tiles], float32, or None
        True softmax probability of each row in each tile.

    Returns
    -------
    Curve
    """
    flat = gap.ravel()
    skippable = np.flatnonzero((flat < 0) & (flat > -np.inf))
    ranking = skippable[np.argsort(flat[skippable], kind="stable")]
    breaks = np.concatenate([np.array([-np.inf], np.float32), flat[ranking]])
    visited = gap.shape[0] * int(grid.visited().sum())
    sparsity = np.arange(breaks.size) / max(visited, 1)
    pairs = grid.pairs()
    skipped_pairs = np.broadcast_to(pairs, gap.shape).ravel()[ranking].cumsum()
    total_pairs = gap.shape[0] * int(pairs.sum())
    pair_share = np.concatenate([[0.0], skipped_pairs / max(total_pairs, 1)])
    if mass is None:
        return Curve(breaks, sparsity, pair_share, None, None)
    tile_mass = np.empty(gap.shape)  # summed over the rows of the group
    worst = np.empty(gap.shape)  # what one row has lost once its group skips all up to this gap
    for h, i in np.ndindex(gap.shape[:2]):
        rows = mass[h, grid.group_rows(i)]
        by_gap = np.argsort(gap[h, i], kind="stable")
        tile_mass[h, i] = rows.sum(axis=0, dtype=np.float64)
        worst[h, i, by_gap] = rows[:, by_gap].cumsum(axis=1, dtype=np.float64).max(axis=0)
    mean = tile_mass.ravel()[ranking].cumsum() / (gap.shape[0] * grid.lq)
    worst_so_far = np.maximum.accumulate(worst.ravel()[ranking])
    return Curve(
        breaks,
        sparsity,
        pair_share,
        np.concatenate([[0.0], np.minimum(mean, 1)]),
        np.concatenate([[0.0], np.minimum(worst_so_far, 1)]),
    )
