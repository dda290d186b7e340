"""The maximum rule and two sequential ones on the same heads: measured one setting at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import streamlit as st

from app.wording import percent, plain_number
from sim.accuracy import dropped_mass
from sim.rules import MassBudget, Maximum, NormalisedMaximum, Rule, decide
from sim.skip_softmax import Scan


@dataclass(frozen=True)
class Family:
    """One rule with its one setting."""

    name: str
    make: Callable[[float], Rule]
    symbol: str
    formula: str
    promise: str
    settings: tuple[float, ...]
    """Drawn in the picture; from the smallest to the largest."""


FAMILIES = (
    Family(
        "Maximum",
        Maximum,
        "λ",
        "exp(tile_max − m) < λ",
        "none",
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
    ),
    Family(
        "Running sum",
        NormalisedMaximum,
        "λ",
        "exp(tile_max − m) < λ · l",
        "none",
        (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    Family(
        "Mass budget",
        MassBudget,
        "ε",
        "u ≤ ε · l, with this tile in u",
        "no row loses more than ε ÷ (1 + ε)",
        (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0),
    ),
)

TARGETS = {
    "tiles skipped": ("sparsity", (10.0, 20.0, 30.0, 40.0, 50.0)),
    "mean loss": ("mean", (0.1, 0.3, 1.0, 3.0)),
}
"""What is made equal in the table → the field of Point, and the percentages on offer."""

BISECTIONS = 7
CLOSE = 0.01  # relative, to the target


class Point(NamedTuple):
    """What one rule does at one setting, over all rows of all heads."""

    setting: float
    sparsity: float
    mean: float
    worst: float


Measure = Callable[[Family, float], Point]


def measure(key: str, family: str, setting: float, scan: Scan) -> Point:
    """Decide all heads by one rule and say what it skips and what it costs.

    Parameters
    ----------
    key : str
        Names the scan in the cache.
    family : str
        Name of a rule.
    setting : float
    scan : Scan
        With masses and row maxima.
    """
    return _measure(key, family, setting, scan)


@st.cache_resource(max_entries=512, show_spinner=False)
def _measure(key: str, family: str, setting: float, _scan: Scan) -> Point:
    rule = next(one for one in FAMILIES if one.name == family).make(setting)
    tiles = _scan.decide(setting) if isinstance(rule, Maximum) else decide(_scan, rule)
    assert _scan.mass is not None, "rules are compared on scans with masses"
    lost = dropped_mass(_scan.mass, tiles)
    sparsity = tiles.skipped.sum() / max(tiles.visited.sum(), 1)
    return Point(setting, float(sparsity), float(lost.mean()), float(lost.max()))


def work(families: tuple[Family, ...] = FAMILIES) -> int:
    """Measurements that a comparison takes at most."""
    return sum(len(family.settings) + BISECTIONS for family in families)


def at_target(
    family: Family, points: list[Point], field: str, target: float, measured: Measure
) -> Point | None:
    """Find the setting at which a rule reaches the target, by bisection of its logarithm.

    Parameters
    ----------
    family : Family
    points : list of Point
        At the family's settings.
    field : str
        Of Point, made equal.
    target : float
    measured : callable

    Returns
    -------
    Point or None
        None where the settings do not enclose the target.
    """
    values = [getattr(point, field) for point in points]
    if not values[0] <= target <= values[-1]:
        return None
    upper = int(np.searchsorted(np.maximum.accumulate(values), target))
    best = min(points, key=lambda point: abs(getattr(point, field) - target))
    low, high = points[max(upper - 1, 0)].setting, points[upper].setting
    for _ in range(BISECTIONS):
        if abs(getattr(best, field) - target) <= CLOSE * target:
            break
        middle = float(f"{math.sqrt(low * high):.3g}")
        point = measured(family, middle)
        if abs(getattr(point, field) - target) < abs(getattr(best, field) - target):
            best = point
        low, high = (low, middle) if getattr(point, field) > target else (middle, high)
    return best


def column(family: Family, point: Point | None) -> list[str]:
    """Write one column of the table; see :data:`QUANTITIES`."""
    if point is None:
        return ["out of reach", *["–"] * 4]
    bounded = f"at most {percent(point.setting / (1 + point.setting))}"
    return [
        f"{family.symbol} = {plain_number(point.setting)}",
        percent(point.sparsity),
        percent(point.mean),
        percent(point.worst),
        bounded if family.make is MassBudget else "nothing",
    ]


QUANTITIES = (
    "its setting",
    "tiles skipped",
    "lost, mean row",
    "lost, worst row",
    "promised of every row",
)
"""Rows of the table."""
