"""Every instruction gives what PTX says: in the emulator, and on a GPU if there is one."""

import pickle
import warnings

import numpy as np
import pytest
from hopper_probes import HOPPER_PROBES
from probes import PROBES

from cuda_kernels import detect
from cuda_kernels.ptx import language
from cuda_kernels.ptx.instruction import AddressOf, Instruction

INSTRUCTIONS = [v for v in vars(language).values() if isinstance(v, Instruction)]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_emulated(probe):
    pytest.importorskip("greenlet")
    from cuda_kernels.emulator import emulate

    inputs, output = probe.inputs(), probe.output()
    emulate(probe.kernel, 1, probe.threads, *inputs, output)
    probe.check(inputs, output)


@pytest.mark.gpu
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_on_the_gpu(probe):
    if detect().kind != "gpu":
        pytest.skip(detect().reason or "kernels are simulated")
    cupy = pytest.importorskip("cupy")
    from numba.core.errors import NumbaPerformanceWarning

    inputs, output = probe.inputs(), probe.output()
    moved = [as_strided(cupy, x) for x in (*inputs, output)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)  # one block
        probe.kernel[1, probe.threads](*moved)
    probe.check(inputs, cupy.asnumpy(moved[-1]))


def as_strided(cupy, array):
    """Copy an array to the GPU with its strides."""
    base = array if array.base is None or array.flags.c_contiguous else array.base
    moved = cupy.asarray(base)
    if (moved.shape, moved.strides) == (array.shape, array.strides):
        return moved
    return cupy.lib.stride_tricks.as_strided(moved, array.shape, array.strides)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_probe_notices_a_wrong_result(probe):
    inputs = probe.inputs()
    wrong = probe.expected(*inputs).copy()
    place = np.flatnonzero(np.isfinite(wrong) & (wrong != 0))[-1]
    wrong.flat[place] += 1
    with pytest.raises(AssertionError):
        probe.check(inputs, wrong)


@pytest.mark.parametrize("made", INSTRUCTIONS, ids=repr)
def test_every_instruction_is_probed_and_documented(made):
    used = set()
    for probe in (*PROBES, *HOPPER_PROBES):
        code = getattr(probe.kernel, "py_func", probe.kernel).__code__
        used |= set(code.co_names)
    assert made.__name__ in used
    assert made.__doc__
    assert (
        isinstance(made, AddressOf)
        or not made.text
        or "PTX ISA" in made.__doc__
        or ("See ``" in made.__doc__)
    )


@pytest.mark.parametrize("made", INSTRUCTIONS, ids=repr)
def test_instructions_are_pickled_by_name(made):
    """Numba's disk cache hashes what a kernel closes over: it must be the same in every process."""
    assert pickle.loads(pickle.dumps(made)) is made
    assert len(pickle.dumps(made)) < 100
