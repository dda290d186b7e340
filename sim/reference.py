"""Dense attention in float64: the truth that everything else is held to.

Deliberately naive: one head at a time, the whole score matrix at once, no tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.geometry import TileMap


class Attention(NamedTuple):
    """Output [Hq, Lq, Dv] and lse [Hq, Lq], both float64; lse is natural log, after the scale."""

    output: NDArray[np.float64]
    lse: NDArray[np.float64]


def attention(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    *,
    causal: bool = True,
    window: int | None = None,
    softmax_scale: float | None = None,
    tiles: TileMap | None = None,
) -> Attention:
    """softmax(scale · q kᵀ) v in float64, optionally over exactly the keys of computed tiles.

    Parameters
    ----------
    q : ndarray, shape [Hq, Lq, D]
    k : ndarray, shape [Hkv, Lk, D]
    v : ndarray, shape [Hkv, Lk, Dv]
        Query head h uses KV head h // (Hq / Hkv).
    causal : bool
        Bottom-right aligned: query i sees keys ≤ i + Lk − Lq.
    window : int, optional
        Of those keys a query sees the last ``window`` only.
    softmax_scale : float, optional
        Default D ** −0.5.
    tiles : TileMap, optional
        Leave out the keys of skipped tiles.

    Returns
    -------
    Attention
        A row that sees no key has output 0 and lse −inf.

    Examples
    --------
    >>> q = k = np.zeros((1, 2, 4)); v = np.arange(2.0).reshape(1, 2, 1)
    >>> attention(q, k, v).output.ravel().tolist()
    [0.0, 0.5]
    """
    heads, lq, head_dim = q.shape
    lk = k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    output = np.zeros((heads, lq, v.shape[2]))
    lse = np.full((heads, lq), -np.inf)
    for h in range(heads):
        kv = h // (heads // k.shape[0])
        scores = scale * (q[h].astype(np.float64) @ k[kv].astype(np.float64).T)  # [Lq, Lk]
        distance = np.arange(lq)[:, None] + lk - lq - np.arange(lk)
        if causal:
            scores[distance < 0] = -np.inf
        if window is not None:
            scores[distance >= window] = -np.inf
        if tiles is not None:
            rows, keys = tiles.grid.tile
            skipped = tiles.skipped[h].repeat(rows, axis=0).repeat(keys, axis=1)[:lq, :lk]
            scores[skipped] = -np.inf
        row_max = scores.max(axis=1)
        seen = row_max > -np.inf
        p = np.exp(scores[seen] - row_max[seen, None])
        row_sum = p.sum(axis=1)
        output[h, seen] = p @ v[kv].astype(np.float64) / row_sum[:, None]
        lse[h, seen] = row_max[seen] + np.log(row_sum)
    return Attention(output, lse)
