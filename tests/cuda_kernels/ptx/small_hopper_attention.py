"""FlashAttention with Hopper's pipeline, of the layer's instructions: to try them all at once.

One producer warpgroup and two consumers of 64 query rows each; K and V come through a ring of two
stages, each tile with a barrier of its own.  No mask, no ends that do not fit, no heads.
"""

import math
from functools import cache

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
    bar_sync,
    cuda,
    ex2,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    fmax,
    i32,
    k_major,
    mark_tile,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    mn_major,
    pack,
    setmaxnreg_dec,
    setmaxnreg_inc,
    shared_address,
    st_shared_32,
    swizzle,
    tma_commit,
    tma_load_2d,
    tma_store_2d,
    tma_wait_read,
    u8,
    u32,
    wgmma_commit,
    wgmma_fence,
    wgmma_rs,
    wgmma_ss,
    wgmma_wait,
)

ROWS, KEYS = 128, 128
THREADS = 384
SIGNATURE = "void(tensor_map, tensor_map, tensor_map, tensor_map, int32, float32)"
Q_BOX, K_BOX, OUT_BOX = (ROWS, 64), (KEYS, 64), (64, 64)


def shared_bytes(head_dim):
    """Q, then two stages of K and of V, then nine barriers."""
    return 2 * head_dim * (ROWS + 4 * KEYS) + 72


