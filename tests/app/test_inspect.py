"""Votes, stepper, forced tiles, ledger, downloads, masks and crops: held to the simulator."""

import base64
import io
import json
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

import app.wording
from app import downloads, forced, real_kernel, rule_source, scans, sources, visit, votes, work
from app.views import Words
from cuda_kernels.crop import CropError, CropRun
from sim import rules, scan
from sim.accuracy import dropped_mass
from sim.cost import ledger
from sim.geometry import TileMap
from sim.reference import attention
from sim.traces import bundled, read_trace, write_trace

ENTRY = Path(app.wording.__file__).with_name("streamlit_app.py")
NO_WORDS = Words([], [])
I, J = 40, 7


def open_page(**query: str | list[str]) -> AppTest:
    page = AppTest.from_file(str(ENTRY), default_timeout=120)
    for name, value in query.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return page


def component(page: AppTest, n: int = 0) -> dict:
    return json.loads(page.get("bidi_component")[n].proto.json)


def panel(page: AppTest) -> dict:
    return component(page)["panels"][0]


def said(page: AppTest, begins: str) -> str:
    return next(one.value for one in page.markdown if one.value.startswith(begins))


@pytest.fixture(scope="module")
def trace():
    return read_trace(next(iter(bundled().values())))


@pytest.fixture(scope="module")
def head(trace):
    """Scan of head 0."""
    return scan(trace.q[:1], trace.k, softmax_scale=trace.softmax_scale, mass=True)


@pytest.fixture(scope="module")
def scores(trace):
    """Scores of group I in float64, masked."""
    rows = np.arange(I * 64, (I + 1) * 64)
    s = trace.q[0, rows].astype(float) @ trace.k[0].astype(float).T * trace.softmax_scale
    s[np.arange(4096) > rows[:, None]] = -np.inf
    return s


ORDER = [20, 0, *range(19, 0, -1)]
"""Key tiles of group 40 in its visit."""


# ---- Votes --------------------------------------------------------------------------------------


def test_votes_are_those_of_the_scores(head, scores) -> None:
    tile_max = scores[:, J * 128 : (J + 1) * 128].max(axis=1)
    before = ORDER[: ORDER.index(J)]
    m = np.max([scores[:, j * 128 : (j + 1) * 128].max(axis=1) for j in before], axis=0)
    for threshold in (1e-4, 0.003, 0.01):
        found = votes.Votes.on(head, I, J, threshold, {})
        np.testing.assert_allclose(found.tile_max, tile_max, atol=1e-3)
        np.testing.assert_allclose(found.m, m, atol=1e-3)
        far = abs(tile_max - m - np.log(threshold)) > 1e-2
        np.testing.assert_array_equal(found.agrees[far], (tile_max - m < np.log(threshold))[far])


def test_page_says_who_vetoed_and_tabulates_all(head, scores) -> None:
    page = open_page(votes="true", votes_view="Table", group="40", key_tile="19")
    found = votes.Votes.on(head, I, 19, 0.01, {})
    n = int((~found.agrees).sum())
    assert 0 < n < 64
    row = I * 64 + int(found.gap.argmax())
    sentence = said(page, f"**{n} of 64 rows veto**")
    assert f"Query row {row:,} most of all" in sentence
    table = page.dataframe[0].value
    assert (table["Vote"] == "vetoes").sum() == n
    assert table["Query row"].tolist() == list(range(2560, 2624))
    chart = open_page(votes="true", group="40", key_tile="19")
    assert sum(sentence.startswith(f"**{n}") for sentence in (m.value for m in chart.markdown)) == 1
    assert len(chart.get("vega_lite_chart")) == 4


@pytest.mark.parametrize(
    ("query", "begins"),
    [
        ({"key_tile": "20"}, "**Every row vetoes**: none has a running maximum yet"),
        ({"key_tile": "30"}, "No query of the group sees a key"),
        ({"key_tile": "4", "threshold": "0"}, "**Every row vetoes**: with λ off"),
        ({"key_tile": "4", "threshold": "1"}, "**All 64 rows agree** to skip: the closest"),
    ],
)
def test_special_votes(query, begins) -> None:
    assert said(open_page(votes="true", group="40", **query), begins)


