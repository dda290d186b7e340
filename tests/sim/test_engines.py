"""Engines' settings: published forms, round trips, refusals, and what they mean."""

import ast
import json
import math
import shlex
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import maps_of

from sim.calibration import Calibration, calibrate
from sim.engines import (
    ENGINES,
    EngineError,
    explain,
    export,
    read_setting,
)
from sim.targets import TARGETS

TARGET = {"prefill": 0.5, "decode": 0.3}


def ln_a(name: str, phase: str, *_: object) -> float:
    return float(np.log(7.92 if phase == "prefill" else 0.1196))


@pytest.fixture(scope="module")
def nvidia() -> Calibration:
    return calibrate(maps_of(ln_a, b=9.0), "nvidia")


@pytest.fixture(scope="module")
def ours() -> Calibration:
    return calibrate(maps_of(ln_a, b=9.0, phases=("prefill", "decode")), "ours")


# Published forms, as their documentation prints them

YAML = """\
sparse_attention_config:
  algorithm: skip_softmax
  threshold_scale_factor:
    prefill: 1000.0
    decode: 500.0
"""
CHECKPOINT = """\
{"sparse_attention_config": {"config_groups": {"group_0": {
  "algorithm": "skip_softmax",
  "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)",
     "prefill": {"a": 100.0, "b": 5.0}, "decode": {"a": 0.05, "b": 10.0}},
  "target_sparsity": {"prefill": 0.5, "decode": 0.3},
  "ignore": ["model.layers.0.self_attn"]}}}}
"""
OLD_CHECKPOINT = """\
{"sparse_attention_config": {
  "config_groups": {"group_0": {"sparse_algo": "softmax_skip", "targets": ["LlamaAttention"]}},
  "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)",
    "prefill": {"a": 7.93, "b": 8.61}, "decode": {"a": 0.12, "b": 9.85}},
  "producer": {"name": "modelopt", "version": "0.37.0"}}}
"""
VLLM = """\
vllm serve <model> \\
  --attention-config.trtllm_skip_softmax_prefill_threshold_scale_factor 1000.0 \\
  --attention-config.trtllm_skip_softmax_decode_threshold_scale_factor 500.0
"""
VLLM_JSON = """\
vllm serve <model> --attention-config '{"trtllm_skip_softmax_prefill_threshold_scale_factor": \
1000.0, "trtllm_skip_softmax_decode_threshold_scale_factor": 500.0}'
"""
SGLANG = """\
SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=1000 \\
SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR=500 python -m sglang.launch_server
"""
FLASHINFER = """\
out = flashinfer.prefill.trtllm_batch_context_with_kv_cache(
    query, kv_cache, torch.empty(128), skip_softmax_threshold_scale_factor=1000.0)
out = trtllm_batch_decode_with_kv_cache(query, skip_softmax_threshold_scale_factor = 500.0, )
"""


@pytest.mark.parametrize(
    ("text", "engine"),
    [
        (YAML, "tensorrt-llm"),
        (f"kv_cache_config:\n  - {{odd: [1]}}\n{YAML}max_batch_size: 4\n", "tensorrt-llm"),
        ("\ufeff" + YAML.replace("\n", "\r\n"), "tensorrt-llm"),
        (
            "# ours\nsparse_attention_config:\n    algorithm: 'skip_softmax'  # BLASST\n\n"
            "    threshold_scale_factor: {prefill: 1e3, decode: 5e2}\n",
            "tensorrt-llm",
        ),
        (VLLM, "vllm"),
        (VLLM_JSON, "vllm"),
        (VLLM.replace("factor ", "factor="), "vllm"),
        (VLLM_JSON[VLLM_JSON.index("{") : -2], "vllm"),
        (SGLANG, "sglang"),
        (SGLANG.replace("=1000", ": '1000'"), "sglang"),
        (FLASHINFER, "flashinfer"),
    ],
)
def test_published_forms(text: str, engine: str) -> None:
    one = read_setting(text)
    assert one.engine == engine
    assert one.threshold_scale_factor == {"prefill": 1000, "decode": 500}
    assert (one.factor("prefill"), one.factor("decode")) == (1000, 500)


