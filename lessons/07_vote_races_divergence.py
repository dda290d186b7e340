# %% [markdown]
# # 7 · The vote, races and divergence
#
# **Question:** What goes wrong when threads depend on each other, and how does a whole block skip?
#
# **Before:** lessons 4 and 5.
# **Time:** 35 minutes. **Needs a GPU:** no.
#
# In lesson 5 each thread minded its own row. Now 64 threads, two warps, share memory and decide
# together. Three things are needed, and a GPU says nothing when one of them is wrong:
#
# * **No races.** What one thread writes, another may read only after a *barrier* between them.
# * **A vote.** A tile is skipped by all rows of a vote group or by none.
# * **No divergence where it hurts.** Barriers, votes and exchanges between the lanes of a warp
#   (*collectives*) wait for all who take part. So all must come, rows that do not exist included.
#
# The emulator of this project does say something: it runs every thread on its own, and reports what
# no GPU promises to do right. First we let it.

# %%
import math

import numpy as np

import sim
from cuda_kernels.emulator import EmulationError, emulate
from cuda_kernels.ptx.language import bar_red_and, cuda, f32, fmax, shfl_bfly_f32
from lessons import checks, helpers, pictures
from sim.draw import PALETTE, Axis, labelled

THREADS, KEYS = 64, 16  # one thread for each row of a vote group; keys in a tile


def report(kernel):
    """Run a kernel on 64 numbers and print what the emulator says."""
    try:
        emulate(kernel, 1, THREADS, np.arange(THREADS, dtype=np.float32))
        print(f"{kernel.__name__}: nothing to report")
    except EmulationError as error:
        print(f"{kernel.__name__}: {error}\n")


def race(x):
    """Reverse 64 numbers through shared memory; nobody waits."""
    memory = cuda.shared.array(THREADS, f32)
    t = cuda.threadIdx.x
    memory[t] = x[t]
    x[t] = memory[THREADS - 1 - t]


def half_a_warp(x):
    """Take the maximum of neighbours; of warp 1 only 8 lanes come."""
    t = cuda.threadIdx.x
    if t < 40:
        x[t] = fmax(x[t], shfl_bfly_f32(x[t], 1))


def gone_early(x):
    """Do all 64 agree? But some have left."""
    t = cuda.threadIdx.x
    if t < 40:
        x[t] = bar_red_and(1, THREADS, x[t] >= 0)


for kernel in (race, half_a_warp, gone_early):
    report(kernel)

# %% [markdown]
# Read each report: which threads, where they wait, which line.
#
# ## Predict
#
# The last 60 of 320 words are a vote group; tiles of 16 keys, λ = 0.1. How many of the 20 tiles
# does the group skip?

# %%
prediction = None  # PREDICT: how many of 20 tiles are skipped

# %% [markdown]
# ## Your turn
#
# `vote_group` decides which tiles a group of up to 64 rows skips. Row r is thread r's; rows from
# `rows` on do not exist, their scores are −inf.
#
# **1. No race.** A tile of scores comes in through shared memory, neighbouring threads fetching
# neighbouring scores: fast, but most of row r is fetched by other threads. What must happen before
# row r is read?
#
# **2. The vote.** `bar_red_and(1, THREADS, mine)` is a barrier (number 1) for 64 threads that gives
# 1 to all if nobody's `mine` is 0, and 0 to all otherwise. A row votes to skip if its gap,
# `tile_max - m`, lies below `ln_lam`. What does a row vote that does not exist? (Its gap is
# −inf − −inf, nan, and nan is below nothing.)
#
# The vote is the second barrier that a loop over one buffer needs: nobody fetches the next tile
# before all have read this one.
#
# **3. All lanes.** Each warp finds the largest m of its 32 rows: five times, `top` becomes the
# maximum of one's own and that of the lane whose number differs in bit i:
# `shfl_bfly_f32(top, 1 << i)`. `fmax` takes the maximum. Rows that do not exist have m = −inf,
# which disturbs no maximum.


