"""Scans that are kept, so that λ, length, order and tile never wait for Q·Kᵀ a second time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from threading import Lock

import streamlit as st

from app.sources import Source
from sim.curve import Curve
from sim.skip_softmax import Scan, scan

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


def scan_of(
    source: Source, heads: list[int], order: str, length: int, progress: Callable[[float], None]
) -> Scan:
    """Scan some heads of a source, cropped to ``length`` tokens, in a visit order.

    Parameters
    ----------
    source : Source
    heads : list of int
    order : str
    length : int
        The whole length, or less where :func:`sim.skip_softmax.Scan.crop` allows it.
    progress : callable
        Given the share done while Q·Kᵀ is formed.

    Returns
    -------
    Scan
    """
    kept, long, whole = _kept(), is_long(source), source.trace.k.shape[1]
    base_order = order if long else "ends_first"
    base_key = (source.key, *heads, base_order)
    base = kept.get(base_key)
    if base is None:
        base = _scan(source, heads, base_order, not long, progress)
        kept.put(base_key, base)
    if length == whole and order == base_order:
        return base
    key = (source.key, *heads, order, length)
    made = kept.get(key)
    if made is None:
        made = base if length == whole else base.crop(length)
        made = made if order == base_order else made.replay(order=order)
        kept.put(key, made)
    return made


def _scan(
    source: Source, heads: list[int], order: str, rows: bool, progress: Callable[[float], None]
) -> Scan:
    trace = source.trace
    share = trace.q.shape[0] // trace.k.shape[0]
    if len(heads) == trace.q.shape[0]:
        q, k = trace.q, trace.k
    else:
        q, k = trace.q[heads], trace.k[[head // share for head in heads]]
    return scan(
        q,
        k,
        causal=trace.causal,
        order=order,
        softmax_scale=trace.softmax_scale,
        mass=rows,
        keep_row_max=rows,
        progress=progress,
    )


@st.cache_resource(max_entries=128, show_spinner=False)
def curve_of(key: str, order: str, length: int, head: int, index: int, _scan: Scan) -> Curve:
    """Curve of one head; ``index`` is its place in ``_scan``, the rest names the scan."""
    return _scan.curve(index)


@st.cache_resource(max_entries=32, show_spinner=False)
def growth(
    key: str, order: str, head: int, index: int, lengths: tuple[int, ...], _scan: Scan
) -> list[Scan]:
    """Gap maps of one head at several lengths, from the scan of the whole length."""
    one = _scan.heads([index])
    return [replace(one.crop(n), row_max=None, mass=None, lse=None) for n in lengths]
