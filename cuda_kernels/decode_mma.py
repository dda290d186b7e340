"""Skip-softmax decode on the tensor cores of Ampere and later: K streams, V only where it is kept.

One thread block is one split of the cache of one KV head, for one vote group: the up to 16 query
rows (tokens × heads of the GQA group) of one ``mma`` tile.  Rows beyond the last repeat it: they
vote as it does, and nothing of theirs is written.  Decode reads a cache once and multiplies little,
so what counts is how many bytes are on their way, and a step's work only has to hide behind them.

Each of four warps owns a quarter of every tile's keys (16 of 64, 32 of 128), copies the K and V of
those alone, multiplies them alone, and so needs no barrier for what has arrived.  What warps must
share is the running maximum: the rule has one per split, and the decision on a tile needs the row
maxima of all its keys.  So each step has one barrier: warps leave the row maxima of their keys, and
all four take the same decision from the same numbers.  (A tile per warp would spare that barrier,
but then each warp has its own running maximum: that is four times the splits, and skips less.)
As maxima are shared, sums and output of the four warps simply add up at the end.

    copies   K₀ K₁   K₂ V₀   K₃     K₄ V₂   K₅ …      stages = 2; V₁ was skipped, never asked for
    step             0       1      2       3
    scores           S₀      S₁     S₂      S₃        needs Kᵢ, copied while two steps were done
    vote             keep    skip   keep    …
    output                          P₀V₀    –         P·V trails by ``stages`` steps

V is asked for as soon as its tile is kept and used ``stages`` steps later, by when the wait for K
has covered it: nobody ever waits for V as such, and up to ``stages`` tiles of each are under way.
P lies in shared memory meanwhile, each thread's own registers in a slot of its own, and with it
what the output is to be multiplied with first.  The sketch has two stages; there are as many as let
two blocks share a multiprocessor, or else two with one block, if they fit (``choose_stages``).
Before step 0 the pages of the first tiles are looked up together, so that their K is asked for
after one wait; from then on a page is looked up a step before its K is asked for.

A seeded split first multiplies the K of tile 0 and of the newest tile, for their row maxima alone.
The blocks of one vote group leave l, u and acc, all relative to their own m; whichever comes last
(it counts) merges them in the order of the splits, so that the result does not depend on who that
was.  Everyone waits for it, so its loads of up to 16 splits are all under way at once.
"""

import math
from functools import cache

from cuda_kernels.blocks.decode_mma import BLOCKS, MAXIMA, ROWS, SLOT, THREADS, WARPS
from cuda_kernels.fragments import (
    chunk_at,
    exp2_rows,
    fill,
    pack_rows,
    quad_max,
    quad_sum,
    row_max,
    scale_rows,
)
from cuda_kernels.ptx.language import (
    bits_float,
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    ex2,
    f32,
    fence_gpu,
    float_bits,
    fmax,
    fragment,
    global_address,
    i32,
    ld_global_128,
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
    st_global_32,
    st_global_128,
    st_shared_4f,
    st_shared_32,
    st_shared_128,
    sync_warp,
    u8,
    u32,
    u64,
    vote_all,
)
from cuda_kernels.tiles import BOUND_SAFETY, DESCENDING, ENDS_FIRST, LOG2_E

STATISTICS = 4 * ROWS  # float32 that stand behind a partial result's output: m, l, u of each row
TOGETHER = 16  # splits that the merge reads at a time
SIGNATURE = (  # caches of any strides: one build serves them all
    "void(int16[:,:,:,:], int16[:,:,:,:], int16[:,:,:,:], int16[:,:,:,:], int32[:,:], int32[:], "
    "float32[:,:], float32[:,:,::1], int32[::1], float32[:,:,::1], float32[:,:,::1], "
    "uint8[:,:,:,::1], float32[:,:,:,::1], float32, int32, boolean, int32, boolean, int32, int32, "
    "uint64, uint64, uint64)"
)


