"""How long a scan takes, against the bare Q·Kᵀ products over the visited tiles.

Run ``python -m sim.benchmark`` (about a minute), or with ``--long`` for one 128K head too.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.accuracy import dropped_mass
from sim.geometry import Grid
from sim.scores import chunks, strips
from sim.skip_softmax import scan


def bare_products(q: NDArray[np.float32], k: NDArray[np.float32], grid: Grid) -> None:
    """Q·Kᵀ over the visited tiles and nothing else, by the strips that ``scan`` uses."""
    for rows in strips(grid):
        for tiles in chunks(grid, rows):
            np.matmul(k[0, tiles.start * grid.keys : tiles.stop * grid.keys], q[0, rows].T)


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, candidates in turn within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m sim.benchmark", description=__doc__)
    parser.add_argument("--length", type=int, default=32_768, help="tokens (default 32768)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="also time one head of 131072 tokens")
    options = parser.parse_args(arguments)

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, options.length, options.head_dim), dtype=np.float32)
    grid = Grid((64, 128), options.length, options.length, True)
    kept = scan(q, k, mass=True)

    def slider() -> None:
        assert kept.mass is not None
        dropped_mass(kept.mass, kept.decide(0.01)).max()

    seconds = interleaved(
        {
            "bare products": lambda: bare_products(q, k, grid),
            "scan": lambda: scan(q, k),
            "scan, mass": lambda: scan(q, k, mass=True),
            "slider move": slider,
            "curve": kept.curve,
        },
        options.rounds,
    )
    print(
        f"one head, {options.length} tokens, causal, D = {options.head_dim}, float32, tile 64 × 128"
    )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"NumPy {np.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    print(f"{'':14}{'median s':>9}{'× bare (median of rounds)':>27}")
    for name, times in seconds.items():
        ratio = statistics.median(
            t / b for t, b in zip(times, seconds["bare products"], strict=True)
        )
        print(f"{name:14}{statistics.median(times):9.3f}{ratio:27.2f}")
    if options.long:
        q, k = rng.standard_normal((2, 1, 131_072, options.head_dim), dtype=np.float32)
        start = time.perf_counter()
        scan(q, k, keep_row_max=False, progress=True)
        print(f"one head, 131072 tokens: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
