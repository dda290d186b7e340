"""One thread block: a greenlet per CUDA thread, local clocks, and who waits for whom.

The scheduler resumes the threads whose clock is smallest; a thread runs until it must wait.
Warp-wide instructions on register tiles (``mma``, ``ldmatrix``, ``stmatrix``) do not make it wait:
they are issued lane by lane, and done for the whole warp when every lane has issued them and one
needs the result, as a scoreboard does.
"""

from __future__ import annotations

import contextvars
import heapq
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

from cuda_kernels.emulator import timing
from cuda_kernels.emulator.arguments import Call
from cuda_kernels.emulator.arrays import GlobalMemory
from cuda_kernels.emulator.errors import (
    EmulationError,
    Site,
    describe_site,
    ranges,
    site_of,
)
from cuda_kernels.emulator.registers import Registers
from cuda_kernels.emulator.shared import SharedMemory
from cuda_kernels.emulator.timeline import Event
from cuda_kernels.emulator.transactions import Stores, Transactions
from cuda_kernels.emulator.warpgroup import Warpgroup
from cuda_kernels.ptx import machine
from cuda_kernels.ptx.instruction import Instruction

PER_LANE = object()
"""Stands for a scalar operand of an issued instruction: every lane has its own."""

REGISTERS = 65536  # of an SM, all of which a block of warpgroups takes

Index = tuple[int, int, int]
Copy = tuple[int, Any, int, Any]  # shared address, source bytes, size with the fill, place


class Issued:
    """A warp-wide instruction that lanes have issued and that is not done yet."""

    __slots__ = (
        "args", "clock", "count", "instruction", "key", "lanes", "site", "tile", "waiting"
    )  # fmt: skip

    def __init__(self, instruction: Instruction, key: Any, site: Site, tile: int) -> None:
        self.instruction = instruction
        self.key = key  # the operands that all lanes must agree in
        self.site = site
        self.tile = tile
        self.args: list[Any] = []
        self.count = 0
        self.clock = 0.0
        self.lanes: list[Any] = [None] * 32  # of every lane: its scalar operands
        self.waiting: list[Thread] = []


class Meeting:
    """Lanes of a warp that wait for the others."""

    def __init__(self) -> None:
        self.threads: list[Thread] = []
        self.values: dict[int, Any] = {}  # by lane


