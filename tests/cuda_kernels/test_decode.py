"""The decode kernel and its door: emulated on any machine, and on a GPU, against the simulator."""

import ctypes
import re
from types import SimpleNamespace

import decode_cases
import numpy as np
import pytest
from decode_cases import CASES, DecodeCase, random_case, run

from cuda_kernels import arrays, detect, skip_softmax_decode, skip_softmax_decode_plan
from cuda_kernels.blocks.decode_mma import choose_stages, inverse, shared_bytes
from cuda_kernels.decode_mma import SIGNATURE, quotient
from cuda_kernels.decode_plan import H200, blocks_at_a_time, choose_splits
from cuda_kernels.emulator import emulate
from cuda_kernels.ptx.language import cuda
from cuda_kernels.remembered import Remembered


def name(case):
    return case.name


def as_bits_of(case, monkeypatch):
    """Make arrays of a case's dtype, and float32 of them: NumPy has float16 only.

    With bfloat16, arrays of its bits stand under float16's name.
    """
    if case.dtype == "float16":
        return (lambda x: x.astype(np.float16)), (lambda x: x.astype(np.float32))
    of = arrays.dtype_name
    monkeypatch.setattr(arrays, "dtype_name", lambda x: of(x).replace("float16", "bfloat16"))

    def give(x):
        high = np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16
        return high.astype(np.uint16).view(np.float16)

    return give, lambda x: (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def fields(report):
    return report.state, report.gap, report.lse, report.dropped_mass_bound


@pytest.mark.parametrize("case", CASES, ids=name)
def test_emulated(case, monkeypatch):
    give, back = as_bits_of(case, monkeypatch)
    out, report = run(case, give=give, emulate=True, gap=True)
    skipped = decode_cases.check(case, back(out), *fields(report))
    assert (skipped > 0) == case.skips
    assert report.backend == "decode mma, emulated"


def test_emulated_gaps_do_not_depend_on_the_threshold_nor_results_on_the_gap_build():
    case = DecodeCase("gaps", lens=(130,), seeded=True, group=2)
    give = np.float16
    runs = {
        lam: run(case, lam, give=lambda x: x.astype(give), emulate=True, gap=True)
        for lam in (1e-30, 1.0)
    }
    assert runs[1e-30][1].gap.tobytes() == runs[1.0][1].gap.tobytes()
    assert runs[1e-30][1].state.tobytes() != runs[1.0][1].state.tobytes()
    plain = run(case, 1.0, give=lambda x: x.astype(give), emulate=True)
    assert plain[1].gap is None
    assert plain[0].tobytes() == runs[1.0][0].tobytes()
    assert plain[1].dropped_mass_bound.tobytes() == runs[1.0][1].dropped_mass_bound.tobytes()


def test_emulated_dense_build_is_the_skip_build_at_zero():
    case = DecodeCase("zero", lens=(140,), splits=2)
    dense, barely = (
        run(case, lam, give=lambda x: x.astype(np.float16), emulate=True) for lam in (0.0, 1e-30)
    )
    assert dense[0].tobytes() == barely[0].tobytes()
    assert dense[1].lse.tobytes() == barely[1].lse.tobytes()
    assert (dense[1].state == barely[1].state).all()


def test_a_split_that_is_wholly_skipped_weighs_nothing_but_its_bound():
    """With three splits each of the three tiles is a split of its own."""
    case = DecodeCase("whole split", lens=(180,), splits=3, seeded=True, group=2)
    workspace = np.zeros(1 * (3 * (16 * 64 + 64) + 1), np.float32)
    out, report = run(
        case, give=lambda x: x.astype(np.float16), emulate=True, gap=True, workspace=workspace
    )
    assert report.state.tolist() == [[[[1, 2, 2]]]]
    decode_cases.check(case, out.astype(np.float32), *fields(report))
    assert (report.dropped_mass_bound > 0).all()
    partials = workspace[:-1].reshape(3, -1)
    m, l, u, _ = partials[:, 1024:].reshape(3, 16, 4)[1, :2].T
    assert np.isfinite(m).all()
    assert (l == 0).all()
    assert (u > 0).all()
    assert workspace[-1] == 0  # the counter, ready for the next call


def test_a_factor_is_divided_by_the_keys_of_each_request_and_short_ones_are_dense():
    case = DecodeCase("factor", lens=(140, 30), group=2, seeded=True)
    out, report = run(
        case, give=lambda x: x.astype(np.float16), emulate=True, threshold_scale_factor=[[42], [42]]
    )
    np.testing.assert_allclose(report.threshold, [[0.3], [0.0]])
    assert report.sparsity.tolist() == [[pytest.approx(1 / 3)], [0]]
    alone, _ = run(case, give=lambda x: x.astype(np.float16), emulate=True)
    assert out[0].tobytes() == alone[0].tobytes()
    assert report.bytes.k == report.bytes.dense_v == 2 * 64 * 170
    assert report.bytes.v == 2 * 64 * (170 - 64)
    assert report.bytes.partials == report.bytes.page_table == 0


Q = np.ones((2, 2, 4, 64), np.float16)
K = np.ones((2, 100, 2, 64), np.float16)
PAGED = np.ones((5, 16, 2, 64), np.float16)
TABLE = np.array([[0, 1], [2, 3]], np.int32)
BATCH_OF_PAGES = {"k": PAGED, "v": PAGED, "page_table": TABLE, "seq_lens": [20, 32]}


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \[batch, length, heads, head_dim\]"),
        ({"k": K[0]}, ValueError, r"k must be \[batch, length, KV heads, head_dim\], none of"),
        (
            {**BATCH_OF_PAGES, "layout": "HND", "k": PAGED[0]},
            ValueError,
            r"k must be \[pages, KV heads, page, head_dim\]",
        ),
        ({"layout": "HDN"}, ValueError, "layout must be one of NHD, HND, got 'HDN'"),
        ({"v": K.astype(np.float32)}, ValueError, "must share library and dtype; .* v is numpy fl"),
        ({"q": Q.astype(np.float32), "k": K.astype(np.float32), "v": K.astype(np.float32)},
         ValueError, "must be float16 or bfloat16 for the decode kernel, got float32"),
        ({"v": K[:, :90]}, ValueError, "k and v must share their shape"),
        ({"q": Q[..., :32], "k": K[..., :32], "v": K[..., :32]}, ValueError, "head_dim must be 64"),
        ({"q": Q[:1]}, ValueError, "q and k must share batch, got 1 and 2"),
        ({"q": Q[:, :, :3]}, ValueError, "query heads must be a multiple of KV heads, got 3 and 2"),
        (
            {"q": np.ones((2, 1, 34, 64), np.float16)},
            ValueError,
            "at most 16 query heads may share a KV head, got 34 and 2 heads",
        ),
        (
            {"q": np.ones((2, 9, 4, 64), np.float16)},
            ValueError,
            "q must have 1 to 8 new tokens, got 9",
        ),
        ({"seq_lens": [50, 101]}, ValueError, "the 100 keys .* room for, got 101 for request 1"),
        ({"seq_lens": [1, 50]}, ValueError, "between the 2 new tokens and .* got 1 for request 0"),
        ({"seq_lens": [50]}, ValueError, r"seq_lens must be int32 \[2\], got int64 of shape \(1,"),
        ({"seq_lens": [1.5, 2.5]}, ValueError, r"seq_lens must be int32 \[2\], got float64"),
        ({**BATCH_OF_PAGES, "seq_lens": None}, ValueError, "seq_lens must be given with a page"),
        ({**BATCH_OF_PAGES, "seq_lens": [20, 33]}, ValueError, "32 keys that the cache has room"),
        (
            {**BATCH_OF_PAGES, "page_table": [[0, 1], [2, 5]]},
            ValueError,
            "pages 0 to 4 for the keys in use, got 5 for page 1 of request 1",
        ),
        ({**BATCH_OF_PAGES, "page_table": [0, 1]}, ValueError, r"int32 \[2, pages\], got int64 of"),
        (
            {**BATCH_OF_PAGES, "k": PAGED[:, :8], "v": PAGED[:, :8]},
            ValueError,
            "pages must have 16, 64 or 128 keys, got 8",
        ),
        ({"threshold": 1.5}, ValueError, "threshold must be at most 1 in decode, got 1.5"),
        ({"threshold": -1}, ValueError, "threshold must be finite and at least 0, got -1"),
        ({"threshold": [0.1] * 3}, ValueError, r"one threshold, or one for each of \[2\] requests"),
        ({"threshold_scale_factor": 3}, ValueError, "give threshold or threshold_scale_factor"),
        (
            {"threshold": None, "threshold_scale_factor": float("nan")},
            ValueError,
            "threshold_scale_factor must be finite",
        ),
        ({"keys": 32}, ValueError, "keys must be one of 64, 128, got 32"),
        ({"order": "up"}, ValueError, "order must be one of"),
        ({"split_layout": "random"}, ValueError, "split_layout must be one of interleaved"),
        ({"splits": 0}, ValueError, "splits must be between 1 and 128, got 0"),
        ({"splits": 1.0}, ValueError, "splits must be an integer, got 1.0"),
        ({"softmax_scale": 0}, ValueError, "softmax_scale must be finite and above 0"),
        ({"out": Q.astype(np.float32)}, ValueError, "out must share dtype and device with q"),
        (
            {"splits": 2, "workspace": np.zeros(9, np.float32)},
            ValueError,
            "workspace must be a numpy array of at least 8708 float32 on cpu, got float32",
        ),
        ({"k": np.ones((2, 100, 2, 68), np.float16)[..., :64]}, ValueError, "multiples of 16 byt"),
        ({"q": [[1.0]]}, TypeError, "arrays must be of NumPy, CuPy or PyTorch, got list"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(change, error, sentence):
    arguments = {"q": Q, "k": K, "v": K, "threshold": 0.1, "emulate": True, **change}
    with pytest.raises(error, match=sentence):
        skip_softmax_decode(**arguments)


def test_nothing_falls_back_silently():
    if detect().kind == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="the decode kernel cannot run here: "):
        skip_softmax_decode(Q, K, K, threshold=0.1)
    with pytest.raises(RuntimeError, match="emulate=True runs it on the CPU"):
        skip_softmax_decode_plan(Q, K, K, threshold=0.1)


@pytest.mark.parametrize(
    ("groups", "tiles", "splits"),
    [(256, 256, 1), (64, 256, 4), (8, 1024, 33), (264, 1024, 1), (5000, 1024, 1), (133, 256, 1),
     (132, 256, 2), (1, 1024, 128), (1, 40, 10), (8, 3, 1)],
)  # fmt: skip
def test_splits_fill_the_gpu_and_have_tiles_enough(groups, tiles, splits):
    assert choose_splits(groups, tiles, 264) == splits
    assert groups * splits <= 264 or splits == 1
    assert tiles >= 4 * splits or splits == 1
    more = splits + 1
    assert groups * more > 264 or tiles < 4 * more or splits == 128


@pytest.mark.parametrize(
    ("shared", "stages", "blocks"),
    [(228, 3, 2), (164, 2, 2), (100, 2, 1)],  # Hopper; A100; the other Amperes and Ada
)  # fmt: skip
def test_as_many_stages_as_let_two_blocks_share_a_multiprocessor(shared, stages, blocks):
    assert choose_stages(128, 64, shared << 10) == stages
    assert blocks_at_a_time(128, 64, stages, 132, shared << 10) == 132 * blocks
    for head_dim, keys in ((64, 64), (64, 128), (128, 128)):
        stages = choose_stages(head_dim, keys, shared << 10)
        assert stages >= 1
        assert shared_bytes(head_dim, keys, stages) <= (shared - 1) << 10


@cuda.jit
def divide(x, inverse, out):
    out[cuda.threadIdx.x] = quotient(x[cuda.threadIdx.x], inverse)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 9, 16, 33, 127, 128])
