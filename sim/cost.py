"""What tiles cost: floating-point operations, exponentials and bytes, by tile state.

Counted over visible (query, key) pairs, so a tile on the causal diagonal counts for the part
of it that is seen.  A skipped tile has cost its Q·Kᵀ and its K bytes; whether its V was loaded
depends on the kernel: prefill kernels load it, decode kernels do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.geometry import COMPUTED, SKIPPED, TileMap


@dataclass(frozen=True)
class Work:
    """Operations and bytes of some tiles."""

    qk_flops: int
    pv_flops: int
    exponentials: int
    k_bytes: int
    v_bytes: int

    @property
    def matrix_flops(self) -> int:
        """Operations of both matrix products."""
        return self.qk_flops + self.pv_flops

    def __add__(self, other: Work) -> Work:
        """Work of both."""
        return Work(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


@dataclass(frozen=True)
class Ledger:
    """Work by tile state, and that of dense attention over the same visited tiles."""

    computed: Work
    skipped: Work
    dense: Work

    @property
    def total(self) -> Work:
        """What skip-softmax attention does."""
        return self.computed + self.skipped

    @property
    def matrix_work_ratio(self) -> float:
        """Dense matrix operations ÷ ours: below 2, because Q·Kᵀ is never skipped."""
        return self.dense.matrix_flops / max(self.total.matrix_flops, 1)


def matrix_work_ratio(
    pair_share: NDArray[np.float64], head_dim: int, v_head_dim: int | None = None
) -> NDArray[np.float64]:
    """Dense matrix operations ÷ ours, where this share of pairs lies in skipped tiles.

    Parameters
    ----------
    pair_share : float or array
        Such as :attr:`sim.curve.Curve.pair_share`.
    head_dim : int
    v_head_dim : int, optional
        Default ``head_dim``.

    Returns
    -------
    ndarray, float64
        1 … 1 + v_head_dim / head_dim.

    Examples
    --------
    >>> float(matrix_work_ratio(0.5, 64))
    1.3333333333333333
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    dense = head_dim + v_head_dim
    return dense / (dense - v_head_dim * np.asarray(pair_share, np.float64))


def ledger(
    tiles: TileMap,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    element_bytes: int = 2,
    spares_v: bool = False,
) -> Ledger:
    """Count the work of a tile map.

    Parameters
    ----------
    tiles : TileMap
    head_dim : int
    v_head_dim : int, optional
        Default ``head_dim``.
    element_bytes : int
        Of K and V; 2 for fp16 and bf16.
    spares_v : bool
        Whether V of a skipped tile is not loaded, as in decode kernels.

    Returns
    -------
    Ledger
        Bytes are of K and V tiles as each vote group asks for them, before any cache.

    Examples
    --------
    >>> from sim import scan, workloads
    >>> work = workloads.columns(2048, heads=1, sparsity=0.5)
    >>> round(ledger(scan(work.q, work.k).decide(0.01), 128).matrix_work_ratio, 2)
    1.36
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    grid = tiles.grid
    pairs = grid.pairs()
    ends = np.minimum((np.arange(grid.key_tiles) + 1) * grid.keys, grid.lk)
    keys = np.broadcast_to(np.diff(ends, prepend=0), pairs.shape)

    def work(which: np.ndarray, *, skipped: bool) -> Work:
        n_pairs = int((which * pairs).sum())
        n_keys = int((which * keys).sum())
        return Work(
            qk_flops=2 * head_dim * n_pairs,
            pv_flops=0 if skipped else 2 * v_head_dim * n_pairs,
            exponentials=0 if skipped else n_pairs,
            k_bytes=element_bytes * head_dim * n_keys,
            v_bytes=0 if skipped and spares_v else element_bytes * v_head_dim * n_keys,
        )

    return Ledger(
        computed=work(tiles.state == COMPUTED, skipped=False),
        skipped=work(tiles.state == SKIPPED, skipped=True),
        dense=work(tiles.visited, skipped=False),
    )