def test_rows_that_see_nothing_and_rows_beyond_the_end_count_as_agreement() -> None:
    q = np.random.default_rng(0).standard_normal((1, 70, 8)).astype(np.float32)
    short = scan(q, q, tile=(64, 32), mass=True)
    last = votes.Votes.on(short, 0, 1, 0.5, {})  # keys 32 – 63: rows 0 – 31 see none
    assert "32 of the rows see no key here" in votes.said(last, np.log(0.5), 64)
    cut = votes.Votes.on(short, 1, 0, 0.5, {})
    assert "the group has only 6 rows" in votes.said(cut, np.log(0.5), 64)


# ---- The stepper --------------------------------------------------------------------------------


def test_pseudo_code_is_the_readme_s(root) -> None:
    assert f"```\n{rule_source.PSEUDO_CODE}\n```" in (root / "README.md").read_text("utf-8")


@pytest.mark.parametrize("listing", [rule_source.pseudo_code, rule_source.kernel])
def test_every_phase_has_its_own_lines(listing) -> None:
    spans = sorted(listing().lit.values())
    assert len(spans) == len(rule_source.PHASES)
    assert all(a <= b < len(listing().lines) for a, b in spans)
    assert all(before[1] < after[0] for before, after in pairwise(spans))


@pytest.mark.parametrize(
    ("phase", "does"),
    [
        ("scores", "= k[b, key, kv,"),
        ("vote", "cuda.syncthreads_and("),
        ("skip", "u += seen"),
        ("softmax", "alpha = math.exp("),
        ("values", "= v[b, key, kv,"),
        ("output", "out[b, row, h, d] ="),
    ],
)
def test_lit_kernel_lines_do_what_the_phase_says(phase, does) -> None:
    listing = rule_source.kernel()
    holds = {
        name: any(does in line for line in listing.lines[a : b + 1])
        for name, (a, b) in listing.lit.items()
    }
    assert [name for name, here in holds.items() if here] == [phase]
    source = rule_source.KERNEL.read_text("utf-8").splitlines()
    first = listing.lit[phase][0]
    assert source[listing.first_number - 1 + first].strip() == listing.lines[first].strip()


def test_an_edit_of_the_kernel_that_loses_a_line_is_noticed() -> None:
    with pytest.raises(LookupError, match="begins with 'continue'"):
        rule_source._span(["if skip:", "    pass"], "if skip:", "continue")


