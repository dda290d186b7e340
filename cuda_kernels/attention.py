"""The public doors to prefill: skip-softmax attention on arrays, at once or by a plan."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuda_kernels import arrays
from cuda_kernels.backends import TENSOR_CORE_BACKENDS, best_tensor_cores, choose, detect
from cuda_kernels.checks import check_lengths, check_out, check_tensors
from cuda_kernels.plan import (
    PrefillPlan,
    Settings,
    emulated,
    why_not_tensor_cores,
    why_not_tma,
)
from cuda_kernels.remembered import Remembered, call_of
from cuda_kernels.report import SkipReport
from sim.geometry import ORDERS, Grid, check_order
from sim.scores import check_scale
from sim.threshold import ln_threshold, resolve

_PLANS = Remembered()


def skip_softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
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
        float16, bfloat16 or float32, of NumPy, CuPy, PyTorch or DLPack.  On a GPU the tensor-core
        kernels take arrays that are there.
    k : array, shape [B, Lk, Hkv, D]
        Query head h uses KV head h // (Hq / Hkv).
    v : array, shape [B, Lk, Hkv, Dv]
    causal : bool
        Bottom-right aligned: query i sees keys ≤ i + Lk − Lq.
    window : int, optional
        With ``causal``: a query sees the last ``window`` of those keys only.
    q_lens, kv_lens : sequence of B integers, optional
        How many rows of each request are its own, where requests are not all as long as the
        arrays; the others may hold anything, and their output is 0.
    threshold : float or array [B] or [B, Hq], optional
        λ: a tile is skipped iff its gap < ln λ.  Larger skips more; 0 skips nothing.
    threshold_scale_factor : float or array [B] or [B, Hq], optional
        λ = factor / keys of the request.  Give one of the two.
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
    backend : {"wgmma", "mma", "simt", "reference"}, optional
        Default: the best kernel for this GPU that takes these arguments, ``wgmma`` on Hopper and
        ``mma`` from Ampere on; the report names it.  ``reference`` is the simulator, on the CPU.
    emulate : bool
        Run a tensor-core kernel's own source on the CPU, thread by thread (``mma``, unless
        ``backend`` says ``wgmma``): for a few tiles only, as the time grows with tiles × heads ×
        requests.
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

    Notes
    -----
    Of the last 64 kinds of call on a GPU the plan is remembered.  A CUDA graph needs its plan as
    long as it is replayed: capture one made by :func:`skip_softmax_plan`, and keep it.

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
    asked = (
        causal, window, q_lens, kv_lens, threshold, threshold_scale_factor, short_context, order,
        tile, softmax_scale, gap,
    )  # fmt: skip
    known = None
    if backend in (None, *TENSOR_CORE_BACKENDS) and not emulate:
        known = call_of(
            (q, k, v, out), (backend, *asked, cu_seqlens_q, cu_seqlens_k, page_table, sink_logits)
        )
        plan = _PLANS.get(known)
        if plan is not None:
            return _run(plan, q, k, v, out, return_report)
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
    out_shape = check_tensors(q, k, v)
    if out is not None:
        check_out(out, q, out_shape)
    settings = _settings(q, k, *asked)
    misfit = why_not_tensor_cores(q, v, settings.grid)
    no_tma = why_not_tma({"q": q, "k": k, "v": v} | ({} if out is None else {"out": out}))
    if emulate:
        if backend not in (None, *TENSOR_CORE_BACKENDS):
            raise ValueError(f"emulate=True runs the mma or the wgmma kernel, not {backend!r}")
        chosen = backend or "mma"
    else:
        device = detect()
        chosen = choose(backend, device, fits_tensor_cores=misfit is None, fits_tma=no_tma is None)
        _check_device(q, chosen, device.kind)
    if chosen in TENSOR_CORE_BACKENDS:
        _check_fit(chosen, misfit, no_tma)
        if not emulate:
            plan = PrefillPlan(q, k, v, settings, out, chosen)
            _PLANS.keep(known, plan)
            return _run(plan, q, k, v, out, return_report)
        result = arrays.empty_like(q, out_shape)
        report = emulated(q, k, v, result, settings, chosen)
    else:
        run_whole = _run_reference if chosen == "reference" else _run_simt
        result, report = run_whole(q, k, v, settings)
    if out is None:
        out = arrays.cast(result, q)
    elif out is not result:
        out[...] = arrays.cast(result, out)
    return (out, report) if return_report else out


def skip_softmax_plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    threshold_scale_factor: ArrayLike | None = None,
    short_context: str = "dense",
    order: str = "ends_first",
    softmax_scale: float | None = None,
    gap: bool = False,
    backend: str | None = None,
) -> PrefillPlan:
    """Check, compile and allocate once, for many calls on arrays that are alike.

    Parameters
    ----------
    q, k, v : array
        On a GPU; what is in them does not matter.
    causal, window, q_lens, kv_lens, threshold, threshold_scale_factor, short_context, order, \
