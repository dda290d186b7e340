"""Other rules, the walk through a group, forced tiles: against the literal rule and float64."""

import literal
import numpy as np
import pytest

from sim import accuracy, rules, workloads
from sim.geometry import COMPUTED, ORDERS, SKIPPED
from sim.skip_softmax import attend, scan


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(8)
    q, k, v = rng.standard_normal((3, 1, 150, 16))
    q *= 2
    q[..., 0], k[..., 0] = 5, -6 * (rng.random((1, 38)).repeat(4, axis=1)[:, :150] < 0.7)
    k[:, 0, 0] = 3
    return q, k, v


@pytest.fixture(scope="module", params=[True, 60])
def one(request, head):
    window = None if request.param is True else request.param
    return scan(*head[:2], tile=(4, 8), mass=True, window=window)


@pytest.mark.parametrize("lam", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("order", ORDERS)
def test_maximum_rule_in_sequence_is_what_the_gap_map_decides(one, lam, order):
    replayed = one.replay(order=order)
    tiles = rules.decide(replayed, rules.Maximum(lam))
    assert np.array_equal(tiles.state, replayed.decide(lam).state)
    assert tiles.threshold.tolist() == [lam]


def test_walk_ends_with_the_sums_of_the_literal_rule(one, head):
    q, k, v = head
    grid = {"tile": (4, 8), "causal": True, "window": one.grid.window}
    expected = literal.skip_softmax(
        q[0], k[0], v[0], order="ends_first", scale=0.25, lam=0.05, **grid
    )
    for i in range(one.grid.groups):
        *_, last = rules.walk(one, 0, i, rules.Maximum(0.05))
        rows = one.grid.group_rows(i)
        np.testing.assert_allclose(last.m + np.log(last.l), expected.lse[rows], atol=1e-4)
        np.testing.assert_allclose(last.u / (last.l + last.u), expected.bound[rows], atol=1e-4)


def test_walk_shows_votes_gaps_and_alpha(one):
    i = one.grid.groups - 2
    steps = list(rules.walk(one, 0, i, rules.Maximum(0.05)))
    assert [s.j for s in steps] == one.grid.visit("ends_first", i).tolist()
    m = np.full(4, -np.inf)
    for s in steps:
        assert s.gap.max() == one.gap[0, i, s.j]
        assert s.skipped == s.vote.all()
        new = m if s.skipped else np.maximum(m, s.tile_max)
        assert np.array_equal(s.m, new)
        if not s.skipped and np.isfinite(m).all():
            np.testing.assert_allclose(s.alpha, np.exp(m - new), rtol=1e-5)
        m = new
    assert any(s.skipped for s in steps)
    assert any(s.vote.any() and not s.vote.all() for s in steps)


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.2])
def test_mass_budget_is_kept_in_every_row_and_used(one, budget):
    tiles = rules.decide(one, rules.MassBudget(budget))
    worst = accuracy.dropped_mass(one.mass, tiles).max()
    assert worst <= budget
    assert np.isnan(tiles.threshold).all()
    assert (tiles.sparsity[0] > 0.05) == (budget > 0)


def test_budget_is_stricter_than_the_maximum_rule_on_the_worst_row(one):
    skips = one.decide(0.05)
    worst = accuracy.dropped_mass(one.mass, skips).max()
    tiles = rules.decide(one, rules.MassBudget(worst / 4))
    assert accuracy.dropped_mass(one.mass, tiles).max() <= worst / 4


