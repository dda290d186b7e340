"""A block of :mod:`cuda_kernels.prefill_wgmma`."""

from cuda_kernels.blocks.grid import KEYS, ROWS

THREADS = 384
BOX = 128 * 128  # bytes of a copy: 128 rows of Q, K or V × 64 columns
Q_BOX, K_BOX, V_BOX = (1, 128, 1, 64), (1, KEYS, 1, 64), (1, KEYS, 1, 64)
OUT_BOX = (1, ROWS // 4, 1, 64)  # every warp of a group stores its own rows


def stages(head_dim: int) -> int:
    """Tiles of K, and of V, that are in shared memory at a time."""
    return {64: 4, 128: 3, 192: 2}[head_dim]


def shared_bytes(head_dim: int, v_head_dim: int) -> int:
    """Dynamic shared memory of a block: Q, K, V, barriers, and zeros."""
    return BOX * (head_dim // 64 + stages(head_dim) * (head_dim + v_head_dim) // 64) + 256 + 512


def blocks(groups: int, causal: bool) -> int:
    """Blocks of the grid along the rows of the longest request."""
    return (groups + 1 + int(causal)) // 2
