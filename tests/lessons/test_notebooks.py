"""The first kernel as a program, and notebooks in Jupyter."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from lessons import catalogue
from lessons.helpers import ROOT, child_environment

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


def test_first_kernel_size():
    assert len(catalogue.FIRST_KERNEL.read_text(encoding="utf-8").splitlines()) <= 250


@needs_jupyter
def test_first_kernel_is_a_notebook(tmp_path):
    outputs = execute(catalogue.FIRST_KERNEL, tmp_path)
    assert not [one for one in outputs if one["output_type"] == "error"]
    assert_agrees(printed(outputs))
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