def test_normalised_rule_compares_with_the_running_sum(one):
    """A direct loop over kept row maxima and masses, in plain Python floats."""
    lam, grid = 1e-3, one.grid
    tiles = rules.decide(one, rules.NormalisedMaximum(lam))
    for i in range(grid.groups):
        rows = range(150)[grid.group_rows(i)]
        kept = {r: 0.0 for r in rows}  # share of the row's dense sum
        top = {r: -np.inf for r in rows}
        for j in grid.visit("ends_first", i):
            votes = []
            for r in rows:
                x = float(one.row_max[0, r, j])
                if x == -np.inf:
                    votes.append(True)
                elif top[r] == -np.inf:
                    votes.append(False)
                else:
                    total = kept[r] * np.exp(float(one.lse[0, r]))  # Σ exp(score) over kept keys
                    votes.append(np.exp(x) < lam * total)
            assert (tiles.state[0, i, j] == SKIPPED) == all(votes)
            if not all(votes):
                for r in rows:
                    kept[r] += float(one.mass[0, r, j])
                    top[r] = max(top[r], float(one.row_max[0, r, j]))
    assert tiles.sparsity[0] > 0.02


def test_forcing_a_tile_changes_it_and_only_its_group(one):
    before = rules.decide(one, rules.Maximum(0.05))
    i = one.grid.groups - 3
    j = int(np.flatnonzero(before.state[0, i] == COMPUTED)[0])
    after = rules.decide(one, rules.Maximum(0.05), forced={(0, i, j): True})
    assert after.state[0, i, j] == SKIPPED
    others = np.arange(one.grid.groups) != i
    assert np.array_equal(after.state[0, others], before.state[0, others])
    lost = [accuracy.dropped_mass(one.mass, t)[0, one.grid.group_rows(i)] for t in (before, after)]
    assert lost[1].sum() > lost[0].sum()


def test_forcing_a_skipped_tile_to_be_kept_lowers_the_error(one):
    before = rules.decide(one, rules.Maximum(0.3))
    i, j = np.argwhere(before.skipped[0])[-1]
    after = rules.decide(one, rules.Maximum(0.3), forced={(0, int(i), int(j)): False})
    assert after.state[0, i, j] == COMPUTED
    rows = one.grid.group_rows(int(i))
    lost = [accuracy.dropped_mass(one.mass, t)[0, rows].mean() for t in (before, after)]
    assert lost[1] < lost[0]


def test_forcing_the_first_tile_away_leaves_the_row_to_the_others(head):
    q, k, v = head
    one = scan(q, k, tile=(4, 8), mass=True)
    tiles = rules.decide(one, rules.Maximum(0.05), forced={(0, 37, 18): True})
    assert tiles.state[0, 37, 18] == SKIPPED
    out = attend(q, k, v, tiles)
    assert np.isfinite(out.output).all()
    *_, last = rules.walk(one, 0, 37, rules.Maximum(0.05), {18: True})
    np.testing.assert_allclose(last.m + np.log(last.l), out.lse[0, 148:], atol=1e-4)


def test_sequence_above_one_is_the_same_walk(head):
    one = scan(*head[:2], tile=(4, 8), mass=True)
    tiles = one.decide(5.0, short_context="allow")
    assert np.array_equal(rules.decide(one, rules.Maximum(5.0)).state, tiles.state)


def test_bad_rules_and_forces_are_named(one, head):
    for make in (rules.Maximum, rules.NormalisedMaximum, rules.MassBudget):
        with pytest.raises(ValueError, match="must be finite and at least 0, got -1"):
            make(-1)
    with pytest.raises(ValueError, match=r"there is no tile \(0, 99, 0\) to force"):
        rules.decide(one, rules.Maximum(0.1), forced={(0, 99, 0): True})
    with pytest.raises(ValueError, match="mass=True"):
        rules.decide(scan(*head[:2]), rules.Maximum(0.1))


def test_progress_reaches_one(one):
    shares = []
    rules.decide(one, rules.Maximum(0.1), progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_on_a_synthetic_head_the_budget_bounds_what_the_maximum_rule_does_not():
    q, k, *_ = workloads.local_band(1024)
    one = scan(q, k, mass=True)
    worst = accuracy.dropped_mass(one.mass, one.decide(0.3)).max()
    assert worst > 0.05
    assert accuracy.dropped_mass(one.mass, rules.decide(one, rules.MassBudget(0.05))).max() <= 0.05
