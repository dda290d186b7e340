"""What is measured and how it is kept, with a GPU that is played: its clock runs as a test says."""

import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from cuda_kernels import (
    Device,
    benchmark,
    benchmark_launch,
    detect,
    machine,
    skip_softmax_attention,
)
from cuda_kernels.benchmark import TINY, Job, bench_prefill, jobs, measure, table

MACHINE = {"gpu": "NVIDIA H200", "date": "2026-11-26 12:00 UTC"}
MILLISECONDS = {0.0: 4.0, TINY: 5.0, 0.01: 2.0, 0.05: 1.0}  # by λ; what others take is 3


class Played:
    """NumPy's arrays, the simulator's kernel, and a clock that goes by what is called."""

    def __init__(self, stop_after=10**9):
        self.timed, self.stop_after = [], stop_after

    def normal(self, shape):
        return np.random.default_rng(0).standard_normal(shape).astype(np.float16)

    def put(self, x, heads, batch):
        shape = (batch, x.shape[1], heads, x.shape[2])
        return np.broadcast_to(np.moveaxis(x, 0, 1)[None], shape).astype(np.float16, "C")

    def ours(self, backend, q, k, v, causal, threshold, **settings):
        if backend == "narrow":
            raise ValueError("takes head_dim 32")
        assert backend in ("mma", "another")
        return skip_softmax_attention(
            q, k, v, causal=causal, threshold=threshold, backend="reference", **settings
        )

    def peers(self, q, k, v, causal):
        def refuses():
            raise RuntimeError("no kernel for this\nand a long traceback")

        return {"fa2": lambda: None, "cudnn": refuses}

    def wait(self):
        pass

    def milliseconds(self, call):
        if len(self.timed) == self.stop_after:
            raise KeyboardInterrupt
        self.timed.append(call)
        return MILLISECONDS[call.args[-1]] if isinstance(call, partial) else 3.0


@pytest.fixture
def hopper(monkeypatch):
    card = Device("gpu", "", "NVIDIA H200", (9, 0))
    monkeypatch.setattr(machine, "detect", lambda: card)
    monkeypatch.setattr(benchmark, "describe", lambda: dict(MACHINE))
    monkeypatch.setattr(benchmark_launch, "describe", lambda: dict(MACHINE))


def small(causal=True):
    shape = (512, 64, 2, 1, causal)
    make = partial(benchmark._prescribed, "columns", 0.2, shape)
    return [
        Job("random", *shape, {"nothing skipped": TINY}, partial(benchmark._random, shape)),
        Job("columns 0.2", *shape, {"skip": 0.01}, make, 0.2),
    ]


def test_ratios_are_of_the_same_round_and_sparsity_is_the_kernels_own():
    gpu = Played()
    rows, notes = measure(small()[1], gpu, ["mma", "another"], 5)
    by_name = {(row["backend"], row["kernel"]): row for row in rows}
    assert list(by_name) == [
        ("", "fa2"), ("mma", "dense"), ("mma", "skip"), ("another", "dense"), ("another", "skip"),
    ]  # fmt: skip
    assert by_name["mma", "skip"]["ratios"] == {"dense": [2.0, 2.0, 2.0]}
    assert by_name["mma", "dense"]["ratios"] == {"fa2": [0.75, 0.75, 0.75]}
    assert by_name["mma", "dense"]["sparsity"] == 0
    assert abs(by_name["another", "skip"]["sparsity"] - 0.2) < 0.01
    assert by_name["mma", "skip"]["flops"] == 4 * 64 * 2 * 512 * 513 // 2
    assert by_name["mma", "skip"]["tflops"] == pytest.approx(4 * 64 * 512 * 513 / 2e-3 / 1e12)
    assert notes == [
        "columns 0.2, head_dim 64, 512 tokens, 2/1 heads, causal: cudnn does not run: "
        "no kernel for this"
    ]
    rounds = [tuple(map(id, gpu.timed[i : i + 5])) for i in range(0, 25, 5)]
    assert all(len(set(one)) == 5 for one in rounds)
    assert len(set(rounds)) > 1


def test_quartiles():
    ratio = benchmark.ratio([1.0, 1.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 10.0])
    assert ratio == [2.0, 3.0, 4.0]


def test_sparsity_that_is_not_as_prescribed_is_noted():
    job = small()[1]
    rows, notes = measure(Job(**{**vars(job), "prescribed": 0.5}), Played(), ["mma"], 2)
    assert "mma skipped 0.2" in notes[-1]
    assert "not 0.5" in notes[-1]
    assert rows


def test_a_kernel_that_does_not_take_the_shape_is_noted():
    rows, notes = measure(small()[0], Played(), ["narrow", "mma"], 2)
    assert notes[-1].endswith("causal: narrow does not take it: takes head_dim 32")
    assert {row["backend"] for row in rows} == {"", "mma"}


