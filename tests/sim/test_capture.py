"""Capturing: what is kept is what the attention received, finished files stay, and go on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from sim import capture as module
from sim.attention_hook import Layer, Shape
from sim.calibration import TRIALS
from sim.capture import capture
from sim.gap_maps import GapMapError, read_gap_maps
from sim.gap_scans import decode_gaps, prefill_gaps
from sim.model import Model, Tokens, load
from sim.targets import TARGETS
from sim.texts import Text
from sim.traces import read_trace

TEXTS = [Text("A tale", "a tale", "CC0-1.0"), Text("B tale", "b tale", "MIT")]
PREFILL, DECODE = (
    [one for one in TARGETS.values() if one.phase == phase] for phase in ("prefill", "decode")
)


def made_up_layer(number: int, length: int, steps: int = 0) -> Layer:
    """6 query and 2 KV heads; with ``steps``, of decoding so many tokens."""
    rng = np.random.default_rng(number)
    q, k, v = (
        rng.standard_normal((heads, 2000, size)).astype(np.float32)
        for heads, size in ((6, 16), (2, 16), (2, 12))
    )
    first, last = (length if steps else 0), length + steps
    return Layer(3 * q[:, first:last], k[:, :last], v[:, :last], 0.25, 1e-6 * (number + 1))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Stand-in for torch and a model of three layers; ``runs`` lists the forward passes."""
    state = SimpleNamespace(runs=[], fail_at=None, config="c", path=tmp_path / "model.gguf")
    state.path.write_bytes(b"")

    def made_up(model):
        config = SimpleNamespace(max_position_embeddings=1500, get_text_config=lambda: config)
        tokenizer = SimpleNamespace(decode=lambda ids: f"new{ids[0]}")
        return Model(SimpleNamespace(config=config), tokenizer, model.name)

    def run(network, ids, layers, take, *, phases, kv_heads, decode_tokens, generated):
        state.runs.append((len(ids), tuple(phases), decode_tokens))
        generated += range(decode_tokens)
        share = slice(None) if kv_heads is None else list(kv_heads)
        heads = share if kv_heads is None else [3 * kv + i for kv in kv_heads for i in range(3)]
        for phase in phases:
            for number in layers:
                if state.fail_at == (len(ids), phase, number):
                    raise KeyboardInterrupt
                one = made_up_layer(number, len(ids), decode_tokens if phase == "decode" else 0)
                part = Layer(one.q[heads], one.k[share], one.v[share], 0.25, one.max_difference)
                take(phase, number, part)
        return 1.25

    def probe(network, layers):
        shape = Shape(6, 2, 16, 12)
        return {number: shape for number in (range(3) if layers is None else sorted(layers))}

    def tokenize(tokenizer, text, length):
        if length > 1400:
            raise ValueError(f"the text {text.title!r} has only 1400 of this model's tokens")
        return Tokens(list(range(length)), [f"{text.content[0]}{i}" for i in range(length)])

    monkeypatch.setattr(module, "load", made_up)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "probe", probe)
    monkeypatch.setattr(module, "tokenize", tokenize)
    monkeypatch.setattr(module, "config_hash", lambda network: state.config)
    return state


def captured(machine, out, **options):
    return capture(machine.path, out, **{"texts": TEXTS, "lengths": [300, 130], **options})


def test_importing_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import sim.capture, sim.model, sim.attention_hook"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("keep", ["maps", "counts"])
def test_gap_maps_are_those_of_every_layer(machine, tmp_path, keep):
    report = captured(machine, tmp_path / "out", keep=keep, decode_tokens=4)
    assert report["captured"] == 4
    assert machine.runs == [(300, ("prefill", "decode"), 4), (130, ("prefill", "decode"), 4)] * 2
    maps = read_gap_maps(tmp_path / "out")
    assert [(one.name, one.text, one.license) for one in maps.samples][:5] == [
        ("text0-300-prefill", "a tale", "CC0-1.0"),
        ("text0-300-decode", "a tale", "CC0-1.0"),
        ("text0-130-prefill", "a tale", "CC0-1.0"),
        ("text0-130-decode", "a tale", "CC0-1.0"),
        ("text1-300-prefill", "b tale", "MIT"),
    ]
    assert maps.samples[3].steps == (131, 132, 133, 134)
    assert maps.layers == (0, 1, 2)
    assert (maps.heads, maps.kv_heads) == (tuple("012345"), tuple("01"))
    assert maps.thresholds == (None if keep == "maps" else TRIALS)
    prefill, decode = maps.samples[:2]
    for number in maps.layers:
        layer = made_up_layer(number, 300)
        expected = prefill_gaps(layer.q, layer.k, PREFILL, softmax_scale=0.25, lengths=[300])
        for target in PREFILL:
            gaps = maps.gaps(target, prefill, number)
            if keep == "maps":
                assert np.array_equal(gaps, expected[300, target.name][0])
                assert np.array_equal(
                    maps.mass(target, prefill, number), expected[300, target.name][1]
                )
            assert gaps.shape == expected[300, target.name][0].shape
        layer = made_up_layer(number, 300, 4)
        expected = decode_gaps(layer.q, layer.k, decode.steps, DECODE, softmax_scale=0.25)
        for target in DECODE:
            gaps = maps.gaps(target, decode, number)
            assert gaps.shape == expected[target.name][0].shape
            if keep == "maps":
                assert np.array_equal(gaps, expected[target.name][0])


