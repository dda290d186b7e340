"""Capturing: what is kept is what the attention received, and the card says where it is from."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from sim import capture as module
from sim.capture import (
    Layer,
    Text,
    capture,
    main,
    max_difference,
    record,
    reference_text,
    survey,
    token_pieces,
)
from sim.traces import bundled, read_trace

LENGTH = 700


def made_up_layer(seed: int) -> Layer:
    """6 query and 2 KV heads; head 0 sees only the first key, the last head only itself."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((heads, LENGTH, size)).astype(np.float32) / 10
        for heads, size in ((6, 16), (2, 16), (2, 12))
    )
    q[0, :, 0], k[0, :, 0], k[0, 0, 0] = 20, 0, 20
    angle = np.arange(LENGTH) / 3
    for x in (q[5], k[1]):
        x[:, 1], x[:, 2] = 20 * np.cos(angle / 200), 20 * np.sin(angle / 200)
    return Layer(q, k, v, 0.25, 1e-6)


@pytest.fixture
def model(monkeypatch, tmp_path):
    """Path of a model whose two layers are made up, so that no torch is needed."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")

    def prepare(model, text, length):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
        return (
            SimpleNamespace(config=config),
            None,
            [f"{text.content[0]}{i}" for i in range(length)],
        )

    def recorded(network, ids, layers):
        return {layer: made_up_layer(layer) for layer in layers}, 1.25

    monkeypatch.setattr(module, "_prepare", prepare)
    monkeypatch.setattr(module, "record", recorded)
    return path


def test_importing_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import sim.capture; sim.capture.reference_text()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_without_torch_there_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    status = main(["--model", str(tmp_path), "--layer", "0", "--out", "x.safetensors"])
    assert status == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "capturing needs torch: python -m pip install -e '.[capture]'" in said


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


def test_reference_text_is_long_real_and_named():
    text = reference_text()
    assert text.content.startswith("Compound statements\n*****")
    assert len(text.content) > 40_000
    assert "The Python Language Reference 3." in text.title


def test_difference_is_that_of_causal_attention():
    rng = np.random.default_rng(1)
    length, scale = 1100, 0.3  # more than two blocks of rows, the last not full
    q = rng.standard_normal((4, length, 8)).astype(np.float32)
    k = rng.standard_normal((2, length, 8)).astype(np.float32)
    v = rng.standard_normal((2, length, 5)).astype(np.float32)
    output = np.empty((4, length, 5))
    for head in range(4):
        for row in range(length):
            weights = np.exp(scale * (k[head // 2, : row + 1] @ q[head, row]).astype(float))
            output[head, row] = weights @ v[head // 2, : row + 1] / weights.sum()
    assert max_difference(q, k, v, scale, output) < 1e-5
    for place in ((0, 0, 0), (3, 1099, 4), (2, 512, 1)):
        changed = output.copy()
        changed[place] += 0.01
        assert max_difference(q, k, v, scale, changed) == pytest.approx(0.01, abs=1e-5)
    assert max_difference(q, k, v, 2 * scale, output) > 0.1


@pytest.mark.parametrize(("kv_head", "heads"), [(0, [0, 1, 2]), (1, [3, 4, 5]), (None, range(6))])
def test_a_group_is_written_whole(model, tmp_path, kv_head, heads):
    out = tmp_path / "group.safetensors"
    lines: list[str] = []
    trace = capture(
        model, out, layer=1, kv_head=kv_head, length=LENGTH, model_license="MIT", log=lines.append
    )
    layer = made_up_layer(1)
    kv = [0, 1] if kv_head is None else [kv_head]
    np.testing.assert_array_equal(trace.q, layer.q[list(heads)].astype(np.float16))
    np.testing.assert_array_equal(trace.k, layer.k[kv].astype(np.float16))
    np.testing.assert_array_equal(trace.v, layer.v[kv].astype(np.float16))
    assert trace.head_names == [f"layer 1, head {head}" for head in heads]
    assert (trace.softmax_scale, trace.causal, trace.tokens[-1]) == (0.25, True, "C699")
    assert json.loads(trace.card["kv_heads"]) == [str(x) for x in kv]
    assert trace.card["license"] == "MIT"
    assert trace.card["text_license"] == "PSF-2.0"
    assert str(tmp_path) not in out.read_bytes().decode("latin-1")
    part = "" if kv_head is None else f" --kv-head {kv_head}"
    assert trace.card["command"] == (
        f"python -m sim.capture --model model.gguf --layer 1{part} --length 700 "
        "--model-license MIT --out group.safetensors"
    )
    assert "1.250 nats" in lines[0]
    assert any("float16 moves a gap" in line for line in lines)


def test_the_recorded_command_quotes_its_words(model, tmp_path):
    text = Text("some text", "my notes.txt", "CC0-1.0")
    out = tmp_path / "a.safetensors"
    card = capture(model, out, layer=0, length=LENGTH, text=text, log=str).card
    assert "--text 'my notes.txt' --text-license CC0-1.0" in card["command"]
    assert (card["text"], card["model"], card["license"]) == (
        "my notes.txt",
        "model.gguf",
        "not stated",
    )


def test_values_beyond_float16_are_refused(model, tmp_path, monkeypatch):
    layer = made_up_layer(0)
    layer.v[1, 3, 0] = 70_000
    monkeypatch.setattr(module, "record", lambda *_: ({0: layer}, 1.0))
    out = tmp_path / "a.safetensors"
    with (
        pytest.warns(RuntimeWarning, match="overflow"),
        pytest.raises(ValueError, match="v has a value that is not finite at head 1, token 3"),
    ):
        capture(model, out, layer=0, length=LENGTH, log=str)
    assert not out.exists()


def test_survey_knows_a_sink_and_a_neighbourhood(model):
    rows = list(survey(model, length=LENGTH))
    assert [(r["layer"], r["kv_head"], r["head"]) for r in rows] == [
        (layer, head // 3, head) for layer in (0, 1) for head in range(6)
    ]
    sink, other, near = rows[0], rows[1], rows[5]
    assert sink["first"] > 0.99
    assert near["local"] > other["local"]
    for row in rows:
        assert row["first"] + row["local"] + row["elsewhere"] == pytest.approx(1)
        for order in ("ascending", "descending", "ends_first"):
            shares = [row[f"{order}@{threshold}"] for threshold in (0.001, 0.01, 0.05)]
            assert shares == sorted(shares)
    assert sink["ends_first@0.01"] > 0.4
    assert other["ends_first@0.01"] == 0


def test_survey_prints_and_writes_a_table(model, tmp_path, capsys):
    out = tmp_path / "survey.csv"
    assert main(["--model", str(model), "--survey", "--length", "700", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[3:7]] == [
        ["0", "0"],
        ["0", "1"],
        ["1", "0"],
        ["1", "1"],
    ]
    assert "Mean over 12 heads" in printed
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert len(rows[0]) == 15
    assert float(rows[0]["first"]) > 0.99


def test_command_captures(model, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    words = ["--model", str(model), "--layer", "0", "--kv-head", "1", "--length", "700"]
    assert main([*words, "--out", str(out)]) == 0
    assert read_trace(out).q.shape == (3, 700, 16)
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (
            ["--layer", "0", "--out", "x", "--kv-head", "2"],
            1,
            "kv_head must be between 0 and 1, got 2",
        ),
        (["--layer", "0", "--out", "x", "--text", "none.txt"], 1, "No such file"),
        (["--layer", "0"], 2, "--layer and --out are needed"),
        (["--out", "x"], 2, "--layer and --out are needed"),
    ],
)
def test_bad_commands_give_one_sentence(model, capsys, words, status, sentence):
    try:
        got = main(["--model", str(model), *words])
    except SystemExit as stop:
        got = stop.code
    assert got == status
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none", "none.gguf", "model.bin"])
def test_no_model_is_looked_for_elsewhere(tmp_path, name):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="model must be a folder or a"):
        capture(tmp_path / name, tmp_path / "out", layer=0)


def test_bundled_survey_agrees_with_the_bundled_traces():
    folder = next(iter(bundled().values())).parent
    with (folder / "survey.csv").open(encoding="utf-8") as file:
        rows = {(int(r["layer"]), int(r["head"])): r for r in csv.DictReader(file)}
    assert len(rows) == 270
    for path in bundled().values():
        trace = read_trace(path)
        layer = Layer(trace.q, trace.k, trace.v, trace.softmax_scale, 0.0)
        number = int(trace.card["layer"])
        heads = [int(head) for head in json.loads(trace.card["heads"])]
        for head, measured in zip(heads, module._survey_layer(number, layer), strict=True):
            for name in list(measured)[3:]:
                # The survey is of float32 arrays, the traces are float16; 1056 tiles a head.
                assert float(rows[number, head][name]) == pytest.approx(measured[name], abs=2.5e-3)


@pytest.fixture
def torch():
    pytest.importorskip("transformers", reason="needs the capture extra: torch, transformers")
    return pytest.importorskip("torch", reason="needs the capture extra: torch, transformers")


def small_model(torch, kind="Llama", **config):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    made = getattr(transformers, f"{kind}Config")(**sizes, **config)
    return getattr(transformers, f"{kind}ForCausalLM")(made).eval()


def test_recording_changes_nothing_and_keeps_what_came_in(torch):
    model = small_model(torch)
    ids = torch.arange(40)[None] % 50
    with torch.no_grad():
        before = model(ids, labels=ids)
        inputs = model(ids, output_hidden_states=True).hidden_states[2]
    layers, loss = record(model, ids, [2, 0])
    assert set(layers) == {0, 2}
    assert loss == pytest.approx(before.loss.item(), abs=1e-6)
    assert math.log(50) - 1 < loss < math.log(50) + 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before.logits)
    one = layers[2]
    assert (one.q.shape, one.k.shape, one.v.shape) == ((4, 40, 8), (2, 40, 8), (2, 40, 8))
    assert one.softmax_scale == pytest.approx(8**-0.5)
    assert one.max_difference < 1e-5
    # V and, at position 0, where the rotation is none, Q are plain projections of the input.
    block = model.model.layers[2]
    with torch.no_grad():
        normed = block.input_layernorm(inputs)
        v = block.self_attn.v_proj(normed)[0].reshape(40, 2, 8).transpose(0, 1)
        q = block.self_attn.q_proj(normed)[0].reshape(40, 4, 8).transpose(0, 1)
    np.testing.assert_allclose(one.v, v.numpy(), atol=1e-5)
    np.testing.assert_allclose(one.q[:, 0], q[:, 0].numpy(), atol=1e-5)
    assert np.abs(one.q[:, 1] - q[:, 1].numpy()).max() > 1e-4


def test_a_sliding_window_is_refused_by_what_it_does(torch):
    model = small_model(torch, "Mistral", sliding_window=4)
    # Attention that differs from row to row needs values that do.
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data *= 50
    with pytest.raises(ValueError, match="layer 1 does more than softmax"):
        record(model, torch.arange(40)[None], [1])
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_is_not_there_is_refused(torch):
    with pytest.raises(ValueError, match=r"layers must be between 0 and 2, got \[3\]"):
        record(small_model(torch), torch.arange(9)[None], [3])
