"""Gap maps: what scanning gives is kept, counts are exact, and damaged files are refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sim.calibration import TRIALS
from sim.container import MAX_HEADER
from sim.gap_maps import (
    GapMapError,
    GapMaps,
    Sample,
    bundled_gap_maps,
    count_gaps,
    read_gap_maps,
    tiles_of_row,
)
from sim.gap_scans import decode_gaps, prefill_gaps
from sim.targets import TARGETS, targets_of
from sim.threshold import ln_threshold
from sim.traces import Trace, bundled, read_trace

PREFILL, DECODE = targets_of("prefill"), targets_of("decode")
SCALE = 0.3


def made_up_trace(length: int = 700, seed: int = 0, rows: int | None = None, **card: str) -> Trace:
    """4 query and 2 KV heads whose gaps spread over many thresholds."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((heads, length, 16)).astype(np.float32) for heads in (4, 2))
    blocks = rng.uniform(-14, 0, (2, -(-length // 128)))  # natural-log units, a run of keys alike
    blocks[:, 0] = -1
    q[..., 0] = 2
    k[..., 0] = blocks.repeat(128, axis=1)[:, :length] / (2 * SCALE)
    q = q[:, length - (rows or length) :]
    card = {"layer": "7", "text": "A tale", "model": "made up", **card}
    return Trace(q, k, k, SCALE, True, [], card)


@pytest.fixture(scope="module")
def maps() -> GapMaps:
    traces = [made_up_trace(layer="7"), made_up_trace(seed=1, layer="9")]
    return GapMaps.from_traces(traces, lengths=[130, 700])


def written(maps: GapMaps, folder: Path) -> Path:
    path = folder / "maps.safetensors"
    maps.write(path)
    return path


def literal_gaps(q, k, rows, keys, order):
    """Gap and mass of each visited tile of one head, by the words of the rule."""
    length = len(q)
    scores = SCALE * q.astype(np.float64) @ k.astype(np.float64).T
    scores[np.triu_indices(length, 1)] = -np.inf
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    gaps, masses = [], []
    for start in range(0, length, rows):
        group = slice(start, min(start + rows, length))
        n = -(-group.stop // keys)
        tiles = [slice(j * keys, min((j + 1) * keys, length)) for j in range(n)]
        visit = list(range(n))
        if order == "ends_first":
            visit = [n - 1, *([0] if n > 1 else []), *range(n - 2, 0, -1)]
        m = np.full(group.stop - group.start, -np.inf)
        found = {}
        for j in visit:
            tile_max = scores[group, tiles[j]].max(axis=1)
            with np.errstate(invalid="ignore"):
                row_gap = np.where(tile_max == -np.inf, -np.inf, tile_max - m)
            found[j] = row_gap.max()
            m = np.maximum(m, tile_max)
        gaps += [found[j] for j in range(n)]
        masses += [p[group, tiles[j]].sum() / length for j in range(n)]
    return np.array(gaps), np.array(masses)


@pytest.mark.parametrize("target", PREFILL, ids=lambda one: one.name)
@pytest.mark.parametrize("length", [130, 700])
def test_prefill_is_the_rule(maps, target, length):
    sample = next(s for s in maps.samples if (s.length, s.phase) == (length, "prefill"))
    trace = made_up_trace(seed=1)
    gaps, mass = maps.gaps(target, sample, 9), maps.mass(target, sample, 9)
    assert gaps.dtype == mass.dtype == np.float32
    for head in range(4):
        expected = literal_gaps(
            trace.q[head, :length], trace.k[head // 2, :length], *target.tile, target.order
        )
        np.testing.assert_allclose(gaps[head], expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mass[head], expected[1], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(mass.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("target", PREFILL, ids=lambda one: one.name)
def test_one_pass_gives_what_each_kernel_would(maps, target):
    sample = maps.samples[2]
    trace = made_up_trace()
    one = target.scan(trace.q, trace.k, softmax_scale=SCALE)
    gaps = maps.gaps(target, sample, 7)
    assert np.array_equal(gaps, one.gap[:, one.grid.visited_tiles()])
    for threshold in (1e-4, 0.01, 0.5):
        sparsity = (gaps < ln_threshold(threshold)).mean(axis=1)
        assert sparsity.tolist() == one.decide(threshold).sparsity.tolist()
    assert 0 < (gaps < ln_threshold(0.01)).sum() <= (gaps < ln_threshold(0.5)).sum() < gaps.size


@pytest.mark.parametrize("target", DECODE, ids=lambda one: one.name)
def test_decode_is_the_last_rows(maps, target):
    sample = next(s for s in maps.samples if (s.length, s.phase) == (700, "decode"))
    assert sample.steps == tuple(range(685, 701))
    trace = made_up_trace()
    gaps, mass = maps.gaps(target, sample, 7), maps.mass(target, sample, 7)
    group = 2 if target.vote == "group" else 1
    assert len(gaps) == 4 // group == len(maps.rows(target))
    place = 0
    for step in sample.steps:
        n = -(-step // target.tile[1])
        for vote in range(len(gaps)):
            heads = range(vote * group, (vote + 1) * group)
            row_gaps, masses = [], []
            for head in heads:
                scores = SCALE * trace.k[head // 2, :step].astype(float) @ trace.q[head, step - 1]
                p = np.exp(scores - scores.max())
                starts = np.arange(0, step, target.tile[1])
                top = np.maximum.reduceat(scores, starts)
                before = np.concatenate([[-np.inf], np.maximum.accumulate(top)[:-1]])
                if target.seeded:
                    before = np.maximum(before, max(top[0], top[-1]))
                row_gaps.append(top - before)
                masses.append(np.add.reduceat(p, starts) / p.sum())
            part = slice(place, place + n)
            np.testing.assert_allclose(gaps[vote, part], np.max(row_gaps, axis=0), atol=1e-4)
            np.testing.assert_allclose(
                mass[vote, part], np.mean(masses, axis=0) / 16, rtol=1e-3, atol=1e-8
            )
        place += n
    assert place == gaps.shape[1] == tiles_of_row(target, sample)


def test_lengths_default_to_halves():
    maps = GapMaps.from_traces([made_up_trace(1100)])
    assert [(one.length, one.phase) for one in maps.samples] == [
        (550, "prefill"),
        (550, "decode"),
        (1100, "prefill"),
        (1100, "decode"),
    ]


def test_decoded_tokens_replace_the_last_rows():
    traces = [made_up_trace(200), made_up_trace(203, rows=3)]
    maps = GapMaps.from_traces(traces, lengths=[200])
    assert [(one.name, one.steps) for one in maps.samples] == [
        ("text0-200-prefill", ()),
        ("text0-200-decode", (201, 202, 203)),
    ]
    gaps = maps.gaps(TARGETS["ours", "decode"], maps.samples[1], 7)
    last = decode_gaps(
        traces[1].q, traces[1].k, [201, 202, 203], [TARGETS["ours", "decode"]], softmax_scale=SCALE
    )
    assert np.array_equal(gaps, last["ours"][0])


def test_progress_reaches_the_end():
    shares: list[float] = []
    GapMaps.from_traces([made_up_trace(100), made_up_trace(100, layer="8")], progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) == 8


@pytest.mark.parametrize(
    ("traces", "lengths", "sentence"),
    [
        ([], None, "traces must be at least one"),
        ([made_up_trace(), made_up_trace()], None, "two traces of layer 7 over 'A tale'"),
        ([made_up_trace(layer="")], None, "must say their layer, a number, .* got ''"),
        ([made_up_trace(layer="twelve")], None, "got 'twelve'"),
        ([made_up_trace(), made_up_trace(layer="8", heads='["8", "9", "10", "11"]')], None, "same"),
        ([made_up_trace(), made_up_trace(layer="8", model="another")], None, "of one model"),
        ([made_up_trace(), made_up_trace(layer="8", text="B")], None, "8 is missing .* 'A tale'"),
        ([made_up_trace()], [701], "between 2 and a trace's 700 tokens"),
        ([made_up_trace()], [], "between 2 and"),
        ([replace(made_up_trace(), causal=False)], None, "must be causal"),
    ],
)
def test_traces_that_do_not_belong_together(traces, lengths, sentence):
    with pytest.raises(GapMapError, match=sentence) as caught:
        GapMaps.from_traces(traces, lengths=lengths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 7, 400])
def test_counts_are_exact_at_their_thresholds(size):
    rng = np.random.default_rng(size)
    ln = ln_threshold(TRIALS)
    gap = rng.uniform(-18, 3, (2, 3, size)).astype(np.float32)
    gap[..., : size // 3] = rng.choice(ln, (2, 3, size // 3))  # ties with a threshold
    gap[..., -1] = np.inf
    mass = rng.random(gap.shape).astype(np.float32) / size
    count, total = count_gaps(gap, mass, ln)
    assert count.dtype == (np.uint8 if size < 256 else count.dtype)
    assert (count.sum(axis=2, dtype=int) == size).all()
    for i, one in enumerate(ln):
        below = gap < one
        assert np.array_equal(count[..., : i + 1].sum(axis=2, dtype=int), below.sum(axis=2))
        np.testing.assert_allclose(
            total[..., : i + 1].sum(axis=2, dtype=float),
            np.where(below, mass, 0).sum(axis=2),
            rtol=2e-3,
            atol=1e-6,
        )


def test_counts_of_many_tiles_do_not_wrap():
    gap = np.full((1, 70_000), -1, np.float32)
    count, _ = count_gaps(gap, np.zeros_like(gap), np.array([-2, 0], np.float32))
    assert count.tolist() == [[0, 70_000, 0]]
    assert count.dtype == np.uint32


def test_counted_maps_answer_like_full_ones(maps):
    counted = maps.counted()
    for sample in maps.samples:
        for target in (one for one in maps.targets if one.phase == sample.phase):
            for layer in maps.layers:
                full, few = (one.gaps(target, sample, layer) for one in (maps, counted))
                mass, some = (one.mass(target, sample, layer) for one in (maps, counted))
                assert few.shape == full.shape == some.shape
                assert few.dtype == some.dtype == np.float32
                assert (np.diff(few[few < np.inf]) >= 0).sum() >= (few < np.inf).sum() - len(few)
                for ln in ln_threshold(TRIALS):
                    assert np.array_equal((few < ln).sum(axis=1), (full < ln).sum(axis=1))
                    dropped, about = (
                        np.where(gaps < ln, share, 0).sum(axis=1)
                        for gaps, share in ((full, mass), (few, some))
                    )
                    np.testing.assert_allclose(dropped, about, rtol=2e-3, atol=1e-6)


def test_a_threshold_that_meets_a_gap_skips_it_not():
    trace = made_up_trace()
    full = GapMaps.from_traces([trace], lengths=[700])
    target, sample = PREFILL[0], full.samples[0]
    gaps = full.gaps(target, sample, 7)
    gap = np.sort(gaps[gaps < 0])[20]
    counted = full.counted([float(np.exp(gap.astype(float)))])
    ln = ln_threshold(counted.thresholds)[0]
    assert abs(ln - gap) < 1e-6
    assert (counted.gaps(target, sample, 7) < ln).sum() == (full.gaps(target, sample, 7) < ln).sum()


@pytest.mark.parametrize("counted", [False, True])
def test_round_trip(maps, tmp_path, counted):
    maps = maps.counted([0.001, 0.1]) if counted else maps
    path = written(maps, tmp_path)
    again = read_gap_maps(path)
    for name in ("samples", "layers", "heads", "kv_heads", "targets", "thresholds", "card"):
        assert getattr(again, name) == getattr(maps, name), name
    assert again.arrays.keys() == maps.arrays.keys()
    for name, pair in maps.arrays.items():
        for array, original in zip(again.arrays[name], pair, strict=True):
            assert array.dtype == original.dtype
            np.testing.assert_array_equal(array, original)
            assert not array.flags.writeable
    assert "text0-700-decode/nvidia/mass" in load_file(path)
    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert read_gap_maps(source).samples == maps.samples


def one_sample(maps: GapMaps, index: int, **changes: object) -> GapMaps:
    sample = maps.samples[index]
    targets = tuple(one for one in maps.targets if one.phase == sample.phase)
    arrays = {(sample.name, one.name): maps.arrays[sample.name, one.name] for one in targets}
    return replace(maps, samples=(sample,), targets=targets, arrays=arrays, **changes)


def test_files_of_one_capture_join(maps, tmp_path):
    paths = []
    for i, sample in enumerate(maps.samples):
        paths.append(tmp_path / f"{sample.name}.safetensors")
        one_sample(maps, i, card={**maps.card, "date": f"day {i // 2}"}).write(paths[-1])
    joined = read_gap_maps(paths)
    assert joined.samples == maps.samples
    assert set(joined.targets) == set(maps.targets)
    assert joined.card == maps.card  # the date, on which they differ, is gone
    target, sample = TARGETS["ours", "decode"], maps.samples[3]
    np.testing.assert_array_equal(joined.gaps(target, sample, 9), maps.gaps(target, sample, 9))

    with pytest.raises(GapMapError, match="different samples, got one twice"):
        read_gap_maps([paths[0], paths[0]])
    other = tmp_path / "other.safetensors"
    one_sample(maps, 1, card={"model": "another"}).write(other)
    with pytest.raises(GapMapError, match="one capture, but their models differ"):
        read_gap_maps([paths[0], other])
    one_sample(maps.counted(), 1).write(other)
    with pytest.raises(GapMapError, match="one capture, but their thresholds differ"):
        read_gap_maps([paths[0], other])
    with pytest.raises(GapMapError, match="at least one file"):
        read_gap_maps([])


def test_files_that_lack_a_kernel_join_without_it(maps, tmp_path):
    """As when this version goes on with a capture that an older one began."""
    old, new = (one_sample(maps, i) for i in (0, 2))
    lacking = tuple(one for one in old.targets if one.name != "nvidia-256")
    arrays = {key: pair for key, pair in old.arrays.items() if key[1] != "nvidia-256"}
    paths = [tmp_path / "old.safetensors", tmp_path / "new.safetensors", tmp_path / "decode"]
    replace(old, targets=lacking, arrays=arrays).write(paths[0])
    new.write(paths[1])
    one_sample(maps, 1).write(paths[2])
    joined = read_gap_maps(paths)
    assert joined.targets == (*lacking, *DECODE)
    with pytest.raises(ValueError, match=r"not for nvidia-256 \(prefill\)"):
        joined.gaps(TARGETS["nvidia-256", "prefill"], new.samples[0], 7)
    joined.write(tmp_path / "joined")
    assert read_gap_maps(tmp_path / "joined").samples == joined.samples


def test_the_card_states_head_dim(maps):
    assert maps.card["head_dim"] == "16"
    wide = replace(made_up_trace(layer="9"), q=np.zeros((4, 700, 8)), k=np.zeros((2, 700, 8)))
    assert "head_dim" not in GapMaps.from_traces([made_up_trace(), wide], lengths=[130]).card


def test_sparsity_counts_the_gaps_below(maps):
    counted = maps.counted([0.001, 0.01, 0.1])
    wanted = [0.1, 1e-3, 0.05, 1.0, 0.01, 0.0005, 1e-9, 0.0]  # in no order, some between, some out
    for sample in maps.samples:
        for target in targets_of(sample.phase):
            tiles = tiles_of_row(target, sample)
            for layer, row in ((7, 0), (9, 1)):
                index, ln = maps.layers.index(layer), ln_threshold(wanted)
                gaps = maps.gaps(target, sample, layer)[row]
                exact = [(gaps < one).sum() / tiles for one in ln]
                assert maps.sparsity(target, sample, wanted)[index, row].tolist() == exact
                got = counted.sparsity(target, sample, wanted)[index, row]
                assert [got[0], got[1], got[4]] == [exact[0], exact[1], exact[4]]
                assert [got[3], *got[-2:]] == [exact[0], 0, 0]  # nothing is known above the last
                spread = counted.gaps(target, sample, layer)[row]
                for lam, share in zip(ln, got, strict=True):
                    assert abs((spread < lam).sum() - share * tiles) < 0.51
    with pytest.raises(ValueError, match="no sample 'elsewhere'"):
        maps.sparsity(TARGETS["ours", "prefill"], replace(maps.samples[0], name="elsewhere"), [0.1])


def test_a_folder_is_read_once_it_is_finished(maps, tmp_path):
    names = [f"{sample.name}.safetensors" for sample in maps.samples]
    with pytest.raises(GapMapError, match=r"is no capture: it holds no capture\.json"):
        read_gap_maps(tmp_path)
    record = tmp_path / "capture.json"
    record.write_text(json.dumps({"keep": "maps", "files": names}))
    for i, name in enumerate(names):
        with pytest.raises(GapMapError, match=f"unfinished, {4 - i} of 4 samples are missing"):
            read_gap_maps(tmp_path)
        one_sample(maps, i).write(tmp_path / name)
    assert read_gap_maps(tmp_path).samples == maps.samples
    for text, sentence in {
        "{": "not valid JSON",
        "[]": "must list its files",
        '{"files": []}': "must list its files",
        '{"files": ["../a"]}': "must list its files",
        '{"files": ["a"], "keep": "qkv"}': "holds traces, no gap maps",
    }.items():
        record.write_text(text)
        with pytest.raises(GapMapError, match=sentence):
            read_gap_maps(tmp_path)


def test_what_is_not_there_is_named(maps):
    prefill, decode = maps.samples[:2]
    target = TARGETS["ours", "prefill"]
    with pytest.raises(ValueError, match="layer must be one of 7, 9, got 8"):
        maps.gaps(target, prefill, 8)
    with pytest.raises(ValueError, match="target is for prefill, but the sample is of decode"):
        maps.gaps(target, decode, 7)
    with pytest.raises(ValueError, match=r"made for ours \(prefill\), .* tiles of 32 × 128: "):
        maps.mass(replace(target, tile=(32, 128)), prefill, 7)
    with pytest.raises(ValueError, match="no sample 'elsewhere'"):
        maps.gaps(target, replace(prefill, name="elsewhere"), 7)
    with pytest.raises(ValueError, match="counts already"):
        maps.counted().counted()
    for thresholds in ([0.1, 0.01], [0.0, 0.1], [0.5, 1.5], [], [0.1, 0.1]):
        with pytest.raises(ValueError, match="thresholds must be ascending, above 0 and at most 1"):
            maps.counted(thresholds)


def test_rows_are_named(maps):
    trace = made_up_trace(heads='["6", "7", "8", "9"]', kv_heads='["3", "4"]')
    named = GapMaps.from_traces([trace], lengths=[100])
    assert named.rows(TARGETS["ours", "decode"]) == ("KV head 3", "KV head 4")
    assert named.rows(TARGETS["ours", "prefill"])[0] == "head 6"
    assert maps.rows(TARGETS["model-optimizer", "decode"])[-1] == "head 3"


# Damaged files: one valid file, changed in one place.

SMALL = Sample("text0-70-prefill", "A tale", "CC0-1.0", 70, "prefill")
TARGET = TARGETS["model-optimizer", "prefill"]  # 1 tile at 70 tokens


def small(thresholds: tuple[float, ...] | None = None) -> GapMaps:
    values = np.full((2, 2, 1), np.inf, np.float32)
    maps = GapMaps(
        (SMALL,), (0, 3), ("0", "1"), ("0",), (TARGET,), None, {"model": "m"},
        {(SMALL.name, TARGET.name): (values, np.ones_like(values))},
    )  # fmt: skip
    return maps if thresholds is None else maps.counted(thresholds)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    return written(small(), tmp_path_factory.mktemp("small")).read_bytes()


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> bytes:
    return written(small((0.1, 0.2)), tmp_path_factory.mktemp("counts")).read_bytes()


def parts(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def packed(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def about(content: bytes, **changes: object) -> bytes:
    header, data = parts(content)
    told = {**json.loads(header["__metadata__"]["gap_maps"]), **changes}
    told = {key: value for key, value in told.items() if value is not ...}
    return packed({**header, "__metadata__": {"gap_maps": json.dumps(told)}}, data)


def sample(content: bytes, **changes: object) -> bytes:
    told = json.loads(parts(content)[0]["__metadata__"]["gap_maps"])
    return about(content, samples=[{**told["samples"][0], **changes}])


def target(content: bytes, **changes: object) -> bytes:
    told = json.loads(parts(content)[0]["__metadata__"]["gap_maps"])
    return about(content, targets=[{**told["targets"][0], **changes}])


def entry(content: bytes, kind: str, **changes: object) -> bytes:
    header, data = parts(content)
    header[f"{SMALL.name}/{TARGET.name}/{kind}"].update(changes)
    return packed(header, data)


def values(content: bytes, kind: str, index: int, value: bytes) -> bytes:
    header, data = parts(content)
    begin = header[f"{SMALL.name}/{TARGET.name}/{kind}"]["data_offsets"][0] + index * len(value)
    return packed(header, data[:begin] + value + data[begin + len(value) :])


def renamed(content: bytes, name: str) -> bytes:
    header, data = parts(content)
    header[name] = header.pop(f"{SMALL.name}/{TARGET.name}/mass")
    return packed(header, data)


F32 = lambda x: np.float32(x).tobytes()  # noqa: E731
DAMAGED = {
    "empty": (lambda f: b"", "0 bytes long, too short"),
    "huge header": (
        lambda f: (MAX_HEADER + 1).to_bytes(8, "little") + f[8:],
        "1000001 bytes; at most 1000000",
    ),
    "cut off": (lambda f: f[:-1], "it is cut off"),
    "left over": (lambda f: f + b"x", "1 bytes are left over"),
    "another field": (
        lambda f: packed({**parts(f)[0], "__metadata__": {"q": ""}}, b""),
        "holds no gap maps: its metadata must be one field",
    ),
    "no metadata": (lambda f: packed({}, b""), "holds no gap maps"),
    "not JSON": (
        lambda f: packed({"__metadata__": {"gap_maps": "{"}}, b""),
        "gap_maps is not valid JSON",
    ),
    "twice": (
        lambda f: packed({"__metadata__": {"gap_maps": '{"card": 1, "card": 2}'}}, b""),
        "gap_maps has 'card' twice",
    ),
    "deep": (
        lambda f: packed({"__metadata__": {"gap_maps": "[" * 200_000}}, b""),
        "gap_maps is not valid JSON: nested too deeply",
    ),
    "a list": (lambda f: packed({"__metadata__": {"gap_maps": "[]"}}, b""), "must hold exactly"),
    "no card": (lambda f: about(f, card=...), "gap_maps must hold exactly format, samples"),
    "a field too many": (lambda f: about(f, more=1), "gap_maps must hold exactly"),
    "format": (lambda f: about(f, format=2), "format must be 1, got 2"),
    "layers a number": (lambda f: about(f, layers=3), "layers must be a list of 1 to 1000"),
    "layers a float": (lambda f: about(f, layers=[0, 3.0]), "a list of int, got 3.0"),
    "layers bool": (lambda f: about(f, layers=[False, 3]), "a list of int, got False"),
    "layers descend": (lambda f: about(f, layers=[3, 0]), "layers must be ascending"),
    "no layers": (lambda f: about(f, layers=[]), "layers must be a list of 1 to"),
    "heads numbers": (lambda f: about(f, heads=[0, 1]), "heads must be a list of str, got 0"),
    "half a surrogate": (lambda f: about(f, heads=["0", "\ud83d"]), "heads is not valid text"),
    "no GQA": (lambda f: about(f, kv_heads=["0", "1", "2"]), "must be a multiple of kv_heads"),
    "card a list": (lambda f: about(f, card=[]), "card must be a JSON object"),
    "card of numbers": (lambda f: about(f, card={"model": 1}), "'model' must be a string"),
    "thresholds descend": (lambda f: about(f, thresholds=[0.2, 0.1]), "must be ascending"),
    "threshold above 1": (lambda f: about(f, thresholds=[1.1]), "at most 1"),
    "thresholds too near": (lambda f: about(f, thresholds=[0.1, 0.1 + 1e-15]), "in float32"),
    "no samples": (lambda f: about(f, samples=[]), "samples must be a list of 1 to"),
    "sample a word": (lambda f: about(f, samples=["a"]), "samples must be a list of dict"),
    "sample field": (lambda f: sample(f, more=1), "a sample must have name, text, license"),
    "sample name": (lambda f: sample(f, name="../x"), "must be lower-case letters"),
    "sample phase": (lambda f: sample(f, phase="both"), "phase must be one of prefill, decode"),
    "length 0": (lambda f: sample(f, length=0), "length must be between 1 and 131072"),
    "length huge": (lambda f: sample(f, length=1 << 70), "got an integer beyond 64 bits"),
    "length true": (lambda f: sample(f, length=True), "a sample must have"),
    "prefill steps": (lambda f: sample(f, steps=[3]), "steps must be empty in prefill"),
    "no steps": (lambda f: sample(f, phase="decode"), "steps must be a list of 1 to"),
    "steps huge": (lambda f: sample(f, phase="decode", steps=[1 << 40]), "steps must be between"),
    "same samples": (
        lambda f: about(
            f, samples=2 * json.loads(parts(f)[0]["__metadata__"]["gap_maps"])["samples"]
        ),
        "different names",
    ),
    "another kernel": (lambda f: target(f, tile=[64, 64]), "a kernel that this version lacks"),
    "target field": (lambda f: target(f, more=1), "a kernel that this version lacks"),
    "same targets": (
        lambda f: about(
            f, targets=2 * json.loads(parts(f)[0]["__metadata__"]["gap_maps"])["targets"]
        ),
        "targets must differ",
    ),
    "longer": (lambda f: sample(f, length=700), r"must be \[2, 2, 21\], got \[2, 2, 1\]"),
    "a layer more": (lambda f: about(f, layers=[0, 1, 3]), r"must be \[3, 2, 1\]"),
    "a tensor more": (
        lambda f: packed({**parts(f)[0], "<b>": 1}, parts(f)[1]),
        "unknown tensor '<b>'",
    ),
    "a tensor less": (lambda f: renamed(f, "mass"), "tensor .*/mass is missing"),
    "dtype": (lambda f: entry(f, "gap", dtype="F16"), "must be F32, got 'F16'"),
    "shape a word": (lambda f: entry(f, "gap", shape="x"), "must be a list of integers"),
    "offsets": (lambda f: entry(f, "mass", data_offsets=[0, 8]), "needs 16 bytes as F32"),
    "overlap": (lambda f: entry(f, "mass", data_offsets=[0, 16]), "overlap at byte 0"),
    "gap NaN": (lambda f: values(f, "gap", 1, F32(np.nan)), "a gap that is NaN or −inf"),
    "gap −inf": (lambda f: values(f, "gap", 3, F32(-np.inf)), "a gap that is NaN or −inf"),
    "mass NaN": (lambda f: values(f, "mass", 0, F32(np.nan)), "a mass outside 0 to 1"),
    "mass below 0": (lambda f: values(f, "mass", 2, F32(-0.1)), "a mass outside 0 to 1"),
    "mass above 1": (lambda f: values(f, "mass", 2, F32(2)), "a mass outside 0 to 1"),
}  # fmt: skip
DAMAGED_COUNTS = {
    "counts": (lambda f: values(f, "count", 2, b"\2"), "must add up to 1 tiles a row"),
    "counts F32": (lambda f: entry(f, "count", dtype="F32"), "must be U8, U16 or U32, got 'F32'"),
    "mass F32": (lambda f: entry(f, "mass", dtype="F32"), "must be F16, got 'F32'"),
    "a threshold more": (
        lambda f: about(f, thresholds=[0.1, 0.2, 0.3]),
        r"must be \[2, 2, 4\], got \[2, 2, 3\]",
    ),
    "full instead": (lambda f: about(f, thresholds=None), "/gap is missing"),
}


def test_the_undamaged_files_are_read(file, counts):
    assert read_gap_maps(file).gaps(TARGET, SMALL, 3).tolist() == [[np.inf], [np.inf]]
    assert read_gap_maps(counts).mass(TARGET, SMALL, 0).tolist() == [[1], [1]]


@pytest.mark.parametrize("name", [*DAMAGED, *DAMAGED_COUNTS])
def test_damaged_file(name, file, counts):
    damage, sentence = {**DAMAGED, **DAMAGED_COUNTS}[name]
    with pytest.raises(GapMapError, match=sentence) as caught:
        read_gap_maps(damage(file if name in DAMAGED else counts))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_any_flipped_header_byte_gives_maps_or_a_sentence(file, counts):
    rng = np.random.default_rng(0)
    refused = 0
    for content in (file, counts):
        header = len(content) - len(parts(content)[1])
        for _ in range(1000):
            damaged = bytearray(content)
            damaged[rng.integers(header)] = rng.integers(256)
            try:
                read_gap_maps(bytes(damaged))
            except GapMapError:
                refused += 1
    assert refused > 1000


def test_nothing_is_allocated_for_a_false_claim(file):
    claim = sample(file, length=131_072)
    tiles = tiles_of_row(TARGET, replace(SMALL, length=131_072))
    for kind, begin in (("gap", 0), ("mass", 16 * tiles)):
        claim = entry(claim, kind, shape=[2, 2, tiles], data_offsets=[begin, begin + 16 * tiles])
    tracemalloc.start()
    try:
        with pytest.raises(GapMapError, match="cut off"):
            read_gap_maps(claim)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", [3, None])
def test_other_sources_are_refused(source):
    with pytest.raises(GapMapError, match="source must be a path, bytes, a binary file or several"):
        read_gap_maps(source)


def test_text_files_are_refused(tmp_path):
    with pytest.raises(GapMapError, match="binary mode"):
        read_gap_maps(io.StringIO("words, many words"))
    with pytest.raises(FileNotFoundError):
        read_gap_maps(tmp_path / "none.safetensors")


def test_a_trace_is_no_gap_map():
    with pytest.raises(GapMapError, match="holds no gap maps"):
        read_gap_maps(next(iter(bundled().values())))


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "maps.safetensors"
    path.write_bytes(b"before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sim.container.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small().write(path)
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with pytest.raises(GapMapError, match="'model' must be a string"):
        replace(small(), card={"model": 3}).write(path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_reading_needs_numpy_alone():
    program = (
        "import sys; sys.modules['safetensors'] = sys.modules['torch'] = None\n"
        "import sim.gap_maps as g; g.read_gap_maps(g.bundled_gap_maps())\n"
        "assert not {'torch', 'transformers', 'numba', 'streamlit'} & {n for n in sys.modules"
        " if sys.modules[n]}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_long_scan_keeps_no_square():
    """16 times the row maxima of one head would be a 4096 × 4096 square of float32."""
    trace = read_trace(bundled()["smollm2-135m-layer12-kv0"])
    tracemalloc.start()
    try:
        prefill_gaps(trace.q, trace.k, PREFILL, softmax_scale=0.125, lengths=[4096])
        assert tracemalloc.get_traced_memory()[1] < 4 * 4096 * 4096 / 2
    finally:
        tracemalloc.stop()


def test_bundled_counts_are_those_of_the_bundled_traces():
    path = bundled_gap_maps()
    assert path.stat().st_size < 1_500_000
    maps = read_gap_maps(path)
    assert maps.thresholds == TRIALS
    assert {one.phase for one in maps.samples} == {"prefill", "decode"}
    without = TARGETS["nvidia-256", "prefill"]  # which came later
    assert {*maps.targets, without} == set(TARGETS.values())
    with pytest.raises(ValueError, match=r"not for nvidia-256 \(prefill\) with its tiles of 64 × "):
        maps.gaps(without, maps.samples[0], 0)
    assert len({one.text for one in maps.samples}) == 5
    assert {"model", "license", "command", "date", "versions"} <= set(maps.card)
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert maps.card["command"] in readme
    assert path.name in readme
    # The traces' text begins as the first calibration text does.
    sample = next(one for one in maps.samples if one.name == "text0-4096-prefill")
    ln = ln_threshold(TRIALS)
    for trace in map(read_trace, bundled().values()):
        layer = int(trace.card["layer"])
        scanned = prefill_gaps(
            trace.q, trace.k, PREFILL, softmax_scale=trace.softmax_scale, lengths=[4096]
        )
        for target in set(PREFILL) & set(maps.targets):
            gaps = scanned[4096, target.name][0]
            bundled_gaps = maps.gaps(target, sample, layer)[:3]
            for one in ln:
                off = (gaps < one).sum(axis=1) - (bundled_gaps < one).sum(axis=1)
                assert np.abs(off).max() <= 3  # the traces are rounded to float16


def test_bundled_counts_are_those_of_the_survey():
    """Another program measured every head, on the text that the first sample begins."""
    maps = read_gap_maps(bundled_gap_maps())
    sample = next(one for one in maps.samples if one.name == "text0-4096-prefill")
    survey = np.genfromtxt(
        bundled_gap_maps().with_name("survey.csv"), delimiter=",", names=True, deletechars=""
    )
    for name, order in (("ours", "ends_first"), ("nvidia", "ascending")):
        gaps = np.stack([maps.gaps(TARGETS[name, "prefill"], sample, n) for n in maps.layers])
        for threshold in (0.001, 0.01, 0.05):
            shares = (gaps < ln_threshold(threshold)).mean(axis=2).ravel()
            np.testing.assert_allclose(shares, survey[f"{order}@{threshold}"], atol=5.1e-5)
