"""What can be known of the arrays of a call before anything is launched."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels import arrays


def check_tensors(q: Any, k: Any, v: Any) -> tuple[int, ...]:
    """Check what can be known before a launch; give the shape of the output."""
    check_alike(q, k, v, "[batch, length, heads, head_dim]")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must share batch, length and heads, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must share batch, got {q.shape[0]} and {k.shape[0]}")
    check_heads(q.shape[2], k.shape[2])
    return (*q.shape[:3], v.shape[3])


def check_alike(q: Any, k: Any, v: Any, cache: str) -> None:
    """Check rank, library, dtype, device, strides and head_dim; ``cache`` names k's axes."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        library = arrays.library_of(array)
        if array.ndim != 4 or 0 in array.shape:
            axes = "[batch, length, heads, head_dim]" if name == "q" else cache
            raise ValueError(
                f"{name} must be {axes}, none of them 0; got shape {tuple(array.shape)}"
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
        check_layout(name, array)
        if arrays.wants_gradient(array):
            raise ValueError(
                f"{name} requires a gradient, and there is no backward pass: call under "
                "torch.no_grad(), or on tensors that require none"
            )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share head_dim, got {q.shape[3]} and {k.shape[3]}")


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuse query heads that do not share KV heads evenly."""
    if heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {heads} and {kv_heads}; heads are "
            "the third axis (the second in HND caches)"
        )


def check_layout(name: str, array: Any) -> None:
    """Refuse strides and addresses that 16-byte copies cannot work with."""
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
    if array.shape[1] * strides[1] >= 1 << 32:
        raise ValueError(
            f"{name} must have less than 4 GB between its first and last row, got "
            f"{array.shape[1]} rows {strides[1]} bytes apart"
        )


def check_out(out: Any, q: Any, shape: tuple[int, ...]) -> None:
    """Refuse an output array that does not match."""
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
    check_layout("out", out)


def check_lengths(name: str, lengths: Any, batch: int, longest: int) -> NDArray[np.int32]:
    """Return the lengths of the requests, [B] int32; all are the longest where none are given."""
    if lengths is None:
        return np.full(batch, longest, np.int32)
    given = np.asarray(lengths)
    if given.shape != (batch,) or given.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be {batch} integers on the host, one for each request; "
            f"got {given.dtype} of shape {given.shape}"
        )
    if (given < 0).any() or (given > longest).any():
        raise ValueError(f"{name} must be between 0 and {longest}, got {given.tolist()}")
    return given.astype(np.int32)
