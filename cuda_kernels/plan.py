"""A prefill call made ready: what does not change from one call to the next is done once."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels import arrays
from cuda_kernels.report import SkipReport
from sim.geometry import ORDERS, Grid
from sim.threshold import ln_threshold

_NAMES = ("q", "k", "v", "out")


@dataclass(frozen=True, eq=False)
class Settings:
    """What a prefill call asks for, checked.

    Parameters
    ----------
    grid : Grid
        Of the longest request.
    order : str
    scale : float
    threshold : ndarray, shape [B, Hq], float64
        λ; 0 where a request is computed densely.
    spans : ndarray, shape [B, 4], int32
        First query row, query rows, first key, keys of each request.
    gap : bool
        Whether the gap of every tile is wanted.
    """

    grid: Grid
    order: str
    scale: float
    threshold: NDArray[np.float64]
    spans: NDArray[np.int32]
    gap: bool

    @property
    def skips(self) -> bool:
        """Whether any tile can be skipped."""
        return bool((self.threshold > 0).any())


def why_not_mma(q: Any, v: Any, grid: Grid) -> str | None:
    """Say what of these arguments the tensor-core kernel does not take; None if it takes them."""
    if arrays.dtype_name(q) == "float32":
        return "takes float16 and bfloat16, got float32"
    if grid.tile != (64, 128):
        return f"decides on tiles of 64 × 128, got {grid.tile[0]} × {grid.tile[1]}"
    if (q.shape[3], v.shape[3]) not in ((64, 64), (128, 128), (192, 128)):
        return (
            "takes head_dim 64 and 128, and 192 for q and k with 128 for v; "
            f"got {q.shape[3]} and {v.shape[3]}"
        )
    return None


class PrefillPlan:
    """One call of the tensor-core kernel, for arrays of given shapes, strides, dtype and device.

    Made by :func:`cuda_kernels.skip_softmax_plan`.  Calling it checks that the arrays are like
    those it was made for, and launches; it allocates nothing but an ``out`` that is not given, so
    it can be captured in a CUDA graph.

    Attributes
    ----------
    report : SkipReport
        Of the last call; the next one overwrites its arrays.
    """

    def __init__(self, q: Any, k: Any, v: Any, settings: Settings, out: Any = None) -> None:
        from numba import cuda

        from cuda_kernels.launch import Launcher, load
        from cuda_kernels.prefill_mma import SIGNATURE, THREADS

        kernel, shared_bytes = _kernel(q, v, settings)
        self._settings = settings
        if out is None:
            out = arrays.empty_like(q, (*q.shape[:3], v.shape[3]))
        self._is_torch = arrays.library_of(q) == "torch"
        self._forms = [_form(x) for x in (q, k, v, out)]
        self._constants = _constants(q, settings)
        self.report = make_report(q, settings, "mma")
        fields = _fields(self.report, q)
        self._addresses = [arrays.layout(x)[1] for x in (*self._constants, *fields)]
        device = cuda.get_current_device().id
        self._launcher = Launcher(
            load(kernel, SIGNATURE, shared_bytes, device),
            (settings.grid.groups, q.shape[2], q.shape[0]),
            THREADS,
            shared_bytes,
            *(_abi(x) for x in (q, k, v, out, *self._constants, *fields)),
            *_scalars(settings, ctypes.c_float, ctypes.c_uint8, ctypes.c_int32),
        )

    def __call__(self, q: Any, k: Any, v: Any, *, out: Any = None) -> Any:
        """Launch on the current stream of the arrays' library.

        Parameters
        ----------
        q, k, v : array
            Like those that the plan was made for.
        out : array, shape [B, Lq, Hq, Dv], optional
            Contiguous.

        Returns
        -------
        out : array

        Raises
        ------
        ValueError
            If an array has another shape, other strides, another dtype or device.
        """
        if out is None:
            out = self.empty_out(q)
        self._launch(q, k, v, out, self._addresses)
        return out

    def empty_out(self, q: Any) -> Any:
        """Allocate an output."""
        return arrays.empty_like(q, self._forms[3][0])

    def fresh(self, q: Any, k: Any, v: Any, out: Any) -> SkipReport:
        """Launch, and return a report of its own."""
        report = make_report(q, self._settings, "mma")
        results = [arrays.layout(x)[1] for x in _fields(report, q)]
        self._launch(q, k, v, out, [*self._addresses[:2], *results])
        return report

    def _launch(self, q: Any, k: Any, v: Any, out: Any, rest: list[int]) -> None:
        addresses = [arrays.address(x) for x in (q, k, v, out)]
        for name, x, form, at in zip(_NAMES, (q, k, v, out), self._forms, addresses, strict=True):
            shape, strides, dtype, device = form
            if not (
                x.shape == shape
                and (x.stride() if self._is_torch else x.strides) == strides
                and x.dtype == dtype
                and x.device == device
            ):
                raise ValueError(
                    f"{name} must be as planned, {_words(form)}; got {_words(_form(x))}"
                )
            if at & 15:
                raise ValueError(f"{name} must start at a multiple of 16 bytes, got 0x{at:x}")
        self._launcher(arrays.current_stream(q), *addresses, *rest)


def emulated(q: Any, k: Any, v: Any, out: Any, settings: Settings) -> SkipReport:
    """Run the kernel's own source on the CPU."""
    from cuda_kernels.emulator import emulate
    from cuda_kernels.prefill_mma import THREADS

    kernel, shared_bytes = _kernel(q, v, settings)
    report = make_report(q, settings, "mma, emulated")
    emulate(
        kernel,
        (settings.grid.groups, q.shape[2], q.shape[0]),
        THREADS,
        *(arrays.bare(arrays.as_bits(x)) for x in (q, k, v, out)),
        *(arrays.bare(x) for x in (*_constants(q, settings), *_fields(report, q))),
        *_scalars(settings, np.float32, bool, int),
        shared_bytes=shared_bytes,
    )
    return report


