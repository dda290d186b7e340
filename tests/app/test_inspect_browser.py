"""Stepper, forced tiles and downloads in Chromium: what only a browser can show."""

import json
import re

import pytest

from app import rule_source
from app.wording import percent
from sim import rules, scan
from sim.traces import bundled, read_trace

pytestmark = pytest.mark.browser

OPEN = "votes=true&steps=true&saves=true&kernel=true&ledger=true&files=true"


@pytest.fixture(scope="module")
def head():
    trace = read_trace(next(iter(bundled().values())))
    return scan(trace.q[:1], trace.k, softmax_scale=trace.softmax_scale, mass=True)


def stepper(open_page, **context):
    page = open_page("?steps=true&group=40&row=2600", **context)
    page.wait_for_selector(".stepper .line.lit")
    page.settle()
    return page


def shown(page) -> dict[str, str]:
    rows = page.locator(".numbers tr")
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows.all()}


def lit(page, which: str) -> list[int]:
    lines = page.locator(f".listing.{which} .lit")
    return [int(line.get_attribute("data-number")) for line in lines.all()]


def expected(listing, phase: str) -> list[int]:
    first, last = listing.lit[phase]
    return [listing.first_number + n for n in range(first, last + 1)]


def test_stepping_by_keyboard_follows_the_rule_and_sends_nothing(open_page, head) -> None:
    page = stepper(open_page)
    page.sent.clear()
    page.locator(".stage").focus()
    status = page.locator(".stepper .status")
    for step in list(rules.walk(head, 0, 40, rules.Maximum(0.01)))[:12]:
        for phase in ("scores", "vote", *(("skip",) if step.skipped else ("softmax", "values"))):
            assert f"key tile {step.j}." in status.inner_text()
            assert lit(page, "pseudo") == expected(rule_source.pseudo_code(), phase)
            assert lit(page, "kernel") == expected(rule_source.kernel(), phase)
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        vetoes = int((~step.vote).sum())
        said = "all 64 agree, skipped" if step.skipped else f"{vetoes} row"
        assert said in status.inner_text()
        numbers = shown(page)
        assert numbers["running max m"] == f"{step.m[40]:.2f}".replace("-", "−")
        assert float(numbers["running sum l"]) == pytest.approx(step.l[40], rel=1e-2)
        page.keyboard.press("ArrowRight")
    assert not page.sent


def test_ends_tiles_rows_and_scrubbing(open_page) -> None:
    page = stepper(open_page)
    stage, status = page.locator(".stage"), page.locator(".stepper .status")
    stage.focus()
    page.keyboard.press("End")
    assert "After 21 tiles" in status.inner_text()
    assert lit(page, "kernel") == expected(rule_source.kernel(), "output")
    page.keyboard.press("Home")
    assert "Tile 1 of 21" in status.inner_text()
    page.keyboard.press("PageDown")
    page.keyboard.press("PageDown")
    assert "Tile 3 of 21" in status.inner_text()
    page.get_by_role("button", name="Tile back").click()
    assert "Tile 2 of 21" in status.inner_text()
    stage.focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".row-caption").inner_text().startswith("Query row 2,601")
    page.locator(".scrub").fill("0")
    assert "Tile 1 of 21" in status.inner_text()
    assert page.locator(".scrub").get_attribute("aria-valuetext") == "tile 1 of 21, scores"


def test_it_plays_pauses_and_stays_with_the_page(open_page) -> None:
    page = stepper(open_page)
    assert page.locator(".speed").input_value() == "1"
    page.locator(".speed").select_option("10")
    play, scrub = page.locator(".play"), page.locator(".scrub")
    play.click()
    assert play.inner_text() == "Pause"
    while int(scrub.input_value()) < 4:
        page.wait_for_timeout(50)
    play.click()
    at = int(scrub.input_value())
    page.timers(400)
    assert int(scrub.input_value()) == at
    assert play.inner_text() == "Play"
    page.get_by_role("spinbutton", name="Query row").fill("2610")
    page.keyboard.press("Enter")
    page.settle()
    assert int(scrub.input_value()) == at
    page.get_by_role("spinbutton", name="Query group").fill("41")
    page.keyboard.press("Enter")
    page.settle()
    assert int(scrub.input_value()) == 0


