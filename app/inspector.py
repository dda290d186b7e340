"""One tile and one query row, by number: all that the map shows at a pointer, without a pointer."""

from __future__ import annotations

from typing import NamedTuple

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import controls, forced
from app.forced import Forced, WhatIf
from app.scans import Arrays
from app.sections import section
from app.views import STATES, Words
from app.wording import percent, score, why
from sim.accuracy import dropped_mass
from sim.geometry import TileMap
from sim.skip_softmax import Scan
from sim.threshold import ln_threshold

TABLE = ":material/table_rows:"


class Place(NamedTuple):
    """Tile and query row that were chosen, and where to write about them."""

    group: int
    key_tile: int
    row: int
    forced: Forced
    about_tile: DeltaGenerator
    about_row: DeltaGenerator


def pick(scan: Scan) -> Place:
    """Show inputs for tile, forced tiles and row of one head's scan: the map needs them."""
    st.subheader("One tile", anchor=False)
    i, j = controls.pick_tile(scan.grid)
    picked = forced.pick(scan.grid, i, j, scan.mass is not None)
    about_tile = st.container()
    st.subheader("One query row", anchor=False)
    row = controls.pick_row(scan.grid.lq, _deciding(scan, i, j))
    return Place(i, j, row, picked, about_tile, st.container())


class Subject(NamedTuple):
    """One head at one λ: its scan, what the forced tiles make of it, its Q, K and V, its words.

    ``name`` tells it from every other head and view.
    """

    scan: Scan
    what_if: WhatIf
    threshold: float
    arrays: Arrays
    words: Words
    name: str


def tell(place: Place, subject: Subject) -> None:
    """Say what is known about the chosen tile and row, and offer what lies deeper."""
    tiles = subject.what_if.decide(subject.threshold)
    with place.about_tile:
        _tell_tile(place, subject, tiles)
    with place.about_row:
        _tell_row(subject.what_if.scan, tiles, subject.words, place.row)


def _tell_tile(place: Place, subject: Subject, tiles: TileMap) -> None:
    scan, what_if, threshold = subject.scan, subject.what_if, subject.threshold
    arrays, words = subject.arrays, subject.words
    i, j = place.group, place.key_tile
    st.markdown(_tile_sentence(what_if, tiles, i, j))
    if what_if.forced:
        forced.tell(i, what_if, scan, threshold, arrays)
    if words.keys:
        left, right = st.columns(2, gap="large")
        for side, name, tokens, where in (
            (left, "keys", words.keys, scan.grid.tile_keys(j)),
            (right, "queries", words.queries, scan.grid.group_rows(i)),
        ):
            side.caption(f"Words of its {name} ({where.start:,} – {where.stop - 1:,})")
            side.text(words.passage(tokens, where))

    def vote() -> None:
        from app import votes

        votes.tell(scan, (i, j), threshold, what_if.forced, words)

    def savings() -> None:
        from app import work

        work.tell_tile(tiles, i, j, sizes_of(arrays))

    def steps() -> None:
        from app import visit

        visit.show(scan, i, place.row, threshold, what_if.forced, words, subject.name)

    def table() -> None:
        st.dataframe(
            _tile_table(what_if.scan, tiles, words, i),
            hide_index=True,
            alt=f"State, gap and maxima of every tile that query group {i} visits",
        )

    def kernel() -> None:
        from app import real_kernel

        real_kernel.show(scan, arrays, i, j, threshold, subject.name)

    section(f"The vote on tile ({i}, {j}), row by row", "votes", ":material/how_to_vote:", vote)
    section(f"Step through the visit of query group {i}", "steps", ":material/play_circle:", steps)
    section("What skipping it saves, by kernel", "saves", ":material/savings:", savings)
    section("The real kernel around this tile", "kernel", ":material/memory:", kernel)
    section(f"Table: the tiles of query group {i}, in visit order", "tiles", TABLE, table)


def sizes_of(arrays: Arrays) -> tuple[int, int]:
    """Head size of q and k, and of v."""
    return arrays.q.shape[2], arrays.v.shape[2]


def _tell_row(scan: Scan, tiles: TileMap, words: Words, row: int) -> None:
    if scan.mass is None:
        st.caption("Above 32,768 tokens the attention of single rows is not kept.")
        return
    lost = dropped_mass(scan.mass, tiles)[0, row]
    st.markdown(f"Query row {row:,} loses **{percent(lost)}** of its attention.")
    if words.queries:
        st.caption("Its word, after the words before it")
        st.text(words.passage(words.queries, slice(max(0, row - 31), row + 1)))

    def table() -> None:
        st.dataframe(
            _row_table(scan, tiles, words, row),
            hide_index=True,
            column_config={"Attention": st.column_config.NumberColumn(format="%.3g")},
            alt=f"Attention of query row {row} in every key tile, and whether it is skipped",
        )

    section(f"Table: attention of query row {row:,} per key tile", "row_tiles", TABLE, table)


def _deciding(scan: Scan, i: int, j: int) -> int | None:
    return None if scan.row_max is None else int(scan.deciding_row(0)[i, j])


def _tile_sentence(what_if: WhatIf, tiles: TileMap, i: int, j: int) -> str:
    scan, ln = what_if.scan, float(ln_threshold(tiles.threshold[0]))
    state = STATES[tiles.state[0, i, j]]
    if (i, j) in what_if.forced:
        gap = score(what_if.own_gap[i, j])
        return f"Tile ({i}, {j}) is **{state}** by hand: its gap is {gap}, ln λ {score(ln)}."
    sentence = f"Tile ({i}, {j}) is **{state}**: {why(state, float(scan.gap[0, i, j]), ln)}."
    deciding = _deciding(scan, i, j)
    if state == "masked" or deciding is None or scan.row_max is None:
        return sentence
    tile_max, m = scan.row_max[0, deciding, j], scan.running_max(0)[deciding, j]
    return (
        f"{sentence} Query row {deciding:,} decides: its largest score here is "
        f"{score(tile_max)}, its running maximum m before is {score(m)}."
    )


def _tile_table(scan: Scan, tiles: TileMap, words: Words, i: int) -> dict[str, list]:
    order = scan.grid.visit(scan.order, i)
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


def _row_table(scan: Scan, tiles: TileMap, words: Words, row: int) -> dict[str, list]:
    grid, mass = scan.grid, scan.mass
    assert mass is not None, "without masses no row is told about"
    visible = grid.visit("ascending", row // grid.rows)
    table: dict[str, list] = {
        "Key tile": visible.tolist(),
        "Attention": mass[0, row, visible].tolist(),
        "State": [STATES[state] for state in tiles.state[0, row // grid.rows, visible]],
    }
    if words.keys:
        firsts = (grid.tile_keys(j).start for j in visible)
        table["First words"] = [words.passage(words.keys, slice(n, n + 12)) for n in firsts]
    return table
