"""Skip-softmax prefill on Hopper's tensor cores: TMA, mbarriers, specialised warps and ``wgmma``.

A thread block is two neighbouring vote groups of one head.  Its first warpgroup copies: one thread
K, another V, each as far ahead as its ring of stages lets it.  The other two warpgroups multiply,
64 query rows each; while one works out exponentials, the tensor cores have the other's products.
Within a group the product with V lags one tile behind, beside this tile's exponentials:

    K          K₀ ─► K₁ ─► K₂ ─► K₃ ─►                 as stages of K become empty
    V          V₀ ─► V₁ ─► V₂ ─►                       as stages of V become empty
    group 0    QK₀     vote p₀   QK₁ p₀V₀  vote (skip)   QK₂        vote p₂   QK₃ p₂V₂ …
    group 1         QK₀     vote p₀   QK₁ p₀V₀  vote p₁     QK₂ p₁V₁     vote (skip)   …

**From one product to the next** a group does what it must and no more.  What can wait is done
while the next Q·K runs: the verdict is written, a skipped tile's weight is bounded, and its stage
of V let go.

**A stage of V** is let go by each warp for itself, once it has seen that the copy came: its next
copy must not end while a warp still waits for this one, whose parity would then have passed by.

**A vote** is one barrier of a group, which ands what its threads say.  They vote on the maxima of
their own columns.

**Weights are relative to a maximum that lags behind**: it is raised only where a score exceeds it
by a factor of 2⁸ in weight.  Until then nothing that was summed is to be scaled; weights up to 2⁸
are as exact as others.  Votes are on the true running maximum.

**Order is a matter of each vote group**, but the two share their copies of K and V.  So blocks
begin where both groups end in the same key tile: under a causal mask that is every other group,
which one the lengths decide, and the first block may begin one group above the first row.  Tiles
that only one of the two sees (under a window) are masked for the other, whose rows all vote skip.

**A block begins** with the copies of Q and of the first K: who copies makes the mbarriers of its
copies, and all meet at a barrier only then.

**It ends** with outputs leaving first, each warp's for itself, by way of shared memory.  What is
reported of rows and tiles is worked out while TMA reads them there.

A row beyond the request's own has m = +∞ from the start: whatever its scores, it votes skip.

**Measured and left out** (H200, 16K tokens; ``results/log.md``): V asked for after the votes loses
up to 16 %, blocks that stay for more rows 5 to 12 %, who keeps passing the vote unheard up to 4 %,
clusters of two blocks that share copies 1 to 4 %.
"""

import math
from functools import cache

from cuda_kernels.blocks.grid import KEYS, ROWS
from cuda_kernels.blocks.prefill_wgmma import BOX, THREADS, stages
from cuda_kernels.fragments import (
    exp2_rows,
    finite,
    pack_rows,
    quad_max,
    quad_sum,
    row_max,
    scale_rows,
)
from cuda_kernels.ptx.language import (
    K_MAJOR,
    MN_MAJOR,
    bar_red_and,
    cuda,
    ex2,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    fmax,
    fragment,
    i32,
    k_major,
    ld_shared_4f,
    ld_shared_128,
    mark_tile,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    mn_major,
    rcp,
    setmaxnreg_dec,
    setmaxnreg_inc,
    shared_address,
    shfl_bfly_f32,
    st_shared_128,
    stmatrix_x4,
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
    ASCENDING,
    BOUND_SAFETY,
    LOG2_E,
    columns_seen,
    end_of,
    mask_row,
    tile_of,
    uniform,
)

