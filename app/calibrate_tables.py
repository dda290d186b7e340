"""What ``skip-softmax calibrate`` prints for people: its reports in aligned columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

FEW_TEXTS = 10


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)  # text from files


def table(report: dict[str, Any]) -> str:
    from sim.engines import hopper_line

    lines = [_printable(report["model"])] if report["model"] else []
    lines.append(
        f"threshold_scale_factor = a·exp(b·sparsity), fitted in {report['space']} space, "
        f"for kernel {report['kernel']}"
    )
    for phase, one in report["phases"].items():
        lines += ["", *_phase(phase, one)]
    for phase, rows in report["miss"].items():
        lines += ["", *_miss(phase, rows, report["phases"][phase]["target_sparsity"])]
        if phase == "prefill" and report["head_dim"] is not None:
            lines.append(f"  {hopper_line(report['head_dim'])}")
    for engine, text in report["exports"].items():
        lines += ["", f"── {engine} " + "─" * max(0, 60 - len(engine)), text.rstrip()]
    if report["written"]:
        lines += ["", f"Written to {' and '.join(report['written'])}."]
    return "\n".join(lines)


def _phase(phase: str, one: dict[str, Any]) -> list[str]:
    from sim.engines import decision
    from sim.targets import Target

    made = Target(**{**one["target"], "tile": tuple(one["target"]["tile"])})
    count = len(one["texts"])
    low, high = one["range"]
    lines = [f"{phase}: {decision(made)}"]
    fitted = f"  a = {one['a']:.4g}, b = {one['b']:.4g}, R² = {one['r_squared']:.4f}"
    lines.append(f"{fitted}, {one['points']} points of {count} text{'s' * (count > 1)}")
    if one["coefficient_intervals"]:
        (a0, a1), (b0, b1) = one["coefficient_intervals"]
        few = ", too narrow with so few" if count < FEW_TEXTS else ""
        lines.append(f"  95 % over texts: a {a0:.4g} to {a1:.4g}, b {b0:.4g} to {b1:.4g}{few}")
    else:
        lines.append("  no interval: that needs at least two texts")
    lines.append(f"  holds from {low:.1%} to {high:.1%} sparsity")
    if one["why_not"]:
        return [*lines, f"  no factor: {one['why_not']}", *_parts(one)]
    interval = "" if one["interval"] is None else " ({:.4g} to {:.4g})".format(*one["interval"])
    lines.append(
        f"  target {one['target_sparsity']:.0%}: threshold_scale_factor "
        f"{one['scale_factor']:.6g}{interval}; λ > 1 below {math.ceil(one['scale_factor'])} tokens"
    )
    rows = [["length", "λ", "achieved", "lowest text", "highest text", "measured − formula"]]
    off = {row["group"]: row["mean"] for row in one["by_length"]}
    for row in one["at"]:
        shares = [_share(row[key]) for key in ("achieved", "lowest", "highest")]
        lam = f"{row['threshold']:.4g}" + (" > 1: dense here" if row["above_one"] else "")
        rows.append([str(row["length"]), lam, *shares, _points(off[row["length"]])])
    lines += ["", *(f"  {line}" for line in _columns(rows))]
    if one["interpolated"]:
        lines.append("  (achieved: interpolated between the thresholds that were counted)")
    layers = [row for row in one["by_layer"] if row["mean"] is not None]
    if len(layers) > 1:
        layers.sort(key=lambda row: row["mean"])
        least, most = layers[0], layers[-1]
        lines.append(
            f"  layers differ: layer {least['group']} {_points(least['mean'])}, layer "
            f"{most['group']} {_points(most['mean'])} from the formula"
        )
    return [*lines, *_parts(one)]


def _parts(one: dict[str, Any]) -> list[str]:
    if not one["parts"]:
        return []
    rows = [["part", "a", "b", "R²", "factor", "points"]]
    for part in one["parts"]:
        fit = part["fit"]
        numbers = ["–"] * 3
        if fit is not None:
            numbers = [f"{fit['a']:.4g}", f"{fit['b']:.4g}", f"{fit['r_squared']:.3f}"]
        factor = "–" if part["scale_factor"] is None else f"{part['scale_factor']:.4g}"
        rows.append([_printable(part["name"]), *numbers, factor, str(part["points"])])
    lines = ["", *(f"  {line}" for line in _columns(rows))]
    if without := [_printable(p["name"]) for p in one["parts"] if p["fit"] is None]:
        lines.append(f"  too few points within 10 to 90 %: {'; '.join(without)}")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} points"


def _miss(phase: str, rows: Sequence[dict[str, Any]], wanted: float) -> list[str]:
    from sim.engines import decision
    from sim.targets import target

    names = list(rows[0]["achieved"])
    lines = [["calibrated for", "factor", *(f"on {name}" for name in names)]]
    for row in rows:
        factor = "–" if row["scale_factor"] is None else f"{row['scale_factor']:.4g}"
        lines.append([row["kernel"], factor, *(_share(row["achieved"][name]) for name in names)])
    head = f"{phase}, target {wanted:.0%}: what each kernel's factor skips on each kernel's grid"
    grids = [f"  {name}: {decision(target(name, phase))}" for name in names]
    reasons = [f"  {row['kernel']}: {row['why_not']}" for row in rows if row["why_not"]]
    return [head, *(f"  {line}" for line in _columns(lines)), *grids, *reasons]


def explained(told: dict[str, Any]) -> str:
    lines = [f"{told['config']}: setting of {told['setting']['engine']}"]
    for phase, one in told["phases"].items():
        if one["scale_factor"] is None:
            lines += ["", f"{phase}: {one['source']}; {one['expectation']}"]
            continue
        if one["scale_factor"] == 0:
            lines += ["", f"{phase}: dense"]
            continue
        expected = one["expected_sparsity"]
        lines += [
            "",
            f"{phase}: threshold_scale_factor {one['scale_factor']:.6g}, {one['source']}",
            f"  no expected sparsity: {one['expectation']}"
            if expected is None
            else f"  expected sparsity where λ ≤ 1: {expected:.1%}, by {one['expectation']}",
        ]
        rows = [["length", "λ", ""]]
        for at in one["at"]:
            rows.append([str(at["length"]), f"{at['threshold']:.4g}", "> 1" * at["above_one"]])
        lines += [f"  {line}" for line in _columns(rows)]
    return "\n".join([*lines, "", *(f"• {_printable(one)}" for one in told["warnings"])])
