"""What a call says about itself: which tiles it skipped, and what that can have cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels import arrays
from sim.geometry import Grid, TileMap


@dataclass(frozen=True, repr=False)
class SkipReport:
    """What a call skipped and what that can have cost.

    Arrays are of the caller's library and stay on its device; ``tiles`` and ``sparsity`` are
    fetched to the host when they are first asked for.

    Parameters
    ----------
    state : array, shape [B, Hq, groups, key_tiles], uint8
        0 masked, 1 computed, 2 skipped.
    gap : array, shape [B, Hq, groups, key_tiles], float32, or None
        Natural-log units; +inf for the first visited tile, −inf where masked.
    lse : array, shape [B, Hq, Lq], float32
        Natural log, over kept keys only.
    dropped_mass_bound : array, shape [B, Hq, Lq], float32
        Certified: the true softmax probability that fell into skipped tiles is at most this.
    grid : Grid
    order : str
    threshold : ndarray, shape [B, Hq], float64
        λ that was applied; 0 where the request was computed densely.
    backend : str
    """

    state: Any
    gap: Any
    lse: Any
    dropped_mass_bound: Any
    grid: Grid
    order: str
    threshold: NDArray[np.float64]
    backend: str

    def __repr__(self) -> str:
        share = self.tiles.skipped.sum() / max(self.tiles.visited.sum(), 1)
        return f"<SkipReport: {share:.1%} of visited tiles skipped, by {self.backend}>"

    @cached_property
    def tiles(self) -> TileMap:
        """Tile map with a leading batch axis."""
        return TileMap(arrays.to_numpy(self.state), self.grid, self.order, self.threshold)

    @property
    def sparsity(self) -> NDArray[np.float64]:
        """Skipped ÷ visited tiles, [B, Hq]; first tiles count as visited."""
        return self.tiles.sparsity
