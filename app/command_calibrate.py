"""``skip-softmax calibrate``: scale factors from gap maps, and an engine's setting explained."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.calibrate_tables import explained, table
from app.options import KERNELS

if TYPE_CHECKING:
    from sim.calibration import Calibration, PhaseCalibration
    from sim.engines import Explanation
    from sim.gap_maps import GapMaps

Source = str | os.PathLike[str] | bytes

PHASES = ("prefill", "decode")
ENGINES = ("tensorrt-llm", "tensorrt-llm-checkpoint", "flashinfer", "vllm", "sglang")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("calibrate", help="scale factor for a target sparsity")
    parser.description = (
        "Fit threshold_scale_factor = a·exp(b·sparsity) through the gap maps of some texts, and "
        "write it as an inference engine's setting; or explain such a setting."
    )
    parser.add_argument(
        "maps",
        nargs="*",
        metavar="MAPS",
        help="a folder from skip-softmax capture, or gap-map or trace files",
    )
    parser.add_argument(
        "--kernel",
        choices=KERNELS,
        default="ours",
        help="whose decision grid, visit order and vote; default: ours. Of NVIDIA's on Hopper, "
        "nvidia-256 is for head_dim 32 to 64, and FP8 to 128; nvidia for larger ones",
    )
    parser.add_argument(
        "--space",
        choices=("log", "linear"),
        default="log",
        help="of the least squares; linear is Model Optimizer's default",
    )
    parser.add_argument(
        "--target-sparsity",
        nargs="+",
        type=_target,
        default=[("", 0.5)],
        metavar="S",
        help="share of tiles to skip: 0.5, or prefill=0.5 decode=0.3; default 0.5",
    )
    parser.add_argument("--per-layer", action="store_true", help="also a fit for each layer")
    parser.add_argument("--per-head", action="store_true", help="also a fit for each head")
    parser.add_argument(
        "--engine",
        action="append",
        choices=ENGINES,
        help="write the setting in this engine's form; may be given several times",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensorrt-llm-checkpoint: layers that stay dense, such as model.layers.0.self_attn",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the calibration as JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw tiles skipped against scale factor, with the formula: .svg or .png",
    )
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="CONFIG",
        help="say what an engine's setting means: YAML, config.json, or a file of its options",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="N",
        help="with --explain: KV lengths; default 8192 32768 131072",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="with --explain: a calibration of the model, for the sparsity to expect",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _target(text: str) -> tuple[str, float]:
    phase, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if phase not in ("", *PHASES) or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number between 0 and 1, or prefill=… or decode=…"
        )
    return phase, value


def _run(options: argparse.Namespace) -> int:
    if options.explain is not None:
        if options.maps:
            raise ValueError("give MAPS to calibrate, or --explain CONFIG, not both")
        told = explain_file(
            options.explain, options.lengths or (8192, 32768, 131_072), options.calibration
        )
        print(json.dumps(told, indent=2) if options.json else explained(told))
        return 0
    if not options.maps:
        raise ValueError("give MAPS: a folder from skip-softmax capture, or gap-map or trace files")
    if options.lengths or options.calibration:
        raise ValueError("--lengths and --calibration go with --explain")
    report = calibrate_files(
        options.maps,
        options.kernel,
        space=options.space,
        target_sparsity=_targets(options.target_sparsity),
        per_layer=options.per_layer,
        per_head=options.per_head,
        engines=options.engine or (),
        ignore=options.ignore,
        out=options.out,
        plot=options.plot,
    )
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else table(report))
    return 0


def _targets(given: Sequence[tuple[str, float]]) -> float | dict[str, float]:
    if len(given) == 1 and not given[0][0]:
        return given[0][1]
    targets = dict(given)
    if "" in targets or len(targets) < len(given):
        raise ValueError(
            "--target-sparsity is one number for both phases, or prefill=… and decode=… once each"
        )
    return targets


def read_maps(
    sources: Sequence[Source], progress: Callable[[float], None] = lambda share: None
) -> GapMaps:
    """Read gap maps, or scan traces into gap maps.

    Parameters
    ----------
    sources : sequence of path or bytes
        One folder of a capture, or gap-map files, or trace files.
    progress : callable
        Is given the share of the traces scanned, in (0, 1].

    Returns
    -------
    GapMaps

    Raises
    ------
    ValueError
        If a file is damaged, or files do not belong together.
    OSError
        If a file cannot be opened.
    """
    from sim import container
    from sim.gap_maps import GapMaps, read_gap_maps

    if len(sources) == 1 and _is_folder(sources[0]):
        return read_gap_maps(sources[0])
    held = []
    for number, source in enumerate(sources, 1):
        name = f"file {number}" if isinstance(source, bytes) else os.fspath(source)
        if _is_folder(source):
            raise ValueError(f"MAPS is one folder, or files: {name} is one of several")
        with container.opened(source) as file:
            try:
                header, _, _ = container.read_header(file)
            except container.ContainerError as error:
                raise ValueError(f"{name}: {error}") from None
        held.append("gap_maps" in header["__metadata__"])
    if all(held):
        return read_gap_maps(sources)
    if any(held):
        raise ValueError("MAPS are gap maps or traces, and these files are some of each")
    return GapMaps.from_traces(sources, progress=progress)


def _is_folder(source: Source) -> bool:
    return not isinstance(source, bytes) and Path(source).is_dir()


def calibrate_files(
    maps: Sequence[str | os.PathLike[str]],
    kernel: str = "ours",
    *,
    space: str = "log",
    target_sparsity: float | Mapping[str, float] = 0.5,
    per_layer: bool = False,
    per_head: bool = False,
    engines: Sequence[str] = (),
    ignore: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Calibrate on files, and say what the result rests on.

    Parameters
    ----------
    maps : sequence of path
        As in :func:`read_maps`.
    kernel, space, per_layer, per_head
        As in :func:`sim.calibration.calibrate`.
    target_sparsity : float or dict
        One for both phases, or phase → target.
    engines : sequence of str
        As in :func:`sim.engines.export`.
    ignore : sequence of str
        For ``tensorrt-llm-checkpoint``.
    out : path, optional
        Write the calibration here.
    plot : path, optional
        Draw it here, as .svg or .png: :func:`sim.calibration_plot.calibration_plot`.

    Returns
    -------
    dict
        Ready for JSON.

    Raises
    ------
    ValueError
        If a file is damaged, too few points can be fitted, or an export is refused.
    OSError
        If a file cannot be opened or written.
    """
    from sim.calibration import calibrate, measure, miss_table
    from sim.calibration_file import write_calibration
    from sim.calibration_plot import calibration_plot
    from sim.engines import check_engine, export, head_dim_of
    from sim.picture import check_suffix
    from sim.targets import target

    for engine in engines:
        for phase in PHASES:
            check_engine(engine, target(kernel, phase))
    for name, path in (("out", out), ("plot", plot)):
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{name} must lie in a folder that exists, got {os.fspath(path)}")
    if plot is not None:
        check_suffix(plot)
    read = read_maps(maps)
    one = calibrate(read, kernel, space=space, per_layer=per_layer, per_head=per_head)
    targets = one.targets(target_sparsity)
    report: dict[str, Any] = {
        "maps": [os.fspath(path) for path in maps],
        "model": one.card.get("model", ""),
        "head_dim": head_dim_of(one.card),
        "kernel": kernel,
        "space": space,
        "phases": {
            phase: _phase_report(read, one.phases[phase], wanted)
            for phase, wanted in targets.items()
        },
        "miss": {
            phase: [asdict(row) for row in miss_table(read, phase, wanted, space=space)]
            for phase, wanted in targets.items()
        },
        "exports": {
            engine: export(
                one,
                engine,
                targets,
                ignore=ignore if engine == "tensorrt-llm-checkpoint" else (),
            )
            for engine in engines
        },
        "written": [os.fspath(path) for path in (out, plot) if path is not None],
    }
    if out is not None:
        write_calibration(out, one)
    if plot is not None:
        measured = {phase: measure(read, one.phases[phase].target) for phase in targets}
        calibration_plot(one, measured, targets).write(plot)
    return report


