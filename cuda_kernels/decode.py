"""The public doors to decode: a few new tokens against a KV cache, at once or by a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cuda_kernels import arrays, gpu
from cuda_kernels.backends import TENSOR_CORES, detect
from cuda_kernels.blocks.decode_mma import ROWS, choose_stages
from cuda_kernels.checks import check_alike, check_heads, check_out
from cuda_kernels.decode_plan import (
    H200,
    MAX_SPLITS,
    DecodePlan,
    DecodeSettings,
    blocks_at_a_time,
    choose_splits,
    emulated,
)
from cuda_kernels.remembered import Remembered, call_of
from sim.geometry import MAX_LENGTH, check_order
from sim.scores import check_scale
from sim.threshold import from_scale_factor, resolve

_PLANS = Remembered()
PAGES = (16, 64, 128)
MAX_QUERY_TOKENS = 8
LAYOUTS = {
    "NHD": ("[batch, length, KV heads, head_dim]", "[pages, page, KV heads, head_dim]"),
    "HND": ("[batch, KV heads, length, head_dim]", "[pages, KV heads, page, head_dim]"),
}
SPLIT_LAYOUTS = ("interleaved", "contiguous")


def skip_softmax_decode(
    q: Any,
    k: Any,
    v: Any,
    *,
    seq_lens: Any = None,
    page_table: Any = None,
    layout: str = "NHD",
    threshold: ArrayLike | None = None,
    threshold_scale_factor: ArrayLike | None = None,
    keys: int = 64,
    order: str = "ascending",
    splits: int | None = None,
    split_layout: str = "interleaved",
    seeded: bool = True,
    softmax_scale: float | None = None,
    out: Any = None,
    workspace: Any = None,
    return_report: bool = False,
    gap: bool = False,
    check: bool = False,
    emulate: bool = False,
) -> Any:
    """Attention of a few new tokens to a KV cache, reading V of kept tiles only.

    Parameters
    ----------
    q : array, shape [B, Lq, Hq, D]
        float16 or bfloat16, of NumPy, CuPy, PyTorch or DLPack; 1 to 8 new tokens of each request,
        causal among themselves; D is 64 or 128.
    k, v : array, shape [B, L, Hkv, D], or [pages, page, Hkv, D] with a page table
        The cache, new tokens included.  Query head h uses KV head h // (Hq / Hkv), of which at
        most 16 share one.  Pages have 16, 64 or 128 keys.
    seq_lens : array, shape [B], int32, optional
        Keys of each request, its new tokens included; default, without a page table: all L.
    page_table : array, shape [B, pages of the longest request], int32, optional
        Page p of the cache that holds keys page·i and on of request b, at [b, i].
    layout : {"NHD", "HND"}
        With ``HND``, heads stand before keys: k is [B, Hkv, L, D] or [pages, Hkv, page, D].
    threshold : float or array [B] or [B, Hkv], optional
        λ: a tile is skipped iff its gap < ln λ.  Larger skips more; 0 skips nothing.
    threshold_scale_factor : float or array [B] or [B, Hkv], optional
        λ = factor / keys of the request; where that exceeds 1 the request is computed densely.
        Give one of the two.
    keys : {64, 128}
        Keys of a tile.  A tile's vote group is the query heads of one KV head, for up to
        16 // heads new tokens.
    order : {"ascending", "descending", "ends_first"}
        Visit order within each split.
    splits : int, optional
        Blocks that share the cache of one vote group, 1 to 128; default: as many as fill this GPU
        (with ``emulate``, an H200).
    split_layout : {"interleaved", "contiguous"}
        Tile j goes to split j % splits, or each split gets a run of tiles, as even as possible.
    seeded : bool
        Start every split at the larger row maximum of tile 0 and of the newest tile.  Otherwise no
        split skips its first tile, as in NVIDIA's kernels.
    softmax_scale : float, optional
        Default D ** −0.5.
    out : array, shape [B, Lq, Hq, D], optional
        Written to and returned.
    workspace : array, float32, 1-D, optional
        For partial results, all zeros before its first use; one call at a time uses it.  Its size
        is ``skip_softmax_decode_plan(...).settings.workspace_size``.  Default: allocated.
    return_report : bool
        Also return a :class:`DecodeReport`.
    gap : bool
        Fill ``report.gap``: a build of its own, a little slower.
    check : bool
        Also check lengths, page table and thresholds that lie on the GPU, which waits for it.  What
        lies on the host is always checked.
    emulate : bool
        Run the kernel's own source on the CPU, thread by thread: for a few tiles only.

    Returns
    -------
    out : array, shape [B, Lq, Hq, D]
        In the library, dtype and device of ``q``.
    report : DecodeReport
        With ``return_report``.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; nothing has been launched then.
    RuntimeError
        If the kernel cannot run here.

    Notes
    -----
    λ, lengths and page table are read from device memory by the kernel.  A threshold on the GPU is
    taken as it is: above 1, negative or NaN, its request is computed densely.

    References
    ----------
    BLASST, arXiv 2512.12087; the rule and the splits are those of :mod:`sim.decode`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 1, 4, 64)).astype(np.float16)
    >>> k, v = rng.standard_normal((2, 1, 100, 2, 64)).astype(np.float16)
    >>> out, report = skip_softmax_decode(
    ...     q, k, v, threshold=0.01, emulate=True, return_report=True
    ... )
    >>> out.shape, report.state.shape, report.bytes.v
    ((1, 1, 4, 64), (1, 2, 1, 2), 25600)
    """
    rule = threshold if threshold_scale_factor is None else threshold_scale_factor
    changes: dict[str, Any] = {"seq_lens": seq_lens, "page_table": page_table, "out": out}
    if _on_gpu(rule):
        changes["threshold"] = rule
    known = None
    if not (emulate or check or workspace is not None):
        fixed = (
            layout, keys, order, splits, split_layout, seeded, softmax_scale, gap,
            threshold is None, threshold_scale_factor is None,
            None if "threshold" in changes else rule,
        )  # fmt: skip
        known = call_of((q, k, v, *changes.values()), fixed)
        if known is not None:  # calls on two streams must not share partial results
            known = arrays.current_stream(q), *known
    plan = _PLANS.get(known)
    if plan is None:
        tensors, settings = _prepare(
            q, k, v, seq_lens, page_table, layout, threshold, threshold_scale_factor, keys, order,
            splits, split_layout, seeded, softmax_scale, out, workspace, gap, check, emulate,
        )  # fmt: skip
        if emulate:
            report = emulated(tensors, settings, workspace)
            return (tensors["out"], report) if return_report else tensors["out"]
        plan = DecodePlan(tensors, settings, workspace)
        _PLANS.keep(known, plan)
        changes = {"out": tensors["out"]}
    return plan.fresh(q, k, v, **changes) if return_report else plan(q, k, v, **changes)


def skip_softmax_decode_plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    seq_lens: Any = None,
    page_table: Any = None,
    layout: str = "NHD",
    threshold: ArrayLike | None = None,
    threshold_scale_factor: ArrayLike | None = None,
    keys: int = 64,
    order: str = "ascending",
    splits: int | None = None,
    split_layout: str = "interleaved",
    seeded: bool = True,
    softmax_scale: float | None = None,
    workspace: Any = None,
    gap: bool = False,
    check: bool = False,
) -> DecodePlan:
    """Check, compile and allocate once, for many calls on arrays that are alike.

    Parameters
    ----------
    q, k, v : array
        On a GPU; what is in them does not matter.
    seq_lens, page_table, layout, threshold, threshold_scale_factor, keys, order, splits, \
