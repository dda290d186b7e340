"""scan_decode, decide, attend_decode and decode_bytes against the rule written out in loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sim
from sim.decode import DecodeGrid, attend_decode, decode_bytes, scan_decode
from sim.geometry import COMPUTED, MASKED, ORDERS, SKIPPED

DIM, V_DIM = 8, 5


def make(lengths, kv_heads=2, group=3, cache=None, seed=0, dtype=np.float32):
    """Heads with a sink, recent keys that matter, and faint keys, so that tiles do get skipped."""
    rng = np.random.default_rng(seed)
    cache = max(lengths) if cache is None else cache
    q = 2.5 * rng.standard_normal((len(lengths), kv_heads * group, DIM))
    k = rng.standard_normal((kv_heads, cache, DIM))
    v = rng.standard_normal((kv_heads, cache, V_DIM))
    faint = rng.random((kv_heads, cache // 4 + 1)).repeat(4, axis=1)[:, :cache] < 0.7
    q[..., 0], k[..., 0] = 4.0, -6.0 * faint
    k[:, :2, 0] = 2.0
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


class Literal:
    """One step of one vote group: q [rows, D], k [n, D], v [n, Dv], all in plain loops."""

    def __init__(self, q, k, v, *, keys, order, splits, split_layout, seeded, lam):
        n, rows = math.ceil(len(k) / keys), range(len(q))
        ln_lam = math.log(lam) if lam else -math.inf
        s = [[float(DIM**-0.5 * (a.astype(float) @ b.astype(float))) for b in k] for a in q]

        def tile_keys(j):
            return range(j * keys, min((j + 1) * keys, len(k)))

        def tile_max(r, j):
            return max(s[r][c] for c in tile_keys(j))

        self.gap, self.state = [None] * n, [None] * n
        parts = []  # (m, l, u, acc) of each split and row
        for split in range(splits):
            if split_layout == "interleaved":
                lane = [j for j in range(n) if j % splits == split]
            else:
                lane = list(range(split * n // splits, (split + 1) * n // splits))
            if order == "descending":
                lane = lane[::-1]
            if order == "ends_first" and len(lane) > 1:
                lane = [lane[-1], lane[0], *lane[-2:0:-1]]
            m, l, u = [-math.inf for _ in rows], [0.0 for _ in rows], [0.0 for _ in rows]
            acc = [np.zeros(V_DIM) for _ in rows]
            if seeded:
                m = [max(tile_max(r, 0), tile_max(r, n - 1)) for r in rows]
            for j in lane:
                above = [tile_max(r, j) - m[r] for r in rows]
                self.gap[j] = max(above)
                self.state[j] = SKIPPED if all(a < ln_lam for a in above) else COMPUTED
                for r in rows:
                    if self.state[j] == SKIPPED:
                        u[r] += 1.01 * len(tile_keys(j)) * math.exp(tile_max(r, j) - m[r])
                        continue
                    new = max(m[r], tile_max(r, j))
                    alpha = math.exp(m[r] - new)
                    l[r], u[r], acc[r] = l[r] * alpha, u[r] * alpha, acc[r] * alpha
                    for c in tile_keys(j):
                        p = math.exp(s[r][c] - new)
                        l[r] += p
                        acc[r] = acc[r] + p * v[c].astype(float)
                    m[r] = new
            parts.append((m, l, u, acc))
        self.split_lse = [
            [m[r] + math.log(l[r]) if l[r] else -math.inf for m, l, _, _ in parts] for r in rows
        ]
        self.output, self.lse, self.dropped, self.bound = [], [], [], []
        for r in rows:
            top = max(m[r] for m, _, _, _ in parts)
            l = sum(part[1][r] * math.exp(part[0][r] - top) for part in parts)
            u = sum(part[2][r] * math.exp(part[0][r] - top) for part in parts)
            acc = sum(part[3][r] * math.exp(part[0][r] - top) for part in parts)
            dense = sum(math.exp(x - top) for x in s[r])
            self.output.append(acc / l)
            self.lse.append(top + math.log(l))
            self.dropped.append(max(0.0, 1 - l / dense))
            self.bound.append(u / (l + u))


def agree(q, k, v, lengths, lam, atol, **how):
    """Compare everything with the literal rule; gives the skipped tiles, or None if one is near."""
    one = scan_decode(q, k, lengths, **how)
    tiles = one.decide(lam)
    out = attend_decode(q, k, v, tiles)
    group = q.shape[1] // k.shape[0]
    together = group if how["vote"] == "group" else 1
    literal_how = {name: value for name, value in how.items() if name != "vote"}
    near = False
    for t, vote in np.ndindex(one.gap.shape[:2]):
        heads = slice(vote * together, (vote + 1) * together)
        kv, n = heads.start // group, -(-lengths[t] // how["keys"])
        expected = Literal(
            q[t, heads], k[kv, : lengths[t]], v[kv, : lengths[t]], lam=lam, **literal_how
        )
        np.testing.assert_allclose(one.gap[t, vote, :n], expected.gap, atol=1e-4)
        assert np.isneginf(one.gap[t, vote, n:]).all()
        assert (tiles.state[t, vote, n:] == MASKED).all()
        if lam and (np.abs(np.array(expected.gap) - math.log(lam)) < 1e-5).any():
            near = near or lam < 1  # at λ = 1 a gap of 0 is exact: the tile gave the maximum
        if near:
            continue
        assert tiles.state[t, vote, :n].tolist() == expected.state
        np.testing.assert_allclose(out.output[t, heads], expected.output, atol=atol)
        np.testing.assert_allclose(out.lse[t, heads], expected.lse, atol=atol)
        np.testing.assert_allclose(out.split_lse[t, heads], expected.split_lse, atol=atol)
        np.testing.assert_allclose(out.dropped_mass[t, heads], expected.dropped, atol=atol)
        np.testing.assert_allclose(out.dropped_mass_bound[t, heads], expected.bound, atol=atol)
        assert (out.dropped_mass_bound[t, heads] >= np.array(expected.dropped) - 1e-12).all()
    return None if near else int(tiles.skipped.sum())


@pytest.mark.parametrize("vote", ["group", "head"])
@pytest.mark.parametrize("split_layout", ["interleaved", "contiguous"])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.02, 1.0])
def test_the_rule_is_followed(vote, split_layout, seeded, lam):
    lengths = [61, 37, 64, 3]
    q, k, v = make(lengths)
    skipped = 0
    for splits in (1, 3, 5, 40):
        for order in ORDERS:
            how = dict(
                keys=4,
                order=order,
                vote=vote,
                splits=splits,
                split_layout=split_layout,
                seeded=seeded,
            )
            skipped += agree(q, k, v, lengths, lam, 2e-5, **how)
    assert (skipped > 0) == (lam > 0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    keys=st.integers(1, 9),
    splits=st.integers(1, 9),
    order=st.sampled_from(ORDERS),
    vote=st.sampled_from(["group", "head"]),
    split_layout=st.sampled_from(["interleaved", "contiguous"]),
    seeded=st.booleans(),
    lam=st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_random_shapes(
    seed, group, kv_heads, lengths, keys, splits, order, vote, split_layout, seeded, lam
):
    q, k, v = make(lengths, kv_heads, group, seed=seed, dtype=np.float64)
    how = dict(
        keys=keys, order=order, vote=vote, splits=splits, split_layout=split_layout, seeded=seeded
    )
    agree(q, k, v, lengths, lam, 1e-11, **how)


@pytest.mark.parametrize("seeded", [False, True])
def test_output_is_dense_attention_over_the_kept_keys(seeded):
    lengths = [200, 131]
    q, k, v = make(lengths, kv_heads=1, group=4, cache=210)
    tiles = scan_decode(q, k, lengths, keys=8, splits=3, seeded=seeded).decide(0.2)
    assert tiles.sparsity.max() > 0.2
    out = attend_decode(q, k, v, tiles)
    for t, length in enumerate(lengths):
        kept = (tiles.state[t, 0] == COMPUTED).repeat(8)[:length]
        keys, values = k[:, :length][:, kept], v[:, :length][:, kept]
        exact = sim.reference.attention(q[t][:, None], keys, values, causal=False)
        np.testing.assert_allclose(out.output[t], exact.output[:, 0], atol=2e-5)
        np.testing.assert_allclose(out.lse[t], exact.lse[:, 0], atol=2e-5)


def test_one_plain_split_of_heads_alone_is_prefill_with_one_row_a_group():
    q, k, _ = make([50] * 20, kv_heads=2, group=2, cache=50)
    one = scan_decode(q, k, np.arange(31, 51), keys=8, vote="head", mass=True)
    prefill = sim.scan(q.swapaxes(0, 1), k, tile=(1, 8), order="ascending", mass=True)
    np.testing.assert_allclose(one.gap, prefill.gap.swapaxes(0, 1), atol=1e-5)
    np.testing.assert_allclose(one.mass, prefill.mass.swapaxes(0, 1), atol=1e-6)


def test_a_group_gap_is_the_largest_of_its_heads_gaps():
    q, k, _ = make([61, 40])
    how = dict(keys=4, splits=3, split_layout="contiguous", seeded=True)
    heads = scan_decode(q, k, [61, 40], vote="head", **how).gap
    group = scan_decode(q, k, [61, 40], vote="group", **how).gap
    assert np.array_equal(group, heads.reshape(2, 2, 3, -1).max(axis=2))


def test_a_plain_split_keeps_its_first_tile_and_a_seeded_one_need_not():
    q, k, v = make([96], kv_heads=1, group=2)
    k[:, 4:92, 0], k[:, 92:, 0] = -9.0, 2.0  # all but the first and the last tile are far below
    plain = scan_decode(q, k, [96], keys=4, splits=6)
    first = np.flatnonzero(np.isposinf(plain.gap[0, 0]))
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    seeded = scan_decode(q, k, [96], keys=4, splits=6, seeded=True)
    assert not np.isposinf(seeded.gap).any()
    tiles = seeded.decide(0.01)
    assert np.flatnonzero(tiles.state[0, 0] == COMPUTED).tolist() == [0, 23]
    out = attend_decode(q, k, v, tiles)
    assert np.isneginf(out.split_lse[0, :, 1:5]).all()  # wholly skipped: weight 0
    assert np.isfinite(out.split_lse[0, :, [0, 5]]).all()
    ends = np.r_[0:4, 92:96]
    exact = sim.reference.attention(q[0][:, None], k[:, ends], v[:, ends], causal=False)
    np.testing.assert_allclose(out.output[0], exact.output[:, 0], atol=1e-5)
    np.testing.assert_allclose(out.lse[0], exact.lse[:, 0], atol=1e-5)
    assert (out.dropped_mass > 0).all()
    assert (out.dropped_mass_bound > out.dropped_mass).all()  # wholly skipped splits count too


def test_a_seed_that_is_the_maximum_makes_splits_and_order_irrelevant():
    q, k, _ = make([90], kv_heads=1, group=3)
    k[:, 1:89, 0] -= 9.0
    whole = scan_decode(q, k, [90], keys=4, seeded=True).gap
    for splits in (2, 7, 23, 64):
        for order in ORDERS:
            for layout in ("interleaved", "contiguous"):
                how = dict(keys=4, seeded=True, splits=splits, order=order, split_layout=layout)
                assert np.array_equal(scan_decode(q, k, [90], **how).gap, whole)


@pytest.mark.parametrize("split_layout", ["interleaved", "contiguous"])
def test_a_split_knows_less_so_its_gaps_are_larger(split_layout):
    q, k, _ = make([200] * 5, cache=200)
    how = dict(keys=4, split_layout=split_layout)
    whole = scan_decode(q, k, [200] * 5, seeded=True, **how).gap
    for splits in (2, 7):
        seeded = scan_decode(q, k, [200] * 5, seeded=True, splits=splits, **how).gap
        plain = scan_decode(q, k, [200] * 5, splits=splits, **how).gap
        assert (seeded >= whole).all()
        assert (plain >= seeded).all()
        assert (seeded > whole).any()
        assert (plain > seeded).any()


@pytest.mark.parametrize("splits", [1, 4, 100])
def test_a_seed_leaves_every_row_something_even_at_threshold_one(splits):
    lengths = [77, 13, 1]
    for seed in range(5):
        q, k, v = make(lengths, seed=seed)
        tiles = scan_decode(q, k, lengths, keys=4, splits=splits, seeded=True).decide(1.0)
        out = attend_decode(q, k, v, tiles)
        assert np.isfinite(out.lse).all()
        assert (out.dropped_mass < 1).all()


def test_more_splits_than_tiles_leaves_empty_ones_with_no_weight():
    q, k, v = make([9], kv_heads=1)
    for layout in ("interleaved", "contiguous"):
        tiles = scan_decode(q, k, [9], keys=4, splits=8, split_layout=layout).decide(0.5)
        assert (tiles.state == COMPUTED).all()  # every tile is the first of its split
        out = attend_decode(q, k, v, tiles)
        assert np.isfinite(out.split_lse).sum(axis=2).tolist() == [[3, 3, 3]]
        exact = sim.reference.attention(q[0][:, None], k, v, causal=False)
        np.testing.assert_allclose(out.output[0], exact.output[:, 0], atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 31])
def test_contiguous_splits_are_runs_as_even_as_whole_tiles_can_be(splits, n):
    grid = DecodeGrid(np.array([64 * n]), 64 * n, 1, 1, splits=splits, split_layout="contiguous")
    lanes = grid.lanes(n)
    assert np.concatenate(lanes).tolist() == list(range(n))
    sizes = [lane.size for lane in lanes]
    assert len(sizes) == splits
    assert max(sizes) - min(sizes) <= 1


def test_steps_of_one_growing_cache_are_each_what_they_are_alone():
    lengths = [12, 60, 13, 8]
    q, k, v = make(lengths, cache=64)
    how = dict(keys=4, splits=3, seeded=True, mass=True)
    together = scan_decode(q, k, lengths, **how)
    out = attend_decode(q, k, v, together.decide(0.1))
    for t, length in enumerate(lengths):
        cut = k[:, :length], v[:, :length]  # what comes later is not looked at
        alone = scan_decode(q[t : t + 1], cut[0], [length], **how)
        n = alone.gap.shape[2]
        np.testing.assert_allclose(together.gap[t, :, :n], alone.gap[0], atol=1e-5)
        np.testing.assert_allclose(together.mass[t, :, :n], alone.mass[0], atol=1e-6)
        assert (together.mass[t, :, n:] == 0).all()
        one = attend_decode(q[t : t + 1], *cut, alone.decide(0.1))
        np.testing.assert_allclose(out.output[t], one.output[0], atol=1e-5)


def test_several_strips_give_what_one_gives(monkeypatch):
    lengths = np.arange(150, 190)
    q, k, _ = make(lengths.tolist())
    whole = scan_decode(q, k, lengths, keys=4, splits=3, mass=True)
    monkeypatch.setattr("sim.decode.STRIP_ROWS", 7)
    monkeypatch.setattr("sim.decode.STRIP_KEYS", 24)
    strips = scan_decode(q, k, lengths, keys=4, splits=3, mass=True)
    assert np.array_equal(np.isposinf(strips.gap), np.isposinf(whole.gap))
    np.testing.assert_allclose(strips.gap, whole.gap, atol=1e-4)
    np.testing.assert_allclose(strips.mass, whole.mass, atol=1e-5)


def test_mass_is_the_true_probability_of_each_tile():
    q, k, _ = make([30], kv_heads=1, group=2)
    one = scan_decode(q, k, [30], keys=8, mass=True, splits=2)
    p = np.exp(DIM**-0.5 * q[0].astype(float) @ k[0].T.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(one.mass[0], np.add.reduceat(p, [0, 8, 16, 24], axis=1), atol=1e-6)


def test_the_scale_is_the_softmax_scale():
    q, k, v = make([30])
    default = scan_decode(q, k, [30], keys=8)
    doubled = scan_decode(2 * q, k, [30], keys=8, softmax_scale=0.5 * DIM**-0.5)
    np.testing.assert_allclose(doubled.gap, default.gap, atol=1e-5)
    tiles = default.decide(0.01)
    np.testing.assert_allclose(
        attend_decode(2 * q, k, v, tiles, softmax_scale=0.5 * DIM**-0.5).output,
        attend_decode(q, k, v, tiles).output,
        atol=1e-5,
    )


def test_a_scale_factor_is_a_threshold_per_step_and_short_ones_are_dense_and_counted():
    lengths = [400, 100, 40]
    q, k, _ = make(lengths)
    one = scan_decode(q, k, lengths, keys=8)
    tiles = one.decide(threshold_scale_factor=50)
    assert tiles.threshold.tolist() == [[0.125] * 2, [0.5] * 2, [0.0] * 2]
    assert tiles.short_context.tolist() == [[False] * 2, [False] * 2, [True] * 2]
    assert not tiles.skipped[2].any()
    for t, lam in enumerate((0.125, 0.5)):
        assert np.array_equal(tiles.state[t], one.decide(lam).state[t])
        assert tiles.skipped[t].any()
    per_vote = one.decide(threshold_scale_factor=[50, 20])
    assert per_vote.threshold.tolist() == [[0.125, 0.05], [0.5, 0.2], [0.0, 0.5]]
    assert per_vote.short_context.sum() == 1
    assert not one.decide(threshold_scale_factor=40).short_context.any()  # λ = 1 is allowed


def test_a_threshold_per_vote_and_a_target_sparsity():
    lengths = [300, 301]
    q, k, _ = make(lengths)
    one = scan_decode(q, k, lengths, keys=8, seeded=True)
    tiles = one.decide([0.0, 0.3])
    assert not tiles.skipped[:, 0].any()
    assert np.array_equal(tiles.skipped[:, 1], one.decide(0.3).skipped[:, 1])
    assert tiles.sparsity[1] == tiles.skipped[:, 1].sum() / (38 * 2)
    aimed = one.decide(target_sparsity=0.25)
    assert aimed.skipped.sum() == 38
    assert len(set(aimed.threshold.ravel())) == 1


def test_a_map_made_by_hand_may_skip_everything():
    q, k, v = make([30, 9])
    tiles = scan_decode(q, k, [30, 9], keys=4, splits=2).decide(0.0)
    state = np.where(tiles.visited, SKIPPED, MASKED).astype(np.uint8)
    out = attend_decode(q, k, v, replace(tiles, state=state))
    assert (out.output == 0).all()
    assert np.isneginf(out.lse).all()
    assert np.isneginf(out.split_lse).all()
    assert (out.dropped_mass == 1).all()
    assert (out.dropped_mass_bound == 1).all()


def test_nothing_skipped_has_lost_nothing_and_its_bound_is_zero():
    q, k, v = make([30])
    out = attend_decode(q, k, v, scan_decode(q, k, [30], keys=4, splits=2, seeded=True).decide(0.0))
    assert (out.dropped_mass == 0).all()
    assert (out.dropped_mass_bound == 0).all()


def test_half_precision_is_read_as_it_is():
    q, k, _ = (x.astype(np.float16) for x in make([61]))
    half = scan_decode(q, k, [61], keys=4)
    same = scan_decode(q.astype(np.float32), k.astype(np.float32), [61], keys=4)
    assert np.array_equal(half.gap, same.gap)


def test_bytes_are_those_of_all_k_kept_v_pages_and_partials():
    q, k, _ = make([30, 21], kv_heads=2, group=3)
    tiles = scan_decode(q, k, [30, 21], keys=8, splits=4).decide(0.0)
    state = tiles.state.copy()
    state[0, 0, [1, 3]] = state[1, 1, 2] = SKIPPED  # 8 + 6 keys, and 5
    moved = decode_bytes(replace(tiles, state=state), 64, 32, page=16)
    assert moved.k == 2 * 64 * 2 * (30 + 21)
    assert moved.dense_v == 2 * 32 * 2 * (30 + 21)
    assert moved.v == moved.dense_v - 2 * 32 * (8 + 6 + 5)
    assert moved.page_table == 4 * 2 * (2 + 2)
    assert moved.partials == 2 * 4 * (32 + 2) * 2 * 6 * 4
    assert moved.dense == moved.k + moved.dense_v + moved.page_table + moved.partials
    assert moved.dense - moved.total == 2 * 32 * (8 + 6 + 5)
    unsplit = scan_decode(q, k, [30, 21], keys=8).decide(0.0)
    assert decode_bytes(unsplit, 64, element_bytes=1).partials == 0
    assert decode_bytes(unsplit, 64, element_bytes=1).total == 2 * 64 * 2 * (30 + 21)


def test_v_is_read_if_any_head_of_the_group_keeps_the_tile():
    q, k, _ = make([16], kv_heads=1, group=3)
    tiles = scan_decode(q, k, [16], keys=8, vote="head").decide(0.0)
    state = np.full_like(tiles.state, SKIPPED)
    state[0, 1, 0] = COMPUTED
    assert decode_bytes(replace(tiles, state=state), 64).v == 2 * 64 * 8


BAD_SCANS = [
    (dict(lengths=[31]), "lengths must lie between 1 and the 30 keys of the cache, got 31 … 31"),
    (dict(lengths=[0]), "lengths must lie between 1 and the 30 keys of the cache, got 0 … 0"),
    (dict(lengths=[30.0]), "lengths must be integers"),
    (dict(lengths=30), "lengths must be integers"),
    (dict(lengths=[30, 30]), "one entry a step, got 2 for 1 steps"),
    (dict(keys=0), "keys must be an integer of at least 1, got 0"),
    (dict(keys=True), "keys must be an integer of at least 1, got True"),
    (dict(splits=0), "splits must be an integer of at least 1, got 0"),
    (dict(splits=1.0), "splits must be an integer of at least 1, got 1.0"),
    (dict(vote="row"), "vote must be one of head, group, got 'row'"),
    (dict(split_layout="random"), "split_layout must be one of interleaved, contiguous, got"),
    (dict(order="up"), "order must be one of ascending, descending, ends_first, got 'up'"),
    (dict(softmax_scale=0.0), "softmax_scale must be finite and above 0"),
    (dict(q=np.ones((6, DIM))), r"q must be an array \[steps, heads, head_dim\], got shape"),
    (dict(q=[1.0]), r"q must be an array \[steps, heads, head_dim\], got list"),
    (dict(q=np.ones((1, 5, DIM))), "query heads must be a multiple of KV heads, got 5 and 2"),
    (dict(q=np.ones((1, 6, 4))), "q and k must share head_dim, got 4 and 8"),
    (dict(q=np.ones((1, 6, DIM), int)), "q must have a float dtype"),
    (dict(k=np.full((2, 30, DIM), np.nan)), "k must be finite"),
    (dict(k=np.full((2, 30, DIM), 1e38)), "scores overflow float32: scale q or k down"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_SCANS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_bad_input_gets_one_sentence(change, sentence):
    q, k, _ = make([30])
    arguments = dict(q=100 * np.abs(q), k=k, lengths=[30]) | change
    with pytest.raises(ValueError, match=sentence):
        scan_decode(**arguments)


def test_bad_thresholds_get_one_sentence():
    q, k, _ = make([30])
    for seeded in (False, True):
        one = scan_decode(q, k, [30], keys=8, seeded=seeded)
        with pytest.raises(ValueError, match=r"threshold must be at most 1 in decode, got 1\.5"):
            one.decide(1.5)
    for both in (dict(), dict(threshold=0.1, threshold_scale_factor=1)):
        with pytest.raises(ValueError, match="only one"):
            one.decide(**both)
    with pytest.raises(ValueError, match="only one"):
        one.decide(0.1, target_sparsity=0.5)
    with pytest.raises(ValueError, match="threshold must be finite and at least 0"):
        one.decide(-0.1)
    with pytest.raises(ValueError, match="threshold_scale_factor must be finite and at least 0"):
        one.decide(threshold_scale_factor=np.nan)
    for wrong in ([0.1] * 3, [[0.1, 0.1]]):
        with pytest.raises(ValueError, match="one threshold, or one for each of 2 votes"):
            one.decide(wrong)
    with pytest.raises(ValueError, match="out of reach"):
        one.decide(target_sparsity=1.0)


def test_attend_refuses_what_does_not_fit():
    q, k, v = make([30])
    tiles = scan_decode(q, k, [30], keys=8).decide(0.1)
    with pytest.raises(ValueError, match="k and v must share heads and length"):
        attend_decode(q, k, v[:, :29], tiles)
    with pytest.raises(ValueError, match="the tiles are of 1 steps, 6 query and 2 KV heads and 30"):
        attend_decode(q, k[:, :29], v[:, :29], tiles)
    with pytest.raises(ValueError, match="v must be finite"):
        attend_decode(q, k, np.full_like(v, np.inf), tiles)
    with pytest.raises(ValueError, match=r"q must be an array \[steps, heads, head_dim\]"):
        attend_decode(q[0], k, v, tiles)
    with pytest.raises(ValueError, match="page must be an integer of at least 1, got 0"):
        decode_bytes(tiles, 64, page=0)


@pytest.mark.parametrize("vote", ["group", "head"])
def test_masses_of_skipped_tiles_are_what_attention_drops(vote):
    rng = np.random.default_rng(4)
    q, k, v = 3 * rng.standard_normal((2, 4, 16)), *rng.standard_normal((2, 2, 90, 16))
    scan = scan_decode(q, k, [80, 90], keys=8, vote=vote, mass=True)
    tiles = scan.decide(0.3)
    dropped = scan.dropped_mass(tiles)
    assert (dropped.max(axis=1) > 0).all()
    np.testing.assert_allclose(dropped, attend_decode(q, k, v, tiles).dropped_mass, atol=1e-5)
    with pytest.raises(ValueError, match=r"the dropped mass needs scan_decode\(mass=True\)"):
        scan_decode(q, k, [80, 90]).dropped_mass(tiles)
