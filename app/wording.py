"""Numbers and results in words; every sentence about a threshold is made here and only here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NBSP = "\N{NO-BREAK SPACE}"


def plain_number(x: float) -> str:
    """Write a number with three digits.

    Examples
    --------
    >>> plain_number(0.01), plain_number(1.12e-5), plain_number(40.96)
    ('0.01', '1.12 × 10⁻⁵', '41')
    """
    if x == 0 or 1e-3 <= x < 1000:
        return f"{float(f'{x:.3g}'):g}"
    if x >= 1000:
        return f"{x:,.0f}"
    power = math.floor(math.log10(x) + 1e-9)
    mantissa = float(f"{x / 10**power:.3g}")
    tens = f"10{str(power).translate(SUPERSCRIPT)}"
    return tens if mantissa == 1 else f"{mantissa:g} × {tens}"


def code(text: str) -> str:
    """Quote text of unknown origin in Markdown, so that none of it is taken for markup.

    Examples
    --------
    >>> code("**a** `b`")
    '`` **a** `b` ``'
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {' '.join(text.split())} {fence}"


def percent(share: float) -> str:
    """Write a share with as many digits as it deserves.

    Examples
    --------
    >>> [percent(x).replace(NBSP, " ") for x in (0, 0.00001, 0.0123, 0.328, 1)]
    ['0 %', '< 0.01 %', '1.2 %', '33 %', '100 %']
    """
    value = 100 * share
    if value == 0:
        text = "0"
    elif value < 0.01:
        text = f"<{NBSP}0.01"
    elif value < 1:
        text = f"{value:.2f}".rstrip("0")
    elif value < 9.95:
        text = f"{value:.1f}"
    else:
        text = f"{value:.0f}"
    return f"{text}{NBSP}%"


def headline(
    threshold: float, sparsity: float, worst: float | None, work_ratio: float, forced: int = 0
) -> str:
    """Say what a threshold skips, costs and saves; ``**`` marks what to stress.

    Examples
    --------
    >>> headline(0.01, 0.328, None, 1.196).replace(NBSP, " ")
    '**λ = 0.01**: **33 %** of tiles skipped; about **1.2×** less matrix work.'
    >>> headline(0, 0.001, None, 1.0005, forced=1).replace(NBSP, " ")
    '**λ off, 1 tile forced**: **0.1 %** of tiles skipped; about **1×** less matrix work.'
    """
    if threshold == 0 and not forced:
        return "**λ off**: dense attention, no tile is skipped and nothing is lost."
    setting = f"λ = {plain_number(threshold)}" if threshold else "λ off"
    if forced:
        setting += f", {forced} {'tile' if forced == 1 else 'tiles'} forced"
    parts = [f"**{setting}**: **{percent(sparsity)}** of tiles skipped"]
    if worst is not None:
        parts.append(f"the worst row loses **{percent(worst)}** of its attention")
    return "; ".join([*parts, f"about **{work_ratio:.2g}×** less matrix work."])


def decode_headline(
    threshold: float, sparsity: float, worst: float, spared: float, ratio: float
) -> str:
    """Say what a threshold skips in a decode step and saves; ``**`` marks what to stress.

    Examples
    --------
    >>> said = decode_headline(0.01, 0.781, 0.1, 0.77, 1.6335).replace(NBSP, " ")
    >>> said.split("; ")[1:]
    ['one head loses **10 %** of its attention', '**77 %** of V not read: **1.63×** fewer bytes.']
    >>> decode_headline(0, 0, 0, 0, 1)
    '**λ off**: no tile is skipped, all of K and V is read.'
    """
    setting = f"**λ = {plain_number(threshold)}**" if threshold else "**λ off**"
    if not sparsity:
        return f"{setting}: no tile is skipped, all of K and V is read."
    return (
        f"{setting}: **{percent(sparsity)}** of tiles skipped; one head loses "
        f"**{percent(worst)}** of its attention; **{percent(spared)}** of V not read: "
        f"**{ratio:.3g}×** fewer bytes."
    )


def short_context(factor: float, length: int) -> str:
    """Say why a request shorter than its scale factor is computed densely."""
    threshold = plain_number(factor / length)
    return (
        f"**λ = {plain_number(factor)} ÷ {length:,} = {threshold}** is above 1: a tile that "
        "holds a row’s maximum could be skipped and the answer would be wrong, so this short "
        "request is computed **without skipping**."
    )


def amount(x: float, unit: str = "") -> str:
    """Write a count with a decimal prefix.

    Examples
    --------
    >>> [amount(x, "B").replace(NBSP, " ") for x in (12, 16384, 1.07e9)], amount(8192)
    (['12 B', '16.4 kB', '1.07 GB'], '8,192')
    """
    if not unit and x < 1e6:
        return f"{x:,.0f}"
    power = min(max(math.floor(math.log10(x) / 3), 0), 5) if x > 0 else 0
    return f"{x / 1000**power:.3g}{NBSP}{' kMGTP'[power].strip()}{unit}".rstrip()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a small table in Markdown: no table code is loaded for it, and readers hear it.

    Examples
    --------
    >>> print(table(["", "ours"], [["exp", "spared"]]))
    |  | ours |
    |---|---|
    | exp | spared |
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    rule = "|" + "---|" * len(header)
    return "\n".join([lines[0], rule, *lines[1:]]).replace(NBSP, " ")  # narrow cells must wrap


def score(x: float) -> str:
    """Write a score, a maximum or a gap.

    Examples
    --------
    >>> score(-4.6052), score(float("inf"))
    ('−4.61', '+∞')
    """
    if math.isinf(x):
        return "+∞" if x > 0 else "−∞"
    return f"{x:.2f}".replace("-", "−")


def why(state: str, gap: float, ln: float) -> str:
    """Say why a tile is in its state.

    Examples
    --------
    >>> why("skipped", -6.5, -4.6052)
    'its gap, −6.50, is below ln λ, −4.61'
    """
    if state == "masked":
        return "no query of the group sees a key of it"
    if gap == math.inf:
        return "the first tile that a group visits is never skipped"
    if ln == -math.inf:
        return f"its gap is {score(gap)}, and with λ off nothing is skipped"
    return f"its gap, {score(gap)}, is {'below' if gap < ln else 'not below'} ln λ, {score(ln)}"


def signed_percent(change: float) -> str:
    """Write a relative change.

    Examples
    --------
    >>> [signed_percent(x).replace(NBSP, " ") for x in (0.0104, -0.0003, 0)]
    ['+1.0 %', '−0.03 %', '0 %']
    """
    if change == 0:
        return percent(0)
    return ("+" if change > 0 else "−") + percent(abs(change))
