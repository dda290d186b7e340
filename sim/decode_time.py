"""Time of decode from the bytes that it moves, beside what others have measured.

The model is one division: decode is bound by memory, so a call takes bytes ÷ bandwidth, and
skipping makes it faster by dense bytes ÷ bytes moved, below 2 because all of K is read.  It knows
nothing of launches, of votes, or of V loads that begin late.  How far that is from kernels is not
guessed: ``python -m sim.decode_time`` prints every published row with its residual.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

from sim.decode import DecodeBytes
from sim.hardware import GPUS

BLOG = "TensorRT-LLM tech blog 16 (Skip Softmax Attention), kernel baselines"
ARTIFACT = "BLASST artifact (blasst-ae-mlsys26), hopper_decode"
XQA = "TensorRT-LLM, README of the xqa kernels"
PAPER = "BLASST, arXiv 2512.12087v1, Table 4"

HEAD_DIM = 128


class Dense(NamedTuple):
    """A published decode call with nothing skipped: shape, element bytes, microseconds."""

    gpu: str
    element_bytes: int
    batch: int
    kv_heads: int
    length: int
    microseconds: float
    source: str = BLOG

    @property
    def label(self) -> str:
        """Name of the row."""
        dtype = "BF16" if self.element_bytes == 2 else "FP8"
        return f"{self.gpu} {dtype}, batch {self.batch}, {self.length // 1024}K"

    @property
    def model(self) -> float:
        """Microseconds that K and V take at the data sheet's bandwidth."""
        keys = self.batch * self.kv_heads * self.length
        return 1e6 * seconds(2 * self.element_bytes * HEAD_DIM * keys, GPUS[self.gpu].bandwidth)


class Skipping(NamedTuple):
    """A published speed-up of decode at a measured sparsity, over the same kernel's dense build."""

    label: str
    sparsity: float
    speed_up: float
    source: str

    @property
    def model(self) -> float:
        """Speed-up if nothing but the bytes of K and of kept V counts."""
        return 2 / (2 - self.sparsity)


DENSE = [
    Dense(gpu, element_bytes, 64, 4, length, microseconds)
    for gpu, element_bytes, length, microseconds in (
        ("H200", 2, 16384, 498),
        ("H200", 2, 65536, 1962),
        ("H200", 1, 16384, 266),
        ("H200", 1, 65536, 1045),
        ("B200", 2, 16384, 303),
        ("B200", 2, 65536, 1209),
        ("B200", 1, 16384, 196),
        ("B200", 1, 65536, 755),
    )
]
"""64 query and 4 KV heads, head_dim 128."""

_SKIPPING = {
    ("H200 BF16, batch 64, 16K", ARTIFACT): [
        (0, 0.998),
        (2.67, 1.011),
        (9.50, 1.041),
        (19.65, 1.089),
        (31.24, 1.150),
        (42.25, 1.212),
        (51.63, 1.262),
        (66.17, 1.347),
        (79.26, 1.431),
        (89.39, 1.495),
        (98.0, 1.549),
    ],
    ("H200 BF16, batch 64, 64K", ARTIFACT): [
        (0, 1.014),
        (22.90, 1.130),
        (40.02, 1.228),
        (54.59, 1.318),
        (65.64, 1.389),
        (73.81, 1.444),
        (79.79, 1.486),
        (93.2, 1.583),
        (96.9, 1.610),
        (99.5, 1.627),
    ],
    ("H200 FP8, batch 64, 16K", ARTIFACT): [
        (0, 0.943),
        (36.08, 1.090),
        (51.60, 1.166),
        (65.56, 1.246),
        (79.11, 1.328),
    ],
    ("H200 FP8, batch 64, 64K", ARTIFACT): [
        (0, 0.952),
        (33.68, 1.156),
        (50.33, 1.218),
        (69.25, 1.328),
        (79.73, 1.385),
        (93.13, 1.466),
    ],
    ("Hopper BF16, example", XQA): [(59.07, 1.378), (98.49, 1.845)],
    ("Hopper FP8, example", XQA): [(59.13, 1.329)],
    ("B200, batch 148, 32K", PAPER): [
        (0, 0.98),
        (36.91, 1.18),
        (46.68, 1.25),
        (61.23, 1.34),
        (73.15, 1.48),
        (82.62, 1.64),
        (87.01, 1.71),
        (91.99, 1.79),
    ],
}

