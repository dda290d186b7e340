"""Widgets of the tile map page and the callbacks that keep them in step with the map.

Every widget is bound to the URL, so that a link reproduces the view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import streamlit as st
from numpy.typing import ArrayLike

from app import sources
from app.wording import code
from sim.geometry import ORDERS, Grid
from sim.threshold import from_scale_factor, to_scale_factor
from sim.traces import TraceError

MAP = "map"
"""Key of the tile map component."""

LENGTH_STEP = 512
DEFAULT_THRESHOLD = 0.01
DEFAULT_FACTOR = 40.0
FIXED = ("λ", "scale factor")
_OF_ONE_SOURCE = (
    *("head", "length", "group", "key_tile", "row", "window", "queries"),
    *("kv_head", "token", "tile"),
)


def pick_source() -> sources.Source:
    """Choose a trace; one that cannot be read is named in one sentence, and the next is shown."""
    names = sources.names()
    name = st.selectbox("Source", names, key="source", bind="query-params", on_change=_forget_place)
    try:
        return sources.load(name)
    except (TraceError, OSError) as error:
        st.error(f"{code(name)} was not opened: {code(str(error))}")
        return sources.load(next(other for other in names if other != name))


def upload() -> None:
    """Offer to open a file; one that is no trace leaves the previous source on screen."""
    st.file_uploader("Open a trace", type="safetensors", key="file", on_change=_upload)


def say_fault() -> None:
    """Say what was wrong with the file that was uploaded last, if anything."""
    if fault := st.session_state.get("fault"):
        st.error(fault)


def _upload() -> None:
    st.session_state["fault"] = None
    file = st.session_state["file"]
    if file is None:
        return
    try:
        sources.keep_upload(file.getvalue())
    except TraceError as error:
        st.session_state["fault"] = f"This file was not opened: {code(str(error))}"
    else:
        st.session_state["source"] = sources.UPLOAD
        _forget_place()


def _forget_place() -> None:
    _forget_forced()
    for key in _OF_ONE_SOURCE:
        st.session_state.pop(key, None)


def pick_head(count: int) -> int:
    """Choose a query head, 0 … count−1."""
    keep_within("head", range(count))
    return st.selectbox("Head", range(count), key="head", bind="query-params", format_func=str)


def pick_compare() -> bool:
    """Choose whether two visit orders stand side by side."""
    return st.toggle(
        "Compare visit orders",
        key="compare",
        bind="query-params",
        help="Two maps at the same λ: `ascending`, as NVIDIA’s kernels visit, and `ends_first`.",
    )


def pick_order() -> str:
    """Choose a visit order."""
    return st.selectbox(
        "Visit order",
        ORDERS,
        index=ORDERS.index("ends_first"),
        key="order",
        bind="query-params",
        help="Order in which a group of queries visits its key tiles. `ends_first`: the last tile, "
        "the first, then the rest backwards. NVIDIA’s kernels visit in `ascending` order.",
    )


VOTE_ROWS = (1, 16, 32, 64, 128, 256)
TILE_KEYS = (128, 256, 512)


class Mask(NamedTuple):
    """Decision grid, sliding window and number of queries; None where all are seen."""

    tile: tuple[int, int]
    window: int | None
    queries: int | None


def pick_mask(lq: int, lk: int, causal: bool) -> Mask:
    """Choose decision grid and mask, out of the way in an expander."""
    with st.expander("Mask and decision grid", key="mask", icon=":material/grid_on:"):
        rows = st.selectbox(
            "Vote rows",
            VOTE_ROWS,
            index=VOTE_ROWS.index(64),
            key="vote_rows",
            bind="query-params",
            on_change=_forget_forced,
            help="Queries that must all agree before a tile is skipped. Fewer skip more, but "
            "matrix units work on many rows at once.",
        )
        keys = st.selectbox(
            "Keys of a tile",
            TILE_KEYS,
            key="tile_keys",
            bind="query-params",
            on_change=_forget_forced,
            help="A larger tile is more likely to hold a key that matters.",
        )
        keep_within("window", range(lk))
        window = st.number_input(
            "Sliding window, keys",
            0,
            lk - 1,
            0,
            step=64,
            key="window",
            bind="query-params",
            on_change=_forget_forced,
            disabled=not causal,
            help="Each query sees only that many keys, itself the last. 0: no window.",
        )
        keep_within("queries", range(lq))
        queries = st.number_input(
            "Last queries only",
            0,
            lq - 1,
            0,
            step=64,
            key="queries",
            bind="query-params",
            on_change=_forget_forced,
            help="As when a prompt’s beginning is already in the cache: fewer queries than keys. "
            "0: all queries.",
        )
    mask = Mask((rows, keys), (causal and window) or None, queries or None)
    if mask != Mask((64, 128), None, None):
        said = [f"Tiles of {rows} × {keys}"]
        said += [f"a window of {mask.window:,} keys"] if mask.window else []
        said += [f"the last {queries:,} queries"] if queries else []
        st.caption(", ".join(said))
    return mask


def _forget_forced() -> None:
    if st.session_state.get("forced"):
        st.session_state["forced"] = []  # what is absent would be taken from the URL again


def pick_length(whole: int, croppable: bool) -> int:
    """Choose how many tokens are looked at."""
    lengths = [*range(LENGTH_STEP, whole, LENGTH_STEP), whole] if croppable else [whole]
    if len(lengths) == 1:
        return whole
    keep_within("length", lengths)
    return st.select_slider(
        "Context length, tokens",
        lengths,
        value=whole,
        key="length",
        bind="query-params",
        format_func=lambda n: str(n),
    )


def pick_hold() -> str:
    """Choose what stays fixed when the length changes."""
    return st.segmented_control(
        "Fixed when the length changes",
        FIXED,
        default=FIXED[0],
        required=True,
        key="hold",
        bind="query-params",
        on_change=_write_again,
        help="TensorRT-LLM states a scale factor: λ = scale factor ÷ length.",
    )


def pick_threshold(hold: str, length: int) -> tuple[float, float]:
    """Choose λ or the scale factor; the other one follows.

    Returns
    -------
    threshold : float
        λ as it was asked for: above 1 where a fixed scale factor exceeds the length.
    factor : float
    """
    slots = st.container(), st.container()  # in this order, whichever is made first
    if hold == FIXED[0]:
        with slots[0]:
            threshold = threshold_input("threshold", bind="query-params")
        factor = _short(to_scale_factor(threshold, length))
        st.session_state["factor"] = factor
        with slots[1]:
            _follow(_factor_input, factor, _factor_edited, length)
        return threshold, factor
    with slots[1]:
        factor = _factor_input("factor", bind="query-params")
    threshold = float(from_scale_factor(factor, length))
    st.session_state["threshold"] = min(1.0, _short(threshold))
    with slots[0]:
        _follow(threshold_input, st.session_state["threshold"], _threshold_edited, length)
    return threshold, factor


def threshold_input(key: str, **how: Any) -> float:
    """Choose λ by number."""
    return st.number_input(
        "Threshold λ",
        0.0,
        1.0,
        DEFAULT_THRESHOLD,
        step=0.01,
        format="%.3g",
        key=key,
        help="A tile is skipped if its gap is below ln λ. Larger skips more; 0 skips nothing.",
        **how,
    )


def _factor_input(key: str, **how: Any) -> float:
    return st.number_input(
        "Scale factor",
        0.0,
        1e6,
        DEFAULT_FACTOR,
        step=10.0,
        format="%.4g",
        key=key,
        help="λ × length: what TensorRT-LLM calls `threshold_scale_factor`.",
        **how,
    )


def _follow(
    make_input: Callable[..., float],
    value: float,
    edited: Callable[[float, int], None],
    length: int,
) -> None:
    """Show the one that is not fixed; a value typed into it moves the fixed one.

    A browser that has not yet been told the new value sends the old one along with whatever is
    done next, which looks like an edit.  So each new value is a new widget, unless it was typed
    into this one, and what comes late from an old widget is nobody's.
    """
    state = st.session_state
    number = state.get("follower", 0)
    if state.get(f"follower {number}") != value:
        number += 1
        state[f"follower {number}"] = value
    state["follower"] = number

    def typed() -> None:
        if state["follower"] == number:
            edited(state[f"follower {number}"], length)

    make_input(f"follower {number}", on_change=typed)


def _threshold_edited(threshold: float, length: int) -> None:
    st.session_state["factor"] = _short(to_scale_factor(threshold, length))


def _factor_edited(factor: float, length: int) -> None:
    st.session_state["threshold"] = min(1.0, _short(from_scale_factor(factor, length)))


def _write_again() -> None:
    """Make Streamlit put the value that is fixed from now on into the URL."""
    name = "threshold" if st.session_state["hold"] == FIXED[0] else "factor"
    st.session_state[name] = st.session_state[name]


def pick_tile(grid: Grid) -> tuple[int, int]:
    """Choose tile (i, j) by number, in two columns."""
    keep_within("group", range(grid.groups))
    keep_within("key_tile", range(grid.key_tiles))
    left, right = st.columns(2, gap="large")
    last = grid.groups - 1
    i = left.number_input("Query group", 0, last, last, key="group", bind="query-params")
    last = grid.key_tiles - 1
    j = right.number_input("Key tile", 0, last, 0, key="key_tile", bind="query-params")
    return i, j


def pick_row(rows: int, deciding: int | None) -> int:
    """Choose the query row whose attention is drawn as bars."""
    keep_within("row", range(rows))
    left, right = st.columns(2, gap="large", vertical_alignment="bottom")
    row = left.number_input("Query row", 0, rows - 1, rows - 1, key="row", bind="query-params")
    right.button(
        "Row that decides this tile",
        disabled=deciding is None,
        width="stretch",
        on_click=lambda: st.session_state.update(row=deciding),
    )
    return row


def threshold_moved(length: int) -> None:
    """Take λ from the map's slider."""
    threshold = threshold_of(MAP)
    if threshold is None:
        return
    if st.session_state.get("hold") == FIXED[1]:
        st.session_state["factor"] = _short(to_scale_factor(threshold, length))
    else:
        st.session_state["threshold"] = threshold


def threshold_of(key: str) -> float | None:
    """λ that a component's slider has sent; None if that is no λ."""
    threshold = st.session_state[key].threshold
    fits = isinstance(threshold, int | float) and 0 <= threshold <= 1
    return float(threshold) if fits else None


def head_chosen() -> None:
    """Take the head from the map's thumbnails."""
    st.session_state["head"] = st.session_state[MAP].head


def tile_chosen() -> None:
    """Take the tile that was clicked."""
    cell = st.session_state[MAP].cell
    st.session_state["group"], st.session_state["key_tile"] = int(cell["i"]), int(cell["j"])


def keep_within(key: str, allowed: range | list[int]) -> None:
    """Move a remembered value into the range it has now: the source or the length has changed."""
    value = st.session_state.get(key)
    if value is not None and value not in allowed:
        st.session_state[key] = min(max(value, allowed[0]), allowed[-1])


def _short(x: ArrayLike) -> float:
    """Round to four digits, so that URLs stay readable."""
    return float(f"{float(np.asarray(x)):.4g}")
