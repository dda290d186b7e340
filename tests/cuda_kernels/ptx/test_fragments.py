"""Fragments: what they compute, and that a vectorised body does exactly what its loop does."""

import math

import numpy as np
import pytest

pytest.importorskip("greenlet")

from cuda_kernels import fragments
from cuda_kernels.emulator import emulate
from cuda_kernels.fragments import (
    chunk_at,
    exp2_pack,
    exp2_rows,
    fill,
    finite,
    pack_rows,
    pick,
    quad_max,
    quad_scatter_sum,
    quad_sum,
    row_max,
    scale_rows,
)
from cuda_kernels.ptx import fragment as registry
from cuda_kernels.ptx.halves import BF16, F16
from cuda_kernels.ptx.language import cuda, f32, u32

N = 6


def make_kernel(dtype):
    pairs = N // 2

    @cuda.jit
    def every_fragment(x, rows, values, packed):
        t = cuda.threadIdx.x
        tile = cuda.local.array((N, 4), f32)
        bits = cuda.local.array((pairs, 4), u32)
        fill(tile, N, 3.0)
        values[0, t] = tile[N - 1, 3]
        for j in range(N):
            for i in range(4):
                tile[j, i] = x[t, j, i]
        upper, lower = row_max(tile, N)
        rows[t, 0], rows[t, 1] = upper, lower
        upper, lower = quad_max(upper), quad_max(lower)
        rows[t, 2], rows[t, 3] = upper, lower
        scale = f32(1.25)
        a, b = exp2_rows(tile, N, scale, f32(upper * scale), f32(lower * scale))
        rows[t, 4], rows[t, 5] = a, b
        rows[t, 6], rows[t, 7] = quad_sum(a), quad_sum(b)
        scale_rows(tile, N, f32(0.5), f32(3.0))
        for j in range(N):
            for i in range(4):
                values[1 + 4 * j + i, t] = tile[j, i]
        pack_rows(bits, tile, N, dtype)
        for j in range(pairs):
            for i in range(4):
                packed[t, j, i] = bits[j, i]

    return every_fragment


