"""Scans that are kept, so that λ, length, order and tile never wait for Q·Kᵀ a second time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

import streamlit as st
from numpy.typing import NDArray

from app.sources import Source
from sim.curve import Curve
from sim.skip_softmax import Scan, scan

TILE = (64, 128)
"""Decision grid scanned with; others are replayed from its row maxima."""

LONG = 32768
"""Above this many tokens only gaps are kept: row maxima and masses would fill the memory."""

KEPT_BYTES = 1 << 30

ALL_HEADS_PAIRS = 64 * 4096**2
"""Query-key pairs up to which all heads are scanned at once; beyond, only the chosen head."""


class _Kept:
    """Least recently used scans, bounded in bytes (``st.cache_resource`` can only count)."""

    def __init__(self) -> None:
        self._scans: OrderedDict[tuple, Scan] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple) -> Scan | None:
        with self._lock:
            if key in self._scans:
                self._scans.move_to_end(key)
            return self._scans.get(key)

    def put(self, key: tuple, made: Scan) -> None:
        with self._lock:
            self._scans[key] = made
            while len(self._scans) > 1 and sum(map(_size, self._scans.values())) > KEPT_BYTES:
                self._scans.popitem(last=False)


def _size(made: Scan) -> int:
    arrays = (made.gap, made.row_max, made.mass, made.lse)
    return sum(array.nbytes for array in arrays if array is not None)


@st.cache_resource(show_spinner=False)
def _kept() -> _Kept:
    return _Kept()


def is_long(source: Source) -> bool:
    """Whether only gaps are kept: no cropping, masses or facts about single rows."""
    return source.trace.k.shape[1] > LONG


def scanned_heads(source: Source, head: int) -> list[int]:
    """Heads that are scanned together when this one is asked for."""
    heads, lq, _ = source.trace.q.shape
    all_heads = heads * lq * source.trace.k.shape[1] <= ALL_HEADS_PAIRS
    return list(range(heads)) if all_heads else [head]


@dataclass(frozen=True)
class View:
    """How a source is looked at.

    ``length`` is that of the keys; ``queries`` are the last ones before it, or None for all that
    the source has; ``window`` is None without a sliding window.
    """

    order: str
    length: int
    tile: tuple[int, int] = TILE
    window: int | None = None
    queries: int | None = None


class Arrays(NamedTuple):
    """Q, K and V of some heads, cut to a view: [heads, queries, D], [KV heads, keys, …]."""

    q: NDArray
    k: NDArray
    v: NDArray


def arrays_of(source: Source, heads: list[int], view: View) -> Arrays:
    """Give what a view looks at; query i is key i + Lk − Lq."""
    q, k, v = source.trace.q, source.trace.k, source.trace.v
    if len(heads) < len(q):
        share = len(q) // len(k)
        kv = [head // share for head in heads]
        q, k, v = q[heads], k[kv], v[kv]
    stop = view.length - source.trace.k.shape[1] + q.shape[1]
    start = 0 if view.queries is None else max(stop - view.queries, 0)
    return Arrays(q[:, start:stop], k[:, : view.length], v[:, : view.length])


def scan_of(
    source: Source, heads: list[int], view: View, progress: Callable[[float], None]
) -> Scan:
    """Scan some heads of a source as a view asks for.

    Parameters
    ----------
    source : Source
    heads : list of int
    view : View
        Its length is the whole, or less where :func:`sim.skip_softmax.Scan.crop` allows it.
    progress : callable
        Given the share done while Q·Kᵀ is formed: for another source, window or number of
        queries.  All else is replayed from the row maxima that are kept.

    Returns
    -------
    Scan
    """
    kept, long = _kept(), is_long(source)
    base = view if long else replace(view, order="ends_first", tile=TILE)
    if view.queries is None:
        base = replace(base, length=source.trace.k.shape[1])
    whole = kept.get((source.key, *heads, base))
    if whole is None:
        whole = _scan(source, heads, base, not long, progress)
        kept.put((source.key, *heads, base), whole)
    if view == base:
        return whole
    made = kept.get((source.key, *heads, view))
    if made is None:
        made = whole if view.length == base.length else whole.crop(view.length)
        if (view.order, view.tile) != (base.order, base.tile):
            made = made.replay(order=view.order, tile=view.tile)
        kept.put((source.key, *heads, view), made)
    return made


def _scan(
    source: Source, heads: list[int], view: View, rows: bool, progress: Callable[[float], None]
) -> Scan:
    q, k, _ = arrays_of(source, heads, view)
    return scan(
        q,
        k,
        tile=view.tile,
        causal=source.trace.causal,
        window=view.window,
        order=view.order,
        softmax_scale=source.trace.softmax_scale,
        mass=rows,
        keep_row_max=rows,
        progress=progress,
    )


@st.cache_resource(max_entries=128, show_spinner=False)
def curve_of(key: str, view: View, head: int, index: int, _scan: Scan) -> Curve:
    """Curve of one head; ``index`` is its place in ``_scan``, the rest names the scan."""
    return _scan.curve(index)


@st.cache_resource(max_entries=32, show_spinner=False)
def growth(
    key: str, view: View, head: int, index: int, lengths: tuple[int, ...], _scan: Scan
) -> list[Scan]:
    """Gap maps of one head at several lengths, from the scan of the whole length."""
    one = _scan.heads([index])
    return [replace(one.crop(n), row_max=None, mass=None, lse=None) for n in lengths]
