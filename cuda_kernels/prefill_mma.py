"""Skip-softmax prefill on the tensor cores of Ampere and later, by ``mma.sync`` and ``cp.async``.

One thread block is one vote group of one head: 64 query rows.  Its four warps split a tile of
scores 2 × 2: each has 32 rows against 64 of the tile's 128 keys, so that a fragment of K or V,
once loaded, serves two products.  A warp keeps sums and output of its own half of the keys; the
halves are merged once, at the end, as two splits of a KV cache would be.  Two blocks share a
multiprocessor, so that one waits while the other computes.

    tile       0, kept                 1, skipped         2, kept
    warps    ‖ Q·K₀ᵀ vote ‖ p₀ p₀·V₀ ‖ Q·K₁ᵀ vote ‖       ‖ Q·K₂ᵀ vote ‖ p₂    ‖ p₂·V₂ ‖ Q·K₃ᵀ …
    copies     V₀────────►   K₁────►   V₁────────►  K₂────►              V₂────►  K₃──►   V₃──

K and V have one stage each.  At ‖ all warps wait for each other and for the copies under way.
Copies are begun some rows after each product, V's among those of Q·Kᵀ and the next K's among those
of P·V, so that neither holds up the other.  After a tile that was skipped, the next may be, too:
then V is asked for once the vote has said keep, and waited for behind the first weights, as it is
where there is no vote.

The vote is an AND over rows *and* columns, so every thread votes on the maxima of its own columns.
It compares with the maxima of both halves, which warps leave for each other in shared memory while
they multiply with V: bit by bit, as what waits for a shuffle holds up the products behind it.  Who
votes keep leaves the number of the step in one word there, the same as all who do; behind the next
barrier, where K is done with, everyone looks for it.  It stands until all have, as before each tile
all warps wait.  Infinities are meant as such, so the kernel is compiled without the fast-math
promise that there are none.

A branch takes a warp 15 cycles and more, of some 2500 for a tile.  So what is seldom so is not
asked about at every step: verdicts to be written (bits of a word, until 32 threads write one each),
the loop's end, and a tile that ends behind the last key come at a ``pause``; and a kept tile for
which V is there and no maximum is to be raised takes one branch.

Weights are relative to a maximum that lags behind (FlashAttention-4's conditional rescaling): each
half of the keys has its own, raised only where a score exceeds it by a factor of 2⁸ in weight.
Until then nothing that was summed is to be scaled, and a row's maximum need not be complete.
Weights up to 2⁸ are as exact as others.  It starts from a number below all scores, not from −∞:
less that, −∞ is −∞.  Votes are on the true running maximum, and what bounds a skipped tile's weight
is relative to that: to the one of a half whose own keys are all faint, it may be too large for a
float32.

Registers are the scarce thing (255, of which output and scores take 192): maxima, bounds and, but
at head_dim 64, sums lie in shared memory between tiles, and what little else a thread needs is
computed ``anew``.
"""

import math
from functools import cache

from cuda_kernels.blocks.grid import KEYS, ROWS
from cuda_kernels.blocks.prefill_mma import HALF, SLOT, THREADS
from cuda_kernels.fragments import (
    chunk_at,
    exp2_pack,
    fill,
    pick,
    quad_max,
    quad_scatter_sum,
    row_max,
    scale_rows,
)
from cuda_kernels.ptx.language import (
    anew,
    bits_float,
    cp_async_16_zfill_if,
    cp_async_commit,
    cp_async_wait,
    cuda,
    ex2,
    f32,
    float_bits,
    fmax,
    fragment,
    global_address,
    i32,
    ld_shared_4f,
    ld_shared_32,
    ld_shared_128,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mark_tile,
    mma_m16n8k16,
    pack,
    rcp,
    shared_address,
    shfl_bfly_f32,
    shfl_idx_u32,
    st_global_128,
    st_shared_4f,
    st_shared_32,
    st_shared_relaxed_32,
    sync_warp,
    u8,
    u32,
    u64,
    vote_all,
)
from cuda_kernels.tiles import (
    ASCENDING,
    BOUND_SAFETY,
    ENDS_FIRST,
    LOG2_E,
    count_visible,
    end_of,
    mask_row,
    tile_of,
    uniform,
)

