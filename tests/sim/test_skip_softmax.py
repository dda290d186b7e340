"""scan, decide, curve and attend against the literal rule, on odd shapes, masks and orders."""

import literal
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sim
from sim.geometry import MASKED, ORDERS, SKIPPED
from sim.reference import attention
from sim.skip_softmax import attend, scan

CASES = [  # tile, query heads, KV heads, lq, lk, causal
    ((4, 8), 1, 1, 37, 37, True),
    ((4, 8), 4, 2, 32, 32, True),
    ((4, 8), 3, 1, 21, 50, True),
    ((4, 8), 2, 2, 50, 21, True),
    ((4, 8), 2, 1, 19, 45, False),
    ((1, 8), 2, 1, 9, 70, True),
    ((16, 4), 1, 1, 1, 1, True),
    ((16, 4), 1, 1, 1, 33, True),
    ((64, 128), 2, 1, 300, 300, True),
    ((4, 8), 2, 1, 61, 61, 20),  # a number: causal with a window of so many keys
    ((4, 8), 1, 1, 33, 61, 9),
    ((4, 8), 1, 1, 61, 33, 40),
    ((16, 4), 1, 1, 50, 50, 1),
]


def make(case, seed=0, sharpness=3.0, dtype=np.float32):
    """q, k, v with an attention sink and recent keys that matter, so that tiles do get skipped."""
    tile, hq, hkv, lq, lk, mask = case
    rng = np.random.default_rng(seed)
    q = sharpness * rng.standard_normal((hq, lq, 8))
    k, v = rng.standard_normal((2, hkv, lk, 8))
    faint = rng.random((hkv, lk // 4 + 1)).repeat(4, axis=1)[:, :lk] < 0.7
    q[..., 0], k[..., 0] = 4.0, -6.0 * faint
    k[:, :2, 0] = 3.0
    return (
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        dict(tile=tile, causal=bool(mask), window=None if isinstance(mask, bool) else mask),
    )


def run_literal(q, k, v, head, *, lam, order, **grid):
    kv = head // (q.shape[0] // k.shape[0])
    return literal.skip_softmax(q[head], k[kv], v[kv], order=order, scale=8**-0.5, lam=lam, **grid)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lam", [0.0, 1e-3, 0.05, 1.0])
def test_scan_decide_and_attend_follow_the_rule(case, order, lam):
    q, k, v, grid = make(case)
    one = scan(q, k, order=order, mass=True, **grid)
    tiles = one.decide(lam)
    out = attend(q, k, v, tiles)
    for h in range(q.shape[0]):
        expected = run_literal(q, k, v, h, lam=lam, order=order, **grid)
        finite = np.isfinite(expected.gap)
        assert np.array_equal(np.isposinf(one.gap[h]), np.isposinf(expected.gap))
        assert np.array_equal(np.isneginf(one.gap[h]), np.isneginf(expected.gap))
        np.testing.assert_allclose(one.gap[h][finite], expected.gap[finite], atol=1e-4)
        assert np.array_equal(tiles.state[h], expected.state)
        np.testing.assert_allclose(out.output[h], expected.output, atol=2e-5)
        np.testing.assert_allclose(out.lse[h], expected.lse, atol=2e-5)
        np.testing.assert_allclose(out.dropped_mass[h], expected.dropped_mass, atol=2e-5)
        assert (out.dropped_mass_bound[h] >= expected.bound - 1e-6).all()
        assert (out.dropped_mass_bound[h] <= expected.bound + 0.0026).all()  # the 1.01


def test_the_cases_do_skip():
    shares = [scan(q, k, **grid).decide(0.05).sparsity.max() for q, k, _, grid in map(make, CASES)]
    assert sum(share > 0.1 for share in shares) >= 5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lam", [1.5, 20.0])
def test_above_one_the_rule_is_followed_in_sequence(order, lam):
    differs = 0
    for case in CASES:
        q, k, v, grid = make(case)
        one = scan(q, k, order=order, **grid)
        tiles = one.decide(lam, short_context="allow")
        out = attend(q, k, v, tiles)
        for h in range(q.shape[0]):
            expected = run_literal(q, k, v, h, lam=lam, order=order, **grid)
            assert np.array_equal(tiles.state[h], expected.state)
            np.testing.assert_allclose(out.output[h], expected.output, atol=2e-5)
            np.testing.assert_allclose(out.dropped_mass[h], expected.dropped_mass, atol=2e-5)
            at_once = (one.gap[h] < np.log(np.float32(lam))) & tiles.visited[h]
            differs += not np.array_equal(at_once, tiles.skipped[h])
    assert differs or lam < 2  # far above 1, gaps alone do not decide


@pytest.mark.parametrize("order", ORDERS)
def test_first_visited_tile_is_never_skipped_nor_is_a_masked_one_visited(order):
    q, k, _, grid = make(CASES[0])
    one = scan(q, k, order=order, **grid)
    tiles = one.decide(1.0)
    n = one.grid.visited()
    first = np.where(order == "ascending", 0, n - 1)
    assert (tiles.state[0, np.arange(len(n)), first] == 1).all()
    assert np.array_equal(tiles.state[0] == MASKED, ~one.grid.visited_tiles())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    lq=st.integers(1, 40),
    lk=st.integers(1, 40),
    rows=st.integers(1, 9),
    keys=st.integers(1, 9),
    mask=st.one_of(st.booleans(), st.integers(1, 40)),
    order=st.sampled_from(ORDERS),
    lam=st.sampled_from([1e-4, 0.03, 1.0]),
)
def test_random_shapes(seed, lq, lk, rows, keys, mask, order, lam):
    q, k, v, grid = make(((rows, keys), 2, 1, lq, lk, mask), seed, dtype=np.float64)
    tiles = scan(q, k, order=order, **grid).decide(lam)
    out = attend(q, k, v, tiles)
    for h in range(2):
        expected = run_literal(q, k, v, h, lam=lam, order=order, **grid)
        near = np.abs(expected.gap - np.log(lam)) < 1e-4
        assert np.array_equal(tiles.state[h][~near], expected.state[~near])
        if not near.any():
            np.testing.assert_allclose(out.output[h], expected.output, atol=1e-12)
            assert (out.dropped_mass[h] <= out.dropped_mass_bound[h]).all()


def test_several_strips_give_what_one_strip_gives(monkeypatch):
    q, k, v, grid = make(((4, 8), 2, 1, 301, 333, True))
    whole = scan(q, k, mass=True, **grid)
    monkeypatch.setattr("sim.scores.STRIP_ROWS", 16)
    monkeypatch.setattr("sim.scores.STRIP_KEYS", 24)
    strips = scan(q, k, mass=True, **grid)
    np.testing.assert_allclose(strips.row_max, whole.row_max, atol=1e-4)
    np.testing.assert_allclose(strips.gap, whole.gap, atol=2e-4)
    np.testing.assert_allclose(strips.mass, whole.mass, atol=1e-5)
    tiles = whole.decide(0.05)
    np.testing.assert_allclose(
        attend(q, k, v, tiles).output, attention(q, k, v, tiles=tiles).output, atol=2e-5
    )


def test_several_strips_under_a_window(monkeypatch):
    q, k, v, grid = make(((4, 8), 2, 1, 301, 333, 50))
    monkeypatch.setattr("sim.scores.STRIP_ROWS", 16)
    monkeypatch.setattr("sim.scores.STRIP_KEYS", 24)
    tiles = scan(q, k, **grid).decide(0.05)
    assert tiles.sparsity.max() > 0
    exact = attention(q, k, v, window=50, tiles=tiles).output
    np.testing.assert_allclose(attend(q, k, v, tiles).output, exact, atol=2e-5)


def test_mass_is_the_true_probability_of_each_tile():
    q, k, _, grid = make(CASES[2])
    one = scan(q, k, mass=True, **grid)
    s = np.einsum("hqd,kd->hqk", q, k[0]).astype(float) * 8**-0.5
    s[:, np.arange(50) > np.arange(21)[:, None] + 29] = -np.inf
    p = np.exp(s - s.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    expected = np.add.reduceat(p, np.arange(0, 50, 8), axis=2)
    np.testing.assert_allclose(one.mass, expected, atol=1e-5)
    np.testing.assert_allclose(one.lse, np.log(np.exp(s).sum(axis=2)), atol=1e-4)


def test_rows_that_see_nothing_have_no_mass_and_lose_none():
    q, k, v, grid = make(CASES[3])  # 50 queries, 21 keys: the first 29 rows see nothing
    one = scan(q, k, mass=True, **grid)
    assert (one.mass[:, :29] == 0).all()
    assert np.isneginf(one.lse[:, :29]).all()
    out = attend(q, k, v, one.decide(0.05))
    assert (out.output[:, :29] == 0).all()
    assert np.isneginf(out.lse[:, :29]).all()
    assert (out.dropped_mass_bound[:, :29] == 0).all()


@pytest.mark.parametrize("head", [None, 1])
def test_curve_is_what_deciding_at_every_threshold_gives(head):
    q, k, _, grid = make(CASES[1])
    one = scan(q, k, mass=True, **grid)
    thresholds = np.concatenate([[0, 1], np.random.default_rng(1).uniform(0, 1, 40) ** 4])
    curve = one.curve(head).at(thresholds)
    which = slice(None) if head is None else [head]
    for x, lam in enumerate(thresholds):
        tiles = one.decide(float(lam))
        lost = sim.accuracy.dropped_mass(one.mass, tiles)[which]
        skipped = tiles.skipped[which].sum() / tiles.visited[which].sum()
        assert curve.sparsity[x] == pytest.approx(skipped)
        pairs = np.broadcast_to(one.grid.pairs(), tiles.state.shape)[which]
        share = pairs[tiles.skipped[which]].sum() / pairs.sum()
        assert curve.pair_share[x] == pytest.approx(share)
        assert curve.mean_dropped_mass[x] == pytest.approx(lost.mean(), abs=1e-7)
        assert curve.worst_dropped_mass[x] == pytest.approx(lost.max(), abs=1e-7)
    with pytest.raises(ValueError, match="a curve ends at threshold 1"):
        one.curve().at([2.0])


def test_gap_is_reached_by_the_deciding_row():
    q, k, _, grid = make(CASES[0])
    for order in ORDERS:
        one = scan(q, k, order=order, **grid)
        row = one.deciding_row(0)
        j = np.arange(one.grid.key_tiles)
        visited = one.grid.visited_tiles()
        with np.errstate(invalid="ignore"):
            gap = (one.row_max[0] - one.running_max(0))[row, j]
        assert np.array_equal(gap[visited], one.gap[0][visited])
        assert np.array_equal(row // 4, np.broadcast_to(np.arange(10)[:, None], row.shape))


@pytest.mark.parametrize("length", [1, 7, 8, 29, 37])
def test_crop_is_the_scan_of_the_shorter_text(length):
    q, k, _, grid = make(CASES[0])
    cropped = scan(q, k, mass=True, **grid).crop(length)
    fresh = scan(q[:, :length], k[:, :length], mass=True, **grid)
    np.testing.assert_allclose(cropped.gap, fresh.gap, atol=1e-5)
    np.testing.assert_allclose(cropped.mass, fresh.mass, atol=1e-6)
    np.testing.assert_allclose(cropped.lse, fresh.lse, atol=1e-5)
    assert cropped.grid == fresh.grid


@pytest.mark.parametrize("tile", [(4, 8), (3, 8), (8, 16), (64, 24), (1, 64)])
@pytest.mark.parametrize("order", ORDERS)
def test_replay_is_a_scan_on_that_grid_in_that_order(tile, order):
    q, k, _, grid = make(CASES[2])
    replayed = scan(q, k, mass=True, **grid).replay(order=order, tile=tile)
    fresh = scan(q, k, tile=tile, order=order, causal=True, mass=True)
    np.testing.assert_allclose(replayed.gap, fresh.gap, atol=1e-5)
    np.testing.assert_allclose(replayed.mass, fresh.mass, atol=1e-6)


def test_heads_picks_heads():
    q, k, _, grid = make(CASES[1])
    one = scan(q, k, mass=True, **grid)
    assert np.array_equal(one.heads([2]).gap, one.gap[2:3])
    assert np.array_equal(one.heads([2, 0]).mass, one.mass[[2, 0]])


def test_half_precision_is_read_as_it_is():
    q, k, _, grid = make(CASES[0])
    half = scan(q.astype(np.float16), k.astype(np.float16), **grid)
    same = scan(
        q.astype(np.float16).astype(np.float32), k.astype(np.float16).astype(np.float32), **grid
    )
    assert np.array_equal(half.gap, same.gap)


def test_a_map_made_by_hand_may_skip_everything():
    q, k, v, grid = make(CASES[0])
    tiles = scan(q, k, **grid).decide(0.0)
    tiles.state[tiles.visited] = SKIPPED
    tiles = sim.TileMap(tiles.state, tiles.grid, tiles.order, tiles.threshold)
    out = attend(q, k, v, tiles)
    assert (out.output == 0).all()
    assert np.isneginf(out.lse).all()
    assert (out.dropped_mass == 1).all()


def test_progress_rises_to_one():
    q, k, v, grid = make(CASES[8])
    for run in (
        lambda report: scan(q, k, progress=report, **grid),
        lambda report: attend(q, k, v, scan(q, k, **grid).decide(0.1), progress=report),
    ):
        shares = []
        run(shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == 1


def test_progress_bar_is_on_stderr(capsys):
    q, k, _, grid = make(CASES[0])
    scan(q, k, progress=True, **grid)
    captured = capsys.readouterr()
    assert "100%" in captured.err
    assert captured.out == ""


GOOD = make(CASES[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": np.zeros((2, 3))}, r"q must be an array \[heads, length, head_dim\], got shape"),
        ({"q": [[[1.0]]]}, "q must be an array .* got list"),
        ({"k": np.zeros((2, 0, 8))}, "k must be an array .* got shape"),
        ({"k": np.zeros((2, 4, 8), int)}, "k must have a float dtype, got int64"),
        ({"k": np.full((2, 4, 8), np.nan)}, "k must be finite"),
        ({"k": np.zeros((2, 4, 6))}, "q and k must share head_dim, got 8 and 6"),
        ({"k": np.zeros((3, 4, 8))}, "query heads must be a multiple of KV heads, got 4 and 3"),
        ({"softmax_scale": 0.0}, "softmax_scale must be finite and above 0"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be finite and above 0"),
        ({"order": "sideways"}, "order must be one of"),
        ({"tile": (0, 1)}, "tile rows must be between 1"),
        (
            {"q": np.full((4, 32, 8), 3e19), "k": np.full((2, 32, 8), 3e19)},
            "scores overflow float32",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_bad_input_to_scan_gets_one_sentence(change, sentence):
    q, k, _, _ = GOOD
    with pytest.raises(ValueError, match=sentence):
        scan(**{"q": q, "k": k, **change})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give threshold, threshold_scale_factor or target_sparsity"),
        ({"threshold": 0.1, "threshold_scale_factor": 5}, "not both"),
        ({"threshold": 0.1, "target_sparsity": 0.5}, "only one"),
        ({"threshold": -0.1}, "threshold must be finite and at least 0, got -0.1"),
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"threshold": "much"}, "threshold must be a number, got 'much'"),
        ({"threshold": 1.5}, "threshold must be at most 1"),
        ({"threshold": [0.1, 0.2]}, "one threshold, or one for each of 4 heads"),
        ({"threshold_scale_factor": -3}, "threshold_scale_factor must be finite"),
        ({"target_sparsity": 1.5}, r"target_sparsity must lie in \[0, 1\]"),
        ({"target_sparsity": 0.99}, "out of reach"),
        ({"threshold": 0.1, "short_context": "maybe"}, "short_context must be one of"),
    ],
)
def test_bad_thresholds_get_one_sentence(arguments, sentence):
    q, k, _, grid = GOOD
    with pytest.raises(ValueError, match=sentence):
        scan(q, k, **grid).decide(**arguments)


def test_attend_refuses_what_does_not_fit():
    q, k, v, grid = GOOD
    tiles = scan(q, k, **grid).decide(0.1)
    with pytest.raises(ValueError, match="k and v must share heads and length"):
        attend(q, k, v[:, :5], tiles)
    with pytest.raises(
        ValueError, match="the tile map is for 4 heads of 32 × 32, but q and k are 4 heads"
    ):
        attend(q[:, :8], k, v, tiles)


def test_what_needs_row_maxima_says_so():
    q, k, _, grid = GOOD
    light = scan(q, k, keep_row_max=False, **grid)
    full = scan(q, k, **grid)
    assert np.array_equal(light.gap, full.gap)
    assert np.array_equal(light.decide(0.1).state, full.decide(0.1).state)
    for call in (
        lambda: light.replay(order="ascending"),
        lambda: light.crop(8),
        lambda: light.running_max(0),
        lambda: light.deciding_row(0),
        lambda: light.decide(3.0, short_context="allow"),
    ):
        with pytest.raises(ValueError, match="keep_row_max=True"):
            call()


def test_crop_and_replay_refuse_what_they_cannot_know():
    q, k, _, grid = make(CASES[2])
    one = scan(q, k, **grid)
    with pytest.raises(ValueError, match="as many queries as keys"):
        one.crop(5)
    with pytest.raises(ValueError, match="tile keys must be a multiple of 8, as scanned"):
        one.replay(tile=(4, 12))
    q, k, _, grid = make(CASES[0])
    with pytest.raises(ValueError, match="length must be between 1 and 37, got 38"):
        scan(q, k, **grid).crop(38)
