# %% [markdown]
# # 5 · From loops to blocks and threads
#
# **Question:** What changes when each row of attention becomes a thread on a GPU?
#
# **Before:** lessons 2 and 4.
# **Time:** 40 minutes. **Needs a GPU:** no.
#
# A GPU program, a *kernel*, is an ordinary function that is run by thousands of *threads*. All run
# the same lines; each asks who it is, and works on its own part. Threads come in *blocks* of equal
# size, and number themselves:
#
# * `cuda.blockIdx.x`: which block am I in;
# * `cuda.threadIdx.x`: which thread of my block am I;
# * `cuda.blockDim.x`: how many threads has a block.
#
# We write such a function, run it with plain Python loops first, and then hand the very same
# function to Numba, which compiles Python for NVIDIA GPUs.

# %%
import math
from types import SimpleNamespace

import numpy as np

import sim
from lessons import checks, helpers, pictures
from sim.draw import labelled_tile_map

# %% [markdown]
# ## Predict
#
# 70 rows, one thread for each, in blocks of 16 threads. All blocks have all their threads. How many
# threads have no row?

# %%
prediction = None  # PREDICT: how many threads have no row

# %% [markdown]
# ## A GPU made of two loops
#
# `blk_kernel` is a GPU without any speed: for each block, for each thread, set the numbers and call
# the function. (On a GPU all this happens at the same time; for now, one after the other is fine.)

# %%
cuda = SimpleNamespace(
    blockIdx=SimpleNamespace(x=0), threadIdx=SimpleNamespace(x=0), blockDim=SimpleNamespace(x=0)
)


def blk_kernel(kernel, blocks, threads, *arguments):
    """Run a kernel's blocks and threads one after the other."""
    cuda.blockDim.x = threads
    for block in range(blocks):
        for thread in range(threads):
            cuda.blockIdx.x, cuda.threadIdx.x = block, thread
            kernel(*arguments)


# %% [markdown]
# ## Your turn
#
# One thread computes one row of causal attention: the online softmax of lesson 2 in chunks of a
# single key. A thread has no NumPy, only numbers; so the dot product is a loop, and `acc` is the
# thread's own row of `out`. A kernel returns nothing, it writes its result.
#
# 1. Which row is mine? And if there is no such row (see your prediction): `return`.
# 2. Given the score `s` of key j: new `m`, `alpha`, `p`, and `l`. Use `math.exp` and `max`.


# %%
def attend_row(q, k, v, scale, out):
    """One thread, one row: q, k [n, d], v [n, dv]; writes out [n, dv]."""
    # FILL ME IN (roughly 3 lines)
    row = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if row >= q.shape[0]:
        return
    # END
    for d in range(v.shape[1]):
        out[row, d] = 0.0
    m, l = -math.inf, 0.0
    for j in range(row + 1):
        s = 0.0
        for d in range(q.shape[1]):
            s += q[row, d] * k[j, d]
        s *= scale
        # FILL ME IN (roughly 5 lines)
        m_new = max(m, s)
        alpha = math.exp(m - m_new)
        m = m_new
        p = math.exp(s - m)
        l = l * alpha + p
        # END
        for d in range(v.shape[1]):
            out[row, d] = out[row, d] * alpha + p * v[j, d]
    for d in range(v.shape[1]):
        out[row, d] /= l


