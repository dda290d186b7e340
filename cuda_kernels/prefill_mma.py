"""Skip-softmax prefill on the tensor cores of Ampere and later, by ``mma.sync`` and ``cp.async``.

One thread block is one vote group of one head: 4 warps, 64 query rows.  Each warp holds 16 rows:
their scores against a whole key tile (128 keys), and their output, stay in registers.  Two blocks
share a multiprocessor, so that the exponentials of one run beside the products of the other.

    K    K₀ ─► K₁ ───────────► K₂ ───────────►        two stages: the next is always on its way
    V          V₀ ──────►      V₁ ──────►             one stage
    warps      S=QKᵀ vote p PV S=QKᵀ vote ·           (· skipped)

The vote is an AND over rows *and* columns, so every thread votes on the maxima of its own columns;
the shuffles that complete a row's maximum stand on the kept path only.  Infinities are meant as
such, so the kernel is compiled without the fast-math promise that there are none.
"""

import math
from functools import cache

from cuda_kernels.fragments import fill, pack_rows, quad_sum, scale_rows
from cuda_kernels.ptx.language import (
    bar_red_and,
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    ex2,
    f32,
    fmax,
    fragment,
    global_address,
    i32,
    ld_shared_128,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mark_tile,
    mma_m16n8k16,
    pack,
    shared_address,
    shfl_bfly_f32,
    st_global_128,
    st_shared_32,
    u8,
    u32,
    u64,
)  # fmt: skip

ROWS, KEYS = 64, 128  # the decision grid
THREADS = 128
LOG2_E = math.log2(math.e)
BOUND_SAFETY = 1.01  # covers approximate exponentials
ASCENDING, DESCENDING, ENDS_FIRST = 0, 1, 2
NO_WINDOW = 1 << 30
SIGNATURE = (  # arrays of any strides: one build serves them all
    "void(int16[:,:,:,:], int16[:,:,:,:], int16[:,:,:,:], int16[:,:,:,:], float32[:,::1], "
    "float32[:,:,::1], float32[:,:,::1], uint8[:,:,:,::1], float32[:,:,:,::1], "
    "float32, boolean, int32, int32)"
)


def shared_bytes(head_dim, v_head_dim):
    """Dynamic shared memory of a block: Q, two stages of K, one of V."""
    return 2 * (ROWS * head_dim + 2 * KEYS * head_dim + KEYS * v_head_dim)


@fragment
def swizzled(row, chunk, width):
    """Byte of a 16-byte chunk in a tile of rows of ``width`` chunks, free of bank conflicts."""
    return u32((row * width + (chunk ^ (row & u32(7)))) * 16)