softmax_scale, gap
        As in :func:`skip_softmax_attention`.
    backend : {"wgmma", "mma"}, optional
        Default: the best for this GPU and these arrays; ``plan.report`` names it.

    Returns
    -------
    PrefillPlan
        ``plan(q, k, v, out=...)`` launches a tensor-core kernel, also while a CUDA graph is
        captured; ``plan.report`` is the report of the last call.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`skip_softmax_attention`.

    Examples
    --------
    >>> import cupy  # doctest: +SKIP
    >>> plan = skip_softmax_plan(q, k, v, threshold=0.01)  # doctest: +SKIP
    >>> for layer in layers:  # doctest: +SKIP
    ...     plan(layer.q, layer.k, layer.v, out=layer.out)
    """
    q, k, v = arrays.adopt(q), arrays.adopt(k), arrays.adopt(v)
    check_tensors(q, k, v)
    settings = _settings(
        q, k, causal, window, q_lens, kv_lens, threshold, threshold_scale_factor, short_context,
        order, (64, 128), softmax_scale, gap,
    )  # fmt: skip
    if backend not in (None, *TENSOR_CORE_BACKENDS):
        raise ValueError(f"a plan's backend must be mma or wgmma, got {backend!r}")
    device, no_tma = detect(), why_not_tma({"q": q, "k": k, "v": v})
    chosen = backend or best_tensor_cores(device, fits_tma=no_tma is None)
    _check_fit(chosen, why_not_tensor_cores(q, v, settings.grid), no_tma)
    _check_device(q, choose(chosen, device), device.kind)
    return PrefillPlan(q, k, v, settings, backend=chosen)


def _settings(
    q: Any, k: Any, causal: bool, window: int | None, q_lens: Any, kv_lens: Any, threshold: Any,
    factor: Any, short_context: str, order: str, tile: tuple[int, int], scale: float | None,
    gap: bool,
) -> Settings:  # fmt: skip
    """Check what is asked for, apart from the arrays."""
    check_order(order)
    batch, lq, heads, head_dim = q.shape
    grid = Grid(tile, lq, k.shape[1], causal, window)
    spans = np.zeros((batch, 4), np.int32)
    spans[:, 1] = check_lengths("q_lens", q_lens, batch, lq)
    spans[:, 3] = check_lengths("kv_lens", kv_lens, batch, grid.lk)
    lam = np.stack(
        [
            _per_head(resolve(threshold, factor, max(int(keys), 1), short_context), batch, heads)[b]
            for b, keys in enumerate(spans[:, 3])
        ]
    )
    return Settings(grid, order, check_scale(scale, head_dim), lam, spans, gap)


def _run(plan: PrefillPlan, q: Any, k: Any, v: Any, out: Any, return_report: bool) -> Any:
    if not return_report:
        return plan(q, k, v, out=out)
    if out is None:
        out = plan.empty_out(q)
    return out, plan.fresh(q, k, v, out)


def _run_simt(q: Any, k: Any, v: Any, settings: Settings) -> tuple[Any, SkipReport]:
    from numba import config, cuda
    from numba.core.errors import NumbaPerformanceWarning

    from cuda_kernels.prefill_simt import CHUNK, make_kernel

    grid = settings.grid
    if grid.window is not None or (settings.spans[:, 1::2] != (grid.lq, grid.lk)).any():
        raise ValueError(
            "the simt kernel takes no window, q_lens or kv_lens; the tensor-core kernels and "
            'backend="reference" do'
        )
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
    ln_lam = arrays.from_numpy(ln_threshold(settings.threshold), q)
    stream = 0
    if not config.ENABLE_CUDASIM and (handle := arrays.current_stream(q)):
        stream = cuda.external_stream(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)  # lessons launch small grids
        kernel[(grid.groups, heads, batch), grid.rows, stream](
            *(arrays.bare(arrays.as_float32(x)) for x in (q, k, v)),
            np.float32(settings.scale),
            arrays.bare(ln_lam),
            grid.causal,
            ORDERS.index(settings.order),
            *(arrays.bare(x) for x in (out, lse, bound, state, gap)),
        )
    return out, SkipReport(state, gap, lse, bound, grid, settings.order, settings.threshold, "simt")


def _run_reference(q: Any, k: Any, v: Any, settings: Settings) -> tuple[Any, SkipReport]:
    from sim.skip_softmax import attend, scan

    grid, lam = settings.grid, settings.threshold
    batch, lq, heads, _ = q.shape
    map_shape = (batch, heads, grid.groups, grid.key_tiles)
    out = np.zeros((batch, lq, heads, v.shape[3]), np.float32)
    state, gap = np.zeros(map_shape, np.uint8), np.full(map_shape, -np.inf, np.float32)
    lse = np.full((batch, heads, lq), -np.inf, np.float32)
    bound = np.zeros((batch, heads, lq), np.float32)
    for b, (_, rows, _, keys) in enumerate(settings.spans.tolist()):
        if rows == 0 or keys == 0:
            continue
        q_b, k_b, v_b = (
            np.moveaxis(arrays.to_numpy(arrays.as_float32(x[b, :n])), 1, 0)
            for x, n in ((q, rows), (k, keys), (v, keys))
        )
        one = scan(
            q_b,
            k_b,
            tile=grid.tile,
            causal=grid.causal,
            window=grid.window,
            order=settings.order,
            softmax_scale=settings.scale,
            keep_row_max=bool((lam[b] > 1).any()),
        )
        tiles = one.decide(lam[b], short_context="allow")  # what to do above 1 was resolved before
        done = attend(q_b, k_b, v_b, tiles, softmax_scale=settings.scale)
        out[b, :rows] = np.moveaxis(done.output, 0, 1)
        lse[b, :, :rows], bound[b, :, :rows] = done.lse, done.dropped_mass_bound
        groups, key_tiles = tiles.state.shape[1:]
        state[b, :, :groups, :key_tiles], gap[b, :, :groups, :key_tiles] = tiles.state, one.gap
    fields = (arrays.from_numpy(x, q) for x in (state, gap, lse, bound))
    report = SkipReport(*fields, grid, settings.order, lam, "reference")
    return arrays.from_numpy(out, q), report


def _check_fit(backend: str, misfit: str | None, no_tma: str | None) -> None:
    """Refuse what a tensor-core kernel does not take."""
    misfit = misfit or (no_tma if backend == "wgmma" else None)
    if misfit is not None:
        raise ValueError(f"the {backend} kernel {misfit}")


def _check_device(q: Any, backend: str, kind: str) -> None:
    where, library = arrays.device_of(q), arrays.library_of(q)
    needs_gpu = backend in TENSOR_CORE_BACKENDS or (backend == "simt" and library == "torch")
    if needs_gpu and kind == "gpu" and where == "cpu":
        raise ValueError(f"q is a {library} array on cpu; move q, k and v to the GPU first")
    if backend == "simt" and kind == "simulator" and where != "cpu":
        raise ValueError(f"q is on {where}, but the CUDA simulator works on CPU arrays")


def _per_head(lam: NDArray[np.float64], batch: int, heads: int) -> NDArray[np.float64]:
    """Spread λ over [B, Hq]."""
    given = lam.shape
    if lam.ndim == 1:
        lam = lam[:, None]
    if lam.ndim > 2 or lam.shape not in ((), (batch, 1), (batch, heads)):
        raise ValueError(
            f"one threshold, or one for each of [{batch}] requests, or [{batch}, {heads}]; "
            f"got shape {given}"
        )
    return np.broadcast_to(lam, (batch, heads)).copy()
