"""Counts against loops over pairs; pictures against states."""

import numpy as np
import pytest

from sim import workloads
from sim.cost import ledger, matrix_work_ratio
from sim.draw import PALETTE, tile_map_image
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
