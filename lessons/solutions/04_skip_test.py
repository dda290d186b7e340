# %% [markdown]
# # 4 · The skip test
#
# **Question:** When may a tile be left out, and what does that cost?
#
# **Before:** lesson 3.
# **Time:** 35 minutes. **Needs a GPU:** no.
#
# In lesson 2 most chunks lay far below the running maximum, and their weights came to next to
# nothing. *Skip Softmax* (the BLASST paper; shipped in NVIDIA's TensorRT-LLM) leaves such a tile
# out in the middle of the loop. Its scores have been formed, that cannot be avoided; but its
# exponentials, and the product with its values, are not computed. Nothing is trained anew.

# %%
import numpy as np

import sim
from lessons import checks, helpers, pictures
from sim.draw import labelled_tile_map
from sim.geometry import visit_order

head = helpers.real_head(helpers.LAYER_12, head=0)
TILE = (64, 128)

# %% [markdown]
# ## The rule
#
# For one tile, `tile_max[r]` is the largest score of row r in it, and `m[r]` the running maximum
# from *before* this tile. Their difference is the row's gap. The **gap of the tile** is the largest
# over its rows. With a threshold λ (lambda) between 0 and 1:
#
# > skip the tile iff its gap < ln λ
#
# In words: every weight p in this tile would be less than λ, measured against the largest so far.
#
# * It is a *vote*: the largest gap counts, so a single row that needs the tile keeps it for all 64.
# * Before the first tile m is −∞ and the gap +∞: **the first visited tile is never skipped.**
# * On a skip nothing changes: neither m, nor l, nor acc. The tile is missing above and below the
#   fraction bar, so the other weights still add up to 1.
# * For λ ≤ 1 a skipped tile lies below m, so m comes out the same as without skipping.
#
# λ = 0.01 means ln λ = −4.6. **A larger λ skips more.**
#
# ## Predict
#
# Our head, 4096 tokens, λ = 0.01, tiles visited from the first to the last: what percentage of the
# 1056 visited tiles is skipped?

# %%
prediction = None  # PREDICT: per cent of the visited tiles

# %% [markdown]
# ## Your turn
#
# The loop is that of lesson 3, its geometry taken from `sim.Grid`. Fill in the test: `gap[i, j]`
# and `skip`. One trap: a row that sees nothing of this tile has tile_max −∞. It has no objection to
# skipping, so its gap is −∞ (and not nan, if its m is −∞ too).


# %%
def fold(s, v, m, l, acc):
    """Fold the scores and values of one tile into m, l and acc, as in lesson 3."""
    m_new = np.maximum(m, s.max(axis=1))
    reference = np.where(m_new == -np.inf, 0, m_new)
    alpha = np.exp(m - reference)
    p = np.exp(s - reference[:, None])
    return m_new, l * alpha + p.sum(axis=1), acc * alpha[:, None] + p @ v


def skip_attention(q, k, v, scale, tile, order, ln_lam):
    """Causal attention that skips tiles -> output, state and gap [groups, key tiles]."""
    grid = sim.Grid(tile, len(q), len(q), causal=True)
    output = np.empty((len(q), v.shape[1]))
    state = np.full((grid.groups, grid.key_tiles), sim.MASKED, np.uint8)
    gap = np.full(state.shape, -np.inf)
    for i, visited in enumerate(grid.visited().tolist()):
        rows = np.arange(len(q))[grid.group_rows(i)]
        m, l, acc = np.full(len(rows), -np.inf), np.zeros(len(rows)), np.zeros_like(output[rows])
        for j in visit_order(order, visited):
            keys = np.arange(len(k))[grid.tile_keys(j)]
            s = np.where(keys <= rows[:, None], q[rows] @ k[keys].T * scale, -np.inf)
            # FILL ME IN (roughly 4 lines)
            tile_max = s.max(axis=1)
            row_gap = np.where(tile_max == -np.inf, -np.inf, tile_max - m)
            gap[i, j] = row_gap.max()
            skip = gap[i, j] < ln_lam
            # END
            if skip:
                state[i, j] = sim.SKIPPED
            else:
                state[i, j] = sim.COMPUTED
                m, l, acc = fold(s, v[keys], m, l, acc)
        output[rows] = acc / l[:, None]
    return output, state, gap


checks.check_skip(skip_attention)

# %% [markdown]
# ## On the real head, in two orders
#
# Nothing says that tiles must be visited from first to last (`ascending`, NVIDIA's order). A tile
# is skipped if the maximum is found *before* it, so start where maxima are: with the last tile (the
# diagonal, the nearest words), then tile 0 (the attention sink), then back from there. This order
# is called `ends_first`.

# %%
LAM = 0.01
skipped, images = {}, []
for order in ("ascending", "ends_first"):
    output, state, gap = skip_attention(*head[:4], TILE, order, np.log(LAM))
    tiles = sim.TileMap(state[None], sim.Grid(TILE, 4096, 4096, True), order, np.array([LAM]))
    simulated = sim.scan(head.q[None], head.k[None], order=order).decide(LAM)
    differ = (simulated.state[0] != state).sum()
    skipped[order] = 100 * tiles.sparsity[0]  # sparsity: skipped ÷ visited
    images.append(labelled_tile_map(tiles, cell=6))
    print(f"{order:10}: {skipped[order]:.1f} % of visited tiles skipped; {differ} unlike sim's")