# %%
def vote_group(scores, ln_lam, skip, top_of_warp):
    """One block: scores [rows, tiles · KEYS]; writes skip [tiles] and top_of_warp [2]."""
    memory = cuda.shared.array((THREADS, KEYS), f32)
    t, rows = cuda.threadIdx.x, scores.shape[0]
    m = f32(-math.inf)
    for j in range(scores.shape[1] // KEYS):
        for i in range(KEYS):
            row, key = (i * THREADS + t) // KEYS, t % KEYS
            memory[row, key] = scores[row, j * KEYS + key] if row < rows else -math.inf
        # FILL ME IN (roughly 1 line)
        helpers.todo("Wait until row t is complete.")
        # END
        tile_max = memory[t, 0]
        for key in range(1, KEYS):
            tile_max = fmax(tile_max, memory[t, key])
        # FILL ME IN (roughly 2 lines)
        all_skip = helpers.todo("Vote: skip if all rows that exist would.")
        # END
        if not all_skip:
            m = fmax(m, tile_max)
        if t == 0:
            skip[j] = all_skip
    # FILL ME IN (roughly 3 lines)
    top = helpers.todo("Find the largest m of the 32 lanes of this warp.")
    # END
    if t % 32 == 0:
        top_of_warp[t // 32] = top


def decide(scores, ln_lam, kernel=vote_group):
    """Run one vote group on the emulator: which tiles are skipped, the largest m of each warp."""
    skip = np.full(scores.shape[1] // KEYS, 255, np.uint8)
    top_of_warp = np.full(2, np.nan, np.float32)
    emulate(kernel, 1, THREADS, scores.astype(np.float32), float(ln_lam), skip, top_of_warp)
    return skip, top_of_warp


checks.check_vote(decide)

# %% [markdown]
# ## A real head
#
# The scores of the last 60 words, as lesson 0 has them; −inf above the diagonal.

# %%
LAM = 0.1
head = helpers.real_head(helpers.LAYER_12, head=0, length=320)
q = head.q[-60:]
hidden = np.arange(320) > np.arange(260, 320)[:, None]
scores = np.where(hidden, -np.inf, q @ head.k.T * head.scale)
skip, top_of_warp = decide(scores, math.log(LAM))
helpers.reveal(prediction, int(skip.sum()), "tiles of 20")

scan = sim.scan(q[None], head.k[None], tile=(THREADS, KEYS), order="ascending")
tiles = scan.decide(LAM)
same = (tiles.state[0, 0] == sim.SKIPPED) == skip.astype(bool)
print(f"tiles unlike the simulator's: {(~same).sum()}")

# %% [markdown]
# ## The picture
#
# Left, a line for each row: the tiles that it votes to skip. Right: what all agree on. One row that
# says no is enough; that is why small vote groups skip more than large ones. (The app shows 512
# tokens of this head, in tiles of 64 × 128.)

# %%
votes = np.zeros((60, 20), int)
m = np.full(60, -np.inf)
for j in range(20):
    tile_max = scores[:, j * KEYS : (j + 1) * KEYS].max(axis=1)
    votes[:, j] = tile_max - m < math.log(LAM)
    m = m if skip[j] else np.maximum(m, tile_max)
agreed = np.broadcast_to(skip.astype(int), (60, 20))
legend = {"computes it": PALETTE["computed"], "skips it": PALETTE["skipped"]}
axes = Axis("20 key tiles", 20), Axis("60 rows", 60)
images = [
    labelled(pictures.categories(one, list(legend.values()), cell=9), legend, *axes)
    for one in (votes, agreed)
]
helpers.show(pictures.side_by_side(images, ["votes", "all together"]), "07_vote_races_divergence")
print(f"rows vote to skip {votes.mean():.0%} of their work; together they skip {skip.mean():.0%}")
helpers.app_link(source=helpers.LAYER_12, head=0, length=512, threshold=LAM)

# %% [markdown]
# ## Break it
#
# Someone saves the vote: each row decides for itself, and who skips does not wait either. The
# branch is taken by a part of the block, and there is a barrier in it. On a GPU this hangs, or
# worse, does not.


# %%
def without_vote(scores, ln_lam, skip, top_of_warp):
    """Let each thread decide for itself."""
    t, rows = cuda.threadIdx.x, scores.shape[0]
    m = f32(-math.inf)
    for j in range(scores.shape[1] // KEYS):
        tile_max = f32(-math.inf)
        for key in range(KEYS):
            if t < rows:
                tile_max = fmax(tile_max, scores[t, j * KEYS + key])
        i_skip = t >= rows or tile_max - m < ln_lam
        if not i_skip:
            cuda.syncthreads()  # before V is read, say
            m = fmax(m, tile_max)
        if t == 0:
            skip[j] = i_skip
    for i in range(5):
        m = fmax(m, shfl_bfly_f32(m, 1 << i))
    if t % 32 == 0:
        top_of_warp[t // 32] = m


def each_for_itself(scores, ln_lam):
    """Run it."""
    return decide(scores, ln_lam, without_vote)


print("\nBreak it (this one is meant to fail):")
checks.check_vote(each_for_itself, strict=False)
