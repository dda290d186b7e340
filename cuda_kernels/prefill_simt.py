"""The teaching kernel: skip-softmax attention in plain Numba CUDA, one thread per query row.

No warp intrinsics and no tensor cores: it runs on any GPU and, unchanged, in Numba's CUDA
simulator.  Read it beside section "The rule" of the README; the letters are the same.
A thread block is one vote group of one head.  Its threads load keys together into shared
memory, each scores its own row, and ``syncthreads_and`` counts the votes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from numba import cuda, float32, int32

CHUNK = 16  # keys (or values) in shared memory at a time


@lru_cache(maxsize=32)
def make_kernel(rows: int, keys: int, head_dim: int, v_head_dim: int) -> Any:
    """Build the kernel for one decision grid and one pair of head sizes.

    Parameters
    ----------
    rows, keys : int
        Decision grid; ``keys`` is a multiple of 16.
    head_dim, v_head_dim : int
        Of q and k, and of v.

    Returns
    -------
    kernel
        Launched as ``kernel[(groups, Hq, B), rows](q, k, v, …)``; see its body for the arguments.
    """
    width = max(head_dim, v_head_dim)

    @cuda.jit
    def skip_softmax_prefill(
        q,  # [B, Lq, Hq, D] float32
        k,  # [B, Lk, Hkv, D] float32
        v,  # [B, Lk, Hkv, Dv] float32
        scale,  # softmax scale
        ln_lam,  # [B, Hq] float32: ln λ
        causal,
        order,  # index in sim.geometry.ORDERS
        out,  # [B, Lq, Hq, Dv] float32, result
        lse,  # [B, Hq, Lq] float32, result
        bound,  # [B, Hq, Lq] float32, result: u / (l + u)
        state,  # [B, Hq, groups, key tiles] uint8, result: 0 masked, 1 computed, 2 skipped
        gap,  # [B, Hq, groups, key tiles] float32, result
    ):
        i, h, b, r = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z, cuda.threadIdx.x
        lq, lk, kv = q.shape[1], k.shape[1], h // (q.shape[2] // k.shape[2])
        row, last_row = i * rows + r, min((i + 1) * rows, lq) - 1
        visible = 0  # keys that this row sees; none if it is a padding row
        if row < lq:
            visible = max(row + 1 + lk - lq, 0) if causal else lk
        group_visible = max(last_row + 1 + lk - lq, 0) if causal else lk
        n = (group_visible + keys - 1) // keys  # key tiles that this group visits

        chunk = cuda.shared.array((CHUNK, width), float32)
        gaps = cuda.shared.array(rows, float32)
        p = cuda.local.array(keys, float32)
        acc = cuda.local.array(v_head_dim, float32)
        for d in range(v_head_dim):
            acc[d] = 0.0
        m, l, u = float32(-math.inf), float32(0.0), float32(0.0)

        for step in range(n):
            j = step  # ascending
            if order == 1:
                j = n - 1 - step
            elif order == 2 and step != 1:
                j = n - 1 if step == 0 else n - step
            elif order == 2:
                j = 0
            first, seen = j * keys, min(max(visible - j * keys, 0), keys)

            # --- S = scale · Q Kᵀ, and the row maximum of this tile; the mask comes first
            tile_max = float32(-math.inf)
            for c0 in range(0, keys, CHUNK):
                cuda.syncthreads()
                for x in range(r, CHUNK * head_dim, rows):
                    key = first + c0 + x // head_dim
                    if key < lk:
                        chunk[x // head_dim, x % head_dim] = k[b, key, kv, x % head_dim]
                cuda.syncthreads()
                for c in range(c0, min(c0 + CHUNK, seen)):
                    s = float32(0.0)
                    for d in range(head_dim):
                        s += q[b, row, h, d] * chunk[c - c0, d]
                    p[c] = s * scale
                    tile_max = max(tile_max, p[c])

            # --- the vote: skip only if every row agrees
            row_gap = float32(-math.inf)  # a row that sees nothing here votes skip
            if tile_max > -math.inf:
                row_gap = tile_max - m  # +inf if it has seen nothing so far: it votes keep
            gaps[r] = row_gap
            agrees = row_gap < ln_lam[b, h] or row_gap == -math.inf
            skip = cuda.syncthreads_and(int32(agrees))
            if r == 0:
                for x in range(rows):
                    row_gap = max(row_gap, gaps[x])
                gap[b, h, i, j] = row_gap
                state[b, h, i, j] = 2 if skip else 1
            if skip:
                if seen > 0:
                    u += seen * math.exp(tile_max - m)  # all we know of it bounds its weight
                continue

            # --- online softmax: rescale what was gathered to the new maximum
            if seen > 0:
                m_new = max(m, tile_max)
                alpha = math.exp(m - m_new)  # 0 on the first tile that this row sees
                m = m_new
                l *= alpha
                u *= alpha
                for d in range(v_head_dim):
                    acc[d] *= alpha
                for c in range(seen):
                    p[c] = math.exp(p[c] - m)
                    l += p[c]

            # --- acc += P V
            for c0 in range(0, keys, CHUNK):
                cuda.syncthreads()
                for x in range(r, CHUNK * v_head_dim, rows):
                    key = first + c0 + x // v_head_dim
                    if key < lk:
                        chunk[x // v_head_dim, x % v_head_dim] = v[b, key, kv, x % v_head_dim]
                cuda.syncthreads()
                for c in range(c0, min(c0 + CHUNK, seen)):
                    for d in range(v_head_dim):
                        acc[d] += p[c] * chunk[c - c0, d]

        if row < lq:
            for d in range(v_head_dim):
                out[b, row, h, d] = acc[d] / l if l > 0 else 0.0
            lse[b, h, row] = m + math.log(l) if l > 0 else -math.inf
            u *= 1.01  # covers approximate exponentials
            bound[b, h, row] = u / (l + u) if u > 0 else 0.0

    return skip_softmax_prefill
