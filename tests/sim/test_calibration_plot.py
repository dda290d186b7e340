"""The picture of a calibration: what is drawn is what was measured and fitted."""

import numpy as np
import pytest
from planted import maps_of

from sim.calibration import calibrate, measure
from sim.calibration_plot import BAND, FORMULA, HEIGHT, OF_LENGTH, PANEL, calibration_plot
from sim.picture import Area, Dot, Line, Words
from sim.targets import target


def test_dots_are_the_measured_points_and_the_line_is_the_formula():
    maps = maps_of(lambda name, phase, length, text, *_: np.log(6 + length / 4096 + len(text) / 2))
    one = calibrate(maps)
    measured = {phase: measure(maps, target("ours", phase)) for phase in ("prefill", "decode")}
    picture = calibration_plot(one, measured, {"prefill": 0.4})
    assert (picture.width, picture.height) == (2 * PANEL, HEIGHT)
    assert "kernel ours, planted" in picture.title
    words = {shape.text: shape.at for shape in picture.shapes if isinstance(shape, Words)}
    assert {"prefill", "decode", "4096 tokens", "16384 tokens", "formula"} <= set(words)
    x_100, x_1000 = words["100"][0], words["1000"][0]  # of the right panel, drawn last
    y_of = {share: words[share][1] - 4 for share in ("0%", "100%")}

    def factor_at(x: float) -> float:
        return 10 ** (2 + (x - x_100) / (x_1000 - x_100))

    of_decode = [one for one in picture.shapes if right_of(one, PANEL)]
    dots = [one for one in of_decode if isinstance(one, Dot) and one.colour == OF_LENGTH[1]]
    long = np.array([sample.length for sample in measured["decode"].samples]) == 16384
    share = measured["decode"].sparsity[long].mean((0, 1, 2))
    factor = measured["decode"].thresholds * 16384
    drawn = [
        (
            factor_at(dot.centre[0]),
            (y_of["0%"] - dot.centre[1]) / (y_of["0%"] - y_of["100%"]),
        )
        for dot in dots
    ]
    expected = [*zip(factor, share, strict=True)][-len(drawn) :]
    assert len(drawn) > 5
    np.testing.assert_allclose(drawn, expected, rtol=1e-6, atol=1e-9)

    (line,) = [one for one in of_decode if isinstance(one, Line) and one.width == 3]
    assert line.colour == FORMULA
    fit = one.phases["decode"].fit
    for point, wanted in zip((line.points[0], line.points[-1]), fit.range, strict=True):
        assert factor_at(point[0]) == pytest.approx(fit.scale_factor(wanted))
    assert [one.colour for one in of_decode if isinstance(one, Area)] == [BAND]
    for shape in picture.shapes:  # nothing leaves the sheet
        for x, y in getattr(shape, "points", []):
            assert 0 <= x <= picture.width
            assert 0 <= y <= picture.height


def right_of(shape: object, x: float) -> bool:
    points = getattr(shape, "points", None) or [getattr(shape, "centre", (0, 0))]
    return all(point[0] > x for point in points)


def test_one_text_has_no_band():
    maps = maps_of(lambda *_: 2.0, texts=("one",), phases=("prefill",))
    one = calibrate(maps)
    picture = calibration_plot(one, {"prefill": measure(maps, target("ours", "prefill"))}, {})
    assert picture.width == PANEL
    assert not [shape for shape in picture.shapes if isinstance(shape, Area)]
