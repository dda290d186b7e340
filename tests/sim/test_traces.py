"""Trace files: what goes in comes out, and every damaged file is refused in one sentence."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from sim.container import MAX_HEADER
from sim.traces import TraceError, bundled, read_trace, write_trace

SIZES = {"F16": 2, "BF16": 2, "F32": 4}


def pack(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    """Assemble a safetensors file; ``header`` may be bytes, text or an object."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


def layout(shapes: dict[str, tuple[int, ...]], dtype: str = "F16") -> tuple[dict, bytes]:
    """Return a valid header for these shapes, and zeros for its data."""
    header: dict = {}
    position = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * SIZES.get(dtype, 2)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    return header, bytes(position)


SHAPES = {"q": (2, 4, 8), "k": (1, 4, 8), "v": (1, 4, 6)}  # 128, 64 and 48 bytes as F16


def shaped(**shapes: tuple[int, ...]) -> bytes:
    return pack(*layout({**SHAPES, **shapes}))


def entry(name: str, **fields: object) -> bytes:
    """Return a valid file, but for some fields of one tensor."""
    header, data = layout(SHAPES)
    header[name].update(fields)
    return pack(header, data)


def offsets(**pairs: list) -> bytes:
    header, data = layout(SHAPES)
    for name, pair in pairs.items():
        header[name]["data_offsets"] = pair
    return pack(header, data)


def metadata(**fields: object) -> bytes:
    header, data = layout(SHAPES)
    return pack({"__metadata__": fields, **header}, data)


def edited(old: str, new: str) -> bytes:
    """Return a valid file, but for a replacement in its header's text."""
    header, data = layout(SHAPES)
    text = json.dumps(header)
    assert old in text
    return pack(text.replace(old, new, 1), data)


def not_finite(name: str, index: tuple[int, ...], value: float, dtype: str = "F16") -> bytes:
    arrays = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    arrays[name][index] = value
    header, _ = layout(SHAPES, dtype)
    raw = {
        "F16": lambda a: a.astype("<f2").tobytes(),
        "F32": lambda a: a.astype("<f4").tobytes(),
        "BF16": lambda a: (a.view("<u4") >> 16).astype("<u2").tobytes(),
    }[dtype]
    return pack(header, b"".join(raw(arrays[n]) for n in SHAPES))


VALID = shaped()
HEADER, DATA = layout(SHAPES)

