"""The public door: skip-softmax attention on arrays, with a report of what was skipped."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuda_kernels import arrays
from cuda_kernels.backends import choose, detect
from sim.geometry import ORDERS, Grid, TileMap, check_order
from sim.scores import check_scale
from sim.threshold import ln_threshold, resolve


@dataclass(frozen=True, repr=False)
class SkipReport:
    """What a call skipped and what that can have cost.

    Arrays are of the caller's library and stay on its device; ``tiles`` and ``sparsity`` are
    fetched to the host when they are first asked for.

    Parameters
    ----------
    state : array, shape [B, Hq, groups, key_tiles], uint8
        0 masked, 1 computed, 2 skipped.
    gap : array, shape [B, Hq, groups, key_tiles], float32, or None
        Natural-log units; +inf for the first visited tile, −inf where masked.
    lse : array, shape [B, Hq, Lq], float32
        Natural log, over kept keys only.
    dropped_mass_bound : array, shape [B, Hq, Lq], float32
        Certified: the true softmax probability that fell into skipped tiles is at most this.
    grid : Grid
    order : str
    threshold : ndarray, shape [B, Hq], float64
        λ that was applied; 0 where the request was computed densely.
    backend : str
    """

    state: Any
    gap: Any
    lse: Any
    dropped_mass_bound: Any
    grid: Grid
    order: str
    threshold: NDArray[np.float64]
    backend: str

    def __repr__(self) -> str:
        share = self.tiles.skipped.sum() / max(self.tiles.visited.sum(), 1)
        return f"<SkipReport: {share:.1%} of visited tiles skipped, by {self.backend}>"

    @cached_property
    def tiles(self) -> TileMap:
        """Tile map with a leading batch axis."""
        return TileMap(arrays.to_numpy(self.state), self.grid, self.order, self.threshold)

    @property
    def sparsity(self) -> NDArray[np.float64]:
        """Skipped ÷ visited tiles, [B, Hq]; first tiles count as visited."""
        return self.tiles.sparsity


def skip_softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    threshold: ArrayLike | None = None,
    threshold_scale_factor: ArrayLike | None = None,
    short_context: str = "dense",
    order: str = "ends_first",
    tile: tuple[int, int] = (64, 128),
    softmax_scale: float | None = None,
    out: Any = None,
    return_report: bool = False,
    gap: bool = False,
    backend: str | None = None,
    emulate: bool = False,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    page_table: Any = None,
    sink_logits: Any = None,
) -> Any:
    """Attention that leaves out tiles whose row maxima lie far below the running maxima.

    Parameters
    ----------
    q : array, shape [B, Lq, Hq, D]
        float16, bfloat16 or float32, of NumPy, CuPy, PyTorch or DLPack.
    k : array, shape [B, Lk, Hkv, D]
        Query head h uses KV head h // (Hq / Hkv).
    v : array, shape [B, Lk, Hkv, Dv]
    causal : bool
        Bottom-right aligned: query i sees keys ≤ i + Lk − Lq.
    threshold : float or array [B] or [B, Hq], optional
        λ: a tile is skipped iff its gap < ln λ.  Larger skips more; 0 skips nothing.
    threshold_scale_factor : float or array [B] or [B, Hq], optional
        λ = factor / Lk.  Give one of the two.
    short_context : {"dense", "allow"}
        What happens where factor / Lk exceeds 1.
    order : {"ends_first", "ascending", "descending"}
        Visit order of key tiles.
    tile : (int, int)
        Decision grid: vote rows × keys.
    softmax_scale : float, optional
        Default D ** −0.5.
    out : array, shape [B, Lq, Hq, Dv], optional
        Written to and returned.
    return_report : bool
        Also return a :class:`SkipReport`.
    gap : bool
        Fill ``report.gap``: of the tensor-core kernel that is a build of its own, a little
        slower.  The other back ends always fill it.
    backend : {"mma", "simt", "reference"}, optional
        Default: the best kernel for this GPU that takes these arguments; the report names it.
        ``reference`` is the simulator, on the CPU.
    emulate : bool
        Run the tensor-core kernel's own source on the CPU, thread by thread: for a few
        tiles only, as the time grows with tiles × heads × requests.
    cu_seqlens_q, cu_seqlens_k, page_table, sink_logits : None
        Not built yet; refused by name.

    Returns
    -------
    out : array, shape [B, Lq, Hq, Dv]
        In the library, dtype and device of ``q``.
    report : SkipReport
        With ``return_report``.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; nothing has been launched then.
    RuntimeError
        If no kernel can run here.

    References
    ----------
    BLASST, arXiv 2512.12087, algorithm 1.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 256, 2, 64)).astype(np.float16)
    >>> out, report = skip_softmax_attention(
    ...     q, k, v, threshold=0.01, backend="reference", return_report=True
    ... )
    >>> out.shape, report.tiles.state.shape
    ((1, 256, 2, 64), (1, 2, 4, 2))
    """
    not_built = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "page_table": page_table,
        "sink_logits": sink_logits,
    }
    for name, value in not_built.items():
        if value is not None:
            raise ValueError(f"{name} is not supported yet")
    q, k, v = arrays.adopt(q), arrays.adopt(k), arrays.adopt(v)
    out_shape = _check_tensors(q, k, v)
    if out is not None:
        _check_out(out, q, out_shape)
    check_order(order)
    batch, lq, heads, head_dim = q.shape
    grid = Grid(tile, lq, k.shape[1], causal)
    scale = check_scale(softmax_scale, head_dim)
    lam = _per_head(
        resolve(threshold, threshold_scale_factor, grid.lk, short_context), batch, heads
    )
    misfit = _why_not_mma(q, v, grid)
    if emulate:
        if backend not in (None, "mma"):
            raise ValueError(f"emulate=True runs the mma kernel, not {backend!r}")
        chosen = "mma"
    else:
        device = detect()
        chosen = choose(backend, device, mma_fits=misfit is None)
        _check_device(q, chosen, device.kind)
    if chosen == "mma":
        if misfit is not None:
            raise ValueError(f"the mma kernel {misfit}")
        result = arrays.empty_like(q, out_shape) if out is None or emulate else out
        run = _emulate_mma if emulate else _run_mma
        report = run(q, k, v, result, scale, lam, grid, order, gap)
    else:
        run_whole = _run_reference if chosen == "reference" else _run_simt
        result, report = run_whole(q, k, v, scale, lam, grid, order)
    if out is None:
        out = arrays.cast(result, q)
    elif out is not result:
        out[...] = arrays.cast(result, out)
    return (out, report) if return_report else out


def _why_not_mma(q: Any, v: Any, grid: Grid) -> str | None:
    """Say what of these arguments the tensor-core kernel does not take; None if it takes them."""
    if arrays.dtype_name(q) == "float32":
        return "takes float16 and bfloat16, got float32"
    if grid.tile != (64, 128):
        return f"decides on tiles of 64 × 128, got {grid.tile[0]} × {grid.tile[1]}"
    if q.shape[3] not in (64, 128) or v.shape[3] != q.shape[3]:
        return f"takes head_dim 64 and 128 for q, k and v, got {q.shape[3]} and {v.shape[3]}"
    return None


def _mma_kernel(q: Any, v: Any, lam: NDArray[np.float64], gap: bool) -> tuple[Any, int]:
    """Build the kernel for these arguments: dense where nothing can be skipped."""
    from cuda_kernels.prefill_mma import make_kernel, shared_bytes

    dtype = {"float16": 0, "bfloat16": 1}[arrays.dtype_name(q)]
    kernel = make_kernel(q.shape[3], v.shape[3], dtype, bool((lam > 0).any()), gap)
    return kernel, shared_bytes(q.shape[3], v.shape[3])


def _mma_results(
    q: Any, grid: Grid, lam: NDArray[np.float64], order: str, gap: bool, backend: str
) -> tuple[Any, ...]:
    """Allocate what the kernel fills besides the output: ln λ, lse, bound, state, gaps."""
    batch, lq, heads, _ = q.shape
    map_shape = (batch, heads, grid.groups, grid.key_tiles)
    lse, bound = (arrays.full(q, (batch, heads, lq), np.nan) for _ in range(2))
    state = arrays.full(q, map_shape, 0, "uint8")
    gaps = arrays.full(q, map_shape if gap else (1, 1, 1, 1), -np.inf)
    report = SkipReport(state, gaps if gap else None, lse, bound, grid, order, lam, backend)
    return (arrays.from_numpy(ln_threshold(lam), q), lse, bound, state, gaps), report


def _run_mma(
    q: Any, k: Any, v: Any, out: Any, scale: float, lam: NDArray[np.float64], grid: Grid,
    order: str, gap: bool,
) -> SkipReport:  # fmt: skip
    from numba import cuda

    from cuda_kernels.launch import launch, load
    from cuda_kernels.prefill_mma import NO_WINDOW, SIGNATURE, THREADS

    kernel, shared_bytes = _mma_kernel(q, v, lam, gap)
    results, report = _mma_results(q, grid, lam, order, gap, "mma")
    compiled = load(kernel, SIGNATURE, shared_bytes, cuda.get_current_device().id)
    launch(
        kernel,
        compiled,
        (grid.groups, q.shape[2], q.shape[0]),
        THREADS,
        arrays.current_stream(q),
        shared_bytes,
        *(arrays.as_bits(x) for x in (q, k, v, out)),
        *results,
        np.float32(scale),
        grid.causal,
        np.int32(NO_WINDOW),
        np.int32(ORDERS.index(order)),
    )
    return report


def _emulate_mma(
    q: Any, k: Any, v: Any, out: Any, scale: float, lam: NDArray[np.float64], grid: Grid,
    order: str, gap: bool,
) -> SkipReport:  # fmt: skip
    from cuda_kernels.emulator import emulate
    from cuda_kernels.prefill_mma import NO_WINDOW, THREADS

    kernel, shared_bytes = _mma_kernel(q, v, lam, gap)
    results, report = _mma_results(q, grid, lam, order, gap, "mma, emulated")
    emulate(
        kernel,
        (grid.groups, q.shape[2], q.shape[0]),
        THREADS,
        *(_bare(arrays.as_bits(x)) for x in (q, k, v, out)),
        *(_bare(x) for x in results),
        np.float32(scale),
        grid.causal,
        NO_WINDOW,
        ORDERS.index(order),
        shared_bytes=shared_bytes,
    )
    return report


def _run_simt(
    q: Any, k: Any, v: Any, scale: float, lam: NDArray[np.float64], grid: Grid, order: str
) -> tuple[Any, SkipReport]:
    from numba import config, cuda
    from numba.core.errors import NumbaPerformanceWarning

    from cuda_kernels.prefill_simt import CHUNK, make_kernel

    if grid.keys % CHUNK or grid.rows > 1024:
        raise ValueError(
            f"tile must have at most 1024 rows and a multiple of {CHUNK} keys for the simt "
            f"kernel, got {grid.tile}"
        )
    batch, lq, heads, head_dim = q.shape
    kernel = make_kernel(grid.rows, grid.keys, head_dim, v.shape[3])
    out = arrays.full(q, (batch, lq, heads, v.shape[3]), np.nan)
    lse, bound = (arrays.full(q, (batch, heads, lq), np.nan) for _ in range(2))
    map_shape = (batch, heads, grid.groups, grid.key_tiles)
    state = arrays.full(q, map_shape, 0, "uint8")
    gap = arrays.full(q, map_shape, -np.inf)
    ln_lam = arrays.from_numpy(ln_threshold(lam), q)
    stream = 0
    if not config.ENABLE_CUDASIM and (handle := arrays.current_stream(q)):
        stream = cuda.external_stream(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)  # lessons launch small grids
        kernel[(grid.groups, heads, batch), grid.rows, stream](
            *(_bare(arrays.as_float32(x)) for x in (q, k, v)),
            np.float32(scale),
            _bare(ln_lam),
            grid.causal,
            ORDERS.index(order),
            *(_bare(x) for x in (out, lse, bound, state, gap)),
        )
    return out, SkipReport(state, gap, lse, bound, grid, order, lam, "simt")


def _bare(array: Any) -> Any:
    """Give Numba a CPU tensor of PyTorch as the NumPy array that shares its memory."""
    on_cpu_torch = arrays.library_of(array) == "torch" and not array.is_cuda
    return array.numpy() if on_cpu_torch else array


def _run_reference(
    q: Any, k: Any, v: Any, scale: float, lam: NDArray[np.float64], grid: Grid, order: str
) -> tuple[Any, SkipReport]:
    from sim.skip_softmax import attend, scan

    results: list[tuple[NDArray, ...]] = []
    for b in range(q.shape[0]):
        q_b, k_b, v_b = (
            np.moveaxis(arrays.to_numpy(arrays.as_float32(x[b])), 1, 0) for x in (q, k, v)
        )
        one = scan(
            q_b,
            k_b,
            tile=grid.tile,
            causal=grid.causal,
            order=order,
            softmax_scale=scale,
            keep_row_max=bool((lam[b] > 1).any()),
        )
        tiles = one.decide(lam[b], short_context="allow")  # what to do above 1 was resolved before
        done = attend(q_b, k_b, v_b, tiles, softmax_scale=scale)
        output = np.moveaxis(done.output, 0, 1)
        results.append((output, tiles.state, one.gap, done.lse, done.dropped_mass_bound))
    out, *fields = (arrays.from_numpy(np.stack(x), q) for x in zip(*results, strict=True))
    return out, SkipReport(*fields, grid, order, lam, "reference")


def _check_tensors(q: Any, k: Any, v: Any) -> tuple[int, ...]:
    """Check what can be known before a launch; give the shape of the output."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        library = arrays.library_of(array)
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(
                f"{name} must be [batch, length, heads, head_dim], none of them 0; "
                f"got shape {tuple(array.shape)}"
            )
        if arrays.dtype_name(array) not in arrays.DTYPES:
            raise ValueError(
                f"{name} must be {', '.join(arrays.DTYPES)}; got {arrays.dtype_name(array)}"
            )
        if library != arrays.library_of(q) or array.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must share library and dtype; q is {arrays.library_of(q)} "
                f"{arrays.dtype_name(q)}, {name} is {library} {arrays.dtype_name(array)}"
            )
        if arrays.device_of(array) != arrays.device_of(q):
            raise ValueError(
                f"q, k and v must be on one device; q is on {arrays.device_of(q)}, "
                f"{name} on {arrays.device_of(array)}"
            )
        _check_layout(name, array)
        if arrays.wants_gradient(array):
            raise ValueError(
                f"{name} requires a gradient, and there is no backward pass: call under "
                "torch.no_grad(), or on tensors that require none"
            )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share head_dim, got {q.shape[3]} and {k.shape[3]}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must share batch, length and heads, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must share batch, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}"
        )
    return (*q.shape[:3], v.shape[3])


