"""The calibrate page: every number is the simulator's, refusals are sentences, faults are told."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

import app.calibration_words as words
from app import gap_map_sources, sources
from app.calibrations import joined
from sim import calibration, engines, evaluation_report, gap_maps, targets
from sim.calibration_file import from_json, to_json
from sim.traces import bundled, write_trace

ENTRY = Path(words.__file__).with_name("streamlit_app.py")
NBSP = "\N{NO-BREAK SPACE}"
MARKUP = "**bold** <img src=x onerror=alert(1)> [link](http://x.invalid) `code`"


@pytest.fixture(scope="module")
def maps() -> gap_maps.GapMaps:
    return gap_maps.read_gap_maps(gap_maps.bundled_gap_maps())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Gap maps of two heads groups, in full; their card and text are hostile."""
    path = tmp_path_factory.mktemp("maps") / "small.safetensors"
    made = gap_maps.GapMaps.from_traces(bundled().values(), lengths=[1024, 2048])
    samples = tuple(gap_maps.Sample(**{**vars(sample), "text": MARKUP}) for sample in made.samples)
    hostile = gap_maps.GapMaps(
        **{**vars(made), "samples": samples, "card": {**made.card, "model": MARKUP}}
    )
    hostile.write(path)
    return path.read_bytes()


def open_page(**query: str) -> AppTest:
    page = AppTest.from_file(str(ENTRY), default_timeout=120).run()
    for name, value in query.items():
        page.query_params[name] = value
    page.switch_page("app_pages/calibrate.py").run()
    assert not page.exception
    return page


def upload(page: AppTest, *files: bytes) -> AppTest:
    page.session_state["uploaded_maps"] = list(files)  # AppTest cannot upload
    return page.run().selectbox(key="maps").set_value(gap_map_sources.UPLOAD).run()


def said(page: AppTest) -> str:
    return "\n".join(one.value for one in [*page.markdown, *page.caption])


def cells(page: AppTest, header: str) -> list[list[str]]:
    """Rows of the table whose header begins so."""
    (text,) = [one.value for one in page.markdown if one.value.startswith(f"| {header}")]
    lines = text.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("kernel", "phase", "space", "target"),
    [("ours", "prefill", "log", 50), ("nvidia", "decode", "linear", 35)],
)
def test_factor_and_lengths_are_those_of_the_simulator(maps, kernel, phase, space, target) -> None:
    query = {"for_kernel": kernel, "phase": phase, "space": space, f"{phase}_target": str(target)}
    page = open_page(**query)
    fit = calibration.calibrate(maps, kernel, space=space, phases=[phase]).phases[phase].fit
    factor = fit.scale_factor(target / 100)
    low, high = fit.interval(target / 100)
    line = "`threshold_scale_factor` **{}** (95 % over texts: {} to {})"
    assert line.format(*map(words.plain_number, (factor, low, high))) in said(page)
    achieved = calibration.achieved(maps, targets.target(kernel, phase), factor).mean((1, 2))
    lengths = [sample.length for sample in maps.samples if sample.phase == phase]
    rows = cells(page, "KV length")
    assert [row[0] for row in rows] == ["1,024", "2,048", "4,096", "8,192", "32,768", "131,072"]
    for row, length in zip(rows, (1024, 2048, 4096), strict=False):
        mean = achieved[np.equal(lengths, length)].mean()
        assert row[1:3] == [words.plain_number(factor / length), f"{100 * mean:.0f} %"]
    assert rows[-1][1:] == [words.plain_number(factor / 131_072), "not measured", "–"]


def test_chart_draws_lengths_layers_formula_and_band(maps) -> None:
    page = open_page()
    chart = page.get("vega_lite_chart")[0].proto
    measured = calibration.measure(maps, targets.target("ours", "prefill"))
    spec = json.loads(chart.spec)
    names = next(
        layer["encoding"]["color"]["scale"]["domain"]
        for layer in spec["layer"]
        if "color" in layer["encoding"]
    )
    assert names == [
        *(f"{n} tokens" for n in ("1,024", "2,048", "4,096")),
        "each layer, 4,096 tokens",
        "formula",
    ]
    marks = [layer["mark"]["type"] for layer in spec["layer"]]
    assert marks == ["line", "area", "line", "line", "rule", "rule"]
    shares = measured.sparsity[[s.length == 4096 for s in measured.samples]].mean((0, 1, 2))
    assert f"at 4,096 tokens up to {100 * shares[-1]:.0f}{NBSP}%" in chart.alt
    page.toggle(key="layers").set_value(False).run()
    spec = json.loads(page.get("vega_lite_chart")[0].proto.spec)
    assert [layer["mark"]["type"] for layer in spec["layer"]] == [
        "area",
        "line",
        "line",
        *marks[4:],
    ]