DAMAGED = {
    "empty": (b"", "0 bytes long, too short"),
    "seven bytes": (VALID[:7], "7 bytes long, too short"),
    "huge header": (pack(HEADER, DATA, size=MAX_HEADER + 1), "1000001 bytes; at most 1000000"),
    "header of 2**63": (pack(HEADER, DATA, size=1 << 63), "9223372036854775808 bytes; at most"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07ha", "at most 1000000"),
    "header beyond the file": (pack(HEADER, b"", size=90_000), "90000 bytes, but only"),
    "not UTF-8": (pack(b'{"\xff": 1}'), r"not valid UTF-8 \(byte 2\)"),
    "not JSON": (pack("{q: 1}"), "not valid JSON: Expecting property name"),
    "zip": (b"PK\x03\x04" + bytes(4) + VALID, "at most 1000000"),
    "empty header": (pack(b""), "not valid JSON: Expecting value"),
    "JSON with NaN": (edited("[0, 128]", "[0, NaN]"), "not valid JSON: NaN"),
    "endless integer": (edited("[0, 128]", f"[0, {'9' * 5000}]"), "not valid JSON: .*digits"),
    "deep nesting": (pack("[" * 200_000), "the header is not valid JSON: nested too deeply"),
    "a list": (pack([1, 2]), r"must be a JSON object, got \[1, 2\]"),
    "duplicate tensor": (edited('"k": ', '"q": '), "has 'q' twice"),
    "duplicate field": (edited('"dtype"', '"dtype": "F16", "dtype"'), "has 'dtype' twice"),
    "no tensors": (pack({}), "tensor q is missing"),
    "no v": (pack(*layout({"q": (2, 4, 8), "k": (1, 4, 8)})), "tensor v is missing"),
    "another tensor": (shaped(mask=(1, 4, 4)), "unknown tensor 'mask'"),
    "tensor named with markup": (shaped(**{"<b>": (1, 1, 1)}), "unknown tensor '<b>'"),
    "tensor is a list": (pack({**HEADER, "k": [1]}, DATA), r"k must be described .* got \[1\]"),
    "no shape": (
        pack({**HEADER, "k": {"dtype": "F16", "data_offsets": [0, 64]}}, DATA),
        "k must be described by exactly dtype, shape and data_offsets",
    ),
    "a field too many": (entry("v", strides=[1, 2, 3]), "v must be described by exactly"),
    "F64": (entry("q", dtype="F64"), "dtype of q must be F16, BF16 or F32, got 'F64'"),
    "dtype a list": (entry("q", dtype=["F16"]), r"dtype of q must be .* got \['F16'\]"),
    "dtypes differ": (entry("k", dtype="BF16"), "same dtype, got F16, BF16 and F16"),
    "rank 2": (entry("q", shape=[8, 8]), r"q must have rank 3, .* got shape \[8, 8\]"),
    "rank 4": (entry("k", shape=[1, 1, 4, 8]), "k must have rank 3"),
    "rank 0": (entry("k", shape=[]), "k must have rank 3"),
    "shape a number": (entry("v", shape=24), "shape of v must be a list of integers, got 24"),
    "shape with a float": (entry("v", shape=[1, 4.0, 6]), "shape of v must be a list of"),
    "shape with a bool": (entry("k", shape=[True, 4, 8]), "shape of k must be a list of"),
    "negative sides": (entry("q", shape=[-2, -4, 8]), "heads of q must be between .* got -2"),
    "no tokens": (shaped(k=(1, 0, 8), v=(1, 0, 6)), "tokens of k must be between 1 and 131072"),
    "no heads": (shaped(q=(0, 4, 8)), "heads of q must be between 1"),
    "head size 0": (shaped(v=(1, 4, 0)), "head size of v must be between 1 and 1024, got 0"),
    "head size 1025": (shaped(v=(1, 4, 1025)), "head size of v .* got 1025"),
    "too many heads": (shaped(q=(1025, 4, 8)), "heads of q .* got 1025"),
    "too long": (entry("k", shape=[1, 131_073, 8]), "tokens of k .* got 131073"),
    "product beyond 2**64": (
        entry("q", shape=[1 << 32, 1 << 32, 8]),
        "heads of q must be between 1 and 1024, got 4294967296",
    ),
    "side beyond 64 bits": (entry("q", shape=[1 << 70, 4, 8]), "got an integer beyond 64 bits"),
    "largest shape, tiny file": (
        entry("q", shape=[1024, 131_072, 1024]),
        "needs 274877906944 bytes as F16, but its data_offsets span 128",
    ),
    "shape too small": (entry("q", shape=[2, 4, 7]), "needs 112 bytes .* span 128"),
    "offsets of one": (offsets(q=[0]), "data_offsets of q must be two integers"),
    "offsets a string": (offsets(q="0-128"), "data_offsets of q must be two integers"),
    "offsets with a float": (offsets(q=[0, 128.0]), "data_offsets of q must be two integers"),
    "offsets with a bool": (offsets(q=[False, 128]), "data_offsets of q must be two integers"),
    "negative offset": (offsets(q=[-128, 0]), r"data_offsets of q .* got \[-128, 0\]"),
    "offsets backwards": (offsets(k=[192, 128]), "data_offsets of k must be .* begin <= end"),
    "beyond the file": (offsets(v=[193, 241]), "v ends at byte 241 .* only 240: it is cut off"),
    "offset beyond 64 bits": (
        offsets(v=[1 << 80, (1 << 80) + 48]),
        "v ends at byte an integer beyond 64 bits",
    ),
    "offset of 4300 digits": (
        offsets(v=[10**4300 - 48, 10**4300 - 1]),
        "needs 48 bytes as F16, but its data_offsets span 47",
    ),
    "cut off": (VALID[:-1], "v ends at byte 240 of the data, but the file has only 239"),
    "overlap": (offsets(k=[127, 191]), "q and k overlap at byte 127"),
    "same place": (offsets(k=[0, 64], q=[0, 128]), "overlap at byte 0"),
    "hole": (
        pack({**HEADER, "v": {**HEADER["v"], "data_offsets": [194, 242]}}, DATA + b"00"),
        "a hole of 2 bytes between k and v",
    ),
    "hole at the start": (
        pack(
            {
                n: {**e, "data_offsets": [x + 2 for x in e["data_offsets"]]}
                for n, e in HEADER.items()
            },
            DATA + b"00",
        ),
        "a hole of 2 bytes between the header and q",
    ),
    "bytes left over": (VALID + b"12345", "5 bytes are left over after v"),
    "lengths differ": (shaped(v=(1, 5, 6)), "k and v must have the same tokens, got 4 and 5"),
    "KV heads differ": (shaped(v=(2, 4, 6)), "k and v must have the same heads, got 1 and 2"),
    "head sizes differ": (shaped(q=(2, 4, 6)), "q and k must have the same head size, got 6 and 8"),
    "more queries than keys": (shaped(q=(2, 5, 8)), "q must not have more tokens than k, got 5"),
    "no GQA": (
        shaped(q=(3, 4, 8), k=(2, 4, 8), v=(2, 4, 6)),
        "heads of q must be a multiple of those of k, got 3 and 2",
    ),
    "fewer query heads": (
        shaped(q=(1, 4, 8), k=(2, 4, 8), v=(2, 4, 6)),
        "heads of q must be a multiple of those of k, got 1 and 2",
    ),
    "metadata a list": (pack({"__metadata__": [], **HEADER}, DATA), "__metadata__ must be"),
    "metadata a number": (metadata(layer=12), "metadata 'layer' must be a string, got 12"),
    "half a surrogate": (metadata(text="\ud83d"), "metadata 'text' is not valid text"),
    "scale a word": (metadata(softmax_scale="big"), "softmax_scale must be .* got 'big'"),
    "scale NaN": (metadata(softmax_scale="nan"), "softmax_scale must be a finite number above 0"),
    "scale infinite": (metadata(softmax_scale="1e999"), "softmax_scale must be a finite number"),
    "scale 0": (metadata(softmax_scale="0"), "must be a finite number above 0, got '0'"),
    "scale negative": (metadata(softmax_scale="-0.125"), "must be a finite number above 0"),
    "causal a word": (metadata(causal="yes"), "causal must be 'true' or 'false', got 'yes'"),
    "tokens not JSON": (metadata(tokens="a b c d"), "tokens must be a JSON list of strings"),
    "tokens an object": (metadata(tokens='{"a": "b"}'), "tokens must be a JSON list of strings"),
    "tokens numbers": (metadata(tokens="[1, 2, 3, 4]"), "tokens must be a JSON list of strings"),
    "tokens nested": (metadata(tokens="[" * 100_000), "tokens must be a JSON list of strings"),
    "token half a surrogate": (
        metadata(tokens=json.dumps(["a", "b", "c", "\ud83d"])),
        "tokens is not valid text: .* surrogate",
    ),
    "three tokens": (metadata(tokens='["a", "b", "c"]'), "tokens must be 4 strings, got 3"),
    "one head named": (metadata(heads='["3"]'), "heads must be 2 strings, got 1"),
    "heads numbers": (metadata(heads="[3, 4]"), "heads must be a JSON list of strings"),
    "NaN": (not_finite("k", (0, 3, 1), np.nan), "k has .* not finite at head 0, token 3"),
    "infinity in F32": (not_finite("q", (1, 2, 0), np.inf, "F32"), "q has .* at head 1, token 2"),
    "infinity in BF16": (not_finite("v", (0, 0, 5), -np.inf, "BF16"), "v has .* token 0"),
}


def test_the_undamaged_file_is_read():
    trace = read_trace(VALID)
    assert {n: getattr(trace, n).shape for n in SHAPES} == SHAPES
    assert (trace.softmax_scale, trace.causal, trace.tokens, trace.card) == (8**-0.5, True, [], {})


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(name, tmp_path):
    content, sentence = DAMAGED[name]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=sentence) as caught:
        read_trace(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    with pytest.raises(TraceError, match=sentence):
        read_trace(io.BytesIO(content))


def test_every_truncation_is_refused():
    for length in range(len(VALID)):
        with pytest.raises(TraceError):
            read_trace(VALID[:length])


def test_any_flipped_header_byte_gives_a_trace_or_a_sentence():
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(VALID)
        damaged[rng.integers(len(VALID) - len(DATA))] = rng.integers(256)
        try:
            read_trace(bytes(damaged))
        except TraceError:
            refused += 1
    assert refused > 1000


def test_nothing_is_allocated_for_a_false_claim():
    header, _ = layout({"q": (1024, 131_072, 64), "k": (1, 131_072, 64), "v": (1, 131_072, 64)})
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match="cut off"):
            read_trace(pack(header, b"only this"))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("hq", "hkv", "lq", "lk", "d", "dv"),
    [(1, 1, 1, 1, 1, 1), (6, 2, 37, 37, 64, 64), (5, 5, 3, 11, 80, 17), (8, 1, 130, 130, 192, 128)],
)
def test_round_trip(tmp_path, dtype, hq, hkv, lq, lk, d, dv):
    rng = np.random.default_rng(hq + lk)
    q = rng.standard_normal((hq, lq, d)).astype(dtype)
    k = rng.standard_normal((hkv, lk, d)).astype(dtype)
    v = rng.standard_normal((hkv, lk, dv)).astype(dtype)
    tokens = [f" word{i}\n" for i in range(lk)]
    card = {"model": "m", "layer": "7", "heads": json.dumps([str(h + 3) for h in range(hq)])}
    path = tmp_path / "a.safetensors"
    write_trace(path, q, k, v, tokens=tokens, softmax_scale=0.1, causal=False, card=card)
    trace = read_trace(path)
    for array, original in zip((trace.q, trace.k, trace.v), (q, k, v), strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, original)
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 1
    assert (trace.softmax_scale, trace.causal) == (0.1, False)
    assert trace.tokens == tokens
    assert trace.card == card
    assert trace.head_names == [f"layer 7, head {h + 3}" for h in range(hq)]
    by_library = load_file(path)
    assert set(by_library) == {"q", "k", "v"}
    np.testing.assert_array_equal(by_library["k"], k)