def _check_layout(name: str, array: Any) -> None:
    strides, address = arrays.layout(array)
    item = 4 if arrays.dtype_name(array) == "float32" else 2
    outer = [s for s, n in zip(strides[:3], array.shape[:3], strict=True) if n > 1]
    if array.shape[3] > 1 and strides[3] != item:
        raise ValueError(f"{name} must be contiguous along head_dim, got strides {strides} bytes")
    if any(s % 16 for s in outer) or address % 16:
        raise ValueError(
            f"{name} must start, and step, at multiples of 16 bytes; "
            f"got strides {strides} bytes at address 0x{address:x}"
        )


def _check_out(out: Any, q: Any, shape: tuple[int, ...]) -> None:
    if arrays.library_of(out) != arrays.library_of(q) or tuple(out.shape) != shape:
        raise ValueError(
            f"out must be a {arrays.library_of(q)} array of shape {shape}, "
            f"got {arrays.library_of(out)} {tuple(out.shape)}"
        )
    if out.dtype != q.dtype or arrays.device_of(out) != arrays.device_of(q):
        raise ValueError(
            f"out must share dtype and device with q, got {arrays.dtype_name(out)} "
            f"on {arrays.device_of(out)}"
        )
    _check_layout("out", out)


def _check_device(q: Any, backend: str, kind: str) -> None:
    where, library = arrays.device_of(q), arrays.library_of(q)
    if backend == "simt" and kind == "gpu" and library == "torch" and where == "cpu":
        raise ValueError("q is on cpu; move q, k and v to the GPU first")
    if backend == "simt" and kind == "simulator" and where != "cpu":
        raise ValueError(f"q is on {where}, but the CUDA simulator works on CPU arrays")


def _per_head(lam: NDArray[np.float64], batch: int, heads: int) -> NDArray[np.float64]:
    """Spread λ over [B, Hq]."""
    if lam.ndim == 1:
        lam = lam[:, None]
    if lam.ndim > 2 or lam.shape not in ((), (batch, 1), (batch, heads)):
        raise ValueError(
            f"one threshold, or one for each of [{batch}] requests, or [{batch}, {heads}]; "
            f"got shape {lam.shape}"
        )
    return np.broadcast_to(lam, (batch, heads)).copy()
