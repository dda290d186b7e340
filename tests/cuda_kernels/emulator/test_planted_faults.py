"""Kernels with one fault each: the emulator names the thread, the address or barrier, the line.

Each kernel is right without its fault, which a second run with ``right=1`` shows.
"""

import inspect
import re

import numpy as np
import pytest

pytest.importorskip("greenlet")

from cuda_kernels.emulator import EmulationError, emulate
from cuda_kernels.ptx.language import (
    F16,
    bar_red_or,
    bar_sync,
    cp_async_16,
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    f32,
    fragment,
    global_address,
    ld_shared_128,
    ldmatrix_x4,
    mma_m16n8k16,
    shared_address,
    shfl_bfly_f32,
    st_global_128,
    st_shared_32,
    u8,
    u32,
)

ROWS = 256  # 16-byte rows of the source: two stages of 128 threads


def line_of(kernel, marker):
    """Return ``file:line`` of the line of a kernel that ends in ``# marker``."""
    source, first = inspect.getsourcelines(getattr(kernel, "py_func", kernel))
    lines = [i for i, line in enumerate(source) if line.rstrip().endswith(f"# {marker}")]
    assert len(lines) == 1
    return f"{__file__.rsplit('/', 1)[-1]}:{first + lines[0]} "


def copies():
    return np.arange(ROWS * 8, dtype=np.uint16).reshape(ROWS, 8), np.zeros((ROWS, 8), np.uint16)


@cuda.jit
def missing_wait(source, out, right):
    memory = cuda.shared.array((128, 8), "uint16", alignment=16)
    words = cuda.local.array(4, u32)
    t = cuda.threadIdx.x
    cp_async_16(shared_address(memory, (t, 0)), global_address(source, (t, 0)))  # copy
    cp_async_commit()
    if right:
        cp_async_wait(0)
    cuda.syncthreads()
    ld_shared_128(words, shared_address(memory, (t ^ 1, 0)))  # read
    st_global_128(global_address(out, (t, 0)), words)


@cuda.jit
def wait_for_too_few(source, out, right):
    memory = cuda.shared.array((2, 128, 8), "uint16", alignment=16)
    words = cuda.local.array(4, u32)
    t = cuda.threadIdx.x
    for stage in range(2):
        row = 128 * stage + t
        cp_async_16(shared_address(memory, (stage, t, 0)), global_address(source, (row, 0)))  # copy
        cp_async_commit()
    cp_async_wait(1)
    if right:
        cp_async_wait(0)
    ld_shared_128(words, shared_address(memory, (1, t, 0)))  # read
    st_global_128(global_address(out, (t, 0)), words)


@cuda.jit
def missing_barrier(source, out, right):
    memory = cuda.shared.array((128, 8), "uint16", alignment=16)
    words = cuda.local.array(4, u32)
    t = cuda.threadIdx.x
    cp_async_16(shared_address(memory, (t, 0)), global_address(source, (t, 0)))  # copy
    cp_async_commit()
    cp_async_wait(0)
    if right:
        cuda.syncthreads()
    ld_shared_128(words, shared_address(memory, (max(t - 1, 0), 0)))  # read
    st_global_128(global_address(out, (t, 0)), words)


@cuda.jit
def early_release(source, out, right):
    """One stage too early: the copy of the next tile begins while a warp may read this one."""
    memory = cuda.shared.array((128, 8), "uint16", alignment=16)
    words = cuda.local.array(4, u32)
    t = cuda.threadIdx.x
    for tile in range(2):
        row = 128 * tile + t
        cp_async_16(shared_address(memory, (t, 0)), global_address(source, (row, 0)))  # copy
        cp_async_commit()
        cp_async_wait(0)
        cuda.syncthreads()
        ld_shared_128(words, shared_address(memory, ((t + 32) % 128, 0)))  # read
        st_global_128(global_address(out, (row, 0)), words)
        if right:
            cuda.syncthreads()


@cuda.jit
def store_before_read_is_done(source, out, right):
    memory = cuda.shared.array((128, 8), "uint16", alignment=16)
    tile = cuda.local.array(4, u32)
    t = cuda.threadIdx.x
    cp_async_16(shared_address(memory, (t, 0)), global_address(source, (t, 0)))
    cp_async_commit()
    cp_async_wait(0)
    cuda.syncthreads()
    ldmatrix_x4(tile, shared_address(memory, ((t + 32) % 128, 0)))  # read
    if right:
        cuda.syncthreads()
    st_shared_32(shared_address(memory, (t, 0)), 7)  # store
    st_global_128(global_address(out, (t, 0)), tile)


@cuda.jit
def tail_off_by_one(source, out, right):
    t = cuda.threadIdx.x
    length = source.shape[0]
    for row in range(t, length if right else length + 1, 128):
        out[row, 0] = source[row, 0]  # tail


@cuda.jit
def copied_tail_off_by_one(source, out, right):
    memory = cuda.shared.array((128, 8), "uint16", alignment=16)
    t = cuda.threadIdx.x
    row = 129 + t
    size = 16 if row < source.shape[0] + (not right) else 0
    address = global_address(source, (row, 0))
    cp_async_16_zfill(shared_address(memory, (t, 0)), address, size)  # tail
    cp_async_commit()
    cp_async_wait(0)
    out[t, 0] = memory[t, 0]


