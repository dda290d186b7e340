"""A crop goes through the real kernel in a child process and agrees with the simulator."""

import threading

import numpy as np
import pytest

import sim
from cuda_kernels import crop
from sim.traces import bundled, read_trace

GRID = sim.Grid((16, 16), 200, 200, True)


@pytest.fixture(scope="module")
def head():
    trace = read_trace(bundled()["smollm2-135m-layer12-kv0"])
    return trace.q[0, :200], trace.k[0, :200], trace.v[0, :200], trace.softmax_scale


@pytest.mark.parametrize(
    ("group", "key_tile", "expected"),
    [
        (12, 5, [0, 2, 3, 4, 5, 6, 7, 12]),
        (12, 12, [0, 6, 7, 8, 9, 10, 11, 12]),
        (12, 0, [0, 1, 2, 3, 4, 5, 6, 12]),
        (3, 1, [0, 1, 2, 3]),
        (0, 0, [0]),
    ],
)
def test_cut_keeps_the_ends_the_tile_and_its_neighbours(head, group, key_tile, expected):
    one = crop.cut(*head[:3], GRID, group, key_tile)
    assert one.key_tiles == expected
    assert one.q.shape[1] == (8 if group == 12 else 16)
    assert one.k.shape[1] == one.grid.lk == (len(expected) - 1) * 16 + one.q.shape[1]


@pytest.mark.cudasim
def test_the_kernel_agrees_with_the_simulator_on_a_real_crop(head):
    pytest.importorskip("numba", reason="Numba has no wheel here")
    q, k, v, scale = head
    one = crop.cut(q, k, v, GRID, 11, 6)
    done = crop.run(one, threshold=0.05, order="ends_first", softmax_scale=scale)
    scan = sim.scan(one.q, one.k, tile=(16, 16), softmax_scale=scale)
    finite = np.isfinite(scan.gap)
    np.testing.assert_allclose(done.gap[finite], scan.gap[finite], atol=1e-3)
    assert np.array_equal(done.tiles.state, scan.decide(0.05).state)
    assert done.tiles.sparsity > 0


def test_a_crop_sees_what_its_group_sees_in_the_whole_head(head):
    """With every tile of the group in it, the crop's gaps are those of the head."""
    q, k, v, scale = head
    whole = sim.scan(q[None], k[None], tile=(16, 16), softmax_scale=scale)
    one = crop.cut(q, k, v, GRID, 7, 3)
    part = sim.scan(one.q, one.k, tile=(16, 16), softmax_scale=scale)
    np.testing.assert_allclose(part.gap[0, 0], whole.gap[0, 7, one.key_tiles], atol=1e-5)


def test_bad_crops_are_named(head):
    with pytest.raises(ValueError, match="vote group 3 does not visit key tile 4"):
        crop.cut(*head[:3], GRID, 3, 4)
    with pytest.raises(ValueError, match="vote group 13 does not visit"):
        crop.cut(*head[:3], GRID, 13, 0)
    with pytest.raises(ValueError, match="causal head without a window"):
        crop.cut(*head[:3], sim.Grid((16, 16), 200, 200, False), 3, 0)


def test_one_at_a_time(head, monkeypatch):
    one = crop.cut(*head[:3], GRID, 3, 0)
    inside, leave = threading.Event(), threading.Event()

    def slow(arguments, timeout):
        inside.set()
        leave.wait(10)
        raise crop.CropError("stopped")

    monkeypatch.setattr(crop, "_child", slow)
    settings = {"threshold": 0.1, "order": "ascending", "softmax_scale": 1.0}
    errors = []

    def first():
        try:
            crop.run(one, **settings)
        except crop.CropError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with pytest.raises(crop.CropError, match="another crop is running"):
        crop.run(one, **settings)
    leave.set()
    thread.join()
    assert errors == ["stopped"]
    with pytest.raises(crop.CropError, match="stopped"):  # free again
        crop.run(one, **settings)


def test_a_child_that_hangs_or_fails_ends_in_one_sentence(head):
    one = crop.cut(*head[:3], GRID, 3, 0)
    settings = {"order": "ascending", "softmax_scale": 1.0}
    with pytest.raises(crop.CropError, match=r"longer than 0\.01 s"):
        crop.run(one, threshold=0.1, timeout=0.01, **settings)
    with pytest.raises(
        crop.CropError, match="could not run: ValueError: threshold must be at most"
    ):
        crop.run(one, threshold=3.0, **settings)