@fragment
def load_rows(shared, array, batch, head, first, length, thread, rows, width):
    """Begin to copy rows first … first + rows − 1 of a head; zeros beyond row length − 1."""
    row, column = u32(thread // u32(width)), u32(thread % u32(width))
    source = global_address(array, (batch, i32(first + i32(row)), head, i32(8 * column)))
    step = u64(THREADS // width * u64(array.strides[1]))
    for i in range(rows * width // THREADS):
        r = u32(row + i * (THREADS // width))
        size = u32(16) if i32(first + i32(r)) < length else u32(0)
        cp_async_16_zfill(u32(shared + swizzled(r, column, width)), source, size)
        source = u64(source + step)


@fragment
def load_k(b, k_tile, d, half, lane, width):
    """Load fragments of Kᵀ, dimensions 16 d and on × 16 keys: those of one half of the keys."""
    for i in range(4):
        row = u32(16 * (4 * half + i) + (lane & u32(7)) + (lane >> u32(4)) * 8)
        chunk = u32(2 * d + ((lane >> u32(3)) & u32(1)))
        ldmatrix_x4(b[i], u32(k_tile + swizzled(row, chunk, width)))


@fragment
def load_v(b, v_tile, i, half, lane, width):
    """Load fragments of V, keys 16 i and on × 16 dimensions: of one half of the dimensions."""
    for x in range(width // 4):
        row = u32(16 * i + (lane & u32(15)))
        chunk = u32(2 * (width // 4 * half + x) + (lane >> u32(4)))
        ldmatrix_x4_trans(b[x], u32(v_tile + swizzled(row, chunk, width)))


@fragment
def multiply(c, a, b, half, n, dtype):
    """Add the products of A with n fragments of B to one half of the accumulator tiles."""
    for i in range(n):
        mma_m16n8k16(c[2 * (n * half + i)], a, b[i, 0], dtype)
        mma_m16n8k16(c[2 * (n * half + i) + 1], a, b[i, 1], dtype)


@fragment
def columns_max(s, blocks):
    """Return the largest score of the upper and of the lower row, in this thread's columns."""
    upper, lower = fmax(s[0, 0], s[0, 1]), fmax(s[0, 2], s[0, 3])
    for j in range(1, blocks):
        upper = fmax(upper, fmax(s[j, 0], s[j, 1]))
        lower = fmax(lower, fmax(s[j, 2], s[j, 3]))
    return upper, lower


@fragment
def row_max(x):
    """Complete the maximum of a row: over the four lanes that share it."""
    x = fmax(x, shfl_bfly_f32(x, 1))
    return fmax(x, shfl_bfly_f32(x, 2))


@fragment
def exp_rows(s, blocks, scale, upper, lower):
    """Replace every score by 2**(score · scale − m); return this thread's part of the row sums."""
    upper_sum, lower_sum = f32(0.0), f32(0.0)
    for j in range(blocks):
        for i in range(2):
            s[j, i] = ex2(f32(s[j, i] * scale - upper))
            s[j, i + 2] = ex2(f32(s[j, i + 2] * scale - lower))
            upper_sum = f32(upper_sum + s[j, i])
            lower_sum = f32(lower_sum + s[j, i + 2])
    return upper_sum, lower_sum


@fragment
def mask_row(s, blocks, half, column, first, end):
    """Hide the scores of one row outside keys first … end − 1; return how many stay.

    ``half`` is 0 for the upper row, 2 for the lower one; ``column`` is this thread's first key.
    """
    seen = i32(0)
    for j in range(blocks):
        for i in range(2):
            key = i32(column + 8 * j + i)
            if key < first or key >= end:
                s[j, half + i] = f32(-math.inf)
            else:
                seen = i32(seen + 1)
    return seen


@fragment
def end_of(row, lq, lk, causal):
    """Keys before the first that a query row does not see any more; 0 for a padding row."""
    end = lk
    if causal:
        end = min(max(i32(row + 1 + lk - lq), i32(0)), lk)
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


@cache
def make_kernel(head_dim, v_head_dim, dtype, skip, with_gap):
    """Build the kernel for one pair of head sizes, F16 or BF16, with or without the skip test.

    ``skip=False`` is the dense kernel; ``with_gap`` also writes the gap of every tile.
    """
    width, v_width = head_dim // 8, v_head_dim // 8  # 16-byte chunks in a row
    steps, blocks, pairs, v_blocks = head_dim // 16, KEYS // 8, KEYS // 16, v_head_dim // 8
    q_bytes, k_bytes = 2 * ROWS * head_dim, 2 * KEYS * head_dim
    minus_infinity = -math.inf

    @cuda.jit(launch_bounds=(THREADS, 2))
    def skip_softmax_prefill_mma(
        q, k, v, out,  # [B, Lq, Hq, D], [B, Lk, Hkv, D], [B, Lk, Hkv, Dv], [B, Lq, Hq, Dv]; 16 bits
        ln_lam,  # [B, Hq] float32
        lse, bound,  # [B, Hq, Lq] float32, results
        state, gap,  # [B, Hq, groups, key tiles] uint8 and float32, results; untouched where masked
        scale, causal, window, order,
    ):  # fmt: skip
        memory = cuda.shared.array(0, u8, alignment=128)
        base = shared_address(memory, 0)
        k_base, v_tile = u32(base + q_bytes), u32(base + q_bytes + 2 * k_bytes)
        thread = u32(cuda.threadIdx.x)
        warp, lane = u32(thread >> u32(5)), u32(thread & u32(31))
        head, batch = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        lq, lk = i32(q.shape[1]), i32(k.shape[1])
        kv_head = i32(head // i32(q.shape[2] // k.shape[2]))

        # --- which rows, and which keys they see: the longest rows first
        group = i32(i32(cuda.gridDim.x) - 1 - i32(cuda.blockIdx.x))
        row0 = i32(group * ROWS)
        upper = i32(row0 + i32(warp * 16 + (lane >> u32(2))))
        lower = i32(upper + 8)
        end_first = end_of(row0, lq, lk, causal)  # keys that every real row of the group sees
        end_last = end_of(min(i32(row0 + ROWS), lq) - 1, lq, lk, causal)
        first = i32(max(i32(end_first - window), i32(0)) // KEYS)
        n = max(i32((end_last + KEYS - 1) // KEYS - first), i32(0))  # key tiles to visit

        # --- Q, and the first K
        load_rows(base, q, batch, head, row0, lq, thread, ROWS, width)
        if n > 0:
            key = i32(tile_of(order, i32(0), first, n) * KEYS)
            load_rows(k_base, k, batch, kv_head, key, lk, thread, KEYS, width)
        cp_async_commit()

        q_tile = cuda.local.array((steps, 4), u32)
        s = cuda.local.array((blocks, 4), f32)
        p = cuda.local.array((pairs, 4), u32)
        acc = cuda.local.array((v_blocks, 4), f32)
        b = cuda.local.array((2, 4, 2, 2), u32)  # fragments of K or V: four used, four coming
        fill(acc, v_blocks, 0.0)
        m_upper = m_lower = f32(minus_infinity)  # running maxima, unscaled
        l_upper = l_lower = f32(0.0)
        u_upper = u_lower = f32(0.0)
        scale_log2 = f32(scale * LOG2_E)
        limit = f32(ln_lam[batch, head] / scale)  # ln λ in units of unscaled scores

        for step in range(n):
            j = tile_of(order, i32(step), first, n)
            mark_tile(u32(j))
            cp_async_wait(0)
            cuda.syncthreads()  # K of this tile is there; V of the last one is done with
            load_rows(v_tile, v, batch, kv_head, i32(j * KEYS), lk, thread, KEYS, v_width)
            cp_async_commit()
            if step + 1 < n:
                key = i32(tile_of(order, i32(step + 1), first, n) * KEYS)
                other = u32(k_base + u32((step + 1) & 1) * k_bytes)
                load_rows(other, k, batch, kv_head, key, lk, thread, KEYS, width)
            cp_async_commit()
            if step == 0:
                for d in range(steps):
                    row = u32(warp * 16 + (lane & u32(15)))
                    chunk = u32(2 * d + (lane >> u32(4)))
                    ldmatrix_x4(q_tile[d], u32(base + swizzled(row, chunk, width)))

            # --- S = Q Kᵀ                                                     s [16 rows, 128 keys]
            k_tile = u32(k_base + u32(step & 1) * k_bytes)
            fill(s, blocks, 0.0)
            load_k(b[0], k_tile, 0, 0, lane, width)
            for d in range(steps):  # while one half is multiplied, the next is being loaded
                load_k(b[1], k_tile, d, 1, lane, width)
                multiply(s, q_tile[d], b[0], 0, 4, dtype)
                if d + 1 < steps:
                    load_k(b[0], k_tile, d + 1, 0, lane, width)
                multiply(s, q_tile[d], b[1], 1, 4, dtype)

            # --- the mask comes first
            seen_upper = seen_lower = i32(blocks * 2)
            if row0 + ROWS > lq or (j + 1) * KEYS > end_first or j * KEYS < end_last - window:
                column = i32(j * KEYS + i32(2 * (lane & u32(3))))
                end = end_of(upper, lq, lk, causal)
                seen_upper = mask_row(s, blocks, 0, column, i32(end - window), end)
                end = end_of(lower, lq, lk, causal)
                seen_lower = mask_row(s, blocks, 2, column, i32(end - window), end)

            # --- the vote, on the maxima of this thread's columns
            t_upper, t_lower = columns_max(s, blocks)
            if with_gap:
                row_gap = f32(minus_infinity)
                if t_upper > minus_infinity:
                    row_gap = f32(t_upper - m_upper)
                if t_lower > minus_infinity:
                    row_gap = fmax(row_gap, f32(t_lower - m_lower))
                for i in range(5):
                    row_gap = fmax(row_gap, shfl_bfly_f32(row_gap, u32(1 << i)))
                if lane == 0:
                    cuda.atomic.max(gap, (batch, head, group, j), f32(row_gap * scale))
            if skip:
                agrees = (t_upper == minus_infinity or f32(t_upper - m_upper) < limit) and (
                    t_lower == minus_infinity or f32(t_lower - m_lower) < limit
                )
                skipped = bar_red_and(u32(1), u32(THREADS), u32(agrees))
                if thread == 0:
                    state[batch, head, group, j] = u8(2) if skipped else u8(1)
                if skipped:  # all we know of the tile bounds its weight
                    if seen_upper > 0:
                        weight = ex2(f32((t_upper - m_upper) * scale_log2))
                        u_upper = f32(u_upper + f32(seen_upper) * weight)
                    if seen_lower > 0:
                        weight = ex2(f32((t_lower - m_lower) * scale_log2))
                        u_lower = f32(u_lower + f32(seen_lower) * weight)
                    continue
            elif thread == 0:
                state[batch, head, group, j] = u8(1)

            # --- online softmax                                              p [16 rows, 128 keys]
            old_upper, old_lower = f32(m_upper * scale_log2), f32(m_lower * scale_log2)
            m_upper, m_lower = fmax(m_upper, row_max(t_upper)), fmax(m_lower, row_max(t_lower))
            new_upper = f32(m_upper * scale_log2) if m_upper > minus_infinity else f32(0.0)
            new_lower = f32(m_lower * scale_log2) if m_lower > minus_infinity else f32(0.0)
            alpha_upper = ex2(f32(old_upper - new_upper))
            alpha_lower = ex2(f32(old_lower - new_lower))
            sum_upper, sum_lower = exp_rows(s, blocks, scale_log2, new_upper, new_lower)
            l_upper = f32(l_upper * alpha_upper + sum_upper)
            l_lower = f32(l_lower * alpha_lower + sum_lower)
            u_upper, u_lower = f32(u_upper * alpha_upper), f32(u_lower * alpha_lower)
            scale_rows(acc, v_blocks, alpha_upper, alpha_lower)
            pack_rows(p, s, blocks, dtype)

            # --- acc += P V                                                  acc [16 rows, Dv]
            cp_async_wait(1)
            cuda.syncthreads()  # V of this tile is there
            load_v(b[0], v_tile, 0, 0, lane, v_width)
            for i in range(pairs):
                load_v(b[1], v_tile, i, 1, lane, v_width)
                multiply(acc, p[i], b[0], 0, v_width // 4, dtype)
                if i + 1 < pairs:
                    load_v(b[0], v_tile, i + 1, 0, lane, v_width)
                multiply(acc, p[i], b[1], 1, v_width // 4, dtype)

        # --- out = acc / l, through shared memory where Q and K were; lse and bound
        cp_async_wait(0)
        cuda.syncthreads()
        l_upper, l_lower = quad_sum(l_upper), quad_sum(l_lower)
        u_upper = f32(quad_sum(u_upper) * f32(BOUND_SAFETY))
        u_lower = f32(quad_sum(u_lower) * f32(BOUND_SAFETY))
        over_upper = f32(1.0) / l_upper if l_upper > 0 else f32(0.0)
        over_lower = f32(1.0) / l_lower if l_lower > 0 else f32(0.0)
        scale_rows(acc, v_blocks, over_upper, over_lower)
        for block in range(v_blocks):
            row, byte = u32(warp * 16 + (lane >> u32(2))), u32((lane & u32(3)) * 4)
            above = u32(base + swizzled(row, block, v_width) + byte)
            below = u32(base + swizzled(u32(row + 8), block, v_width) + byte)
            st_shared_32(above, pack(acc[block, 0], acc[block, 1], dtype))
            st_shared_32(below, pack(acc[block, 2], acc[block, 3], dtype))
        if lane & u32(3) == 0:
            if upper < lq:
                seen = f32(m_upper * scale + math.log(l_upper))
                lse[batch, head, upper] = seen if l_upper > 0 else f32(minus_infinity)
                share = u_upper / (l_upper + u_upper)
                bound[batch, head, upper] = share if u_upper > 0 else f32(0.0)
            if lower < lq:
                seen = f32(m_lower * scale + math.log(l_lower))
                lse[batch, head, lower] = seen if l_lower > 0 else f32(minus_infinity)
                share = u_lower / (l_lower + u_lower)
                bound[batch, head, lower] = share if u_lower > 0 else f32(0.0)
        cuda.syncthreads()
        words = cuda.local.array(4, u32)
        for i in range(ROWS * v_width // THREADS):
            chunk = u32(thread + i * THREADS)
            row, column = u32(chunk // u32(v_width)), u32(chunk % u32(v_width))
            if i32(row0 + i32(row)) < lq:
                ld_shared_128(words, u32(base + swizzled(row, column, v_width)))
                st_global_128(
                    global_address(out, (batch, i32(row0 + i32(row)), head, i32(8 * column))), words
                )

    return skip_softmax_prefill_mma
