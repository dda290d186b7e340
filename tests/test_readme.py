"""What the README says: links lead somewhere, and figures are those that its commands print."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from app.cli import main, scan_trace

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRACE = ROOT / "sim/data/smollm2-135m-layer12-kv0.safetensors"


def test_every_relative_link_and_picture_exists():
    links = [x for x in re.findall(r"\]\(([^)]+)\)", README) if "://" not in x]
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).exists(), link


def row(start):
    (line,) = [x for x in README.splitlines() if x.startswith(f"| {start}")]
    return line


def scan(**settings):
    report = scan_trace(TRACE, **settings)
    work = report["work"]
    done = {k: work["computed"][k] + work["skipped"][k] for k in work["dense"]}
    report["matrix"] = done["qk_flops"] + done["pv_flops"]
    report["dense"] = work["dense"]["qk_flops"] + work["dense"]["pv_flops"]
    report["v_read"] = work["computed"]["v_bytes"] / work["dense"]["v_bytes"]
    report["k_read"] = done["k_bytes"] / work["dense"]["k_bytes"]
    return report


def test_claims_about_loading_and_speed():
    at_001 = scan(threshold=0.01)
    assert at_001["k_read"] == 1
    assert f"{at_001['v_read']:.1%}".replace("%", " %") in row("A skipped tile is never loaded")
    half = scan(target_sparsity=0.5)
    assert f"{half['dense'] / half['matrix']:.2f}×" in row("Skipping half the tiles")
    short = scan(threshold=0.01, length=2048)
    growth = at_001["matrix"] / short["matrix"], at_001["dense"] / short["dense"]
    assert f"grows {growth[0]:.1f}×, dense {growth[1]:.1f}×" in row("It makes attention linear")


def test_claims_about_the_threshold():
    for lam in (0.001, 0.01, 0.05):
        share = f"{scan(threshold=lam)['sparsity']:.1%}".replace("%", " %")
        assert share in row("A higher threshold is safer")
    factor = scan(threshold_scale_factor=600)
    assert f"λ = {factor['threshold']:.4g} " in row("`threshold_scale_factor` is")
    assert scan(threshold_scale_factor=600, length=512)["sparsity"] == 0
    loss = scan(threshold=0.05, mass=True)
    line = row("The mean error tells")
    assert f"{loss['mean_dropped_mass']:.1%}".replace("%", " %") in line
    assert f"{loss['worst_dropped_mass']:.1%}".replace("%", " %") in line


@pytest.mark.parametrize("lam", [0.001, 0.01, 0.05])
def test_table_of_visit_orders(lam):
    lines = [x for x in README.splitlines() if x.startswith(f"| {lam} |")]
    orders = ("ascending", "descending", "ends_first")
    ours = [scan(threshold=lam, order=order)["sparsity"] for order in orders]
    survey = np.genfromtxt(ROOT / "sim/data/survey.csv", delimiter=",", names=True, deletechars="")
    model = [survey[f"{order}@{lam}"].mean() for order in orders]
    for line, shares in zip(lines, (ours, model), strict=True):
        assert re.findall(r"([\d.]+) %", line) == [f"{100 * share:.1f}" for share in shares]
        assert shares[2] > shares[0]


def test_every_scan_command_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = set(re.findall(r"`skip-softmax (scan \$T [^`]+)`", README))
    assert len(commands) >= 5
    for command in commands:
        words = [str(TRACE) if word == "$T" else word for word in shlex.split(command)]
        assert main(words) == 0
        assert "all heads" in capsys.readouterr().out


def test_the_python_examples_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    simulator, kernel = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(simulator, "README.md", "exec"), {})
    figures = [f"{float(x):.3f}" for x in re.findall(r"[\d.]+", capsys.readouterr().out)]
    assert figures == ["0.602", "0.516", "0.144", "0.127"]
    assert all(figure in simulator for figure in figures)
    exec(compile(kernel, "README.md", "exec"), {})
    said, tiles, bound = capsys.readouterr().out.splitlines()
    assert f"# {said}\n" in kernel
    assert f": {tiles}\n" in kernel
    assert f": {float(bound):.3f}\n" in kernel


def recorded(command):
    """The recorded run that the README links to, and its rows."""
    (path,) = re.findall(rf"\((cuda_kernels/results/{command}-[^)]+\.json)\)", README)
    run = json.loads((ROOT / path).read_text())
    return run, run["rows"]


def prefill_table():
    """Lines of the README's table of prefill: head_dim 128, 16 heads, 16K tokens, both masks."""
    _, rows = recorded("prefill")

    def cell(backend, kernel, workload, against):
        medians = []
        for causal in (False, True):
            wanted = (backend, kernel, workload, causal, 128, 16_384, 16, 16)
            keys = (
                "backend", "kernel", "workload", "causal", "head_dim", "tokens", "heads",
                "kv_heads",
            )  # fmt: skip
            (row,) = [row for row in rows if tuple(row[key] for key in keys) == wanted]
            medians.append(f"{row['ratios'][against][1]:.2f}")
        return " / ".join(medians)

    kernels = ("mma", "wgmma")
    for peer, name in (("fa2", "FlashAttention-2"), ("cudnn", "cuDNN")):
        cells = [cell(backend, "dense", "random", peer) for backend in kernels]
        yield f"| dense, × {name} | {' | '.join(cells)} |"
    cells = [cell(backend, "nothing skipped", "random", "dense") for backend in kernels]
    yield f"| nothing skipped, × its dense | {' | '.join(cells)} |"
    for workload in ("columns", "scattered"):
        for share in (0.5, 0.75, 0.9):
            cells = [cell(backend, "skip", f"{workload} {share:g}", "dense") for backend in kernels]
            yield f"| {share:g} skipped (`{workload}`), × its dense | {' | '.join(cells)} |"


