"""Prescribed sparsity is met tile for tile; the patterns show what they are named for."""

import numpy as np
import pytest

from sim import workloads
from sim.skip_softmax import scan


@pytest.mark.parametrize("make", [workloads.columns, workloads.scattered])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("order", ["ends_first", "ascending"])
def test_prescribed_states_are_met_tile_for_tile(make, sparsity, order):
    work = make(3001, heads=2, sparsity=sparsity, seed=4)
    tiles = scan(work.q, work.k, order=order).decide(0.01)
    assert (tiles.state == workloads.expected_state(work, order)).all()
    if order == "ends_first":
        assert tiles.sparsity == pytest.approx([sparsity] * 2, abs=0.01)


@pytest.mark.parametrize("make", [workloads.columns, workloads.scattered])
def test_prescribed_on_other_grids_and_without_a_mask(make):
    work = make(700, 64, 1, sparsity=0.6, tile=(16, 32), causal=False)
    tiles = scan(work.q, work.k, tile=(16, 32), causal=False).decide(0.01)
    assert (tiles.state == workloads.expected_state(work, "ends_first")).all()
    assert tiles.sparsity[0] == pytest.approx(0.6, abs=0.01)


def test_columns_agree_down_the_map_and_scattered_does_not():
    column, scatter = (
        make(4096, heads=1, sparsity=0.5).shifted[40:, 1:20]
        for make in (workloads.columns, workloads.scattered)
    )
    assert (column == column[0]).all()
    assert 0.2 < (scatter[:-1] != scatter[1:]).mean() < 0.8


def test_out_of_reach_or_nonsense_is_named():
    with pytest.raises(ValueError, match=r"sparsity 0\.99 is out of reach: at most 0\.8"):
        workloads.columns(4096, sparsity=0.99)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\]"):
        workloads.columns(4096, sparsity=-1)
    with pytest.raises(ValueError, match="head_dim must be above 32"):
        workloads.scattered(4096, 32)
    with pytest.raises(ValueError, match="sparsity is prescribed for columns and scattered"):
        workloads.expected_state(workloads.random(256), "ends_first")
    with pytest.raises(ValueError, match="not in descending order"):
        workloads.expected_state(workloads.columns(1024, sparsity=0.3), "descending")


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_every_workload_is_reproducible_and_its_heads_share_keys(name):
    first, again = workloads.WORKLOADS[name](1024), workloads.WORKLOADS[name](1024)
    assert np.array_equal(first.q, again.q)
    assert first.q.shape[0] == 3
    assert first.k.shape == first.v.shape == (1, 1024, first.q.shape[2])
    assert first.q.dtype == first.k.dtype == first.v.dtype == np.float32
    assert not np.array_equal(first.k, workloads.WORKLOADS[name](1024, seed=1).k)


def mass_of(name):
    """True softmax mass of the last head by key tile, at the default length."""
    work = workloads.WORKLOADS[name]()
    return scan(work.q[-1:], work.k, mass=True).mass[0]


def test_sink_draws_to_the_first_tile():
    mass = mass_of("sink")
    assert mass[2048:, 0].mean() > 0.4
    assert mass_of("random")[2048:, 0].mean() < 0.06


def test_local_band_draws_to_recent_tiles():
    mass = mass_of("local band")
    rows = np.arange(2048, 4096)
    recent = mass[rows, rows // 128] + mass[rows, rows // 128 - 1]
    assert recent.mean() > 0.6


def test_stripes_draw_to_few_tiles_shared_by_all_rows():
    share = mass_of("vertical stripes")[3584:].mean(axis=0)
    assert np.sort(share)[-8:].sum() > 0.8
    assert share[-1] + share[0] < 0.6


def test_patterns_skip_and_noise_does_not():
    sparsity = {}
    for name in ("sink", "local band", "vertical stripes", "random"):
        work = workloads.WORKLOADS[name]()
        sparsity[name] = scan(work.q, work.k).decide(0.01).sparsity
    assert (sparsity.pop("random") < 0.01).all()
    for per_head in sparsity.values():
        assert per_head[-1] > 0.2
        assert per_head[0] < per_head[-1]