def test_steps_are_those_of_an_online_softmax(head, scores) -> None:
    data = visit.stepper_data(head, I, 2600, 0.01, {}, NO_WORDS)
    assert [step["j"] for step in data["steps"]] == ORDER
    assert (data["row"], data["first_row"], data["rows"]) == (40, 2560, 64)

    def unpack(name: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(data[name]), "<f4").reshape(len(ORDER), 64)

    m, l, u = np.full(64, -np.inf), np.zeros(64), np.zeros(64)
    for s, (j, step) in enumerate(zip(ORDER, data["steps"], strict=True)):
        tile = scores[:, j * 128 : (j + 1) * 128]
        tile_max = tile.max(axis=1)
        skip = bool((tile_max - m < np.log(0.01)).all())
        assert step["skipped"] == skip
        assert step["vetoes"] == (tile_max - m >= np.log(0.01)).sum()
        if skip:
            u += np.isfinite(tile).sum(axis=1) * np.exp(tile_max - m)
        else:
            new = np.maximum(m, tile_max)
            alpha = np.exp(m - new)
            l, u, m = l * alpha + np.exp(tile - new[:, None]).sum(axis=1), u * alpha, new
            np.testing.assert_allclose(unpack("alpha")[s], alpha, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(unpack("m")[s], m, atol=1e-3)
        np.testing.assert_allclose(unpack("l")[s], l, rtol=2e-3)
        np.testing.assert_allclose(unpack("u")[s], u, rtol=2e-3, atol=1e-9)
    assert sum(step["skipped"] for step in data["steps"]) > 5


def test_page_has_the_stepper_only_when_it_is_open(head) -> None:
    page = open_page(steps="true", group="40")
    assert component(page, 1)["group"] == 40
    assert len(open_page(group="40").get("bidi_component")) == 1


# ---- Forced tiles -------------------------------------------------------------------------------

FORCED = {(40, 0): True, (40, 12): False, (40, 20): True, (63, 31): True, (50, 3): False}


@pytest.mark.parametrize("threshold", [0, 1e-4, 0.01, 0.3, 1])
@pytest.mark.parametrize("order", ["ends_first", "ascending"])
def test_forced_tiles_change_the_rest_as_the_simulator_says(head, threshold, order) -> None:
    one = head.replay(order=order)
    what_if = forced.apply(one, one.curve(), FORCED)
    by_hand = {(0, i, j): skip for (i, j), skip in FORCED.items()}
    expected = rules.decide(one, rules.Maximum(threshold), forced=by_hand)
    tiles = what_if.decide(threshold)
    np.testing.assert_array_equal(tiles.state, expected.state)
    at = what_if.curve.at([threshold])
    assert at.sparsity[0] == pytest.approx(expected.sparsity[0])
    lost = dropped_mass(one.mass, expected)
    assert at.worst_dropped_mass[0] == pytest.approx(lost.max(), abs=1e-6)
    assert at.mean_dropped_mass[0] == pytest.approx(lost.mean(), abs=1e-6)


def test_output_error_is_that_of_dense_attention(trace, head) -> None:
    tiles = forced.apply(head, head.curve(), FORCED).decide(0.01)
    one = scans.Arrays(trace.q[:1], trace.k, trace.v)
    scale = trace.softmax_scale
    dense = attention(*one, softmax_scale=scale).output[0]
    kept = attention(*one, softmax_scale=scale, tiles=tiles).output[0]
    for i in (0, 40, 63):
        rows = head.grid.group_rows(i)
        error = forced._output_error(i, tiles, one, scale)
        assert error == pytest.approx(np.abs(dense - kept)[rows].max(), rel=1e-9)


def test_buttons_force_and_the_page_follows(head) -> None:
    page = open_page(group="63", key_tile="0")
    before = panel(page)
    page.button(key="force_skip").click().run()
    assert not page.exception
    tiles = rules.decide(head, rules.Maximum(0.01), forced={(0, 63, 0): True})
    after = panel(page)
    assert after["skipped"][-1] == tiles.skipped.sum()
    assert after["skipped"][-1] != before["skipped"][-1]
    assert after["forced"] == [[63, 0]]
    lost = dropped_mass(head.mass, tiles)[0]
    assert f"**{100 * lost.max():.0f}" in after["headline"][-1]
    assert "1 tile forced" in after["headline"][-1]
    assert component(page)["heads"][0]["sparsity"][-1] == app.wording.percent(tiles.sparsity[0])
    table = said(page, "|  | rule alone")
    assert f"| {100 * lost[63 * 64 :].mean():.0f} % |" in table
    assert said(page, "Tile (63, 0) is **skipped** by hand: its gap is ")
    assert page.get_by_key("forced").value == ["skip 63,0"]
    page.button(key="force_keep").click().run()
    assert page.get_by_key("forced").value == ["keep 63,0"]
    assert panel(page)["skipped"] == before["skipped"]
    page.button(key="force_none").click().run()
    assert not page.exception
    assert panel(page) == before


def test_forced_tiles_from_the_url_and_nonsense_there() -> None:
    page = open_page(forced=["skip 63,0", "skip 0,31", "eat 3,4", "keep 99999,0", "skip 63,-1"])
    assert page.get_by_key("forced").value == ["skip 63,0"]
    assert panel(page)["forced"] == [[63, 0]]
    assert panel(open_page(forced=["nothing"])) == panel(open_page())


def test_forced_tiles_are_forgotten_with_the_grid_they_are_of() -> None:
    page = open_page(forced=["skip 63,0"])
    page.selectbox(key="vote_rows").set_value(32).run()
    assert not page.exception
    assert panel(page)["forced"] == []


def test_masked_tiles_cannot_be_forced_nor_those_of_long_sources(tmp_path, monkeypatch) -> None:
    assert open_page(group="0", key_tile="20").button(key="force_skip").disabled
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(small(tmp_path)))
    monkeypatch.setattr(scans, "LONG", 100)
    page = open_page(forced=["skip 3,0"], votes="true", steps="true", ledger="true", kernel="true")
    assert page.button(key="force_skip").disabled
    assert panel(page)["forced"] == []


# ---- Work ---------------------------------------------------------------------------------------


def test_ledger_counts_what_the_simulator_counts(trace, head) -> None:
    tiles = head.decide(0.01)
    columns = work.columns_of(head, tiles, 0.01, (64, 64))
    assert list(columns) == ["dense", work.TEACHING, "NVIDIA fmha_v2"]
    assert columns[work.TEACHING] == ledger(tiles, 64, spares_v=True).total
    assert columns["dense"].pv_flops == 2 * 64 * 4096 * 4097 // 2
    other = scan(
        trace.q[:1],
        trace.k,
        tile=(64, 256),
        order="ascending",
        softmax_scale=trace.softmax_scale,
    )
    theirs = ledger(other.decide(0.01), 64).total
    assert columns["NVIDIA fmha_v2"] == theirs
    assert theirs.v_bytes > columns[work.TEACHING].v_bytes


