"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.texts import Text

KERNELS = ("ours", "nvidia", "nvidia-256", "model-optimizer")
"""Those of :mod:`sim.targets`, which is not imported to print help."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what a run of a model over texts needs: model, texts, lengths, folder."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, or a hub name")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[1024, 2048, 4096],
        metavar="N",
        help="tokens of each text; default 1024 2048 4096",
    )
    parser.add_argument(
        "--texts", nargs="+", metavar="FILE", help="UTF-8 text; default chapters of Python's manual"
    )
    parser.add_argument(
        "--text-license", default="not stated", help="of --texts, to be kept with the results"
    )
    parser.add_argument(
        "--decode-tokens", type=int, default=16, metavar="N", help="after each text; default 16"
    )
    parser.add_argument(
        "--model-name", help="to be kept with the results; default name of the file or folder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def read_texts(names: Sequence[str], license: str) -> list[Text]:
    """Read the files of ``--texts``.

    Raises
    ------
    ValueError
        If a file is not UTF-8.
    OSError
        If it cannot be opened.
    """
    from sim.texts import Text

    texts = []
    for name in names:
        try:
            texts.append(Text(Path(name).read_text(encoding="utf-8"), Path(name).name, license))
        except UnicodeDecodeError:
            raise ValueError(f"texts must be UTF-8, but {name} is not") from None
    return texts