def test_the_card_and_the_record_tell_where_from(machine, tmp_path):
    out = tmp_path / "some where" / "out"
    options = {"layers": [2, 0], "kv_heads": [1], "phases": ["prefill"], "model_license": "MIT"}
    report = captured(machine, out, **options)
    record = json.loads((out / "capture.json").read_text(encoding="utf-8"))
    assert {**record, "captured": 4} == report
    maps = read_gap_maps(out)
    assert (maps.layers, maps.heads, maps.kv_heads) == ((0, 2), ("3", "4", "5"), ("1",))
    assert maps.card == {
        name: record[name] for name in ("model", "model_config", "command", "date", "versions")
    } | {"license": "MIT", "head_dim": "16"}
    assert record["model"] == "model.gguf"
    assert record["files"] == [f"{one.name}.safetensors" for one in maps.samples]
    assert record["checks"]["text1-130"] == {"next_token_loss": 1.25, "max_difference": 3e-6}
    assert [one["title"] for one in record["texts"]] == ["a tale", "b tale"]
    assert record["command"] == (
        "skip-softmax capture model.gguf --out out --texts 'a tale' 'b tale' "
        "--text-license CC0-1.0 --layers 2,0 --kv-heads 1 --lengths 300 130 --phases prefill "
        "--decode-tokens 16 --keep maps --model-license MIT"
    )
    assert record["versions"].startswith("Python 3.")
    for path in out.iterdir():
        assert str(tmp_path) not in path.read_bytes().decode("latin-1")


def test_traces_of_prefill_and_decode(machine, tmp_path):
    out = tmp_path / "out"
    captured(machine, out, keep="qkv", kv_heads=[1], decode_tokens=4, texts=TEXTS[:1])
    assert len(list(out.glob("*.safetensors"))) == 2 * 2 * 3
    for phase, steps in (("prefill", 0), ("decode", 4)):
        trace = read_trace(out / f"text0-130-{phase}-layer2.safetensors")
        layer = made_up_layer(2, 130, steps)
        np.testing.assert_array_equal(trace.q, layer.q[3:].astype(np.float16))
        np.testing.assert_array_equal(trace.k, layer.k[1:].astype(np.float16))
        np.testing.assert_array_equal(trace.v, layer.v[1:].astype(np.float16))
        assert trace.head_names == [f"layer 2, head {head}" for head in (3, 4, 5)]
        assert (trace.softmax_scale, trace.causal) == (0.25, True)
        assert trace.tokens == [f"A{i}" for i in range(130)] + [f"new{i}" for i in range(steps)]
        assert json.loads(trace.card["kv_heads"]) == ["1"]
        assert (trace.card["text"], trace.card["phase"]) == ("a tale", phase)
    with pytest.raises(GapMapError, match="'out' holds traces, no gap maps"):
        read_gap_maps(out)


@pytest.mark.parametrize("keep", ["maps", "qkv"])
def test_an_interrupted_capture_goes_on(machine, tmp_path, keep):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    captured(machine, whole, keep=keep)
    for fail_at in ((300, "prefill", 1), (300, "decode", 2), (130, "prefill", 0)):
        machine.runs.clear()
        machine.fail_at = fail_at
        with pytest.raises(KeyboardInterrupt):
            captured(machine, parts, keep=keep)
        assert not list(parts.glob(".*"))
        assert len(machine.runs) == (2 if fail_at[0] == 130 else 1)
    names = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert "text0-300-prefill" in " ".join(names)
    if keep == "maps":
        with pytest.raises(GapMapError, match="unfinished, 6 of 8 samples are missing"):
            read_gap_maps(parts)
        assert len(read_gap_maps([parts / name for name in names]).samples) == 2
    machine.runs.clear()
    machine.fail_at = None
    assert captured(machine, parts, keep=keep)["captured"] == 3
    assert [length for length, *_ in machine.runs] == [130, 300, 130]
    assert {name: (parts / name).stat().st_mtime_ns for name in names} == names
    for path in whole.glob("*.safetensors"):
        same = (parts / path.name).read_bytes()
        assert same.replace(b"parts", b"whole") == path.read_bytes() or keep == "qkv"
    machine.runs.clear()
    assert captured(machine, parts, keep=keep)["captured"] == 0
    assert machine.runs == []