def test_page_shows_the_ledger() -> None:
    page = open_page(ledger="true")
    lines = said(page, "| this head | dense").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| Q·Kᵀ",
        "| K read",
        "| exponentials",
        "| P·V",
        "| V read",
    ]
    assert "(100 %)" in lines[2]
    assert page.get("vega_lite_chart")[-1].proto.alt.startswith(
        "Of the dense work, our teaching kernel does"
    )


def test_our_kernel_reads_v_after_the_vote_as_the_table_says() -> None:
    lit = rule_source.kernel().lit
    assert lit["skip"][1] < lit["values"][0]
    teaching, ours, nvidia, xqa, _ = work.KERNELS
    assert (teaching.spares_v, ours.spares_v, nvidia.spares_v) == (True, False, False)
    assert not xqa.spares_exponentials
    page = open_page(saves="true", group="40", key_tile="3")
    assert "8,192 exponentials" in said(page, "Computed, this tile takes")
    assert said(page, "| kernel |").count("| no |") == 3


@pytest.mark.parametrize(
    ("head_dim", "tile"), [(64, (64, 256)), (128, (64, 128)), (256, None), (32, (64, 256))]
)
def test_nvidia_s_grid_follows_the_head_size(head_dim, tile) -> None:
    assert work.nvidia_tile(head_dim) == tile


# ---- Downloads ----------------------------------------------------------------------------------


def test_picture_shows_every_tile(head) -> None:
    tiles = head.decide(0.01)
    picture = np.asarray(Image.open(io.BytesIO(downloads.picture(tiles))))
    h, w = picture.shape[0] // 64, picture.shape[1] // 32
    assert (h, w) == (8, 16)
    colours = [(238, 238, 238), (0, 114, 178), (230, 159, 0)]
    for i, j in np.random.default_rng(0).integers((64, 32), size=(50, 2)):
        assert tuple(picture[i * h, j * w]) == colours[tiles.state[0, i, j]]


def test_head_as_a_trace_is_what_is_shown(trace) -> None:
    source = sources.Source("x", trace)
    view = scans.View("ends_first", 1024, queries=100)
    arrays = scans.arrays_of(source, [2], view)
    one = scan(arrays.q, arrays.k, softmax_scale=trace.softmax_scale)
    read = read_trace(downloads.trace_file(arrays, trace, 2, one.grid))
    np.testing.assert_array_equal(read.q, trace.q[2:3, 924:1024])
    np.testing.assert_array_equal(read.v, trace.v[:, :1024])
    assert read.head_names == trace.head_names[2:]
    assert read.tokens == trace.tokens[:1024]
    assert read.card["license"] == trace.card["license"]


def test_page_offers_both_files() -> None:
    labels = [one.proto.label for one in open_page(files="true").get("download_button")]
    assert labels == ["Map as PNG", "This head as a trace"]


# ---- Masks and grids ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "cut", "options"),
    [
        ({"window": "700"}, (None, 4096), {"window": 700}),
        ({"queries": "300"}, (300, 4096), {}),
        ({"queries": "300", "length": "2048", "window": "512"}, (300, 2048), {"window": 512}),
        ({"vote_rows": "16", "tile_keys": "256"}, (None, 4096), {"tile": (16, 256)}),
        (
            {"vote_rows": "256", "tile_keys": "512", "order": "descending", "length": "1536"},
            (None, 1536),
            {"tile": (256, 512), "order": "descending"},
        ),
        ({"vote_rows": "1", "length": "512"}, (None, 512), {"tile": (1, 128)}),
    ],
)
def test_masks_and_grids_are_those_of_a_scan_of_their_own(trace, query, cut, options) -> None:
    page = open_page(**query)
    queries, length = cut
    start = 0 if queries is None else length - queries
    own = scan(
        trace.q[:1, start:length], trace.k[:, :length], softmax_scale=trace.softmax_scale, **options
    )
    tiles = own.decide(0.01)
    shown = panel(page)
    assert (shown["groups"], shown["key_tiles"]) == tiles.state.shape[1:]
    assert shown["skipped"][-1] == tiles.skipped.sum()
    assert shown["visited"] == tiles.visited.sum()


