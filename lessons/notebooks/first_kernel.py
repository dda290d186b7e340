# %% [markdown]
# # Your first skip-softmax kernel
#
# Call the kernel, read its report, and compare it with the simulator. On a machine with an NVIDIA
# GPU it runs there; on any other, Numba's CUDA simulator runs the same kernel on the CPU, which is
# slow (so the input is small) but needs nothing. About 5 minutes.

# %%
import os
import shutil

if shutil.which("nvidia-smi") is None:  # no NVIDIA driver: ask for the simulator, before any import
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")

import time

import numpy as np

import sim
from cuda_kernels import detect, skip_softmax_attention
from cuda_kernels.arrays import to_numpy
from lessons import helpers
from sim.draw import labelled_tile_map
from sim.traces import bundled, read_trace

device = detect()
print(f"{device.kind}: {device.name or device.reason}")

# %% [markdown]
# ## Q, K and V of a real model
#
# Kernels take `[batch, length, heads, head_dim]`; a trace holds `[heads, length, head_dim]`. Three
# query heads share one KV head. On a GPU we take all 4096 tokens, in tiles of 64 queries × 128
# keys, and copy them there: arrays of CuPy or PyTorch stay where they are, and so does the result.
# In the simulator we take one head, the last 32 of 160 tokens as queries, in tiles of 16 × 16.

# %%
on_gpu = device.kind == "gpu"
trace = read_trace(bundled()[helpers.LAYER_12])
heads, length, queries, tile = (3, 4096, 4096, (64, 128)) if on_gpu else (1, 160, 32, (16, 16))
heads_first = [trace.q[:heads, length - queries : length], trace.k[:, :length], trace.v[:, :length]]
q, k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)[None]) for x in heads_first)
if on_gpu:
    q, k, v = (helpers.to_gpu(x) for x in (q, k, v))
print("q", q.shape, "k", k.shape, "v", v.shape, q.dtype)

# %% [markdown]
# ## Call it
#
# `threshold` is λ: a tile is skipped if all its scores lie so far below what its queries have seen
# that every weight in it would be less than λ times the largest. 0 skips nothing, and is then
# ordinary attention.

# %%
settings = {"softmax_scale": trace.softmax_scale, "tile": tile, "threshold": 0.05}
start = time.perf_counter()
out, report = skip_softmax_attention(q, k, v, **settings, gap=True, return_report=True)
bound = to_numpy(report.dropped_mass_bound)  # waits for the GPU
seconds = time.perf_counter() - start
about = "compiling included" if on_gpu else "simulated, thread by thread"
print(f"out {out.shape} {out.dtype} on {out.device}, after {seconds:.1f} s ({about})")

# %% [markdown]
# ## Read the report

# %%
print("kernel:", report.backend)
print("visit order:", report.order)
print("sparsity of each head (skipped ÷ visited tiles):", report.sparsity.round(3))
print("tiles of head 0, last groups (0 masked, 1 computed, 2 skipped):")
print(report.tiles.state[0, 0, -4:])
print(f"guaranteed: no row has lost more than {bound.max():.1%} of its weight")
head_0 = sim.TileMap(report.tiles.state[0], report.grid, report.order, report.threshold[0])
helpers.show(labelled_tile_map(head_0, cell=6 if on_gpu else 48), "first_kernel")

# %% [markdown]
# ## Compare with the simulator
#
# `sim` computes the same on the CPU, in NumPy, and knows more: the weight that each row has really
# lost. The kernel's guarantee must not lie below it. A tile whose gap is within rounding of ln λ
# may differ; the count says so.

# %%
scan = sim.scan(*heads_first[:2], tile=tile, softmax_scale=trace.softmax_scale)
tiles = scan.decide(settings["threshold"])
simulated = sim.attend(*heads_first, tiles, softmax_scale=trace.softmax_scale)
finite = np.isfinite(scan.gap)
gap_difference = np.abs(to_numpy(report.gap)[0][finite] - scan.gap[finite]).max()
differ = (report.tiles.state[0] != tiles.state).sum()
print(f"tiles that differ: {differ} of {tiles.visited.sum()}")
print(f"largest difference of a gap: {gap_difference:.1e}")
print(f"really lost, worst row: {simulated.dropped_mass.max():.1%}")
print(f"guarantee holds: {bool((bound[0] >= simulated.dropped_mass - 1e-6).all())}")
kernel_out = to_numpy(out)[0].transpose(1, 0, 2).astype(np.float32)
print(f"largest difference of the output: {np.abs(kernel_out - simulated.output).max():.1e}")

# %% [markdown]
# Next: read `cuda_kernels/prefill_simt.py`, change it (skip on one row's vote, say), and run this
# again: the simulator will notice. Then [run_the_kernels.py](run_the_kernels.py).