def by_loops(q, k, v, scale, threads):
    """Launch enough blocks for all rows."""
    out = np.full((len(q), v.shape[1]), np.nan)
    blk_kernel(attend_row, -(-len(q) // threads), threads, q, k, v, scale, out)
    return out


checks.check_threads(by_loops)
helpers.reveal(prediction, -(-70 // 16) * 16 - 70, "threads without a row")

# %% [markdown]
# ## The very same function in Numba
#
# `cuda.jit` turns `attend_row` into a kernel. `kernel[blocks, threads](…)` launches it: square
# brackets say how many, round ones with what. No GPU here? Numba has a *CUDA simulator*, which runs
# each thread as a thread of the operating system: slow, but it behaves like CUDA. It must be asked
# for (`NUMBA_ENABLE_CUDASIM=1`) before Numba is imported, so the helper starts a Python of its own
# with a program made of two functions: yours and the one below. The program stays in
# `lessons/output/by_numba.py`: have a look.
#
# 20 tokens of the real head, 2 blocks of 16 threads.


# %%
def by_numba(q, k, v, scale, threads):
    """Launch `attend_row` as a Numba kernel."""
    out = np.full((len(q), v.shape[1]), np.nan)
    kernel = cuda.jit(attend_row)
    kernel[-(-len(q) // threads), threads](q, k, v, scale, out)
    return {"out": out}


head = helpers.real_head(helpers.LAYER_12, head=0, length=160)
few = {"q": head.q[:20], "k": head.k[:20], "v": head.v[:20], "scale": head.scale, "threads": 16}
in_numba = helpers.run_in_cuda_simulator(by_numba, attend_row, **few)["out"]
difference = np.abs(in_numba - by_loops(**few)).max()
print(f"Numba's kernel against our loops: largest difference {difference:.1e}")

# %% [markdown]
# ## What loops cannot do
#
# Our loops finish one thread before the next begins. Two things need threads that wait for each
# other, and both are what skipping is made of:
#
# * **Shared memory.** All rows of a vote group need the same keys. The block fetches a piece of K
#   once, each thread a part of it, into fast memory that all its threads see. Nobody may read
#   before all have written: `cuda.syncthreads()` makes each thread wait for all of its block.
# * **The vote.** Thread r knows the gap of its own row only. `cuda.syncthreads_and(mine)` waits for
#   all threads of the block, and tells each whether *all* said yes. So all skip, or none does; if
#   each did as it liked, some would wait at the next `syncthreads` for threads that never come.
#
# Now read `cuda_kernels/prefill_simt.py`, it is short. A block is a vote group, a thread is a
# row. You know everything in it: `m`, `l`, `acc`, `alpha`, `p`; the gap; the vote; visit orders.
# New is `u`: when a tile is skipped, exp(tile_max − m) for each of its keys bounds the weight left
# out, so the kernel can *guarantee* how much a row has lost at most.
#
# We let it work: the last 32 of 160 tokens, against all keys, tiles of 16 × 16, λ = 0.05.


# %%
def real_kernel(q, k, v, scale, lam):
    """Call the project's own kernel through its public door: arrays are [1, length, 1, size]."""
    from cuda_kernels import skip_softmax_attention

    out, report = skip_softmax_attention(
        q, k, v, softmax_scale=scale, threshold=lam, tile=(16, 16), return_report=True
    )
    return {"out": out, "state": report.tiles.state, "bound": report.dropped_mass_bound}


LAM = 0.05
q, k, v = (x[None, :, None] for x in (head.q[-32:], head.k, head.v))
print("The kernel runs in the simulator, one operating-system thread for each of its threads …")
found = helpers.run_in_cuda_simulator(real_kernel, q=q, k=k, v=v, scale=head.scale, lam=LAM)

heads_first = [x[None] for x in (head.q[-32:], head.k, head.v)]
tiles = sim.scan(*heads_first[:2], tile=(16, 16)).decide(LAM)
simulated = sim.attend(*heads_first, tiles)
print(f"tiles unlike the simulator's: {(found['state'][0] != tiles.state).sum()}")
difference = np.abs(found["out"][0, :, 0] - simulated.output).max()
print(f"largest difference in the output: {difference:.0e}")
print(
    f"worst row: lost {simulated.dropped_mass.max():.2%} of its weight, "
    f"the kernel had guaranteed at most {found['bound'].max():.1%}"
)

# %% [markdown]
# ## The picture
#
# Two vote groups down, ten key tiles across: left by the kernel, right by the simulator. (The app
# shows 512 tokens of this head, in tiles of 64 × 128.)

# %%
by_kernel = sim.TileMap(found["state"][0], tiles.grid, tiles.order, tiles.threshold)
images = [labelled_tile_map(one, cell=18) for one in (by_kernel, tiles)]
helpers.show(pictures.side_by_side(images, ["kernel", "simulator"]), "05_blocks_and_threads")
helpers.app_link(source=helpers.LAYER_12, head=0, length=512, threshold=LAM)

# %% [markdown]
# This kernel is for reading: a GPU runs it, slowly, because a thread that works alone on its row
# cannot use the matrix units. How the fast ones differ is a matter for later lessons. What they
# compute is this.
#
# ## Break it
#
# Someone forgets that there may be more threads than rows. Here NumPy complains. A GPU does not:
# it writes to memory that belongs to something else. Which is worse?


# %%
def without_guard(q, k, v, scale, threads):
    """Launch a kernel whose threads do not ask whether their row exists."""
    out = np.full((len(q), v.shape[1]), np.nan)

    def kernel():
        row = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        s = k[: row + 1] @ q[row] * scale
        p = np.exp(s - s.max())
        out[row] = p @ v[: row + 1] / p.sum()

    blk_kernel(kernel, -(-len(q) // threads), threads)
    return out


print("\nBreak it (this one is meant to fail):")
checks.check_threads(without_guard, strict=False)
