"""The event list of a run, and its export for a trace viewer such as Perfetto."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """What a warp did: one instruction, or the wait at a barrier.

    ``start`` and ``end`` are cycles of the duration model; ``tile`` is what the kernel last passed
    to ``mark_tile``, or −1; ``source`` is ``file:line in function``.
    """

    block: tuple[int, int, int]
    warp: int
    name: str
    start: float
    end: float
    tile: int
    source: str


def to_chrome(events: list[Event]) -> dict[str, Any]:
    """Return events in the Trace Event Format: a process per block, a thread per warp.

    One microsecond of the viewer is one cycle of the model.

    Examples
    --------
    >>> event = Event((0, 0, 0), 1, "ex2", 0.0, 8.0, 3, "kernel.py:7 in kernel")
    >>> to_chrome([event])["traceEvents"][-1]["dur"]
    8.0
    """
    blocks = sorted({event.block for event in events})
    pids = {block: pid for pid, block in enumerate(blocks)}
    trace: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"block {block}"}}
        for block, pid in pids.items()
    ]
    trace += [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": pids[block],
            "tid": warp,
            "args": {"name": f"warp {warp}"},
        }
        for block, warp in sorted({(event.block, event.warp) for event in events})
    ]
    trace += [
        {
            "ph": "X",
            "name": event.name,
            "pid": pids[event.block],
            "tid": event.warp,
            "ts": event.start,
            "dur": event.end - event.start,
            "args": {"tile": event.tile, "source": event.source},
        }
        for event in events
    ]
    return {"traceEvents": trace, "otherData": {"clock": "cycles of a model, not measured"}}


def write_chrome(events: list[Event], path: str | Path) -> None:
    """Write events as a JSON file that Perfetto and Chrome's tracing page open."""
    Path(path).write_text(json.dumps(to_chrome(events)))


def to_plain(events: list[Event]) -> list[dict[str, Any]]:
    """Return events as dictionaries of plain data."""
    return [asdict(event) for event in events]
