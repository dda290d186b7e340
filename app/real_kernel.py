"""A few tiles around the chosen one through the real kernel, beside what the simulator says."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from app.scans import Arrays
from app.views import STATES
from app.wording import plain_number, score
from cuda_kernels.crop import MAX_TILES, Crop, CropError, CropRun, cut, run
from sim.geometry import TileMap
from sim.skip_softmax import Scan, scan

PAIRS = MAX_TILES * 64 * 128
"""Query-key pairs of a crop: a computed tile of 64 × 128 takes about three seconds."""


class Compared(NamedTuple):
    """A crop as the simulator and as the kernel decide it; gaps are [tiles]."""

    crop: Crop
    simulated: Scan
    tiles: TileMap
    ran: CropRun


def show(whole: Scan, arrays: Arrays, i: int, j: int, threshold: float, subject: str) -> None:
    """Offer to run the kernel around tile (i, j), and show what came back.

    Parameters
    ----------
    whole : Scan
        Of one head.
    arrays : Arrays
        Of the same head.
    i, j : int
    threshold : float
    subject : str
        Names the head and the view, so that a result is not shown beside another.
    """
    grid = whole.grid
    limit = max(2, min(MAX_TILES, PAIRS // (grid.rows * grid.keys)))
    st.markdown(
        "The kernel that runs on a GPU, `cuda_kernels/prefill_simt.py`, unchanged, in Numba’s CUDA "
        f"simulator on this machine: query group {i} against at most {limit} key tiles around tile "
        f"{j}, the group’s first and last among them. It takes some seconds for each tile."
    )
    reason = why_not(whole, i, j)
    if reason:
        st.caption(reason)
    key = (subject, i, j, threshold)
    if st.button(
        "Run this crop through the real kernel",
        key="run_crop",
        icon=":material/memory:",
        disabled=bool(reason),
    ):
        st.session_state["crop"] = (key, _compare(whole, arrays, i, j, threshold, limit))
    of, result = st.session_state.get("crop", (None, None))
    if of != key or reason:
        return
    if isinstance(result, str):
        st.error(result)
    elif result is not None:
        _tell(result)


def why_not(whole: Scan, i: int, j: int) -> str:
    """Say why the kernel cannot be run here, or nothing if it can."""
    grid = whole.grid
    if find_spec("numba") is None:
        return "Numba is not installed here, and the kernel is written in it."
    if not grid.causal or grid.window is not None:
        return "A crop can be cut only under the causal mask without a window."
    if 2 * grid.rows * grid.keys > PAIRS:
        return f"Tiles of {grid.rows} × {grid.keys} would take minutes here."
    if not grid.visited_tiles()[i, j]:
        return "The group does not visit this tile."
    return ""


def _compare(
    whole: Scan, arrays: Arrays, i: int, j: int, threshold: float, limit: int
) -> Compared | str:
    """Run the crop; a sentence if the kernel could not be run."""
    q, k, v = (array[0] for array in arrays)
    crop = cut(q, k, v, whole.grid, i, j, limit)
    rows, keys = crop.grid.tile
    text = (
        f"In a child process {rows} Python threads stand for the {rows} CUDA threads of a block "
        f"and meet at every barrier: {len(crop.key_tiles)} tiles of {rows} × {keys}, about "
        "three seconds for each that is computed"
    )
    with st.spinner(text, show_time=True):
        simulated = scan(
            crop.q,
            crop.k,
            tile=crop.grid.tile,
            order=whole.order,
            softmax_scale=whole.softmax_scale,
        )
        try:
            ran = run(
                crop, threshold=threshold, order=whole.order, softmax_scale=whole.softmax_scale
            )
        except CropError as error:
            return f"{str(error)[:1].upper()}{str(error)[1:]}."
    return Compared(crop, simulated, simulated.decide(threshold), ran)


def differences(compared: Compared) -> tuple[float, NDArray[np.bool_]]:
    """Largest difference of finite gaps, and which tiles of the crop are in different states."""
    ours, theirs = compared.simulated.gap[0, 0], compared.ran.gap[0, 0]
    finite = np.isfinite(ours) & np.isfinite(theirs)
    largest = float(np.abs(ours[finite] - theirs[finite]).max(initial=0))
    return largest, compared.tiles.state[0, 0] != compared.ran.tiles.state[0, 0]


def _tell(compared: Compared) -> None:
    from sim.draw import tile_map_image

    largest, differ = differences(compared)
    crop, n = compared.crop, int(differ.sum())
    same = (
        f"All {len(differ)} tiles are in the same state"
        if n == 0
        else f"**{n} of {len(differ)} tiles differ**"
    )
    by = f"differ by at most {plain_number(largest)}" if largest else "are bitwise equal"
    st.markdown(f"{same}; the gaps {by}.")
    for name, tiles in (("The simulator", compared.tiles), ("The real kernel", compared.ran.tiles)):
        words = ", ".join(
            f"{j} {STATES[state]}"
            for j, state in zip(crop.key_tiles, tiles.state[0, 0], strict=True)
        )
        st.caption(name)
        st.image(tile_map_image(tiles, 0, cell=_cell(tiles)), alt=f"{name}: key tiles {words}")
    st.dataframe(
        {
            "Key tile": crop.key_tiles,
            "Simulator": [STATES[state] for state in compared.tiles.state[0, 0]],
            "Kernel": [STATES[state] for state in compared.ran.tiles.state[0, 0]],
            "Gap, simulator": [score(x) for x in compared.simulated.gap[0, 0]],
            "Gap, kernel": [score(x) for x in compared.ran.gap[0, 0]],
            "Differ": ["yes" if one else "" for one in differ],
        },
        hide_index=True,
        alt="State and gap of every tile of the crop, from the simulator and from the kernel",
    )
    st.caption(
        "In a crop a query sees only these keys, so gaps may differ from those of the whole head: "
        "both sides here are of the crop. Forced tiles play no part in it."
    )


def _cell(tiles: TileMap) -> int:
    """Pixels of a tile's shorter side, such that a tile is about 48 wide."""
    rows, keys = tiles.grid.tile
    return max(1, 48 * min(rows, keys) // keys)
