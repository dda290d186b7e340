"""The published forms of an engine's skip-softmax setting, read.

A setting may come from anybody and be of any version, so whatever is not one of the forms that
:mod:`sim.engines` names is refused in one sentence, not guessed at.  Only the part of YAML that
the published form needs is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sim.targets import PHASES

FORMULA = "a * exp(b * target_sparsity)"
ALGORITHMS = ("skip_softmax", "softmax_skip")
"""Names of this algorithm in a checkpoint: today's, and Model Optimizer 0.37's."""

ARGUMENT = "skip_softmax_threshold_scale_factor"
MAX_CHARACTERS = 1_000_000


class EngineError(ValueError):
    """A setting that cannot be read, or is not of this algorithm; the message is one sentence."""


@dataclass(frozen=True)
class Setting:
    """An engine's setting as read.

    Parameters
    ----------
    engine : str
        Whose form it has.
    threshold_scale_factor : dict
        Phase → factor, where it is stated; 0 is dense.
    target_sparsity : dict
        Phase → target, where it is stated.
    formula : dict
        Phase → (a, b), where it is stated.
    ignore : tuple of str
        Patterns of layers that stay dense.
    """

    engine: str
    threshold_scale_factor: dict[str, float]
    target_sparsity: dict[str, float]
    formula: dict[str, tuple[float, float]]
    ignore: tuple[str, ...] = ()

    def factor(self, phase: str) -> float | None:
        """Give the factor that the engine uses in a phase, or None where it cannot be told.

        As in TensorRT-LLM, a stated factor comes before a target; a phase with neither is dense.
        """
        if self.threshold_scale_factor:
            return self.threshold_scale_factor.get(phase, 0.0)
        wanted = self.target_sparsity.get(phase)
        if wanted is None:
            return 0.0 if self.target_sparsity or not self.formula else None
        if phase not in self.formula:
            return None
        a, b = self.formula[phase]
        return a * math.exp(b * wanted)  # finite: a and b were checked


def read_setting(config: str | Mapping[str, Any]) -> Setting:
    """Read a setting in any of the five forms.

    Parameters
    ----------
    config : str or dict
        Text of a YAML file, a ``config.json``, a FlashInfer call, vLLM's options or SGLang's
        environment; or the parsed ``config.json``.

    Returns
    -------
    Setting

    Raises
    ------
    EngineError
        If the form is none of them, is of another algorithm, or a value is out of range.

    Examples
    --------
    >>> one = read_setting("export SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR=500")
    >>> one.engine, one.factor("decode"), one.factor("prefill")
    ('sglang', 500.0, 0.0)
    """
    if isinstance(config, Mapping):
        return _read_json(config)
    text = config.removeprefix("\ufeff")
    if len(text) > MAX_CHARACTERS:
        raise EngineError(f"a setting has at most {MAX_CHARACTERS} characters")
    if text.lstrip().startswith("{"):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            raise EngineError("the setting begins like JSON, but is not") from None
        return _read_json(parsed)
    bare = "\n".join(_without_comment(line) for line in text.splitlines())
    if "SGLANG_SKIP_SOFTMAX_" in bare:
        return _read_lines("sglang", bare, _SGLANG)
    if "trtllm_skip_softmax_" in bare:
        return _read_lines("vllm", bare, _VLLM)
    if re.search(r"^sparse_attention_config\s*:", bare, re.MULTILINE):
        return _read_yaml(bare)
    if ARGUMENT in bare:
        return _read_lines("flashinfer", bare, _FLASHINFER_CALL)
    raise EngineError(
        "no skip-softmax setting found: a setting is TensorRT-LLM's YAML or config.json, a "
        "FlashInfer call, vLLM's options or SGLang's environment variables"
    )


_NUMBER = r"(?P<factor>[^\s,;)}'\"\\]+)"
_SGLANG = re.compile(
    rf"SGLANG_SKIP_SOFTMAX_(?P<phase>\w+?)_THRESHOLD_SCALE_FACTOR\s*[=:]\s*['\"]?{_NUMBER}"
)
_VLLM = re.compile(
    rf"trtllm_skip_softmax_(?P<phase>\w+?)_threshold_scale_factor['\"]?\s*[=:\s]\s*['\"]?{_NUMBER}"
)
_CALL = r"(?:prefill|context|decode)[\w.]*\s*\("
_FLASHINFER_CALL = re.compile(
    rf"(?P<phase>prefill|context|decode)[\w.]*\s*\((?:(?!{_CALL}).)*?{ARGUMENT}\s*=\s*{_NUMBER}",
    re.DOTALL,
)


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*$", "", line)


def _read_lines(engine: str, text: str, pattern: re.Pattern[str]) -> Setting:
    factors: dict[str, float] = {}
    for found in pattern.finditer(text):
        phase = found["phase"].lower()
        phase = "prefill" if phase == "context" else phase
        if phase not in PHASES:
            raise EngineError(f"{found[0][:80]!r} names no phase: prefill or decode")
        if phase in factors:
            raise EngineError(f"the {phase} factor is stated twice")
        factors[phase] = 0.0 if found["factor"] == "None" else _factor(phase, found["factor"])
    if not factors:
        raise EngineError(f"this looks like a setting of {engine}, but states no factor")
    return Setting(engine, factors, {}, {})


def _factor(phase: str, value: object) -> float:
    return _number(f"the {phase} threshold_scale_factor", value, 0, math.inf)


def _number(what: str, value: object, low: float, high: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        limits = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
        raise EngineError(f"{what} must be a number {limits}, got {str(value)[:60]!r}")
    return number


def _by_phase(name: str, value: object, high: float) -> dict[str, float]:
    """Read a number for both phases, or phase → number."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return dict.fromkeys(PHASES, _number(name, value, 0, high))
    for phase in value:
        if phase not in PHASES:
            raise EngineError(f"{name} must name prefill or decode, got {str(phase)[:60]!r}")
    return {
        phase: _number(f"the {phase} {name}", value[phase], 0, high)
        for phase in PHASES
        if phase in value
    }


