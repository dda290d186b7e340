"""Hopper's tensor cores: ``wgmma``, by which four warps multiply matrices in shared memory.

D [64, n] stays in registers: warp w of the four holds rows 16w to 16w + 15, its lane t, with
``g = t // 4`` and ``q = t % 4``, for every block j of 8 columns:

==============  ============================
``d[4j]``       D[16w + g, 8j + 2q]
``d[4j + 1]``   D[16w + g, 8j + 2q + 1]
``d[4j + 2]``   D[16w + g + 8, 8j + 2q]
``d[4j + 3]``   D[16w + g + 8, 8j + 2q + 1]
==============  ============================

which are the fragments of ``mma_m16n8k16`` side by side; A in registers is exactly that one's.

In shared memory a matrix is what TMA leaves: rows of 128 bytes, that is 64 elements, swizzled, and
beginning at a multiple of 1024 bytes.  A row runs along K (``K_MAJOR``: A [m, k], B [n, k]) or
along N (``MN_MAJOR``: B [k, n]).  A product takes 16 of K, so the next is 32 bytes on along a row
of K, or 16 rows on.

It is asynchronous: ``wgmma_fence`` before the first, products, ``wgmma_commit``, ``wgmma_wait``.
In between nobody touches the accumulators, writes A's registers or the shared matrices.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.ptx.compiler import uint32, uint64
from cuda_kernels.ptx.fragment import fragment
from cuda_kernels.ptx.halves import format_name, widen
from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running

K_MAJOR, MN_MAJOR = 0, 1
"""Along which axis the rows of a matrix in shared memory run: a compile-time integer."""

# A descriptor: bits 0–13 address, 16–29 leading offset, 32–45 stride offset, all in 16 bytes;
# bits 62–63: 1, the swizzle of 128 bytes.  The stride is that of 8 rows, 1024 bytes.
_SWIZZLE_AND_STRIDE = 1 << 62 | 1024 >> 4 << 32
_K_MAJOR_BITS = _SWIZZLE_AND_STRIDE | 1 << 16


@fragment
def k_major(address):
    """Describe a matrix whose rows run along K; ``address`` of its first 16 of K."""
    return uint64(uint64((address & uint32(0x3FFFF)) >> uint32(4)) | uint64(_K_MAJOR_BITS))


@fragment
def mn_major(address, leading):
    """Describe B [k, n] whose rows run along N; ``address`` of its first of 16 rows.

    ``leading`` is the distance in bytes between blocks of 64 columns, each a box of TMA's.
    """
    return uint64(
        uint64((address & uint32(0x3FFFF)) >> uint32(4))
        | uint64(leading) << uint64(12)
        | uint64(_SWIZZLE_AND_STRIDE)
    )


def _product(n: int, dtype: int, b_major: int, *, a_in_registers: bool) -> str:
    if not 8 <= n <= 256 or n % 8:
        raise ValueError(f"n must be a multiple of 8 from 8 to 256, got {n}")
    if b_major not in (K_MAJOR, MN_MAJOR):
        raise ValueError(f"b_major must be K_MAJOR (0) or MN_MAJOR (1), got {b_major}")
    name = format_name(dtype)
    majors = f"{b_major}" if a_in_registers else f"{K_MAJOR}, {b_major}"
    return (
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} "
        f"$0, $1, $2, p, 1, 1, {majors}; }}"
    )


@instruction("wgmma.fence.sync.aligned;", memory=True, target="sm_90a")
def wgmma_fence() -> None:
    """Order what this warpgroup has done to its registers before the products that follow.

    PTX ISA: ``wgmma.fence``.
    """
    running().fence_products()


@instruction("wgmma.commit_group.sync.aligned;", memory=True, target="sm_90a")
def wgmma_commit() -> None:
    """Close a group: the products that this warpgroup began since the last commit.

    PTX ISA: ``wgmma.commit_group``.
    """
    running().commit_products()


@instruction(
    "wgmma.wait_group.sync.aligned $0;",
    lambda n: f"n,+{n // 2}f,n",
    memory=True,
    target="sm_90a",
)
def wgmma_wait(pending: int, d: Any, n: int) -> None:
    """Wait until at most the ``pending`` youngest groups are under way; then D may be read.

    Every accumulator goes through a wait of its own, so that the compiler reads none before it.

    PTX ISA: ``wgmma.wait_group``; ``pending`` and ``n``, the columns of D, are compile-time
    integers.
    """
    running().wait_products(pending, d, n)


@instruction(
    lambda n, dtype, b_major: _product(n, dtype, b_major, a_in_registers=False),
    lambda n: f"+{n // 2}f,l,l,r,n,n,n",
    scope="warpgroup",
    memory=True,
    target="sm_90a",
)
def wgmma_ss(d: Any, a: int, b: int, accumulate: int, n: int, dtype: int, b_major: int) -> None:
    """Begin D = A · B or D += A · B, with A [64, 16] and B [16, n] in shared memory.

    PTX ISA: ``wgmma.mma_async``.

    Parameters
    ----------
    d : register tile of n / 2 float32
        Accumulator; see the module's table.
    a : uint64
        ``k_major(address)`` of A.
    b : uint64
        ``k_major(address)`` of B as [n, k], or ``mn_major(address, leading)`` of B as [k, n].
    accumulate : uint32
        0: D = A · B, whatever D was.
    n : int
        A multiple of 8 up to 256, at compile time.
    dtype : int
        F16 or BF16, at compile time.
    b_major : int
        K_MAJOR or MN_MAJOR, at compile time.
    """
    _multiply(d, _k_major_matrix(a, 64, dtype), _right(b, n, dtype, b_major), accumulate)


@instruction(
    lambda n, dtype, b_major: _product(n, dtype, b_major, a_in_registers=True),
    lambda n: f"+{n // 2}f,4r,l,r,n,n,n",
    scope="warpgroup",
    memory=True,
    target="sm_90a",
)
def wgmma_rs(d: Any, a: Any, b: int, accumulate: int, n: int, dtype: int, b_major: int) -> None:
    """Begin D = A · B or D += A · B, with A [64, 16] in registers.

    As ``wgmma_ss``, but ``a`` is a register tile of 4 uint32: warp w's part is rows 16w to
    16w + 15, laid out as for ``mma_m16n8k16``.

    PTX ISA: ``wgmma.mma_async``.
    """
    halves = np.ascontiguousarray(a).view(np.uint16)  # [128, 8]: register i, half e at 2i + e
    # lane 4g + q of warp w: register i holds row g + 8 (i % 2), columns 2q + e + 8 (i // 2)
    rows = halves.reshape(4, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(64, 16)
    _multiply(d, widen(np.ascontiguousarray(rows), dtype), _right(b, n, dtype, b_major), accumulate)


def _multiply(d: Any, a: NDArray[np.float32], b: NDArray[np.float32], accumulate: int) -> None:
    n = b.shape[1]
    # [w, h, g, j, q, e]: row 16w + 8h + g, column 8j + 2q + e
    product = (a @ b).reshape(4, 2, 8, n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    if accumulate:
        d += product.reshape(128, n // 2)
    else:
        d[...] = product.reshape(128, n // 2)


def _k_major_matrix(descriptor: int, rows: int, dtype: int) -> NDArray[np.float32]:
    start, _, stride = _parts(descriptor)
    chunks = start // 1024 * 1024 + _k_major_chunks(start % 1024, rows, stride)
    return widen(_load(chunks).reshape(rows, 16), dtype)


def _right(descriptor: int, n: int, dtype: int, b_major: int) -> NDArray[np.float32]:
    if b_major == K_MAJOR:
        return _k_major_matrix(descriptor, n, dtype).T
    start, leading, stride = _parts(descriptor)
    chunks = start // 1024 * 1024 + _mn_major_chunks(start % 1024, n, leading, stride)
    return widen(_load(chunks).reshape(16, n), dtype)


def _load(chunks: NDArray[np.int64]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(running().load_shared(chunks, 16)).view(np.uint16)


def _parts(descriptor: int) -> tuple[int, int, int]:
    """Return address, leading and stride offset of a descriptor, in bytes."""
    if descriptor >> 62 != 1 or descriptor >> 49 & 7:
        raise ValueError(
            f"descriptor {descriptor:#x}: only the swizzle of 128 bytes is modelled, in matrices "
            "that begin at a multiple of 1024 bytes"
        )
    return tuple((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))  # type: ignore


@cache
def _k_major_chunks(start: int, rows: int, stride: int) -> NDArray[np.int64]:
    """Addresses of the 16-byte chunks of [rows, 16], from a multiple of 1024 on."""
    row, half = np.indices((rows, 2))
    return _swizzled(start + row // 8 * stride + row % 8 * 128 + half * 16).reshape(-1)


@cache
def _mn_major_chunks(start: int, n: int, leading: int, stride: int) -> NDArray[np.int64]:
    """Addresses of the 16-byte chunks of [16, n], from a multiple of 1024 on."""
    k, chunk = np.indices((16, n // 8))
    return _swizzled(
        start + chunk // 8 * leading + k // 8 * stride + k % 8 * 128 + chunk % 8 * 16
    ).reshape(-1)


def _swizzled(address: NDArray[np.int64]) -> NDArray[np.int64]:
    return address ^ (address >> 3 & 0x70)
