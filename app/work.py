"""What is spared, and by which kernel: of one tile, and of a whole head as a ledger."""

from __future__ import annotations

from dataclasses import dataclass, replace

import altair as alt
import numpy as np
import pandas  # type: ignore[import-untyped]
import streamlit as st

from app.wording import amount, percent, table
from sim.cost import Work, ledger
from sim.geometry import COMPUTED, MASKED, TileMap
from sim.skip_softmax import Scan


@dataclass(frozen=True)
class Kernel:
    """What a kernel does not do for a tile that all agree to skip; P·V is spared by every one."""

    name: str
    spares_exponentials: bool
    spares_v: bool
    note: str = ""


KERNELS = (
    Kernel("prefill, our teaching kernel", True, True),
    Kernel("prefill, our tensor-core kernels", True, False),
    Kernel("prefill, NVIDIA fmha_v2 (Hopper)", True, False),
    Kernel("decode, NVIDIA XQA (Hopper)", False, True),
    Kernel("decode, NVIDIA trtllm-gen (Blackwell)", True, True, "warp by warp"),
)

QUANTITIES = (
    ("Q·Kᵀ", "qk_flops", "FLOP"),
    ("K read", "k_bytes", "B"),
    ("exponentials", "exponentials", ""),
    ("P·V", "pv_flops", "FLOP"),
    ("V read", "v_bytes", "B"),
)
TEACHING = "our teaching kernel"
COLOURS = {"dense": "#999999", TEACHING: "#0072b2", "NVIDIA fmha_v2": "#e69f00"}


HeadSizes = tuple[int, int]
"""Head size of q and k, and of v."""

# ---- One tile -----------------------------------------------------------------------------------


def tell_tile(tiles: TileMap, i: int, j: int, sizes: HeadSizes) -> None:
    """Say what skipping tile (i, j) spares in each family of kernels."""
    if not tiles.visited[0, i, j]:
        st.markdown("A masked tile costs nothing: no kernel visits it.")
        return
    state = np.full_like(tiles.state, MASKED)
    state[0, i, j] = COMPUTED
    work = ledger(replace(tiles, state=state), *sizes).dense
    st.markdown(
        f"Computed, this tile takes {amount(work.qk_flops, 'FLOP')} for Q·Kᵀ, "
        f"{amount(work.exponentials)} exponentials, {amount(work.pv_flops, 'FLOP')} for P·V, and "
        f"it reads {amount(work.k_bytes, 'B')} of K and {amount(work.v_bytes, 'B')} of V. A skip "
        "**never** spares K and Q·Kᵀ: they decide. It spares:"
    )
    st.markdown(
        table(
            ["kernel", "exponentials", "P·V", "reading V"],
            [
                [
                    kernel.name,
                    (kernel.note or "yes") if kernel.spares_exponentials else "no",
                    "yes",
                    "yes" if kernel.spares_v else "no",
                ]
                for kernel in KERNELS
            ],
        )
    )
    st.caption(
        "A prefill kernel that fetches V ahead of the vote has read it by then. A decode kernel "
        "meets one query row per head, not a group."
    )


# ---- A head -------------------------------------------------------------------------------------


def nvidia_tile(head_dim: int) -> tuple[int, int] | None:
    """Decision grid of NVIDIA's Hopper prefill kernel in 16 bits, where it can be replayed."""
    if head_dim <= 64:
        return (64, 256)
    return (64, 128) if head_dim <= 128 else None


def columns_of(scan: Scan, tiles: TileMap, threshold: float, sizes: HeadSizes) -> dict[str, Work]:
    """Work of one head: dense, of our teaching kernel, of NVIDIA's on its grid and in its order.

    Parameters
    ----------
    scan : Scan
        Of one head, with nothing forced.
    tiles : TileMap
        What was decided here.
    threshold : float
    sizes : HeadSizes
    """
    ours = ledger(tiles, *sizes, spares_v=True)
    columns = {"dense": ours.dense, TEACHING: ours.total}
    theirs = nvidia_tile(sizes[0])
    if theirs is not None and scan.row_max is not None and theirs[1] % scan.grid.keys == 0:
        other = scan.replay(order="ascending", tile=theirs).decide(threshold)
        columns["NVIDIA fmha_v2"] = ledger(other, *sizes).total
    return columns


def tell_head(scan: Scan, tiles: TileMap, threshold: float, sizes: HeadSizes) -> None:
    """Show the ledger of a head as table and chart; see :func:`columns_of`."""
    columns = columns_of(scan, tiles, threshold, sizes)
    rows = []
    for name, field, unit in QUANTITIES:
        dense = getattr(columns["dense"], field)
        cells = [amount(dense, unit)]
        for work in list(columns.values())[1:]:
            count = getattr(work, field)
            cells.append(f"{amount(count, unit)} ({percent(count / max(dense, 1))})")
        rows.append([name, *cells])
    st.markdown(table(["this head", *columns], rows))
    chart, takeaway = _chart(columns)
    st.altair_chart(chart, alt=takeaway)
    rows_, keys = tiles.grid.tile
    said = (
        f"Our teaching kernel: order {tiles.order}, tiles of {rows_} × {keys}; it reads V after "
        "the vote, our tensor-core prefill kernels read all of it. "
    )
    if "NVIDIA fmha_v2" in columns:
        rows_, keys = nvidia_tile(sizes[0]) or (0, 0)
        said += (
            f"NVIDIA’s Hopper prefill kernel: order ascending, tiles of {rows_} × {keys} at head "
            f"size {sizes[0]}, the same λ; it reads all of V. "
        )
    else:
        said += "NVIDIA’s grid cannot be replayed from what was kept of this head. "
    st.caption(
        said + "Its decode kernel XQA reads only the V that is kept, but takes every exponential. "
        "Bytes are what each query group asks for in 16 bits, before any cache."
    )


def _chart(columns: dict[str, Work]) -> tuple[alt.Chart, str]:
    names = [name for name, _, _ in QUANTITIES]
    dense = columns["dense"]
    shares = pandas.DataFrame(
        [
            {
                "quantity": quantity,
                "kernel": kernel,
                "share": getattr(work, field) / max(getattr(dense, field), 1),
            }
            for quantity, field, _ in QUANTITIES
            for kernel, work in columns.items()
        ]
    )
    kernels = list(columns)
    chart = (
        alt.Chart(shares)
        .mark_bar()
        .encode(
            y=alt.Y("quantity:N", sort=names, title=None),
            yOffset=alt.YOffset("kernel:N", sort=kernels),
            x=alt.X(
                "share:Q",
                title="Share of dense",
                axis=alt.Axis(format="~%", values=[0, 0.25, 0.5, 0.75, 1]),
            ),
            color=alt.Color(
                "kernel:N",
                scale=alt.Scale(domain=kernels, range=[COLOURS[kernel] for kernel in kernels]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=["quantity:N", "kernel:N", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=260, width="container")
    )
    ours = columns[TEACHING]
    takeaway = (
        "Of the dense work, our teaching kernel does "
        f"{percent(ours.pv_flops / max(dense.pv_flops, 1))} of P·V "
        f"and {percent(ours.exponentials / max(dense.exponentials, 1))} of the exponentials; "
        "all of Q·Kᵀ."
    )
    return chart, takeaway
