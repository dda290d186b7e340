"""The console command ``skip-softmax``: each subcommand is a thin door to one function.

The larger ones are in files ``command_*.py``.  NumPy, Pillow and Streamlit load inside the
functions, so that help is instant and a scan needs no Streamlit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import command_calibrate, command_capture, command_evaluate

if TYPE_CHECKING:
    from sim.geometry import TileMap

ORDERS = ("ascending", "descending", "ends_first")
INTERRUPTED = 130
UNREAD = 141  # as a shell says of who was stopped by a closed pipe
SPARSITY = "skipped ÷ visited tiles; first tiles count as visited"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0, 2 after an error that one sentence on stderr names, 130 after Ctrl-C, 141
        where nobody reads what is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # consoles without λ
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["lesson"]:
            status = _lesson(arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            status = options.run(options)
        sys.stdout.flush()  # here, so that an error is seen
        return status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (ValueError, RuntimeError) as error:
        fault = str(error)
    print(f"skip-softmax: {fault}", file=sys.stderr)
    return 2


def open_app(
    trace: str | os.PathLike[str] | None = None, *, port: int | None = None, browser: bool = True
) -> None:
    """Serve the app on this machine alone, until interrupted.

    Parameters
    ----------
    trace : path, optional
        A trace to show first; checked before the server starts.
    port : int, optional
        Default the first free one from 8501; 0 is any free one.
    browser : bool
        Whether to open the app in a browser.

    Raises
    ------
    sim.traces.TraceError
        If the trace is damaged.
    ValueError
        If the port is taken or out of range.
    OSError
        If the trace cannot be opened.
    """
    if trace is not None:
        from sim.traces import read_trace

        read_trace(trace)
        os.environ["SKIP_SOFTMAX_TRACE"] = os.path.abspath(trace)
    from streamlit.web import cli

    port = _free_port(port)
    print(f"Skip Softmax Lab is at http://localhost:{port} (Ctrl-C stops it)", flush=True)
    options = [
        f"--server.port={port}",
        "--logger.hideWelcomeMessage=true",
        "--logger.level=warning",
    ]
    options += [] if browser else ["--server.headless=true"]
    script = Path(__file__).with_name("streamlit_app.py").resolve()
    cli.main(["run", *options, str(script)], prog_name="streamlit", standalone_mode=False)


def _free_port(asked: int | None) -> int:
    if asked is not None and not 0 <= asked <= 65535:
        raise ValueError(f"port must be between 0 and 65535, got {asked}")
    for port in range(8501, 8601) if asked is None else [asked]:
        with suppress(OSError), socket.create_server(("localhost", port)) as server:
            return server.getsockname()[1]
    raise ValueError(f"port must be free, but {asked or 'every one from 8501 to 8600'} is taken")


def scan_trace(
    trace: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    threshold_scale_factor: float | None = None,
    target_sparsity: float | None = None,
    order: str = "ends_first",
    short_context: str = "dense",
    tile: tuple[int, int] = (64, 128),
    length: int | None = None,
    full: bool = False,
    mass: bool = False,
    png: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Say how many tiles of a trace are skipped, head by head.

    Parameters
    ----------
    trace : path
        A trace file: see :mod:`sim.traces`.
    threshold, threshold_scale_factor, target_sparsity : float, one of them
        As in :meth:`sim.Scan.decide`.
    order : {"ends_first", "ascending", "descending"}
        Visit order.
    short_context : {"dense", "allow"}
        What happens where λ exceeds 1.
    tile : (int, int)
        Vote rows × keys of a tile.
    length : int, optional
        The first so many tokens only.
    full : bool
        Every query sees every key, whatever the trace says.
    mass : bool
        Also the dropped mass of each row; takes about twice as long.
    png : path, optional
        Draw the tile maps of all heads, side by side, into this file.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    dict
        Ready for JSON: the settings, ``sparsity`` over all heads, ``heads``, one dict each, and
        ``work``, counts for dense attention and for this tile map (:mod:`sim.cost`).
        ``short_context`` is whether λ would exceed 1, so that nothing is skipped.

    Raises
    ------
    ValueError
        If the trace is damaged or an argument is out of range.
    OSError
        If a file cannot be opened.

    Examples
    --------
    >>> from sim.traces import bundled
    >>> report = scan_trace(next(iter(bundled().values())), threshold=0.01)
    >>> [head["visited"] for head in report["heads"]]
    [1056, 1056, 1056]
    """
    import numpy as np

    from sim.accuracy import dropped_mass
    from sim.cost import ledger
    from sim.skip_softmax import scan
    from sim.traces import read_trace

    data = read_trace(trace)
    if length is not None and not 1 <= length <= data.q.shape[1] == data.k.shape[1]:
        raise ValueError(
            f"length must be between 1 and the {data.k.shape[1]} tokens of a trace with as many "
            f"queries as keys, got {length}"
        )
    one = scan(
        data.q[:, :length],
        data.k[:, :length],
        tile=tile,
        causal=data.causal and not full,
        order=order,
        softmax_scale=data.softmax_scale,
        mass=mass,
        keep_row_max=short_context == "allow",
        progress=progress,
    )
    tiles = one.decide(
        threshold,
        threshold_scale_factor=threshold_scale_factor,
        target_sparsity=target_sparsity,
        short_context=short_context,
    )
    visited = np.count_nonzero(tiles.visited, axis=(1, 2))
    skipped = np.count_nonzero(tiles.skipped, axis=(1, 2))
    heads: list[dict[str, Any]] = [
        {
            "head": h,
            "name": name,
            "sparsity": float(tiles.sparsity[h]),
            "visited": int(visited[h]),
            "skipped": int(skipped[h]),
        }
        for h, name in enumerate(data.head_names)
    ]
    report: dict[str, Any] = {
        "trace": os.fspath(trace),
        "query_length": tiles.grid.lq,
        "key_length": tiles.grid.lk,
        "causal": tiles.grid.causal,
        "tile": list(tiles.grid.tile),
        "order": tiles.order,
        "threshold": float(tiles.threshold[0]),
        "short_context": (threshold_scale_factor or 0) > tiles.grid.lk and not tiles.threshold[0],
        "sparsity": float(skipped.sum() / max(visited.sum(), 1)),
        "sparsity_definition": SPARSITY,
        "heads": heads,
        "work": asdict(ledger(tiles, data.q.shape[2], data.v.shape[2])),
    }
    if one.mass is not None:
        dropped = dropped_mass(one.mass, tiles)  # [Hq, Lq]
        for head, of_head in zip((*heads, report), (*dropped, dropped), strict=True):
            head["mean_dropped_mass"] = float(of_head.mean())
            head["worst_dropped_mass"] = float(of_head.max())
    if png is not None:
        _draw(tiles, Path(png))
    return report


