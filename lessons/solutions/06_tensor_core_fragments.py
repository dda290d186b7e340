# %% [markdown]
# # 6 · Tensor cores: who holds what
#
# **Question:** A tensor core multiplies whole matrices. Which thread holds which element?
#
# **Before:** lesson 5.
# **Time:** 35 minutes. **Needs a GPU:** no.
#
# A thread that multiplies number by number leaves the fastest part of a GPU idle: the *tensor
# cores*. Their instruction, `mma_m16n8k16`, computes D += A · B for matrices A [16, 16],
# B [16, 8] and D [16, 8] at once. A and B are 16-bit numbers, D is float32.
#
# 32 threads, a *warp*, issue it together; each is called a *lane* and brings a share of A, B and D
# in its own registers: its *fragments*. The hardware fixes who brings what, and never says when it
# is wrong: the product is just another one. So this is the map to know.

# %%
import colorsys

import numpy as np

from cuda_kernels.emulator import emulate
from cuda_kernels.ptx.language import F16, cuda, f32, ldmatrix_x4, mma_m16n8k16, shared_address, u32
from lessons import checks, helpers, pictures

# %% [markdown]
# ## Predict
#
# Online softmax needs the maximum of a row of scores, and D is where scores come out. How many
# lanes share one row of D?

# %%
prediction = None  # PREDICT: how many lanes hold elements of the same row of D

# %% [markdown]
# ## The map of D
#
# A lane has 4 numbers of D. Lanes come in *quads* of four: `lane // 4` is the quad, `lane % 4` the
# place in it. A quad works on row `quad`, and on the row 8 below; in each, a lane has two
# neighbours:
#
#     number   0         1             2             3
#     row      quad      quad          quad + 8      quad + 8
#     column   2 place   2 place + 1   2 place       2 place + 1


# %%
def place_in_d(lane, i):
    """Row and column of number i (0 … 3) of a lane in D [16, 8]."""
    return lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2


# %% [markdown]
# ## Your turn
#
# **1.** A lane has 8 numbers of A. They are four pairs, and each pair fills a register of 32 bits:
#
#     register   0             1             2             3
#     row        quad          quad + 8      quad          quad + 8
#     columns    2 place, + 1  2 place, + 1  2 place + 8, + 1   (the same)
#
# Numbers 2r and 2r + 1 are register r, in this order.
#
# **2.** A lane has 4 numbers of B [16, 8], two registers. Here the *column* is the quad, and pairs
# are neighbours in a column: register 0 holds rows 2 place and the next, register 1 the same
# rows + 8.
#
# **3.** Load the fragments by hand. `a` and `b_columns` are arrays of 32-bit words: word [r, c] of
# `a` is A[r, 2c] and A[r, 2c + 1]; word [c, r] of `b_columns` is B[2r, c] and B[2r + 1, c]. Fill
# `a_tile` (4 words) and `b_tile` (2 words); the maps say which words.


# %%
def place_in_a(lane, i):
    """Row and column of number i (0 … 7) of a lane in A [16, 16]."""
    # FILL ME IN (roughly 3 lines)
    register = i // 2
    row = lane // 4 + register % 2 * 8
    column = lane % 4 * 2 + register // 2 * 8 + i % 2
    # END
    return row, column


def place_in_b(lane, i):
    """Row and column of number i (0 … 3) of a lane in B [16, 8]."""
    # FILL ME IN (roughly 2 lines)
    row = lane % 4 * 2 + i // 2 * 8 + i % 2
    column = lane // 4
    # END
    return row, column


