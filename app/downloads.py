"""What can be taken away: the map as a picture, the head as a trace."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import streamlit as st

from app.scans import Arrays
from sim.geometry import Grid, TileMap
from sim.traces import Trace, write_trace

MAX_PICTURE = 4096  # pixels a side


def show(tiles: TileMap, arrays: Arrays, trace: Trace, head: int) -> None:
    """Offer both files; each is made when it is asked for.

    Parameters
    ----------
    tiles : TileMap
        Of one head.
    arrays : Arrays
        Of the same head, as it is looked at.
    trace : Trace
        Where the head comes from.
    head : int
    """
    with st.container(horizontal=True):
        st.download_button(
            "Map as PNG",
            lambda: picture(tiles),
            file_name=f"tile-map-head-{head}.png",
            mime="image/png",
            icon=":material/image:",
            on_click="ignore",
        )
        st.download_button(
            "This head as a trace",
            lambda: trace_file(arrays, trace, head, tiles.grid),
            file_name=f"head-{head}.safetensors",
            mime="application/octet-stream",
            icon=":material/download:",
            on_click="ignore",
        )
    st.caption(
        "The trace is a safetensors file with this head’s Q, K and V as they are shown, its words "
        "and its card; skip-softmax scan, skip-softmax app and sim.traces.read_trace open it."
    )


def picture(tiles: TileMap) -> bytes:
    """Draw one head's map as PNG."""
    from sim.draw import tile_map_image

    grid = tiles.grid
    unit = min(grid.rows, grid.keys)
    side = max(grid.groups * (grid.rows // unit), grid.key_tiles * (grid.keys // unit))
    content = io.BytesIO()
    tile_map_image(tiles, 0, cell=min(max(MAX_PICTURE // side, 1), 8)).save(content, "PNG")
    return content.getvalue()


def trace_file(arrays: Arrays, trace: Trace, head: int, grid: Grid) -> bytes:
    """Write one head as a trace."""
    card = {field: text for field, text in trace.card.items() if field != "heads"}
    if "heads" in trace.card:
        card["heads"] = json.dumps([json.loads(trace.card["heads"])[head]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "head.safetensors")
        write_trace(
            path,
            *arrays,
            tokens=trace.tokens[: grid.lk],
            softmax_scale=trace.softmax_scale,
            causal=trace.causal,
            card=card,
        )
        return path.read_bytes()
