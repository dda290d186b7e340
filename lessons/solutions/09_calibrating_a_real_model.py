# %% [markdown]
# # 9 · Calibrating on a real model
#
# **Question:** Which number do you give an engine so that half of the tiles are skipped?
#
# **Before:** lesson 8.
# **Time:** 40 minutes. **Needs a GPU:** no.
#
# Engines take neither a sparsity nor a λ but a `threshold_scale_factor`, and use λ = factor ÷ the
# length of the text. To *calibrate* is to find the factor for a wanted sparsity. With this project
# comes what that needs of a real model, SmolLM2-135M: for some texts at three lengths, and for
# every layer and head, how many tiles have a gap below each of a series of trial thresholds.

# %%
import numpy as np

import sim
import sim.calibration
from lessons import checks, helpers, pictures
from sim.engines import decision, explain, export
from sim.gap_maps import bundled_gap_maps, read_gap_maps
from sim.targets import target

maps = read_gap_maps(bundled_gap_maps())
LENGTHS = sorted({sample.length for sample in maps.samples})
print(f"{maps.card['model']}: {len(maps.layers)} layers of {len(maps.heads)} heads")
print(f"{len({sample.text for sample in maps.samples})} texts at {LENGTHS} tokens")


def points_of(kernel, phase):
    """Sparsity [texts, trials], mean over layers and heads; lengths [texts]; trials λ [trials]."""
    measured = sim.calibration.measure(maps, target(kernel, phase))
    lengths = np.array([sample.length for sample in measured.samples])
    return measured.sparsity.mean(axis=(1, 2)), lengths, measured.thresholds


# %% [markdown]
# *Prefill* reads the prompt, all rows at once; in *decode* one row at a time is added. Each phase
# has its own factor. A gap also depends on who decides: on the tile, the visit order and who
# votes. The maps hold three such *targets*: our kernels, NVIDIA's, and the grid on which NVIDIA's
# Model Optimizer calibrates. (*GQA groups*: query heads that share K and V. A *seeded* maximum:
# before the walk, m starts from the sink and the newest tile. NVIDIA's is that for head_dim 72 to
# 128; for this model's 64 its tiles are 64 × 256, *nvidia-256*, which these maps lack.)

# %%
for phase in ("prefill", "decode"):
    for kernel in ("ours", "nvidia", "model-optimizer"):
        print(f"{phase:8} {kernel:16} {decision(target(kernel, phase))}")

# %% [markdown]
# ## Predict
#
# You calibrate on NVIDIA's decisions for 40 % in prefill, and give that factor to our kernel. How
# much of the same texts does ours skip?

# %%
TARGET = 0.4
prediction = None  # PREDICT: per cent of our visited tiles

# %% [markdown]
# ## Your turn
#
# Model Optimizer's formula is
#
# > factor = a · exp(b · sparsity)
#
# so ln factor is a straight line in sparsity: ln factor = ln a + b · sparsity. Each text and each
# trial λ is one point.
#
# **1.** What is the `factor` of a point? Keep the points from 10 % to 90 % sparsity (`kept` is True
# there; both are [texts, trials]): beyond, the line bends, as nothing is left to skip.
#
# **2.** Put the line through them, by least squares on ln factor. `np.polyfit(x, y, 1)` gives slope
# and intercept.


# %%
def calibrate(sparsity, lengths, lams):
    """Fit factor = a · exp(b · sparsity) to points [texts, trials] -> a, b."""
    # FILL ME IN (roughly 2 lines)
    factor = lengths[:, None] * lams
    kept = (sparsity >= 0.1) & (sparsity <= 0.9)
    # END
    sparsity, factor = sparsity[kept], factor[kept]
    # FILL ME IN (roughly 2 lines)
    b, ln_a = np.polyfit(sparsity, np.log(factor), 1)
    a = np.exp(ln_a)
    # END
    return a, b


checks.check_calibrate(calibrate)

# %% [markdown]
# ## Yours, ours, and Model Optimizer's
#
# Model Optimizer fits by default in *linear* space: least squares on the factor itself. Factors
# span several powers of ten, so the largest decide where that curve goes.

# %%
fits, mine = {}, {}
for phase in ("prefill", "decode"):
    sparsity, lengths, lams = points_of("ours", phase)
    mine[phase] = a, b = calibrate(sparsity, lengths, lams)
    points = sim.calibration.measure(maps, target("ours", phase)).points()
    fits[phase] = {space: points.fit(space=space, draws=0) for space in ("log", "linear")}
    log = fits[phase]["log"]
    print(f"\n{phase}: yours a = {a:.3f}, b = {b:.3f}; sim's {log.a:.3f}, {log.b:.3f}")
    for space, one in fits[phase].items():
        print(f"  {space:6} a = {one.a:8.3f}  b = {one.b:6.3f}  R² = {one.r_squared:.3f}")
    print(f"  asked for  space    factor   skipped at {' / '.join(map(str, LENGTHS))} tokens")
    for wanted in (0.2, 0.35, 0.5):
        for space, one in fits[phase].items():
            factor = one.scale_factor(wanted)
            got = sim.calibration.achieved(maps, target("ours", phase), factor).mean(axis=(1, 2))
            cells = "  ".join(f"{got[lengths == n].mean():6.1%}" for n in LENGTHS)
            print(f"  {wanted:9.0%}  {space:6} {factor:9.2f}   {cells}")