def test_sections_follow_a_window_and_a_grid(head) -> None:
    opened = dict.fromkeys(("votes", "steps", "saves", "tiles", "row_tiles", "ledger"), "true")
    page = open_page(
        window="512", vote_rows="32", queries="640", group="10", key_tile="30", **opened
    )
    visit_of_group = [step["j"] for step in component(page, 1)["steps"]]
    assert visit_of_group == [29, 28, 27, 26, 25]  # its last row is key 3,807
    assert page.dataframe[0].value["Key tile"].tolist() == visit_of_group


def test_window_needs_no_second_scan_for_another_order(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(scans, "scan", lambda *a, **k: made.append(1) or scan(*a, **k))
    page = open_page(window="801")
    page.selectbox(key="order").set_value("ascending").run()
    page.selectbox(key="vote_rows").set_value(32).run()
    assert not page.exception
    assert len(made) == 1


# ---- Crops through the real kernel --------------------------------------------------------------


def small(folder: Path, *, causal: bool = True) -> Path:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 640, 16)).astype(np.float32)
    path = folder / "small.safetensors"
    write_trace(path, 3 * q, k, v, softmax_scale=0.5, causal=causal, card={})
    return path


def fake_run(crop, *, threshold, order, softmax_scale) -> CropRun:
    """A kernel that computes what it should skip in the crop's second tile."""
    one = scan(crop.q, crop.k, tile=crop.grid.tile, order=order, softmax_scale=softmax_scale)
    state = one.decide(threshold).state.copy()
    state[0, 0, 1] = 3 - state[0, 0, 1]
    gap = one.gap + np.float32(0.25)
    return CropRun(TileMap(state, crop.grid, order, np.ones(1)), gap, np.zeros((1, 64), np.float32))


def test_crop_lists_the_differences(monkeypatch) -> None:
    monkeypatch.setattr(real_kernel, "run", fake_run)
    page = open_page(kernel="true", group="40", key_tile="5")
    page.button(key="run_crop").click().run()
    assert not page.exception
    assert said(page, "**1 of 8 tiles differ**; the gaps differ by at most 0.25")
    table = page.dataframe[0].value
    assert table["Key tile"].tolist() == [0, 2, 3, 4, 5, 6, 7, 20]
    assert table["Differ"].tolist() == ["", "yes", *[""] * 6]
    page.number_input(key="key_tile").set_value(6).run()
    assert not any("tiles differ" in one.value for one in page.markdown)


def test_crop_that_fails_is_one_sentence(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise CropError("another crop is running; wait until it is done")

    monkeypatch.setattr(real_kernel, "run", fail)
    page = open_page(kernel="true", group="40", key_tile="5")
    page.button(key="run_crop").click().run()
    assert [one.value for one in page.error] == ["Another crop is running; wait until it is done."]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ({"window": "512"}, "without a window"),
        ({"group": "0", "key_tile": "9"}, "does not visit"),
        ({"vote_rows": "256", "tile_keys": "512"}, "would take minutes"),
    ],
)
def test_crop_that_cannot_be_run_says_why(query, reason) -> None:
    page = open_page(kernel="true", **query)
    assert page.button(key="run_crop").disabled
    assert any(reason in one.value for one in page.caption)


def test_crop_of_a_head_that_is_not_causal_or_without_numba(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(small(tmp_path, causal=False)))
    page = open_page(kernel="true")
    assert page.button(key="run_crop").disabled
    assert any("under the causal mask" in one.value for one in page.caption)
    monkeypatch.setattr(real_kernel, "find_spec", lambda name: None)
    page.run()
    assert any(one.value.startswith("Numba is not installed") for one in page.caption)


@pytest.mark.cudasim
@pytest.mark.skipif(find_spec("numba") is None, reason="Numba has no wheel here")
def test_crop_through_the_real_kernel_agrees(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(small(tmp_path)))
    page = open_page(kernel="true", vote_rows="1", group="639", key_tile="2", threshold="0.5")
    page.button(key="run_crop").click().run()
    assert not page.exception
    sentence = said(page, "All 5 tiles are in the same state")
    assert re.search(r"differ by at most \S+ × 10⁻|bitwise equal", sentence)
    assert set(page.dataframe[0].value["Kernel"]) == {"computed", "skipped"}
