"""What the emulator runs, how it keeps time, and what it refuses."""

import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("greenlet")

from cuda_kernels.emulator import EmulationError, emulate, to_chrome, to_plain, write_chrome
from cuda_kernels.ptx.language import (
    F16,
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    cuda,
    f32,
    fragment,
    global_address,
    i32,
    ld_shared_32,
    mark_tile,
    mma_m16n8k16,
    shared_address,
    st_shared_32,
    st_shared_relaxed_32,
    u8,
    u32,
)

ROOT = Path(__file__).resolve().parents[3]


# --- kernels of every kind


def test_plain_function_with_a_tail_and_divergent_branches():
    def collatz(x, steps):
        i = cuda.grid(1)
        if i >= x.shape[0]:
            return
        n = x[i]
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            steps[i] += 1

    steps = np.zeros(27, np.int32)
    emulate(collatz, 2, 16, np.arange(1, 28), steps)
    assert steps[26] == 111
    assert steps[0] == 0


def test_closures_helpers_and_recursion_are_replaced_too():
    def offset():
        return cuda.threadIdx.x

    def factorial(n):
        return 1 if n < 2 else n * factorial(n - 1)

    def make(k):
        def kernel(out):
            out[offset()] = factorial(offset()) + k

        return kernel

    out = np.zeros(5, np.int64)
    emulate(make(100), 1, 5, out)
    assert out.tolist() == [101, 101, 102, 106, 124]


def test_grids_blocks_and_lanes():
    def where(out):
        t = cuda.threadIdx
        x, y = cuda.grid(2)
        out[cuda.blockIdx.z, y, x] = t.x + 10 * t.y + 100 * cuda.blockIdx.x + 1000 * cuda.laneid
        assert cuda.blockDim.x == 4
        assert cuda.gridsize(1) == cuda.gridDim.x * 4

    out = np.zeros((2, 6, 8), np.int64)
    emulate(where, (2, 3, 2), (4, 2), out)
    assert out[1, 5, 7] == 3 + 10 + 100 + 7000
    assert out[0, 2, 1] == 1 + 1000


def test_numba_s_own_exchange_between_lanes():
    everyone = 0xFFFFFFFF

    def kernel(x, out):
        t = cuda.threadIdx.x
        out[0, t] = cuda.shfl_xor_sync(everyone, x[t], 3)
        out[1, t] = cuda.shfl_down_sync(everyone, x[t], 4)
        out[2, t] = cuda.shfl_up_sync(everyone, x[t], 4)
        out[3, t] = cuda.shfl_sync(everyone, x[t], 5)
        out[4, t] = cuda.ballot_sync(everyone, x[t] > 10)
        out[5, t] = cuda.any_sync(everyone, x[t] == 31)
        out[6, t] = cuda.all_sync(everyone, x[t] == 31)
        if t < 8:
            out[7, t] = cuda.shfl_xor_sync(0xFF, x[t], 1)
        cuda.syncwarp()
        out[8, t] = cuda.syncthreads_count(t > 2) + cuda.selp(t > 3, 100, 200) + cuda.popc(7)

    x, out = np.arange(32), np.zeros((9, 32), np.int64)
    emulate(kernel, 1, 32, x, out)
    assert np.array_equal(out[0], x ^ 3)
    assert np.array_equal(out[1], np.where(x < 28, x + 4, x))
    assert np.array_equal(out[2], np.where(x >= 4, x - 4, x))
    assert (out[3] == 5).all()
    assert (out[4] == sum(1 << i for i in range(11, 32))).all()
    assert (out[5] == 1).all()
    assert (out[6] == 0).all()
    assert np.array_equal(out[7, :8], x[:8] ^ 1)
    assert np.array_equal(out[8], 29 + 3 + np.where(x > 3, 100, 200))


def test_atomics_need_no_barrier_between_them():
    def histogram(x, out):
        counts = cuda.shared.array(4, "int32")
        t = cuda.threadIdx.x
        if t < 4:
            counts[t] = 0
        cuda.syncthreads()
        cuda.atomic.add(counts, x[t] % 4, 1)
        cuda.syncthreads()
        if t < 4:
            out[t] = counts[t]
        cuda.atomic.max(out, 4, x[t])

    x, out = np.arange(96), np.zeros(5, np.int32)
    emulate(histogram, 1, 96, x, out)
    assert out.tolist() == [24, 24, 24, 24, 95]

    def forgotten(x, out):
        counts = cuda.shared.array(1, "int32")
        if cuda.threadIdx.x == 0:
            counts[0] = 0
        cuda.atomic.add(counts, 0, 1)

    with pytest.raises(EmulationError, match=r"written .* with no barrier between"):
        emulate(forgotten, 1, 96, x, out, schedule="late")


