"""Sweeps: every job once, in order, whatever ends midway, and whoever does it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sim import sweep as module
from sim.sweep import SweepError, processes, read_results, sweep

WORK = """
import os, time
from pathlib import Path

def square(job):
    with open(Path(__file__).with_name("log"), "a") as file:
        file.write(f"{job['n']} {os.getpid()}\\n")
    if job.get("die") and not Path(__file__).with_name("dead").exists():
        Path(__file__).with_name("dead").write_text("")
        os._exit(3)
    if job.get("fail"):
        raise ValueError(f"{job['n']} is no good")
    time.sleep(job.get("time", 0))
    return {"square": job["n"] ** 2, "of": job["n"] / 3}
"""
ABOUT = {"model": "a model", "texts": ["é"]}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A work function that other processes can import, and the folder where it logs its calls."""
    folder = tmp_path / "work"
    folder.mkdir()
    name = f"sweep_work_{tmp_path.name}"
    (folder / f"{name}.py").write_text(WORK)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return __import__(name).square


def calls(tmp_path) -> list[int]:
    log = tmp_path / "work" / "log"
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def pids(tmp_path) -> list[int]:
    return [int(line.split()[1]) for line in (tmp_path / "work" / "log").read_text().splitlines()]


JOBS = [{"n": n, "λ": 0.1} for n in range(7)]
RESULTS = [{"square": n**2, "of": n / 3} for n in range(7)]


@pytest.mark.parametrize("workers", [1, 2])
def test_all_jobs_are_done_in_order_and_kept(work, tmp_path, workers):
    path = tmp_path / "a" / "results.jsonl"
    assert sweep(JOBS, work, path, about=ABOUT, workers=workers) == RESULTS
    assert sorted(calls(tmp_path)) == list(range(7))
    assert (os.getpid() in pids(tmp_path)) == (workers == 1)
    about, kept = read_results(path)
    assert about == ABOUT
    assert sorted(kept, key=lambda one: one[0]["n"]) == list(zip(JOBS, RESULTS, strict=True))
    assert sweep(JOBS, work, path, about=ABOUT, workers=workers) == RESULTS
    assert len(calls(tmp_path)) == 7


def test_an_interrupted_sweep_goes_on(work, tmp_path):
    path = tmp_path / "results.jsonl"
    seen = []

    def interrupted(job):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(job["n"])
        return work(job)

    with pytest.raises(KeyboardInterrupt):
        sweep(JOBS, interrupted, path, about=ABOUT)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"job": {"n": 3')  # as if it had ended while it wrote
    assert sweep(JOBS, work, path, about=ABOUT) == RESULTS
    assert calls(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 8
    assert len(read_results(path)[1]) == 7


def test_a_killed_sweep_loses_nothing(work, tmp_path):
    """The whole process tree's parent is killed in the middle; the file holds what was done."""
    path = tmp_path / "results.jsonl"
    program = (
        f"from {work.__module__} import square\nfrom sim.sweep import sweep\n"
        "jobs = [{'n': n, 'λ': 0.1, 'time': 0.1} for n in range(50)]\n"
        f"sweep(jobs, square, {str(path)!r}, about={ABOUT!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") > 3):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    done = path.read_bytes().count(b"\n") - 1
    assert 3 <= done < 50
    jobs = [{"n": n, "λ": 0.1, "time": 0.1} for n in range(done + 2)]
    before = len(calls(tmp_path))
    results = sweep(jobs, work, path, about=ABOUT)
    assert [one["square"] for one in results] == [n**2 for n in range(done + 2)]
    assert len(calls(tmp_path)) - before <= 2


def test_more_jobs_later_and_others_in_the_file_are_no_matter(work, tmp_path):
    path = tmp_path / "results.jsonl"
    sweep(JOBS[2:5], work, path, about=ABOUT)
    assert sweep(JOBS[::-1], work, path, about=ABOUT) == RESULTS[::-1]
    assert sweep(JOBS[6:], work, path, about=ABOUT) == RESULTS[6:]
    assert len(calls(tmp_path)) == 7


def test_a_worker_that_ends_is_one_sentence_and_loses_nothing(work, tmp_path):
    path = tmp_path / "results.jsonl"
    jobs = [{"n": n, "die": n == 4, "time": 0.05} for n in range(7)]
    with pytest.raises(RuntimeError, match=r"a worker process ended midway.*what is done is kept"):
        sweep(jobs, work, path, about=ABOUT, workers=2)
    kept = {job["n"] for job, _ in read_results(path)[1]}
    assert 4 not in kept
    before = calls(tmp_path)
    assert [x["square"] for x in sweep(jobs, work, path, about=ABOUT, workers=2)] == [
        n**2 for n in range(7)
    ]
    assert not kept & set(calls(tmp_path)[len(before) :])


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_work_says_is_said(work, tmp_path, workers):
    jobs = [{"n": n, "fail": n == 5} for n in range(7)]
    with pytest.raises(ValueError, match="5 is no good"):
        sweep(jobs, work, tmp_path / "r", about=ABOUT, workers=workers)
    assert len(read_results(tmp_path / "r")[1]) >= 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"about": {"model": "another"}}\n', "another sweep: model, texts differ"),
        ("no json\n", "damaged: line 1 is no result"),
        ('{"about": {}}\n[1]\n{"job": 1, "result": 2}\n', "damaged: line 2 is no result"),
        ('{"job": 1, "result": 2}\n', "damaged: line 1 is no result"),
        ("\x00\xff\n", "damaged: line 1 is no result"),
    ],
)
def test_other_files_are_refused_and_left_alone(work, tmp_path, content, sentence):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SweepError, match=sentence):
        sweep(JOBS, work, path, about=ABOUT)
    assert path.read_bytes() == content.encode("latin-1")
    assert calls(tmp_path) == []


