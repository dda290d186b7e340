"""``cuda`` inside an emulated kernel: thread indices, arrays, barriers, votes and shuffles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_kernels.emulator import timing
from cuda_kernels.emulator.arrays import SharedArray
from cuda_kernels.emulator.block import Block
from cuda_kernels.emulator.errors import EmulationError, site_of
from cuda_kernels.emulator.registers import Registers, empty

ALL = 0xFFFFFFFF


class Dim3:
    """Three coordinates."""

    __slots__ = ("x", "y", "z")

    def __init__(self, values: tuple[int, int, int]) -> None:
        self.x, self.y, self.z = values


class Shared:
    """``cuda.shared``."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> SharedArray:
        """Declare an array that the block shares; shape 0 is the dynamic shared memory."""
        kind = dtype_of(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        memory = self._block.shared
        if shape == (0,):
            address = memory.dynamic(alignment or 16)
            return SharedArray(self._block, address, (memory.dynamic_bytes // kind.itemsize,), kind)
        size = int(np.prod(shape)) * kind.itemsize
        aligned = alignment or max(kind.itemsize, 16)
        return SharedArray(
            self._block, memory.allocate(site_of(sys._getframe(1)), size, aligned), shape, kind
        )


class Local:
    """``cuda.local``."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> Registers:
        """Declare a register tile."""
        thread = self._block.running
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        site = site_of(sys._getframe(1))
        number = thread.declared[site] = thread.declared.get(site, -1) + 1
        key, tiles = (site, number), thread.warp.tiles
        if key not in tiles:
            tiles[key] = self._declare(thread.warp, key, shape, dtype_of(dtype))
        return tiles[key]

    def _declare(self, warp: Any, key: Any, shape: tuple[int, ...], dtype: Any) -> Registers:
        group = warp.group
        if not group.whole:
            return Registers(warp, empty((32, *shape), dtype), key=key)
        if key not in group.tiles:
            group.tiles[key] = empty((128, *shape), dtype)
        first = 32 * (warp.number % 4)
        values = group.tiles[key]
        return Registers(warp, values[first : first + 32], values, key=key)


class Atomic:
    """``cuda.atomic``: on shared arrays and global ones; returns the old value."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def _update(self, array: Any, index: Any, change: Callable[[Any], Any]) -> Any:
        thread = self._block.running
        thread.enter(sys._getframe(2))
        if isinstance(array, SharedArray):
            return array.update(index, change)
        old = array[index]
        array[index] = change(old)
        return old

    def add(self, array: Any, index: Any, value: Any) -> Any:
        """Add."""
        return self._update(array, index, lambda old: old + value)

    def max(self, array: Any, index: Any, value: Any) -> Any:
        """Take the larger."""
        return self._update(array, index, lambda old: max(old, value))

    def min(self, array: Any, index: Any, value: Any) -> Any:
        """Take the smaller."""
        return self._update(array, index, lambda old: min(old, value))


class Cuda:
    """Stands for the module ``numba.cuda`` in a kernel that a block runs."""

    warpsize = 32

    def __init__(self, block: Block) -> None:
        self._block = block
        self.blockIdx = Dim3(block.index)
        self.blockDim = Dim3(block.shape)
        self.gridDim = Dim3(block.grid)
        self.shared = Shared(block)
        self.local = Local(block)
        self.atomic = Atomic(block)
        self._threads = [Dim3(thread.index) for thread in block.threads]

    def __getattr__(self, name: str) -> Any:
        raise EmulationError(f"the emulator does not know cuda.{name}")

    @property
    def threadIdx(self) -> Dim3:
        """Index of the thread in its block."""
        return self._threads[self._block.running.number]

    @property
    def laneid(self) -> int:
        """Lane of the thread in its warp."""
        return self._block.running.lane

    def grid(self, axes: int) -> Any:
        """Return the index of the thread in the grid."""
        place = self._block.running.index
        at = [place[i] + self._block.index[i] * self._block.shape[i] for i in range(axes)]
        return at[0] if axes == 1 else tuple(at)

    def gridsize(self, axes: int) -> Any:
        """Return the threads of the grid."""
        size = [self._block.grid[i] * self._block.shape[i] for i in range(axes)]
        return size[0] if axes == 1 else tuple(size)

    # --- barriers

    def syncthreads(self) -> None:
        """Wait for all threads of the block."""
        self._enter().barrier(0, None)

    def syncthreads_and(self, predicate: Any) -> int:
        """Wait; 1 if no thread's predicate is 0."""
        return self._enter().barrier(0, None, "and", predicate)

    def syncthreads_or(self, predicate: Any) -> int:
        """Wait; 1 if some thread's predicate is not 0."""
        return self._enter().barrier(0, None, "or", predicate)

    def syncthreads_count(self, predicate: Any) -> int:
        """Wait; count the predicates that are not 0."""
        return self._enter().barrier(0, None, "popc", predicate)

    def syncwarp(self, mask: int = ALL) -> None:
        """Wait for lanes of the warp."""
        self._enter().sync_warp(mask)

    def threadfence(self) -> None:
        """Order memory accesses; no race is undone by it."""

    threadfence_block = threadfence_system = threadfence

    # --- exchange between lanes

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Any:
        """Return the value of a lane."""
        return self._shuffle(mask, value, lane % 32, "shfl_sync")

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
        """Return the value of lane ``lane ^ lane_mask``."""
        return self._shuffle(mask, value, self._block.running.lane ^ lane_mask, "shfl_xor_sync")

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        """Return the value of lane ``lane − delta``, or one's own below lane 0."""
        lane = self._block.running.lane
        return self._shuffle(mask, value, lane - delta if lane >= delta else lane, "shfl_up_sync")

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        """Return the value of lane ``lane + delta``, or one's own above lane 31."""
        lane = self._block.running.lane
        source = lane + delta if lane + delta < 32 else lane
        return self._shuffle(mask, value, source, "shfl_down_sync")

    def all_sync(self, mask: int, predicate: Any) -> bool:
        """Whether every lane's predicate holds."""
        return self._vote(mask, predicate, "all_sync", lambda votes: all(votes.values()))

    def any_sync(self, mask: int, predicate: Any) -> bool:
        """Whether some lane's predicate holds."""
        return self._vote(mask, predicate, "any_sync", lambda votes: any(votes.values()))

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        """Return a word with a bit for each lane's predicate."""
        return self._vote(
            mask, predicate, "ballot_sync", lambda votes: sum(1 << i for i, v in votes.items() if v)
        )

    def _shuffle(self, mask: int, value: Any, source: int, name: str) -> Any:
        def finish(values: dict[int, Any]) -> dict[int, Any]:
            absent = {lane for _, lane in values.values()} - values.keys()
            if absent:
                raise EmulationError(f"{name} reads lane {min(absent)}, which is not in its mask")
            return {lane: values[source][0] for lane, (_, source) in values.items()}

        return self._enter().meet(name, mask & ALL, (value, source), finish, timing.SHUFFLE, name)

    def _vote(self, mask: int, predicate: Any, name: str, decide: Callable[..., Any]) -> Any:
        def finish(values: dict[int, Any]) -> dict[int, Any]:
            return dict.fromkeys(values, decide(values))

        return self._enter().meet(name, mask & ALL, predicate, finish, timing.SHUFFLE, name)

    # --- arithmetic

    def selp(self, condition: Any, yes: Any, no: Any) -> Any:
        """Choose."""
        return yes if condition else no

    def popc(self, x: int) -> int:
        """Count the bits that are set."""
        return int(x).bit_count()

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """Multiply and add, rounded once."""
        kind = type(z)
        return kind(np.float64(x) * np.float64(y) + np.float64(z))

    def _enter(self) -> Any:
        thread = self._block.running
        thread.enter(sys._getframe(2))
        return thread


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """Return NumPy's type for Numba's, or for one of the emulator's casts."""
    return np.dtype(getattr(dtype, "name", dtype))
