"""The matrix product: against float64 in the emulator and on a GPU, and its machine code."""

import doctest

import numpy as np
import pytest

from cuda_kernels import gemm
from cuda_kernels.ptx.language import BF16, F16

try:
    from cuda_kernels.emulator import EmulationError, emulate
except ImportError:  # no greenlet: only the tests on a GPU can run
    emulate = None

SHAPES = [(1, 1, 1), (16, 8, 16), (64, 64, 64), (65, 63, 17), (37, 70, 129), (5, 130, 80)]


def matrix(rng, rows, columns, dtype):
    """Make random 16-bit numbers in rows 16 bytes aligned; NaN lies between them, to be noticed."""
    padded = np.full((rows, -(-columns // 8) * 8 + 8), np.nan)
    padded[:, :columns] = rng.standard_normal((rows, columns))
    if dtype == F16:
        bits = padded.astype(np.float16).view(np.uint16)
        return bits, bits.view(np.float16)[:, :columns].astype(np.float64)
    bits = (padded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits, values[:, :columns].astype(np.float64)


def product(shape, dtype, b_is_n_by_k, launch):
    """Launch on random matrices; return C and the float64 reference, with the bound of its error.

    Products of 16-bit numbers are exact in float32; each of the K sums may lose 2⁻²³, as tensor
    cores cut off rather than round.
    """
    m, n, k = shape
    rng = np.random.default_rng(m * n * k)
    a_bits, a = matrix(rng, m, k, dtype)
    b_bits, b = matrix(rng, *((n, k) if b_is_n_by_k else (k, n)), dtype)
    c = np.full((m, n + 3), np.nan, np.float32)
    views = (a_bits[:, :k], b_bits[:, : b.shape[1]], c[:, :n])
    grid = (-(-n // gemm.TILE), -(-m // gemm.TILE))
    c = launch(gemm.make_kernel(dtype, b_is_n_by_k), grid, *views)
    b = b.T if b_is_n_by_k else b
    return c, a @ b, k * 2.0**-23 * (abs(a) @ abs(b))


def in_emulator(kernel, grid, a, b, c):
    emulate(kernel, grid, gemm.THREADS, a, b, c, shared_bytes=gemm.SHARED_BYTES)
    assert np.isnan(c.base[:, c.shape[1] :]).all(), "written beyond the columns of C"
    return c


@pytest.mark.parametrize("b_is_n_by_k", [0, 1], ids=["K,N", "N,K"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["F16", "BF16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_the_emulator(shape, dtype, b_is_n_by_k):
    c, exact, bound = product(shape, dtype, b_is_n_by_k, in_emulator)
    assert (abs(c - exact) <= bound).all()


def test_rows_that_are_not_aligned_are_reported():
    a, b = np.zeros((2, 9), np.uint16), np.zeros((9, 8), np.uint16)
    with pytest.raises(EmulationError, match="16"):
        in_emulator(gemm.make_kernel(F16, 0), (1, 1), a, b, np.zeros((2, 9), np.float32)[:, :8])


@pytest.mark.gpu
@pytest.mark.parametrize("b_is_n_by_k", [0, 1], ids=["K,N", "N,K"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["F16", "BF16"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 500, 1000)], ids=str)
def test_on_the_gpu(shape, dtype, b_is_n_by_k):
    cupy = pytest.importorskip("cupy")

    def on_gpu(kernel, grid, *views):
        whole = [cupy.asarray(view.base).view(view.dtype) for view in views]
        moved = [x[:, : view.shape[1]] for x, view in zip(whole, views, strict=True)]
        kernel[grid, gemm.THREADS, 0, gemm.SHARED_BYTES](*moved)
        assert cupy.isnan(whole[2][:, views[2].shape[1] :]).all()
        return cupy.asnumpy(moved[2])

    c, exact, bound = product(shape, dtype, b_is_n_by_k, on_gpu)
    assert (abs(c - exact) <= bound).all()


def test_examples():
    assert doctest.testmod(gemm).failed == 0
