# %% [markdown]
# # 11 · Why decode is different
#
# **Question:** When a model writes one token at a time, what does a skipped tile save, and what
# takes it away again?
#
# **Before:** lessons 4 and 8.
# **Time:** 40 minutes. **Needs a GPU:** no.
#
# Reading a prompt (*prefill*), 64 queries share each tile of K and V. Writing (*decode*), there is
# one query per head, that of the newest token, and it must be compared with the whole cache: K and
# V of all tokens so far. Three things change: what the time goes into, who votes, and how many
# blocks of threads share one query.

# %%
import math
from dataclasses import replace

import numpy as np

import sim
from lessons import checks, helpers, pictures
from sim.decode import attend_decode, scan_decode
from sim.draw import PALETTE, Axis, labelled

LAM, KEYS, STEPS = 0.01, 64, 16
heads = [helpers.real_head(helpers.LAYER_12, head) for head in range(3)]
k, v, scale = heads[0].k, heads[0].v, heads[0].scale  # the three heads share them
print(f"newest token: {heads[0].words[-1]!r}, its cache: {len(k):,} tokens")

# %% [markdown]
# ## Memory, not arithmetic
#
# A key and its value are 2 · 64 numbers of 2 bytes, so 256 bytes; a query that meets them makes
# 4 · 64 = 256 operations of them. So decode makes as many operations per byte as there are queries.