# %% [markdown]
# Three things to see. The two R² are of different spaces and cannot be compared; what is *achieved*
# can: in prefill the linear fit overshoots where a small sparsity was asked for. And whatever the
# fit, one factor skips more of the longer texts. λ ∝ 1 / length is a rule of thumb: on this model
# it is close in decode, and not in prefill. One reason: the first tile of a vote group is never
# skipped, and short texts consist of such tiles to a larger part.

# %%
for n in LENGTHS:
    grid = sim.Grid((64, 128), n, n, causal=True)
    print(f"{n:6} tokens: {grid.groups / grid.visited().sum():.0%} of the tiles are never skipped")

# %% [markdown]
# ## λ at each length, and the trap
#
# A factor has no meaning without a length. Where it exceeds the length, λ is above 1, and tiles
# that hold a row's maximum may be skipped (lesson 4).

# %%
theirs = sim.calibration.calibrate(maps, "nvidia")
setting = export(theirs, "sglang", {"prefill": 0.5})
told = explain(setting, [512, *LENGTHS, 32768, 131072]).phases["prefill"]
print(f"\nNVIDIA's kernel, 50 % in prefill: factor {told.scale_factor:.0f}")
for at in told.at:
    print(f"{at.length:8} tokens: λ = {at.threshold:.4f}{'   λ > 1: a trap' * at.above_one}")

# %% [markdown]
# Where λ would exceed 1, the target is out of reach: such a text is too short for it. And of texts
# far longer than those of the calibration nothing was measured: whether the sparsity stays at such
# a small λ is a guess.
#
# ## On another grid
#
# A factor is made for one kernel. Rows: calibrated on; columns: what it skips there.

# %%
for phase in ("prefill", "decode"):
    table = sim.calibration.miss_table(maps, phase, TARGET)
    print(f"\n{phase}, target {TARGET:.0%}" + "".join(f"{row.kernel:>18}" for row in table))
    for row in table:
        cells = "".join(f"{achieved:18.1%}" for achieved in row.achieved.values())
        print(f"{row.kernel:>{len(phase) + 12}}{cells}")
    if phase == "prefill":
        (answer,) = (row.achieved["ours"] for row in table if row.kernel == "nvidia")
helpers.reveal(prediction, 100 * answer, "per cent")

# %% [markdown]
# (Not even the diagonal is exact: a line through all lengths fits none of them perfectly.)
#
# ## The picture
#
# Prefill on our kernels: a curve for each length, your line, and the linear fit.

# %%
sparsity, lengths, lams = points_of("ours", "prefill")
a, b = mine["prefill"]
linear, s = fits["prefill"]["linear"], np.linspace(0.1, 0.8, 30)
lines = [(f"{n} tokens", 100 * sparsity[lengths == n].mean(axis=0), n * lams) for n in LENGTHS]
lines += [("your fit", 100 * s, a * np.exp(b * s))]
lines += [("linear fit", 100 * s, linear.a * np.exp(linear.b * s))]
titles = "tiles skipped, %", "threshold_scale_factor"
chart = pictures.chart(lines, titles, log_y=True, x_range=(0, 100), y_range=(1, 1e4))
helpers.show(chart, "09_calibrating_a_real_model")
factor = round(fits["prefill"]["log"].scale_factor(TARGET))
helpers.app_link(source=helpers.LAYER_12, head=0, hold="scale factor", factor=factor, length=4096)

# %% [markdown]
# ## Export it
#
# What TensorRT-LLM reads. A calibration made on our decisions is refused: it would promise a
# sparsity that NVIDIA's kernel does not have. `skip-softmax calibrate` does all this for a model of
# yours.

# %%
print(f"\n{export(theirs, 'tensorrt-llm', TARGET)}")
try:
    export(sim.calibration.calibrate(maps, "ours"), "tensorrt-llm", TARGET)
except ValueError as refused:
    print(f"refused: {refused}")

# %% [markdown]
# ## Break it
#
# Someone forgets the length and calibrates λ itself: one λ for all texts. The check asks for a
# factor. And without a check?


# %%
def forget_the_length(sparsity, lengths, lams):
    """Fit λ = a · exp(b · sparsity)."""
    return calibrate(sparsity, np.ones_like(lengths), lams)


print("\nBreak it (this one is meant to fail):")
checks.check_calibrate(forget_the_length, strict=False)
sparsity, lengths, lams = points_of("ours", "decode")
fitted = forget_the_length(sparsity, lengths, lams), calibrate(sparsity, lengths, lams)
lam, factor = (a * np.exp(b * TARGET) for a, b in fitted)
print(f"decode, {TARGET:.0%} asked for      one λ = {lam:.4f}      one factor = {factor:.2f}")
for n in LENGTHS:
    one = sparsity[lengths == n].mean(axis=0)
    cells = np.interp([lam, factor / n], lams, one)
    print(f"skipped at {n} tokens     {cells[0]:14.1%} {cells[1]:18.1%}")
