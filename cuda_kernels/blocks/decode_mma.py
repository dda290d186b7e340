"""A block of :mod:`cuda_kernels.decode_mma`."""

ROWS = 16  # of a vote group
WARPS, THREADS = 4, 128
BLOCKS = 3  # on a multiprocessor, where there is shared memory for them
SLOT = 16 * THREADS  # bytes of four numbers a thread
MAXIMA = 4 * WARPS * ROWS  # bytes of the row maxima of one tile
WHOLE = 30  # page_shift of a cache that is not paged: every key is on page 0 of its request


def stages(head_dim: int, keys: int) -> int:
    """Tiles of K, and of V, that may be under way at a time: 64 KB of both, or a little less."""
    return {(128, 64): 2, (128, 128): 1, (64, 64): 3, (64, 128): 2}[head_dim, keys]


def shared_bytes(head_dim: int, keys: int) -> int:
    """Dynamic shared memory of a block: K and V, the slots of P, and row maxima of two tiles."""
    of_a_stage = 2 * 2 * keys * head_dim + SLOT * (1 + keys // WARPS // 16)
    return stages(head_dim, keys) * of_a_stage + 2 * MAXIMA
