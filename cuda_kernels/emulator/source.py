"""A kernel's own source, with the names it uses replaced by the emulator's.

The code object stays as it is; globals and closure cells are new.  Functions that the kernel
calls are treated likewise, and so on down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from cuda_kernels.emulator.block import Block
from cuda_kernels.emulator.calls import exchange, helper, issue, multiply, perform
from cuda_kernels.emulator.names import Cuda
from cuda_kernels.ptx.compiler import KernelSource, SourceOnlyCuda
from cuda_kernels.ptx.fragment import CPU_BODIES
from cuda_kernels.ptx.instruction import AddressOf, Instruction
from cuda_kernels.ptx.scalars import SCALARS, Scalar

LIBRARIES = ("numpy", "numba", "math", "builtins")


class GpuMath:
    """``math`` as on a GPU: float32 stays float32, and nothing raises."""

    pi, e, inf, nan = math.pi, math.e, math.inf, math.nan

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name, None) or getattr(np, _NUMPY_NAMES.get(name, ""), None)
        return function or getattr(math, name)


_NUMPY_NAMES = {"pow": "power", "acos": "arccos", "asin": "arcsin", "atan": "arctan"}


class Types:
    """``numba.types``: its scalar types as casts."""

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        if name not in SCALARS:
            raise AttributeError(f"the emulator does not know types.{name}")
        return SCALARS[name].cast


class Source:
    """Replaces names for one block."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._cuda = Cuda(block)
        self._made: dict[int, Any] = {}  # by id of the original
        self._keep: list[Any] = []

    def function(self, original: Any) -> Callable[..., Any]:
        """Return a kernel or plain function as the block runs it."""
        original = source_of(original)
        if id(original) in self._made:
            return self._made[id(original)]
        code = original.__code__
        names = dict(original.__globals__)
        cells = tuple(CellType() for _ in original.__closure__ or ())
        made = FunctionType(code, names, original.__name__, original.__defaults__, cells)
        made.__kwdefaults__ = original.__kwdefaults__
        self._made[id(original)] = made  # before its names: it may call itself
        self._keep.append(original)
        for name in _global_names(code):
            if name in names:
                names[name] = self.value(names[name])
        for cell, old in zip(cells, original.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self.value(old.cell_contents)
            except ValueError:  # a name that is not bound yet stays so
                continue
        return made

    def value(self, value: Any) -> Any:
        """Return what stands for a value that a kernel's name refers to."""
        if isinstance(value, Instruction):
            if id(value) not in self._made:
                self._made[id(value)] = self._instruction(value)
            return self._made[id(value)]
        if isinstance(value, SourceOnlyCuda):
            return self._cuda
        kind = type(value).__name__
        module = getattr(value, "__name__", "") if isinstance(value, ModuleType) else ""
        if module == "numba.cuda" or module.startswith("numba.cuda.simulator"):
            return self._cuda
        if kind == "FakeCUDAModule":
            return self._cuda
        if module == "math":
            return GpuMath()
        if module.startswith("numba.") and module.endswith("types"):
            return Types()
        if type(value).__module__.startswith("numba") and getattr(value, "name", "") in SCALARS:
            return SCALARS[value.name].cast
        if isinstance(value, Scalar):
            return value.cast
        original = source_of(value)
        if isinstance(original, FunctionType):
            if original in CPU_BODIES:
                return helper(self._block, CPU_BODIES[original], original.__name__)
            if not (original.__module__ or "").startswith(LIBRARIES):
                return self.function(original)
        return value

    def _instruction(self, made: Instruction) -> Callable[..., Any]:
        if isinstance(made, AddressOf) or made.scope == "thread":
            return perform(self._block, made)
        if made.scope == "warpgroup":
            return multiply(self._block, made)
        literals = dict.fromkeys(made.parameters, 0)
        if any(operand.returned for operand in made.operands(literals)):
            return exchange(self._block, made)
        return issue(self._block, made)


def source_of(kernel: Any) -> Any:
    """Return the Python function of a kernel, jitted or not."""
    if isinstance(kernel, KernelSource):
        return kernel.py_func
    if type(kernel).__module__.startswith("numba"):
        return getattr(kernel, "py_func", None) or getattr(kernel, "fn", kernel)
    return kernel


def _global_names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return names
