"""The kernel a calibration is for: its decision grid, visit order and vote.

What a threshold buys depends on which rows vote together, on which keys, in which order.  A
``Target`` names one such choice per kernel and phase; scores scanned for one target say nothing
exact about another.
Sources: TensorRT-LLM's ``fmha_v2`` and ``xqa`` kernels; Model Optimizer's skip-softmax calibrator.
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import ArrayLike, NDArray

from sim.decode import DecodeScan, scan_decode
from sim.skip_softmax import Scan, scan

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Target:
    """How one kernel decides in one phase.

    Parameters
    ----------
    name : {"ours", "nvidia", "model-optimizer"}
    phase : {"prefill", "decode"}
    tile : (int, int)
        Vote rows × keys of a tile; in decode the rows of one token, (1, keys).
    order : str
        Visit order.
    vote : {"head", "group"}
        Whether a head decides alone, or the heads of one GQA group together.
    seeded : bool
        Decode: whether every split starts from the larger maximum of the sink and newest tile.
    splits : int
        Decode: CTAs that share one request's KV cache.
    split_layout : {"interleaved", "contiguous"}
        Decode: which tiles each of them gets.
    description : str
        One sentence about the kernel.
    """

    name: str
    phase: str
    tile: tuple[int, int]
    order: str
    vote: str
    seeded: bool
    splits: int
    split_layout: str
    description: str

    def scan(
        self,
        q: NDArray,
        k: NDArray,
        *,
        softmax_scale: float | None = None,
        mass: bool = False,
        lengths: ArrayLike | None = None,
    ) -> Scan | DecodeScan:
        """Give the gap of every tile as this kernel would see it.

        Parameters
        ----------
        q : ndarray, shape [Hq, Lq, D] in prefill, [steps, Hq, D] in decode
        k : ndarray, shape [Hkv, Lk, D]
        softmax_scale : float, optional
            Default D ** −0.5.
        mass : bool
            Also keep the true softmax probability of every tile.
        lengths : array of int, shape [steps]
            Decode only, and needed there: keys of each step, its own included.

        Returns
        -------
        Scan or DecodeScan
            In prefill causal, and without the row maxima.

        Raises
        ------
        ValueError
            If shapes do not fit, values are not finite, or ``lengths`` is missing in decode or
            given in prefill.

        Examples
        --------
        >>> import numpy as np
        >>> q, k = np.random.default_rng(0).standard_normal((2, 2, 300, 64))
        >>> target("ours", "prefill").scan(q, k).gap.shape
        (2, 5, 3)
        >>> one_token = np.zeros((1, 4, 64))  # 4 query heads, 2 KV heads
        >>> target("ours", "decode").scan(one_token, k, lengths=[300]).gap.shape
        (1, 2, 5)
        """
        if self.phase == "prefill":
            if lengths is not None:
                raise ValueError("lengths is for decode: prefill takes as many keys as k has")
            return scan(
                q,
                k,
                tile=self.tile,
                order=self.order,
                softmax_scale=softmax_scale,
                mass=mass,
                keep_row_max=False,
            )
        if lengths is None:
            raise ValueError("decode needs lengths: the keys of each step, its own included")
        return scan_decode(
            q,
            k,
            lengths,
            keys=self.tile[1],
            order=self.order,
            vote=self.vote,
            splits=self.splits,
            split_layout=self.split_layout,
            seeded=self.seeded,
            softmax_scale=softmax_scale,
            mass=mass,
        )


def _prefill(name: str, rows: int, order: str, description: str) -> Target:
    return Target(name, "prefill", (rows, 128), order, "head", False, 1, "interleaved", description)


def _decode(name: str, keys: int, vote: str, seeded: bool, description: str) -> Target:
    return Target(
        name, "decode", (1, keys), "ascending", vote, seeded, 1, "interleaved", description
    )


TARGETS: dict[tuple[str, str], Target] = {
    (one.name, one.phase): one
    for one in (
        _prefill("ours", 64, "ends_first", "The prefill kernels of this package."),
        _prefill(
            "nvidia",
            64,
            "ascending",
            "NVIDIA's fmha_v2 on Hopper: fp16 and bf16, head_dim 72 to 128.",
        ),
        _prefill(
            "model-optimizer", 128, "ascending", "Model Optimizer's calibration, and its kernel."
        ),
        _decode(
            "ours",
            64,
            "group",
            True,
            "The decode kernel of this package; with its seed, splits hardly change decisions.",
        ),
        _decode("nvidia", 64, "group", False, "NVIDIA's XQA on Hopper, one CTA per KV head."),
        _decode(
            "model-optimizer", 128, "head", False, "Model Optimizer's calibration: heads alone."
        ),
    )
}
"""Every target, by name and phase."""


def target(name: str, phase: str) -> Target:
    """Give the target of this name and phase.

    Parameters
    ----------
    name : {"ours", "nvidia", "model-optimizer"}
    phase : {"prefill", "decode"}

    Returns
    -------
    Target

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> target("nvidia", "prefill").tile, target("nvidia", "prefill").order
    ((64, 128), 'ascending')
    """
    names = tuple(dict.fromkeys(one for one, _ in TARGETS))
    if name not in names:
        raise ValueError(f"target must be one of {', '.join(names)}, got {name!r}")
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    return TARGETS[name, phase]
