"""Hopper kernels with one fault each: the emulator names it, and the line where it was made.

Every kernel is built with a fault's name or with none, and then it runs.
"""

import inspect
import re

import numpy as np
import pytest

pytest.importorskip("greenlet")

from cuda_kernels.emulator import EmulationError, emulate
from cuda_kernels.ptx.language import (
    F16,
    K_MAJOR,
    TensorMap,
    bar_arrive,
    bar_sync,
    cpu_body,
    cuda,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    fragment,
    i32,
    k_major,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_try_wait,
    mbarrier_wait,
    setmaxnreg_dec,
    setmaxnreg_inc,
    shared_address,
    st_shared_32,
    stmatrix_x4,
    swizzle,
    tma_commit,
    tma_load_2d,
    tma_store_2d,
    tma_wait_read,
    u8,
    u32,
    u64,
    wgmma_commit,
    wgmma_fence,
    wgmma_rs,
    wgmma_ss,
    wgmma_wait,
)

BOX = (64, 64)
TILE_BYTES = 8192
TILES = 6
SKIPS = (
    "unwaited phase", "unwaited, in time", "unwaited by who lets go", "skip that all wait for",
    "skip that one waits for",
)  # fmt: skip


@fragment
def clear(tile, n):
    for i in range(n):
        tile[i] = 0


@cpu_body(clear)
def _clear(tile, n):
    tile[:n] = 0


def ring(fault):
    """Multiply A, written with plain stores, by tiles that TMA brings: two stages, two warpgroups.

    out [128, 32] is the sum of A Bⱼᵀ; tile 1 may be skipped, as attention skips one.
    """

    def kernel(a, b, out):
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        barriers = cuda.shared.array(4, u64, alignment=8)
        full, empty = u32(shared_address(barriers, 0)), u32(shared_address(barriers, 2))
        t = u32(cuda.threadIdx.x)
        if t == 0:
            for stage in range(2):
                mbarrier_init(u32(full + 8 * stage), 1)  # init
                mbarrier_init(u32(empty + 8 * stage), 1)
            if fault != "no init fence":
                fence_mbarrier_init()
        if fault != "no barrier after init":
            cuda.syncthreads()

        if t < 128:
            if t == 0:
                for j in range(TILES):
                    stage, parity = u32(j & 1), u32((j >> 1) & 1)
                    arrived = u32(full + 8 * stage)
                    free = parity if fault == "producer's wrong phase" else u32(parity ^ 1)
                    mbarrier_wait(u32(empty + 8 * stage), free)  # empty
                    size = {"expects less": 4096, "expects more": 8200}.get(fault, TILE_BYTES)
                    mbarrier_arrive_expect_tx(arrived, size)  # expect
                    place = u32(base + TILE_BYTES * (stage + 1))
                    tma_load_2d(place, b, arrived, 64 * j, 0)  # load
                    if fault == "arrives twice":
                        mbarrier_arrive(arrived)  # again
                if fault == "in flight at exit":
                    mbarrier_wait(empty, 0)
                    mbarrier_arrive_expect_tx(full, TILE_BYTES)
                    tma_load_2d(u32(base + TILE_BYTES), b, full, 0, 0)  # last
        else:
            t -= 128
            for i in range(16):
                chunk = u32(base + u32(t * 64) + 4 * i)
                st_shared_32(swizzle(chunk), a[t, i])  # store
            if fault != "missing proxy fence":
                fence_proxy_async()
            bar_sync(1, 128)
            d = cuda.local.array(32, f32)
            clear(d, 32)
            for j in range(TILES):
                stage, parity = u32(j & 1), u32((j >> 1) & 1)
                skipped = j == 1 and fault in SKIPS
                if fault == "wrong phase":
                    parity = u32(parity ^ 1)
                waits = not skipped or fault == "skip that all wait for"
                alone = fault == "skip that one waits for" and t == 0
                others = fault == "unwaited by who lets go" and t > 0
                if waits or alone or others:
                    mbarrier_wait(u32(full + 8 * stage), parity)  # full
                if not skipped:
                    if fault != "missing wgmma_fence" or j > 0:
                        wgmma_fence()
                    for step in range(4):
                        left = k_major(u32(base + 32 * step))
                        right = k_major(u32(base + TILE_BYTES * (stage + 1) + 32 * step))
                        wgmma_ss(d, left, right, 1, 64, F16, K_MAJOR)  # product
                    if fault == "plain store to A" and j == 2 and t == 0:
                        st_shared_32(base, 0)  # overwrite
                    wgmma_commit()
                    if fault == "early release" and t == 0:
                        mbarrier_arrive(u32(empty + 8 * stage))
                    if fault != "missing wgmma wait" or j < TILES - 1:
                        wgmma_wait(0, d, 64)
                in_time = fault in ("unwaited, in time", "unwaited by who lets go")
                if in_time and t == 0 and j in (1, 2):
                    if j == 2:  # the copy of tile 1 has long ended by then
                        mbarrier_arrive(u32(empty + 8))
                        mbarrier_arrive(empty)
                elif fault != "early release" and t == 0:
                    mbarrier_arrive(u32(empty + 8 * stage))
            for i in range(32):
                out[t, i] = d[i]  # use

    return kernel


