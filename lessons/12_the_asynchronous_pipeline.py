# %% [markdown]
# # 12 · The asynchronous pipeline
#
# **Question:** How do copies, products and exponentials run at once, and what may a skip not skip?
#
# **Before:** lessons 6 and 7.
# **Time:** 45 minutes. **Needs a GPU:** no.
#
# On Hopper nobody waits unless told to. One thread asks the *TMA* unit for a whole tile and goes
# on. Four warps, a *warpgroup*, ask the tensor cores for a product (`wgmma`), straight from shared
# memory, and go on. So what is there already, and what may be overwritten?
#
# * An **mbarrier** counts in *phases*. A phase ends when so many threads have arrived and so many
#   bytes have come. Phases 0, 1, 2, … have *parity* 0, 1, 0, …: one bit, all that a wait names.
# * A **ring**: tile j goes to stage j % 2, so tiles 0, 2, 4, … of a stage are its phases 0, 1, 2.
#   Barrier *full* says "the bytes are here", to who multiplies; *empty* "done with", to who copies.
# * **wgmma_wait** says that a product is done: its result is there, its operands are free.
#
# The emulator runs all this twice: with everything as late as it may be, and as early.

# %%
import math

import numpy as np

import sim
from cuda_kernels.emulator import EmulationError, emulate
from cuda_kernels.fragments import exp2_rows, pack_rows, quad_max, quad_sum, row_max, scale_rows
from cuda_kernels.prefill_wgmma import begin_pv, begin_qk
from cuda_kernels.ptx.language import (
    F16,
    TensorMap,
    bar_red_and,
    cuda,
    ex2,
    f32,
    fence_mbarrier_init,
    fmax,
    k_major,
    mark_tile,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    shared_address,
    tma_load_2d,
    u8,
    u32,
    u64,
    wgmma_wait,
)
from lessons import checks, helpers, pictures

KEYS, BYTES = 128, 128 * 64 * 2  # keys of a tile; bytes of a tile of Q, K or V: 64 float16 a row
STAGES, THREADS = 2, 320  # two groups of 128 threads and 64 rows; a warp for K; a warp for V

# %% [markdown]
# ## Predict
#
# Two groups share the tensor cores and all copies. For each tile, a group does Q·K, waits, takes
# exponentials, does P·V, waits. For how much of the time in which either takes exponentials do
# the tensor cores multiply as well, for the other one? (Nobody sees to it that they alternate.)

# %%
prediction = None  # PREDICT: per cent of the time of exponentials in which products run

# %% [markdown]
# ## Your turn
#
# Thread 256 copies Q: a ring of one stage, used once. It arrives at `q_full`, saying how many bytes
# will come, and begins the copy; who needs Q waits for phase 0. Now with a ring:
#
# **1. Copy.** `full` and `empty` are the addresses of stage 0's barriers; a barrier has 8 bytes.
# First wait until the stage is empty. Tile j needs the phase *before* phase j // STAGES of `empty`,
# and the one before phase 0, of parity 1, counts as ended. Then as with Q; row and column are last.
#
# **2. Skip.** No exponentials, no P·V; but V is on its way. One thread of the group waits for it,
# then says: empty. No other waits: it might look too late, when the stage is full again.
#
# **3. Multiply.** `begin_qk` (it is the real kernel's) returns at once. Wait for the product with
# `wgmma_wait(0, s, KEYS)`. Then one thread of the group says that K's stage is empty.


# %%
def copy_tiles(source, ring, full, empty, tiles):
    """One thread: bring tile after tile of K, or of V, to the stages of a ring."""
    for j in range(tiles):
        mark_tile(j)
        stage, parity = j % STAGES, j // STAGES % 2
        # FILL ME IN (roughly 3 lines)
        helpers.todo("Wait for the stage, announce the bytes, begin the copy.")
        # END


def leave_out(full, empty, parity):
    """All threads of a group: do without a tile. The barriers are those of its V's stage."""
    # FILL ME IN (roughly 3 lines)
    helpers.todo("Wait for V, then let its stage go.")
    # END


