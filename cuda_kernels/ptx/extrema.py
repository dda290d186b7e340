"""Largest of two floats as one instruction, whatever the compiler believes of infinities."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.ptx.instruction import instruction


@instruction("max.f32 $0, $1, $2;", "=f,f,f", pure=True)
def fmax(x: Any, y: Any) -> Any:
    """Return the larger of two float32; of a NaN and a number, the number.

    PTX ISA: ``max``.

    Examples
    --------
    >>> fmax(-np.inf, -1.0)
    np.float32(-1.0)
    """
    return np.fmax(np.float32(x), np.float32(y))
