"""Four warps and their tensor cores: ``wgmma``, and registers that change hands.

A product is issued thread by thread and belongs to the warpgroup once all 128 have.  Early, it is
done then; late, when somebody waits for it.  What it may see of shared memory is what all of its
threads had seen by the time the last of them issued it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.emulator import timing
from cuda_kernels.emulator.errors import EmulationError, Site, describe_site
from cuda_kernels.emulator.registers import Registers, check_tile
from cuda_kernels.ptx import machine
from cuda_kernels.ptx.instruction import LETTERS, Instruction

if TYPE_CHECKING:
    from cuda_kernels.emulator.block import Block, Thread

SIZE = 128


class Product:
    """A ``wgmma`` that threads have issued and that is not done yet."""

    def __init__(self, made: Instruction, number: int, site: Site, tile: int) -> None:
        self.instruction = made
        self.number = number  # 1 for the warpgroup's first
        self.site = site
        self.tile = tile
        self.args: dict[int, tuple[Any, ...]] = {}  # by warp
        self.scalars: Any = None
        self.count = 0
        self.clock = 0.0
        self.waiting: list[Thread] = []
        self.seen: NDArray[np.int64] | None = None
        self.fence: NDArray[np.int64] | None = None


class Warpgroup:
    """Four warps; the machine that their products run on."""

    def __init__(self, block: Block, number: int) -> None:
        self.block = block
        self.number = number
        self.threads = slice(SIZE * number, SIZE * (number + 1))
        self.warps = f"warps {4 * number}–{4 * number + 3}"
        self.registers = block.registers  # per thread
        self.used = False  # whether it has reached a wgmma_fence
        self.queue: list[Product] = []
        self.done = 0  # products done; the queue holds the later ones
        self.end = 0.0  # clock at which the last of them has its result
        self.tiles: dict[tuple[Site, int], NDArray[Any]] = {}
        self._meeting: list[Thread] = []
        self._asked: tuple[int, int] = (0, 0)
        self._version = -1
        self._known: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._product: Any = None
        self._actor = 0

    @property
    def whole(self) -> bool:
        """Whether it has all its threads."""
        return self.threads.stop <= len(self.block.threads)

    @property
    def actor(self) -> int:
        """Number of its tensor cores among those who access shared memory."""
        if not self._actor:
            self._actor = self.block.shared.add_actor(self.describe)
        return self._actor

    def describe(self, clock: int, who: str) -> str:
        """Say what a product did, or what ``who`` has missed of it."""
        if not who:
            return f"a product of {self.warps}"
        return f"{who} has seen no wgmma_wait for it"

    def done_as_seen(self, seen: NDArray[np.int64]) -> int:
        """Return how many products are done, as far as one knows who has ``seen`` so much."""
        return int(seen[self._actor]) if 0 < self._actor < len(seen) else 0

    # --- products

    def issue(self, thread: Thread, made: Instruction, args: tuple[Any, ...]) -> None:
        """Issue a product as one thread."""
        place = thread.products - self.done
        if place == len(self.queue):
            self._begin(thread, made, args)
        product = self.queue[place]
        mine = product.args.get(thread.warp.number)
        if mine is None:
            mine = self._join(thread, product, made, args)
        if product.instruction is not made or any(
            a is not b and (isinstance(a, Registers) or a != b)
            for a, b in zip(args, mine, strict=True)
        ):
            raise EmulationError(
                f"{made.__name__}: other threads of {self.warps} are at "
                f"{product.instruction.__name__}, {describe_site(product.site)}, or have other "
                "operands; all must execute the same together"
            )
        thread.products += 1
        for argument in args:
            if isinstance(argument, Registers):
                guard = argument.guard()
                lanes = guard.writing if argument is args[0] else guard.lent
                lanes[thread.lane] = product.number
        product.count += 1
        product.clock = max(product.clock, thread.clock)
        if product.count == SIZE:
            product.seen, product.fence = self._knowledge()
            if not self.block.late:
                self._execute(product.number)
            if product.waiting:
                self.block.wake(product.waiting, product.clock)

    def _begin(self, thread: Thread, made: Instruction, args: tuple[Any, ...]) -> None:
        name = made.__name__
        if not self.whole:
            raise EmulationError(f"{name} needs a whole warpgroup: a multiple of 128 threads")
        if len(args) != len(made.parameters):
            raise EmulationError(f"{name} takes {len(made.parameters)} arguments, got {len(args)}")
        product = Product(made, thread.products + 1, thread.site, thread.tile)
        product.scalars = [a for a in args if not isinstance(a, Registers)]
        self.queue.append(product)

    def _join(
        self, thread: Thread, product: Product, made: Instruction, args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Take the operands of a warp, by its first thread."""
        name = made.__name__
        given = dict(zip(made.parameters, args, strict=True))
        made.assembly(given)  # says what forms there are
        for operand, (parameter, argument) in zip(made.operands(given), given.items(), strict=True):
            if operand.count is None:
                continue
            check_tile(argument, operand.count, LETTERS[operand.letter], name, parameter)
            if argument.written >= thread.fences:
                raise EmulationError(
                    f"{name}: registers of {parameter} were written with no wgmma_fence behind it"
                )
        first = next(iter(product.args.values()), args)
        same = [a for a in args if not isinstance(a, Registers)] == product.scalars and all(
            a.key == b.key for a, b in zip(args, first, strict=True) if isinstance(a, Registers)
        )
        if not same:
            raise EmulationError(
                f"{name}: {self.warps} are at different products, or have different operands "
                f"(scalars {product.scalars} and others, {describe_site(product.site)}); all four "
                "must have the same"
            )
        product.args[thread.warp.number] = args
        return args

    def _knowledge(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return what all threads of the group have seen, and know to be fenced."""
        shared = self.block.shared
        if self._known is None or self._version != shared.version:
            self._version = shared.version
            self._known = shared.seen[self.threads].min(axis=0), shared.fence_of(self.threads)
        return self._known

    def _execute(self, last: int) -> None:
        """Do the products up to number ``last``."""
        block = self.block
        before = machine._running
        machine.set_running(self)  # type: ignore[arg-type]
        while self.done < last:
            product = self._product = self.queue[0]
            name = product.instruction.__name__
            args: list[Any] = [
                a.whole if isinstance(a, Registers) else a for a in product.args[4 * self.number]
            ]
            try:
                product.instruction.body(*args)
            except (EmulationError, ValueError) as error:
                raise EmulationError(
                    f"{self.warps} of block {block.index}, {name}, "
                    f"{describe_site(product.site)}: {error}"
                ) from None
            columns = args[product.instruction.parameters.index("n")]
            cost = timing.wgmma(columns)
            start = block.reserve(cost, 0, product.clock)
            self.end = max(self.end, start + cost.latency)
            for warp in range(4 * self.number, 4 * self.number + 4):
                block.record(warp, name, start, start + cost.busy, product.tile, product.site)
            del self.queue[0]
            self.done += 1
        machine.set_running(before)

    def load_shared(self, addresses: Any, size: int) -> Any:
        """Read one row of 16 bytes per address, as the tensor cores."""
        product = self._product
        return self.block.shared.read_as(
            self.actor, product.number, addresses, product.site, product.seen, product.fence,
            f"a thread of {self.warps}",
        )  # fmt: skip

    def wait(self, thread: Thread, pending: int, d: Registers, n: int) -> None:
        """Wait for all groups but ``pending``; their accumulator D may be read."""
        check_tile(d, n // 2, "float32", "wgmma_wait", "d")
        keep = thread.commits[len(thread.commits) - pending :] if pending else []
        target = max(thread.waited, *thread.commits[: len(thread.commits) - pending], 0)
        thread.commits = keep
        start = thread.clock
        if target > self.done:
            product = self.queue[target - self.done - 1]
            if product.count < SIZE:
                product.waiting.append(thread)
                thread.wait(
                    f"for the other threads of {self.warps} at {product.instruction.__name__}",
                    product.site,
                )
            if target > self.done:
                self._execute(target)
        if target > thread.waited:
            thread.waited = target
            shared = self.block.shared
            shared.seen[thread.number, self.actor] = target
            shared.version += 1
            thread.clock = max(thread.clock, self.end)
        d.give_back(thread.lane, thread.waited)
        if thread.lane == 0:
            self.block.record(
                thread.warp.number, "wgmma_wait", start, thread.clock, thread.tile, thread.site
            )

    # --- registers

    def change_registers(self, thread: Thread, count: int, direction: int) -> None:
        """Give back or take registers once all threads of the group ask for it."""
        name = "setmaxnreg_inc" if direction > 0 else "setmaxnreg_dec"
        if not 24 <= count <= 256 or count % 8:
            raise EmulationError(f"{name}({count}): a multiple of 8 from 24 to 256 is possible")
        if not self.whole:
            raise EmulationError(f"{name} needs a whole warpgroup: a multiple of 128 threads")
        if not self._meeting:
            self._asked = (count, direction)
        if self._asked != (count, direction):
            raise EmulationError(
                f"{name}({count}): other threads of {self.warps} ask for {self._asked[0]} registers"
            )
        if (count - self.registers) * direction < 0:
            raise EmulationError(
                f"{name}({count}): the threads of {self.warps} have {self.registers} registers"
            )
        self._meeting.append(thread)
        if len(self._meeting) == SIZE:
            self.block.wanting.append(self)
            self.block.hand_over_registers()
        thread.wait(
            f"for {count} registers each ({name}): {self.block.registers} × "
            f"{len(self.block.threads)} is all that the block has",
            thread.site,
        )

    def take_registers(self) -> bool:
        """Take what was asked for, or give back, if there is enough."""
        count, _ = self._asked
        if (count - self.registers) * SIZE > self.block.free_registers:
            return False
        self.block.free_registers -= (count - self.registers) * SIZE
        self.registers = count
        threads, self._meeting = self._meeting, []
        self.block.wake(threads, max(thread.clock for thread in threads))
        return True
