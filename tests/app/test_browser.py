"""The tile map in Chromium: what only a browser can show."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from sim import scan
from sim.traces import bundled, read_trace, write_trace

pytestmark = pytest.mark.browser

COLOURS = {1: (0, 114, 178), 2: (230, 159, 0)}
MASKED = {"light": (238, 238, 238), "dark": (38, 42, 51)}
MARKUP = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>**bold** [link](http://x.invalid) "
    ":red[red] :material/home: `code`"
)


def headline(page) -> str:
    page.drawn()
    return page.locator(".headline").first.inner_text()


def pixels(page, cells: list[tuple[int, int]], shape: tuple[int, int]) -> list[tuple[int, ...]]:
    """Most frequent colour of each cell."""
    return [
        tuple(
            page.locator(".map canvas").first.evaluate(
                """(canvas, [i, j, rows, columns]) => {
                    const w = canvas.width / columns, h = canvas.height / rows;
                    const x = Math.round(j * w), y = Math.round(i * h);
                    const data = canvas.getContext("2d").getImageData(x, y, w - 1, h - 1).data;
                    const count = {};
                    for (let n = 0; n < data.length; n += 4) {
                        const key = [data[n], data[n + 1], data[n + 2]].join();
                        count[key] = (count[key] ?? 0) + 1;
                    }
                    const most = Object.entries(count).sort((a, b) => b[1] - a[1])[0][0];
                    return most.split(",").map(Number);
                }""",
                [i, j, *shape],
            )
        )
        for i, j in cells
    ]


@pytest.fixture(scope="module")
def scanned():
    trace = read_trace(next(iter(bundled().values())))
    return scan(trace.q[:1], trace.k, softmax_scale=trace.softmax_scale)


BUSY = """
import time
start = time.perf_counter()
while time.process_time() < 0.2: pass
print((time.perf_counter() - start) / 0.2)
"""


def slowness() -> float:
    """How many times longer than alone a process takes now, with one started on every core."""
    command = [sys.executable, "-S", "-c", BUSY]
    cores = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(os.cpu_count() or 1)]
    return max(1.0, *(float(core.communicate()[0]) for core in cores))


def test_first_paint_within_three_seconds_of_the_page_load(open_page) -> None:
    open_page().settle()  # the server has imported what it needs
    took: list[float] = []  # seconds, ÷ what others' use of the machine makes of one
    while not took or (min(took) > 3 and len(took) < 8):
        before, start = slowness(), time.perf_counter()
        page = open_page()
        wall = time.perf_counter() - start
        took.append(2 * wall / (before + slowness()))
        assert "of tiles skipped" in headline(page)
    assert min(took) < 3, took


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_map_shows_the_states_that_the_simulator_decides(open_page, scanned, theme) -> None:
    page = open_page(color_scheme=theme)
    state = scanned.decide(0.01).state[0]
    rng = np.random.default_rng(0)
    cells = [(int(i), int(j)) for i, j in rng.integers(state.shape, size=(60, 2))]
    colours = COLOURS | {0: MASKED[theme]}
    assert pixels(page, cells, state.shape) == [colours[int(state[cell])] for cell in cells]


def test_slider_by_keyboard_answers_in_the_browser_and_is_sent_once(open_page, scanned) -> None:
    page = open_page()
    page.settle()
    page.locator(".tile-map input").focus()
    page.sent.clear()
    before = headline(page)
    page.keyboard.press("ArrowRight")
    assert headline(page) != before
    assert "λ = 0.0112" in headline(page)
    assert not page.sent
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    assert not page.sent
    page.settle()
    assert len(page.sent) == 1
    assert "threshold=0.0251" in page.url
    skipped = f"{100 * scanned.decide(0.0251).sparsity[0]:.0f}"
    assert f"λ = 0.0251: {skipped}\N{NO-BREAK SPACE}% of tiles skipped" in headline(page)
    assert page.locator(".tile-map input").get_attribute("aria-valuetext") == "λ = 0.0251"


def test_slider_by_pointer_answers_while_it_is_dragged(open_page) -> None:
    page = open_page()
    page.settle()
    box = page.locator(".tile-map input").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.66, y)
    page.mouse.down()
    page.sent.clear()
    seen = set()
    for share in (0.6, 0.5, 0.4, 0.8, 0.9):
        page.mouse.move(box["x"] + box["width"] * share, y)
        seen.add(headline(page))
        assert not page.sent
    assert len(seen) == 5
    page.mouse.move(box["x"] + 2, y)
    page.mouse.up()
    page.settle()
    assert "threshold=0" in page.url
    assert "dense attention" in headline(page)


def test_slider_dragged_back_to_its_place_follows_again(open_page) -> None:
    page = open_page()
    page.settle()
    before = headline(page)
    box = page.locator(".tile-map input").bounding_box()
    thumb = box["x"] + 12 + (box["width"] - 24) * 81 / 121
    y = box["y"] + box["height"] / 2
    page.mouse.move(thumb, y)
    page.mouse.down()
    page.mouse.move(thumb + 80, y)
    assert headline(page) != before
    page.mouse.move(thumb, y)
    page.mouse.up()
    page.settle()
    assert headline(page) == before
    page.get_by_role("spinbutton", name="Threshold λ").fill("0.5")
    page.keyboard.press("Enter")
    page.settle()
    assert "λ = 0.5" in headline(page)


def test_exact_threshold_by_number(open_page) -> None:
    page = open_page()
    page.get_by_role("spinbutton", name="Threshold λ").fill("0.0333")
    page.keyboard.press("Enter")
    page.settle()
    assert "λ = 0.0333" in headline(page)
    assert page.locator(".tile-map output").inner_text() == "λ = 0.0333"


def test_tile_by_pointer(open_page, scanned) -> None:
    page = open_page()
    box = page.locator(".map").bounding_box()
    state, gap = scanned.decide(0.01).state[0], scanned.gap[0]
    i, j = 33, 5
    at = (box["x"] + (j + 0.5) / 32 * box["width"], box["y"] + (i + 0.5) / 64 * box["height"])
    page.mouse.move(*at)
    tooltip = page.locator(".tooltip").inner_text()
    name = ("masked", "computed", "skipped")[state[i, j]]
    assert tooltip.startswith(f"Tile (33, 5): {name}\ngap {gap[i, j]:.2f}".replace("-", "−"))
    tokens = read_trace(next(iter(bundled().values()))).tokens
    assert "".join(tokens[640:650]).split()[1] in tooltip
    page.mouse.click(*at)
    page.settle()
    assert "group=33" in page.url
    assert "key_tile=5" in page.url
    assert page.get_by_role("spinbutton", name="Query group").input_value() == "33"
    assert page.get_by_text(f"Tile (33, 5) is {name}").count() == 1


def test_tile_by_keyboard(open_page) -> None:
    page = open_page("?group=40&key_tile=3")
    tiles = page.get_by_role("application")
    tiles.focus()
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "PageUp"):
        page.keyboard.press(key)
    reading = page.locator(".reading")
    assert reading.get_attribute("aria-live") == "polite"
    page.timers(300)
    assert reading.inner_text().startswith("Tile (31, 5): ")
    page.keyboard.press("End")
    page.timers(300)
    assert reading.inner_text() == "Tile (31, 15): computed; first visited, never skipped."
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.settle()
    assert "group=31" in page.url
    assert page.get_by_role("spinbutton", name="Key tile").input_value() == "0"
    page.keyboard.press("Escape")
    assert page.locator(".tooltip").is_hidden()


def test_head_by_thumbnail_and_the_way_back(open_page) -> None:
    page = open_page()
    first = headline(page)
    page.get_by_role("group", name="Heads").get_by_role("button").nth(2).click()
    page.settle()
    assert "head=2" in page.url
    assert headline(page) != first
    pressed = page.locator(".head[aria-pressed=true]")
    assert pressed.count() == 1
    page.get_by_role("group", name="Heads").get_by_role("button").nth(0).click()
    page.settle()
    assert headline(page) == first


def test_url_reproduces_what_was_set_by_hand(open_page) -> None:
    page = open_page()
    page.get_by_text("Compare visit orders").click()
    page.settle()
    page.get_by_role("radio", name="scale factor").or_(
        page.get_by_role("button", name="scale factor")
    ).first.click()
    page.wait_for_url(re.compile("factor=40.96"))
    page.settle()
    page.get_by_role("slider", name="Context length, tokens").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.wait_for_url(re.compile("length=2560"))
    page.settle()
    shown = page.locator(".headline").all_inner_texts()
    assert len(shown) == 2
    assert all("λ = 0.016: " in one for one in shown)
    again = open_page("?" + page.url.split("?")[1])
    again.settle()
    assert again.locator(".headline").all_inner_texts() == shown


def test_fixed_scale_factor_stays_when_lengths_follow_each_other_quickly(open_page) -> None:
    page = open_page("?hold=scale+factor&factor=40.96")
    page.get_by_role("slider", name="Context length, tokens").focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowLeft"):
        asked = len(page.sent)
        page.keyboard.press(key)
        while len(page.sent) == asked:  # each is a run of its own: the slider waits before it sends
            page.wait_for_timeout(5)
    page.settle()
    assert "factor=40.96" in page.url
    assert "length=3072" in page.url
    assert "λ = 0.0133: " in headline(page)
    page.get_by_role("spinbutton", name="Threshold λ").fill("0.02")
    page.keyboard.press("Enter")
    page.settle()
    assert "factor=61.44" in page.url
    assert page.get_by_role("spinbutton", name="Threshold λ").evaluate(
        "node => node === document.activeElement"
    )
    page.get_by_role("radio", name="λ").or_(page.get_by_role("button", name="λ")).first.click()
    page.settle()
    assert "threshold=0.02" in page.url
    assert "factor" not in page.url


def test_compared_maps_share_slider_and_cursor(open_page) -> None:
    page = open_page("?compare=true")
    page.settle()
    before = page.locator(".headline").all_inner_texts()
    page.locator(".tile-map input").focus()
    page.keyboard.press("ArrowLeft")
    page.drawn()
    after = page.locator(".headline").all_inner_texts()
    assert all(a != b for a, b in zip(before, after, strict=True))
    left, right = (page.locator(".map").nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


@pytest.mark.parametrize("width", [400, 640])  # 640: a window of 1280 at 200 %
def test_narrow_and_zoomed_pages_do_not_scroll_sideways(open_page, width) -> None:
    page = open_page(width=width, height=600, device_scale_factor=2)
    page.settle()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    main = page.locator('[data-testid="stMain"]')
    assert main.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    box = page.locator(".map").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["width"] > 0.7 * width


def test_targets_are_large_enough(open_page) -> None:
    page = open_page()
    for target in [*page.locator(".head").all(), page.locator(".tile-map input")]:
        box = target.bounding_box()
        assert min(box["width"], box["height"]) >= 24


OPEN = "&".join(
    f"{key}=true"
    for key in ("votes", "steps", "saves", "kernel", "tiles", "row_tiles", "ledger", "files")
)
"""All sections that are made only when they are open."""


@pytest.mark.parametrize(
    ("query", "width", "theme"),
    [
        (f"?{OPEN}&forced=skip+60,0", 1400, "light"),
        (f"?{OPEN}&forced=skip+60,0", 1400, "dark"),
        (f"?{OPEN}&forced=skip+60,0", 400, "light"),
        ("?compare=true", 1400, "dark"),
    ],
)
def test_axe_finds_nothing_serious(open_page, query, width, theme) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(query, width=width, height=6000, color_scheme=theme)
    page.settle()
    for label in ("What am I looking at?", "Where this trace comes from"):
        page.get_by_text(label).click()
    page.settle()
    found = Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(
        [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in serious], indent=1
    )


def test_text_of_an_uploaded_trace_is_only_text(open_page, tmp_path) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 300, 8)).astype(np.float32) for n in (2, 1, 1))
    card = {field: MARKUP for field in ("model", "license", "text", "layer", "command", "<b>x</b>")}
    card["heads"] = json.dumps([MARKUP, MARKUP])
    path = tmp_path / "markup.safetensors"
    write_trace(path, q, k, v, tokens=[MARKUP] * 300, softmax_scale=1, card=card)
    page = open_page()
    page.locator("input[type=file]").set_input_files(path)
    page.wait_for_url(re.compile("source=upload"))
    page.settle()
    for expander in page.locator('[data-testid="stMain"] details summary').all():
        expander.click()
    page.locator(".map").hover()
    page.settle()
    assert page.locator(".tooltip").inner_text().count("<img src=x onerror") > 3
    assert page.get_by_text("<b>x</b>: <img src=x").count() == 1
    assert page.locator("img[src=x], a[href*='x.invalid'], script:text('alert(2)')").count() == 0
    assert page.get_by_text("bold", exact=True).count() == 0
    assert page.locator("code", has_text="code").count() == 0


def test_upload_that_is_no_trace_leaves_the_map(open_page, tmp_path) -> None:
    path = tmp_path / "no.safetensors"
    path.write_bytes(b"\xff" * 64)
    page = open_page()
    before = headline(page)
    page.locator("input[type=file]").set_input_files(path)
    page.get_by_text("This file was not opened").wait_for()
    page.settle()
    assert headline(page) == before
