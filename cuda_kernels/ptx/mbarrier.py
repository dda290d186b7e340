"""Hopper's barriers in shared memory, which count threads and the bytes of asynchronous copies.

A barrier is 8 bytes, aligned so.  It goes through phases 0, 1, 2, …; one ends when as many threads
have arrived as it was initialised for and as many bytes as they said to expect have come.  Whoever
waits names the *parity* of a phase, and the wait is over when the phase of that parity which came
last before the present one, has ended: a thread that leaves out a wait may therefore pass the next
one too early; and one that comes to wait when the next phase has ended, too, waits for the phase
after that, perhaps for ever.  So whoever lets the next phase end does it after all waits for this
one: behind a barrier of all who wait, or as the only one who does.  On a new barrier, parity 1
passes at once.
"""

from __future__ import annotations

from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running


@instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", memory=True, target="sm_90")
def mbarrier_init(barrier: int, count: int) -> None:
    """Make a barrier of 8 bytes of shared memory, each of its phases for ``count`` arrivals.

    One thread does it; ``fence_mbarrier_init`` comes before its use, and before that of others a
    barrier of the block, too.

    PTX ISA: ``mbarrier.init``.
    """
    running().init_mbarrier(barrier, count)


@instruction("fence.mbarrier_init.release.cluster;", memory=True, target="sm_90")
def fence_mbarrier_init() -> None:
    """Let asynchronous copies see the barriers that this thread has initialised.

    PTX ISA: ``fence.mbarrier_init``.
    """
    running().fence_mbarriers()


@instruction(
    "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];", "r", memory=True, target="sm_90"
)
def mbarrier_arrive(barrier: int) -> None:
    """Arrive once, and let go what this thread has read or written.

    PTX ISA: ``mbarrier.arrive``.
    """
    running().arrive_mbarrier(barrier, 0)


@instruction(
    "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], $1;",
    "r,r",
    memory=True,
    target="sm_90",
)
def mbarrier_arrive_expect_tx(barrier: int, size: int) -> None:
    """Arrive once; the phase now also waits for ``size`` more bytes of asynchronous copies.

    PTX ISA: ``mbarrier.arrive.expect_tx``.
    """
    running().arrive_mbarrier(barrier, size)


@instruction(
    "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [$1], $2; "
    "selp.u32 $0, 1, 0, p; }",
    "=r,r,r",
    memory=True,
    target="sm_90",
)
def mbarrier_try_wait(barrier: int, parity: int) -> int:
    """Return 1 if the phase of this parity has ended, else 0 after a short time.

    PTX ISA: ``mbarrier.try_wait.parity``.
    """
    return running().wait_mbarrier(barrier, parity, False)


@instruction(
    "{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [$0], $1; "
    "@!p bra again; }",
    "r,r",
    memory=True,
    target="sm_90",
)
def mbarrier_wait(barrier: int, parity: int) -> None:
    """Wait until the phase of this parity has ended, and see what came with it.

    PTX ISA: ``mbarrier.try_wait.parity``, in a loop.
    """
    running().wait_mbarrier(barrier, parity, True)


@instruction("fence.proxy.async.shared::cta;", memory=True, target="sm_90")
def fence_proxy_async() -> None:
    """Let asynchronous copies and ``wgmma`` see what plain stores have written to shared memory.

    The thread that has stored calls it, before the barrier that tells the others.

    PTX ISA: ``fence.proxy.async``.
    """
    running().fence_proxy()
