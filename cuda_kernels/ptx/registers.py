"""Registers that change hands between the warpgroups of a block.

A kernel begins with the same number for every thread; a warpgroup that only copies gives most of
its own back, and the others take them.
"""

from __future__ import annotations

from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running


def _text(direction: str, count: int) -> str:
    if not 24 <= count <= 256 or count % 8:
        raise ValueError(f"count must be a multiple of 8 from 24 to 256, got {count}")
    return f"setmaxnreg.{direction}.sync.aligned.u32 $0;"


@instruction(lambda count: _text("dec", count), "n", memory=True, target="sm_90a")
def setmaxnreg_dec(count: int) -> None:
    """Give back all but ``count`` registers per thread; a whole warpgroup does it.

    PTX ISA: ``setmaxnreg.dec``; ``count`` is a compile-time multiple of 8, 24 to 256.
    """
    running().change_registers(count, -1)


@instruction(lambda count: _text("inc", count), "n", memory=True, target="sm_90a")
def setmaxnreg_inc(count: int) -> None:
    """Wait until there are registers, and have ``count`` per thread; a whole warpgroup does it.

    PTX ISA: ``setmaxnreg.inc``; ``count`` is a compile-time multiple of 8, 24 to 256.
    """
    running().change_registers(count, 1)
