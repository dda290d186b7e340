"""Calibration as Altair charts: sparsity against scale factor, perplexity against sparsity.

Every function returns the chart and its takeaway in words, for those who do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import pandas  # type: ignore[import-untyped]
from numpy.typing import NDArray

from app.wording import percent, plain_number, signed_percent
from sim.calibration import Fit, Measured
from sim.quality_plot import COLOURS as OF_KERNEL

Chart = alt.LayerChart | alt.FacetChart

OF_LENGTH = ("#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#b87a00", "#8a6bbf")
FORMULA = "#d55e00"
GREY = "#888888"
STEPS = 41  # of the formula's line and band
LEAST_DRAWN = 0.01  # of tiles skipped: factors below are left out
LINEAR_BELOW = 0.001  # of the perplexity axis, which is logarithmic beyond
DASHES = [[1, 0], [6, 4], [2, 3], [9, 3, 2, 3]]
CHANGES = [-0.1, -0.01, -0.001, 0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 10]
SHARES = [0, 0.25, 0.5, 0.75, 1]
SPARSITY = alt.Y(
    "sparsity:Q",
    title="Tiles skipped",
    scale=alt.Scale(domain=[0, 1]),
    axis=alt.Axis(format="~%", values=SHARES),
)


def against_factor(
    measured: Measured, fit: Fit | None, target: float, factor: float | None, *, layers: bool
) -> tuple[Chart, str]:
    """Draw sparsity against scale factor: lengths, layers, the formula and its band.

    Parameters
    ----------
    measured : Measured
    fit : Fit or None
        None where no formula holds.
    target : float
        Sparsity wanted.
    factor : float or None
        Scale factor that the formula gives for it.
    layers : bool
        Whether every layer is drawn too, at the longest length.
    """
    lengths = np.array([sample.length for sample in measured.samples])
    each = sorted(set(lengths.tolist()))
    of_length = {f"{n:,} tokens": measured.sparsity[lengths == n].mean((0, 1, 2)) for n in each}
    names = dict(zip(of_length, OF_LENGTH * len(each), strict=False))
    table = pandas.concat(
        _rows(measured.thresholds * n, shares, name)
        for n, (name, shares) in zip(each, of_length.items(), strict=True)
    )
    drawn = table[table["sparsity"] >= LEAST_DRAWN]
    if drawn.empty:
        drawn = table
    low, high = drawn["factor"].min(), table["factor"].max()
    x = partial(_factor_axis, domain=[low, high])
    of_layers = f"each layer, {each[-1]:,} tokens"
    layers &= len(measured.layers) > 1
    names |= {of_layers: GREY} if layers else {}
    names |= {"formula": FORMULA} if fit is not None else {}  # all names before any is drawn
    parts = []
    if layers:
        parts.append(_layers(measured, lengths == each[-1], each[-1], of_layers, x, names))
    if fit is not None:
        parts += _formula(fit, x, names)
    parts.append(
        alt.Chart(table)
        .mark_line(strokeWidth=2, clip=True, point=alt.OverlayMarkDef(size=35, filled=True))
        .encode(x=x("factor"), y=SPARSITY, color=_colour(names), tooltip=_tooltips("length"))
    )
    parts.append(_rule("sparsity", target, horizontal=True))
    if factor:
        parts.append(_rule("factor", factor))
    chart = alt.layer(*parts).properties(height=380, width="container")
    return chart, _in_words(measured, each, of_length, fit)


def _rows(factor: NDArray[np.float64], share: NDArray[np.float64], name: str) -> pandas.DataFrame:
    return pandas.DataFrame({"factor": factor, "sparsity": share, "line": name})


def _factor_axis(field: str, domain: list[float]) -> alt.X:
    return alt.X(
        f"{field}:Q",
        title="Scale factor = λ × KV length",
        scale=alt.Scale(type="log", domain=domain, nice=False),
        axis=alt.Axis(grid=False, format=",~g", tickCount=6),
    )


def _colour(names: Mapping[str, str]) -> alt.Color:
    return alt.Color(
        "line:N",
        scale=alt.Scale(domain=list(names), range=list(names.values())),
        legend=alt.Legend(title=None, orient="top", columns=2, labelLimit=220, symbolOpacity=1),
    )


def _tooltips(title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("line:N", title=title),
        alt.Tooltip("factor:Q", title="scale factor", format=",.3~g"),
        alt.Tooltip("sparsity:Q", title="tiles skipped", format=".1%"),
    ]


def _layers(
    measured: Measured,
    samples: NDArray[np.bool_],
    length: int,
    name: str,
    x: Callable[[str], alt.X],
    names: Mapping[str, str],
) -> alt.Chart:
    """Thin lines, one a layer, over the texts of one length."""
    of_layer = measured.sparsity[samples].mean((0, 2))  # [layers, trials]
    factor = measured.thresholds * length
    table = pandas.concat(
        _rows(factor, shares, name).assign(layer=f"layer {layer}")
        for layer, shares in zip(measured.layers, of_layer, strict=True)
    )
    return (
        alt.Chart(table)
        .mark_line(strokeWidth=1, opacity=0.45, clip=True)
        .encode(
            x=x("factor"),
            y=SPARSITY,
            detail="layer:N",
            color=_colour(names),
            tooltip=["layer:N"],
        )
    )


def _formula(fit: Fit, x: Callable[[str], alt.X], names: Mapping[str, str]) -> list[alt.Chart]:
    """The line where it was fitted, nowhere else, and its band."""
    sparsity = np.linspace(*fit.range, STEPS)
    table = _rows(
        np.array([fit.scale_factor(s) for s in sparsity.tolist()]), sparsity, "formula"
    ).assign(low=np.nan, high=np.nan)
    line = (
        alt.Chart(table)
        .mark_line(strokeWidth=3, strokeDash=[7, 4], clip=True)
        .encode(x=x("factor"), y=SPARSITY, color=_colour(names), tooltip=_tooltips("line"))
    )
    if not fit.draws:
        return [line]
    table[["low", "high"]] = [fit.interval(s) for s in sparsity.tolist()]
    band = (
        alt.Chart(table)
        .mark_area(orient="horizontal", color=FORMULA, opacity=0.25, clip=True)
        .encode(x=x("low"), x2="high:Q", y=SPARSITY)
    )
    return [band, line]


def _rule(field: str, value: float, *, horizontal: bool = False) -> alt.Chart:
    """Line where the page stands now."""
    mark = alt.Chart(alt.Data(values=[{field: value}])).mark_rule(
        color="gray", strokeWidth=1.5, clip=True
    )
    return mark.encode(y=f"{field}:Q") if horizontal else mark.encode(x=f"{field}:Q")


def _in_words(
    measured: Measured,
    lengths: list[int],
    of_length: Mapping[str, NDArray[np.float64]],
    fit: Fit | None,
) -> str:
    most = float(measured.thresholds[-1])
    tops = "; ".join(
        f"at {name} up to {percent(shares[-1])}, at factor {plain_number(n * most)}"
        for n, (name, shares) in zip(lengths, of_length.items(), strict=True)
    )
    words = f"Larger scale factors skip more tiles: {tops}."
    if fit is None:
        return words
    low, high = (fit.scale_factor(s) for s in fit.range)
    return (
        f"{words} The formula rises from {percent(fit.range[0])} at factor {plain_number(low)} to "
        f"{percent(fit.range[1])} at {plain_number(high)}."
    )


def quality(report: Mapping[str, Any], phase: str, target: float) -> tuple[Chart, str] | None:
    """Draw how an evaluation's perplexity moved against the tiles skipped; None without rows.

    Parameters
    ----------
    report : mapping
        From :func:`sim.evaluation_report.report_of`.
    phase : {"prefill", "decode"}
    target : float
        Sparsity wanted, marked.
    """
    table = pandas.DataFrame(
        [
            {
                "kernel": row["kernel"],
                "tokens": f"{row['length']:,} tokens",
                "sparsity": row[phase]["sparsity"][0],
                **dict(
                    zip(("change", "low", "high"), row[phase]["perplexity_change"], strict=True)
                ),
            }
            for row in report["rows"]
            if phase in row
        ]
    )
    if table.empty:
        return None
    kernels, tokens = (list(dict.fromkeys(table[name])) for name in ("kernel", "tokens"))
    change = alt.Scale(type="symlog", constant=LINEAR_BELOW)
    x = alt.X(
        "sparsity:Q",
        title="Tiles skipped",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="~%", values=SHARES, grid=False),
    )
    legend = alt.Legend(
        title=None, orient="bottom", columns=2, symbolFillColor=GREY, symbolStrokeWidth=0
    )
    axis = alt.Axis(format="+.1~%", values=CHANGES)
    colour = alt.Color(
        "kernel:N",
        scale=alt.Scale(domain=kernels, range=[OF_KERNEL[name] for name in kernels]),
        legend=alt.Legend(title=None, orient="top", symbolOpacity=1),
    )
    base = alt.Chart(table)
    lines = base.mark_line(
        strokeWidth=2, point=alt.OverlayMarkDef(size=45, filled=True, strokeDash=[1, 0])
    ).encode(
        x=x,
        y=alt.Y("change:Q", title="Change of perplexity", scale=change, axis=axis),
        color=colour,
        shape=alt.Shape("tokens:N", scale=alt.Scale(domain=tokens), legend=legend),
        strokeDash=alt.StrokeDash(
            "tokens:N", scale=alt.Scale(domain=tokens, range=DASHES), legend=legend
        ),
        tooltip=[
            alt.Tooltip("kernel:N"),
            alt.Tooltip("tokens:N", title="length"),
            alt.Tooltip("sparsity:Q", title="tiles skipped", format=".1%"),
            alt.Tooltip("change:Q", title="perplexity", format="+.2%"),
            alt.Tooltip("low:Q", title="95 % from", format="+.2%"),
            alt.Tooltip("high:Q", title="to", format="+.2%"),
        ],
    )
    intervals = base.mark_rule(strokeWidth=1.2, opacity=0.7).encode(
        x=x, y=alt.Y("low:Q", scale=change, axis=axis), y2="high:Q", color=colour
    )
    chart = alt.layer(intervals, lines, _rule("sparsity", target))
    ends = "; ".join(
        f"{kernel}, {name}: {signed_percent(last['change'])} at {percent(last['sparsity'])}"
        for (kernel, name), of in table.groupby(["kernel", "tokens"], sort=False)
        for last in [of.loc[of["sparsity"].idxmax()]]
    )
    return (
        chart.properties(height=380, width="container"),
        f"Perplexity against tiles skipped; at the largest share measured, {ends}.",
    )
