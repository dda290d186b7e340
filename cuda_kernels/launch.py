"""From a kernel to machine code, to what that code costs, and to a launch.

:func:`build` takes Numba's own way (NVVM, link-time optimisation, nvJitLink) to a cubin for any
architecture, with no GPU, once for all processes; :func:`assemble` reads registers, stack, spills
and instructions out of it.  :func:`load` brings it to this GPU and :class:`Launcher` runs it, for
arrays of any strides; :func:`encode` describes an array to its copy unit.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels import disk_cache
from cuda_kernels.gpu import Gpu
from cuda_kernels.kernel import Kernel
from cuda_kernels.ptx.tensor_map import TensorMap

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
"""What every kernel that claims Ampere and later is assembled for."""


MOST_PLACES = 64
"""Addresses for which a launch keeps a tensor map, of each array that it takes as one."""


@dataclass(frozen=True)
class Resources:
    """What the machine code of one kernel for one architecture takes.

    Attributes
    ----------
    registers : int
        Per thread.
    stack, spill_stores, spill_loads : int
        Bytes per thread.
    shared_bytes : int
        Static shared memory of a block.
    opcodes : dict
        SASS instructions by opcode, with their modifiers: ``HMMA.16816.F32.BF16`` → how many.
    messages : list of str
        What the assembler said, its resource report left out.
    """

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    opcodes: dict[str, int] = field(repr=False)
    messages: list[str]

    def count(self, opcode: str) -> int:
        """Count instructions of one opcode, whatever its modifiers, such as ``HMMA``."""
        return sum(
            number
            for name, number in self.opcodes.items()
            if name == opcode or name.startswith(f"{opcode}.")
        )

    def faults(self) -> list[str]:
        """List what makes this a failed build: a stack frame, a spill, a message C75xx."""
        found = []
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.spill_stores or self.spill_loads:
            found.append(f"spills: {self.spill_stores} bytes out, {self.spill_loads} bytes in")
        found += [message for message in self.messages if re.search(r"\bC75\d\d\b", message)]
        return found


@dataclass(frozen=True)
class Assembled(Resources):
    """A kernel's machine code, and what it takes."""

    cubin: bytes = field(repr=False)


def why_not_assemble() -> str | None:
    """Return why :func:`assemble` cannot run here, or None where it can.

    Examples
    --------
    >>> reason = why_not_assemble()
    >>> reason is None or "assemble" in reason
    True
    """
    from cuda_kernels.ptx.compiler import COMPILES

    if not COMPILES:
        return "numba-cuda is not installed, or is told to simulate: nothing can be assembled"
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        for name in ("nvvm", "nvJitLink"):
            load_nvidia_dynamic_lib(name)
        for name in ("cuobjdump", "nvdisasm"):
            _tool(name)
    except (DynamicLibNotFoundError, RuntimeError):
        return (
            f"no assembler: {name} is missing; install it with "
            "python -m pip install -c constraints.txt -e '.[assemble]'"
        )
    return None


@dataclass(frozen=True)
class Build:
    """Machine code of one kernel, for one signature and one architecture.

    Attributes
    ----------
    entry : str
        The kernel's name in it.
    cubin : bytes
    log : str
        What the assembler said.
    """

    entry: str
    cubin: bytes = field(repr=False)
    log: str = field(repr=False)


def build(kernel: Any, signature: Any, arch: str) -> Build:
    """Compile a kernel for an architecture, unless the disk has what came of it before.

    Parameters
    ----------
    kernel, signature, arch
        As in :func:`assemble`; or a :class:`~cuda_kernels.kernel.Kernel` and None.  A kernel of a
        module that is no file, or that closes over more than numbers, is compiled every time.

    Returns
    -------
    Build

    Raises
    ------
    ValueError
        If ``arch`` is no architecture.
    cuda_kernels.ptx.instruction.WrongUse
        If an instruction is called as it cannot be.
    """
    _capability(arch)
    name = kept_as(kernel, signature, arch)
    kept = name and disk_cache.read("cubins", name)
    if kept:
        head, _, cubin = kept.partition(b"\n")
        return Build(cubin=cubin, **json.loads(head))
    if isinstance(kernel, Kernel):
        kernel, signature = kernel.make(), kernel.signature
    made = _compile(kernel, signature, arch)
    if name:
        head = json.dumps({"entry": made.entry, "log": made.log}).encode()
        disk_cache.write("cubins", name, head + b"\n" + made.cubin)
    return made


