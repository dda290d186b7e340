"""The small attention kernel against float64: emulated, and on a GPU if there is one."""

import warnings

import numpy as np
import pytest
from small_attention import make_kernel

from cuda_kernels import detect
from cuda_kernels.ptx.halves import BF16, F16, narrow, widen

SIZES = [  # head_dim, keys of a tile, warps, key tiles, dtype
    (64, 64, 4, 2, F16),
    (64, 128, 4, 1, F16),
    (128, 64, 4, 2, BF16),
    (64, 64, 8, 3, BF16),
]


def inputs(head_dim, keys, warps, tiles, dtype, blocks=1):
    rng = np.random.default_rng(head_dim + tiles)
    lengths = (16 * warps * blocks, keys * tiles, keys * tiles)
    q, k, v = (narrow(rng.standard_normal((n, head_dim)), dtype) for n in lengths)
    return q, k, v, narrow(np.full(q.shape, np.nan), dtype), log2_scale(head_dim)


def log2_scale(head_dim):
    return np.float32(head_dim**-0.5 / np.log(2))


def check(q, k, v, out, scale, dtype):
    q, k, v, out = (widen(x, dtype).astype(np.float64) for x in (q, k, v, out))
    s = q @ k.T * (float(scale) * np.log(2))
    p = np.exp(s - s.max(axis=1, keepdims=True))
    rough = 2.0**-11 if dtype == F16 else 2.0**-8
    expected = p @ v / p.sum(axis=1, keepdims=True)
    assert np.abs(out - expected).max() <= 2 * rough * np.abs(v).max() * 0.5
    return np.abs(out - expected).max()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_emulated(size):
    pytest.importorskip("greenlet")
    from cuda_kernels.emulator import emulate

    kernel, threads, shared = make_kernel(*size[:3], size[4])
    arrays = inputs(*size)
    emulate(kernel, 1, threads, *arrays, shared_bytes=shared)
    check(*arrays, size[4])


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_the_gpu(size):
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "kernels are simulated")
    cupy = pytest.importorskip("cupy")
    from numba.core.errors import NumbaPerformanceWarning

    kernel, threads, shared = make_kernel(*size[:3], size[4])
    if shared > 48 * 1024:
        pytest.skip(f"needs {shared} bytes of shared memory, more than a plain launch may have")
    *arrays, scale = inputs(*size, blocks=3)
    moved = [cupy.asarray(x) for x in arrays]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        kernel[3, threads, 0, shared](*moved, scale)
    arrays[3] = cupy.asnumpy(moved[3])
    check(*arrays, scale, size[4])
    again = cupy.zeros_like(moved[3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        kernel[3, threads, 0, shared](*moved[:3], again, scale)
    assert cupy.asnumpy(again).tobytes() == arrays[3].tobytes()
