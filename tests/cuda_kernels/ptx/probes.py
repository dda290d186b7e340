"""One small kernel per instruction, its inputs, and what must come out.

What is expected follows PTX's tables, written out anew here, and NumPy.  The emulator is held to
it without a GPU and the hardware itself with one, so that the models are checked against the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuda_kernels.ptx.language import (
    BF16,
    F16,
    anew,
    ballot,
    bar_arrive,
    bar_red_and,
    bar_red_or,
    bar_red_popc,
    bar_sync,
    bits_float,
    cp_async_16,
    cp_async_16_zfill,
    cp_async_16_zfill_if,
    cp_async_commit,
    cp_async_wait,
    cuda,
    ex2,
    f32,
    fence_block,
    fence_gpu,
    float_bits,
    fmax,
    global_address,
    i32,
    ld_global_128,
    ld_global_nc_128,
    ld_shared_4f,
    ld_shared_32,
    ld_shared_128,
    ldmatrix_x2,
    ldmatrix_x2_trans,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mark_tile,
    mma_m16n8k16,
    pack,
    rcp,
    shared_address,
    shfl_bfly_f32,
    shfl_bfly_u32,
    shfl_idx_u32,
    st_global_32,
    st_global_128,
    st_shared_4f,
    st_shared_32,
    st_shared_128,
    st_shared_relaxed_32,
    sync_warp,
    u8,
    u32,
    u64,
    vote_all,
    vote_any,
)

LANE = np.arange(32)


@dataclass(frozen=True)
class Probe:
    """A kernel of one block; ``expected`` makes the last argument from the others.

    ``relative`` is the error allowed where the result is not exact.
    """

    name: str
    kernel: Any
    signature: str
    inputs: Callable[[], list[np.ndarray]]
    output: Callable[[], np.ndarray]
    expected: Callable[..., np.ndarray]
    threads: int = 32
    relative: float = 0.0

    def check(self, inputs, output):
        """Assert that a run gave what it must."""
        expected = self.expected(*inputs)
        assert output.dtype == expected.dtype
        if self.relative:
            assert np.array_equal(np.isnan(output), np.isnan(expected))
            with np.errstate(invalid="ignore"):
                same = (output == expected) | np.isnan(expected)
                close = np.abs(output - expected) <= self.relative * np.abs(expected)
            assert (same | close).all()
        else:
            assert output.tobytes() == expected.tobytes()


def bits(values, dtype):
    """16-bit floats of exactly representable numbers, as uint16."""
    values = np.asarray(values)
    if dtype == F16:
        return values.astype(np.float16).view(np.uint16)
    wide = values.astype(np.float32).view(np.uint32)
    assert not (wide & 0xFFFF).any()
    return (wide >> 16).astype(np.uint16)


# --- mma


def make_mma(dtype):
    @cuda.jit
    def mma(a, b, d, out):
        t = cuda.threadIdx.x
        a_tile, b_tile = cuda.local.array(4, u32), cuda.local.array(2, u32)
        d_tile = cuda.local.array((1, 4), f32)
        for i in range(4):
            a_tile[i] = a[t, i]
            d_tile[0, i] = d[t, i]
        for i in range(2):
            b_tile[i] = b[t, i]
        mma_m16n8k16(d_tile[0], a_tile, b_tile, dtype)
        for i in range(4):
            out[t, i] = d_tile[0, i]

    return mma


def fragments_of(a, b, dtype):
    """Registers of matrices A [16, 16] and B [16, 8], by PTX's table."""
    a, b = bits(a, dtype).astype(np.uint32), bits(b, dtype).astype(np.uint32)
    a_registers, b_registers = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    for t in range(32):
        g, q = t // 4, t % 4
        for i, (row, column) in enumerate(((g, 0), (g + 8, 0), (g, 8), (g + 8, 8))):
            low, high = a[row, column + 2 * q], a[row, column + 2 * q + 1]
            a_registers[t, i] = low | high << 16
        for i in range(2):
            b_registers[t, i] = b[8 * i + 2 * q, g] | b[8 * i + 2 * q + 1, g] << 16
    return a_registers, b_registers


