"""Addresses, and loads and stores wider than an array element.

Addresses of 128-bit accesses are multiples of 16 bytes; of 32-bit ones, of 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.ptx.instruction import AddressOf, instruction
from cuda_kernels.ptx.machine import running


def _shared_address(array: Any, index: Any) -> int:
    """Return the 32-bit shared address of an element; ``index`` is an integer or a tuple."""
    return running().address("shared", array, index)


def _global_address(array: Any, index: Any) -> int:
    """Return the 64-bit address of an element, by the array's strides; it need not exist."""
    return running().address("global", array, index)


shared_address = AddressOf(_shared_address, "shared")
shared_address.__qualname__ = shared_address.__name__ = "shared_address"
global_address = AddressOf(_global_address, "global")
global_address.__qualname__ = global_address.__name__ = "global_address"


def _words(data: Any) -> Any:
    return np.ascontiguousarray(data).view(np.uint32)


def _bytes(words: Any) -> Any:
    return np.ascontiguousarray(words, np.uint32).reshape(-1).view(np.uint8)


@instruction("ld.global.v4.b32 $0, [$1];", "=4r,l", memory=True)
def ld_global_128(r: Any, address: int) -> None:
    """Read 16 bytes of global memory into a register tile of 4 uint32.  PTX ISA: ``ld``."""
    r[...] = _words(running().load_global(address, 16)).reshape(np.shape(r))


@instruction("ld.global.nc.L1::no_allocate.v4.b32 $0, [$1];", "=4r,l")
def ld_global_nc_128(r: Any, address: int) -> None:
    """Read 16 bytes that no thread writes while the kernel runs.  PTX ISA: ``ld.global.nc``."""
    r[...] = _words(running().load_global(address, 16)).reshape(np.shape(r))


@instruction("st.global.v4.b32 [$0], $1;", "l,4r", memory=True)
def st_global_128(address: int, r: Any) -> None:
    """Write a register tile of 4 uint32 to global memory.  PTX ISA: ``st``."""
    running().store_global(address, _bytes(r))


@instruction("st.global.b32 [$0], $1;", "l,r", memory=True)
def st_global_32(address: int, x: int) -> None:
    """Write 4 bytes to global memory.  PTX ISA: ``st``."""
    running().store_global(address, _bytes(x))


@instruction("ld.shared.v4.b32 $0, [$1];", "=4r,r", memory=True)
def ld_shared_128(r: Any, address: int) -> None:
    """Read 16 bytes of shared memory into a register tile of 4 uint32.  PTX ISA: ``ld``."""
    r[...] = _words(running().load_shared(address, 16)).reshape(np.shape(r))


@instruction("st.shared.v4.b32 [$0], $1;", "r,4r", memory=True)
def st_shared_128(address: int, r: Any) -> None:
    """Write a register tile of 4 uint32 to shared memory.  PTX ISA: ``st``."""
    running().store_shared(address, _bytes(r))


@instruction("ld.shared.b32 $0, [$1];", "=r,r", memory=True)
def ld_shared_32(address: int) -> int:
    """Read 4 bytes of shared memory.  PTX ISA: ``ld``."""
    return int(_words(running().load_shared(address, 4))[0])


@instruction("st.shared.b32 [$0], $1;", "r,r", memory=True)
def st_shared_32(address: int, x: int) -> None:
    """Write 4 bytes to shared memory.  PTX ISA: ``st``."""
    running().store_shared(address, _bytes(x))


@instruction("st.relaxed.cta.shared.b32 [$0], $1;", "r,r", memory=True)
def st_shared_relaxed_32(address: int, x: int) -> None:
    """Write 4 bytes to shared memory, where other threads may do so at the same time.

    One of the values stays; who reads it waits at a barrier before, as after any store.

    PTX ISA: ``st.relaxed``; Memory Consistency Model, "Morally strong operations".
    """
    running().store_shared(address, _bytes(x), relaxed=True)


@instruction("ld.shared.v4.f32 $0, [$1];", "=4f,r", memory=True)
def ld_shared_4f(r: Any, address: int) -> None:
    """Read 16 bytes of shared memory into a register tile of 4 float32.  PTX ISA: ``ld``."""
    r[...] = _words(running().load_shared(address, 16)).view(np.float32).reshape(np.shape(r))


@instruction("st.shared.v4.f32 [$0], $1;", "r,4f", memory=True)
def st_shared_4f(address: int, r: Any) -> None:
    """Write a register tile of 4 float32 to shared memory.  PTX ISA: ``st``."""
    running().store_shared(address, np.ascontiguousarray(r, np.float32).reshape(-1).view(np.uint8))
