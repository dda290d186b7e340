"""The model of time: bytes ÷ bandwidth, and the published rows beside it."""

import numpy as np
import pytest

from sim import decode_time
from sim.decode import decode_bytes, scan_decode
from sim.decode_time import DENSE, SKIPPING, expected_speed_up, reached, seconds
from sim.hardware import GPUS


def test_speed_up_and_time_are_those_of_the_bytes() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 4, 64)), rng.standard_normal((1, 4096, 64))
    k[:, 64:-64:2] *= 0.01
    k[:, :64] *= 8
    q *= 8
    tiles = scan_decode(q, k, [4096], splits=8, seeded=True).decide(0.05)
    moved = decode_bytes(tiles, 64, page=64)
    assert 0.3 < tiles.sparsity[0] < 1
    assert expected_speed_up(moved) == pytest.approx(moved.dense / moved.total)
    assert 1 < expected_speed_up(moved) < 2 / (2 - tiles.sparsity[0])  # pages and partials stay
    assert seconds(moved, 1e12) == moved.total / 1e12
    with pytest.raises(ValueError, match="bandwidth must be above 0 bytes a second, got 0"):
        seconds(moved, 0)


def test_published_bandwidths_are_those_of_their_microseconds() -> None:
    published = [4.31, 4.37, 4.03, 4.10, 7.08, 7.10, 5.46, 5.68]
    for row, bandwidth in zip(DENSE, published, strict=True):
        moved = row.model * 1e-6 * GPUS[row.gpu].bandwidth
        assert moved / row.microseconds * 1e-6 == pytest.approx(bandwidth, abs=0.02)
        assert row.microseconds > row.model  # nothing is faster than its data sheet


def test_model_bounds_what_kernels_reach() -> None:
    for row in SKIPPING:
        assert 1 <= row.model < 2
        assert row.speed_up - row.model < 0.015
    least, most = reached()
    assert least == pytest.approx(0.090 / 0.2201, rel=1e-3)  # H200 FP8, 16K, 36 %
    assert most == pytest.approx(0.130 / 0.1293, rel=1e-3)  # H200 BF16, 64K, 23 %


def test_every_row_is_printed_with_its_residual(capsys) -> None:
    decode_time.main([])
    out = capsys.readouterr().out
    for row in DENSE:
        assert f"{row.microseconds / row.model - 1:+.1%}" in out
    for row in SKIPPING:
        line = f"{row.label:26}{row.sparsity:9.1%}{row.speed_up:10.3f}"
        [found] = [text for text in out.splitlines() if text.startswith(line)]
        assert float(found.split()[-1]) == pytest.approx(row.speed_up - row.model, abs=6e-4)
        assert row.source in out