def make_second_kernel(dtype):
    @cuda.jit
    def the_other_fragments(x, sums, packed, threes, chunks):
        t = u32(cuda.threadIdx.x)
        tile = cuda.local.array((2, 4, 4), f32)
        bits = cuda.local.array((2, 4), u32)
        m = cuda.local.array(4, f32)
        l = cuda.local.array(4, f32)
        for j in range(4):
            for i in range(4):
                tile[0, j, i] = x[t, j, i]
                tile[1, j, i] = f32(x[t, j, i] - f32(1.0))
        for r in range(4):
            m[r], l[r] = f32(r), f32(1.0)
        exp2_pack(bits, tile, l, m, f32(1.25), 1, dtype)
        for r in range(4):
            sums[t, r] = l[r]
            for i in range(2):
                packed[t, i, r] = bits[i, r]
        threes[t, 0] = pick(m, u32(t & u32(3)))
        threes[t, 1] = quad_scatter_sum(l, u32(t & u32(3)))
        threes[t, 2] = finite(f32(-math.inf) if t == 0 else f32(t))
        for n in range(0, 16, 2):
            chunks[t, n // 2] = chunk_at(u32(u32(1024) + t * u32(272 - 16 * 16)), n)

    return the_other_fragments


def run_second(dtype):
    x = np.random.default_rng(1).standard_normal((32, 4, 4)).astype(np.float32)
    sums, threes = np.full((32, 4), np.nan, np.float32), np.full((32, 3), np.nan, np.float32)
    packed, chunks = np.zeros((32, 2, 4), np.uint32), np.zeros((32, 8), np.uint32)
    emulate(make_second_kernel(dtype), 1, 32, x, sums, packed, threes, chunks)
    return x, sums, packed, threes, chunks


def run(dtype):
    x = np.random.default_rng(0).standard_normal((32, N, 4)).astype(np.float32)
    x[3, :, :2] = -np.inf
    x[4, 1, 0] = -np.inf
    rows = np.full((32, 8), np.nan, np.float32)
    values = np.full((1 + 4 * N, 32), np.nan, np.float32)
    packed = np.zeros((32, N // 2, 4), np.uint32)
    emulate(make_kernel(dtype), 1, 32, x, rows, values, packed)
    return x, rows, values, packed


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_vectorised_bodies_equal_their_loops(dtype, monkeypatch):
    vectorised = (*run(dtype), *run_second(dtype))
    assert len(registry.CPU_BODIES) >= 6
    monkeypatch.setattr("cuda_kernels.emulator.source.CPU_BODIES", {})
    for one, other in zip(vectorised, (*run(dtype), *run_second(dtype)), strict=True):
        assert one.tobytes() == other.tobytes()


def test_against_numpy():
    x, rows, values, packed = run(F16)
    two = x.reshape(32, N, 2, 2).swapaxes(1, 2).reshape(32, 2, 2 * N)  # [thread, row, column]
    assert (values[0] == 3).all()
    assert np.array_equal(rows[:, :2], two.max(axis=2))
    quad = two.max(axis=2).reshape(8, 4, 2).max(axis=1).repeat(4, axis=0)
    assert np.array_equal(rows[:, 2:4], quad)
    p = np.exp2(1.25 * (two.astype(np.float64) - quad[..., None]))
    assert np.allclose(rows[:, 4:6], p.sum(axis=2), rtol=1e-5)
    assert np.allclose(rows[:, 6:], p.sum(axis=2).reshape(8, 4, 2).sum(axis=1).repeat(4, axis=0))
    p *= [[0.5], [3.0]]
    expected = p.reshape(32, 2, N, 2).swapaxes(1, 2).reshape(32, 4 * N)
    assert np.allclose(values[1:].T, expected, rtol=1e-5)
    half = np.ascontiguousarray(values[1:].T, np.float16)  # [t, block, row, column]
    assert np.array_equal(packed, half.view(np.uint32).reshape(32, N // 2, 4))


def test_the_other_fragments_against_numpy():
    x, sums, packed, threes, chunks = run_second(F16)
    scores = np.stack([x[:, 2:4], x[:, 2:4] - 1], axis=1)  # [t, block of 16 rows, z, 4]
    rows = scores.reshape(32, 2, 2, 2, 2).swapaxes(2, 3).reshape(32, 4, 4)  # [t, row, z and column]
    p = np.exp2(1.25 * rows.astype(np.float64) - np.arange(4)[:, None])
    assert np.allclose(sums, 1 + p.sum(axis=2), rtol=1e-6)
    half = p.reshape(32, 2, 2, 2, 2).swapaxes(2, 3).astype(np.float32).astype(np.float16)
    got = packed.reshape(32, 8).view(np.float16).reshape(32, 2, 2, 2, 2)
    assert np.abs(got.astype(float) - half.astype(float)).max() <= 2.0**-9 * half.max()
    assert np.array_equal(threes[:, 0], np.arange(32) % 4)
    quads = sums.reshape(8, 4, 4).sum(axis=1).ravel()
    assert np.allclose(threes[:, 1], quads, rtol=1e-6)
    assert np.array_equal(threes[:, 2], np.arange(32))
    start = 1024 + 16 * np.arange(32)[:, None]
    n = np.arange(0, 16, 2)
    assert np.array_equal(chunks, (start ^ (n & 6) * 16) + (n >> 3) * 128)


def test_every_fragment_is_run():
    made = {name for name, value in vars(fragments).items() if hasattr(value, "py_func")}
    made -= set(dir(registry)) | {"ex2", "pack", "fmax", "u32"}
    run_here = set()
    for make in (make_kernel, make_second_kernel):
        run_here |= set(make(F16).py_func.__code__.co_names)
    assert made <= run_here