def test_published_checkpoint() -> None:
    for config in (CHECKPOINT, json.loads(CHECKPOINT)):
        one = read_setting(config)
        assert one.engine == "tensorrt-llm-checkpoint"
        assert one.formula == {"prefill": (100, 5), "decode": (0.05, 10)}
        assert one.target_sparsity == TARGET
        assert one.ignore == ("model.layers.0.self_attn",)
        assert one.factor("prefill") == pytest.approx(100 * math.exp(2.5))
        assert one.factor("decode") == pytest.approx(0.05 * math.exp(3))


def test_older_checkpoint() -> None:
    one = read_setting(OLD_CHECKPOINT)
    assert one.formula == {"prefill": (7.93, 8.61), "decode": (0.12, 9.85)}
    assert one.target_sparsity == {}
    assert one.factor("prefill") is None


def test_rules_of_the_engine() -> None:
    both = YAML + "  target_sparsity: 0.9\n"
    assert read_setting(both).factor("prefill") == 1000  # the factor comes first
    one = read_setting("sparse_attention_config:\n  algorithm: skip_softmax\n")
    assert one.factor("prefill") == one.factor("decode") == 0
    scalar = read_setting(YAML.split("threshold")[0] + "threshold_scale_factor: 7\n")
    assert scalar.threshold_scale_factor == {"prefill": 7, "decode": 7}
    half = read_setting(YAML.replace("    decode: 500.0\n", ""))
    assert half.factor("decode") == 0
    wanted = read_setting(YAML.split("threshold")[0] + "target_sparsity: {prefill: 0.5}\n")
    assert wanted.factor("prefill") is None
    assert wanted.factor("decode") == 0
    nothing = FLASHINFER.replace("=1000.0", "=None")
    assert read_setting(nothing).factor("prefill") == 0
    shared = json.loads(CHECKPOINT)
    group = shared["sparse_attention_config"]["config_groups"]["group_0"]
    group["threshold_scale_factor"] = {
        "formula": "a*exp(b*target_sparsity)",
        "coefficients": {"a": 2, "b": 3},
    }
    assert read_setting(shared).formula == {"prefill": (2, 3), "decode": (2, 3)}


def test_a_factor_goes_to_the_call_it_stands_in() -> None:
    text = "prefill(q)\ndecode(q, skip_softmax_threshold_scale_factor=5)"
    assert read_setting(text).threshold_scale_factor == {"decode": 5}


def edited(path: str, value: Any) -> dict[str, Any]:
    body = json.loads(CHECKPOINT)
    inner = body
    *keys, last = path.split("/")
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return body


