"""Gap maps whose calibration is known: every kernel, phase and length has a planted formula."""

from collections.abc import Callable

import numpy as np

from sim.gap_maps import GapMaps, Sample
from sim.targets import PHASES, targets_of

TILES = 2000


def gaps_of(a: float, b: float, length: int, tiles: int = TILES) -> np.ndarray:
    """Gaps that λ·length = a·exp(b·s) skips a share s of, in random order."""
    share = (np.arange(tiles) + 0.5) / tiles
    gaps = np.log(a) - np.log(length) + b * share
    gaps[-1] = np.inf
    return np.random.default_rng(0).permutation(gaps).astype(np.float32)


def maps_of(
    ln_a: Callable[..., float],
    b: float = 8.0,
    *,
    lengths: tuple[int, ...] = (4096, 16384),
    texts: tuple[str, ...] = ("one", "two", "three"),
    layers: tuple[int, ...] = (0, 7),
    phases: tuple[str, ...] = PHASES,
    card: dict[str, str] | None = None,
) -> GapMaps:
    """Maps with ``ln a = ln_a(kernel, phase, length, text, layer, row)``; 4 heads, 2 KV heads."""
    samples = [
        Sample(f"{text}-{length}-{phase}", text, "none", length, phase)
        for phase in phases
        for text in texts
        for length in lengths
    ]
    arrays = {}
    for sample in samples:
        for target in targets_of(sample.phase):
            rows = 2 if target.vote == "group" else 4
            of = target.name, sample.phase, sample.length, sample.text
            gap = np.array(
                [
                    [
                        gaps_of(np.exp(ln_a(*of, layer, row)), b, sample.length)
                        for row in range(rows)
                    ]
                    for layer in layers
                ],
                np.float32,
            )
            arrays[sample.name, target.name] = gap, np.full_like(gap, 1 / TILES)
    return GapMaps(
        tuple(samples),
        layers,
        ("0", "1", "2", "3"),
        ("0", "1"),
        targets_of(*phases),
        None,
        {"model": "planted"} if card is None else card,
        arrays,
    )
