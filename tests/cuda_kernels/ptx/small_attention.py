"""A small attention kernel on the PTX layer: one tile of Q against all key tiles, no mask.

It is what the layer is tested on as a whole: cp.async, ldmatrix, mma, fragments, 128-bit stores.
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
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    cuda,
    ex2,
    f32,
    fragment,
    global_address,
    i32,
    ld_shared_128,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k16,
    pack,
    shared_address,
    st_global_128,
    st_shared_32,
    u8,
    u32,
    u64,
)


@fragment
def swizzled(row, chunk, width):
    """Byte of a 16-byte chunk in a tile of rows of ``width`` chunks, free of bank conflicts."""
    return u32((row * width + (chunk ^ (row & 7))) * 16)


@fragment
def load_tile(shared, source, thread, rows, width, threads):
    """Begin to copy rows of ``width`` 16-byte chunks that lie one after the other."""
    for i in range(rows * width // threads):
        chunk = u32(thread + i * threads)
        row, column = u32(chunk // u32(width)), u32(chunk % u32(width))
        cp_async_16(u32(shared + swizzled(row, column, width)), u64(source + u64(chunk * 16)))


@cache
def make_kernel(head_dim, keys, warps, dtype):
    """One thread block: 16 × warps rows of one head; K and V in tiles of ``keys``, two stages."""
    threads, rows = 32 * warps, 16 * warps
    width = head_dim // 8  # 16-byte chunks in a row
    steps, blocks, pairs, v_blocks = head_dim // 16, keys // 8, keys // 16, head_dim // 8
    q_bytes, tile_bytes = 2 * rows * head_dim, 2 * keys * head_dim

    @cuda.jit(launch_bounds=(threads, 1), fastmath=True)
    def small_attention(q, k, v, out, scale):  # [rows, D], [L, D], [L, D], [rows, D]; 16-bit
        memory = cuda.shared.array(0, u8, alignment=128)
        base = shared_address(memory, 0)
        k_base, v_base = u32(base + q_bytes), u32(base + q_bytes + 2 * tile_bytes)
        thread = u32(cuda.threadIdx.x)
        warp, lane = u32(thread >> u32(5)), u32(thread & u32(31))
        tiles = u32(k.shape[0] // keys)

        q_rows = global_address(q, (cuda.blockIdx.x * rows, 0))
        load_tile(base, q_rows, thread, rows, width, threads)
        load_tile(k_base, global_address(k, (0, 0)), thread, keys, width, threads)
        load_tile(v_base, global_address(v, (0, 0)), thread, keys, width, threads)
        cp_async_commit()

        q_tile = cuda.local.array((steps, 4), u32)
        s = cuda.local.array((blocks, 4), f32)
        p = cuda.local.array((pairs, 4), u32)
        acc = cuda.local.array((v_blocks, 4), f32)
        b = cuda.local.array((2, 2), u32)
        fill(acc, v_blocks, 0.0)
        m_upper, m_lower = f32(-math.inf), f32(-math.inf)
        l_upper, l_lower = f32(0.0), f32(0.0)

        for j in range(tiles):
            stage = u32(j & 1)
            cp_async_wait(0)
            cuda.syncthreads()
            if j + 1 < tiles:
                other = u32((u32(1) - stage) * tile_bytes)
                k_rows = global_address(k, ((j + 1) * keys, 0))
                v_rows = global_address(v, ((j + 1) * keys, 0))
                load_tile(u32(k_base + other), k_rows, thread, keys, width, threads)
                load_tile(u32(v_base + other), v_rows, thread, keys, width, threads)
                cp_async_commit()
            if j == 0:
                for step in range(steps):
                    row, chunk = u32(warp * 16 + (lane & u32(15))), u32(2 * step + (lane >> u32(4)))
                    ldmatrix_x4(q_tile[step], u32(base + swizzled(row, chunk, width)))

            # --- S = Q Kᵀ
            fill(s, blocks, 0.0)
            tile = u32(k_base + stage * tile_bytes)
            for step in range(steps):
                for block in range(blocks // 2):
                    row = u32(16 * block + (lane & u32(7)) + (lane >> u32(4)) * 8)
                    chunk = u32(2 * step + ((lane >> u32(3)) & u32(1)))
                    ldmatrix_x4(b, u32(tile + swizzled(row, chunk, width)))
                    mma_m16n8k16(s[2 * block], q_tile[step], b[0], dtype)
                    mma_m16n8k16(s[2 * block + 1], q_tile[step], b[1], dtype)

            # --- online softmax
            t_upper, t_lower = row_max(s, blocks)
            n_upper = max(m_upper, f32(quad_max(t_upper) * scale))
            n_lower = max(m_lower, f32(quad_max(t_lower) * scale))
            a_upper, a_lower = ex2(f32(m_upper - n_upper)), ex2(f32(m_lower - n_lower))
            m_upper, m_lower = n_upper, n_lower
            sum_upper, sum_lower = exp2_rows(s, blocks, scale, m_upper, m_lower)
            l_upper = f32(l_upper * a_upper + sum_upper)
            l_lower = f32(l_lower * a_lower + sum_lower)
            scale_rows(acc, v_blocks, a_upper, a_lower)
            pack_rows(p, s, blocks, dtype)

            # --- acc += P V
            tile = u32(v_base + stage * tile_bytes)
            for step in range(blocks // 2):
                for block in range(v_blocks // 2):
                    row = u32(16 * step + (lane & u32(15)))
                    chunk = u32(2 * block + (lane >> u32(4)))
                    ldmatrix_x4_trans(b, u32(tile + swizzled(row, chunk, width)))
                    mma_m16n8k16(acc[2 * block], p[step], b[0], dtype)
                    mma_m16n8k16(acc[2 * block + 1], p[step], b[1], dtype)

        # --- out = acc / l, through shared memory where Q was
        l_upper, l_lower = quad_sum(l_upper), quad_sum(l_lower)
        scale_rows(acc, v_blocks, f32(f32(1.0) / l_upper), f32(f32(1.0) / l_lower))
        cuda.syncthreads()
        for block in range(v_blocks):
            row, byte = u32(warp * 16 + (lane >> u32(2))), u32((lane & u32(3)) * 4)
            upper = u32(base + swizzled(row, block, width) + byte)
            lower = u32(base + swizzled(row + 8, block, width) + byte)
            st_shared_32(upper, pack(acc[block, 0], acc[block, 1], dtype))
            st_shared_32(lower, pack(acc[block, 2], acc[block, 3], dtype))
        cuda.syncthreads()
        words = cuda.local.array(4, u32)
        for i in range(rows * width // threads):
            chunk = u32(thread + i * threads)
            row, column = u32(chunk // u32(width)), u32(chunk % u32(width))
            ld_shared_128(words, u32(base + swizzled(row, column, width)))
            place = (i32(cuda.blockIdx.x * rows + row), 8 * column)
            st_global_128(global_address(out, place), words)

    return small_attention, threads, q_bytes + 4 * tile_bytes


def kernel_alone(head_dim, keys, warps, dtype):
    """Return the kernel without its launch parameters."""
    return make_kernel(head_dim, keys, warps, dtype)[0]