_OPTIONS = ("debug", "fastmath", "launch_bounds", "lineinfo", "opt")  # of kernels, for Numba


def kept_as(kernel: Any, signature: Any, arch: str) -> str | None:
    """Name a build on disk; None if it cannot be kept there (:func:`build` says when)."""
    if isinstance(kernel, Kernel):  # its module says all the rest
        return disk_cache.entry_name((__name__, kernel.module), *kernel.arguments, arch)
    function, options = kernel.py_func, kernel.targetoptions
    return disk_cache.entry_name(
        (__name__, function.__module__),
        function.__qualname__,
        tuple(cell.cell_contents for cell in function.__closure__ or ()),
        *(options.get(option) for option in (*_OPTIONS, "max_registers")),
        str(signature),
        arch,
    )


def _compile(kernel: Any, signature: Any, arch: str) -> Build:
    from cuda.core import Linker, LinkerOptions, ObjectCode

    capability = _capability(arch)
    library = _lowered(kernel, signature, capability)
    linker = Linker(
        ObjectCode.from_ltoir(library.get_ltoir(cc=capability)),
        options=LinkerOptions(
            arch=arch,
            link_time_optimization=True,
            max_register_count=kernel.targetoptions.get("max_registers"),
            ptxas_options=["-v"],
        ),
    )
    cubin = bytes(linker.link("cubin").code)
    log = f"{linker.get_info_log()}\n{linker.get_error_log()}"
    linker.close()
    return Build(library._entry_name, cubin, log)


_last: tuple[Any, ...] = ()  # kernel, signature, what Numba made of them, instructions in it


def _lowered(kernel: Any, signature: Any, capability: tuple[Any, ...]) -> Any:
    """Let Numba turn a kernel into LLVM's language: most of the time that compiling takes.

    What it makes is the same for all architectures from Turing on, unless tensor maps are taken
    (see :mod:`cuda_kernels.ptx.compiler`): the last one is kept for the next architecture.
    """
    from numba.cuda.compiler import _compile_pyfunc_with_fixup  # type: ignore[attr-defined]

    from cuda_kernels.ptx import compiler
    from cuda_kernels.ptx.instruction import WrongUse

    global _last
    if _last[:2] == (kernel, str(signature)):
        library, used = _last[2:]
        for made in used:
            if reason := compiler.why_not_on(made, capability):
                raise WrongUse(reason)
        return library
    compiler.USED.clear()
    with compiler.quicker_liveness():
        library, _ = _compile_pyfunc_with_fixup(
            kernel.py_func,
            _parsed(signature),
            device=False,
            abi="numba",
            cc=capability,
            **{option: kernel.targetoptions.get(option) for option in _OPTIONS},
        )
    if "tensor_map" not in str(signature):
        _last = (kernel, str(signature), library, frozenset(compiler.USED))
    return library


def assemble(kernel: Any, signature: Any, arch: str) -> Assembled:
    """Compile a kernel for an architecture and read the machine code.

    Parameters
    ----------
    kernel : ``@cuda.jit`` kernel
        Its options (``launch_bounds``, ``max_registers``, ``fastmath``, …) are kept.
    signature : str or Numba signature
        Types of the arguments, such as ``"void(uint16[:,:,:,::1], float32)"``; ``tensor_map`` is
        that of a :class:`~cuda_kernels.ptx.tensor_map.TensorMap`.
    arch : str
        Such as ``sm_80`` or ``sm_90a``.

    Returns
    -------
    Assembled

    Raises
    ------
    ValueError
        If ``arch`` is no architecture.
    cuda_kernels.ptx.instruction.WrongUse
        If an instruction is called as it cannot be.
    """
    made = build(kernel, signature, arch)
    return _read(kernel.py_func.__name__, arch, made.cubin, made.log)


def _parsed(signature: Any) -> Any:
    """Return Numba's signature, of its types and tensor maps."""
    from numba.cuda import types

    from cuda_kernels.ptx.compiler import TENSOR_MAP

    if not isinstance(signature, str):
        return signature
    return eval(signature, {}, {**vars(types), "tensor_map": TENSOR_MAP})