def make_kernel(leave_out=leave_out):
    """Build attention of 128 rows; how a tile is left out can be exchanged."""

    def attention(q, k, v, out, skip, scale, log_lam):
        t, tiles = cuda.threadIdx.x, skip.shape[1]
        q_tile = shared_address(cuda.shared.array(0, u8, alignment=1024), 0)
        k_ring, v_ring = q_tile + BYTES, q_tile + BYTES * (1 + STAGES)
        q_full = shared_address(cuda.shared.array(1 + 4 * STAGES, u64, alignment=8), 0)
        k_full, v_full, k_empty, v_empty = (q_full + 8 + 16 * i for i in range(4))
        if t == 0:
            for i in range(1 + 4 * STAGES):  # at empty, a thread of each group arrives
                mbarrier_init(q_full + 8 * i, 2 if i > 2 * STAGES else 1)
            fence_mbarrier_init()
        cuda.syncthreads()
        if t == 256:
            mbarrier_arrive_expect_tx(q_full, BYTES)
            tma_load_2d(q_tile, q, q_full, 0, 0)
            copy_tiles(k, k_ring, k_full, k_empty, tiles)
        if t == 288:
            copy_tiles(v, v_ring, v_full, v_empty, tiles)
        if t >= 256:
            return

        group, leads, row = t // 128, t % 128 == 0, t // 32 * 16 + t % 32 // 4  # and row + 8
        my_q = k_major(q_tile + BYTES // 2 * group)
        s, acc = cuda.local.array((16, 4), f32), cuda.local.array((8, 4), f32)
        p = cuda.local.array((8, 4), u32)
        for i in range(32):
            acc[i // 4, i % 4] = f32(0)
        m, m_8, l, l_8 = f32(-math.inf), f32(-math.inf), f32(0), f32(0)
        mbarrier_wait(q_full, 0)
        for j in range(tiles):
            mark_tile(j)
            stage, parity = j % STAGES, j // STAGES % 2
            mbarrier_wait(k_full + 8 * stage, parity)
            begin_qk(s, my_q, k_major(k_ring + BYTES * stage), 4, F16)
            # FILL ME IN (roughly 3 lines)
            helpers.todo("Wait for the product, then let the stage of K go.")
            # END
            top, top_8 = row_max(s, 16)  # of this thread's columns: so is its vote
            mine = fmax(top * scale - m, top_8 * scale - m_8) < log_lam
            if bar_red_and(1 + group, 128, mine):
                leave_out(v_full + 8 * stage, v_empty + 8 * stage, parity)
                skip[group, j] = 1
                continue
            old, old_8 = m, m_8
            m, m_8 = fmax(m, quad_max(top) * scale), fmax(m_8, quad_max(top_8) * scale)
            alpha, alpha_8 = ex2(f32(old - m)), ex2(f32(old_8 - m_8))
            sums, sums_8 = exp2_rows(s, 16, scale, m, m_8)
            l, l_8 = l * alpha + sums, l_8 * alpha_8 + sums_8
            pack_rows(p, s, 16, F16)
            scale_rows(acc, 8, alpha, alpha_8)
            mbarrier_wait(v_full + 8 * stage, parity)
            begin_pv(acc, p, v_ring + BYTES * stage, 64, F16)
            wgmma_wait(0, acc, 64)
            if leads:
                mbarrier_arrive(v_empty + 8 * stage)
        scale_rows(acc, 8, 1 / quad_sum(l), 1 / quad_sum(l_8))
        for i in range(32):
            out[row + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2] = acc[i // 4, i % 4]

    return attention


def run(q, k, v, scale, ln_lam, kernel=None, rows=KEYS, schedule="both"):
    """Emulate: q [128, 64], k and v [128 · tiles, 64]; TMA copies so many rows at a time."""
    maps = [TensorMap(np.ascontiguousarray(x, np.float16), (rows, 64)) for x in (q, k, v)]
    out, skip = np.zeros((128, 64), np.float32), np.zeros((2, len(k) // KEYS), np.uint8)
    in_powers_of_2 = np.float32(scale / math.log(2)), np.float32(ln_lam / math.log(2))
    done = emulate(
        kernel or make_kernel(), 1, THREADS, *maps, out, skip, *in_powers_of_2,
        shared_bytes=(1 + 2 * STAGES) * BYTES, schedule=schedule,
    )  # fmt: skip
    return skip, out, done.events


def pipeline(q, k, v, scale, ln_lam):
    """Say which tiles each group skips, and what comes out."""
    return run(q, k, v, scale, ln_lam)[:2]


checks.check_pipeline(pipeline)

# %% [markdown]
# ## A real head
#
# The last 128 of 1024 words look at the first 768: six tiles, none of them masked.

# %%
LAM = 0.05
head = helpers.real_head(helpers.LAYER_12, head=0, length=1024)
q, k, v = head.q[-128:], head.k[:768], head.v[:768]
skip, _, events = run(q, k, v, head.scale, math.log(LAM), schedule="late")
scan = sim.scan(q[None], k[None], tile=(64, KEYS), causal=False, order="ascending")
same = (scan.decide(LAM).state[0] == sim.SKIPPED) == skip.astype(bool)
print(f"skipped by group 0: {skip[0]}, by group 1: {skip[1]}; unlike sim: {(~same).sum()}")
print(f"copied by TMA: {sum(event.name == 'TMA load' for event in events)} tiles of Q, K and V")

share = pictures.overlap(events, ("exp2_rows", "pack_rows"), ("wgmma_ss", "wgmma_rs"))
helpers.reveal(prediction, 100 * share, "% of the exponentials' time, by the emulator's model")

# %% [markdown]
# ## The picture
#
# What happens when, by the emulator's *model* of durations: no measurement. Numbers are tiles. Of
# a skipped tile you see Q·K and its maxima, neither exponentials nor P·V; and its V comes all the
# same: group 1 skips 3, 4 and 5, and waits for it. (The app shows this head with a causal mask.)

# %%
lanes = {"K warp": 8, "V warp": 9, "group 0": 0, "group 1": 4}
left_out = {f"group {g}": np.flatnonzero(skip[g]) for g in range(2)}
helpers.show(pictures.timeline(events, lanes, left_out), "12_the_asynchronous_pipeline")
helpers.app_link(source=helpers.LAYER_12, head=0, length=1024, threshold=LAM)

# %% [markdown]
# `cuda_kernels/prefill_wgmma.py`, the real kernel, also lets P·V of a tile run beside the
# exponentials of the next: its first lines draw that.
#
# ## Break it
#
# A GPU hangs here, or worse, does not. The emulator says who, where, and which phase. First, half
# of the bytes come that are expected. Then, who skips lets V's stage go without a wait for V.

# %%
try:
    run(q, k, v, head.scale, math.log(LAM), rows=KEYS // 2)
except EmulationError as error:
    print(f"half of the bytes: {error}")


def let_go(full, empty, parity):
    """Say "empty" of a stage that may not be full yet."""
    if cuda.threadIdx.x % 128 == 0:
        mbarrier_arrive(empty)


def hasty(q, k, v, scale, ln_lam):
    """Run it."""
    return run(q, k, v, scale, ln_lam, make_kernel(let_go))[:2]


print("\nBreak it (this one is meant to fail):")
checks.check_pipeline(hasty, strict=False)