def test_bf16_is_widened_exactly():
    # sign | 8 exponent bits | 7 fraction bits, written by hand
    bits = {
        0x0000: 0.0,
        0x3F80: 1.0,
        0xC000: -2.0,
        0x3FC0: 1.5,
        0x4049: 3.140625,
        0x7F7F: (2 - 2**-7) * 2.0**127,
        0x0080: 2.0**-126,
        0x8001: -(2.0**-133),
    }
    row = np.array(list(bits), "<u2").tobytes()
    header, _ = layout({"q": (1, 1, 8), "k": (1, 1, 8), "v": (1, 1, 8)}, "BF16")
    trace = read_trace(pack(header, 3 * row))
    assert trace.q.dtype == np.float32
    assert trace.q[0, 0].tolist() == list(bits.values())
    assert not trace.q.flags.writeable


def test_tensors_may_stand_in_any_order_and_lie_unaligned():
    header, data = layout({"v": (1, 3, 5), "k": (1, 3, 4), "q": (2, 3, 4)}, "F32")
    data = np.arange(15 + 12 + 24, dtype="<f4").tobytes()
    text = json.dumps(header)
    text += " " * ((3 - len(text)) % 8)  # arrays begin at an odd address
    trace = read_trace(pack(text, data))
    assert trace.v.ravel().tolist() == list(range(15))
    assert trace.q.ravel().tolist() == list(range(27, 51))