BLOCK_ROWS = 2 * ROWS
VOTE = 1  # a barrier of the block, + the number of the group
LN_2 = math.log(2.0)
GROWTH = 8.0  # the maximum that weights are relative to lags behind by less, in powers of two
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
    # without signs these divisions are shifts: some 40 instructions less before the first product
    first = i32(u32(max(i32(end_first - window), i32(0))) // u32(KEYS))
    stop = i32(max(i32(u32(end_last + KEYS - 1) // u32(KEYS)), first))
    return first, stop, i32(end_last - window), end_first


@fragment
def tiles_of_both(row0, lq, lk, causal, window):
    """Return the first key tile that either group of a block sees, and the one after their last."""
    first, stop, _, _ = tiles_of(row0, lq, lk, causal, window)
    first_1, stop_1, _, _ = tiles_of(i32(row0 + ROWS), lq, lk, causal, window)
    if stop <= first:
        first, stop = first_1, stop_1
    elif first_1 < stop_1:
        first, stop = i32(min(first, first_1)), i32(max(stop, stop_1))
    return first, stop


@fragment
def most(seen, tile_max, top, scale_log2):
    """Bound the weight of ``seen`` scores, none above ``tile_max``, relative to 2**top."""
    weight = ex2(f32(tile_max * scale_log2 - top))
    return f32(seen * weight) if seen > 0 else f32(0.0)


@fragment
def after(stage, parity, depth):
    """Return the stage of a ring that follows, and the parity of its phase."""
    last = stage == u32(depth - 1)
    return (u32(0) if last else u32(stage + u32(1))), (u32(parity ^ u32(1)) if last else parity)


@fragment
def make_ring(full, empty, depth, frees):
    """Make the barriers of a ring: each stage is filled by one copy, and let go by ``frees``."""
    for stage in range(depth):
        mbarrier_init(u32(full + 8 * stage), 1)
        mbarrier_init(u32(empty + 8 * stage), frees)


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
    depth = stages(head_dim)
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
        v_raw, k_full = u32(q_full + 8), u32(q_full + 16)
        k_empty, v_full = u32(k_full + 8 * depth), u32(k_full + 16 * depth)
        v_empty, zero = u32(k_full + 24 * depth), u32(q_full + 256)  # 512 bytes of zeros
        thread = u32(cuda.threadIdx.x)
        head, batch, lane = u32(cuda.blockIdx.y), u32(cuda.blockIdx.z), u32(thread & u32(31))
        kv_head = i32(head // u32(heads_per_kv))
        q_first, lq = uniform(spans[batch, 0]), uniform(spans[batch, 1])
        k_first, lk = uniform(spans[batch, 2]), uniform(spans[batch, 3])
        row_block = i32(i32(cuda.gridDim.x) - 1 - i32(cuda.blockIdx.x))  # the longest rows first
        row0 = i32(first_row_of(row_block, lq, lk, causal))

        # --- who copies makes the mbarriers of its copies, and begins before it meets the others
        zeros = cuda.local.array(4, u32)
        for i in range(4):
            zeros[i] = u32(0)
        if thread == 0:
            make_ring(k_full, k_empty, depth, 2)  # let go by either group
            fence_mbarrier_init()
        elif thread == 32:
            make_ring(v_full, v_empty, depth, 8)  # by every warp of both
            mbarrier_init(v_raw, 1)
            fence_mbarrier_init()
        elif thread == 64:
            mbarrier_init(q_full, 1)
            fence_mbarrier_init()
            load_tile(base, q, q_full, boxes, batch, i32(q_first + row0), head)
        elif thread >= 96 and thread < 128:
            st_shared_128(u32(zero + lane * u32(16)), zeros)
        first, stop = tiles_of_both(row0, lq, lk, causal, window)
        first, n = uniform(first), uniform(i32(stop - first))  # key tiles to visit
        if thread == 0 and n > 0:
            key = i32(tile_of(order, 0, first, n) * KEYS)
            load_tile(k_base, k, k_full, boxes, batch, i32(k_first + key), kv_head)
        cuda.syncthreads()

        if thread < 128:  # --- producers
            setmaxnreg_dec(24)
            stage, parity = u32(0), u32(0)
            if thread == 0:
                stage = u32(1)
                for step in range(i32(1), n):  # the first is on its way
                    key = i32(tile_of(order, step, first, n) * KEYS)
                    mbarrier_wait(u32(k_empty + 8 * stage), u32(parity ^ u32(1)))
                    load_tile(
                        u32(k_base + stage * u32(k_bytes)), k, u32(k_full + 8 * stage), boxes,
                        batch, i32(k_first + key), kv_head,
                    )  # fmt: skip
                    stage, parity = after(stage, parity, depth)
            elif thread == 32:
                for step in range(n):
                    key = i32(tile_of(order, step, first, n) * KEYS)
                    tile, arrived = u32(v_base + stage * u32(v_bytes)), u32(v_full + 8 * stage)
                    mbarrier_wait(u32(v_empty + 8 * stage), u32(parity ^ u32(1)))
                    if i32(key + KEYS) <= lk:
                        load_tile(tile, v, arrived, v_boxes, batch, i32(k_first + key), kv_head)
                    else:
                        load_tile(tile, v, v_raw, v_boxes, batch, i32(k_first + key), kv_head)
                    stage, parity = after(stage, parity, depth)
            elif thread >= 64 and thread < 96 and n > 0 and i32(stop * KEYS) > lk:
                # rows behind the last key may hold anything, and 0 · NaN is NaN
                stage = u32(u32(n - 1) % u32(depth)) if order == ASCENDING else u32(0)
                tile, key = u32(v_base + stage * u32(v_bytes)), i32((stop - 1) * KEYS)
                mbarrier_wait(v_raw, u32(0))
                at = u32(u32(lk - key) * u32(128) + lane * u32(16))
                while at < BOX:
                    for box in range(v_boxes):
                        st_shared_128(u32(tile + at + box * BOX), zeros)
                    at = u32(at + u32(512))
                fence_proxy_async()
                sync_warp()
                if lane == 0:
                    mbarrier_arrive(u32(v_full + 8 * stage))
        else:  # --- consumers: 64 rows each
            setmaxnreg_inc(240)
            group = uniform((thread >> u32(7)) - u32(1))
            warp, mine = u32((thread >> u32(5)) & u32(3)), u32(thread & u32(127))
            frees_k, frees_v = mine == 0, lane == 0  # one of the group; one of each warp
            row0 = i32(row0 + group * ROWS)
            vote_group = i32(row0 // ROWS)
            exists = row0 >= 0 and vote_group < i32(state.shape[2])
            tells = mine == 64 and exists
            verdicts = state[batch, head, u32(vote_group) if exists else u32(0)]
            first_seen, stop_seen, all_from, all_until = tiles_of(row0, lq, lk, causal, window)
            upper_row = i32(row0 + i32(warp * u32(16) + (lane >> u32(2))))
            lower_row = i32(upper_row + 8)
            q_tile = k_major(u32(base + u32(group) * u32(BOX // 2)))
            s = cuda.local.array((blocks, 4), f32)  # [64 rows, 128 keys]
            p = cuda.local.array((pairs, 4), u32)  # of the tile before: [64 rows, 128 keys]
            acc = cuda.local.array((v_blocks, 4), f32)  # [64 rows, Dv]
            m_upper = f32(minus_infinity) if upper_row < lq else f32(math.inf)
            m_lower = f32(minus_infinity) if lower_row < lq else f32(math.inf)
            top_upper, top_lower = m_upper, m_lower  # weights are relative to 2**top
            l_upper, l_lower = f32(0.0), f32(0.0)
            u_upper, u_lower = f32(0.0), f32(0.0)
            t_upper, t_lower = f32(0.0), f32(0.0)  # of the tile before, too, when Q·K begins
            seen_upper, seen_lower = f32(0.0), f32(0.0)
            scale_log2, lam = f32(scale * f32(LOG2_E)), f32(ln_lam[batch, head])
            kept = u32(0)  # was the tile before, so that its product with V is still to be begun?
            j, j_before = tile_of(order, 0, first, n), i32(0)
            stage, parity, before, before_parity = u32(0), u32(0), u32(0), u32(0)
            k_tile = k_major(k_base)
            # zeros that ptxas does not know of: others it would make between the first K's arrival
            # and the first product, and those of acc twice
            for block in range(v_blocks):
                ld_shared_4f(acc[block], u32(zero + 16 * block))
            for pair in range(pairs):
                ld_shared_128(p[pair], u32(zero + 16 * (v_blocks + pair)))
            mbarrier_wait(q_full, u32(0))
            if n > 0:
                mbarrier_wait(k_full, u32(0))

            for step in range(n):
                mark_tile(u32(j))

                # --- S = Q Kᵀ, and after it acc += P V of the tile before   s [64 rows, 128 keys]
                begin_qk(s, q_tile, k_tile, steps, dtype)
                here, here_parity = stage, parity
                stage, parity = after(stage, parity, depth)
                k_tile = k_major(u32(k_base + stage * u32(k_bytes)))
                j_next = tile_of(order, i32(step + 1), first, n)
                # ptxas needs product and wait in one branch, or it waits for every single product
                if kept:
                    begin_pv(acc, p, u32(v_base + before * u32(v_bytes)), v_head_dim, dtype)
                    if skip and tells:
                        verdicts[u32(j_before)] = u8(1)
                    if i32(step + 1) < n:
                        mbarrier_wait(u32(k_full + 8 * stage), parity)
                    wgmma_wait(1, s, KEYS)
                else:
                    if skip and step > 0:  # --- all we know of the tile before bounds its weight
                        if tells:
                            verdicts[u32(j_before)] = u8(2)
                        u_upper = f32(u_upper + most(seen_upper, t_upper, top_upper, scale_log2))
                        u_lower = f32(u_lower + most(seen_lower, t_lower, top_lower, scale_log2))
                        mbarrier_wait(u32(v_full + 8 * before), before_parity)
                        sync_warp()
                        if frees_v:
                            mbarrier_arrive(u32(v_empty + 8 * before))
                    if i32(step + 1) < n:
                        mbarrier_wait(u32(k_full + 8 * stage), parity)
                    wgmma_wait(0, s, KEYS)
                if frees_k:
                    mbarrier_arrive(u32(k_empty + 8 * here))

                # --- the mask comes first
                key = i32(j * KEYS)
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
                if skip:  # vote_all tells ptxas that the warp shares the verdict
                    skipped = vote_all(bar_red_and(u32(VOTE + group), 128, u32(rise < lam)))

                if skipped == 0:  # --- online softmax
                    over = fmax(f32(minus_infinity), f32(t_upper * scale_log2 - top_upper))
                    over = fmax(over, f32(t_lower * scale_log2 - top_lower))
                    grows = vote_all(u32(over <= f32(GROWTH))) == 0
                    a_upper, a_lower = f32(1.0), f32(1.0)
                    if grows:
                        a_upper, a_lower = top_upper, top_lower
                        top_upper = fmax(top_upper, f32(quad_max(t_upper) * scale_log2))
                        top_lower = fmax(top_lower, f32(quad_max(t_lower) * scale_log2))
                        a_upper = ex2(f32(a_upper - finite(top_upper)))
                        a_lower = ex2(f32(a_lower - finite(top_lower)))
                        l_upper, l_lower = f32(l_upper * a_upper), f32(l_lower * a_lower)
                        if skip:
                            u_upper, u_lower = f32(u_upper * a_upper), f32(u_lower * a_lower)
                    sum_upper, sum_lower = exp2_rows(
                        s, blocks, scale_log2, finite(top_upper), finite(top_lower)
                    )
                    l_upper, l_lower = f32(l_upper + sum_upper), f32(l_lower + sum_lower)
                    if compares:
                        m_upper = fmax(m_upper, quad_max(t_upper))
                        m_lower = fmax(m_lower, quad_max(t_lower))
                    # a wait for V of this tile, not the next step's: ptxas moves none of the
                    # exponentials beyond it, as it does beyond the wait for the product
                    mbarrier_wait(u32(v_full + 8 * here), here_parity)
                    wgmma_wait(0, acc, v_head_dim)
                    if kept and frees_v:
                        mbarrier_arrive(u32(v_empty + 8 * before))
                    if grows:
                        scale_rows(acc, v_blocks, a_upper, a_lower)
                    pack_rows(p, s, blocks, dtype)
                    kept = u32(1)
                else:
                    wgmma_wait(0, acc, v_head_dim)
                    if kept and frees_v:
                        mbarrier_arrive(u32(v_empty + 8 * before))
                    kept = u32(0)
                before, before_parity = here, here_parity
                j_before, j = j, j_next

            # --- what is left of the last tile
            if kept:
                begin_pv(acc, p, u32(v_base + before * u32(v_bytes)), v_head_dim, dtype)
                wgmma_wait(0, acc, v_head_dim)
            elif skip and n > 0:
                u_upper = f32(u_upper + most(seen_upper, t_upper, top_upper, scale_log2))
                u_lower = f32(u_lower + most(seen_lower, t_lower, top_lower, scale_log2))
                mbarrier_wait(u32(v_full + 8 * before), before_parity)  # nothing is on its way

            # --- outputs; 0 in rows that are no request's, for 0 · NaN is NaN
            l_upper, l_lower = quad_sum(l_upper), quad_sum(l_lower)
            over_upper = rcp(l_upper) if l_upper > 0 else f32(0.0)
            over_lower = rcp(l_lower) if l_lower > 0 else f32(0.0)
            scale_rows(acc, v_blocks, over_upper, over_lower)
            if vote_all(u32(lower_row < lq)) == 0:
                for block in range(v_blocks):
                    for i in range(2):
                        acc[block, i] = acc[block, i] if upper_row < lq else f32(0.0)
                        acc[block, i + 2] = acc[block, i + 2] if lower_row < lq else f32(0.0)

            # --- out, through shared memory where this warp's rows of Q were, 16 × 16 per store:
            # lane t gives the address of row t % 16 in the left or the right 8 columns
            pack_rows(p, acc, v_blocks, dtype)
            # not from the number of the group: ptxas would make Q's descriptor anew in every step
            place = u32(base + u32((thread >> u32(5)) - u32(4)) * u32(16 * 128))
            at = swizzle(u32(place + (lane & u32(15)) * u32(128) + (lane >> u32(4)) * u32(16)))
            for i in range(v_head_dim // 16):  # in a swizzled row, 32 bytes on is an exclusive or
                stmatrix_x4(u32((at ^ u32(i % 4 * 32)) + u32(i // 4 * BOX)), p[i])
            fence_proxy_async()
            sync_warp()
            if lane == 0 and exists:
                row = i32(q_first + row0 + i32(warp * u32(16)))
                for box in range(v_boxes):
                    tma_store_4d(out, u32(place + box * BOX), batch, row, head, 64 * box)
                tma_commit()

            # --- while TMA reads them: what is known of the rows, by one lane each
            u_upper, u_lower = quad_sum(u_upper), quad_sum(u_lower)
            lower = u32(lane & u32(3)) == 1
            row = lower_row if lower else upper_row
            l, u = (l_lower, u_lower) if lower else (l_upper, u_upper)
            top = top_lower if lower else top_upper
            u = f32(u * f32(BOUND_SAFETY))
            if u32(lane & u32(3)) < 2 and exists and row < i32(lse.shape[2]):
                real = row < lq and l > 0
                known = f32(top * f32(LN_2) + math.log(l)) if real else f32(minus_infinity)
                share = f32(u * rcp(f32(l + u))) if real and u > 0 else f32(0.0)
                lse[batch, head, u32(q_first + row)] = known
                bound[batch, head, u32(q_first + row)] = share

            # --- the last verdict; and tiles not visited, or on which the dense build has no vote
            if skip and tells and n > 0 and j_before >= first_seen and j_before < stop_seen:
                verdicts[u32(j_before)] = u8(u32(2) - kept)
            if exists:
                for tile in range(mine, u32(state.shape[3]), 128):
                    if i32(tile) < first_seen or i32(tile) >= stop_seen:
                        verdicts[tile] = u8(0)
                    elif not skip:
                        verdicts[tile] = u8(1)
            if lane == 0 and exists:
                tma_wait_read(0)

    return skip_softmax_prefill_wgmma
