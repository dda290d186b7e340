"""The kernel a calibration is for: its decision grid, visit order and vote.

What a threshold buys depends on which rows vote together, on which keys, in which order.  A
``Target`` names one such choice per kernel and phase; scores scanned for one target say nothing
exact about another.
Sources: TensorRT-LLM's ``fmha_v2`` (``STEP_KV`` of ``generator_utils.py``) and ``xqa`` kernels;
Model Optimizer's skip-softmax calibrator.
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
    name : {"ours", "nvidia", "nvidia-256", "model-optimizer"}
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


def _prefill(name: str, tile: tuple[int, int], order: str, description: str) -> Target:
    return Target(name, "prefill", tile, order, "head", False, 1, "interleaved", description)


def _decode(name: str, keys: int, vote: str, seeded: bool, description: str) -> Target:
    return Target(
        name, "decode", (1, keys), "ascending", vote, seeded, 1, "interleaved", description
    )


_XQA = _decode("nvidia", 64, "group", False, "NVIDIA's XQA on Hopper, one CTA per KV head.")

TARGETS: dict[tuple[str, str], Target] = {
    ("ours", "prefill"): _prefill(
        "ours", (64, 128), "ends_first", "The prefill kernels of this package."
    ),
    ("nvidia", "prefill"): _prefill(
        "nvidia",
        (64, 128),
        "ascending",
        "NVIDIA's fmha_v2 on Hopper: fp16 and bf16, head_dim 72 to 128.",
    ),
    ("nvidia-256", "prefill"): _prefill(
        "nvidia-256",
        (64, 256),
        "ascending",
        "NVIDIA's fmha_v2 on Hopper: fp16 and bf16, head_dim 32 to 64; FP8, head_dim 32 to 128.",
    ),
    ("model-optimizer", "prefill"): _prefill(
        "model-optimizer",
        (128, 128),
        "ascending",
        "Model Optimizer's calibration, and its kernel.",
    ),
    ("ours", "decode"): _decode(
        "ours",
        64,
        "group",
        True,
        "The decode kernel of this package; with its seed, splits hardly change decisions.",
    ),
    ("nvidia", "decode"): _XQA,
    ("nvidia-256", "decode"): _XQA,
    ("model-optimizer", "decode"): _decode(
        "model-optimizer", 128, "head", False, "Model Optimizer's calibration: heads alone."
    ),
}
"""The target of every kernel, by the kernel's name and phase; two kernels may share one."""

KERNELS = tuple(dict.fromkeys(name for name, _ in TARGETS))
"""Names of the kernels."""


def targets_of(*phases: str) -> tuple[Target, ...]:
    """Give the targets of these phases, each once.

    Examples
    --------
    >>> [one.name for one in targets_of("decode")]
    ['ours', 'nvidia', 'model-optimizer']
    """
    return tuple(dict.fromkeys(one for one in TARGETS.values() if one.phase in phases))


def hopper_prefill(head_dim: int) -> dict[str, str]:
    """Say as which kernels NVIDIA's Hopper prefill decides at a head_dim, and in which precision.

    Parameters
    ----------
    head_dim : int
        Of Q and K.

    Returns
    -------
    dict
        Kernel → precisions.  fp16 and bf16 with head_dim 160 to 256 in V too decide on 64 × 64,
        which no target has.

    Examples
    --------
    >>> hopper_prefill(64)
    {'nvidia-256': 'fp16, bf16 and FP8'}
    >>> hopper_prefill(128)
    {'nvidia': 'fp16 and bf16', 'nvidia-256': 'FP8'}
    """
    if head_dim <= 64:
        return {"nvidia-256": "fp16, bf16 and FP8"}
    if head_dim <= 128:
        return {"nvidia": "fp16 and bf16", "nvidia-256": "FP8"}
    return {"nvidia": "FP8, and fp16 and bf16 where V has head_dim 128"}


def target(name: str, phase: str) -> Target:
    """Give the target of this name and phase.

    Parameters
    ----------
    name : {"ours", "nvidia", "nvidia-256", "model-optimizer"}
        Of the kernel.
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
    if name not in KERNELS:
        raise ValueError(f"target must be one of {', '.join(KERNELS)}, got {name!r}")
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    return TARGETS[name, phase]
