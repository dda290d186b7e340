"""Quality against sparsity: every kernel and length of an evaluation in one picture.

The vertical axis is linear up to 0.1 % and logarithmic beyond, so that no change and a ruined model
fit on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sim.picture import Dot, Line, Picture, Words

WIDTH, HEIGHT = 800, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 46, 56

COLOURS = {
    "ours": "#0072B2",
    "nvidia": "#D55E00",
    "nvidia-256": "#CC79A7",
    "model-optimizer": "#009E73",
}
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 4), (2, 3), (9, 3, 2, 3), (1, 5))
GRID = "#e3e3e3"
_LINEAR = 0.001
_TICKS = (-0.01, -0.001, 0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)


def quality_plot(report: Mapping[str, Any]) -> Picture:
    """Draw perplexity change against sparsity, in prefill.

    Parameters
    ----------
    report : mapping
        From :func:`sim.evaluation.evaluate`.

    Returns
    -------
    Picture
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

    title = f"Perplexity change against share of tiles skipped, {report['model']}"
    picture = Picture(WIDTH, HEIGHT, title)
    draw = picture.shapes.append
    draw(Words((LEFT, 22), f"{report['model']}: what skipping costs", size=15))
    for tick in np.linspace(0, right, round(right * 10) + 1).tolist():
        draw(Line([(x(tick), TOP), (x(tick), HEIGHT - BOTTOM)], GRID))
        draw(Words((x(tick), HEIGHT - BOTTOM + 18), f"{tick:.0%}", "middle"))
    for tick in _TICKS:
        if low <= _height(tick) <= high:
            draw(Line([(LEFT, y(tick)), (WIDTH - RIGHT, y(tick))], GRID))
            label = f"{100 * tick:+g} %" if tick else "0 %"
            draw(Words((LEFT - 8, y(tick) + 4), label, "end"))
    draw(Line([(LEFT, y(0)), (WIDTH - RIGHT, y(0))], "#555555"))
    draw(Words(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), "tiles skipped", "middle"))
    draw(Words((LEFT, TOP - 6), "change of perplexity"))
    for number, ((kernel, length), of) in enumerate(lines.items()):
        colour = COLOURS.get(kernel, "#000000")
        dash = DASHES[lengths.index(length) % len(DASHES)]
        of = sorted(of, key=lambda one: one["sparsity"][0])
        path = [(x(one["sparsity"][0]), y(one["perplexity_change"][0])) for one in of]
        draw(Line(path, colour, 2, dash))
        for one in of:
            value, lower, upper = (y(change) for change in one["perplexity_change"])
            at = x(one["sparsity"][0])
            draw(Line([(at, lower), (at, upper)], colour))
            draw(Dot((at, value), 3, colour))
        height, start = TOP + 14 + 22 * number, WIDTH - RIGHT + 14
        draw(Line([(start, height), (start + 34, height)], colour, 2, dash))
        draw(Words((start + 42, height + 4), f"{kernel}, {length} tokens"))
    return picture


def _height(change: float) -> float:
    return float(np.arcsinh(change / _LINEAR))
