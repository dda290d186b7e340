# %% [markdown]
# # 3 · Tiles and the causal staircase
#
# **Question:** In which pieces does a GPU compute attention, and which pieces need no work at all?
#
# **Before:** lesson 2.
# **Time:** 25 minutes. **Needs a GPU:** no.
#
# Lesson 2 took one row in chunks of keys. A GPU takes many rows together, because a chunk of keys
# that was fetched from memory should serve many rows, and because its matrix units multiply blocks,
# not rows. So the big table of scores is cut into *tiles*:
#
# * 64 query rows that belong together are a *vote group* (why "vote", lesson 4 says);
# * 128 keys, and their values, are a *key tile*;
# * **tile (i, j)** is the scores of vote group i against key tile j.
#
# This division, here 64 × 128, is called the *decision grid*.

# %%
import time

import numpy as np

import sim
from lessons import checks, helpers
from sim.draw import labelled_tile_map

head = helpers.real_head(helpers.LAYER_12, head=0)
TILE = (64, 128)

# %% [markdown]
# ## Predict
#
# 4096 tokens make 64 vote groups and 32 key tiles: 64 × 32 = 2048 tiles. Causal attention looks
# only back. How many of the 2048 tiles contain at least one score that counts?

# %%
prediction = None  # PREDICT: how many of 2048 tiles

# %% [markdown]
# ## Lesson 2 for many rows
#
# `fold` is the online softmax of lesson 2 for all rows of a group at once: `m` and `l` become
# arrays [rows], `acc` [rows, 64]. New is one line: a row that sees nothing of a tile has s = −∞
# everywhere, and if it has seen nothing before, its m is −∞ as well. As in lesson 1, 0 stands in.


# %%
def fold(s, v, m, l, acc):
    """Fold the scores s [rows, keys] and values v [keys, d] of one tile into m, l and acc."""
    m_new = np.maximum(m, s.max(axis=1))
    reference = np.where(m_new == -np.inf, 0, m_new)
    alpha = np.exp(m - reference)
    p = np.exp(s - reference[:, None])
    return m_new, l * alpha + p.sum(axis=1), acc * alpha[:, None] + p @ v


# %% [markdown]
# ## Your turn
#
# Two gaps, both about *which* rows and keys:
#
# 1. For group i: its query rows, as an array of row numbers (the last group may have fewer); and
#    how many key tiles it must visit. Row r sees keys 0 … r, so the group's *last* row decides.
#    `-(-a // b)` is a ÷ b rounded up.
# 2. For tile j: its keys, as an array of key numbers (the last tile may have fewer); and the scores
#    `s` [rows, keys], with −∞ wherever a key lies in the future of a row. Mask first, fold after.


