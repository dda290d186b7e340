"""Ours against what is installed, in one run on one GPU: ``skip-softmax bench prefill``.

All candidates work on the same tensors, in random order in every round, because the card slows as
it heats; what counts is the median of per-round ratios.  FLOPs are 4 · D per visible pair and
head, so a kernel that skips is given the rate of a dense one that would take as long.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
TINY = 1e-30  # λ of the skip build on which nothing is skipped


def bench_prefill(*, quick: bool = False, progress: bool = True) -> dict[str, Any]:
    """Time prefill kernels and write every row to ``cuda_kernels/results/``.

    Parameters
    ----------
    quick : bool
        16K tokens only, 10 rounds: about a minute.  Otherwise 4K, 16K and 64K, 30 rounds.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    dict
        ``machine``, ``rows``, and ``path`` of the JSON written.

    Raises
    ------
    RuntimeError
        If there is no GPU that runs the tensor-core kernel, or no PyTorch.
    """
    torch = _torch()
    lengths, rounds = ((16_384,), 10) if quick else ((4096, 16_384, 65_536), 30)
    shapes = [
        (head_dim, length, causal)
        for head_dim in (128, 64)
        for length in lengths
        for causal in (False, True)
    ]
    rows: list[dict[str, Any]] = []
    for shape in _bar(shapes, progress):
        rows += _random(torch, *shape, rounds)
        if shape[1] == 16_384:
            for workload in ("columns", "scattered"):
                for sparsity in (0.5, 0.75) if shape[2] else (0.5, 0.75, 0.9):
                    rows += _prescribed(torch, workload, sparsity, *shape, rounds)
    record = {"machine": machine(torch), "rounds": rounds, "rows": rows}
    name = f"prefill-{record['machine']['gpu']}-{record['machine']['date'][:10]}.json"
    path = RESULTS / name.lower().replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return {**record, "path": str(path)}


def table(record: dict[str, Any]) -> str:
    """Lay a record out in aligned columns."""
    head = f"{'kernel':15}{'workload':22}{'D':>4}{'tokens':>8}{'mask':>8}{'sparsity':>10}"
    lines = [f"{head}{'ms':>9}{'TFLOP/s':>9}  ratio (quartiles)"]
    for row in record["rows"]:
        mask = "causal" if row["causal"] else "full"
        ratio = (
            f"{row['ratio']:.3f} ({row['ratio_quartiles'][0]:.3f}–{row['ratio_quartiles'][1]:.3f})"
        )
        lines.append(
            f"{row['kernel']:15}{row['workload']:22}{row['head_dim']:4}{row['tokens']:8}{mask:>8}"
            f"{row['sparsity']:10.3f}{row['ms']:9.3f}{row['tflops']:9.0f}"
            f"  {ratio} × {row['against']}"
        )
    machine_ = record["machine"]
    lines.append(", ".join(f"{key} {value}" for key, value in machine_.items()))
    return "\n".join(lines)


def machine(torch: Any) -> dict[str, str]:
    """Say what a run was made on."""
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    packages = ("numba", "numba-cuda", "numpy", "torch")
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda_driver": f"{version // 1000}.{version % 1000 // 10}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return __import__(name.replace("-", "_")).__version__


def _torch() -> Any:
    from cuda_kernels.backends import TENSOR_CORES, detect

    device = detect()
    if device.kind != "gpu" or (device.compute_capability or (0, 0)) < TENSOR_CORES:
        raise RuntimeError(
            f"bench needs a GPU from Ampere on: {device.reason or f'this is {device.name}'}"
        )
    try:
        import torch
    except ImportError:
        raise RuntimeError("bench needs PyTorch, for its kernels and its timers") from None
    return torch


def _bar(items: list[Any], progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, unit="shape", disable=not progress)


def _random(torch: Any, head_dim: int, length: int, causal: bool, rounds: int) -> list[dict]:
    """N(0, 1) inputs: dense, nothing skipped, and PyTorch's kernels."""
    heads = 16
    q, k, v = (
        torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    peers = _peers(torch, q, k, v, causal)
    ours = {
        "dense": lambda: _ours(q, k, v, causal, 0.0),
        "nothing skipped": lambda: _ours(q, k, v, causal, TINY),
    }
    times = _times(torch, {**peers, **ours}, rounds)
    common = _common(head_dim, length, causal, heads, "random")
    against = dict.fromkeys(peers, "fa2") | {"dense": "fa2", "nothing skipped": "dense"}
    return [_row(name, times, against[name], 0.0, common) for name in times]


def _prescribed(
    torch: Any,
    workload: str,
    sparsity: float,
    head_dim: int,
    length: int,
    causal: bool,
    rounds: int,
) -> list[dict]:
    """Prescribed sparsity: our skip build over our dense build, on the same tensors."""
    from sim import workloads

    heads = 16
    work = workloads.WORKLOADS[workload](length, head_dim, heads, sparsity=sparsity, causal=causal)
    q, k, v = (
        torch.from_numpy(np.moveaxis(x, 0, 1)[None]).cuda().to(torch.bfloat16).contiguous()
        for x in (work.q, work.k, work.v)
    )
    _, report = _ours(q, k, v, causal, 0.01, report=True)
    times = _times(
        torch,
        {
            "dense": lambda: _ours(q, k, v, causal, 0.0),
            "skip": lambda: _ours(q, k, v, causal, 0.01),
        },
        rounds,
    )
    common = _common(head_dim, length, causal, heads, f"{workload} {sparsity:g}")
    return [_row("skip", times, "dense", float(report.sparsity.mean()), common)]


def _ours(q: Any, k: Any, v: Any, causal: bool, threshold: float, report: bool = False) -> Any:
    from cuda_kernels.attention import skip_softmax_attention

    return skip_softmax_attention(
        q, k, v, causal=causal, threshold=threshold, backend="mma", return_report=report
    )


def _peers(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Callable[[], Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def with_backend(which: Any) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(which):
                return torch.nn.functional.scaled_dot_product_attention(
                    *heads_first, is_causal=causal
                )

        return call

    return {
        "fa2": with_backend(SDPBackend.FLASH_ATTENTION),
        "cudnn": with_backend(SDPBackend.CUDNN_ATTENTION),
    }


def _times(
    torch: Any, candidates: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round; the queue is kept full before each."""
    rng = np.random.default_rng(0)
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in rng.permutation(list(candidates)):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # the launch is queued while this runs
            start.record()
            candidates[name]()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    return times


def _common(head_dim: int, length: int, causal: bool, heads: int, workload: str) -> dict[str, Any]:
    pairs = length * (length + 1) // 2 if causal else length * length
    return {
        "workload": workload,
        "head_dim": head_dim,
        "tokens": length,
        "causal": causal,
        "heads": heads,
        "dtype": "bfloat16",
        "flops": 4 * head_dim * pairs * heads,
    }


def _row(
    name: str, times: dict[str, list[float]], against: str, sparsity: float, common: dict[str, Any]
) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(times[name], times[against], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    ms = statistics.median(times[name])
    return {
        "kernel": name,
        **common,
        "sparsity": sparsity,
        "ms": ms,
        "tflops": common["flops"] / ms / 1e9,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "against": against,
    }
