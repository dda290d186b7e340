"""Hopper's mbarriers, and TMA, whose copies they count, in an emulated block.

A copy ends on the model's clock.  What it brings is poison to a thread that has not waited for the
phase it counts for, however early it may have landed: whether a wait was forgotten does not depend
on the schedule.  Early, a copy reads its source and writes when it begins; late, when it ends.

A wait names a parity, so it must be over before the next phase ends: later, it would be for the
phase after that.  Whether one may come too late does not depend on the schedule either: whoever has
waited must have arrived somewhere since, and by a chain of arrivals and waits that comes before
the next phase's end.  A product does as well that the thread has issued since and that another of
its warpgroup has waited for: it needs all of them.

Nor may a wait begin before the previous phase has ended: it would be over at once, too early.
Whoever waits must know that end by such a chain: from a wait for it, its own or another's, or,
if the phase counts no copies, from all its arrivals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulator import timing
from cuda_kernels.emulator.arguments import first_argument
from cuda_kernels.emulator.errors import EmulationError, Site, describe_site, ranges
from cuda_kernels.ptx.tensor_map import SWIZZLED, TensorMap

if TYPE_CHECKING:
    from cuda_kernels.emulator.block import Block, Thread

POLL = 100.0  # cycles that a try_wait suspends its thread
POLLS = 20_000  # of one phase, after which it is taken for a deadlock


class Step(NamedTuple):
    """A thread's arrival at a phase, or its wait for one that has ended.

    ``clock`` is the thread's, ``products`` the number that it had issued.
    """

    thread: Thread
    clock: int
    products: int
    site: Site

    def is_known(self, seen: NDArray[np.int64]) -> bool:
        """Whether it comes before what one does who has ``seen`` so much."""
        return bool(
            self.clock <= seen[self.thread.number]
            or self.products < self.thread.group.done_as_seen(seen)
        )


class Phase:
    """Who has arrived at a phase and, since it has ended, waited for it."""

    def __init__(self) -> None:
        self.arrivals: list[Step] = []
        self.waits: list[Step] = []
        self.copies = False  # whether it counts their bytes

    def is_known(self, seen: NDArray[np.int64]) -> bool:
        """Whether one who has ``seen`` so much knows that it has ended."""
        if any(wait.is_known(seen) for wait in self.waits):
            return True
        return not self.copies and all(arrival.is_known(seen) for arrival in self.arrivals)


class MBarrier:
    """An mbarrier and what its phases let others see.

    ``phase`` is the number of the present one, so as many have ended.
    """

    def __init__(self, block: Block, address: int, count: int, thread: Thread) -> None:
        self.address = address
        self.count = self.pending = count
        self.phase = 0
        self.bytes = 0  # expected and not come, in this phase; below 0: come and not expected
        self.clock = 0.0  # of the latest arrival
        self.ended = 0.0  # clock at which the last phase ended
        self.maker, self.made, self.site = thread.number, 0, thread.site
        self.calls = thread.calls()  # whose argument names it: the first wait's, once there is one
        self.waited_for = False
        self.fenced = False  # whether copies may use it
        self.waiting: list[Thread] = []
        self.polls = 0
        self._before, self._last, self._present = Phase(), Phase(), Phase()
        self.last_copy: tuple[int, int, Site] | None = None  # phase, thread, place
        self.actor = block.shared.add_actor(self.describe)
        self._shared = block.shared
        width = block.shared.seen.shape[1]
        self._seen = np.zeros(width, np.int64)  # by those who have arrived so far
        self._fence = np.zeros(len(block.threads), np.int64)
        self.known = self._seen.copy()  # to those who wait for the last phase that has ended
        self.known_fence = self._fence.copy()

    def __str__(self) -> str:
        name = first_argument(self.calls)
        where = f"{name} (at {self.address})" if name else f"at {self.address}"
        return f"the mbarrier {where}"

    def describe(self, clock: int, who: str) -> str:
        """Say what a copy of a phase did, or what ``who`` has missed of it."""
        if not who:
            return f"a copy by TMA in phase {clock - 1} of {self}"
        ended = f"phase {self.phase} goes on" if self.phase < clock else "it has ended"
        return f"{who} has not waited for that phase (parity {(clock - 1) & 1}; {ended})"

    def state(self) -> str:
        """Say where it stands."""
        return (
            f"{self} is in phase {self.phase} (parity {self.phase & 1}) "
            f"with {self.count - self.pending} of {self.count} arrivals and "
            f"{self.bytes} bytes to come"
        )

    def arrive(self, thread: Thread, size: int) -> None:
        """A thread arrives, expects bytes, and lets go what it has seen and done."""
        self.bytes += size
        self.pending -= 1
        self.clock = max(self.clock, thread.clock)
        seen = self._shared.seen[thread.number]
        self._present.copies |= size > 0
        self._present.arrivals.append(_step(thread, seen))
        if len(seen) > len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(len(seen) - len(self._seen), int)])
        np.maximum(self._seen, seen, out=self._seen)
        if self._shared.fenced is not None:
            np.maximum(self._fence, self._shared.fenced[thread.number], out=self._fence)
        self._shared.seen[thread.number, thread.number] += 1

    def pass_wait(self, threads: list[Thread]) -> None:
        """Threads have waited for the last phase: they see what it brought."""
        seen = self._shared.seen
        self._shared.acquire([t.number for t in threads], self.known, self.known_fence)
        self._last.waits += [_step(thread, seen[thread.number]) for thread in threads]

    def _check_waits(self) -> None:
        """Report threads whose wait for the last phase need not come before the end of this one."""
        seen = self._seen
        late = [wait for wait in self._last.waits if not wait.is_known(seen)]
        if late:
            site = late[0].site
            threads = {wait.thread.number for wait in late if wait.site == site}
            raise EmulationError(
                f"phase {self.phase} of {self} may end before threads "
                f"{ranges(threads)} have waited for the one before it, of parity "
                f"{self.phase - 1 & 1} ({describe_site(site)}): nothing orders their wait before "
                "that end, and later they would wait for a phase that has passed"
            )

    def check_wait(self, thread: Thread, parity: int) -> None:
        """Report a wait that begins where the phase before need not have ended."""
        ended = self.has_ended(parity)
        phase = self.phase - ended
        seen = self._shared.seen[thread.number]
        if seen[self.actor] >= phase or (self._before if ended else self._last).is_known(seen):
            return
        behind = seen[self.actor] < phase - 1
        late = f"; if phase {phase - 2} is meant, it comes too late" if behind else ""
        raise EmulationError(
            f"a wait for phase {phase} of {self} that may pass too early: "
            f"nothing tells this thread that phase {phase - 1} has ended, and as long as that goes "
            f"on, parity {parity} passes at once; first wait for phase {phase - 1}, or meet one "
            f"who has at a barrier{late}"
        )

    def end_phase(self) -> None:
        """Let those who wait see what the phase brought."""
        self._check_waits()
        self._before, self._last, self._present = self._last, self._present, Phase()
        self.phase += 1
        self.pending = self.count
        self.ended = self.clock
        self.polls = 0
        self.known, self.known_fence = self._seen.copy(), self._fence.copy()
        self.known[self.actor] = self.phase

    def has_ended(self, parity: int) -> bool:
        """Whether the latest phase of this parity has ended."""
        return self.phase & 1 != parity


class PhaseWait(NamedTuple):
    """What a thread waits for; written out in a report only."""

    parity: int
    barrier: MBarrier

    def __str__(self) -> str:
        return f"for the phase of parity {self.parity} of {self.barrier}"


def _step(thread: Thread, seen: NDArray[np.int64]) -> Step:
    return Step(thread, int(seen[thread.number]), thread.products, thread.site)


class Copy:
    """A copy by TMA under way."""

    def __init__(self, thread: Thread, barrier: MBarrier, shared: int, size: int) -> None:
        self.thread, self.site = thread, thread.site
        self.barrier, self.phase = barrier, barrier.phase
        self.shared, self.size = shared, size

    def describe(self) -> str:
        """Say who began it, and where."""
        thread = self.thread
        return f"thread {thread.number} of block {thread.block.index}, {describe_site(self.site)}"


class Transactions:
    """The mbarriers of a block and its TMA unit."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.barriers: dict[int, MBarrier] = {}
        self._busy = 0.0  # clock until which the unit brings bytes

    # --- mbarriers

    def init(self, thread: Thread, address: int, count: int) -> None:
        """Make an mbarrier."""
        shared = self._block.shared
        if address in self.barriers:
            raise EmulationError(
                f"{self.barriers[address]} is initialised again: "
                f"{describe_site(self.barriers[address].site)} has done it"
            )
        if not 0 < count < 1 << 20:
            raise EmulationError(f"an mbarrier for {count} arrivals; 1 to 2**20 − 1 are possible")
        shared.check_bounds(address, 8, "an mbarrier")
        shared.write(thread.number, address, np.zeros(8, np.uint8), thread.site)
        barrier = MBarrier(self._block, address, count, thread)
        barrier.made = int(shared.seen[thread.number, thread.number])
        self.barriers[address] = barrier

    def fence_init(self, thread: Thread) -> None:
        """Copies may use the mbarriers that this thread has made."""
        for barrier in self.barriers.values():
            barrier.fenced |= barrier.maker == thread.number

    def find(self, thread: Thread, address: int) -> MBarrier:
        """Return the mbarrier at an address, if the thread may know of it."""
        barrier = self.barriers.get(address)
        if barrier is None:
            known = ", ".join(str(self.barriers[a]) for a in sorted(self.barriers)) or "none"
            raise EmulationError(f"no mbarrier at shared address {address}; there are: {known}")
        if barrier.made > self._block.shared.seen[thread.number, barrier.maker]:
            raise EmulationError(
                f"{barrier} was initialised by thread {barrier.maker} "
                f"({describe_site(barrier.site)}) with no barrier between"
            )
        return barrier

    def arrive(self, thread: Thread, address: int, size: int) -> None:
        """Arrive once, and expect bytes."""
        barrier = self.find(thread, address)
        if barrier.pending == 0:
            raise EmulationError(
                f"one arrival too many: {barrier.state()}; a wait for the phase before was left "
                "out, or its count is too small"
            )
        barrier.arrive(thread, size)
        self._complete(barrier)

    def wait(self, thread: Thread, address: int, parity: int, until: bool) -> int:
        """Wait for a phase, or for a short time."""
        barrier = self.find(thread, address)
        if parity not in (0, 1):
            raise EmulationError(f"parity {parity} of an mbarrier; it is 0 or 1")
        if not barrier.waited_for:
            barrier.calls, barrier.waited_for = thread.calls(), True
        barrier.check_wait(thread, parity)
        start = thread.clock
        if not barrier.has_ended(parity) and not until:
            barrier.polls += 1
            if barrier.polls > POLLS:
                raise EmulationError(
                    f"mbarrier_try_wait has failed {POLLS} times: {barrier.state()}"
                )
            self._block.wake([thread], thread.clock + POLL)
            thread.wait()
        if barrier.has_ended(parity):
            barrier.pass_wait([thread])
            thread.clock = max(thread.clock, barrier.ended)
        elif until:
            barrier.waiting.append(thread)
            thread.wait(PhaseWait(parity, barrier), thread.site)
        else:
            return 0
        if thread.lane == 0:
            self._block.record(
                thread.warp.number, "mbarrier wait", start, thread.clock, thread.tile, thread.site
            )
        return 1

    def _complete(self, barrier: MBarrier) -> None:
        """End the phase if nothing is missing, and wake who waits for it."""
        if barrier.pending or barrier.bytes:
            return
        barrier.end_phase()
        # All named the parity of the phase that went on: another's would not have made them wait.
        threads, barrier.waiting = barrier.waiting, []
        if threads:
            barrier.pass_wait(threads)
            self._block.wake(threads, barrier.ended)

    # --- loads

    def load(
        self, thread: Thread, shared: int, source: Any, address: int, index: tuple[int, ...]
    ) -> None:
        """Begin to copy a box to shared memory."""
        block = self._block
        place = _checked(source, index)
        barrier = self.find(thread, address)
        if not barrier.fenced:
            raise EmulationError(
                f"a copy for {barrier}, which thread {barrier.maker} has "
                f"initialised ({describe_site(barrier.site)}) with no fence_mbarrier_init behind it"
            )
        self._check_box(shared, source.size)
        for other in self.barriers.values():
            if shared - 8 < other.address < shared + source.size:
                raise EmulationError(f"a copy over {other}")
        copy = Copy(thread, barrier, shared, source.size)
        block.shared.begin_fill(
            thread.number, shared, source.size, barrier.actor, barrier.phase + 1, thread.site
        )
        barrier.last_copy = (barrier.phase, thread.number, thread.site)
        if not block.late:
            self._land(shared, source.read(place))
        begin = max(self._busy, thread.clock)
        self._busy = begin + source.size / timing.COPY_BYTES
        end = self._busy + timing.TMA_LATENCY
        block.record(thread.warp.number, "TMA load", thread.clock, end, thread.tile, thread.site)
        block.at(end, lambda: self._end_load(copy, source, place, end))

    def _end_load(
        self, copy: Copy, source: TensorMap, place: tuple[int, ...], clock: float
    ) -> None:
        barrier = copy.barrier
        if self._block.late:
            self._land(copy.shared, source.read(place))
        barrier.bytes -= copy.size
        barrier.clock = max(barrier.clock, clock)
        if barrier.phase != copy.phase or (barrier.bytes < 0 and not barrier.pending):
            more = -barrier.bytes if barrier.phase == copy.phase else copy.size
            raise EmulationError(
                f"{copy.describe()}: wrong expect_tx: the copies of phase {copy.phase} of "
                f"{barrier} bring {more} bytes more than it expects"
            )
        try:
            self._complete(barrier)
        except EmulationError as error:
            raise EmulationError(f"{copy.describe()}: {error}") from None

    def _land(self, shared: int, data: NDArray[np.uint8]) -> None:
        self._block.shared.bytes[shared : shared + len(data)] = exchanged(shared, data)

    def _check_box(self, shared: int, size: int) -> None:
        if shared % SWIZZLED:
            raise EmulationError(
                f"a box at shared address {shared}, which is no multiple of {SWIZZLED}"
            )
        self._block.shared.check_range(shared, size, "a box")

    # --- stores

    def store(self, thread: Thread, target: Any, shared: int, index: tuple[int, ...]) -> None:
        """Begin to copy a box from shared memory."""
        block, memory = self._block, self._block.shared
        place = _checked(target, index)
        self._check_box(shared, target.size)
        if thread.stores is None:
            thread.stores = Stores(thread)
        stores = thread.stores
        chunks = np.arange(shared, shared + target.size, 16)
        only = slice(thread.number, thread.number + 1)

        data = memory.read_as(
            stores.actor, stores.groups + 1, chunks, thread.site, memory.seen[thread.number],
            memory.fence_of(only), f"thread {thread.number}",
        )  # fmt: skip
        written = data.reshape(-1).copy() if not block.late else None

        def land() -> None:
            box = memory.bytes[shared : shared + target.size] if written is None else written
            target.write(place, exchanged(shared, box))

        stores.begun.append((land, target.size, thread.site))

    # --- the end

    def check_end(self) -> None:
        """Report copies that nobody has waited for: the block may end before they do."""
        seen = self._block.shared.seen.max(axis=0)
        for barrier in self.barriers.values():
            if barrier.last_copy is None or seen[barrier.actor] > barrier.last_copy[0]:
                continue
            phase, thread, site = barrier.last_copy
            raise EmulationError(
                f"thread {thread} of block {self._block.index}, {describe_site(site)}: a copy by "
                f"TMA may be in flight when the block ends: nobody has waited for phase {phase} of "
                f"{barrier}"
            )


