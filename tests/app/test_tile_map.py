"""The tile map page without a browser: what it says is what the simulator says."""

import base64
import doctest
import json
import re
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

import app.wording
from app import controls, scans, sources, views
from sim import scan
from sim.accuracy import dropped_mass
from sim.cost import ledger
from sim.traces import bundled, read_trace, write_trace
from sim.workloads import WORKLOADS

ENTRY = Path(app.wording.__file__).with_name("streamlit_app.py")
NBSP = "\N{NO-BREAK SPACE}"
MARKUP = "**bold** <img src=x onerror=alert(1)> [link](http://x.invalid) :red[red] $x^2$ `code`"


def open_page(**query: str) -> AppTest:
    page = AppTest.from_file(str(ENTRY), default_timeout=60)
    for name, value in query.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return page


def map_data(page: AppTest) -> dict:
    return json.loads(page.get("bidi_component")[0].proto.json)


def number(page: AppTest, label: str):
    (found,) = (one for one in page.number_input if one.label == label)
    return found


def headlines(page: AppTest) -> list[str]:
    return [panel["headline"][-1] for panel in map_data(page)["panels"]]


def unpack(text: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


@pytest.fixture(scope="module")
def trace():
    return read_trace(next(iter(bundled().values())))


@pytest.fixture(scope="module")
def scanned(trace):
    return scan(trace.q, trace.k, softmax_scale=trace.softmax_scale, mass=True)


def write_small(path: Path, *, heads: int = 2, length: int = 640, markup: str = "") -> Path:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, length, 16)).astype(np.float32) for n in (heads, 1, 1))
    fields = ("model", "license", "text", "layer", "command", markup)
    card = {field: markup for field in fields} if markup else {"model": "small"}
    card |= {"heads": json.dumps([markup] * heads)} if markup else {}
    tokens = [markup or f" w{n}" for n in range(length)]
    write_trace(path, 3 * q, k, v, tokens=tokens, softmax_scale=0.5, card=card)
    return path


# ---- What the page says is what the simulator says ----------------------------------------------


@pytest.mark.parametrize("threshold", [0.01, 0.0777])
def test_headline_is_that_of_the_simulator(trace, scanned, threshold) -> None:
    page = open_page()
    if threshold != 0.01:
        page.number_input(key="threshold").set_value(threshold).run()
        assert not page.exception
    head = scanned.heads([0])
    tiles = head.decide(threshold)
    worst = dropped_mass(head.mass, tiles).max()
    work = ledger(tiles, 64).matrix_work_ratio
    assert headlines(page) == [
        f"**λ = {threshold}**: **{100 * tiles.sparsity[0]:.0f}{NBSP}%** of tiles skipped; the "
        f"worst row loses **{100 * worst:.0f}{NBSP}%** of its attention; about "
        f"**{work:.1f}×** less matrix work."
    ]


def test_every_position_of_the_slider_is_decided_as_the_simulator_decides(scanned) -> None:
    data = map_data(open_page(head="1"))
    panel, head = data["panels"][0], scanned.heads([1])
    gap = unpack(panel["gap"], "<f4", head.gap.shape[1:])
    np.testing.assert_array_equal(gap, head.gap[0])
    assert len(data["thresholds"]) == 122
    for step, threshold in enumerate([*data["thresholds"], 0.01]):
        tiles = head.decide(threshold)
        ln = -np.inf if data["ln"][step] is None else data["ln"][step]
        np.testing.assert_array_equal((gap > -np.inf) & (gap < ln), tiles.skipped[0])
        assert panel["skipped"][step] == tiles.skipped.sum()
        assert panel["sparsity"][step] == f"{100 * tiles.sparsity[0]:.1f}{NBSP}%"
    assert (panel["visited"], panel["masked"]) == (tiles.visited.sum(), (~tiles.visited).sum())


