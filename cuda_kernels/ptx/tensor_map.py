"""What TMA knows of an array: its address, lengths and strides, and the box that it copies."""

from __future__ import annotations

from typing import Any

import numpy as np

SWIZZLED = 128  # bytes of a row of a box, and of shared memory's swizzle
ALIGNED = 16  # bytes: where a row of the array, and a row of a box, may begin


class TensorMap:
    """A box that walks over an array of 2 to 5 axes; a kernel takes it by value.

    In shared memory a box is rows of 128 bytes, its axes in order, each row's eight chunks of 16
    bytes exchanged: chunk c lies at c XOR (row mod 8), the row as the address counts it.

    Parameters
    ----------
    array : NumPy array or array on a GPU
        Elements of 1, 2 or 4 bytes.  They lie side by side along the last axis; the other strides
        are multiples of 16 bytes, and so is the address.
    box : tuple of int
        Elements along each axis, 1 to 256; the last axis has 128 bytes.

    Attributes
    ----------
    array
    shape, strides, box : tuple of int
        Strides in bytes.
    itemsize : int
    address : int
    size : int
        Bytes of a box; a load brings all of them, zeros for what lies outside the array.

    Raises
    ------
    ValueError
        If it is not as above.

    Examples
    --------
    Two rows of 64 numbers, from the second row of three on; there is no fourth:

    >>> keys = np.ones((3, 64), np.float16)
    >>> boxes = TensorMap(keys, (2, 64))
    >>> boxes.size, boxes.read((2, 0)).view(np.float16).reshape(2, 64).sum(axis=1)
    (256, array([64.,  0.], dtype=float16))
    """

    def __init__(self, array: Any, box: tuple[int, ...]) -> None:
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            interface = array.__array_interface__
        self.array = array
        self.box = tuple(int(n) for n in box)
        self.shape = tuple(int(n) for n in interface["shape"])
        self.itemsize = int(interface["typestr"][2:])
        self.address = int(interface["data"][0])
        self.strides = tuple(interface.get("strides") or _contiguous(self.shape, self.itemsize))
        self.size = int(np.prod(self.box)) * self.itemsize
        self._check()

    def _check(self) -> None:
        axes = len(self.shape)
        if not 2 <= axes <= 5 or min(self.shape) < 1:
            raise ValueError(f"array must have 2 to 5 axes, none empty, got shape {self.shape}")
        if self.itemsize not in (1, 2, 4):
            raise ValueError(f"array must have elements of 1, 2 or 4 bytes, got {self.itemsize}")
        if len(self.box) != axes or not all(1 <= n <= 256 for n in self.box):
            raise ValueError(f"box must be {axes} lengths of 1 to 256, got {self.box}")
        if self.box[-1] * self.itemsize != SWIZZLED:
            raise ValueError(
                f"box must have {SWIZZLED // self.itemsize} elements (128 bytes) along the last "
                f"axis, got {self.box[-1]}"
            )
        # The stride of an axis of length 1 means nothing, and libraries leave anything in it.
        self.strides = tuple(
            self.itemsize if i == axes - 1 else ALIGNED if n == 1 else int(stride)
            for i, (n, stride) in enumerate(zip(self.shape, self._last_side_by_side(), strict=True))
        )
        steps = self.strides[:-1]
        if self.address % ALIGNED or any(s % ALIGNED or not 0 < s < 1 << 40 for s in steps):
            raise ValueError(
                "array must begin at a multiple of 16 bytes, and its strides but the last be such "
                f"multiples, got address {self.address} and strides {self.strides}"
            )

    def _last_side_by_side(self) -> tuple[int, ...]:
        if self.shape[-1] > 1 and self.strides[-1] != self.itemsize:
            raise ValueError(
                "array must have its elements side by side along the last axis, got strides "
                f"{self.strides}"
            )
        return self.strides

    def check_load(self, index: tuple[int, ...]) -> None:
        """Raise ValueError if no box can begin at ``index``: the hardware stops the kernel there.

        ``cudaErrorIllegalInstruction`` is what it says; the PTX ISA leaves the rule out.

        Examples
        --------
        >>> TensorMap(np.ones((3, 72), np.float16), (2, 64)).check_load((1, 4))
        Traceback (most recent call last):
            ...
        ValueError: the last axis' index must be a multiple of 8 (16 bytes), got 4
        """
        step = ALIGNED // self.itemsize
        if int(index[-1]) % step:
            raise ValueError(
                f"the last axis' index must be a multiple of {step} ({ALIGNED} bytes), "
                f"got {int(index[-1])}"
            )

    def check_store(self, index: tuple[int, ...]) -> None:
        """Raise ValueError if a store at ``index`` is refused, or may write beyond the array.

        The hardware writes 16 bytes or none: behind a last axis that ends between, too.
        """
        self.check_load(index)
        if self.shape[-1] * self.itemsize % ALIGNED:
            raise ValueError(
                f"the last axis of an array that TMA stores to must have a multiple of {ALIGNED} "
                f"bytes, got {self.shape[-1] * self.itemsize}"
            )

    def read(self, index: tuple[int, ...]) -> Any:
        """Return the bytes of the box at ``index``, a NumPy array's; zeros outside it."""
        box = np.zeros(self.box, self.array.dtype)
        inside, there = self._overlap(index)
        box[inside] = self.array[there]
        return box.reshape(-1).view(np.uint8)

    def write(self, index: tuple[int, ...], data: Any) -> None:
        """Write the bytes of a box to a NumPy array; nothing outside it."""
        inside, there = self._overlap(index)
        self.array[there] = data.view(self.array.dtype).reshape(self.box)[inside]

    def _overlap(self, index: tuple[int, ...]) -> tuple[Any, Any]:
        """Return slices of the box and of the array where the two are one."""
        inside, there = [], []
        for first, count, length in zip(index, self.box, self.shape, strict=True):
            low, high = max(first, 0), min(first + count, length)
            high = max(high, low)
            there.append(slice(low, high))
            inside.append(slice(low - first, high - first))
        return tuple(inside), tuple(there)

    def __repr__(self) -> str:
        return f"TensorMap(shape={self.shape}, box={self.box})"


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return tuple(strides)
