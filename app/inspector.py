"""One tile and one query row, by number: all that the map shows at a pointer, without a pointer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import streamlit as st
from numpy.typing import NDArray
from streamlit.delta_generator import DeltaGenerator

from app import controls
from app.views import STATES, Words
from app.wording import percent, score, why
from sim.accuracy import dropped_mass
from sim.geometry import TileMap, visit_order
from sim.skip_softmax import Scan
from sim.threshold import ln_threshold


class Place(NamedTuple):
    """Tile and query row that were chosen, and where to write about them."""

    group: int
    key_tile: int
    row: int
    about_tile: DeltaGenerator
    about_row: DeltaGenerator


def pick(scan: Scan) -> Place:
    """Show number inputs for tile and row of one head's scan: the map needs both."""
    st.subheader("One tile", anchor=False)
    i, j = controls.pick_tile(scan.grid)
    about_tile = st.container()
    st.subheader("One query row", anchor=False)
    row = controls.pick_row(scan.grid.lq, _deciding(scan, i, j))
    return Place(i, j, row, about_tile, st.container())


def tell(place: Place, scan: Scan, tiles: TileMap, words: Words) -> None:
    """Say what is known about the chosen tile and row, and offer the tables.

    Parameters
    ----------
    place : Place
    scan : Scan
        Of one head.
    tiles : TileMap
        Decided from it.
    words : Words
    """
    with place.about_tile:
        _tell_tile(scan, tiles, words, place.group, place.key_tile)
    with place.about_row:
        _tell_row(scan, tiles, words, place.row)


def _tell_tile(scan: Scan, tiles: TileMap, words: Words, i: int, j: int) -> None:
    st.markdown(_tile_sentence(scan, tiles, i, j, _deciding(scan, i, j)))
    if words.keys:
        left, right = st.columns(2, gap="large")
        for side, name, tokens, where in (
            (left, "keys", words.keys, scan.grid.tile_keys(j)),
            (right, "queries", words.queries, scan.grid.group_rows(i)),
        ):
            side.caption(f"Words of its {name} ({where.start:,} – {where.stop - 1:,})")
            side.text(words.passage(tokens, where))
    # Closed tables are not made: the browser would load its table code at first paint.
    table = st.expander(
        f"Table: the tiles of query group {i}, in visit order", key="tiles", on_change="rerun"
    )
    if table.open:
        table.dataframe(
            _tile_table(scan, tiles, words, i),
            hide_index=True,
            alt=f"State, gap and maxima of every tile that query group {i} visits",
        )


def _tell_row(scan: Scan, tiles: TileMap, words: Words, row: int) -> None:
    if scan.mass is None:
        st.caption("Above 32,768 tokens the attention of single rows is not kept.")
        return
    lost = dropped_mass(scan.mass, tiles)[0, row]
    st.markdown(f"Query row {row:,} loses **{percent(lost)}** of its attention.")
    if words.queries:
        st.caption("Its word, after the words before it")
        st.text(words.passage(words.queries, slice(max(0, row - 31), row + 1)))
    table = st.expander(
        f"Table: attention of query row {row:,} per key tile", key="row_tiles", on_change="rerun"
    )
    if table.open:
        table.dataframe(
            _row_table(scan.mass, tiles, words, row),
            hide_index=True,
            column_config={"Attention": st.column_config.NumberColumn(format="%.3g")},
            alt=f"Attention of query row {row} in every key tile, and whether it is skipped",
        )


def _deciding(scan: Scan, i: int, j: int) -> int | None:
    return None if scan.row_max is None else int(scan.deciding_row(0)[i, j])


def _tile_sentence(scan: Scan, tiles: TileMap, i: int, j: int, deciding: int | None) -> str:
    gap, ln = float(scan.gap[0, i, j]), float(ln_threshold(tiles.threshold[0]))
    state = STATES[tiles.state[0, i, j]]
    reason = why(state, gap, ln)
    sentence = f"Tile ({i}, {j}) is **{state}**: {reason}."
    if state == "masked" or deciding is None or scan.row_max is None:
        return sentence
    tile_max, m = scan.row_max[0, deciding, j], scan.running_max(0)[deciding, j]
    return (
        f"{sentence} Query row {deciding:,} decides: its largest score here is "
        f"{score(tile_max)}, its running maximum m before is {score(m)}."
    )


def _tile_table(scan: Scan, tiles: TileMap, words: Words, i: int) -> dict[str, list]:
    order = visit_order(scan.order, int(scan.grid.visited()[i]))
    table: dict[str, list] = {
        "Key tile": order.tolist(),
        "State": [STATES[state] for state in tiles.state[0, i, order]],
        "Gap": scan.gap[0, i, order].tolist(),
    }
    if scan.row_max is not None:
        rows = scan.deciding_row(0)[i, order]
        table["Tile max"] = scan.row_max[0, rows, order].tolist()
        table["Running max m"] = scan.running_max(0)[rows, order].tolist()
        table["Deciding row"] = rows.tolist()
    if words.keys:
        firsts = (scan.grid.tile_keys(j).start for j in order)
        table["First words"] = [words.passage(words.keys, slice(n, n + 12)) for n in firsts]
    return table


def _row_table(
    mass: NDArray[np.float32], tiles: TileMap, words: Words, row: int
) -> dict[str, list]:
    grid = tiles.grid
    visible = range(int(grid.visited()[row // grid.rows]))
    table: dict[str, list] = {
        "Key tile": list(visible),
        "Attention": mass[0, row, : len(visible)].tolist(),
        "State": [STATES[tiles.state[0, row // grid.rows, j]] for j in visible],
    }
    if words.keys:
        firsts = (grid.tile_keys(j).start for j in visible)
        table["First words"] = [words.passage(words.keys, slice(n, n + 12)) for n in firsts]
    return table
