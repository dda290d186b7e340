"""What happens to every tile: a tile-level simulator of skip-softmax attention.

NumPy only; importing it loads neither numba nor streamlit.

Examples
--------
>>> import sim
>>> q, k, v, *_ = sim.workloads.local_band(1024)
>>> tiles = sim.scan(q, k).decide(threshold=0.01)
>>> tiles.state.shape
(3, 16, 8)
>>> out = sim.attend(q, k, v, tiles)
>>> bool((out.dropped_mass <= out.dropped_mass_bound).all())
True
"""

from sim import (
    accuracy,
    calibration,
    cost,
    decode,
    decode_splits,
    decode_time,
    engines,
    gap_maps,
    hardware,
    rules,
    targets,
    threshold,
    traces,
    workloads,
)
from sim.geometry import COMPUTED, MASKED, ORDERS, SKIPPED, Grid, TileMap
from sim.layout import from_kernel_layout, to_kernel_layout
from sim.skip_softmax import Attended, Scan, attend, scan

__all__ = [
    "COMPUTED",
    "MASKED",
    "ORDERS",
    "SKIPPED",
    "Attended",
    "Grid",
    "Scan",
    "TileMap",
    "accuracy",
    "attend",
    "calibration",
    "cost",
    "decode",
    "decode_splits",
    "decode_time",
    "engines",
    "from_kernel_layout",
    "gap_maps",
    "hardware",
    "rules",
    "scan",
    "targets",
    "threshold",
    "to_kernel_layout",
    "traces",
    "workloads",
]
