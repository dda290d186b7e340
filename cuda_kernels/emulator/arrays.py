"""Arrays as a kernel sees them, bounds-checked and with addresses, and the memory of arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulator.errors import EmulationError

GLOBAL_SHIFT = 40  # each argument has 2**40 addresses to itself


class SharedArray:
    """``cuda.shared.array`` as a thread sees it."""

    def __init__(self, block: Any, address: int, shape: tuple[int, ...], dtype: Any) -> None:
        self._block = block
        self.base = address
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.strides = _strides(shape, self.dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        if len(index) < len(self.shape):
            rest = self.shape[len(index) :]
            return SharedArray(self._block, self._address(index), rest, self.dtype)
        thread, size = self._block.running, self.dtype.itemsize
        data = thread.read_element(self._address(index), size)
        return plain(data.view(self.dtype)[0])

    def __setitem__(self, index: Any, value: Any) -> None:
        index = index if isinstance(index, tuple) else (index,)
        if len(index) != len(self.shape):
            raise EmulationError(
                f"a shared array of {len(self.shape)} axes is set element by element"
            )
        data = np.empty(1, self.dtype)
        data[0] = fitting(value, self.dtype)
        self._block.running.write_element(self._address(index), data.view(np.uint8))

    def update(self, index: Any, change: Callable[[Any], Any]) -> Any:
        """Change an element in one step; return what it was."""
        index = index if isinstance(index, tuple) else (index,)
        thread, address = self._block.running, self._address(index)
        data = self._block.shared.bytes[address : address + self.dtype.itemsize].copy()
        old = plain(data.view(self.dtype)[0])
        data.view(self.dtype)[0] = fitting(change(old), self.dtype)
        self._block.shared.update(thread.number, address, data, thread.site)
        return old

    def address(self, index: Any) -> int:
        """Return the shared address of an element, which need not exist."""
        index = index if isinstance(index, tuple) else (index,)
        return self.base + sum(
            int(i) * stride for i, stride in zip(index, self.strides, strict=True)
        )

    def _address(self, index: tuple[Any, ...]) -> int:
        check_index(index, self.shape, "a shared array")
        pairs = zip(index, self.strides, strict=False)
        return self.base + sum(int(i) * stride for i, stride in pairs)


class GlobalArray:
    """An argument of the kernel, or a view of it: bounds-checked, with an address."""

    def __init__(self, array: NDArray[Any], base: int, name: str) -> None:
        self._array = array
        self.base = base  # address of element 0
        self.name = name
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        self.ndim, self.size = array.ndim, array.size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        self._check(index)
        if len(index) == self.ndim and not any(isinstance(i, slice) for i in index):
            return plain(self._array[index])
        view = self._array[index]
        offset = sum(
            (i.indices(length)[0] if isinstance(i, slice) else int(i)) * stride
            for i, length, stride in zip(index, self.shape, self.strides, strict=False)
        )
        return GlobalArray(view, self.base + offset, self.name)

    def __setitem__(self, index: Any, value: Any) -> None:
        index = index if isinstance(index, tuple) else (index,)
        self._check(index)
        self._array[index] = fitting(value, self.dtype)

    def _check(self, index: tuple[Any, ...]) -> None:
        check_index(index, self.shape, self.name)

    def address(self, index: Any) -> int:
        """Return the global address of an element, which need not exist."""
        index = index if isinstance(index, tuple) else (index,)
        return self.base + sum(
            int(i) * stride for i, stride in zip(index, self.strides, strict=True)
        )


class GlobalMemory:
    """All array arguments of a launch, by address."""

    def __init__(self) -> None:
        self._bytes: list[NDArray[np.uint8]] = []
        self._bases: list[int] = []
        self._names: list[str] = []

    def add(self, array: NDArray[Any], name: str) -> GlobalArray:
        """Give an array its addresses."""
        low, memory = memory_of(array)
        base = (len(self._bytes) + 1 << GLOBAL_SHIFT) + low % 256  # aligned as it is
        self._bytes.append(memory)
        self._bases.append(base)
        self._names.append(f"{name} {list(array.shape)}")
        return GlobalArray(array, base, f"argument {name}")

    def locate(self, address: int, size: int, what: str, aligned: int) -> NDArray[np.uint8]:
        """Return the bytes at an address, which must lie inside one array."""
        which = (address >> GLOBAL_SHIFT) - 1
        if not 0 <= which < len(self._bytes):
            raise EmulationError(f"{what} of {size} bytes at {address:#x}: no array is there")
        offset, length = address - self._bases[which], len(self._bytes[which])
        if offset < 0 or offset + size > length:
            raise EmulationError(
                f"{what} of {size} bytes at byte {offset} of argument {self._names[which]}, which "
                f"has {length}: out of bounds"
            )
        if address % aligned:
            raise EmulationError(
                f"{what} of {size} bytes at byte {offset} of argument {self._names[which]}: "
                f"misaligned, its address must be a multiple of {aligned}"
            )
        return self._bytes[which][offset : offset + size]


class _Span:
    """Bytes from the first to the last element of a strided array, as NumPy takes them."""

    def __init__(self, array: NDArray[Any], address: int, size: int) -> None:
        self._keep = array
        self.__array_interface__ = {
            "data": (address, not array.flags.writeable),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def memory_of(array: NDArray[Any]) -> tuple[int, NDArray[np.uint8]]:
    """Return the address of an array and a view of its memory, gaps between rows included."""
    if any(stride < 0 for stride in array.strides):
        raise ValueError("an array with negative strides cannot be emulated: copy it first")
    if not array.size:
        return 0, np.empty(0, np.uint8)
    low, high = np.lib.array_utils.byte_bounds(array)
    return low, np.asarray(_Span(array, low, high - low))


def check_index(index: tuple[Any, ...], shape: tuple[int, ...], name: str) -> None:
    """Report an index outside ``shape``; unlike NumPy's, none may be negative."""
    if len(index) > len(shape):
        raise EmulationError(f"{len(index)} indices for {name}, which has {len(shape)} axes")
    for i, length in zip(index, shape, strict=False):
        if not isinstance(i, slice) and not 0 <= i < length:
            where = ", ".join(str(entry) for entry in index)
            raise EmulationError(f"index [{where}] is out of bounds of {name}, shape {list(shape)}")


def plain(value: Any) -> Any:
    """Return integers as Python's: Numba widens them, NumPy's would wrap around."""
    return int(value) if value.dtype.kind in "iu" else value


def fitting(value: Any, dtype: np.dtype[Any]) -> Any:
    """Wrap an integer around to fit, as a store does."""
    if dtype.kind in "iu" and np.ndim(value) == 0:
        bits = 8 * dtype.itemsize
        value = int(value) & ((1 << bits) - 1)
        if dtype.kind == "i" and value >> (bits - 1):
            value -= 1 << bits
    return value


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return tuple(strides)
