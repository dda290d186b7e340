"""What of ``skip-softmax bench decode`` can be seen without a GPU."""

import numpy as np
import pytest

from app import cli
from cuda_kernels import detect
from cuda_kernels.bandwidth import AT_A_TIME, CHUNK, THREADS, make_kernel
from cuda_kernels.benchmark_decode import SHAPES, Shape, _row, decode_table, faint_tiles, working
from cuda_kernels.emulator import emulate


def test_the_read_only_kernel_reads_every_word_once():
    k, v = np.random.default_rng(0).integers(-9, 9, (2, CHUNK // 2), np.int16)
    v[-1] ^= 77
    folded = np.zeros(2 * THREADS, np.uint32)
    emulate(make_kernel(), 2, THREADS, k, v, folded)
    for block, x in enumerate((k, v)):
        words = x.view(np.uint32).reshape(AT_A_TIME, THREADS, 4)
        expected = np.bitwise_xor.reduce(words, axis=(0, 2))
        assert np.array_equal(folded[block * THREADS : (block + 1) * THREADS], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bars_shapes_are_whole_chunks_and_tiles(shape):
    assert shape.bytes // 2 % CHUNK == 0
    assert shape.keys % 64 == 0


def test_faint_tiles_are_as_many_as_prescribed_and_never_the_first_or_newest():
    faint = faint_tiles(Shape(3, 8, 2, 1280), 0.9)
    assert (faint.sum(axis=2) == 18).all()
    assert not faint[..., [0, -1]].any()
    assert not (faint_tiles(Shape(3, 8, 2, 1280), 0.5)[0, 0] == faint_tiles(
        Shape(3, 8, 2, 1280), 0.5)[0, 1]).all()  # fmt: skip


def test_a_row_compares_round_by_round_and_the_table_shows_it():
    times = {"read-only": [1.0, 2.0, 4.0], "dense": [2.0, 2.0, 2.0]}
    common = {**Shape(1, 8, 2, 64)._asdict(), "layout": "HND"}
    row = _row("dense", times, "read-only", 4 * 10**9, 0.0, 3, common)
    assert row["ratio"] == 1.0
    assert row["ratio_quartiles"] == [0.5, 2.0]
    assert row["tb_per_s"] == 2.0
    left_out = {}
    peers = {"good": lambda: 1, "bad": lambda: 1 / 0}
    assert list(working(peers, lambda: None, left_out)) == ["good"]
    shown = decode_table({"machine": {"gpu": "none"}, "rows": [row], "left_out": left_out})
    assert "left out: bad: ZeroDivisionError: division by zero" in shown
    assert "1.000 (0.500–2.000) × read-only" in shown
    assert "8/2" in shown


def test_without_a_gpu_one_sentence_says_so(capsys):
    if detect().kind == "gpu":
        pytest.skip("there is a GPU")
    assert cli.main(["bench", "decode", "--quick"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "bench needs a GPU from Ampere on" in sentence
