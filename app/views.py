"""Results of the simulator → what the tile map component draws.  Packing only, no arithmetic."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.forced import WhatIf
from app.wording import NBSP, headline, percent, plain_number
from sim.cost import matrix_work_ratio
from sim.curve import Curve
from sim.geometry import Grid
from sim.skip_softmax import Scan
from sim.threshold import ln_threshold
from sim.traces import Trace

STATES = ("masked", "computed", "skipped")
"""Words for MASKED, COMPUTED and SKIPPED."""

MAX_SIDE = 1024
"""Tiles drawn along a side of the map; more are pooled, any computed → computed."""

THUMBNAIL_SIDE = 64

THRESHOLDS = [0.0, *(float(f"{10 ** (n / 20 - 6):.3g}") for n in range(121))]
"""Positions of the slider: off, then a twentieth of a decade apart from 10⁻⁶ to 1."""

TICKS = [(0, "off"), *((1 + 20 * n, plain_number(10.0 ** (n - 6))) for n in range(1, 7))]


@dataclass(frozen=True)
class Setting:
    """The λ that is applied, and how the headline is to explain it if it is out of the ordinary."""

    threshold: float
    sentence: str | None = None


@dataclass(frozen=True)
class Words:
    """Text of the tokens: one string per query and per key, or nothing."""

    queries: list[str]
    keys: list[str]

    @classmethod
    def of(cls, trace: Trace, grid: Grid) -> Words:
        """Words of the keys and queries of a grid: query i is key i + Lk − Lq."""
        keys = trace.tokens[: grid.lk]
        return cls(keys[grid.lk - grid.lq :], keys)

    @staticmethod
    def passage(tokens: list[str], where: slice) -> str:
        """Text of some tokens, in one line."""
        return " ".join("".join(tokens[where]).split())


def pack(array: NDArray[Any], dtype: str) -> str:
    """Give the array's bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def pool(gap: NDArray[np.float32], side: int) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Shrink a gap map to at most ``side`` tiles each way by taking the largest gap.

    Returns
    -------
    gap : ndarray, shape [≤ side, ≤ side], float32
        A pooled tile is skipped only where all its tiles are.
    pooled : (int, int)
        Vote groups and key tiles that went into one.
    """
    pooled = (-(-gap.shape[0] // side), -(-gap.shape[1] // side))
    for axis, factor in enumerate(pooled):
        if factor > 1:
            gap = np.maximum.reduceat(gap, np.arange(0, gap.shape[axis], factor), axis=axis)
    return gap, pooled


def thumbnail(
    scan: Scan, index: int, curve: Curve, setting: Setting, head: int, name: str
) -> dict[str, Any]:
    """Pack one head's small map and its sparsity at every position of the slider."""
    gap, _ = pool(scan.gap[index], THUMBNAIL_SIDE)
    sparsity = curve.at(steps_of(setting)).sparsity
    return _map(scan, gap) | {
        "head": head,
        "label": name,
        "sparsity": [percent(share) for share in sparsity],
    }


