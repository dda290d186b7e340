"""``skip-softmax capture``: gap maps, or Q, K and V, of a Hugging Face model."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from app.options import add_model_options, read_texts


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to the console command's parser."""
    capture = commands.add_parser("capture", help="gap maps of a Hugging Face model")
    capture.description = (
        "Run a causal language model over texts and keep the gap of every attention tile, for "
        "calibration. A capture that was interrupted goes on when the command is given again."
    )
    add_model_options(capture)
    capture.add_argument("--layers", type=_numbers, metavar="0,3-5", help="default: all")
    capture.add_argument(
        "--kv-heads", type=_numbers, metavar="0,2", help="with their query heads; default: all"
    )
    capture.add_argument(
        "--phases", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"]
    )
    capture.add_argument(
        "--keep",
        choices=("maps", "counts", "qkv"),
        default="maps",
        help="gap maps (default); counts at fixed thresholds, far smaller; or traces of Q, K, V",
    )
    capture.add_argument("--model-license", help="for the card; default: not stated")
    capture.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Capture, and say what was captured."""
    from sim.capture import capture

    report = capture(
        options.model,
        options.out,
        texts=None if options.texts is None else read_texts(options.texts, options.text_license),
        layers=options.layers,
        kv_heads=options.kv_heads,
        lengths=options.lengths,
        phases=options.phases,
        decode_tokens=options.decode_tokens,
        keep=options.keep,
        model_name=options.model_name,
        model_license=options.model_license,
        progress=sys.stderr.isatty(),
    )
    print(json.dumps(report, indent=2) if options.json else _summary(report, Path(options.out)))
    return 0


def _numbers(text: str) -> list[int]:
    """Parse ``0,3-5``."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers and ranges, such as 0,3-5")
        numbers += range(first, last + 1)
    return numbers


def _summary(report: dict[str, Any], folder: Path) -> str:
    size = sum((folder / name).stat().st_size for name in report["files"])
    lines = [f"{report['model']}: {len(report['files'])} files, {size / 1e6:.1f} MB, in {folder}"]
    for number, text in enumerate(report["texts"]):
        lines.append(f"text {number}: {text['title']} ({text['license']})")
    lines += ["", f"{'run':16}{'next-token loss':>16}{'off the model by':>18}"]
    for name, check in report["checks"].items():
        lines.append(f"{name:16}{check['next_token_loss']:16.3f}{check['max_difference']:18.2g}")
    if not report["captured"]:
        lines += ["", "All of it was there already."]
    return "\n".join(lines)
