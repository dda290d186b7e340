# %% [markdown]
# # Run the kernels
#
# Choose a back end, read a report, make a plan, compare with the simulator, look at machine code,
# take times, profile. With an NVIDIA GPU from Ampere on, kernels are launched and timed. On any
# other machine the *emulator* runs the tensor-core kernels' own source on the CPU, on a few tiles,
# and the times shown are those of a recorded run. Every part says which it is. About 10 minutes.
#
# First: [first_kernel.py](first_kernel.py).

# %%
import shutil
from importlib.util import find_spec

import numpy as np

import sim
from cuda_kernels import BACKENDS, detect, skip_softmax_attention, skip_softmax_plan
from cuda_kernels.arrays import to_numpy
from cuda_kernels.backends import HOPPER, TENSOR_CORES, choose
from cuda_kernels.benchmark import Gpu, jobs, measure, recorded, table
from cuda_kernels.launch import why_not_assemble
from cuda_kernels.machine import describe
from cuda_kernels.resources import CONFIGURATIONS, format_table, resource_table
from lessons import helpers
from sim.draw import labelled_tile_map
from sim.traces import bundled, read_trace

device = detect()
live = device.kind == "gpu" and device.compute_capability >= TENSOR_CORES
where = f"launched on {device.name}" if live else "emulated on the CPU: right, and slow"
print(f"{device.kind}: {device.name or device.reason}")
print(f"kernels in this notebook are {where}")

# %% [markdown]
# ## Choose a back end
#
# `backend=None` takes the best kernel for GPU and arguments: `wgmma` on Hopper, `mma` from Ampere
# on and for arrays that TMA does not take, `simt` for the rest; the report names it. Where one that
# is asked for cannot run, the door says why in a sentence, and takes no other instead.

# %%
refused = {}
for name, what in BACKENDS.items():
    try:
        print(f"{name:10} runs here: {what}  [{choose(name, device)}]")
    except RuntimeError as reason:
        refused.setdefault(str(reason), []).append(name)
for reason, names in refused.items():
    print(f"{', '.join(names):10} {'does' if len(names) == 1 else 'do'} not: {reason}")

asked = ["mma", "wgmma"]
if live and device.compute_capability != HOPPER:
    asked = ["mma"]
print("asked for below:", ", ".join(asked))

# %% [markdown]
# ## Arrays, and a call
#
# Kernels take `[batch, length, heads, head_dim]`, float16 or bfloat16, of CuPy or PyTorch, on the
# GPU; the emulator takes NumPy's. On a GPU: three heads of a real model, 4096 tokens. In the
# emulator: one head, the last 64 of 768 tokens, which are one vote group and six key tiles.

# %%
trace = read_trace(bundled()[helpers.LAYER_12])
heads, length, queries = (3, 4096, 4096) if live else (1, 768, 64)
heads_first = [trace.q[:heads, length - queries : length], trace.k[:, :length], trace.v[:, :length]]
q, k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)[None]) for x in heads_first)
if live:
    q, k, v = (helpers.to_gpu(x) for x in (q, k, v))
settings = {"softmax_scale": trace.softmax_scale, "threshold": 0.05}
results = {
    name: skip_softmax_attention(
        q, k, v, **settings, backend=name, emulate=not live, gap=True, return_report=True
    )
    for name in asked
}
print({name: tuple(out.shape) for name, (out, _) in results.items()}, where)

# %% [markdown]
# ## The report
#
# Which tiles were skipped (0 masked, 1 computed, 2 skipped), what share of the visited ones, and a
# bound: no row has lost more of its weight than that, whatever the text. Both kernels' bounds hold.
# That of `mma` is tighter: 8 of its threads share a row's keys of a tile (4 lanes of each of two
# warps, which have half of the keys each), and each knows the largest score among its own 16; with
# `wgmma` it is 4 threads and 32 keys.

# %%
for report in (report for _, report in results.values()):
    bound = to_numpy(report.dropped_mass_bound)
    print(f"{report.backend}: order {report.order}, {report!r}")
    print(f"  sparsity of each head {report.sparsity.round(3)[0]}, bound {bound.max():.1%}")
    print(f"  tiles of head 0, last group: {report.tiles.state[0, 0, -1]}")
report = results["mma"][1]
head_0 = sim.TileMap(report.tiles.state[0], report.grid, report.order, report.threshold[0])
helpers.show(labelled_tile_map(head_0, cell=6 if live else 48), "run_the_kernels")

