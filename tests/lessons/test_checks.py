"""What a check says about results that are not merely inaccurate."""

import doctest

import numpy as np
import pytest

from cuda_kernels.emulator.timeline import Event
from lessons import catalogue, checks, helpers, pictures
from lessons.helpers import Stop


def good(scores):
    m = np.where(np.isinf(scores.max(-1, keepdims=True)), 0, scores.max(-1, keepdims=True))
    p = np.exp(scores - m)
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def raises(scores):
    return scores[:, 99]


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda scores: None, "weights is None"),
        (lambda scores: good(scores)[0], r"weights has shape \(7,\), expected \(3, 7\)"),
        (lambda scores: good(scores) * np.nan, r"max \|Δ\| = inf, budget 1e-12, worst at \(0, 0\)"),
        (lambda scores: (good(scores), 1), "must return weights"),
        (lambda scores: "weights", "weights must be an array of numbers, got str"),
        (raises, r"raised IndexError: .*\n   in line \d+: return scores\[:, 99\]"),
        (lambda scores: good(scores) + 1e-9, r"max \|Δ\| = 1e-09, budget 1e-12"),
    ],
)
def test_first_fault(fn, said, capsys):
    assert checks.check_softmax(fn, strict=False) is False
    shown = capsys.readouterr().out
    with pytest.raises(
        Stop, match=rf"^❌ .*: case 1 of 6: ordinary scores, seed 0.*\n   (weights: )?{said}"
    ):
        checks.check_softmax(fn, strict=True)
    assert shown.count("❌") == 1
    assert "   hint: " in shown


def test_a_program_is_strict():
    with pytest.raises(Stop):
        checks.check_softmax(raises)


def test_good_passes(capsys):
    assert checks.check_softmax(good) is True
    assert capsys.readouterr().out == "✅ 6/6 cases: good\n"


def test_a_function_cannot_change_what_it_is_judged_by():
    def overwrites(scores):
        result = good(scores)
        scores[:] = 0
        return result

    assert checks.check_softmax(overwrites)


def test_results_of_wrong_number(capsys):
    assert not checks.check_attention(lambda q, k, v, scale: q, strict=False)
    assert "must return output, weights" in capsys.readouterr().out


def test_todo_is_not_taken_for_a_fault():
    with pytest.raises(Stop, match=r"^To do in tests/lessons/test_checks\.py:\d+\n  think$"):
        checks.check_softmax(lambda scores: helpers.todo("think"), strict=False)


def test_stop_has_no_traceback_in_a_notebook():
    assert Stop("one message")._render_traceback_() == ["one message"]


def test_reveal_answers_a_prediction_and_asks_for_one(capsys):
    helpers.reveal(12, 53.789, "per cent")
    assert capsys.readouterr().out == "You predicted 12; it is 53.79 per cent.\n"
    helpers.reveal(None, 53.789, "per cent")
    asked = capsys.readouterr().out
    assert asked.startswith("Predict first (per cent)")
    assert "53" not in asked


def test_a_program_that_fails_in_the_simulator_stops(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(helpers, "OUTPUT", tmp_path)

    def breaks(x):
        return {"y": 1 / x}

    monkeypatch.setattr(helpers.inspect, "getsource", lambda one: "def breaks(x):\n    1 / x\n")
    with pytest.raises(Stop, match=r"(?s)^❌ .*breaks\.py failed in Numba's CUDA simulator:.*Zero"):
        helpers.run_in_cuda_simulator(breaks, x=0)


def test_pictures():
    picture = pictures.weights_by_word(np.eye(3), ["a", "\n", "word"], cell=10)
    pixel = [picture.getpixel((130 + 10 * j + 4, 130 + 10 * i + 4)) for i, j in np.ndindex(3, 3)]
    blue, white, grey = (0x00, 0x72, 0xB2), (255, 255, 255), (0xEE, 0xEE, 0xEE)
    assert pixel == [blue, grey, grey, white, blue, grey, white, white, blue]
    two = pictures.categories(np.array([[0, 1]]), ["#000000", "#ffffff"], cell=2)
    assert np.asarray(two)[:, :, 0].tolist() == [[0, 0, 255, 255]] * 2
    ones = pictures.numbers(np.array([[0, 1]]), [(0, 0, 0), (1, 0, 0)], cell=24)
    assert [ones.getpixel((24 * j + 1, 1)) for j in range(2)] == [(0, 0, 0), (255, 0, 0)]
    sheet = pictures.side_by_side([two, two], ["left", "right"])
    assert sheet.size == (2 * 192, 2 + 26)
    series = [("a", np.array([1.0, 100]), np.array([50.0, 50])), ("b", np.array([10.0]), [500.0])]
    axes = pictures.chart(series, ("x", "y"), log_x=True, x_range=(1, 100))
    assert axes.size == (64 + 560 + 24, 64 + 320 + 48)
    middle = 64 + 160
    on_the_line = [axes.getpixel((64 + 560 // 3, y)) for y in (middle, middle + 10, 64 + 2)]
    assert on_the_line == [blue, white, white], "and what lies outside is not drawn"
    bars = pictures.bars_under_line(np.array([1.0, 3.0]), np.array([3.0, 3.0]), ("bars", "line"))
    top = [bars.getpixel((30 + 20 * i + 10, 60)) for i in range(2)]
    assert top == [white, blue]


def test_the_timeline_shows_what_was_done_and_what_was_not():
    def event(name, start, end, tile, warp=0):
        return Event((0, 0, 0), warp, name, start, end, tile, "")

    events = [
        event("wgmma_ss", 0, 100, 0), event("wgmma_ss", 100, 200, 0),
        event("row_max", 200, 300, 0), event("exp2_rows", 300, 400, 0),
        event("wgmma_rs", 350, 450, 0, warp=4), event("barrier 1", 900, 1000, 1),
        event("shfl_bfly_f32", 500, 900, 1),
    ]  # fmt: skip
    shown = pictures.timeline(events, {"one": 0, "other": 4}, {"one": {0}}, width=1000)
    at = {x: [shown.getpixel((80 + x, y)) for y in (68, 86)] for x in (5, 105, 250, 350, 700, 950)}
    white, blue, grey = (255, 255, 255), (0x00, 0x72, 0xB2), (0xD0, 0xD0, 0xD0)
    yellow, pink = (0xF0, 0xE4, 0x42), (0xCC, 0x79, 0xA7)
    assert at[5] == at[105] == [blue, white]
    first_half = np.asarray(shown)[67:80, 81:160].reshape(-1, 3)
    assert {tuple(pixel) for pixel in first_half.tolist()} == {blue}, "one bar, one number"
    assert [at[x][1] for x in (250, 350, 700, 950)] == [yellow, pink, white, grey]
    plain = pictures.timeline(events, {"one": 0, "other": 4}, {}, width=1000)
    differ = np.argwhere((np.asarray(shown) != np.asarray(plain)).any(axis=2))
    assert 350 < differ[:, 1].mean() < 410, "the tile that is skipped is named behind its maxima"
    assert pictures.overlap(events, ["exp2_rows"], ["wgmma_ss", "wgmma_rs"]) == 0.5


def test_examples():
    assert doctest.testmod(catalogue) == (0, 1)
