"""What a call costs the host: ``skip-softmax bench launch``.

Calls of one block of work, so that the GPU never keeps the host waiting: by a plan, through the
door, and through the door with a report, with arrays of PyTorch and of CuPy, by every tensor-core
back end that runs here; and the first call of a fresh process, with nothing kept on disk and with
compiled kernels there.  Two sets of arrays take turns, so that no call finds the addresses of the
one before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from cuda_kernels.benchmark import choose_backends
from cuda_kernels.machine import RESULTS, Record, describe

LIBRARIES = ("torch", "cupy")
SHAPE = (1, 64, 1, 64)
LIMITS = {"plan": 10.0, "door": 25.0}
"""Microseconds that these may take."""
BATCH = 200  # calls that are queued before the GPU is waited for


def bench_launch(
    *, calls: int = 10_000, progress: bool = True, results: Path = RESULTS
) -> dict[str, Any]:
    """Time calls on the host and write every row to ``cuda_kernels/results/``.

    Parameters
    ----------
    calls : int
        Of each kind.
    progress : bool
        Say on stderr what is being measured.
    results : path
        Folder of the JSON.

    Returns
    -------
    dict
        ``machine``, ``calls``, ``backends``, ``rows``, ``notes``, ``interrupted``, and ``path`` of
        the JSON.

    Raises
    ------
    ValueError
        If there are too few calls for quartiles.
    RuntimeError
        If there is no GPU that runs the tensor-core kernel, or neither PyTorch nor CuPy.
    """
    if calls < 4 * BATCH:
        raise ValueError(f"calls must be at least {4 * BATCH}, got {calls}")
    backends = choose_backends(None)
    installed = [name for name in LIBRARIES if find_spec(name) is not None]
    if not installed:
        raise RuntimeError("bench launch needs PyTorch or CuPy, for arrays on the GPU")
    record = Record("launch", describe(), results)
    record.fields |= {"calls": calls, "shape": list(SHAPE), "backends": backends}
    say: Callable[[str], Any] = tqdm_write if progress else lambda text: None
    with record:
        for library, backend in product(installed, backends):
            row = {"library": library, "backend": backend}
            with tempfile.TemporaryDirectory() as empty:
                for disk in ("cold", "warm"):
                    say(f"{library}, {backend}: first call of a process, {disk} disk")
                    what = {"what": f"first call, {disk} disk"}
                    record.add([row | what | first_call_of_a_process(library, backend, empty)], [])
            kinds, wait = ways(library, backend)
            for what, in_turn in kinds.items():
                say(f"{library}, {backend}: {what}")
                quartiles = microseconds(in_turn, wait, calls)
                record.add([row | {"what": what, "microseconds": quartiles}], [])
    return record.result()


def tqdm_write(text: str) -> None:
    """Say something on stderr, beside a progress bar or without one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def microseconds(
    in_turn: Sequence[Callable[[], Any]], wait: Callable[[], Any], calls: int
) -> list[float]:
    """Time a call on the host: lower quartile, median and upper quartile over batches of calls.

    Parameters
    ----------
    in_turn : sequence of callable
        One after the other, and from the first again.  Each is called once before the clock starts.
    wait : callable
        Waits for the GPU, between batches and off the clock.
    calls : int
        A batch is ``BATCH`` of them.
    """
    for call in in_turn:
        call()
    times = []
    for _ in range(calls // BATCH):
        wait()
        start = time.perf_counter()
        for _ in range(BATCH // len(in_turn)):
            for call in in_turn:
                call()
        times.append((time.perf_counter() - start) / BATCH * 1e6)
    wait()
    return statistics.quantiles(times, n=4, method="inclusive")


def ways(
    library: str, backend: str
) -> tuple[dict[str, list[Callable[[], Any]]], Callable[[], Any]]:
    """Make the calls to time on a GPU, each with two sets of arrays, and what waits for it."""
    from cuda_kernels.attention import skip_softmax_plan

    (first, wait), (second, _) = (_arrays(library) for _ in range(2))
    plan = skip_softmax_plan(*first[:3], threshold=0.1, backend=backend)
    one, other = (_calls(plan, backend, *arrays) for arrays in (first, second))
    return {what: [one[what], other[what]] for what in one}, wait


def _calls(
    plan: Any, backend: str, q: Any, k: Any, v: Any, out: Any
) -> dict[str, Callable[[], Any]]:
    from cuda_kernels.attention import skip_softmax_attention

    return {
        "plan": lambda: plan(q, k, v, out=out),
        "door": lambda: skip_softmax_attention(q, k, v, threshold=0.1, out=out, backend=backend),
        "door, output allocated": lambda: skip_softmax_attention(
            q, k, v, threshold=0.1, backend=backend
        ),
        "door, with a report": lambda: skip_softmax_attention(
            q, k, v, threshold=0.1, out=out, backend=backend, return_report=True
        ),
    }


def _arrays(library: str) -> tuple[list[Any], Callable[[], Any]]:
    if library == "torch":
        import torch

        made = [torch.zeros(SHAPE, dtype=torch.float16, device="cuda") for _ in range(4)]
        return made, torch.cuda.synchronize
    import cupy

    made = [cupy.zeros(SHAPE, cupy.float16) for _ in range(4)]
    return made, cupy.cuda.get_current_stream().synchronize


def first_call_of_a_process(library: str, backend: str, cache: str) -> dict[str, Any]:
    """Start Python anew, with its compiled kernels kept in ``cache``, and time what it does first.

    Returns
    -------
    dict
        ``seconds``: of starting Python and importing, of the first arrays (the library's start and
        the GPU's), of the first call until its result is there, and of a second call.
    """
    environment = os.environ | {"SKIP_SOFTMAX_CACHE_DIR": cache}
    code = (
        "from cuda_kernels.benchmark_launch import first_call; "
        f"first_call({library!r}, {backend!r}, {time.time()!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process of a first call with {library} failed: {last}")
    return {"seconds": json.loads(done.stdout.splitlines()[-1])}


def first_call(library: str, backend: str, started: float) -> None:
    """Do in a fresh process what :func:`first_call_of_a_process` times, and print the seconds."""
    from cuda_kernels.attention import skip_softmax_attention

    marks = [("start", started), ("imports", time.time())]
    (q, k, v, out), wait = _arrays(library)
    wait()
    marks.append(("arrays", time.time()))
    for which in ("first call", "second call"):
        skip_softmax_attention(q, k, v, threshold=0.1, out=out, backend=backend)
        wait()
        marks.append((which, time.time()))
    spans = zip(marks[1:], marks, strict=False)
    print(json.dumps({name: round(end - begin, 6) for (name, end), (_, begin) in spans}))


def launch_table(record: dict[str, Any]) -> str:
    """Lay a record out in aligned columns."""
    lines = []
    for row in record["rows"]:
        head = f"{row['library']:7}{row['backend']:7}{row['what']:26}"
        if "seconds" in row:
            spans = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row["seconds"].items())
            lines.append(f"{head}{spans}")
            continue
        low, middle, high = row["microseconds"]
        limit = LIMITS.get(row["what"])
        bar = f"  (bar: {limit:g})" if limit else ""
        lines.append(f"{head}{middle:8.1f} µs  ({low:.1f}–{high:.1f}){bar}")
    lines += record["notes"]
    lines.append(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    return "\n".join(lines)