split_layout, seeded, softmax_scale, workspace, gap, check
        As in :func:`skip_softmax_decode`.

    Returns
    -------
    DecodePlan
        ``plan(q, k, v, seq_lens=..., out=...)`` launches, also while a CUDA graph is captured;
        ``plan.report`` is the report of the last call.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`skip_softmax_decode`.

    Examples
    --------
    >>> import cupy  # doctest: +SKIP
    >>> plan = skip_softmax_decode_plan(
    ...     q, k, v, seq_lens=seq_lens, page_table=table, threshold_scale_factor=factor
    ... )  # doctest: +SKIP
    >>> for layer in layers:  # doctest: +SKIP
    ...     plan(layer.q, layer.k, layer.v, out=layer.out)
    """
    tensors, settings = _prepare(
        q, k, v, seq_lens, page_table, layout, threshold, threshold_scale_factor, keys, order,
        splits, split_layout, seeded, softmax_scale, None, workspace, gap, check, emulate=False,
    )  # fmt: skip
    return DecodePlan(tensors, settings, workspace)


def _prepare(
    q: Any, k: Any, v: Any, seq_lens: Any, page_table: Any, layout: str, threshold: Any,
    factor: Any, keys: int, order: str, splits: int | None, split_layout: str, seeded: bool,
    scale: float | None, out: Any, workspace: Any, gap: bool, check: bool, emulate: bool,
) -> tuple[dict[str, Any], DecodeSettings]:  # fmt: skip
    """Check what is asked for; give the kernel's arrays, on the device of q, and the rest."""
    _choice("layout", layout, tuple(LAYOUTS))
    _choice("split_layout", split_layout, SPLIT_LAYOUTS)
    _choice("keys", keys, (64, 128))
    check_order(order)
    q, k, v = arrays.adopt(q), arrays.adopt(k), arrays.adopt(v)
    paged = page_table is not None
    check_alike(q, k, v, LAYOUTS[layout][paged])
    if k.shape != v.shape:
        raise ValueError(
            f"k and v must share their shape, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if layout == "HND":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    batch, tokens, heads, head_dim = (int(n) for n in q.shape)
    blocks, page, kv_heads = (int(n) for n in k.shape[:3])
    check_heads(heads, kv_heads)
    group = heads // kv_heads
    if arrays.dtype_name(q) == "float32":
        raise ValueError(
            "q, k and v must be float16 or bfloat16 for the decode kernel, got float32"
        )
    if head_dim not in (64, 128):
        raise ValueError(f"head_dim must be 64 or 128 for the decode kernel, got {head_dim}")
    if group > ROWS:
        raise ValueError(
            f"at most {ROWS} query heads may share a KV head, got {heads} and {kv_heads} heads"
        )
    if tokens > MAX_QUERY_TOKENS:
        raise ValueError(
            f"q must have 1 to {MAX_QUERY_TOKENS} new tokens, got {tokens}: "
            "skip_softmax_attention takes more"
        )
    if out is None:
        out = arrays.empty_like(q, tuple(q.shape))
    else:
        check_out(out, q, tuple(q.shape))
    if not emulate:
        _check_gpu(q)
    elif arrays.device_of(q) != "cpu":
        raise ValueError(f"emulate=True runs on the CPU, but q is on {arrays.device_of(q)}")

    # --- the cache: what is on the host is checked, what is on the device if asked for
    capacity = page
    if paged:
        if page not in PAGES:
            raise ValueError(f"pages must have 16, 64 or 128 keys, got {page}")
        page_table, table = _integers("page_table", page_table, q, (batch, None), check)
        capacity = page * int(page_table.shape[1])
        if seq_lens is None:
            raise ValueError("seq_lens must be given with a page table")
    elif blocks != batch:
        raise ValueError(f"q and k must share batch, got {batch} and {blocks}")
    else:
        page_table, table = arrays.from_numpy(np.arange(batch, dtype=np.int32)[:, None], q), None
    if capacity > MAX_LENGTH:
        raise ValueError(f"the cache must have at most {MAX_LENGTH} keys a request, got {capacity}")
    lengths = np.full(batch, capacity, np.int32) if seq_lens is None else seq_lens
    seq_lens, lengths = _integers("seq_lens", lengths, q, (batch,), check)
    if lengths is not None:
        wrong = np.flatnonzero((lengths < tokens) | (lengths > capacity))
        if wrong.size:
            raise ValueError(
                f"seq_lens must lie between the {tokens} new tokens and the {capacity} keys that "
                f"the cache has room for, got {lengths[wrong[0]]} for request {wrong[0]}"
            )
        if table is not None:
            used = np.arange(table.shape[1]) * page < lengths[:, None]
            wrong = np.argwhere(used & ((table < 0) | (table >= blocks)))
            if wrong.size:
                b, i = wrong[0].tolist()
                raise ValueError(
                    f"page_table must name pages 0 to {blocks - 1} for the keys in use, "
                    f"got {table[b, i]} for page {i} of request {b}"
                )

    lam, skips = _thresholds(threshold, factor, q, (batch, kv_heads), check)
    longest = capacity if lengths is None else int(lengths.max())
    shape = (batch, tokens, heads, kv_heads, head_dim, capacity, page if paged else None, layout)
    multiprocessors, shared = H200 if emulate else _gpu()
    stages = choose_stages(head_dim, keys, shared)
    settings = DecodeSettings(
        *shape, keys, order, split_layout, 1, stages, bool(seeded), factor is not None, bool(gap),
        skips, check_scale(scale, head_dim),
    )  # fmt: skip
    if splits is None:
        slots = blocks_at_a_time(head_dim, keys, stages, multiprocessors, shared)
        splits = choose_splits(settings.groups, -(-longest // keys), slots)
    elif isinstance(splits, bool) or not isinstance(splits, (int, np.integer)):
        raise ValueError(f"splits must be an integer, got {splits!r}")
    elif not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be between 1 and {MAX_SPLITS}, got {splits}")
    settings = DecodeSettings(**{**vars(settings), "splits": int(splits)})
    if workspace is not None:
        _check_workspace(workspace, q, settings.workspace_size)
    tensors = {
        "q": q, "k": k, "v": v, "out": out, "page_table": page_table, "seq_lens": seq_lens,
        "threshold": lam,
    }  # fmt: skip
    return tensors, settings


def _integers(
    name: str, given: Any, q: Any, shape: tuple[int | None, ...], check: bool
) -> tuple[Any, np.ndarray | None]:
    """Give int32 on the device of q, and on the host where they are known there or asked for."""
    axes = ", ".join("pages" if n is None else str(n) for n in shape)
    on_device = _on_gpu(given)
    host = None if on_device else np.asarray(given)
    array = given if host is None else host
    kind = arrays.dtype_name(array) if on_device else str(array.dtype)
    fits = array.ndim == len(shape) and all(
        n is None or n == m for n, m in zip(shape, array.shape, strict=True)
    )
    whole = kind == "int32" if on_device else array.dtype.kind in "iu"
    if not fits or not whole or 0 in array.shape:
        raise ValueError(f"{name} must be int32 [{axes}], got {kind} of shape {tuple(array.shape)}")
    if host is None:
        if arrays.device_of(given) != arrays.device_of(q):
            raise ValueError(
                f"{name} must be on the device of q, {arrays.device_of(q)}, "
                f"got {arrays.device_of(given)}"
            )
        return given, arrays.to_numpy(given) if check else None
    host = host.astype(np.int64).clip(-(1 << 31), (1 << 31) - 1).astype(np.int32)
    return arrays.from_numpy(host, q), host


def _thresholds(
    threshold: Any, factor: Any, q: Any, shape: tuple[int, int], check: bool
) -> tuple[Any, bool]:
    """Give λ or the factor, [B, Hkv] float32 on the device of q, and whether any tile can go."""
    if (threshold is None) == (factor is None):
        raise ValueError("give threshold or threshold_scale_factor, one of them")
    name = "threshold" if factor is None else "threshold_scale_factor"
    given = threshold if factor is None else factor
    on_gpu = _on_gpu(given)
    if on_gpu and (tuple(given.shape) != shape or arrays.dtype_name(given) != "float32"):
        raise ValueError(
            f"{name} on a GPU must be float32 [{shape[0]}, {shape[1]}], "
            f"got {arrays.dtype_name(given)} of shape {tuple(given.shape)}"
        )
    if on_gpu and not check:
        return given, True
    host = arrays.to_numpy(given) if hasattr(given, "detach") or on_gpu else given
    values = resolve(host, None, 1, "allow") if factor is None else from_scale_factor(host, 1)
    if factor is None and (values > 1).any():
        raise ValueError(
            f"threshold must be at most 1 in decode, got {threshold!r}: above 1 a split may skip "
            "the tile that holds a row's maximum"
        )
    if on_gpu:
        return given, True
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim > 2 or values.shape not in ((), (shape[0], 1), shape):
        raise ValueError(
            f"one {name}, or one for each of [{shape[0]}] requests, or [{shape[0]}, {shape[1]}] "
            f"requests and KV heads; got shape {values.shape}"
        )
    spread = np.broadcast_to(values, shape).astype(np.float32)
    return arrays.from_numpy(spread, q), bool((spread > 0).any())


def _on_gpu(x: Any) -> bool:
    root = type(x).__module__.partition(".")[0]
    return root in ("cupy", "torch") and arrays.device_of(x) != "cpu"


def _check_workspace(workspace: Any, q: Any, size: int) -> None:
    if (
        arrays.library_of(workspace) != arrays.library_of(q)
        or arrays.dtype_name(workspace) != "float32"
        or arrays.device_of(workspace) != arrays.device_of(q)
        or workspace.ndim != 1
        or workspace.shape[0] < size
    ):
        raise ValueError(
            f"workspace must be a {arrays.library_of(q)} array of at least {size} float32 on "
            f"{arrays.device_of(q)}, got {arrays.dtype_name(workspace)} of shape "
            f"{tuple(workspace.shape)} on {arrays.device_of(workspace)}"
        )


def _check_gpu(q: Any) -> None:
    device = detect()
    if device.kind != "gpu" or (device.compute_capability or (0, 0)) < TENSOR_CORES:
        raise RuntimeError(
            f"the decode kernel cannot run here: {device.reason or f'this is {device.name}'}; it "
            "needs compute capability 8.0 or later; emulate=True runs it on the CPU"
        )
    if arrays.device_of(q) == "cpu":
        raise ValueError("q is on cpu; move q, k and v to the GPU first")


def _gpu() -> tuple[int, int]:
    """Multiprocessors of the current GPU, and the shared memory of each."""
    found = gpu.current()
    return found.multiprocessors, found.shared_bytes


def _choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
