"""Data sheets of GPUs: what the models of time divide by.

Peaks as the vendor states them; nothing reaches them, and nothing here was measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU: its name, its peak memory bandwidth in bytes a second, and where that stands."""

    name: str
    bandwidth: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 4.8e12, "NVIDIA's data sheet of the H200, SXM"),
        Gpu("B200", 8.0e12, "NVIDIA's data sheet of the DGX B200, 64 TB/s of eight GPUs"),
    )
}
"""By name; those that published decode measurements are of."""
