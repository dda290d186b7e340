"""How the emulator runs Hopper's units: when copies and products happen, and how long they take."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("greenlet")

from cuda_kernels.emulator import MAX_SHARED_BYTES, EmulationError, emulate, timing
from cuda_kernels.ptx.language import (
    F16,
    K_MAJOR,
    TensorMap,
    cuda,
    f32,
    fence_mbarrier_init,
    k_major,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    setmaxnreg_dec,
    setmaxnreg_inc,
    shared_address,
    tma_load_2d,
    u8,
    u32,
    u64,
    wgmma_commit,
    wgmma_fence,
    wgmma_ss,
    wgmma_wait,
)

ROOT = Path(__file__).resolve().parents[3]
BOX = (64, 64)


def load_one(source, values, out):
    """Copy a box; its source changes once the copy has begun."""
    base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
    barrier = shared_address(cuda.shared.array(1, u64, alignment=8), 0)
    memory = cuda.shared.array(0, "uint16", alignment=1024)
    mbarrier_init(barrier, 1)
    fence_mbarrier_init()
    mbarrier_arrive_expect_tx(barrier, 8192)
    tma_load_2d(base, source, barrier, 0, 0)
    values[0, 0] = 7
    mbarrier_wait(barrier, 0)
    out[0] = memory[0]


def test_copies_are_late_or_early():
    def run(schedule):
        values, out = np.ones((64, 64), np.uint16), np.zeros(1, np.uint16)
        emulate(
            load_one, 1, 1, TensorMap(values, BOX), values, out,
            shared_bytes=8192, schedule=schedule,
        )  # fmt: skip
        return int(out[0])

    assert run("late") == 7
    assert run("early") == 1
    # Both: the map and the argument are the same array in either run.
    with pytest.raises(EmulationError, match="argument out depends on when asynchronous copies"):
        run("both")


def test_a_map_argument_is_not_copied_back():
    """The first of two runs works on copies: what a map describes changes once."""

    def add_one(source, values):
        values[0, 0] += 1

    values = np.zeros((1, 64), np.uint16)
    emulate(add_one, 1, 1, TensorMap(values, (1, 64)), values)
    assert values[0, 0] == 1


def two_groups(a, out):
    """Two warpgroups multiply the same matrices, in all of the shared memory there is."""
    base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
    barrier = shared_address(cuda.shared.array(1, u64, alignment=8), 0)
    last = u32(base + MAX_SHARED_BYTES // 1024 * 1024 - 8192)
    t = cuda.threadIdx.x
    if t == 0:
        mbarrier_init(barrier, 1)
        fence_mbarrier_init()
        mbarrier_arrive_expect_tx(barrier, 16384)
        tma_load_2d(base, a, barrier, 0, 0)
        tma_load_2d(last, a, barrier, 0, 0)
    cuda.syncthreads()
    mbarrier_wait(barrier, 0)
    d = cuda.local.array(32, f32)
    wgmma_fence()
    for k in range(4):
        wgmma_ss(d, k_major(u32(base + 32 * k)), k_major(u32(last + 32 * k)), k, 64, F16, K_MAJOR)
    wgmma_commit()
    wgmma_wait(0, d, 64)
    out[t] = d[0]


def test_timeline_of_copies_and_products():
    rng = np.random.default_rng(3)
    a = rng.integers(-3, 4, BOX).astype(np.float16)
    out = np.zeros(256, np.float32)
    run = emulate(two_groups, 1, 256, TensorMap(a, BOX), out, shared_bytes=MAX_SHARED_BYTES)
    exact = a.astype(np.float32) @ a.astype(np.float32).T
    lane = np.arange(256) % 128
    assert np.array_equal(out, exact[lane // 32 * 16 + lane % 32 // 4, 2 * (lane % 4)])

    products = [e for e in run.events if e.name == "wgmma_ss"]
    assert len(products) == 2 * 4 * 4
    assert {e.end - e.start for e in products} == {32.0}  # n / 2
    spans = sorted({(e.start, e.end) for e in products})
    assert len(spans) == 8  # one set of tensor cores: groups take turns, warps of a group do not
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    loads = [e for e in run.events if e.name == "TMA load"]
    assert loads[0].end - loads[0].start == timing.TMA_LATENCY + 8192 / timing.COPY_BYTES
    assert loads[1].end - loads[0].end == 8192 / timing.COPY_BYTES
    assert spans[0][0] >= loads[1].end
    assert all("test_hopper.py:" in e.source for e in products + loads)


def test_registers_are_handed_over_when_they_are_there():
    def kernel(out):
        if cuda.threadIdx.x >= 256:
            for _ in range(100):
                out[0] += 1
            setmaxnreg_dec(24)
        else:
            setmaxnreg_inc(240)

    emulate(kernel, 1, 384, np.zeros(1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda a, b, s: tma_load_2d(s + 64, a, b, 0, 0), "which is no multiple of 128"),
        (lambda a, b, s: tma_load_2d(s + 8192, a, b, 0, 0), "a box of 8192 bytes .* out of bounds"),
        (lambda a, b, s: tma_load_2d(s, b, b, 0, 0), "needs a tensor map, got int"),
        (
            lambda a, b, s: tma_load_2d(s, a, s, 0, 0),
            r"no mbarrier at shared address \d+; there are: the mbarrier barrier \(at \d+\)$",
        ),
        (lambda a, b, s: mbarrier_init(b, 1), "initialised again"),
        (lambda a, b, s: mbarrier_init(s, 0), "an mbarrier for 0 arrivals"),
        (lambda a, b, s: mbarrier_init(s + 4, 1), "misaligned"),
        (lambda a, b, s: mbarrier_wait(b, 2), "parity 2 of an mbarrier"),
        (lambda a, b, s: setmaxnreg_dec(32), "needs a whole warpgroup"),
        (lambda a, b, s: wgmma_ss(0, 0, 0, 0, 64, F16, K_MAJOR), "needs a whole warpgroup"),
    ],
)
def test_wrong_use_is_reported(body, message):
    def kernel(a):
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        barrier = shared_address(cuda.shared.array(1, u64, alignment=8), 0)
        mbarrier_init(barrier, 1)
        fence_mbarrier_init()
        body(a, barrier, base)

    with pytest.raises(EmulationError, match=message):
        emulate(kernel, 1, 1, TensorMap(np.zeros(BOX, np.uint16), BOX), shared_bytes=8192)


CHILD = """
import sys
if {hidden}:
    sys.modules["numba"] = sys.modules["numba_cuda"] = None
sys.path[:0] = [{root!r}, {root!r} + "/tests/cuda_kernels"]
from cuda_kernels.ptx.language import COMPILES
assert not COMPILES
import test_gemm_wgmma as t
t.test_in_the_emulator((5, 200, 80), 0, 0)
"""


@pytest.mark.parametrize("hidden", [True, False], ids=["no numba-cuda", "simulator"])
def test_without_a_compiler(hidden):
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(hidden=hidden, root=str(ROOT))],
        env=os.environ if hidden else {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