def test_only_the_missing_phase_is_run_again(machine, tmp_path):
    captured(machine, tmp_path / "out")
    (tmp_path / "out/text1-130-prefill.safetensors").unlink()
    machine.runs.clear()
    captured(machine, tmp_path / "out")
    assert machine.runs == [(130, ("prefill",), 0)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lengths": [300]}, r"other lengths, \[300, 130\] and not \[300\]: give another folder"),
        ({"layers": [0]}, r"other layers, None and not \[0\]"),
        ({"kv_heads": [0]}, "other kv_heads"),
        ({"keep": "counts"}, "other keep, maps and not counts"),
        ({"phases": ["decode"]}, "other phases"),
        ({"decode_tokens": 3}, "other decode_tokens, 16 and not 3"),
        ({"texts": TEXTS[:1]}, "other texts: give another folder"),
        ({"texts": [TEXTS[0]._replace(content="B"), TEXTS[1]]}, "other texts: give"),
        ({"model_name": "new"}, "other model, model.gguf and not new"),
    ],
)
def test_another_capture_is_not_mixed_in(machine, tmp_path, change, sentence):
    captured(machine, tmp_path / "out")
    machine.runs.clear()
    with pytest.raises(ValueError, match=sentence) as caught:
        captured(machine, tmp_path / "out", **change)
    assert "\n" not in str(caught.value)
    assert machine.runs == []


def test_another_model_of_the_same_name_is_not_mixed_in(machine, tmp_path):
    captured(machine, tmp_path / "out")
    machine.config = "d"
    (tmp_path / "out/text0-130-decode.safetensors").unlink()
    with pytest.raises(ValueError, match="a capture of another model of this name"):
        captured(machine, tmp_path / "out")


def test_the_date_is_that_of_the_beginning(machine, tmp_path):
    captured(machine, tmp_path / "out")
    path = tmp_path / "out/capture.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "date": "2026-01-01"}), encoding="utf-8")
    (tmp_path / "out/text0-300-decode.safetensors").unlink()
    assert captured(machine, tmp_path / "out")["date"] == "2026-01-01"
    file = tmp_path / "out/text0-300-decode.safetensors"
    assert read_gap_maps(file).card["date"] == "2026-01-01"


def test_folders_of_other_things_are_left_alone(machine, tmp_path):
    (tmp_path / "out").mkdir()
    captured(machine, tmp_path / "out")  # an empty folder is fine
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"out must be a folder, but .*file is a file"):
        captured(machine, tmp_path / "file")
    with pytest.raises(ValueError, match="holds other files: give a folder that is new, empty"):
        captured(machine, tmp_path)
    for text in ("", "[]", "{}", "\x80"):
        (tmp_path / "out/capture.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"capture\.json is damaged: give another folder"):
            captured(machine, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"texts": []}, "texts must be at least one"),
        ({"lengths": []}, r"lengths must be between 2 and 131072, got \[\]"),
        ({"lengths": [1]}, "lengths must be between 2 and"),
        ({"lengths": [300, 300]}, r"lengths must differ, got \[300, 300\]"),
        ({"lengths": [1401]}, "the text 'a tale' has only 1400 of this model's tokens"),
        ({"lengths": [1490]}, "lengths and 16 tokens to decode must fit in the model's 1500"),
        ({"lengths": [1501], "phases": ["prefill"]}, "lengths must fit in the model's 1500"),
        ({"phases": ["train"]}, "phases must be of prefill, decode, got"),
        ({"phases": []}, "phases must be of"),
        ({"decode_tokens": 0}, "decode_tokens must be between 1 and 1024, got 0"),
        ({"keep": "all"}, "keep must be one of maps, counts, qkv, got 'all'"),
        ({"kv_heads": [0, 2]}, r"kv_heads must be between 0 and 1, got \[0, 2\]"),
    ],
)
def test_bad_arguments_are_named_before_work_starts(machine, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        captured(machine, tmp_path / "out", **change)
    assert machine.runs == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keep", "times"), [("maps", 1), ("counts", 0.5), ("qkv", 1)], ids=["maps", "counts", "qkv"]
)
def test_a_full_disk_is_seen_before_work_starts(machine, tmp_path, monkeypatch, keep, times):
    captured(machine, tmp_path / "done", keep=keep)
    size = sum(path.stat().st_size for path in (tmp_path / "done").glob("*.safetensors"))
    machine.runs.clear()
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda place: real._replace(free=int(times * 0.4 * size))
    )
    with pytest.raises(ValueError, match=r"the capture needs .* GB, but .*new has .* GB free"):
        captured(machine, tmp_path / "new", keep=keep)
    assert machine.runs == []
    assert captured(machine, tmp_path / "done", keep=keep)["captured"] == 0  # nothing to write


