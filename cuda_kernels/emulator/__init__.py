"""Runs a kernel's own Python source on the CPU, one cooperative thread per CUDA thread.

It reports what a GPU would pass over in silence: reads of what has not arrived, missing barriers
and fences, accesses out of bounds, deadlocks, warp-wide instructions that some lanes do not reach,
phases of an mbarrier that nobody waited for or that may pass before a thread has waited, waits that
may be over before the previous phase has ended, copies and products under way at the end.  It does
not prove integer types (the compiler does) or speed; its timeline is that of a simple model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulator.arrays import GlobalMemory, memory_of
from cuda_kernels.emulator.block import Block, event_of
from cuda_kernels.emulator.errors import EmulationError
from cuda_kernels.emulator.source import Source, source_of
from cuda_kernels.emulator.timeline import Event, to_chrome, to_plain, write_chrome
from cuda_kernels.ptx.tensor_map import TensorMap

SCHEDULES = ("late", "early", "both")
MAX_SHARED_BYTES = 232448  # 227 KiB: the most that a block can have on any GPU so far

__all__ = [
    "Emulation", "EmulationError", "Event", "emulate", "to_chrome", "to_plain", "write_chrome",
]  # fmt: skip


@dataclass(frozen=True)
class Emulation:
    """What a run left behind.

    Attributes
    ----------
    cycles : float
        Length of the longest block, by the duration model.
    """

    cycles: float
    _raw: list[Any] = field(repr=False)

    @property
    def events(self) -> list[Event]:
        """The event list, in the order in which things were done."""
        return [event_of(raw) for raw in self._raw]


def emulate(
    kernel: Any, grid: Any, block: Any, *args: Any, shared_bytes: int = 0, schedule: str = "both"
) -> Emulation:
    """Run a kernel on the CPU; its array arguments are changed as a launch would change them.

    Parameters
    ----------
    kernel : ``@cuda.jit`` kernel or function
        Its source runs unmodified; nothing is compiled.
    grid, block : int or tuple of up to 3 int
        Blocks, run one after the other, and threads of each.
    *args
        NumPy arrays, scalars, and tensor maps of NumPy arrays.
    shared_bytes : int
        Dynamic shared memory of a block.
    schedule : str
        ``late``: asynchronous copies and products happen as late as they may.  ``early``: as early
        as they may, and threads run in reverse order.  ``both`` (default): one after the other, on
        copies the first time; the results must be bitwise equal.

    Returns
    -------
    Emulation
        Of the last run.

    Raises
    ------
    ValueError
        If an argument is not as above.
    EmulationError
        If the kernel does what no GPU promises to do right.

    Examples
    --------
    >>> from cuda_kernels.ptx.language import cuda
    >>> def reverse(x):
    ...     memory = cuda.shared.array(64, "float32")
    ...     t = cuda.threadIdx.x
    ...     memory[t] = x[t]
    ...     cuda.syncthreads()
    ...     x[t] = memory[63 - t]
    >>> x = np.arange(64, dtype=np.float32)
    >>> run = emulate(reverse, 1, 64, x)
    >>> x[:3]
    array([63., 62., 61.], dtype=float32)
    """
    function = source_of(kernel)
    if not callable(function):
        raise ValueError(f"kernel must be a function or a @cuda.jit kernel, got {kernel!r}")
    blocks, threads = _dimensions(grid, "grid"), _dimensions(block, "block")
    if threads[0] * threads[1] * threads[2] > 1024:
        raise ValueError(f"block must have at most 1024 threads, got {block}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
        raise ValueError(f"shared_bytes must be 0 to {MAX_SHARED_BYTES}, got {shared_bytes}")
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    if len(args) != len(names):
        raise ValueError(
            f"{function.__name__} takes {len(names)} arguments ({', '.join(names)}), "
            f"got {len(args)}"
        )
    for name, argument in zip(names, args, strict=True):
        if not isinstance(argument, (np.ndarray, np.generic, int, float, TensorMap)):
            raise ValueError(
                f"argument {name} must be a NumPy array, a number or a tensor map, got "
                f"{type(argument).__name__}"
            )

    def run(arguments: list[Any], late: bool) -> Emulation:
        memory = GlobalMemory()
        given = [
            memory.add(argument, name) if isinstance(argument, np.ndarray) else _number(argument)
            for name, argument in zip(names, arguments, strict=True)
        ]
        events: list[Any] = []
        cycles = 0.0
        for index in _indices(blocks):
            cycles = max(
                cycles, _run_block(function, given, index, blocks, threads, memory,
                                   shared_bytes, late, events),
            )  # fmt: skip
        return Emulation(cycles, events)

    with np.errstate(all="ignore"):
        if schedule != "both":
            return run(list(args), schedule == "late")
        arrays = [array for a in args if (array := _array(a)) is not None]
        clones = {key: _clone(array) for key, array in {id(a): a for a in arrays}.items()}
        run([_on_clone(a, clones) for a in args], late=True)
        done = run(list(args), late=False)
    for name, argument in zip(names, args, strict=True):
        if (array := _array(argument)) is not None:
            _compare(name, clones[id(array)], array)
    return done


def _run_block(
    function: Any, given: list[Any], index: Any, grid: Any, shape: Any, memory: GlobalMemory,
    shared_bytes: int, late: bool, events: list[Any],
) -> float:  # fmt: skip
    def kernel() -> None:
        made(*given)

    block = Block(index, grid, shape, kernel, memory, shared_bytes, late, events)
    made = Source(block).function(function)
    return block.run()


def _compare(name: str, late: NDArray[Any], early: NDArray[Any]) -> None:
    different = late.view(np.uint8) != early.view(np.uint8) if late.flags.c_contiguous else None
    if different is None:
        different = memory_of(late)[1] != memory_of(early)[1]
    if different.any():
        first = int(np.flatnonzero(different.reshape(-1))[0])
        raise EmulationError(
            f"argument {name} depends on when asynchronous copies happen and in which order "
            f"threads run: the two schedules differ, first at byte {first}"
        )


def _array(argument: Any) -> NDArray[Any] | None:
    """Return the array that an argument is, or describes."""
    if isinstance(argument, TensorMap):
        return argument.array
    return argument if isinstance(argument, np.ndarray) else None


def _on_clone(argument: Any, clones: dict[int, NDArray[Any]]) -> Any:
    if isinstance(argument, TensorMap):
        return TensorMap(clones[id(argument.array)], argument.box)
    return clones[id(argument)] if isinstance(argument, np.ndarray) else argument


def _clone(array: NDArray[Any]) -> NDArray[Any]:
    """Copy an array, its strides and what lies between its rows."""
    if not array.size:
        return array.copy()
    low, memory = memory_of(array)
    start = array.__array_interface__["data"][0] - low
    return np.ndarray(array.shape, array.dtype, memory.copy().data, start, array.strides)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, (int, np.integer)) else value


def _dimensions(value: Any, name: str) -> tuple[int, int, int]:
    given = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(given) <= 3 or not all(
        isinstance(n, (int, np.integer)) and n > 0 for n in given
    ):
        raise ValueError(f"{name} must be 1 to 3 positive integers, got {value!r}")
    x, y, z = (*(int(n) for n in given), 1, 1)[:3]
    return x, y, z


def _indices(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                yield x, y, z
