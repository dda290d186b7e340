"""Fits against normal equations and planted formulas; calibrations and their files."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import maps_of

from sim.calibration import (
    KEPT,
    TRIALS,
    achieved,
    calibrate,
    fit,
    measure,
    miss_table,
)
from sim.calibration_file import (
    CalibrationError,
    from_json,
    read_calibration,
    to_json,
    write_calibration,
)
from sim.gap_maps import GapMaps
from sim.targets import KERNELS, TARGETS, targets_of

TENTHS = np.arange(1, 10) / 10
PUBLISHED = {  # TensorRT-LLM, tech blog 16: Qwen3-30B-A3B-Instruct-2507, targets 0.1 … 0.9
    "prefill": [18.76, 44.37, 104.97, 248.40, 587.18, 1390.63, 3293.04, 7799.91, 18471.56],
    "decode": [0.32, 0.86, 2.30, 6.17, 16.52, 44.26, 118.62, 317.99, 852.20],
}


def noisy(seed: int = 0, size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.1, 0.9, size)
    return s, 5 * np.exp(7 * s + rng.normal(0, 0.3, size))


# The fit


@pytest.mark.parametrize("space", ["log", "linear"])
@pytest.mark.parametrize(("phase", "a", "b"), [("prefill", 7.92, 8.615), ("decode", 0.1196, 9.857)])
def test_published_table(phase: str, a: float, b: float, space: str) -> None:
    one = fit(TENTHS, PUBLISHED[phase], space=space)
    # Decode factors are published to two digits only, which log space weighs like the others.
    assert one.a == pytest.approx(a, rel=2e-3 if (phase, space) == ("prefill", "log") else 1e-2)
    assert one.b == pytest.approx(b, rel=2e-3)
    assert one.r_squared > 0.9999
    assert one.range == (0.1, 0.9)
    for target, factor in zip(TENTHS, PUBLISHED[phase], strict=True):
        assert one.scale_factor(target) == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_normal_equations(seed: int) -> None:
    s, f = noisy(seed)
    log = fit(s, f)
    off = np.log(f) - np.log(log.a) - log.b * s
    assert abs(off.sum()) < 1e-9
    assert abs((off * s).sum()) < 1e-9
    assert log.r_squared == pytest.approx(1 - off.var() / np.log(f).var())
    linear = fit(s, f, space="linear")
    e = np.exp(linear.b * s)
    off = f - linear.a * e
    assert abs((off * e).sum()) < 1e-6 * (f * e).sum()
    assert abs((off * s * e).sum()) < 1e-6 * (f * s * e).sum()
    assert linear.r_squared == pytest.approx(1 - (off**2).sum() / ((f - f.mean()) ** 2).sum())


def test_linear_space_is_the_global_minimum() -> None:
    s, f = noisy(7, 12)
    one = fit(s, f, space="linear")
    best = ((f - one.a * np.exp(one.b * s)) ** 2).sum()
    a, b = np.meshgrid(np.geomspace(1e-3, 1e4, 400), np.linspace(0, 20, 400))
    errors = ((f - a[..., None] * np.exp(b[..., None] * s)) ** 2).sum(axis=-1)
    assert best <= errors.min()


def test_the_largest_factors_rule_linear_space() -> None:
    f = 5 * np.exp(7 * TENTHS)
    low, high = f.copy(), f.copy()
    low[0] *= 2
    high[-1] *= 2
    plain = 5 * np.exp(7 * 0.5)

    def moved(factors: np.ndarray, space: str) -> float:
        return abs(fit(TENTHS, factors, space=space).scale_factor(0.5) / plain - 1)

    assert moved(low, "linear") < 1e-3 < 0.05 < moved(low, "log")
    assert moved(high, "log") < 0.1 < 0.2 < moved(high, "linear")


@pytest.mark.parametrize("space", ["log", "linear"])
def test_b_is_at_most_20(space: str) -> None:
    one = fit(TENTHS, np.exp(30 * TENTHS), space=space)
    assert one.b == pytest.approx(20, abs=1e-6)
    assert one.r_squared < 1


@pytest.mark.parametrize("space", ["log", "linear"])
def test_sparsity_that_falls_is_refused(space: str) -> None:
    with pytest.raises(ValueError, match="must grow with scale_factor"):
        fit(TENTHS, np.exp(-TENTHS), space=space)


@pytest.mark.parametrize(
    ("sparsity", "factor", "message"),
    [
        ([0.1, 0.2], [1, 2], "at least 3 points"),
        ([0.3, 0.3, 0.3], [1, 2, 3], "more than one sparsity"),
        ([0.1, 0.2, 1.2], [1, 2, 3], "sparsity must lie"),
        ([0.1, 0.2, np.nan], [1, 2, 3], "sparsity must lie"),
        ([0.1, 0.2, 0.3], [0, 2, 3], "above 0"),
        ([0.1, 0.2, 0.3], [1, np.inf, 3], "finite"),
        ([0.1, 0.2, 0.3], [1, 2], "one length"),
    ],
)
def test_bad_points(sparsity: list[float], factor: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(sparsity, factor)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="space must be one of log, linear, got 'cubic'"):
        fit(*noisy(), space="cubic")
    with pytest.raises(ValueError, match="must name each of 40 points, got 2"):
        fit(*noisy(), sample=["a", "b"])


def test_no_silent_extrapolation() -> None:
    one = fit([0.2, 0.3, 0.6], np.exp([2, 3, 6]))
    for target in (0.19, 0.61, 1.0):
        with pytest.raises(ValueError, match=r"between 0.2 and 0.6"):
            one.scale_factor(target)
        assert one.scale_factor(target, extrapolate=True) == pytest.approx(np.exp(10 * target))
    for factor in (np.exp(1.9), np.exp(6.1)):
        with pytest.raises(ValueError, match=r"between 0.2 and 0.6"):
            one.sparsity(factor)
    assert one.scale_factor(0) == 0
    assert one.sparsity(0) == 0
    assert one.sparsity(np.exp(50), extrapolate=True) == 1
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            one.scale_factor(bad, extrapolate=True)


@pytest.mark.parametrize("target", [0.1, 0.37, 0.9])
def test_inverse(target: float) -> None:
    one = fit(TENTHS, PUBLISHED["prefill"])
    assert one.sparsity(one.scale_factor(target)) == pytest.approx(target)


# The bootstrap


def covered(by_text: bool, space: str = "log", trials: int = 120) -> tuple[float, float]:
    """Share of 95 % intervals that hold the truth, and their mean width in ln factor."""
    hits, widths = 0, []
    rng = np.random.default_rng(1)
    for _ in range(trials):
        s = np.tile(np.linspace(0.15, 0.85, 8), 15)
        text = np.repeat(np.arange(15), 8)
        noise = rng.normal(0, 0.4, 15)[text] + rng.normal(0, 0.05, s.size)
        labels = text if by_text else np.arange(s.size)
        one = fit(s, 5 * np.exp(7 * s + noise), space=space, sample=labels.tolist(), draws=120)
        low, high = one.interval(0.5) or (0, 0)
        hits += low <= 5 * np.exp(3.5) <= high
        widths.append(np.log(high / low))
    return hits / trials, float(np.mean(widths))


def test_intervals_cover() -> None:
    share, width = covered(by_text=True)
    assert 0.85 <= share <= 0.99
    assert width == pytest.approx(2 * 1.96 * 0.4 / np.sqrt(15), rel=0.15)  # theirs, by theory


def test_points_of_one_text_are_not_independent() -> None:
    share, _ = covered(by_text=False)
    assert share < 0.7


def test_bootstrap_is_seeded_and_needs_two_texts() -> None:
    s, f = noisy()
    labels = [i % 4 for i in range(40)]
    one, same, other = (fit(s, f, sample=labels, draws=20, seed=n) for n in (0, 0, 1))
    assert one == same != other
    assert len(one.draws) == 20
    alone = fit(s, f, sample=["only"] * 40)
    assert alone.draws == ()
    assert alone.interval(0.5) is None
    assert alone.coefficient_intervals() is None
    linear = fit(s, f, sample=labels, draws=20, space="linear")
    intervals = linear.coefficient_intervals()
    assert intervals is not None
    for (low, high), value in zip(intervals, (linear.a, linear.b), strict=True):
        assert low < value < high


# Points from gap maps


def flat(*_: object) -> float:
    return float(np.log(6.0))


@pytest.fixture(scope="module")
def plain() -> GapMaps:
    return maps_of(flat)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("space", ["log", "linear"])
def test_planted_formula_is_found(plain: GapMaps, kernel: str, space: str) -> None:
    one = calibrate(plain, kernel, space=space)
    for phase in ("prefill", "decode"):
        made = one.phases[phase]
        assert made.target == TARGETS[kernel, phase]
        assert made.fit.a == pytest.approx(6, rel=0.02)
        assert made.fit.b == pytest.approx(8, rel=0.005)
        assert made.fit.r_squared > 0.9999
        assert KEPT[0] <= made.fit.range[0] < 0.2
        assert 0.7 < made.fit.range[1] <= KEPT[1]
        assert made.lengths == (4096, 16384)
        assert made.texts == ("one", "two", "three")
    assert one.card == {"model": "planted"}


def test_measure_counts_gaps_below_ln_threshold(plain: GapMaps) -> None:
    target = TARGETS["nvidia", "decode"]
    measured = measure(plain, target)
    assert measured.sparsity.shape == (6, 2, 2, 20)
    assert measured.votes == ("KV head 0", "KV head 1")
    for i, sample in enumerate(measured.samples):
        gaps = plain.gaps(target, sample, 7)
        for j, lam in enumerate(TRIALS):
            expected = (gaps[1] < np.float32(np.log(lam))).mean()
            assert measured.sparsity[i, 1, 1, j] == expected
        assert measured.scale_factor[i].tolist() == [lam * sample.length for lam in TRIALS]


def test_a_gap_of_exactly_ln_threshold_is_kept(plain: GapMaps) -> None:
    target, lam = TARGETS["ours", "prefill"], 0.5
    at = np.log(np.float64(lam)).astype(np.float32)
    gap = np.array([np.nextafter(at, np.float32(-9)), at, at, np.inf], np.float32)
    arrays = {
        (sample.name, "ours"): (np.broadcast_to(gap, (2, 4, 4)), np.full((2, 4, 4), 0.25))
        for sample in plain.samples
    }
    tied = replace(plain, arrays=arrays)
    assert (measure(tied, target, [lam]).sparsity == 0.25).all()
    assert (achieved(tied, target, lam * 4096)[0] == 0.25).all()  # samples[0] has 4096 tokens


def test_only_10_to_90_percent_is_kept(plain: GapMaps) -> None:
    measured = measure(plain, TARGETS["ours", "prefill"])
    points = measured.points()
    mean = measured.sparsity.mean(axis=(1, 2))
    inside = (mean >= 0.1) & (mean <= 0.9)
    assert 0 < inside.sum() < inside.size
    assert np.array_equal(points.sparsity, mean[inside])
    assert points.text[0] == "one"
    assert set(points.length) == {4096, 16384}


def test_counts_calibrate_alike(plain: GapMaps) -> None:
    counted = plain.counted()
    one, same = (calibrate(maps, "ours").phases["prefill"] for maps in (plain, counted))
    assert one.fit == same.fit
    with pytest.raises(ValueError, match=r"hold counts, and not at threshold 0.123"):
        measure(counted, TARGETS["ours", "prefill"], [0.123])
    with pytest.raises(ValueError, match="above 1"):
        measure(plain, TARGETS["ours", "prefill"], [0.1, 1.5])


def test_residuals_say_which_length_and_layer_differ() -> None:
    shift = 0.4

    def ln_a(_: str, phase: str, length: int, text: str, layer: int, row: int) -> float:
        return shift * (1 if length == 16384 else -1) + (shift / 2 if layer == 7 else -shift / 2)

    made = calibrate(maps_of(ln_a, b=8.0, phases=("prefill",))).phases["prefill"]
    short, long = made.by_length
    # a higher a needs a larger factor for as much: less is skipped than the formula says
    assert (short.group, long.group) == (4096, 16384)
    assert short.mean == pytest.approx(shift / 8, abs=0.01)
    assert long.mean == pytest.approx(-shift / 8, abs=0.01)
    first, last = made.by_layer
    assert (first.group, last.group) == (0, 7)
    assert first.mean is not None
    assert last.mean is not None
    assert first.mean - last.mean == pytest.approx(shift / 8, abs=0.01)
    assert short.worst is not None
    assert abs(short.worst) >= abs(short.mean or 1)
    assert short.points + long.points == made.fit.points


def test_a_length_outside_the_kept_range_is_named() -> None:
    def ln_a(_: str, phase: str, length: int, text: str, layer: int, row: int) -> float:
        return 30.0 if length == 64 else 1.0

    made = calibrate(maps_of(ln_a, lengths=(64, 4096), phases=("prefill",))).phases["prefill"]
    assert asdict(made.by_length[0]) == {"group": 64, "mean": None, "worst": None, "points": 0}


def test_layers_and_heads_have_their_own_fits() -> None:
    def ln_a(_: str, phase: str, length: int, text: str, layer: int, row: int) -> float:
        return 40.0 if (layer, row) == (7, 3) else np.log(2.0 + layer + 10 * row)

    maps = maps_of(ln_a, phases=("prefill",))
    assert calibrate(maps).phases["prefill"].parts == ()
    parts = calibrate(maps, per_layer=True, per_head=True).phases["prefill"].parts
    assert [part.name for part in parts[:3]] == ["layer 0", "layer 0, head 0", "layer 0, head 1"]
    assert len(parts) == 10
    for part in parts:
        if part.vote is not None and (part.layer, part.vote) != (7, "head 3"):
            assert part.fit is not None
            assert part.fit.a == pytest.approx(2 + part.layer + 10 * int(part.vote[-1]), rel=0.02)
    assert parts[-1].name == "layer 7, head 3"
    assert parts[-1].fit is None
    assert parts[-1].points == 0


def test_too_few_points_are_an_error() -> None:
    maps = maps_of(lambda *_: 40.0, phases=("decode",))
    with pytest.raises(ValueError, match=r"decode: a fit needs .* 0 of 120 points lie within 10%"):
        calibrate(maps)


def test_phase_that_the_maps_lack(plain: GapMaps) -> None:
    only = replace(plain, samples=tuple(s for s in plain.samples if s.phase == "prefill"))
    assert list(calibrate(only).phases) == ["prefill"]
    with pytest.raises(ValueError, match="no text of the decode phase"):
        calibrate(only, phases=["decode"])
    with pytest.raises(ValueError, match="no text"):
        calibrate(replace(plain, samples=()))
    with pytest.raises(ValueError, match="got 'theirs'"):
        calibrate(plain, "theirs")


# What a factor achieves


def test_achieved_at_the_fitted_factor(plain: GapMaps) -> None:
    factor = calibrate(plain).phases["prefill"].fit.scale_factor(0.5)
    got = achieved(plain, TARGETS["ours", "prefill"], factor)
    assert got.shape == (6, 2, 4)
    assert got == pytest.approx(0.5, abs=0.005)


def test_short_texts_achieve_nothing() -> None:
    maps = maps_of(flat, lengths=(64, 4096), phases=("prefill",))
    got = achieved(maps, TARGETS["ours", "prefill"], 100.0)
    lengths = np.array([sample.length for sample in maps.samples])
    assert np.isnan(got[lengths == 64]).all()
    assert not np.isnan(got[lengths == 4096]).any()
    exactly_one = achieved(maps, TARGETS["ours", "prefill"], 64.0)
    assert not np.isnan(exactly_one).any()


def test_miss_table() -> None:
    a = {"ours": 4.0, "nvidia": 8.0, "nvidia-256": 10.0, "model-optimizer": 12.0}
    maps = maps_of(lambda name, *_: float(np.log(a[name])), b=6.0)
    for phase in ("prefill", "decode"):
        table = miss_table(maps, phase, 0.5)
        # in decode nvidia-256 is nvidia
        assert [row.kernel for row in table] == [one.name for one in targets_of(phase)]
        for row in table:
            assert row.scale_factor == pytest.approx(a[row.kernel] * np.exp(3), rel=0.02)
            for other, share in row.achieved.items():
                expected = 0.5 + np.log(a[row.kernel] / a[other]) / 6
                assert share == pytest.approx(expected, abs=0.01)


def test_miss_table_names_a_row_without_a_factor() -> None:
    maps = maps_of(lambda name, *_: 40.0 if name == "nvidia" else 1.0, phases=("prefill",))
    rows = {row.kernel: row for row in miss_table(maps, "prefill", 0.5)}
    assert rows["nvidia"].scale_factor is None
    assert "at least 3 points" in rows["nvidia"].why_not
    assert set(rows["nvidia"].achieved.values()) == {None}
    assert rows["ours"].why_not == ""
    assert rows["ours"].achieved["nvidia"] == 0
    outside = miss_table(maps, "prefill", 0.95, kernels=["ours"])
    assert "between" in outside[0].why_not


def test_scale_factors_of_a_calibration(plain: GapMaps) -> None:
    one = calibrate(plain)
    both = one.scale_factor(0.5)
    assert both == one.scale_factor({"prefill": 0.5, "decode": 0.5})
    assert list(one.scale_factor({"decode": 0.3})) == ["decode"]
    with pytest.raises(ValueError, match=r"^decode: target_sparsity must lie between"):
        one.scale_factor({"prefill": 0.5, "decode": 0.97})
    with pytest.raises(ValueError, match="names 'training'"):
        one.scale_factor({"training": 0.5})


# Files


@pytest.fixture(scope="module")
def written(plain: GapMaps) -> str:
    one = calibrate(plain, "nvidia", per_layer=True, per_head=True)
    body = json.loads(to_json(one))
    for made in body["phases"].values():
        made["fit"]["draws"] = made["fit"]["draws"][:2]
    return json.dumps(body)


def test_file_round_trip(plain: GapMaps, tmp_path: Path) -> None:
    card = {"model": "planted", "command": "a [\n 1,\n 2 ] \x1b[31m λ"}
    one = calibrate(replace(plain, card=card), "nvidia", per_layer=True, per_head=True)
    path = tmp_path / "calibration.json"
    write_calibration(path, one)
    assert read_calibration(path) == one
    assert from_json(to_json(one).encode()) == one
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) < 20_000
    assert "[64, 128]" in path.read_text(encoding="utf-8")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field, and the first two items of every list."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    if isinstance(value, list):
        for index, inner in enumerate(value[:2]):
            yield from places(inner, (*path, index))


def test_a_damaged_field_is_refused_in_one_sentence(written: str) -> None:
    fine = json.loads(written)
    strange: list[Any] = [None, True, -1, 1e400, "\ud800", [], {}, [["a"]], {"a": {}}, 10**400]
    every = list(places(fine))
    messages = []
    for path in every:
        for value in strange:
            body = json.loads(written)
            inner = body
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            try:
                from_json(json.dumps(body))
            except CalibrationError as error:
                messages.append(str(error))
    assert len(messages) > 0.8 * len(every) * len(strange)
    for message in messages:
        assert "\n" not in message
        assert len(message) < 250
        message.encode()


def test_a_missing_field_is_named(written: str) -> None:
    for path in places(json.loads(written)):
        body = json.loads(written)
        inner = body
        for key in path[:-1]:
            inner = inner[key]
        if not isinstance(path[-1], str) or path[-1] in ("model", "numpy", "skip-softmax-lab"):
            continue
        if path[-1] in ("prefill", "decode"):
            continue  # either may be left out
        del inner[path[-1]]
        with pytest.raises(CalibrationError):
            from_json(json.dumps(body))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1, 2]", "no calibration"),
        ('{"format": "other"}', "no calibration"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ('{"format": "skip-softmax-lab calibration", "version": 2}', "version '2'"),
        ('{"format": "skip-softmax-lab calibration", "version": 1}', "lacks phases"),
        (" " * 20_000_001, "at most 20000000 bytes"),
    ],
)
def test_foreign_files(text: str | bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        from_json(text)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"broken\.json: "):
        read_calibration(path)
    with pytest.raises(OSError, match="absent"):
        read_calibration(tmp_path / "absent.json")
