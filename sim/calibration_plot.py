"""What a calibration rests on, as a picture: sparsity against scale factor, and the formula."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sim.calibration import Calibration, Measured, PhaseCalibration
from sim.picture import Area, Dot, Line, Picture, Shape, Words
from sim.quality_plot import GRID

PANEL, HEIGHT = 460, 420
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 78, 92
LEAST = 0.01
"""Of tiles skipped: factors that skip less at every length are left out."""

OF_LENGTH = ("#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#B87A00", "#8A6BBF")
FORMULA, BAND, RULE = "#D55E00", "#F6D9C7", "#888888"
_STEPS = 41


def calibration_plot(
    calibration: Calibration,
    measured: Mapping[str, Measured],
    target_sparsity: Mapping[str, float],
) -> Picture:
    """Draw, for each phase, what every length skips at each factor, and the formula with its band.

    Parameters
    ----------
    calibration : Calibration
    measured : mapping
        Phase → what :func:`sim.calibration.measure` gives for the calibration's targets.
    target_sparsity : mapping
        Phase → target, where a rule is drawn.

    Returns
    -------
    Picture
        A panel a phase; the band is the 95 % interval over texts, and absent with one text.
    """
    model = "".join(c for c in calibration.card.get("model", "") if c.isprintable())
    title = f"Tiles skipped against scale factor, kernel {calibration.kernel}"
    picture = Picture(PANEL * len(measured), HEIGHT, f"{title}, {model}" if model else title)
    picture.shapes.append(Words((LEFT, 24), picture.title, size=15))
    for number, (phase, one) in enumerate(measured.items()):
        picture.shapes += _panel(
            PANEL * number, one, calibration.phases[phase], target_sparsity.get(phase)
        )
    return picture


def _panel(
    left: float, measured: Measured, made: PhaseCalibration, target: float | None
) -> list[Shape]:
    lengths = np.array([sample.length for sample in measured.samples])
    curves = {
        length: (
            np.log10(measured.thresholds * length),
            measured.sparsity[lengths == length].mean((0, 1, 2)),
        )
        for length in made.lengths
    }
    fit = made.fit
    shown = [at[share >= LEAST] for at, share in curves.values()]
    shown.append(np.log10([fit.scale_factor(share) for share in fit.range]))
    low, high = np.concatenate(shown).min(), np.concatenate(shown).max()

    def x(log_factor: float) -> float:
        return left + LEFT + (log_factor - low) / (high - low) * (PANEL - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    start, end = left + LEFT, left + PANEL - RIGHT
    shapes: list[Shape] = [Words((start, TOP - 26), made.target.phase)]
    shapes.append(Words((start, TOP - 8), "tiles skipped"))
    for tick in range(math.ceil(low), math.floor(high) + 1):
        shapes.append(Line([(x(tick), y(0)), (x(tick), y(1))], GRID))
        shapes.append(Words((x(tick), y(0) + 18), f"{10.0**tick:g}", "middle"))
    for share in (0, 0.25, 0.5, 0.75, 1):
        shapes.append(Line([(start, y(share)), (end, y(share))], GRID))
        shapes.append(Words((start - 8, y(share) + 4), f"{share:.0%}", "end"))
    shapes.append(Words(((start + end) / 2, y(0) + 36), "scale factor", "middle"))
    shares = np.linspace(*fit.range, _STEPS).tolist()
    ends = [one for one in map(fit.interval, shares) if one is not None]
    if ends:
        sides = [[x(math.log10(one[side])) for one in ends] for side in (0, 1)]
        outline = [*zip(sides[0], map(y, shares), strict=True)]
        outline += [*zip(sides[1], map(y, shares), strict=True)][::-1]
        shapes.append(Area([(min(max(at, start), end), height) for at, height in outline], BAND))
    if target is not None:
        shapes.append(Line([(start, y(target)), (end, y(target))], RULE))
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number, (length, (at, share)) in enumerate(curves.items()):
        colour = OF_LENGTH[number % len(OF_LENGTH)]
        names[f"{length} tokens"] = colour, ()
        path = [(x(f), y(s)) for f, s in zip(at.tolist(), share.tolist(), strict=True) if f >= low]
        if len(path) > 1:
            shapes.append(Line(path, colour, 2))
        shapes += [Dot(point, 3, colour) for point in path]
    names["formula"] = FORMULA, (7, 4)
    path = [(x(math.log10(fit.scale_factor(share))), y(share)) for share in shares]
    shapes.append(Line(path, FORMULA, 3, (7, 4)))
    for number, (name, (colour, dash)) in enumerate(names.items()):
        at_x, at_y = start + 130 * (number % 3), y(0) + 58 + 18 * (number // 3)
        shapes.append(Line([(at_x, at_y), (at_x + 30, at_y)], colour, 2, dash))
        shapes.append(Words((at_x + 36, at_y + 4), name))
    return shapes
