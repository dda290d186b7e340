"""The Tensor Memory Accelerator: one thread begins to copy a whole box of an array.

The array is described by a :class:`~cuda_kernels.ptx.tensor_map.TensorMap`, which the kernel takes
by value.  An index is that of the box's first element, in the order of the array's axes, and may
be negative or beyond the end; along the last axis it is a multiple of 16 bytes, or the hardware
stops the kernel with an illegal instruction.  In shared memory a box begins at a multiple of 128
bytes, and of 1024 if ``wgmma`` is to read it; its rows are swizzled (:func:`swizzle`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.ptx.compiler import uint32
from cuda_kernels.ptx.fragment import fragment
from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running
from cuda_kernels.ptx.tensor_map import TensorMap


def _load(axes: int) -> str:
    place = ", ".join(f"${i}" for i in range(2 + axes, 2, -1))
    return (
        f"cp.async.bulk.tensor.{axes}d.shared::cluster.global.tile"
        f".mbarrier::complete_tx::bytes [$0], [$1, {{{place}}}], [$2];"
    )


def _store(axes: int) -> str:
    place = ", ".join(f"${i}" for i in range(1 + axes, 1, -1))
    return (
        f"cp.async.bulk.tensor.{axes}d.global.shared::cta.tile.bulk_group [$0, {{{place}}}], [$1];"
    )


def _begin_load(shared: int, source: Any, barrier: int, *index: int) -> None:
    if isinstance(source, TensorMap):
        source.check_load(index)
    running().load_box(shared, source, barrier, index)


def _begin_store(target: Any, shared: int, *index: int) -> None:
    if isinstance(target, TensorMap):
        target.check_store(index)
    running().store_box(target, shared, index)


@instruction(_load(2), "r,t,r,r,r", memory=True, target="sm_90")
def tma_load_2d(shared: int, source: Any, barrier: int, i0: int, i1: int) -> None:
    """Begin to copy a box to shared memory; its bytes count for the barrier's present phase.

    What lies outside the array comes as zeros, which count too.

    PTX ISA: ``cp.async.bulk.tensor``, ``mbarrier::complete_tx``.

    Parameters
    ----------
    shared : uint32
        Shared address of the box.
    source : TensorMap
        A parameter of the kernel.
    barrier : uint32
        Shared address of an mbarrier.
    i0, i1 : int32
        Index of the box's first element, in the order of the array's axes; the last one a multiple
        of 16 bytes.
    """
    _begin_load(shared, source, barrier, i0, i1)


@instruction(_load(3), "r,t,r,r,r,r", memory=True, target="sm_90")
def tma_load_3d(shared: int, source: Any, barrier: int, i0: int, i1: int, i2: int) -> None:
    """Begin to copy a box of 3 axes.  See ``tma_load_2d``."""
    _begin_load(shared, source, barrier, i0, i1, i2)


@instruction(_load(4), "r,t,r,r,r,r,r", memory=True, target="sm_90")
def tma_load_4d(shared: int, source: Any, barrier: int, i0: int, i1: int, i2: int, i3: int) -> None:
    """Begin to copy a box of 4 axes.  See ``tma_load_2d``."""
    _begin_load(shared, source, barrier, i0, i1, i2, i3)


@instruction(_load(5), "r,t,r,r,r,r,r,r", memory=True, target="sm_90")
def tma_load_5d(
    shared: int, source: Any, barrier: int, i0: int, i1: int, i2: int, i3: int, i4: int
) -> None:
    """Begin to copy a box of 5 axes.  See ``tma_load_2d``."""
    _begin_load(shared, source, barrier, i0, i1, i2, i3, i4)


@instruction(_store(2), "t,r,r,r", memory=True, target="sm_90")
def tma_store_2d(target: Any, shared: int, i0: int, i1: int) -> None:
    """Begin to copy a box from shared memory to an array; nothing is written outside the array.

    The array's last axis has a multiple of 16 bytes: the hardware writes no fewer.  Who has written
    the box with plain stores calls ``fence_proxy_async`` first.

    PTX ISA: ``cp.async.bulk.tensor``, ``bulk_group``.
    """
    _begin_store(target, shared, i0, i1)


@instruction(_store(4), "t,r,r,r,r,r", memory=True, target="sm_90")
def tma_store_4d(target: Any, shared: int, i0: int, i1: int, i2: int, i3: int) -> None:
    """Begin to copy a box of 4 axes to an array.  See ``tma_store_2d``."""
    _begin_store(target, shared, i0, i1, i2, i3)


@instruction("cp.async.bulk.commit_group;", memory=True, target="sm_90")
def tma_commit() -> None:
    """Close a group: the stores that this thread began since the last commit.

    PTX ISA: ``cp.async.bulk.commit_group``.
    """
    running().commit_boxes()


@instruction("cp.async.bulk.wait_group.read $0;", "n", memory=True, target="sm_90")
def tma_wait_read(pending: int) -> None:
    """Wait until all but the ``pending`` youngest groups of this thread have read their boxes.

    Shared memory is free again then; the block may end.

    PTX ISA: ``cp.async.bulk.wait_group.read``; ``pending`` is a compile-time integer.
    """
    running().wait_boxes(pending)


@instruction("prefetch.tensormap [$0];", "t", memory=True, target="sm_90")
def tma_prefetch(source: Any) -> None:
    """Fetch the map itself, ahead of the first copy.  PTX ISA: ``prefetch.tensormap``."""


@instruction(
    "{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 $0, 1, 0, p; }",
    "=r",
    scope="warp",
    target="sm_90",
)
def elect_one() -> Any:
    """Return 1 in one lane of the warp, always the same, and 0 in the others.

    The compiler then knows that one thread alone begins a copy.

    PTX ISA: ``elect.sync``.

    Examples
    --------
    >>> int(elect_one().sum())
    1
    """
    return (np.arange(32) == 0).astype(np.uint32)


@fragment
def swizzle(address):
    """Where a byte of a box lies in shared memory, from where it would without the exchange."""
    return uint32(address ^ ((address >> uint32(3)) & uint32(0x70)))