def test_sources_agree(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(VALID)
    upload = io.BytesIO(VALID)
    upload.seek(17)  # a widget may have read from it before
    for source in (path, str(path), VALID, upload):
        assert read_trace(source).q.shape == (2, 4, 8)
    with pytest.raises(TraceError, match="binary mode, got str"):
        read_trace(io.StringIO("some text"))
    with pytest.raises(TraceError, match="a path, bytes or a binary file, got int"):
        read_trace(3)
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.safetensors")


def test_markup_stays_text(tmp_path):
    markup = "<script>alert('x')</script> & <img src=x onerror=y> **bold** $x$ :red[x]"
    x = np.ones((2, 3, 4), np.float16)
    card = {name: markup for name in ("model", "license", "text", "layer", "command", markup)}
    card["heads"] = json.dumps([markup, "\u202e🤖"])
    path = tmp_path / "markup.safetensors"
    write_trace(path, x, x, x, tokens=[markup, "", "\x00é本"], softmax_scale=1, card=card)
    trace = read_trace(path)
    assert trace.tokens == [markup, "", "\x00é本"]
    assert trace.card == card
    assert trace.head_names[0] == f"layer {markup}, head {markup}"


def test_head_names_without_a_card(tmp_path):
    assert read_trace(VALID).head_names == ["head 0", "head 1"]


@pytest.mark.parametrize("layout_of", [np.asfortranarray, lambda a: a[:, ::2], lambda a: a.T])
def test_memory_order_does_not_matter(tmp_path, layout_of):
    x = layout_of(np.random.default_rng(0).standard_normal((4, 4, 4)).astype(np.float32))
    path = tmp_path / "a.safetensors"
    write_trace(path, x, x, x, softmax_scale=1, card={})
    np.testing.assert_array_equal(read_trace(path).v, x)


ONE = np.ones((1, 2, 4), np.float16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": ONE.astype(np.float64)}, "q must be .* float16 or float32, got float64"),
        ({"k": ONE.tolist()}, "k must be a NumPy array of float16 or float32, got list"),
        ({"v": ONE.astype(">f2")}, "v must be .* got >f2"),
        ({"v": ONE.astype(np.float32)}, "same dtype, got F16, F16 and F32"),
        ({"q": ONE[0]}, "q must have rank 3"),
        ({"q": ONE * np.float16(np.inf)}, "q has a value that is not finite"),
        ({"tokens": ["a"]}, "tokens must be 2 strings, got 1"),
        ({"tokens": [1, 2]}, "tokens must be a JSON list of strings"),
        ({"tokens": ["a", "\ud83d"]}, "not valid text"),
        ({"tokens": ["a", "x" * MAX_HEADER]}, "tokens should be left out"),
        ({"softmax_scale": 0}, "softmax_scale must be a finite number above 0"),
        ({"card": {"layer": 12}}, "card must map strings to strings"),
        ({"card": {"tokens": "[]"}}, "card must not hold 'tokens'"),
        ({"card": {"heads": "[]"}}, "heads must be 1 strings, got 0"),
    ],
)
def test_refused_write_leaves_the_old_file(tmp_path, change, sentence):
    path = tmp_path / "a.safetensors"
    path.write_bytes(VALID)
    arguments = {"q": ONE, "k": ONE, "v": ONE, "softmax_scale": 1, "card": {}, **change}
    with pytest.raises(TraceError, match=sentence):
        write_trace(path, **arguments)
    assert path.read_bytes() == VALID
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(VALID)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sim.container.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_trace(path, ONE, ONE, ONE, softmax_scale=1, card={})
    assert path.read_bytes() == VALID
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_the_library_writes_is_read():
    x = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    trace = read_trace(save({"v": x, "q": x, "k": x}, {"softmax_scale": "0.5"}))
    np.testing.assert_array_equal(trace.q, x)
    assert trace.softmax_scale == 0.5


