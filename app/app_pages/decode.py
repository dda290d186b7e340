"""Decode: one new token against the cache, split by split, and which reads of V are saved."""

import streamlit as st

from app import controls, decode_controls, decode_view
from app import decode_words as words
from app.components.lanes import lanes
from app.sections import section
from app.wording import percent, plain_number

# ---- What is looked at ---------------------------------------------------------------------------
with st.sidebar:
    source = controls.pick_source()
    trace = source.trace
    kv = decode_controls.pick_kv_head(len(trace.k))
    how = decode_view.How(
        splits=decode_controls.pick_splits(),
        seeded=decode_controls.pick_seeded(),
        split_layout=decode_controls.pick_layout(),
        keys=decode_controls.pick_keys(),
    )
    threshold = controls.threshold_input(decode_controls.THRESHOLD, bind="query-params")
    controls.upload()

st.title("Decode", anchor=False)
controls.say_fault()
st.markdown(
    "To write one token, a model reads its whole cache once, for one query per head: memory is "
    "what it waits for. A tile is skipped after its K has been read and before its V is."
)
if not trace.causal:
    st.info("Decode writes one token after another; this trace is not causal.")
    st.stop()

place, passage = st.columns([1, 3], gap="large", vertical_alignment="bottom")
with place:
    token = decode_controls.pick_token(decode_view.first_token(trace), trace.k.shape[1] - 1)
if trace.tokens:
    passage.markdown(words.before_and_newest(trace, token))

# ---- The step ------------------------------------------------------------------------------------
step = decode_view.step_of(source, kv, token, how)
names = [trace.head_names[head] for head in decode_view.heads_of(trace, kv)]
tiles = step.together.decide(threshold)
moved = step.moved(tiles)

picture = st.container()
left, right = st.columns(2, gap="large")
with right:
    st.subheader("One tile", anchor=False)
    tile = decode_controls.pick_tile(step.tiles)
    st.markdown(words.about_tile(step, tiles, tile))
    st.markdown(words.votes(step, tile, threshold, names))
with picture:
    lanes(
        decode_view.lanes_data(step, how, threshold, names, trace.tokens, tile),
        key=decode_controls.LANES,
        on_threshold=decode_controls.threshold_moved,
        on_tile=decode_controls.tile_chosen,
    )
with left:
    st.subheader("Bytes of this step", anchor=False)
    st.markdown(words.ledger(moved))
    st.markdown(words.expected(moved))
    st.caption(
        "One request and one KV head, elements of 16 bits. What every seeded split reads, K of the "
        "first and the newest tile, counts once: the L2 cache holds it. λ × keys, the scale factor "
        "of engines, "
        f"is {plain_number(threshold * (token + 1))} here."
    )
st.subheader("What each head loses", anchor=False)
st.markdown(words.losses(step, tiles, names))

# ---- Deeper --------------------------------------------------------------------------------------


def splits_cost() -> None:
    """Draw sparsity against splits."""
    from app.decode_chart import against_splits

    rows = decode_view.split_costs(source, kv, token, how.keys, how.split_layout, threshold)
    if not rows:
        st.markdown(f"This takes {decode_view.DECODE_STEPS} tokens, the newest one included.")
        return
    chart, alt = against_splits(rows, how.splits)
    st.altair_chart(chart, alt=alt)
    st.caption(
        f"The last {decode_view.DECODE_STEPS} tokens, each as a step; λ = "
        f"{plain_number(threshold)}, {how.keys} keys a tile, {how.split_layout}. One seeded split "
        f"skips {percent(rows[0].unsplit)}."
    )


def published() -> None:
    """Tabulate others' measurements."""
    st.markdown(words.published())


section(
    "What splits cost, and what the seed gives back", "cost", ":material/call_split:", splits_cost
)
section(
    "The model of time beside published measurements",
    "model",
    ":material/speed:",
    published,
)
with st.expander("What am I looking at?", icon=":material/help:"):
    st.markdown(words.EXPLANATION)
