"""The rule written as literally as can be: one row, one tile, one comparison at a time.

Independent of ``sim``: plain Python loops, float64, its own geometry.  Slow, for small cases.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Literal:
    """Result for one head."""

    state: np.ndarray  # [groups, nk]
    gap: np.ndarray  # [groups, nk]
    output: np.ndarray  # [lq, dv]
    lse: np.ndarray  # [lq]
    dropped_mass: np.ndarray  # [lq]
    bound: np.ndarray  # [lq]


def order_of(name, tiles):
    """Visit order of a list of key tiles."""
    if name == "ascending":
        return list(tiles)
    if name == "descending":
        return list(tiles)[::-1]
    rest = list(tiles)
    first = [rest.pop()] if rest else []
    second = [rest.pop(0)] if rest and rest[0] == 0 else []
    return first + second + rest[::-1]


def skip_softmax(q, k, v, *, tile, causal, order, scale, lam, window=None):
    """Skip-softmax attention of one head: q [lq, d], k [lk, d], v [lk, dv]."""
    lq, lk, (rows, keys) = len(q), len(k), tile
    groups, nk = math.ceil(lq / rows), math.ceil(lk / keys)
    s = scale * (q.astype(float) @ k.astype(float).T)
    for r in range(lq):
        for c in range(lk):
            if causal and c > r + lk - lq:
                s[r, c] = -math.inf
            if window and c <= r + lk - lq - window:
                s[r, c] = -math.inf
    state = np.zeros((groups, nk), np.uint8)
    gap = np.full((groups, nk), -math.inf)
    output, lse = np.zeros((lq, v.shape[1])), np.full(lq, -math.inf)
    dropped, bound = np.zeros(lq), np.zeros(lq)
    for i in range(groups):
        real = range(i * rows, min((i + 1) * rows, lq))
        seen = [
            j
            for j in range(nk)
            if any(s[r, j * keys : (j + 1) * keys].max() > -math.inf for r in real)
        ]
        m = dict.fromkeys(real, -math.inf)
        l = dict.fromkeys(real, 0.0)
        u = dict.fromkeys(real, 0.0)
        acc = {r: np.zeros(v.shape[1]) for r in real}
        for j in order_of(order, seen):
            part = {r: s[r, j * keys : (j + 1) * keys] for r in real}
            votes = []
            for r in real:
                tile_max = part[r].max()
                if tile_max == -math.inf:
                    votes.append(True)
                elif m[r] == -math.inf:
                    votes.append(False)
                    gap[i, j] = math.inf
                else:
                    votes.append(lam > 0 and tile_max - m[r] < math.log(lam))
                    gap[i, j] = max(gap[i, j], tile_max - m[r])
            state[i, j] = 2 if all(votes) else 1
            for r in real:
                tile_max = part[r].max()
                if tile_max == -math.inf:
                    continue
                if state[i, j] == 2:
                    u[r] += np.isfinite(part[r]).sum() * math.exp(tile_max - m[r])
                    continue
                new = max(m[r], tile_max)
                alpha = math.exp(m[r] - new) if m[r] > -math.inf else 0.0
                p = np.exp(part[r] - new)
                l[r] = l[r] * alpha + p.sum()
                u[r] = u[r] * alpha
                acc[r] = acc[r] * alpha + p @ v[j * keys : (j + 1) * keys]
                m[r] = new
        for r in real:
            if l[r] == 0:
                continue
            output[r], lse[r] = acc[r] / l[r], m[r] + math.log(l[r])
            top = s[r].max()
            dense = top + math.log(np.exp(s[r] - top).sum())
            dropped[r] = max(0.0, -math.expm1(lse[r] - dense))
            bound[r] = u[r] / (l[r] + u[r])
    return Literal(state, gap, output, lse, dropped, bound)