@cache
def make_kernel(head_dim, dtype):
    """Return the kernel; head_dim is 64 or 128."""
    halves = head_dim // 64  # boxes of 64 columns
    q_half, k_half = 128 * ROWS, 128 * KEYS  # bytes of a box
    q_bytes, tile_bytes = halves * q_half, halves * k_half
    blocks, pairs, v_blocks = KEYS // 8, KEYS // 16, head_dim // 8

    @cuda.jit(launch_bounds=(THREADS, 1), fastmath=True)
    def attention(q, k, v, out, tiles, scale):  # [rows, D], [L, D], [L, D], [rows, D]; 16-bit
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        k_base, v_base = u32(base + q_bytes), u32(base + q_bytes + 2 * tile_bytes)
        q_full = u32(v_base + 2 * tile_bytes)
        k_full, k_empty = u32(q_full + 8), u32(q_full + 24)
        v_full, v_empty = u32(q_full + 40), u32(q_full + 56)
        thread = u32(cuda.threadIdx.x)
        first_row = i32(cuda.blockIdx.x * ROWS)
        if thread == 0:
            mbarrier_init(q_full, 1)
            for stage in range(2):
                mbarrier_init(u32(k_full + 8 * stage), 1)
                mbarrier_init(u32(v_full + 8 * stage), 1)
                mbarrier_init(u32(k_empty + 8 * stage), 2)
                mbarrier_init(u32(v_empty + 8 * stage), 2)
            fence_mbarrier_init()
        cuda.syncthreads()

        if thread < 128:  # --- producer
            setmaxnreg_dec(40)
            if thread == 0:
                mbarrier_arrive_expect_tx(q_full, q_bytes)
                for half in range(halves):
                    tma_load_2d(u32(base + half * q_half), q, q_full, first_row, 64 * half)
                for j in range(tiles):
                    mark_tile(j)
                    stage, parity = u32(j & 1), u32((j >> 1) & 1)
                    place, arrived = u32(stage * tile_bytes), u32(8 * stage)
                    mbarrier_wait(u32(k_empty + arrived), u32(parity ^ 1))
                    mbarrier_arrive_expect_tx(u32(k_full + arrived), tile_bytes)
                    for half in range(halves):
                        at = u32(k_base + place + half * k_half)
                        tma_load_2d(at, k, u32(k_full + arrived), i32(j * KEYS), 64 * half)
                    mbarrier_wait(u32(v_empty + arrived), u32(parity ^ 1))
                    mbarrier_arrive_expect_tx(u32(v_full + arrived), tile_bytes)
                    for half in range(halves):
                        at = u32(v_base + place + half * k_half)
                        tma_load_2d(at, v, u32(v_full + arrived), i32(j * KEYS), 64 * half)
        else:  # --- consumers
            setmaxnreg_inc(232)
            group, lane = u32((thread >> u32(7)) - 1), u32(thread & u32(31))
            warp = u32((thread >> u32(5)) & u32(3))
            q_tile = u32(base + group * 8192)  # its 64 rows
            s = cuda.local.array((blocks, 4), f32)
            p = cuda.local.array((pairs, 4), u32)
            acc = cuda.local.array((v_blocks, 4), f32)
            fill(acc, v_blocks, 0.0)
            m_upper, m_lower = f32(-math.inf), f32(-math.inf)
            l_upper, l_lower = f32(0.0), f32(0.0)
            mbarrier_wait(q_full, 0)
            for j in range(tiles):
                mark_tile(j)
                stage, parity = u32(j & 1), u32((j >> 1) & 1)
                k_tile = u32(k_base + stage * tile_bytes)
                v_tile = u32(v_base + stage * tile_bytes)

                # --- S = Q Kᵀ
                mbarrier_wait(u32(k_full + 8 * stage), parity)
                wgmma_fence()
                for step in range(head_dim // 16):
                    half, at = step // 4, 32 * (step % 4)
                    left = k_major(u32(q_tile + half * q_half + at))
                    right = k_major(u32(k_tile + half * k_half + at))
                    wgmma_ss(s, left, right, step > 0, KEYS, dtype, K_MAJOR)
                wgmma_commit()
                wgmma_wait(0, s, KEYS)
                if thread % 128 == 0:
                    mbarrier_arrive(u32(k_empty + 8 * stage))

                # --- online softmax
                t_upper, t_lower = row_max(s, blocks)
                n_upper = fmax(m_upper, f32(quad_max(t_upper) * scale))
                n_lower = fmax(m_lower, f32(quad_max(t_lower) * scale))
                a_upper, a_lower = ex2(f32(m_upper - n_upper)), ex2(f32(m_lower - n_lower))
                m_upper, m_lower = n_upper, n_lower
                sum_upper, sum_lower = exp2_rows(s, blocks, scale, m_upper, m_lower)
                l_upper = f32(l_upper * a_upper + sum_upper)
                l_lower = f32(l_lower * a_lower + sum_lower)
                scale_rows(acc, v_blocks, a_upper, a_lower)
                pack_rows(p, s, blocks, dtype)

                # --- acc += P V
                mbarrier_wait(u32(v_full + 8 * stage), parity)
                wgmma_fence()
                for step in range(pairs):
                    right = mn_major(u32(v_tile + 2048 * step), k_half)
                    wgmma_rs(acc, p[step], right, 1, head_dim, dtype, MN_MAJOR)
                wgmma_commit()
                wgmma_wait(0, acc, head_dim)
                if thread % 128 == 0:
                    mbarrier_arrive(u32(v_empty + 8 * stage))

            # --- out = acc / l, through shared memory where this group's rows of Q were
            l_upper, l_lower = quad_sum(l_upper), quad_sum(l_lower)
            scale_rows(acc, v_blocks, f32(f32(1.0) / l_upper), f32(f32(1.0) / l_lower))
            row = u32(warp * 16 + (lane >> u32(2)))
            for block in range(v_blocks):
                half = block // 8
                place = u32(q_tile + half * q_half + row * 128 + (block % 8) * 16)
                byte = u32((lane & u32(3)) * 4)
                upper, lower = swizzle(u32(place + byte)), swizzle(u32(place + byte + 1024))
                st_shared_32(upper, pack(acc[block, 0], acc[block, 1], dtype))
                st_shared_32(lower, pack(acc[block, 2], acc[block, 3], dtype))
            fence_proxy_async()
            bar_sync(u32(group + 1), 128)
            if thread % 128 == 0:
                for half in range(halves):
                    place = u32(q_tile + half * q_half)
                    tma_store_2d(out, place, i32(first_row + i32(group) * 64), 64 * half)
                tma_commit()
                tma_wait_read(0)

    return attention