@pytest.mark.parametrize(
    ("kernel", "target", "word"), [("nvidia", 60, "answers go wrong"), ("ours", 70, "dense")]
)
def test_lambda_above_one_is_said(maps, kernel, target, word) -> None:
    page = open_page(for_kernel=kernel, prefill_target=str(target))
    one = calibration.calibrate(maps, kernel, phases=["prefill"])
    factor = one.scale_factor(target / 100)["prefill"]
    rows = cells(page, "KV length")
    for row in rows:
        assert row[1].endswith("**above 1**") == (factor > int(row[0].replace(",", "")))
        assert (row[2] == word) == (factor > int(row[0].replace(",", "")))
    assert rows[0][2] == word
    assert f"shorter than {int(np.ceil(factor)):,} tokens" in said(page)


def test_a_target_outside_the_fit_has_no_factor_and_no_export() -> None:
    page = open_page(for_kernel="nvidia", prefill_target="90")
    assert page.info[0].value.startswith("No factor: the formula was fitted on 10")
    assert "There is no factor to measure." in said(page)
    assert "There is nothing to export" in said(page)
    assert "`threshold_scale_factor` **" in said(page)  # decode still has one


@pytest.mark.parametrize("engine", list(engines.ENGINES))
def test_export_is_the_engine_s_and_reads_back(maps, engine) -> None:
    page = open_page(for_kernel="nvidia", engine=engine, prefill_target="45", decode_target="30")
    one = calibration.calibrate(maps, "nvidia")
    wanted = {"prefill": 0.45, "decode": 0.3}
    text = page.code[0].value
    assert text == engines.export(one, engine, wanted).rstrip("\n")
    setting = engines.read_setting(text)
    assert setting.engine == engine
    for phase, factor in one.scale_factor(wanted).items():
        assert setting.factor(phase) == pytest.approx(factor, rel=1e-5)


def test_refusal_is_the_engine_s_sentence_and_ours_takes_the_factor(maps) -> None:
    page = open_page(for_kernel="ours", engine="vllm")
    with pytest.raises(ValueError, match="vllm decides prefill") as refused:
        engines.export(calibration.calibrate(maps, "ours"), "vllm")
    assert [one.value for one in page.info] == [f"{refused.value}."]
    factor = calibration.calibrate(maps, "ours").scale_factor(0.5)["prefill"]
    assert f"threshold_scale_factor={factor:.6g})" in page.code[0].value


def test_other_kernels_only_when_asked(maps) -> None:
    page = open_page(misses="true", phase="decode", decode_target="40")
    table = calibration.miss_table(maps, "decode", 0.4)
    rows = cells(page, "factor set on")
    for row, miss in zip(rows, table, strict=True):
        assert row[0] == f"**{miss.kernel}**: {words.plain_number(miss.scale_factor)}"
        shares = [f"{100 * share:.0f} %" for share in miss.achieved.values()]
        assert [cell.strip("*") for cell in row[1:]] == shares
    assert "| factor set on" not in said(open_page())


def test_other_kernels_without_a_factor_say_why() -> None:
    page = open_page(misses="true", prefill_target="75")
    assert [row[0] for row in cells(page, "factor set on")][1:] == [
        "**nvidia**: none",
        "**model-optimizer**: none",
    ]
    assert "None on nvidia: target_sparsity must lie between 0.1" in said(page)
    assert "extrapolate" not in said(page)


def test_recorded_quality_is_shown_with_its_origin() -> None:
    report = evaluation_report.bundled_evaluation()
    page = open_page()
    assert page.code[-1].value == report["command"]
    origin = next(one.value for one in page.caption if report["date"] in one.value)
    for word in (report["model"], f"torch {report['versions']['torch']}", "held-out texts"):
        assert word in origin
    chart = page.get("vega_lite_chart")[1].proto
    row = next(one for one in report["rows"] if one["kernel"] == "ours")
    assert f"{row['length']:,} tokens" in chart.alt
    found = cells(page, "kernel | tokens")
    first = report["answers"]["skippable"][0]
    assert found[0][:2] == [first["kernel"], f"{first['length']:,}"]
    assert f"{100 * first['changes'][0]['sparsity'][0]:.0f} %" in found[0][2]


def test_missing_evaluation_is_one_sentence(monkeypatch) -> None:
    def absent() -> dict:
        raise FileNotFoundError

    monkeypatch.setattr(evaluation_report, "bundled_evaluation", absent)
    page = open_page()
    assert "No evaluation has been recorded yet" in said(page)
    assert len(page.get("vega_lite_chart")) == 1


def test_uploaded_maps_are_calibrated_and_their_text_is_only_text(small) -> None:
    page = upload(open_page(), small)
    assert not page.exception
    one = calibration.calibrate(gap_maps.read_gap_maps(small))
    factor = one.scale_factor({"prefill": 0.5})["prefill"]
    assert f"**{words.plain_number(factor)}**" in said(page)
    assert "2 layers and 3 heads" in said(page)
    assert MARKUP not in said(page)
    assert f"model: {MARKUP}" in [one.value for one in page.text]


