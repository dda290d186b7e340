"""The public door: shapes and dtypes in and out, every refusal, thresholds per request and head."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import sim
from cuda_kernels import (
    Device,
    backends,
    gpu,
    skip_softmax_attention,
    skip_softmax_plan,
)
from cuda_kernels.arrays import layout
from cuda_kernels.forms import Forms
from cuda_kernels.remembered import Remembered

RNG = np.random.default_rng(5)
Q = RNG.standard_normal((2, 40, 4, 16)).astype(np.float16)
K, V = RNG.standard_normal((2, 2, 56, 2, 16)).astype(np.float16)
Q[..., 0], K[..., 0], K[:, 0, :, 0] = 3, 0, 4  # an attention sink, so that tiles are skipped


def call(q=Q, k=K, v=V, **arguments):
    arguments = {"threshold": 0.5, "tile": (8, 16), "backend": "reference", **arguments}
    return skip_softmax_attention(q, k, v, **arguments)


def test_output_has_the_callers_shape_and_dtype():
    out, report = call(return_report=True)
    assert out.shape == Q.shape
    assert out.dtype == np.float16
    assert report.backend == "reference"
    assert report.tiles.state.shape == (2, 4, 5, 4)
    assert report.sparsity.shape == (2, 4)
    assert report.lse.shape == report.dropped_mass_bound.shape == (2, 4, 40)
    assert isinstance(call(), np.ndarray)


def test_out_is_written_and_returned():
    mine = np.full(Q.shape, np.nan, np.float16)
    assert call(out=mine) is mine
    assert np.array_equal(mine, call())


def test_dense_is_attention():
    out = call(threshold=0, softmax_scale=0.3)
    for b in range(2):
        q, k, v = (np.moveaxis(x[b], 1, 0) for x in (Q, K, V))
        exact = sim.reference.attention(q, k, v, softmax_scale=0.3).output
        np.testing.assert_allclose(np.moveaxis(out[b], 1, 0), exact, atol=2e-3)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.5, np.full((2, 4), 0.5)),
        ([0.5, 0.0], [[0.5] * 4, [0.0] * 4]),
        (
            [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]],
            [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]],
        ),
    ],
)
def test_thresholds_per_request_and_per_head(threshold, expected):
    _, report = call(threshold=threshold, return_report=True)
    assert report.threshold.tolist() == np.asarray(expected).tolist()


def test_a_looser_head_skips_more():
    _, report = call(Q * 3, threshold=[[1.0, 0, 1.0, 0]] * 2, return_report=True)
    assert (report.sparsity[:, [1, 3]] == 0).all()
    assert report.sparsity[:, [0, 2]].max() > 0


def test_factor_is_divided_by_the_key_length_and_short_contexts_stay_dense():
    _, report = call(threshold=None, threshold_scale_factor=28, return_report=True)
    assert (report.threshold == 0.5).all()
    _, report = call(threshold=None, threshold_scale_factor=112, return_report=True)
    assert (report.threshold == 0).all()
    assert (report.sparsity == 0).all()
    _, report = call(
        threshold=None, threshold_scale_factor=112, short_context="allow", return_report=True
    )
    assert (report.threshold == 2).all()
    assert report.sparsity.min() > 0


def test_transposed_views_are_read_in_place():
    cache = np.ascontiguousarray(np.moveaxis(K, 1, 2))  # [B, Hkv, L, D], as model caches are
    assert np.array_equal(call(k=np.moveaxis(cache, 1, 2)), call())


WIDE = np.zeros((2, 40, 4, 32), np.float16)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \[batch, length, heads, head_dim\]"),
        ({"k": K[:, :0]}, ValueError, r"k must be .* none of them 0; got shape \(2, 0, 2, 16\)"),
        ({"q": Q.astype(float)}, ValueError, "q must be float16, bfloat16, float32; got float64"),
        ({"v": V.astype(np.float32)}, ValueError, "must share library and dtype; .* v is numpy"),
        ({"k": K[..., :8]}, ValueError, "q and k must share head_dim, got 16 and 8"),
        ({"v": V[:, :50]}, ValueError, "k and v must share batch, length and heads"),
        ({"q": Q[:1]}, ValueError, "q and k must share batch, got 1 and 2"),
        ({"q": Q[:, :, :3]}, ValueError, "query heads must be a multiple of KV heads, got 3 and 2"),
        ({"q": WIDE[..., ::2]}, ValueError, "q must be contiguous along head_dim"),
        ({"q": WIDE[..., 4:20]}, ValueError, "q must start, and step, at multiples of 16 bytes"),
        ({"q": [[1.0]]}, TypeError, "arrays must be of NumPy, CuPy or PyTorch, got list"),
        ({"threshold": -1}, ValueError, "threshold must be finite and at least 0, got -1"),
        ({"threshold": float("nan")}, ValueError, "threshold must be finite"),
        ({"threshold": 1.5}, ValueError, "threshold must be at most 1"),
        ({"threshold": [0.1] * 3}, ValueError, r"one for each of \[2\] requests, or \[2, 4\]"),
        ({"threshold_scale_factor": 1}, ValueError, "not both"),
        ({"threshold": None}, ValueError, "give threshold or threshold_scale_factor"),
        ({"order": "up"}, ValueError, "order must be one of"),
        ({"tile": (8, 0)}, ValueError, "tile keys must be between 1"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be finite and above 0"),
        ({"out": np.zeros((1, 2))}, ValueError, "out must be a numpy array of shape"),
        ({"out": np.zeros(Q.shape)}, ValueError, "out must share dtype and device with q"),
        (
            {"backend": "magic"},
            ValueError,
            "backend must be one of wgmma, mma, simt, reference, got 'magic'",
        ),
        ({"backend": "simt", "emulate": True}, ValueError, "emulate=True runs the mma or the"),
        ({"backend": None, "emulate": True}, ValueError, "the mma kernel decides on tiles of 64"),
        ({"q_lens": [40]}, ValueError, "q_lens must be 2 integers on the host"),
        ({"kv_lens": [57, 1]}, ValueError, r"kv_lens must be between 0 and 56, got \[57, 1\]"),
        ({"kv_lens": [1.0, 2.0]}, ValueError, "kv_lens must be 2 integers on the host"),
        ({"window": 0}, ValueError, "window must be between 1"),
        ({"window": 3, "causal": False}, ValueError, "a window needs the causal mask"),
        ({"cu_seqlens_q": [0]}, ValueError, "cu_seqlens_q is not supported yet"),
        ({"cu_seqlens_k": [0]}, ValueError, "cu_seqlens_k is not supported yet"),
        ({"page_table": [0]}, ValueError, "page_table is not supported yet"),
        ({"sink_logits": [0]}, ValueError, "sink_logits is not supported yet"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, sentence):
    with pytest.raises(error, match=sentence):
        call(**change)


def test_nothing_falls_back_silently(monkeypatch):
    none = Device("none", "there is no CUDA GPU, or no driver for it")
    monkeypatch.setattr("cuda_kernels.attention.detect", lambda: none)
    with pytest.raises(RuntimeError, match="no kernel can run here: there is no CUDA GPU"):
        call(backend=None)


def test_simt_names_the_tiles_it_takes(monkeypatch):
    pytest.importorskip("numba", reason="Numba has no wheel here")
    monkeypatch.setattr("cuda_kernels.attention.detect", lambda: Device("gpu"))
    with pytest.raises(ValueError, match="at most 1024 rows and a multiple of 16 keys"):
        call(backend=None, tile=(8, 24))


def test_torch_tensors_come_in_and_go_out():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    q, k, v = (torch.from_numpy(x) for x in (Q, K, V))
    out = call(q, k, v)
    assert np.array_equal(out.numpy(), call())
    assert call(*(x.to(torch.bfloat16) for x in (q, k, v))).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="q requires a gradient, and there is no backward pass"):
        call(q.clone().requires_grad_(), k, v)
    with torch.no_grad():
        call(q.clone().requires_grad_(), k, v)


@pytest.mark.parametrize("door", [skip_softmax_attention, skip_softmax_plan])
@pytest.mark.parametrize("backend", ["mma", "wgmma"])
def test_tensor_cores_take_arrays_that_are_on_the_gpu(door, backend, monkeypatch):
    card = Device("gpu", "", "NVIDIA H200", (9, 0))
    monkeypatch.setattr("cuda_kernels.attention.detect", lambda: card)
    q = k = v = np.zeros((1, 64, 1, 64), np.float16)
    with pytest.raises(ValueError, match="q is a numpy array on cpu; move q, k and v to the GPU"):
        door(q, k, v, threshold=0.1, backend=backend)


def test_a_cpu_tensor_is_not_sent_to_the_gpu_unasked(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr("cuda_kernels.attention.detect", lambda: Device("gpu"))
    with pytest.raises(
        ValueError, match="q is a torch array on cpu; move q, k and v to the GPU first"
    ):
        call(*(torch.from_numpy(x) for x in (Q, K, V)), backend="simt")


def test_choice_of_back_end():
    old = Device("too old", "GTX 980 is too old: compute capability 5.2 …")
    turing, ampere, hopper, blackwell = (
        Device("gpu", "", "Card", x) for x in ((7, 5), (8, 0), (9, 0), (10, 0))
    )
    assert backends.choose(None, hopper, fits_tensor_cores=True) == "wgmma"
    assert backends.choose(None, hopper, fits_tensor_cores=True, fits_tma=False) == "mma"
    assert backends.choose(None, hopper, fits_tensor_cores=False) == "simt"
    for asked in ("mma", "simt"):
        assert backends.choose(asked, hopper, fits_tensor_cores=True) == asked
    assert backends.choose(None, ampere, fits_tensor_cores=True) == "mma"
    assert backends.choose(None, blackwell, fits_tensor_cores=True) == "mma"
    assert backends.choose(None, turing, fits_tensor_cores=True) == "simt"
    with pytest.raises(RuntimeError, match=r"cannot run on Card: it needs compute capability 8\.0"):
        backends.choose("mma", turing, fits_tensor_cores=True)
    assert backends.choose("reference", old) == "reference"
    with pytest.raises(RuntimeError, match="GTX 980 is too old"):
        backends.choose("simt", old)


class PlayedDriver:
    """One GPU, as cuda-bindings would tell of it, in a thread that has no context yet."""

    def __init__(self, capability):
        self.capability, self.made_current = capability, None

    def play(self, monkeypatch):
        driver = pytest.importorskip("cuda.bindings.driver", reason="numba-cuda is not installed")
        good, bad = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        kinds = driver.CUdevice_attribute
        numbers = {
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability[0],
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability[1],
            kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 132,
            kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: 233_472,
        }

        def make_current(context):
            self.made_current = context
            return (good,)

        answers = {
            "cuInit": lambda _: (good,),
            "cuDeviceGetCount": lambda: (good, 1),
            "cuCtxGetCurrent": lambda: (good, driver.CUcontext(int(self.made_current is not None))),
            "cuCtxGetDevice": lambda: (bad, None) if self.made_current is None else (good, 2),
            "cuDeviceGet": lambda number: (good, number),
            "cuDevicePrimaryCtxRetain": lambda device: (good, f"context of {device}"),
            "cuCtxSetCurrent": make_current,
            "cuDeviceGetName": lambda _, device: (good, b"Some card\0\0"),
            "cuDeviceGetAttribute": lambda kind, device: (good, numbers[kind]),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(driver, name, answer)
        return driver


@pytest.mark.parametrize(
    ("capability", "kind"), [((9, 0), "gpu"), ((7, 5), "gpu"), ((5, 2), "too old")]
)
def test_old_gpus_are_told_apart(monkeypatch, capability, kind):
    played = PlayedDriver(capability)
    played.play(monkeypatch)
    found = backends.detect()
    assert found.kind == kind
    assert found.name == "Some card"
    assert found.compute_capability == capability
    assert ("compute capability 5.2, at least 7.5" in found.reason) == (kind == "too old")


def test_the_current_gpu_is_that_of_the_context_and_the_first_gets_one(monkeypatch):
    played = PlayedDriver((9, 0))
    played.play(monkeypatch)
    assert gpu.current() == gpu.Gpu(0, "Some card", (9, 0), 132, 233_472)
    assert played.made_current == "context of 0"
    assert gpu.current().number == 2
    assert played.made_current == "context of 0"
    assert gpu.current().architecture == "sm_90a"
    assert gpu.Gpu(0, "A100", (8, 0), 108, 167_936).architecture == "sm_80"


@pytest.mark.parametrize(("function", "number"), [("cuInit", 100), ("cuDeviceGetCount", 0)])
def test_no_gpu_is_no_error(monkeypatch, function, number):
    driver = PlayedDriver((9, 0)).play(monkeypatch)
    result = driver.CUresult
    answers = {"cuInit": (result(number),), "cuDeviceGetCount": (result.CUDA_SUCCESS, number)}
    monkeypatch.setattr(driver, function, lambda *_: answers[function])
    found = backends.detect()
    assert (found.kind, found.reason) == ("none", "there is no CUDA GPU, or no driver for it")


@pytest.mark.parametrize(
    ("package", "reason"),
    [("numba", "Numba is not installed"), ("numba_cuda", "numba-cuda is not installed"),
     ("cuda.bindings", "cannot be imported")],
)  # fmt: skip
def test_what_is_not_installed_is_named(monkeypatch, package, reason):
    PlayedDriver((9, 0)).play(monkeypatch)
    assert backends.detect().kind == "gpu"
    monkeypatch.setitem(sys.modules, package, None)
    found = backends.detect()
    assert found.kind == "none"
    assert reason in found.reason


def test_a_broken_driver_ends_in_a_sentence(monkeypatch):
    driver = PlayedDriver((9, 0)).play(monkeypatch)
    monkeypatch.setattr(driver, "cuDeviceGetName", lambda *_: (driver.CUresult(999), None))
    assert backends.detect().reason == (
        "the CUDA driver does not work (cuDeviceGetName: CUDA_ERROR_UNKNOWN)"
    )


def test_the_simulator_is_found_before_numba_is_loaded():
    look = "import sys, cuda_kernels as c; print(c.detect().kind, 'numba' in sys.modules)"
    for told, answer in (("0", "False"), ("1", "simulator True")):
        done = subprocess.run(
            [sys.executable, "-c", look], capture_output=True, text=True, check=True,
            env={**os.environ, "NUMBA_ENABLE_CUDASIM": told},
        )  # fmt: skip
        assert done.stdout.strip().endswith(answer)


def test_a_plan_refuses_before_it_compiles(monkeypatch):
    with pytest.raises(ValueError, match=r"the w?g?mma kernel takes head_dim 64 and 128"):
        skip_softmax_plan(Q, K, V, threshold=0.5)
    with pytest.raises(ValueError, match="a plan's backend must be mma or wgmma, got 'simt'"):
        skip_softmax_plan(Q, K, V, threshold=0.5, backend="simt")
    q, k, v = np.zeros((3, 1, 64, 1, 64), np.float16)
    advice = "on the CPU, skip_softmax_attention with emulate=True runs"  # a plan does not take it
    for device, sentence in (
        (Device("none", "there is no card"), "no kernel can run here: there is no card; "),
        (
            Device("simulator", "", "Numba's"),
            r"the mma kernel cannot run on Numba's: .* or later; ",
        ),
        (
            Device("gpu", "", "Card", (7, 5)),
            r"the mma kernel cannot run on Card: .* 8\.0 or later; ",
        ),
    ):
        monkeypatch.setattr("cuda_kernels.attention.detect", lambda device=device: device)
        with pytest.raises(RuntimeError, match=sentence + advice):
            skip_softmax_plan(q, k, v, threshold=0.5)


# --- the door remembers plans: with arrays that say they are on a GPU, and plans that only note


class OnCard(np.ndarray):
    """What the door sees of a CuPy array."""

    __module__ = "cupy"
    card = 0
    device = property(lambda self: SimpleNamespace(id=self.card))
    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data, device_id=self.card))


class Tensor:
    """What it sees of a PyTorch tensor."""

    __module__ = "torch"
    is_cuda, requires_grad, device, dtype, ndim = True, False, "cuda:0", "torch.float16", 4

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def stride(self):
        return tuple(n // 2 for n in self.array.strides)

    def element_size(self):
        return 2

    def data_ptr(self):
        return self.array.ctypes.data


@pytest.fixture
def planned(monkeypatch):
    """List the plans made; calls return the number of theirs."""
    made = []

    class Plan:
        def __init__(self, q, k, v, settings, out=None, backend="mma"):
            made.append((settings, backend))
            self.number = len(made)

        def __call__(self, q, k, v, *, out=None):
            return self.number

    monkeypatch.setattr("cuda_kernels.attention.PrefillPlan", Plan)
    monkeypatch.setattr("cuda_kernels.attention._PLANS", Remembered())
    monkeypatch.setattr("cuda_kernels.attention.detect", lambda: Device("gpu", "", "Card", (9, 0)))
    return made


ARRAY = np.zeros((1, 64, 2, 64), np.float16)
LIBRARIES = {"cupy": lambda x: x.view(OnCard), "torch": Tensor}
by_library = pytest.mark.parametrize("library", LIBRARIES)


def tensors(library, length=128, width=64):
    rows = [np.zeros((1, length, 2, width), np.float16)[..., :64] for _ in range(3)]
    return [LIBRARIES[library](x) for x in rows]


@by_library
def test_a_plan_is_made_once_for_calls_alike(planned, library):
    calls = [
        skip_softmax_attention(*tensors(library), threshold=threshold)
        for threshold in (0.1, 0.1, np.float32(0.5), 0.1, 0.5)
    ]
    assert calls == [1, 1, 2, 1, 2]
    assert skip_softmax_attention(*tensors(library, 192), threshold=0.1) == 3
    q, k, v = tensors(library)
    assert skip_softmax_attention(q, k, v, threshold=0.1, out=v) == 4
    assert skip_softmax_attention(q, k, v, threshold=0.1, causal=False) == 5
    assert skip_softmax_attention(*tensors(library, width=72), threshold=0.1) == 6
    assert len(planned) == 6


@by_library
def test_a_host_thread_has_plans_of_its_own(planned, library):
    with ThreadPoolExecutor(1) as other:
        arrays = tensors(library)
        first = skip_softmax_attention(*arrays, threshold=0.1)
        assert other.submit(skip_softmax_attention, *arrays, threshold=0.1).result() == 2
        assert skip_softmax_attention(*arrays, threshold=0.1) == first == 1


@by_library
def test_the_plan_that_was_not_called_for_longest_goes(planned, library, monkeypatch):
    monkeypatch.setattr("cuda_kernels.remembered.MAX_PLANS", 2)
    calls = [
        skip_softmax_attention(*tensors(library), threshold=threshold)
        for threshold in (0.1, 0.2, 0.1, 0.3, 0.1, 0.2)
    ]
    assert calls == [1, 2, 1, 3, 1, 4]


@by_library
def test_what_is_not_plain_is_checked_each_time(planned, library):
    for threshold in ([0.1], np.array([0.1]), (np.array(0.1),)):
        for _ in range(2):
            skip_softmax_attention(*tensors(library), threshold=threshold)
    assert len(planned) == 6
    for _ in range(2):
        with pytest.raises(ValueError, match="q_lens must be"):
            skip_softmax_attention(*tensors(library), threshold=0.1, q_lens=[500])
        with pytest.raises(ValueError, match="threshold must be finite"):
            skip_softmax_attention(*tensors(library), threshold=float("nan"))


def broadcast(library):
    """Give q, k and v; all query heads of k lie at one place."""
    q, k, v = np.zeros((3, 1, 128, 2, 64), np.float16)
    return [LIBRARIES[library](x) for x in (q, np.broadcast_to(k[:, :, :1], k.shape), v)]


@by_library
@pytest.mark.parametrize(
    ("capability", "usual", "without_tma"),
    [((8, 0), "mma", "mma"), ((9, 0), "wgmma", "mma"), ((10, 0), "mma", "mma")],
)
def test_both_doors_take_the_best_kernel_for_gpu_and_arrays(
    planned, library, capability, usual, without_tma, monkeypatch
):
    card = Device("gpu", "", "Card", capability)
    monkeypatch.setattr("cuda_kernels.attention.detect", lambda: card)
    for door in (skip_softmax_attention, skip_softmax_plan):
        planned.clear()
        door(*tensors(library), threshold=0.1)
        door(*tensors(library), threshold=0.2, backend="mma")
        door(*broadcast(library), threshold=0.1)
        assert [backend for _, backend in planned] == [usual, "mma", without_tma]


@pytest.mark.parametrize("how", [{"emulate": True}, {}], ids=["emulated", "on the GPU"])
def test_wgmma_refuses_what_tma_cannot_step_over(planned, how):
    q, k, v = broadcast("cupy")
    sentence = r"the wgmma kernel takes arrays whose strides are above 0, got k with \[\d+, 256, 0"
    with pytest.raises(ValueError, match=sentence):
        skip_softmax_attention(q, k, v, threshold=0.1, backend="wgmma", **how)
    backwards = np.zeros(q.shape, np.float16)[:, :, ::-1].view(OnCard)
    with pytest.raises(ValueError, match=r"wgmma .* got out with"):
        skip_softmax_attention(q, q, v, threshold=0.1, backend="wgmma", out=backwards, **how)


OTHERS = {
    "shape": {"array": ARRAY[:, :60]},
    "strides": {"array": np.zeros((1, 64, 2, 72), np.float16)[..., :64]},
    "dtype": {"array": np.zeros((1, 64, 2, 64), np.int16)},
    "device": {"card": 1},
}


def made(library, array=ARRAY, card=0):
    """Give an array that says it is on a GPU."""
    x = LIBRARIES[library](array)
    if library == "torch":
        x.dtype, x.device = f"torch.{array.dtype}", f"cuda:{card}"
    else:
        x.card = card
    return x


NAMES = ("q", "k", "v", "out", "lens")


@by_library
@pytest.mark.parametrize("which", range(5))
def test_arrays_of_another_form_than_planned_are_refused(library, which):
    alike = [made(library, np.zeros_like(ARRAY)) for _ in NAMES]
    forms = Forms(dict(zip(NAMES, alike, strict=True)))
    calls = [made(library, np.zeros_like(ARRAY)) for _ in NAMES]
    assert forms.addresses(*calls) == [layout(x)[1] for x in calls]
    planned = {other: r"\[1, 64, 2, 64\] with strides \[" for other in OTHERS} | {"library": "of"}
    for change, sentence in planned.items():
        other = ARRAY if change == "library" else made(library, **OTHERS[change])
        with pytest.raises(ValueError, match=f"^{NAMES[which]} must be as planned, {sentence}"):
            forms.addresses(*calls[:which], other, *calls[which + 1 :])


@by_library
@pytest.mark.parametrize("which", range(5))
def test_arrays_that_kernels_copy_in_chunks_start_at_16_bytes(library, which):
    calls = [made(library, np.zeros_like(ARRAY)) for _ in NAMES]
    forms = Forms(dict(zip(NAMES, calls, strict=True)))
    room = np.zeros(ARRAY.size + 16, np.float16)
    start = (-room.ctypes.data % 16) // 2 + 1
    calls[which] = made(library, room[start : start + ARRAY.size].reshape(ARRAY.shape))
    if which == 4:
        assert forms.addresses(*calls)[4] % 16 == 2
        return
    with pytest.raises(ValueError, match=f"^{NAMES[which]} must start at a multiple of 16 bytes"):
        forms.addresses(*calls)
