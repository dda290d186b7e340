"""The rules page: every number is the simulator's, and what is made equal is equal."""

import json
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

import app.rule_chart
from app import rule_comparison as comparison
from app import sources
from sim import rules, scan
from sim.accuracy import dropped_mass
from sim.traces import bundled, read_trace, write_trace

ENTRY = Path(app.rule_chart.__file__).with_name("streamlit_app.py")
MAXIMUM, RUNNING, BUDGET = comparison.FAMILIES


@pytest.fixture(scope="module")
def head():
    trace = read_trace(next(iter(bundled().values())))
    q, k = trace.q[:2, :1024], trace.k[:, :1024]
    return scan(q, k, softmax_scale=trace.softmax_scale, mass=True)


@pytest.mark.parametrize("family", comparison.FAMILIES)
def test_points_are_what_the_simulator_counts(head, family) -> None:
    for setting in family.settings[2:5:2]:
        point = comparison.measure(f"test {id(head)}", family.name, setting, head)
        tiles = rules.decide(head, family.make(setting))
        lost = dropped_mass(head.mass, tiles)
        assert point.sparsity == pytest.approx(tiles.sparsity.mean())
        assert (point.mean, point.worst) == pytest.approx((lost.mean(), lost.max()))


def test_a_budget_keeps_its_promise_and_no_rule_skips_less_for_a_larger_setting(head) -> None:
    for family in comparison.FAMILIES:
        points = [
            comparison.measure(f"test {id(head)}", family.name, x, head) for x in family.settings
        ]
        shares = [point.sparsity for point in points]
        assert shares == sorted(shares)
        assert shares[-1] > 0.1
        if family is BUDGET:
            for point in points:
                assert point.worst <= point.setting / (1 + point.setting) + 1e-9


@pytest.mark.parametrize("field", ["sparsity", "mean"])
def test_bisection_reaches_the_target_or_says_that_it_cannot(field) -> None:
    def measured(family, setting):
        return comparison.Point(setting, setting**0.25 / 2, setting**0.5 / 10, 1.0)

    points = [measured(MAXIMUM, x) for x in MAXIMUM.settings]
    for target in (0.1, 0.3) if field == "sparsity" else (0.005, 0.03):
        found = comparison.at_target(MAXIMUM, points, field, target, measured)
        assert getattr(found, field) == pytest.approx(target, rel=0.02)
    assert comparison.at_target(MAXIMUM, points, field, 0.9, measured) is None
    assert comparison.column(MAXIMUM, None)[0] == "out of reach"


def small(folder: Path, length: int = 768, **options) -> Path:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, length, 16)).astype(np.float32)
    k += np.linspace(2, 0, length)[:, None].astype(np.float32) * q.mean(axis=1, keepdims=True)
    path = folder / "small.safetensors"
    write_trace(path, 4 * q, k, v, softmax_scale=0.5, card={}, **options)
    return path


def open_rules(**query: str) -> AppTest:
    page = AppTest.from_file(str(ENTRY), default_timeout=120).run()
    for name, value in query.items():
        page.query_params[name] = value
    page.switch_page("app_pages/rules.py").run()
    assert not page.exception
    return page


def test_page_compares_and_draws(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(small(tmp_path)))
    page = open_rules(equal="mean loss", at_mean="0.3")
    rows = page.markdown[2].value.splitlines()
    assert rows[0] == "|  | Maximum | Running sum | Mass budget |"
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        f"| {name}" for name in comparison.QUANTITIES
    ]
    assert page.subheader[0].value == "At equal mean loss, 0.3\N{NO-BREAK SPACE}%"
    charts = page.get("vega_lite_chart")
    assert len(charts) == 2
    assert charts[0].proto.alt.startswith("Lost by the worst row: Maximum from ")
    names = json.loads(charts[0].proto.spec)["encoding"]["color"]["scale"]["domain"]
    assert names == [family.name for family in comparison.FAMILIES]


def test_source_that_is_too_long_and_cannot_be_cut_says_so(tmp_path, monkeypatch) -> None:
    path = small(tmp_path, length=4224, causal=False)
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    page = open_rules()
    assert "at most 4,096 tokens" in page.info[0].value
    assert not page.get("vega_lite_chart")
