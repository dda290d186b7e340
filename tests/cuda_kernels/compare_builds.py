"""Builds of a prefill kernel against the tree's, in turns: ``python compare_builds.py mma FILE …``.

A file is another ``prefill_mma.py`` or ``prefill_wgmma.py``: an earlier one (``git show
REV:cuda_kernels/prefill_mma.py > old.py``), or one with a change on trial.  All are compiled first,
side by side; then in every round each is timed once, in another order, so that a card that slows as
it heats slows all of them.  Printed are medians of how many times faster than the tree's a build
was in a round, with quartiles, and whether its outputs and states are the tree's, bit by bit.
Needs a GPU and PyTorch.
"""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from cuda_kernels import plan
from cuda_kernels.benchmark import Gpu, choose_backends, interleaved, jobs, ratio
from cuda_kernels.gpu import current
from cuda_kernels.kernel import Kernel

PACKAGE = "builds_on_trial"  # modules of a package, so that what is compiled is kept on disk
TREE = "tree"


def parse(arguments):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=sorted(plan.RECIPES))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=16_384, choices=(4096, 16_384, 65_536))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--mask", nargs="+", default=["full", "causal"])
    parser.add_argument("--workload", nargs="+", default=["random", "columns 0.5", "columns 0.9"])
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args(arguments)


def chosen(asked):
    """List the workloads asked for."""
    return [
        job
        for job in jobs(quick=False)
        if job.tokens == asked.tokens
        and job.heads == job.kv_heads
        and job.head_dim in asked.head_dim
        and ("causal" if job.causal else "full") in asked.mask
        and job.workload in asked.workload
    ]


def adopt(files, folder):
    """Copy the files into a package in ``folder``; return the module of each build by its name."""
    package = Path(folder) / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    modules = {}
    for file in files:
        name = file.stem
        if not name.isidentifier() or name in (TREE, *modules):
            raise ValueError(f"files need names of their own that Python can import, got {file}")
        shutil.copyfile(file, package / f"{name}.py")
        modules[name] = f"{PACKAGE}.{name}"
    return modules


def compile_one(folder, kernel, architecture):
    """Compile a kernel, and keep it on disk; in a process of its own."""
    from cuda_kernels.launch import build

    sys.path.insert(0, str(folder))
    build(kernel, None, architecture)


@contextmanager
def launching(backend, module):
    """Within, plans of a back end launch the kernel of this module; of the tree's where None."""
    recipe = plan.RECIPES[backend]

    def other(*arguments):
        made = recipe(*arguments)
        return replace(made, kernel=Kernel(module, made.kernel.arguments))

    if module is not None:
        plan.RECIPES[backend] = other
    try:
        yield
    finally:
        plan.RECIPES[backend] = recipe


def compare(job, tensors, modules, gpu, make_plan, rounds):
    """Yield, for every kernel of a job and every build, its ratios, and what is said of it."""
    for kernel, threshold in {"dense": 0.0, **job.skip}.items():
        if kernel == "dense" and job.prescribed is not None:
            continue  # the same for every workload
        results, calls = {}, {}
        for name, module in modules.items():
            call = make_plan(module, *tensors, job.causal, threshold)
            out = call(*tensors)
            results[name] = out, call.report.state
            calls[name] = partial(call, *tensors, out=out)
        gpu.wait()
        same = {
            name: all((a == b).all() for a, b in zip(result, results[TREE], strict=True))
            for name, result in results.items()
        }
        times = interleaved(gpu, calls, rounds)
        for name in modules:
            said = "" if same[name] else "  results differ from the tree's"
            yield kernel, name, ratio(times[name], times[TREE]), said


def show(asked, folder, modules, work):
    """Compare, and print; in a process that began after the files were there, or none is kept."""
    from cuda_kernels.attention import skip_softmax_plan

    sys.path.insert(0, folder)
    gpu = Gpu()

    def make_plan(module, q, k, v, causal, threshold):
        with launching(asked.backend, module):
            return skip_softmax_plan(
                q, k, v, causal=causal, threshold=threshold, backend=asked.backend
            )

    for job in work():
        about = f"{job.workload:13} {job.head_dim:3} {'causal' if job.causal else 'full':6}"
        try:
            tensors = job.make(gpu)
        except ValueError as reason:  # so much cannot be skipped under that mask
            print(f"{about} {reason}", flush=True)
            continue
        for kernel, name, (low, middle, high), said in compare(
            job, tensors, modules, gpu, make_plan, asked.rounds
        ):
            line = f"{about} {kernel:15} {name:12} {middle:.3f} ({low:.3f}–{high:.3f}){said}"
            print(line, flush=True)


def main(arguments):
    """Compile, compare, print."""
    asked = parse(arguments)
    work = partial(chosen, asked)
    if not work():
        print("no workload has such a head_dim, mask and name", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            choose_backends([asked.backend])
            Gpu()
            modules = {TREE: None, **adopt(asked.files, folder)}
        except (OSError, RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        kernels = [
            Kernel(module or f"cuda_kernels.prefill_{asked.backend}", (d, d, 1, skip, False))
            for module in modules.values()
            for d in asked.head_dim
            for skip in (False, True)
        ]
        one = partial(compile_one, folder, architecture=current().architecture)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            list(tqdm(pool.map(one, kernels), total=len(kernels), unit="build"))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(show, asked, folder, modules, work).result()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
