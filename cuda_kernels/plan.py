"""A prefill call made ready: what does not change from one call to the next is done once."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels import arrays, gpu
from cuda_kernels.blocks import prefill_mma, prefill_wgmma
from cuda_kernels.blocks.grid import NO_WINDOW
from cuda_kernels.forms import Forms
from cuda_kernels.kernel import Kernel
from cuda_kernels.ptx.tensor_map import TensorMap
from cuda_kernels.report import SkipReport
from sim.geometry import ORDERS, Grid
from sim.threshold import ln_threshold


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


def why_not_tensor_cores(q: Any, v: Any, grid: Grid) -> str | None:
    """Say what of these arguments the tensor-core kernels do not take; None if they take them."""
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


@dataclass(frozen=True, eq=False)
class Recipe:
    """One build of a tensor-core kernel, and how it is launched.

    Attributes
    ----------
    kernel : Kernel
    shared_bytes : int
        Dynamic shared memory of a block.
    grid : tuple of int
    threads : int
    boxes : tuple of tuple of int, or None
        Where q, k, v and out come as tensor maps, the box of each.
    scalars : tuple of (str, number)
        ``real``, ``boolean`` or ``integer``, and the value.
    """

    kernel: Kernel
    shared_bytes: int
    grid: tuple[int, int, int]
    threads: int
    boxes: tuple[tuple[int, ...], ...] | None
    scalars: tuple[tuple[str, Any], ...]


class PrefillPlan:
    """One call of a tensor-core kernel, for arrays of given shapes, strides, dtype and device.

    Made by :func:`cuda_kernels.skip_softmax_plan`.  Calling it checks that the arrays are like
    those it was made for, and launches; it allocates nothing but an ``out`` that is not given, so
    it can be captured in a CUDA graph.

    Attributes
    ----------
    report : SkipReport
        Of the last call; the next one overwrites its arrays.
    """

    def __init__(
        self, q: Any, k: Any, v: Any, settings: Settings, out: Any = None, backend: str = "mma"
    ) -> None:
        from cuda_kernels.launch import Launcher, load

        recipe = RECIPES[backend](q, k, v, settings)
        self._settings, self._backend = settings, backend
        if out is None:
            out = arrays.empty_like(q, (*q.shape[:3], v.shape[3]))
        self._out_shape = out.shape
        self._forms = Forms({"q": q, "k": k, "v": v, "out": out})
        self._stream = arrays.stream_of(q)
        self._constants = _constants(q, settings)
        self.report = make_report(q, settings, backend)
        fields = _fields(self.report, q)
        self._addresses = [arrays.layout(x)[1] for x in (*self._constants, *fields)]
        self._displaced: list[int] = self._addresses  # what the launcher does not have of them
        kinds = {"real": ctypes.c_float, "boolean": ctypes.c_uint8, "integer": ctypes.c_int32}
        tensors = [abi_of(x) for x in (q, k, v, out)]
        if recipe.boxes is not None:
            bits = (arrays.as_bits(x) for x in (q, k, v, out))
            tensors = [TensorMap(x, box) for x, box in zip(bits, recipe.boxes, strict=True)]
        self._launcher = Launcher(
            load(recipe.kernel, None, recipe.shared_bytes, gpu.current()),
            recipe.grid,
            recipe.threads,
            recipe.shared_bytes,
            *tensors,
            *(abi_of(x) for x in (*self._constants, *fields)),
            *(kinds[kind](value) for kind, value in recipe.scalars),
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
        at = self._forms.addresses(q, k, v, out)
        self._launcher(self._stream(), *at, *self._displaced)
        self._displaced = []
        return out

    def empty_out(self, q: Any) -> Any:
        """Allocate an output."""
        return arrays.empty_like(q, self._out_shape)

    def fresh(self, q: Any, k: Any, v: Any, out: Any) -> SkipReport:
        """Launch, and return a report of its own."""
        report = make_report(q, self._settings, self._backend)
        results = [arrays.layout(x)[1] for x in _fields(report, q)]
        at = self._forms.addresses(q, k, v, out)
        self._displaced = self._addresses
        self._launcher(self._stream(), *at, *self._addresses[:2], *results)
        return report


def emulated(
    q: Any, k: Any, v: Any, out: Any, settings: Settings, backend: str = "mma"
) -> SkipReport:
    """Run the kernel's own source on the CPU."""
    from cuda_kernels.emulator import emulate

    recipe = RECIPES[backend](q, k, v, settings)
    report = make_report(q, settings, f"{backend}, emulated")
    kinds = {"real": np.float32, "boolean": bool, "integer": int}
    tensors = [arrays.bare(arrays.as_bits(x)) for x in (q, k, v, out)]
    if recipe.boxes is not None:
        tensors = [TensorMap(x, box) for x, box in zip(tensors, recipe.boxes, strict=True)]
    emulate(
        recipe.kernel.make(),
        recipe.grid,
        recipe.threads,
        *tensors,
        *(arrays.bare(x) for x in (*_constants(q, settings), *_fields(report, q))),
        *(kinds[kind](value) for kind, value in recipe.scalars),
        shared_bytes=recipe.shared_bytes,
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


def _mma(q: Any, k: Any, v: Any, settings: Settings) -> Recipe:
    block = prefill_mma
    return Recipe(
        Kernel("cuda_kernels.prefill_mma", _compile_time(q, v, settings)),
        block.shared_bytes(q.shape[3], v.shape[3]),
        (settings.grid.groups, q.shape[2], q.shape[0]),
        block.THREADS,
        None,
        (*_scalars(settings), ("boolean", True)),
    )


def _wgmma(q: Any, k: Any, v: Any, settings: Settings) -> Recipe:
    block = prefill_wgmma
    return Recipe(
        Kernel("cuda_kernels.prefill_wgmma", _compile_time(q, v, settings)),
        block.shared_bytes(q.shape[3], v.shape[3]),
        (block.blocks(settings.grid.groups, settings.grid.causal), q.shape[2], q.shape[0]),
        block.THREADS,
        (block.Q_BOX, block.K_BOX, block.V_BOX, block.OUT_BOX),
        (*_scalars(settings), ("integer", q.shape[2] // k.shape[2])),
    )


RECIPES = {"mma": _mma, "wgmma": _wgmma}
"""By back end: how its kernel runs for given arguments; dense where nothing can be skipped."""


def _compile_time(q: Any, v: Any, settings: Settings) -> tuple[int, int, int, bool, bool]:
    dtype = {"float16": 0, "bfloat16": 1}[arrays.dtype_name(q)]
    return q.shape[3], v.shape[3], dtype, settings.skips, settings.gap


def _constants(q: Any, settings: Settings) -> tuple[Any, Any]:
    ln_lam = ln_threshold(settings.threshold)
    return arrays.from_numpy(settings.spans, q), arrays.from_numpy(ln_lam, q)


def _fields(report: SkipReport, q: Any) -> tuple[Any, ...]:
    gap = arrays.empty(q, (1, 1, 1, 1), "float32") if report.gap is None else report.gap
    return report.lse, report.dropped_mass_bound, report.state, gap


def _scalars(settings: Settings) -> tuple[tuple[str, Any], ...]:
    """Softmax scale, mask and order, as both kernels take them."""
    window = NO_WINDOW if settings.grid.window is None else settings.grid.window
    return (
        ("real", settings.scale),
        ("boolean", settings.grid.causal),
        ("integer", window),
        ("integer", ORDERS.index(settings.order)),
    )


def abi_of(array: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides in bytes and bytes of an element, as ``Launcher`` takes an array."""
    strides, _ = arrays.layout(array)
    return tuple(array.shape), strides, array.dtype.itemsize