def _capability(arch: str) -> tuple[Any, ...]:
    match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", arch)
    if not match:
        raise ValueError(f"arch must look like sm_80 or sm_90a, got {arch!r}")
    major, minor, feature = match.groups()
    return (int(major), int(minor), feature) if feature else (int(major), int(minor))


def _read(kernel: str, arch: str, cubin: bytes, log: str) -> Assembled:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        sass = _run("nvdisasm", "--print-code", path)
    resources = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not resources or spills is None:
        raise RuntimeError(f"the assembler's report of {kernel} for {arch} has another form")
    opcodes = Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", sass))
    return Assembled(
        kernel=kernel,
        arch=arch,
        cubin=cubin,
        registers=int(resources["REG"]),
        stack=int(resources["STACK"]),
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        shared_bytes=int(resources["SHARED"]),
        opcodes=dict(opcodes),
        messages=[line for line in log.splitlines() if re.search(r"C\d{4}|warning|error", line)],
    )


def _tool(name: str) -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    path = find_nvidia_binary_utility(name)
    if path is None:
        raise RuntimeError(f"{name} is missing")
    return str(path)


def _run(tool: str, *arguments: Any) -> str:
    return subprocess.run(
        [_tool(tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


@cache
def load(kernel: Any, signature: str | None, shared_bytes: int, gpu: Gpu) -> int:
    """Build a kernel for this GPU, load it, and let it have its dynamic shared memory.

    Parameters
    ----------
    kernel : Kernel, or ``@cuda.jit`` kernel
    signature : str or None
        Of a ``@cuda.jit`` kernel.  Arrays in it have any strides: one build serves contiguous and
        strided ones.
    shared_bytes : int
        More than 48 KB must be asked for, kernel by kernel.
    gpu : Gpu
        The current one.

    Returns
    -------
    int
        The driver's handle, for :class:`Launcher`.

    Raises
    ------
    RuntimeError
        If this GPU has not that much shared memory, or does not take the machine code.
    """
    from cuda.bindings import driver

    made = build(kernel, signature, gpu.architecture)
    name = kernel.name if isinstance(kernel, Kernel) else kernel.py_func.__name__
    status, library = driver.cuLibraryLoadData(made.cubin, [], [], 0, [], [], 0)
    _check(status, f"{name} cannot be loaded")
    status, function = driver.cuLibraryGetKernel(library, made.entry.encode())
    _check(status, f"{name} cannot be found in its own machine code")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, function, gpu.number)
    _check(
        status,
        f"{name} needs {shared_bytes} bytes of shared memory per block, more than this GPU has; "
        'pass backend="simt"',
    )
    return int(function)


def _check(status: Any, sentence: str) -> None:
    if status.value:  # 0 is success
        raise RuntimeError(f"{sentence} ({status.name})")


class _Placed:
    """The parameter of a launch that is a tensor map: as the driver has it, for each address.

    To move a map costs the driver more than a microsecond, and calls come back to few addresses.
    """

    def __init__(self, tensor_map: TensorMap) -> None:
        self._first = encode(tensor_map)
        self._known = {tensor_map.address: (self._first.ctypes.data, self._first)}
        self._value = tensor_map.address
        self._pointers: Any = [0]
        self._index = 0

    def put(self, pointers: Any, index: int) -> None:
        """Say where a launch looks for the pointer to this parameter."""
        self._pointers, self._index = pointers, index
        pointers[index] = self._known[self._value][0]

    @property
    def value(self) -> int:
        """Address of the array."""
        return self._value

    @value.setter
    def value(self, address: int) -> None:
        if address == self._value:
            return
        known = self._known.get(address)
        if known is None:
            known = self._moved_to(address)
        self._pointers[self._index] = known[0]
        self._value = address

    def _moved_to(self, address: int) -> tuple[int, NDArray[np.uint8]]:
        from cuda.bindings import driver

        moved = _aligned()
        moved[:] = self._first
        (status,) = driver.cuTensorMapReplaceAddress(
            driver.CUtensorMap(_ptr=moved.ctypes.data), address
        )
        _check(status, f"no tensor map can be at 0x{address:x}")
        if len(self._known) == MOST_PLACES:
            self._known.clear()
        self._known[address] = moved.ctypes.data, moved
        return self._known[address]


class Launcher:
    """A launch made ready: of one call to the next, only the stream and addresses change.

    Numba looks at every argument of every launch; here the driver is handed parameters that were
    laid out once, which takes it a few microseconds.  Not for two host threads at a time.

    Parameters
    ----------
    function : int
        Got from :func:`load`.
    grid : tuple of int
        Blocks in x, y, z.
    threads : int
        Of a block.
    shared_bytes : int
    *args
        In the order of the signature: an array as ``(shape, strides in bytes, bytes of an
        element)``, or its :class:`~cuda_kernels.ptx.tensor_map.TensorMap`, whose address comes
        with each launch; or a scalar of ``ctypes``.
    """

    def __init__(
        self, function: int, grid: tuple[int, int, int], threads: int, shared_bytes: int, *args: Any
    ) -> None:
        from cuda.bindings import driver

        self._addresses: list[ctypes.c_void_p | _Placed] = []
        values: list[Any] = []
        for argument in args:
            if isinstance(argument, TensorMap):
                self._addresses.append(_Placed(argument))
                values.append(self._addresses[-1])
                continue
            if not isinstance(argument, tuple):
                values.append(argument)
                continue
            shape, strides, item = argument  # an array is several parameters: see Numba's ABI
            address = ctypes.c_void_p(0)
            self._addresses.append(address)
            values += [ctypes.c_void_p(0), ctypes.c_void_p(0)]
            values += [ctypes.c_int64(math.prod(shape)), ctypes.c_int64(item), address]
            values += [ctypes.c_int64(n) for n in (*shape, *strides)]
        self._values = values
        self._pointers = (ctypes.c_void_p * len(values))()
        for i, value in enumerate(values):
            if isinstance(value, _Placed):
                value.put(self._pointers, i)
            else:
                self._pointers[i] = ctypes.addressof(value)
        where = (*grid, threads, 1, 1, shared_bytes)
        self._launch = partial(driver.cuLaunchKernel, driver.CUfunction(function), *where)
        self._parameters = ctypes.addressof(self._pointers)
        self._success = driver.CUresult.CUDA_SUCCESS

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launch.

        Parameters
        ----------
        stream : int
            Handle of a CUDA stream; 0 is the default stream.
        *addresses : int
            Of the arrays, in the order of the signature.  The last ones may be left out where they
            are what they were in the call before.

        Raises
        ------
        RuntimeError
            If the driver refuses.
        """
        for slot, address in zip(self._addresses, addresses, strict=False):
            slot.value = address
        (status,) = self._launch(stream, self._parameters, 0)
        if status != self._success:
            _check(status, "the launch failed")


def encode(tensor_map: TensorMap) -> NDArray[np.uint8]:
    """Return the driver's form of a tensor map: boxes swizzled, zeros outside the array.

    Parameters
    ----------
    tensor_map : TensorMap
        Of an array on a GPU.

    Returns
    -------
    uint8 [128]
        At a multiple of 64 bytes; valid while the array is where it is.

    Raises
    ------
    RuntimeError
        If the driver does not take it, which says why the array cannot be copied so.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {
        1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16,
        4: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT32,
    }[tensor_map.itemsize]
    # The driver's axes run the other way, the innermost first, whose stride it knows.
    status, encoded = driver.cuTensorMapEncodeTiled(
        kind,
        len(tensor_map.shape),
        tensor_map.address,
        [driver.cuuint64_t(n) for n in reversed(tensor_map.shape)],
        [driver.cuuint64_t(n) for n in reversed(tensor_map.strides[:-1])],
        [driver.cuuint32_t(n) for n in reversed(tensor_map.box)],
        [driver.cuuint32_t(1)] * len(tensor_map.shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    _check(status, f"{tensor_map} cannot be encoded")
    aligned = _aligned()
    ctypes.memmove(aligned.ctypes.data, encoded.getPtr(), 128)
    return aligned


def _aligned() -> NDArray[np.uint8]:
    """Room for a tensor map, at a multiple of 64 bytes."""
    room = np.empty(192, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + 128]
