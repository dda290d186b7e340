"""Skip-softmax prefill on Hopper's tensor cores: TMA, mbarriers, specialised warps and ``wgmma``.

A thread block is two neighbouring vote groups of one head.  Its first warpgroup copies: one warp
K, another V, each as far ahead as its ring of stages lets it.  The other two warpgroups multiply,
64 query rows each, and take turns, so that the exponentials of one run beside the products of the
other; within a group the product with V lags one tile behind, beside this tile's exponentials:

    K warp     K₀ ─► K₁ ─► K₂ ─► K₃ ─►                 as stages of K become empty
    V warp     V₀ ─► V₁ ─► V₂ ─►                       as stages of V become empty
    group 0    QK₀     vote p₀ │ QK₁ p₀V₀  vote (skip) │ QK₂        vote p₂ │ QK₃ p₂V₂ …
    group 1            QK₀     │ vote p₀     QK₁ p₀V₀  │ vote p₁    QK₂     │ p₁V₁ …

**The vote costs nothing where a tile is kept.**  A thread votes on the maxima of its own columns.
A warp with a row that keeps the tile knows the verdict: it leaves a mark, arrives at the group's
barrier and goes on.  Only warps that would skip wait there, and look for marks.  The next turn's
barrier sees to it that no mark is overwritten before all have looked.

**Order is a matter of each vote group**, but the two share their copies of K and V.  So blocks
begin where both groups end in the same key tile: under a causal mask that is every other group,
which one the lengths decide, and the first block may begin one group above the first row.  Tiles
that only one of the two sees (under a window) are masked for the other, whose rows all vote skip.

A row beyond the request's own has m = +∞ from the start: whatever its scores, it votes skip.
"""

import math
from functools import cache

from cuda_kernels.blocks.grid import KEYS, ROWS
from cuda_kernels.blocks.prefill_wgmma import BOX, THREADS, stages
from cuda_kernels.fragments import (
    exp2_rows,
    fill,
    pack_rows,
    quad_max,
    quad_sum,
    row_max,
    scale_rows,
)
from cuda_kernels.ptx.language import (
    K_MAJOR,
    MN_MAJOR,
    bar_arrive,
    bar_sync,
    cuda,
    ex2,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    fmax,
    fragment,
    i32,
    k_major,
    ld_shared_128,
    mark_tile,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    mn_major,
    pack,
    rcp,
    setmaxnreg_dec,
    setmaxnreg_inc,
    shared_address,
    shfl_bfly_f32,
    st_shared_32,
    st_shared_128,
    swizzle,
    sync_warp,
    tma_commit,
    tma_load_4d,
    tma_store_4d,
    tma_wait_read,
    u8,
    u32,
    u64,
    vote_all,
    wgmma_commit,
    wgmma_fence,
    wgmma_rs,
    wgmma_ss,
    wgmma_wait,
)
from cuda_kernels.tiles import (
    BOUND_SAFETY,
    LOG2_E,
    columns_seen,
    end_of,
    mask_row,
    tile_of,
    uniform,
)

BLOCK_ROWS = 2 * ROWS
TURN, VOTE, OUT = 1, 3, 5  # barriers of the block, + the number of the group
SIGNATURE = (  # arrays of any strides: one build serves them all
    "void(tensor_map, tensor_map, tensor_map, tensor_map, int32[:,::1], float32[:,::1], "
    "float32[:,:,:], float32[:,:,:], uint8[:,:,:,::1], float32[:,:,:,::1], "
    "float32, boolean, int32, int32, int32)"
)


@fragment
def first_row_of(block, lq, lk, causal):
    """First row of a block, −64 for some: the groups of a block see the same last key tile."""
    row = i32(block * BLOCK_ROWS)
    if causal and (i32(lk - lq + ROWS - 1) & i32(KEYS - 1)) >= ROWS:
        row = i32(row - ROWS)
    return row


