"""Models by name and from a folder, and texts in exactly so many tokens."""

from __future__ import annotations

import sys

import pytest

from sim.model import check_name, config_hash, load, token_pieces, tokenize
from sim.texts import Text


@pytest.mark.parametrize(
    ("spans", "pieces"),
    [
        ([(0, 2), (2, 5), (5, 7)], ["ab", " cd", "é本"]),
        ([(0, 2), (3, 5), (5, 6), (6, 7)], ["ab", " cd", "é", "本"]),  # trimmed spaces
        ([(0, 5), (5, 6), (5, 6), (6, 7), (6, 7), (6, 7)], ["ab cd", "é", "", "本", "", ""]),
        ([(0, 0), (0, 7)], ["", "ab cdé本"]),  # a special token first
    ],
)
def test_pieces_join_to_the_text(spans, pieces):
    text = "ab cdé本"
    assert token_pieces(text, spans) == pieces
    assert "".join(pieces) == text


def test_a_model_goes_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    (tmp_path / "big.gguf").write_bytes(b"")
    assert check_name(tmp_path / "small") == "small"
    assert check_name(str(tmp_path / "big.gguf")) == "big.gguf"
    monkeypatch.chdir(tmp_path / "small")
    assert check_name(".") == "small"
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["none.gguf", "model.bin", "a/b/c", "/nowhere/model", "", "https://x.y/z", "a b"]
)
def test_what_is_no_model_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "model.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model must be a folder, a \.gguf file or a name on"):
        check_name(name)


def test_without_torch_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        RuntimeError, match=r"needs torch: python -m pip install -e '\.\[capture\]'"
    ):
        load(tmp_path)


def test_a_folder_is_loaded(tiny_folder, monkeypatch):
    model = load(tiny_folder)
    assert model.name == "tiny"
    assert model.network.dtype.is_floating_point
    assert str(model.network.dtype) == "torch.float32"
    assert not model.network.training
    monkeypatch.chdir(tiny_folder)
    again = load(".")
    assert config_hash(again.network) == config_hash(model.network)
    again.network.config.rope_theta = 77.0
    assert config_hash(again.network) != config_hash(model.network)


def test_what_cannot_be_loaded_gives_one_sentence(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="could not be loaded: ") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF, or not")
    with pytest.raises(ValueError, match=r"'damaged\.gguf' could not be loaded: ") as caught:
        load(damaged)
    assert "\n" not in str(caught.value)


def test_a_text_is_cut_to_its_length(tiny_folder):
    tokenizer = load(tiny_folder).tokenizer
    text = Text("one two three one two three", "count", "CC0-1.0")
    tokens = tokenize(tokenizer, text, 4)
    assert tokens.pieces == ["<s>", "one", " two", " three"]
    assert len(tokens.ids) == 4
    with pytest.raises(ValueError, match="the text 'count' has only 7 of this model's tokens"):
        tokenize(tokenizer, text, 8)
