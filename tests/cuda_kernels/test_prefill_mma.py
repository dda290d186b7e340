"""The tensor-core kernel: emulated on any machine, and on a GPU, against the shared contract."""

import contract
import numpy as np
import pytest
from cases import MMA_CASES, Case
from run_cases import run

from cuda_kernels import detect, skip_softmax_attention


def name(case):
    return case.name


@pytest.mark.parametrize("case", MMA_CASES, ids=name)
def test_emulated(case):
    results = run(case, case.threshold, emulate=True, gap=True)
    skipped = contract.check(case, case.tensors(), *results)
    assert (skipped > 0) == ("skips" in case.name or case.name == "wide heads")


def test_emulated_gaps_do_not_depend_on_the_threshold_nor_results_on_the_gap_build():
    case = MMA_CASES[0]
    strict, loose = (run(case, lam, emulate=True, gap=True) for lam in (0.01, 1.0))
    assert strict[2].tobytes() == loose[2].tobytes()
    assert strict[1].tobytes() != loose[1].tobytes()
    plain = run(case, 1.0, emulate=True)
    assert plain[2] is None
    for one, other in zip(loose[:2] + loose[3:], plain[:2] + plain[3:], strict=True):
        assert one.tobytes() == other.tobytes()


def test_emulated_dense_build_is_the_skip_build_at_zero():
    case = Case("zero", lq=64, lk=300, tile=(64, 128), d=64, dv=64)
    dense = run(case, 0.0, emulate=True)
    barely = run(case, 1e-30, emulate=True)  # the skip build, which finds nothing to skip
    for one, other in zip(dense, barely, strict=True):
        assert one is other is None or one.tobytes() == other.tobytes()


def test_emulated_padding_may_hold_anything():
    """Rows beyond a strided view's end are never read."""
    case = Case("padded", lq=70, lk=140, tile=(64, 128), d=64, dv=64, threshold=0.3)
    tensors = case.tensors()
    wide = []
    for x in tensors:
        bigger = np.full((1, x.shape[1] + 128, 1, 64), np.nan, np.float16)
        bigger[:, : x.shape[1]] = x
        wide.append(bigger[:, : x.shape[1]])
    settings = {"threshold": 0.3, "emulate": True}
    out, clean = (skip_softmax_attention(*x, **settings) for x in (wide, tensors))
    assert np.isfinite(out).all()
    assert out.tobytes() == clean.tobytes()


needs_gpu = pytest.mark.gpu


@pytest.fixture
def cupy():
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "the CUDA simulator is no GPU")
    return pytest.importorskip("cupy")


@needs_gpu
@pytest.mark.parametrize("case", MMA_CASES, ids=name)
def test_on_the_gpu(case, cupy):
    settings = {"move": cupy.asarray, "back": cupy.asnumpy, "backend": "mma", "gap": True}
    results = run(case, case.threshold, **settings)
    contract.check(case, case.tensors(), *results)
    for one, other in zip(results, run(case, case.threshold, **settings), strict=True):
        assert one.tobytes() == other.tobytes()


@needs_gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_shapes_on_the_gpu(seed, cupy):
    case = random_case(seed)
    settings = {"move": cupy.asarray, "back": cupy.asnumpy, "backend": "mma", "gap": True}
    contract.check(case, case.tensors(), *run(case, case.threshold, **settings))


def random_case(seed):
    """Any shape, mask, order, threshold and scale that the kernel takes."""
    rng = np.random.default_rng(seed)
    hkv, group, d = (
        int(rng.integers(1, 3)),
        int(rng.choice([1, 2, 4, 8])),
        int(rng.choice([64, 128])),
    )
    lq, lk = (int(rng.choice([1, 63, 64, 65, 200, 513, 1000])) for _ in range(2))
    return Case(
        f"random {seed}",
        batch=int(rng.integers(1, 3)),
        lq=lq,
        lk=lq if rng.random() < 0.4 else lk,
        hq=hkv * group,
        hkv=hkv,
        d=d,
        dv=d,
        tile=(64, 128),
        causal=bool(rng.random() < 0.75),
        order=str(rng.choice(["ends_first", "ascending", "descending"])),
        threshold=float(rng.choice([0, 0.01, 0.1, 1.0])),
        scale=float(rng.choice([0.1, 1, 3])),
    )


@needs_gpu
@pytest.mark.parametrize("seed", range(10))
def test_bfloat16_on_the_gpu(seed, cupy):
    torch = pytest.importorskip("torch")
    case = random_case(seed)
    values = case.bfloat16_tensors()
    q, k, v = (torch.from_numpy(x).cuda().to(torch.bfloat16) for x in values)
    out, report = skip_softmax_attention(
        q, k, v, causal=case.causal, threshold=case.threshold, order=case.order, gap=True,
        return_report=True, backend="mma",
    )  # fmt: skip
    fields = (report.state, report.gap, report.lse, report.dropped_mass_bound)
    rough = Case(**{**vars(case), "dtype": "bfloat16"})
    contract.check(rough, values, out.float().cpu().numpy(), *(x.cpu().numpy() for x in fields))


@needs_gpu
def test_strides_streams_and_thresholds_per_head_on_the_gpu(cupy):
    case = Case("strides", lq=200, lk=333, hq=4, hkv=2, tile=(64, 128), d=64, dv=64)
    q, k, v = (cupy.asarray(x) for x in case.tensors())
    cache = cupy.ascontiguousarray(cupy.moveaxis(k, 1, 2))  # as model caches lie
    thresholds = [[0.0, 0.1, 1.0, 0.1]]
    with cupy.cuda.Stream(non_blocking=True):
        out, report = skip_softmax_attention(
            q, cupy.moveaxis(cache, 1, 2), v, threshold=thresholds, return_report=True
        )
        same = skip_softmax_attention(q, k, v, threshold=thresholds)
        assert report.backend == "mma"
        assert (out == same).all()
        assert report.sparsity[0, 0] == 0
        assert report.sparsity[0, 2] >= report.sparsity[0, 1]