# %%
flops_per_byte = {"decode, 3 heads": 3, "prefill of the cache, at best": 3 * len(k) // 2}
balance = 989e12 / sim.hardware.GPUS["H200"].bandwidth  # 989 TFLOP/s: the same data sheet
for name, intensity in flops_per_byte.items():
    print(f"{name:30} {intensity:5,} operations a byte; an H200 could make {balance:.0f}")

# %% [markdown]
# Decode waits for memory. Sparing arithmetic is worth nothing; sparing *bytes* is worth all. Of a
# skipped tile K has been read, or there would be no scores; but if V is only asked for after the
# vote, V is spared: at best half of all bytes.
#
# ## The vote
#
# Several query heads share one KV head (here three: *grouped-query attention*). V of a tile is read
# once for all of them, so all must agree to skip it. One veto, and it is read.
#
# ## The splits
#
# One token has a vote group for each KV head: far too few for the 132 multiprocessors of a GPU. So
# the cache is dealt out to *splits*, here tile j to split j mod splits. Each has its own m, l and
# acc, and they are merged at the end. But a split's m starts at −∞: its first tile is never
# skipped, and it may never meet the keys that weigh most, which lie in the first tile (the *sink*)
# and in the newest.
#
# ## Predict
#
# One plain split skips about 70 % of the tiles of this head group at λ = 0.01 (sixteen tokens,
# tiles of 64 keys). How many per cent do sixteen plain splits skip?

# %%
prediction = None  # PREDICT: tiles skipped by 16 splits, in per cent

# %% [markdown]
# ## Your turn
#
# `scores` holds the scores of one token's heads against the cache, tile by tile: [heads, keys].
#
# **1.** *Seeded*, every split starts at the larger of two maxima, one number for each head: those
# of the first tile and of the newest. l stays 0.
#
# **2.** The vote of all heads on tile j. `m` is −∞ where a split has seen nothing.
#
# **3.** Merge: each of `parts` has m, l [heads] and acc [heads, Dv], and each l and acc counts in
# units of its own m. A split that has skipped everything has l = 0, and must weigh nothing.
#
# **4.** How many bytes were read, at 2 bytes a number? `sizes` has the keys of each tile.


# %%
def decode_step(q, k, v, scale, keys, ln_lam, splits, seeded):
    """One token's heads q [heads, D] against k, v [n, …] -> output, skipped [tiles], bytes."""
    first_keys = range(0, len(k), keys)
    scores = [q @ k[first : first + keys].T * scale for first in first_keys]
    tile_max = [s.max(axis=1) for s in scores]
    sizes = np.array([s.shape[1] for s in scores])
    start = np.full(len(q), -np.inf)
    if seeded:
        # FILL ME IN (roughly 1 line)
        start = helpers.todo("Where does every seeded split start?")
        # END
    skipped, parts = np.zeros(len(scores), bool), []
    for split in range(splits):
        m, l, acc = start, np.zeros(len(q)), np.zeros((len(q), v.shape[1]))
        for j in range(split, len(scores), splits):
            # FILL ME IN (roughly 1 line)
            skipped[j] = helpers.todo("Do all heads vote to skip tile j?")
            # END
            if skipped[j]:
                continue
            m_new = np.maximum(m, tile_max[j])
            alpha, p = np.exp(m - m_new), np.exp(scores[j] - m_new[:, None])
            m, l = m_new, l * alpha + p.sum(axis=1)
            acc = acc * alpha[:, None] + p @ v[j * keys : (j + 1) * keys]
        parts.append((m, l, acc))
    # FILL ME IN (roughly 4 lines)
    output = helpers.todo("Merge the splits.")
    # END
    # FILL ME IN (roughly 1 line)
    read = helpers.todo("Count the bytes of K, and of the V that was read.")
    # END
    return output, skipped, read


checks.check_decode(decode_step)

# %% [markdown]
# ## On a real head group
#
# The last sixteen tokens of the text, each against all tokens up to itself: shares are means over
# them, as in the app under "What splits cost". The app's headline is of one token, the newest
# unless you choose another. The speed-up is a model: bytes ÷ bytes. (`python -m sim.decode_time`
# prints how far published kernels are from it.)


# %%
def run(splits, seeded, which=(0, 1, 2)):
    """Skipped tiles of the last token, mean sparsity, and bytes of all steps."""
    shares, read = [], 0
    for n in range(len(k) - STEPS + 1, len(k) + 1):
        q = np.stack([heads[h].q[n - 1] for h in which])
        _, skipped, moved = decode_step(q, k[:n], v[:n], scale, KEYS, math.log(LAM), splits, seeded)
        shares.append(skipped.mean())
        read += moved
    return skipped, np.mean(shares), read


dense = sum(4 * k.shape[1] * n for n in range(len(k) - STEPS + 1, len(k) + 1))
print(f"\nλ = {LAM}   skipped: plain   seeded      bytes ÷ bytes: plain   seeded")
found = {}
for splits in (1, 4, 16, 64):
    found[splits] = [run(splits, seeded) for seeded in (False, True)]
    (_, plain, read), (_, given, fewer) = found[splits]
    print(
        f"{splits:3} splits {plain:14.1%} {given:8.1%} {dense / read:21.2f}× {dense / fewer:7.2f}×"
    )
helpers.reveal(prediction, 100 * found[16][0][1], "per cent of tiles, by 16 plain splits")
plain, given = (skipped.mean() for skipped, *_ in found[16])
print(f"the newest token alone, by 16 splits: {plain:.1%} plain, {given:.1%} seeded")
print("\nthe vote, one seeded split:")
for which in ((0,), (1,), (2,), (0, 1, 2)):
    name = f"head {which[0]} alone" if len(which) == 1 else "all three together"
    print(f"{name:19} {run(1, True, which)[1]:7.1%}")

# %% [markdown]
# Splitting takes nearly all of it away: each split compares its few tiles with one another, and
# none of them stands out. Two maxima give it back, for the price of two tiles of scores in every
# split, because here the largest score of nearly every head lies in the first tile or in the
# newest. And no group skips more than its most demanding head would alone.
#
# ## The picture
#
# The cache of the newest token from left to right, a line for each of 16 splits; left plain, right
# seeded.

# %%
legend = {
    "in another split": PALETTE["masked"],
    "computed: its V is read": PALETTE["computed"],
    "skipped: its V is not read": PALETTE["skipped"],
}
images = []
for skipped, *_ in found[16]:
    j = np.arange(len(skipped))
    lanes = np.zeros((16, len(j)), int)
    lanes[j % 16, j] = 1 + skipped
    axes = Axis(f"{len(j)} key tiles of {KEYS} keys", len(j)), Axis("16 splits", 16)
    image = pictures.categories(lanes, list(legend.values()), cell=7)
    images.append(labelled(image, legend, *axes))
helpers.show(pictures.side_by_side(images, ["plain", "seeded"]), "11_why_decode_is_different")
helpers.app_link(
    "decode", source=helpers.LAYER_12, kv_head=0, splits=16, seeded="false", decode_threshold=LAM
)

# %% [markdown]
# ## Break it
#
# Someone finds the merge complicated: sixteen splits, sixteen outputs, so take their mean. Which
# outputs should have counted more, and what does a split contribute that has skipped everything?


# %%
def averaged(q, k, v, scale, keys, ln_lam, splits, seeded):
    """Merge by the mean of the splits' outputs."""
    how = {"keys": keys, "splits": splits, "seeded": seeded, "softmax_scale": scale}
    tiles = scan_decode(q[None], k[None], [len(k)], **how).decide(math.exp(ln_lam))
    outputs = []
    for split in range(splits):
        others = np.arange(tiles.state.shape[2]) % splits != split
        only = replace(tiles, state=np.where(others, sim.SKIPPED, tiles.state))
        outputs.append(
            attend_decode(q[None], k[None], v[None], only, softmax_scale=scale).output[0]
        )
    read = sim.decode.decode_bytes(tiles, k.shape[1], v.shape[1])
    return np.mean(outputs, axis=0), tiles.skipped[0, 0], read.k + read.v


print("\nBreak it (this one is meant to fail):")
checks.check_decode(averaged, strict=False)
q = np.stack([head.q[-1] for head in heads])
right, wrong = (
    step(q, k, v, scale, KEYS, math.log(LAM), 16, True)[0] for step in (decode_step, averaged)
)
off = np.abs(wrong - right).mean() / np.abs(right).mean()
print(f"on the real heads the output is off by {off:.0%} of its size")
