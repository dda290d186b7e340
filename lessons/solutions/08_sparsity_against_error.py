# %% [markdown]
# # 8 · Sparsity against error
#
# **Question:** What does a threshold cost, and when is one order or rule really better?
#
# **Before:** lesson 4.
# **Time:** 35 minutes. **Needs a GPU:** no.
#
# λ is a knob without a unit. What you gain by turning it is *sparsity*, the share of visited tiles
# that are skipped; what you pay is error. One gap map holds both for every λ, and this lesson
# draws the curve. It also shows the commonest mistake in comparing two methods: at equal λ.

# %%
import math

import numpy as np

import sim
from lessons import checks, helpers, pictures
from sim.rules import MassBudget, NormalisedMaximum, decide

LAM = 0.01
head = helpers.real_head(helpers.LAYER_12, head=1)
ascending = sim.scan(head.q[None], head.k[None], order="ascending", mass=True)
ends_first = ascending.replay(order="ends_first")  # the same scores, visited in another order
for one in (ascending, ends_first):
    print(
        f"{one.order:10} at λ = {LAM}: {one.decide(LAM).sparsity[0]:.1%} of visited tiles skipped"
    )

# %% [markdown]
# ## Predict
#
# That looks decided. But a smaller sparsity may also be a smaller error. The *dropped mass* δ of a
# row is the share of its true weights that lay in skipped tiles. Turn the λ of either order until
# the mean δ is 0.5 %. How many percentage points does `ends_first` skip more than `ascending` now?

# %%
BUDGET = 0.005
prediction = None  # PREDICT: percentage points at equal mean δ

# %% [markdown]
# ## The error, exactly
#
# Let y be a row of the true output, ŷ the row with tiles skipped, and ȳ the row that attends only
# to *skipped* tiles. A softmax over everything is a mixture of the softmax over each part, and the
# mixing weights are 1 − δ and δ:
#
# > y = (1 − δ)·ŷ + δ·ȳ,  hence  y − ŷ = δ·(ȳ − ŷ)
#
# No approximation: the error is δ times how differently the skipped words would have voted. So δ is
# what to watch. It needs no v, is at most 1, and bounds the error: ‖y − ŷ‖ ≤ 2 δ max‖v‖.
#
# ## Your turn
#
# `gap` and `visited` are [groups, tiles]: the gap map, and which tiles the causal mask leaves.
# `mass` [rows, tiles] is the true weight of every row in every tile, so a row of it adds up to 1.
# `part` [rows, tiles, size of v] is what each tile adds to y: `part.sum(axis=1)` is y.
#
# **1.** Sparsity is skipped ÷ visited. `left_out` [rows, tiles] says for every *row* what its group
# skips: groups have `vote_rows` rows, the last one may have fewer. `delta` is the δ of each row. A
# tile that is not visited has gap −∞. Is it skipped?
#
# **2.** The error y − ŷ of each row. `lost` is what the skipped tiles add to y; which of the terms
# above is that? What is (1 − δ)·ŷ?


# %%
def cost(gap, visited, vote_rows, mass, part, ln_lam):
    """One threshold -> sparsity, δ [rows] and y − ŷ [rows, size of v]."""
    # FILL ME IN (roughly 4 lines)
    skip = visited & (gap < ln_lam)
    sparsity = skip.sum() / visited.sum()
    left_out = skip.repeat(vote_rows, axis=0)[: len(mass)]
    delta = np.where(left_out, mass, 0).sum(axis=1)
    # END
    lost = np.where(left_out[:, :, None], part, 0).sum(axis=1)
    # FILL ME IN (roughly 2 lines)
    after = (part.sum(axis=1) - lost) / (1 - delta)[:, None]  # ŷ
    error = lost - delta[:, None] * after
    # END
    return sparsity, delta, error


checks.check_cost(cost)

# %% [markdown]
# ## The curve of a real head
#
# A row of `part` is formed from the scores, tile by tile, with the true denominator: the one place
# where scores are needed again. Everything else comes from the gap map.


# %%
def parts(head, grid, lse):
    """Form what each tile adds to the output of each row, [rows, tiles, size of v]."""
    part = np.zeros((grid.lq, grid.key_tiles, head.v.shape[1]), np.float32)
    rows = np.arange(grid.lq)[:, None]
    for j in range(grid.key_tiles):
        keys = np.arange(grid.lk)[grid.tile_keys(j)]
        p = np.exp(head.q @ head.k[keys].T * head.scale - lse[:, None])
        part[:, j] = np.where(keys <= rows, p, 0) @ head.v[keys]
    return part


part = parts(head, ascending.grid, ascending.lse[0])
size = np.linalg.norm(part.sum(axis=1), axis=1)  # of y, row by row
visited = ascending.grid.visited_tiles()
lams = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
table = {}
for one in (ascending, ends_first):
    rows = [cost(one.gap[0], visited, 64, one.mass[0], part, math.log(lam)) for lam in lams]
    off = [(np.linalg.norm(error, axis=1) / size).mean() for _, _, error in rows]
    table[one.order] = np.array(
        [(s, delta.mean(), delta.max(), x) for (s, delta, _), x in zip(rows, off, strict=True)]
    )