def _phase_report(maps: GapMaps, one: PhaseCalibration, wanted: float) -> dict[str, Any]:
    target = asdict(one.target)
    fit = one.fit
    report: dict[str, Any] = {
        "target": {**target, "tile": list(one.target.tile)},
        "a": fit.a,
        "b": fit.b,
        "coefficient_intervals": fit.coefficient_intervals(),
        "r_squared": fit.r_squared,
        "range": list(fit.range),
        "points": fit.points,
        "texts": list(one.texts),
        "lengths": list(one.lengths),
        "target_sparsity": wanted,
        "scale_factor": None,
        "interval": None,
        "why_not": "",
        "at": [],
        "interpolated": maps.thresholds is not None,
        "by_length": [asdict(row) for row in one.by_length],
        "by_layer": [asdict(row) for row in one.by_layer],
        "parts": [_part(part, wanted) for part in one.parts],
    }
    try:
        report["scale_factor"] = fit.scale_factor(wanted)
    except ValueError as error:
        report["why_not"] = str(error)
        return report
    report["interval"] = fit.interval(wanted) if wanted else None
    report["at"] = at_lengths(maps, one, report["scale_factor"])
    return report


def _part(part: Any, wanted: float) -> dict[str, Any]:
    factor, why_not = None, ""
    if part.fit is None:
        why_not = f"only {part.points} points lie within 10 to 90 %, or they do not rise"
    else:
        try:
            factor = part.fit.scale_factor(wanted)
        except ValueError as error:
            why_not = str(error)
    fitted = {} if part.fit is None else asdict(part.fit)
    fitted.pop("draws", None)
    return {
        "name": part.name,
        "layer": part.layer,
        "vote": part.vote,
        "points": part.points,
        "fit": fitted or None,
        "scale_factor": factor,
        "why_not": why_not,
    }