def test_a_tile_s_maxima_are_those_of_its_deciding_row(trace, scanned) -> None:
    panel = map_data(open_page())["panels"][0]
    shape = scanned.gap.shape[1:]
    rows = unpack(panel["deciding_row"], "<i4", shape)
    tile_max = unpack(panel["tile_max"], "<f4", shape)
    i, j = 40, 7
    row = rows[i, j]
    assert row // 64 == i
    scores = trace.q[0, row].astype(float) @ trace.k[0, : row + 1].astype(float).T / 8
    assert tile_max[i, j] == pytest.approx(scores[j * 128 : (j + 1) * 128].max(), abs=1e-3)
    before = np.concatenate([scores[:128], scores[(j + 1) * 128 :]])  # ends first: 20, 0, 19 … 8
    assert scanned.gap[0, i, j] == pytest.approx(tile_max[i, j] - before.max(), abs=1e-3)


def test_thumbnails_name_every_head_and_its_sparsity(trace, scanned) -> None:
    thumbnails = map_data(open_page())["heads"]
    assert [one["label"] for one in thumbnails] == trace.head_names
    sparsity = scanned.decide(0.01).sparsity
    assert [one["sparsity"][-1] for one in thumbnails] == [
        f"{100 * share:.0f}{NBSP}%" for share in sparsity
    ]


def test_orders_side_by_side(scanned) -> None:
    page = open_page(compare="true")
    panels = map_data(page)["panels"]
    assert [panel["title"] for panel in panels] == ["ascending", "ends_first"]
    for panel in panels:
        tiles = scanned.replay(order=panel["title"]).heads([0]).decide(0.01)
        assert panel["skipped"][-1] == tiles.skipped.sum()
    assert panels[0]["skipped"][-1] < panels[1]["skipped"][-1]


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_visit_order(scanned, order) -> None:
    page = open_page(order=order)
    tiles = scanned.replay(order=order).heads([0]).decide(0.01)
    assert map_data(page)["panels"][0]["skipped"][-1] == tiles.skipped.sum()


def test_length_crops_to_what_a_scan_of_fewer_tokens_gives(trace) -> None:
    page = open_page(length="1024")
    panel = map_data(page)["panels"][0]
    short = scan(trace.q[:1, :1024], trace.k[:, :1024], softmax_scale=trace.softmax_scale)
    assert (panel["queries_total"], panel["groups"]) == (1024, 16)
    assert panel["skipped"][-1] == short.decide(0.01).skipped.sum()
    assert len(map_data(page)["words"]) == 1024


def test_scale_factor_stays_fixed_when_the_length_changes(trace) -> None:
    page = open_page()
    page.get_by_key("hold").set_value("scale factor").run()
    assert number(page, "Scale factor").value == pytest.approx(40.96)
    page.select_slider(key="length").set_value(512).run()
    assert not page.exception
    assert headlines(page)[0].startswith("**λ = 0.08**")
    assert number(page, "Threshold λ").value == pytest.approx(0.08)
    number(page, "Threshold λ").set_value(0.1).run()
    assert number(page, "Scale factor").value == pytest.approx(51.2)
    page.get_by_key("hold").set_value("λ").run()
    page.select_slider(key="length").set_value(4096).run()
    assert number(page, "Threshold λ").value == pytest.approx(0.1)
    assert number(page, "Scale factor").value == pytest.approx(409.6)


def test_what_comes_late_from_an_old_follower_moves_nothing(monkeypatch) -> None:
    state, made, edits = {}, [], []
    monkeypatch.setattr(controls.st, "session_state", state)

    def follow(value: float, length: int) -> None:
        controls._follow(
            lambda key, on_change: made.append((key, on_change)),
            value,
            lambda *edit: edits.append(edit),
            length,
        )

    follow(0.01, 4096)
    follow(0.02, 2048)
    (old, late), (new, typed) = made
    assert old != new
    late()
    assert edits == []
    state[new] = 0.05
    typed()
    assert edits == [(0.05, 2048)]
    follow(0.05, 2048)
    assert made[2][0] == new  # typed into it: it keeps the focus


def test_request_shorter_than_its_factor_is_dense_and_says_why() -> None:
    page = open_page(hold="scale factor", factor="600", length="512")
    assert "above 1" in headlines(page)[0]
    assert "without skipping" in headlines(page)[0]
    assert map_data(page)["panels"][0]["skipped"][-1] == 0


