"""The decode page: every number is the simulator's, and the lanes follow λ in the browser."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

import app.decode_view
from app import sources
from sim.decode import attend_decode, decode_bytes, scan_decode
from sim.decode_splits import SPLITS, of_splits
from sim.decode_time import DENSE, SKIPPING
from sim.traces import bundled, read_trace, write_trace

ENTRY = Path(app.decode_view.__file__).with_name("streamlit_app.py")
TOKEN, THRESHOLD = 3000, 0.03
HOW = {"keys": 128, "splits": 4, "split_layout": "contiguous", "seeded": False}
QUERY = {
    "token": str(TOKEN),
    "decode_threshold": str(THRESHOLD),
    "keys": "128",
    "splits": "4",
    "layout": "contiguous",
    "seeded": "false",
    "tile": "20",
}


def open_decode(**query: str) -> AppTest:
    page = AppTest.from_file(str(ENTRY), default_timeout=120).run()
    for name, value in query.items():
        page.query_params[name] = value
    page.switch_page("app_pages/decode.py").run()
    assert not page.exception
    return page


def lanes(page: AppTest) -> dict:
    return json.loads(page.get("bidi_component")[0].proto.json)


def rows(page: AppTest, first: str) -> dict[str, list[str]]:
    """Table whose header begins with these cells: row name → other cells."""
    [text] = [one.value for one in page.markdown if one.value.startswith(first)]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {name: rest for name, *rest in cells}


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def trace():
    return read_trace(next(iter(bundled().values())))


@pytest.fixture(scope="module")
def page():
    return open_decode(**QUERY, cost="true", model="true")


@pytest.fixture(scope="module")
def scans(trace):
    q, k = trace.q[:, TOKEN][None], trace.k[:, : TOKEN + 1]
    scale = trace.softmax_scale
    return {
        vote: scan_decode(q, k, [TOKEN + 1], vote=vote, softmax_scale=scale, **HOW)
        for vote in ("group", "head")
    }


def test_lanes_hold_gaps_splits_and_votes_of_the_simulator(page, scans) -> None:
    data, group, heads = lanes(page), scans["group"], scans["head"]
    assert (data["key_tiles"], data["length"], data["selected"]) == (24, TOKEN + 1, 20)
    np.testing.assert_array_equal(unpack(data["gap"]), group.gap[0, 0])
    for head, gap in zip(data["heads"], heads.gap[0], strict=True):
        np.testing.assert_array_equal(unpack(head["gap"]), gap)
    assert data["split_of"] == group.grid.split_of(24).tolist()
    assert data["visit"] == np.concatenate(group.grid.lanes(24)).tolist()
    assert "3,001 keys in 24 tiles of 128: 4 splits, contiguous, plain" in data["title"]


def attended(trace, tiles):
    q, k, v = trace.q[:, TOKEN][None], trace.k[:, : TOKEN + 1], trace.v[:, : TOKEN + 1]
    return attend_decode(q, k, v, tiles, softmax_scale=trace.softmax_scale)


def test_every_position_of_the_slider_says_what_the_simulator_decides(page, trace, scans) -> None:
    data = lanes(page)
    for step in (0, 1, 60, 85, 100, 121, 122):
        threshold = [*data["thresholds"], THRESHOLD][step]
        tiles = scans["group"].decide(threshold)
        moved = decode_bytes(tiles, 64, page=64)
        said = plain(data["headline"][step])
        if not tiles.skipped.any():
            assert "no tile is skipped" in said
        else:
            skipped, lost, spared, ratio = re.findall(r"\*\*([\d.]+)[ ×]", said)
            most = attended(trace, tiles).dropped_mass.max()
            assert float(lost) == pytest.approx(100 * most, rel=0.06)
            assert float(skipped) == pytest.approx(100 * tiles.sparsity[0], abs=0.5)
            assert float(spared) == pytest.approx(100 * (1 - moved.v / moved.dense_v), abs=0.5)
            assert float(ratio) == pytest.approx(moved.dense / moved.total, abs=0.005)
        keeps = scans["head"].decide(threshold).state[0] == 1
        for head, mine in zip(data["heads"], keeps, strict=True):
            alone = (mine & (keeps.sum(axis=0) == 1)).sum()
            assert f"vetoes {mine.sum()} of 24 tiles, {alone} of them alone" in head["counts"][step]


def test_ledger_votes_and_losses_are_the_simulators(page, trace, scans) -> None:
    tiles = scans["group"].decide(THRESHOLD)
    moved = decode_bytes(tiles, 64, page=64)
    assert 0 < moved.v < moved.dense_v
    ledger = rows(page, "|  | dense | now")
    for name, now in (("K of every tile", moved.k), ("V of kept tiles", moved.v)):
        assert float(ledger[name][1].split()[0]) == pytest.approx(now / 1000, rel=0.01)
    spared = 100 * (1 - moved.total / moved.dense)
    assert float(ledger["**together**"][2].split()[0]) == pytest.approx(spared, abs=0.5)
    [expected] = [one.value for one in page.markdown if one.value.startswith("**Expected")]
    assert f"{moved.dense / moved.total:.3g}× faster than dense**, by a model" in expected
    votes = rows(page, "| head | gap | vote")
    for cells, gap in zip(votes.values(), scans["head"].gap[0, :, 20], strict=True):
        assert cells == [
            f"{gap:.2f}".replace("-", "−"),
            "skip" if gap < np.log(THRESHOLD) else "**veto**",
        ]
    [said] = [one.value for one in page.markdown if one.value.startswith("Tile 20, keys 2,560")]
    assert "number 3 of 6 that split 3 visits" in said
    assert ("**Skipped**" in said) == bool(tiles.skipped[0, 0, 20])
    out = attended(trace, tiles)
    alone = scans["head"].decide(THRESHOLD).sparsity
    for head, (lost, certified, share) in enumerate(rows(page, "| head | attention lost").values()):
        for text, value in (
            (lost, out.dropped_mass[0, head]),
            (certified.removeprefix("at most "), out.dropped_mass_bound[0, head]),
            (share, alone[head]),
        ):
            assert float(text.strip("< %")) == pytest.approx(100 * value, rel=0.05, abs=0.011)


def test_words_are_those_of_the_token(page, trace) -> None:
    [said] = [one.value for one in page.markdown if one.value.startswith("… ")]
    assert said.endswith(f"→ **`` {trace.tokens[TOKEN].strip()} ``**") or said.endswith(
        f"→ **` {trace.tokens[TOKEN].strip()} `**"
    )
    assert lanes(page)["words"] == trace.tokens[: TOKEN + 1]


def test_chart_of_splits_and_published_rows(page, trace) -> None:
    [chart] = page.get("vega_lite_chart")
    spec = json.loads(chart.proto.spec)
    assert spec["layer"][1]["encoding"]["x"]["sort"] == [str(n) for n in SPLITS]
    measured = of_splits(
        [trace],
        lengths=[TOKEN + 1],
        thresholds=[THRESHOLD],
        keys=128,
        split_layout="contiguous",
    )
    first, last = measured[0], measured[-1]
    numbers = [float(x) for x in re.findall(r"([\d.]+) %", plain(chart.proto.alt))]
    expected = [first.plain, last.plain, first.seeded, last.seeded]
    assert numbers == pytest.approx([100 * share for share in expected], abs=0.5)
    [published] = [one.value for one in page.markdown if "measured by this project" in one.value]
    assert published.count("\n| ") >= len(DENSE) + len(SKIPPING)
    assert "1.26× (1.35×) | −0.09" in published


def test_stepping_stays_in_range() -> None:
    page = open_decode(token="2", tile="0", splits="64", cost="true")
    assert lanes(page)["length"] == 3
    assert any("This takes 16 tokens" in one.value for one in page.markdown)
    page.number_input(key="token").increment().run()
    assert lanes(page)["length"] == 4
    page.number_input(key="token").set_value(4095).run()
    page.number_input(key="tile").set_value(63).run()
    page.number_input(key="token").set_value(100).run()
    assert not page.exception
    assert lanes(page)["selected"] == 1


def test_a_trace_that_is_not_causal_says_so(tmp_path, monkeypatch) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 64, 16)).astype(np.float32)
    path = tmp_path / "all.safetensors"
    write_trace(path, q, k, v, softmax_scale=1, causal=False, card={})
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    page = open_decode()
    assert "not causal" in page.info[0].value
    assert not page.get("bidi_component")


def test_two_kv_heads_are_looked_at_one_at_a_time(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 200, 16)).astype(np.float32) for n in (4, 2, 2))
    path = tmp_path / "two.safetensors"
    write_trace(path, 3 * q[:, -40:], k, v, softmax_scale=0.5, card={})
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    page = open_decode(kv_head="1", splits="1", token="170")
    data = lanes(page)
    assert [head["name"] for head in data["heads"]] == ["head 2", "head 3"]
    one = scan_decode(3 * q[2:, 170][None], k[1:, :171], [171], softmax_scale=0.5, seeded=True)
    np.testing.assert_allclose(unpack(data["gap"]), one.gap[0, 0], atol=1e-5)
    assert data["words"] == []
    assert "200 keys" in lanes(open_decode(kv_head="0"))["title"]


# ---- In Chromium ---------------------------------------------------------------------------------

LANES = ".lanes .headline strong"


@pytest.mark.browser
def test_lanes_answer_in_the_browser_and_tiles_are_chosen_by_keyboard_and_pointer(open_page, trace):
    page = open_page("decode?splits=4&tile=5", ready=LANES)
    page.settle()
    headline, slider = page.locator(".lanes .headline"), page.locator(".lanes input")
    before = headline.inner_text()
    slider.focus()
    page.sent.clear()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.drawn()
    assert headline.inner_text() != before
    assert not page.sent
    page.settle()
    assert len(page.sent) == 1
    assert "decode_threshold=0.0158" in page.url
    page.locator(".lanes .map").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowDown"):  # 5 → 9 → 10 → 14
        page.keyboard.press(key)
    page.timers(200)
    reading = page.locator(".lanes .reading")
    assert reading.get_attribute("aria-live") == "polite"
    assert reading.inner_text().startswith("Tile 14, keys 896 – 959, split 2, 4 of 16 visited: ")
    passage = " ".join("".join(trace.tokens[896:960]).split())
    assert page.locator(".lanes .passage").inner_text() == passage
    page.keyboard.press("Enter")
    page.settle()
    assert "tile=14" in page.url
    assert page.get_by_role("spinbutton", name="Key tile").input_value() == "14"
    box = page.locator(".lanes .map canvas").first.bounding_box()
    page.mouse.click(box["x"] + 40.5 / 64 * box["width"], box["y"] + 2)
    page.settle()
    assert "tile=40" in page.url
    again = open_page("decode?" + page.url.split("?")[1], ready=LANES)
    again.settle()
    assert again.locator(".lanes .headline").inner_text() == headline.inner_text()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1400, "dark"), (400, "light")])
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(open_page, width, theme) -> None:
    from axe_playwright_python.sync_playwright import Axe

    query = "decode?splits=64&cost=true&model=true"
    page = open_page(query, ready=LANES, width=width, height=6000, color_scheme=theme)
    page.settle()
    page.get_by_text("What am I looking at?").click()
    page.settle()
    main = page.locator('[data-testid="stMain"]')
    assert main.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    colours = page.locator(".lanes .map canvas").first.evaluate(
        """(canvas) => {
            const { width, height } = canvas, seen = new Set();
            const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            for (let n = 0; n < data.length; n += 4) seen.add([...data.slice(n, n + 3)].join());
            return [...seen];
        }"""
    )
    masked = {"light": "238,238,238", "dark": "38,42,51"}[theme]
    assert {"0,114,178", "230,159,0", masked} <= set(colours)
    found = Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(
        [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in serious], indent=1
    )
