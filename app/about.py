"""What the page shows, in plain words, and where the trace comes from."""

from __future__ import annotations

import streamlit as st

EXPLANATION = """
**The map.** A language model reads each new token (a *query*) against all tokens so far (*keys*).
A GPU does this in tiles: one cell of the map is 64 consecutive queries against 128 consecutive
keys. Time runs downwards and the past lies to the left, so the upper right is empty (*masked*).

**The rule.** While a group of 64 queries walks over its key tiles, each query remembers the largest
score it has met, its running maximum *m*. The *gap* of the next tile is the largest score in it
minus *m*, for the query of the group where that difference is largest. The tile is skipped if its
gap is below ln λ: with λ = 0.01, if for **every** query no key in the tile weighs as much as a
hundredth of the best key met before. A larger λ skips more. The first tile of a group is never
skipped.

**Sparsity** is skipped ÷ visited tiles. Other papers count otherwise.

**What is lost.** A skipped tile's share of a query's attention is simply gone; the rest is
scaled up. The curves show it for the worst query and on average.

**What is saved.** Scores (Q·Kᵀ) are always computed, since they decide; the exponentials and
the product with V are not. With half of the tiles skipped, a quarter of the matrix work is saved.

**The order matters.** The first keys and the most recent ones usually hold the largest scores.
Visiting them first (`ends_first`) raises *m* early, and more tiles fall below it.
"""


def show(card: dict[str, str]) -> None:
    """Show the explanation and the trace's card; its text may come from anybody."""
    with st.expander("What am I looking at?", icon=":material/help:"):
        st.markdown(EXPLANATION)
    if card:
        with st.expander("Where this trace comes from", icon=":material/description:"):
            for field, text in card.items():
                st.text(f"{field}: {text}")
