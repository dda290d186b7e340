"""Ampere's asynchronous copies from global to shared memory.

A copy may land at any time up to the wait, and its source is read at any time up to then.  The
wait makes it visible to the thread that waits; a barrier after it, to the others.
"""

from __future__ import annotations

from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running


@instruction("cp.async.cg.shared.global.L2::128B [$0], [$1], 16;", "r,l", memory=True)
def cp_async_16(shared: int, source: int) -> None:
    """Begin to copy 16 bytes; both addresses are multiples of 16.

    PTX ISA: ``cp.async``.

    Parameters
    ----------
    shared : uint32
        Shared address to write.
    source : uint64
        Global address to read.
    """
    running().copy_async(shared, source, 16, 16)


@instruction("cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;", "r,l,r", memory=True)
def cp_async_16_zfill(shared: int, source: int, size: int) -> None:
    """Begin to copy ``size`` ≤ 16 bytes and to fill the rest of 16 with zeros.

    With size 0 the source is not read, and its address need not exist.

    PTX ISA: ``cp.async`` with ``src-size``.
    """
    running().copy_async(shared, source, size, 16)


@instruction(
    "{ .reg .pred p; setp.ne.u32 p, $3, 0; "
    "@p cp.async.cg.shared.global.L2::256B [$0], [$1], 16, $2; }",
    "r,l,r,r",
    memory=True,
)
def cp_async_16_zfill_if(shared: int, source: int, size: int, wanted: int) -> None:
    """Begin to copy as :func:`cp_async_16_zfill` does, unless ``wanted`` is 0.

    A predicate, not a branch, so that it can stand among other instructions; the assembler may
    still branch around it.

    PTX ISA: ``cp.async`` with ``src-size``, predicated.
    """
    if wanted:
        running().copy_async(shared, source, size, 16)


@instruction("cp.async.commit_group;", memory=True)
def cp_async_commit() -> None:
    """Close a group: the copies that this thread began since the last commit.

    PTX ISA: ``cp.async.commit_group``.
    """
    running().commit_copies()


@instruction("cp.async.wait_group $0;", "n", memory=True)
def cp_async_wait(pending: int) -> None:
    """Wait until at most the ``pending`` youngest groups of this thread are under way.

    PTX ISA: ``cp.async.wait_group``; ``pending`` is a compile-time integer.
    """
    running().wait_copies(pending)