@cuda.jit
def shared_tail_off_by_one(source, out, right):
    memory = cuda.shared.array(0, u8, alignment=16)
    t = cuda.threadIdx.x
    st_shared_32(shared_address(memory, 4 * t + (0 if right else 4)), t)  # tail


@cuda.jit
def mma_by_half_a_warp(source, out, right):
    d, a, b = cuda.local.array(4, f32), cuda.local.array(4, u32), cuda.local.array(2, u32)
    for i in range(4):
        a[i] = b[i // 2] = 0
        d[i] = f32(0.0)
    if cuda.threadIdx.x % 32 < 16 or right:
        mma_m16n8k16(d, a, b, F16)  # collective
    cuda.syncthreads()  # elsewhere
    out[cuda.threadIdx.x, 0] = d[0]


@cuda.jit
def shuffle_by_half_a_warp(source, out, right):
    x = f32(1.0)
    if cuda.threadIdx.x % 32 < 16 or right:
        x = shfl_bfly_f32(x, 1)  # collective
    cuda.syncthreads()  # elsewhere
    out[cuda.threadIdx.x, 0] = x


@cuda.jit
def barrier_by_half_a_warp(source, out, right):
    t = cuda.threadIdx.x
    if t < 48 or right:
        bar_sync(1, 128 if right else 64)  # barrier
    if (t < 96 and t >= 80) and not right:
        bar_sync(1, 64)


@cuda.jit
def thread_never_arrives(source, out, right):
    if cuda.threadIdx.x == 77 and not right:
        return
    cuda.syncthreads()  # barrier


@cuda.jit
def warps_at_different_barriers(source, out, right):
    warp = cuda.threadIdx.x // 32
    bar_red_or(1 if warp < 2 or right else 2, 128, warp)  # barrier


@fragment
def inner(memory, t):
    return memory[t + 1]  # inner


@cuda.jit
def fault_in_a_fragment(source, out, right):
    memory = cuda.shared.array(129, "int32")
    t = cuda.threadIdx.x
    memory[t] = t
    if t == 0 and right:
        memory[128] = 0
    cuda.syncthreads()
    out[t, 0] = inner(memory, t)  # outer


@cuda.jit
def order_of_threads_matters(source, out, right):
    if cuda.threadIdx.x == 0 or not right:
        out[0, 0] = cuda.threadIdx.x


FAULTS = [
    (missing_wait, "read", ["thread", "read of poison", "asynchronous copy of thread", "@copy"]),
    (wait_for_too_few, "read", ["thread 0 ", "read of poison", "@copy", "has not waited"]),
    (missing_barrier, "read", ["thread", "read of", "thread", "written", "@copy", "no barrier"]),
    (early_release, "copy", ["thread", "write to shared address", "read", "@read", "no barrier"]),
    (store_before_read_is_done, "store", ["thread", "write to", "@read", "no barrier"]),
    (tail_off_by_one, "tail", ["thread 0 ", r"index \[256, 0\]", "argument source"]),
    (copied_tail_off_by_one, "tail", ["thread 127 ", "argument source", "out of bounds"]),
    (shared_tail_off_by_one, "tail", ["thread 127 ", "shared address", "out of bounds"]),
    (mma_by_half_a_warp, "collective", ["deadlock", "threads 0–15,", "mma_m16n8k16", "@elsewhere"]),
    (shuffle_by_half_a_warp, "collective", ["deadlock", "threads 0–15,", "shfl", "@elsewhere"]),
    (barrier_by_half_a_warp, None, ["barrier 1", "a part of warp 1", "threads 48–63"]),
    (
        thread_never_arrives,
        "barrier",
        ["threads 0–76, 78–127", "barrier 0", "77 have left", "127 of 128"],
    ),
    (
        warps_at_different_barriers,
        "barrier",
        ["deadlock", "0–63", "barrier 1", "64–127", "barrier 2"],
    ),
    (fault_in_a_fragment, None, ["thread 127 ", "poison", ": 13", "@outer"]),
    (order_of_threads_matters, None, ["argument out", "order", "differ"]),
]


@pytest.mark.parametrize(
    ("kernel", "marker", "parts"), FAULTS, ids=lambda x: getattr(x, "__name__", "")
)
def test_fault_is_reported(kernel, marker, parts):
    if kernel is fault_in_a_fragment:
        parts = [*parts[:2], re.escape(line_of(inner, "inner")), parts[3]]
    source, out = copies()
    with pytest.raises(EmulationError) as caught:
        emulate(kernel, 1, 128, source, out, 0, shared_bytes=512)
    message = str(caught.value)
    if marker:
        assert line_of(kernel, marker) in message
    for part in parts:
        pattern = re.escape(line_of(kernel, part[1:])) if part[0] == "@" else part
        assert re.search(pattern, message), f"no {pattern!r} in: {message}"


@pytest.mark.parametrize("kernel", [fault[0] for fault in FAULTS], ids=lambda x: x.__name__)
@pytest.mark.parametrize("schedule", ["late", "early", "both"])
def test_the_same_kernel_without_its_fault_runs(kernel, schedule):
    source, out = copies()
    emulate(kernel, 1, 128, source, out, 1, shared_bytes=512, schedule=schedule)
