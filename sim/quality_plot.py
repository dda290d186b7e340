"""Quality against sparsity, drawn as SVG: every kernel and length of an evaluation.

Nothing but text is written, so no plotting library is needed.  The vertical axis is linear up to
0.1 % and logarithmic beyond, so that no change and a ruined model fit on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT = 800, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 46, 56

COLOURS = {
    "ours": "#0072B2",
    "nvidia": "#D55E00",
    "nvidia-256": "#CC79A7",
    "model-optimizer": "#009E73",
}
DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 5")
_LINEAR = 0.001
_TICKS = (-0.01, -0.001, 0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)


def quality_plot(report: Mapping[str, Any]) -> str:
    """Draw perplexity change against sparsity, in prefill.

    Parameters
    ----------
    report : mapping
        From :func:`sim.evaluation.evaluate`.

    Returns
    -------
    str
        An SVG document.
    """
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        lines.setdefault((row["kernel"], row["length"]), []).append(row["prefill"])
    lengths = sorted({length for _, length in lines})
    points = [one for of in lines.values() for one in of]
    widest = max([one["sparsity"][2] for one in points], default=0)
    changes = [x for one in points for x in one["perplexity_change"]]
    right = max(np.ceil(widest * 10) / 10, 0.1)
    low = _height(min([0.0, *changes]))
    high = max(_height(max([0.0, *changes])), _height(0.02))

    def x(sparsity: float) -> float:
        return LEFT + sparsity / right * (WIDTH - LEFT - RIGHT)

    def y(change: float) -> float:
        return HEIGHT - BOTTOM - (_height(change) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'role="img" font-family="sans-serif" font-size="13">',
        f"<title>Perplexity change against share of tiles skipped, {escape(report['model'])}"
        "</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">{escape(report["model"])}: '
        "what skipping costs</text>",
    ]
    for tick in np.linspace(0, right, round(right * 10) + 1):
        parts.append(_line(x(tick), TOP, x(tick), HEIGHT - BOTTOM, "#e3e3e3"))
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:.0%}", "middle"))
    for tick in _TICKS:
        if low <= _height(tick) <= high:
            parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "#e3e3e3"))
            parts.append(
                _text(LEFT - 8, y(tick) + 4, f"{100 * tick:+g} %" if tick else "0 %", "end")
            )
    parts.append(_line(LEFT, y(0), WIDTH - RIGHT, y(0), "#555555"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "tiles skipped", "middle"))
    parts.append(_text(LEFT, TOP - 6, "change of perplexity"))
    for number, ((kernel, length), of) in enumerate(lines.items()):
        colour = COLOURS.get(kernel, "#000000")
        dash = DASHES[lengths.index(length) % len(DASHES)]
        of = sorted(of, key=lambda one: one["sparsity"][0])
        path = " ".join(
            f"{x(one['sparsity'][0]):.1f},{y(one['perplexity_change'][0]):.1f}" for one in of
        )
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
        for one in of:
            value, lower, upper = (y(change) for change in one["perplexity_change"])
            at = x(one["sparsity"][0])
            parts.append(_line(at, lower, at, upper, colour))
            parts.append(f'<circle cx="{at:.1f}" cy="{value:.1f}" r="3" fill="{colour}"/>')
        height, start = TOP + 14 + 22 * number, WIDTH - RIGHT + 14
        parts.append(_line(start, height, start + 34, height, colour, dash, 2))
        parts.append(_text(start + 42, height + 4, f"{kernel}, {length} tokens"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _height(change: float) -> float:
    return float(np.arcsinh(change / _LINEAR))


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "", width: float = 1
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}" stroke-dasharray="{dash}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
