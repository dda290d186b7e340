"""The calibrate page in words: its sentences, its tables, and what its terms mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.wording import NBSP, percent, plain_number, signed_percent, table
from sim.calibration import Fit, Miss, PhaseCalibration
from sim.threshold import from_scale_factor

HEAD_DIM_UNKNOWN = (
    "These gap maps do not say the model’s head_dim, and what NVIDIA’s prefill kernel on Hopper "
    "decides on depends on it: 64 × 128 at 72 to 128 (nvidia), 64 × 256 at 32 to 64, as SmolLM2 "
    "has (nvidia-256). Take this setting for an example: capture a model anew before you serve it."
)
"""Beside an export of which nobody can say whether it is for the right grid."""

EXPLANATION = """
**What is looked for.** Skip Softmax skips a tile if its *gap* is below ln λ, so λ, the *threshold*,
decides how much is skipped; larger skips more. The longer a text, the smaller a λ will do, so
engines are given a `threshold_scale_factor` instead: λ = threshold_scale_factor ÷ KV length of the
request. Calibration asks which factor skips the share of tiles that is wanted.

**Sparsity** is skipped ÷ visited tiles; first tiles count as visited. Other papers count otherwise.

**How it is found.** The *gap map* of a text holds the gap of every tile: the largest score in it
minus the running maximum, for the row of its vote group where that difference is largest. So one
run of the model gives the sparsity of every threshold at once. Each text and each of 20 thresholds
is a point; points between 10 and 90 % are fitted by threshold_scale_factor = a · exp(b · sparsity),
by least squares on the factor’s logarithm (*log*), or on the factor itself (*linear*, Model
Optimizer’s default, where the largest factors count most).

**The band** is a 95 % interval: the fit is repeated on texts drawn with replacement. It says how
far other texts of this kind would move the formula, and is too narrow with few texts. It does not
say how well the formula fits each length or layer: that is what the other lines are for. Outside
the range that was fitted there is no formula, and this page gives no factor.

**Why the kernel matters.** A tile is skipped only if every row of its *vote group* agrees, in
prefill 64 or 128 consecutive query rows, in decode one row or the heads of a GQA group; and the
running maximum depends on the *visit order*. The *decision grid* (vote rows × keys), the order and
the vote are those of one kernel, and a factor means something else on another.