def test_the_kernel_divides_by_an_inverse(divisor):
    largest = min((1 << 32) // divisor, (1 << 31) - 1)
    multiples = [x // divisor * divisor for x in (divisor, 1 << 18, largest)]
    x = np.array([0, *(y - z for y in multiples for z in (0, 1))], np.int32)
    out = np.full_like(x, -1)
    emulate(divide, (1, 1, 1), len(x), x, inverse(divisor), out)
    assert out.tolist() == (x // divisor).tolist()


class ImitatedLauncher:
    """Makes arrays of the addresses that a driver would be given, and lets the emulator run."""

    def __init__(self, compiled, grid, threads, shared, *args):
        self.launch, self.args = (compiled, grid, threads), args
        self.shared = shared

    def __call__(self, stream, *addresses):
        left = iter(addresses)
        kinds = re.findall(r"(\w+)(?:\[[^]]*\])?(?:, |\))", SIGNATURE)
        values = []
        for kind, argument in zip(kinds, self.args, strict=True):
            if not isinstance(argument, tuple):
                values.append(argument.value)
                continue
            shape, strides, item = argument
            span = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + item
            memory = (ctypes.c_char * span).from_address(next(left))
            values.append(np.ndarray(shape, kind, memory, 0, strides))
        assert next(left, None) is None
        emulate(*self.launch, *values, shared_bytes=self.shared)


@pytest.fixture
def imitated_gpu(monkeypatch):
    monkeypatch.setattr("cuda_kernels.gpu.current", lambda: None)
    monkeypatch.setattr("cuda_kernels.launch.load", lambda kernel, *_: kernel.make())
    monkeypatch.setattr("cuda_kernels.launch.Launcher", ImitatedLauncher)
    monkeypatch.setattr("cuda_kernels.decode._check_gpu", lambda q: None)
    monkeypatch.setattr("cuda_kernels.decode._gpu", lambda: H200)


class OnCard(np.ndarray):
    """What the door sees of a CuPy array."""

    __module__ = "cupy"
    data = SimpleNamespace(device_id=0)


def test_plans_are_remembered_for_each_stream_and_the_oldest_call_goes(monkeypatch):
    made, stream = [], [7]

    def plan(*_):
        number = len(made)
        made.append(number)
        return lambda *_, **__: number

    tensors = {"out": None}
    monkeypatch.setattr("cuda_kernels.decode._PLANS", Remembered())
    monkeypatch.setattr("cuda_kernels.remembered.MAX_PLANS", 3)
    monkeypatch.setattr("cuda_kernels.decode._prepare", lambda *_, **__: (tensors, None))
    monkeypatch.setattr("cuda_kernels.decode.DecodePlan", plan)
    monkeypatch.setattr(arrays, "current_stream", lambda q: stream[0])
    x = np.zeros((1, 1, 2, 64), np.float16).view(OnCard)

    def call(threshold):
        return skip_softmax_decode(x, x, x, threshold=threshold)

    assert [call(lam) for lam in (0.1, 0.1, 0.2)] == [0, 0, 1]
    stream[0] = 8  # partial results of the other stream may be in use
    assert [call(0.1), call(0.1)] == [2, 2]
    stream[0] = 7
    assert [call(lam) for lam in (0.1, 0.3, 0.1, 0.2)] == [0, 3, 0, 4]  # 0.2 went, 0.1 did not


def test_a_plan_hands_over_what_the_emulator_was_given(imitated_gpu):
    case = DecodeCase(
        "plan", lens=(70, 20), group=2, page=16, layout="HND", splits=2, seeded=True
    )  # fmt: skip
    q, k, v = (x.astype(np.float16) for x in case.tensors())
    (k, table), (v, _) = case.cache(k, fill=0), case.cache(v, fill=0)
    lens, lam = np.array(case.lens, np.int32), np.full((2, 1), 0.3, np.float32)
    how = {"page_table": table, "layout": "HND", "splits": 2}
    plan = skip_softmax_decode_plan(q, k, v, seq_lens=lens, threshold=0.01, **how)
    out = np.full_like(q, np.nan)
    assert plan(q, k, v, seq_lens=lens, threshold=lam, out=out) is out
    same, report = skip_softmax_decode(
        q, k, v, seq_lens=lens, threshold=lam, **how, emulate=True, return_report=True
    )
    assert out.tobytes() == same.tobytes()
    for mine, other in zip(fields(plan.report), fields(report), strict=True):
        assert mine is other is None or mine.tobytes() == other.tobytes()
    assert (plan.report.threshold == report.threshold).all()
    assert plan.report.bytes == report.bytes
    assert report.bytes.page_table == 4 * (5 + 2)
    assert report.bytes.partials == 2 * 4 * 2 * 2 * (8 * 64 + 64)
    with pytest.raises(ValueError, match="k must be as planned"):
        plan(q, k[1:], v)
    with pytest.raises(ValueError, match="seq_lens must be as planned"):
        plan(q, k, v, seq_lens=lens[:1])


@pytest.mark.parametrize(
    ("shared", "keys", "stages", "splits"), [(228, 64, 3, 4), (228, 128, 2, 2), (100, 64, 2, 2)]
)
def test_a_plan_has_the_stages_and_splits_of_the_gpu_it_is_for(
    shared, keys, stages, splits, imitated_gpu, monkeypatch
):
    monkeypatch.setattr("cuda_kernels.decode._gpu", lambda: (132, shared << 10))
    q, k = np.zeros((66, 1, 1, 128), np.float16), np.zeros((66, 2048, 1, 128), np.float16)
    plan = skip_softmax_decode_plan(q, k, k, threshold=0.1, keys=keys)
    assert (plan.settings.stages, plan.settings.splits) == (stages, splits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seq_lens": np.array([50, 101], np.int32)}, "got 101 for request 1"),
        ({"threshold": np.full((2, 2), 1.5, np.float32)}, "threshold must be at most 1 in decode"),
        (
            {**BATCH_OF_PAGES, "page_table": np.array([[0, 1], [-1, 3]], np.int32),
             "seq_lens": np.array([20, 32], np.int32)},
            "got -1 for page 0 of request 1",
        ),
    ],
)  # fmt: skip
def test_what_lies_on_the_gpu_is_looked_at_only_when_asked(
    change, sentence, imitated_gpu, monkeypatch
):
    monkeypatch.setattr("cuda_kernels.decode._on_gpu", lambda x: isinstance(x, np.ndarray))
    arguments = {"q": Q, "k": K, "v": K, "threshold": 0.1, "splits": 1, **change}
    assert skip_softmax_decode_plan(**arguments).settings.skips
    with pytest.raises(ValueError, match=sentence):
        skip_softmax_decode_plan(**arguments, check=True)


def test_arrays_on_the_gpu_must_have_the_kernels_types(imitated_gpu, monkeypatch):
    monkeypatch.setattr("cuda_kernels.decode._on_gpu", lambda x: isinstance(x, np.ndarray))
    with pytest.raises(ValueError, match=r"seq_lens must be int32 \[2\], got int64"):
        skip_softmax_decode_plan(Q, K, K, seq_lens=np.array([50, 50]), threshold=0.1, splits=1)
    with pytest.raises(
        ValueError, match=r"threshold on a GPU must be float32 \[2, 2\], got float64"
    ):
        skip_softmax_decode_plan(Q, K, K, threshold=np.full((2, 2), 0.1), splits=1)


# --- on a GPU

needs_gpu = pytest.mark.gpu


@pytest.fixture
def torch():
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "the CUDA simulator is no GPU")
    return pytest.importorskip("torch")


def on_gpu(torch, case):
    return lambda x: torch.from_numpy(x).cuda().to(getattr(torch, case.dtype))


def compare_on_gpu(torch, case):
    """Two runs are bitwise equal and keep the contract."""
    first, second = (run(case, give=on_gpu(torch, case), gap=True, check=True) for _ in range(2))
    assert torch.equal(first[0].view(torch.int16), second[0].view(torch.int16))
    for one, other in zip(fields(first[1]), fields(second[1]), strict=True):
        assert torch.equal(one, other)
    host = [x.cpu().numpy() for x in fields(first[1])]
    decode_cases.check(case, first[0].float().cpu().numpy(), *host)


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=name)
def test_on_the_gpu(case, torch):
    compare_on_gpu(torch, case)


