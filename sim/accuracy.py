"""What skipping costs: dropped mass, the exact error identity, the certified bound."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.geometry import SKIPPED, TileMap
from sim.reference import attention
from sim.skip_softmax import BOUND_SAFETY, Scan


def dropped_mass(mass: NDArray[np.float32], tiles: TileMap) -> NDArray[np.float64]:
    """True softmax probability δ of each row that fell into skipped tiles.

    Parameters
    ----------
    mass : ndarray, shape [Hq, Lq, key_tiles], float32
        From ``scan(mass=True)``.
    tiles : TileMap

    Returns
    -------
    ndarray, shape [Hq, Lq], float64

    Examples
    --------
    >>> from sim.skip_softmax import scan
    >>> q, k = 4 * np.random.default_rng(0).standard_normal((2, 1, 512, 64))
    >>> one = scan(q, k, mass=True)
    >>> bool(dropped_mass(one.mass, one.decide(0.01)).max() < 0.5)
    True
    """
    return np.where(_skipped_rows(tiles), mass, 0).sum(axis=2, dtype=np.float64)


def dropped_mass_bound(scan: Scan, tiles: TileMap) -> NDArray[np.float64]:
    """Certified bound u / (l + u) ≥ δ of each row, with u from tile maxima alone.

    A skipped tile of n visible keys weighs at most n · exp(tile max − m); that is all a kernel
    needs to know of it.

    Parameters
    ----------
    scan : Scan
        Made with ``mass=True`` and the row maxima kept.
    tiles : TileMap

    Returns
    -------
    ndarray, shape [Hq, Lq], float64
        0 where nothing was skipped.

    Raises
    ------
    ValueError
        If the scan has no masses or no row maxima.
    """
    if scan.mass is None or scan.lse is None or scan.row_max is None:
        raise ValueError("the bound needs scan(mass=True, keep_row_max=True)")
    skipped = _skipped_rows(tiles)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        weight = scan.grid.visible_keys() * np.exp(scan.row_max - scan.lse[..., None])
        u = BOUND_SAFETY * np.where(skipped, weight, 0).sum(axis=2, dtype=np.float64)
        kept = 1 - dropped_mass(scan.mass, tiles)  # l, in the same units: shares of the dense sum
        return np.where(u > 0, u / (np.maximum(kept, 0) + u), 0)


def _skipped_rows(tiles: TileMap) -> NDArray[np.bool_]:
    """Whether each row's tile was skipped, [Hq, Lq, key_tiles]."""
    return tiles.skipped.repeat(tiles.grid.rows, axis=1)[:, : tiles.grid.lq]


class ErrorIdentity(NamedTuple):
    """The terms of y − ŷ = δ · (ȳ_skipped − ŷ), all float64.

    ``dense`` y, ``kept`` ŷ and ``skipped`` ȳ_skipped are [Hq, Lq, Dv]: attention over all keys,
    over the keys of computed tiles, over those of skipped tiles; ``dropped_mass`` is δ [Hq, Lq].
    """

    dense: NDArray[np.float64]
    kept: NDArray[np.float64]
    skipped: NDArray[np.float64]
    dropped_mass: NDArray[np.float64]

    @property
    def error(self) -> NDArray[np.float64]:
        """y − ŷ as the identity gives it, [Hq, Lq, Dv]."""
        return self.dropped_mass[..., None] * (self.skipped - self.kept)


def error_identity(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    tiles: TileMap,
    softmax_scale: float | None = None,
) -> ErrorIdentity:
    """Split dense attention into what was kept and what was skipped; exact, in float64.

    From it follows ‖y − ŷ‖ ≤ 2 δ max‖v‖.

    Parameters
    ----------
    q, k, v : ndarray
        [Hq, Lq, D], [Hkv, Lk, D], [Hkv, Lk, Dv].
    tiles : TileMap
    softmax_scale : float, optional
        Default D ** −0.5.

    Returns
    -------
    ErrorIdentity

    Examples
    --------
    >>> from sim.skip_softmax import scan
    >>> q, k, v = 3 * np.random.default_rng(0).standard_normal((3, 1, 512, 64))
    >>> parts = error_identity(q, k, v, scan(q, k).decide(0.01))
    >>> bool(abs(parts.dense - parts.kept - parts.error).max() < 1e-12)
    True
    """
    grid = tiles.grid
    complement = np.where(tiles.skipped, 1, np.where(tiles.visited, SKIPPED, 0)).astype(np.uint8)
    others = TileMap(complement, grid, tiles.order, tiles.threshold)
    whole, kept, lost = (
        attention(
            q,
            k,
            v,
            causal=grid.causal,
            window=grid.window,
            softmax_scale=softmax_scale,
            tiles=which,
        )
        for which in (None, tiles, others)
    )
    with np.errstate(invalid="ignore"):
        delta = np.where(lost.lse > -np.inf, np.exp(lost.lse - whole.lse), 0)
    return ErrorIdentity(whole.output, kept.output, lost.output, delta)
