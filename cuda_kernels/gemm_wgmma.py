"""A matrix product on Hopper's tensor cores, on one screen: the pipeline of fast kernels there.

A block of three warpgroups computes 128 × 128 of C, walking along K in steps of 64.  The first
copies; the others multiply, 64 rows each, straight from shared memory:

    producer     A₀B₀ ─► A₁B₁ ─► A₂B₂ ─► A₃B₃ ─►   waits until stage j − 4 is empty, copies tile j
    full[j % 4]     ╲       ╲       ╲                one arrival, and the bytes of both tiles
    consumers        A₀·B₀   A₁·B₁   A₂·B₂           one product always under way
    empty[j % 4]          ╲       ╲       ╲          one arrival per consumer, a step behind

A stage is used for tiles j, j + 4, j + 8, …: their phases have parity 0, 1, 0, ….
"""

from functools import cache
from typing import Any

from cuda_kernels.fragments import fill
from cuda_kernels.ptx.language import (
    K_MAJOR,
    MN_MAJOR,
    cuda,
    f32,
    fence_mbarrier_init,
    i32,
    k_major,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    mn_major,
    setmaxnreg_dec,
    setmaxnreg_inc,
    shared_address,
    tma_load_2d,
    u8,
    u32,
    wgmma_commit,
    wgmma_fence,
    wgmma_ss,
    wgmma_wait,
)

TILE = 128  # rows and columns of C in a block
DEPTH = 64  # of K in a tile: 128 bytes, what a row of shared memory holds
STAGES = 4
THREADS = 384
TILE_BYTES = 2 * TILE * DEPTH
STAGE_BYTES = 2 * TILE_BYTES  # A and B
SHARED_BYTES = STAGES * STAGE_BYTES + 16 * STAGES
SIGNATURE = "void(tensor_map, tensor_map, float32[:,:], int32)"
A_BOX = (TILE, DEPTH)


def b_box(b_is_n_by_k: int) -> tuple[int, int]:
    """Return what is copied of B at a time: all 128 columns of C, or 64 of them."""
    return (TILE, DEPTH) if b_is_n_by_k else (DEPTH, 64)


@cache
def make_kernel(dtype: int, b_is_n_by_k: int) -> Any:
    """Build the kernel ``gemm(a, b, c, depth)``: C = A · B, products exact, sums in float32.

    Parameters
    ----------
    dtype : int
        ``F16`` or ``BF16``: what the 16 bits of A and B mean.
    b_is_n_by_k : int
        1 if B lies as [N, K], as the keys of attention do; 0 if as [K, N], as the values do.

    Returns
    -------
    ``@cuda.jit`` kernel
        ``a``: ``TensorMap`` of uint16 [M, K] with ``A_BOX``; ``b``: of [N, K] or [K, N] with
        ``b_box``; ``c`` float32 [M, N], written; ``depth`` int32: K.  Launch with ⌈N/128⌉ × ⌈M/128⌉
        blocks of ``THREADS`` threads and ``SHARED_BYTES`` of dynamic shared memory.

    Examples
    --------
    >>> import numpy as np
    >>> from cuda_kernels.emulator import emulate
    >>> from cuda_kernels.ptx.language import F16, TensorMap
    >>> a, b = np.full((2, 8), 0.5, np.float16), np.ones((3, 8), np.float16)
    >>> c = np.zeros((2, 3), np.float32)
    >>> maps = TensorMap(a, A_BOX), TensorMap(b, b_box(1))
    >>> run = emulate(make_kernel(F16, 1), (1, 1), THREADS, *maps, c, 8, shared_bytes=SHARED_BYTES)
    >>> c
    array([[4., 4., 4.],
           [4., 4., 4.]], dtype=float32)
    """
    b_major = K_MAJOR if b_is_n_by_k else MN_MAJOR
    blocks, steps = TILE // 8, DEPTH // 16  # of C's columns, 8 at a time; of K, 16 at a time

    @cuda.jit(launch_bounds=(THREADS, 1))
    def gemm(a, b, c, depth):  # [M, K], [N, K] or [K, N] 16-bit; [M, N] float32
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        full = u32(base + STAGES * STAGE_BYTES)
        empty = u32(full + 8 * STAGES)
        thread = u32(cuda.threadIdx.x)
        first_row, first_column = i32(cuda.blockIdx.y * TILE), i32(cuda.blockIdx.x * TILE)
        tiles = i32((depth + DEPTH - 1) // DEPTH)
        if thread == 0:
            for stage in range(STAGES):
                mbarrier_init(u32(full + 8 * stage), 1)
                mbarrier_init(u32(empty + 8 * stage), 2)
            fence_mbarrier_init()
        cuda.syncthreads()

        if thread < 128:  # --- producer
            setmaxnreg_dec(40)
            if thread == 0:
                for j in range(tiles):
                    stage, parity = u32(j & 3), u32((j >> 2) & 1)
                    arrived = u32(full + 8 * stage)
                    a_tile = u32(base + stage * STAGE_BYTES)
                    b_tile = u32(a_tile + TILE_BYTES)
                    mbarrier_wait(u32(empty + 8 * stage), u32(parity ^ 1))
                    mbarrier_arrive_expect_tx(arrived, STAGE_BYTES)
                    tma_load_2d(a_tile, a, arrived, first_row, j * DEPTH)
                    if b_is_n_by_k:
                        tma_load_2d(b_tile, b, arrived, first_column, j * DEPTH)
                    else:
                        half = u32(b_tile + TILE_BYTES // 2)
                        tma_load_2d(b_tile, b, arrived, j * DEPTH, first_column)
                        tma_load_2d(half, b, arrived, j * DEPTH, first_column + 64)
        else:  # --- consumers
            setmaxnreg_inc(232)
            row = u32((thread >> u32(7)) * 64 - 64)  # of this warpgroup, in the tile
            acc = cuda.local.array((blocks, 4), f32)  # [64, 128] of C in a warpgroup
            fill(acc, blocks, 0.0)
            for j in range(tiles):
                stage, parity = u32(j & 3), u32((j >> 2) & 1)
                a_tile = u32(base + stage * STAGE_BYTES + row * 128)
                b_tile = u32(base + stage * STAGE_BYTES + TILE_BYTES)
                mbarrier_wait(u32(full + 8 * stage), parity)
                # --- acc += A B
                wgmma_fence()
                for k in range(steps):
                    left = k_major(u32(a_tile + 32 * k))
                    if b_is_n_by_k:
                        right = k_major(u32(b_tile + 32 * k))
                    else:
                        right = mn_major(u32(b_tile + 2048 * k), TILE_BYTES // 2)
                    wgmma_ss(acc, left, right, 1, TILE, dtype, b_major)
                wgmma_commit()
                # --- the product before this one is done: its stage is empty
                wgmma_wait(1, acc, TILE)
                if j > 0 and thread % 128 == 0:
                    mbarrier_arrive(u32(empty + 8 * ((j - 1) & 3)))
            wgmma_wait(0, acc, TILE)

            # --- C = acc, where C is: lane 4g + q holds columns 2q and 2q + 1 of rows g and g + 8
            for n in range(blocks):
                for i in range(4):
                    at = u32(row + ((thread >> u32(5)) & u32(3)) * 16 + (i // 2) * 8)
                    m = i32(first_row + i32(at + ((thread >> u32(2)) & u32(7))))
                    column = i32(first_column + i32(8 * n + (thread & u32(3)) * 2 + i % 2))
                    if m < c.shape[0] and column < c.shape[1]:
                        c[m, column] = acc[n, i]

    return gemm
