"""``skip-softmax evaluate``: what the words mean, what is printed, and what is refused."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from app import command_evaluate
from sim.evaluation_report import report_of
from sim.model_attention import Setting
from sim.texts import split


def result(sparsity: float, change: float, threshold: float) -> dict:
    one = {
        "threshold": threshold,
        "loss_dense": 2.0,
        "loss": 2.0 + change,
        "kl_mean": change / 2,
        "kl_worst": 0.5,
        "same_token": 0.9,
        "sparsity": [sparsity, sparsity],
        "output_error": [0.01, 0.03],
    }
    return {"prefill": one, "decode": one}


def made_up_report() -> dict:
    results = []
    for length in (1024, 2048):
        for kernel, more in (("ours", 0.05), ("nvidia", 0.0)):
            for threshold in (0.1, 0.5, 0.9):
                values = {"prefill": threshold, "decode": threshold}
                job = {
                    "kernel": kernel,
                    "length": length,
                    "threshold": values,
                    "threshold_scale_factor": None,
                }
                sparsity = threshold * length / 4096 + more
                for text in range(2):
                    of_text = {"kind": "text", "text": text, "depth": None}
                    results.append((of_text | job, result(sparsity, sparsity**2 / 4, threshold)))
                    needle = {
                        "probability_dense": 0.75,
                        "probability": 0.5,
                        "found_dense": True,
                        "found": text == 0,
                        "sparsity": sparsity,
                    }
                    results.append(({"kind": "needle", "text": text, "depth": 0.5} | job, needle))
    return report_of(results, {"model": "tiny", "texts": [{"title": "a"}, {"title": "b"}]})


REPORT = made_up_report()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Arguments that the function behind the command was given."""
    given: dict = {}

    def evaluate(model: str, out: str, settings: list[Setting], **options: object) -> dict:
        given.update(options, model=model, out=out, settings=settings)
        return REPORT

    monkeypatch.setattr("sim.evaluation.evaluate", evaluate)
    return given


def run(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="skip-softmax")
    command_evaluate.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["evaluate", *words])
    return options.run(options)


def test_defaults(asked: dict, capsys: pytest.CaptureFixture) -> None:
    assert run("some/model", "--out", "folder") == 0
    assert asked["settings"] == [
        Setting.both("ours", threshold=x) for x in command_evaluate.THRESHOLDS
    ]
    assert asked["texts"] == split()[1]
    assert asked["lengths"] == [1024, 2048, 4096]
    assert asked["depths"] == [0.1, 0.5, 0.9]
    assert (asked["model"], asked["out"]) == ("some/model", "folder")
    assert asked["needle_lengths"] is asked["workers"] is asked["scheduler"] is None
    assert asked["decode_tokens"] == 16
    assert asked["command"].startswith("skip-softmax evaluate some/model --lengths 1024 2048")


