"""Register tiles: what a thread does with its part of a tile of scores or output.

A warp holds 16 rows × 8n columns as ``mma`` leaves them: in each thread a float32
``cuda.local.array((n, 4))``, of which entries 0 and 1 of a row belong to the thread's upper row,
``lane // 4``, and entries 2 and 3 to its lower row, 8 rows below.  The four lanes of a quad share
their rows.  ``n`` is a compile-time integer, or the tile leaves the registers.
"""

from __future__ import annotations

import math

import numpy as np

from cuda_kernels.ptx.language import cpu_body, ex2, f32, fmax, fragment, pack, shfl_bfly_f32, u32


@fragment
def fill(tile, n, value):
    """Set a tile of n × 4 values to ``value``."""
    for j in range(n):
        for i in range(4):
            tile[j, i] = f32(value)


@fragment
def row_max(tile, n):
    """Return the largest value of the upper and of the lower row, in this thread's columns."""
    upper = fmax(tile[0, 0], tile[0, 1])
    lower = fmax(tile[0, 2], tile[0, 3])
    for j in range(1, n):
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
def finite(x):
    """Return 0 for −∞: subtracting it from −∞ leaves that."""
    return x if x > f32(-math.inf) else f32(0.0)


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


@fragment
def exp2_pack(packed, tile, sums, m, scale, i, dtype):
    """Turn scores of 32 rows × keys 16 i … 16 i + 15 into weights, rounded as the A operand.

    ``tile`` is 2 × n × 4: two blocks of 16 rows; ``packed`` 2 × 4.  A weight is 2**(x·scale − m);
    ``m`` and ``sums`` have an entry for each of a thread's four rows, and the weights are added to
    the sums.
    """
    for x in range(2):
        for half in range(2):
            r = 2 * x + half
            for z in range(2):
                low = ex2(f32(tile[x, 2 * i + z, 2 * half] * scale - m[r]))
                high = ex2(f32(tile[x, 2 * i + z, 2 * half + 1] * scale - m[r]))
                sums[r] = f32(f32(sums[r] + low) + high)
                packed[x, 2 * z + half] = pack(low, high, dtype)


@fragment
def pick(x, i):
    """Return entry ``i`` of four, known only at run time: the array stays in registers."""
    low = x[1] if i & u32(1) else x[0]
    high = x[3] if i & u32(1) else x[2]
    return high if i & u32(2) else low


@fragment
def quad_scatter_sum(x, quad_lane):
    """Add up the four lanes' entries; lane ``quad_lane`` of the quad gets the sum of that entry."""
    odd, upper = quad_lane & u32(1), quad_lane & u32(2)
    low = f32((x[1] if odd else x[0]) + shfl_bfly_f32(x[0] if odd else x[1], 1))
    high = f32((x[3] if odd else x[2]) + shfl_bfly_f32(x[2] if odd else x[3], 1))
    return f32((high if upper else low) + shfl_bfly_f32(low if upper else high, 2))


@fragment
def chunk_at(address, n):
    """Address of an even 16-byte chunk of a row, given that of its chunk 0, or of 1 for 1 + n.

    Rows are whole multiples of 128 bytes, and chunk c of row r lies where c ^ (r % 8) would: then
    neither the rows of a matrix nor the chunks of a row meet in a bank.
    """
    return u32(u32(address ^ u32((n & 6) * 16)) + u32((n >> 3) * 128))


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


@cpu_body(exp2_pack)
def _exp2_pack(packed, tile, sums, m, scale, i, dtype):
    s = tile[:, 2 * i : 2 * i + 2].reshape(2, 2, 2, 2).swapaxes(1, 2)  # [x, half, z, column]
    p = ex2(s * np.float32(scale) - m.reshape(2, 2, 1, 1))
    parts = np.concatenate([sums[:, None], p.reshape(4, 4)], axis=1)
    sums[:] = np.add.accumulate(parts, axis=1, dtype=np.float32)[:, -1]
    packed[...] = pack(p[..., 0], p[..., 1], dtype).swapaxes(1, 2).reshape(2, 4)