def half_ring(fault):
    """Products with A in registers, two groups under way, and who may touch what."""

    def kernel(a, b, out):
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        barrier = shared_address(cuda.shared.array(1, u64, alignment=8), 0)
        t = u32(cuda.threadIdx.x)
        if t == 0:
            mbarrier_init(barrier, 1)
            fence_mbarrier_init()
            mbarrier_arrive_expect_tx(barrier, TILE_BYTES)
            tma_load_2d(base, b, barrier, 0, 0)
        cuda.syncthreads()
        if fault != "one warp does not wait" or t >= 32:
            mbarrier_wait(barrier, 0)
        left = cuda.local.array((2, 4), u32)
        d, e = cuda.local.array(32, f32), cuda.local.array(32, f32)
        for i in range(4):
            left[0, i] = a[t, i]
            left[1, i] = a[t, i + 4]
        wgmma_fence()
        right = k_major(u32(base + (32 if fault == "warps differ" and t >= 64 else 0)))
        if fault != "three warps" or t < 96:
            wgmma_rs(d, left[0], right, 0, 64, F16, K_MAJOR)  # first
        wgmma_commit()
        wgmma_rs(e, left[1], right, 0, 64, F16, K_MAJOR)  # second
        wgmma_commit()
        wgmma_wait(1, d, 64)
        if fault == "A written":
            left[1, 0] = 7  # write
        if fault == "other accumulator":
            wgmma_wait(0, d, 64)
            d[0] = d[0] + e[0]  # other
        out[t, 0] = d[0]
        left[0, 0] = 7
        if fault != "left under way":
            wgmma_wait(0, e, 64)
            out[t, 1] = e[0]

    return kernel


def stores(fault):
    """A box written with plain stores and copied out, twice."""

    def kernel(a, b, out):
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        t = u32(cuda.threadIdx.x)
        for j in range(2):
            for i in range(16):
                st_shared_32(u32(base + 64 * t + 4 * i), u32(j))  # store
            if fault != "missing proxy fence":
                fence_proxy_async()
            cuda.syncthreads()
            if t == 0:
                tma_store_2d(b, base, 64 * j, 0)  # copy
                tma_commit()
                if fault != "overwritten" and (fault != "store at exit" or j == 0):
                    tma_wait_read(0)
            cuda.syncthreads()

    return kernel


def matrices(fault):
    """A box of which each warp writes 16 rows as matrices, copied out, twice."""

    def kernel(a, b, out):
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        t = u32(cuda.threadIdx.x)
        tile = cuda.local.array(4, u32)
        row = u32(u32(t >> u32(5)) * 16 + u32(t & u32(15)))
        place = u32(base + 128 * row + u32(u32(t >> u32(4)) & u32(1)) * 16)
        if fault == "misaligned rows":
            place = u32(place + 8)
        if fault == "two lanes write one row" and t == 37:
            place = u32(place - 128)
        for j in range(2):
            for i in range(4):
                tile[i] = u32(j)
            for pair in range(4):
                stmatrix_x4(u32(place + 32 * pair), tile)  # matrices
            if fault != "matrices with no proxy fence":
                fence_proxy_async()
            if fault != "matrices with no barrier":
                cuda.syncthreads()
            if t == 0:
                tma_store_2d(b, base, 64 * j, 0)  # out
                tma_commit()
                if fault != "matrices written too soon" or j == 1:
                    tma_wait_read(0)
            cuda.syncthreads()

    return kernel


