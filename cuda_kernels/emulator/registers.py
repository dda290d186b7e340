"""``cuda.local.array``: the registers of a warp, one lane's part visible to its thread.

All lanes share one object per declaration, so that a warp-wide instruction finds its operands in
one array; the four warps of a warpgroup have theirs side by side in a larger one.  Reading or
writing an element waits for the warp-wide instructions before it.  Not so for ``wgmma``: until it
is waited for, its accumulators are not to be touched, nor A's registers to be written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulator.arrays import fitting, plain
from cuda_kernels.emulator.errors import EmulationError

if TYPE_CHECKING:
    from cuda_kernels.emulator.block import Thread, Warp

POISON = 0xAB


class Guard:
    """Registers that ``wgmma`` uses: of every lane, its latest product that does, by number."""

    __slots__ = ("lent", "span", "writing")

    def __init__(self, span: tuple[int, int]) -> None:
        self.span = span  # places in the declared tile
        self.writing = [0] * 32  # as accumulator, and no wgmma_wait has given it back
        self.lent = [0] * 32  # as A


class Registers:
    """A register tile of every lane: ``values`` is [32, *shape].

    Parameters
    ----------
    warp : Warp
    values : array
    whole : array, optional
        The same tile of the whole warpgroup, [128, *shape].
    parent : Registers, optional
        Of which this is a part, and ``key`` says which.
    """

    __slots__ = (
        "_parts", "_rows", "_warp", "base", "dtype", "flat", "guards", "key", "lanes", "shape",
        "size", "span", "stamp", "values", "whole",
    )  # fmt: skip

    def __init__(
        self, warp: Warp, values: NDArray[Any], whole: NDArray[Any] | None = None,
        parent: Registers | None = None, key: Any = None,
    ) -> None:  # fmt: skip
        self._warp = warp
        self.values = values
        self.shape, self.dtype = values.shape[1:], values.dtype
        self.size = int(np.prod(self.shape))
        self.key = key
        self.base: Registers = self if parent is None else parent.base
        self.span = (0, self.size) if parent is None else parent.span_of(key[-1])
        self.guards: list[Guard] | None = None  # of the base, once wgmma uses it
        self.stamp = 0  # wgmma fences of the lane that wrote last
        self.lanes = list(values)  # views
        self.whole = _flat(whole)
        self._rows = [
            Registers(
                warp, values[:, i], None if whole is None else whole[:, i], self, (key, i)
            )
            for i in range(self.shape[0])
        ] if len(self.shape) > 1 else []  # fmt: skip
        self._parts: dict[str, Registers] = {}
        self.flat = _flat(values)

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
        if self.base.guards is not None:
            self._granule(index).check(thread)
        value = self.lanes[thread.lane][index]
        return self._part(index) if isinstance(value, np.ndarray) else plain(value)

    def __setitem__(self, index: Any, value: Any) -> None:
        thread = self._warp.running
        if thread.issued > self._warp.executed:
            thread.settle()
        if thread.group.used:
            granule = self._granule(index)
            granule.stamp = thread.fences
            if self.base.guards is not None:
                granule.check(thread, writing=True)
        if isinstance(value, Registers):
            value = value.lanes[thread.lane]
        elif self.dtype.kind != "f":
            value = fitting(value, self.dtype)
        self.lanes[thread.lane][index] = value

    def _granule(self, index: Any) -> Registers:
        """Return the row that an element is in, or this."""
        if self._rows and type(index) is tuple and type(index[0]) is int:
            return self._rows[index[0]]
        return self

    def _part(self, index: Any) -> Registers:
        """Return a row, or what else the index leaves, as a tile."""
        key = repr(index)
        if key not in self._parts:
            entries = index if isinstance(index, tuple) else (index,)
            place = (slice(None), *entries)
            whole = self.whole
            if whole is not None:
                whole = whole.reshape(len(whole), *self.shape)[place]
            self._parts[key] = Registers(
                self._warp, self.values[place], whole, self, (self.key, key)
            )
        return self._parts[key]

    def span_of(self, index: Any) -> tuple[int, int]:
        """Return the places of a row in the declared tile; of another part, all of this tile's."""
        if type(index) is not int:
            return self.span
        size = self.size // self.shape[0]
        return self.span[0] + index * size, self.span[0] + (index + 1) * size

    # --- wgmma

    @property
    def written(self) -> int:
        """The wgmma fences that came before the last write to any of these registers."""
        return max(self.stamp, self.base.stamp, *(row.stamp for row in self._rows), 0)

    def guard(self) -> Guard:
        """Return what says which products use these registers."""
        base = self.base
        if base.guards is None:
            base.guards = []
        for guard in base.guards:
            if guard.span == self.span:
                return guard
        base.guards.append(Guard(self.span))
        return base.guards[-1]

    def give_back(self, lane: int, done: int) -> None:
        """A lane has waited for its products up to number ``done``, and passed this accumulator."""
        writing = self.guard().writing
        if writing[lane] <= done:
            writing[lane] = 0

    def check(self, thread: Thread, writing: bool = False) -> None:
        """Report an access to registers that a product may still write, or a write to its A."""
        first, end = self.span
        for guard in self.base.guards or ():
            if guard.span[0] >= end or guard.span[1] <= first:
                continue
            if guard.writing[thread.lane]:
                done = guard.writing[thread.lane] <= thread.waited
                raise EmulationError(
                    "read of poison: these registers are the accumulator of a wgmma that is under "
                    "way: no wgmma_wait has been passed them"
                    + (" (one has waited for it, with other registers)" if done else "")
                    if not writing
                    else "write to the accumulator of a wgmma that is under way: no wgmma_wait "
                    "has been passed it"
                )
            if writing and guard.lent[thread.lane] > thread.waited:
                raise EmulationError(
                    "write to registers that a wgmma under way may still read as A: no wgmma_wait "
                    "for it"
                )

    def lent(self, thread: Thread) -> bool:
        """Whether a product under way reads some of these registers."""
        first, end = self.span
        return any(
            guard.lent[thread.lane] > thread.waited
            for guard in self.base.guards or ()
            if guard.span[0] < end and first < guard.span[1]
        )


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array of poison: NaN, or integers that mean nothing."""
    values = np.empty(shape, dtype)
    if dtype.kind == "f":
        values.fill(np.nan)
    else:
        values.view(np.uint8).fill(POISON)
    return values


def _flat(values: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return a view of [lanes, everything else], if there is one."""
    if values is None:
        return None
    flat = values.reshape(len(values), -1)
    return flat if np.may_share_memory(flat, values) else None


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
