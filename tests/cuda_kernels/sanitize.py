"""Small cases of every tensor-core kernel under compute-sanitizer: ``python sanitize.py``.

Needs a GPU, CuPy, and the CUDA toolkit's compute-sanitizer on PATH; takes some minutes: a launch of
``wgmma`` under racecheck up to one, so that it may look as if it stood still.  Runs memcheck,
racecheck and synccheck, or those named as arguments, and ends with 0 if all are clean.
Results are held to the contract too, so that a run in which nothing happened is not called clean.
Driver calls that fail are not counted: NVIDIA's Python bindings ask for functions that a driver may
not have, and ours raise.
"""

import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # exit status of the sanitizer when it has found something
DONE = "cases agree"


def main(arguments):
    """Run this file under each tool."""
    tools = arguments or TOOLS
    for tool in tools:
        if tool not in TOOLS:
            print(f"tools are {', '.join(TOOLS)}, got {tool!r}", file=sys.stderr)
            return 2
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    clean = True
    for tool in tools:
        command = [
            sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all",
            "--report-api-errors", "no", sys.executable, __file__, "inside",
        ]  # fmt: skip
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        ran = DONE in done.stdout
        clean = clean and ran and done.returncode == 0
        if ran and done.returncode in (0, FOUND):
            print(f"{tool}: {'clean' if done.returncode == 0 else 'found something'}", flush=True)
        else:
            print(f"{tool}: did not run to its end (status {done.returncode})", flush=True)
        if not ran or done.returncode:
            print(done.stdout, flush=True)
    return 0 if clean else 1


def inside():
    """Run the cases; every array is an allocation of its own, so that memcheck sees its end."""
    import contract
    import cupy
    import decode_cases
    from cases import MMA_CASES
    from run_cases import run

    from cuda_kernels.benchmark import choose_backends

    cupy.cuda.set_allocator(None)
    number = 0
    for backend in choose_backends(None):
        for case in MMA_CASES:
            for gap in (True, False):
                results = run(
                    case, case.threshold, move=cupy.asarray, back=cupy.asnumpy, backend=backend,
                    gap=gap,
                )  # fmt: skip
                if gap:
                    contract.check(case, case.tensors(), *results)
                number += 1
    for case in decode_cases.CASES:
        if case.dtype == "bfloat16":  # CuPy has none
            continue

        def give(x, dtype=case.dtype):
            return cupy.asarray(x, dtype)

        out, report = decode_cases.run(case, give=give, gap=True, check=True)
        fields = (report.state, report.gap, report.lse, report.dropped_mass_bound)
        decode_cases.check(case, *(cupy.asnumpy(x) for x in (out.astype("float32"), *fields)))
        number += 1
    print(f"{number} {DONE}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if sys.argv[1:] == ["inside"]:
        inside()
    else:
        sys.exit(main(sys.argv[1:]))