GROUP = "sparse_attention_config/config_groups/group_0"
FACTOR = f"{GROUP}/threshold_scale_factor"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "no skip-softmax setting found"),
        ("max_batch_size: 4\n", "no skip-softmax setting found"),
        ("{", "begins like JSON"),
        ("[" * 9, "no skip-softmax"),
        ('{"a": ' * 100_000, "begins like JSON"),
        ("#" * 1_000_001, "at most 1000000 characters"),
        ({"model_type": "llama"}, "has no sparse_attention_config"),
        ({"sparse_attention_config": 3}, "must be a JSON object"),
        (YAML.replace("skip_softmax", "rocket"), "algorithm 'rocket'"),
        (YAML.replace("  algorithm: skip_softmax\n", ""), "algorithm 'None'"),
        (edited(f"{GROUP}/algorithm", "dsa"), "algorithm 'dsa'"),
        (edited("sparse_attention_config/config_groups", {}), "algorithm 'None'"),
        (
            edited(
                "sparse_attention_config/config_groups",
                {"a": {"algorithm": "skip_softmax"}, "b": {"sparse_algo": "softmax_skip"}},
            ),
            "holds 2 skip_softmax groups",
        ),
        (edited(f"{FACTOR}/formula", "a * b ** target_sparsity"), "the formula must be 'a"),
        (edited(f"{FACTOR}/prefill", {"a": 1}), "coefficients a and b"),
        (edited(f"{FACTOR}/prefill/a", -1), "coefficient a must be a number between 0"),
        (edited(f"{FACTOR}/prefill/b", 0), "above 0"),
        (edited(f"{FACTOR}/decode/b", "many"), "decode coefficient b"),
        (edited(FACTOR, {"formula": "a * exp(b * target_sparsity)"}), "no coefficients"),
        (edited(f"{GROUP}/target_sparsity", 1.5), "between 0 and 1, got '1.5'"),
        (edited(f"{GROUP}/target_sparsity", {"both": 0.5}), "prefill or decode, got 'both'"),
        (edited(f"{GROUP}/ignore", "model.layers.0"), "ignore must be a list"),
        (YAML.replace("1000.0", "-1"), "of at least 0, got '-1'"),
        (YAML.replace("1000.0", "nan"), "must be a number"),
        (YAML.replace("1000.0", "true"), "must be a number"),
        (YAML.replace("decode:", "prefill:"), "prefill is stated twice"),
        (YAML + YAML, "stated twice"),
        (YAML.replace("    prefill", "\tprefill"), "not of the published form"),
        (YAML.replace("    decode", "   decode"), "indentation"),
        (YAML.replace("    prefill: 1000.0", "    - 1000.0"), "not of the published form"),
        (YAML.replace("threshold_scale_factor", "threshold"), "no field 'threshold'"),
        (SGLANG.replace("DECODE", "PREFILL"), "stated twice"),
        (SGLANG.replace("DECODE", "TRAIN"), "names no phase"),
        (SGLANG.replace("=500", "=lots"), "decode threshold_scale_factor must be a number"),
        (VLLM.replace("decode_", "encode_"), "names no phase"),
        ("skip_softmax_threshold_scale_factor=5", "states no factor"),
    ],
)
def test_refused_settings(config: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        read_setting(config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_text_is_refused_or_read(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([YAML, CHECKPOINT, OLD_CHECKPOINT, VLLM, SGLANG, FLASHINFER]))
    at = data.draw(st.integers(0, len(text)))
    until = data.draw(st.integers(at, min(len(text), at + 20)))
    noise = st.text(alphabet=st.sampled_from("{}[]:,'\"=# \n\t0aλ-.e\\("), max_size=6)
    broken = text[:at] + data.draw(noise) + text[until:]
    try:
        one = read_setting(broken)
    except EngineError:
        return
    explain(one, [8192])


# Exports


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("target", [TARGET, 0.4, {"decode": 0.3}])
def test_round_trip(nvidia: Calibration, engine: str, target: Any) -> None:
    expected = nvidia.scale_factor(target)
    one = read_setting(export(nvidia, engine, target))
    assert one.engine == engine
    for phase in ("prefill", "decode"):
        assert one.factor(phase) == pytest.approx(expected.get(phase, 0.0), rel=2e-5)


def test_yaml_form(nvidia: Calibration) -> None:
    lines = export(nvidia, "tensorrt-llm", TARGET).splitlines()
    body = [line for line in lines if not line.startswith("#")]
    assert [line.partition(":")[0] for line in body] == [
        line.partition(":")[0] for line in YAML.splitlines()
    ]
    assert any("64 × 128, ascending" in line for line in lines)
    assert any("4096 to 16384 tokens" in line for line in lines)


def test_yaml_form_by_a_yaml_reader(nvidia: Calibration) -> None:
    yaml = pytest.importorskip("yaml")
    block = yaml.safe_load(export(nvidia, "tensorrt-llm", TARGET))["sparse_attention_config"]
    assert block["algorithm"] == "skip_softmax"
    assert block["threshold_scale_factor"] == pytest.approx(nvidia.scale_factor(TARGET), rel=1e-5)


def test_checkpoint_form(nvidia: Calibration) -> None:
    text = export(nvidia, "tensorrt-llm-checkpoint", TARGET, ignore=["model.layers.0.self_attn"])
    mine, theirs = json.loads(text), json.loads(CHECKPOINT)

    def shape(value: Any) -> Any:
        return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else type(value)

    assert shape(mine) == shape(theirs)
    group = mine["sparse_attention_config"]["config_groups"]["group_0"]
    assert group["ignore"] == ["model.layers.0.self_attn"]
    for phase, wanted in group["target_sparsity"].items():
        names = {**group["threshold_scale_factor"][phase], "target_sparsity": wanted}
        factor = eval(group["threshold_scale_factor"]["formula"], {"exp": math.exp}, names)
        assert factor == pytest.approx(nvidia.scale_factor(TARGET)[phase], rel=2e-5)


def test_flashinfer_form_is_python(nvidia: Calibration) -> None:
    calls = ast.parse(export(nvidia, "flashinfer", TARGET)).body
    for call, phase in zip(calls, ("prefill", "decode"), strict=True):
        assert isinstance(call, ast.Expr)
        assert isinstance(call.value, ast.Call)
        (keyword,) = call.value.keywords
        assert keyword.arg == "skip_softmax_threshold_scale_factor"
        assert phase in ast.unparse(call.value.func)
        expected = nvidia.scale_factor(TARGET)[phase]
        assert ast.literal_eval(keyword.value) == pytest.approx(expected, rel=1e-5)


def test_command_line_forms(nvidia: Calibration) -> None:
    words = shlex.split(export(nvidia, "vllm", TARGET), comments=True)
    assert words[::2] == [
        f"--attention-config.trtllm_skip_softmax_{phase}_threshold_scale_factor"
        for phase in ("prefill", "decode")
    ]
    lines = shlex.split(export(nvidia, "sglang", TARGET), comments=True)
    assert [word.partition("=")[0] for word in lines] == [
        "export",
        "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR",
        "export",
        "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR",
    ]


def test_comments_cannot_be_broken_out_of(nvidia: Calibration) -> None:
    evil = replace(nvidia, card={"model": "x\nmalicious: 1\r\u2028y"})
    for engine in ENGINES:
        assert not any(
            line.startswith("malicious") for line in export(evil, engine, 0.5).splitlines()
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_another_kernels_calibration_is_refused(ours: Calibration, engine: str) -> None:
    with pytest.raises(
        ValueError, match=r"64 × 128, ascending.*ends_first.*calibrate with kernel nvidia"
    ):
        export(ours, engine, 0.5)
    with pytest.raises(ValueError, match="seeded maximum"):
        export(ours, engine, {"decode": 0.5})


@pytest.mark.parametrize("engine", ENGINES)
def test_model_optimizers_grid_is_the_checkpoints_only(engine: str) -> None:
    made = calibrate(maps_of(ln_a, b=9.0), "model-optimizer")
    if engine == "tensorrt-llm-checkpoint":
        assert read_setting(export(made, engine, 0.5)).target_sparsity["decode"] == 0.5
        return
    with pytest.raises(ValueError, match="128 × 128"):
        export(made, engine, 0.5)
    with pytest.raises(ValueError, match="1 × 128"):
        export(made, engine, {"decode": 0.5})


@pytest.mark.parametrize("engine", ENGINES)
def test_head_dim_decides_which_grid_is_accepted(engine: str) -> None:
    made = {
        (name, dim): calibrate(maps_of(ln_a, b=9.0, card={"head_dim": dim} if dim else {}), name)
        for name in ("nvidia", "nvidia-256")
        for dim in ("", "64", "128", "256")
    }
    refused = {("nvidia", "64"): "nvidia-256", ("nvidia-256", "256"): "nvidia"}
    for (name, dim), one in made.items():
        if (name, dim) in refused:
            told = rf"prefill at head_dim {dim} on tiles of .* with kernel {refused[name, dim]}$"
            with pytest.raises(ValueError, match=told):
                export(one, engine, 0.5)
            assert read_setting(export(one, engine, {"decode": 0.5})).factor("decode")
            continue
        text = export(one, engine, 0.5)
        if engine == "tensorrt-llm-checkpoint":
            continue
        assert f"tiles of 64 × {128 if name == 'nvidia' else 256}, ascending" in text
        assert (f"At this model's head_dim, {dim}, NVIDIA's" in text) == bool(dim)


def test_names_do_not_deceive(nvidia: Calibration) -> None:
    phase = replace(nvidia.phases["prefill"], target=TARGETS["ours", "prefill"])
    claimed = replace(nvidia, phases={"prefill": phase})
    with pytest.raises(ValueError, match="ends_first"):
        export(claimed, "sglang", 0.5)


def test_refused_exports(nvidia: Calibration) -> None:
    with pytest.raises(ValueError, match=r"engine must be one of tensorrt-llm, .* got 'onnx'"):
        export(nvidia, "onnx", 0.5)
    with pytest.raises(ValueError, match="prefill: target_sparsity must lie between"):
        export(nvidia, "vllm", 0.97)
    assert "97%" in export(nvidia, "vllm", 0.97, extrapolate=True)
    with pytest.raises(ValueError, match="sglang has no such list"):
        export(nvidia, "sglang", 0.5, ignore=["model.layers.0.self_attn"])
    only = replace(nvidia, phases={"prefill": nvidia.phases["prefill"]})
    with pytest.raises(ValueError, match="names 'decode'"):
        export(only, "vllm", TARGET)
    assert read_setting(export(only, "vllm", 0.5)).factor("decode") == 0


# Explanations


def test_threshold_at_each_length() -> None:
    told = explain(YAML, [400, 1000, 8192])
    prefill, decode = told.phases["prefill"], told.phases["decode"]
    assert [at.threshold for at in prefill.at] == [2.5, 1.0, 1000 / 8192]
    assert [at.above_one for at in prefill.at] == [True, False, False]
    assert [at.above_one for at in decode.at] == [True, False, False]
    text = " ".join(told.warnings)
    assert "prefill: λ exceeds 1 at 400 tokens, and below 1000" in text
    assert "ends_first" in text
    assert "seeded" in text
    assert prefill.expected_sparsity is None
    assert "calibration" in prefill.expectation


def test_no_warning_where_there_is_nothing_to_warn_of() -> None:
    told = explain(YAML.replace("1000.0", "0").replace("500.0", "0"), [100])
    assert told.warnings == (ENGINES["tensorrt-llm"].note,)
    assert told.phases["prefill"].expected_sparsity == 0


def test_expected_sparsity_of_the_formula() -> None:
    told = explain(CHECKPOINT, [65536])
    for phase, wanted in TARGET.items():
        assert told.phases[phase].expected_sparsity == pytest.approx(wanted)
    assert "Layers that stay dense: model.layers.0.self_attn." in told.warnings
    assert any("128 × 128" in warning for warning in told.warnings)


def test_expected_sparsity_of_a_calibration(nvidia: Calibration, ours: Calibration) -> None:
    factor = 7.92 * math.exp(9 * 0.6)
    text = f"export SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR={factor}"
    told = explain(text, [65536], nvidia)
    assert told.phases["prefill"].expected_sparsity == pytest.approx(0.6, abs=0.01)
    assert "not that of the engine's kernel" not in " ".join(told.warnings)
    assert "not that of the engine's kernel" in " ".join(explain(text, [65536], ours).warnings)
    small = replace(nvidia, card={"head_dim": "64"})
    assert "not that of the engine's kernel" in " ".join(explain(text, [65536], small).warnings)
    outside = explain(text.replace(str(factor), "1e9"), [65536], nvidia).phases["prefill"]
    assert outside.expected_sparsity is None
    assert "outside" in outside.expectation


def test_a_bare_target_needs_a_formula(nvidia: Calibration) -> None:
    text = "sparse_attention_config:\n  algorithm: skip_softmax\n  target_sparsity: 0.5\n"
    bare = explain(text, [8192]).phases["prefill"]
    assert bare.scale_factor is None
    assert bare.at == ()
    assert "config.json" in bare.expectation
    told = explain(text, [8192], nvidia).phases["prefill"]
    assert told.scale_factor == pytest.approx(7.92 * math.exp(4.5), rel=0.02)
    assert told.expected_sparsity == pytest.approx(0.5)
    beyond = explain(text.replace("0.5", "0.99"), [8192], nvidia).phases["prefill"]
    assert beyond.scale_factor is None
    assert "must lie between" in beyond.expectation


def test_both_stated() -> None:
    told = explain(YAML + "  target_sparsity: 0.9\n", [8192])
    assert any("the first wins" in warning for warning in told.warnings)


@pytest.mark.parametrize("lengths", [[], [0], [8192, -1]])
def test_lengths(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be at least 1"):
        explain(YAML, lengths)