def _read_yaml(text: str) -> Setting:
    block = _yaml_block(text)
    if not isinstance(block, dict):
        raise EngineError("sparse_attention_config must be a mapping")
    _check_algorithm(block.get("algorithm"))
    known = {"algorithm", "threshold_scale_factor", "target_sparsity"}
    if unknown := set(block) - known:
        raise EngineError(f"sparse_attention_config has no field {min(unknown)[:60]!r}")
    return Setting(
        "tensorrt-llm",
        _by_phase("threshold_scale_factor", block.get("threshold_scale_factor"), math.inf),
        _by_phase("target_sparsity", block.get("target_sparsity"), 1),
        {},
    )


def _yaml_block(text: str) -> Any:
    """Value of ``sparse_attention_config``: mappings by indentation or in braces, and scalars.

    The published form needs no more of YAML; anything else is refused, not guessed at.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("sparse_attention_config")]
    if len(starts) != 1:
        raise EngineError("sparse_attention_config is stated twice")
    block = [lines[starts[0]]]
    for line in lines[starts[0] + 1 :]:
        if not line.startswith((" ", "\t")):
            break
        block.append(line)
    mapping, rest = _mapping(block, 0)
    if rest:
        raise EngineError(f"the indentation of {rest[0].strip()[:60]!r} does not fit")
    return mapping["sparse_attention_config"]


def _mapping(lines: list[str], indent: int) -> tuple[dict[str, Any], list[str]]:
    """Read the lines of one indentation; returns the mapping and the lines after it."""
    mapping: dict[str, Any] = {}
    while lines:
        found = re.fullmatch(r"( *)([\w]+) *:(?: +(.*))?", lines[0])
        if found is None:
            raise EngineError(f"YAML line {lines[0].strip()[:60]!r} is not of the published form")
        if len(found[1]) != indent:
            break
        name, value, lines = found[2], found[3], lines[1:]
        if name in mapping:
            raise EngineError(f"{name} is stated twice")
        if value:
            mapping[name] = _scalar(value)
            continue
        deeper = len(lines[0]) - len(lines[0].lstrip(" ")) if lines else 0
        mapping[name] = None
        if deeper > indent:
            mapping[name], lines = _mapping(lines, deeper)
    return mapping, lines


def _scalar(text: str) -> Any:
    if text.startswith("{") and text.endswith("}"):
        pairs = [pair.partition(":")[::2] for pair in text[1:-1].split(",") if pair.strip()]
        return {key.strip(" '\""): _scalar(value.strip()) for key, value in pairs}
    if text in ("null", "~", ""):
        return None
    return text.strip("'\"")


def _check_algorithm(algorithm: object) -> None:
    if algorithm not in ALGORITHMS:
        raise EngineError(
            f"this setting is of algorithm {str(algorithm)[:60]!r}, and skip_softmax is explained"
        )


def _read_json(body: object) -> Setting:
    if not isinstance(body, Mapping):
        raise EngineError("a config.json must be a JSON object")
    if any(str(key).startswith("trtllm_skip_softmax_") for key in body):
        return _read_lines("vllm", json.dumps(dict(body)), _VLLM)
    block = body.get("sparse_attention_config", body)
    if not isinstance(block, Mapping):
        raise EngineError("sparse_attention_config must be a JSON object")
    groups = block.get("config_groups")
    if groups is None and not {"threshold_scale_factor", "target_sparsity"} & set(block):
        raise EngineError("this JSON has no sparse_attention_config, so it sets no skip-softmax")
    if groups is not None and not isinstance(groups, Mapping):
        raise EngineError("config_groups must be a JSON object")
    found = [block] if groups is None else [g for g in groups.values() if _is_ours(g)]
    if groups is not None and not found:
        names = [_algorithm(group) for group in groups.values()]
        _check_algorithm(names[0] if names else None)
    if len(found) > 1:
        raise EngineError(f"config_groups holds {len(found)} skip_softmax groups, and one is read")
    _check_algorithm(_algorithm(found[0]))
    group = {**{name: block[name] for name in block if name != "config_groups"}, **found[0]}
    stated, formula = _formula(group.get("threshold_scale_factor"))
    ignore = group.get("ignore", [])
    if not isinstance(ignore, list) or any(not isinstance(one, str) for one in ignore):
        raise EngineError(f"ignore must be a list of layer patterns, got {str(ignore)[:60]!r}")
    return Setting(
        "tensorrt-llm-checkpoint",
        stated,
        _by_phase("target_sparsity", group.get("target_sparsity"), 1),
        formula,
        tuple(ignore),
    )


def _algorithm(group: object) -> object:
    if not isinstance(group, Mapping):
        return None
    return group.get("algorithm", group.get("sparse_algo"))


def _is_ours(group: object) -> bool:
    return _algorithm(group) in ALGORITHMS


def _formula(value: object) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Read plain factors, or the coefficients of the formula."""
    if not isinstance(value, Mapping) or "formula" not in value:
        return _by_phase("threshold_scale_factor", value, math.inf), {}
    if re.sub(r"\s", "", str(value["formula"])) != re.sub(r"\s", "", FORMULA):
        raise EngineError(f"the formula must be {FORMULA!r}, got {str(value['formula'])[:60]!r}")
    shared = value.get("coefficients")
    read = {}
    for phase in PHASES:
        one = value.get(phase, shared)
        if one is None:
            continue
        if not isinstance(one, Mapping) or not {"a", "b"} <= set(one):
            raise EngineError(f"the {phase} formula needs coefficients a and b")
        a = _number(f"the {phase} coefficient a", one["a"], 0, 1e30)
        b = _number(f"the {phase} coefficient b", one["b"], 0, 100)
        if a == 0 or b == 0:
            raise EngineError(f"the {phase} coefficients a and b must be above 0")
        read[phase] = (a, b)
    if not read:
        raise EngineError("the formula has no coefficients of prefill or decode")
    return {}, read