def test_one_row_loses_what_the_simulator_says(scanned) -> None:
    page = open_page(row="3000", group="46", key_tile="3")
    page.session_state["tiles"] = page.session_state["row_tiles"] = True  # open the tables
    page.run()
    head = scanned.heads([0])
    tiles = head.decide(0.01)
    sentence = next(m.value for m in page.markdown if m.value.startswith("Query row 3,000 loses"))
    lost = float(re.search(r"\*\*([\d.]+)", sentence)[1])
    assert lost == pytest.approx(100 * dropped_mass(head.mass, tiles)[0, 3000], rel=0.05)
    state = {1: "computed", 2: "skipped"}[int(tiles.state[0, 46, 3])]
    assert any(m.value.startswith(f"Tile (46, 3) is **{state}**") for m in page.markdown)
    panel = map_data(page)["panels"][0]
    np.testing.assert_array_equal(unpack(panel["mass"], "<f4", (32,)), head.mass[0, 3000])
    order, states = page.dataframe[0].value["Key tile"], page.dataframe[0].value["State"]
    assert order.tolist()[:3] == [23, 0, 22]
    named = [("masked", "computed", "skipped")[s] for s in tiles.state[0, 46, order]]
    assert states.tolist() == named
    weights = page.dataframe[1].value["Attention"].to_numpy()
    np.testing.assert_array_equal(weights, head.mass[0, 3000, :24])


def test_button_goes_to_the_deciding_row(scanned) -> None:
    page = open_page(group="30", key_tile="4")
    next(one for one in page.button if one.label == "Row that decides this tile").click().run()
    assert page.number_input(key="row").value == scanned.deciding_row(0)[30, 4]


def test_charts_state_their_takeaway() -> None:
    charts = open_page().get("vega_lite_chart")
    assert len(charts) == 3
    assert all(chart.proto.alt for chart in charts)


# ---- Sources ------------------------------------------------------------------------------------


def test_first_source_is_bundled_and_all_are_offered() -> None:
    page = open_page()
    assert page.selectbox(key="source").options == [
        *bundled(),
        *(f"workload: {name}" for name in WORKLOADS),
    ]
    assert page.selectbox(key="source").value == next(iter(bundled()))


@pytest.mark.parametrize("name", [*bundled(), *(f"workload: {name}" for name in WORKLOADS)])
def test_every_source_opens(name) -> None:
    page = open_page(source=name)
    assert page.selectbox(key="source").value == name
    assert "of tiles skipped" in headlines(page)[0]


def test_file_of_the_command_line_comes_first(tmp_path, monkeypatch) -> None:
    path = write_small(tmp_path / "mine.safetensors")
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    page = open_page()
    assert page.selectbox(key="source").value == "file: mine.safetensors"
    assert map_data(page)["panels"][0]["queries_total"] == 640


def test_damaged_file_of_the_command_line_is_one_sentence(tmp_path, monkeypatch) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"broken")
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    page = open_page()
    assert len(page.error) == 1
    assert "too short for a safetensors file" in page.error[0].value
    assert len(headlines(page)) == 1


def test_upload(tmp_path) -> None:
    page = open_page(head="2", row="4000")
    content = write_small(tmp_path / "x.safetensors").read_bytes()
    page.file_uploader(key="file").upload("x.safetensors", content).run()
    assert not page.exception
    assert page.selectbox(key="source").value == "upload"
    assert map_data(page)["panels"][0]["queries_total"] == 640
    assert page.selectbox(key="head").value == 0
    assert page.number_input(key="row").value == 639


def test_upload_that_is_no_trace_is_one_sentence_and_changes_nothing() -> None:
    page = open_page(source="workload: sink")
    before = headlines(page)
    page.file_uploader(key="file").upload("x.safetensors", b"\xff" * 100).run()
    assert not page.exception
    assert len(page.error) == 1
    assert page.error[0].value.startswith("This file was not opened: ` the header claims")
    assert page.selectbox(key="source").value == "workload: sink"
    assert headlines(page) == before


