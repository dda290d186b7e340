"""Many jobs on all cores or on a cluster, nothing lost when interrupted.

A job is a dictionary ready for JSON; the work is a function of it that gives another.  Every
finished job becomes one line of a results file at once, and a sweep that finds its file skips
what is done there.  Which process or machine did a job makes no difference to its line.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Work = Callable[[Job], dict[str, Any]]


class SweepError(ValueError):
    """A results file that is damaged or of another sweep, in one sentence."""


def sweep(
    jobs: Sequence[Job],
    work: Work,
    results: str | os.PathLike[str],
    *,
    about: dict[str, Any],
    workers: int = 1,
    scheduler: str | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Do all jobs that a results file does not hold yet.

    Parameters
    ----------
    jobs : sequence of dict
        Ready for JSON, all different.
    work : callable
        Importable by other processes; is given a job and gives a result ready for JSON.
    results : path
        One JSON line a finished job, after a first line with ``about``.
    about : dict
        What all jobs share (model, texts); a file that says otherwise is refused.
    workers : int
        Processes; 1 works in this one.
    scheduler : str, optional
        Address of a Dask scheduler, such as ``tcp://10.0.0.1:8786``, instead of processes.
        Jobs of a worker that ends are done by the others.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    list of dict
        The results, in the order of ``jobs``, whoever did them and when.

    Raises
    ------
    SweepError
        If the results file is of something else or damaged.
    ValueError
        If jobs are not all different or ``workers`` is below 1.
    RuntimeError
        If a worker process ends midway, the scheduler cannot be reached, or Dask is missing.
    OSError
        If the results cannot be written; what was written before is kept.
    """
    names = [_name(job) for job in jobs]
    if len(set(names)) < len(names):
        raise ValueError("jobs must all be different")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    path = Path(results)
    done = _read(path, about)
    todo = [job for job, name in zip(jobs, names, strict=True) if name not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        if not file.tell():
            _write(file, {"about": about})
        with _bar(len(jobs), len(jobs) - len(todo), progress) as step:
            for job, result in _finished(todo, work, workers, scheduler):
                _write(file, {"job": job, "result": result})
                done[_name(job)] = result
                step()
    return [done[name] for name in names]


def read_results(results: str | os.PathLike[str]) -> tuple[dict[str, Any], list[tuple[Job, Any]]]:
    """Read a results file.

    Returns
    -------
    about : dict
    results : list of (job, result)

    Raises
    ------
    SweepError
        If it is no results file.
    OSError
        If it cannot be read.
    """
    about, lines, _ = _parse(Path(results))
    if about is None:
        raise SweepError(f"{results} is empty")
    return about, [(line["job"], line["result"]) for line in lines]


def processes(bytes_each: int) -> int:
    """Give how many processes to run: one a core, as far as memory goes.

    Parameters
    ----------
    bytes_each : int
        Memory that one process needs.

    Returns
    -------
    int
        At least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows does not say
        memory = 8 << 30
    return max(min(cores or 1, memory * 3 // 4 // bytes_each), 1)


def _finished(
    jobs: Sequence[Job], work: Work, workers: int, scheduler: str | None
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Do jobs and give each with its result, in any order."""
    if scheduler is not None:
        yield from _on_dask(jobs, work, scheduler)
    elif workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, work(job)
    else:
        yield from _in_processes(jobs, work, min(workers, len(jobs)))


def _in_processes(
    jobs: Sequence[Job], work: Work, workers: int
) -> Iterator[tuple[Job, dict[str, Any]]]:
    # spawn: torch does not survive a fork once it has run threads
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process ended midway, perhaps for want of memory; what is done is kept: "
            "run it again, with fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_dask(
    jobs: Sequence[Job], work: Work, scheduler: str
) -> Iterator[tuple[Job, dict[str, Any]]]:
    try:
        from distributed import Client, KilledWorker, as_completed
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"a scheduler needs {error.name}: python -m pip install -e '.[cluster]'"
        ) from None
    try:
        client = Client(scheduler, timeout="20s", set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise RuntimeError(f"no Dask scheduler answers at {scheduler!r}") from error
    try:
        # pure=False: the same job in another sweep is another task
        futures = {client.submit(work, job, pure=False): job for job in jobs}
        for future in as_completed(list(futures), loop=client.loop):
            yield futures[future], future.result()
            future.release()
    except (KilledWorker, CancelledError) as error:
        raise RuntimeError(
            f"the Dask cluster gave a job up ({type(error).__name__}), perhaps for want of "
            "memory; what is done is kept: run it again"
        ) from None
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"a Dask worker lacks {error.name}: install this package there, with its capture extra"
        ) from None
    finally:
        client.close()


@contextmanager
def _bar(total: int, done: int, shown: bool) -> Iterator[Callable[[], object]]:
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="job", smoothing=0) as bar:
        yield bar.update


def _name(job: Job) -> str:
    return json.dumps(job, sort_keys=True, ensure_ascii=False)


def _write(file: Any, line: dict[str, Any]) -> None:
    """Append one line to an unbuffered file and make it last."""
    data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        if file.write(data) < len(data):  # part of it: no more room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        said = f"{error.strerror}; what was done before is kept: make room and run it again"
        raise OSError(error.errno, said, file.name) from None


def _read(path: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results so far; cuts off a last line that was being written when a sweep ended."""
    if not path.exists():
        return {}
    before, lines, whole = _parse(path)
    with path.open("r+b") as file:
        file.truncate(whole)
    if before is not None and before != json.loads(_name(about)):
        other = [key for key in {**before, **about} if before.get(key) != about.get(key)]
        raise SweepError(
            f"{path} holds results of another sweep: {', '.join(other)} differ; "
            "choose another folder"
        )
    return {_name(line["job"]): line["result"] for line in lines}


def _parse(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """First line's ``about``, the other lines, and the bytes that whole lines take."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            one = json.loads(line)
        except ValueError:
            one = None
        expected = {"about"} if number == 1 else {"job", "result"}
        if not isinstance(one, dict) or set(one) != expected:
            raise SweepError(f"{path} is damaged: line {number} is no result")
        lines.append(one)
    return (lines[0]["about"] if lines else None), lines[1:], whole