helpers.reveal(prediction, skipped["ascending"], "per cent")

# %% [markdown]
# ## The picture
#
# Orange is skipped, blue computed, grey the future.

# %%
helpers.show(pictures.side_by_side(images, list(skipped)), "04_skip_test")
helpers.app_link(source=helpers.LAYER_12, head=0, compare="true", threshold=LAM)

# %% [markdown]
# ## What it costs
#
# The gaps do not depend on λ, so one pass tells what *every* λ would skip. That is what the
# simulator does, and why the app's slider answers at once. The *dropped mass* of a row is the share
# of its true weights that lay in skipped tiles: what it should have looked at and did not.

# %%
scan = sim.scan(head.q[None], head.k[None], order="ascending", mass=True)
lams = [0.001, 0.01, 0.05, 0.1, 0.5]
print("               ascending                       ends_first")
print("     λ   skipped    mean    worst row     skipped    mean    worst row")
for lam in lams:
    cells = []
    for one in (scan, scan.replay(order="ends_first")):
        at = one.curve().at([lam])
        cells.append(
            f"{at.sparsity[0]:7.1%} {at.mean_dropped_mass[0]:7.2%} {at.worst_dropped_mass[0]:9.1%}"
        )
    print(f"{lam:6}  {'       '.join(cells)}")

# %% [markdown]
# `ends_first` skips more at the same λ, and loses a little more: part of its gain is a bolder
# choice, part is real. And mind the worst row: the mean hides it.
#
# ## A trap: λ = factor / length
#
# Engines do not take λ but a `threshold_scale_factor`: λ = factor ÷ length of the text, because
# more keys can hide more weight. A factor of 1000 is modest for 128K tokens: λ = 0.008. But
# the same server also gets short prompts. (Another head of this layer, in NVIDIA's order.)

# %%
other = helpers.real_head(helpers.LAYER_12, head=2)
FACTOR = 1000
print(f"131072 tokens: λ = {FACTOR / 131072:.3f}")
for length in (4096, 2048, 1024, 512):
    one = sim.scan(other.q[None, :length], other.k[None, :length], order="ascending", mass=True)
    tiles = one.decide(threshold_scale_factor=FACTOR, short_context="allow")
    kept_max = np.where(tiles.skipped.repeat(64, axis=1), -np.inf, one.row_max).max(axis=2)
    lost = (kept_max < one.row_max.max(axis=2)).sum()
    dropped = sim.accuracy.dropped_mass(one.mass, tiles)
    print(
        f"{length:6} tokens: λ = {FACTOR / length:.3f}, {tiles.sparsity[0]:.0%} skipped, mean "
        f"dropped mass {dropped.mean():.0%}, {lost} rows lost their own largest score"
    )
safe = one.decide(threshold_scale_factor=FACTOR)
print(f"   512 tokens, by default of this project: {safe.sparsity[0]:.0%} skipped")

# %% [markdown]
# A λ near 1 costs this head a quarter of its attention: a factor chosen for 128K tokens is not
# meant for these lengths. But up to λ = 1 at least no row can lose its largest score. Above, "far
# below the maximum" has turned into "not far enough *above* it": tiles that hold the maximum are
# skipped, and answers go wrong. It has happened (vLLM issue 39297). Here such a request is computed
# densely unless you ask otherwise (`short_context="allow"`).
#
# ## Break it
#
# Someone lets a tile be skipped if *one* row agrees, where all must. It skips much more, and that
# looks splendid in a table of speeds. The check complains about a gap, not about a skip: what must
# have happened to m before? And the worst row?


# %%
def one_row_suffices(q, k, v, scale, tile, order, ln_lam):
    """Skip attention in which the most willing row decides, not the least willing."""
    grid = sim.Grid(tile, len(q), len(q), causal=True)
    output = np.empty((len(q), v.shape[1]))
    state = np.full((grid.groups, grid.key_tiles), sim.MASKED, np.uint8)
    gap = np.full(state.shape, -np.inf)
    for i, visited in enumerate(grid.visited().tolist()):
        rows = np.arange(len(q))[grid.group_rows(i)]
        m, l, acc = np.full(len(rows), -np.inf), np.zeros(len(rows)), np.zeros_like(output[rows])
        for j in visit_order(order, visited):
            keys = np.arange(len(k))[grid.tile_keys(j)]
            s = np.where(keys <= rows[:, None], q[rows] @ k[keys].T * scale, -np.inf)
            gap[i, j] = (s.max(axis=1) - m).max()
            skip = (s.max(axis=1) - m).min() < ln_lam
            state[i, j] = sim.SKIPPED if skip else sim.COMPUTED
            if not skip:
                m, l, acc = fold(s, v[keys], m, l, acc)
        output[rows] = acc / l[:, None]
    return output, state, gap


print("\nBreak it (this one is meant to fail):")
checks.check_skip(one_row_suffices, strict=False)
damaged, state, _ = one_row_suffices(*head[:4], TILE, "ends_first", np.log(LAM))
tiles = sim.TileMap(state[None], sim.Grid(TILE, 4096, 4096, True), "ends_first", np.array([LAM]))
lost = sim.accuracy.dropped_mass(scan.mass, tiles)
print(f"on the real head: {tiles.sparsity[0]:.1%} skipped, worst row lost {lost.max():.0%}")
