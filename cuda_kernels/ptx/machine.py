"""What the CPU body of an instruction may ask of the machine that it runs on.

The emulator puts the running thread here; there is none elsewhere, and then only instructions
that touch neither memory nor other threads have a meaning.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Machine(Protocol):
    """One emulated thread; for an instruction of a warp or a warpgroup, all of that.

    Addresses are Python integers: 32-bit shared, 64-bit global.  The methods of more than one
    thread take one address per row of the result, or of the data.
    """

    def load_shared(self, address: Any, size: int) -> Bytes:
        """Read ``size`` bytes that earlier, ordered writes have left there."""

    def store_shared(self, address: Any, data: Bytes, *, relaxed: bool = False) -> None:
        """Write bytes that other threads see after a barrier; ``relaxed``: as others may, too."""

    def load_global(self, address: int, size: int) -> Bytes:
        """Read ``size`` bytes inside one array."""

    def store_global(self, address: int, data: Bytes) -> None:
        """Write bytes inside one array."""

    def copy_async(self, shared: int, source: int, size: int, filled: int) -> None:
        """Begin to copy ``size`` bytes and as many zeros as make ``filled``."""

    def commit_copies(self) -> None:
        """Close the group of copies begun since the last call."""

    def wait_copies(self, pending: int) -> None:
        """Wait until at most ``pending`` groups of this thread are under way."""

    def barrier(self, name: int, count: int | None, vote: str = "", value: int = 0) -> int:
        """Wait at a barrier for ``count`` threads (None: the block); return what they voted."""

    def arrive(self, name: int, count: int) -> None:
        """Arrive at a barrier without waiting."""

    def sync_warp(self, mask: int) -> None:
        """Wait for the lanes in ``mask`` and see what they wrote."""

    # --- Hopper's

    def init_mbarrier(self, address: int, count: int) -> None:
        """Make an mbarrier for ``count`` arrivals."""

    def fence_mbarriers(self) -> None:
        """Let asynchronous copies see this thread's mbarriers."""

    def arrive_mbarrier(self, address: int, size: int) -> None:
        """Arrive once and expect ``size`` more bytes."""

    def wait_mbarrier(self, address: int, parity: int, until: bool) -> int:
        """Return 1 when the phase of this parity has ended, or 0 before, unless ``until``."""

    def fence_proxy(self) -> None:
        """Let asynchronous reads see plain stores to shared memory."""

    def load_box(self, shared: int, source: Any, barrier: int, index: tuple[int, ...]) -> None:
        """Begin to copy a box of a tensor map to shared memory."""

    def store_box(self, target: Any, shared: int, index: tuple[int, ...]) -> None:
        """Begin to copy a box from shared memory."""

    def commit_boxes(self) -> None:
        """Close the group of stores begun since the last call."""

    def wait_boxes(self, pending: int) -> None:
        """Wait until all but ``pending`` groups of stores have read shared memory."""

    def fence_products(self) -> None:
        """Order register accesses before the warpgroup's next products."""

    def commit_products(self) -> None:
        """Close the group of products begun since the last call."""

    def wait_products(self, pending: int, d: Any, n: int) -> None:
        """Wait until ``pending`` groups of products are under way; D, n columns, may be read."""

    def change_registers(self, count: int, direction: int) -> None:
        """Give registers back (−1) or take them (1), as a whole warpgroup."""

    # --- and what is no instruction

    def mark_tile(self, tile: int) -> None:
        """Label the events that follow."""

    def address(self, space: str, array: Any, index: Any) -> int:
        """Return the address of an element, which need not exist, of an array."""


_running: Machine | None = None


def set_running(machine: Machine | None) -> None:
    """Name the thread that runs from now on."""
    global _running
    _running = machine


def running() -> Machine:
    """Return the thread that runs.

    Raises
    ------
    RuntimeError
        If no kernel is being emulated.
    """
    if _running is None:
        raise RuntimeError(
            "this instruction needs a thread: call it in a kernel, and run the kernel on a GPU or "
            "with cuda_kernels.emulator.emulate"
        )
    return _running