@fragment
def tiles_of(row0, lq, lk, causal, window):
    """Return what the 64 rows from ``row0`` on see: nothing where they are no request's rows.

    Namely: their first key tile; the one after their last; and first and end of the keys that all
    of them see.
    """
    last_row = i32(min(i32(row0 + ROWS), lq) - 1)
    exist = row0 >= 0 and row0 < lq
    end_first = i32(end_of(row0, lq, lk, causal)) if exist else i32(0)
    end_last = i32(end_of(last_row, lq, lk, causal)) if exist else i32(0)
    first = i32(max(i32(end_first - window), i32(0)) // KEYS)
    stop = i32(max(i32(end_last + KEYS - 1) // KEYS, first))
    return first, stop, i32(end_last - window), end_first


@fragment
def most(seen, tile_max, m, scale_log2):
    """Bound the weight of ``seen`` scores, none above ``tile_max``, that go with the maximum m."""
    weight = ex2(f32(f32(tile_max - m) * scale_log2))
    return f32(seen * weight) if seen > 0 else f32(0.0)


@fragment
def load_tile(shared, source, barrier, boxes, batch, row, head):
    """Begin to copy 128 rows of Q, K or V: a box for every 64 columns."""
    mbarrier_arrive_expect_tx(barrier, boxes * BOX)
    for box in range(boxes):
        tma_load_4d(u32(shared + box * BOX), source, barrier, batch, row, head, 64 * box)


@fragment
def begin_qk(s, q_tile, k_tile, steps, dtype):
    """Begin S = Q Kᵀ, [64, 128], from the descriptors of 64 rows of Q and of a tile of K."""
    wgmma_fence()
    for d in range(steps):
        at = (d // 4 * BOX + d % 4 * 32) // 16
        wgmma_ss(s, u64(q_tile + at), u64(k_tile + at), d > 0, KEYS, dtype, K_MAJOR)
    wgmma_commit()


@fragment
def begin_pv(acc, p, v_tile, n, dtype):
    """Begin acc += P V, [64, n], from the shared address of a tile of V."""
    v = mn_major(v_tile, BOX)
    wgmma_fence()
    for i in range(KEYS // 16):
        wgmma_rs(acc, p[i], u64(v + 128 * i), 1, n, dtype, MN_MAJOR)
    wgmma_commit()


@cache
def make_kernel(head_dim, v_head_dim, dtype, skip, with_gap):
    """Build the kernel for one pair of head sizes, F16 or BF16, with or without the skip test.

    ``skip=False`` is the dense kernel; ``with_gap`` also writes the gap of every tile.
    """
    boxes, v_boxes = head_dim // 64, v_head_dim // 64
    depth, shift = stages(head_dim), stages(head_dim).bit_length() - 1
    steps, blocks, pairs, v_blocks = head_dim // 16, KEYS // 8, KEYS // 16, v_head_dim // 8
    q_bytes, k_bytes, v_bytes = BOX * boxes, BOX * boxes, BOX * v_boxes
    compares = skip or with_gap
    minus_infinity = -math.inf

    @cuda.jit(launch_bounds=(THREADS, 1))
    def skip_softmax_prefill_wgmma(
        q, k, v, out,  # maps of [B, Lq, Hq, D], [B, Lk, Hkv, D], [B, Lk, Hkv, Dv], [B, Lq, Hq, Dv]
        spans,  # [B, 4] int32: first query row, query rows, first key, keys of each request
        ln_lam,  # [B, Hq] float32
        lse, bound,  # [B, Hq, Lq] float32, results
        state, gap,  # [B, Hq, groups, key tiles] uint8 and float32, results; gaps begin at −inf
        scale, causal, window, order, heads_per_kv,
    ):  # fmt: skip
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        k_base = u32(base + q_bytes)
        v_base = u32(k_base + depth * k_bytes)
        q_full = u32(v_base + depth * v_bytes)
        v_raw, marks = u32(q_full + 8), u32(q_full + 16)  # marks: a word of each of the 8 warps
        k_full, k_empty = u32(q_full + 64), u32(q_full + 64 + 8 * depth)
        v_full, v_empty = u32(q_full + 64 + 16 * depth), u32(q_full + 64 + 24 * depth)
        thread = u32(cuda.threadIdx.x)
        head, batch = uniform(cuda.blockIdx.y), uniform(cuda.blockIdx.z)
        q_first, lq = uniform(spans[batch, 0]), uniform(spans[batch, 1])
        k_first, lk = uniform(spans[batch, 2]), uniform(spans[batch, 3])
        if thread < 8:
            st_shared_32(u32(marks + thread * 4), u32(0))
        if thread == 0:
            mbarrier_init(q_full, 1)
            mbarrier_init(v_raw, 1)
            for stage in range(depth):
                mbarrier_init(u32(k_full + 8 * stage), 1)
                mbarrier_init(u32(v_full + 8 * stage), 1)
                mbarrier_init(u32(k_empty + 8 * stage), 2)
                mbarrier_init(u32(v_empty + 8 * stage), 2)
            fence_mbarrier_init()

        # --- which rows, and which key tiles either group sees: the longest rows first
        row_block = i32(i32(cuda.gridDim.x) - 1 - i32(cuda.blockIdx.x))
        row0 = i32(first_row_of(row_block, lq, lk, causal))
        first, stop, _, _ = tiles_of(row0, lq, lk, causal, window)
        first_1, stop_1, _, _ = tiles_of(i32(row0 + ROWS), lq, lk, causal, window)
        if stop <= first:
            first, stop = first_1, stop_1
        elif first_1 < stop_1:
            first, stop = i32(min(first, first_1)), i32(max(stop, stop_1))
        n = i32(stop - first)  # key tiles to visit
        cuda.syncthreads()

        if thread < 128:  # --- producers
            setmaxnreg_dec(24)
            kv_head, lane = i32(u32(head) // u32(heads_per_kv)), u32(thread & u32(31))
            if thread == 0:
                load_tile(base, q, q_full, boxes, batch, i32(q_first + row0), head)
                for step in range(n):
                    stage, parity = u32(step & (depth - 1)), u32((step >> shift) & 1)
                    key = i32(tile_of(order, step, first, n) * KEYS)
                    mbarrier_wait(u32(k_empty + 8 * stage), u32(parity ^ u32(1)))
                    load_tile(
                        u32(k_base + stage * u32(k_bytes)), k, u32(k_full + 8 * stage), boxes,
                        batch, i32(k_first + key), kv_head,
                    )  # fmt: skip
            elif thread >= 32 and thread < 64:
                for step in range(n):
                    stage, parity = u32(step & (depth - 1)), u32((step >> shift) & 1)
                    key = i32(tile_of(order, step, first, n) * KEYS)
                    tile, arrived = u32(v_base + stage * u32(v_bytes)), u32(v_full + 8 * stage)
                    mbarrier_wait(u32(v_empty + 8 * stage), u32(parity ^ u32(1)))
                    if i32(key + KEYS) <= lk:
                        if lane == 0:
                            load_tile(tile, v, arrived, v_boxes, batch, i32(k_first + key), kv_head)
                    else:  # rows behind the last key may hold anything, and 0 · NaN is NaN
                        if lane == 0:
                            load_tile(tile, v, v_raw, v_boxes, batch, i32(k_first + key), kv_head)
                        mbarrier_wait(v_raw, u32(0))
                        zeros = cuda.local.array(4, u32)
                        for i in range(4):
                            zeros[i] = u32(0)
                        at = u32(u32(lk - key) * u32(128) + lane * u32(16))
                        while at < BOX:
                            for box in range(v_boxes):
                                st_shared_128(u32(tile + at + box * BOX), zeros)
                            at = u32(at + u32(512))
                        fence_proxy_async()
                        sync_warp()
                        if lane == 0:
                            mbarrier_arrive(arrived)
        else:  # --- consumers: 64 rows each
            setmaxnreg_inc(240)
            group, lane = uniform((thread >> u32(7)) - u32(1)), u32(thread & u32(31))
            warp, leads = u32((thread >> u32(5)) & u32(3)), u32(thread & u32(127)) == 0
            row0 = i32(row0 + group * ROWS)
            vote_group = i32(row0 // ROWS)
            exists = row0 >= 0 and vote_group < i32(state.shape[2])
            first_seen, stop_seen, all_from, all_until = tiles_of(row0, lq, lk, causal, window)
            upper_row = i32(row0 + i32(warp * u32(16) + (lane >> u32(2))))
            lower_row = i32(upper_row + 8)
            q_tile = k_major(u32(base + u32(group) * u32(BOX // 2)))
            my_marks = u32(marks + u32(group) * u32(16))
            verdict, turn, next_turn = u32(VOTE + group), u32(TURN + group), u32(TURN + 1 - group)
            s = cuda.local.array((blocks, 4), f32)  # [64 rows, 128 keys]
            p = cuda.local.array((pairs, 4), u32)  # of the tile before: [64 rows, 128 keys]
            acc = cuda.local.array((v_blocks, 4), f32)  # [64 rows, Dv]
            votes = cuda.local.array(4, u32)
            fill(acc, v_blocks, 0.0)
            m_upper = f32(minus_infinity) if upper_row < lq else f32(math.inf)
            m_lower = f32(minus_infinity) if lower_row < lq else f32(math.inf)
            l_upper, l_lower = f32(0.0), f32(0.0)
            u_upper, u_lower = f32(0.0), f32(0.0)
            scale_log2, lam = f32(scale * f32(LOG2_E)), f32(ln_lam[batch, head])
            kept = u32(0)  # is a product with V still to be begun?
            if group == 1:
                bar_arrive(u32(TURN), 256)
            mbarrier_wait(q_full, u32(0))

            for step in range(n):
                stage, parity = u32(step & (depth - 1)), u32((step >> shift) & 1)
                before = u32((step - 1) & (depth - 1))
                j = tile_of(order, step, first, n)
                mark_tile(u32(j))
                key = i32(j * KEYS)

                # --- S = Q Kᵀ, and after it acc += P V of the tile before   s [64 rows, 128 keys]
                mbarrier_wait(u32(k_full + 8 * stage), parity)
                bar_sync(turn, 256)
                begin_qk(s, q_tile, k_major(u32(k_base + stage * u32(k_bytes))), steps, dtype)
                if kept:
                    begin_pv(acc, p, u32(v_base + before * u32(v_bytes)), v_head_dim, dtype)
                    bar_arrive(next_turn, 256)
                    wgmma_wait(1, s, KEYS)
                else:
                    bar_arrive(next_turn, 256)
                    wgmma_wait(0, s, KEYS)
                if leads:
                    mbarrier_arrive(u32(k_empty + 8 * stage))

                # --- the mask comes first
                seen_upper, seen_lower = f32(2 * blocks), f32(2 * blocks)
                if key < all_from or i32(key + KEYS) > all_until:
                    column = i32(key + i32(2 * (lane & u32(3))))
                    end = i32(end_of(upper_row, lq, lk, causal))
                    mask_row(s, blocks, 0, column, i32(end - window), end)
                    seen_upper = columns_seen(column, blocks, i32(end - window), end)
                    end = i32(end_of(lower_row, lq, lk, causal))
                    mask_row(s, blocks, 2, column, i32(end - window), end)
                    seen_lower = columns_seen(column, blocks, i32(end - window), end)

                # --- the vote, on the maxima of this thread's columns
                t_upper, t_lower = row_max(s, blocks)
                skipped = u32(0)
                if compares:  # fmax leaves out −inf − −inf: a row that has seen nothing yet
                    rise = fmax(f32(minus_infinity), f32(t_upper - m_upper))
                    rise = f32(fmax(rise, f32(t_lower - m_lower)) * scale)
                if with_gap:
                    highest = rise
                    for i in range(5):
                        highest = fmax(highest, shfl_bfly_f32(highest, u32(1 << i)))
                    if lane == 0 and exists:
                        cuda.atomic.max(gap, (batch, head, vote_group, j), highest)
                if skip:
                    if vote_all(u32(rise < lam)):
                        bar_sync(verdict, 128)
                        ld_shared_128(votes, my_marks)
                        mine = u32(step + 1)
                        skipped = u32(1)
                        for i in range(4):
                            if votes[i] == mine:
                                skipped = u32(0)
                    else:
                        if lane == 0:
                            st_shared_32(u32(my_marks + warp * u32(4)), u32(step + 1))
                        bar_arrive(verdict, 128)
                    if leads and exists:
                        state[batch, head, vote_group, j] = u8(u32(1) + skipped)

                if skipped == 0:  # --- online softmax
                    old_upper, old_lower = f32(m_upper * scale_log2), f32(m_lower * scale_log2)
                    m_upper = fmax(m_upper, quad_max(t_upper))
                    m_lower = fmax(m_lower, quad_max(t_lower))
                    top_upper = f32(m_upper * scale_log2) if m_upper > minus_infinity else f32(0.0)
                    top_lower = f32(m_lower * scale_log2) if m_lower > minus_infinity else f32(0.0)
                    a_upper = ex2(f32(old_upper - top_upper))
                    a_lower = ex2(f32(old_lower - top_lower))
                    sum_upper, sum_lower = exp2_rows(s, blocks, scale_log2, top_upper, top_lower)
                    l_upper = f32(l_upper * a_upper + sum_upper)
                    l_lower = f32(l_lower * a_lower + sum_lower)
                    if skip:
                        u_upper, u_lower = f32(u_upper * a_upper), f32(u_lower * a_lower)
                    # a wait for V of this tile, not the next step's: ptxas moves none of the
                    # exponentials beyond it, as it does beyond the wait for the product
                    mbarrier_wait(u32(v_full + 8 * stage), parity)
                    wgmma_wait(0, acc, v_head_dim)
                    if kept and leads:
                        mbarrier_arrive(u32(v_empty + 8 * before))
                    scale_rows(acc, v_blocks, a_upper, a_lower)
                    pack_rows(p, s, blocks, dtype)
                    kept = u32(1)
                else:  # --- all we know of the tile bounds its weight
                    u_upper = f32(u_upper + most(seen_upper, t_upper, m_upper, scale_log2))
                    u_lower = f32(u_lower + most(seen_lower, t_lower, m_lower, scale_log2))
                    mbarrier_wait(u32(v_full + 8 * stage), parity)  # or a later wait may miss it
                    wgmma_wait(0, acc, v_head_dim)
                    if leads:
                        if kept:
                            mbarrier_arrive(u32(v_empty + 8 * before))
                        mbarrier_arrive(u32(v_empty + 8 * stage))
                    kept = u32(0)

            # --- acc += P V of the last tile
            if kept:
                before = u32((n - 1) & (depth - 1))
                begin_pv(acc, p, u32(v_base + before * u32(v_bytes)), v_head_dim, dtype)
                wgmma_wait(0, acc, v_head_dim)
            if group == 0:
                bar_sync(u32(TURN), 256)  # the turn that nobody takes

            # --- what is known of the rows
            l_upper, l_lower = quad_sum(l_upper), quad_sum(l_lower)
            u_upper, u_lower = f32(quad_sum(u_upper)), f32(quad_sum(u_lower))
            over_upper = rcp(l_upper) if l_upper > 0 else f32(0.0)
            over_lower = rcp(l_lower) if l_lower > 0 else f32(0.0)
            scale_rows(acc, v_blocks, over_upper, over_lower)
            for half in range(2):
                row = i32(upper_row + 8 * half)
                l, u = (l_upper, u_upper) if half == 0 else (l_lower, u_lower)
                m = m_upper if half == 0 else m_lower
                u = f32(u * f32(BOUND_SAFETY))
                if u32(lane & u32(3)) == 0 and exists and row < i32(lse.shape[2]):
                    real = row < lq and l > 0
                    known = f32(m * scale + math.log(l)) if real else f32(minus_infinity)
                    share = f32(u * rcp(f32(l + u))) if real and u > 0 else f32(0.0)
                    lse[batch, head, q_first + row] = known
                    bound[batch, head, q_first + row] = share
                if row >= lq:
                    for block in range(v_blocks):
                        acc[block, 2 * half] = f32(0.0)
                        acc[block, 2 * half + 1] = f32(0.0)

            # --- out, through shared memory where this group's rows of Q were
            bar_sync(u32(OUT + group), 128)
            place = u32(base + u32(group) * u32(BOX // 2))
            row_here = u32(warp * u32(16) + (lane >> u32(2)))
            for block in range(v_blocks):
                at = u32(place + row_here * u32(128) + u32(block // 8 * BOX + block % 8 * 16))
                at = u32(at + (lane & u32(3)) * u32(4))
                st_shared_32(swizzle(at), pack(acc[block, 0], acc[block, 1], dtype))
                st_shared_32(swizzle(u32(at + 1024)), pack(acc[block, 2], acc[block, 3], dtype))
            fence_proxy_async()
            bar_sync(u32(OUT + group), 128)
            if leads and exists:
                for box in range(v_boxes):
                    tma_store_4d(
                        out, u32(place + box * BOX), batch, i32(q_first + row0), head, 64 * box
                    )
                tma_commit()
                tma_wait_read(0)

            # --- tiles that were not visited, or on which the dense build has no vote
            if exists:
                for tile in range(i32(thread & u32(127)), i32(state.shape[3]), 128):
                    if tile < first_seen or tile >= stop_seen:
                        state[batch, head, vote_group, tile] = u8(0)
                    elif not skip:
                        state[batch, head, vote_group, tile] = u8(1)

    return skip_softmax_prefill_wgmma
