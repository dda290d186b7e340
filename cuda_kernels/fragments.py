"""Register tiles: what a thread does with its part of a tile of scores or output.

A warp holds 16 rows × 8n columns as ``mma`` leaves them: in each thread a float32
``cuda.local.array((n, 4))``, of which entries 0 and 1 of a row belong to the thread's upper row,
``lane // 4``, and entries 2 and 3 to its lower row, 8 rows below.  The four lanes of a quad share
their rows.  ``n`` is a compile-time integer, or the tile leaves the registers.
"""

from __future__ import annotations

import math

import numpy as np

from cuda_kernels.ptx.language import cpu_body, ex2, f32, fmax, fragment, pack, shfl_bfly_f32


@fragment
def fill(tile, n, value):
    """Set a tile of n × 4 values to ``value``."""
    for j in range(n):
        for i in range(4):
            tile[j, i] = f32(value)


@fragment
def row_max(tile, n):
    """Return the largest value of the upper and of the lower row, in this thread's columns."""
    upper = f32(-math.inf)
    lower = f32(-math.inf)
    for j in range(n):
        upper = fmax(upper, fmax(tile[j, 0], tile[j, 1]))
        lower = fmax(lower, fmax(tile[j, 2], tile[j, 3]))
    return upper, lower


@fragment
def quad_max(x):
    """Return the largest value of the four lanes that share a row; all lanes take part."""
    x = fmax(x, shfl_bfly_f32(x, 1))
    return fmax(x, shfl_bfly_f32(x, 2))


@fragment
def quad_sum(x):
    """Return the sum over the four lanes that share a row; all lanes take part."""
    x = f32(x + shfl_bfly_f32(x, 1))
    return f32(x + shfl_bfly_f32(x, 2))


@fragment
def exp2_rows(tile, n, scale, upper, lower):
    """Replace every x by 2**(x·scale − m), m being ``upper`` or ``lower``; return the row sums.

    The sums are of this thread's columns alone.
    """
    upper_sum = f32(0.0)
    lower_sum = f32(0.0)
    for j in range(n):
        for i in range(2):
            tile[j, i] = ex2(f32(tile[j, i] * scale - upper))
            tile[j, i + 2] = ex2(f32(tile[j, i + 2] * scale - lower))
            upper_sum += tile[j, i]
            lower_sum += tile[j, i + 2]
    return upper_sum, lower_sum


@fragment
def scale_rows(tile, n, upper, lower):
    """Multiply the upper and the lower row each by its factor."""
    for j in range(n):
        for i in range(2):
            tile[j, i] *= upper
            tile[j, i + 2] *= lower


@fragment
def pack_rows(packed, tile, n, dtype):
    """Round a tile of n × 4 float32 to F16 or BF16, as the A operand of the next ``mma``.

    ``packed`` is a tile of n / 2 × 4 uint32: the columns of two score blocks are 16 keys.
    """
    for j in range(n // 2):
        for i in range(2):
            packed[j, 2 * i] = pack(tile[2 * j + i, 0], tile[2 * j + i, 1], dtype)
            packed[j, 2 * i + 1] = pack(tile[2 * j + i, 2], tile[2 * j + i, 3], dtype)


@cpu_body(fill)
def _fill(tile, n, value):
    tile[:n] = value


@cpu_body(row_max)
def _row_max(tile, n):
    return np.fmax.reduce(tile[:n, :2], axis=None), np.fmax.reduce(tile[:n, 2:], axis=None)


@cpu_body(exp2_rows)
def _exp2_rows(tile, n, scale, upper, lower):
    rows = tile[:n].reshape(n, 2, 2)
    rows[...] = ex2(rows * np.float32(scale) - np.float32([[upper], [lower]]))
    # One by one, as the loop adds them: NumPy's sum would pair them up.
    sums = np.add.accumulate(rows.swapaxes(1, 2).reshape(2 * n, 2), axis=0, dtype=np.float32)[-1]
    return sums[0], sums[1]


@cpu_body(scale_rows)
def _scale_rows(tile, n, upper, lower):
    tile[:n, :2] *= np.float32(upper)
    tile[:n, 2:] *= np.float32(lower)


@cpu_body(pack_rows)
def _pack_rows(packed, tile, n, dtype):
    pairs = tile[:n].reshape(n // 2, 2, 2, 2)  # [j, i, row, column]
    packed[: n // 2] = pack(pairs[..., 0], pairs[..., 1], dtype).reshape(n // 2, 4)
