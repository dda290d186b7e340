"""``skip-softmax evaluate``: what skipping costs a Hugging Face model, setting by setting."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.options import KERNELS, add_model_options, read_texts

if TYPE_CHECKING:
    from sim.model_attention import Setting
    from sim.texts import Text

THRESHOLDS = (0.03, 0.1, 0.3, 0.6, 0.9)
TARGETS = (0.3, 0.5)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the console command's parser."""
    parser = commands.add_parser("evaluate", help="what skipping costs a model")
    parser.description = (
        "Run a causal language model over held-out texts with attention that skips tiles as a "
        "kernel does, and compare: perplexity, divergence of its predictions, a hidden number, "
        "attention output. Interrupted, it goes on when the command is given again."
    )
    add_model_options(parser)
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        metavar="X",
        help=f"λ, in both phases; default {' '.join(map(str, THRESHOLDS))}",
    )
    rule.add_argument(
        "--scale-factors", nargs="+", type=float, metavar="X", help="λ = X / KV length"
    )
    rule.add_argument(
        "--calibration", metavar="FILE", help="scale factors from skip-softmax calibrate --out"
    )
    parser.add_argument(
        "--target-sparsity",
        nargs="+",
        type=float,
        metavar="S",
        help=f"with --calibration; default {' '.join(map(str, TARGETS))}",
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=KERNELS,
        help="whose decision grid, visit order and vote; default ours, or the calibration's",
    )
    parser.add_argument(
        "--needle-lengths",
        nargs="*",
        type=int,
        metavar="N",
        help="of the texts a number is hidden in; default --lengths, nothing after it for none",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0.1, 0.5, 0.9],
        metavar="D",
        help="where it is hidden, 0 … 1; default 0.1 0.5 0.9",
    )
    parser.add_argument(
        "--max-texts", type=int, metavar="N", help="the first N texts only; default all"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; default one a core, if memory allows"
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="a Dask scheduler, such as tcp://10.0.0.1:8786"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from sim.evaluation import evaluate

    if options.workers is not None and options.scheduler is not None:
        raise ValueError("--workers is for this machine's processes: not with --scheduler")
    if options.max_texts is not None and options.max_texts < 1:
        raise ValueError(f"--max-texts must be at least 1, got {options.max_texts}")
    report = evaluate(
        options.model,
        options.out,
        _settings(options),
        lengths=options.lengths,
        needle_lengths=options.needle_lengths,
        texts=_texts(options),
        decode_tokens=options.decode_tokens,
        depths=options.depths,
        workers=options.workers,
        scheduler=options.scheduler,
        model_name=options.model_name,
        command=_command(options),
        progress=sys.stderr.isatty(),
    )
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else table(report))
    return 0


def _settings(options: argparse.Namespace) -> list[Setting]:
    from sim.model_attention import Setting

    if options.target_sparsity is not None and options.calibration is None:
        raise ValueError("--target-sparsity goes with --calibration")
    if options.calibration is not None:
        return _calibrated(options)
    kernels = options.kernel or ["ours"]
    if options.scale_factors is not None:
        return [
            Setting.both(kernel, threshold_scale_factor=factor)
            for kernel in kernels
            for factor in options.scale_factors
        ]
    thresholds = options.thresholds or THRESHOLDS
    return [Setting.both(kernel, threshold=x) for kernel in kernels for x in thresholds]


def _calibrated(options: argparse.Namespace) -> list[Setting]:
    """Settings of a calibration; a phase it does not hold is computed densely."""
    from sim.calibration_file import read_calibration
    from sim.model_attention import Setting
    from sim.targets import PHASES

    calibration = read_calibration(options.calibration)
    if options.kernel not in (None, [calibration.kernel]):
        raise ValueError(
            f"--kernel is {' '.join(options.kernel)}, but {options.calibration} is calibrated for "
            f"{calibration.kernel}: its factors mean something else on another kernel"
        )
    targets = options.target_sparsity or TARGETS
    return [
        Setting(
            calibration.kernel,
            None,
            dict.fromkeys(PHASES, 0.0) | calibration.scale_factor(target_sparsity),
        )
        for target_sparsity in targets
    ]


def _texts(options: argparse.Namespace) -> list[Text]:
    if options.texts is None:
        from sim.texts import split

        return split()[1][: options.max_texts]
    return read_texts(options.texts[: options.max_texts], options.text_license)


