"""Barriers between the threads of a block, barriers that vote, and memory fences.

A block has 16 barriers, 0 to 15; ``cuda.syncthreads()`` is barrier 0 for all its threads.  Counts
are multiples of 32, and all lanes of a warp must execute the same barrier instruction.
"""

from __future__ import annotations

from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running

_REDUCE = (
    "{{ .reg .pred p, q; setp.ne.u32 p, $3, 0; "
    "bar.red.{}.pred q, $1, $2, p; selp.u32 $0, 1, 0, q; }}"
)


@instruction("bar.sync $0, $1;", "r,r", memory=True)
def bar_sync(name: int, count: int) -> None:
    """Wait until ``count`` threads have arrived at barrier ``name``, and see what they wrote.

    PTX ISA: ``bar.sync``.
    """
    running().barrier(name, count)


@instruction("bar.arrive $0, $1;", "r,r", memory=True)
def bar_arrive(name: int, count: int) -> None:
    """Arrive at barrier ``name``, for ``count`` threads, and go on.  PTX ISA: ``bar.arrive``."""
    running().arrive(name, count)


@instruction(_REDUCE.format("and"), "=r,r,r,r", memory=True)
def bar_red_and(name: int, count: int, predicate: int) -> int:
    """Wait as ``bar_sync`` does; return 1 if no thread's predicate is 0, else 0.

    PTX ISA: ``bar.red.and.pred``.
    """
    return running().barrier(name, count, "and", predicate)


@instruction(_REDUCE.format("or"), "=r,r,r,r", memory=True)
def bar_red_or(name: int, count: int, predicate: int) -> int:
    """Wait as ``bar_sync`` does; return 1 if any thread's predicate is not 0, else 0.

    PTX ISA: ``bar.red.or.pred``.
    """
    return running().barrier(name, count, "or", predicate)


@instruction(
    "{ .reg .pred p; setp.ne.u32 p, $3, 0; bar.red.popc.u32 $0, $1, $2, p; }",
    "=r,r,r,r",
    memory=True,
)
def bar_red_popc(name: int, count: int, predicate: int) -> int:
    """Wait as ``bar_sync`` does; return how many threads' predicates are not 0.

    PTX ISA: ``bar.red.popc.u32``.
    """
    return running().barrier(name, count, "popc", predicate)


@instruction("fence.acq_rel.cta;", memory=True)
def fence_block() -> None:
    """Order this thread's memory accesses for its block.  PTX ISA: ``fence.acq_rel.cta``."""


@instruction("fence.acq_rel.gpu;", memory=True)
def fence_gpu() -> None:
    """Order this thread's memory accesses for the GPU.  PTX ISA: ``fence.acq_rel.gpu``."""


@instruction("", "r")
def mark_tile(tile: int) -> None:
    """Label this thread's events in the emulator's timeline; no code on a GPU."""
    running().mark_tile(tile)
