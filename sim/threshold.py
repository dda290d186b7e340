"""The threshold λ in all its spellings: λ, scale factor, base-2 logarithm, target sparsity.

A tile is skipped iff its gap < ln λ, so a **larger λ skips more**.  TensorRT-LLM states
``threshold_scale_factor``, with λ = threshold_scale_factor / KV length of the request.
Above λ = 1 a tile may be skipped although it holds the row's maximum, and answers go wrong;
what happens to such a request is always an explicit choice (``short_context``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

SHORT_CONTEXT = ("dense", "allow")
"""For λ = factor / length > 1: compute without skipping, or skip as NVIDIA's kernels do."""


def _not_negative(name: str, value: ArrayLike) -> NDArray[np.float64]:
    try:
        if np.asarray(value).dtype.kind not in "biuf":  # text that looks like a number is none
            raise TypeError
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return array


def from_scale_factor(threshold_scale_factor: ArrayLike, kv_length: int) -> NDArray[np.float64]:
    """λ = threshold_scale_factor / KV length.

    Parameters
    ----------
    threshold_scale_factor : float or array
        Finite and ≥ 0.
    kv_length : int
        Keys of the request, cached ones included.

    Returns
    -------
    ndarray, float64
        λ, of the factor's shape.

    Raises
    ------
    ValueError
        If the factor is negative or not finite, or the length is below 1.

    Examples
    --------
    >>> float(from_scale_factor(600, 60_000))
    0.01
    """
    if kv_length < 1:
        raise ValueError(f"kv_length must be at least 1, got {kv_length}")
    return _not_negative("threshold_scale_factor", threshold_scale_factor) / kv_length


def to_scale_factor(threshold: ArrayLike, kv_length: int) -> NDArray[np.float64]:
    """Give the scale factor that yields λ at this KV length.

    Examples
    --------
    >>> float(to_scale_factor(0.01, 60_000))
    600.0
    """
    if kv_length < 1:
        raise ValueError(f"kv_length must be at least 1, got {kv_length}")
    return _not_negative("threshold", threshold) * kv_length


def to_log2(threshold: ArrayLike) -> NDArray[np.float64]:
    """log₂ λ, the form kernels with base-2 exponentials compare in; −inf for λ = 0.

    Examples
    --------
    >>> float(to_log2(0.25))
    -2.0
    """
    with np.errstate(divide="ignore"):
        return np.log2(_not_negative("threshold", threshold))


def from_log2(log2_threshold: ArrayLike) -> NDArray[np.float64]:
    """λ from its base-2 logarithm.

    Examples
    --------
    >>> float(from_log2(-2.0))
    0.25
    """
    return np.exp2(np.asarray(log2_threshold, np.float64))


def ln_threshold(threshold: ArrayLike) -> NDArray[np.float32]:
    """Ln λ in float32, the number a gap is compared with; −inf for λ = 0 (nothing is skipped).

    Examples
    --------
    >>> round(float(ln_threshold(0.01)), 4)
    -4.6052
    """
    with np.errstate(divide="ignore"):
        return np.log(_not_negative("threshold", threshold)).astype(np.float32)


def for_target_sparsity(gap: NDArray[np.float32], target_sparsity: float) -> float:
    """Find the λ ≤ 1 that skips as much as possible, but no more than the target.

    Parameters
    ----------
    gap : ndarray of any shape, float32
        Gaps in natural-log units, +inf for first visited tiles, −inf for tiles not visited.
    target_sparsity : float
        Skipped ÷ visited tiles, in [0, 1].

    Returns
    -------
    float
        λ.  Its logarithm lies half-way to the next tile, so rounding decides nothing.

    Raises
    ------
    ValueError
        If the target is outside [0, 1] or not to be had with λ ≤ 1.

    Examples
    --------
    >>> gap = np.array([np.inf, -1, -3, -2], np.float32)
    >>> lam = for_target_sparsity(gap, 0.5)
    >>> bool(np.exp(-2) < lam < np.exp(-1))
    True
    """
    if not 0 <= target_sparsity <= 1:
        raise ValueError(f"target_sparsity must lie in [0, 1], got {target_sparsity!r}")
    visited = np.sort(gap[gap != -np.inf], axis=None)
    wanted = math.floor(target_sparsity * visited.size + 1e-9)
    skippable = int(np.searchsorted(visited, np.float32(0)))
    if wanted == 0:
        return 0.0
    if wanted > skippable:
        raise ValueError(
            f"target_sparsity {target_sparsity:g} is out of reach: λ ≤ 1 skips at most "
            f"{math.floor(skippable / visited.size * 1e4) / 1e4:g} of these tiles"
        )
    below = float(visited[wanted - 1])
    above = min(float(visited[wanted]), 0.0) if wanted < visited.size else 0.0
    middle = float(np.float32((below + above) / 2))
    ln_lam = middle if middle > below else above  # above == below: a tie, skip none of the equals
    return math.exp(ln_lam)


def resolve(
    threshold: ArrayLike | None,
    threshold_scale_factor: ArrayLike | None,
    kv_length: int,
    short_context: str = "dense",
) -> NDArray[np.float64]:
    """Turn either spelling into the λ that is applied.

    Parameters
    ----------
    threshold, threshold_scale_factor : float or array, exactly one of them
    kv_length : int
        Keys of the request.
    short_context : {"dense", "allow"}
        What happens where factor / length exceeds 1.

    Returns
    -------
    ndarray, float64
        λ; 0 where the request is computed densely.

    Raises
    ------
    ValueError
        If both or neither is given, a value is negative, or a literal threshold exceeds 1
        without ``short_context="allow"``.

    Examples
    --------
    >>> float(resolve(None, 600, 300))  # λ would be 2
    0.0
    """
    if short_context not in SHORT_CONTEXT:
        raise ValueError(
            f"short_context must be one of {', '.join(SHORT_CONTEXT)}, got {short_context!r}"
        )
    if threshold is not None and threshold_scale_factor is not None:
        raise ValueError("give threshold or threshold_scale_factor, not both")
    if threshold is not None:
        lam = _not_negative("threshold", threshold)
        if short_context != "allow" and (lam > 1).any():
            raise ValueError(
                f"threshold must be at most 1, got {threshold!r}: above 1 a tile that holds a "
                "row's maximum may be skipped; short_context=allow lets you see it happen"
            )
        return lam
    if threshold_scale_factor is None:
        raise ValueError("give threshold or threshold_scale_factor")
    lam = from_scale_factor(threshold_scale_factor, kv_length)
    return lam if short_context == "allow" else np.where(lam > 1, 0.0, lam)
