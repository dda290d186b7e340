"""``skip-softmax calibrate``: what it prints and writes, and how it fails."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import command_calibrate, options
from sim import calibration, engines, gap_maps, targets
from sim.calibration_file import read_calibration, write_calibration
from sim.traces import bundled, read_trace


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command_calibrate.add_parser(parser.add_subparsers())
    given = parser.parse_args(["calibrate", *map(str, arguments)])
    return given.run(given)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maps") / "small.safetensors"
    gap_maps.GapMaps.from_traces(bundled().values(), lengths=[1024, 2048]).write(path)
    return path


@pytest.fixture
def report(maps: Path, capsys: pytest.CaptureFixture) -> Any:
    def of(*arguments: object) -> dict[str, Any]:
        assert run(maps, "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)

    return of


def test_choices_are_those_of_the_simulator() -> None:
    assert command_calibrate.PHASES == targets.PHASES
    assert tuple(engines.ENGINES) == command_calibrate.ENGINES
    assert options.KERNELS == targets.KERNELS


def test_json_is_the_calibration(maps: Path, report: Any) -> None:
    read = gap_maps.read_gap_maps(maps)
    for kernel in options.KERNELS:
        got = report("--kernel", kernel, "--target-sparsity", 0.4)
        one = calibration.calibrate(read, kernel)
        assert got["kernel"] == kernel
        assert got["model"].startswith("SmolLM2-135M")
        for phase in ("prefill", "decode"):
            fit = one.phases[phase].fit
            row = got["phases"][phase]
            assert (row["a"], row["b"], row["r_squared"]) == (fit.a, fit.b, fit.r_squared)
            assert row["range"] == list(fit.range)
            assert row["scale_factor"] == fit.scale_factor(0.4)
            assert [at["length"] for at in row["at"]] == [1024, 2048]
            made = targets.target(kernel, phase)
            for at, sparsity in zip(
                row["at"],
                calibration.achieved(read, made, fit.scale_factor(0.4)).mean(axis=(1, 2)),
                strict=True,
            ):
                expected = None if np.isnan(sparsity) else pytest.approx(sparsity)
                assert at["achieved"] == expected
                assert at["threshold"] == row["scale_factor"] / at["length"]
            for line, other in zip(got["miss"][phase], targets.targets_of(phase), strict=True):
                assert line["kernel"] == other.name
                assert list(line["achieved"]) == [one.name for one in targets.targets_of(phase)]


def test_the_table_says_what_matters(maps: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(maps, "--per-layer", "--per-head", "--target-sparsity", "prefill=0.4") == 0
    text = capsys.readouterr().out
    one = calibration.calibrate(gap_maps.read_gap_maps(maps)).phases["prefill"]
    for wanted in (
        "tiles of 64 × 128, ends_first, each head for itself",
        f"a = {one.fit.a:.4g}, b = {one.fit.b:.4g}, R² = {one.fit.r_squared:.4f}",
        f"holds from {one.fit.range[0]:.1%} to {one.fit.range[1]:.1%} sparsity",
        "no interval: that needs at least two texts",
        f"threshold_scale_factor {one.fit.scale_factor(0.4):.6g}",
        f"λ > 1 below {math.ceil(one.fit.scale_factor(0.4))} tokens",
        "layer 12, head 2",
        "on model-optimizer",
        "nvidia-256: tiles of 64 × 256, ascending, each head for itself",
        "At this model's head_dim, 64, NVIDIA's Hopper prefill decides as nvidia-256",
    ):
        assert wanted in text
    assert "decode" not in text


def test_interval_over_texts(maps: Path, report: Any, tmp_path: Path) -> None:
    one = read_trace(next(iter(bundled().values())))
    q = one.q.astype(np.float32)
    traces = []
    for seed in range(3):  # three "texts": the same heads with other noise
        noise = np.random.default_rng(seed).normal(0, 0.3 * seed, q.shape).astype(np.float32)
        card = {**one.card, "text": f"text {seed}", "text_title": f"text {seed}"}
        traces.append(replace(one, q=(q + noise), card=card))
    path = tmp_path / "three.safetensors"
    gap_maps.GapMaps.from_traces(traces, lengths=[1024, 2048]).write(path)
    got = command_calibrate.calibrate_files([path], target_sparsity=0.3)
    row = got["phases"]["prefill"]
    low, high = row["interval"]
    assert low <= row["scale_factor"] <= high
    assert low < high
    assert "too narrow with so few" in command_calibrate.table(got)


def test_lambda_above_one_is_shown(maps: Path, capsys: pytest.CaptureFixture) -> None:
    got = command_calibrate.calibrate_files([maps], "nvidia", target_sparsity={"prefill": 0.5})
    factor = got["phases"]["prefill"]["scale_factor"]
    for at in got["phases"]["prefill"]["at"]:
        assert at["above_one"] == (factor > at["length"])
        assert (at["achieved"] is None) == at["above_one"]
    assert any(at["above_one"] for at in got["phases"]["prefill"]["at"])
    assert "> 1: dense here" in command_calibrate.table(got)


def test_target_outside_the_range_is_said(maps: Path, report: Any) -> None:
    row = report("--target-sparsity", "decode=0.95")["phases"]["decode"]
    assert row["scale_factor"] is None
    assert "must lie between" in row["why_not"]
    with pytest.raises(ValueError, match="decode: target_sparsity must lie between"):
        run(maps, "--kernel", "nvidia", "--engine", "vllm", "--target-sparsity", "decode=0.95")


def test_export_and_explain(maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "calibration.json"
    every = [word for engine in engines.ENGINES for word in ("--engine", engine)]
    wanted = ("prefill=0.4", "decode=0.3")
    rest = (*every, "--out", out, "--target-sparsity", *wanted)
    with pytest.raises(ValueError, match=r"at head_dim 64 on tiles of 64 × 256.* nvidia-256$"):
        run(maps, "--kernel", "nvidia", *rest)
    assert run(maps, "--kernel", "nvidia-256", *rest) == 0
    printed = capsys.readouterr().out
    one = read_calibration(out)
    factors = one.scale_factor({"prefill": 0.4, "decode": 0.3})
    for engine in engines.ENGINES:
        text = engines.export(one, engine, {"prefill": 0.4, "decode": 0.3})
        assert text in printed + "\n"
        config = tmp_path / engine
        config.write_text(text, encoding="utf-8")
        given = ("--explain", config, "--lengths", 256, 8192, "--calibration", out)
        assert run(*given, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["setting"]["engine"] == engine
        for phase, factor in factors.items():
            row = told["phases"][phase]
            assert row["scale_factor"] == pytest.approx(factor, rel=2e-5)
            assert row["at"][1]["threshold"] == pytest.approx(factor / 8192, rel=2e-5)
            assert row["at"][0]["above_one"] == (factor > 256)
        assert told["phases"]["prefill"]["expected_sparsity"] == pytest.approx(0.4, abs=1e-4)
        assert run(*given) == 0
        table = capsys.readouterr().out
        assert f"setting of {engine}" in table
        assert "expected sparsity where λ ≤ 1: 40.0%" in table
        assert "• prefill:" in table


def test_explain_a_dense_phase(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "env"
    config.write_text("SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=10000", encoding="utf-8")
    assert run("--explain", config) == 0
    text = capsys.readouterr().out
    assert "decode: dense" in text
    assert "no expected sparsity" in text
    assert "131072  0.07629" in text
    assert "λ exceeds 1 at 8192 tokens" in text


def test_traces_are_scanned(capsys: pytest.CaptureFixture) -> None:
    got = command_calibrate.calibrate_files([*bundled().values()], target_sparsity=0.4)
    assert got["phases"]["prefill"]["lengths"][-1] == 4096


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture, suffix: str) -> None:
    path = tmp_path / f"calibration{suffix}"
    assert run(maps, "--target-sparsity", "prefill=0.4", "--plot", path) == 0
    assert f"Written to {path}." in capsys.readouterr().out
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        assert "1024 tokens" in content.decode()
        assert "decode" not in content.decode()


def test_ignore_reaches_the_checkpoint_form(maps: Path, report: Any) -> None:
    got = report(
        "--kernel", "nvidia-256", "--target-sparsity", 0.3, "--ignore", "model.layers.0.self_attn",
        "--engine", "tensorrt-llm-checkpoint", "--engine", "vllm",
    )  # fmt: skip
    assert "model.layers.0.self_attn" in got["exports"]["tensorrt-llm-checkpoint"]
    assert "model.layers.0.self_attn" not in got["exports"]["vllm"]


def test_wrong_kernel_is_refused_before_work(tmp_path: Path) -> None:
    absent = tmp_path / "absent.safetensors"  # not even opened
    with pytest.raises(ValueError, match="calibrate with kernel nvidia"):
        run(absent, "--engine", "vllm")
    with pytest.raises(ValueError, match="out must lie in a folder that exists"):
        run(absent, "--out", tmp_path / "no" / "folder.json")
    with pytest.raises(ValueError, match="plot must lie in a folder that exists"):
        run(absent, "--plot", tmp_path / "no" / "plot.png")
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png, got '.*plot\.pdf'"):
        run(absent, "--plot", tmp_path / "plot.pdf")
    with pytest.raises(OSError, match=r"absent\.safetensors"):
        run(absent)


def test_wrong_arguments(maps: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in [
        ([], "give MAPS"),
        ([maps, "--explain", maps], "not both"),
        ([maps, "--lengths", "5"], "go with --explain"),
        ([maps, "--target-sparsity", "0.5", "prefill=0.5"], "once each"),
        ([maps, "--target-sparsity", "prefill=0.5", "prefill=0.4"], "once each"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    for target in ("1.5", "half", "train=0.5", "nan"):
        with pytest.raises(SystemExit):
            run(maps, "--target-sparsity", target)
        assert "between 0 and 1" in capsys.readouterr().err


def test_damaged_files(maps: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"abc")
    trace = next(iter(bundled().values()))
    for paths, message in [
        ([broken], r"broken\.safetensors: the file is 3 bytes long"),
        ([maps, trace], "some of each"),
        ([tmp_path, maps], "one of several"),
        ([tmp_path], "is no capture"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*paths)
    for content, message in [(b"\xff\xff", "not text"), (b"{", "begins like JSON")]:
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=rf"broken\.safetensors: .*{message}"):
            run("--explain", broken)
    config = tmp_path / "env"
    config.write_text("SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.safetensors: this is not JSON"):
        run("--explain", config, "--calibration", broken)


def test_text_from_files_cannot_drive_a_terminal(maps: Path, tmp_path: Path) -> None:
    read = gap_maps.read_gap_maps(maps)
    evil = tmp_path / "evil.safetensors"
    replace(read, card={"model": "\x1b[31mred\nnew"}).write(evil)
    text = command_calibrate.table(
        command_calibrate.calibrate_files([evil], "nvidia", target_sparsity=0.3, engines=["vllm"])
    )
    assert "\x1b" not in text
    assert "red\n" not in text


def test_calibration_survives_the_file(maps: Path, tmp_path: Path) -> None:
    one = calibration.calibrate(gap_maps.read_gap_maps(maps), per_head=True)
    write_calibration(tmp_path / "one.json", one)
    assert read_calibration(tmp_path / "one.json") == one