# %% [markdown]
# ## Agreement with the simulator
#
# The simulator computes the same in NumPy, and knows what each row has really lost.

# %%
scan = sim.scan(*heads_first[:2], softmax_scale=trace.softmax_scale)
tiles = scan.decide(settings["threshold"])
simulated = sim.attend(*heads_first, tiles, softmax_scale=trace.softmax_scale)
seen = np.isfinite(scan.gap)
for name, (out, report) in results.items():
    gap, bound = to_numpy(report.gap)[0], to_numpy(report.dropped_mass_bound)[0]
    moved = to_numpy(out)[0].transpose(1, 0, 2).astype(np.float32)
    print(f"{name}, {where}")
    differ = (report.tiles.state[0] != tiles.state).sum()
    print(f"  tiles that differ: {differ} of {tiles.visited.sum()}")
    print(f"  largest difference of a gap: {np.abs(gap[seen] - scan.gap[seen]).max():.1e}")
    print(f"  largest difference of the output: {np.abs(moved - simulated.output).max():.1e}")
    print(f"  bound holds: {bool((bound >= simulated.dropped_mass - 1e-6).all())}")

# %% [markdown]
# ## A plan
#
# The door checks its arguments at every call. A plan checks, compiles and allocates once; then it
# costs the host little, and can be captured in a CUDA graph. It needs a GPU, and takes the best
# tensor-core kernel for it.

# %%
try:
    plan = skip_softmax_plan(q, k, v, **settings)
    out = plan(q, k, v)
    print("plan, launched:", plan.report)
    print(
        "as the door's, bit for bit:",
        to_numpy(out).tobytes() == to_numpy(results[plan.report.backend][0]).tobytes(),
    )
except RuntimeError as reason:
    print(f"no plan: {reason}")

# %% [markdown]
# ## What machine code costs
#
# Registers, spills and shared memory of a build, with no GPU: it takes the CUDA assembler, and a
# while the first time. `skip-softmax kernels` lists every configuration and architecture.

# %%
wanted = ("prefill_mma head_dim 128, bf16, skip", "prefill_wgmma head_dim 128, bf16, skip")
if (reason := why_not_assemble()) is None:
    builds = [one for one in CONFIGURATIONS if one.name in wanted]
    print(format_table(resource_table(builds, architectures=["sm_90a"], processes=1)))
else:
    print(f"not assembled here: {reason}")

# %% [markdown]
# ## Timing
#
# All candidates on the same tensors in random order, and the median of per-round ratios, because a
# card slows as it heats. FLOPs are those of dense attention, so a kernel that skips shows the rate
# of a dense one that would take as long. Live, this takes PyTorch; all of it is
# `skip-softmax bench prefill`.

# %%
WORKLOADS = ("random", "columns 0.5", "columns 0.9")
if live and find_spec("torch"):
    run = {"machine": describe(), "rows": [], "notes": []}
    for job in jobs(quick=True):
        if job.head_dim == 128 and not job.causal and job.workload in WORKLOADS:
            rows, notes = measure(job, Gpu(), asked, rounds=10)
            run["rows"] += rows
            run["notes"] += notes
    print("Measured here and now:\n")
else:
    run = recorded() | {"notes": []}
    shown = {"head_dim": 128, "causal": False, "tokens": 16_384, "heads": 16, "kv_heads": 16}
    run["rows"] = [
        row for row in run["rows"] if row["workload"] in WORKLOADS and shown.items() <= row.items()
    ]
    machine = run["machine"]
    print(f"Recorded on {machine['gpu']}, {machine['date']}; nothing was timed here:\n")
print(table(run))

# %% [markdown]
# ## Profiling
#
# Nsight Compute runs this notebook as a program and profiles the first launch of a kernel of ours.
# Leave the clocks alone (`--clock-control none`), or the figures are of another card. Look at the
# tensor pipe's share, at L2 throughput, and at what warps stall on.

# %%
command = "ncu --set full --clock-control none --kernel-name regex:skip_softmax_prefill"
command += " --launch-count 1 python lessons/notebooks/run_the_kernels.py"
print(f"{'here' if live and shutil.which('ncu') else 'on a machine with a GPU and ncu'}: {command}")

# %% [markdown]
# Next: change `cuda_kernels/prefill_mma.py` or `prefill_wgmma.py` and run this again; if it is
# wrong, tiles, gaps or output differ. What was tried, and what it brought, is in
# `cuda_kernels/results/log.md`.