@needs_gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_random_cases_on_the_gpu(hundred, torch):
    for seed in range(100 * hundred, 100 * hundred + 100):
        compare_on_gpu(torch, random_case(seed))


@needs_gpu
def test_a_plan_is_captured_and_reads_lengths_pages_and_threshold_as_they_are(torch):
    case = DecodeCase("graph", lens=(500, 433), kv_heads=2, page=16, splits=4, seeded=True)
    q, k, v = case.tensors()
    (k, table), (v, _) = case.cache(k, fill=0.0), case.cache(v, fill=0.0)
    give = on_gpu(torch, case)
    q, k, v = give(q), give(k), give(v)
    lens = torch.tensor(case.lens, dtype=torch.int32, device="cuda")
    table = torch.from_numpy(table).cuda()
    lam = torch.full((2, 2), 0.3, device="cuda")
    how = {"splits": 4, "seeded": True}
    plan = skip_softmax_decode_plan(q, k, v, seq_lens=lens, page_table=table, threshold=lam, **how)
    out = torch.full_like(q, float("nan"))
    plan(q, k, v, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(q, k, v, out=out)
    for change in (lambda: lens.sub_(100), lambda: lam.zero_(), lambda: table.copy_(table.flip(0))):
        change()
        graph.replay()
        asked = {"seq_lens": lens, "page_table": table, "threshold": lam}
        expected, report = skip_softmax_decode(q, k, v, **asked, **how, return_report=True)
        assert torch.equal(out, expected)
        assert (plan.report.sparsity == report.sparsity).all()
    with pytest.raises(ValueError, match="k must be as planned"):
        plan(q, k[1:], v)