def _draw(tiles: TileMap, path: Path) -> None:
    """Save the tile maps of all heads, side by side."""
    from PIL import Image

    from sim.draw import tile_map_image

    cell = max(1, min(8, 2048 // max(tiles.state.shape[1:])))
    maps = [tile_map_image(tiles, head, cell) for head in range(len(tiles.state))]
    width, height = maps[0].size
    sheet = Image.new("RGB", (len(maps) * (width + 8) - 8, height), "white")
    for head, one in enumerate(maps):
        sheet.paste(one, (head * (width + 8), 0))
    sheet.save(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skip-softmax", description="See and measure attention that skips tiles."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    app = commands.add_parser("app", help="open the app in a browser")
    app.description = "Serve the app on this machine alone, and open it in a browser."
    app.add_argument("trace", nargs="?", metavar="TRACE", help="a trace file to show first")
    app.add_argument("--port", type=int, help="default: the first free one from 8501")
    app.add_argument("--no-browser", action="store_true", help="only print the address")
    app.set_defaults(run=_app)

    scan = commands.add_parser("scan", help="sparsity of every head of a trace")
    scan.description = f"Print the sparsity of every head of a trace: {SPARSITY}."
    scan.add_argument("trace", metavar="TRACE", help="a trace file (safetensors)")
    rule = scan.add_mutually_exclusive_group()
    rule.add_argument("--threshold", type=float, metavar="X", help="λ; default 0.01")
    rule.add_argument("--threshold-scale-factor", type=float, metavar="X", help="λ = X / length")
    rule.add_argument("--target-sparsity", type=float, metavar="X", help="skip at most this share")
    scan.add_argument(
        "--short-context",
        choices=("dense", "allow"),
        default="dense",
        help="above λ = 1: compute densely (default), or skip as NVIDIA's kernels do",
    )
    scan.add_argument("--order", choices=ORDERS, default="ends_first", help="default: ends_first")
    scan.add_argument("--tile", nargs=2, type=int, default=(64, 128), metavar=("ROWS", "KEYS"))
    scan.add_argument("--length", type=int, metavar="N", help="the first N tokens only")
    scan.add_argument("--full", action="store_true", help="every query sees every key")
    scan.add_argument("--mass", action="store_true", help="also the attention that rows lose")
    scan.add_argument("--work", action="store_true", help="also operations and bytes")
    scan.add_argument("--png", type=_png, metavar="FILE", help="draw the tile maps of all heads")
    scan.add_argument("--json", action="store_true", help="print JSON")
    scan.set_defaults(run=_scan)

    command_capture.add_parser(commands)
    command_calibrate.add_parser(commands)
    command_evaluate.add_parser(commands)

    kernels = commands.add_parser("kernels", help="registers and spills of every kernel")
    kernels.description = (
        "Assemble the kernels, each for the architectures it is held to; no GPU needed. Stack and "
        "spills are bytes of a thread in memory; the teaching kernel keeps a row of scores there."
    )
    kernels.add_argument("--arch", action="append", help="only this one, such as sm_90a")
    kernels.add_argument("--json", action="store_true", help="print JSON")
    kernels.set_defaults(run=_kernels)

    bench = commands.add_parser("bench", help="time kernels on this machine's GPU")
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    prefill = kinds.add_parser("prefill", help="our kernels against those installed")
    prefill.add_argument("--quick", action="store_true", help="16K tokens only, about a minute")
    prefill.add_argument("--tokens", type=int, nargs="+", metavar="N", help="only these lengths")
    prefill.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="a kernel of ours; default: all that run",
    )
    decode = kinds.add_parser("decode", help="ours against reading the cache alone")
    decode.add_argument("--quick", action="store_true", help="caches with heads first alone")
    launch = kinds.add_parser("launch", help="what a call costs the host")
    launch.add_argument("--calls", type=int, default=10_000, metavar="N", help="of each kind")
    runs = ((prefill, _bench_prefill), (decode, _bench_decode), (launch, _bench_launch))
    for one, run in runs:
        one.add_argument("--json", action="store_true", help="print JSON")
        one.set_defaults(run=run)

    commands.add_parser("lesson", help="list, open and check the lessons (lesson --help)")
    return parser


def _kernels(options: argparse.Namespace) -> int:
    from cuda_kernels.resources import format_table, resource_table

    rows = resource_table(architectures=options.arch)
    print(json.dumps(rows, indent=2) if options.json else format_table(rows))
    if not options.json:
        spilled = sum(row["spill_stores"] + row["spill_loads"] > 0 for row in rows)
        print(f"{len(rows)} builds, {spilled or 'none'} with spills")
    return 1 if any(row["faults"] for row in rows) else 0


def _bench_prefill(options: argparse.Namespace) -> int:
    from cuda_kernels.benchmark import bench_prefill, table

    record = bench_prefill(
        quick=options.quick,
        tokens=options.tokens,
        backends=options.backend,
        progress=sys.stderr.isatty(),
    )
    return _measured(record, options.json, table)


def _bench_decode(options: argparse.Namespace) -> int:
    from cuda_kernels.benchmark_decode import bench_decode, decode_table

    record = bench_decode(quick=options.quick, progress=sys.stderr.isatty())
    return _measured(record, options.json, decode_table)


def _bench_launch(options: argparse.Namespace) -> int:
    from cuda_kernels.benchmark_launch import bench_launch, launch_table

    record = bench_launch(calls=options.calls, progress=sys.stderr.isatty())
    return _measured(record, options.json, launch_table)


def _measured(record: dict[str, Any], as_json: bool, table: Callable[[dict], str]) -> int:
    print(json.dumps(record, indent=2) if as_json else table(record))
    if not record["interrupted"]:
        return 0
    print(f"Interrupted; what was measured is in {record['path']}.", file=sys.stderr)
    return INTERRUPTED


def _lesson(arguments: list[str]) -> int:
    """Hand over to the lessons, which are not installed: they need a clone."""
    try:
        from lessons.runner import main as run
    except ModuleNotFoundError as error:
        if error.name != "lessons":
            raise
        raise ValueError("lessons come with a clone of the project, and this is not one") from None
    return run(arguments)


def _png(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} must end in .png, in a folder that exists")
    return path


def _app(options: argparse.Namespace) -> int:
    open_app(options.trace, port=options.port, browser=not options.no_browser)
    return INTERRUPTED  # Streamlit takes Ctrl-C itself, says so, and returns


def _scan(options: argparse.Namespace) -> int:
    rules = ("threshold", "threshold_scale_factor", "target_sparsity")
    rule = {name: value for name in rules if (value := getattr(options, name)) is not None}
    report = scan_trace(
        options.trace,
        **(rule or {"threshold": 0.01}),
        order=options.order,
        short_context=options.short_context,
        tile=tuple(options.tile),
        length=options.length,
        full=options.full,
        mass=options.mass,
        png=options.png,
        progress=sys.stderr.isatty(),
    )
    print(json.dumps(report, indent=2) if options.json else _table(report))
    if options.work and not options.json:
        print(f"\n{_work(report['work'])}")
    return 0


def _work(work: dict[str, dict[str, int]]) -> str:
    """Lay out what is done of dense attention's work; V bytes as decode kernels read them too."""
    computed, skipped, dense = work["computed"], work["skipped"], work["dense"]
    done = {name: computed[name] + skipped[name] for name in dense}
    matrix = [x["qk_flops"] + x["pv_flops"] for x in (dense, done)]
    rows = [
        ("QKᵀ", dense["qk_flops"], done["qk_flops"], "MFLOP"),
        ("PV", dense["pv_flops"], done["pv_flops"], "MFLOP"),
        ("exponentials", dense["exponentials"], done["exponentials"], "10⁶"),
        ("K read", dense["k_bytes"], done["k_bytes"], "MB"),
        ("V read, prefill kernels", dense["v_bytes"], done["v_bytes"], "MB"),
        ("V read, decode kernels", dense["v_bytes"], computed["v_bytes"], "MB"),
    ]
    lines = [f"{'work, all heads':24}{'dense':>9}{'skipping':>10}"]
    for name, whole, part, unit in rows:
        share = part / whole if whole else 1
        lines.append(f"{name:24}{whole / 1e6:9.1f}{part / 1e6:10.1f} {unit:6}{share:7.1%}")
    return "\n".join([*lines, f"{matrix[0] / max(matrix[1], 1):.2f}× less matrix work"])


def _table(report: dict[str, Any]) -> str:
    """Lay a report out in aligned columns."""
    rows, keys = report["tile"]
    mask = "causal" if report["causal"] else "full"
    dense = " (the factor exceeds the length: computed densely)" if report["short_context"] else ""
    with_mass = "mean_dropped_mass" in report
    lines = [["head", "skipped", "visited", "sparsity"]]
    lines[0] += ["mean dropped mass", "worst"] if with_mass else []
    total = {key: sum(head[key] for head in report["heads"]) for key in ("skipped", "visited")}
    for head in (*report["heads"], {**report, **total, "name": "all heads"}):
        name = "".join(c if c.isprintable() else "�" for c in head["name"])  # text from the file
        line = [name, str(head["skipped"]), str(head["visited"]), f"{head['sparsity']:.1%}"]
        if with_mass:
            line += [f"{head['mean_dropped_mass']:.3%}", f"{head['worst_dropped_mass']:.3%}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        [
            f"{report['trace']}: {report['query_length']} queries × {report['key_length']} keys,"
            f" {mask}",
            f"tiles of {rows} × {keys}, {report['order']}, λ = {report['threshold']:.4g}{dense}",
            "",
            *(
                "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
                for line in lines
            ),
            "",
            f"Sparsity is {report['sparsity_definition']}.",
        ]
    )