def handover(fault):
    """One thread fills a stage of two, 128 see it, and one of them lets it go for all."""

    def kernel(a, b, out):
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        barriers = cuda.shared.array(4, u64, alignment=8)
        full, empty = u32(shared_address(barriers, 0)), u32(shared_address(barriers, 2))
        t = u32(cuda.threadIdx.x)
        if t == 0:
            for stage in range(2):
                mbarrier_init(u32(full + 8 * stage), 1)
                mbarrier_init(u32(empty + 8 * stage), 1)
            fence_mbarrier_init()
        if t < 128:
            for i in range(16):
                st_shared_32(u32(base + 64 * t + 4 * i), u32(0))
            fence_proxy_async()
        cuda.syncthreads()
        d = cuda.local.array(32, f32)
        clear(d, 32)
        for j in range(TILES):
            stage, parity = u32(j & 1), u32((j >> 1) & 1)
            if t == 128:
                mbarrier_wait(u32(empty + 8 * stage), u32(parity ^ 1))
                mbarrier_arrive_expect_tx(u32(full + 8 * stage), TILE_BYTES)
                place = u32(base + TILE_BYTES * (stage + 1))
                tma_load_2d(place, b, u32(full + 8 * stage), 64 * j, 0)  # fill
            elif t < 128:
                if fault == "barrier before the wait":
                    bar_sync(1, 128)
                if fault == "product before the wait":
                    multiply(d, base)
                if fault == "one polls for all":
                    while not mbarrier_try_wait(u32(full + 8 * stage), parity):  # poll
                        pass
                else:
                    mbarrier_wait(u32(full + 8 * stage), parity)  # see
                if not fault:
                    bar_sync(1, 128)
                if fault == "product after the wait":
                    multiply(d, base)
                wgmma_wait(0, d, 64)
                if t == 0:
                    mbarrier_arrive(u32(empty + 8 * stage))

    return kernel


def multiply(d, tile):
    wgmma_fence()
    wgmma_ss(d, k_major(tile), k_major(tile), 1, 64, F16, K_MAJOR)
    wgmma_commit()


def relay(fault):
    """One thread ends phases, another waits for each, and a warp, late, for but one of them."""
    by_arrival = fault.startswith("told by")
    two = fault == "told by one of two who arrive"
    told = fault not in ("never told", "two phases late")
    alone = fault in ("one left out", "two phases late")

    def kernel(a, b, out):
        base = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        barriers = cuda.shared.array(3, u64, alignment=8)
        full, empty, copied = (u32(shared_address(barriers, i)) for i in range(3))
        t = u32(cuda.threadIdx.x)
        if t == 0:
            mbarrier_init(full, 2 if two else 1)
            mbarrier_init(empty, 1)
            mbarrier_init(copied, 1)
            fence_mbarrier_init()
            mbarrier_arrive_expect_tx(copied, TILE_BYTES)
        cuda.syncthreads()
        if t >= 64:
            if fault == "one left out":
                mbarrier_wait(full, 0)
            if told:
                bar_sync(1, 64)
            mbarrier_wait(copied, 0)
            mbarrier_wait(full, 0 if alone else 1)  # next
            if not alone:
                bar_sync(2, 64)
            return
        for j in range(3):
            if t == 0:
                mbarrier_wait(empty, u32((j & 1) ^ 1))
                if j == 0 and fault == "told by who begins a copy":
                    mbarrier_arrive_expect_tx(full, TILE_BYTES)
                    tma_load_2d(base, b, full, 0, 0)
                else:
                    mbarrier_arrive(full)
                if j == 0:
                    tma_load_2d(u32(base + TILE_BYTES), b, copied, 0, 0)
            if t == 32:
                if two:
                    mbarrier_arrive(full)
                mbarrier_wait(full, u32(j & 1))
            if j == 0 and told and by_arrival == (t < 32):
                bar_sync(1, 64)
            if j == 1 and t >= 32 and not alone:
                bar_sync(2, 64)
            if t == 32:
                mbarrier_arrive(empty)

    return kernel


