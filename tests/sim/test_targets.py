"""Targets: what each kernel decides on, and that scanning for one does just that."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from sim.decode import DecodeScan, scan_decode
from sim.skip_softmax import Scan, scan
from sim.targets import KERNELS, TARGETS, hopper_prefill, target, targets_of

EXPECTED = {  # tile, order, vote, seeded
    ("ours", "prefill"): ((64, 128), "ends_first", "head", False),
    ("nvidia", "prefill"): ((64, 128), "ascending", "head", False),
    ("nvidia-256", "prefill"): ((64, 256), "ascending", "head", False),
    ("model-optimizer", "prefill"): ((128, 128), "ascending", "head", False),
    ("ours", "decode"): ((1, 64), "ascending", "group", True),
    ("nvidia", "decode"): ((1, 64), "ascending", "group", False),
    ("nvidia-256", "decode"): ((1, 64), "ascending", "group", False),
    ("model-optimizer", "decode"): ((1, 128), "ascending", "head", False),
}


def tensors():
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((4, 300, 16)), rng.standard_normal((2, 300, 16))


def test_the_targets_are_these():
    found = {key: (one.tile, one.order, one.vote, one.seeded) for key, one in TARGETS.items()}
    assert found == EXPECTED
    for (name, phase), one in TARGETS.items():
        assert target(name, phase) is one
        shared = (name, phase) == ("nvidia-256", "decode")  # XQA, at every head_dim
        assert (one.name, one.phase, one.splits) == ("nvidia" if shared else name, phase, 1)
        assert one.description.endswith(".")
    assert set(targets_of("prefill", "decode")) == set(TARGETS.values())
    assert len(targets_of("prefill")) == 4
    assert len(targets_of("decode")) == 3


def test_head_dim_chooses_nvidias_grid():
    """STEP_KV of fmha_v2's generator: 256 for 32 to 64, 128 for 72 to 128; in FP8 256 to 128."""
    for head_dim, sixteen_bit, fp8 in ((32, 256, 256), (64, 256, 256), (72, 128, 256)):
        named = hopper_prefill(head_dim)
        (of_16,) = (target(name, "prefill").tile for name in named if "bf16" in named[name])
        (of_8,) = (target(name, "prefill").tile for name in named if "FP8" in named[name])
        assert (of_16, of_8) == ((64, sixteen_bit), (64, fp8))
    assert hopper_prefill(128) == hopper_prefill(72)
    assert list(hopper_prefill(192)) == list(hopper_prefill(256)) == ["nvidia"]


def test_a_wide_tile_is_skipped_where_both_of_its_halves_are():
    """In ascending order, for λ ≤ 1: a skip leaves the maxima as they are, whatever its width."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 2000, 16))
    q[..., 0], k[..., 0] = 10, rng.uniform(-2, 2, (2, 16)).repeat(128, axis=1)[:, :2000]
    fine, wide = (
        target(name, "prefill").scan(q, k, softmax_scale=0.3).gap
        for name in ("nvidia", "nvidia-256")
    )
    halves = np.maximum.reduceat(fine, np.arange(0, fine.shape[2], 2), axis=2)
    assert wide.shape == halves.shape
    for lam in (1e-3, 1e-2, 0.1, 0.5, 1.0):
        assert np.array_equal(wide < np.log(lam), halves < np.log(lam))
        assert 5 < (np.isfinite(wide) & (wide < np.log(lam))).sum() < np.isfinite(wide).sum()
    assert not np.array_equal(wide, halves)  # but gaps above 0 may differ


@pytest.mark.parametrize("name", KERNELS)
def test_prefill_scans_on_its_grid_in_its_order(name):
    q, k = tensors()
    tile, order, *_ = EXPECTED[name, "prefill"]
    one = target(name, "prefill").scan(q, k, softmax_scale=0.3, mass=True)
    same = scan(q, k, tile=tile, order=order, softmax_scale=0.3, mass=True)
    assert isinstance(one, Scan)
    assert np.array_equal(one.gap, same.gap)
    assert np.array_equal(one.mass, same.mass)
    assert one.row_max is None


@pytest.mark.parametrize("name", ["ours", "nvidia", "model-optimizer"])
def test_decode_scans_with_its_vote_and_seed(name):
    q, k = tensors()
    steps, lengths = q.swapaxes(0, 1)[-3:], [298, 299, 300]
    tile, order, vote, seeded = EXPECTED[name, "decode"]
    one = target(name, "decode").scan(steps, k, lengths=lengths, softmax_scale=0.3, mass=True)
    same = scan_decode(
        steps,
        k,
        lengths,
        keys=tile[1],
        order=order,
        vote=vote,
        seeded=seeded,
        softmax_scale=0.3,
        mass=True,
    )
    assert isinstance(one, DecodeScan)
    assert np.array_equal(one.gap, same.gap)
    assert np.array_equal(one.mass, same.mass)
    split = replace(target(name, "decode"), splits=2, split_layout="contiguous")
    assert split.scan(steps, k, lengths=lengths).grid.splits == 2
    assert split.scan(steps, k, lengths=lengths).grid.split_layout == "contiguous"


def test_every_target_sees_something_else():
    q, k = tensors()
    for phase in ("prefill", "decode"):
        if phase == "decode":
            q, lengths = q.swapaxes(0, 1)[-2:], [299, 300]
        else:
            lengths = None
        scans = [
            target(name, phase).scan(q, k, lengths=lengths).gap
            for name in KERNELS
            if TARGETS[name, phase].name == name
        ]
        for a, b in combinations(scans, 2):
            assert not np.array_equal(a, b)


def test_bad_input_gets_one_sentence():
    q, k = tensors()
    with pytest.raises(
        ValueError, match="target must be one of ours, nvidia, nvidia-256, model-optimizer, got"
    ):
        target("vllm", "prefill")
    with pytest.raises(ValueError, match="phase must be one of prefill, decode, got 'training'"):
        target("ours", "training")
    with pytest.raises(ValueError, match="lengths is for decode"):
        target("ours", "prefill").scan(q, k, lengths=[300])
    with pytest.raises(ValueError, match="decode needs lengths"):
        target("ours", "decode").scan(q.swapaxes(0, 1)[-1:], k)
