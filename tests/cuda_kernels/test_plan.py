"""A prefill plan's calls, with a launcher that only notes what it would launch with."""

import numpy as np
import pytest

from cuda_kernels import Device, skip_softmax_plan


class NotingLauncher:
    """Keeps the addresses that are not given, as the real one does."""

    def __init__(self, *_):
        self.at = []

    def __call__(self, stream, *addresses):
        assert stream == 0
        self.at[: len(addresses)] = addresses


@pytest.fixture
def noting(monkeypatch):
    monkeypatch.setattr("cuda_kernels.gpu.current", lambda: None)
    monkeypatch.setattr("cuda_kernels.attention.detect", lambda: Device("gpu", "", "Card", (9, 0)))
    monkeypatch.setattr("cuda_kernels.attention._check_device", lambda *_: None)
    monkeypatch.setattr("cuda_kernels.launch.load", lambda *_: 7)
    monkeypatch.setattr("cuda_kernels.launch.Launcher", NotingLauncher)


def arrays():
    return [np.zeros((1, 64, 1, 64), np.float16) for _ in range(4)]


def starts(*given):
    return [x.ctypes.data for x in given]


def fields(report):
    return starts(report.lse, report.dropped_mass_bound, report.state, report.gap)


@pytest.mark.parametrize(("asked", "takes"), [("mma", "mma"), (None, "wgmma")])
def test_a_plan_writes_its_own_report_and_another_one_only_when_asked(noting, asked, takes):
    plan = skip_softmax_plan(*arrays()[:3], threshold=0.1, gap=True, backend=asked)
    assert plan.report.backend == takes
    at = plan._launcher.at
    for _ in range(2):
        for _ in range(2):
            q, k, v, out = arrays()
            assert plan(q, k, v, out=out) is out
            assert at[:4] == starts(q, k, v, out)
            assert at[6:] == fields(plan.report)
        report = plan.fresh(q, k, v, out)
        assert at[6:] == fields(report) != fields(plan.report)
        assert at[4:6] == starts(*plan._constants)
    with pytest.raises(ValueError, match="v must be as planned"):
        plan(q, k, v[:, :32], out=out)
    assert at[:4] == starts(q, k, v, out)
