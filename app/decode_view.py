"""One decode step of one KV head, and what the lanes component draws of it.  No arithmetic here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from app.sources import Source
from app.views import Setting, pack, slider, steps_of
from app.wording import decode_headline
from sim.decode import (
    DecodeBytes,
    DecodeScan,
    DecodeTiles,
    decode_bytes,
    scan_decode,
)
from sim.decode_splits import Sparsity, of_splits
from sim.decode_time import expected_speed_up
from sim.gap_scans import DECODE_STEPS
from sim.geometry import COMPUTED
from sim.traces import Trace

PAGE = 64
"""Tokens of a page of the cache, for the page table's bytes."""


@dataclass(frozen=True)
class How:
    """How a step is computed: keys of a tile, splits and their layout, seeded or plain."""

    keys: int
    splits: int
    split_layout: str
    seeded: bool


@dataclass(frozen=True, eq=False)
class Step:
    """One step: its arrays, and its scans with the heads together and alone.

    ``q`` [1, heads, D], ``k`` [1, length, D], ``v`` [1, length, Dv].
    """

    q: NDArray
    k: NDArray
    v: NDArray
    softmax_scale: float
    together: DecodeScan
    alone: DecodeScan

    @property
    def tiles(self) -> int:
        """Tiles that the step visits."""
        return self.together.grid.key_tiles

    def moved(self, tiles: DecodeTiles) -> DecodeBytes:
        """Bytes of the step, in 16-bit elements and pages of 64 tokens."""
        return decode_bytes(tiles, self.k.shape[2], self.v.shape[2], page=PAGE)


def heads_of(trace: Trace, kv: int) -> range:
    """Query heads that share a KV head."""
    group = len(trace.q) // len(trace.k)
    return range(kv * group, (kv + 1) * group)


def first_token(trace: Trace) -> int:
    """Number of the first token that the trace has a query of."""
    return trace.k.shape[1] - trace.q.shape[1]


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs={Source: lambda one: one.key})
def step_of(source: Source, kv: int, token: int, how: How) -> Step:
    """Scan the step of a token for one KV head.

    Parameters
    ----------
    source : Source
        Of a causal trace.
    kv : int
    token : int
        Number of the newest token: it sees keys 0 … token.
    how : How
    """
    trace, heads = source.trace, heads_of(source.trace, kv)
    q = trace.q[heads.start : heads.stop, token - first_token(trace)][None]
    k, v = (x[kv : kv + 1, : token + 1] for x in (trace.k, trace.v))
    scanned = partial(
        scan_decode, q, k, [token + 1], softmax_scale=trace.softmax_scale, **vars(how)
    )
    together, alone = scanned(vote="group", mass=True), scanned(vote="head")
    return Step(q, k, v, trace.softmax_scale, together, alone)


def lanes_data(
    step: Step, how: How, threshold: float, names: list[str], words: list[str], tile: int
) -> dict[str, Any]:
    """Pack a step for the component: gaps, splits, and all that the slider can show."""
    setting = Setting(threshold)
    decided = [step.together.decide(x) for x in steps_of(setting)]
    moved = [step.moved(tiles) for tiles in decided]
    length, n = int(step.together.grid.lengths[0]), step.tiles
    lanes = step.together.grid.lanes(n)
    splits = f"{how.splits} splits, {how.split_layout}" if how.splits > 1 else "one split"
    kind = "seeded" if how.seeded else "plain"
    return slider(setting) | {
        "gap": pack(step.together.gap[0, 0], "<f4"),
        "heads": [
            {
                "name": name,
                "short": name.rsplit(", ", 1)[-1],
                "gap": pack(gap, "<f4"),
                "counts": counts,
            }
            for name, gap, counts in zip(
                names, step.alone.gap[0], _counts(step, setting, names), strict=True
            )
        ],
        "headline": [
            decode_headline(
                x,
                float(tiles.sparsity[0]),
                float(step.together.dropped_mass(tiles).max()),
                1 - one.v / one.dense_v,
                expected_speed_up(one),
            )
            for x, tiles, one in zip(steps_of(setting), decided, moved, strict=True)
        ],
        "key_tiles": n,
        "keys": how.keys,
        "length": length,
        "splits": how.splits,
        "seeded": how.seeded,
        "split_of": step.together.grid.split_of(n).tolist(),
        "visit": [int(j) for lane in lanes for j in lane],
        "words": words[:length],
        "selected": tile,
        "title": f"The cache, {length:,} keys in {n} tiles of {how.keys}: {splits}, {kind}",
        "label": f"Cache of {length:,} keys in {n} tiles, {splits}, {kind}",
    }


def _counts(step: Step, setting: Setting, names: list[str]) -> list[list[str]]:
    """Say how many tiles each head vetoes, and how many it alone keeps, at each position."""
    sentences: list[list[str]] = [[] for _ in names]
    for threshold in steps_of(setting):
        keeps = step.alone.decide(threshold).state[0] == COMPUTED  # [heads, tiles]
        lonely = keeps & (np.count_nonzero(keeps, axis=0) == 1)
        for sentence, name, mine, alone in zip(sentences, names, keeps, lonely, strict=True):
            sentence.append(
                f"{name} vetoes {np.count_nonzero(mine):,} of {step.tiles:,} tiles, "
                f"{np.count_nonzero(alone):,} of them alone"
            )
    return sentences


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs={Source: lambda one: one.key})
def split_costs(
    source: Source, kv: int, token: int, keys: int, split_layout: str, threshold: float
) -> list[Sparsity]:
    """Sparsity by number of splits over the steps up to a token; empty if there are too few."""
    trace, heads = source.trace, heads_of(source.trace, kv)
    if token + 1 < first_token(trace) + DECODE_STEPS:
        return []
    k, v = trace.k[kv : kv + 1], trace.v[kv : kv + 1]
    one = replace(trace, q=trace.q[heads.start : heads.stop], k=k, v=v)
    return of_splits(
        [one], lengths=[token + 1], thresholds=[threshold], keys=keys, split_layout=split_layout
    )
