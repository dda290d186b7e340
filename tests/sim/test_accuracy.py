"""The error identity to rounding, dropped mass against brute force, the bound above it."""

import numpy as np
import pytest

from sim import accuracy
from sim.reference import attention
from sim.skip_softmax import attend, scan


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 2, 200, 16))
    q, k = 3 * q, k
    q[..., 0], k[..., 0] = 5, -8 * (rng.random((2, 50)).repeat(4, axis=1) < 0.7)
    k[:, 0, 0] = 3
    return q, k, v


@pytest.mark.parametrize("lam", [1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("causal", [True, False])
def test_error_identity_is_exact(head, lam, causal):
    q, k, v = head
    tiles = scan(q, k, tile=(4, 8), causal=causal).decide(lam, short_context="allow")
    assert tiles.sparsity.min() > 0
    parts = accuracy.error_identity(q, k, v, tiles)
    assert abs(parts.dense - parts.kept - parts.error).max() < 1e-12
    error = np.linalg.norm(parts.dense - parts.kept, axis=2)
    limit = 2 * parts.dropped_mass * np.linalg.norm(v, axis=2).max(axis=1)[:, None]
    assert (error <= limit + 1e-12).all()
    assert error.max() > 0


def test_identity_terms_are_attention_over_the_two_halves(head):
    q, k, v = head
    tiles = scan(q, k, tile=(4, 8)).decide(0.1)
    parts = accuracy.error_identity(q, k, v, tiles)
    s = 16**-0.5 * q[0] @ k[0].T
    s[np.triu_indices(200, 1)] = -np.inf
    r = int(parts.dropped_mass[0].argmax())
    lost = tiles.skipped[0, r // 4].repeat(8)[:200] & (s[r] > -np.inf)
    p = np.exp(s[r] - s[r].max())
    assert parts.dropped_mass[0, r] == pytest.approx(p[lost].sum() / p.sum(), rel=1e-12)
    np.testing.assert_allclose(parts.skipped[0, r], p[lost] @ v[0, lost] / p[lost].sum(), rtol=1e-9)


def test_dropped_mass_agrees_three_ways(head):
    q, k, v = head
    one = scan(q, k, tile=(4, 8), mass=True)
    tiles = one.decide(0.1)
    exact = accuracy.error_identity(q, k, v, tiles).dropped_mass
    assert exact.max() > 0.01
    np.testing.assert_allclose(accuracy.dropped_mass(one.mass, tiles), exact, atol=1e-5)
    np.testing.assert_allclose(attend(q, k, v, tiles).dropped_mass, exact, atol=1e-12)


@pytest.mark.parametrize("lam", [1e-3, 0.05, 1.0])
def test_bound_covers_dropped_mass_and_both_doors_agree(head, lam):
    q, k, v = head
    one = scan(q, k, tile=(4, 8), mass=True)
    tiles = one.decide(lam)
    bound = accuracy.dropped_mass_bound(one, tiles)
    out = attend(q, k, v, tiles)
    assert (bound >= accuracy.dropped_mass(one.mass, tiles)).all()
    assert (out.dropped_mass_bound >= out.dropped_mass).all()
    np.testing.assert_allclose(bound, out.dropped_mass_bound, atol=1e-4)
    assert bound.max() < 1


def test_the_bound_is_reached_when_all_skipped_keys_are_equal():
    q, v = np.full((1, 2, 4), 2.0), np.ones((1, 16, 4))
    k = np.zeros((1, 16, 4))
    k[:, 8:] = 3.0  # visited first, scores 12; the other tile is 8 keys of score 0
    tiles = scan(q, k, tile=(2, 8), causal=False).decide(0.01)
    out = attend(q, k, v, tiles)
    assert tiles.state.tolist() == [[[2, 1]]]
    assert out.dropped_mass_bound == pytest.approx(1.01 * out.dropped_mass, rel=1e-3)


def test_bound_needs_masses(head):
    q, k, _ = head
    one = scan(q, k)
    with pytest.raises(ValueError, match="mass=True"):
        accuracy.dropped_mass_bound(one, one.decide(0.1))


def test_reference_agrees_with_a_second_formula():
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((4, 9, 8)),
        rng.standard_normal((2, 13, 8)),
        rng.standard_normal((2, 13, 5)),
    )
    out = attention(q, k, v, causal=True, softmax_scale=0.3)
    for h in range(4):
        for r in range(9):
            n = r + 1 + 4
            w = np.exp(0.3 * k[h // 2, :n] @ q[h, r])
            np.testing.assert_allclose(out.output[h, r], w @ v[h // 2, :n] / w.sum(), rtol=1e-12)
            assert out.lse[h, r] == pytest.approx(np.log(w.sum()), rel=1e-12)
