"""Ours against what is installed, in one run on one GPU: ``skip-softmax bench prefill``.

All candidates work on the same tensors, in random order in every round, because the card slows as
it heats; what counts is the median of per-round ratios.  FLOPs are 4 · D per visible pair and
head, so a kernel that skips is given the rate of a dense one that would take as long.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.machine import RESULTS, Record, check_gpu, describe

TINY = 1e-30  # λ of the skip build on which nothing is skipped
PRESCRIBED = (0.5, 0.75, 0.9)
PEERS = ("fa2", "cudnn", "fa3")
COPIES = 8  # of the real heads, so that they fill a GPU

Call = Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """Tensors, and what runs on them.

    Attributes
    ----------
    workload : str
    tokens, head_dim, heads, kv_heads : int
    causal : bool
    skip : dict
        λ of each build that may skip, by its name in the table.
    make : callable
        ``make(gpu)`` returns q, k and v.
    prescribed : float, optional
        Sparsity that they are made for.
    batch : int
    """

    workload: str
    tokens: int
    head_dim: int
    heads: int
    kv_heads: int
    causal: bool
    skip: dict[str, float]
    make: Callable[[Any], tuple[Any, Any, Any]] = field(repr=False)
    prescribed: float | None = None
    batch: int = 1

    @property
    def flops(self) -> int:
        """Of dense attention: 4 · D for every pair that the mask lets see each other."""
        n = self.tokens
        pairs = n * (n + 1) // 2 if self.causal else n * n
        return 4 * self.head_dim * pairs * self.heads * self.batch


def bench_prefill(
    *,
    quick: bool = False,
    tokens: Sequence[int] | None = None,
    backends: Sequence[str] | None = None,
    progress: bool = True,
    gpu: Any = None,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Time prefill kernels and write every row to ``cuda_kernels/results/``.

    Interrupted, it keeps and returns what it has measured.

    Parameters
    ----------
    quick : bool
        16K tokens and 16 heads only, 10 rounds: about a minute.  Otherwise 4K, 16K and 64K tokens,
        16 heads and 32 on 8, heads of a real model, 30 rounds.
    tokens : sequence of int, optional
        Only these lengths.
    backends : sequence of str, optional
        Kernels of ours; default all that can run on this GPU.
    progress : bool
        Show a progress bar on stderr.
    gpu : Gpu, optional
        What the calls are timed on.
    results : path
        Folder of the JSON.

    Returns
    -------
    dict
        ``machine``, ``rounds``, ``rows``, ``notes`` (sentences: what could not be measured, what
        is not as prescribed), ``interrupted``, and ``path`` of the JSON written.

    Raises
    ------
    ValueError
        If there is no such back end.
    RuntimeError
        If there is no GPU that runs the tensor-core kernel, or no PyTorch.
    """
    chosen = choose_backends(backends)
    if gpu is None:
        gpu = Gpu()
    rounds = 10 if quick else 30
    record = Record("prefill-quick" if quick else "prefill", describe(), results)
    record.fields |= {"rounds": rounds, "backends": list(chosen)}
    work = [job for job in jobs(quick) if tokens is None or job.tokens in tokens]
    if not work:
        raise ValueError(f"tokens must be some of 4096, 16384, 65536; got {list(tokens or ())}")
    with record:
        for job in _bar(work, progress):
            rows, notes = measure(job, gpu, chosen, rounds)
            record.add(rows, notes)
    return record.result()


def recorded(results: Path = RESULTS) -> dict[str, Any]:
    """Return the newest prefill run that was kept, as :func:`bench_prefill` returns one.

    Runs of before 2026-11-24 name no back end, and one ratio: they are given today's fields.

    Parameters
    ----------
    results : path
        Folder of the JSON.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If none was kept there.

    Examples
    --------
    >>> recorded()["machine"]["gpu"]
    'NVIDIA H200'
    """
    runs = [
        {
            "notes": [],
            "interrupted": False,
            "path": str(path),
            **json.loads(path.read_text("utf-8")),
        }
        for path in results.glob("prefill-*.json")
    ]
    if not runs:
        raise ValueError(f"there is no recorded prefill run in {results}")
    newest = max(runs, key=lambda run: run["machine"]["date"])
    newest["rows"] = [_in_todays_fields(row) for row in newest["rows"]]
    return newest


def _in_todays_fields(row: dict[str, Any]) -> dict[str, Any]:
    if "ratios" in row:
        return row
    low, high = row["ratio_quartiles"]
    return {
        "backend": "" if row["kernel"] in PEERS else "mma",
        "batch": 1,
        "kv_heads": row["heads"],
        "ratios": {row["against"]: [low, row["ratio"], high]},
        **row,
    }


def choose_backends(asked: Sequence[str] | None) -> list[str]:
    """Check names of tensor-core back ends, or list all that run here.

    Raises
    ------
    ValueError
        If there is no such back end.
    RuntimeError
        If one cannot run here.
    """
    from cuda_kernels.backends import TENSOR_CORE_BACKENDS, choose

    for name in asked or ():
        if name not in TENSOR_CORE_BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(TENSOR_CORE_BACKENDS)}, got {name!r}"
            )
    device = check_gpu()
    if asked:
        return [choose(name, device) for name in asked]
    found = []
    for name in TENSOR_CORE_BACKENDS:
        try:
            found.append(choose(name, device))
        except RuntimeError:  # not a kernel for this GPU
            continue
    return found