def decode_table():
    """Lines of the README's table of decode: medians, heads before keys."""
    _, rows = recorded("decode")

    def ratio(kernel, workload, batch):
        wanted = (kernel, workload, batch, "HND")
        keys = ("kernel", "workload", "batch", "layout")
        (row,) = [row for row in rows if tuple(row[key] for key in keys) == wanted]
        return f"{row['ratio'][1]:.2f}"

    batches = (64, 8, 1)
    cells = [ratio("dense", "random", batch) for batch in batches]
    yield f"| dense, × a kernel that only reads the cache | {' | '.join(cells)} |"
    cells = [ratio("none skipped", "random", batch) for batch in batches]
    yield f"| nothing skipped, × dense | {' | '.join(cells)} |"
    cells = [
        " / ".join(ratio("skip", f"columns {share:g}", batch) for share in (0.5, 0.75, 0.9))
        for batch in batches
    ]
    yield f"| 0.5 / 0.75 / 0.9 skipped, × dense | {' | '.join(cells)} |"


@pytest.mark.parametrize("table", [prefill_table, decode_table])
def test_kernel_figures_are_those_of_the_recorded_runs(table):
    lines = list(table())
    assert len(lines) == {prefill_table: 9, decode_table: 3}[table]
    for line in lines:
        assert line in README.splitlines(), line


def test_runs_are_named_by_machine_and_date():
    for command in ("prefill", "decode"):
        machine = recorded(command)[0]["machine"]
        assert machine["gpu"] == "NVIDIA H200"
        assert machine["date"].split()[0] in README


def test_answers_about_the_model_are_those_recorded():
    path = ROOT / "sim/data/smollm2-135m-evaluation.json"
    answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
    found = {(x["kernel"], x["length"]): x["changes"][1]["sparsity"] for x in answers["skippable"]}
    for length in (1024, 2048, 4096):
        line = row(f"{length} | ")
        for kernel in ("ours", "nvidia"):
            middle, low, high = (f"{100 * x:.1f}" for x in found[kernel, length])
            assert f"{middle} % [{low}, {high}]" in line
    gains = [f"{100 * x['changes'][1]['more_sparsity'][0]:.0f}" for x in answers["gains"]]
    assert f"by {gains[0]}, {gains[1]} and {gains[2]} points" in README
    (at_40, worse) = answers["thresholds"][0]["at"][2], answers["thresholds"][0]["at"][4]
    assert f"power −{-at_40['exponent'][0]:.1f};" in README
    assert f"power −{-worse['exponent'][0]:.1f} [" in README
