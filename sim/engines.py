"""Skip-softmax settings of inference engines: written from a calibration, and read back.

Five published forms, each of which :func:`export` writes and :mod:`sim.engine_settings` reads:

* ``tensorrt-llm``: ``sparse_attention_config`` of TensorRT-LLM's YAML options
  (``docs/source/features/sparse-attention.md``, 1.3.0rc, 2026);
* ``tensorrt-llm-checkpoint``: the same in a checkpoint's ``config.json``, with the formula that
  the engine evaluates itself and an ignore list (same page).  Read too: the older form of Model
  Optimizer 0.37, whose formula stands beside ``config_groups``;
* ``flashinfer``: the argument of ``trtllm_fmha_v2_prefill`` and of
  ``trtllm_batch_decode_with_kv_cache`` (docs.flashinfer.ai, 2026);
* ``vllm``: options of pull request vllm-project/vllm#42989 (May 2026, not merged when read);
* ``sglang``: environment variables of sgl-project/sglang#19089 (merged, February 2026).

All mean λ = threshold_scale_factor / KV length, and 0 or none is dense attention.  What a factor
skips depends on the kernel's decision grid, visit order and vote, so an export refuses a
calibration made on others: in prefill NVIDIA's grid depends on the model's head_dim
(:func:`sim.targets.hopper_prefill`), which gap maps state.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.calibration import Calibration
from sim.engine_settings import ARGUMENT, FORMULA, EngineError, Setting, read_setting
from sim.targets import PHASES, TARGETS, Target, hopper_prefill
from sim.threshold import from_scale_factor

__all__ = [
    "ENGINES",
    "At",
    "Engine",
    "EngineError",
    "Explanation",
    "PhaseMeaning",
    "Setting",
    "check_engine",
    "decision",
    "explain",
    "export",
    "head_dim_of",
    "hopper_line",
    "read_setting",
]


@dataclass(frozen=True)
class Engine:
    """An engine's form of the setting.

    Parameters
    ----------
    name : str
    published : str
        Kernel on whose decisions the factors that others publish in this form were made.
    note : str
        What its users should know; one sentence.
    """

    name: str
    published: str
    note: str


_HOPPER = (
    "on Hopper prefill decides on tiles of 64 × 256 at head_dim 32 to 64, and in FP8 to 128, and "
    "on Blackwell on other tiles; larger ones skip less at the same factor"
)
ENGINES = {
    one.name: one
    for one in (
        Engine("tensorrt-llm", "nvidia", f"Attention backend TRTLLM only; {_HOPPER}."),
        Engine(
            "tensorrt-llm-checkpoint",
            "model-optimizer",
            "Model Optimizer writes this form from its own grid, 128 × 128 and head by head, on "
            "which the same factor skips more in decode than in the engine's kernels.",
        ),
        Engine("flashinfer", "nvidia", f"Decode skips on Blackwell only; {_HOPPER}."),
        Engine("vllm", "nvidia", f"Pull request 42989, TRTLLM backends only; {_HOPPER}."),
        Engine("sglang", "nvidia", f"Backends trtllm_mha and trtllm_mla only; {_HOPPER}."),
    )
}
"""Every engine, by name."""

_FLASHINFER = {
    "prefill": "flashinfer.prefill.trtllm_fmha_v2_prefill",
    "decode": "flashinfer.decode.trtllm_batch_decode_with_kv_cache",
}


def export(
    calibration: Calibration,
    engine: str,
    target_sparsity: float | Mapping[str, float] = 0.5,
    *,
    ignore: Sequence[str] = (),
    extrapolate: bool = False,
) -> str:
    """Write a calibration in the form that an engine reads.

    Parameters
    ----------
    calibration : Calibration
    engine : {"tensorrt-llm", "tensorrt-llm-checkpoint", "flashinfer", "vllm", "sglang"}
    target_sparsity : float or dict
        One for both phases, or phase → target.  A phase without one stays dense.
    ignore : sequence of str
        ``tensorrt-llm-checkpoint`` only: patterns of layers that stay dense, such as
        ``model.layers.0.self_attn``.
    extrapolate : bool
        Allow targets outside the range that was fitted.

    Returns
    -------
    str
        Text to copy; all but the checkpoint's JSON begin with comments that say what it rests on.

    Raises
    ------
    ValueError
        If the engine is unknown, the calibration was made on another grid, order or vote than its
        kernel's, or a target lies outside the fitted range.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if ignore and engine != "tensorrt-llm-checkpoint":
        raise ValueError(f"ignore is for tensorrt-llm-checkpoint: {engine} has no such list")
    targets = calibration.targets(target_sparsity)
    for phase in targets:
        check_engine(engine, calibration.phases[phase].target, head_dim_of(calibration.card))
    factors = calibration.scale_factor(target_sparsity, extrapolate=extrapolate)
    factors = {phase: _rounded(factors.get(phase, 0.0)) for phase in PHASES}
    if engine == "tensorrt-llm-checkpoint":
        return _checkpoint(calibration, targets, ignore)
    lines = {
        "tensorrt-llm": _yaml,
        "flashinfer": _flashinfer,
        "vllm": _vllm,
        "sglang": _sglang,
    }[engine](factors)
    return "\n".join([*_comments(calibration, ENGINES[engine], targets), *lines]) + "\n"