def jobs(quick: bool) -> Iterator[Job]:
    """List what is measured: random inputs, two workloads of prescribed sparsity, real heads."""
    for head_dim in (128, 64):
        for tokens in (16_384,) if quick else (4096, 16_384, 65_536):
            for heads, kv_heads in ((16, 16),) if quick else ((16, 16), (32, 8)):
                for causal in (False, True):
                    shape = (tokens, head_dim, heads, kv_heads, causal)
                    yield Job("random", *shape, {"nothing skipped": TINY}, partial(_random, shape))
                    for workload in ("columns", "scattered"):
                        for sparsity in PRESCRIBED:
                            make = partial(_prescribed, workload, sparsity, shape)
                            name = f"{workload} {sparsity:g}"
                            yield Job(name, *shape, {"skip": 0.01}, make, sparsity)
    if not quick:
        heads = _real_heads()
        (hq, tokens, head_dim), hkv = heads[0].shape, len(heads[1])
        skip = {f"skip λ = {lam:g}": lam for lam in (0.001, 0.01, 0.05)}
        yield Job(
            "SmolLM2-135M", tokens, head_dim, hq, hkv, True, skip,
            lambda gpu: tuple(gpu.put(x, x.shape[0], COPIES) for x in heads), None, COPIES,
        )  # fmt: skip


def _random(shape: tuple[Any, ...], gpu: Any) -> tuple[Any, ...]:
    tokens, head_dim, heads, kv_heads, _ = shape
    return tuple(gpu.normal((1, tokens, n, head_dim)) for n in (heads, kv_heads, kv_heads))


def _prescribed(
    workload: str, sparsity: float, shape: tuple[Any, ...], gpu: Any
) -> tuple[Any, ...]:
    """Make one head, and lay as many copies of it side by side as there are heads."""
    from sim import workloads

    tokens, head_dim, heads, kv_heads, causal = shape
    work = workloads.WORKLOADS[workload](tokens, head_dim, 1, sparsity=sparsity, causal=causal)
    pairs = zip((work.q, work.k, work.v), (heads, kv_heads, kv_heads), strict=True)
    return tuple(gpu.put(x, n, 1) for x, n in pairs)


def _real_heads() -> tuple[NDArray, NDArray, NDArray]:
    """Heads of SmolLM2-135M that come with the project, as [heads, tokens, head_dim]."""
    from sim.traces import bundled, read_trace

    traces = [read_trace(path) for path in bundled().values()]
    q, k, v = (
        np.concatenate([getattr(trace, name) for trace in traces]).astype(np.float32)
        for name in "qkv"
    )
    return q, k, v


