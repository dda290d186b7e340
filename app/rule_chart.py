"""Sparsity against what is lost, one line for each rule."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas  # type: ignore[import-untyped]

from app.rule_comparison import Family, Point
from app.wording import percent

COLOURS = ("#0072b2", "#d55e00", "#009e73")
FLOOR = 1e-5


def trade_off(
    points: Mapping[Family, list[Point]], field: str, title: str
) -> tuple[alt.Chart, str]:
    """Draw lost attention against tiles skipped, and say in words what is seen.

    Parameters
    ----------
    points : mapping of Family to list of Point
    field : {"worst", "mean"}
    title : str
        Of the vertical axis.
    """
    names = [family.name for family in points]
    table = pandas.DataFrame(
        [
            {
                "rule": family.name,
                "setting": f"{family.symbol} = {point.setting:g}",
                "sparsity": point.sparsity,
                "lost": max(getattr(point, field), FLOOR),
            }
            for family, line in points.items()
            for point in line
        ]
    )
    legend = alt.Legend(title=None, orient="top", columns=2)
    chart = (
        alt.Chart(table)
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=60, filled=True))
        .encode(
            x=alt.X(
                "sparsity:Q",
                title="Tiles skipped",
                axis=alt.Axis(format="~%", grid=False, tickCount=5),
            ),
            y=alt.Y(
                "lost:Q",
                title=title,
                scale=alt.Scale(type="log", clamp=True),
                axis=alt.Axis(format="~%", values=[1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
            ),
            order=alt.Order("sparsity:Q"),
            color=alt.Color(
                "rule:N", scale=alt.Scale(domain=names, range=list(COLOURS)), legend=legend
            ),
            shape=alt.Shape("rule:N", scale=alt.Scale(domain=names), legend=legend),
            tooltip=[
                alt.Tooltip("rule:N"),
                alt.Tooltip("setting:N"),
                alt.Tooltip("sparsity:Q", title="tiles skipped", format=".1%"),
                alt.Tooltip("lost:Q", title=title, format=".3~%"),
            ],
        )
        .properties(height=300, width="container")
    )
    ends = "; ".join(
        f"{family.name} from {percent(getattr(line[0], field))} at {percent(line[0].sparsity)} of "
        f"tiles skipped to {percent(getattr(line[-1], field))} at {percent(line[-1].sparsity)}"
        for family, line in points.items()
    )
    return chart, f"{title}: {ends}."
