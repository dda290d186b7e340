"""Probes of Hopper's instructions: mbarriers, TMA, stmatrix, wgmma, registers that change hands.

As in :mod:`probes`; arrays that TMA reads or writes reach the kernel as tensor maps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from probes import Probe, bits, zeros

from cuda_kernels.ptx.language import (
    BF16,
    F16,
    K_MAJOR,
    MN_MAJOR,
    TensorMap,
    bar_sync,
    cuda,
    elect_one,
    f32,
    fence_mbarrier_init,
    fence_proxy_async,
    i32,
    k_major,
    ld_shared_128,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_try_wait,
    mbarrier_wait,
    mn_major,
    setmaxnreg_dec,
    setmaxnreg_inc,
    shared_address,
    st_shared_32,
    stmatrix_x4,
    swizzle,
    sync_warp,
    tma_commit,
    tma_load_2d,
    tma_load_3d,
    tma_load_4d,
    tma_load_5d,
    tma_prefetch,
    tma_store_2d,
    tma_store_4d,
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


@dataclass(frozen=True)
class HopperProbe(Probe):
    """A probe whose kernel takes tensor maps: ``boxes`` has one per argument, or None."""

    boxes: tuple = ()
    shared_bytes: int = 0
    opcodes: tuple[str, ...] = ()

    def arguments(self, arrays):
        """What the kernel takes for its arrays, on the CPU or a GPU."""
        pairs = zip(arrays, self.boxes or [None] * len(arrays), strict=True)
        return [TensorMap(array, box) if box else array for array, box in pairs]


# --- mbarriers


@cuda.jit
def mbarriers(x, out):
    """Warp 0 hands 8 messages to warp 1 through 2 slots: full and empty, 4 phases each."""
    memory = cuda.shared.array((2, 32), u32)
    barriers = cuda.shared.array(5, u64, alignment=8)
    full, empty = u32(shared_address(barriers, 0)), u32(shared_address(barriers, 2))
    t = cuda.threadIdx.x
    if t == 0:
        for slot in range(2):
            mbarrier_init(u32(full + 8 * slot), 32)
            mbarrier_init(u32(empty + 8 * slot), 32)
        mbarrier_init(u32(shared_address(barriers, 4)), 1)
        fence_mbarrier_init()
    cuda.syncthreads()
    lane = t % 32
    for j in range(8):
        slot, parity = u32(j & 1), u32((j >> 1) & 1)
        if t < 32:
            mbarrier_wait(u32(empty + 8 * slot), u32(parity ^ 1))
            memory[slot, lane] = x[j, lane]
            mbarrier_arrive(u32(full + 8 * slot))
        else:
            mbarrier_wait(u32(full + 8 * slot), parity)
            out[j, lane] = memory[slot, 31 - lane]
            if j % 4 < 2:
                mbarrier_arrive(u32(empty + 8 * slot))
            else:
                mbarrier_arrive_expect_tx(u32(empty + 8 * slot), 0)
    if t < 32:
        fresh = u32(shared_address(barriers, 4))
        out[8, lane] = mbarrier_try_wait(fresh, 0)
        out[9, lane] = mbarrier_try_wait(fresh, 1)
        out[10, lane] = mbarrier_try_wait(u32(full + 8), 1)


def mbarriers_inputs():
    return [np.random.default_rng(7).integers(0, 1 << 32, (8, 32), dtype=np.uint32)]


def mbarriers_expected(x):
    column = np.ones(32, np.uint32)
    return np.stack([*x[:, ::-1], 0 * column, column, column])


# --- TMA


def make_load(axes, box, index):
    """One thread copies two boxes, at ``index`` and at the origin; all write them out."""
    size = int(np.prod(box)) * 2
    a, b, c, d, e = (*index, 0, 0, 0, 0)[:5]

    @cuda.jit
    def load(source, out):
        memory = cuda.shared.array(0, u8, alignment=1024)
        barriers = cuda.shared.array(1, u64, alignment=8)
        base, barrier = shared_address(memory, 0), shared_address(barriers, 0)
        t = cuda.threadIdx.x
        if t < 32:
            first = elect_one()
            if first:
                tma_prefetch(source)
                mbarrier_init(barrier, 1)
                fence_mbarrier_init()
                mbarrier_arrive_expect_tx(barrier, 2 * size)
                if axes == 2:
                    tma_load_2d(base, source, barrier, a, b)
                    tma_load_2d(u32(base + size), source, barrier, 0, 0)
                elif axes == 3:
                    tma_load_3d(base, source, barrier, a, b, c)
                    tma_load_3d(u32(base + size), source, barrier, 0, 0, 0)
                elif axes == 4:
                    tma_load_4d(base, source, barrier, a, b, c, d)
                    tma_load_4d(u32(base + size), source, barrier, 0, 0, 0, 0)
                else:
                    tma_load_5d(base, source, barrier, a, b, c, d, e)
                    tma_load_5d(u32(base + size), source, barrier, 0, 0, 0, 0, 0)
        cuda.syncthreads()
        mbarrier_wait(barrier, 0)
        for i in range(t, 2 * size, 64):
            out[i] = memory[u32(swizzle(u32(base + i)) - base)]

    return load


def load_probe(array, box, index):
    axes, size = len(box), int(np.prod(box)) * 2

    def expected(source):
        boxes = []
        for start in (index, (0,) * axes):
            values = np.zeros(box, np.uint16)
            for place in np.ndindex(*box):
                at = tuple(i + j for i, j in zip(start, place, strict=True))
                if all(0 <= i < n for i, n in zip(at, source.shape, strict=True)):
                    values[place] = source[at]
            boxes.append(values.reshape(-1).view(np.uint8))
        return np.concatenate(boxes)

    return HopperProbe(
        f"tma_load_{axes}d", make_load(axes, box, index), "void(tensor_map, uint8[::1])",
        lambda: [array], lambda: np.full(2 * size, 7, np.uint8), expected,
        threads=64, boxes=(box, None), shared_bytes=2 * size, opcodes=(f"UTMALDG.{axes}D",),
    )  # fmt: skip


def numbers(*shape):
    return np.random.default_rng(8).integers(0, 1 << 16, shape).astype(np.uint16)


def make_store(axes):
    """Fill a box of 32 rows with plain stores and copy it out, past the end of the array."""

    @cuda.jit
    def store(x, out):
        memory = cuda.shared.array(0, u8, alignment=1024)
        base = shared_address(memory, 0)
        t = cuda.threadIdx.x
        for i in range(32):
            st_shared_32(swizzle(u32(base + 128 * i + 4 * t)), x[i, t])
        fence_proxy_async()
        cuda.syncthreads()
        if t == 0:
            if axes == 2:
                tma_store_2d(out, base, 5, 64)
            else:
                tma_store_4d(out, base, 1, 5, 0, 64)
            tma_commit()
            tma_wait_read(0)

    return store


def store_probe(axes):
    shape = (25, 104) if axes == 2 else (2, 25, 3, 104)
    padded = (*shape[:-1], 112)

    def expected(x):
        out = np.full(padded, 7, np.uint16)[..., :104]
        rows = x.view(np.uint16)[:20, :40]
        place = (
            (slice(5, 25), slice(64, 104)) if axes == 2 else (1, slice(5, 25), 0, slice(64, 104))
        )
        out[place] = rows
        return out

    return HopperProbe(
        f"tma_store_{axes}d", make_store(axes), "void(uint32[:,::1], tensor_map)",
        lambda: [np.random.default_rng(9).integers(0, 1 << 32, (32, 32), dtype=np.uint32)],
        lambda: np.full(padded, 7, np.uint16)[..., :104], expected,
        boxes=(None, (32, 64) if axes == 2 else (1, 32, 1, 64)), shared_bytes=4096,
        opcodes=(f"UTMASTG.{axes}D", "UTMACMDFLUSH", "FENCE.VIEW.ASYNC"),
    )  # fmt: skip


# --- stmatrix


@cuda.jit
def stmatrix(words, order, out):
    """Each warp stores four matrices; row t % 8 of matrix t // 8 goes to row ``order[t]``."""
    memory = cuda.shared.array((64, 8), "uint16", alignment=16)
    t = cuda.threadIdx.x
    first = t // 32 * 32
    tile = cuda.local.array((2, 4), u32)
    for i in range(4):
        tile[0, i] = words[t, i]
    stmatrix_x4(u32(shared_address(memory, (first + order[t % 32], 0))), tile[0])
    sync_warp()
    ld_shared_128(tile[1], shared_address(memory, (first + (t + 1) % 32, 0)))
    for i in range(4):
        out[t, i] = tile[1, i]


