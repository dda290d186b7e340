# %% [markdown]
# # 2 · Online softmax
#
# **Question:** How can a softmax be computed piece by piece, without ever holding a whole row?
#
# **Before:** lesson 1.
# **Time:** 25 minutes. **Needs a GPU:** no.
#
# Softmax needs the row's maximum before its first exp, and the row's sum before its first division:
# it seems that all scores of a row must lie in memory before anything can begin. At 131 072 tokens
# that is 68 GB of scores for one head. But memory close to the processor is small (a GPU has about
# 0.2 MB of it for each of its cores), and distant memory is slow.
#
# The way out, *online softmax*, is the heart of FlashAttention: take the keys in *chunks*, and
# whenever the maximum turns out to be larger than believed, correct what was gathered so far.

# %%
import numpy as np

from lessons import checks, helpers, pictures

head = helpers.real_head(helpers.LAYER_12, head=0)
CHUNK = 128

# %% [markdown]
# ## Predict
#
# Our head has 4096 rows (tokens that look). We walk along each row in chunks of 128 keys, from the
# first key on. In what share of the rows is the row's maximum already found in the *first* chunk?
# Give a percentage. (Chance would say: a long row has 32 chunks.)

# %%
prediction = None  # PREDICT: per cent of the rows

# %% [markdown]
# ## What must come out
#
# One row at a time, with all scores at once: the softmax of lesson 1, then the mixed values.


# %%
def whole_row(scores, values):
    """Attention of one row: scores [n], values [n, d] -> output [d], m, l."""
    m = scores.max()
    p = np.exp(scores - m)
    l = p.sum()
    return p @ values / l, m, l


# %% [markdown]
# ## By hand, with two chunks
#
# Scores 1, 2 | 4, 3. After the first chunk we believe m = 2. The second chunk says 4. Everything
# gathered so far was divided by exp(2) and should have been divided by exp(4): it is too large, by
# a factor that we know. `alpha` = exp(old m − new m) puts it right.

# %%
first, second = np.array([1.0, 2.0]), np.array([4.0, 3.0])
m = first.max()
l = np.exp(first - m).sum()
print(f"after chunk 1: m = {m}, l = {l:.4f}")
alpha = np.exp(m - second.max())
m = second.max()
l = l * alpha + np.exp(second - m).sum()
print(f"after chunk 2: m = {m}, l = {l:.4f}, alpha was {alpha:.4f}")
print(f"all at once:   m = 4.0, l = {np.exp(np.array([1.0, 2, 4, 3]) - 4).sum():.4f}")

# %% [markdown]
# ## Your turn
#
# Three things are carried from chunk to chunk:
#
# * `m`, the largest score so far (−∞ before the first chunk);
# * `l`, the sum of p = exp(s − m) so far;
# * `acc`, the sum of p · value so far. Dividing by `l` waits until the end.
#
# When `m` grows, both `l` and `acc` are multiplied with `alpha`. At the first chunk alpha is
# exp(−∞ − m) = 0: nothing was gathered, nothing is kept. No special case is needed.


# %%
def online_softmax(scores, values, chunk):
    """As `whole_row`, but seeing only `chunk` scores at a time."""
    m, l, acc = -np.inf, 0.0, np.zeros(values.shape[1])
    for start in range(0, len(scores), chunk):
        s = scores[start : start + chunk]
        v = values[start : start + chunk]
        # FILL ME IN (roughly 6 lines)
        m = l = acc = helpers.todo("Fold one chunk (s, v) into m, l and acc.")
        # END
    return acc / l, m, l


checks.check_online_softmax(online_softmax)

# %% [markdown]
# ## On the real row
#
# The last token of the text, 4096 keys in 32 chunks of 128.

# %%
row = 4095
scores = head.k @ head.q[row] * np.float32(head.scale)
whole, _, _ = whole_row(scores, head.v)
online, m, l = online_softmax(scores, head.v, CHUNK)
print(f"token {row} is {head.words[row]!r}: m = {m:.3f}, l = {l:.3f}")
print(f"largest difference between the two outputs: {np.abs(whole - online).max():.1e}")

# %% [markdown]
# ## The picture
#
# Blue bars: the largest score of each chunk. Orange stair: `m`, the largest so far. Where the stair
# is flat, alpha is 1 and nothing is rescaled.

# %%
chunk_max = scores.reshape(-1, CHUNK).max(axis=1)
running_max = np.maximum.accumulate(chunk_max)
names = ("largest score of each chunk", "running maximum m")
helpers.show(pictures.bars_under_line(chunk_max, running_max, names), "02_online_softmax")
helpers.app_link(source=helpers.LAYER_12, head=0, row=row)

# %% [markdown]
# The first chunk, with the attention sink in it, sets the maximum, and the stair never rises again.
# Now all 4096 rows.

# %%
all_scores = np.where(np.tri(4096, dtype=bool), head.q @ head.k.T * np.float32(head.scale), -np.inf)
chunk_max = all_scores.reshape(4096, -1, CHUNK).max(axis=2)  # [rows, chunks]
in_first = chunk_max[:, 0] == chunk_max.max(axis=1)
helpers.reveal(prediction, 100 * in_first.mean(), "per cent of the rows")

below = chunk_max[row, 1:-2].max() - chunk_max[row, 0]
print(f"In row {row} the chunks in the middle lie at least {-below:.1f} below m:", end=" ")
print(f"each of their p is at most exp({below:.1f}) = {np.exp(below):.4f}.")

# %% [markdown]
# Look at that again. After the first chunk we know `m`. For a chunk in the middle we form the
# scores, see that the largest lies 5 or 10 below `m`, and then compute 128 exps and mix 128
# values, to add next to nothing. **Could we not just go on to the next chunk?** That is the skip
# test, lesson 4. First we need tiles (lesson 3), because a GPU never works on one row alone.
#
# ## Break it
#
# Someone rescales `l` and forgets `acc`. The first case passes. Why? And would a test with falling
# scores have caught it?


# %%
def forgets_acc(scores, values, chunk):
    """Online softmax that rescales l but not acc."""
    m, l, acc = -np.inf, 0.0, np.zeros(values.shape[1])
    for start in range(0, len(scores), chunk):
        s = scores[start : start + chunk]
        m_new = max(m, s.max())
        l = l * np.exp(m - m_new) + np.exp(s - m_new).sum()
        acc = acc + np.exp(s - m_new) @ values[start : start + chunk]
        m = m_new
    return acc / l, m, l


print("\nBreak it (this one is meant to fail):")
checks.check_online_softmax(forgets_acc, strict=False)
