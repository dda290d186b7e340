"""The tensor-core kernels: emulated on any machine, and on a GPU, against the shared contract."""

import contract
import numpy as np
import pytest
from cases import MMA_CASES, Case
from run_cases import run

import sim
from cuda_kernels import detect, skip_softmax_attention, skip_softmax_plan
from cuda_kernels.backends import HOPPER, TENSOR_CORE_BACKENDS, best_tensor_cores
from sim.workloads import WORKLOADS


def name(case):
    return case.name


@pytest.fixture(params=TENSOR_CORE_BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("case", MMA_CASES, ids=name)
def test_emulated(case, backend):
    results = run(case, case.threshold, emulate=True, gap=True, backend=backend)
    skipped = contract.check(case, case.tensors(), *results)
    assert (skipped > 0) == ("skips" in case.name or case.name == "wide heads")


def test_emulated_gaps_do_not_depend_on_the_threshold_nor_results_on_the_gap_build(backend):
    case = Case("three tiles", lq=64, lk=300, tile=(64, 128), d=64, dv=64)
    settings = {"emulate": True, "backend": backend}
    strict, loose = (run(case, lam, gap=True, **settings) for lam in (0.01, 1.0))
    assert strict[2].tobytes() == loose[2].tobytes()
    assert strict[1].tobytes() != loose[1].tobytes()
    plain = run(case, 1.0, **settings)
    assert plain[2] is None
    for one, other in zip(loose[:2] + loose[3:], plain[:2] + plain[3:], strict=True):
        assert one.tobytes() == other.tobytes()


def test_emulated_dense_build_is_the_skip_build_at_zero(backend):
    case = Case("zero", lq=64, lk=200, tile=(64, 128), d=64, dv=64)
    settings = {"emulate": True, "backend": backend}
    dense = run(case, 0.0, **settings)
    barely = run(case, 1e-30, **settings)  # the skip build, which finds nothing to skip
    for one, other in zip(dense, barely, strict=True):
        assert one is other is None or one.tobytes() == other.tobytes()


def test_emulated_padding_may_hold_anything(backend):
    """Rows beyond a strided view's end are never read."""
    case = Case("padded", lq=70, lk=140, tile=(64, 128), d=64, dv=64, threshold=0.3)
    tensors = case.tensors()
    wide = []
    for x in tensors:
        bigger = np.full((1, x.shape[1] + 128, 1, 64), np.nan, np.float16)
        bigger[:, : x.shape[1]] = x
        wide.append(bigger[:, : x.shape[1]])
    settings = {"threshold": 0.3, "emulate": True, "backend": backend}
    out, clean = (skip_softmax_attention(*x, **settings) for x in (wide, tensors))
    assert np.isfinite(out).all()
    assert out.tobytes() == clean.tobytes()


RAGGED = [  # head sizes, lengths of the arrays, of the requests, window, causal
    ((64, 64), (130, 200), ([130, 76], [200, 90]), None, True),
    ((64, 64), (70, 300), ([70], [300]), 100, True),
    ((64, 64), (66, 140), ([0, 66, 5], [140, 0, 140]), 64, True),
    ((128, 128), (65, 129), ([65, 1], [129, 128]), None, False),
    ((192, 128), (64, 140), ([64], [140]), None, True),
]


def ragged(sizes, lengths, own, heads=2, dtype=np.float16):
    """Tensors whose rows beyond a request's own are NaN, and the same with zeros there."""
    rng = np.random.default_rng([*sizes, *lengths])
    (d, dv), (lq, lk), (q_lens, kv_lens) = sizes, lengths, own
    batch = len(q_lens)
    shapes = ((batch, lq, heads, d), (batch, lk, 1, d), (batch, lk, 1, dv))
    holed = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    for x, lens in zip(holed, (q_lens, kv_lens, kv_lens), strict=True):
        for b, length in enumerate(lens):
            x[b, length:] = np.nan
    return holed, [np.nan_to_num(x) for x in holed]


def agree(out, report, expected, reference):
    """The same tiles, and outputs as near as their dtype lets them be."""
    assert np.array_equal(report.tiles.state, reference.tiles.state)
    np.testing.assert_allclose(out.astype(float), expected.astype(float), atol=4e-3)
    np.testing.assert_allclose(report.lse, reference.lse, atol=2e-3)
    np.testing.assert_allclose(report.dropped_mass_bound, reference.dropped_mass_bound, atol=2e-2)


@pytest.mark.parametrize(("sizes", "lengths", "own", "window", "causal"), RAGGED)
def test_emulated_windows_and_unequal_lengths(sizes, lengths, own, window, causal, backend):
    holed, whole = ragged(sizes, lengths, own, heads=1)  # "groups and batch" has more
    settings = {
        "threshold": 0.6, "window": window, "causal": causal, "q_lens": own[0], "kv_lens": own[1],
        "return_report": True,
    }  # fmt: skip
    got = skip_softmax_attention(*holed, **settings, emulate=True, backend=backend)
    expected = skip_softmax_attention(*whole, **settings, backend="reference")
    agree(*got, *expected)
    for b, length in enumerate(own[0]):
        assert (got[0][b, length:] == 0).all()


@pytest.mark.parametrize(
    ("rows", "levels", "threshold", "skipped"),
    [
        (5, [0, 3, -10, 5, 16, 13, 4, 30], 0.0, []),
        (5, [0, 3, -10, 5, 16, 13, 4, 30], 0.02, [2, 6]),
        (5, [0, -10] * 17, 0.02, [*range(1, 34, 2)]),  # more verdicts than a word has bits
        (70, [0, -1, 8], 0.6, [1]),  # what was left out is nothing beside what came after
    ],
)
def test_emulated_maxima_that_rise(rows, levels, threshold, skipped, backend):
    """Key tiles that score ever more, by a little and by a lot, and some that are faint."""
    rng = np.random.default_rng(5)
    q, k, v = (0.3 * rng.standard_normal((1, n, 1, 64)) for n in (rows, *[128 * len(levels)] * 2))
    q[..., 0] = 8.0
    k[0, :, 0, 0] = np.repeat(levels, 128)
    tensors = [x.astype(np.float16) for x in (q, k, v)]
    settings = {
        "threshold": threshold, "causal": False, "order": "ascending", "return_report": True,
    }  # fmt: skip
    got = skip_softmax_attention(*tensors, **settings, emulate=True, backend=backend)
    expected = skip_softmax_attention(*tensors, **settings, backend="reference")
    agree(*got, *expected)
    assert np.flatnonzero(got[1].state[0, 0, 0] == 2).tolist() == skipped


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_emulated_scores_far_below_zero(threshold, backend):
    """2 to their power is no float32, but their differences are what counts."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((1, n, 1, 64)) for n in (64, 200, 200))
    q[..., 0], k[..., 0] = 40.0, -40.0
    tensors = [x.astype(np.float16) for x in (q, k, v)]
    settings = {"threshold": threshold, "return_report": True}
    got = skip_softmax_attention(*tensors, **settings, emulate=True, backend=backend)
    agree(*got, *skip_softmax_attention(*tensors, **settings, backend="reference"))
    assert got[1].lse.max() < -150


KEPT_BY = [4, 0, None, 1, 2, None, None, 3, 0, None]  # a warp, all four, or none, tile by tile


def kept_by_one_warp():
    """Tiles that some rows find strong in half of the keys and others faint: one warp's of ``mma``.

    Warps of rows 0 … 31 are 0 and 2, of keys 0 … 63 of a tile 0 and 1.
    """
    rng = np.random.default_rng(7)
    q, k, v = (0.3 * rng.standard_normal((n, 64)) for n in (64, *[128 * len(KEPT_BY)] * 2))
    q[:, 0] = 8.0
    q[:32, 1:3] = [8.0, 0.0]
    q[32:, 1:3] = [0.0, 8.0]
    for tile, warp in enumerate(KEPT_BY):
        keys = k[128 * tile : 128 * (tile + 1)]
        keys[:, :3] = [0.0 if warp == 4 else -10.0, 0.0, 0.0]
        if warp is not None and warp < 4:
            keys[64 * (warp // 2) : 64 * (warp // 2 + 1), 1 + warp % 2] = 10.0
    return [x[None, :, None].astype(np.float16) for x in (q, k, v)]


ONE_WARP = {"threshold": 0.02, "causal": False, "order": "ascending", "return_report": True}


def test_emulated_tiles_that_one_warp_keeps(backend):
    tensors = kept_by_one_warp()
    got = skip_softmax_attention(*tensors, **ONE_WARP, emulate=True, backend=backend)
    expected = skip_softmax_attention(*tensors, **ONE_WARP, backend="reference")
    agree(*got, *expected)
    assert got[1].state[0, 0, 0].tolist() == [1 if x is not None else 2 for x in KEPT_BY]


def test_emulated_skip_of_the_last_tile_copies_no_further_one(backend):
    """Visited downwards, tile 0 is the last: what would come next lies before the array."""
    q, v = np.ones((1, 64, 1, 64), np.float16), np.ones((1, 256, 1, 64), np.float16)
    k = np.ones((1, 256, 1, 64), np.float16)
    k[:, :128] = -1
    settings = {"causal": False, "order": "descending", "threshold": 0.5}
    _, report = skip_softmax_attention(
        q, k, v, **settings, emulate=True, backend=backend, return_report=True
    )
    assert report.state[0, 0, 0].tolist() == [2, 1]


def test_reference_of_unequal_lengths_is_that_of_each_request():
    _, whole = ragged((64, 64), (130, 200), ([130, 70], [200, 90]))
    settings = {"threshold": 0.5, "backend": "reference", "tile": (8, 16)}
    both = skip_softmax_attention(*whole, q_lens=[130, 70], kv_lens=[200, 90], **settings)
    alone = [x[1:, :n] for x, n in zip(whole, (70, 90, 90), strict=True)]
    assert np.array_equal(both[1:, :70], skip_softmax_attention(*alone, **settings))
    assert (both[1, 70:] == 0).all()


def test_a_factor_is_divided_by_the_keys_of_each_request():
    _, whole = ragged((64, 64), (64, 200), ([64, 64], [200, 50]))
    _, report = skip_softmax_attention(
        *whole, threshold_scale_factor=20, kv_lens=[200, 50], backend="reference",
        return_report=True,
    )  # fmt: skip
    assert report.threshold.tolist() == [[0.1, 0.1], [0.4, 0.4]]


needs_gpu = pytest.mark.gpu


@pytest.fixture
def cupy():
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "the CUDA simulator is no GPU")
    return pytest.importorskip("cupy")


@pytest.fixture
def on_gpu(cupy, backend):
    """Back end, if this GPU runs it."""
    if backend == "wgmma" and detect().compute_capability != HOPPER:
        pytest.skip("no Hopper GPU")
    return backend


@needs_gpu
@pytest.mark.parametrize("case", MMA_CASES, ids=name)
def test_on_the_gpu(case, cupy, on_gpu):
    settings = {"move": cupy.asarray, "back": cupy.asnumpy, "backend": on_gpu, "gap": True}
    results = run(case, case.threshold, **settings)
    contract.check(case, case.tensors(), *results)
    for one, other in zip(results, run(case, case.threshold, **settings), strict=True):
        assert one.tobytes() == other.tobytes()


@needs_gpu
def test_random_shapes_on_the_gpu(shape_seed, cupy, on_gpu):
    case = random_case(shape_seed)
    settings = {"move": cupy.asarray, "back": cupy.asnumpy, "backend": on_gpu, "gap": True}
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
def test_bfloat16_on_the_gpu(seed, cupy, on_gpu):
    torch = pytest.importorskip("torch")
    case = random_case(seed)
    values = case.bfloat16_tensors()
    q, k, v = (torch.from_numpy(x).cuda().to(torch.bfloat16) for x in values)
    out, report = skip_softmax_attention(
        q, k, v, causal=case.causal, threshold=case.threshold, order=case.order, gap=True,
        return_report=True, backend=on_gpu,
    )  # fmt: skip
    fields = (report.state, report.gap, report.lse, report.dropped_mass_bound)
    rough = Case(**{**vars(case), "dtype": "bfloat16"})
    contract.check(rough, values, out.float().cpu().numpy(), *(x.cpu().numpy() for x in fields))


@needs_gpu
def test_strides_streams_and_thresholds_per_head_on_the_gpu(cupy, on_gpu):
    case = Case("strides", lq=200, lk=333, hq=4, hkv=2, tile=(64, 128), d=64, dv=64)
    q, k, v = (cupy.asarray(x) for x in case.tensors())
    cache = cupy.ascontiguousarray(cupy.moveaxis(k, 1, 2))  # as model caches lie
    thresholds = [[0.0, 0.1, 1.0, 0.1]]
    with cupy.cuda.Stream(non_blocking=True):
        out, report = skip_softmax_attention(
            q, cupy.moveaxis(cache, 1, 2), v, threshold=thresholds, return_report=True,
            backend=on_gpu,
        )  # fmt: skip
        same = skip_softmax_attention(q, k, v, threshold=thresholds, backend=on_gpu)
        assert report.backend == on_gpu
        assert (out == same).all()
        assert report.sparsity[0, 0] == 0
        assert report.sparsity[0, 2] >= report.sparsity[0, 1]


@needs_gpu
@pytest.mark.parametrize(("sizes", "lengths", "own", "window", "causal"), RAGGED)
def test_windows_and_unequal_lengths_on_the_gpu(sizes, lengths, own, window, causal, cupy, on_gpu):
    holed, whole = ragged(sizes, lengths, own)
    settings = {
        "threshold": 0.6, "window": window, "causal": causal, "q_lens": own[0], "kv_lens": own[1],
        "return_report": True,
    }  # fmt: skip
    moved = (cupy.asarray(x) for x in holed)
    out, report = skip_softmax_attention(*moved, **settings, backend=on_gpu)
    assert report.backend == on_gpu
    expected, reference = skip_softmax_attention(*whole, **settings, backend="reference")
    assert np.array_equal(report.tiles.state, reference.tiles.state)
    np.testing.assert_allclose(cupy.asnumpy(out).astype(float), expected.astype(float), atol=4e-3)


@needs_gpu
def test_tiles_that_one_warp_keeps_on_the_gpu(cupy, on_gpu):
    tensors = kept_by_one_warp()
    moved = [cupy.asarray(x) for x in tensors]
    out, report = skip_softmax_attention(*moved, **ONE_WARP, backend=on_gpu)
    expected, reference = skip_softmax_attention(*tensors, **ONE_WARP, backend="reference")
    assert np.array_equal(report.tiles.state, reference.tiles.state)
    np.testing.assert_allclose(cupy.asnumpy(out).astype(float), expected.astype(float), atol=4e-3)
    for _ in range(20):
        assert (skip_softmax_attention(*moved, **ONE_WARP, backend=on_gpu)[0] == out).all()


@needs_gpu
def test_arrays_that_tma_does_not_take_are_for_mma_on_the_gpu(cupy):
    case = Case("broadcast", lq=200, lk=333, hq=4, hkv=4, tile=(64, 128), d=64, dv=64)
    q, k, v = case.tensors()
    k = np.broadcast_to(k[:, :, :1], k.shape)
    on_gpu = [cupy.asarray(x) for x in (q, k[:, :, :1], v)]
    on_gpu[1] = cupy.broadcast_to(on_gpu[1], k.shape)
    settings = {"threshold": case.threshold, "gap": True, "return_report": True}
    out, report = skip_softmax_attention(*on_gpu, **settings)
    assert report.backend == "mma"
    fields = (report.state, report.gap, report.lse, report.dropped_mass_bound)
    contract.check(case, (q, k, v), *(cupy.asnumpy(x) for x in (out, *fields)))
    on_gpu[1] = cupy.ascontiguousarray(on_gpu[1])
    _, usual = skip_softmax_attention(*on_gpu, **settings)
    assert usual.backend == best_tensor_cores(detect())


@needs_gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("workload", ["columns", "scattered"])
def test_many_blocks_of_prescribed_sparsity_on_the_gpu(workload, cupy, on_gpu):
    """In ``scattered``, neighbouring groups skip different tiles: a build stood still there."""
    work = WORKLOADS[workload](8192, 128, 1, sparsity=0.5, causal=False)
    one = (sim.to_kernel_layout(x).astype(np.float16) for x in (work.q, work.k, work.v))
    tensors = [cupy.asarray(np.repeat(x, 8, axis=2)) for x in one]
    settings = {"causal": False, "threshold": 0.01, "return_report": True, "backend": on_gpu}
    out, report = skip_softmax_attention(*tensors, **settings)
    assert np.abs(report.sparsity - 0.5).max() < 0.01
    for _ in range(20):
        again, other = skip_softmax_attention(*tensors, **settings)
        assert (other.state == report.state).all()
        assert (again == out).all()


@needs_gpu
def test_a_plan_launches_again_and_in_a_graph_on_the_gpu(cupy, on_gpu):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    settings = {"threshold": 0.2, "backend": on_gpu}
    plan = skip_softmax_plan(q, k, v, **settings)
    expected = skip_softmax_attention(q, k, v, **settings)
    out = torch.full_like(q, float("nan"))
    assert plan(q, k, v, out=out) is out
    assert (out == expected).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(q, k, v, out=out)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert (out == skip_softmax_attention(q, k, v, **settings)).all()
    assert plan.report.sparsity.shape == (1, 2)
    with pytest.raises(ValueError, match="k must be as planned"):
        plan(q, k[:, 1:], v)
