"""Hopper's matrix product: against float64 in the emulator and on a GPU, and its machine code."""

import doctest
import time

import numpy as np
import pytest
from on_gpu import launch
from test_gemm import matrix

from cuda_kernels import detect, gemm_wgmma
from cuda_kernels.launch import assemble, why_not_assemble
from cuda_kernels.ptx.language import BF16, F16, TensorMap
from cuda_kernels.resources import CONFIGURATIONS

try:
    from cuda_kernels.emulator import emulate
except ImportError:  # no greenlet: only the tests on a GPU can run
    emulate = None

SHAPES = [(1, 1, 1), (128, 128, 64), (64, 128, 256), (129, 127, 330), (5, 200, 80)]
needs_assembler = pytest.mark.skipif(bool(why_not_assemble()), reason=str(why_not_assemble()))
by_layout = pytest.mark.parametrize("b_is_n_by_k", [0, 1], ids=["K,N", "N,K"])
by_dtype = pytest.mark.parametrize("dtype", [F16, BF16], ids=["F16", "BF16"])


def product(shape, dtype, b_is_n_by_k, launcher):
    """Launch on random matrices; return C and the float64 reference, with the bound of its error.

    As in :mod:`test_gemm`; NaN lies behind the rows, so zeros must come from TMA.
    """
    m, n, k = shape
    rng = np.random.default_rng(m * n * k)
    a_bits, a = matrix(rng, m, k, dtype)
    b_bits, b = matrix(rng, *((n, k) if b_is_n_by_k else (k, n)), dtype)
    c = np.full((m, n + 3), np.nan, np.float32)
    grid = (-(-n // gemm_wgmma.TILE), -(-m // gemm_wgmma.TILE))
    kernel = gemm_wgmma.make_kernel(dtype, b_is_n_by_k)
    views = (a_bits[:, :k], b_bits[:, : b.shape[1]], c[:, :n])
    c = launcher(kernel, grid, gemm_wgmma.b_box(b_is_n_by_k), *views, np.int32(k))
    b = b.T if b_is_n_by_k else b
    return c, a @ b, k * 2.0**-23 * (abs(a) @ abs(b))


def in_emulator(kernel, grid, b_box, a, b, c, depth, schedule="both"):
    maps = TensorMap(a, gemm_wgmma.A_BOX), TensorMap(b, b_box)
    shared = gemm_wgmma.SHARED_BYTES
    emulate(
        kernel, grid, gemm_wgmma.THREADS, *maps, c, depth, shared_bytes=shared, schedule=schedule
    )
    assert np.isnan(c.base[:, c.shape[1] :]).all(), "written beyond the columns of C"
    return c


@by_layout
@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_the_emulator(shape, dtype, b_is_n_by_k):
    c, exact, bound = product(shape, dtype, b_is_n_by_k, in_emulator)
    assert (abs(c - exact) <= bound).all()


def test_a_long_product_is_emulated_in_seconds():
    """A block of 384 threads and 64 tiles; measured 0.7 s, on a busy machine more."""

    def late(*arguments):
        return in_emulator(*arguments, schedule="late")

    start = time.process_time()
    c, exact, bound = product((128, 128, 4096), BF16, 1, late)
    assert time.process_time() - start < 8
    assert (abs(c - exact) <= bound).all()


@pytest.mark.gpu
@by_layout
@by_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (300, 520, 1000), (1024, 2048, 512)], ids=str)
def test_on_the_gpu(shape, dtype, b_is_n_by_k):
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "kernels are simulated")
    cupy = pytest.importorskip("cupy")
    from numba import cuda

    if cuda.get_current_device().compute_capability[0] != 9:
        pytest.skip("no Hopper GPU")

    def on_gpu(kernel, grid, b_box, *views):
        *views, depth = views
        whole = [cupy.asarray(view.base).view(view.dtype) for view in views]
        a, b, c = (x[:, : view.shape[1]] for x, view in zip(whole, views, strict=True))
        launch(
            kernel, gemm_wgmma.SIGNATURE, grid, gemm_wgmma.THREADS, gemm_wgmma.SHARED_BYTES,
            TensorMap(a, gemm_wgmma.A_BOX), TensorMap(b, b_box), c, np.int32(depth),
        )  # fmt: skip
        assert cupy.isnan(whole[2][:, views[2].shape[1] :]).all()
        return cupy.asnumpy(c)

    c, exact, bound = product(shape, dtype, b_is_n_by_k, on_gpu)
    assert (abs(c - exact) <= bound).all()


@pytest.mark.assembler
@needs_assembler
@by_layout
def test_machine_code(b_is_n_by_k):
    kernel = gemm_wgmma.make_kernel(BF16, b_is_n_by_k)
    made = assemble(kernel, gemm_wgmma.SIGNATURE, "sm_90a")
    assert made.faults() == []
    assert made.registers == 168  # all that 384 threads can have
    assert made.count("HGMMA") >= gemm_wgmma.DEPTH // 16


def test_the_gate_has_it():
    mine = [one for one in CONFIGURATIONS if one.name.startswith("gemm_wgmma")]
    assert {one.signature for one in mine} == {gemm_wgmma.SIGNATURE}
    assert {one.shared_bytes for one in mine} == {gemm_wgmma.SHARED_BYTES}


def test_examples():
    assert doctest.testmod(gemm_wgmma).failed == 0
