"""What ``compare_builds.py`` makes of builds, with plans and a GPU played."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import compare_builds
import numpy as np
import pytest

from cuda_kernels import disk_cache, plan
from cuda_kernels.benchmark import Job
from cuda_kernels.kernel import Kernel


@dataclass
class PlayedGpu:
    """Its calls take as long as they say."""

    log: list

    def wait(self):
        """Say that all is done."""
        self.log.append("waited")

    def milliseconds(self, call):
        """Launch, and tell how long that build takes."""
        call()
        return call.func.took


@dataclass
class PlayedPlan:
    """Gives the same output, or another one, and takes as long as it is told."""

    took: float
    value: float
    log: list

    def __call__(self, q, k, v, out=None):
        self.log.append(self.took)
        return q + self.value

    @property
    def report(self):
        return SimpleNamespace(state=np.ones(3, np.uint8))


def test_builds_are_timed_in_turns_and_compared_with_the_tree():
    log = []
    plans = {None: (4.0, 0.0), "p.quick": (2.0, 0.0), "p.wrong": (8.0, 1.0)}
    job = Job("random", 4096, 64, 1, 1, False, {"skip": 0.5}, lambda gpu: 3 * (np.zeros(2),))

    def make_plan(module, q, k, v, causal, threshold):
        assert (causal, threshold) in ((False, 0.0), (False, 0.5))
        return PlayedPlan(*plans[module], log)

    modules = {"tree": None, "quick": "p.quick", "wrong": "p.wrong"}
    rows = list(compare_builds.compare(job, job.make(None), modules, PlayedGpu(log), make_plan, 4))
    assert [(kernel, name) for kernel, name, *_ in rows] == [
        (kernel, name) for kernel in ("dense", "skip") for name in modules
    ]
    assert [row[2][1] for row in rows] == [1.0, 2.0, 0.5] * 2
    assert [bool(row[3]) for row in rows] == [False, False, True] * 2
    rounds = log[log.index("waited") + 4 :][:12]  # after each has been launched once more
    assert all(sorted(rounds[i : i + 3]) == [2.0, 4.0, 8.0] for i in range(0, 12, 3))
    assert len({tuple(rounds[i : i + 3]) for i in range(0, 12, 3)}) > 1


def test_dense_is_timed_for_one_workload_alone():
    make = lambda gpu: 3 * (np.zeros(2),)  # noqa: E731
    job = Job("columns 0.5", 4096, 64, 1, 1, False, {"skip": 0.01}, make, 0.5)
    plans = compare_builds.compare(
        job, make(None), {"tree": None}, PlayedGpu([]), lambda *_: PlayedPlan(1.0, 0.0, []), 2
    )
    assert [kernel for kernel, *_ in plans] == ["skip"]


def test_a_file_becomes_a_module_whose_builds_are_kept(tmp_path, monkeypatch):
    source = tmp_path / "old.py"
    source.write_text("SIGNATURE = 0\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    modules = compare_builds.adopt([source], folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(disk_cache, "_LOADED_AT", float("inf"))  # it is no change of ours
    kernel = Kernel(modules["old"], (64, 64, 1, 1, 0))
    assert disk_cache.entry_name((kernel.module,), *kernel.arguments)
    sys.modules.pop(compare_builds.PACKAGE, None)


@pytest.mark.parametrize("name", ["tree.py", "prefill-mma.py"])
def test_names_that_cannot_be_told_apart_or_imported(tmp_path, name):
    with pytest.raises(ValueError, match="names of their own"):
        compare_builds.adopt([tmp_path / name], tmp_path)


def test_plans_launch_the_build_within_and_the_tree_s_again_behind():
    recipe = plan.RECIPES["mma"]
    with compare_builds.launching("mma", "builds_on_trial.old"):
        assert plan.RECIPES["mma"] is not recipe
    assert plan.RECIPES["mma"] is recipe
    with compare_builds.launching("mma", None):
        assert plan.RECIPES["mma"] is recipe


def test_what_cannot_be_made_is_said_and_the_rest_still_compared(monkeypatch, capsys, tmp_path):
    def out_of_reach(gpu):
        raise ValueError("sparsity 0.9 is out of reach")

    fine = Job("random", 4096, 64, 1, 1, True, {"skip": 0.5}, lambda gpu: 3 * (np.zeros(2),))
    work = [Job("columns 0.9", 4096, 64, 1, 1, True, {"skip": 0.01}, out_of_reach, 0.9), fine]
    monkeypatch.setattr(compare_builds, "Gpu", lambda: PlayedGpu([]))
    monkeypatch.setattr(
        "cuda_kernels.attention.skip_softmax_plan", lambda *_, **__: PlayedPlan(1.0, 0.0, [])
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = SimpleNamespace(backend="mma", rounds=2)
    compare_builds.show(asked, str(tmp_path), {"tree": None}, lambda: work)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=4) == [
        "columns",
        "0.9",
        "64",
        "causal",
        "sparsity 0.9 is out of reach",
    ]
    assert [line.split()[3:5] for line in others] == [["dense", "tree"], ["skip", "tree"]]


def test_wrong_use_is_one_sentence(capsys):
    assert compare_builds.main(["mma", "old.py", "--workload", "nothing"]) == 2
    assert capsys.readouterr().err == "no workload has such a head_dim, mask and name\n"
