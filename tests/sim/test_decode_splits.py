"""What splits cost on real heads: counted as scan_decode says, within the bar, as recorded."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sim import decode_splits
from sim.decode import LAYOUTS, scan_decode
from sim.decode_splits import of_splits
from sim.traces import bundled, read_trace


@pytest.fixture(scope="module")
def traces():
    return [read_trace(path) for path in bundled().values()]


def test_shares_are_those_of_the_steps_counted_one_by_one(traces) -> None:
    [row] = of_splits(
        traces, lengths=[1500], splits=[3], thresholds=[0.02], keys=128, split_layout="contiguous"
    )
    counted = {}
    for name, splits, seeded in (("plain", 3, False), ("seeded", 3, True), ("unsplit", 1, True)):
        skipped = visited = 0
        for trace in traces:
            for length in range(1485, 1501):
                one = scan_decode(
                    trace.q[:, length - 1][None],
                    trace.k[:, :length],
                    [length],
                    keys=128,
                    splits=splits,
                    split_layout="contiguous",
                    seeded=seeded,
                    softmax_scale=trace.softmax_scale,
                ).decide(0.02)
                skipped += one.skipped.sum()
                visited += one.visited.sum()
        counted[name] = skipped / visited
    assert row._asdict() == pytest.approx(
        counted | {"length": 1500, "splits": 3, "threshold": 0.02}
    )
    assert row.plain < row.seeded < 1


@pytest.mark.parametrize("split_layout", LAYOUTS)
@pytest.mark.parametrize("keys", [64, 128])
def test_sixteen_seeded_splits_are_within_two_points_of_one(traces, split_layout, keys) -> None:
    rows = of_splits(traces, splits=[16], keys=keys, split_layout=split_layout)
    assert max(row.unsplit for row in rows) > 0.8
    for row in rows:
        assert row.plain <= row.seeded <= row.unsplit
        assert row.unsplit - row.seeded <= 0.02


def test_recorded_table_is_what_the_traces_give(traces) -> None:
    readme = Path(decode_splits.__file__).with_name("data") / "README.md"
    table = readme.read_text(encoding="utf-8").split("## Decode: what splits cost")[1]
    number = r"([\d.]+)(?: %)?"
    recorded = re.findall(rf"^\| {' [|] '.join([number] * 6)} \|$", table, flags=re.M)
    assert len(recorded) == 36
    found = {row[:3]: row[3:] for row in of_splits(traces, splits=(1, 4, 16, 64))}
    for length, threshold, splits, *shares in recorded:
        measured = found[int(length), int(splits), float(threshold)]
        assert shares == [f"{100 * share:.1f}" for share in measured]
    said = float(re.search(r"all but ([\d.]+) points", table)[1])
    lost = [row[2] - row[1] for (_, splits, _), row in found.items() if splits == 16]
    assert round(100 * max(lost), 1) == said


def test_a_trace_of_last_queries_only_is_measured_there(traces) -> None:
    short = replace(traces[0], q=traces[0].q[:, -20:])
    how = dict(lengths=[4096], splits=[4], thresholds=[0.05])
    assert of_splits([short], **how) == of_splits(traces[:1], **how)
    with pytest.raises(ValueError, match="between 4092 and 4096 for 16 steps of this trace, got 9"):
        of_splits([short], lengths=[9])
    with pytest.raises(ValueError, match="traces must be causal"):
        of_splits([replace(short, causal=False)])


def test_command_prints_every_row(capsys) -> None:
    path = str(next(iter(bundled().values())))
    decode_splits.main([path, "--lengths", "600", "--splits", "1", "5", "--thresholds", "0.05"])
    lines = capsys.readouterr().out.splitlines()
    assert "traces: 1, last 16 queries as steps, 64 keys a tile, interleaved" in lines[0]
    rows = of_splits([read_trace(path)], lengths=[600], splits=[1, 5], thresholds=[0.05])
    for line, row in zip(lines[2:], rows, strict=True):
        np.testing.assert_allclose(
            [float(x) for x in line.split()],
            [600, 0.05, row.splits, 100 * row.plain, 100 * row.seeded, 100 * row.unsplit],
            atol=0.051,
        )
