"""Arithmetic of one thread that plain Python has no name for."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.ptx.halves import format_name, narrow, narrow_one
from cuda_kernels.ptx.instruction import instruction

_SMALLEST_NORMAL = np.finfo(np.float32).tiny
_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)


def _flush(x: Any) -> Any:
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


@instruction("ex2.approx.ftz.f32 $0, $1;", "=f,f", pure=True)
def ex2(x: Any) -> Any:
    """Return 2**x; ex2(−inf) is 0, and numbers below 2**-126 are 0 on either side.

    PTX ISA: ``ex2``, maximum relative error 2**-22.  On the CPU also of whole arrays.

    Examples
    --------
    >>> ex2(3.0), ex2(-np.inf), ex2(-127.0)
    (np.float32(8.0), np.float32(0.0), np.float32(0.0))
    """
    if np.ndim(x):
        with np.errstate(over="ignore", under="ignore"):
            return _flush(np.exp2(_flush(np.asarray(x, np.float32))))
    x = np.float32(x)
    if x >= 128:
        return _INFINITY
    y = np.exp2(x) if abs(x) >= _SMALLEST_NORMAL or x != x else _ONE
    return y if y >= _SMALLEST_NORMAL or y != y else _ZERO


@instruction("rcp.approx.ftz.f32 $0, $1;", "=f,f", pure=True)
def rcp(x: Any) -> Any:
    """Return 1 / x; rcp(0) is infinite, and numbers below 2**-126 are 0 on either side.

    PTX ISA: ``rcp``, maximum error 1 unit in the last place.  Division proper calls a function.

    Examples
    --------
    >>> rcp(4.0), rcp(np.inf)
    (np.float32(0.25), np.float32(0.0))
    """
    with np.errstate(divide="ignore"):
        return np.float32(_flush(np.float32(1) / _flush(np.float32(x))))


@instruction(lambda dtype: f"cvt.rn.{format_name(dtype)}x2.f32 $0, $2, $1;", "=r,f,f,n", pure=True)
def pack(low: Any, high: Any, dtype: int) -> Any:
    """Round two float32 to F16 or BF16 and pack them, ``low`` into bits 0–15.

    PTX ISA: ``cvt.rn.f16x2.f32``, ``cvt.rn.bf16x2.f32``.  On the CPU also of whole arrays.

    Examples
    --------
    >>> hex(pack(1.0, -2.0, 0))
    '0xc0003c00'
    """
    if np.ndim(low):
        bits = narrow([low, high], dtype).astype(np.uint32)
        return bits[0] | bits[1] << np.uint32(16)
    return narrow_one(low, dtype) | narrow_one(high, dtype) << 16


@instruction("mov.b32 $0, $1;", "=r,f", pure=True)
def float_bits(x: Any) -> int:
    """Return the bits of a float32.  PTX ISA: ``mov``.

    Examples
    --------
    >>> hex(float_bits(1.0))
    '0x3f800000'
    """
    return int(np.float32(x).view(np.uint32))


@instruction("mov.b32 $0, $1;", "=f,r", pure=True)
def bits_float(bits: int) -> Any:
    """Return the float32 with these bits.  PTX ISA: ``mov``.

    Examples
    --------
    >>> bits_float(0x3F800000)
    np.float32(1.0)
    """
    return np.uint32(bits).view(np.float32)


@instruction("mov.b32 $0, $1;", "=r,r")
def anew(x: int) -> int:
    """Return x, so that what is computed from it is computed here, and every time.

    Compilers move what does not change out of a loop, where it occupies a register all along; that
    can be one register too many.  PTX ISA: ``mov``.
    """
    return x
