"""What a kernel calls in place of an instruction or a fragment, by the kind of instruction."""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import itemgetter
from types import FrameType
from typing import Any

import numpy as np

from cuda_kernels.emulator import timing
from cuda_kernels.emulator.block import PER_LANE, Block, Issued, Thread
from cuda_kernels.emulator.errors import EmulationError, describe_site, site_of
from cuda_kernels.emulator.registers import Registers, check_tile
from cuda_kernels.ptx.instruction import LETTERS, Instruction


def issue(block: Block, made: Instruction) -> Callable[..., None]:
    """Return what a kernel calls for a warp-wide instruction on register tiles."""
    operands = made.operands(dict.fromkeys(made.parameters, 0))
    scalars = [i for i, o in enumerate(operands) if o.count is None and not o.literal]
    common = [i for i in range(len(operands)) if i not in scalars]
    key_of = itemgetter(*common) if scalars else tuple
    name = made.__name__

    def begin(thread: Thread, args: tuple[Any, ...], frame: FrameType) -> Issued:
        if len(args) != len(operands):
            raise EmulationError(f"{name} takes {len(operands)} arguments, got {len(args)}")
        if len(thread.warp.threads) != 32:
            raise EmulationError(f"{name} needs a whole warp: blocks of a multiple of 32 threads")
        given = dict(zip(made.parameters, args, strict=True))
        for operand, (parameter, argument) in zip(made.operands(given), given.items(), strict=True):
            if operand.count is not None:
                check_tile(argument, operand.count, LETTERS[operand.letter], name, parameter)
                _touch(argument, thread, bool(operand.access))
        issued = Issued(made, key_of(args), site_of(frame), thread.tile)
        issued.args = [PER_LANE if i in scalars else a for i, a in enumerate(args)]
        thread.warp.queue.append(issued)
        return issued

    def call(*args: Any) -> None:
        thread = block.running
        warp = thread.warp
        place = thread.issued - warp.executed
        queue = warp.queue
        issued = queue[place] if place < len(queue) else begin(thread, args, sys._getframe(1))
        if issued.instruction is not made or issued.key != key_of(args):
            raise EmulationError(
                f"{name}: other lanes of the warp are at {issued.instruction.__name__}, "
                f"{describe_site(issued.site)}, or use other registers; all lanes must execute a "
                "warp-wide instruction together"
            )
        if scalars:
            issued.lanes[thread.lane] = args
        thread.issued += 1
        issued.count += 1
        if thread.clock > issued.clock:
            issued.clock = thread.clock
        if issued.count == 32 and issued.waiting:
            block.wake(issued.waiting, issued.clock)

    return call


def exchange(block: Block, made: Instruction) -> Callable[..., Any]:
    """Return what a kernel calls for a warp-wide instruction that returns values."""
    operands = made.operands({})
    kinds = [np.dtype(LETTERS[operand.letter]) for operand in operands]

    def finish(values: dict[int, Any]) -> dict[int, Any]:
        columns = zip(*(values[lane] for lane in range(32)), strict=True)
        arrays = [np.array(column, kind) for column, kind in zip(columns, kinds[1:], strict=True)]
        result = made.body(*arrays)
        if kinds[0].kind == "f":
            return dict(enumerate(result))
        return dict(enumerate(result.tolist()))

    def call(*args: Any) -> Any:
        thread = block.running
        if len(args) != len(made.parameters):
            raise EmulationError(f"{made.__name__} takes {len(made.parameters)} arguments")
        if len(thread.warp.threads) != 32:
            raise EmulationError(f"{made.__name__} needs a whole warp: blocks of a multiple of 32")
        thread.site = site_of(sys._getframe(1))
        return thread.meet(made, 0xFFFFFFFF, args, finish, timing.SHUFFLE, made.__name__)

    return call


def perform(block: Block, made: Instruction) -> Callable[..., Any]:
    """Return what a kernel calls for an instruction of one thread."""
    body, cost = made.body, timing.cost_of(made.__name__)
    operands = made.operands({}) if isinstance(made.constraints, str) and made.text else []
    tiles = [
        (i, operand.count, LETTERS[operand.letter], bool(operand.access))
        for i, operand in enumerate(o for o in operands if not o.returned)
        if operand.count is not None
    ]

    def call(*args: Any) -> Any:
        thread = block.running
        thread.site = site_of(sys._getframe(1))
        if thread.issued > thread.warp.executed:
            thread.settle()
        if tiles:
            values = list(args)
            for i, count, dtype, written in tiles:
                check_tile(args[i], count, dtype, made.__name__, made.parameters[i])
                _touch(args[i], thread, written)
                values[i] = args[i].lanes[thread.lane]
            thread.clock += cost.latency
            return body(*values)
        thread.clock += cost.latency
        return body(*args)

    return call


def helper(block: Block, function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return what a kernel calls for a fragment with a vectorised body."""

    def call(*args: Any) -> Any:
        thread = block.running
        thread.site = site_of(sys._getframe(1))
        if thread.issued > thread.warp.executed:
            thread.settle()
        lane, size, values = thread.lane, 0, []
        lent: list[Any] = []
        for argument in args:
            if isinstance(argument, Registers):
                size = max(size, argument.size)
                if thread.group.used:
                    argument.stamp = thread.fences  # it may write
                    if argument.base.guards is not None:
                        argument.check(thread)
                        if argument.lent(thread):
                            lent.append((argument, argument.lanes[lane].copy()))
                argument = argument.lanes[lane]
            values.append(argument)
        start = thread.clock
        thread.clock += size * timing.ELEMENT
        if lane == 0:
            block.record(thread.warp.number, name, start, thread.clock, thread.tile, thread.site)
        result = function(*values)
        for argument, before in lent:
            if argument.lanes[lane].tobytes() != before.tobytes():
                argument.check(thread, writing=True)
        return result

    return call


def multiply(block: Block, made: Instruction) -> Callable[..., None]:
    """Return what a kernel calls for a product of a warpgroup."""

    def call(*args: Any) -> None:
        thread = block.running
        thread.enter(sys._getframe(1))
        thread.group.issue(thread, made, args)

    return call


def _touch(tile: Registers, thread: Thread, written: bool) -> None:
    """An instruction reads or writes a tile that ``wgmma`` may use too."""
    if not thread.group.used:
        return
    if written:
        tile.stamp = thread.fences
    if tile.base.guards is not None:
        tile.check(thread, written)