def test_text_of_a_trace_reaches_only_elements_that_show_it_as_text(tmp_path, monkeypatch) -> None:
    path = write_small(tmp_path / "markup.safetensors", markup=MARKUP)
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    page = open_page()
    assert sum(MARKUP in text.value for text in page.text) >= 6
    for kind in ("markdown", "caption", "title", "header", "subheader", "error", "metric", "html"):
        for element in page.get(kind):
            assert "onerror" not in str(element.value)
    for element in page.get("expander"):
        assert "onerror" not in element.label


def test_trace_without_words_and_with_one_head(tmp_path, monkeypatch) -> None:
    q = np.random.default_rng(0).standard_normal((1, 200, 8)).astype(np.float32)
    path = tmp_path / "bare.safetensors"
    write_trace(path, q[:, :70], q, q, softmax_scale=1, causal=False, card={})
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    data = map_data(open_page())
    assert data["heads"] == []
    assert (data["panels"][0]["groups"], data["panels"][0]["key_tiles"]) == (2, 2)


def test_long_source_keeps_gaps_only(tmp_path, monkeypatch) -> None:
    path = write_small(tmp_path / "long.safetensors")
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    monkeypatch.setattr(scans, "LONG", 600)
    monkeypatch.setattr(scans, "ALL_HEADS_PAIRS", 1)
    page = open_page(head="1", compare="true")
    data = map_data(page)
    assert "worst row" not in headlines(page)[0]
    assert "tile_max" not in data["panels"][0]
    assert [panel["title"] for panel in data["panels"]] == ["ascending", "ends_first"]
    trace = read_trace(path)
    tiles = scan(trace.q[1:], trace.k, softmax_scale=0.5).decide(0.01)
    assert data["panels"][1]["skipped"][-1] == tiles.skipped.sum()


def test_pooled_tile_is_computed_if_any_of_its_tiles_is() -> None:
    gap = np.full((5, 3), -9, np.float32)
    gap[3, 2], gap[4] = -1, -np.inf
    pooled, factors = views.pool(gap, 2)
    assert factors == (3, 2)
    np.testing.assert_array_equal(pooled, [[-9, -9], [-9, -1]])


def test_kept_scans_are_bounded_in_bytes(monkeypatch, scanned) -> None:
    kept = scans._Kept()
    monkeypatch.setattr(scans, "KEPT_BYTES", int(2.5 * scans._size(scanned)))
    for name in "abc":
        kept.put((name,), scanned)
        kept.get(("a",))
    assert kept.get(("b",)) is None
    assert kept.get(("a",)) is kept.get(("c",)) is scanned


# ---- The URL ------------------------------------------------------------------------------------


def test_url_opens_the_view_that_the_widgets_give() -> None:
    page = open_page()
    page.selectbox(key="head").set_value(1)
    page.number_input(key="threshold").set_value(0.05)
    page.selectbox(key="order").set_value("ascending")
    page.select_slider(key="length").set_value(2048)
    page.number_input(key="row").set_value(100).run()
    page.number_input(key="group").set_value(20)
    page.number_input(key="key_tile").set_value(3).run()
    query = {"head": "1", "threshold": "0.05", "order": "ascending", "length": "2048"}
    by_url = open_page(**query, row="100", group="20", key_tile="3")
    assert map_data(by_url) == map_data(page)
    assert map_data(by_url) != map_data(open_page())


@pytest.mark.parametrize(
    "query",
    [
        {"source": "nothing", "head": "99", "order": "sideways", "length": "77"},
        {"threshold": "abc", "hold": "x", "compare": "perhaps"},
        {"threshold": "7", "group": "-1", "key_tile": "99", "row": "1e9"},
        {"threshold": "nan", "factor": "inf", "head": "-1", "source": "upload"},
    ],
)
def test_nonsense_in_the_url_falls_to_defaults(query) -> None:
    assert map_data(open_page(**query)) == map_data(open_page())


def test_examples_of_the_wording() -> None:
    result = doctest.testmod(app.wording)
    assert result.attempted > 0
    assert result.failed == 0
