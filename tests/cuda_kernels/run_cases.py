"""Run the case list through the public door and write what comes out: ``run_cases.py OUT.npz``.

A program of its own, because the CUDA simulator must be chosen before Numba is imported.
"""

import sys

import numpy as np
from cases import CASES

from cuda_kernels import skip_softmax_attention

FIELDS = ("state", "gap", "lse", "dropped_mass_bound")


def run(case, threshold, *, move=lambda x: x, back=lambda x: x, **settings):
    """Call the door; the output is poisoned first and must be written everywhere."""
    q, k, v = (move(x) for x in case.tensors())
    out = move(np.full((case.batch, case.lq, case.hq, case.dv), np.nan, case.dtype))
    result, report = skip_softmax_attention(
        q,
        k,
        v,
        causal=case.causal,
        threshold=threshold,
        order=case.order,
        tile=case.tile,
        out=out,
        return_report=True,
        **settings,
    )
    assert result is out
    fields = (getattr(report, name) for name in FIELDS)
    return back(out), *(None if x is None else back(x) for x in fields)


def main(path):
    """Run every case once, and some again."""
    results = {}
    for case in CASES:
        results |= {f"{case.name}/{i}": x for i, x in enumerate(run(case, case.threshold))}
    again = CASES[0]
    for label, threshold in (("again", again.threshold), ("looser", 1.0), ("dense", 0.0)):
        results |= {f"{label}/{i}": x for i, x in enumerate(run(again, threshold))}
    np.savez(path, **results)


if __name__ == "__main__":
    sys.setswitchinterval(1e-4)  # the simulator's barriers poll
    main(sys.argv[1])
