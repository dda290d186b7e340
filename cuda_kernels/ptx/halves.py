"""The two 16-bit floats of the tensor cores, as bits in a uint16, and how the CPU converts them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

F16, BF16 = 0, 1
"""Formats, as the compile-time integer that instructions take."""

_NAMES = {F16: "f16", BF16: "bf16"}


def format_name(dtype: int) -> str:
    """Return PTX's name of a format.

    Raises
    ------
    ValueError
        If it is neither of the two.
    """
    if dtype not in _NAMES:
        raise ValueError(f"dtype must be F16 (0) or BF16 (1), got {dtype}")
    return _NAMES[dtype]


def widen(bits: NDArray[np.uint16], dtype: int) -> NDArray[np.float32]:
    """Return the values of 16-bit floats, exactly.

    Examples
    --------
    >>> widen(np.uint16([0x3C00]), F16), widen(np.uint16([0x3F80]), BF16)
    (array([1.], dtype=float32), array([1.], dtype=float32))
    """
    if dtype == F16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_one(value: Any, dtype: int) -> int:
    """Return what :func:`narrow` does, of one number and many times faster.

    Examples
    --------
    >>> hex(narrow_one(1.0, F16)), hex(narrow_one(-1e9, F16)), hex(narrow_one(float("nan"), BF16))
    ('0x3c00', '0xfc00', '0x7fff')
    """
    value = float(np.float32(value))
    if value != value:
        return 0x7FFF
    if dtype == F16:
        try:
            return int.from_bytes(struct.pack("<e", value), "little")
        except OverflowError:
            return 0x7C00 if value > 0 else 0xFC00
    wide = int.from_bytes(struct.pack("<f", value), "little")
    return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16


def narrow(values: Any, dtype: int) -> NDArray[np.uint16]:
    """Round float32 to the nearest 16-bit float, ties to even; NaN becomes 0x7FFF, as on a GPU.

    Examples
    --------
    >>> [hex(bits) for bits in narrow([1.0, 1e9], F16)], hex(narrow([1.0], BF16)[0])
    (['0x3c00', '0x7c00'], '0x3f80')
    """
    values = np.atleast_1d(np.asarray(values, np.float32))
    if dtype == F16:
        with np.errstate(over="ignore"):
            bits = values.astype(np.float16).view(np.uint16)
    else:
        wide = np.ascontiguousarray(values).view(np.uint32)
        up = np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
        bits = ((wide + up) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)
