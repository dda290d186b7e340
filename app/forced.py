"""Tiles that are skipped or kept by hand: which they are, and what the map becomes with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import streamlit as st

from app.scans import Arrays
from app.wording import percent, table
from sim.accuracy import dropped_mass, error_identity
from sim.curve import Curve
from sim.geometry import COMPUTED, SKIPPED, Grid, TileMap
from sim.rules import Maximum, walk
from sim.skip_softmax import Scan

OUT = np.float32(-1e30)
"""Gap of a tile that is skipped by hand: below ln λ for every λ.  Kept by hand: +inf."""

KEY = "forced"
Forced = Mapping[tuple[int, int], bool]
"""Tile (i, j) → True if it is skipped by hand, False if it is kept."""


@dataclass(frozen=True)
class WhatIf:
    """One head with some tiles forced: its gap map is what the rest of each group then sees.

    ``scan.gap`` of a forced tile is OUT or +inf; ``own_gap`` is what it would have been.
    """

    scan: Scan
    curve: Curve
    forced: Forced
    own_gap: Mapping[tuple[int, int], float]

    def decide(self, threshold: float) -> TileMap:
        """Decide by λ, and by hand."""
        tiles = self.scan.decide(threshold)
        if not self.forced:
            return tiles
        state = tiles.state.copy()
        for (i, j), skip in self.forced.items():
            state[0, i, j] = SKIPPED if skip else COMPUTED
        return replace(tiles, state=state)


def apply(scan: Scan, curve: Curve, forced: Forced) -> WhatIf:
    """Force tiles of one head's scan; its curve is used where nothing is forced."""
    if not forced:
        return WhatIf(scan, curve, forced, {})
    gap, own_gap = scan.gap.copy(), {}
    row_max = None if scan.row_max is None else scan.row_max.copy()
    for i, of_group in groupby(sorted(forced), key=lambda tile: tile[0]):
        by_hand = {j: forced[i, j] for _, j in of_group}
        for step in walk(scan, 0, i, Maximum(0), by_hand):  # for λ ≤ 1 gaps do not depend on λ
            gap[0, i, step.j] = step.gap.max()
            if step.forced:
                own_gap[i, step.j] = float(step.gap.max())
                gap[0, i, step.j] = OUT if step.skipped else np.inf
            if step.forced and step.skipped and row_max is not None:
                row_max[0, scan.grid.group_rows(i), step.j] = -np.inf  # it never raises m
    changed = replace(scan, gap=gap, row_max=row_max)
    return WhatIf(changed, _always(changed.curve(), sum(forced.values())), forced, own_gap)