def dangling(fault):
    def kernel(a, b, out):
        if cuda.threadIdx.x < 64:
            bar_arrive(3, 128)
        elif not fault:
            bar_sync(3, 128)

    return kernel


def budgets(fault):
    def kernel(a, b, out):
        if cuda.threadIdx.x < 128:
            setmaxnreg_dec(56 if fault else 40)
        else:
            setmaxnreg_inc(232)  # take

    return kernel


def polling(fault):
    """A barrier that one thread ends; the others try until they see it."""

    def kernel(a, b, out):
        barrier = shared_address(cuda.shared.array(1, u64, alignment=8), 0)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barrier, 1)
        cuda.syncthreads()
        tries = i32(0)
        if t == 0:
            if not fault:
                mbarrier_arrive(barrier)
        else:
            while not mbarrier_try_wait(barrier, 0):  # try
                tries += 1
        out[t, 0] = 1.0

    return kernel


A_READ = "read of poison: shared address"
NOT_ORDERED = [
    "thread 128 ", "@fill", "phase 1 of the mbarrier", "before threads 1–127 have waited",
    "of parity 0", "a phase that has passed",
]  # fmt: skip
TOO_EARLY = [
    "a wait for phase 1 of the mbarrier", "may pass too early", "phase 0 has ended",
    "parity 1 passes at once", "first wait for phase 0, .* at a barrier$",
]  # fmt: skip
LEFT_OUT = [
    "a wait for phase 2 of the mbarrier", "may pass too early", "phase 1 has ended",
    "parity 0 passes at once", "first wait for phase 1, .* at a barrier",
]  # fmt: skip
FAULTS = [
    (ring, 256, "wrong phase", "product", [
        "warps 4–7", A_READ, "a copy by TMA in phase 0", "@load", "not waited", "parity 0",
    ]),
    (ring, 256, "producer's wrong phase", "empty", [
        "deadlock", r"threads 0 wait for the phase of parity 0 of the mbarrier empty \+ 8 \* 0",
        r"; the mbarrier empty \+ 8 \* 0 \(at 1048\) is in phase 0", "0 of 1 arrivals",
        r"threads 128–255 wait for the phase of parity 0 of the mbarrier full \+ 8 \* 0",
    ]),
    (ring, 256, "expects less", "load", ["thread 0 ", "wrong expect_tx", "phase 0", "4096 bytes"]),
    (ring, 256, "expects more", "full", ["deadlock", "1 of 1 arrivals and 8 bytes to come"]),
    (ring, 256, "unwaited phase", "empty", [
        "thread 128 ", "phase 0 of the mbarrier", "before threads 0 have waited", "of parity 1",
    ]),
    (ring, 256, "unwaited, in time", "full", TOO_EARLY),
    (ring, 256, "unwaited by who lets go", "load", [
        "thread 0 ", "write to shared address", "a copy by TMA in phase 0", "may still fill",
        "has not waited for that phase",
    ]),
    (ring, 256, "early release", "load", [
        "thread 0 ", "write to shared address", "a product of warps 4–7", "@product",
        "may still read", "no wgmma_wait",
    ]),
    (ring, 256, "missing wgmma wait", "use", [
        "thread 128 |thread 255 ", "read of poison", "accumulator of a wgmma", "no wgmma_wait",
    ]),
    (ring, 256, "missing wgmma_fence", "product", ["registers of d", "no wgmma_fence"]),
    (ring, 256, "missing proxy fence", "product", [
        "warps 4–7", "has written", "@store", "no fence_proxy_async",
    ]),
    (ring, 256, "plain store to A", "overwrite", [
        "shared address", "@overwrite", "may still read|no barrier between",
    ]),
    (ring, 256, "in flight at exit", "last", [
        "thread 0 ", "in flight when the block ends", "nobody has waited for phase 3",
    ]),
    (ring, 256, "no init fence", "load", ["no fence_mbarrier_init", "@init"]),
    (ring, 256, "no barrier after init", "full", ["mbarrier", "@init|no mbarrier"]),
    (ring, 256, "arrives twice", "again", [
        "one arrival too many", "1 of 1 arrivals", "a wait for the phase before was left out",
    ]),
    (ring, 256, "skip that all wait for", "load", [
        "thread 0 ", "phase 1 of the mbarrier", "before threads 129–255 have waited", "@full",
    ]),
    (half_ring, 128, "one warp does not wait", "first", [
        "warps 0–3", A_READ, "a thread of warps 0–3 has not waited",
    ]),
    (half_ring, 128, "warps differ", "first", ["warps 0–3 are at different .* operands"]),
    (half_ring, 128, "three warps", "first", ["warps 0–3 are at different products"]),
    (half_ring, 128, "A written", "write", ["a wgmma under way may still read as A"]),
    (half_ring, 128, "other accumulator", "other", ["with other registers"]),
    (half_ring, 128, "left under way", None, [
        "thread (0|127) of .* ends with 1 wgmma with no wgmma_wait",
    ]),
    (stores, 128, "missing proxy fence", "copy", ["@store", "no fence_proxy_async"]),
    (stores, 128, "overwritten", "store", [
        "a store by TMA of thread 0", "@copy", "may still read", "no tma_wait_read",
    ]),
    (stores, 128, "store at exit", "copy", [
        "thread 0 ", "ends with a store by TMA", "no tma_wait_read",
    ]),
    (matrices, 128, "matrices with no proxy fence", "out", [
        "@matrices", "no fence_proxy_async",
    ]),
    (matrices, 128, "matrices with no barrier", None, [
        "shared address", "@matrices", "no barrier between|no fence_proxy_async|may still read",
    ]),
    (matrices, 128, "matrices written too soon", "matrices", [
        "warp (0|3) ", "stmatrix_x4", "a store by TMA of thread 0", "@out", "may still read",
    ]),
    (matrices, 128, "misaligned rows", "matrices", ["stmatrix_x4", "write of 16 .*: misaligned"]),
    (matrices, 128, "two lanes write one row", "matrices", [
        "warp 1 ", "write to shared address", "thread 3[67] has written", "no barrier between",
    ]),
    (handover, 160, "one arrives for all", "see", NOT_ORDERED),
    (handover, 160, "barrier before the wait", "see", NOT_ORDERED),
    (handover, 160, "product before the wait", "see", NOT_ORDERED),
    (handover, 160, "one polls for all", "poll", NOT_ORDERED),
    (relay, 96, "never told", "next", TOO_EARLY),
    (relay, 96, "told by who begins a copy", "next", TOO_EARLY),
    (relay, 96, "told by one of two who arrive", "next", TOO_EARLY),
    (relay, 96, "one left out", "next", [*LEFT_OUT, "at a barrier$"]),
    (relay, 96, "two phases late", "next", [*LEFT_OUT, "if phase 0 is meant, it comes too late$"]),
    (dangling, 128, "dangling", None, ["barrier 3", "64 of 128", "0–63", "nobody waits"]),
    (budgets, 384, "budgets", "take", [
        "deadlock", "threads 256–383|threads 128–255", "232 registers each", "168 × 384",
        "does not add up", "6144 registers are free",
    ]),
    (polling, 64, "polling", "try", ["mbarrier_try_wait has failed 20000 times", "phase 0"]),
]  # fmt: skip


