"""Targets: what each kernel decides on, and that scanning for one does just that."""

from dataclasses import replace

import numpy as np
import pytest

from sim.decode import DecodeScan, scan_decode
from sim.skip_softmax import Scan, scan
from sim.targets import TARGETS, target

EXPECTED = {  # tile, order, vote, seeded
    ("ours", "prefill"): ((64, 128), "ends_first", "head", False),
    ("nvidia", "prefill"): ((64, 128), "ascending", "head", False),
    ("model-optimizer", "prefill"): ((128, 128), "ascending", "head", False),
    ("ours", "decode"): ((1, 64), "ascending", "group", True),
    ("nvidia", "decode"): ((1, 64), "ascending", "group", False),
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
        assert (one.name, one.phase, one.splits) == (name, phase, 1)
        assert one.description.endswith(".")


@pytest.mark.parametrize("name", ["ours", "nvidia", "model-optimizer"])
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
            for name in ("ours", "nvidia", "model-optimizer")
        ]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not np.array_equal(scans[a], scans[b])


def test_bad_input_gets_one_sentence():
    q, k = tensors()
    with pytest.raises(
        ValueError, match="target must be one of ours, nvidia, model-optimizer, got"
    ):
        target("vllm", "prefill")
    with pytest.raises(ValueError, match="phase must be one of prefill, decode, got 'training'"):
        target("ours", "training")
    with pytest.raises(ValueError, match="lengths is for decode"):
        target("ours", "prefill").scan(q, k, lengths=[300])
    with pytest.raises(ValueError, match="decode needs lengths"):
        target("ours", "decode").scan(q.swapaxes(0, 1)[-1:], k)