def accumulators_of(d):
    """Registers of a matrix D [16, 8]."""
    registers = np.zeros((32, 4), np.float32)
    for t in range(32):
        g, q = t // 4, t % 4
        registers[t] = d[g, 2 * q], d[g, 2 * q + 1], d[g + 8, 2 * q], d[g + 8, 2 * q + 1]
    return registers


def whole_numbers(seed):
    """Matrices whose product is exact in any order of additions."""
    rng = np.random.default_rng(seed)
    shapes = ((16, 16), (16, 8), (16, 8))
    return [rng.integers(-9, 10, shape).astype(np.float32) for shape in shapes]


def mma_probe(dtype, name):
    a, b, d = whole_numbers(dtype)
    return Probe(
        f"mma_m16n8k16 {name}",
        make_mma(dtype),
        "void(uint32[:,::1], uint32[:,::1], float32[:,::1], float32[:,::1])",
        lambda: [*fragments_of(a, b, dtype), accumulators_of(d)],
        lambda: np.full((32, 4), np.nan, np.float32),
        lambda *_: accumulators_of(d + a @ b),
    )


# --- ldmatrix


@cuda.jit
def ldmatrix(rows, order, out):
    """Columns 0–3: x4; 4–7: x4.trans; 8–9: x2; 10–11: x2.trans."""
    memory = cuda.shared.array((32, 8), "uint16", alignment=16)
    t = cuda.threadIdx.x
    words, two = cuda.local.array(4, u32), cuda.local.array((1, 2), u32)
    ld_global_128(words, global_address(rows, (t, 0)))
    st_shared_128(shared_address(memory, (t, 0)), words)
    sync_warp()
    address = u32(shared_address(memory, (order[t], 0)))
    ldmatrix_x4(words, address)
    for i in range(4):
        out[t, i] = words[i]
    ldmatrix_x4_trans(words, address)
    for i in range(4):
        out[t, 4 + i] = words[i]
    ldmatrix_x2(two[0], address)
    for i in range(2):
        out[t, 8 + i] = two[0, i]
    ldmatrix_x2_trans(two[0], address)
    for i in range(2):
        out[t, 10 + i] = two[0, i]


def ldmatrix_expected(rows, order):
    rows = rows.astype(np.uint32)[order].reshape(4, 8, 8)
    out = np.zeros((32, 12), np.uint32)
    for t in range(32):
        g, q = t // 4, t % 4
        plain = [m[g, 2 * q] | m[g, 2 * q + 1] << 16 for m in rows]
        transposed = [m[2 * q, g] | m[2 * q + 1, g] << 16 for m in rows]
        out[t] = *plain, *transposed, *plain[:2], *transposed[:2]
    return out


def ldmatrix_inputs():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 1 << 16, (32, 8)).astype(np.uint16), rng.permutation(32)]


# --- copies


@cuda.jit
def copies(source, out):
    """Thread t copies 16 bytes, then t bytes of 16 (t > 16: none), then, if t is odd, 16 again."""
    memory = cuda.shared.array((3, 32, 16), u8, alignment=16)
    t = cuda.threadIdx.x
    words = cuda.local.array(4, u32)
    cp_async_16(shared_address(memory, (0, t, 0)), global_address(source, (t, 0)))
    cp_async_commit()
    size = t if t <= 16 else 0
    row = t if size else 1000
    cp_async_16_zfill(shared_address(memory, (1, t, 0)), global_address(source, (row, 0)), size)
    third, odd = shared_address(memory, (2, t, 0)), u32(t & 1)
    row = t if odd else 1000
    if odd == 0:
        for i in range(4):
            words[i] = u32(0)
        st_shared_128(third, words)
    cp_async_16_zfill_if(third, global_address(source, (row, 0)), u32(16), odd)
    cp_async_commit()
    cp_async_wait(1)
    ld_shared_128(words, shared_address(memory, (0, t, 0)))
    st_global_128(global_address(out, (0, t, 0)), words)
    cp_async_wait(0)
    cuda.syncthreads()
    ld_shared_128(words, shared_address(memory, (1, 31 - t, 0)))
    st_global_128(global_address(out, (1, 31 - t, 0)), words)
    ld_shared_128(words, shared_address(memory, (2, 31 - t, 0)))
    st_global_128(global_address(out, (2, 31 - t, 0)), words)