def test_reading_needs_numpy_alone():
    program = (
        "import sys; sys.modules['safetensors'] = None; import sim.traces as t\n"
        "t.read_trace(next(iter(t.bundled().values())))\n"
        "assert not {'torch', 'transformers', 'numba', 'streamlit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("name", bundled())
def test_bundled(name):
    path = bundled()[name]
    trace = read_trace(path)
    assert path.stat().st_size < 2_750_000
    assert (trace.q.shape, trace.k.shape, trace.v.shape) == (
        (3, 4096, 64),
        (1, 4096, 64),
        (1, 4096, 64),
    )
    assert trace.q.dtype == np.float16
    assert (trace.softmax_scale, trace.causal, len(trace.tokens)) == (0.125, True, 4096)
    assert "".join(trace.tokens).startswith("Compound statements\n***")
    assert sum(not token for token in trace.tokens) < 10
    assert {"model", "license", "text", "layer", "heads", "command"} <= set(trace.card)
    assert f"layer {trace.card['layer']}" in trace.head_names[0]
    by_library = load_file(path)
    for tensor in ("q", "k", "v"):
        np.testing.assert_array_equal(by_library[tensor], getattr(trace, tensor))


def test_two_traces_are_bundled_and_described():
    assert len(bundled()) == 2
    card = (next(iter(bundled().values())).parent / "README.md").read_text(encoding="utf-8")
    for name, path in bundled().items():
        assert name in card
        assert read_trace(path).card["command"] in card


def test_bundled_is_beside_the_module():
    assert all(isinstance(path, Path) and path.is_absolute() for path in bundled().values())
