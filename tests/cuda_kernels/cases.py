"""One case list for every kernel: tails, odd shapes, masks, orders, scales, a real head.

Small enough for Numba's CUDA simulator, where a tile takes about a tenth of a second.
"""

from dataclasses import dataclass

import numpy as np

from sim.traces import bundled, read_trace


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one call."""

    name: str
    lq: int = 75
    lk: int = 75
    batch: int = 1
    hq: int = 1
    hkv: int = 1
    d: int = 16
    dv: int = 16
    causal: bool = True
    order: str = "ends_first"
    tile: tuple[int, int] = (8, 16)
    threshold: float = 0.05
    scale: float = 1.0  # of the scores
    dtype: str = "float16"
    source: str = "patchy"

    def tensors(self):
        """Fresh q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; the seed is the name."""
        if self.source == "real":
            return crop_of_a_real_head(self)
        rng = np.random.default_rng(list(self.name.encode()))
        q = self.scale * rng.standard_normal((self.batch, self.lq, self.hq, self.d))
        k = rng.standard_normal((self.batch, self.lk, self.hkv, self.d))
        v = rng.standard_normal((self.batch, self.lk, self.hkv, self.dv))
        keys, strength = self.tile[1], (self.d / 16) ** 0.5
        faint = np.arange(self.lk) // keys % 3 == 1  # every third tile can be skipped
        q[..., 0] = 3 * self.scale
        k[..., 0] = -6 * strength * faint[:, None]
        k[:, :2, :, 0] = 4 * strength
        return tuple(x.astype(self.dtype) for x in (q, k, v))

    def bfloat16_tensors(self):
        """Such tensors with bfloat16 values, as float32."""
        bits = [x.astype(np.float32).view(np.uint32) & 0xFFFF0000 for x in self.tensors()]
        return tuple(x.astype(np.uint32).view(np.float32) for x in bits)


def crop_of_a_real_head(case):
    """Queries around token 90 of a bundled head against keys 0 … 95: sink and diagonal included."""
    trace = read_trace(bundled()["smollm2-135m-layer12-kv0"])
    stop = case.lk
    q = trace.q[None, : case.hq, stop - case.lq : stop]
    k, v = trace.k[None, :, :stop], trace.v[None, :, :stop]
    return tuple(np.ascontiguousarray(np.moveaxis(x, 1, 2)).astype(case.dtype) for x in (q, k, v))


CASES = [
    Case("plain"),
    Case("ascending", order="ascending"),
    Case("descending", order="descending"),
    Case("grouped", hq=4, hkv=2, lq=20, lk=20),
    Case("batch", batch=2, lq=50, lk=50),
    Case("full mask", causal=False, lq=9, lk=40),
    Case("more keys", lq=20, lk=90),
    Case("more queries", lq=40, lk=12),
    Case("one row", lq=1, lk=37),
    Case("one key", lq=9, lk=1),
    Case("one of each", lq=1, lk=1),
    Case("whole tiles", lq=32, lk=32),
    Case("wide values", d=16, dv=24, lq=17, lk=17),
    Case("float32", dtype="float32", lq=17, lk=17),
    Case("huge scores", scale=40.0, lq=17, lk=17),
    Case("tiny scores", scale=1e-3, lq=17, lk=17),
    Case("nothing skipped", threshold=0.0, lq=17, lk=17),
    Case("lambda one", threshold=1.0),
    Case("real head", source="real", lq=32, lk=96, d=64, dv=64, tile=(16, 16)),
]

GRID = {"tile": (64, 128), "d": 64, "dv": 64}
MMA_CASES = [  # small enough for the emulator: a tile takes about a third of a second
    Case("skips", lq=64, lk=600, threshold=0.5, **GRID),
    Case("skips ascending", lq=64, lk=640, order="ascending", threshold=0.5, **GRID),
    Case("skips ascending to a tail", lq=64, lk=300, order="ascending", threshold=0.5, **GRID),
    Case("square with tails", lq=150, lk=150, **GRID),
    Case("one row", lq=1, lk=200, **GRID),
    Case("one key", lq=66, lk=1, **GRID),
    Case("more queries than keys", lq=140, lk=70, **GRID),
    Case("full mask, descending", lq=65, lk=129, causal=False, order="descending", **GRID),
    Case("groups and batch", batch=2, hq=2, lq=64, lk=128, **GRID),
    Case("wide heads", lq=64, lk=300, tile=(64, 128), d=128, dv=128, threshold=0.2),
    Case("huge scores", lq=64, lk=256, scale=40.0, **GRID),
    Case("dense build", lq=64, lk=200, threshold=0.0, **GRID),
    Case("dense build, ascending", lq=64, lk=200, order="ascending", threshold=0.0, **GRID),
]