def test_a_write_that_fails_keeps_what_was_finished(machine, tmp_path, monkeypatch):
    write = module.GapMaps.write

    def full(self, path):
        if "text1" in path.name:
            raise OSError(28, "No space left on device", str(path))
        write(self, path)

    monkeypatch.setattr(module.GapMaps, "write", full)
    with pytest.raises(OSError, match="No space left"):
        captured(machine, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    monkeypatch.undo()


def test_values_beyond_float16_are_refused(machine, tmp_path, monkeypatch):
    layer = made_up_layer(0, 300)
    layer.v[1, 3, 0] = 70_000
    monkeypatch.setattr(
        module, "run", lambda network, ids, layers, take, **_: take("prefill", 0, layer)
    )
    with pytest.raises(ValueError, match="v has a value that is not finite at head 1, token 3"):
        captured(machine, tmp_path / "out", keep="qkv", lengths=[300])
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_progress_counts_layers(machine, tmp_path, capsys):
    captured(machine, tmp_path / "out", progress=True)
    assert "24/24" in capsys.readouterr().err
    captured(machine, tmp_path / "quiet")
    assert capsys.readouterr().err == ""


# With torch: a tiny random model, from its folder to gap maps.

STORY = Text("one two three " * 100, "a count", "CC0-1.0")


def test_a_model_is_captured(tiny_folder, tmp_path):
    maps, traces = tmp_path / "maps", tmp_path / "traces"
    options = {"texts": [STORY], "lengths": [150, 200], "decode_tokens": 5, "layers": [0, 2]}
    report = capture(tiny_folder, maps, **options)
    assert all(check["max_difference"] < 1e-4 for check in report["checks"].values())
    capture(tiny_folder, traces, keep="qkv", **options)
    found = read_gap_maps(maps)
    assert len(found.samples) == 4
    assert found.card["model"] == "tiny"
    below = 0
    for sample in found.samples:
        for layer in (0, 2):
            trace = read_trace(traces / f"{sample.name}-layer{layer}.safetensors")
            assert len(trace.tokens) == trace.k.shape[1]
            for target in (one for one in TARGETS.values() if one.phase == sample.phase):
                gaps = found.gaps(target, sample, layer)
                if sample.phase == "decode":
                    packed = decode_gaps(
                        trace.q, trace.k, sample.steps, [target], softmax_scale=trace.softmax_scale
                    )[target.name]
                else:
                    packed = prefill_gaps(
                        trace.q,
                        trace.k,
                        [target],
                        softmax_scale=trace.softmax_scale,
                        lengths=[sample.length],
                    )[sample.length, target.name]
                np.testing.assert_allclose(gaps, packed[0], atol=0.02)
                np.testing.assert_allclose(found.mass(target, sample, layer), packed[1], atol=2e-4)
                below += (gaps < 0).sum()
    assert below > 0
    first = read_trace(traces / "text0-150-decode-layer0.safetensors")
    assert first.q.shape == (4, 5, 8)
    assert first.tokens[:3] == ["<s>", "one", " two"]


def test_a_model_that_does_not_fit_is_refused(tiny_folder, tmp_path):
    for change, sentence in (
        ({}, "the text 'a count' has only 301 of this model's tokens, not 302"),
        ({"lengths": [600]}, "must fit in the model's 512, got 600"),
        ({"layers": [3]}, r"layers must be between 0 and 2, got \[3\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            capture(tiny_folder, tmp_path / "out", **{"texts": [STORY], "lengths": [302], **change})
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_needs_no_square(tiny_folder, tmp_path, monkeypatch):
    loaded = load(tiny_folder)
    loaded.network.config.max_position_embeddings = 4096
    monkeypatch.setattr(module, "load", lambda model: loaded)
    text = STORY._replace(content=7 * STORY.content)
    tracemalloc.start()
    try:
        capture(tiny_folder, tmp_path / "out", texts=[text], lengths=[2048], layers=[1])
        assert tracemalloc.get_traced_memory()[1] < 4 * 2048 * 2048  # one head, of four
    finally:
        tracemalloc.stop()