def _command(options: argparse.Namespace) -> str:
    """Give the command for the report, without the folders of this machine."""
    words = ["skip-softmax", "evaluate", Path(options.model).name]
    if not Path(options.model).exists():
        words[2] = options.model
    given: list[tuple[str, Sequence[Any]]] = [
        ("--calibration", [Path(options.calibration).name] if options.calibration else []),
        ("--target-sparsity", options.target_sparsity or []),
        ("--thresholds", options.thresholds or []),
        ("--scale-factors", options.scale_factors or []),
        ("--kernel", options.kernel or []),
        ("--lengths", options.lengths),
        ("--depths", options.depths),
        ("--texts", [Path(name).name for name in options.texts or []]),
        ("--max-texts", [] if options.max_texts is None else [options.max_texts]),
        ("--decode-tokens", [options.decode_tokens]),
        ("--out", [Path(options.out).name]),
    ]
    for name, values in given:
        if values:
            words += [name, *map(str, values)]
    if options.needle_lengths is not None:
        words += ["--needle-lengths", *map(str, options.needle_lengths)]
    return shlex.join(words)


def table(report: dict[str, Any]) -> str:
    """Lay a report out in aligned columns: rows, needle, answers."""
    lines = [
        f"{report['model']}: {len(report['texts'])} held-out texts. Sparsity: "
        f"{report['sparsity_definition']}.",
        f"In brackets: {report['interval']}.",
        "",
        f"{'kernel':<16}{'tokens':>6}  {'setting':<24}{'λ':>9}  {'phase':<8}"
        f"{'sparsity':>8}  {'perplexity':<28}{'KL':>9}{'worst':>8}{'output':>9}",
    ]
    for row in report["rows"]:
        for phase in ("prefill", "decode"):
            if phase in row:
                lines.append(_row(row, phase))
    if report["needle"]:
        lines += [
            "",
            f"{'needle: kernel':<16}{'tokens':>6}  {'setting':<24}{'sparsity':>9}"
            f"{'found':>7}{'dense':>7}{'probability':>13}{'dense':>7}",
        ]
        lines += [
            f"{row['kernel']:<16}{row['length']:>6}  {_setting(row):<24}{row['sparsity']:>9.1%}"
            f"{row['found'][0]:>7.0%}{row['found_dense'][0]:>7.0%}"
            f"{row['probability'][0]:>13.3f}{row['probability_dense'][0]:>7.3f}"
            for row in report["needle"]
        ]
    return "\n".join(lines + _answers(report["answers"]))


def _row(row: dict[str, Any], phase: str) -> str:
    one = row[phase]
    value, low, high = one["perplexity_change"]
    change = f"{one['perplexity']:.3f} {value:+.2%} [{low:+.2%}, {high:+.2%}]"
    return (
        f"{row['kernel']:<16}{row['length']:>6}  {_setting(row):<24}"
        f"{one['applied_threshold']:>9.3g}  {phase:<8}{one['sparsity'][0]:>8.1%}  {change:<28}"
        f"{one['kl_mean'][0]:>9.2g}{one['kl_worst']:>8.2g}{one['output_error']:>9.2g}"
    )


def _setting(row: dict[str, Any]) -> str:
    if row["threshold"] is not None:
        return f"threshold {row['threshold']['prefill']:g}"
    factors = row["threshold_scale_factor"]
    if factors["prefill"] == factors["decode"]:
        return f"factor {factors['prefill']:g}"
    return f"factors {factors['prefill']:.4g}, {factors['decode']:.4g}"


def _answers(answers: dict[str, Any]) -> list[str]:
    """Lay out the three answers, as far as the settings allow them."""
    lines = ["", "Skipped in prefill before the perplexity has moved:"]
    for one in answers["skippable"]:
        parts = [
            f"by {x['perplexity_change']:.1%}: {'' if x['reached'] else 'more than '}"
            f"{_interval(x['sparsity'])}"
            for x in one["changes"]
        ]
        lines.append(f"  {one['kernel']}, {one['length']} tokens  {'; '.join(parts)}")
    if answers["gains"]:
        lines += ["", "ours skips more, at that change, by:"]
    for one in answers["gains"]:
        parts = [
            f"at {x['perplexity_change']:.1%}: {_interval(x['more_sparsity'])}"
            for x in one["changes"]
        ]
        lines.append(f"  than {one['kernel']}, {one['length']} tokens  {'; '.join(parts)}")
    found = [
        (one["kernel"], x)
        for one in answers["thresholds"]
        for x in one["at"]
        if x["exponent"] is not None
    ]
    if found:
        lines += ["", "λ that gives it, by length, and the exponent of the length (−1: λ ∝ 1/L):"]
    for kernel, x in found:
        name = "sparsity" if "sparsity" in x else "perplexity change"
        wanted = x["sparsity"] if "sparsity" in x else x["perplexity_change"]
        at = ", ".join(f"{length}: {value:.3g}" for length, value in x["thresholds"].items())
        value, low, high = x["exponent"]
        exponent = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"  {kernel}, {name} {wanted:.3g}: {at}; exponent {exponent}")
    return lines if len(lines) > 2 else []


def _interval(values: Sequence[float]) -> str:
    return f"{values[0]:.1%} [{values[1]:.1%}, {values[2]:.1%}]"
