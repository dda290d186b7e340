"""A block of :mod:`cuda_kernels.decode_mma`."""

ROWS = 16  # of a vote group
WARPS, THREADS = 4, 128
BLOCKS = 2  # on a multiprocessor, where there is shared memory for them
RESERVED = 1024  # bytes of shared memory that the system takes for each block
SLOT = 16 * THREADS  # bytes of four numbers a thread
MAXIMA = 4 * WARPS * ROWS  # bytes of the row maxima of one tile
WHOLE = 30  # page_shift of a cache that is not paged: every key is on page 0 of its request


def shared_bytes(head_dim: int, keys: int, stages: int) -> int:
    """Dynamic shared memory of a block: K and V, the slots of P, and row maxima of two tiles."""
    of_a_stage = 2 * 2 * keys * head_dim + SLOT * (1 + keys // WARPS // 16)
    return stages * of_a_stage + 2 * MAXIMA


def inverse(divisor: int) -> int:
    """What the kernel multiplies by, and takes the upper 32 bits of, to divide.

    Examples
    --------
    >>> 100 * inverse(7) >> 32
    14
    """
    return (1 << 32) // divisor + 1


def choose_stages(head_dim: int, keys: int, shared: int) -> int:
    """Tiles of K, and of V, under way at a time, with ``shared`` bytes on a multiprocessor.

    As many as let ``BLOCKS`` blocks share it; or, if that is one, up to two with one block.
    """

    def most(blocks: int) -> int:
        room = shared // blocks - RESERVED - shared_bytes(head_dim, keys, 0)
        return room // (shared_bytes(head_dim, keys, 1) - shared_bytes(head_dim, keys, 0))

    return max(most(BLOCKS), min(most(1), 2))
