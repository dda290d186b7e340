"""Functions of kernels: inlined device code on a GPU, the same Python in the emulator.

One that only works on a thread's own register tiles may have a second, vectorised body for the
CPU, which a test holds equal to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_kernels.ptx.compiler import device_function

CPU_BODIES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Vectorised body of a fragment, by the function that it stands for."""


def fragment(function: Callable[..., Any]) -> Any:
    """Make a function that kernels call, and that costs no call.

    Integer literals stay compile-time integers through its arguments, and register tiles are
    passed by reference.

    Examples
    --------
    >>> @fragment
    ... def double(tile, n):
    ...     for j in range(n):
    ...         tile[j] *= 2
    """
    return device_function(function)


def cpu_body(of: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a fragment a faster body for the CPU; register tiles are NumPy arrays in it.

    Parameters
    ----------
    of : fragment
        It may read and write only its register tiles.

    Examples
    --------
    >>> @fragment
    ... def double(tile, n):
    ...     for j in range(n):
    ...         tile[j] *= 2
    >>> @cpu_body(double)
    ... def _double(tile, n):
    ...     tile[:n] *= 2
    """

    def remember(body: Callable[..., Any]) -> Callable[..., Any]:
        CPU_BODIES[of.py_func] = body
        return body

    return remember