def _always(curve: Curve, skips: int) -> Curve:
    """Make the first ``skips`` breakpoints of a curve hold for λ = 0 too."""

    def rest(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[skips:]

    return Curve(
        np.concatenate([curve.gap[:1], curve.gap[skips + 1 :]]),
        curve.sparsity[skips:],
        curve.pair_share[skips:],
        rest(curve.mean_dropped_mass),
        rest(curve.worst_dropped_mass),
    )


# ---- Choosing -----------------------------------------------------------------------------------


def pick(grid: Grid, i: int, j: int, possible: bool) -> Forced:
    """Offer to force tile (i, j), and list what is forced.

    Parameters
    ----------
    grid : Grid
    i, j : int
    possible : bool
        Whether row maxima and masses were kept.
    """
    visited = grid.visited_tiles()
    asked = _parse(_remembered()) if possible else {}
    forced = {tile: skip for tile, skip in asked.items() if _in(visited, tile)}
    here = possible and bool(visited[i, j])

    def button(label: str, key: str, icon: str, then: Forced, useful: bool, why: str) -> None:
        st.button(
            label,
            key=key,
            icon=icon,
            help=why,
            disabled=not useful,
            on_click=_remember,
            args=(then,),
        )

    with st.container(horizontal=True):
        for skip, word, icon, why in (
            (True, "skip", "remove_selection", "Skip this tile whatever its rows vote."),
            (False, "keep", "add_box", "Compute this tile whatever its rows vote."),
        ):
            useful = here and forced.get((i, j)) is not skip
            then = {**forced, (i, j): skip}
            label, key = f"{word.capitalize()} it", f"force_{word}"
            button(label, key, f":material/{icon}:", then, useful, why)
        why = "Force no tile any more."
        button("Undo all", "force_none", ":material/undo:", {}, bool(forced), why)
    if not possible:
        st.caption("Above 32,768 tokens tiles cannot be forced.")
    if not forced:
        return {}
    names = [_name(tile, skip) for tile, skip in forced.items()]
    st.session_state[KEY] = names
    label = "Forced tiles: group, key tile; click one to let the rule decide it again"
    st.pills(label, names, selection_mode="multi", key=KEY, bind="query-params")
    return forced


def _remembered() -> list[str]:
    return st.session_state[KEY] if KEY in st.session_state else st.query_params.get_all(KEY)


def _remember(forced: Forced) -> None:
    names = [_name(tile, skip) for tile, skip in forced.items()]
    if not st.session_state.get(KEY):  # nothing puts the first value of a new widget into the URL
        st.query_params[KEY] = names
    st.session_state[KEY] = names


def _name(tile: tuple[int, int], skip: bool) -> str:
    return f"{'skip' if skip else 'keep'} {tile[0]},{tile[1]}"


def _parse(names: list[str]) -> Forced:
    found = (re.fullmatch(r"(skip|keep) (\d{1,7}),(\d{1,7})", name) for name in names)
    return {(int(one[2]), int(one[3])): one[1] == "skip" for one in found if one}


def _in(visited: np.ndarray, tile: tuple[int, int]) -> bool:
    i, j = tile
    return i < visited.shape[0] and j < visited.shape[1] and bool(visited[i, j])


# ---- What it does -------------------------------------------------------------------------------


def tell(i: int, what_if: WhatIf, scan: Scan, threshold: float, arrays: Arrays) -> None:
    """Compare the error of query group ``i`` and of the head with that of the rule alone.

    Parameters
    ----------
    i : int
    what_if : WhatIf
    scan : Scan
        Of the same head, with nothing forced.
    threshold : float
    arrays : Arrays
        Of the same head.
    """
    if scan.mass is None:
        return
    rows, columns = scan.grid.group_rows(i), []
    for tiles in (scan.decide(threshold), what_if.decide(threshold)):
        lost = dropped_mass(scan.mass, tiles)[0]
        error = _output_error(i, tiles, arrays, scan.softmax_scale)
        of_group, of_head = lost[rows], lost
        columns.append(
            [
                percent(of_group.mean()),
                percent(of_group.max()),
                f"{error:.3g}",
                percent(of_head.mean()),
                percent(of_head.max()),
            ]
        )
    names = [
        f"Group {i}: attention lost, mean row",
        f"Group {i}: attention lost, worst row",
        f"Group {i}: output error, largest │y − ŷ│",
        "Whole head: attention lost, mean row",
        "Whole head: attention lost, worst row",
    ]
    st.markdown(table(["", "rule alone", "with forced tiles"], zip(names, *columns, strict=True)))


def _output_error(i: int, tiles: TileMap, arrays: Arrays, scale: float) -> float:
    """Largest difference that skipping makes to an output of one query group."""
    grid, rows = tiles.grid, tiles.grid.group_rows(i)
    stop = int(grid.visible()[rows.stop - 1])  # keys that the group's last row sees
    if stop == 0:
        return 0.0
    group = Grid((grid.rows, grid.keys), rows.stop - rows.start, stop, grid.causal, grid.window)
    state = tiles.state[:, i : i + 1, : group.key_tiles]
    parts = error_identity(
        arrays.q[:, rows],
        arrays.k[:, :stop],
        arrays.v[:, :stop],
        replace(tiles, state=state, grid=group),
        scale,
    )
    return float(np.abs(parts.error).max())