def run(make, threads, fault, schedule):
    rng = np.random.default_rng(1)
    a = rng.integers(-2, 3, (128, 32)).astype(np.float16)
    b = rng.integers(-2, 3, (64 * TILES, 64)).astype(np.float16)
    out = np.zeros((128, 32), np.float32)
    kernel = make(fault)
    emulate(
        kernel, 1, threads, a.view(np.uint32), TensorMap(b, BOX), out,
        shared_bytes=3 * TILE_BYTES, schedule=schedule,
    )  # fmt: skip
    return a, b, out


def line_of(make, marker):
    """Return ``file:line`` of the line of a kernel that ends in ``# marker``."""
    source, first = inspect.getsourcelines(make)
    lines = [i for i, line in enumerate(source) if line.rstrip().endswith(f"# {marker}")]
    assert len(lines) == 1, marker
    return f"{__file__.rsplit('/', 1)[-1]}:{first + lines[0]} "


@pytest.mark.parametrize(
    ("make", "threads", "fault", "marker", "parts"), FAULTS, ids=[row[2] for row in FAULTS]
)
@pytest.mark.parametrize("schedule", ["late", "early"])
def test_fault_is_reported(make, threads, fault, marker, parts, schedule):
    with pytest.raises(EmulationError) as caught:
        run(make, threads, fault, schedule)
    message = str(caught.value)
    if marker:
        assert line_of(make, marker) in message, message
    for part in parts:
        pattern = re.sub(r"@(\w+)", lambda found: re.escape(line_of(make, found[1])), part)
        assert re.search(pattern, message), f"no {pattern!r} in: {message}"