def test_an_empty_file_is_none(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(SweepError, match="is empty"):
        read_results(tmp_path / "r")


def test_bad_arguments_are_refused(work, tmp_path):
    with pytest.raises(ValueError, match="jobs must all be different"):
        sweep([*JOBS, JOBS[0]], work, tmp_path / "r", about=ABOUT)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        sweep(JOBS, work, tmp_path / "r", about=ABOUT, workers=0)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("partly", [True, False])
def test_a_full_disk_keeps_what_was_done(work, tmp_path, monkeypatch, partly):
    path, real, count = tmp_path / "results.jsonl", module._write, []

    class Full:
        name = str(path)

        def __init__(self, file):
            self.file = file

        def write(self, data):
            if not partly:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:9])

    def write(file, line):
        count.append(line)
        real(Full(file) if len(count) == 4 else file, line)

    monkeypatch.setattr(module, "_write", write)
    with pytest.raises(OSError, match="No space left on device; what was done before is kept"):
        sweep(JOBS, work, path, about=ABOUT)
    monkeypatch.undo()
    assert len(read_results(path)[1]) == 2
    assert sweep(JOBS, work_of(tmp_path), path, about=ABOUT) == RESULTS
    assert calls(tmp_path) == [0, 1, 2, 2, 3, 4, 5, 6]


def work_of(tmp_path):
    """The work function again, after its import path is gone."""
    return sys.modules[f"sweep_work_{tmp_path.name}"].square


def test_processes_are_as_many_as_cores_and_memory_allow():
    assert processes(1) >= 1
    assert processes(1 << 60) == 1
    if hasattr(os, "sched_getaffinity"):
        assert processes(1) == len(os.sched_getaffinity(0))


def test_progress_counts_what_was_done_before(work, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    sweep(JOBS[:3], work, path, about=ABOUT)
    sweep(JOBS, work, path, about=ABOUT, progress=True)
    assert "7/7" in capsys.readouterr().err


def test_without_dask_there_is_one_sentence(work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RuntimeError, match=r"a scheduler needs distributed: .*'\.\[cluster\]'"):
        sweep(JOBS, work, tmp_path / "r", about=ABOUT, scheduler="tcp://127.0.0.1:9")


@pytest.fixture
def cluster(work):
    """Two Dask workers in processes of their own, and no web page."""
    distributed = pytest.importorskip("distributed", reason="needs the cluster extra: Dask")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        host="127.0.0.1",
        silence_logs=50,
    ) as one:
        yield one


@pytest.mark.filterwarnings("ignore")  # Dask's own, while a worker is replaced
def test_a_cluster_gives_the_same_although_a_worker_ends(work, tmp_path, cluster):
    jobs = [{"n": n, "time": 0.2} for n in range(20)]
    path = tmp_path / "results.jsonl"

    ended = []

    def end_a_worker():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") > 3:
                begun = pids(tmp_path)
                os.kill(begun[-1], signal.SIGKILL)
                ended.append((begun[-1], len(begun)))
                return
            time.sleep(0.02)

    killer = threading.Thread(target=end_a_worker)
    killer.start()
    results = sweep(jobs, work, path, about=ABOUT, scheduler=cluster.scheduler_address)
    killer.join()
    ((worker, begun),) = ended
    assert begun < 15
    later = pids(tmp_path)[begun + 1 :]  # it may have begun one more before it died
    assert len(later) > 3
    assert worker not in later
    alone = sweep(jobs, work, tmp_path / "alone.jsonl", about=ABOUT)
    assert results == alone
    lines = sorted(path.read_text(encoding="utf-8").splitlines())
    assert lines == sorted((tmp_path / "alone.jsonl").read_text(encoding="utf-8").splitlines())
    assert json.loads(lines[0])["about"] == ABOUT
    assert sweep(jobs, work, path, about=ABOUT, scheduler=cluster.scheduler_address) == alone


def test_a_scheduler_that_is_not_there_is_one_sentence(work, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs the cluster extra: Dask")
    real = distributed.Client
    monkeypatch.setattr(
        distributed, "Client", lambda *args, **kwargs: real(*args, **{**kwargs, "timeout": "1s"})
    )
    with pytest.raises(RuntimeError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9'"):
        sweep(JOBS, work, tmp_path / "r", about=ABOUT, scheduler="tcp://127.0.0.1:9")
