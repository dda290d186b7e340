"""A block of :mod:`cuda_kernels.prefill_mma`."""

from cuda_kernels.blocks.grid import KEYS, ROWS

THREADS = 128
HALF = 4 * ROWS  # bytes of a number for every row, of one half of the keys
SLOT = 16 * THREADS  # bytes of four numbers a thread


def shared_bytes(head_dim: int, v_head_dim: int) -> int:
    """Dynamic shared memory of a block: Q, K, V, and what warps and threads leave there."""
    tiles = 2 * (ROWS * head_dim + KEYS * head_dim + KEYS * v_head_dim)
    return tiles + 4 * HALF + 16 + 2 * SLOT