def test_relaxed_stores_need_no_order_among_them_but_one_with_reads():
    def raise_flags(right, out):
        flag = cuda.shared.array(1, "uint32")
        t, address = cuda.threadIdx.x, shared_address(flag, 0)
        if t == 0:
            st_shared_32(address, u32(0))
        cuda.syncthreads()
        if t % 3 == 1:
            st_shared_relaxed_32(address, u32(1))
        cuda.syncthreads()
        out[0, t] = ld_shared_32(address)
        if right[0]:
            cuda.syncthreads()
        if t == 95:  # all others have read it
            st_shared_relaxed_32(address, u32(2))
        cuda.syncthreads()
        out[1, t] = ld_shared_32(address)

    out = np.zeros((2, 96), np.uint32)
    emulate(raise_flags, 1, 96, np.array([1]), out)
    assert (out == [[1], [2]]).all()
    with pytest.raises(EmulationError, match=r"which thread \d+ has read .* with no barrier"):
        emulate(raise_flags, 1, 96, np.array([0]), out)


def test_integers_wrap_where_they_are_cast_or_stored():
    def kernel(out, small):
        tile = cuda.local.array(2, u32)
        tile[0] = -1
        tile[1] = tile[0] + 2
        out[0], out[1] = tile[0], tile[1]
        out[2] = u32(1 << 32)
        out[3] = i32(0x80000000)
        small[0] = 300
        small[1] = -3.7

    out, small = np.zeros(4, np.int64), np.zeros(2, np.uint8)
    emulate(kernel, 1, 1, out, small)
    assert out.tolist() == [2**32 - 1, 1, 0, -(2**31)]
    assert small.tolist() == [44, 253]


def test_math_is_single_precision_and_never_raises():
    def kernel(x, out):
        out[0] = math.exp(x[0])
        out[1] = math.log(f32(0.0))
        out[2] = x[0] / f32(0.0)
        assert isinstance(math.exp(x[0]), np.float32)

    out = np.zeros(3, np.float32)
    emulate(kernel, 1, 1, np.float32([100]), out)
    assert out.tolist() == [math.inf, -math.inf, math.inf]


def test_strided_arguments_and_views_keep_their_strides():
    def double(x):
        row = x[cuda.threadIdx.x]
        for i in range(row.shape[0]):
            row[i] = 2 * row[i]
        assert x.strides[0] == 4

    base = np.arange(12, dtype=np.float32).reshape(4, 3)
    emulate(double, 1, 3, base.T)
    assert np.array_equal(base, 2 * np.arange(12).reshape(4, 3))


def test_registers_begin_as_poison():
    def kernel(out, bits):
        tile, words = cuda.local.array(2, f32), cuda.local.array(1, u32)
        out[0] = tile[1]
        bits[0] = words[0]

    out, bits = np.zeros(1, np.float32), np.zeros(1, np.uint32)
    emulate(kernel, 1, 1, out, bits)
    assert np.isnan(out[0])
    assert bits[0] == 0xABABABAB


def test_dynamic_shared_memory_is_aligned_as_declared_and_no_better():
    def kernel(out):
        memory = cuda.shared.array(0, u8, alignment=128)
        out[0] = shared_address(memory, 0)
        out[1] = len(memory)

    out = np.zeros(2, np.int64)
    emulate(kernel, 1, 1, out, shared_bytes=100)
    assert out[0] % 128 == 0
    assert out[0] % 256
    assert out[1] == 100


def test_kernels_of_numba_run_unmodified():
    pytest.importorskip("numba", reason="Numba has no wheel here")
    import contract
    from cases import CASES

    from cuda_kernels.prefill_simt import make_kernel
    from sim.geometry import ORDERS, Grid

    case = next(case for case in CASES if case.name == "wide values")
    q, k, v = case.tensors()
    grid = Grid(case.tile, case.lq, case.lk, case.causal)
    out = np.full((case.batch, case.lq, case.hq, case.dv), np.nan, np.float32)
    lse, bound = (np.full((case.batch, case.hq, case.lq), np.nan, np.float32) for _ in range(2))
    shape = (case.batch, case.hq, grid.groups, grid.key_tiles)
    state, gap = np.zeros(shape, np.uint8), np.full(shape, -np.inf, np.float32)
    ln_lam = np.full(shape[:2], np.log(case.threshold), np.float32)
    emulate(
        make_kernel(*case.tile, case.d, case.dv),
        (grid.groups, case.hq, case.batch),
        case.tile[0],
        *(x.astype(np.float32) for x in (q, k, v)),
        np.float32(case.d**-0.5),
        ln_lam,
        case.causal,
        ORDERS.index(case.order),
        *(out, lse, bound, state, gap),
        schedule="early",
    )
    contract.check(case, (q, k, v), out, state, gap, lse, bound)


