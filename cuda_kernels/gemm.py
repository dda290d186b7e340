"""A matrix product on the tensor cores, on one screen: the loop inside every fast kernel.

A block of 4 warps computes 64 × 64 of C, walking along K in steps of 64: 64 × 64 of A and of B.

    copies     A₀B₀ ─► A₁B₁ ─────► A₂B₂ ─────►      two stages: the next is always on its way
    products           A₀·B₀       A₁·B₁            ldmatrix and mma, 16 of K at a time

Every tile in shared memory is 64 rows of 8 chunks of 16 bytes, whatever it holds.
"""

from functools import cache
from typing import Any

from cuda_kernels.fragments import fill
from cuda_kernels.ptx.language import (
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    f32,
    fragment,
    global_address,
    i32,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k16,
    shared_address,
    u8,
    u32,
)

TILE = 64  # rows, columns and depth of every tile
WIDTH = TILE // 8  # 16-byte chunks in a row of a tile
THREADS = 128  # 4 warps, 16 rows of C each
TILE_BYTES = 2 * TILE * TILE
SHARED_BYTES = 4 * TILE_BYTES  # A and B, two stages each


@fragment
def swizzled(row, chunk):
    """Byte of a 16-byte chunk in a tile: 8 rows' chunks of one column lie in different banks."""
    return u32((row * WIDTH + (chunk ^ (row & u32(7)))) * 16)


@fragment
def load_tile(shared, matrix, first_row, first_column, thread):
    """Begin to copy 64 × 64 of a matrix; zeros where the matrix has ended."""
    chunk = u32(thread & u32(7))
    column = i32(first_column + i32(8 * chunk))
    columns = min(max(i32(i32(matrix.shape[1]) - column), i32(0)), i32(8))
    for i in range(TILE * WIDTH // THREADS):
        row = u32((thread >> u32(3)) + i * (THREADS // WIDTH))
        place = i32(first_row + i32(row))
        size = u32(2 * columns) if place < matrix.shape[0] else u32(0)
        source = global_address(matrix, (place, column))
        cp_async_16_zfill(u32(shared + swizzled(row, chunk)), source, size)


@cache
def make_kernel(dtype: int, b_is_n_by_k: int) -> Any:
    """Build the kernel ``gemm(a, b, c)``: C = A · B, products exact, sums in float32.

    Parameters
    ----------
    dtype : int
        ``F16`` or ``BF16``: what the 16 bits of A and B mean.
    b_is_n_by_k : int
        1 if B lies as [N, K], as the keys of attention do; 0 if as [K, N], as the values do.

    Returns
    -------
    ``@cuda.jit`` kernel
        Of three matrices, each side at least 1: ``a`` uint16 [M, K], ``b`` uint16 [K, N] or [N, K],
        ``c`` float32 [M, N], written.  Rows of ``a`` and ``b`` begin at multiples of 16 bytes and
        their elements lie side by side; what lies between two rows is not read.  Launch with
        ⌈N/64⌉ × ⌈M/64⌉ blocks of ``THREADS`` threads and ``SHARED_BYTES`` of dynamic shared memory.

    Examples
    --------
    >>> import numpy as np
    >>> from cuda_kernels.emulator import emulate
    >>> from cuda_kernels.ptx.language import F16
    >>> a = np.full((2, 8), 0.5, np.float16)
    >>> b = np.ones((3, 8), np.float16)
    >>> c = np.zeros((2, 3), np.float32)
    >>> kernel = make_kernel(F16, 1)
    >>> arguments = a.view(np.uint16), b.view(np.uint16), c
    >>> run = emulate(kernel, (1, 1), THREADS, *arguments, shared_bytes=SHARED_BYTES)
    >>> c
    array([[4., 4., 4.],
           [4., 4., 4.]], dtype=float32)
    """
    steps, blocks = TILE // 16, TILE // 8  # of K, 16 at a time; of C's columns, 8 at a time

    @cuda.jit(launch_bounds=(THREADS, 1))
    def gemm(a, b, c):  # [M, K], [K, N] or [N, K] 16-bit; [M, N] float32
        base = shared_address(cuda.shared.array(0, u8, alignment=128), 0)
        thread = u32(cuda.threadIdx.x)
        warp, lane = u32(thread >> u32(5)), u32(thread & u32(31))
        first_row, first_column = i32(cuda.blockIdx.y * TILE), i32(cuda.blockIdx.x * TILE)
        a_row, a_chunk = u32(warp * 16 + (lane & u32(15))), u32(lane >> u32(4))

        a_tile = cuda.local.array(4, u32)  # [16, 16] of A in a warp
        b_tile = cuda.local.array((2, 2), u32)  # [16, 8] of B, twice
        acc = cuda.local.array((blocks, 4), f32)  # [16, 64] of C in a warp
        fill(acc, blocks, 0.0)

        tiles = i32((i32(a.shape[1]) + TILE - 1) // TILE)
        for j in range(-1, tiles):
            # --- tile j has come, for everyone; so nobody still reads tile j − 1
            cp_async_wait(0)
            cuda.syncthreads()
            if j + 1 < tiles:
                depth = i32((j + 1) * TILE)
                stage = u32(base + u32((j + 1) & 1) * u32(2 * TILE_BYTES))
                load_tile(stage, a, first_row, depth, thread)
                if b_is_n_by_k:
                    load_tile(u32(stage + TILE_BYTES), b, first_column, depth, thread)
                else:
                    load_tile(u32(stage + TILE_BYTES), b, depth, first_column, thread)
                cp_async_commit()

            # --- acc += A B
            if j >= 0:
                a_base = u32(base + u32(j & 1) * u32(2 * TILE_BYTES))
                b_base = u32(a_base + TILE_BYTES)
                for k in range(steps):
                    ldmatrix_x4(a_tile, u32(a_base + swizzled(a_row, u32(2 * k + a_chunk))))
                    for n in range(blocks // 2):
                        if b_is_n_by_k:
                            row = u32(16 * n + (lane & u32(7)) + (lane >> u32(4)) * 8)
                            chunk = u32(2 * k + ((lane >> u32(3)) & u32(1)))
                            ldmatrix_x4(b_tile, u32(b_base + swizzled(row, chunk)))
                        else:
                            row = u32(16 * k + (lane & u32(15)))
                            chunk = u32(2 * n + (lane >> u32(4)))
                            ldmatrix_x4_trans(b_tile, u32(b_base + swizzled(row, chunk)))
                        mma_m16n8k16(acc[2 * n], a_tile, b_tile[0], dtype)
                        mma_m16n8k16(acc[2 * n + 1], a_tile, b_tile[1], dtype)

        # --- C = acc, where C is: lane 4g + q holds columns 2q and 2q + 1 of rows g and g + 8
        for n in range(blocks):
            for i in range(4):
                row = i32(first_row + i32(warp * 16 + (lane >> u32(2)) + (i // 2) * 8))
                column = i32(first_column + i32(8 * n + (lane & u32(3)) * 2 + i % 2))
                if row < c.shape[0] and column < c.shape[1]:
                    c[row, column] = acc[n, i]

    return gemm
