"""The teaching kernel against the simulator: in Numba's CUDA simulator, and on a GPU if any."""

import os
import subprocess
import sys
from pathlib import Path

import contract
import numpy as np
import pytest
from cases import CASES
from run_cases import run

from cuda_kernels import detect

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Everything that ``run_cases.py`` writes, run under the CUDA simulator."""
    pytest.importorskip("numba", reason="Numba has no wheel here")
    path = tmp_path_factory.mktemp("cudasim") / "results.npz"
    child = subprocess.run(
        [sys.executable, HERE / "run_cases.py", path],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert child.returncode == 0, child.stderr
    with np.load(path) as results:
        return {name: results[name] for name in results.files}


def fields(results, name):
    return [results[f"{name}/{i}"] for i in range(5)]


@pytest.mark.cudasim
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_simulator(simulated, case):
    skipped = contract.check(case, case.tensors(), *fields(simulated, case.name))
    if case.name in ("plain", "ascending", "batch", "more keys", "real head", "lambda one"):
        assert skipped


@pytest.mark.cudasim
def test_runs_are_bitwise_equal_and_gaps_do_not_depend_on_the_threshold(simulated):
    first, again, looser, dense = (
        fields(simulated, name) for name in (CASES[0].name, "again", "looser", "dense")
    )
    for one, other in zip(first, again, strict=True):
        assert one.tobytes() == other.tobytes()
    assert first[1].tobytes() != looser[1].tobytes() != dense[1].tobytes()
    assert first[2].tobytes() == looser[2].tobytes() == dense[2].tobytes()
    assert (dense[4] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_on_the_gpu(case):
    if detect().kind != "gpu":
        pytest.skip(detect().reason)
    cupy = pytest.importorskip("cupy")
    results = run(case, case.threshold, move=cupy.asarray, back=cupy.asnumpy)
    contract.check(case, case.tensors(), *results)
    for one, other in zip(
        results, run(case, case.threshold, move=cupy.asarray, back=cupy.asnumpy), strict=True
    ):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_back_end_keeps_the_contract_too(case):
    contract.check(case, case.tensors(), *run(case, case.threshold, backend="reference"))


@pytest.mark.parametrize("fault", range(5))
def test_the_contract_notices_faults(fault):
    case = CASES[0]
    good = run(case, case.threshold, backend="reference")
    bad = [x.copy() for x in good]
    if fault == 1:
        bad[1][bad[1] == 2] = 1  # says it kept what it skipped
    else:
        where = np.flatnonzero(np.isfinite(bad[fault]) & (bad[fault] != 0))[-1]
        bad[fault].flat[where] += {0: 0.05, 2: 0.01, 3: 0.01, 4: -1.0}[fault]
    with pytest.raises(AssertionError):
        contract.check(case, case.tensors(), *bad)