def test_what_is_out_of_reach_is_noted():
    shape = (512, 64, 2, 1, True)
    make = partial(benchmark._prescribed, "columns", 0.9, shape)
    rows, notes = measure(Job("columns 0.9", *shape, {"skip": 0.01}, make, 0.9), Played(), [], 2)
    assert rows == []
    assert "sparsity 0.9 is out of reach" in notes[0]


def test_all_that_the_bars_name_is_measured():
    full = list(jobs(False))
    for head_dim in (64, 128):
        for tokens in (4096, 16_384, 65_536):
            for heads in ((16, 16), (32, 8)):
                for causal in (True, False):
                    names = {
                        job.workload
                        for job in full
                        if (job.head_dim, job.tokens, job.causal) == (head_dim, tokens, causal)
                        and (job.heads, job.kv_heads) == heads
                    }
                    assert names == {"random"} | {
                        f"{workload} {sparsity}"
                        for workload in ("columns", "scattered")
                        for sparsity in (0.5, 0.75, 0.9)
                    }
    (real,) = (job for job in full if job.workload == "SmolLM2-135M")
    assert (real.tokens, real.head_dim, real.heads, real.kv_heads, real.batch) == (
        4096,
        64,
        6,
        2,
        8,
    )
    q, k, v = real.make(Played())
    assert q.shape == (8, 4096, 6, 64)
    assert k.shape == v.shape == (8, 4096, 2, 64)
    quick = list(jobs(True))
    assert {(job.tokens, job.heads) for job in quick} == {(16_384, 16)}


def test_every_row_is_kept_and_nothing_is_written_over(hopper, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "jobs", lambda quick: small())
    paths = []
    for _ in range(2):
        record = bench_prefill(
            gpu=Played(), results=tmp_path, progress=False, quick=True, backends=["mma"]
        )
        paths.append(record.pop("path"))
        assert json.loads((tmp_path / paths[-1]).read_text()) == record
        assert not record["interrupted"]
    stem = "prefill-quick-nvidia-h200-2026-11-26"
    assert paths == [str(tmp_path / f"{stem}.json"), str(tmp_path / f"{stem}-2.json")]
    assert record["machine"] == MACHINE
    assert [row["kernel"] for row in record["rows"]] == [
        "fa2", "dense", "nothing skipped", "fa2", "dense", "skip",
    ]  # fmt: skip
    assert "2.000 (2.000–2.000) × dense" in table(record)
    assert "cudnn does not run" in table(record)
    assert re.search("^fa2 +random ", table(record), re.M)


def test_interrupted_it_keeps_what_is_measured(hopper, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "jobs", lambda quick: small())
    record = bench_prefill(
        gpu=Played(30 * 3 + 10), results=tmp_path, progress=False, backends=["mma"]
    )
    assert record["interrupted"]
    kept = json.loads((tmp_path / "prefill-nvidia-h200-2026-11-26.json").read_text())
    assert kept["interrupted"]
    assert {row["workload"] for row in kept["rows"]} == {"random"}