def copies_expected(source):
    out = np.stack([source, source, source])
    out[2, ::2] = 0
    for t in range(32):
        out[1, t, t if t <= 16 else 0 :] = 0
    return out


# --- loads and stores


@cuda.jit
def loads_and_stores(source, out):
    """Rows of 16 bytes through every kind of load and store; a strided array, a 64-bit address."""
    memory = cuda.shared.array((32, 4), u32, alignment=16)
    t = cuda.threadIdx.x
    mark_tile(t)
    words = cuda.local.array((2, 2), u32)
    ld_global_128(words, u64(global_address(source, (t, 0)) + u64(0)))
    st_global_128(global_address(out, (0, t, 0)), words)
    ld_global_nc_128(words, global_address(source, (31 - t, 0)))
    for i in range(4):
        st_shared_32(u32(shared_address(memory, (t, i))), words[i // 2, i % 2])
    fence_block()
    fence_gpu()
    cuda.syncthreads()
    ld_shared_128(words, shared_address(memory, (31 - t, 0)))
    st_global_128(global_address(out, (1, t, 0)), words)
    for i in range(4):
        st_global_32(global_address(out, (2, t, i)), ld_shared_32(shared_address(memory, (t, i))))
    cuda.syncthreads()
    for i in range(4):  # each word by eight lanes, of which all have the same
        st_shared_relaxed_32(shared_address(memory, (t // 8, i)), u32(t // 8 + i))
    cuda.syncthreads()
    for i in range(4):
        word = ld_shared_32(shared_address(memory, (t % 4, i)))
        st_global_32(global_address(out, (3, t, i)), word)


def loads_expected(source):
    written = np.arange(32)[:, None] % 4 + np.arange(4)
    return np.stack([source, source, source[::-1], written]).astype(np.uint32)


def words_of(rows):
    return np.random.default_rng(2).integers(0, 1 << 32, (rows, 4), dtype=np.uint32)


def every_other_row():
    return np.repeat(words_of(32), 2, axis=0)[::2]


# --- arithmetic


@cuda.jit
def exponentials(x, out):
    i = cuda.grid(1)
    out[i] = ex2(x[i])


def ex2_inputs():
    special = [0.0, -0.0, 1.0, -1.0, 10.0, -126.0, -127.0, -149.0, 127.0, 128.0, 1e-40]
    x = np.concatenate(
        [special, [np.inf, -np.inf, np.nan], np.random.default_rng(3).uniform(-126, 127, 498)]
    )
    return [x.astype(np.float32)]


def ex2_expected(x):
    with np.errstate(over="ignore", under="ignore"):
        y = np.exp2(x.astype(np.float64)).astype(np.float32)
    return np.where(np.abs(y) < np.finfo(np.float32).tiny, np.float32(0), y)


@cuda.jit
def reciprocals(x, out):
    i = cuda.grid(1)
    out[i] = rcp(x[i])


def rcp_inputs():
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 1e38, -2.0]
    return [np.concatenate([special, np.random.default_rng(5).uniform(-9, 9, 504)]).astype("f4")]


def rcp_expected(x):
    flushed = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
    with np.errstate(divide="ignore"):
        y = (1 / flushed.astype(np.float64)).astype(np.float32)
    return np.where(np.abs(y) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), y), y)


@cuda.jit
def fours(x, out):
    """Rows of four float32 through shared memory, each to the thread beside it."""
    memory = cuda.shared.array((32, 4), u32, alignment=16)
    t = u32(cuda.threadIdx.x)
    four = cuda.local.array(4, f32)
    for i in range(4):
        four[i] = x[t, i]
    st_shared_4f(shared_address(memory, (t, 0)), four)
    cuda.syncthreads()
    ld_shared_4f(four, shared_address(memory, (anew(t) ^ u32(1), 0)))
    for i in range(4):
        out[t, i] = four[i]


def fours_expected(x):
    return x.reshape(16, 2, 4)[:, ::-1].reshape(32, 4)


def make_packing(dtype):
    @cuda.jit
    def packing(x, out):
        i = cuda.grid(1)
        out[i] = pack(x[i, 0], x[i, 1], dtype)

    return packing


def pack_inputs():
    rng = np.random.default_rng(4)
    special = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 1e6, -1e6, 3.4e38, -3.4e38, 6e-8, 2e-8]
    special += [2.98e-8, 2.99e-8, 1e-40, -1e-40, np.inf, -np.inf, np.nan, -np.nan]
    special += [1 + n * 2.0**-place for place in (8, 11) for n in (1, 3)]  # ties
    x = np.concatenate([special, rng.standard_normal(1000) * 10.0 ** rng.uniform(-9, 6, 1000)])
    return [x.astype(np.float32).reshape(-1, 2)]


def pack_expected(dtype):
    def expected(x):
        with np.errstate(over="ignore"):
            half = np.array([[_round(float(v), dtype) for v in row] for row in x], np.uint32)
        return half[:, 0] | half[:, 1] << np.uint32(16)

    return expected


def _round(x, dtype):
    """Round by hand: to a multiple of the last place, ties to even."""
    if np.isnan(x):
        return 0x7FFF
    sign = 0x8000 if np.signbit(x) else 0
    fraction, bias, top = (10, 15, 65504.0) if dtype == F16 else (7, 127, 255 / 128 * 2.0**127)
    infinity = ((1 << (15 - fraction)) - 1) << fraction
    if np.isinf(x):
        return sign | infinity
    exponent = max(int(np.floor(np.log2(abs(x)))) if x else 1 - bias, 1 - bias)
    count = int(np.round(abs(x) / 2.0 ** (exponent - fraction)))  # NumPy rounds ties to even
    if count * 2.0 ** (exponent - fraction) > top:
        return sign | infinity
    return sign | ((exponent + bias - 1 << fraction) + count)


@cuda.jit
def bit_casts(x, out):
    i = cuda.grid(1)
    word = float_bits(x[i])
    out[i, 0] = word
    out[i, 1] = float_bits(bits_float(u32(word ^ u32(0x80000000))))
    out[i, 2] = float_bits(fmax(x[i], f32(-0.5)))
    out[i, 3] = u32(-i)
    out[i, 4] = u32(i32(u32(0xFFFFFFFF)) + i)
    out[i, 5] = u32(u64(i) << u64(31))


def bit_casts_inputs():
    return [np.array([0, 1, -1, -0.25, -np.inf, np.inf, 1e-40, 3e38] * 4, np.float32)]


def bit_casts_expected(x):
    i = np.arange(32, dtype=np.int64)
    word = x.view(np.uint32)
    columns = [word, word ^ 0x80000000, np.fmax(x, np.float32(-0.5)).view(np.uint32)]
    columns += [-i & 0xFFFFFFFF, i - 1 & 0xFFFFFFFF, i << 31 & 0xFFFFFFFF]
    return np.stack(columns, 1).astype(np.uint32)


# --- warps


@cuda.jit
def exchanges(x, y, out):
    t = cuda.threadIdx.x
    out[t, 0] = float_bits(shfl_bfly_f32(x[t], 1))
    out[t, 1] = shfl_bfly_u32(y[t], u32(7))
    out[t, 2] = shfl_idx_u32(y[t], u32(t * 5))
    out[t, 3] = ballot(y[t] & u32(1))
    out[t, 4] = vote_any(x[t] > f32(100.0))
    out[t, 5] = vote_any(t == 31)
    out[t, 6] = vote_all(t < 31)
    out[t, 7] = vote_all(y[t] >= u32(0))


def exchanges_inputs():
    rng = np.random.default_rng(5)
    return [
        rng.standard_normal(32).astype(np.float32),
        rng.integers(0, 1 << 32, 32, dtype=np.uint32),
    ]


def exchanges_expected(x, y):
    mask = sum(1 << t for t in range(32) if y[t] & 1)
    constant = [np.full(32, v) for v in (mask, 0, 1, 0, 1)]
    columns = [x.view(np.uint32)[LANE ^ 1], y[LANE ^ 7], y[LANE * 5 % 32], *constant]
    return np.stack(columns, 1).astype(np.uint32)


# --- barriers


@cuda.jit
def barriers(x, out):
    """Two halves vote apart at barriers 1 and 2, the block together at 3; 4: arrive and sync."""
    memory = cuda.shared.array(128, u32)
    t = cuda.threadIdx.x
    half = 1 + t // 64
    out[t, 0] = bar_red_and(half, 64, x[t] & u32(1))
    out[t, 1] = bar_red_or(half, 64, x[t] & u32(2))
    out[t, 2] = bar_red_popc(half, 64, x[t] & u32(4))
    out[t, 3] = bar_red_popc(3, 128, x[t] & u32(8))
    memory[t] = x[t]
    if t < 64:
        bar_arrive(4, 128)
        out[t, 4] = 0
    else:
        bar_sync(4, 128)
        out[t, 4] = memory[t - 64]


def barriers_inputs():
    x = np.random.default_rng(6).integers(0, 16, 128, dtype=np.uint32)
    x[:64] |= 1
    x[64:] &= ~np.uint32(2)
    return [x]


def barriers_expected(x):
    out = np.zeros((128, 5), np.uint32)
    for half in (slice(0, 64), slice(64, 128)):
        out[half, 0] = (x[half] & 1 != 0).all()
        out[half, 1] = (x[half] & 2 != 0).any()
        out[half, 2] = (x[half] & 4 != 0).sum()
    out[:, 3] = (x & 8 != 0).sum()
    out[64:, 4] = x[:64]
    return out


def zeros(*shape):
    return lambda: np.full(shape, 0xABABABAB, np.uint32)


U2, F2 = "uint32[:,::1]", "float32[:,::1]"
PROBES = [
    mma_probe(F16, "f16"),
    mma_probe(BF16, "bf16"),
    Probe(
        "ldmatrix", ldmatrix, f"void(uint16[:,::1], int64[::1], {U2})", ldmatrix_inputs,
        zeros(32, 12), ldmatrix_expected,
    ),
    Probe(
        "cp.async", copies, "void(uint8[:,::1], uint8[:,:,::1])",
        lambda: [words_of(32).view(np.uint8).copy()], lambda: np.full((3, 32, 16), 7, np.uint8),
        copies_expected,
    ),
    Probe(
        "loads and stores", loads_and_stores, "void(uint32[:,:], uint32[:,:,::1])",
        lambda: [every_other_row()], zeros(4, 32, 4), loads_expected,
    ),
    Probe(
        "ex2", exponentials, "void(float32[::1], float32[::1])", ex2_inputs,
        lambda: np.full(512, 7, np.float32), ex2_expected, threads=512, relative=2.0**-22,
    ),
    Probe(
        "rcp", reciprocals, "void(float32[::1], float32[::1])", rcp_inputs,
        lambda: np.full(512, 7, np.float32), rcp_expected, threads=512, relative=2.0**-22,
    ),
    Probe(
        "fours", fours, "void(float32[:,::1], float32[:,::1])",
        lambda: [np.random.default_rng(6).standard_normal((32, 4)).astype(np.float32)],
        lambda: np.full((32, 4), 7, np.float32), fours_expected,
    ),
    Probe(
        "pack f16", make_packing(F16), f"void({F2}, uint32[::1])", pack_inputs, zeros(512),
        pack_expected(F16), threads=512,
    ),
    Probe(
        "pack bf16", make_packing(BF16), f"void({F2}, uint32[::1])", pack_inputs, zeros(512),
        pack_expected(BF16), threads=512,
    ),
    Probe(
        "bit casts", bit_casts, f"void(float32[::1], {U2})", bit_casts_inputs, zeros(32, 6),
        bit_casts_expected,
    ),
    Probe(
        "exchanges", exchanges, f"void(float32[::1], uint32[::1], {U2})", exchanges_inputs,
        zeros(32, 8), exchanges_expected,
    ),
    Probe(
        "barriers", barriers, f"void(uint32[::1], {U2})", barriers_inputs, zeros(128, 5),
        barriers_expected, threads=128,
    ),
]  # fmt: skip
