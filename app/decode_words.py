"""What the decode page says in tables and sentences about one step."""

from __future__ import annotations

from app.decode_view import PAGE, Step
from app.wording import NBSP, amount, code, percent, score, table
from sim.decode import DecodeBytes, DecodeTiles, attend_decode
from sim.decode_time import DENSE, SKIPPING, expected_speed_up, reached
from sim.hardware import GPUS
from sim.threshold import ln_threshold
from sim.traces import Trace

EXPLANATION = """
**The cache.** A language model writes one token at a time. For each it compares one query per head
with the keys (K) of all tokens so far, and mixes their values (V). Reading K and V is nearly all of
the work: memory is what decode waits for, not arithmetic.

**The rule.** Scores need K, so all of K is read. Then a tile whose scores all lie far enough below
the running maximum *m*, by more than ln λ, is skipped, and its V stays unread: at best half of the
bytes.

**The vote.** Several query heads share one KV head (GQA). A tile’s V is read once for all of them,
so all must agree: one head’s veto keeps the tile.

**Splits.** One request has too few heads to fill a GPU, so its cache is cut among many blocks of
threads (CTAs). Each has a running maximum of its own. A plain split starts from nothing: it never
skips its first tile, and may never see the tokens that matter most. A *seeded* split starts at the
larger row maximum of the first and the newest tile, where most rows have their largest score.
It costs two tiles of K per split, and gives back nearly everything that splitting loses.

**Sparsity** is skipped ÷ visited tiles of this step.
"""


def before_and_newest(trace: Trace, token: int, before: int = 24) -> str:
    """Write the words before a token, and the token's own."""
    context = " ".join("".join(trace.tokens[max(token - before, 0) : token]).split())
    word = "".join(trace.tokens[token : token + 1]).strip()
    return f"… {code(context or NBSP)} → **{code(word or NBSP)}**"


def ledger(moved: DecodeBytes) -> str:
    """Tabulate bytes with nothing skipped, bytes moved, and what is spared."""
    rows = [
        ("K of every tile", moved.k, moved.k),
        ("V of kept tiles", moved.dense_v, moved.v),
        (f"page table, {PAGE} tokens a page", moved.page_table, moved.page_table),
        ("partial results, written and read", moved.partials, moved.partials),
        ("**together**", moved.dense, moved.total),
    ]
    return table(
        ["", "dense", "now", "spared"],
        [
            [
                name,
                amount(dense, "B"),
                amount(now, "B"),
                percent(1 - now / dense) if dense else "–",
            ]
            for name, dense, now in rows
        ],
    )


def expected(moved: DecodeBytes) -> str:
    """Say what the bytes make of the time, and that this is a model."""
    least, most = reached()
    return (
        f"**Expected: {expected_speed_up(moved):.3g}× faster than dense**, by a model: time is "
        "bytes ÷ bandwidth, the same for both; launches, votes and V loads that begin late cost "
        "nothing. "
        f"Published kernels had {percent(least)} to {percent(most)} of the gain that the model "
        "gives them."
    )


def votes(step: Step, tile: int, threshold: float, names: list[str]) -> str:
    """Tabulate what each head says of a tile."""
    ln = float(ln_threshold(threshold))
    gaps = step.alone.gap[0, :, tile]
    rows = [
        [name, score(gap), "skip" if gap < ln else "**veto**"]
        for name, gap in zip(names, gaps.tolist(), strict=True)
    ]
    return table(["head", "gap", f"vote: skip if below {score(ln)}"], rows)


def about_tile(step: Step, tiles: DecodeTiles, tile: int) -> str:
    """Say which split visits a tile, when, and what became of it."""
    grid = step.together.grid
    split = int(grid.split_of(step.tiles)[tile])
    lane = grid.lanes(step.tiles)[split].tolist()
    keys = range(tile * grid.keys, min((tile + 1) * grid.keys, grid.cache))
    place = "the first" if lane[0] == tile else f"number {lane.index(tile) + 1}"
    said = (
        f"Tile {tile}, keys {keys.start:,} – {keys.stop - 1:,}: {place} of {len(lane)} that split "
        f"{split} visits. "
    )
    if tiles.skipped[0, 0, tile]:
        return said + "**Skipped**: its V is not read."
    return said + "**Computed**: its V is read."


def losses(step: Step, tiles: DecodeTiles, names: list[str]) -> str:
    """Tabulate what each head loses, what is certified, and what it would skip alone."""
    out = attend_decode(step.q, step.k, step.v, tiles, softmax_scale=step.softmax_scale)
    alone = step.alone.decide(float(tiles.threshold[0, 0])).sparsity
    return table(
        ["head", "attention lost", "certified", "would skip alone"],
        [
            [name, percent(lost), f"at most {percent(bound)}", percent(share)]
            for name, lost, bound, share in zip(
                names,
                out.dropped_mass[0].tolist(),
                out.dropped_mass_bound[0].tolist(),
                alone.tolist(),
                strict=True,
            )
        ],
    )


def published() -> str:
    """Tabulate published measurements beside the model, each with its residual."""
    sheets = "; ".join(
        f"{gpu.name} {gpu.bandwidth / 1e12:g} TB/s ({gpu.source})" for gpu in GPUS.values()
    )
    dense = table(
        ["dense", "µs (model)", "residual"],
        [
            [
                row.label,
                f"{row.microseconds:,.0f} ({row.model:,.0f})",
                f"{row.microseconds / row.model - 1:+.0%}",
            ]
            for row in DENSE
        ],
    )
    skipping = table(
        ["skipping", "skipped", "speed-up (model)", "residual"],
        [
            [
                row.label,
                percent(row.sparsity),
                f"{row.speed_up:.2f}× ({row.model:.2f}×)",
                f"{row.speed_up - row.model:+.2f}".replace("-", "−"),
            ]
            for row in SKIPPING
        ],
    )
    sources = sorted({row.source for row in DENSE} | {row.source for row in SKIPPING})
    return (
        f"Nothing here was measured by this project. Bandwidths are data sheets’: {sheets}.\n\n"
        f"{dense}\n\nSpeed-up over dense, model: 2 ÷ (2 − sparsity). Most were measured on random "
        f"data, so they show speed, not accuracy.\n\n{skipping}\n\nSources: {'; '.join(sources)}."
    )
