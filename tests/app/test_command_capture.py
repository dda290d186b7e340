"""``skip-softmax capture``: what the words mean, what is printed, and what is refused."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from app import command_capture

REPORT = {
    "model": "tiny",
    "files": ["a.safetensors"],
    "texts": [{"title": "a tale", "license": "MIT"}],
    "checks": {"text0-64": {"next_token_loss": 1.5, "max_difference": 2e-06}},
    "captured": 1,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Arguments that the function behind the command was given."""
    given: dict = {}

    def capture(model: str, out: str, **options: object) -> dict:
        given.update(options, model=model, out=out)
        return REPORT

    monkeypatch.setattr("sim.capture.capture", capture)
    return given


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="skip-softmax")
    command_capture.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["capture", *words])


def run(*words: str) -> int:
    options = parse(*words)
    return options.run(options)


def test_defaults(asked: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(2_000_000))
    assert run("some/model", "--out", str(tmp_path)) == 0
    assert asked == {
        "model": "some/model",
        "out": str(tmp_path),
        "texts": None,
        "layers": None,
        "kv_heads": None,
        "lengths": [1024, 2048, 4096],
        "phases": ["prefill", "decode"],
        "decode_tokens": 16,
        "keep": "maps",
        "model_name": None,
        "model_license": None,
        "progress": False,
    }
    printed = capsys.readouterr().out
    assert f"tiny: 1 files, 2.0 MB, in {tmp_path}" in printed
    assert "text 0: a tale (MIT)" in printed
    assert "text0-64                   1.500             2e-06" in printed


def test_every_option_arrives(asked: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Größe", encoding="utf-8")
    words = ["m.gguf", "--out", "o", "--texts", str(text), str(text), "--text-license", "CC0-1.0"]
    words += ["--layers", "0,3-5", "--kv-heads", "1", "--lengths", "64", "128"]
    words += ["--phases", "decode", "--decode-tokens", "3", "--keep", "qkv"]
    words += ["--model-name", "M", "--model-license", "MIT", "--json"]
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out) == REPORT
    assert [tuple(one) for one in asked.pop("texts")] == [("Größe", "notes.txt", "CC0-1.0")] * 2
    assert asked == {
        "model": "m.gguf",
        "out": "o",
        "layers": [0, 3, 4, 5],
        "kv_heads": [1],
        "lengths": [64, 128],
        "phases": ["decode"],
        "decode_tokens": 3,
        "keep": "qkv",
        "model_name": "M",
        "model_license": "MIT",
        "progress": False,
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "required: --out"),
        (["--out", "o", "--layers", "a"], "'a' must be numbers and ranges, such as 0,3-5"),
        (["--out", "o", "--layers", "3-"], "'3-' must be numbers"),
        (["--out", "o", "--layers", "5-3"], "'5-3' must be numbers"),
        (["--out", "o", "--kv-heads", "0,,1"], "'0,,1' must be numbers"),
        (["--out", "o", "--layers", "0-99999999999"], "must be numbers"),
        (["--out", "o", "--keep", "all"], "invalid choice: 'all'"),
        (["--out", "o", "--lengths", "many"], "invalid int value: 'many'"),
    ],
)
def test_words_that_mean_nothing(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("model", *words)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_texts_that_cannot_be_read(asked: dict, tmp_path: Path) -> None:
    binary = tmp_path / "weights.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"texts must be UTF-8, but .*weights\.bin is not"):
        run("model", "--out", "o", "--texts", str(binary))
    with pytest.raises(FileNotFoundError):
        run("model", "--out", "o", "--texts", str(tmp_path / "none.txt"))
    assert not asked


def test_what_was_there_already_is_said(
    asked: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORT, "captured", 0)
    (tmp_path / "a.safetensors").write_bytes(b"")
    run("model", "--out", str(tmp_path))
    assert capsys.readouterr().out.endswith("All of it was there already.\n")


def test_help_loads_nothing_heavy(root: Path) -> None:
    program = (
        "import argparse, sys\n"
        "from app import command_capture\n"
        "command_capture.add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "assert not {'numpy', 'torch', 'sim', 'streamlit'} & {n.split('.')[0] for n in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=60)
