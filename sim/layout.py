"""The order of axes: heads first here, as the simulator thinks; length before heads in kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def to_kernel_layout(x: ArrayLike) -> NDArray:
    """Turn the heads of one request into a batch of one, as kernels take it.

    Parameters
    ----------
    x : array, shape [H, L, D]

    Returns
    -------
    ndarray, shape [1, L, H, D]
        Contiguous.

    Raises
    ------
    ValueError
        If ``x`` has not three axes.

    Examples
    --------
    >>> to_kernel_layout(np.zeros((4, 100, 64))).shape
    (1, 100, 4, 64)
    """
    heads = np.asarray(x)
    if heads.ndim != 3:
        raise ValueError(f"x must be [heads, length, head_dim], got shape {heads.shape}")
    return np.ascontiguousarray(np.moveaxis(heads, 0, 1)[None])


def from_kernel_layout(x: ArrayLike, request: int = 0) -> NDArray:
    """Take the heads of one request out of a batch.

    Parameters
    ----------
    x : array, shape [B, L, H, D]
    request : int

    Returns
    -------
    ndarray, shape [H, L, D]
        Contiguous.

    Raises
    ------
    ValueError
        If ``x`` has not four axes, or there is no such request.

    Examples
    --------
    >>> from_kernel_layout(to_kernel_layout([[[1, 2]], [[3, 4]]])).tolist()
    [[[1, 2]], [[3, 4]]]
    """
    batch = np.asarray(x)
    if batch.ndim != 4:
        raise ValueError(f"x must be [batch, length, heads, head_dim], got shape {batch.shape}")
    if not 0 <= request < len(batch):
        raise ValueError(f"request must be 0 to {len(batch) - 1}, got {request}")
    return np.ascontiguousarray(np.moveaxis(batch[request], 1, 0))