def test_reduced_motion_starts_at_half_speed(open_page) -> None:
    page = stepper(open_page, reduced_motion="reduce")
    assert page.locator(".speed").input_value() == "0.5"


def test_forcing_a_clicked_tile_moves_map_and_numbers_and_url(open_page, head) -> None:
    page = open_page()
    page.settle()
    box = page.locator(".map").bounding_box()
    page.mouse.click(box["x"] + 0.5 / 32 * box["width"], box["y"] + 60.5 / 64 * box["height"])
    page.settle()
    page.get_by_role("button", name="Skip it").click()
    page.settle()
    assert "forced=skip+60%2C0" in page.url
    tiles = rules.decide(head, rules.Maximum(0.01), forced={(0, 60, 0): True})
    counts = page.locator(".legend").inner_text()
    assert f"skipped {tiles.skipped.sum()}" in counts
    assert "1 tile forced" in page.locator(".headline").inner_text()
    shared = open_page("?" + page.url.split("?")[1])
    shared.settle()
    assert shared.locator(".headline").inner_text() == page.locator(".headline").inner_text()
    shared.locator(".map").focus()
    shared.keyboard.press("ArrowRight")
    shared.keyboard.press("ArrowLeft")
    shared.timers(300)
    assert shared.locator(".reading").inner_text() == "Tile (60, 0): skipped; forced by hand."
    page.get_by_role("button", name="Undo all").click()
    page.settle()
    assert "forced" not in page.url
    assert "forced" not in page.locator(".headline").inner_text()
    page.get_by_role("button", name="Keep it").click()
    page.settle()
    assert "forced=keep+60%2C0" in page.url


def test_slider_off_keeps_what_is_skipped_by_hand(open_page) -> None:
    page = open_page("?forced=skip+60,0")
    page.settle()
    page.locator(".tile-map input").focus()
    page.keyboard.press("Home")
    page.drawn()
    assert "λ off, 1 tile forced" in page.locator(".headline").inner_text()
    assert "skipped 1\n" in page.locator(".legend").inner_text()
    assert percent(1 / 1056) in page.locator(".headline").inner_text()


def test_files_come_down(open_page, tmp_path) -> None:
    page = open_page("?files=true")
    for button, name in (
        ("Map as PNG", "tile-map-head-0.png"),
        ("This head as a trace", "head-0.safetensors"),
    ):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    assert read_trace(tmp_path / "head-0.safetensors").q.shape == (1, 4096, 64)
    assert (tmp_path / "tile-map-head-0.png").read_bytes().startswith(b"\x89PNG")


def test_narrow_page_with_all_open_does_not_scroll_sideways(open_page) -> None:
    page = open_page(f"?{OPEN}&forced=skip+60,0", width=400, height=800)
    page.settle()
    main = page.locator('[data-testid="stMain"]')
    assert main.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    assert page.locator(".stepper").bounding_box()["width"] > 250


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_the_rules(open_page, theme) -> None:
    from axe_playwright_python.sync_playwright import Axe

    ready = '[data-testid="stVegaLiteChart"] :is(canvas, svg)'
    page = open_page("rules?source=workload:+sink", ready=ready, height=2000, color_scheme=theme)
    page.settle()
    found = Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(
        [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in serious], indent=1
    )


def test_pages_lead_to_each_other(open_page) -> None:
    page = open_page()
    page.get_by_role("link", name="Rules").click()
    page.wait_for_url(re.compile("/rules"))
    page.get_by_role("heading", name="Rules").wait_for()
    page.get_by_role("link", name="Tile map").click()
    page.wait_for_selector(".tile-map .headline strong")