# %%
def tiled_attention(q, k, v, scale, tile):
    """Causal attention by tiles -> output [n, d], state [groups, key tiles] (1: computed)."""
    (rows, keys), n = tile, len(q)
    output = np.empty((n, v.shape[1]))
    state = np.zeros((-(-n // rows), -(-n // keys)), np.uint8)
    for i in range(state.shape[0]):
        # FILL ME IN (roughly 2 lines)
        group = visited = helpers.todo("Say which rows group i has and how many tiles it visits.")
        # END
        m, l = np.full(len(group), -np.inf), np.zeros(len(group))
        acc = np.zeros((len(group), v.shape[1]))
        for j in range(visited):
            # FILL ME IN (roughly 3 lines)
            columns = s = helpers.todo("Give the keys of tile j and its scores, masked.")
            # END
            m, l, acc = fold(s, v[columns], m, l, acc)
            state[i, j] = sim.COMPUTED
        output[group] = acc / l[:, None]
    return output, state


checks.check_tiled_attention(tiled_attention)

# %% [markdown]
# ## On the real head

# %%
start = time.perf_counter()
output, state = tiled_attention(head.q, head.k, head.v, head.scale, TILE)
print(f"{state.size} tiles, {state.sum()} visited, in {time.perf_counter() - start:.2f} s")
helpers.reveal(prediction, state.sum(), "of 2048 tiles")

scores = np.where(np.tri(4096, dtype=bool), head.q @ head.k.T * head.scale, -np.inf)
p = np.exp(scores - scores.max(axis=1, keepdims=True))
dense = p @ head.v / p.sum(axis=1, keepdims=True)
print(f"largest difference from whole rows: {np.abs(output - dense).max():.1e}")
print(f"scores held at a time: {TILE[0] * TILE[1]:,} instead of {scores.size:,}")

# %% [markdown]
# ## The picture
#
# Vote groups down, key tiles across; a tile is twice as wide as high, so the picture is square.
# Blue is computed. Grey is *masked*: no row of the group sees any key of it, so it is not visited.
# The border is a staircase with steps two groups long, because a tile has twice as many keys as
# rows.

# %%
grid = sim.Grid(TILE, 4096, 4096, causal=True)
tiles = sim.TileMap(state[None], grid, "ascending", np.zeros(1))
helpers.show(labelled_tile_map(tiles, cell=6), "03_tiles")
helpers.app_link(source=helpers.LAYER_12, head=0, threshold=0)

# %% [markdown]
# `sim.Grid` is the same geometry in the simulator, and the app's map is drawn from it. Does it
# agree with you?

# %%
print("visited tiles of each group:", grid.visited().tolist())
same = np.array_equal(state.astype(bool), grid.visited_tiles())
print("the simulator visits the same tiles:", same)

# %% [markdown]
# ## What the stairs cost
#
# A tile on a stair is computed as a whole, though some of its scores are in the future. How many
# scores are formed for nothing, with tiles of different sizes? Larger tiles suit the machine
# better, and fit the triangle worse.

# %%
visible = 4096 * 4097 // 2
print(f"scores that count: {visible:,}")
for tile in [(16, 16), (64, 64), (64, 128), (128, 128), (256, 256)]:
    one = sim.Grid(tile, 4096, 4096, causal=True)
    formed = int(one.visited().sum()) * tile[0] * tile[1]
    unused = 1 - visible / formed
    print(f"tiles of {tile[0]:3} × {tile[1]:3}: {formed:10,} formed, {unused:5.1%} unused")

# %% [markdown]
# So tiles give us three things: little memory, blocks for the matrix units, and the future nearly
# for free. What they also give is a *unit that can be left out*. Half of the square is grey because
# we know beforehand that it does not count. Which of the blue tiles do not count either, and when
# do we know? That is lesson 4.
#
# ## Break it
#
# Someone lets the *first* row of a group decide how many tiles are visited. The cases with tiles of
# 8 × 8 and 8 × 16 pass, the one with 16 × 8 does not. Why? Which rows lose keys? And would our own
# 64 × 128 have shown the fault?


# %%
def first_row_decides(q, k, v, scale, tile):
    """Tiled attention that visits only the tiles which the first row of each group sees."""
    (rows, keys), n = tile, len(q)
    output = np.empty((n, v.shape[1]))
    state = np.zeros((-(-n // rows), -(-n // keys)), np.uint8)
    for i in range(state.shape[0]):
        group = np.arange(i * rows, min((i + 1) * rows, n))
        visited = -(-(group[0] + 1) // keys)
        m, l = np.full(len(group), -np.inf), np.zeros(len(group))
        acc = np.zeros((len(group), v.shape[1]))
        for j in range(visited):
            columns = np.arange(j * keys, min((j + 1) * keys, n))
            s = np.where(columns <= group[:, None], q[group] @ k[columns].T * scale, -np.inf)
            m, l, acc = fold(s, v[columns], m, l, acc)
            state[i, j] = sim.COMPUTED
        output[group] = acc / l[:, None]
    return output, state


print("\nBreak it (this one is meant to fail):")
checks.check_tiled_attention(first_row_decides, strict=False)
