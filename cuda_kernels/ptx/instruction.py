"""One function per PTX instruction: its assembly text for the GPU, its body for the CPU.

:func:`instruction` is all that a new instruction needs.  Operands are counted as the constraints
list them: first what the function returns, then its arguments.

=========  ===================================================================================
``=f``     returned value
``f``      argument
``t``      tensor map, a parameter of the kernel
``n``      compile-time integer: a literal, or a global or closed-over integer, at the call
``4f``     argument: a register tile (``cuda.local.array`` or a row of one) of four values
``=4f``    register tile that the instruction writes
``+4f``    register tile that it reads and writes
=========  ===================================================================================

The letters are LLVM's: ``f`` float32, ``d`` float64, ``h`` uint16, ``r`` uint32, ``l`` uint64.
Text and constraints may be functions of the compile-time integers, by their names.

This module knows nothing of Numba; see :mod:`cuda_kernels.ptx.compiler` for that side.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, update_wrapper
from typing import Any

from cuda_kernels.ptx import compiler

LETTERS = {"f": "float32", "d": "float64", "h": "uint16", "r": "uint32", "l": "uint64"}
SCOPES = ("thread", "warp", "warpgroup")

Text = str | Callable[..., str]


class WrongUse(TypeError):
    """An instruction was called as it cannot be: one sentence says how."""


@dataclass(frozen=True)
class Operand:
    """One entry of a constraint string."""

    access: str  # "" read, "=" written, "+" both
    count: int | None  # values of a register tile; None for a scalar
    letter: str

    @property
    def returned(self) -> bool:
        """Whether the function returns it, rather than takes it."""
        return self.access == "=" and self.count is None

    @property
    def literal(self) -> bool:
        """Whether it is a compile-time integer."""
        return self.letter == "n"

    @classmethod
    def parse(cls, text: str) -> Operand:
        """Read one entry.

        Examples
        --------
        >>> Operand.parse("+4f")
        Operand(access='+', count=4, letter='f')
        """
        match = re.fullmatch(r"([=+]?)(\d*)([fdhrlnt])", text.strip())
        if not match:
            raise ValueError(f"no such constraint: {text!r}; see cuda_kernels.ptx.instruction")
        access, count, letter = match.groups()
        operand = cls(access, int(count) if count else None, letter)
        if (access == "+" and not count) or (letter in "nt" and (access or count)):
            raise ValueError(f"no such constraint: {text!r}; see cuda_kernels.ptx.instruction")
        return operand


@cache
def parse_constraints(text: str) -> tuple[Operand, ...]:
    """Split a constraint string into operands, in the order in which ``$0``, ``$1``, … name them.

    Examples
    --------
    >>> [operand.returned for operand in parse_constraints("=f,f")]
    [True, False]
    """
    return tuple(Operand.parse(entry) for entry in text.split(",")) if text else ()


class Instruction:
    """A PTX instruction: a name in a kernel, a function everywhere else.

    Called outside a kernel it runs its CPU body.  A warp-wide body gets every argument with one
    more leading axis, the lanes, and writes register tiles in place.

    Attributes
    ----------
    body : callable
        The CPU model.
    scope : str
        ``thread``, ``warp`` for an instruction that all lanes execute together, or ``warpgroup``
        for one that four warps do.
    parameters : tuple of str
        Names of the arguments.
    """

    __name__: str
    __qualname__: str

    def __init__(
        self, body: Callable[..., Any], text: Text, constraints: Text, scope: str, target: str
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
        self.body = body
        self.text = text
        self.constraints = constraints
        self.scope = scope
        self.target = Target.parse(target)
        self.parameters = tuple(inspect.signature(body).parameters)
        update_wrapper(self, body)

    def __call__(self, *args: Any) -> Any:
        """Run the CPU body."""
        return self.body(*args)

    def operands(self, literals: Mapping[str, int]) -> tuple[Operand, ...]:
        """List the operands of the form that ``literals`` (by parameter name) choose."""
        operands = parse_constraints(_choose(self.constraints, literals))
        taken = sum(not operand.returned for operand in operands)
        if taken != len(self.parameters):
            raise ValueError(
                f"{self.__name__} has {len(self.parameters)} parameters, its constraints {taken}"
            )
        return operands

    def assembly(self, literals: Mapping[str, int]) -> str:
        """Return the text of the form that ``literals`` choose, operands as ``$0``, ``$1``, …."""
        return _choose(self.text, literals)

    def __repr__(self) -> str:
        return f"<instruction {self.__name__}>"

    # Numba deep-copies the code that it rewrites, and pickles what kernels close over to make the
    # key of its disk cache: an instruction is one object, known by its name.
    def __deepcopy__(self, memo: dict[int, Any]) -> Instruction:
        return self

    def __reduce__(self) -> str:
        return self.__qualname__


@dataclass(frozen=True)
class Target:
    """The architectures that have an instruction: from one on, or one alone."""

    capability: tuple[int, int]
    feature: str  # "" for this capability and later; "a" for exactly this one's accelerated form

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``sm_80`` (and later) or ``sm_90a`` (that one alone).

        Examples
        --------
        >>> Target.parse("sm_90a").has((10, 0, "a"))
        False
        """
        match = re.fullmatch(r"sm_(\d+)(\d)(a?)", text)
        if not match:
            raise ValueError(f"target must look like sm_80 or sm_90a, got {text!r}")
        return cls((int(match[1]), int(match[2])), match[3])

    def has(self, architecture: tuple[Any, ...]) -> bool:
        """Whether code for ``architecture``, such as ``(9, 0, "a")``, may use it.

        Numba names a device by its capability alone and compiles from 9.0 on for the ``a`` form.
        """
        capability = (architecture[0], architecture[1])
        if not self.feature:
            return capability >= self.capability
        return capability == self.capability and (*architecture, "a")[2] == "a"

    def __str__(self) -> str:
        name = f"sm_{self.capability[0]}{self.capability[1]}{self.feature}"
        return name if self.feature else f"{name} or later"