def check_engine(engine: str, made: Target, head_dim: int | None = None) -> None:
    """Raise ValueError unless an engine's kernel decides as this target does.

    Parameters
    ----------
    engine : str
        One of ``ENGINES``.
    made : Target
        What a calibration is made on.
    head_dim : int, optional
        Of the model; without it any grid that NVIDIA's prefill kernel has at some head_dim will
        do.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    accepted = _accepted(ENGINES[engine], made.phase, head_dim)
    if not any(_decides_alike(made, one) for one in accepted.values()):
        kernel, one = next(iter(accepted.items()))
        where = f" at head_dim {head_dim}" if head_dim and made.phase == "prefill" else ""
        raise ValueError(
            f"{engine} decides {made.phase}{where} on {decision(one)}, but this calibration "
            f"is made on {decision(made)}: calibrate with kernel {kernel}"
        )


def _accepted(engine: Engine, phase: str, head_dim: int | None) -> dict[str, Target]:
    """Kernels on whose decisions a calibration for this engine may be made."""
    names = ["nvidia", "nvidia-256"] if head_dim is None else list(hopper_prefill(head_dim))
    if engine.published not in names and engine.published != "nvidia":
        names.append(engine.published)
    return {name: TARGETS[name, phase] for name in names}


def head_dim_of(card: Mapping[str, str]) -> int | None:
    """Read the model's head_dim from the card of gap maps; None if it does not say.

    Examples
    --------
    >>> head_dim_of({"head_dim": "64"}), head_dim_of({})
    (64, None)
    """
    said = card.get("head_dim", "")
    return int(said) if re.fullmatch(r"[1-9]\d{0,3}", said, re.ASCII) else None


def hopper_line(head_dim: int) -> str:
    """Say which kernel to calibrate for if a model is to run on Hopper; one sentence."""
    kernels = (f"{name} ({kind})" for name, kind in hopper_prefill(head_dim).items())
    return (
        f"At this model's head_dim, {head_dim}, NVIDIA's Hopper prefill decides as "
        f"{' or '.join(kernels)}."
    )


def _decides_alike(one: Target, other: Target) -> bool:
    return (one.tile, one.order, one.vote, one.seeded, one.splits) == (
        other.tile,
        other.order,
        other.vote,
        other.seeded,
        other.splits,
    )


def decision(made: Target) -> str:
    """Say how a kernel decides: grid, visit order and vote, for a sentence."""
    rows, keys = made.tile
    voters = "GQA groups voting together" if made.vote == "group" else "each head for itself"
    seed = ", from a seeded maximum" if made.seeded else ""
    return f"tiles of {rows} × {keys}, {made.order}, {voters}{seed}"


def _rounded(factor: float) -> float:
    return float(f"{factor:.6g}")


def _comments(calibration: Calibration, engine: Engine, targets: Mapping[str, float]) -> list[str]:
    lines = []
    for phase, wanted in targets.items():
        one = calibration.phases[phase]
        span = f"{one.lengths[0]} to {one.lengths[-1]} tokens of {len(one.texts)} text(s)"
        lines.append(f"# {phase}: {wanted:.0%} of tiles, calibrated on {span}")
        lines.append(f"#   {decision(one.target)}: {one.target.description}")
    model = "".join(c for c in calibration.card.get("model", "") if c.isprintable())
    made = f"# skip-softmax calibrate, {calibration.date}" + (f", model {model}" if model else "")
    head_dim = head_dim_of(calibration.card)
    if head_dim is not None:
        lines.append(f"# {hopper_line(head_dim)}")
    return [made, *lines, f"# {engine.note}"]


def _yaml(factors: Mapping[str, float]) -> list[str]:
    return [
        "sparse_attention_config:",
        "  algorithm: skip_softmax",
        "  threshold_scale_factor:",
        *(f"    {phase}: {factor!r}" for phase, factor in factors.items()),
    ]


def _checkpoint(
    calibration: Calibration, targets: Mapping[str, float], ignore: Sequence[str]
) -> str:
    formula: dict[str, Any] = {"formula": FORMULA}
    for phase in targets:
        one = calibration.phases[phase].fit
        formula[phase] = {"a": _rounded(one.a), "b": _rounded(one.b)}
    group = {
        "algorithm": "skip_softmax",
        "threshold_scale_factor": formula,
        "target_sparsity": dict(targets),
        "ignore": list(ignore),
    }
    block = {"sparse_attention_config": {"config_groups": {"group_0": group}}}
    return json.dumps(block, indent=2, ensure_ascii=False) + "\n"


def _flashinfer(factors: Mapping[str, float]) -> list[str]:
    return [
        f"{_FLASHINFER[phase]}(..., {ARGUMENT}={factor!r})" for phase, factor in factors.items()
    ]


def _vllm(factors: Mapping[str, float]) -> list[str]:
    return [
        " ".join(
            f"--attention-config.trtllm_skip_softmax_{phase}_threshold_scale_factor {factor!r}"
            for phase, factor in factors.items()
        )
    ]


def _sglang(factors: Mapping[str, float]) -> list[str]:
    return [
        f"export SGLANG_SKIP_SOFTMAX_{phase.upper()}_THRESHOLD_SCALE_FACTOR={factor!r}"
        for phase, factor in factors.items()
    ]


@dataclass(frozen=True)
class At:
    """What a factor means at one KV length.

    Parameters
    ----------
    length : int
    threshold : float
        λ = factor / length.
    above_one : bool
        Whether λ > 1, where a tile that holds the row's maximum may be skipped.
    """

    length: int
    threshold: float
    above_one: bool


@dataclass(frozen=True)
class PhaseMeaning:
    """What a setting means in one phase.

    Parameters
    ----------
    scale_factor : float or None
        None if the setting does not tell it.
    source : str
        Where the factor comes from.
    expected_sparsity : float or None
        For λ ≤ 1; None where nothing tells it.
    expectation : str
        What that rests on, or why there is none.
    at : tuple of At
        One for each length.
    """

    scale_factor: float | None
    source: str
    expected_sparsity: float | None
    expectation: str
    at: tuple[At, ...]


@dataclass(frozen=True)
class Explanation:
    """What a setting means: ``phases`` phase → PhaseMeaning, and ``warnings``, sentences."""

    setting: Setting
    phases: dict[str, PhaseMeaning]
    warnings: tuple[str, ...]


def explain(
    config: str | Mapping[str, Any] | Setting,
    lengths: Sequence[int],
    calibration: Calibration | None = None,
) -> Explanation:
    """Say what an engine's setting means at given KV lengths.

    Parameters
    ----------
    config : str, dict or Setting
        As in :func:`read_setting`.
    lengths : sequence of int
        KV lengths, at least 1.
    calibration : Calibration, optional
        Tells what sparsity to expect of a bare factor, and the formula that a bare target
        sparsity needs.  Should be of the same model.

    Returns
    -------
    Explanation

    Raises
    ------
    EngineError
        If the setting cannot be read.
    ValueError
        If a length is below 1.

    Examples
    --------
    >>> told = explain("export SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=10000", [8192])
    >>> told.phases["prefill"].at[0].above_one
    True
    """
    setting = config if isinstance(config, Setting) else read_setting(config)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be at least 1, and at least one, got {list(lengths)}")
    phases = {phase: _meaning(setting, phase, lengths, calibration) for phase in PHASES}
    return Explanation(setting, phases, tuple(_warnings(setting, phases, calibration)))


def _meaning(
    setting: Setting, phase: str, lengths: Sequence[int], calibration: Calibration | None
) -> PhaseMeaning:
    factor, source = setting.factor(phase), "stated"
    wanted = setting.target_sparsity.get(phase)
    if not setting.threshold_scale_factor:
        source = "not stated" if wanted is None else f"its formula at target {wanted:g}"
    fitted = calibration.phases.get(phase) if calibration is not None else None
    if factor is None and wanted is not None:
        source = f"stated as target {wanted:g}"
        if fitted is not None:
            try:
                factor = fitted.fit.scale_factor(wanted)
                source = f"the calibration's formula at target {wanted:g}"
            except ValueError as error:
                return PhaseMeaning(None, source, None, f"the calibration: {error}", ())
    at: tuple[At, ...] = ()
    if factor is not None:
        ratios = [float(from_scale_factor(factor, length)) for length in lengths]
        at = tuple(At(n, x, x > 1) for n, x in zip(lengths, ratios, strict=True))
    expected, rests_on = _expected(setting, phase, factor, calibration)
    return PhaseMeaning(factor, source, expected, rests_on, at)


def _expected(
    setting: Setting, phase: str, factor: float | None, calibration: Calibration | None
) -> tuple[float | None, str]:
    if factor is None:
        return None, "neither a factor nor a formula: the checkpoint's config.json holds it"
    if factor == 0:
        return 0.0, "factor 0 is dense attention"
    if calibration is not None and phase in calibration.phases:
        one = calibration.phases[phase].fit
        try:
            return one.sparsity(factor), f"the calibration, on {calibration.kernel}'s decisions"
        except ValueError:
            low, high = one.range
            return None, f"outside the {low:.1%} to {high:.1%} that the calibration covers"
    if phase in setting.formula:
        a, b = setting.formula[phase]
        expected = math.log(factor / a) / b
        if 0 <= expected <= 1:
            return expected, "its formula"
        return None, "its formula leaves 0 to 100 % there"
    return None, "give a calibration of the model to know"


def _warnings(
    setting: Setting, phases: Mapping[str, PhaseMeaning], calibration: Calibration | None
) -> list[str]:
    engine = ENGINES[setting.engine]
    warnings = []
    for phase, meaning in phases.items():
        if not meaning.scale_factor:
            continue
        theirs, ours = TARGETS[engine.published, phase], TARGETS["ours", phase]
        warnings.append(
            f"{phase}: a factor of this form is made for {decision(theirs)}; the kernels here "
            f"decide on {decision(ours)}, where it skips another share."
        )
        if calibration is not None and phase in calibration.phases:
            made = calibration.phases[phase].target
            kernels = _accepted(engine, phase, head_dim_of(calibration.card))
            kernels.pop("model-optimizer", None)  # a calibration's grid, no engine's
            if not any(_decides_alike(made, one) for one in kernels.values()):
                warnings.append(
                    f"{phase}: the expected sparsity is that of {calibration.kernel}'s decisions, "
                    f"on {decision(made)}, not that of the engine's kernel."
                )
        above = [str(one.length) for one in meaning.at if one.above_one]
        if above:
            warnings.append(
                f"{phase}: λ exceeds 1 at {', '.join(above)} tokens, and below "
                f"{math.ceil(meaning.scale_factor)}: a tile that holds a row's maximum may be "
                "skipped there, and answers go wrong."
            )
    if setting.threshold_scale_factor and setting.target_sparsity:
        warnings.append(
            "threshold_scale_factor and target_sparsity are both stated: the first wins."
        )
    if setting.ignore:
        warnings.append(f"Layers that stay dense: {', '.join(setting.ignore)}.")
    return [*warnings, engine.note]
