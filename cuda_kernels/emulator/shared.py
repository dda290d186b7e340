"""Shared memory of an emulated block, and who may see what is in it.

It remembers of every byte who wrote it and who has read it, and when by that thread's
clock.  An access is in order if a barrier lies between it and the others' accesses that it must
follow: every thread keeps, of each other thread, the clock up to which it has seen its accesses
(a vector clock), and a barrier joins what its threads have seen.  A byte that nothing was written
to, or that an asynchronous copy is still to fill, is poison.

Hopper's units access shared memory on their own.  Each is one more actor beside the threads, with a
clock of its own: an mbarrier's is its phase, and what TMA brings for it is seen by who has waited
for that phase; a warpgroup's tensor cores count products, a thread's bulk stores their groups.
They see a plain store only after a proxy fence, of which there is a vector clock too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulator.errors import EmulationError, Site, describe_site

STATIC_BASE = 1024  # on a GPU the first bytes are the system's, and no array begins at address 0
DYNAMIC_BASE = 1 << 16
ADDRESS_LIMIT = 1 << 18  # what the descriptor of a wgmma can say

# An access is one integer: the thread's clock, the place in the source, the thread.
_CLOCK, _SITE = 32, 12
_THREAD_MASK, _SITE_MASK = (1 << _SITE) - 1, (1 << (_CLOCK - _SITE)) - 1
_IN_FLIGHT = 1 << 30  # clock of a byte that a copy is to fill: nobody has seen that
_NEVER = 1 << 60


class SharedMemory:
    """Shared memory of one block, in bytes.

    Parameters
    ----------
    threads : int
        Of the block.
    dynamic_bytes : int
        Dynamic shared memory of the launch.
    """

    def __init__(self, threads: int, dynamic_bytes: int) -> None:
        room = (dynamic_bytes + 15) // 16 * 16
        self._dynamic_base = min(DYNAMIC_BASE, (ADDRESS_LIMIT - room) // 2048 * 2048 - 2048)
        size = self._dynamic_base + 2048 + room
        self.dynamic_bytes = dynamic_bytes
        self.threads = threads
        self.bytes = np.zeros(size, np.uint8)
        self.epoch = 0  # barriers of the whole block so far
        self.seen = np.zeros((threads, threads), np.int64)  # vector clocks; [t, t] is t's own
        np.fill_diagonal(self.seen, 1)
        self.fenced: NDArray[np.int64] | None = None  # of plain stores, what a proxy fence followed
        self.version = 0  # of what threads have seen
        self._actors: list[Callable[[int, str], str]] = []  # beyond the threads: how to say it
        self._written = np.zeros(size, np.int64)  # last write of every byte; 0: never
        self._reads: dict[int, NDArray[np.int64]] = {}  # last read of every byte, by reader
        # Per 16 bytes, the epoch of the last write and of the last access: most checks end here.
        self._write_epoch = np.full(size // 16, _NEVER, np.int64)
        self._access_epoch = np.full(size // 16, -1, np.int64)
        self._write_epochs = memoryview(self._write_epoch)
        self._access_epochs = memoryview(self._access_epoch)
        self._sites: dict[Site, int] = {}
        self._atomic: set[int] = set()  # numbers of the places of atomic operations
        self._before_atomic: dict[int, int] = {}  # by address: the last write that was not
        self._static: dict[Site, int] = {}
        self._next_static = STATIC_BASE
        self._dynamic: int | None = None
        self._regions: list[tuple[int, int]] = []  # first and past-the-end address of every array

    # --- allocation

    def allocate(self, site: Site, size: int, alignment: int) -> int:
        """Return the address of the static array declared at ``site``."""
        if site not in self._static:
            # Aligned as declared and no better, with a gap behind it.
            address = -(-self._next_static // (2 * alignment)) * 2 * alignment + alignment
            if address + size > self._dynamic_base:
                raise EmulationError("more static shared memory than there is: 48 KiB, or less")
            self._next_static = address + size + 16
            self._static[site] = address
            self._regions.append((address, address + size))
        return self._static[site]

    def dynamic(self, alignment: int) -> int:
        """Return the address of dynamic shared memory: aligned as declared and no better."""
        if self._dynamic is None:
            if alignment > 1024:
                raise EmulationError(f"an alignment of {alignment} bytes; at most 1024 is modelled")
            self._dynamic = self._dynamic_base + alignment
            self._regions.append((self._dynamic, self._dynamic + self.dynamic_bytes))
        return self._dynamic

    def check_bounds(self, address: int, size: int, what: str) -> None:
        """Report an access outside all arrays, or one whose address is no multiple of its size."""
        if address % size:
            raise EmulationError(f"{what} of {size} bytes at shared address {address}: misaligned")
        self.check_range(address, size, what)

    def check_range(self, address: int, size: int, what: str) -> None:
        """Report an access outside all arrays."""
        for first, end in self._regions:
            if first <= address and address + size <= end:
                return
        arrays = ", ".join(f"[{first}, {end})" for first, end in self._regions) or "none"
        raise EmulationError(
            f"{what} of {size} bytes at shared address {address}: out of bounds (arrays: {arrays})"
        )

    # --- one thread

    def read(self, thread: int, address: int, size: int, site: Site) -> NDArray[np.uint8]:
        """Return bytes that ``thread`` may see; the result is a view."""
        end = address + size
        first, last = address >> 4, (end - 1) >> 4
        for chunk in range(first, last + 1):
            if self._write_epochs[chunk] >= self.epoch:
                self._check_read(thread, address, end)
                break
        self._reader(thread >> 5)[address:end] = self._access(thread, site)
        for chunk in range(first, last + 1):
            if self._access_epochs[chunk] < self.epoch:
                self._access_epochs[chunk] = self.epoch
        return self.bytes[address:end]

    def write(self, thread: int, address: int, data: NDArray[np.uint8], site: Site) -> None:
        """Write bytes as ``thread``."""
        self._claim(thread, address, address + len(data))
        self.bytes[address : address + len(data)] = data
        self._finish(thread, address, address + len(data), site)

    def begin_copy(self, thread: int, address: int, size: int, site: Site) -> None:
        """From now on nobody may touch these bytes but the copy."""
        end = address + size
        self._claim(thread, address, end)
        self._written[address:end] = self._access(thread, site, _IN_FLIGHT)
        for chunk in range(address >> 4, ((end - 1) >> 4) + 1):
            self._write_epochs[chunk] = self._access_epochs[chunk] = _NEVER

    def end_copy(self, thread: int, address: int, data: NDArray[np.uint8], site: Site) -> None:
        """The copy has landed: ``thread`` sees it."""
        self.bytes[address : address + len(data)] = data
        self._finish(thread, address, address + len(data), site)

    def update(self, thread: int, address: int, data: NDArray[np.uint8], site: Site) -> None:
        """Write as an atomic operation: other atomic ones need not be ordered with it."""
        if _parts(int(self._written[address]))[1] not in self._atomic:
            self._check_read(thread, address, address + len(data))
        self.write_relaxed(thread, address, data, site)

    def write_relaxed(self, thread: int, address: int, data: NDArray[np.uint8], site: Site) -> None:
        """Write what other relaxed or atomic operations may write without an order."""
        end = address + len(data)
        last = int(self._written[address])
        if _parts(last)[1] in self._atomic:
            self._follow_reads(thread, address, end)
        else:
            self._claim(thread, address, end)
            self._before_atomic[address] = last
        clock, place, other = _parts(self._before_atomic[address])
        if clock > self.seen[thread, other]:
            raise EmulationError(
                f"write to shared address {address}, which thread {other} has written "
                f"({self._place(place)}) with no barrier between"
            )
        self._atomic.add(_parts(self._access(thread, site))[1])
        self.bytes[address:end] = data
        self._finish(thread, address, end, site)

    def _finish(self, thread: int, address: int, end: int, site: Site) -> None:
        self._written[address:end] = self._access(thread, site)
        for chunk in range(address >> 4, ((end - 1) >> 4) + 1):
            self._access_epochs[chunk] = self.epoch
            whole = address <= 16 * chunk and 16 * chunk + 16 <= end
            if whole or self._write_epochs[chunk] < _NEVER:
                self._write_epochs[chunk] = self.epoch

    def _reader(self, reader: int) -> NDArray[np.int64]:
        """Return the last read of every byte by one warp, or by an actor beyond the threads."""
        if reader not in self._reads:
            self._reads[reader] = np.zeros(len(self.bytes), np.int64)
        return self._reads[reader]

    def _claim(self, thread: int, address: int, end: int) -> None:
        """Report a write that does not follow every other access to these bytes."""
        for chunk in range(address >> 4, ((end - 1) >> 4) + 1):
            if self._access_epochs[chunk] >= self.epoch:
                break
        else:
            return
        seen = self.seen[thread]
        for access in _distinct(self._written[address:end]):
            clock, place, other = _parts(access)
            if clock <= seen[other]:
                continue
            byte = address + int(np.flatnonzero(self._written[address:end] == access)[0])
            if other >= self.threads:
                raise EmulationError(
                    f"write to shared address {byte}, which {self._actor(other, clock)} "
                    f"({self._place(place)}) may still fill: "
                    f"{self._not_waited(other, clock, thread)}"
                )
            if clock == _IN_FLIGHT:
                raise EmulationError(
                    f"write to shared address {byte}, which an asynchronous copy of thread {other} "
                    f"({self._place(place)}) is still to fill"
                )
            raise EmulationError(
                f"write to shared address {byte}, which thread {other} has written "
                f"({self._place(place)}) with no barrier between"
            )
        self._follow_reads(thread, address, end)

    def _follow_reads(self, thread: int, address: int, end: int) -> None:
        """Report a write that does not follow every other thread's read of these bytes."""
        seen = self.seen[thread]
        for accesses in self._reads.values():
            reads = accesses[address:end]
            late = reads >> _CLOCK > seen[reads & _THREAD_MASK]
            if not late.any():
                continue
            offset = int(np.flatnonzero(late)[0])
            clock, place, other = _parts(int(reads[offset]))
            if other >= self.threads:
                raise EmulationError(
                    f"write to shared address {address + offset}, which "
                    f"{self._actor(other, clock)} ({self._place(place)}) may still read: "
                    f"{self._not_waited(other, clock, thread)}"
                )
            raise EmulationError(
                f"write to shared address {address + offset}, which thread {other} has read "
                f"({self._place(place)}) with no barrier between"
            )

    def _check_read(self, thread: int, address: int, end: int) -> None:
        """Report a read of poison, or of another's write that no barrier has made visible."""
        seen = self.seen[thread]
        for access in _distinct(self._written[address:end]):
            clock, place, other = _parts(access)
            if access and clock <= seen[other]:
                continue
            byte = address + int(np.flatnonzero(self._written[address:end] == access)[0])
            if not access:
                raise EmulationError(
                    f"read of poison: nothing was written to shared address {byte}"
                )
            if other >= self.threads:
                raise EmulationError(
                    f"read of poison: shared address {byte} is filled by "
                    f"{self._actor(other, clock)} ({self._place(place)}), but "
                    f"{self._not_waited(other, clock, thread)}"
                )
            if clock == _IN_FLIGHT:
                raise EmulationError(
                    f"read of poison: shared address {byte} is still to be filled by an "
                    f"asynchronous copy of thread {other} ({self._place(place)}), which has not "
                    "waited for it"
                )
            raise EmulationError(
                f"read of shared address {byte}, which thread {other} has written "
                f"({self._place(place)}) with no barrier between"
            )
        # Whole 16 bytes that are in order now need no second look after the next barrier.
        for chunk in range(address >> 4, ((end - 1) >> 4) + 1):
            words = self._written[16 * chunk : 16 * chunk + 16]
            if words.all() and int(words.max()) >> _CLOCK < _IN_FLIGHT:
                self._write_epochs[chunk] = self.epoch

    # --- a warp

    def read_rows(
        self, threads: NDArray[np.int64], addresses: NDArray[np.int64], size: int, site: Site
    ) -> NDArray[np.uint8]:
        """Return 16 bytes per thread: ``[len(addresses), 16]``."""
        chunks = addresses >> 4
        if size != 16 or (addresses & 15).any() or not self._inside(addresses, size):
            for address in addresses.tolist():
                self.check_bounds(address, size, "read")
        index = addresses[:, None] + _SIXTEEN
        if (self._write_epoch[chunks] >= self.epoch).any():
            for thread, address in zip(threads.tolist(), addresses.tolist(), strict=True):
                if self._write_epochs[address >> 4] >= self.epoch:
                    self._check_read(thread, address, address + size)
        accesses = self._access(0, site, 0) + threads + (self.seen[threads, threads] << _CLOCK)
        self._reader(int(threads[0]) >> 5)[index] = accesses[:, None]
        self._access_epoch[chunks] = self.epoch
        return self.bytes[index]

    # --- Hopper's units

    def add_actor(self, describe: Callable[[int, str], str]) -> int:
        """Return the number of a unit that accesses shared memory on its own.

        ``describe(clock, who)`` says what it did at a clock, or with ``who`` what that one missed.
        """
        number = self.threads + len(self._actors)
        if number > _THREAD_MASK:
            raise EmulationError("more mbarriers than are modelled")
        self._actors.append(describe)
        if number >= self.seen.shape[1]:
            more = np.zeros((self.threads, 32), np.int64)
            self.seen = np.concatenate([self.seen, more], axis=1)
        return number

    def fence_proxy(self, thread: int) -> None:
        """Units may see what ``thread`` has seen."""
        if self.fenced is None:
            self.fenced = np.zeros((self.threads, self.threads), np.int64)
        known = self.fenced[thread]
        np.maximum(known, self.seen[thread, : self.threads], out=known)
        # What it writes from now on is another matter.
        self.seen[thread, thread] += 1
        self.version += 1

    def fence_of(self, threads: slice) -> NDArray[np.int64]:
        """Return the clocks up to which all of ``threads`` know plain stores to be fenced."""
        if self.fenced is None:
            return np.zeros(self.threads, np.int64)
        return self.fenced[threads].min(axis=0)

    def begin_fill(self, thread: int, address: int, size: int, actor: int, clock: int, site: Site
                   ) -> None:  # fmt: skip
        """From now on ``actor``, for ``thread``, may write these bytes, until its ``clock``."""
        end = address + size
        self._claim(thread, address, end)
        fence = self.fence_of(slice(thread, thread + 1))
        self._check_fence(self._written[address:end], fence, np.arange(address, end))
        self._written[address:end] = self._access(actor, site, clock)
        self._write_epoch[address >> 4 : end + 15 >> 4] = _NEVER
        self._access_epoch[address >> 4 : end + 15 >> 4] = _NEVER

    def read_as(
        self, actor: int, clock: int, addresses: NDArray[np.int64], site: Site,
        seen: NDArray[np.int64], fence: NDArray[np.int64], who: str,
    ) -> NDArray[np.uint8]:  # fmt: skip
        """Return 16 bytes per address, read by ``actor`` for threads that have ``seen`` so much."""
        if (addresses & 15).any() or not self._inside(addresses, 16):
            for address in addresses.tolist():
                self.check_bounds(address, 16, "read")
        index = addresses[:, None] + _SIXTEEN
        written = self._written[index]
        for access in _distinct(written):
            when, place, other = _parts(access)
            if access and when <= (seen[other] if other < len(seen) else 0):
                continue
            byte = int(index[written == access][0])
            if not access:
                raise EmulationError(
                    f"read of poison: nothing was written to shared address {byte}"
                )
            if other >= self.threads:
                raise EmulationError(
                    f"read of poison: shared address {byte} is filled by "
                    f"{self._actor(other, when)} ({self._place(place)}), but "
                    f"{self._actors[other - self.threads](when, who)}"
                )
            raise EmulationError(
                f"read of shared address {byte}, which thread {other} has written "
                f"({self._place(place)}) with no barrier between"
            )
        self._check_fence(written, fence, index)
        self._reader(actor)[index] = self._access(actor, site, clock)
        self._access_epoch[addresses >> 4] = _NEVER
        return self.bytes[index]

    def _check_fence(
        self, written: NDArray[np.int64], fence: NDArray[np.int64], index: NDArray[np.int64]
    ) -> None:
        """Report plain stores, at these addresses, that no proxy fence has shown to the units."""
        for access in _distinct(written):
            clock, place, other = _parts(access)
            if other >= self.threads or clock <= fence[other]:
                continue
            raise EmulationError(
                f"asynchronous access to shared address {int(index[written == access][0])}, which "
                f"thread {other} has written ({self._place(place)}) with no fence_proxy_async "
                "between"
            )

    def acquire(self, threads: list[int] | slice, seen: NDArray[np.int64], fence: NDArray[np.int64]
                ) -> None:  # fmt: skip
        """``threads`` see what others have let go."""
        width = len(seen)
        self.seen[threads, :width] = np.maximum(self.seen[threads, :width], seen)
        if fence.any():
            if self.fenced is None:
                self.fenced = np.zeros((self.threads, self.threads), np.int64)
            self.fenced[threads] = np.maximum(self.fenced[threads], fence)
        self.version += 1

    def _actor(self, number: int, clock: int) -> str:
        return self._actors[number - self.threads](clock, "")

    def _not_waited(self, number: int, clock: int, thread: int) -> str:
        return self._actors[number - self.threads](clock, f"thread {thread}")

    def _inside(self, addresses: NDArray[np.int64], size: int) -> bool:
        low, high = addresses.min(), addresses.max() + size
        return any(first <= low and high <= end for first, end in self._regions)

    # --- order

    def join(self, threads: list[int], arrived: list[int]) -> None:
        """``threads`` have waited at a barrier at which they and ``arrived`` arrived."""
        everyone = threads + arrived
        if len(everyone) == len(self.seen):
            self.epoch += 1 if not arrived else 0
        seen = self.seen[everyone].max(axis=0)
        self.seen[threads] = seen
        self.seen[everyone, everyone] += 1
        if self.fenced is not None:
            self.fenced[threads] = self.fenced[everyone].max(axis=0)
        self.version += 1

    def _access(self, thread: int, site: Site, clock: int | None = None) -> int:
        place = self._sites.setdefault(site, len(self._sites))
        if clock is None:
            clock = int(self.seen[thread, thread])
        return clock << _CLOCK | place << _SITE | thread

    def _place(self, place: int) -> str:
        return describe_site(next(itertools.islice(self._sites, place, None)))


_SIXTEEN = np.arange(16)


def _distinct(accesses: NDArray[np.int64]) -> list[int]:
    """Return the different accesses; most often there is one."""
    first = accesses.flat[0]
    if (accesses == first).all():
        return [int(first)]
    return np.unique(accesses).tolist()


def _parts(access: int) -> tuple[int, int, int]:
    return access >> _CLOCK, access >> _SITE & _SITE_MASK, access & _THREAD_MASK