def stmatrix_expected(words, order):
    out = np.zeros((64, 4), np.uint32)
    for warp in range(2):
        rows = np.zeros((32, 4), np.uint32)
        for t in range(32):
            for i in range(4):
                rows[order[8 * i + t // 4], t % 4] = words[32 * warp + t, i]
        out[32 * warp : 32 * warp + 32] = np.roll(rows, -1, axis=0)
    return out


def stmatrix_inputs():
    rng = np.random.default_rng(11)
    return [rng.integers(0, 1 << 32, (64, 4), dtype=np.uint32), rng.permutation(32)]


# --- wgmma

DEPTH = 128  # of K: two boxes of 64, eight products


def make_wgmma(n, dtype, b_major, a_in_registers, accumulate):
    """D [64, n] = A [64, 128] · B, or C + A · B, by one warpgroup."""
    values, blocks = n // 2, -(-n // 64)
    a_box, b_box = 64 * 128, (n if b_major == K_MAJOR else 64) * 128
    boxes = 2 * a_box + (2 if b_major == K_MAJOR else 2 * blocks) * b_box

    @cuda.jit(launch_bounds=(128, 1))
    def product(a, b, words, c, out):
        memory = cuda.shared.array(0, u8, alignment=1024)
        barriers = cuda.shared.array(1, u64, alignment=8)
        base, barrier = shared_address(memory, 0), shared_address(barriers, 0)
        b_base = u32(base + 2 * a_box)
        t = cuda.threadIdx.x
        if t == 0:
            mbarrier_init(barrier, 1)
            fence_mbarrier_init()
            mbarrier_arrive_expect_tx(barrier, boxes)
            for half in range(2):
                tma_load_2d(u32(base + half * a_box), a, barrier, 0, 64 * half)
                if b_major == K_MAJOR:
                    tma_load_2d(u32(b_base + half * b_box), b, barrier, 0, 64 * half)
                else:
                    for block in range(blocks):
                        place = u32(b_base + (half + 2 * block) * b_box)
                        tma_load_2d(place, b, barrier, 64 * half, 64 * block)
        cuda.syncthreads()
        mbarrier_wait(barrier, 0)
        left = cuda.local.array((8, 4), u32)
        if a_in_registers:
            for k in range(8):
                for i in range(4):
                    left[k, i] = words[t, k, i]
        d = cuda.local.array(values, f32)
        for i in range(values):
            d[i] = c[t, i]
        wgmma_fence()
        for k in range(8):
            half, step = k // 4, k % 4
            if b_major == K_MAJOR:
                right = k_major(u32(b_base + half * b_box + 32 * step))
            else:
                right = mn_major(u32(b_base + 2048 * k), 2 * b_box)
            more = u32(accumulate or k > 0)
            if a_in_registers:
                wgmma_rs(d, left[k], right, more, n, dtype, b_major)
            else:
                place = k_major(u32(base + half * a_box + 32 * step))
                wgmma_ss(d, place, right, more, n, dtype, b_major)
        wgmma_commit()
        wgmma_wait(0, d, n)
        for i in range(values):
            out[t, i] = d[i]

    return product


def matrices(n, seed):
    """Matrices whose product is exact in any order of additions."""
    rng = np.random.default_rng(seed)
    shapes = ((64, DEPTH), (DEPTH, n), (64, n))
    return [rng.integers(-9, 10, shape).astype(np.float32) for shape in shapes]


def a_registers(a):
    """Registers of A [64, 128], by PTX's table: lane t of warp w, product k, register i."""
    registers = np.zeros((128, 8, 4), np.uint32)
    for thread in range(128):
        w, g, q = thread // 32, thread % 32 // 4, thread % 4
        for k in range(8):
            for i, (row, column) in enumerate(((g, 0), (g + 8, 0), (g, 8), (g + 8, 8))):
                pair = a[16 * w + row, 16 * k + column + 2 * q :][:2].astype(np.uint32)
                registers[thread, k, i] = pair[0] | pair[1] << 16
    return registers


def d_registers(d):
    """Registers of D [64, n], by PTX's table."""
    n = d.shape[1]
    registers = np.zeros((128, n // 2), np.float32)
    for thread in range(128):
        w, g, q = thread // 32, thread % 32 // 4, thread % 4
        for j in range(n // 8):
            for i in range(4):
                row, column = 16 * w + g + 8 * (i // 2), 8 * j + 2 * q + i % 2
                registers[thread, 4 * j + i] = d[row, column]
    return registers


def wgmma_probe(n, dtype, b_major, a_in_registers, accumulate):
    a, b, c = matrices(n, n)
    names = ("f16", "bf16")[dtype], ("K", "MN")[b_major]
    a_bits, b_bits = bits(a, dtype), bits(b, dtype)
    b_stored = np.ascontiguousarray(b_bits.T if b_major == K_MAJOR else b_bits)
    sum_of = (c if accumulate else 0) + a @ b
    blocks = -(-n // 64)
    return HopperProbe(
        f"wgmma_{'rs' if a_in_registers else 'ss'} n{n} {names[0]} B {names[1]}-major",
        make_wgmma(n, dtype, b_major, a_in_registers, accumulate),
        "void(tensor_map, tensor_map, uint32[:,:,::1], float32[:,::1], float32[:,::1])",
        lambda: [a_bits, b_stored, a_registers(a_bits), d_registers(c)],
        lambda: np.full((128, n // 2), np.nan, np.float32),
        lambda *_: d_registers(sum_of.astype(np.float32)),
        threads=128,
        boxes=((64, 64), (n, 64) if b_major == K_MAJOR else (64, 64), None, None, None),
        shared_bytes=2 * 64 * 128 + 2 * 128 * (n if b_major == K_MAJOR else 64 * blocks),
        opcodes=(f"HGMMA.64x{n}x16.F32" + (".BF16" if dtype == BF16 else ""),),
    )


# --- registers


@cuda.jit(launch_bounds=(384, 1))
def registers(x, out):
    """One warpgroup gives 128 registers per thread, two take 64 each."""
    memory = cuda.shared.array(384, u32)
    t = cuda.threadIdx.x
    memory[t] = x[t]
    cuda.syncthreads()
    if t < 128:
        setmaxnreg_dec(40)
        out[t] = memory[t]
    else:
        setmaxnreg_inc(232)
        bar_sync(1, 256)
        out[t] = u32(memory[t] + memory[i32(t) ^ 1])


def registers_expected(x):
    out = x.copy()
    out[128:] += x[np.arange(128, 384) ^ 1]
    return out


LOADS: list[tuple[Callable[[], np.ndarray], tuple, tuple]] = [
    (lambda: numbers(37, 104)[:, :100], (24, 64), (20, 56)),
    (lambda: numbers(9, 3, 72).transpose(1, 0, 2), (2, 8, 64), (-1, 5, -8)),
    (lambda: numbers(2, 11, 3, 64), (1, 16, 1, 64), (1, 3, 2, 0)),
    (lambda: numbers(2, 2, 5, 3, 72)[..., :65], (2, 1, 4, 2, 64), (1, 1, -2, 2, 8)),
]
HOPPER_PROBES = [
    HopperProbe(
        "mbarrier", mbarriers, "void(uint32[:,::1], uint32[:,::1])", mbarriers_inputs,
        zeros(11, 32), mbarriers_expected, threads=64,
        opcodes=("SYNCS.EXCH.64", "SYNCS.ARRIVE", "SYNCS.PHASECHK.TRANS64.TRYWAIT"),
    ),
    *(load_probe(make(), box, index) for make, box, index in LOADS),
    store_probe(2),
    store_probe(4),
    HopperProbe(
        "stmatrix", stmatrix, "void(uint32[:,::1], int64[::1], uint32[:,::1])", stmatrix_inputs,
        zeros(64, 4), stmatrix_expected, threads=64, opcodes=("STSM.16.M88.4",),
    ),
    wgmma_probe(64, F16, K_MAJOR, 0, 0),
    wgmma_probe(128, BF16, K_MAJOR, 0, 1),
    wgmma_probe(256, F16, MN_MAJOR, 0, 0),
    wgmma_probe(8, BF16, K_MAJOR, 0, 0),
    wgmma_probe(96, BF16, MN_MAJOR, 0, 1),
    wgmma_probe(192, BF16, K_MAJOR, 0, 0),
    wgmma_probe(64, BF16, MN_MAJOR, 1, 1),
    wgmma_probe(128, F16, MN_MAJOR, 1, 0),
    wgmma_probe(192, BF16, MN_MAJOR, 1, 0),
    wgmma_probe(256, BF16, K_MAJOR, 1, 1),
    HopperProbe(
        "setmaxnreg", registers, "void(uint32[::1], uint32[::1])",
        lambda: [np.arange(384, dtype=np.uint32) * 1000], zeros(384), registers_expected,
        threads=384, opcodes=("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"),
    ),
]  # fmt: skip