# --- asynchronous copies


def test_copies_are_late_or_early():
    """The source changes after the copy began: what arrives tells when it was read."""

    def kernel(source, out):
        memory = cuda.shared.array(4, u32, alignment=16)
        cp_async_16(shared_address(memory, 0), global_address(source, 0))
        cp_async_commit()
        source[0] = 7
        cp_async_wait(0)
        out[0] = memory[0]

    def run(schedule):
        source, out = np.ones(4, np.uint32), np.zeros(1, np.uint32)
        emulate(kernel, 1, 1, source, out, schedule=schedule)
        return int(out[0])

    assert run("late") == 7
    assert run("early") == 1
    with pytest.raises(EmulationError, match="argument out depends on when asynchronous copies"):
        run("both")


def test_misaligned_copies_are_reported():
    def kernel(source, shift):
        memory = cuda.shared.array(8, u32, alignment=16)
        cp_async_16(shared_address(memory, shift), global_address(source, 1 - shift))

    source = np.zeros(9, np.uint32)
    source = source[-source.ctypes.data % 16 // 4 :][:8]
    with pytest.raises(EmulationError, match=r"at shared address .* misaligned"):
        emulate(kernel, 1, 1, source, 1)
    with pytest.raises(EmulationError, match=r"argument source .* misaligned"):
        emulate(kernel, 1, 1, source, 0)


# --- warp-wide instructions


@fragment
def clear(tile, n):
    for i in range(n):
        tile[i] = 0


def test_register_tiles_of_the_wrong_size_are_reported():
    def kernel(out):
        d, a, b = cuda.local.array(4, f32), cuda.local.array(4, u32), cuda.local.array(4, u32)
        clear(d, 4)
        clear(a, 4)
        clear(b, 4)
        mma_m16n8k16(d, a, b, F16)

    with pytest.raises(EmulationError, match=r"b must be .* 2 uint32, got shape \[4\]"):
        emulate(kernel, 1, 32, np.zeros(1))


def test_lanes_at_different_instructions_are_reported():
    def kernel(out):
        d, a, b = cuda.local.array((2, 4), f32), cuda.local.array(4, u32), cuda.local.array(2, u32)
        mma_m16n8k16(d[cuda.threadIdx.x % 2], a, b, F16)

    with pytest.raises(EmulationError, match=r"thread 1 .*all lanes must execute"):
        emulate(kernel, 1, 32, np.zeros(1), schedule="late")


def test_warp_wide_instructions_need_a_whole_warp():
    def kernel(out):
        d, a, b = cuda.local.array(4, f32), cuda.local.array(4, u32), cuda.local.array(2, u32)
        mma_m16n8k16(d, a, b, F16)

    with pytest.raises(EmulationError, match="whole warp"):
        emulate(kernel, 1, 16, np.zeros(1))


def test_intra_warp_exchange_needs_a_barrier_too():
    def kernel(out, right):
        memory = cuda.shared.array(32, "int32")
        t = cuda.threadIdx.x
        memory[t] = t
        if right:
            cuda.syncwarp()
        out[t] = memory[max(t - 1, 0)]

    emulate(kernel, 1, 32, np.zeros(32), 1)
    with pytest.raises(EmulationError, match="no barrier between"):
        emulate(kernel, 1, 32, np.zeros(32), 0)


# --- the timeline


def pipeline(out):
    t = cuda.threadIdx.x
    d, a, b = cuda.local.array(4, f32), cuda.local.array(4, u32), cuda.local.array(2, u32)
    clear(d, 4)
    clear(a, 4)
    clear(b, 2)
    for j in range(3):
        mark_tile(j)
        mma_m16n8k16(d, a, b, F16)
    cuda.syncthreads()
    out[t] = d[0]


def test_events():
    run = emulate(pipeline, 2, 256, np.zeros(256))
    events = run.events
    products = [e for e in events if e.name == "mma_m16n8k16"]
    assert len(products) == 2 * 8 * 3
    assert {e.tile for e in products} == {0, 1, 2}
    assert {e.warp for e in products} == set(range(8))
    assert {e.block for e in products} == {(0, 0, 0), (1, 0, 0)}
    assert all("test_emulator.py:" in e.source and "in pipeline" in e.source for e in products)
    assert max(e.end for e in events) <= run.cycles
    # Warps 0 and 4 share a tensor core: never at the same time.
    for block in {(0, 0, 0), (1, 0, 0)}:
        shared = sorted((e.start, e.end) for e in products if e.block == block and e.warp % 4 == 0)
        assert all(end <= start for (_, end), (start, _) in pairwise(shared))
    waits = [e for e in events if e.name == "barrier 0"]
    assert len(waits) == 2 * 8
    assert len({e.end for e in waits if e.block == (0, 0, 0)}) == 1


def test_runs_are_deterministic():
    one, other = (emulate(pipeline, 1, 64, np.zeros(64)) for _ in range(2))
    assert one.events == other.events
    assert one.cycles == other.cycles > 0


def test_chrome_trace(tmp_path):
    run = emulate(pipeline, 1, 64, np.zeros(64))
    write_chrome(run.events, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace == json.loads(json.dumps(to_chrome(run.events)))
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == len(run.events)
    assert {"name", "pid", "tid", "ts", "dur", "args"} <= spans[0].keys()
    assert to_plain(run.events)[0]["warp"] == run.events[0].warp


# --- what it refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 0}, "grid must be 1 to 3 positive integers, got 0"),
        ({"block": (32, 33)}, "block must have at most 1024 threads"),
        ({"block": "x"}, "block must be 1 to 3 positive integers"),
        ({"schedule": "lucky"}, "schedule must be one of late, early, both, got 'lucky'"),
        ({"shared_bytes": 10**6}, "shared_bytes must be 0 to 232448"),
        ({"args": ()}, r"pipeline takes 1 arguments \(out\), got 0"),
        ({"args": ([1],)}, "out must be a NumPy array, a number or a tensor map, got list"),
        ({"args": (np.zeros(64)[::-1],)}, "negative strides"),
        ({"kernel": 3}, "kernel must be a function"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_bad_input(change, message):
    given = {"kernel": pipeline, "grid": 1, "block": 64, "args": (np.zeros(64),)} | change
    args = given.pop("args")
    first = [given.pop(name) for name in ("kernel", "grid", "block")]
    with pytest.raises(ValueError, match=message):
        emulate(*first, *args, **given)


def test_unknown_names_are_named():
    def kernel(out):
        cuda.nanosleep(1)

    with pytest.raises(EmulationError, match=r"thread 0 .* does not know cuda.nanosleep"):
        emulate(kernel, 1, 1, np.zeros(1))


def test_python_s_own_errors_say_where():
    def kernel(out):
        tile = cuda.local.array(4, f32)
        tile[4] = 1  # here

    with pytest.raises(EmulationError, match=r"thread 0 of .*test_emulator.py:\d+ in kernel: "):
        emulate(kernel, 1, 1, np.zeros(1))


# --- where there is no compiler

CHILD = """
import sys
if {hidden}:
    sys.modules["numba"] = sys.modules["numba_cuda"] = None
sys.path[:0] = [{root!r}, {ptx!r}]
import numpy as np
import cuda_kernels
from cuda_kernels.ptx.language import COMPILES
assert not COMPILES
import test_small_attention as t
t.test_emulated(t.SIZES[1])
from small_attention import make_kernel
try:
    make_kernel(64, 128, 4, 0)[0][1, 128](1)
except RuntimeError as error:
    assert "cannot be launched" in str(error)
else:
    raise AssertionError
from cuda_kernels.launch import why_not_assemble
assert "nothing can be assembled" in why_not_assemble()
"""


@pytest.mark.parametrize("hidden", [True, False], ids=["no numba-cuda", "simulator"])
def test_without_a_compiler(hidden):
    ptx = str(ROOT / "tests" / "cuda_kernels" / "ptx")
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(hidden=hidden, root=str(ROOT), ptx=ptx)],
        env=os.environ if hidden else {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr


# --- speed


def test_four_tiles_of_a_whole_block_take_about_a_second():
    """256 threads, 4 tiles of 128 × 128 at head_dim 64; measured 0.7 s, on a busy machine more."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda_kernels" / "ptx"))
    import small_attention
    import test_small_attention

    kernel, threads, shared = small_attention.make_kernel(64, 128, 8, F16)
    arrays = test_small_attention.inputs(64, 128, 8, 4, F16)
    start = time.process_time()
    emulate(kernel, 1, threads, *arrays, shared_bytes=shared, schedule="late")
    assert time.process_time() - start < 6
    test_small_attention.check(*arrays, F16)
