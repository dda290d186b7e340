"""The notebooks as programs, and in Jupyter; on a GPU that is played, too."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cuda_kernels
from cuda_kernels import benchmark
from lessons import catalogue, helpers
from lessons.helpers import OUTPUT, ROOT, child_environment

pytestmark = [
    pytest.mark.cudasim,
    pytest.mark.skipif(
        importlib.util.find_spec("numba") is None, reason="numba has no wheel for this machine"
    ),
]
needs_jupyter = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jupytext", "nbclient", "ipykernel")),
    reason="jupytext, nbclient and ipykernel are not installed (extra: notebooks)",
)

EXECUTE = """
import sys, jupytext, nbclient, nbformat
notebook = jupytext.read(sys.argv[1], fmt="py:percent")
nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
nbformat.write(notebook, sys.argv[2])
"""


def execute(path, tmp_path):
    """Run a percent script as a notebook; give the outputs of its cells."""
    out = tmp_path / "out.ipynb"
    subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(out)],
        env=child_environment() | {"NUMBA_ENABLE_CUDASIM": "1"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=200,
    )
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def printed(outputs):
    return "".join(x for one in outputs if one["output_type"] == "stream" for x in one["text"])


def assert_agrees(text):
    assert re.search(r"^kernel: simt$", text, re.M)
    assert re.search(r"^tiles that differ: 0 of 19$", text, re.M)
    assert re.search(r"^guarantee holds: True$", text, re.M)
    gap, output = re.findall(r"^largest difference of (?:a gap|the output): (\S+)$", text, re.M)
    assert float(gap) < 1e-3
    assert float(output) < 2e-3
    sparsity = float(re.search(r"tiles\): \[\[(\S+)\]\]", text)[1])
    assert 0.1 < sparsity < 0.9


def test_first_kernel_is_a_program(program, slack):
    done = program(catalogue.FIRST_KERNEL)
    assert (done.status, done.stderr) == (0, "")
    assert done.seconds <= 15 * slack
    assert_agrees(done.stdout)


@pytest.mark.parametrize("path", catalogue.NOTEBOOKS, ids=lambda path: path.stem)
def test_size(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


def assert_emulated(text):
    """What run_the_kernels says where there is no GPU: nothing of it was launched or timed."""
    assert "kernels in this notebook are emulated on the CPU" in text
    for name in ("mma", "wgmma"):
        assert re.search(rf"^{name} +does not: the {name} kernel cannot run on Numba's", text, re.M)
        (part,) = re.findall(rf"^{name}, emulated on the CPU.*\n((?:  .*\n)+)", text, re.M)
        assert "tiles that differ: 0 of 6" in part
        gap, output = re.findall(r"largest difference of (?:a gap|the output): (\S+)", part)
        assert float(gap) < 1e-3
        assert float(output) < 2e-3
        assert "bound holds: True" in part
        assert re.search(rf"^{name}, emulated: .* 33\.3% of visited tiles skipped", text, re.M)
    assert "no plan: the mma kernel cannot run on Numba's CUDA simulator" in text
    assert "not assembled here: numba-cuda is not installed, or is told to simulate" in text
    newest = benchmark.recorded()["machine"]
    said = f"Recorded on {newest['gpu']}, {newest['date']}; nothing was timed here:"
    table = text[text.index(said) :]
    assert re.search(r"^mma skip +columns 0\.5 +128 ", table, re.M)
    assert "on a machine with a GPU and ncu: ncu --set full" in table


def test_run_the_kernels_is_a_program(program, slack):
    done = program(catalogue.RUN_THE_KERNELS)
    assert (done.status, done.stderr) == (0, "")
    assert done.seconds <= 15 * slack
    assert_emulated(done.stdout)


class OfCupy(np.ndarray):
    """An array of NumPy that looks like one of CuPy."""

    get = np.ndarray.__array__
    device = "a GPU that is played"


OfCupy.__module__ = "cupy"


@pytest.fixture
def played_gpu(monkeypatch):
    """A Hopper GPU with CuPy and PyTorch, whose kernels are the simulator."""
    card = cuda_kernels.Device("gpu", "", "NVIDIA H200", (9, 0))
    find, door, measured = importlib.util.find_spec, cuda_kernels.skip_softmax_attention, []

    def call(q, k, v, *, backend=None, emulate=False, **settings):
        assert isinstance(q, OfCupy)
        assert not emulate
        assert backend in (None, "mma", "wgmma")
        plain = (x.view(np.ndarray) for x in (q, k, v))
        out, report = door(*plain, backend="reference", **settings)
        return out.view(OfCupy), dataclasses.replace(report, backend=backend or "wgmma")

    class Plan:
        def __init__(self, q, k, v, **settings):
            self.settings = settings

        def __call__(self, *qkv):
            out, self.report = call(*qkv, return_report=True, **self.settings)
            return out

    def measure(job, gpu, backends, rounds):
        measured.append((job.workload, job.head_dim, tuple(backends), rounds))
        ratios = {"fa2": [1.0, 1.5, 2.0]}
        row = {"kernel": "dense", "backend": "mma", "sparsity": 0.0, "ms": 2.0, "tflops": 3.0}
        fields = {x: getattr(job, x) for x in ("workload", "tokens", "head_dim", "heads")}
        fields |= {"kv_heads": job.kv_heads, "causal": job.causal, "ratios": ratios}
        return [row | fields], ["played"]

    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")  # nobody asks for CUDASIM
    monkeypatch.setattr(cuda_kernels, "detect", lambda: card)
    monkeypatch.setattr(cuda_kernels, "skip_softmax_attention", call)
    monkeypatch.setattr(cuda_kernels, "skip_softmax_plan", Plan)
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "Gpu", object)
    monkeypatch.setattr("cuda_kernels.machine.describe", lambda: {"gpu": card.name})
    monkeypatch.setattr("cuda_kernels.launch.why_not_assemble", lambda: "no assembler: played")
    cupy = SimpleNamespace(asarray=lambda x: x.view(OfCupy))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    there = lambda name: name in ("cupy", "torch") or find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", there)
    monkeypatch.setattr(helpers, "find_spec", there)
    return measured


@pytest.mark.parametrize("path", catalogue.NOTEBOOKS, ids=lambda path: path.stem)
def test_on_a_gpu_nothing_is_emulated_or_recorded(path, played_gpu, capsys):
    """No kernel is launched here: this runs the lines that a laptop leaves out."""
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "__main__"})
    text = capsys.readouterr().out
    assert text.startswith("gpu: NVIDIA H200\n")
    assert re.search(r"tiles that differ: 0 of 3168\b", text)
    assert re.search(r"(bound|guarantee) holds: True", text)
    assert "emulated" not in text
    picture = Image.open(OUTPUT / f"{path.stem}.png")
    assert picture.getpixel((0, 0)) == (255, 255, 255)  # not yet the map: axes, legend
    assert min(picture.size) > 384
    if path == catalogue.RUN_THE_KERNELS:
        assert "kernels in this notebook are launched on NVIDIA H200" in text
        assert "asked for below: mma, wgmma\n" in text
        assert re.search(r"^plan, launched: .* by wgmma>$", text, re.M)
        assert "as the door's, bit for bit: True" in text
        assert "Recorded" not in text
        workloads = ["random", "columns 0.5", "columns 0.9"]
        assert played_gpu == [(name, 128, ("mma", "wgmma"), 10) for name in workloads]
        assert "1.500 (1.000–2.000) × fa2" in text[text.index("Measured here and now:") :]
    else:
        assert "on a GPU that is played" in text


@needs_jupyter
def test_first_kernel_is_a_notebook(tmp_path):
    outputs = execute(catalogue.FIRST_KERNEL, tmp_path)
    assert not [one for one in outputs if one["output_type"] == "error"]
    assert_agrees(printed(outputs))
    assert any("image/png" in one.get("data", {}) for one in outputs)


@needs_jupyter
def test_run_the_kernels_is_a_notebook(tmp_path):
    outputs = execute(catalogue.RUN_THE_KERNELS, tmp_path)
    assert not [one for one in outputs if one["output_type"] == "error"]
    assert_emulated(printed(outputs))
    assert any("image/png" in one.get("data", {}) for one in outputs)


@needs_jupyter
def test_a_lesson_that_reads_its_own_source_is_a_notebook(tmp_path):
    solution = next(one.solution for one in catalogue.lessons() if one.number == 5)
    outputs = execute(solution, tmp_path)
    assert not [one for one in outputs if one["output_type"] == "error"]
    assert "tiles unlike the simulator's: 0" in printed(outputs)


@needs_jupyter
def test_an_unsolved_notebook_says_one_sentence(tmp_path):
    lesson = catalogue.lessons()[0]
    outputs = execute(lesson.path, tmp_path)
    errors = [one for one in outputs if one["output_type"] == "error"]
    task = re.search(r'helpers\.todo\("(.+)"\)', lesson.path.read_text(encoding="utf-8"))[1]
    assert errors[0]["traceback"] == [f"To do in the cell above\n  {task}"]


def test_helpers_import_no_numba():
    modules = "lessons.checks, lessons.pictures, lessons.runner"
    code = f"import sys, {modules}; print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(),
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
