"""The current GPU, asked of the driver itself: no compiler is loaded for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU, as its driver describes it.

    Attributes
    ----------
    number : int
    name : str
    compute_capability : (int, int)
    multiprocessors : int
    shared_bytes : int
        Shared memory of a multiprocessor.
    """

    number: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @property
    def architecture(self) -> str:
        """What compilers call it, with the instructions that only its family has: ``sm_90a``."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


class NoGpu(RuntimeError):
    """There is nothing to run kernels on."""


def current() -> Gpu:
    """Return the GPU of this thread's CUDA context; without one, the first GPU, which gets it.

    Raises
    ------
    NoGpu
        If there is no GPU, or no driver.
    RuntimeError
        If the driver refuses.
    ImportError
        If cuda-bindings is not installed.
    """
    from cuda.bindings import driver

    none = NoGpu("there is no CUDA GPU, or no driver for it")
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:  # the driver's library cannot be loaded
        raise none from None
    if status.value or _answer("cuDeviceGetCount") == 0:
        raise none
    if int(_answer("cuCtxGetCurrent")):
        device = _answer("cuCtxGetDevice")  # an error where there is no context
    else:
        device = _answer("cuDeviceGet", 0)
        _answer("cuCtxSetCurrent", _answer("cuDevicePrimaryCtxRetain", device))
    return _describe(device)


def _describe(device: Any) -> Gpu:
    from cuda.bindings import driver

    def attribute(name: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_answer("cuDeviceGetAttribute", kind, device))

    return Gpu(
        int(device),
        _answer("cuDeviceGetName", 256, device).partition(b"\0")[0].decode(),
        (attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
        attribute("MULTIPROCESSOR_COUNT"),
        attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
    )


def _answer(function: str, *arguments: Any) -> Any:
    from cuda.bindings import driver

    status, *answer = getattr(driver, function)(*arguments)
    if status.value:  # 0 is success
        raise RuntimeError(f"{function}: {status.name}")
    return answer[0] if answer else None
