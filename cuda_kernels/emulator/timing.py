"""How long an instruction takes in the emulator's timeline: a model, in clock cycles of an SM.

The figures are those of an Ampere or Hopper SM, rounded: four sub-partitions, each with one tensor
core for ``mma.sync`` (2048 multiply-adds in 8 cycles) and a quarter of the exp unit (4 lanes a
cycle); shared memory moves 128 bytes a cycle.  They order events; they do not predict speed.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """One instruction of one warp.

    ``unit`` does one such instruction at a time, for ``busy`` cycles (``""``: no such limit;
    ``partition:`` one unit per four warps, else one per SM); the result is there after ``latency``.
    """

    unit: str
    busy: float
    latency: float


COSTS = {
    "mma_m16n8k16": Cost("partition:tensor core", 8, 33),
    "ldmatrix_x4": Cost("shared memory", 4, 29),
    "ldmatrix_x4_trans": Cost("shared memory", 4, 29),
    "ldmatrix_x2": Cost("shared memory", 2, 27),
    "ldmatrix_x2_trans": Cost("shared memory", 2, 27),
    "stmatrix_x4": Cost("shared memory", 4, 4),
    "ld_shared_128": Cost("", 4, 30),
    "ld_shared_32": Cost("", 1, 23),
    "ld_global_128": Cost("", 4, 500),
    "ld_global_nc_128": Cost("", 4, 500),
    "ex2": Cost("", 8, 8),
}
"""By instruction; others cost ``OTHER``."""

OTHER = Cost("", 1, 4)
SHUFFLE = 24.0  # cycles until every lane has the other's value
BARRIER = 20.0  # cycles from the last arrival to the release
COPY_LATENCY = 500.0  # cycles from the first asynchronous copy of a group until it may be there
COPY_BYTES = 32.0  # bytes a cycle that asynchronous copies bring to an SM
TMA_LATENCY = 600.0  # cycles from the start of a copy by TMA until its first bytes are there
ELEMENT = 2.0  # cycles for one element of a register tile in a fragment helper


def cost_of(name: str) -> Cost:
    """Return the cost of an instruction."""
    return COSTS.get(name, OTHER)


def wgmma(n: int) -> Cost:
    """Return the cost of one ``wgmma`` of 64 × n × 16: n / 2 cycles of all tensor cores."""
    return Cost("tensor cores", n / 2, n / 2 + 30)
