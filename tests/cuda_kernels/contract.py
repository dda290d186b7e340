"""The agreement contract: what every kernel must share with the simulator, and how nearly.

Works on NumPy arrays in kernel layout, [batch, length, heads, head_dim].
"""

import numpy as np

import sim
from sim.reference import attention


def heads_first(array):
    """[L, H, D] → [H, L, D]."""
    return np.ascontiguousarray(np.moveaxis(array, 1, 0))


def rounded(x, dtype):
    """Round float32 to a dtype by name, and back."""
    if dtype != "bfloat16":
        return x.astype(dtype).astype(np.float32)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def low_precision(q, k, v, tiles, scale, dtype):
    """Attention of one request with weights and output rounded to ``dtype``: a rough one.

    A kernel's weights are relative to whatever maximum it keeps.  So the largest of a row is not 1,
    which would be exact, but the number after it that rounding changes most.
    """
    worst = np.float32(1 + {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}[dtype])
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]), np.float32)
    for h in range(q.shape[0]):
        kv = h // (q.shape[0] // k.shape[0])
        s = np.float32(scale) * (q[h].astype(np.float32) @ k[kv].astype(np.float32).T)
        rows, keys = tiles.grid.tile
        seen = np.arange(s.shape[1]) < tiles.grid.visible()[:, None]
        kept = ~tiles.skipped[h].repeat(rows, 0).repeat(keys, 1)[: s.shape[0], : s.shape[1]]
        s[~(seen & kept)] = -np.inf
        m = s.max(axis=1, keepdims=True)
        p = worst * np.exp(s - np.where(np.isfinite(m), m, 0))
        weights = rounded(p, dtype)
        l = np.maximum(p.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        out[h] = weights @ v[kv].astype(np.float32) / l
    return rounded(out, dtype)


def check(case, tensors, out, report_state, gap, lse, bound):
    """Assert the contract for one case; arrays as the kernel returned them, on the host.

    Returns the number of tiles skipped, so that a suite can see to it that some were.
    """
    q, k, v = tensors
    ulp = {"float16": 2.0**-16, "bfloat16": 2.0**-13, "float32": 2.0**-20}[case.dtype]
    skipped = 0
    for b in range(q.shape[0]):
        q1, k1, v1 = (heads_first(x[b]) for x in (q, k, v))
        scan = sim.scan(q1, k1, tile=case.tile, causal=case.causal, order=case.order)
        own = sim.TileMap(report_state[b], scan.grid, case.order, np.zeros(q1.shape[0]))
        skipped += int(own.skipped.sum())

        # 1. gaps, and maps but for tiles on the edge
        top = np.abs(scan.row_max[np.isfinite(scan.row_max)]).max()
        room = 1e-3 + 4e-6 * top
        finite = np.isfinite(scan.gap)
        assert np.array_equal(np.isfinite(gap[b]), finite)
        assert np.array_equal(gap[b][~finite], scan.gap[~finite])
        assert np.abs(gap[b][finite] - scan.gap[finite]).max(initial=0) <= room
        expected = scan.decide(case.threshold)
        differs = expected.state != own.state
        if case.threshold > 0:
            assert (np.abs(scan.gap[differs] - np.log(case.threshold)) <= room).all()
        assert differs.sum() <= 1e-3 * own.visited.sum()

        # 2. output against float64 over exactly the keys that this kernel kept
        exact = attention(q1, k1, v1, causal=case.causal, tiles=own)
        rough = low_precision(q1, k1, v1, own, q.shape[3] ** -0.5, case.dtype)
        error = np.abs(heads_first(out[b]) - exact.output).max()
        allowed = 2 * np.abs(rough - exact.output).max() + ulp * np.abs(v1).max()
        assert error <= allowed, f"output is off by {error:.3g}, allowed {allowed:.3g}"
        seen = np.isfinite(exact.lse)
        assert np.array_equal(np.isfinite(lse[b]), seen)
        assert np.abs(lse[b][seen] - exact.lse[seen]).max(initial=0) <= room

        # 3. the certified bound
        reference = sim.attend(*(x.astype(np.float64) for x in (q1, k1, v1)), own)
        assert (bound[b] >= reference.dropped_mass - 1e-9).all()
        assert (bound[b] <= reference.dropped_mass_bound + 1e-3).all()
    return skipped
