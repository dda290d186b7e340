"""What sharing the cache among splits costs in sparsity, and what the seeded maximum gives back.

Measured on traces: their last queries stand for decode steps, since each sees what a decoded
token would.  ``python -m sim.decode_splits`` prints the table for the bundled traces.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from sim.decode import LAYOUTS, scan_decode
from sim.gap_scans import DECODE_STEPS
from sim.traces import Trace, bundled, read_trace

SPLITS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1024, 2048, 4096)
THRESHOLDS = (0.001, 0.01, 0.05)


class Sparsity(NamedTuple):
    """Shares of visited tiles that are skipped, over all steps and votes of all traces.

    ``plain`` and ``seeded`` with this many splits, ``unsplit`` seeded with one.
    """

    length: int
    splits: int
    threshold: float
    plain: float
    seeded: float
    unsplit: float


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
        unsplit = _shares(traces, length, steps, thresholds, keys=keys, seeded=True)
        for count in splits:
            split = partial(
                _shares,
                traces,
                length,
                steps,
                thresholds,
                keys=keys,
                splits=count,
                split_layout=split_layout,
            )
            for row in zip(
                thresholds, split(seeded=False), split(seeded=True), unsplit, strict=True
            ):
                measured.append(Sparsity(length, count, *row))
    return measured


def _shares(
    traces: Sequence[Trace],
    length: int,
    steps: int,
    thresholds: Sequence[float],
    **how: object,
) -> list[float]:
    """Share of visited tiles skipped at each λ, over all traces."""
    skipped, visited = np.zeros(len(thresholds)), 0
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
        visited += int(one.visited.sum())
        skipped += [one.decide(threshold).skipped.sum() for threshold in thresholds]
    return [float(count) for count in skipped / visited]


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
    print(f"{'tokens':>7}{'λ':>7}{'splits':>8}{'plain':>8}{'seeded':>8}{'unsplit':>9}")
    for one in sorted(rows, key=lambda row: (row.length, row.threshold, row.splits)):
        shares = (f"{100 * share:.1f}" for share in (one.plain, one.seeded, one.unsplit))
        print(f"{one.length:7}{one.threshold:7}{one.splits:8}{{:>8}}{{:>8}}{{:>9}}".format(*shares))


if __name__ == "__main__":
    main()
