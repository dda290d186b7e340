"""One case list for decode, and the agreement contract that every execution keeps on it."""

import math
from dataclasses import dataclass

import numpy as np
from contract import rounded

from cuda_kernels import skip_softmax_decode
from sim.decode import DecodeGrid, attend_decode, scan_decode

ULP = {"float16": 2.0**-16, "bfloat16": 2.0**-13}


@dataclass(frozen=True)
class DecodeCase:
    """Shapes and settings of one call; ``page`` None is a cache that is not paged."""

    name: str
    lens: tuple[int, ...] = (200,)
    tokens: int = 1
    kv_heads: int = 1
    group: int = 4
    d: int = 64
    keys: int = 64
    page: int | None = None
    layout: str = "NHD"
    order: str = "ascending"
    splits: int = 1
    split_layout: str = "interleaved"
    seeded: bool = False
    threshold: float = 0.3
    scale: float = 1.0  # of the scores
    dtype: str = "float16"
    skips: bool = True  # whether anything is skipped

    @property
    def key_tiles(self):
        """Tiles of the cache, which has room for a few keys more than the longest request."""
        return -(-self.room // self.keys)

    @property
    def room(self):
        """Keys that the cache has room for, in whole pages if it is paged."""
        unit = self.page or 8
        return -(-(max(self.lens) + 9) // unit) * unit

    def tensors(self):
        """q [B, Lq, Hq, D], k and v [B, room, Hkv, D], float32 of values that the dtype has.

        Every third tile is faint, so that it can be skipped; the first two keys are a sink.
        """
        rng = np.random.default_rng(list(self.name.encode()))
        heads, batch = self.kv_heads * self.group, len(self.lens)
        q = self.scale * rng.standard_normal((batch, self.tokens, heads, self.d))
        k, v = rng.standard_normal((2, batch, self.room, self.kv_heads, self.d))
        strength = (self.d / 16) ** 0.5
        faint = np.arange(self.room) // self.keys % 3 == 1
        q[..., 0] = 3 * self.scale
        k[..., 0] = -6 * strength * faint[None, :, None]
        k[:, :2, :, 0] = 4 * strength
        return tuple(rounded(x.astype(np.float32), self.dtype) for x in (q, k, v))

    def cache(self, x, fill=np.nan):
        """Lay k or v out as the door takes it; what no request uses holds ``fill``.

        Pages lie in any order and one is nobody's.  Returns the cache and its page table, or None.
        """
        x = x.copy()
        for b, length in enumerate(self.lens):
            x[b, length:] = fill
        table = None
        if self.page is not None:
            batch, room = x.shape[:2]
            each = room // self.page
            number = np.random.default_rng(0).permutation(batch * each + 1)
            pages = np.full((batch * each + 1, self.page, *x.shape[2:]), fill, x.dtype)
            pages[number[:-1]] = x.reshape(batch * each, self.page, *x.shape[2:])
            table = number[:-1].reshape(batch, each).astype(np.int32)
            for b, length in enumerate(self.lens):
                table[b, -(-length // self.page) :] = 1 << 30  # never looked at
            x = pages
        if self.layout == "HND":
            x = x.swapaxes(1, 2)
        return np.ascontiguousarray(x), table


def run(case, threshold=None, *, give=lambda x: x, **settings):
    """Call the door on poisoned caches and outputs; ``give`` makes its arrays of float32 ones."""
    q, k, v = case.tensors()
    (k, table), (v, _) = case.cache(k), case.cache(v)
    out = give(np.full(q.shape, np.nan, np.float32))
    asked = {
        "seq_lens": np.array(case.lens, np.int32),
        "page_table": table,
        "layout": case.layout,
        "keys": case.keys,
        "order": case.order,
        "splits": case.splits,
        "split_layout": case.split_layout,
        "seeded": case.seeded,
    }
    if "threshold_scale_factor" not in settings:
        asked["threshold"] = case.threshold if threshold is None else threshold
    result, report = skip_softmax_decode(
        give(q), give(k), give(v), out=out, return_report=True, **asked, **settings
    )
    assert result is out
    return out, report


def check(case, out, state, gap, lse, bound):
    """Assert the contract for one case; arrays on the host, ``out`` float32.

    Returns the number of tiles skipped.
    """
    q, k, v = case.tensors()
    scale, rows_of = case.d**-0.5, 16 // case.group
    skipped = 0
    for b, length in enumerate(case.lens):
        for h in range(case.kv_heads):
            heads = slice(h * case.group, (h + 1) * case.group)
            for t in range(state.shape[2]):
                tokens = range(t * rows_of, min((t + 1) * rows_of, case.tokens))
                ends = [length - case.tokens + token + 1 for token in tokens]
                where = (b, slice(tokens.start, tokens.stop), heads)
                group = VoteGroup(case, q[where], k[b, :, h], v[b, :, h], ends, scale)
                mine = [x[b, heads, tokens.start : tokens.stop].T for x in (lse, bound)]
                skipped += group.check(state[b, h, t], gap[b, h, t], out[where], *mine)
                if case.tokens == 1:
                    one = [x[b : b + 1, :, h : h + 1].swapaxes(1, 2)[0] for x in (k, v)]
                    group.check_against_the_simulator(q[b, :, heads], *one, length, mine[1][0])
    return skipped


class VoteGroup:
    """The rule, literally, in float64, for the rows [tokens, heads] that decide together."""

    def __init__(self, case, q, k, v, ends, scale):
        self.case, self.v, self.ends = case, v.astype(float), ends
        last = max(ends)
        s = scale * np.einsum("thd,kd->thk", q.astype(float), k[:last].astype(float))
        self.top = np.abs(s).max()
        for token, end in enumerate(ends):
            s[token, :, end:] = -np.inf
        self.s = s
        self.n = -(-last // case.keys)
        grid = DecodeGrid(
            np.array([last]), last, case.group, 1, case.keys, case.order, "group", case.splits,
            case.split_layout, case.seeded,
        )  # fmt: skip
        self.lanes = grid.lanes(self.n)
        self.tiles = [slice(j * case.keys, min((j + 1) * case.keys, last)) for j in range(self.n)]
        self.tile_max = np.stack([s[..., tile].max(axis=-1) for tile in self.tiles])
        seed = np.maximum(self.tile_max[0], self.tile_max[-1])
        self.gap = np.full(self.n, np.nan)
        for lane in self.lanes:
            m = seed if case.seeded else np.full(s.shape[:2], -np.inf)
            for j in lane:
                with np.errstate(invalid="ignore"):  # −inf − −inf: a row that sees nothing
                    self.gap[j] = np.nan_to_num(
                        self.tile_max[j] - m, nan=-np.inf, posinf=np.inf, neginf=-np.inf
                    ).max()
                m = np.maximum(m, self.tile_max[j])

    def check(self, state, gap, out, lse, bound):
        """Compare with what a kernel says of these rows; gives how many tiles it skipped."""
        case, room = self.case, 1e-3 + 4e-6 * self.top
        assert (state[self.n :] == 0).all()
        assert np.isneginf(gap[self.n :]).all()
        gap, state = gap[: self.n], state[: self.n]
        finite = np.isfinite(self.gap)
        assert np.array_equal(gap[~finite], self.gap[~finite])
        assert np.abs(gap[finite] - self.gap[finite]).max(initial=0) <= room
        with np.errstate(divide="ignore"):
            expected = np.where(self.gap < np.log(case.threshold), 2, 1)
        assert np.array_equal(state, expected)

        kept = np.concatenate([np.full(tile.stop - tile.start, state[j] == 1)
                               for j, tile in enumerate(self.tiles)])  # fmt: skip
        s = np.where(kept, self.s, -np.inf)
        m = s.max(axis=-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(axis=-1, keepdims=True)
        exact = p @ self.v[: s.shape[-1]] / l
        rough = rounded((rounded(p.astype(np.float32), case.dtype) @ self.v[: s.shape[-1]]) / l,
                        case.dtype)  # fmt: skip
        allowed = 2 * np.abs(rough - exact).max() + ULP[case.dtype] * np.abs(self.v).max()
        assert np.abs(out - exact).max() <= allowed
        np.testing.assert_allclose(lse, (m + np.log(l))[..., 0], atol=room)

        dense = np.exp(self.s - m).sum(axis=-1, keepdims=True)
        dropped = 1 - (l / dense)[..., 0]
        u = np.zeros(self.s.shape[:2])
        for j, tile in enumerate(self.tiles):
            if state[j] == 2:
                seen = (self.s[..., tile] > -np.inf).sum(axis=-1)
                u += 1.01 * seen * np.exp(self.tile_max[j] - m[..., 0])
        assert (bound >= dropped - 1e-6).all()
        assert (bound <= u / (u + l[..., 0]) + 1e-3).all()
        assert ((bound > 0) == (u > 0)).all()
        return int((state == 2).sum())

    def check_against_the_simulator(self, q, k, v, length, bound):
        """What was compared with is what the simulator says: one new token is one step."""
        case = self.case
        how = {
            "keys": case.keys, "order": case.order, "splits": case.splits,
            "split_layout": case.split_layout, "seeded": case.seeded,
        }  # fmt: skip
        scan = scan_decode(q, k, [length], **how)
        seen = np.isfinite(self.gap)
        assert np.array_equal(np.isfinite(scan.gap[0, 0, : self.n]), seen)
        np.testing.assert_allclose(scan.gap[0, 0, : self.n][seen], self.gap[seen], atol=1e-4)
        out = attend_decode(q, k, v, scan.decide(case.threshold))
        assert (bound >= out.dropped_mass[0] - 1e-5).all()
        assert (bound <= out.dropped_mass_bound[0] + 1e-3).all()


CASES = [  # small enough for the emulator
    DecodeCase("plain", lens=(200,)),
    DecodeCase("seeded splits", lens=(300,), group=16, splits=3, seeded=True),
    DecodeCase("more splits than are merged at once", lens=(1100,), group=9, splits=17),
    DecodeCase("runs", lens=(260,), group=1, d=128, splits=2, split_layout="contiguous"),
    DecodeCase(
        "pages of 16, heads first", lens=(150, 20), tokens=2, group=3, page=16, layout="HND",
        d=128, seeded=True, dtype="bfloat16",
    ),
    DecodeCase(
        "eight tokens over an edge", lens=(260,), tokens=8, group=1, page=128, d=128, keys=128,
        seeded=True, order="descending",
    ),
    DecodeCase(
        "two query tiles", lens=(300,), tokens=3, group=8, page=64, keys=128, order="ends_first"
    ),
    DecodeCase(
        "dense build, empty split", lens=(70,), group=5, threshold=0.0, splits=3, skips=False
    ),
]  # fmt: skip


def random_case(seed):
    """Any shape, cache, split, order and threshold that the kernel takes."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(1, 9))
    batch = int(rng.integers(1, 4))
    longest = int(rng.choice([70, 300, 1000, 4000]))
    return DecodeCase(
        f"random {seed}",
        lens=tuple(int(n) for n in rng.integers(tokens, longest, batch)),
        tokens=tokens,
        kv_heads=int(rng.integers(1, 4)),
        group=int(rng.integers(1, 17)),
        d=int(rng.choice([64, 128])),
        keys=int(rng.choice([64, 128])),
        page=[None, 16, 64, 128][rng.integers(4)],
        layout=str(rng.choice(["NHD", "HND"])),
        order=str(rng.choice(["ascending", "descending", "ends_first"])),
        splits=int(rng.choice([1, 2, 5, 16, 33])),
        split_layout=str(rng.choice(["interleaved", "contiguous"])),
        seeded=bool(rng.random() < 0.5),
        threshold=float(rng.choice([0, 0.01, 0.1, math.exp(-0.3)])),
        scale=float(rng.choice([0.1, 1, 2])),
        dtype=str(rng.choice(["float16", "bfloat16"])),
    )