def make_report(q: Any, settings: Settings, backend: str) -> SkipReport:
    """Allocate what a kernel reports; it writes all of it but gaps, which begin at −inf."""
    batch, lq, heads, _ = q.shape
    map_shape = (batch, heads, settings.grid.groups, settings.grid.key_tiles)
    lse, bound = (arrays.empty(q, (batch, heads, lq), "float32") for _ in range(2))
    state = arrays.empty(q, map_shape, "uint8")
    gap = arrays.full(q, map_shape, -np.inf) if settings.gap else None
    return SkipReport(
        state, gap, lse, bound, settings.grid, settings.order, settings.threshold, backend
    )


def _kernel(q: Any, v: Any, settings: Settings) -> tuple[Any, int]:
    """Build the kernel for these arguments: dense where nothing can be skipped."""
    from cuda_kernels.prefill_mma import make_kernel, shared_bytes

    dtype = {"float16": 0, "bfloat16": 1}[arrays.dtype_name(q)]
    kernel = make_kernel(q.shape[3], v.shape[3], dtype, settings.skips, settings.gap)
    return kernel, shared_bytes(q.shape[3], v.shape[3])


def _constants(q: Any, settings: Settings) -> tuple[Any, Any]:
    ln_lam = ln_threshold(settings.threshold)
    return arrays.from_numpy(settings.spans, q), arrays.from_numpy(ln_lam, q)


def _fields(report: SkipReport, q: Any) -> tuple[Any, ...]:
    gap = arrays.empty(q, (1, 1, 1, 1), "float32") if report.gap is None else report.gap
    return report.lse, report.dropped_mass_bound, report.state, gap


def _scalars(settings: Settings, real: Any, boolean: Any, integer: Any) -> tuple[Any, ...]:
    from cuda_kernels.prefill_mma import NO_WINDOW

    window = NO_WINDOW if settings.grid.window is None else settings.grid.window
    order = ORDERS.index(settings.order)
    return (
        real(settings.scale), boolean(settings.grid.causal), integer(window), integer(order),
        boolean(True),
    )  # fmt: skip


def _form(array: Any) -> tuple[Any, ...]:
    """What a plan needs to be the same: shape, strides in elements or bytes, dtype, device."""
    strides = array.stride() if hasattr(array, "stride") else array.strides
    return array.shape, strides, array.dtype, array.device


def _words(form: tuple[Any, ...]) -> str:
    shape, strides, dtype, device = form
    return f"{list(shape)} with strides {list(strides)}, {dtype} on {device}"


def _abi(array: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    strides, _ = arrays.layout(array)
    return tuple(array.shape), strides, array.dtype.itemsize