SKIPPING = [
    Skipping(label, per_cent / 100, speed_up, source)
    for (label, source), rows in _SKIPPING.items()
    for per_cent, speed_up in rows
]
"""As published: sparsity measured by the kernel, mostly on random data, so speed alone."""


def seconds(moved: DecodeBytes | float, bandwidth: float) -> float:
    """Time of moving bytes.

    Parameters
    ----------
    moved : DecodeBytes or float
        Bytes.
    bandwidth : float
        Bytes a second: a data sheet's peak, or what was measured.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    ValueError
        If the bandwidth is not above 0.

    Examples
    --------
    >>> f"{1e6 * seconds(2 * 2**30, GPUS['H200'].bandwidth):.0f} µs"
    '447 µs'
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0 bytes a second, got {bandwidth}")
    return (moved.total if isinstance(moved, DecodeBytes) else moved) / bandwidth


def expected_speed_up(moved: DecodeBytes) -> float:
    """How many times faster than dense, if nothing but bytes counts.

    Parameters
    ----------
    moved : DecodeBytes

    Returns
    -------
    float
        1 … below 2 where K and V are as wide.

    Examples
    --------
    >>> half = DecodeBytes(k=100, v=50, dense_v=100, page_table=0, partials=0)
    >>> round(expected_speed_up(half), 3)
    1.333
    """
    return moved.dense / moved.total


def reached(rows: Iterable[Skipping] = SKIPPING) -> tuple[float, float]:
    """Least and largest part of the model's gain that published kernels had.

    Rows with a gain of 10 % or more by the model count.

    Returns
    -------
    (float, float)
        (measured speed-up − 1) ÷ (model's speed-up − 1).

    Examples
    --------
    >>> least, most = reached()
    >>> 0 < least < most
    True
    """
    parts = [(row.speed_up - 1) / (row.model - 1) for row in rows if row.model >= 1.1]
    return min(parts), max(parts)


def main(arguments: list[str] | None = None) -> None:
    """Print every published row beside the model."""
    parser = argparse.ArgumentParser(prog="python -m sim.decode_time", description=__doc__)
    parser.parse_args(arguments)
    print(f"Dense decode: bytes of K and V ÷ data sheet. Source: {BLOG}.")
    for gpu in GPUS.values():
        print(f"  {gpu.name}: {gpu.bandwidth / 1e12:g} TB/s ({gpu.source})")
    print(f"{'':26}{'measured µs':>12}{'model µs':>10}{'residual':>10}")
    for dense in DENSE:
        residual = dense.microseconds / dense.model - 1
        print(f"{dense.label:26}{dense.microseconds:12.0f}{dense.model:10.0f}{residual:+10.1%}")
    print("\nSkipping: speed-up over dense, 2 ÷ (2 − sparsity) if only bytes count.")
    print(f"{'':26}{'sparsity':>9}{'measured':>10}{'model':>8}{'residual':>10}")
    source = ""
    for row in SKIPPING:
        if row.source != source:
            source = row.source
            print(source)
        residual = row.speed_up - row.model
        print(
            f"{row.label:26}{row.sparsity:9.1%}{row.speed_up:10.3f}{row.model:8.3f}{residual:+10.3f}"
        )
    least, most = reached()
    print(
        f"\nOf the model's gain, where that is 10 % or more, kernels had {least:.0%} to {most:.0%}."
    )


if __name__ == "__main__":
    main()