class Stores:
    """The bulk stores of one thread, in groups."""

    def __init__(self, thread: Thread) -> None:
        self._thread = thread
        self.actor = thread.block.shared.add_actor(self.describe)
        self.begun: list[Any] = []  # since the last commit: how to land, bytes, place
        self.committed: list[tuple[float, list[Any]]] = []
        self.groups = 0  # committed so far

    def describe(self, clock: int, who: str) -> str:
        """Say what a store did, or what ``who`` has missed of it."""
        if not who:
            return f"a store by TMA of thread {self._thread.number}"
        return f"{who} has seen no tma_wait_read for it"

    def commit(self) -> None:
        """Close a group."""
        size = sum(size for _, size, _ in self.begun)
        ready = self._thread.clock + size / timing.COPY_BYTES + timing.TMA_LATENCY
        self.committed.append((ready, self.begun))
        self.begun = []
        self.groups += 1

    def wait(self, pending: int) -> None:
        """Let the oldest groups land."""
        thread = self._thread
        while len(self.committed) > pending:
            ready, stores = self.committed.pop(0)
            thread.clock = max(thread.clock, ready)
            for land, _, _ in stores:
                land()
        thread.block.shared.seen[thread.number, self.actor] = self.groups - len(self.committed)
        thread.block.shared.version += 1

    def left(self) -> str:
        """Say what the thread has not waited for; nothing if it has."""
        left = [store for _, stores in self.committed for store in stores] + self.begun
        if not left:
            return ""
        return (
            f"a store by TMA ({describe_site(left[0][2])}) that may still read shared memory: no "
            "tma_wait_read for it"
        )


def exchanged(shared: int, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Exchange the 16-byte chunks of a box's rows, to or from where they lie in shared memory."""
    rows = data.reshape(-1, 8, 16)
    line = (shared >> 7) + np.arange(len(rows))[:, None]
    return np.take_along_axis(rows, (np.arange(8) ^ (line & 7))[:, :, None], axis=1).reshape(-1)


def _checked(box: Any, index: tuple[int, ...]) -> tuple[int, ...]:
    """Return an index as int32, of as many axes as the map has."""
    if not isinstance(box, TensorMap):
        raise EmulationError(f"a copy by TMA needs a tensor map, got {type(box).__name__}")
    if len(index) != len(box.box):
        raise EmulationError(f"an index of {len(index)} axes in {box}")
    return tuple((int(i) + (1 << 31) & 0xFFFFFFFF) - (1 << 31) for i in index)
