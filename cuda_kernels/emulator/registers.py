"""``cuda.local.array``: the registers of a warp, one lane's part visible to its thread.

All lanes share one object per declaration, so that a warp-wide instruction finds its operands in
one array.  Reading or writing an element waits for the warp-wide instructions before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulator.arrays import fitting, plain
from cuda_kernels.emulator.errors import EmulationError

if TYPE_CHECKING:
    from cuda_kernels.emulator.block import Warp

POISON = 0xAB


class Registers:
    """A register tile of every lane: ``values`` is [32, *shape]."""

    __slots__ = ("_parts", "_rows", "_warp", "dtype", "flat", "lanes", "shape", "size", "values")

    def __init__(self, warp: Warp, values: NDArray[Any]) -> None:
        self._warp = warp
        self.values = values
        self.shape, self.dtype = values.shape[1:], values.dtype
        self.size = int(np.prod(self.shape))
        self.lanes = list(values)  # views
        self._rows = [Registers(warp, values[:, i]) for i in range(self.shape[0])] if (
            len(self.shape) > 1
        ) else []  # fmt: skip
        self._parts: dict[str, Registers] = {}
        flat = values.reshape(len(values), -1)
        self.flat = flat if np.may_share_memory(flat, values) else None

    @classmethod
    def empty(cls, warp: Warp, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Registers:
        """Make a tile of poison: NaN, or integers that mean nothing."""
        values = np.empty((32, *shape), dtype)
        if dtype.kind == "f":
            values.fill(np.nan)
        else:
            values.view(np.uint8).fill(POISON)
        return cls(warp, values)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if self._rows and type(index) is int:
            return self._rows[index]
        given = len(index) if isinstance(index, tuple) else 1
        if given < len(self.shape) or isinstance(index, slice):
            return self._part(index)
        thread = self._warp.running
        if thread.issued > self._warp.executed:
            thread.settle()
        value = self.lanes[thread.lane][index]
        return self._part(index) if isinstance(value, np.ndarray) else plain(value)

    def __setitem__(self, index: Any, value: Any) -> None:
        thread = self._warp.running
        if thread.issued > self._warp.executed:
            thread.settle()
        if isinstance(value, Registers):
            value = value.lanes[thread.lane]
        elif self.dtype.kind != "f":
            value = fitting(value, self.dtype)
        self.lanes[thread.lane][index] = value

    def _part(self, index: Any) -> Registers:
        """Return a row, or what else the index leaves, as a tile."""
        key = repr(index)
        if key not in self._parts:
            entries = index if isinstance(index, tuple) else (index,)
            self._parts[key] = Registers(self._warp, self.values[(slice(None), *entries)])
        return self._parts[key]


def check_tile(tile: Any, count: int, dtype: str, instruction: str, parameter: str) -> None:
    """Report an operand that is not a register tile of ``count`` values of ``dtype``."""
    if not isinstance(tile, Registers):
        raise EmulationError(
            f"{instruction}: {parameter} must be a register tile of {count} {dtype}, got "
            f"{type(tile).__name__}"
        )
    if tile.size != count or tile.dtype != dtype or tile.flat is None:
        raise EmulationError(
            f"{instruction}: {parameter} must be a contiguous register tile of {count} {dtype}, "
            f"got shape {list(tile.shape)} of {tile.dtype}"
        )
