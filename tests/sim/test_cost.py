"""Counts against loops over pairs; pictures against states."""

import re
from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from sim import workloads
from sim.cost import ledger, matrix_work_ratio
from sim.draw import PALETTE, Axis, labelled, labelled_tile_map, tile_map_image
from sim.geometry import Grid, TileMap
from sim.skip_softmax import scan

GRID = Grid((4, 8), 10, 20, True)
STATE = np.array([[[1, 2, 0], [1, 2, 1], [1, 2, 1]], [[1, 1, 0], [2, 1, 1], [2, 2, 1]]], np.uint8)


def test_every_count_matches_a_loop_over_pairs():
    tiles = TileMap(STATE, GRID, "ascending", np.zeros(2))
    count = ledger(tiles, 6, 5, element_bytes=4)
    spared = ledger(tiles, 6, 5, element_bytes=4, spares_v=True)
    for which, state in ((count.computed, 1), (count.skipped, 2)):
        pairs = sum(
            STATE[h, r // 4, c // 8] == state
            for h in range(2)
            for r in range(10)
            for c in range(20)
            if c <= r + 10
        )
        keys = sum(
            len(range(20)[GRID.tile_keys(j)])
            for h in range(2)
            for i in range(3)
            for j in range(3)
            if STATE[h, i, j] == state
        )
        assert which.qk_flops == 2 * 6 * pairs
        assert which.pv_flops == (2 * 5 * pairs if state == 1 else 0)
        assert which.exponentials == (pairs if state == 1 else 0)
        assert which.k_bytes == 4 * 6 * keys
        assert which.v_bytes == 4 * 5 * keys
    assert spared.skipped.v_bytes == 0
    assert spared.computed == count.computed
    assert count.dense.qk_flops == count.total.qk_flops
    assert count.dense.matrix_flops == 2 * (6 + 5) * 2 * int(GRID.pairs().sum())


def test_ratio_stays_below_two_however_much_is_skipped():
    work = workloads.columns(4096, heads=1, sparsity=0.85)
    tiles = scan(work.q, work.k).decide(0.01)
    ratio = ledger(tiles, 128).matrix_work_ratio
    assert 1.7 < ratio < 2
    assert ledger(scan(work.q, work.k).decide(0.0), 128).matrix_work_ratio == 1


def test_ratio_from_the_curve_is_that_of_the_ledger():
    work = workloads.sink(1024)
    one = scan(work.q, work.k)
    for lam in (0.001, 0.05, 1.0):
        ratio = matrix_work_ratio(one.curve(2).at([lam]).pair_share[0], 64, 32)
        tiles = one.heads([2]).decide(lam)
        assert ratio == pytest.approx(ledger(tiles, 64, 32).matrix_work_ratio)
        assert ratio > 1


def test_picture_shows_each_state_in_its_colour():
    tiles = TileMap(STATE, GRID, "ascending", np.zeros(2))
    image = tile_map_image(tiles, head=1, cell=1)
    assert image.size == (6, 3)
    for i in range(3):
        for j in range(3):
            r, g, b = image.getpixel((2 * j, i))
            assert f"#{r:02X}{g:02X}{b:02X}" == list(PALETTE.values())[STATE[1, i, j]]


def test_skipped_tiles_are_told_apart_without_colour():
    image = np.asarray(tile_map_image(TileMap(STATE, GRID, "ascending", np.zeros(2)), cell=8))
    skipped, computed = image[:8, 16:32], image[:8, :16]
    assert len(np.unique(skipped.reshape(-1, 3), axis=0)) == 2
    assert len(np.unique(computed.reshape(-1, 3), axis=0)) == 1


def test_bad_pictures_are_named():
    tiles = TileMap(STATE, GRID, "ascending", np.zeros(2))
    with pytest.raises(ValueError, match="head must be between 0 and 1, got 2"):
        tile_map_image(tiles, head=2)
    with pytest.raises(ValueError, match="cell must be at least 1 pixel, got 0"):
        tile_map_image(tiles, cell=0)


@pytest.fixture
def words(monkeypatch):
    """Text → its box (left, top, right, bottom), of everything written on a picture."""
    boxes = []
    write = ImageDraw.ImageDraw.text

    def text(self, xy, text, fill, font, anchor):
        boxes.append((text, self.textbbox(xy, text, font, anchor)))
        write(self, xy, text, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return boxes


def random_map(lq, lk):
    grid = Grid((64, 128), lq, lk, True)
    state = np.random.default_rng(0).integers(1, 3, (1, grid.groups, grid.key_tiles), np.uint8)
    return TileMap(np.where(grid.visited_tiles(), state, 0), grid, "ascending", np.zeros(1))


def place_of(picture, sheet):
    """Box of a picture, pixel for pixel, on the sheet on which it was put."""
    wanted, pixels = np.asarray(picture), np.asarray(sheet)
    height, width = wanted.shape[:2]
    *_, (left, top) = [  # below any cell of the legend
        (left, top)
        for top in range(sheet.height - height)
        for left in range(sheet.width - width)
        if np.array_equal(pixels[top, left : left + width], wanted[0])
        and np.array_equal(pixels[top : top + height, left : left + width], wanted)
    ]
    return left, top, left + width, top + height


@pytest.mark.parametrize(
    ("tiles", "cell"),
    [
        (random_map(64, 100), 1),
        (random_map(300, 300), 8),
        (random_map(64, 768), 48),
        (random_map(4096, 4096), 6),
        (random_map(131_072, 131_072), 1),
        (random_map(16_384, 16_384), 8),
    ],
    ids=["one tile", "small", "one group", "lesson", "thousands of tiles", "2048 pixels"],
)
def test_labels_are_whole_apart_and_not_on_the_map(tiles, cell, words):
    sheet = labelled_tile_map(tiles, cell=cell)
    boxes = [box for _, box in words] + [place_of(tile_map_image(tiles, cell=cell), sheet)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= sheet.width
        assert 0 <= top < bottom <= sheet.height
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    grid = tiles.grid
    groups, keys = f"{grid.groups:,} vote groups", f"{grid.key_tiles:,} key tiles"
    said = [text for text, _ in words]
    for name in (f"across: {keys} of 128 keys", f"down: {groups} of 64 query rows"):
        assert re.sub(r" 1 (\w+ \w+)s", r" 1 \1", name) in said
    assert 2 <= sum(text.isdigit() for text in said) <= 22


def test_the_legend_names_the_colours_that_occur(words):
    for state in (STATE[:1] * 0 + 1, STATE[1:], np.minimum(STATE[:1], 1)):
        words.clear()
        sheet = labelled_tile_map(TileMap(state, GRID, "ascending", np.zeros(1)), cell=8)
        boxes = {text: box for text, box in words if text in PALETTE}
        assert list(boxes) == [
            name
            for name in ("computed", "skipped", "masked")
            if (state == list(PALETTE).index(name)).any()
        ]
        for name, (left, top, _, bottom) in boxes.items():
            swatch = np.asarray(sheet)[round(top + bottom) // 2, round(left) - 16 : round(left) - 7]
            colours = {tuple(pixel) for pixel in swatch.tolist()}
            assert ImageColor.getrgb(PALETTE[name]) in colours
            assert len(colours) == (2 if name == "skipped" else 1)  # strokes, as on the map


def test_numbers_stand_at_the_middle_of_their_cells(words):
    picture = Image.new("RGB", (50 * 7, 30 * 7), "#0072B2")
    axes = Axis("keys", 50, first=80), Axis("queries", 30, first=1398)
    sheet = labelled(picture, {"all": "#0072B2"}, *axes)
    left, top, _, _ = place_of(picture, sheet)
    numbers = {int(text): box for text, box in words if text.isdigit()}
    across = {n: (box[0] + box[2]) / 2 for n, box in numbers.items() if n < 1398}
    down = {n: (box[1] + box[3]) / 2 for n, box in numbers.items() if n >= 1398}
    assert list(across) == list(range(80, 130, 5))
    assert list(down) == list(range(1400, 1428, 5))
    for n, x in across.items():
        assert x == pytest.approx(left + (n - 80 + 0.5) * 7, abs=1.5)
    for n, y in down.items():
        assert y == pytest.approx(top + (n - 1398 + 0.5) * 7, abs=1.5)


def test_words_grow_with_the_picture(words):
    heights = []
    for side in (100, 768, 1536, 3072):
        words.clear()
        labelled(Image.new("RGB", (side, side)), {"k": "black"}, Axis("a", 4), Axis("b", 4))
        heights.append(next(box[3] - box[1] for text, box in words if text == "k"))
    assert heights[0] == heights[1]
    assert all(b > 1.7 * a for a, b in pairwise(heights[1:]))
