"""What sharing the cache among splits costs in sparsity, and what the seeded maximum gives back.

Measured on traces: their last queries stand for decode steps, since each sees what a decoded
token would.  ``python -m sim.decode_splits`` prints the table for the bundled traces;
``sim/data/README.md`` keeps it, with longer ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.decode import LAYOUTS, scan_decode
from sim.gap_scans import DECODE_STEPS
from sim.traces import Trace, bundled, read_trace

SPLITS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1024, 2048, 4096)
THRESHOLDS = (0.001, 0.01, 0.05)

TOLERATED = 0.02
"""What seeded splits may lose, as a share of tiles: the command counts the groups that lose more.
"""


class Sparsity(NamedTuple):
    """Shares of visited tiles that are skipped, over all steps and votes of all traces.

    ``plain`` and ``seeded`` with this many splits, ``unsplit`` seeded with one.  ``lost`` is
    ``unsplit`` less ``seeded`` for each GQA group by itself, trace after trace.
    """

    length: int
    splits: int
    threshold: float
    plain: float
    seeded: float
    unsplit: float
    lost: tuple[float, ...]


def of_splits(
    traces: Sequence[Trace],
    *,
    lengths: Iterable[int] = LENGTHS,
    splits: Iterable[int] = SPLITS,
    thresholds: Sequence[float] = THRESHOLDS,
    keys: int = 64,
    split_layout: str = "interleaved",
    steps: int = DECODE_STEPS,
) -> list[Sparsity]:
    """Measure the sparsity of split decode, plain and seeded.

    Parameters
    ----------
    traces : sequence of Trace
        Causal, with at least ``steps`` queries at each length.
    lengths : iterable of int
        Keys that the last step sees.
    splits : iterable of int
    thresholds : sequence of float
        λ, at most 1.
    keys : int
        Keys of a tile.
    split_layout : {"interleaved", "contiguous"}
    steps : int
        Decode steps, one token apart.

    Returns
    -------
    list of Sparsity
        By length, then splits, then λ.  The heads of a GQA group vote together, and every split
        visits in ascending order.

    Raises
    ------
    ValueError
        If a trace is not causal or has no such steps.

    Examples
    --------
    >>> trace = read_trace(bundled()["smollm2-135m-layer12-kv0"])
    >>> [one] = of_splits([trace], lengths=[2048], splits=[8], thresholds=[0.05])
    >>> one.plain < one.seeded
    True
    """
    measured = []
    for length in lengths:
        counts = partial(_counts, traces, length, steps, thresholds, keys=keys)
        unsplit, visited = counts(seeded=True)
        for count in splits:
            split = partial(counts, splits=count, split_layout=split_layout)
            plain, seeded = split(seeded=False)[0], split(seeded=True)[0]
            shares = (x.sum(axis=1) / visited.sum() for x in (plain, seeded, unsplit))
            lost = map(tuple, ((unsplit - seeded) / visited).tolist())
            for row in zip(thresholds, *(x.tolist() for x in shares), lost, strict=True):
                measured.append(Sparsity(length, count, *row))
    return measured


def _counts(
    traces: Sequence[Trace],
    length: int,
    steps: int,
    thresholds: Sequence[float],
    **how: object,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tiles that each GQA group skips, [thresholds, groups], and visits, [groups]."""
    skipped, visited = [], []
    for trace in traces:
        first = trace.k.shape[1] - trace.q.shape[1]  # query i is key first + i
        if not trace.causal:
            raise ValueError("traces must be causal, got one that is not")
        if not first + steps <= length <= trace.k.shape[1]:
            raise ValueError(
                f"a length must lie between {first + steps} and {trace.k.shape[1]} for {steps} "
                f"steps of this trace, got {length}"
            )
        queries = trace.q[:, length - first - steps : length - first].swapaxes(0, 1)
        sees = np.arange(length - steps, length) + 1
        one = scan_decode(
            queries,
            trace.k[:, :length],
            sees,
            softmax_scale=trace.softmax_scale,
            **how,  # type: ignore[arg-type]
        )
        visited.append(one.visited.sum(axis=(0, 2)))
        skipped.append([one.decide(threshold).skipped.sum(axis=(0, 2)) for threshold in thresholds])
    return np.concatenate(skipped, axis=1), np.concatenate(visited)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m sim.decode_splits", description=__doc__)
    parser.add_argument("traces", nargs="*", help="trace files (default: the bundled ones)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--splits", type=int, nargs="+", default=SPLITS)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--keys", type=int, default=64, help="keys of a tile (default 64)")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    options = parser.parse_args(arguments)
    paths = options.traces or list(bundled().values())
    rows = of_splits(
        [read_trace(path) for path in paths],
        lengths=options.lengths,
        splits=options.splits,
        thresholds=options.thresholds,
        keys=options.keys,
        split_layout=options.layout,
    )
    print(
        f"Tiles skipped, per cent of visited; traces: {len(paths)}, last {DECODE_STEPS} queries as "
        f"steps, {options.keys} keys a tile, {options.layout}"
    )
    over = f">{100 * TOLERATED:g}"
    print(
        f"lost: the most that seeded splits lose in one of {len(rows[0].lost)} GQA groups, points; "
        f"{over}: groups that lose more"
    )
    heads = f"{'plain':>8}{'seeded':>8}{'unsplit':>9}{'lost':>6}{over:>5}"
    print(f"{'tokens':>7}{'λ':>7}{'splits':>8}{heads}")
    for one in sorted(rows, key=lambda row: (row.length, row.threshold, row.splits)):
        shares = f"{100 * one.plain:8.1f}{100 * one.seeded:8.1f}{100 * one.unsplit:9.1f}"
        above = sum(share > TOLERATED for share in one.lost)
        print(
            f"{one.length:7}{one.threshold:7}{one.splits:8}{shares}"
            f"{100 * max(one.lost):6.1f}{above:5}"
        )


if __name__ == "__main__":
    main()
