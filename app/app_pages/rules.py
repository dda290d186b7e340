"""Rules: the maximum rule beside two that look at sums, at equal sparsity or at equal loss."""

import streamlit as st

from app import controls
from app import rule_comparison as rules
from app.scans import View, scan_of
from app.wording import percent, plain_number, table

MOST_TOKENS = 4096
MOST_HEADS = 8

with st.sidebar:
    source = controls.pick_source()
    order = controls.pick_order()
    equal = st.segmented_control(
        "Made equal in the table",
        list(rules.TARGETS),
        default="tiles skipped",
        required=True,
        key="equal",
        bind="query-params",
    )
    field, offered = rules.TARGETS[equal]
    share = st.selectbox(
        "At, per cent",
        offered,
        index=2,
        key=f"at_{field}",
        bind="query-params",
        format_func=plain_number,
    )
    target = share / 100

st.title("Rules", anchor=False)
st.markdown(
    "Skip Softmax compares a tile’s largest score with the running maximum. Two other rules look "
    "at sums that their own skips change, so they are walked through tile by tile. What each rule "
    "asks of every row before a tile is skipped:"
)
st.markdown(
    table(
        ["rule", "skips where", "promise"],
        [[family.name, f"`{family.formula}`", family.promise] for family in rules.FAMILIES],
    )
)

trace = source.trace
lq, lk = trace.q.shape[1], trace.k.shape[1]
length = min(lk, MOST_TOKENS) if trace.causal and lq == lk else lk
if lq * length > MOST_TOKENS**2:
    st.info(f"Rules are compared on at most {MOST_TOKENS:,} tokens; this trace cannot be cut.")
    st.stop()
heads = list(range(min(len(trace.q), MOST_HEADS)))
bar = st.progress(0.0)


def forming(share: float) -> None:
    """Show how much of Q·Kᵀ has been formed."""
    bar.progress(share, "Forming Q·Kᵀ")


scan = scan_of(source, heads, View(order, length), forming)

key, done = f"{source.key} {heads} {order} {length}", 0


def measured(family: rules.Family, setting: float) -> rules.Point:
    """Measure one setting and move the bar."""
    global done
    done += 1
    text = f"{family.name}, {family.symbol} = {setting:g}, {len(heads)} heads"
    bar.progress(min(done / rules.work(), 1.0), text)
    return rules.measure(key, family.name, setting, scan)


points = {family: [measured(family, x) for x in family.settings] for family in rules.FAMILIES}
columns = [
    rules.column(family, rules.at_target(family, line, field, target, measured))
    for family, line in points.items()
]
bar.empty()

st.subheader(f"At equal {equal}, {percent(target)}", anchor=False)
names = [family.name for family in rules.FAMILIES]
st.markdown(table(["", *names], zip(rules.QUANTITIES, *columns, strict=True)))
st.caption(
    f"{len(heads)} heads, {length:,} tokens, tiles of 64 × 128, order {order}. Each setting was "
    f"found by bisection, to one part in a hundred of the target where tiles allow it. Lost: true "
    "softmax probability in skipped tiles; worst: of all rows of all heads."
)

from app.rule_chart import trade_off  # noqa: E402  the table is on screen before Altair

for side, (name, title) in zip(
    st.columns(2, gap="large"),
    (("worst", "Lost by the worst row"), ("mean", "Lost by the mean row")),
    strict=True,
):
    with side:
        st.subheader(title, anchor=False)
        chart, alt = trade_off(points, name, title)
        st.altair_chart(chart, alt=alt)
st.markdown(
    "Lower is better. A budget spends on each row only what it was given, so its worst row is "
    "bounded whatever the text; the price is that one cautious row keeps a tile for its whole "
    "group, and usually fewer tiles fall at the same mean loss. The maximum rule promises nothing "
    "beforehand, but every call can return a certified bound of what each row has lost."
)