def instruction(
    text: Text, constraints: Text = "", *, scope: str = "thread", target: str = "sm_80",
    memory: bool = False, pure: bool = False,
) -> Callable[[Callable[..., Any]], Instruction]:  # fmt: skip
    """Make a PTX instruction of a function that models it.

    Parameters
    ----------
    text : str or callable
        PTX; ``$0``, ``$1``, … are the operands, a register tile in braces.  Empty: the instruction
        is for the emulator and costs nothing on a GPU.
    constraints : str or callable
        What the operands are; see the module's table.
    scope : str
        ``thread``, ``warp`` if all lanes must execute it together, ``warpgroup`` if four warps.
    target : str
        ``sm_80``: that architecture and later; ``sm_90a``: that one alone.
    memory : bool
        It reads or writes memory, or orders such accesses: the compiler moves none across it.
    pure : bool
        Its result depends on its operands alone: the compiler may drop or merge it.

    Returns
    -------
    callable
        The decorator.

    Examples
    --------
    >>> @instruction("add.f32 $0, $1, $2;", "=f,f,f", pure=True)
    ... def add(x, y):
    ...     return x + y
    >>> add(1.0, 2.0)
    3.0
    """

    def decorate(body: Callable[..., Any]) -> Instruction:
        made = Instruction(body, text, constraints, scope, target)
        if isinstance(constraints, str):
            made.operands({})  # counts its parameters
        compiler.register_instruction(made, memory=memory, volatile=not pure, error=WrongUse)
        return made

    return decorate


class AddressOf(Instruction):
    """The address of an array element: no instruction, but known to Numba in the same way."""

    def __init__(self, body: Callable[..., Any], space: str) -> None:
        super().__init__(body, "", "", "thread", "sm_80")
        self.space = space
        compiler.register_address(self, space, error=WrongUse)


def _choose(text: Text, literals: Mapping[str, int]) -> str:
    if isinstance(text, str):
        return text
    wanted = inspect.signature(text).parameters
    return text(**{name: literals[name] for name in wanted})
