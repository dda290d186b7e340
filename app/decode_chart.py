"""Sparsity against the number of splits, plain and seeded, as an Altair chart."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas  # type: ignore[import-untyped]

from app.wording import percent
from sim.decode_splits import Sparsity

NAMES = ("plain", "seeded")
COLOURS = ("#d55e00", "#0072b2")


def against_splits(rows: Sequence[Sparsity], splits: int) -> tuple[alt.LayerChart, str]:
    """Draw what plain and seeded splits skip, and say it in words.

    Parameters
    ----------
    rows : sequence of Sparsity
        At one length and λ, by splits.
    splits : int
        Where the page stands.
    """
    table = pandas.DataFrame(
        [
            {"splits": str(row.splits), "sparsity": getattr(row, name), "maximum": name}
            for row in rows
            for name in NAMES
        ]
    )
    x = alt.X("splits:O", title="Splits", sort=[str(row.splits) for row in rows])
    x = x.axis(labelAngle=0, grid=False)
    legend = alt.Legend(title=None, orient="top")
    lines = (
        alt.Chart(table)
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=60, filled=True))
        .encode(
            x=x,
            y=alt.Y(
                "sparsity:Q",
                title="Tiles skipped",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="~%", values=[0, 0.25, 0.5, 0.75, 1]),
            ),
            color=alt.Color(
                "maximum:N", scale=alt.Scale(domain=NAMES, range=COLOURS), legend=legend
            ),
            shape=alt.Shape("maximum:N", scale=alt.Scale(domain=NAMES), legend=legend),
            tooltip=[
                alt.Tooltip("maximum:N", title="splits are"),
                alt.Tooltip("splits:O"),
                alt.Tooltip("sparsity:Q", title="tiles skipped", format=".1%"),
            ],
        )
    )
    here = alt.Chart(alt.Data(values=[{"splits": str(splits)}]))
    rule = here.mark_rule(color="gray", strokeWidth=1.5).encode(x=x)
    first, last = rows[0], rows[-1]
    alternative = (
        f"From {first.splits} to {last.splits} splits, plain ones skip {percent(first.plain)} and "
        f"then {percent(last.plain)} of tiles, seeded ones {percent(first.seeded)} and then "
        f"{percent(last.seeded)}."
    )
    return (rule + lines).properties(height=240, width="container"), alternative
