# %% [markdown]
# # 1 · Softmax needs a maximum
#
# **Question:** Why does every attention kernel carry along the maximum of each row?
#
# **Before:** lesson 0.
# **Time:** 15 minutes. **Needs a GPU:** no.
#
# Softmax takes exp of every score. exp grows fast, and the numbers of a computer end somewhere.
# GPUs like short numbers, because they move and multiply faster: `float32` has 32 bits, `float16`
# has 16, and ends already at 65 504.

# %%
import numpy as np

from lessons import checks, helpers, pictures
from sim.draw import PALETTE, Axis, labelled

np.seterr(over="ignore", invalid="ignore")  # we are going to overflow on purpose

# %% [markdown]
# ## Predict
#
# What is the largest x for which exp(x) is still a finite number in `float32`? (The largest
# `float32` is about 3.4 · 10³⁸; the natural logarithm of 10 is 2.3.)

# %%
prediction = None  # PREDICT: the largest x whose exp is finite in float32

# %% [markdown]
# ## See it break
#
# This is the softmax of lesson 0. It is right on paper, and works for small scores.


# %%
def naive_softmax(scores):
    """Weights of each row: exp, divided by the row's sum."""
    p = np.exp(scores)
    return p / p.sum(axis=-1, keepdims=True)


for scores in ([1.0, 2.0, 3.0], [101.0, 102.0, 103.0], [-201.0, -202.0, -203.0]):
    print(scores, "->", naive_softmax(np.array(scores, np.float32)))

# %% [markdown]
# * At 101 exp *overflows*: it becomes inf, and inf / inf is nan ("not a number"). One nan in a
#   row spoils that row, and in the next layer everything.
# * At −201 exp *underflows*: it becomes 0 for all three, and 0 / 0 is nan again.
#
# Where exactly does it overflow? Halve the interval until it cannot be halved any more.


# %%
def largest_x(dtype):
    """Find the largest x whose exp is finite in this type."""
    low, high = dtype(0), dtype(1000)
    while low < (middle := dtype((float(low) + float(high)) / 2)) < high:
        low, high = (middle, high) if np.isfinite(np.exp(middle)) else (low, middle)
    return float(low)


print(f"float16: exp is finite up to {largest_x(np.float16):.2f}")
helpers.reveal(prediction, largest_x(np.float32), "in float32")

# %% [markdown]
# ## Does it happen in a real model?
#
# Layer 23, head 2 of SmolLM2-135M on 4096 real tokens. We form all scores, and ask for the largest
# one of each row.

# %%
head = helpers.real_head(helpers.LAYER_23, head=2)
visible = np.tri(4096, dtype=bool)
scores = np.where(visible, head.q @ head.k.T * np.float32(head.scale), -np.inf)
row_max = scores.max(axis=1)

print(f"Largest score of all: {row_max.max():.1f}")
print(f"Rows that overflow in float16: {(row_max > largest_x(np.float16)).sum()} of 4096")
unscaled = row_max / head.scale
print(f"Rows that overflow even in float32 without the factor {head.scale}:", end=" ")
print(f"{(unscaled > largest_x(np.float32)).sum()}, the largest is {unscaled.max():.0f}")

# %% [markdown]
# The same 17 rows twice: `float32` reaches 8 times as far, and the scores are 8 times as large.
# What is special about them? Here are the keys that some of these rows look for.

# %%
for i, j in np.argwhere(scores > largest_x(np.float16))[4:10]:
    print(f"token {i} {head.words[i]!r:12} looks at token {j:3} {head.words[j]!r}")

# %% [markdown]
# The text says "specifies exception handlers and/or cleanup code for a group" a second time, and
# this head looks up which word came *next* the first time. It is very sure of itself, and sure
# means large scores. A row of nan just there would be a pity.
#
# ## The cure costs nothing
#
# Subtract the same number c from all scores of a row. Then every exp shrinks by the same factor
# exp(c), the sum shrinks by it too, and the factor cancels:
#
# exp(s − c) / Σ exp(s − c)  =  exp(s) / Σ exp(s)
#
# So c may be anything. With c = `m`, the row's *maximum*, every exponent is ≤ 0: nothing overflows.
# The largest one is exp(0) = 1, so the sum is at least 1: no division by 0. What underflows is at
# least 10³⁸ times smaller than the largest weight (in `float32`), and is not missed.
#
# From here on: `m` is the row's maximum, `p` = exp(s − m) the weights before they are divided,
# `l` their sum.
#
# ## Your turn
#
# One special case: a row may see nothing at all, all of its scores are −∞. Then `m` is −∞, and
# −∞ − (−∞) is nan. Give such a row zeros: use 0 in place of `m`, and do not divide by 0.


# %%
def softmax(scores):
    """Weights along the last axis, for scores of any size; scores [..., n] -> weights [..., n]."""
    # FILL ME IN (roughly 5 lines)
    m = scores.max(axis=-1, keepdims=True)
    m = np.where(m == -np.inf, 0, m)
    p = np.exp(scores - m)
    l = p.sum(axis=-1, keepdims=True)
    return p / np.where(l == 0, 1, l)
    # END


checks.check_softmax(softmax)

# %% [markdown]
# ## The picture
#
# Tokens 1400–1429 (down) looking at tokens 80–129 (across), where the text repeats itself, in
# `float16`: black is inf, orange is 0 (too small to be held), blue is a number. Left exp(s), right
# exp(s − m).

# %%
rows, columns = slice(1400, 1430), slice(80, 130)
part = scores[rows, columns].astype(np.float16)
m = row_max[rows, None].astype(np.float16)


def kinds(p):
    """0 a number, 1 underflow, 2 overflow."""
    return np.where(p == 0, 1, np.where(np.isinf(p), 2, 0))


without, with_max = kinds(np.exp(part)), kinds(np.exp(part - m))
legend = {
    "a number": PALETTE["computed"],
    "0: too small": PALETTE["skipped"],
    "inf: too large": "#000000",
}
axes = Axis("tokens looked at", 50, columns.start), Axis("tokens that look", 30, rows.start)
images = [
    labelled(pictures.categories(x, list(legend.values()), cell=7), legend, *axes)
    for x in (without, with_max)
]
helpers.show(pictures.side_by_side(images, ["exp(s)", "exp(s - m)"]), "01_softmax_needs_a_max")
helpers.app_link(source=helpers.LAYER_23, head=2, row=1418)
print(f"inf: {(without == 2).sum()} without the maximum, {(with_max == 2).sum()} with it")
print(f"zero: {(without == 1).sum()} without the maximum, {(with_max == 1).sum()} with it")

# %% [markdown]
# The left diagonal is the repeated sentence, the other a similar one ("code around a block of
# code"). On the right both are gone, and there is some orange: weights too small for `float16` to
# hold beside a 1 in the same row. They are computed, and come to nothing. Keep that in mind.
#
# ## Break it
#
# One maximum for the whole array would be cheaper than one for each row. Any constant cancels, does
# it not? Run it, then say which row dies, and of what.


# %%
def one_maximum_for_all(scores):
    """Softmax that subtracts the largest score of the whole array."""
    p = np.exp(scores - scores.max())
    return p / p.sum(axis=-1, keepdims=True)


print("\nBreak it (this one is meant to fail):")
checks.check_softmax(one_maximum_for_all, strict=False)
