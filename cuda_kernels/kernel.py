"""A kernel by its name: it can be looked for on disk, and loaded, while no compiler is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kernel:
    """What ``make_kernel`` of a module makes of these arguments, not made yet.

    Parameters
    ----------
    module : str
        It has a ``SIGNATURE``, too.
    arguments : tuple of int
    """

    module: str
    arguments: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the module, without its package."""
        return self.module.rpartition(".")[2]

    def make(self) -> Any:
        """Make the kernel: its module loads Numba, where that is installed."""
        return import_module(self.module).make_kernel(*self.arguments)

    @property
    def signature(self) -> str:
        """Types of the kernel's arguments; this loads Numba, too."""
        return import_module(self.module).SIGNATURE
