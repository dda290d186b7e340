"""The console command: what it prints, how it fails, what it loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sim
from app import cli
from sim.traces import bundled, read_trace, write_trace


@pytest.fixture(scope="module")
def trace() -> Path:
    return next(iter(bundled().values()))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    q, k, v = 4 * np.random.default_rng(0).standard_normal((3, 2, 300, 64)).astype(np.float32)
    path = tmp_path / "small.safetensors"
    card = {"heads": json.dumps(["3", "\x1b[31mred"])}
    write_trace(path, q, k, v, softmax_scale=0.125, card=card)
    return path


def loaded_by(root: Path, *arguments: str) -> set[str]:
    code = (
        "import sys; from app import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('\\n', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_json_matches_the_simulator(trace: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["scan", str(trace), "--threshold", "0.01", "--mass", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    data = read_trace(trace)
    one = sim.scan(data.q, data.k, softmax_scale=data.softmax_scale)
    tiles = one.decide(0.01)
    attended = sim.attend(data.q, data.k, data.v, tiles, softmax_scale=data.softmax_scale)
    assert report["threshold"] == 0.01
    assert report["tile"] == [64, 128]
    assert report["order"] == "ends_first"
    assert report["short_context"] is False
    assert len(report["heads"]) == len(data.q)
    for h, head in enumerate(report["heads"]):
        assert head["head"] == h
        assert head["skipped"] / head["visited"] == head["sparsity"] == tiles.sparsity[h]
        assert head["worst_dropped_mass"] == pytest.approx(attended.dropped_mass[h].max(), abs=1e-4)
        assert head["mean_dropped_mass"] == pytest.approx(attended.dropped_mass[h].mean(), abs=1e-4)
    assert 0 < report["sparsity"] < 1


def test_ends_first_skips_more_than_ascending(trace: Path) -> None:
    skipped = [
        cli.scan_trace(trace, threshold=0.01, order=order)["sparsity"]
        for order in ("ends_first", "ascending")
    ]
    assert skipped[0] > skipped[1]


def test_options_reach_the_scan(small: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["scan", str(small), "--threshold", "0.5", "--tile", "32", "50", "--full"]
    assert cli.main([*arguments, "--order", "descending", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tile"] == [32, 50]
    assert report["causal"] is False
    assert report["order"] == "descending"
    assert [head["visited"] for head in report["heads"]] == [60, 60]
    assert report["threshold"] == 0.5


def test_target_sparsity(trace: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["scan", str(trace), "--target-sparsity", "0.3", "--json"]) == 0
    assert 0.29 < json.loads(capsys.readouterr().out)["sparsity"] <= 0.3


def test_table(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["scan", str(small), "--threshold-scale-factor", "3"]) == 0
    shown = capsys.readouterr()
    assert "λ = 0.01" in shown.out
    assert "head 3" in shown.out
    assert "all heads" in shown.out
    assert "Sparsity is skipped ÷ visited tiles" in shown.out
    assert "\x1b" not in shown.out  # a trace cannot steer the terminal
    assert not shown.err


def test_short_context_is_said(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["scan", str(small), "--threshold-scale-factor", "600"]) == 0
    assert "computed densely" in capsys.readouterr().out


def test_png(small: Path, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "maps.png"
    assert cli.main(["scan", str(small), "--png", str(path)]) == 0
    with Image.open(path) as image:
        assert image.size == (2 * 3 * 16 + 8, 5 * 8)  # two heads of 5 × 3 tiles, 8 × 16 pixels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "absent.safetensors"], "absent.safetensors: No such file"),
        (["scan", "{small}", "--threshold", "nan"], "threshold"),
        (["scan", "{small}", "--threshold", "2"], "at most 1"),
        (["scan", "{small}", "--tile", "0", "128"], "tile rows"),
        (["app", "absent.safetensors"], "absent.safetensors: No such file"),
        (["app", "{this}"], "safetensors"),
        (["app", "--port", "70000"], "port"),
    ],
)
def test_faults_are_one_sentence(
    arguments: list[str], words: str, small: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [argument.format(small=small, this=__file__) for argument in arguments]
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    (sentence,) = shown.err.splitlines()
    assert words in sentence
    assert not shown.out


def test_ctrl_c(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "scan_trace", interrupted)
    assert cli.main(["scan", str(small)]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["capture", "calibrate", "evaluate"])
def test_ctrl_c_in_a_long_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("sim.capture.capture", "sim.evaluation.evaluate"):
        monkeypatch.setattr(name, interrupted)
    monkeypatch.setattr("app.command_calibrate.calibrate_files", interrupted)
    out = [] if command == "calibrate" else ["--out", str(tmp_path / "out")]
    assert cli.main([command, "anything", *out]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_help_loads_no_numpy_and_scan_no_streamlit(root: Path, small: Path) -> None:
    for command in ([], ["capture"], ["calibrate"], ["evaluate"]):
        assert "numpy" not in loaded_by(root, *command, "--help")
    loaded = loaded_by(root, "scan", str(small))
    assert "numpy" in loaded
    assert not loaded & {"streamlit", "pandas", "numba", "torch"}


def test_who_reads_one_line_gets_no_error(root: Path, small: Path) -> None:
    """A pipe that is closed before anything is written, which ``head`` may do at any time."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "app", "scan", str(small)],
        cwd=root, env=buffered, stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.UNREAD, "")


def test_orders_are_those_of_the_simulator() -> None:
    assert cli.ORDERS == sim.ORDERS


@pytest.mark.parametrize(("spilled", "words"), [(0, "none"), (8, "1")])
def test_kernels_says_how_many_builds_spill(
    spilled: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    row = {"kernel": "k", "arch": "sm_80", "registers": 32, "stack": 0, "spill_stores": spilled}
    rows = [row | {"spill_loads": 0, "shared_bytes": 0, "faults": []}]
    monkeypatch.setattr("cuda_kernels.resources.resource_table", lambda **_: rows)
    assert cli.main(["kernels"]) == 0
    assert capsys.readouterr().out.endswith(f"\n1 builds, {words} with spills\n")
    assert cli.main(["kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows


@pytest.mark.parametrize("interrupted", [False, True])
def test_bench_hands_its_arguments_on_and_says_what_was_kept(
    interrupted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = {}
    record = {
        "machine": {"gpu": "Card"}, "rows": [], "notes": [], "interrupted": interrupted,
        "path": "kept.json",
    }  # fmt: skip
    for module, name in (("benchmark", "bench_prefill"), ("benchmark_launch", "bench_launch")):
        monkeypatch.setattr(
            f"cuda_kernels.{module}.{name}", lambda **how: asked.update(how) or record
        )
    wanted = cli.INTERRUPTED if interrupted else 0
    options = ["--tokens", "4096", "16384", "--backend", "mma"]
    assert cli.main(["bench", "prefill", *options]) == wanted
    assert (asked["tokens"], asked["backends"], asked["quick"]) == ([4096, 16384], ["mma"], False)
    assert cli.main(["bench", "launch", "--calls", "5000", "--json"]) == wanted
    assert asked["calls"] == 5000
    out, err = capsys.readouterr()
    assert "gpu Card" in out
    assert ("what was measured is in kept.json" in err) is interrupted