SLICES = KEYS // 16  # of 16 rows of K or V
LOWEST = -3e38  # below scores, in powers of two, and finite
GROWTH = 8.0  # the maximum that weights are relative to lags behind by less, in powers of two
SIGNATURE = (  # arrays of any strides: one build serves them all
    "void(int16[:,:,:,:], int16[:,:,:,:], int16[:,:,:,:], int16[:,:,:,:], int32[:,::1], "
    "float32[:,::1], float32[:,:,:], float32[:,:,:], uint8[:,:,:,::1], float32[:,:,:,::1], "
    "float32, boolean, int32, int32, boolean)"
)


@fragment
def row_of(thread):
    """Topmost row of a thread in its block; it has those 8, 16 and 24 rows below, too."""
    return u32((thread & u32(32)) + ((thread & u32(31)) >> u32(2)))


@fragment
def share_of(thread, shared, first, step, width):
    """Say where a thread's copies of rows go to, and where they come from.

    Rows have ``width`` 16-byte chunks and lie ``step`` bytes apart; ``first`` is the topmost.  A
    thread copies chunk thread % 8 and every eighth after it, of row thread // 8 and every sixteenth
    after it.
    """
    row, chunk = u32(thread >> u32(3)), u32(thread & u32(7))
    target = u32(shared + (row * width + (chunk ^ (row & u32(7)))) * 16)
    return target, u32(u32(row * step + chunk * 16) + u32(first) * step)


