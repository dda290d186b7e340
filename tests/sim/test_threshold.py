"""λ in all its spellings, target sparsity, and the trap above 1."""

import numpy as np
import pytest

from sim import threshold as t
from sim.skip_softmax import scan


def test_spellings_convert_both_ways():
    for lam in (0.0, 1e-6, 0.01, 1.0):
        assert t.from_scale_factor(t.to_scale_factor(lam, 4096), 4096) == pytest.approx(lam)
        assert t.from_log2(t.to_log2(lam)) == pytest.approx(lam)
    assert t.ln_threshold([1.0, 0.0]).tolist() == [0.0, -np.inf]
    assert t.ln_threshold(0.01).dtype == np.float32


def test_published_factor_gives_the_published_threshold():
    # TensorRT-LLM's factor for half the tiles of Qwen3-30B's prefill, at 32K and 128K
    assert t.from_scale_factor(587.18, 32_768) == pytest.approx(0.0179, abs=5e-5)
    assert np.log(t.from_scale_factor(587.18, 131_072)) == pytest.approx(-5.41, abs=5e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.0, 0.1, 0.33, 0.5])
def test_target_sparsity_is_reached_from_below_and_by_one_tile(seed, target):
    rng = np.random.default_rng(seed)
    gap = rng.normal(-5, 2, (3, 7, 11)).astype(np.float32)
    gap[:, :, 0], gap[:, 3, 5:] = np.inf, -np.inf
    visited = gap > -np.inf
    lam = t.for_target_sparsity(gap, target)
    skipped = ((gap < t.ln_threshold(lam)) & visited).sum() / visited.sum()
    assert target - 1 / visited.sum() < skipped <= target


def test_ties_are_skipped_together_or_not_at_all():
    gap = np.array([np.inf, -2, -2, -2, -1, -3], np.float32)
    lam = t.for_target_sparsity(gap, 0.5)  # three of six: one of the three equals would be left
    assert ((gap < t.ln_threshold(lam)).sum()) == 1


def test_neighbouring_floats_are_told_apart():
    low = np.float32(-4)
    gap = np.array([np.inf, low, np.nextafter(low, np.float32(0))], np.float32)
    lam = t.for_target_sparsity(gap, 1 / 3)
    assert ((gap < t.ln_threshold(lam)).tolist()) == [False, True, False]


def test_per_head_thresholds_balance_heads():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 256, 8))
    k[:, :8], q[..., 0], k[..., 0] = 3, 6, 0
    k[:, :8, 0] = 4
    q[1] *= 2
    one = scan(q, k, tile=(4, 8))
    together = one.decide(target_sparsity=0.4)
    each = one.decide(target_sparsity=0.4, per_head=True)
    assert together.threshold[0] == together.threshold[1]
    assert together.skipped.sum() / together.visited.sum() == pytest.approx(0.4, abs=0.01)
    assert np.ptp(together.sparsity) > 0.1
    assert each.sparsity == pytest.approx([0.4, 0.4], abs=0.01)
    assert each.threshold[0] != each.threshold[1]


def test_short_context_is_dense_unless_allowed():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 100, 8))
    one = scan(q, k, tile=(4, 8))
    dense = one.decide(threshold_scale_factor=200)  # λ would be 2
    assert dense.sparsity[0] == 0
    assert dense.threshold[0] == 0
    allowed = one.decide(threshold_scale_factor=200, short_context="allow")
    assert allowed.threshold[0] == 2
    assert allowed.sparsity[0] > 0.5


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="kv_length must be at least 1, got 0"):
        t.from_scale_factor(1, 0)
    with pytest.raises(ValueError, match="kv_length must be at least 1, got 0"):
        t.to_scale_factor(1, 0)
