# %% [markdown]
# # 0 · Attention on one real sentence
#
# **Question:** What does attention compute, and why does a long text cost so much?
#
# **Before:** Python and NumPy.
# **Time:** 20 minutes. **Needs a GPU:** no.
#
# A language model reads text as *tokens*: words, or pieces of words. For every token, attention
# asks: which earlier tokens matter here? It answers with one weight for each of them, and then
# mixes what those tokens have to say in these proportions.
#
# Below is a real model (SmolLM2-135M, layer 23, head 0) reading the first sentence of a text about
# Python. It has turned each token into three vectors of 64 numbers:
#
# * `q`, the *query*: what this token is looking for;
# * `k`, the *key*: what this token can be found by;
# * `v`, the *value*: what it hands over to those who look at it.

# %%
import time

import numpy as np

from lessons import checks, helpers, pictures

head = helpers.real_head(helpers.LAYER_23, head=0, length=34)
q, k, v, scale, words = head
print("The text:", "".join(words))
print("Its tokens:", words)
print("q, k and v:", q.shape, k.shape, v.shape)

# %% [markdown]
# ## Predict
#
# Later we measure attention over 2048 tokens. The same head over 131 072 tokens ("128K": 64 times
# as many) takes how many times as long? Put your number here; the last cell compares.

# %%
prediction = None  # PREDICT: how many times as long?

# %% [markdown]
# ## What it computes, for one token
#
# The *score* of a key says how well it fits a query: the dot product q·k, times `scale`
# (here 1/√64 = 0.125, so that scores do not grow with the size of the vectors). The *softmax*
# turns scores into weights: exp makes them positive, dividing by the sum makes them add up to 1.
#
# A token may look at itself and at what came before, never ahead: that is *causal* attention.
# So for the last token of our text, the full stop, all 34 keys are visible.

# %%
scores = k @ q[33] * scale  # [34]: one score for each key
p = np.exp(scores)
weights = p / p.sum()  # [34]: they add up to 1
output = weights @ v  # [64]: the mixed values

print(f"Where {words[33]!r} looks:")
for j in np.argsort(weights)[::-1][:5]:
    print(f"  {weights[j]:6.1%}  token {j:2}  {words[j]!r}")

# %% [markdown]
# It looks back at "Comp·ound", with which the sentence began, and at token 0. The first token gets
# weight in nearly every head of nearly every model, whatever it says: a head that finds nothing
# worth looking at looks there. It is called the *attention sink*, and it will matter.
#
# ## Your turn: all tokens at once
#
# `q @ k.T` gives all scores, a row for each token that looks, a column for each looked at. Row `i`
# may see columns 0 … `i`; a score that must not count becomes −∞, because exp(−∞) = 0.
# `np.tri(n, dtype=bool)` is true exactly where row `i` may see column `j`.


# %%
def attention(q, k, v, scale):
    """Causal attention: q [n, d], k [n, d], v [n, dv] -> output [n, dv], weights [n, n]."""
    # FILL ME IN (roughly 4 lines)
    scores = q @ k.T * scale
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    p = np.exp(scores)
    weights = p / p.sum(axis=1, keepdims=True)
    # END
    return weights @ v, weights


checks.check_attention(attention)

# %% [markdown]
# ## The picture
#
# One row for each token that looks; the darker, the more weight. The grey half is the future.

# %%
output, weights = attention(q, k, v, scale)
helpers.show(pictures.weights_by_word(weights, words), "00_attention")
helpers.app_link(source=helpers.LAYER_23, head=0, row=33)

# %% [markdown]
# The link opens the app on the whole text: 4096 tokens, drawn in tiles (lesson 3), with the bars
# of this row below the map.
#
# ## Why a long text costs so much
#
# Twice as many tokens means twice as many rows, each of them twice as long. We measure your
# function at small lengths.

# %%
length, seconds = 0, 0.0
for length in (256, 512, 1024, 2048):
    x = helpers.real_head(helpers.LAYER_23, head=0, length=length)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        attention(x.q, x.k, x.v, x.scale)
        took.append(time.perf_counter() - start)
    seconds = min(took)
    print(f"{length:5} tokens: {length * length:9,} scores, {1000 * seconds:7.1f} ms")

# %% [markdown]
# Now by arithmetic, because nobody wants to wait: scores grow with the *square* of the length.

# %%
times_as_many = 131_072 // length
factor = times_as_many**2
heads = 30 * 9  # this small model has 30 layers of 9 heads; large ones have thousands
print(f"131,072 / {length:,} = {times_as_many} times as many tokens")
print(f"{times_as_many}² = {factor:,} times as many scores: {131_072**2:,} of them for one head")
print(f"{factor:,} × {seconds:.3f} s = {factor * seconds / 60:.1f} minutes for one head")
print(f"× {heads} heads = {factor * seconds * heads / 3600:.0f} hours to read one text once")
helpers.reveal(prediction, factor, "times as long")

# %% [markdown]
# A GPU is thousands of times faster than this, and still spends most of its time here once texts
# are long. Half of the scores are in the future and need not be formed at all (lesson 3). And most
# of the others end as a weight of nearly nothing: leaving *those* out is what this course is about.
#
# ## Break it
#
# Someone forgot the mask, so every token also reads the future. Which rows are still right?
# Look at the first case that fails, and at the worst index: why is the last row never wrong?


# %%
def without_mask(q, k, v, scale):
    """Attention in which every token sees all others."""
    p = np.exp(q @ k.T * scale)
    weights = p / p.sum(axis=1, keepdims=True)
    return weights @ v, weights


print("\nBreak it (this one is meant to fail):")
checks.check_attention(without_mask, strict=False)