def test_the_words_reach_the_function(asked: dict, tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("é", encoding="utf-8")
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    texts = [str(tmp_path / name) for name in ("one.txt", "two.txt")]
    words = ["--scale-factors", "10", "200", "--kernel", "nvidia", "ours", "--lengths", "64"]
    words += ["--texts", *texts, "--text-license", "MIT", "--max-texts", "1", "--decode-tokens"]
    words += ["3", "--needle-lengths", "--depths", "0.5", "--scheduler", "tcp://a:1"]
    assert run(str(model), *words, "--model-name", "Tiny", "--out", str(tmp_path / "o")) == 0
    assert asked["settings"] == [
        Setting.both(kernel, threshold_scale_factor=x)
        for kernel in ("nvidia", "ours")
        for x in (10, 200)
    ]
    assert [(text.content, text.title, text.license) for text in asked["texts"]] == [
        ("é", "one.txt", "MIT")
    ]
    assert asked["needle_lengths"] == []
    assert (asked["scheduler"], asked["model_name"]) == ("tcp://a:1", "Tiny")
    assert str(tmp_path) not in asked["command"]
    assert asked["command"] == (
        "skip-softmax evaluate model.gguf --scale-factors 10.0 200.0 --kernel nvidia ours "
        "--lengths 64 --depths 0.5 --texts one.txt two.txt --max-texts 1 --decode-tokens 3 "
        "--out o --needle-lengths"
    )


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    class Read:
        kernel = "nvidia"

        def scale_factor(self, target: float) -> dict[str, float]:
            if target > 0.8:
                raise ValueError("prefill: target_sparsity 0.9 is beyond what was measured")
            return {"prefill": 1000 * target}

    monkeypatch.setattr("sim.calibration_file.read_calibration", lambda path: Read())


def test_a_calibration_gives_factors(asked: dict, calibration: None) -> None:
    words = ("m", "--out", "o", "--calibration", "c.json")
    assert run(*words, "--target-sparsity", "0.25", "0.5") == 0
    assert asked["settings"] == [
        Setting("nvidia", None, {"prefill": 1000 * x, "decode": 0.0}) for x in (0.25, 0.5)
    ]
    assert run(*words, "--kernel", "nvidia") == 0
    assert len(asked["settings"]) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target-sparsity", "0.5"], "--target-sparsity goes with --calibration"),
        (["--calibration", "c", "--kernel", "ours"], "--kernel is ours, but c is calibrated for n"),
        (["--calibration", "c", "--target-sparsity", "0.9"], "prefill: target_sparsity 0.9 is bey"),
        (["--thresholds", "1.5"], "threshold must be at most 1"),
        (["--scale-factors", "-1"], "threshold_scale_factor must"),
        (["--workers", "2", "--scheduler", "tcp://a:1"], "--workers is for this machine's process"),
        (["--max-texts", "0"], "--max-texts must be at least 1, got 0"),
    ],
)
def test_bad_words_give_one_sentence(
    asked: dict, calibration: None, words: list[str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run("m", "--out", "o", *words)
    assert asked == {}


def test_a_text_that_is_not_utf8_is_refused(asked: dict, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"texts must be UTF-8, but .*bad is not"):
        run("m", "--out", "o", "--texts", str(tmp_path / "bad"))


def test_json_is_the_report(asked: dict, capsys: pytest.CaptureFixture) -> None:
    assert run("m", "--out", "o", "--json") == 0
    assert json.loads(capsys.readouterr().out) == REPORT


def test_the_table_says_it_all(asked: dict, capsys: pytest.CaptureFixture) -> None:
    assert run("m", "--out", "o") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "first tiles count as visited" in lines[0]
    rows = [line.split() for line in lines if "threshold 0.5 " in line and "prefill" in line]
    assert rows[0][:6] == ["ours", "1024", "threshold", "0.5", "0.5", "prefill"]
    assert rows[0][6] == "17.5%"
    assert rows[0][8] == "+0.77%"
    needles = [
        line.split() for line in lines if line.startswith(("ours", "nvidia")) and "%" in line
    ]
    assert any(line[-4:] == ["50%", "100%", "0.500", "0.750"] for line in needles)
    text = "\n".join(lines)
    assert "ours, 1024 tokens  by 0.1%: 5.3" in text
    assert "than nvidia, 2048 tokens" in text
    assert "nvidia, sparsity 0.2: 1024: 0.777, 2048: 0.334; exponent -1.22" in text
    assert "exponent" in text


def test_a_single_setting_has_no_answers(asked: dict) -> None:
    one = [item for item in REPORT["rows"] if item["threshold"]["prefill"] == 0.5]
    empty = {"skippable": [], "gains": [], "thresholds": []}
    text = command_evaluate.table(REPORT | {"rows": one, "needle": [], "answers": empty})
    assert "before the perplexity has moved" not in text
    assert "needle" not in text


def test_help_needs_no_numpy() -> None:
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "import argparse; from app import command_evaluate as c\n"
        "p = argparse.ArgumentParser(); c.add_parser(p.add_subparsers()); p.format_help()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