def measure(
    job: Job, gpu: Any, backends: Sequence[str], rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time all candidates on the tensors of one job.

    Returns
    -------
    rows : list of dict
        One per candidate.
    notes : list of str
        What could not be measured, and sparsity that is more than 0.01 from what was prescribed.
    """
    about = f"{job.workload}, head_dim {job.head_dim}, {job.tokens} tokens, "
    about += f"{job.heads}/{job.kv_heads} heads, {'causal' if job.causal else 'full'}"
    try:
        tensors = job.make(gpu)
    except ValueError as reason:
        return [], [f"{about}: {reason}"]
    notes = []
    calls: dict[tuple[str, str], Call] = {}
    sparsity: dict[tuple[str, str], float] = {}
    works, refusals = working(gpu.peers(*tensors, job.causal), gpu.wait)
    notes += [f"{about}: {refusal}" for refusal in refusals]
    calls |= {("", name): call for name, call in works.items()}
    for backend in backends:
        for name, lam in {"dense": 0.0, **job.skip}.items():
            call = partial(gpu.ours, backend, *tensors, job.causal, lam)
            try:
                report = call(return_report=True)[1]
            except ValueError as reason:
                notes.append(f"{about}: {backend} does not take it: {reason}")
                break
            calls[backend, name] = call
            found = sparsity[backend, name] = float(report.sparsity.mean())
            if name == "skip" and abs(found - (job.prescribed or 0)) > 0.01:
                notes.append(f"{about}: {backend} skipped {found:.3f}, not {job.prescribed:g}")
    times = interleaved(gpu, calls, rounds)
    peers = [which for which in times if which[1] in PEERS]
    rows = []
    for backend, name in times:
        dense = (backend, "dense")
        against = [dense] if backend and name != "dense" else peers
        ratios = {other[1]: ratio(times[backend, name], times[other]) for other in against}
        ms = statistics.median(times[backend, name])
        rows.append(
            {
                "kernel": name,
                "backend": backend,
                "workload": job.workload,
                "head_dim": job.head_dim,
                "tokens": job.tokens,
                "causal": job.causal,
                "batch": job.batch,
                "heads": job.heads,
                "kv_heads": job.kv_heads,
                "dtype": "bfloat16",
                "flops": job.flops,
                "sparsity": sparsity.get((backend, name), 0.0),
                "ms": ms,
                "tflops": job.flops / ms / 1e9,
                "ratios": ratios,  # lower quartile, median, upper quartile
            }
        )
    return rows, notes


def working(peers: dict[str, Call], wait: Call) -> tuple[dict[str, Call], list[str]]:
    """Give the peers that run here, and a sentence for each that does not.

    ``wait`` returns when the GPU has done what was called.
    """
    works, refusals = {}, []
    for name, call in peers.items():
        try:
            call()
            wait()
        except Exception as reason:  # whatever another library says, ours are still to be timed
            said = str(reason).splitlines() or [type(reason).__name__]
            refusals.append(f"{name} does not run: {said[0]}")
        else:
            works[name] = call
    return works, refusals


def interleaved(gpu: Any, calls: dict[Any, Call], rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of every candidate in every round, each round in another order."""
    rng = np.random.default_rng(0)
    names = list(calls)
    for call in calls.values():
        call()
    times: dict[Any, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for i in rng.permutation(len(names)):
            times[names[i]].append(gpu.milliseconds(calls[names[i]]))
    return times


def ratio(mine: list[float], theirs: list[float]) -> list[float]:
    """How many times faster mine was in a round: lower quartile, median, upper quartile."""
    return statistics.quantiles(
        [b / a for a, b in zip(mine, theirs, strict=True)], n=4, method="inclusive"
    )


class Gpu:
    """Tensors, kernels and timers of PyTorch.

    Raises
    ------
    RuntimeError
        If PyTorch is not installed.
    """

    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            raise RuntimeError("bench needs PyTorch, for its kernels and its timers") from None
        self.torch: Any = torch

    def normal(self, shape: tuple[int, ...]) -> Any:
        """Draw bfloat16 numbers from N(0, 1)."""
        return self.torch.randn(shape, device="cuda", dtype=self.torch.bfloat16)

    def put(self, x: NDArray[np.float32], heads: int, batch: int) -> Any:
        """Copy [heads or 1, L, D] to the GPU as bfloat16 [batch, L, heads, D]."""
        one = self.torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, 0, 1)[None])).cuda()
        shape = (batch, x.shape[1], heads, x.shape[2])
        return one.to(self.torch.bfloat16).expand(shape).contiguous()

    def ours(
        self, backend: str, q: Any, k: Any, v: Any, causal: bool, threshold: float, **settings: Any
    ) -> Any:
        """Call the door."""
        from cuda_kernels.attention import skip_softmax_attention

        return skip_softmax_attention(
            q, k, v, causal=causal, threshold=threshold, backend=backend, **settings
        )

    def peers(self, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Call]:
        """Dense kernels of others that are installed; some may refuse to run."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}

        def of_pytorch(which: Any) -> Any:
            with sdpa_kernel(which):
                return self.torch.nn.functional.scaled_dot_product_attention(
                    *heads_first, is_causal=causal, **grouped
                )

        found: dict[str, Call] = {
            "fa2": partial(of_pytorch, SDPBackend.FLASH_ATTENTION),
            "cudnn": partial(of_pytorch, SDPBackend.CUDNN_ATTENTION),
        }
        try:
            from flash_attn_interface import flash_attn_func
        except ImportError:
            return found
        return {**found, "fa3": partial(flash_attn_func, q, k, v, causal=causal)}

    def wait(self) -> None:
        """Return when the GPU has done what it was asked to."""
        self.torch.cuda.synchronize()

    def milliseconds(self, call: Call) -> float:
        """Time one call on the GPU, the launch being queued while something else runs."""
        cuda = self.torch.cuda
        start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(1_000_000)
        start.record()
        call()
        stop.record()
        cuda.synchronize()
        return start.elapsed_time(stop)


def table(record: dict[str, Any]) -> str:
    """Lay a record out in aligned columns."""
    lines = [
        f"{'kernel':22}{'workload':16}{'D':>4}{'tokens':>8}{'heads':>7}{'mask':>8}{'sparsity':>10}"
        f"{'ms':>9}{'TFLOP/s':>9}  ratio (quartiles)"
    ]
    for row in record["rows"]:
        ratios = [
            f"{middle:.3f} ({low:.3f}–{high:.3f}) × {name}"
            for name, (low, middle, high) in row["ratios"].items()
        ]
        lines.append(
            f"{(row['backend'] + ' ' + row['kernel']).strip():22}{row['workload']:16}"
            f"{row['head_dim']:4}"
            f"{row['tokens']:8}{row['heads']:>4}/{row['kv_heads']:<2}"
            f"{'causal' if row['causal'] else 'full':>8}{row['sparsity']:10.3f}{row['ms']:9.3f}"
            f"{row['tflops']:9.0f}  {', '.join(ratios)}"
        )
    lines += record["notes"]
    lines.append(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    return "\n".join(lines)


def _bar(items: list[Any], progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, unit="shape", disable=not progress)
