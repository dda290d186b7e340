"""Which key tiles a vote group visits, in which order, and which of their scores a row sees.

What every kernel that decides on tiles of 64 × 128 has in common, whatever its instructions.
"""

from __future__ import annotations

import math

import numpy as np

from cuda_kernels.ptx.language import cpu_body, f32, fragment, i32, shfl_idx_u32, u32

LOG2_E = math.log2(math.e)
BOUND_SAFETY = 1.01  # covers approximate exponentials
ASCENDING, DESCENDING, ENDS_FIRST = 0, 1, 2


@fragment
def uniform(x):
    """Say of an integer that the whole warp shares that it does: it can leave the registers."""
    return i32(shfl_idx_u32(u32(x), u32(0)))


@fragment
def end_of(row, lq, lk, causal):
    """Keys before the first that a query row does not see any more; 0 for a padding row."""
    end = lk
    if causal:
        end = i32(min(max(i32(row + 1 + lk - lq), i32(0)), lk))
    return i32(0) if row >= lq else end


@fragment
def tile_of(order, step, first, n):
    """Key tile of a step: tiles first … first + n − 1 in visit order."""
    j = i32(first + n - 1 - step)
    if order == ASCENDING:
        j = i32(first + step)
    elif order == ENDS_FIRST and first == 0 and step > 0:
        j = i32(n - step) if step > 1 else i32(0)
    return j


@fragment
def mask_row(s, blocks, half, column, first, end):
    """Hide the scores of one row outside keys first … end − 1.

    ``half`` is 0 for the upper row, 2 for the lower one; ``column`` is this thread's first key.
    """
    for j in range(blocks):
        for i in range(2):
            key = i32(column + 8 * j + i)
            if key < first or key >= end:
                s[j, half + i] = f32(-math.inf)


@cpu_body(mask_row)
def _mask_row(s, blocks, half, column, first, end):
    keys = column + 8 * np.arange(blocks)[:, None] + np.arange(2)
    s[:blocks, half : half + 2][(keys < first) | (keys >= end)] = -np.inf


@fragment
def count_visible(s, blocks, half):
    """Count the scores of one row that are not hidden."""
    seen = f32(0.0)
    for j in range(blocks):
        for i in range(2):
            seen = f32(seen + (f32(1.0) if s[j, half + i] > -math.inf else f32(0.0)))
    return seen


@fragment
def columns_seen(column, blocks, first, end):
    """Count those of a thread's keys, column + 8 j and the next, j < blocks, in first … end − 1."""
    seen = i32(0)
    for i in range(2):
        low = i32(min(max(i32(first - column - i + 7) >> 3, i32(0)), i32(blocks)))
        high = i32(min(max(i32(end - column - i + 7) >> 3, i32(0)), i32(blocks)))
        seen = i32(seen + max(i32(high - low), i32(0)))
    return f32(seen)