def test_wrong_use_of_bench_is_one_sentence(hopper, monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of mma.*, got 'simt'"):
        bench_prefill(backends=["simt"])
    with pytest.raises(ValueError, match=r"tokens must be some of 4096, .*; got \[5\]"):
        bench_prefill(tokens=[5], gpu=Played())
    with pytest.raises(ValueError, match="calls must be at least 800, got 3"):
        benchmark_launch.bench_launch(calls=3)
    monkeypatch.setattr(machine, "detect", lambda: Device("gpu", "", "T4", (7, 5)))
    with pytest.raises(RuntimeError, match="bench needs a GPU from Ampere on: this is T4"):
        bench_prefill()


def test_recorded_runs_are_read_in_todays_fields(hopper, monkeypatch, tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    shutil.copy(benchmark.RESULTS / "prefill-nvidia-h200-2026-11-23.json", before)
    old = benchmark.recorded(before)
    assert old["machine"]["date"] == "2026-11-23 20:32 UTC"
    assert "1.193 (1.193–1.194) × dense" in table(old)
    assert {row["backend"] for row in old["rows"] if row["kernel"] in ("fa2", "cudnn")} == {""}
    monkeypatch.setattr(benchmark, "jobs", lambda quick: small())
    made = bench_prefill(gpu=Played(), backends=["mma"], results=tmp_path, progress=False)
    earlier = {**made, "machine": {**MACHINE, "date": "2026-11-25 12:00 UTC"}, "rows": []}
    (tmp_path / "prefill-earlier.json").write_text(json.dumps(earlier))
    assert benchmark.recorded(tmp_path) == made
    with pytest.raises(ValueError, match="there is no recorded prefill run in"):
        benchmark.recorded(tmp_path / "empty")


def test_without_a_gpu_a_sentence_says_so():
    if detect().kind == "gpu":
        pytest.skip("here is one")
    for command in (bench_prefill, benchmark_launch.bench_launch):
        with pytest.raises(RuntimeError, match="bench needs a GPU from Ampere on: "):
            command()


def test_the_host_is_timed_and_not_the_wait_for_the_gpu(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark_launch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    called, waited = [], []

    def call(which, seconds):
        called.append(which)
        now[0] += seconds if len(called) > 2 else 5.0

    def wait():
        waited.append(len(called))
        now[0] += 1.0

    in_turn = [partial(call, "one", 2e-6), partial(call, "other", 4e-6)]
    found = benchmark_launch.microseconds(in_turn, wait, 1000)
    assert found == pytest.approx([3.0, 3.0, 3.0])
    assert waited == [2, 202, 402, 602, 802, 1002]  # so that the queue is never full
    assert called == ["one", "other"] * 501


def test_every_call_that_is_timed_moves_every_address(monkeypatch):
    """Otherwise a call would look cheaper than in a model, whose layers lie side by side."""
    seen, asked = [], []

    def door(q, k, v, *, threshold, backend, out=None, return_report=False):
        seen.append((q, k, v, out))
        asked.append(backend)

    def plan_of(q, k, v, *, threshold, backend):
        asked.append(backend)
        return lambda q, k, v, *, out: seen.append((q, k, v, out))

    monkeypatch.setattr("cuda_kernels.attention.skip_softmax_attention", door)
    monkeypatch.setattr("cuda_kernels.attention.skip_softmax_plan", plan_of)
    monkeypatch.setattr(
        benchmark_launch, "_arrays", lambda library: ([object() for _ in range(4)], lambda: None)
    )
    kinds, _ = benchmark_launch.ways("cupy", "wgmma")
    for what, in_turn in kinds.items():
        seen.clear()
        for call in in_turn:
            call()
        first, second = seen
        assert all(x is not y or x is None for x, y in zip(first, second, strict=True))
        assert (first[3] is None) == (what == "door, output allocated")
    assert asked == ["wgmma"] * 7


def test_launch_is_measured_cold_then_warm_for_each_library(hopper, monkeypatch, tmp_path):
    caches = []

    def fresh(library, backend, cache):
        caches.append((library, backend, cache))
        return {"seconds": {"first call": 9.0 - len(caches)}}

    monkeypatch.setattr(benchmark_launch, "find_spec", lambda name: name == "cupy" or None)
    monkeypatch.setattr(benchmark_launch, "first_call_of_a_process", fresh)
    monkeypatch.setattr(
        benchmark_launch, "ways", lambda *_: ({"door": [int] * 2, "plan": [int]}, int)
    )
    record = benchmark_launch.bench_launch(calls=800, results=tmp_path, progress=False)
    (cold, warm), (cold_too, warm_too) = caches[:2], caches[2:]
    assert cold == warm == ("cupy", "mma", cold[2])
    assert cold_too == warm_too == ("cupy", "wgmma", cold_too[2])
    assert cold[2] != cold_too[2]
    assert record["backends"] == ["mma", "wgmma"]
    assert [(row["backend"], row["what"]) for row in record["rows"]] == [
        (name, what)
        for name in ("mma", "wgmma")
        for what in ("first call, cold disk", "first call, warm disk", "door", "plan")
    ]
    written = benchmark_launch.launch_table(record)
    assert "first call 8.00 s" in written
    assert "cupy   wgmma  plan" in written
    assert "(bar: 25)" in written
    assert json.loads((tmp_path / "launch-nvidia-h200-2026-11-26.json").read_text())["rows"]
    monkeypatch.setattr(benchmark_launch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="bench launch needs PyTorch or CuPy"):
        benchmark_launch.bench_launch()


def test_a_first_call_says_how_long_each_step_took(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_launch, "_arrays", lambda library: ([0] * 4, lambda: None))
    called = []
    monkeypatch.setattr(
        "cuda_kernels.attention.skip_softmax_attention", lambda *_, **how: called.append(how)
    )
    benchmark_launch.first_call("torch", "mma", 0.0)
    seconds = json.loads(capsys.readouterr().out)
    assert list(seconds) == ["imports", "arrays", "first call", "second call"]
    assert [how["backend"] for how in called] == ["mma", "mma"]


def test_a_first_call_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"a first call with nonesuch failed: .*Error: "):
        benchmark_launch.first_call_of_a_process("nonesuch", "mma", str(tmp_path))
