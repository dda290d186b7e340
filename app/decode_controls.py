"""Widgets of the decode page, each bound to the URL, and the callbacks of its picture."""

from __future__ import annotations

import streamlit as st

from app import controls
from sim.decode import LAYOUTS
from sim.decode_splits import SPLITS

LANES = "lanes"
"""Key of the lanes component."""

THRESHOLD = "decode_threshold"
"""Key of λ: engines, too, have one of prefill and one of decode."""

KEYS = (64, 128)
DEFAULT_SPLITS = 8


def pick_kv_head(count: int) -> int:
    """Choose a KV head; its query heads vote together."""
    controls.keep_within("kv_head", range(count))
    return st.selectbox(
        "KV head",
        range(count),
        key="kv_head",
        bind="query-params",
        format_func=str,
        help="The query heads that share it are one vote group: V is read if one of them needs it.",
    )


def pick_splits() -> int:
    """Choose how many CTAs share the cache."""
    return st.selectbox(
        "Splits",
        SPLITS,
        index=SPLITS.index(DEFAULT_SPLITS),
        key="splits",
        bind="query-params",
        format_func=str,
        help="CTAs that share the cache of one request, so that one token keeps a whole GPU busy. "
        "Each has its own running maximum.",
    )


def pick_seeded() -> bool:
    """Choose whether splits start at the seeded maximum."""
    return st.toggle(
        "Seeded maximum",
        value=True,
        key="seeded",
        bind="query-params",
        help="Every split starts at the larger row maximum of the first and the newest tile. "
        "Without it every split starts from nothing and never skips its first tile, as in "
        "NVIDIA’s kernels.",
    )


def pick_layout() -> str:
    """Choose which tiles a split gets."""
    return st.selectbox(
        "Tiles of a split",
        LAYOUTS,
        key="layout",
        bind="query-params",
        help="Every so-manyth tile, or a run of neighbours.",
    )


def pick_keys() -> int:
    """Choose the keys of a tile."""
    return st.selectbox(
        "Keys of a tile",
        KEYS,
        key="keys",
        bind="query-params",
        format_func=str,
        help="A larger tile is more likely to hold a key that matters.",
    )


def pick_token(first: int, last: int) -> int:
    """Choose the newest token: its number, from 0."""
    controls.keep_within("token", range(first, last + 1))
    return st.number_input(
        "Newest token",
        first,
        last,
        last,
        key="token",
        bind="query-params",
        help="Its query is compared with every key of the cache, its own included. Arrow keys up "
        "and down step from token to token.",
    )


def pick_tile(count: int) -> int:
    """Choose a key tile by number."""
    controls.keep_within("tile", range(count))
    return st.number_input("Key tile", 0, count - 1, 0, key="tile", bind="query-params")


def threshold_moved() -> None:
    """Take λ from the slider."""
    threshold = controls.threshold_of(LANES)
    if threshold is not None:
        st.session_state[THRESHOLD] = threshold


def tile_chosen() -> None:
    """Take the tile that was clicked."""
    st.session_state["tile"] = int(st.session_state[LANES].tile)