@fragment
def load_slice(share, source, step, width, i, size, wanted):
    """Begin to copy, if ``wanted``, a thread's chunks of slice ``i``: 16 bytes each, or zeros."""
    target, offset = share
    start = u32(offset + u32(step * u32(16 * i)))
    for c in range(width // 8):
        to = u32(target + (16 * i * width + 8 * c) * 16)
        cp_async_16_zfill_if(to, u64(source + u64(start) + 128 * c), size, wanted)


@fragment
def load_slices(share, source, step, width, turn, count, wanted):
    """Begin to copy, if ``wanted``, ``count`` slices of 16 rows: those whose turn it is, if any."""
    if turn * count < SLICES:
        for i in range(turn * count, turn * count + count):
            load_slice(share, source, step, width, i, u32(16), wanted)


@fragment
def load_rows(thread, shared, source, first, step, left, rows, width):
    """Begin to copy ``rows`` rows, all at once; those beyond the ``left`` ones become zeros."""
    share = share_of(thread, shared, first, step, width)
    if left >= rows:  # then there is no need to look at each
        load_slices(share, source, step, width, 0, rows // 16, u32(1))
    else:
        own = i32(left - i32(thread >> u32(3)))
        for i in range(rows // 16):
            size = u32(16) if own > i32(16 * i) else u32(0)
            load_slice(share, source, step, width, i, size, u32(1))


@fragment
def load_q(a, q_lane, d, width):
    """Load fragments of Q: 32 rows × dimensions 16 d and on."""
    for x in range(2):
        ldmatrix_x4(a[x], u32(chunk_at(q_lane, 2 * d) + u32(256 * x * width)))


@fragment
def load_k(b, k_lane, d, half, width):
    """Load fragments of Kᵀ: dimensions 16 d and on × 32 keys."""
    for x in range(2):
        ldmatrix_x4(b[x], u32(chunk_at(k_lane, 2 * d) + u32(256 * (2 * half + x) * width)))


@fragment
def load_v(b, v_lane, i, part, width):
    """Load fragments of V: keys 16 i and on × 32 dimensions."""
    for x in range(2):
        ldmatrix_x4_trans(b[x], u32(chunk_at(v_lane, 4 * part + 2 * x) + u32(256 * i * width)))


@fragment
def multiply(c, a, b, part, dtype):
    """Add A [32, 16] times B [16, 32] to columns 32 part and on of an accumulator."""
    for x in range(2):
        for y in range(2):
            mma_m16n8k16(c[x, 4 * part + 2 * y], a[x], b[y, 0], dtype)
            mma_m16n8k16(c[x, 4 * part + 2 * y + 1], a[x], b[y, 1], dtype)


@fragment
def multiply_qk(
    s, a, b, q_lane, k_lane, v_copy, wanted, steps, q_stages, width, v_width, v_slices, dtype
):  # fmt: skip
    """Add Q Kᵀ to s [32, 64]; begin to copy V, if ``wanted``, some rows after each product."""
    share, rows, step = v_copy
    if q_stages < steps:
        load_q(a[0], q_lane, 0, width)
    load_k(b[0], k_lane, 0, 0, width)
    for d in range(steps):  # while one half is multiplied, the next is being loaded
        load_k(b[1], k_lane, d, 1, width)
        multiply(s, a[d % q_stages], b[0], 0, dtype)
        load_slices(share, rows, step, v_width, 2 * d, v_slices, wanted)
        if d + 1 < steps:
            if q_stages < steps:
                load_q(a[(d + 1) % q_stages], q_lane, d + 1, width)
            load_k(b[0], k_lane, d + 1, 0, width)
        multiply(s, a[d % q_stages], b[1], 1, dtype)
        load_slices(share, rows, step, v_width, 2 * d + 1, v_slices, wanted)


@fragment
def raise_maximum(mine, x, t, quad_lane, turn):
    """Raise the running maximum of row ``quad_lane``, at ``mine``, to the tile's, in three turns.

    The four lanes that have a row exchange the maxima of their columns, ``t``, as
    :func:`quad_scatter_sum` does sums; ``x`` keeps what is on its way from one turn to the next.
    """
    odd, upper = quad_lane & u32(1), quad_lane & u32(2)
    if turn == 0:
        x[0], x[1] = t[1] if odd else t[0], t[3] if odd else t[2]
        x[2] = shfl_bfly_f32(t[0] if odd else t[1], 1)
        x[3] = shfl_bfly_f32(t[2] if odd else t[3], 1)
    elif turn == 1:
        low, high = fmax(x[0], x[2]), fmax(x[1], x[3])
        x[0] = high if upper else low
        x[1] = shfl_bfly_f32(low if upper else high, 2)
        x[2] = bits_float(ld_shared_32(mine))
    else:
        st_shared_32(mine, float_bits(fmax(x[2], fmax(x[0], x[1]))))


@fragment
def raise_top(acc, l, top, factor, t, scale_log2, tops, writes, v_blocks):
    """Raise what weights are relative to, 2**top, to the tile's maxima, and scale what was summed.

    ``t`` has the maxima in this thread's columns, ``factor`` is room, ``tops`` where ``top`` lies.
    """
    for r in range(4):
        factor[r] = top[r]
        top[r] = fmax(top[r], f32(quad_max(t[r]) * scale_log2))
        factor[r] = ex2(f32(factor[r] - top[r]))
        l[r] = f32(l[r] * factor[r])
    sync_warp()  # all of a quad have read what one of it writes
    if writes:
        st_shared_4f(tops, top)
    scale_rows(acc[0], v_blocks, factor[0], factor[1])
    scale_rows(acc[1], v_blocks, factor[2], factor[3])


@cache
def make_kernel(head_dim, v_head_dim, dtype, skip, with_gap):
    """Build the kernel for one pair of head sizes, F16 or BF16, with or without the skip test.

    ``skip=False`` is the dense kernel; ``with_gap`` also writes the gap of every tile.
    """
    width, v_width = head_dim // 8, v_head_dim // 8  # 16-byte chunks in a row
    steps, blocks, v_blocks = head_dim // 16, KEYS // 2 // 8, v_head_dim // 8
    pairs, parts = KEYS // 2 // 16, v_head_dim // 32
    q_bytes, k_bytes, v_bytes = 2 * ROWS * head_dim, 2 * KEYS * head_dim, 2 * KEYS * v_head_dim
    stay = head_dim == 64  # Q and the running sums, in registers
    q_stages = steps if stay else 2
    at_once = 8 if stay else 4  # chunks that a thread begins to copy after a product
    k_slices, v_slices = at_once * 8 // width, at_once * 8 // v_width
    if head_dim == 192:  # with two, the compiler does not unroll the 12 steps of Q Kᵀ
        v_slices = 1
    # Copies that may not be wanted are branched around, one by one, and that costs 2 % at head_dim
    # 128; two ways of Q Kᵀ, with copies and without, cost 4 % at 64, and 2 % in the dense build.
    one_way = head_dim != 128 or with_gap or not skip
    compares = skip or with_gap
    minus_infinity = -math.inf

    @cuda.jit(launch_bounds=(THREADS, 2 if head_dim <= 128 else 1))
    def skip_softmax_prefill_mma(
        q, k, v, out,  # [B, Lq, Hq, D], [B, Lk, Hkv, D], [B, Lk, Hkv, Dv], [B, Lq, Hq, Dv]; 16 bits
        spans,  # [B, 4] int32: first query row, query rows, first key, keys of each request
        ln_lam,  # [B, Hq] float32
        lse, bound,  # [B, Hq, Lq] float32, results
        state, gap,  # [B, Hq, groups, key tiles] uint8 and float32, results; gaps begin at −inf
        scale, causal, window, order, padded,  # padded: rows beyond a request's own become 0
    ):  # fmt: skip
        memory = cuda.shared.array(0, u8, alignment=1024)
        base = shared_address(memory, 0)
        k_tile, v_tile = u32(base + q_bytes), u32(base + q_bytes + k_bytes)
        maxima = u32(v_tile + v_bytes)  # [half of the keys, 64 rows], and the like of top
        constants = u32(maxima + 4 * HALF)  # ln λ, and q_first
        vote = u32(constants + 8)  # the last step whose tile somebody voted to keep
        slots = u32(constants + 16)  # of each thread: its 4 running sums; u and what that refers to
        thread = u32(cuda.threadIdx.x)
        lane, quad_lane = u32(thread & u32(31)), u32(thread & u32(3))
        row_half, key_half = u32((thread >> u32(5)) & u32(1)), u32(thread >> u32(6))
        head, batch = uniform(cuda.blockIdx.y), uniform(cuda.blockIdx.z)
        kv_head = uniform(u32(head) // (u32(q.shape[2]) // u32(k.shape[2])))
        q_first, lq = uniform(spans[batch, 0]), uniform(spans[batch, 1])
        k_first, lk = uniform(spans[batch, 2]), uniform(spans[batch, 3])

        # --- which rows, and which keys they see: the longest rows first
        group = i32(i32(cuda.gridDim.x) - 1 - i32(cuda.blockIdx.x))
        row0 = i32(group * ROWS)
        last_row = i32(min(i32(row0 + ROWS), lq) - 1)
        end_first = i32(end_of(row0, lq, lk, causal))  # keys that every real row of the group sees
        end_last = i32(end_of(last_row, lq, lk, causal)) if row0 < lq else i32(0)
        first = i32(max(i32(end_first - window), i32(0)) // KEYS)
        n = i32(max(i32(i32(end_last + KEYS - 1) // KEYS - first), i32(0)))  # key tiles to visit
        # keys of tiles clear_from … clear_from + clear − 1 are seen by all rows; the group is full
        clear_from = i32(max(i32(end_last - window + KEYS - 1), i32(0)) // KEYS)
        clear = i32(max(i32(end_first // KEYS - clear_from), i32(0)))
        if row0 + ROWS > lq:
            clear = i32(0)
        whole = i32(lk // KEYS)  # tiles that end before the keys do

        # --- the first copies: Q, and one tile of K
        q_step, k_step, v_step = u32(q.strides[1]), u32(k.strides[1]), u32(v.strides[1])
        q_rows = global_address(q, (batch, i32(q_first + row0), head, 0))
        k_rows = global_address(k, (batch, k_first, kv_head, 0))
        v_rows = global_address(v, (batch, k_first, kv_head, 0))
        load_rows(thread, base, q_rows, i32(0), q_step, i32(lq - row0), ROWS, width)
        if n > 0:
            key = i32(tile_of(order, i32(0), first, n) * KEYS)
            load_rows(thread, k_tile, k_rows, key, k_step, i32(lk - key), KEYS, width)
        cp_async_commit()

        # --- where this lane's rows of 8 × 8 matrices lie
        low, high = u32(lane & u32(7)), u32(lane >> u32(4))
        middle = u32((lane >> u32(3)) & u32(1))
        q_row, k_row = u32(32 * row_half + (lane & u32(15))), u32(64 * key_half + low + 8 * high)
        v_row = u32(64 * key_half + (lane & u32(15)))
        q_lane = u32(base + (q_row * width + (high ^ low)) * 16)
        k_lane = u32(k_tile + (k_row * width + (middle ^ low)) * 16)
        v_lane = u32(v_tile + (v_row * v_width + (high ^ low)) * 16)
        my_maxima = u32(maxima + (thread >> u32(2)) * 16)
        my_sums = u32(slots + thread * 16)
        my_bound = u32(my_sums + SLOT)

        s = cuda.local.array((2, blocks, 4), f32)  # [32 rows, 64 keys]
        acc = cuda.local.array((2, v_blocks, 4), f32)  # [32 rows, Dv]
        a = cuda.local.array((q_stages, 2, 4), u32)  # fragments of Q: all, or one used, one coming
        p = cuda.local.array((2, 2, 4), u32)  # of the weights: one used, one coming
        b = cuda.local.array((2, 2, 2, 2), u32)  # of K or V: likewise
        words = cuda.local.array(4, u32)
        t = cuda.local.array(4, f32)  # of each of the thread's 4 rows: tile max in its columns,
        m = cuda.local.array(4, f32)  # running max of all keys,
        l = cuda.local.array(4, f32)  # running sum in its columns,
        top = cuda.local.array(4, f32)  # 2**top is what its weights are relative to;
        alpha = cuda.local.array(4, f32)
        x = cuda.local.array(4, f32)  # for what is exchanged
        fill(acc[0], v_blocks, 0.0)
        fill(acc[1], v_blocks, 0.0)
        for r in range(4):
            m[r], l[r], top[r] = f32(minus_infinity), f32(0.0), f32(LOWEST)
        if quad_lane == 0:
            st_shared_4f(my_maxima, m)
            st_shared_4f(u32(my_maxima + 2 * HALF), top)
        st_shared_4f(my_sums, l)
        if skip:
            st_shared_4f(my_bound, l)
        if thread == 0:
            st_shared_32(constants, float_bits(ln_lam[batch, head]))
            st_shared_32(u32(constants + 4), u32(q_first))
            st_shared_32(vote, u32(0))
        scale_log2 = f32(scale * f32(LOG2_E))

        # --- the walk: to the next tile above or below, but for the first two steps of ends_first
        j = tile_of(order, i32(0), first, n)
        by = i32(1) if order == ASCENDING else i32(-1)
        leaps = uniform(i32(2) if order == ENDS_FIRST and first == 0 else i32(0))
        # a tile that ends behind the last key is copied all at once, and zeros where there are no
        # rows: K at step ``stop``, if it is the last one's, and V ``late``, once it is needed
        stop = n
        if order == ASCENDING and n > 1 and i32(first + n) > whole:
            stop = i32(n - 1)
        late = u32(j >= whole)
        pause = i32(min(i32(1 if late else 32), stop))
        history = u32(0)  # decisions of the last 32 steps, the newest in the lowest bit
        step = i32(0)
        while True:
            if step == pause:
                if skip:
                    here = i32(anew(thread))
                    if here < 32 and here < step:  # of the last 32 decisions, a thread writes one
                        decision = u32(u32(history >> u32(here)) & u32(1))
                        tile = tile_of(order, i32(step - 1 - here), first, n)
                        state[batch, head, group, tile] = u8(1 + decision)
                if step == n:
                    break
                if step == stop:
                    key = i32(j * KEYS)
                    left = i32(lk - key)
                    load_rows(anew(thread), k_tile, k_rows, key, k_step, left, KEYS, width)
                    cp_async_commit()
                    stop = n
                late = u32(j >= whole)
                pause = i32(min(i32(step + i32(1 if late else 32)), stop))
            j_next = i32(j + by)
            if step < leaps:
                j_next = i32(0) if step == 0 else i32(n - 2)
            step = i32(step + 1)
            more = u32(step < stop)
            mark_tile(u32(j))
            cp_async_wait(0)
            cuda.syncthreads()  # K of this tile is there; V of the last one is done with
            key = i32(j * KEYS)
            v_share = share_of(anew(thread), v_tile, key, v_step, v_width)
            early = u32(late ^ u32(1))
            if skip:  # where the last tile was skipped, V of this one may not be needed
                early = u32(u32(~(history | late)) & u32(1))

            # --- S = Q Kᵀ                                                      s [32 rows, 64 keys]
            fill(s[0], blocks, 0.0)
            fill(s[1], blocks, 0.0)
            if stay and step == 1:
                for d in range(steps):
                    load_q(a[d], q_lane, d, width)
            v_copy = v_share, v_rows, v_step
            if one_way or early:
                multiply_qk(
                    s, a, b, q_lane, k_lane, v_copy, early if one_way else u32(1),
                    steps, q_stages, width, v_width, v_slices, dtype,
                )  # fmt: skip
            else:
                multiply_qk(
                    s, a, b, q_lane, k_lane, v_copy, u32(0),
                    steps, q_stages, width, v_width, v_slices, dtype,
                )  # fmt: skip
            cp_async_commit()

            # --- the mask comes first
            masked = u32(j - clear_from) >= u32(clear)
            if masked:
                here = anew(thread)
                column = i32(key + i32((here >> u32(6)) * 64 + 2 * (here & u32(3))))
                for r in range(4):
                    row = i32(row0 + i32(row_of(here)) + 8 * r)
                    end = i32(end_of(row, lq, lk, causal))
                    mask_row(s[r // 2], blocks, 2 * (r % 2), column, i32(end - window), end)

            # --- the vote, on the maxima of this thread's columns; before it, what comes after it
            next_key = i32(j_next * KEYS)
            k_share = share_of(anew(thread), k_tile, next_key, k_step, width)
            my_maxima = u32(maxima + (anew(thread) >> u32(2)) * 16)
            if compares:
                ld_shared_4f(m, my_maxima)
                ld_shared_4f(x, u32(my_maxima ^ u32(HALF)))
            my_tops = u32(my_maxima + 2 * HALF)
            ld_shared_4f(top, my_tops)
            if not stay:
                ld_shared_4f(l, my_sums)
            if skip:
                limit = bits_float(ld_shared_32(constants))
            t[0], t[1] = row_max(s[0], blocks)
            t[2], t[3] = row_max(s[1], blocks)
            if compares:
                for r in range(4):
                    m[r] = fmax(m[r], x[r])
                # fmax leaves out −inf − −inf: a row that has seen nothing yet, but for all four
                low = fmax(f32(t[0] - m[0]), f32(t[1] - m[1]))
                rise = f32(fmax(low, fmax(f32(t[2] - m[2]), f32(t[3] - m[3]))) * scale)
            if with_gap:
                highest = fmax(f32(minus_infinity), rise)
                for i in range(5):
                    highest = fmax(highest, shfl_bfly_f32(highest, u32(1 << i)))
                if lane == 0:
                    cuda.atomic.max(gap, (batch, head, group, j), highest)
            low = fmax(f32(t[0] * scale_log2 - top[0]), f32(t[1] * scale_log2 - top[1]))
            high = fmax(f32(t[2] * scale_log2 - top[2]), f32(t[3] * scale_log2 - top[3]))
            stays = vote_all(u32(fmax(low, high) <= f32(GROWTH)))  # what weights are relative to
            if skip:
                if rise >= limit:
                    st_shared_relaxed_32(vote, u32(step))
                cp_async_wait(0)
                cuda.syncthreads()  # the votes are there, V if it was asked for; K is done with
                skipped = u32(0) if ld_shared_32(vote) == u32(step) else u32(1)
                history = u32(u32(history + history) + skipped)
                if skipped:
                    if more:
                        load_slices(k_share, k_rows, k_step, width, 0, SLICES, u32(1))
                    cp_async_commit()
                    for r in range(4):  # all we know of the tile bounds its weight
                        seen = f32(2 * blocks)
                        if masked:
                            seen = count_visible(s[r // 2], blocks, 2 * (r % 2))
                        weight = ex2(f32((t[r] - m[r]) * scale_log2))
                        t[r] = f32(seen * weight) if seen > 0 else f32(0.0)
                    # of row quad_lane: u, relative to the maximum x[1] of all keys, not to 2**top:
                    # that of this half may lie below by so much that the weight overflows
                    ld_shared_4f(x, my_bound)
                    now = pick(m, quad_lane)
                    older = f32(x[0] * ex2(f32((x[1] - now) * scale_log2)))
                    older = older if x[0] > 0 else f32(0.0)
                    x[0], x[1] = f32(older + quad_scatter_sum(t, quad_lane)), now
                    st_shared_4f(my_bound, x)
                    j = j_next
                    continue

            # --- online softmax: the first weights
            if stays & early:  # as is usual
                exp2_pack(p[0], s, l, top, scale_log2, 0, dtype)
            else:
                if not early:  # V is yet to be asked for
                    left = i32(lk - key)
                    load_rows(anew(thread), v_tile, v_rows, key, v_step, left, KEYS, v_width)
                    cp_async_commit()
                if not stays:
                    raise_top(acc, l, top, alpha, t, scale_log2, my_tops, quad_lane == 0, v_blocks)
                exp2_pack(p[0], s, l, top, scale_log2, 0, dtype)
                if skip and not early:
                    cp_async_wait(0)
                    cuda.syncthreads()
            if not skip:
                cp_async_wait(0)
                cuda.syncthreads()  # V is there, and K is done with

            # --- acc += P V, the exponentials one step of 16 keys ahead           acc [32 rows, Dv]
            load_v(b[0], v_lane, 0, 0, v_width)
            for i in range(pairs):
                if i + 1 < pairs:
                    exp2_pack(p[(i + 1) % 2], s, l, top, scale_log2, i + 1, dtype)
                    if i + 2 == pairs and not stay:
                        st_shared_4f(u32(slots + anew(thread) * 16), l)
                for c in range(parts):
                    if c + 1 < parts:
                        load_v(b[(c + 1) % 2], v_lane, i, c + 1, v_width)
                    elif i + 1 < pairs:
                        load_v(b[(c + 1) % 2], v_lane, i + 1, 0, v_width)
                    multiply(acc, p[i % 2], b[c % 2], c, dtype)
                    load_slices(k_share, k_rows, k_step, width, i * parts + c, k_slices, more)
                    if compares and i > 0 and c == 0:  # nobody compares with the maxima now
                        raise_maximum(u32(maxima + anew(thread) * 4), x, t, quad_lane, i - 1)
            cp_async_commit()
            j = j_next

        # --- merge the halves of the keys: one leaves what it has, the other takes it up
        cp_async_wait(0)
        cuda.syncthreads()
        thread = shfl_idx_u32(thread, thread)  # itself; but the assembler, which sees through anew,
        # does not know that, and so keeps nothing computed from it in a register until here
        my_maxima, my_sums = u32(maxima + (thread >> u32(2)) * 16), u32(slots + thread * 16)
        ld_shared_4f(top, u32(my_maxima + 2 * HALF))
        if not stay:
            ld_shared_4f(l, my_sums)
        x[0], x[1] = f32(0.0), f32(0.0)
        if skip:
            ld_shared_4f(x, u32(my_sums + SLOT))
        lane, quad_lane = u32(thread & u32(31)), u32(thread & u32(3))
        row_half, key_half = u32((thread >> u32(5)) & u32(1)), u32(thread >> u32(6))
        top_row, l_row, u, u_m = pick(top, quad_lane), quad_scatter_sum(l, quad_lane), x[0], x[1]
        pair = u32((thread & u32(63)) * 16)  # where the thread of the other half looks
        there = u32(base + row_half * u32(2 * v_blocks * 512) + lane * 16)
        if key_half == 1:
            x[0], x[1], x[2] = top_row, l_row, u
            st_shared_4f(u32(v_tile + pair), x)
            for i in range(2):
                for block in range(v_blocks):
                    st_shared_4f(u32(there + u32((i * v_blocks + block) * 512)), acc[i, block])
        cuda.syncthreads()
        rows_out = i32(q.shape[1]) if padded else lq
        q_first = i32(ld_shared_32(u32(constants + 4)))
        if key_half == 0:
            ld_shared_4f(x, u32(v_tile + pair))
            highest = fmax(top_row, x[0])
            weight = ex2(f32(top_row - highest)) if l_row > 0 else f32(0.0)
            weight_other = ex2(f32(x[0] - highest)) if x[1] > 0 else f32(0.0)
            total = f32(l_row * weight + x[1] * weight_other)
            over = rcp(total) if total > 0 else f32(0.0)
            u = f32(f32(u + x[2]) * f32(BOUND_SAFETY))
            u = f32(u * ex2(f32(u_m * scale_log2 - highest))) if u > 0 else f32(0.0)
            row = i32(row0 + i32(row_of(thread) + 8 * quad_lane))
            if row < rows_out:
                seen = f32(highest * f32(1 / LOG2_E) + math.log(total))
                lse[batch, head, q_first + row] = seen if total > 0 else f32(minus_infinity)
                bound[batch, head, q_first + row] = u * rcp(f32(total + u)) if u > 0 else f32(0.0)
            for r in range(4):
                source = u32((lane & u32(28)) + r)
                alpha[r] = bits_float(shfl_idx_u32(float_bits(f32(weight * over)), source))
                top[r] = bits_float(shfl_idx_u32(float_bits(f32(weight_other * over)), source))
            for i in range(2):
                for block in range(v_blocks):
                    ld_shared_4f(x, u32(there + u32((i * v_blocks + block) * 512)))
                    for c in range(4):
                        r = 2 * i + c // 2
                        acc[i, block, c] = f32(acc[i, block, c] * alpha[r] + x[c] * top[r])
        cuda.syncthreads()

        # --- out, through shared memory so that whole rows are written
        if key_half == 0:
            for r in range(4):
                row_here = u32(row_of(thread) + 8 * r)
                to = u32(base + (row_here * v_width + (row_here & u32(7))) * 16 + quad_lane * 4)
                for block in range(v_blocks):
                    i, c = r // 2, 2 * (r % 2)
                    two = pack(acc[i, block, c], acc[i, block, c + 1], dtype)
                    st_shared_32(u32(u32(to ^ u32(block % 8 * 16)) + u32(block // 8 * 128)), two)
        cuda.syncthreads()
        q_first = i32(ld_shared_32(u32(constants + 4)))  # again: a register less until here
        row_here, chunk = u32(thread >> u32(3)), u32(thread & u32(7))
        source = u32(base + (row_here * v_width + (chunk ^ (row_here & u32(7)))) * 16)
        for i in range(ROWS // 16):
            row = i32(row0 + i32(row_here) + 16 * i)
            if row < rows_out:
                for c in range(v_width // 8):
                    ld_shared_128(words, u32(source + u32((16 * i * v_width + 8 * c) * 16)))
                    at = (batch, i32(q_first + row), head, i32(8 * chunk + 64 * c))
                    st_global_128(global_address(out, at), words)

        # --- tiles that were not visited, or on which the dense build has no vote
        for tile in range(i32(thread), i32(state.shape[3]), THREADS):
            if tile < first or tile >= first + n:
                state[batch, head, group, tile] = u8(0)
            elif not skip:
                state[batch, head, group, tile] = u8(1)

    return skip_softmax_prefill_mma
