"""Which kernels there are, what this machine can run, and which one is chosen."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cuda_kernels import gpu

OLDEST = (7, 5)
"""Compute capability of Turing, the oldest that CUDA 13 compiles for."""

BACKENDS = {
    "wgmma": "tensor-core kernel of TMA and wgmma: Hopper, and the emulator",
    "mma": "tensor-core kernel of mma.sync: Ampere and later, and the emulator",
    "simt": "teaching kernel in plain Numba CUDA: any GPU, or Numba's CUDA simulator",
    "reference": "the simulator's NumPy on the CPU",
}
"""Every back end and what it is, the best first; ``reference`` is never chosen unless asked for."""

TENSOR_CORES = (8, 0)
"""Compute capability of Ampere, the first with ``cp.async`` and bfloat16."""

TENSOR_CORE_BACKENDS = ("mma", "wgmma")
"""Those that work by plans, and that the emulator runs."""

HOPPER = (9, 0)
"""Compute capability of the only GPUs with ``wgmma``."""

EMULATES = "skip_softmax_attention with emulate=True runs"  # which a plan does not take


@dataclass(frozen=True)
class Device:
    """What this machine has to run kernels on.

    ``kind`` is ``gpu``, ``simulator`` (NUMBA_ENABLE_CUDASIM=1), ``too old`` or ``none``;
    ``reason`` says in one sentence why kernels cannot run, and is empty where they can.
    """

    kind: str
    reason: str = ""
    name: str = ""
    compute_capability: tuple[int, int] | None = None

    @property
    def runs_kernels(self) -> bool:
        """Whether a kernel can be launched here."""
        return self.kind in ("gpu", "simulator")


def detect() -> Device:
    """Find out what kernels can run on here.

    Returns
    -------
    Device

    Examples
    --------
    >>> detect().kind in ("gpu", "simulator", "too old", "none")
    True
    """
    if find_spec("numba") is None:
        return Device("none", "Numba is not installed")
    try:
        if simulates():
            return Device("simulator", name="Numba's CUDA simulator")
        if find_spec("numba_cuda") is None:
            return Device("none", "numba-cuda is not installed")
        found = gpu.current()
    except gpu.NoGpu as error:
        return Device("none", str(error))
    except ImportError as error:
        return Device("none", f"Numba CUDA cannot be imported ({error})")
    except Exception as error:  # drivers fail in many ways, and each must end in a sentence
        return Device("none", f"the CUDA driver does not work ({error})")
    name, capability = found.name, found.compute_capability
    if capability < OLDEST:
        major, minor = capability
        reason = f"{name} is too old: compute capability {major}.{minor}, at least 7.5 is needed"
        return Device("too old", reason, name, capability)
    return Device("gpu", "", name, capability)


def simulates() -> bool:
    """Whether Numba is told to simulate.

    It is asked only where the answer can be yes: to load it takes longer than all else that the
    first call of a process does.
    """
    told = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0"
    if not (told or "numba" in sys.modules or Path(".numba_config.yaml").exists()):
        return False
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def best_tensor_cores(device: Device, *, fits_tma: bool = True) -> str:
    """Name the best tensor-core back end for a GPU; whether that runs any is not asked.

    Parameters
    ----------
    device : Device
    fits_tma : bool
        Whether TMA takes the arrays.

    Examples
    --------
    >>> [best_tensor_cores(Device("gpu", compute_capability=x)) for x in ((9, 0), (10, 0))]
    ['wgmma', 'mma']
    """
    on_hopper = device.kind == "gpu" and device.compute_capability == HOPPER
    return "wgmma" if on_hopper and fits_tma else "mma"


def choose(
    backend: str | None, device: Device, *, fits_tensor_cores: bool = False, fits_tma: bool = True
) -> str:
    """Name the back end that runs.

    Parameters
    ----------
    backend : str or None
        What the caller asked for; None lets GPU and arguments decide between kernels.
    device : Device
    fits_tensor_cores : bool
        Whether the tensor-core kernels take these arguments.
    fits_tma : bool
        Whether TMA takes these arrays, without which ``wgmma`` cannot run.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If there is no such back end.
    RuntimeError
        If it cannot run here.

    Examples
    --------
    >>> choose(None, Device("simulator"))
    'simt'
    >>> choose(None, Device("gpu", compute_capability=(9, 0)), fits_tensor_cores=True)
    'wgmma'
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    if not device.runs_kernels:
        raise RuntimeError(
            f"no kernel can run here: {device.reason}; on the CPU, {EMULATES} a tensor-core "
            'kernel, with backend="reference" the simulator, and the teaching kernel if '
            "NUMBA_ENABLE_CUDASIM=1 is set before Python starts"
        )
    tensor_cores = device.kind == "gpu" and (device.compute_capability or (0, 0)) >= TENSOR_CORES
    if backend == "mma" and not tensor_cores:
        raise RuntimeError(
            f"the mma kernel cannot run on {device.name}: it needs compute capability 8.0 or "
            f"later; on the CPU, {EMULATES} it"
        )
    if backend == "wgmma" and (device.kind != "gpu" or device.compute_capability != HOPPER):
        raise RuntimeError(
            f"the wgmma kernel cannot run on {device.name}: it needs compute capability 9.0 "
            f'(Hopper); backend="mma" runs from 8.0 on, and on the CPU, {EMULATES} wgmma'
        )
    if backend is not None:
        return backend
    if tensor_cores and fits_tensor_cores:
        return best_tensor_cores(device, fits_tma=fits_tma)
    return "simt"