@fragment
def load_keys(shared, source, pages, key, end, mask, page_bytes, row_bytes, own, width, lane):
    """Begin to copy a warp's ``own`` keys of a tile, from ``key`` on; zeros from ``end`` on.

    Keys of one page lie ``row_bytes`` apart, and each 16 of them are on one page.  A lane copies
    chunk lane % 8 and every eighth after it, of row lane // 8 and every fourth after it.
    """
    row, chunk = u32(lane >> u32(3)), u32(lane & u32(7))
    target = u32(shared + (row * width + (chunk ^ row)) * 16)
    for x in range(own // 16):
        first = i32(key + 16 * x)
        inside = u64(u32(u32(first & mask) + row))
        at = u64(source + u64(pages[x]) * page_bytes + inside * row_bytes + u64(chunk) * u64(16))
        for i in range(4):
            size = u32(16) if i32(first + i32(row) + 4 * i) < end else u32(0)
            to = u32(u32(target ^ u32(64 * (i % 2))) + u32((16 * x + 4 * i) * width * 16))
            for c in range(width // 8):
                cp_async_16_zfill(u32(to + 128 * c), u64(at + u64(128 * c)), size)
            at = u64(at + row_bytes * u64(4))


@fragment
def look_up(pages, table, batch, key, end, page_shift, pairs):
    """Look up the page of each 16 of a warp's keys, from ``key`` on, that lie before ``end``."""
    for i in range(pairs):
        if i32(key + 16 * i) < end:
            pages[i] = u32(table[batch, i32(key + 16 * i) >> page_shift])


@fragment
def tile_of(step, seeds, order, first, last, start, slope, n):
    """Key tile of a step: the seeds, then the split's tiles ``first`` to ``last`` in order.

    From ``start`` by ``slope``, but that ``ENDS_FIRST`` begins with the last and the first.
    """
    at = i32(step - seeds)
    tile = i32(start + at * slope)
    if order == ENDS_FIRST:
        tile = last if at == 0 else tile
        tile = first if at == 1 else tile
    if step < seeds:
        tile = i32(0) if step == 0 else i32(n - 1)
    return tile


@fragment
def quotient(x, inverse):
    """Divide by the d of which ``inverse`` is 2³² // d + 1: exact while x and x d are below 2³².

    A division is a long chain of instructions, and no copy is asked for before the first ones.
    """
    return i32((u64(u32(x)) * u64(inverse)) >> u64(32))


@fragment
def end_of(token, lq, length):
    """Keys that a query token sees."""
    return i32(min(max(i32(length - lq + token + 1), i32(0)), length))


@fragment
def hide(s, blocks, half, column, end):
    """Hide the scores of the upper (half 0) or lower (1) row from key ``end`` on; count the rest.

    ``column`` is this thread's first key.
    """
    seen = f32(0.0)
    for j in range(blocks):
        for i in range(2):
            if i32(column + 8 * j + i) < end:
                seen = f32(seen + f32(1.0))
            else:
                s[j, 2 * half + i] = f32(-math.inf)
    return seen


@fragment
def largest(x):
    """Largest of four."""
    return fmax(fmax(x[0], x[1]), fmax(x[2], x[3]))


@fragment
def total(x):
    """Sum of four."""
    return f32(f32(x[0] + x[1]) + f32(x[2] + x[3]))


@fragment
def merge_rows(acc, m, l, u, half, output, statistics, stride, splits, part, of, scale, n, couples):
    """Merge what the splits have left of the upper (half 0) or lower (1) rows.

    ``output`` and ``statistics`` are where split 0 left this thread's numbers of them; those of the
    next one lie ``stride`` bytes on.  ``part`` and ``of`` have room for ``n`` splits, which are all
    asked for before the first is used.  A split that has seen nothing weighs 2**−∞ = 0.
    """
    for i in range(0, splits, n):
        for z in range(n):
            there = u64(u64(min(i32(i + z), i32(splits - 1))) * stride)
            ld_global_128(of[z], u64(statistics + there))
            for c in range(couples):
                ld_global_128(part[z, c], u64(output + there + u64(512 * c)))
        highest = m[half]
        for z in range(n):
            highest = fmax(highest, bits_float(of[z, 0]))
        zero = highest if highest > f32(-math.inf) else f32(0.0)
        before = ex2(f32((m[half] - zero) * scale))
        m[half] = highest
        l[half], u[half] = f32(l[half] * before), f32(u[half] * before)
        for c in range(2 * couples):
            for w in range(2):
                acc[c, 2 * half + w] *= before
        for z in range(n):
            weight = ex2(f32((bits_float(of[z, 0]) - zero) * scale))
            if i32(i + z) >= splits:
                weight = f32(0.0)
            l[half] = f32(l[half] + weight * bits_float(of[z, 1]))
            u[half] = f32(u[half] + weight * bits_float(of[z, 2]))
            for c in range(2 * couples):
                for w in range(2):
                    x = bits_float(part[z, c // 2, 2 * (c % 2) + w])
                    acc[c, 2 * half + w] = f32(acc[c, 2 * half + w] + weight * x)


@cache
def make_kernel(head_dim, keys, dtype, skip, with_gap, stages):
    """Build the kernel for one head size and tile, F16 or BF16, with or without the skip test.

    ``skip=False`` is the dense kernel; ``with_gap`` also writes the gap of every tile.  Launch with
    (splits, KV heads × query tiles, requests) blocks of ``THREADS`` threads.
    """
    width = head_dim // 8  # 16-byte chunks in a row
    own = keys // WARPS  # keys of a tile that a warp has
    depths, blocks, v_blocks, pairs = head_dim // 16, own // 8, head_dim // 8, own // 16
    mine, couples = v_blocks // WARPS, v_blocks // WARPS // 2  # blocks that a warp finishes; pairs
    ahead = stages
    pending = ahead - 1  # younger copies, when those of a step must be there
    tile_bytes = 2 * keys * head_dim
    slot_bytes = SLOT * (1 + pairs)
    half_output = ROWS // 2 * head_dim  # float32 of a partial result's output, 8 rows
    minus_infinity = -math.inf

    @cuda.jit(launch_bounds=(THREADS, BLOCKS))
    def skip_softmax_decode_mma(
        q,  # [B, Lq, Hq, D], 16 bits
        k, v,  # [pages, page, Hkv, D]; or [B, L, Hkv, D]: one page for each request
        out,  # [B, Lq, Hq, D], result
        page_table,  # [B, pages of a request] int32
        seq_lens,  # [B] int32
        threshold,  # [B, Hkv] float32: λ, or factor
        partials,  # [vote groups, splits, 16 D + 64] float32; used if splits > 1
        counters,  # [vote groups] int32, 0 before and after
        lse, bound,  # [B, Hq, Lq] float32, results
        state, gap,  # [B, Hkv, query tiles, key tiles] uint8, float32, results
        scale, page_shift, by_length, seeds, in_runs, order,  # seeds: 0 or 2; in_runs: of splits
        group, of_query_tiles, of_splits, of_group,  # query heads of a KV head; inverses
    ):  # fmt: skip
        memory = cuda.shared.array(0, u8, alignment=1024)
        base = shared_address(memory, 0)
        slots = u32(base + 2 * ahead * tile_bytes)
        maxima = u32(slots + ahead * slot_bytes)  # [2, 16 rows, 4 warps]
        thread = u32(cuda.threadIdx.x)
        lane, warp = u32(thread & u32(31)), u32(thread >> u32(5))
        quad_lane, row = u32(lane & u32(3)), u32(lane >> u32(2))  # and the row 8 below

        # --- which rows, which keys they see, and which tiles of those this split has
        split, splits = i32(cuda.blockIdx.x), i32(cuda.gridDim.x)
        batch = i32(cuda.blockIdx.z)
        kv_head = quotient(cuda.blockIdx.y, of_query_tiles)
        q_tile = i32(i32(cuda.blockIdx.y) - kv_head * i32(state.shape[2]))
        lq = i32(q.shape[1])
        at_most = quotient(ROWS, of_group)
        first_token = i32(q_tile * at_most)
        tokens = i32(min(at_most, i32(lq - first_token)))
        rows = i32(tokens * group)
        length = seq_lens[batch]
        end_first = end_of(first_token, lq, length)  # keys that every row sees
        end = end_of(i32(first_token + tokens - 1), lq, length)  # and that any row sees
        n = i32(u32(end + keys - 1) // u32(keys))
        each = quotient(n, of_splits)
        left = i32(n - each * splits)
        first, stride = split, splits
        count = i32(each + 1) if split < left else each
        if in_runs:
            first, stride = i32(split * each + quotient(split * left, of_splits)), i32(1)
            count = i32(each + quotient(i32(split + 1) * left, of_splits))
            count = i32(count - quotient(split * left, of_splits))
        last = i32(first + i32(count - 1) * stride)
        start, slope = first, stride
        if order == DESCENDING:
            start, slope = last, i32(-stride)
        elif order == ENDS_FIRST:
            start, slope = i32(last + stride), i32(-stride)
        if count == 0:
            seeds = i32(0)
        steps = i32(seeds + count)

        # --- λ, from device memory; above 1 the request is computed densely
        ln_lam = f32(minus_infinity)
        if skip:
            given = threshold[batch, kv_head]
            limit = f32(length) if by_length else f32(1.0)
            if given <= limit:
                ln_lam = f32(math.log(given) - math.log(limit))

        # --- where this lane's rows of 8 × 8 matrices lie, and its slot
        low, high = u32(lane & u32(7)), u32(lane >> u32(4))
        middle = u32((lane >> u32(3)) & u32(1))
        k_warp = u32(base + warp * u32(own * width * 16))
        v_warp = u32(k_warp + ahead * tile_bytes)
        k_lane = u32(k_warp + ((low + 8 * high) * width + (middle ^ low)) * 16)
        v_lane = u32(v_warp + ((lane & u32(15)) * width + (high ^ low)) * 16)
        my_slot = u32(slots + thread * 16)

        s = cuda.local.array((blocks, 4), f32)  # [16 rows, keys / 4]
        acc = cuda.local.array((v_blocks, 4), f32)  # [16 rows, D]
        a = cuda.local.array((depths, 4), u32)  # fragments of Q
        b = cuda.local.array((2, 2), u32)  # of K or V: 16 × 16
        p = cuda.local.array((pairs, 4), u32)  # of the weights
        slot = cuda.local.array(4, u32)  # factors of the output's two rows; pages of K and V
        pages = cuda.local.array((ahead, 2), u32)  # of the keys of the first steps,
        here = cuda.local.array(2, u32)  # of this step's,
        coming = cuda.local.array(2, u32)  # and of those that are copied in the next
        m = cuda.local.array(2, f32)  # of this thread's upper and lower row: running max,
        l = cuda.local.array(2, f32)  # running sum in its columns,
        u = cuda.local.array(2, f32)  # bound on what they leave out,
        t = cuda.local.array(2, f32)  # tile max in its columns,
        top = cuda.local.array(2, f32)  # and in all,
        seen = cuda.local.array(2, f32)  # keys of its columns that the row sees
        alpha = cuda.local.array(2, f32)
        x = cuda.local.array(4, f32)
        fill(acc, v_blocks, 0.0)
        for half in range(2):
            m[half], l[half], u[half] = f32(minus_infinity), f32(0.0), f32(0.0)
            coming[half] = u32(0)

        # --- Q on its way, to where V will be; rows beyond the last are as the last
        q_row, chunk = u32(thread >> u32(3)), u32(thread & u32(7))
        real_row = i32(min(i32(q_row), i32(rows - 1)))
        token = quotient(real_row, of_group)
        head = i32(kv_head * group + real_row - token * group)
        q_from = global_address(q, (batch, i32(first_token + token), head, i32(8 * chunk)))
        q_to = u32(base + ahead * tile_bytes + (q_row * width + (chunk ^ (q_row & u32(7)))) * 16)
        for c in range(width // 8):
            cp_async_16_zfill(u32(q_to + 128 * c), u64(q_from + u64(128 * c)), u32(16))

        # --- and K of the first steps, whose pages are looked up together; Q counts with the first
        mask = i32((i32(1) << page_shift) - 1)
        warp_key = i32(warp * u32(own))
        for i in range(ahead):
            pages[i, 0], pages[i, 1] = u32(0), u32(0)
            if i < steps:
                key = i32(tile_of(i, seeds, order, first, last, start, slope, n) * keys + warp_key)
                look_up(pages[i], page_table, batch, key, end, page_shift, pairs)
        for i in range(ahead):
            if i < steps:
                key = i32(tile_of(i, seeds, order, first, last, start, slope, n) * keys + warp_key)
                load_keys(
                    u32(k_warp + i * tile_bytes), global_address(k, (0, 0, kv_head, 0)), pages[i],
                    key, end, mask, u64(k.strides[0]), u64(k.strides[1]), own, width, lane,
                )  # fmt: skip
            slot[2], slot[3] = pages[i, 0], pages[i, 1]
            st_shared_128(u32(my_slot + i * slot_bytes), slot)
            cp_async_commit()
        key_coming = i32(0)
        if ahead < steps:
            tile = tile_of(ahead, seeds, order, first, last, start, slope, n)
            key_coming = i32(tile * keys + warp_key)
            look_up(coming, page_table, batch, key_coming, end, page_shift, pairs)

        scale_log2 = f32(scale * f32(LOG2_E))
        waiting = u32(0)  # bit i: the tile of i + 1 steps ago was kept
        stage = u32(0)
        for step in range(i32(steps + ahead)):
            at_slot = u32(my_slot + stage * u32(slot_bytes))
            at_tile = u32(stage * u32(tile_bytes))
            is_live = step < steps
            cp_async_wait(pending)
            sync_warp()  # this warp's K of this step is there, and V of ``ahead`` steps ago
            ld_shared_128(slot, at_slot)
            alpha[0], alpha[1] = bits_float(slot[0]), bits_float(slot[1])
            here[0], here[1] = slot[2], slot[3]
            j = tile_of(step, seeds, order, first, last, start, slope, n)
            key = i32(j * keys + warp_key)
            if is_live:
                mark_tile(u32(j))
                if step == 0:
                    cuda.syncthreads()  # all of Q is there
                    q_lane = u32(low + 8 * middle)
                    q_lane = u32(base + ahead * tile_bytes + (q_lane * width + (high ^ low)) * 16)
                    for d in range(depths):
                        ldmatrix_x4(a[d], chunk_at(q_lane, 2 * d))

                # --- S = Q Kᵀ of this warp's keys                         s [16 rows, keys / 4]
                fill(s, blocks, 0.0)
                for d in range(depths):
                    for i in range(pairs):
                        ldmatrix_x4(b, chunk_at(u32(k_lane + at_tile + 256 * i * width), 2 * d))
                        mma_m16n8k16(s[2 * i], a[d], b[0], dtype)
                        mma_m16n8k16(s[2 * i + 1], a[d], b[1], dtype)
                sync_warp()  # K is done with

            # --- K of ``ahead`` steps from now; the pages of one step more
            to = i32(step + ahead)
            if to < steps:
                load_keys(
                    u32(k_warp + at_tile), global_address(k, (0, 0, kv_head, 0)), coming,
                    key_coming, end, mask, u64(k.strides[0]), u64(k.strides[1]), own, width, lane,
                )  # fmt: skip
            slot[2], slot[3] = coming[0], coming[1]
            to = i32(to + 1)
            if to < steps:
                tile = tile_of(to, seeds, order, first, last, start, slope, n)
                key_coming = i32(tile * keys + warp_key)
                look_up(coming, page_table, batch, key_coming, end, page_shift, pairs)

            # --- row maxima, for the other warps; the mask comes first
            row_maxima = u32(maxima + (u32(step) & u32(1)) * u32(MAXIMA) + row * 16)
            if is_live:
                masked = i32(j * keys + keys) > end_first
                for half in range(2):
                    seen[half] = f32(2 * blocks)
                    if masked:
                        token = quotient(min(i32(row + 8 * half), i32(rows - 1)), of_group)
                        end_of_row = end_of(i32(first_token + token), lq, length)
                        column = i32(key + i32(2 * quad_lane))
                        seen[half] = hide(s, blocks, half, column, end_of_row)
                t[0], t[1] = row_max(s, blocks)
                for half in range(2):
                    top[half] = quad_max(t[half])
                    if quad_lane == 0:
                        at = u32(row_maxima + warp * 4 + 128 * half)
                        st_shared_32(at, float_bits(top[half]))

            # --- acc += P V of the tile ``ahead`` steps ago                        acc [16 rows, D]
            if (waiting >> u32(pending)) & u32(1):
                scale_rows(acc, v_blocks, alpha[0], alpha[1])
                for i in range(pairs):
                    ld_shared_128(p[i], u32(at_slot + SLOT * (1 + i)))
                    for c in range(v_blocks // 2):
                        v_at = u32(v_lane + at_tile + 256 * i * width)
                        ldmatrix_x4_trans(b, chunk_at(v_at, 2 * c))
                        mma_m16n8k16(acc[2 * c], p[i], b[0], dtype)
                        mma_m16n8k16(acc[2 * c + 1], p[i], b[1], dtype)

            kept = u32(0)
            if is_live:
                cuda.syncthreads()  # all row maxima are there, and V of that tile is done with
                rise = f32(minus_infinity)
                for half in range(2):  # fmax leaves out −inf − −inf: a row that has seen nothing
                    ld_shared_4f(x, u32(row_maxima + 128 * half))
                    top[half] = largest(x)
                    rise = fmax(rise, f32(top[half] - m[half]))
                rise = f32(rise * scale)
                if step >= seeds:
                    kept = u32(1)
                    if with_gap:
                        highest = rise
                        for i in range(3):
                            highest = fmax(highest, shfl_bfly_f32(highest, u32(4 << i)))
                        if thread == 0:
                            gap[batch, kv_head, q_tile, j] = highest
                    if skip:
                        kept = u32(1 - vote_all(u32(rise < ln_lam)))
                    if thread == 0:
                        state[batch, kv_head, q_tile, j] = u8(2 - kept)
                if kept:
                    load_keys(
                        u32(v_warp + at_tile), global_address(v, (0, 0, kv_head, 0)), here, key,
                        end, mask, u64(v.strides[0]), u64(v.strides[1]), own, width, lane,
                    )  # fmt: skip
                    # --- online softmax
                    for half in range(2):
                        old = f32(m[half] * scale_log2)
                        m[half] = fmax(m[half], top[half])
                        new = f32(m[half] * scale_log2) if m[half] > minus_infinity else f32(0.0)
                        top[half], alpha[half] = new, ex2(f32(old - new))
                    t[0], t[1] = exp2_rows(s, blocks, scale_log2, top[0], top[1])
                    for half in range(2):
                        l[half] = f32(l[half] * alpha[half] + t[half])
                        u[half] = f32(u[half] * alpha[half])
                        slot[half] = float_bits(alpha[half])
                    pack_rows(p, s, blocks, dtype)
                    for i in range(pairs):
                        st_shared_128(u32(at_slot + SLOT * (1 + i)), p[i])
                elif step < seeds:
                    for half in range(2):
                        m[half] = fmax(m[half], top[half])
                else:  # all we know of the tile bounds its weight
                    for half in range(2):
                        weight = ex2(f32((t[half] - m[half]) * scale_log2))
                        if seen[half] > 0:
                            u[half] = f32(u[half] + seen[half] * weight)
            st_shared_128(at_slot, slot)
            cp_async_commit()
            waiting = u32((waiting << u32(1)) | kept)
            stage = u32(stage + 1) if stage + 1 < ahead else u32(0)

        # --- add up the warps: each finishes a quarter of the columns
        cp_async_wait(0)
        cuda.syncthreads()
        for block in range(v_blocks):
            at = u32(base + (warp * u32(v_blocks) + u32(block)) * 512 + lane * 16)
            st_shared_4f(at, acc[block])
        sums = u32(maxima + row * 16)  # of l; those of u behind it
        for half in range(2):
            l[half], u[half] = quad_sum(l[half]), quad_sum(u[half])
            if quad_lane == 0:
                st_shared_32(u32(sums + warp * 4 + 128 * half), float_bits(l[half]))
                st_shared_32(u32(sums + warp * 4 + 128 * half + MAXIMA), float_bits(u[half]))
        cuda.syncthreads()
        for half in range(2):
            ld_shared_4f(x, u32(sums + 128 * half))
            l[half] = total(x)
            ld_shared_4f(x, u32(sums + 128 * half + MAXIMA))
            u[half] = f32(total(x) * f32(BOUND_SAFETY))
        fill(acc, mine, 0.0)
        for other in range(WARPS):
            for c in range(mine):
                block = u32(u32(other * v_blocks) + warp * u32(mine) + u32(c))
                ld_shared_4f(x, u32(base + block * 512 + lane * 16))
                for i in range(4):
                    acc[c, i] = f32(acc[c, i] + x[i])

        # --- several splits: leave what there is; the last block of the vote group merges
        vote_group = i32(batch * i32(cuda.gridDim.y) + i32(cuda.blockIdx.y))
        mine_at = i32(i32(warp * u32(mine * 64)) + i32(lane * 4))  # of 8 rows × D
        finish = u32(1)
        if splits > 1:
            for half in range(2):
                if i32(8 * half) < rows:
                    for c in range(couples):
                        for i in range(4):
                            slot[i] = float_bits(acc[2 * c + i // 2, 2 * half + i % 2])
                        to_output = (vote_group, split, i32(mine_at + half * half_output + 128 * c))
                        st_global_128(global_address(partials, to_output), slot)
                if warp == 0 and quad_lane == 0:
                    slot[0], slot[1] = float_bits(m[half]), float_bits(l[half])
                    slot[2], slot[3] = float_bits(u[half]), u32(0)
                    to_row = (vote_group, split, i32(2 * half_output + 32 * half + i32(4 * row)))
                    st_global_128(global_address(partials, to_row), slot)
            fence_gpu()
            cuda.syncthreads()
            if thread == 0:
                st_shared_32(maxima, u32(cuda.atomic.add(counters, vote_group, 1)))
            cuda.syncthreads()
            finish = u32(1) if i32(ld_shared_32(maxima)) == i32(splits - 1) else u32(0)
        if finish and splits > 1:
            fence_gpu()
            if thread == 0:
                counters[vote_group] = 0
            part = cuda.local.array((TOGETHER, couples, 4), u32)
            of = cuda.local.array((TOGETHER, 4), u32)
            fill(acc, mine, 0.0)
            for half in range(2):
                m[half], l[half], u[half] = f32(minus_infinity), f32(0.0), f32(0.0)
            output = global_address(partials, (vote_group, 0, mine_at))
            statistics = (vote_group, 0, i32(2 * half_output + i32(4 * row)))
            statistics = global_address(partials, statistics)
            stride = u64(partials.strides[1])
            merge_rows(
                acc, m, l, u, 0, output, statistics, stride, splits, part, of, scale_log2,
                TOGETHER, couples,
            )  # fmt: skip
            if rows > 8:
                output, statistics = u64(output + u64(4 * half_output)), u64(statistics + u64(128))
                merge_rows(
                    acc, m, l, u, 1, output, statistics, stride, splits, part, of, scale_log2,
                    TOGETHER, couples,
                )  # fmt: skip

        # --- out
        for half in range(2):
            my_row = i32(i32(row) + 8 * half)
            if finish and my_row < rows:
                token = quotient(my_row, of_group)
                head = i32(kv_head * group + my_row - token * group)
                token = i32(first_token + token)
                over = rcp(l[half]) if l[half] > 0 else f32(0.0)
                for c in range(mine):
                    column = i32(i32(8 * (warp * u32(mine) + u32(c))) + i32(2 * quad_lane))
                    two = pack(
                        f32(acc[c, 2 * half] * over), f32(acc[c, 2 * half + 1] * over), dtype
                    )
                    st_global_32(global_address(out, (batch, token, head, column)), two)
                if warp == 0 and quad_lane == 0:
                    reached = f32(minus_infinity)
                    if l[half] > 0:
                        reached = f32(m[half] * scale + math.log(l[half]))
                    lse[batch, head, token] = reached
                    share = u[half] * rcp(f32(l[half] + u[half])) if u[half] > 0 else f32(0.0)
                    bound[batch, head, token] = share
        first_tile = i32(n + split * THREADS + i32(thread))
        for tile in range(first_tile, i32(state.shape[3]), i32(splits * THREADS)):  # not visited
            state[batch, kv_head, q_tile, tile] = u8(0)
            if with_gap:
                gap[batch, kv_head, q_tile, tile] = f32(minus_infinity)

    return skip_softmax_decode_mma
