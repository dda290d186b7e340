"""One query group's visit to its key tiles → what the stepper shows.  Packing only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import streamlit as st

from app import rule_source
from app.components.stepper import stepper
from app.forced import Forced
from app.views import Words, pack
from sim.rules import Maximum, walk
from sim.skip_softmax import Scan
from sim.threshold import ln_threshold


def show(
    scan: Scan, i: int, row: int, threshold: float, forced: Forced, words: Words, name: str
) -> None:
    """Show the stepper through the visit of query group ``i``; see :func:`stepper_data`.

    ``name`` tells the head and the view: the stepper keeps its place while that and the group stay.
    """
    if scan.mass is None:
        st.caption("Above 32,768 tokens the maxima of single rows are not kept.")
    elif not scan.grid.visited()[i]:
        st.caption("This group sees no key, so it visits no tile.")
    else:
        data = stepper_data(scan, i, row, threshold, forced, words)
        stepper(data | {"name": f"{name} {i}"}, key="stepper")


def stepper_data(
    scan: Scan, i: int, row: int, threshold: float, forced: Forced, words: Words
) -> dict[str, Any]:
    """Walk through a visit under the maximum rule and pack what every row held after every tile.

    Parameters
    ----------
    scan : Scan
        Of one head, with nothing forced.
    i : int
        Query group.
    row : int
        Query row that is shown first, if it is in the group.
    threshold : float
    forced : Forced
    words : Words
    """
    rows = scan.grid.group_rows(i)
    by_hand = {key_tile: skip for (group, key_tile), skip in forced.items() if group == i}
    steps = list(walk(scan, 0, i, Maximum(threshold), by_hand))
    ln = float(ln_threshold(threshold))
    packed = {
        name: pack(np.stack([getattr(step, name) for step in steps]), "<f4")
        for name in ("tile_max", "gap", "m", "l", "u", "alpha")
    }
    return packed | {
        "group": i,
        "first_row": rows.start,
        "rows": rows.stop - rows.start,
        "row": row - rows.start if rows.start <= row < rows.stop else 0,
        "key_tiles": scan.grid.key_tiles,
        "ln": None if ln == -math.inf else ln,
        "vote": pack(np.stack([step.vote for step in steps]), "u1"),
        "steps": [
            {
                "j": step.j,
                "skipped": step.skipped,
                "forced": step.forced,
                "vetoes": int((~step.vote).sum()),
            }
            for step in steps
        ],
        "words": [
            words.passage(words.queries, slice(r, r + 1)) for r in range(rows.start, rows.stop)
        ],
        "phases": [[phase.name, phase.says] for phase in rule_source.PHASES],
        "pseudo": rule_source.pseudo_code()._asdict(),
        "kernel": rule_source.kernel()._asdict(),
    }