**λ above 1.** On a request shorter than its factor, λ exceeds 1: then a tile that holds a row’s
maximum could be skipped, and answers go wrong. The kernels here compute such a request densely.
"""

BEYOND = (8192, 32_768, 131_072)
"""KV lengths for which λ is told though no text is so long."""


def factor_line(one: PhaseCalibration, target: float, factor: float) -> str:
    """Say which factor a target needs."""
    interval = one.fit.interval(target)
    span = ""
    if interval is not None:
        span = " (95 % over texts: {} to {})".format(*map(plain_number, interval))
    return f"`threshold_scale_factor` **{plain_number(factor)}**{span}"


def out_of_range(fit: Fit, target: float) -> str:
    """Say why a target has no factor."""
    low, high = map(percent, fit.range)
    return (
        f"No factor: the formula was fitted on {low} to {high} of tiles skipped, and says nothing "
        f"about {percent(target)}."
    )


def formula_line(one: PhaseCalibration) -> str:
    """Give the formula, and what it rests on."""
    fit, texts = one.fit, len(one.texts)
    low, high = map(percent, fit.range)
    return (
        f"threshold_scale_factor = {plain_number(fit.a)} · exp({fit.b:.3g} · sparsity), from {low} "
        f"to {high}; R² = {fit.r_squared:.3f}, {fit.points} points of {texts} "
        f"{'text' if texts == 1 else 'texts'}"
    )


def layers_line(one: PhaseCalibration) -> str:
    """Say how far layers lie from the formula; empty for a single layer."""
    known = [(row.mean, row.group) for row in one.by_layer if row.mean is not None]
    if len(known) < 2:
        return ""
    (least, low), (most, high) = min(known), max(known)
    return (
        f"Layers differ: from layer {low}, {_points(least)} than the formula says, to layer "
        f"{high}, {_points(most)}."
    )


def _points(difference: float) -> str:
    count = f"{abs(100 * difference):.0f} points"
    return f"{count} {'more' if difference >= 0 else 'less'}"


def lengths_table(rows: Sequence[Mapping[str, Any]], factor: float, kernel: str) -> str:
    """Write what a factor means, and skips, at each KV length.

    Parameters
    ----------
    rows : sequence of mapping
        From :func:`app.command_calibrate.at_lengths`.
    factor : float
    kernel : str
        Whose decisions; where λ > 1, ours compute densely, others may skip what matters.
    """
    lines = []
    for row in rows:
        skipped = ["dense" if kernel == "ours" else "answers go wrong", "–"]
        if not row["above_one"]:
            skipped = [percent(row["achieved"]), _span(row["lowest"], row["highest"])]
        lines.append([f"{row['length']:,}", _threshold(row["threshold"]), *skipped])
    for length in (n for n in BEYOND if n > rows[-1]["length"]):
        threshold = float(from_scale_factor(factor, length))
        lines.append([f"{length:,}", _threshold(threshold), "not measured", "–"])
    return table(["KV length", "λ", "tiles skipped", "text by text"], lines)


def _threshold(threshold: float) -> str:
    return plain_number(threshold) + (", **above 1**" if threshold > 1 else "")


def _span(low: float, high: float) -> str:
    return f"{percent(low).removesuffix(f'{NBSP}%')}–{percent(high)}"


def above_one_line(factor: float) -> str:
    """Say on which requests λ exceeds 1."""
    shortest = math.ceil(factor)
    return (
        f"λ exceeds 1 on requests shorter than {shortest:,} tokens: the kernels here compute them "
        "densely; where an engine skips regardless, answers go wrong."
    )


def miss_text(rows: Sequence[Miss], named: Mapping[str, str]) -> str:
    """Write how far a target set on one kernel's decisions misses on another's.

    Parameters
    ----------
    rows : sequence of Miss
    named : mapping
        Kernel → its decision grid, visit order and vote.
    """
    kernels = list(rows[0].achieved)
    lines = [
        [
            f"**{row.kernel}**: "
            + ("none" if row.scale_factor is None else plain_number(row.scale_factor)),
            *(_achieved(row.achieved[kernel], kernel == row.kernel) for kernel in kernels),
        ]
        for row in rows
    ]
    header = ["factor set on", *(f"skips on {kernel}" for kernel in kernels)]
    key = "; ".join(f"**{kernel}**: {named[kernel]}" for kernel in kernels)
    reasons = [
        f"None on {row.kernel}: {row.why_not.partition('; from Python')[0]}."
        for row in rows
        if row.why_not
    ]
    return "\n\n".join([table(header, lines), *reasons, f"{key}."])


def _achieved(share: float | None, own: bool) -> str:
    if share is None:
        return "–"
    return f"**{percent(share)}**" if own else percent(share)


def skippable_table(entries: Iterable[Mapping[str, Any]]) -> str:
    """Write how much can be skipped before the perplexity moves.

    Parameters
    ----------
    entries : iterable of mapping
        ``answers["skippable"]`` of :func:`sim.evaluation_report.report_of`.
    """
    entries = list(entries)
    changes = [one["perplexity_change"] for one in entries[0]["changes"]]
    lines = [
        [entry["kernel"], f"{entry['length']:,}", *map(_reached, entry["changes"])]
        for entry in entries
    ]
    return table(["kernel", "tokens", *(f"until {signed_percent(one)}" for one in changes)], lines)


def _reached(change: Mapping[str, Any]) -> str:
    value, low, high = map(percent, change["sparsity"])
    low, high = (end.removesuffix(f"{NBSP}%") for end in (low, high))
    return f"{'' if change['reached'] else 'more than '}{value} ({low}–{high})"


def run_line(report: Mapping[str, Any]) -> str:
    """Say where and when an evaluation was recorded, with what."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [f"{report['model']}, {len(report['texts'])} held-out texts, {report['date']}"]
    parts += [report["machine"]] if "machine" in report else []
    parts.append(versions)
    note = f" {report['note']}" if report.get("note") else ""
    return "; ".join(parts) + "." + note