def at_lengths(maps: GapMaps, one: PhaseCalibration, factor: float) -> list[dict[str, Any]]:
    """Say what a factor means, and skips, at each length of the texts.

    Parameters
    ----------
    maps : GapMaps
    one : PhaseCalibration
    factor : float

    Returns
    -------
    list of dict
        ``length``; ``threshold`` and whether it is ``above_one``; sparsity ``achieved`` on
        average, and of the ``lowest`` and ``highest`` text, None where λ > 1; ``texts``, how many.
    """
    from sim.calibration import achieved

    samples = [sample for sample in maps.samples if sample.phase == one.target.phase]
    skipped = achieved(maps, one.target, factor).mean(axis=(1, 2))  # [samples]
    rows = []
    for length in one.lengths:
        of = [
            float(s) for s, sample in zip(skipped, samples, strict=True) if sample.length == length
        ]
        dense = factor > length
        rows.append(
            {
                "length": length,
                "threshold": factor / length,
                "above_one": dense,
                "achieved": None if dense else sum(of) / len(of),
                "lowest": None if dense else min(of),
                "highest": None if dense else max(of),
                "texts": len(of),
            }
        )
    return rows


def explain_file(
    config: str | os.PathLike[str],
    lengths: Sequence[int] = (8192, 32768, 131_072),
    calibration: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Say what a file with an engine's setting means.

    Parameters
    ----------
    config : path
        YAML of TensorRT-LLM, ``config.json``, or a text file with a FlashInfer call, vLLM's
        options or SGLang's environment variables.
    lengths : sequence of int
        KV lengths.
    calibration : path, optional
        A calibration of the model, for the sparsity to expect.

    Returns
    -------
    dict
        Ready for JSON.

    Raises
    ------
    ValueError
        If a file is damaged or holds no such setting.
    OSError
        If a file cannot be opened.
    """
    from sim.calibration_file import read_calibration
    from sim.engine_settings import MAX_CHARACTERS, EngineError
    from sim.engines import explain

    with Path(config).open("rb") as file:
        raw = file.read(4 * MAX_CHARACTERS + 1)
    made: Calibration | None = None if calibration is None else read_calibration(calibration)
    try:
        told: Explanation = explain(raw.decode("utf-8-sig"), lengths, made)
    except UnicodeDecodeError:
        raise ValueError(f"{os.fspath(config)}: not text in UTF-8") from None
    except EngineError as error:
        raise ValueError(f"{os.fspath(config)}: {error}") from None
    return {"config": os.fspath(config), **asdict(told)}