print("               ascending                             ends_first")
print("     λ   skipped  mean δ   worst δ  error     skipped  mean δ   worst δ  error")
for n, lam in enumerate(lams):
    cells = ["{:7.1%} {:7.2%} {:8.1%} {:7.2%}".format(*of[n]) for of in table.values()]
    print(f"{lam:6}  {'      '.join(cells)}")
kept = sim.attend(head.q[None], head.k[None], head.v[None], ends_first.decide(lams[-1]))
direct = part.sum(axis=1) - kept.output[0]
print(f"y − ŷ, computed directly: at most {np.abs(direct - rows[-1][2]).max():.1g} from yours")

# %% [markdown]
# *Error* is ‖y − ŷ‖ ÷ ‖y‖, mean over rows. It follows mean δ; the worst row is another matter, and
# a mean over thousands of rows hides it.
#
# ## At equal error
#
# `Scan.curve()` has the same for every step of λ. Now read sparsity where the *cost* is equal. Two
# other rules may compete. One compares with the running sum: exp(tile_max − m) < λ·l. The *mass
# budget* carries along u, a bound on the weight left out, and skips only while u ≤ ε·l: it promises
# every row, beforehand, δ ≤ ε ÷ (1 + ε). (Lesson 10 is about u.)


# %%
def walked(rule, settings):
    """Sparsity, mean δ and worst δ of a rule whose skips change what it sees: one run for each."""
    maps = [decide(ends_first, rule(x)) for x in settings]
    lost = [sim.accuracy.dropped_mass(ends_first.mass, tiles) for tiles in maps]
    sparsity = [tiles.sparsity[0] for tiles in maps]
    return np.array([sparsity, [x.mean() for x in lost], [x.max() for x in lost]])


def skipped_at(costs, sparsity, budget):
    """Read sparsity off a curve where its cost is the budget (on a logarithmic scale of cost)."""
    some = costs > 0
    return float(np.interp(np.log(budget), np.log(costs[some]), sparsity[some]))


curves = {
    "maximum, ascending": ascending.curve(),
    "maximum, ends_first": ends_first.curve(),
}
curves = {
    name: np.array([x.sparsity, x.mean_dropped_mass, x.worst_dropped_mass])
    for name, x in curves.items()
}
curves["running sum, ends_first"] = walked(NormalisedMaximum, np.geomspace(1e-4, 0.05, 12))
curves["mass budget, ends_first"] = walked(MassBudget, np.geomspace(0.01, 10, 12))
WORST = 0.1
equal = {}
print(f"\nskipped where                mean δ = {BUDGET:.1%}   worst δ = {WORST:.0%}")
for name, (sparsity, mean, worst) in curves.items():
    equal[name] = skipped_at(mean, sparsity, BUDGET), skipped_at(worst, sparsity, WORST)
    print(f"{name:26} {equal[name][0]:12.1%} {equal[name][1]:16.1%}")
gain = equal["maximum, ends_first"][0] - equal["maximum, ascending"][0]
helpers.reveal(prediction, 100 * gain, "percentage points")

# %% [markdown]
# Most of what `ends_first` gains at equal λ is a bolder λ, not a better choice. What is left at
# equal error is real, and costs nothing. The mass budget skips least, since it must assume the
# worst of every tile; but it is the only one that promised anything beforehand.
#
# ## The picture
#
# Up is good, left is good. At equal cost means: on one vertical line.

# %%
names = list(curves)
chart = pictures.chart(
    [(name, 100 * curves[name][1], 100 * curves[name][0]) for name in names],
    ("mean dropped mass, %", "tiles skipped, %"),
    log_x=True,
    x_range=(0.01, 10),
)
helpers.show(chart, "08_sparsity_against_error")
helpers.app_link(source=helpers.LAYER_12, head=1, compare="true", threshold=LAM)

# %% [markdown]
# The app's page *Rules* finds such settings for any head of yours.
#
# ## Break it
#
# Someone counts a tile that the mask hides as skipped, and divides by all tiles. Half of a causal
# map is hidden, so the figures are splendid. Papers differ in this: ask what a "sparsity" is a
# share of, and what it is at λ ≈ 0.


# %%
def cost_of_everything(gap, visited, vote_rows, mass, part, ln_lam):
    """Take the future for skipped."""
    skip = gap < ln_lam
    left_out = skip.repeat(vote_rows, axis=0)[: len(mass)]
    delta = (mass * left_out).sum(axis=1)
    lost = (part * left_out[:, :, None]).sum(axis=1)
    y = part.sum(axis=1)
    return skip.mean(), delta, lost - delta[:, None] * (y - lost) / (1 - delta)[:, None]


print("\nBreak it (this one is meant to fail):")
checks.check_cost(cost_of_everything, strict=False)
splendid, _, _ = cost_of_everything(ascending.gap[0], visited, 64, ascending.mass[0], part, -30)
print(f"on the real head, at λ = 1e-13: {splendid:.0%} “skipped”")
