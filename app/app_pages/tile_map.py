"""Tile map: a real model's attention, tile by tile, and what a threshold λ leaves out of it."""

from dataclasses import replace
from functools import partial

import streamlit as st

from app import about, controls, forced, inspector, views, whole_head
from app.components.tile_map import tile_map
from app.scans import View, arrays_of, curve_of, growth, is_long, scan_of, scanned_heads
from app.views import Words
from app.wording import short_context

# ---- What is looked at --------------------------------------------------------------------------
with st.sidebar:
    source = controls.pick_source()
    trace = source.trace
    lq, lk = trace.q.shape[1], trace.k.shape[1]
    head = controls.pick_head(len(trace.q))
    compare = controls.pick_compare()
    croppable = trace.causal and lq == lk and not is_long(source)
    orders = ["ascending", "ends_first"] if compare else [controls.pick_order()]
    length = controls.pick_length(lk, croppable)
    mask = controls.pick_mask(lq, lk, trace.causal)
    hold = controls.pick_hold()
    asked, factor = controls.pick_threshold(hold, length)
    controls.upload()

st.title("Tile map", anchor=False)
controls.say_fault()
st.markdown(
    "A model’s attention, tile by tile. Drag λ: Skip Softmax leaves out the tiles whose scores lie "
    "too far below what their queries have seen already."
)
if compare:  # two maps take the whole width
    map_slot = st.container()
    curves_slot, growth_slot = st.columns(2, gap="large")
else:
    map_slot, side = st.columns([8, 5], gap="large")
    curves_slot, growth_slot = side.container(), side.container()
too_short = asked > 1  # for its scale factor: such a request is computed densely
setting = views.Setting(
    0.0 if too_short else asked, short_context(factor, length) if too_short else None
)

# ---- Scans: the only place that waits -----------------------------------------------------------
heads = scanned_heads(source, head)
index = heads.index(head)
bar = map_slot.empty()


def report(share: float) -> None:
    """Show how much of Q·Kᵀ has been formed."""
    bar.progress(share, text=f"Forming Q·Kᵀ: {lk:,} tokens, {len(heads)} of {len(trace.q)} heads")


views_of = {one: View(one, length, *mask) for one in orders}
found = {one: scan_of(source, heads, view, report) for one, view in views_of.items()}
bar.empty()
curves = {
    one: [curve_of(source.key, view, h, x, found[one]) for x, h in enumerate(heads)]
    for one, view in views_of.items()
}
one_head = {one: found[one].heads([index]) for one in orders}
shown = orders[-1]
words = Words.of(trace, found[shown].grid)

# ---- Map: sent before everything below it, so that it is on screen first ------------------------
place = inspector.pick(one_head[shown])
what_ifs = {one: forced.apply(one_head[one], curves[one][index], place.forced) for one in orders}
what_if = what_ifs[shown]
head_sizes = (trace.q.shape[2], trace.v.shape[2])
panels = [
    views.panel(what_ifs[one], setting, head_sizes)
    | views.titles(found[one], one if compare else "")
    | views.query_row(one_head[one], place.row, words)
    for one in orders
]
thumbnails = [
    views.thumbnail(what_if.scan, 0, what_if.curve, setting, h, trace.head_names[h])
    if h == head
    else views.thumbnail(found[shown], x, curves[shown][x], setting, h, trace.head_names[h])
    for x, h in enumerate(heads)
]
with map_slot:
    tile_map(
        views.component_data(setting, panels, thumbnails, words, head, place[:2]),
        key=controls.MAP,
        on_threshold=partial(controls.threshold_moved, length),
        on_head=controls.head_chosen,
        on_cell=controls.tile_chosen,
    )
    if views.is_pooled(what_if.scan.grid):
        st.caption(
            f"Drawn at {views.MAX_SIDE:,} tiles a side: a cell is skipped only if all its tiles "
            "are. All numbers are of the full map."
        )

# ---- Words and curves ---------------------------------------------------------------------------
from app import charts  # noqa: E402  the map is on screen before Altair has been imported

subject = inspector.Subject(
    one_head[shown],
    what_if,
    setting.threshold,
    arrays_of(source, [head], views_of[shown]),
    words,
    f"{source.key} {head} {views_of[shown]}",
)
inspector.tell(place, subject)
with curves_slot:
    st.subheader(f"What λ saves, and what it costs{f': {shown}' if compare else ''}", anchor=False)
    for chart, alt in charts.against_threshold(what_if.curve, setting.threshold):
        st.altair_chart(chart, alt=alt)
if croppable and mask.queries is None and lk > controls.LENGTH_STEP:
    with growth_slot:
        st.subheader("What is skipped in longer contexts", anchor=False)
        whole_view = replace(views_of[shown], length=lk)
        whole = scan_of(source, heads, whole_view, report)
        lengths = charts.lengths_up_to(lk, controls.LENGTH_STEP)
        scans = growth(source.key, whole_view, head, index, lengths, whole)
        chart, alt = charts.against_length(scans, min(asked, 1.0), factor, length)
        st.altair_chart(chart, alt=alt)

whole_head.tell(subject, trace, head)
about.show(trace.card)
