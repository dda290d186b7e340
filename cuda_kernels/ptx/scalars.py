"""Casts as a CUDA thread does them: integers wrap around, floats round to their type.

On a GPU these names are Numba's types, which kernels call to cast; here is what the same calls
mean on the CPU.  Integers stay Python's, as Numba widens them to 64 bits between two casts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Scalar:
    """A type that casts when called and that arrays take as their dtype.

    Examples
    --------
    >>> SCALARS["uint32"](-1), SCALARS["int32"](0xFFFFFFFF), SCALARS["float32"](0.1)
    (4294967295, -1, np.float32(0.1))
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = np.dtype(name)
        self.cast = _caster(self.dtype)

    def __call__(self, value: Any) -> Any:
        """Cast ``value``."""
        return self.cast(value)

    def __repr__(self) -> str:
        return self.name


def _caster(dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    """Return a plain function: kernels cast a million times."""
    if dtype.kind == "f":
        kind = dtype.type

        def cast(value: Any) -> Any:
            return kind(value)

    elif dtype.kind == "u":
        wrap = (1 << 8 * dtype.itemsize) - 1

        def cast(value: Any) -> Any:
            try:
                return value & wrap
            except TypeError:  # a float: towards zero
                return int(value) & wrap

    else:
        wrap, sign = (1 << 8 * dtype.itemsize) - 1, 1 << 8 * dtype.itemsize - 1

        def cast(value: Any) -> Any:
            return ((int(value) & wrap) ^ sign) - sign

    cast.name = dtype.name  # type: ignore[attr-defined]  # arrays take it as their dtype
    return cast


SCALARS = {
    name: Scalar(name)
    for name in (
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
"""Every cast by NumPy's name of its type."""
