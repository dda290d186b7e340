"""The small Hopper attention kernel against float64: emulated, assembled, and on a Hopper GPU."""

import time

import numpy as np
import pytest
import small_hopper_attention as small
from on_gpu import launch
from test_small_attention import check, log2_scale

from cuda_kernels import detect
from cuda_kernels.launch import assemble, why_not_assemble
from cuda_kernels.ptx.halves import BF16, F16, narrow
from cuda_kernels.ptx.language import TensorMap

SIZES = [(64, 3, F16), (128, 4, BF16)]  # head_dim, key tiles, dtype


def inputs(head_dim, tiles, dtype, blocks=1):
    rng = np.random.default_rng(head_dim + tiles)
    lengths = (small.ROWS * blocks, small.KEYS * tiles, small.KEYS * tiles)
    q, k, v = (narrow(rng.standard_normal((n, head_dim)), dtype) for n in lengths)
    return q, k, v, narrow(np.full(q.shape, np.nan), dtype)


def maps(q, k, v, out):
    boxes = (small.Q_BOX, small.K_BOX, small.K_BOX, small.OUT_BOX)
    return [TensorMap(x, box) for x, box in zip((q, k, v, out), boxes, strict=True)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("schedule", ["late", "early", "both"])
def test_emulated(size, schedule):
    pytest.importorskip("greenlet")
    from cuda_kernels.emulator import emulate

    head_dim, tiles, dtype = size
    arrays = inputs(*size)
    start = time.process_time()
    run = emulate(
        small.make_kernel(head_dim, dtype), 1, small.THREADS, *maps(*arrays),
        tiles, log2_scale(head_dim),
        shared_bytes=small.shared_bytes(head_dim), schedule=schedule,
    )  # fmt: skip
    assert time.process_time() - start < 12  # measured 1 s a schedule, on a busy machine more
    check(*arrays, log2_scale(head_dim), dtype)
    names = {event.name for event in run.events}
    assert {"wgmma_ss", "wgmma_rs", "TMA load", "mbarrier wait", "wgmma_wait"} <= names


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_the_gpu(size):
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "kernels are simulated")
    cupy = pytest.importorskip("cupy")
    from numba import cuda

    if cuda.get_current_device().compute_capability[0] != 9:
        pytest.skip("no Hopper GPU")
    head_dim, tiles, dtype = size
    arrays = list(inputs(*size, blocks=3))
    kernel, shared = small.make_kernel(head_dim, dtype), small.shared_bytes(head_dim)
    results = []
    for _ in range(2):
        moved = [cupy.asarray(x) for x in arrays]
        launch(
            kernel, small.SIGNATURE, (3,), small.THREADS, shared,
            *maps(*moved), np.int32(tiles), log2_scale(head_dim),
        )  # fmt: skip
        results.append(cupy.asnumpy(moved[3]))
    check(*arrays[:3], results[0], log2_scale(head_dim), dtype)
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.assembler
@pytest.mark.skipif(bool(why_not_assemble()), reason=str(why_not_assemble()))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_machine_code(size):
    made = assemble(small.make_kernel(size[0], size[2]), small.SIGNATURE, "sm_90a")
    assert made.faults() == []
    assert made.count("HGMMA") == size[0] // 16 + small.KEYS // 16
