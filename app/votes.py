"""The vote on one tile: each row's tile max against its running max, and who vetoed."""

from __future__ import annotations

import math
from typing import NamedTuple

import altair as alt
import numpy as np
import pandas  # type: ignore[import-untyped]
import streamlit as st
from numpy.typing import NDArray

from app.forced import Forced
from app.views import Words
from app.wording import score
from sim.rules import Maximum, walk
from sim.skip_softmax import Scan
from sim.threshold import ln_threshold

AGREES, VETOES = "votes skip", "vetoes"
COLOURS = {AGREES: "#0072b2", VETOES: "#d55e00"}
LINES = {"running max m": [1, 0], "m + ln λ": [4, 3]}


class Votes(NamedTuple):
    """What the rows of a group see of one tile; arrays are [rows]."""

    rows: NDArray[np.int64]
    tile_max: NDArray[np.float32]
    m: NDArray[np.float32]
    gap: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    forced: bool

    @classmethod
    def on(cls, scan: Scan, i: int, j: int, threshold: float, forced: Forced) -> Votes | None:
        """Votes on tile (i, j) of one head's scan; None if the group does not visit it."""
        rows = scan.grid.group_rows(i)
        m = np.full(rows.stop - rows.start, -np.inf, np.float32)
        by_hand = {key_tile: skip for (group, key_tile), skip in forced.items() if group == i}
        for step in walk(scan, 0, i, Maximum(threshold), by_hand):
            if step.j == j:
                where = np.arange(rows.start, rows.stop)
                return cls(where, step.tile_max, m, step.gap, step.vote, step.forced)
            m = step.m
        return None


def tell(
    scan: Scan, place: tuple[int, int], threshold: float, forced: Forced, words: Words
) -> None:
    """Show the vote on a tile as a sentence, and as a chart or a table.

    Parameters
    ----------
    scan : Scan
        Of one head, with nothing forced.
    place : (int, int)
        Query group and key tile.
    threshold : float
    forced : Forced
    words : Words
    """
    if scan.mass is None:
        st.caption("Above 32,768 tokens the maxima of single rows are not kept.")
        return
    votes = Votes.on(scan, *place, threshold, forced)
    if votes is None:
        st.markdown("No query of the group sees a key of this tile, so there is no vote.")
        return
    ln = float(ln_threshold(threshold))
    sentence = said(votes, ln, scan.grid.rows)
    st.markdown(sentence)
    chart, numbers = st.tabs(
        ["Chart", "Table"], key="votes_view", on_change="rerun", bind="query-params"
    )
    if chart.open:
        chart.altair_chart(_chart(votes, ln), alt=sentence.replace("**", ""))
    if numbers.open:
        numbers.dataframe(
            _table(votes, words), hide_index=True, alt="Tile max, m, gap and vote of every row"
        )


def said(votes: Votes, ln: float, group_rows: int) -> str:
    """Say who vetoed and why the tile is kept, or that all agreed."""
    n, sees = len(votes.rows), votes.tile_max > -np.inf
    vetoes = np.flatnonzero(~votes.agrees)
    most = int(votes.gap.argmax())
    parts = []
    if not len(vetoes):
        parts.append(f"**All {n} rows agree** to skip")
        if sees.any():
            parts[0] += (
                f": the closest, query row {votes.rows[most]:,}, sees at most "
                f"{score(votes.tile_max[most])}, which is {score(-votes.gap[most])} below its m "
                f"({score(votes.m[most])}); it had to be more than {score(-ln)} below"
            )
    elif (votes.m[sees] == -np.inf).all():
        parts.append(
            "**Every row vetoes**: none has a running maximum yet. The first tile that a group "
            "visits is never skipped"
        )
    elif ln == -np.inf:
        parts.append("**Every row vetoes**: with λ off no score lies low enough")
    else:
        parts.append(
            f"**{len(vetoes)} of {n} rows {'vetoes' if len(vetoes) == 1 else 'veto'}**: what they "
            f"see here is not more than {score(-ln)} below their m. "
            + (
                f"Query row {votes.rows[most]:,} most of all: tile max "
                f"{score(votes.tile_max[most])}, m {score(votes.m[most])}. "
                if votes.m[most] > -np.inf
                else ""
            )
            + "One veto keeps the tile for all"
        )
    if blind := int(n - sees.sum()):
        verb = "sees" if blind == 1 else "see"
        parts.append(f"{blind} of the rows {verb} no key here, which counts as agreement")
    if n < group_rows:
        parts.append(f"the group has only {n} rows; rows beyond the last query count as agreement")
    if votes.forced:
        parts.append("the vote was overruled by hand")
    return "; ".join(parts) + "."


def _chart(votes: Votes, ln: float) -> alt.LayerChart:
    names = [AGREES if agrees else VETOES for agrees in votes.agrees]
    points = pandas.DataFrame(
        {"row": votes.rows, "score": votes.tile_max, "vote": names, "gap": votes.gap}
    )
    lines = pandas.concat(
        pandas.DataFrame({"row": votes.rows, "score": votes.m + shift, "line": name})
        for name, shift in zip(LINES, (0.0, ln), strict=True)
        if math.isfinite(shift)
    )
    x = alt.X(
        "row:Q",
        title="Query row",
        scale=alt.Scale(domain=[int(votes.rows[0]) - 1, int(votes.rows[-1]) + 1], nice=False),
        axis=alt.Axis(grid=False, format=",.0f", tickMinStep=1, tickCount=8),
    )
    y = alt.Y("score:Q", title="Score", scale=alt.Scale(zero=False))
    legend = alt.Legend(title=None, orient="top", columns=1)
    steps = (
        alt.Chart(lines[np.isfinite(lines["score"])])
        .mark_line(interpolate="step", strokeWidth=1.5, color="gray")
        .encode(
            x=x,
            y=y,
            strokeDash=alt.StrokeDash(
                "line:N",
                scale=alt.Scale(domain=list(LINES), range=list(LINES.values())),
                legend=legend,
            ),
        )
    )
    dots = (
        alt.Chart(points[np.isfinite(points["score"])].replace({"gap": {np.inf: None}}))
        .mark_point(filled=True, size=55, opacity=1)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "vote:N",
                scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())),
                legend=legend,
            ),
            shape=alt.Shape(
                "vote:N",
                scale=alt.Scale(domain=list(COLOURS), range=["circle", "triangle-up"]),
                legend=legend,
            ),
            tooltip=[
                alt.Tooltip("row:Q", title="query row", format=","),
                alt.Tooltip("score:Q", title="tile max", format=".2f"),
                alt.Tooltip("gap:Q", title="tile max − m", format=".2f"),
                alt.Tooltip("vote:N", title="vote"),
            ],
        )
    )
    return (steps + dots).properties(height=260, width="container")


def _table(votes: Votes, words: Words) -> dict[str, list]:
    table: dict[str, list] = {"Query row": votes.rows.tolist()}
    if words.queries:
        table["Word"] = [words.passage(words.queries, slice(row, row + 1)) for row in votes.rows]
    return table | {
        "Tile max": [score(x) for x in votes.tile_max],
        "Running max m": [score(x) for x in votes.m],
        "Tile max − m": [score(x) for x in votes.gap],
        "Vote": [AGREES if agrees else VETOES for agrees in votes.agrees],
    }