def one_mma(a, b_columns, d):
    """Multiply with one warp: a [16, 8] words, b_columns [8, 8] words, d [16, 8] float32."""
    lane = cuda.threadIdx.x
    a_tile, b_tile = cuda.local.array(4, u32), cuda.local.array(2, u32)
    acc = cuda.local.array(4, f32)
    for i in range(4):
        acc[i] = f32(0)
    # FILL ME IN (roughly 6 lines)
    for register in range(4):
        row, column = place_in_a(lane, 2 * register)
        a_tile[register] = a[row, column // 2]
    for register in range(2):
        row, column = place_in_b(lane, 2 * register)
        b_tile[register] = b_columns[column, row // 2]
    # END
    mma_m16n8k16(acc, a_tile, b_tile, F16)
    for i in range(4):
        row, column = place_in_d(lane, i)
        d[row, column] = acc[i]


# %% [markdown]
# No GPU here? This project's *emulator* runs a kernel's own source, 32 threads that wait for each
# other where a GPU's would, and does what each instruction is specified to do.


# %%
def words(matrix):
    """Pairs of float16 as 32-bit words: [rows, columns] → [rows, columns / 2]."""
    return np.ascontiguousarray(matrix, np.float16).view(np.uint32)


def places(place_of, numbers):
    """Write a map as a table [32 lanes, numbers, (row, column)]."""
    return [[place_of(lane, i) for i in range(numbers)] for lane in range(32)]


def multiply(a, b):
    """Multiply a [16, 16] and b [16, 8] on the emulator; return the maps as well."""
    d = np.zeros((16, 8), np.float32)
    in_a, in_b = places(place_in_a, 8), places(place_in_b, 4)
    emulate(one_mma, 1, 32, words(a), words(b.T), d)
    return in_a, in_b, d


checks.check_fragments(multiply)
rows_of_d = np.array(places(place_in_d, 4))[:, :, 0]
sharing = int((rows_of_d == 0).any(axis=1).sum())
helpers.reveal(prediction, sharing, "lanes that share a row: two exchanges give all four its max")

# %% [markdown]
# ## Scores of a real head
#
# 16 queries against 8 keys of 64 dimensions are four such products, one for every 16 dimensions.

# %%
head = helpers.real_head(helpers.LAYER_12, head=0, length=64)
q, k = head.q[-16:], head.k[:8]
s = sum(multiply(q[:, i : i + 16], k[:, i : i + 16].T)[2] for i in range(0, 64, 16))
print(f"largest difference to NumPy's q @ k.T: {np.abs(s - q @ k.T).max():.1e}")

# %% [markdown]
# ## One instruction instead of four loads
#
# Once A lies in shared memory, `ldmatrix_x4` loads four 8 × 8 matrices at once, in just the way
# that `mma` wants them: lane t gives the address of one row of 8 numbers, row t % 8 of matrix
# t // 8. This is how every fast kernel does it; see `cuda_kernels/gemm.py`, it is short.


# %%
def with_ldmatrix(a, fragments):
    """Copy a [16, 8] words to shared memory; write fragments [32, 4] words."""
    lane = cuda.threadIdx.x
    memory = cuda.shared.array((16, 8), u32, alignment=16)
    for i in range(4):
        memory[i * 4 + lane // 8, lane % 8] = a[i * 4 + lane // 8, lane % 8]
    cuda.syncthreads()
    a_tile = cuda.local.array(4, u32)
    ldmatrix_x4(a_tile, shared_address(memory, (lane % 16, lane // 16 * 4)))
    for register in range(4):
        fragments[lane, register] = a_tile[register]


loaded = np.zeros((32, 4), np.uint32)
emulate(with_ldmatrix, 1, 32, words(q[:, :16]), loaded)
row, column = np.moveaxis(np.array(places(place_in_a, 8)), 2, 0)
by_hand = words(q[:, :16].astype(np.float16)[row, column])
print(f"registers that ldmatrix loads unlike you: {(loaded != by_hand).sum()} of {loaded.size}")

# %% [markdown]
# ## The picture
#
# The number in a cell is the lane that holds it; a colour is a quad. Rows of A and of D belong to
# quads, and so do columns of B.


# %%
def holders(place_of, numbers, shape):
    """Say which lane holds each element of a matrix."""
    lanes = np.zeros(shape, int)
    for lane in range(32):
        for i in range(numbers):
            lanes[place_of(lane, i)] = lane
    return lanes


def colour(lane):
    """A hue for the quad, lighter from lane to lane."""
    return colorsys.hls_to_rgb(lane // 4 / 8, 0.62 + 0.07 * (lane % 4), 0.75)


grids = [(place_in_a, 8, (16, 16)), (place_in_b, 4, (16, 8)), (place_in_d, 4, (16, 8))]
images = [pictures.numbers(holders(*grid), [colour(lane) for lane in range(32)]) for grid in grids]
helpers.show(pictures.side_by_side(images, ["A", "B", "D"]), "06_tensor_core_fragments")
helpers.app_link(source=helpers.LAYER_12, head=0, length=512)

# %% [markdown]
# D's map is A's left half, in float32. So weights p, computed where the scores S came out, are
# already where the next product, p · V, wants its A: that is why flash attention keeps them in
# registers.
#
# ## Break it
#
# Someone hands over B as it lies, row by row, where pairs are neighbours in a *row*. Nothing
# complains. (For such a B there is `ldmatrix_x4_trans`.)


# %%
def rows_for_columns(a, b):
    """Multiply with B's words taken from its rows."""
    d = np.zeros((16, 8), np.float32)
    emulate(one_mma, 1, 32, words(a), words(b.reshape(8, 16)), d)
    return places(place_in_a, 8), places(place_in_b, 4), d


print("\nBreak it (this one is meant to fail):")
checks.check_fragments(rows_for_columns, strict=False)