@pytest.mark.parametrize(
    "make",
    [ring, half_ring, stores, matrices, handover, relay, dangling, budgets, polling],
)
@pytest.mark.parametrize("schedule", ["late", "early", "both"])
def test_the_same_kernel_without_a_fault_runs(make, schedule):
    threads = next(row[1] for row in FAULTS if row[0] is make)
    a, b, out = run(make, threads, "", schedule)
    if make is ring:
        exact = (
            a.reshape(64, 64).astype(np.float64) @ b.astype(np.float64).reshape(-1, 64, 64).sum(0).T
        )
        lane = np.arange(128)
        row, column = lane // 32 * 16 + lane % 32 // 4, 2 * (lane % 4)
        assert np.array_equal(out[:, 0], exact[row, column])
        assert np.array_equal(out[:, 31], exact[row + 8, 56 + column + 1])


def test_a_skip_that_one_waits_for_is_right():
    """As attention skips: no product, but who lets the stage go has waited for it."""
    run(ring, 256, "skip that one waits for", "both")


def test_arrivals_alone_tell_that_a_phase_has_ended():
    """No copy counts for the phase, and who is told of all arrivals needs no wait for it."""
    run(relay, 96, "told by who arrives", "both")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("late", "a wait for phase 1 .* may pass too early: nothing tells this thread"),
        ("early", "phase 0 .* may end before threads 32–63 have waited for the one before it"),
    ],
)
def test_a_wait_is_tied_to_its_phase_at_both_ends(schedule, message):
    """Threads of which one lets phases end and the others wait for one, with nothing between."""

    def kernel(out):
        barrier = shared_address(cuda.shared.array(1, u64, alignment=8), 0)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barrier, 1)
        cuda.syncthreads()
        if t == 0:
            mbarrier_arrive(barrier)
            mbarrier_arrive(barrier)
        elif t >= 32:
            mbarrier_wait(barrier, 1)
        out[t] = 1.0

    with pytest.raises(EmulationError, match=message):
        emulate(kernel, 1, 64, np.zeros(64, np.float32), schedule=schedule)


def test_a_product_orders_the_waits_before_it():
    """Whoever has waited for it knows that all of its warpgroup have issued it."""
    run(handover, 160, "product after the wait", "both")


def make_barriers(at, count):
    for i in range(count):
        mbarrier_init(u32(at + 8 * i), 1)


def hold(ring, stage):
    mbarrier_wait(u32(ring + 8 * stage), 0)


def two_rings(then):
    """Two rings of two barriers, made at one place; then thread 0 does something with the second.

    Nobody arrives.
    """

    def kernel():
        first = shared_address(cuda.shared.array(4, u64, alignment=8), 0)
        second = u32(first + 16)
        make_barriers(first, 4)
        then(second)

    return kernel


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda at: hold(at, 1), r"0 wait .* of the mbarrier second \+ 8 \* 1 \(at 1056\), "),
        (lambda at: hold(*(at, 1)), r"0 wait .* of the mbarrier ring \+ 8 \* 1 \(at 1056\), "),
        (lambda at: mbarrier_init(at, 1), r": the mbarrier first \+ 8 \* 2 \(at 1048\) is init"),
    ],
    ids=["by the first wait", "as far as it is known", "by who makes it"],
)
def test_a_report_names_an_mbarrier_as_the_kernel_does(then, message):
    with pytest.raises(EmulationError, match=message):
        emulate(two_rings(then), 1, 1)


def test_where_the_source_is_not_known_an_mbarrier_has_its_address(monkeypatch):
    monkeypatch.setattr("linecache.getlines", lambda *_: ["%time\n"])
    with pytest.raises(EmulationError, match=r"of parity 0 of the mbarrier at 1056, "):
        emulate(two_rings(lambda at: hold(at, 1)), 1, 1)
