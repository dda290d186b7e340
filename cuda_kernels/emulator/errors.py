"""What the emulator reports, and where in the kernel's source it happened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import CodeType, FrameType

Site = tuple[CodeType, int]
"""A place in a kernel: code object and offset; cheap to take, its line is looked up in a report."""


class EmulationError(Exception):
    """A kernel did what no GPU promises to do right: the message says which thread, what, where."""


def site_of(frame: FrameType) -> Site:
    """Return the place that a frame has reached."""
    return frame.f_code, frame.f_lasti


def describe_site(site: Site | None) -> str:
    """Return ``file:line``, and the function unless a lambda."""
    if site is None:
        return "the start"
    code, offset = site
    line = next(
        (at for start, end, at in code.co_lines() if start <= offset < end), code.co_firstlineno
    )
    return f"{os.path.basename(code.co_filename)}:{line} in {code.co_name}"


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers briefly.

    Examples
    --------
    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7–8'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in parts)