def test_uploaded_trace_is_scanned(monkeypatch) -> None:
    path = next(iter(bundled().values()))
    page = upload(open_page(), path.read_bytes())
    assert not page.exception
    made = gap_maps.GapMaps.from_traces([path])
    factor = calibration.calibrate(made, phases=["prefill"]).scale_factor(0.5)["prefill"]
    assert f"**{words.plain_number(factor)}**" in said(page)
    assert not [one for one in page.toggle if one.key == "layers"]  # there is one layer


def test_head_dim_decides_which_of_nvidias_grids_is_exported(small) -> None:
    page = upload(open_page(prefill_target="40", decode_target="40", misses="true"), small)
    assert "At this model's head_dim, 64, NVIDIA's Hopper prefill decides as nvidia-256" in said(
        page
    )
    assert "**nvidia-256**: tiles of 64 × 256" in said(page)
    choice = next(one for one in page.get("button_group") if one.label == "Kernel")
    choice.set_value("nvidia").run()
    (refused,) = [one.value for one in page.info if "calibrate with kernel" in one.value]
    assert refused.startswith("tensorrt-llm decides prefill at head_dim 64 on tiles of 64 × 256")
    next(one for one in page.get("button_group") if one.label == "Kernel").set_value("nvidia-256")
    page.run()
    assert not page.info
    assert "tiles of 64 × 256" in page.code[0].value
    next(one for one in page.get("button_group") if one.label == "Phase").set_value("decode").run()
    assert not page.info  # the choice outlives the phase, in which it decides as nvidia does
    assert page.session_state["for_kernel"] == "nvidia-256"


@pytest.mark.parametrize(
    ("files", "words_"),
    [
        ([b"\xff" * 64], "file 1: the header claims"),
        ([b""], "file 1: the file is 0 bytes long"),
        (None, "some of each"),
    ],
)
def test_a_fault_of_a_file_is_one_sentence_and_the_page_stays(small, files, words_) -> None:
    trace = next(iter(bundled().values())).read_bytes()
    page = upload(open_page(), *(files or [small, trace]))
    assert not page.exception
    (sentence,) = [one.value for one in page.error]
    assert words_ in sentence
    assert "30 layers" in said(page)


def test_trace_that_cannot_be_fitted_says_why(tmp_path, monkeypatch) -> None:
    flat = np.zeros((1, 600, 16), np.float32)  # every gap is 0: nothing is ever skipped
    path = tmp_path / "flat.safetensors"
    write_trace(path, flat, flat, flat, softmax_scale=1, card={"layer": "3"})
    monkeypatch.setenv(sources.TRACE_VARIABLE, str(path))
    page = open_page(maps="file: flat.safetensors")
    assert page.info[0].value.startswith("No formula: prefill: a fit needs at least 3 points")
    assert "There is nothing to export" in said(page)
    assert page.get("vega_lite_chart")


def test_phases_that_were_calibrated_alone_are_one_calibration(maps) -> None:
    alone = {p: calibration.calibrate(maps, "nvidia", phases=[p]) for p in targets.PHASES}
    read = from_json(to_json(joined(alone)))
    whole = calibration.calibrate(maps, "nvidia")
    assert tuple(read.phases) == targets.PHASES
    for phase in targets.PHASES:
        assert read.phases[phase].fit.range == whole.phases[phase].fit.range
    assert read.scale_factor(0.5) == whole.scale_factor(0.5)


# ---- In Chromium ---------------------------------------------------------------------------------

CHART = '[data-testid="stVegaLiteChart"] :is(svg, canvas)'


@pytest.mark.browser
def test_what_is_chosen_stands_in_the_url_and_an_upload_is_opened(open_page, tmp_path, small):
    page = open_page("calibrate", ready=CHART)
    page.settle()
    page.get_by_role("slider", name="Target sparsity in prefill").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile("prefill_target=51"))
    page.get_by_role("radio", name="nvidia", exact=True).click()
    page.wait_for_url(re.compile("for_kernel=nvidia"))
    path = tmp_path / "mine.safetensors"
    path.write_bytes(small)
    page.locator("input[type=file]").set_input_files(path)
    page.wait_for_url(re.compile("maps=upload"))
    page.get_by_text("2 layers and 3 heads").wait_for()
    assert page.locator("img[src=x], a[href*='x.invalid']").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(1400, "light"), (1400, "dark"), (400, "light")])
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(open_page, width, theme) -> None:
    from axe_playwright_python.sync_playwright import Axe

    query = "calibrate?for_kernel=nvidia&misses=true"
    page = open_page(query, ready=CHART, width=width, height=5000, color_scheme=theme)
    page.settle()
    for label in ("What am I looking at?", "Where these gap maps come from"):
        page.get_by_text(label).click()
    page.settle()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    main = page.locator('[data-testid="stMain"]')
    assert main.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    found = Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(
        [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in serious], indent=1
    )
