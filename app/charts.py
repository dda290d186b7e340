"""Curves as Altair charts: sparsity and dropped mass against λ, sparsity against length.

Every function returns the chart and its takeaway in words, for those who do not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
import pandas  # type: ignore[import-untyped]  # Streamlit brings it; Altair checks rows of other data one by one
from numpy.typing import NDArray

from app.wording import percent, plain_number
from sim.curve import Curve
from sim.skip_softmax import Scan

SPARSITY = "#b87a00"  # the map's orange, darkened: a line needs more contrast than an area
WORST = "#d55e00"
MEAN = "#0072b2"
LOWEST = 1e-6  # of the λ axis, and of the losses drawn
THRESHOLDS = np.geomspace(LOWEST, 1, 241)
POWERS = [1e-6, 1e-4, 1e-2, 1]
POWER_LABELS = (
    "datum.value < 1e-5 ? '10⁻⁶' : datum.value < 1e-3 ? '10⁻⁴' : format(datum.value, '~g')"
)
LINEAR = alt.Scale(domain=[0, 1])
LOG = alt.Scale(type="log", domain=[LOWEST, 1], clamp=True)


def against_threshold(curve: Curve, threshold: float) -> list[tuple[alt.LayerChart, str]]:
    """Tiles skipped, and attention lost where it is known, against λ, with the current λ."""
    at = curve.at(np.append(THRESHOLDS, threshold))  # the last is for the words
    takeaway = f"Larger λ skips more tiles: {percent(at.sparsity[-1])} at the current λ."
    drawn = [(_lines({"all": (at.sparsity, SPARSITY)}, "Tiles skipped", threshold), takeaway)]
    worst, mean = at.worst_dropped_mass, at.mean_dropped_mass
    if worst is None or mean is None:
        return drawn
    lost = {"worst row": (worst, WORST), "mean row": (mean, MEAN)}
    takeaway = (
        f"Larger λ loses more attention: at the current λ {percent(worst[-1])} of the worst row’s, "
        f"{percent(mean[-1])} of a row’s on average."
    )
    return [*drawn, (_lines(lost, "Attention lost", threshold), takeaway)]


def _lines(
    series: Mapping[str, tuple[NDArray[np.float64], str]], title: str, threshold: float
) -> alt.LayerChart:
    """One axis of shares against λ: a line each, and a rule at the current λ."""
    log = len(series) > 1
    table = pandas.concat(
        pandas.DataFrame({"λ": THRESHOLDS, "share": ys[: len(THRESHOLDS)], "series": name})
        for name, (ys, _) in series.items()
    )
    if log:
        table = table[table["share"] >= LOWEST]
    names = list(series)
    x = alt.X(
        "λ:Q",
        title="Threshold λ",
        scale=alt.Scale(type="log", domain=[LOWEST, 1]),
        axis=alt.Axis(values=POWERS, labelExpr=POWER_LABELS, grid=False),
    )
    y = alt.Y(
        "share:Q",
        title=title,
        scale=LOG if log else LINEAR,
        axis=alt.Axis(format="~%", values=POWERS if log else [0, 0.25, 0.5, 0.75, 1]),
    )
    colour = alt.Scale(domain=names, range=[colour for _, colour in series.values()])
    dash = alt.Scale(domain=names, range=[[1, 0], [5, 3]][: len(names)])
    legend = alt.Legend(title=None, orient="top", columns=1) if log else None
    lines = (
        alt.Chart(table)
        .mark_line(interpolate="step-after", strokeWidth=2.5, clip=True)
        .encode(
            x=x,
            y=y,
            color=alt.Color("series:N", scale=colour, legend=legend),
            strokeDash=alt.StrokeDash("series:N", scale=dash, legend=legend),
            tooltip=[
                alt.Tooltip("series:N", title="line"),
                alt.Tooltip("λ:Q", format=".2e"),
                alt.Tooltip("share:Q", format=".3~%"),
            ],
        )
    )
    return (lines + _rule("λ", max(threshold, LOWEST))).properties(
        height=250 if log else 200, width="container"
    )


def _rule(field: str, value: float) -> alt.Chart:
    """Vertical line where the page stands now."""
    mark = alt.Chart(alt.Data(values=[{field: value}])).mark_rule(color="gray", strokeWidth=1.5)
    return mark.encode(x=f"{field}:Q")


def lengths_up_to(whole: int, step: int) -> tuple[int, ...]:
    """At most nine lengths, multiples of ``step`` and the whole."""
    stride = step * max(1, whole // (8 * step))
    return (*range(stride, whole, stride), whole)


def against_length(
    scans: Sequence[Scan], threshold: float, factor: float, length: int
) -> tuple[alt.LayerChart, str]:
    """Sparsity against context length, with λ fixed and with the scale factor fixed."""
    lengths = [scan.grid.lk for scan in scans]
    fixed = {
        f"λ = {plain_number(threshold)}": [scan.decide(threshold) for scan in scans],
        f"scale factor = {plain_number(factor)}": [
            scan.decide(threshold_scale_factor=factor) for scan in scans
        ],
    }
    sparsity = {name: [float(t.sparsity[0]) for t in tiles] for name, tiles in fixed.items()}
    table = pandas.concat(
        pandas.DataFrame({"length": lengths, "sparsity": shares, "fixed": name})
        for name, shares in sparsity.items()
    )
    names = list(sparsity)
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=240)
    lines = (
        alt.Chart(table)
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=50, filled=True))
        .encode(
            x=alt.X(
                "length:Q",
                title="Context length, tokens",
                scale=alt.Scale(domain=[0, lengths[-1]]),
                axis=alt.Axis(grid=False, format=",.0f", tickCount=4),
            ),
            y=alt.Y("sparsity:Q", title="Tiles skipped", axis=alt.Axis(format="~%", tickCount=4)),
            color=alt.Color(
                "fixed:N", scale=alt.Scale(domain=names, range=[MEAN, WORST]), legend=legend
            ),
            shape=alt.Shape("fixed:N", scale=alt.Scale(domain=names), legend=legend),
            tooltip=[
                alt.Tooltip("fixed:N", title="fixed"),
                alt.Tooltip("length:Q", format=","),
                alt.Tooltip("sparsity:Q", title="tiles skipped", format=".1%"),
            ],
        )
    )
    ends = "; ".join(
        f"with {name} from {percent(shares[0])} at {lengths[0]:,} tokens to "
        f"{percent(shares[-1])} at {lengths[-1]:,}"
        for name, shares in sparsity.items()
    )
    chart = (lines + _rule("length", length)).properties(height=250, width="container")
    return chart, f"Tiles skipped, {ends}."
