"""The tensor cores of Ampere and later: ``mma.sync``, and ``ldmatrix``, which feeds them.

``stmatrix``, on Hopper and later, writes fragments back to shared memory.

Who holds what, for lane ``t``, with ``g = t // 4`` and ``q = t % 4`` (PTX ISA, "Matrix Fragments
for mma.m16n8k16"; a register of A and B holds two neighbours, the lower column or row in bits
0–15):

====  ====  =====================================================
A     a[0]  A[g, 2q], A[g, 2q + 1]
      a[1]  A[g + 8, 2q], A[g + 8, 2q + 1]
      a[2]  A[g, 2q + 8], A[g, 2q + 9]
      a[3]  A[g + 8, 2q + 8], A[g + 8, 2q + 9]
B     b[0]  B[2q, g], B[2q + 1, g]
      b[1]  B[2q + 8, g], B[2q + 9, g]
D     d[0]  D[g, 2q]
      d[1]  D[g, 2q + 1]
      d[2]  D[g + 8, 2q]
      d[3]  D[g + 8, 2q + 1]
====  ====  =====================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.ptx.halves import format_name, widen
from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running

Registers = NDArray[np.uint32]

# Where an element of a matrix lies among the values of all lanes, flattened.
_row, _column = np.indices((16, 16))
_A = (_row % 8 * 4 + _column % 8 // 2) * 8 + (_row // 8 + _column // 8 * 2) * 2 + _column % 2
_row, _column = np.indices((16, 8))
_B = (_column * 4 + _row % 8 // 2) * 4 + _row // 8 * 2 + _row % 2
_D = (_row % 8 * 4 + _column // 2) * 4 + _row // 8 * 2 + _column % 2
_FROM_D = np.argsort(_D, axis=None)
del _row, _column


@instruction(
    lambda dtype: (
        "mma.sync.aligned.m16n8k16.row.col.f32."
        f"{format_name(dtype)}.{format_name(dtype)}.f32 $0, $1, $2, $0;"
    ),
    "+4f,4r,2r,n",
    scope="warp",
    pure=True,
)
def mma_m16n8k16(d: Any, a: Registers, b: Registers, dtype: int) -> None:
    """D += A · B, with A [16, 16] and B [16, 8] in F16 or BF16 and D [16, 8] in float32.

    PTX ISA: ``mma.sync.aligned.m16n8k16``; the fragments are the module's table.

    Parameters
    ----------
    d : register tile of 4 float32
        Accumulator; read and written.
    a : register tile of 4 uint32
    b : register tile of 2 uint32
    dtype : int
        F16 or BF16, at compile time.

    Examples
    --------
    With A all ones and B twice the identity in its first rows, D becomes 2:

    >>> d, one = np.zeros((32, 4), np.float32), 0x3C003C00
    >>> b = np.zeros((32, 2), np.uint32)
    >>> lane = np.arange(32)
    >>> b[lane // 4 // 2 == lane % 4, 0] = [0x4000, 0x40000000] * 4
    >>> mma_m16n8k16(d, np.full((32, 4), one, np.uint32), b, 0)
    >>> bool((d == 2).all())
    True
    """
    a_values = widen(np.ascontiguousarray(a).view(np.uint16), dtype).take(_A)
    b_values = widen(np.ascontiguousarray(b).view(np.uint16), dtype).take(_B)
    d += (a_values @ b_values).take(_FROM_D).reshape(32, 4)


def _matrices(address: Any, count: int) -> NDArray[np.uint16]:
    rows = running().load_shared(address[: 8 * count], 16)
    return np.ascontiguousarray(rows).view(np.uint16).reshape(count, 8, 8)


def _fragments(matrices: NDArray[np.uint16]) -> Registers:
    """Give lane t elements 2(t % 4) and the next of row t // 4 of each matrix."""
    pairs = np.ascontiguousarray(matrices).view(np.uint32)
    return pairs.reshape(len(matrices), 32).T


@instruction(
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 $0, [$1];", "=4r,r", scope="warp", memory=True
)
def ldmatrix_x4(r: Registers, address: Any) -> None:
    """Load four 8×8 matrices of 16-bit elements from shared memory.

    Lane t gives the address of row t % 8 of matrix t // 8, a multiple of 16 bytes, and gets in
    ``r[i]`` elements 2(t % 4) and 2(t % 4) + 1 of row t // 4 of matrix i.

    PTX ISA: ``ldmatrix``.

    Parameters
    ----------
    r : register tile of 4 uint32
        Written.
    address : uint32
        Shared address.
    """
    r[...] = _fragments(_matrices(address, 4))


@instruction(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 $0, [$1];", "=4r,r", scope="warp", memory=True
)
def ldmatrix_x4_trans(r: Registers, address: Any) -> None:
    """Load four 8×8 matrices transposed: ``ldmatrix_x4`` with rows and columns exchanged.

    Lane t gets in ``r[i]`` elements t // 4 of rows 2(t % 4) and 2(t % 4) + 1 of matrix i.

    PTX ISA: ``ldmatrix``.
    """
    r[...] = _fragments(_matrices(address, 4).swapaxes(1, 2))


@instruction(
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 $0, [$1];", "=2r,r", scope="warp", memory=True
)
def ldmatrix_x2(r: Registers, address: Any) -> None:
    """Load two 8×8 matrices; lanes 0–15 give the addresses.  See ``ldmatrix_x4``."""
    r[...] = _fragments(_matrices(address, 2))


@instruction(
    "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 $0, [$1];", "=2r,r", scope="warp", memory=True
)
def ldmatrix_x2_trans(r: Registers, address: Any) -> None:
    """Load two 8×8 matrices transposed.  See ``ldmatrix_x4_trans``."""
    r[...] = _fragments(_matrices(address, 2).swapaxes(1, 2))


@instruction(
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], $1;",
    "r,4r",
    scope="warp",
    memory=True,
    target="sm_90",
)
def stmatrix_x4(address: Any, r: Registers) -> None:
    """Store four 8×8 matrices of 16-bit elements: what ``ldmatrix_x4`` would load as ``r``.

    Lane t gives the address of row t % 8 of matrix t // 8, a multiple of 16 bytes, and in ``r[i]``
    elements 2(t % 4) and 2(t % 4) + 1 of row t // 4 of matrix i.

    PTX ISA: ``stmatrix``.

    Parameters
    ----------
    address : uint32
        Shared address.
    r : register tile of 4 uint32
    """
    rows = np.ascontiguousarray(r.T, np.uint32).reshape(32, 4)  # [8 · matrix + row, lane % 4]
    running().store_shared(address, rows.view(np.uint8))