def panel(what_if: WhatIf, setting: Setting, head_sizes: tuple[int, int]) -> dict[str, Any]:
    """Pack one map: gaps, deciding rows, and every headline and count that the slider can show."""
    scan, forced = what_if.scan, what_if.forced
    gap, pooled = pool(scan.gap[0], MAX_SIDE)
    grid = scan.grid
    at = what_if.curve.at(steps_of(setting))
    visited = int(grid.visited().sum())
    worst = [None] * len(at.sparsity) if at.worst_dropped_mass is None else at.worst_dropped_mass
    work = matrix_work_ratio(at.pair_share, *head_sizes).tolist()
    each = zip(steps_of(setting), at.sparsity, worst, work, strict=True)
    headlines = [headline(*one, forced=len(forced)) for one in each]
    if setting.sentence:
        headlines[-1] = setting.sentence
    data = _map(scan, gap) | {
        "pooled": pooled,
        "tokens_per_cell": [grid.rows * pooled[0], grid.keys * pooled[1]],
        "queries_total": grid.lq,
        "keys_total": grid.lk,
        "headline": headlines,
        "sparsity": [f"{100 * share:.1f}{NBSP}%" for share in at.sparsity],
        "skipped": [round(share * visited) for share in at.sparsity.tolist()],
        "visited": visited,
        "masked": grid.groups * grid.key_tiles - visited,
        "forced": [(i // pooled[0], j // pooled[1]) for i, j in forced],
    }
    if scan.row_max is not None and pooled == (1, 1):
        rows = scan.deciding_row(0)
        tile_max = np.take_along_axis(scan.row_max[0], rows, axis=0)
        data |= {"deciding_row": pack(rows, "<i4"), "tile_max": pack(tile_max, "<f4")}
    return data


def titles(scan: Scan, title: str) -> dict[str, str]:
    """Name one map; an empty title where there is only one."""
    order = f", visit order {title}" if title else ""
    size = f"{scan.grid.groups} query groups by {scan.grid.key_tiles} key tiles"
    return {"title": title, "label": f"Tile map{order}: {size}"}


def query_row(scan: Scan, row: int, words: Words) -> dict[str, Any]:
    """Pack one query row's attention per key tile, drawn as bars under the map."""
    if scan.mass is None:
        return {}
    mass = scan.mass[0, row]
    strongest = int(mass.argmax())
    return {
        "mass": pack(mass, "<f4"),
        "row_group": row // scan.grid.rows,
        "row_title": f"Attention of query row {row:,} per key tile, log scale ",
        "row_word": words.passage(words.queries, slice(row, row + 1)),
        "row_label": f"Attention of query row {row:,} per key tile on a logarithmic scale; most, "
        f"{percent(mass[strongest])}, on key tile {strongest}. A table below has every weight.",
    }


def component_data(
    setting: Setting,
    panels: list[dict[str, Any]],
    thumbnails: list[dict[str, Any]],
    words: Words,
    head: int,
    tile: tuple[int, int],
) -> dict[str, Any]:
    """Put together what the component is sent."""
    pooled = panels[0]["pooled"]
    return slider(setting) | {
        "panels": panels,
        "heads": thumbnails if len(thumbnails) > 1 else [],
        "head": head,
        "selected": {"i": tile[0] // pooled[0], "j": tile[1] // pooled[1]},
        "words": words.keys,
        "first_query": len(words.keys) - len(words.queries),
    }


def slider(setting: Setting) -> dict[str, Any]:
    """Pack what the λ slider needs: an entry for every position, then one for the exact λ."""
    steps = steps_of(setting)
    distance = [abs(math.log(max(x, 1e-7) / max(setting.threshold, 1e-7))) for x in THRESHOLDS]
    ln = ln_threshold(steps).tolist()
    return {
        "thresholds": THRESHOLDS,
        "threshold": setting.threshold,
        "ln": [None if value == -math.inf else value for value in ln],
        "labels": ["off" if x == 0 else f"λ = {plain_number(x)}" for x in steps],
        "ticks": TICKS,
        "steps": len(THRESHOLDS),
        "nearest": distance.index(min(distance)),
    }


def is_pooled(grid: Grid) -> bool:
    """Whether the map is drawn with fewer cells than tiles."""
    return max(grid.groups, grid.key_tiles) > MAX_SIDE


def steps_of(setting: Setting) -> list[float]:
    """Give the λ of every entry of a table: the slider's positions, then the exact λ."""
    return [*THRESHOLDS, setting.threshold]


def _map(scan: Scan, gap: NDArray[np.float32]) -> dict[str, Any]:
    return {
        "gap": pack(gap, "<f4"),
        "groups": gap.shape[0],
        "key_tiles": gap.shape[1],
        "aspect": min(1.5, max(0.25, scan.grid.lq / scan.grid.lk)),
    }
