"""Decision grid, masks, visit orders, tile maps, against loops over every query and key."""

import numpy as np
import pytest

from sim.geometry import COMPUTED, MASKED, ORDERS, SKIPPED, Grid, TileMap, visit_order

SHAPES = [
    (tile, lq, lk, causal)
    for tile in [(1, 1), (4, 8), (16, 4), (64, 128)]
    for lq, lk in [(1, 1), (7, 7), (33, 33), (5, 40), (40, 5), (64, 128), (129, 257)]
    for causal in (True, False, 1, 6, 50)  # a number: causal with a window of so many keys
]


def sees(grid, r, c):
    distance = r + grid.lk - grid.lq - c
    return (not grid.causal or distance >= 0) and (not grid.window or distance < grid.window)


def make(tile, lq, lk, mask):
    return Grid(tile, lq, lk, bool(mask), None if isinstance(mask, bool) else mask)


@pytest.mark.parametrize(("tile", "lq", "lk", "mask"), SHAPES)
def test_every_count_matches_a_loop_over_pairs(tile, lq, lk, mask):
    grid = make(tile, lq, lk, mask)
    pairs = np.zeros((-(-lq // tile[0]), -(-lk // tile[1])), int)
    for r in range(lq):
        for c in range(lk):
            pairs[r // tile[0], c // tile[1]] += sees(grid, r, c)
    assert (grid.groups, grid.key_tiles) == pairs.shape
    assert np.array_equal(grid.pairs(), pairs)
    assert np.array_equal(grid.visited_tiles(), pairs > 0)
    assert np.array_equal(grid.visited(), (pairs > 0).sum(axis=1))
    seen = [[c for c in range(lk) if sees(grid, r, c)] for r in range(lq)]
    assert (grid.visible() - grid.hidden()).tolist() == [len(keys) for keys in seen]
    assert all(h == keys[0] for h, keys in zip(grid.hidden(), seen, strict=True) if keys)
    for i in range(grid.groups):
        assert sorted(grid.visit("ends_first", i)) == np.flatnonzero(pairs[i]).tolist()


def test_groups_and_tiles_cover_every_row_and_key_once():
    grid = Grid((4, 8), 33, 21, True)
    rows = [r for i in range(grid.groups) for r in range(grid.lq)[grid.group_rows(i)]]
    keys = [c for j in range(grid.key_tiles) for c in range(grid.lk)[grid.tile_keys(j)]]
    assert (rows, keys) == (list(range(33)), list(range(21)))


@pytest.mark.parametrize(
    ("order", "n", "expected"),
    [
        ("ascending", 4, [0, 1, 2, 3]),
        ("descending", 4, [3, 2, 1, 0]),
        ("ends_first", 4, [3, 0, 2, 1]),
        ("ends_first", 3, [2, 0, 1]),
        ("ends_first", 2, [1, 0]),
        ("ends_first", 1, [0]),
    ],
)
def test_visit_orders(order, n, expected):
    assert visit_order(order, n).tolist() == expected


def test_ends_first_is_descending_where_a_window_hides_tile_0():
    assert visit_order("ends_first", 4, first=2).tolist() == [5, 4, 3, 2]
    grid = Grid((4, 8), 64, 64, True, window=16)
    assert grid.visit("ends_first", 0).tolist() == [0]
    assert grid.visit("ends_first", 5).tolist() == [2, 0, 1]
    assert grid.visit("ends_first", 15).tolist() == [7, 6, 5]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", range(9))
def test_every_order_is_a_permutation(order, n):
    assert sorted(visit_order(order, n).tolist()) == list(range(n))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((64,), 8, 8, True), r"tile must be \(vote rows, keys\)"),
        ((64, 8, 8, True), r"tile must be \(vote rows, keys\)"),
        (((0, 8), 8, 8, True), "tile rows must be between 1"),
        (((8, 2.5), 8, 8, True), "tile keys must be an integer, got 2.5"),
        (((8, 8), 0, 8, True), "query length must be between 1"),
        (((8, 8), 8, True, True), "key length must be an integer, got True"),
        (((8, 8), 8, 8, True, 0), "window must be between 1"),
        (((8, 8), 8, 8, False, 4), "a window needs the causal mask"),
    ],
)
def test_bad_grids_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Grid(*arguments)


def test_unknown_order_is_named():
    with pytest.raises(ValueError, match="order must be one of ascending, descending, ends_first"):
        visit_order("random", 3)


def test_sparsity_is_skipped_over_visited_per_head():
    state = np.array(
        [[[COMPUTED, MASKED], [SKIPPED, COMPUTED]], [[COMPUTED, MASKED], [COMPUTED] * 2]]
    )
    tiles = TileMap(state.astype(np.uint8), Grid((1, 1), 2, 2, True), "ascending", np.zeros(2))
    assert tiles.sparsity.tolist() == [1 / 3, 0]
    assert tiles.visited.sum() == 6
    assert tiles.skipped.sum() == 1