class Barrier:
    """A named barrier between two uses."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.waiting: list[Thread] = []
        self.arrived: list[int] = []
        self.clock = 0.0
        self.votes = 0
        self.vote = ""


class Warp:
    """32 threads; the machine that warp-wide instructions run on."""

    def __init__(self, block: Block, number: int) -> None:
        self.block = block
        self.number = number
        self.group = block.groups[number // 4]
        self.threads: list[Thread] = []
        self.running: Any = None
        self.queue: list[Issued] = []
        self.executed = 0  # instructions done; the queue holds the later ones
        self.done = 0.0  # clock at which the last of them has its result
        self.meetings: dict[Any, Meeting] = {}
        self.tiles: dict[tuple[Site, int], Registers] = {}
        self._site: Site = (Warp.execute.__code__, 0)  # of the instruction being done
        self._rows = np.empty(0, np.int64)

    def load_shared(self, addresses: Any, size: int) -> Any:
        """Read one row per address, each as the lane that gives it."""
        count = len(addresses)
        return self.block.shared.read_rows(self._rows[:count], addresses, size, self._site)

    def store_shared(self, addresses: Any, rows: Any) -> None:
        """Write one row per address, each as the lane that gives it."""
        shared = self.block.shared
        for thread, address, row in zip(self._rows, addresses.tolist(), rows, strict=True):
            shared.check_bounds(address, len(row), "write")
            shared.write(int(thread), address, row, self._site)

    def execute(self, count: int) -> None:
        """Do the first ``count`` instructions of the queue."""
        block = self.block
        before = machine._running
        machine.set_running(self)  # type: ignore[arg-type]
        for issued in self.queue[:count]:
            name = issued.instruction.__name__
            self._site = issued.site
            args = []
            for position, argument in enumerate(issued.args):
                if isinstance(argument, Registers):
                    args.append(argument.flat)
                elif argument is PER_LANE:
                    args.append(np.array([lane[position] for lane in issued.lanes]))
                else:
                    args.append(argument)
            try:
                issued.instruction.body(*args)
            except EmulationError as error:
                raise EmulationError(
                    f"warp {self.number} of block {block.index}, {name}, "
                    f"{describe_site(issued.site)}: {error}"
                ) from None
            cost = timing.cost_of(name)
            start = block.reserve(cost, self.number, issued.clock)
            self.done = max(self.done, start + cost.latency)
            block.record(self.number, name, start, start + cost.busy, issued.tile, issued.site)
        machine.set_running(before)
        del self.queue[:count]
        self.executed += count


class Thread:
    """One CUDA thread; the machine that its instructions run on."""

    def __init__(self, block: Block, number: int, warp: Warp, run: Callable[[], None]) -> None:
        width, height, _ = block.shape
        self.block = block
        self.number = number
        self.index: Index = (
            number % width,
            number // width % height,
            number // (width * height),
        )
        self.warp = warp
        self.lane = number % 32
        self.clock = 0.0
        self.issued = 0  # warp-wide instructions of register tiles issued so far
        self.site: Site = (run.__code__, 0)  # of the instruction that it executes
        self.waits_for: tuple[object, Site | None] = ("", None)
        self.result: Any = None
        self.tile = -1
        self.declared: dict[Site, int] = {}
        self.group = warp.group
        self.products = 0  # of its warpgroup that this thread has issued
        self.commits: list[int] = []  # products before each commit since the last wait
        self.waited = 0  # products that it has waited for
        self.fences = 0  # wgmma_fence so far
        self.stores: Stores | None = None
        self._copies: list[Copy] = []
        self._groups: list[tuple[float, list[Copy]]] = []
        self.greenlet = greenlet(self._main, block.hub)
        self.greenlet.gr_context = contextvars.copy_context()  # NumPy's error state is in it
        self._run = run

    def _main(self) -> None:
        try:
            self._run()
            self.settle()
        except EmulationError as error:
            if getattr(error, "placed", False):
                raise
            raise self._placed(error) from error.__cause__
        except (IndexError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise self._placed(error) from error
        left = self.stores.left() if self.stores is not None else ""
        if self.products > self.waited:
            left = f"{self.products - self.waited} wgmma with no wgmma_wait for them"
        if left:
            raise EmulationError(
                f"thread {self.number} of block {self.block.index} ends with {left}"
            )

    def _placed(self, error: Exception) -> EmulationError:
        """Say which thread it was, and where in the kernel."""
        place = _deepest(error, self._run.__code__)
        text = str(error)
        if not text.startswith(("warp ", "warps ")):
            text = f"thread {self.number} of block {self.block.index}, {place}: {text}"
        placed = EmulationError(text)
        placed.placed = True  # type: ignore[attr-defined]
        return placed

    # --- waiting

    def settle(self) -> None:
        """Wait until the warp-wide instructions that this lane has issued are done."""
        warp = self.warp
        while self.issued > warp.executed:
            count = self.issued - warp.executed
            issued = warp.queue[count - 1]
            if issued.count == 32:
                warp.execute(count)
            else:
                issued.waiting.append(self)
                self.wait(f"for the other lanes at {issued.instruction.__name__}", issued.site)
        self.clock = max(self.clock, warp.done)

    def wait(self, what: object = "", site: Site | None = None) -> Any:
        """Let others run until somebody wakes this thread."""
        self.waits_for = (what, site)
        self.block.hub.switch()
        return self.result

    def meet(
        self, key: Any, lanes: int, value: Any, finish: Callable[[dict[int, Any]], dict[int, Any]],
        latency: float, what: str,
    ) -> Any:  # fmt: skip
        """Wait for the lanes in the mask; return this lane's part of what ``finish`` makes."""
        self.settle()
        warp = self.warp
        if not lanes >> self.lane & 1:
            raise EmulationError(f"{what}: lane {self.lane} is not in its own mask {lanes:#x}")
        meeting = warp.meetings.setdefault((key, lanes), Meeting())
        meeting.threads.append(self)
        meeting.values[self.lane] = value
        if len(meeting.threads) < lanes.bit_count():
            return self.wait(f"for the other lanes at {what}", self.site)
        del warp.meetings[key, lanes]
        results = finish(meeting.values)
        start = max(thread.clock for thread in meeting.threads)
        for thread in meeting.threads:
            thread.result = results[thread.lane]
        self.block.record(warp.number, what, start, start + latency, self.tile, self.site)
        self.block.wake(meeting.threads, start + latency)
        return self.wait()

    # --- what instructions ask for (cuda_kernels.ptx.machine.Machine)

    def load_shared(self, address: Any, size: int) -> Any:
        """Read shared memory."""
        self.block.shared.check_bounds(address, size, "read")
        return self.block.shared.read(self.number, address, size, self.site)

    def store_shared(self, address: int, data: Any, *, relaxed: bool = False) -> None:
        """Write shared memory."""
        shared = self.block.shared
        shared.check_bounds(address, len(data), "write")
        write = shared.write_relaxed if relaxed else shared.write
        write(self.number, address, data, self.site)

    def load_global(self, address: int, size: int) -> Any:
        """Read global memory."""
        return self.block.memory.locate(address, size, "read", size)

    def store_global(self, address: int, data: Any) -> None:
        """Write global memory."""
        self.block.memory.locate(address, len(data), "write", len(data))[:] = data

    def copy_async(self, shared: int, source: int, size: int, filled: int) -> None:
        """Begin a copy; the schedule decides when it happens."""
        block = self.block
        if not 0 <= size <= filled:
            raise EmulationError(f"a copy of {size} bytes; 0 to {filled} are possible")
        block.shared.check_bounds(shared, filled, "asynchronous write")
        origin = np.empty(0, np.uint8)
        if size:
            origin = block.memory.locate(source, size, "asynchronous read", filled)
        block.shared.begin_copy(self.number, shared, filled, self.site)
        if not block.late:
            origin = _filled(origin.copy(), filled)
            block.shared.bytes[shared : shared + filled] = origin
        self._copies.append((shared, origin, filled, self.site))

    def commit_copies(self) -> None:
        """Close a group."""
        block, size = self.block, sum(filled for _, _, filled, _ in self._copies)
        begin = max(block.copies_until, self.clock)
        block.copies_until = begin + size / timing.COPY_BYTES
        ready = block.copies_until + timing.COPY_LATENCY if size else self.clock
        self._groups.append((ready, self._copies))
        self._copies = []

    def wait_copies(self, pending: int) -> None:
        """Let the oldest groups land."""
        shared = self.block.shared
        start = self.clock
        while len(self._groups) > pending:
            ready, copies = self._groups.pop(0)
            self.clock = max(self.clock, ready)
            for address, origin, filled, site in copies:
                shared.end_copy(self.number, address, _filled(origin, filled), site)
        if self.lane == 0:
            self.block.record(
                self.warp.number, "wait for copies", start, self.clock, self.tile, self.site
            )

    def barrier(self, name: int, count: int | None, vote: str = "", value: int = 0) -> int:
        """Wait at a barrier."""
        self.settle()
        barrier = self._arrive(name, count, vote)
        barrier.votes += bool(value)
        barrier.waiting.append(self)
        if not self._complete(name, barrier):
            return self.wait(f"at barrier {name}", self.site)
        return self.wait()

    def arrive(self, name: int, count: int) -> None:
        """Arrive at a barrier and go on."""
        self.settle()
        barrier = self._arrive(name, count, "")
        barrier.arrived.append(self.number)
        self._complete(name, barrier)

    def _arrive(self, name: int, count: int | None, vote: str) -> Barrier:
        block = self.block
        if not 0 <= name < 16:
            raise EmulationError(f"barrier {name}: a block has barriers 0 to 15")
        if count is None:
            count = len(block.threads)
        elif count % 32 or not 0 < count <= len(block.threads):
            raise EmulationError(
                f"barrier {name} for {count} threads: the count must be a multiple of 32, at most "
                f"the block's {len(block.threads)}"
            )
        barrier = block.barriers.setdefault(name, Barrier(count))
        if not barrier.waiting and vote:
            barrier.vote = vote
        if barrier.count != count or (vote or barrier.vote) != barrier.vote:
            raise EmulationError(
                f"barrier {name} for {count} threads, while others wait at it for {barrier.count}"
            )
        barrier.clock = max(barrier.clock, self.clock)
        return barrier

    def _complete(self, name: int, barrier: Barrier) -> bool:
        arrived = len(barrier.waiting) + len(barrier.arrived)
        if arrived < barrier.count:
            return False
        block = self.block
        del block.barriers[name]
        numbers = [thread.number for thread in barrier.waiting]
        present = set(numbers) | set(barrier.arrived)
        for warp in {number // 32 for number in present}:
            absent = {thread.number for thread in block.warps[warp].threads} - present
            if absent:
                raise EmulationError(
                    f"barrier {name} was reached by a part of warp {warp} alone: threads "
                    f"{ranges(absent)} are elsewhere"
                )
        result = {
            "": 0,
            "and": int(barrier.votes == len(barrier.waiting)),
            "or": int(barrier.votes > 0),
            "popc": barrier.votes,
        }[barrier.vote]
        block.shared.join(numbers, barrier.arrived)
        end = barrier.clock + timing.BARRIER
        for thread in barrier.waiting:
            if thread.lane == 0:
                block.record(
                    thread.warp.number, f"barrier {name}", thread.clock, end, thread.tile,
                    thread.site,
                )  # fmt: skip
            thread.result = result
        block.wake(barrier.waiting, end)
        return True

    def sync_warp(self, mask: int) -> None:
        """Wait for lanes and see what they wrote."""
        first = self.warp.number * 32

        def finish(values: dict[int, Any]) -> dict[int, Any]:
            self.block.shared.join([first + lane for lane in values], [])
            return values

        self.meet("sync_warp", mask & self.warp_mask(), None, finish, 4, "sync_warp")

    # --- and Hopper's

    def init_mbarrier(self, address: int, count: int) -> None:
        """Make an mbarrier."""
        self.block.transactions.init(self, address, count)

    def fence_mbarriers(self) -> None:
        """Let copies use this thread's mbarriers."""
        self.block.transactions.fence_init(self)

    def arrive_mbarrier(self, address: int, size: int) -> None:
        """Arrive once, and expect bytes."""
        self.block.transactions.arrive(self, address, size)

    def wait_mbarrier(self, address: int, parity: int, until: bool) -> int:
        """Wait for a phase, or for a short time."""
        return self.block.transactions.wait(self, address, parity, until)

    def fence_proxy(self) -> None:
        """Let Hopper's units see plain stores."""
        self.block.shared.fence_proxy(self.number)
        self.block.transactions.fence_init(self)

    def load_box(self, shared: int, source: Any, barrier: int, index: tuple[int, ...]) -> None:
        """Begin to copy a box to shared memory."""
        self.block.transactions.load(self, shared, source, barrier, index)

    def store_box(self, target: Any, shared: int, index: tuple[int, ...]) -> None:
        """Begin to copy a box from shared memory."""
        self.block.transactions.store(self, target, shared, index)

    def commit_boxes(self) -> None:
        """Close a group of stores."""
        if self.stores is not None:
            self.stores.commit()

    def wait_boxes(self, pending: int) -> None:
        """Wait for groups of stores."""
        if self.stores is not None:
            self.stores.wait(pending)

    def fence_products(self) -> None:
        """Order register accesses before the products that follow."""
        self.fences += 1
        self.group.used = True

    def commit_products(self) -> None:
        """Close a group of products."""
        self.commits.append(self.products)

    def wait_products(self, pending: int, d: Any, n: int) -> None:
        """Wait for groups of products."""
        self.group.wait(self, pending, d, n)

    def change_registers(self, count: int, direction: int) -> None:
        """Give back or take registers."""
        self.group.change_registers(self, count, direction)

    def mark_tile(self, tile: int) -> None:
        """Label the events that follow."""
        self.tile = tile

    def address(self, space: str, array: Any, index: Any) -> int:
        """Return the address of an array element."""
        if not hasattr(array, "address"):
            raise EmulationError(f"{type(array).__name__} has no {space} address")
        return array.address(index)

    # --- what arrays in shared memory ask for

    def read_element(self, address: int, size: int) -> Any:
        """Read an element of a shared array."""
        self.enter(sys._getframe(2))
        return self.block.shared.read(self.number, address, size, self.site)

    def write_element(self, address: int, data: Any) -> None:
        """Write an element of a shared array."""
        self.enter(sys._getframe(2))
        self.block.shared.write(self.number, address, data, self.site)

    def enter(self, frame: FrameType) -> None:
        """Begin an instruction that is not issued for the warp: those before it must be done."""
        self.site = site_of(frame)
        if self.issued > self.warp.executed:
            self.settle()

    def calls(self) -> list[Call]:
        """Return the calls that it is in: of its instruction, and out to the kernel's own."""
        calls: list[Call] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._run.__code__:
            if calls or frame.f_code is self.site[0]:
                calls.append((site_of(frame), dict(frame.f_locals)))
            frame = frame.f_back
        return calls

    def warp_mask(self) -> int:
        """Return the lanes that the warp has."""
        return (1 << len(self.warp.threads)) - 1


class Block:
    """One thread block of a launch.

    Parameters
    ----------
    index, grid, shape : tuple of 3 int
        Block index, blocks of the grid, threads of the block.
    run : callable
        The kernel with its arguments.
    memory : GlobalMemory
    shared_bytes : int
        Dynamic shared memory.
    late : bool
        Asynchronous copies happen as late as they may, and threads run in order; else as early as
        they may, and in reverse order.
    events : list of Event
        Extended.
    """

    def __init__(
        self, index: Index, grid: Index, shape: Index, run: Callable[[], None],
        memory: GlobalMemory, shared_bytes: int, late: bool, events: list[Any],
    ) -> None:  # fmt: skip
        count = shape[0] * shape[1] * shape[2]
        self.index, self.grid, self.shape = index, grid, shape
        self.memory, self.late = memory, late
        self.shared = SharedMemory(count, shared_bytes)
        self.hub = getcurrent()
        self.barriers: dict[int, Barrier] = {}
        self.copies_until = 0.0
        self.running: Any = None
        self.transactions = Transactions(self)
        self.registers = min(REGISTERS // count // 8 * 8, 256)  # per thread, at the launch
        self.free_registers = 0
        self.wanting: list[Warpgroup] = []
        self.groups = [Warpgroup(self, number) for number in range((count + 127) // 128)]
        self.warps = [Warp(self, number) for number in range((count + 31) // 32)]
        self.threads: list[Thread] = []
        for number in range(count):
            warp = self.warps[number // 32]
            thread = Thread(self, number, warp, run)
            warp.threads.append(thread)
            self.threads.append(thread)
        for warp in self.warps:
            warp._rows = np.array([thread.number for thread in warp.threads])
        self._events = events
        self._busy: dict[str, float] = {}
        self._ready: list[tuple[float, int, Any]] = []  # clock, order, threads or what to do
        self._woken = 0

    def run(self) -> float:
        """Run every thread to its end; return the clock of the last."""
        self.wake(self.threads, 0.0)
        try:
            while self._ready:
                _, _, threads = heapq.heappop(self._ready)
                if callable(threads):
                    threads()
                    continue
                for thread in threads:
                    self.running = thread.warp.running = thread
                    machine.set_running(thread)
                    thread.greenlet.switch()
        finally:
            machine.set_running(None)
        stuck = [thread for thread in self.threads if not thread.greenlet.dead]
        if stuck:
            raise EmulationError(self._deadlock(stuck))
        self._check_end()
        return max(thread.clock for thread in self.threads)

    def wake(self, threads: list[Thread], clock: float) -> None:
        """Let threads go on at a clock."""
        for thread in threads:
            thread.clock = max(thread.clock, clock)
        order = sorted(threads, key=_number, reverse=not self.late)
        self._woken += 1
        heapq.heappush(self._ready, (clock, self._woken, order))

    def at(self, clock: float, action: Callable[[], None]) -> None:
        """Do something at a clock."""
        self._woken += 1
        heapq.heappush(self._ready, (clock, self._woken, action))

    def hand_over_registers(self) -> None:
        """Let warpgroups have the registers that they wait for, as long as there are some."""
        served = True
        while served:
            waiting = [group for group in self.wanting if not group.take_registers()]
            served = len(waiting) < len(self.wanting)
            self.wanting = waiting

    def _check_end(self) -> None:
        """Report what a finished block leaves behind."""
        self.transactions.check_end()
        for name, barrier in self.barriers.items():
            raise EmulationError(
                f"block {self.index} ends with arrivals at barrier {name} that nobody waits for: "
                f"{len(barrier.arrived)} of {barrier.count} threads ({ranges(barrier.arrived)})"
            )

    def reserve(self, cost: timing.Cost, warp: int, clock: float) -> float:
        """Return when a unit begins an instruction that is ready at ``clock``."""
        if not cost.unit:
            return clock
        unit = f"{cost.unit} {warp % 4}" if cost.unit.startswith("partition:") else cost.unit
        start = max(clock, self._busy.get(unit, 0.0))
        self._busy[unit] = start + cost.busy
        return start

    def record(self, warp: int, name: str, start: float, end: float, tile: int, site: Site) -> None:
        """Add to the event list."""
        self._events.append((self.index, warp, name, start, end, tile, site))

    def _deadlock(self, stuck: list[Thread]) -> str:
        """Say who waits for what, and who never came."""
        groups: dict[Any, list[int]] = {}
        for thread in stuck:
            groups.setdefault(thread.waits_for, []).append(thread.number)
        gone = [thread.number for thread in self.threads if thread.greenlet.dead]
        parts = [
            f"threads {ranges(numbers)} wait {what}, {describe_site(site)}"
            for (what, site), numbers in groups.items()
        ]
        if gone:
            parts.append(f"threads {ranges(gone)} have left the kernel")
        for name, barrier in self.barriers.items():
            arrived = len(barrier.waiting) + len(barrier.arrived)
            parts.append(f"barrier {name} has seen {arrived} of {barrier.count} threads")
        parts += [m.state() for m in self.transactions.barriers.values() if m.waiting]
        if self.wanting:
            parts.append(f"{self.free_registers} registers are free: setmaxnreg does not add up")
        return f"deadlock in block {self.index}: {'; '.join(parts)}"


def event_of(raw: tuple[Any, ...]) -> Event:
    """Make an event of what :meth:`Block.record` noted."""
    block, warp, name, start, end, tile, site = raw
    return Event(block, warp, name, start, end, tile, describe_site(site))


def _filled(origin: Any, size: int) -> Any:
    """Return bytes with as many zeros behind them as make ``size``."""
    if len(origin) == size:
        return origin
    return np.concatenate([origin, np.zeros(size - len(origin), np.uint8)])


def _number(thread: Thread) -> int:
    return thread.number


def _deepest(error: BaseException, last: Any) -> str:
    """Return the place in the kernel's source at which an error arose."""
    places = []
    trace = error.__traceback__
    package = __name__.rsplit(".", 1)[0]
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        code = trace.tb_frame.f_code
        inside = module.startswith((package, "cuda_kernels.ptx"))
        if not inside and code is not last:
            places.append(describe_site((code, trace.tb_lasti)))
        trace = trace.tb_next
    return ", called from ".join(reversed(places)) or "its start"
