"""What a measurement was made on, and the file that keeps it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from cuda_kernels.backends import TENSOR_CORES, Device, detect

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numba", "numba-cuda", "cuda-bindings", "numpy", "torch", "cupy", "cupy-cuda13x")


def check_gpu() -> Device:
    """Return this machine's GPU.

    Raises
    ------
    RuntimeError
        If there is none that runs the tensor-core kernels.
    """
    device = detect()
    if device.kind != "gpu" or (device.compute_capability or (0, 0)) < TENSOR_CORES:
        raise RuntimeError(
            f"bench needs a GPU from Ampere on: {device.reason or f'this is {device.name}'}"
        )
    return device


def describe() -> dict[str, str]:
    """Name GPU, driver, versions and date."""
    found = {"gpu": detect().name, "driver": _driver(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.UTC)
    return {**found, "date": now.strftime("%Y-%m-%d %H:%M UTC")}


def _driver() -> str:
    asked = shutil.which("nvidia-smi")
    if asked is None:
        return "unknown"
    said = subprocess.run(
        [asked, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return (said.stdout.split() or ["unknown"])[0]


class Record:
    """A JSON file that holds every row measured so far.

    As a context it ends, and does not pass on, a run that is interrupted.

    Parameters
    ----------
    what : str
        First word of the file's name; GPU, date and, where there is such a file, a number follow.
    machine : dict
        What :func:`describe` returns.
    folder : path
    """

    def __init__(self, what: str, machine: dict[str, str], folder: Path) -> None:
        self.fields: dict[str, Any] = {"machine": machine}
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.interrupted = False
        stem = f"{what}-{machine['gpu']}-{machine['date'][:10]}".lower().replace(" ", "-")
        self.path = folder / f"{stem}.json"
        number = 1
        while self.path.exists():  # nothing measured is written over
            number += 1
            self.path = folder / f"{stem}-{number}.json"

    def add(self, rows: list[dict[str, Any]], notes: list[str]) -> None:
        """Keep some more rows, on disk too."""
        self.rows += rows
        self.notes += notes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unseen = self.path.with_suffix(".tmp")
        unseen.write_text(json.dumps(self._content(), indent=1) + "\n", encoding="utf-8")
        os.replace(unseen, self.path)

    def result(self) -> dict[str, Any]:
        """Return what the file holds, and where it is."""
        return {**self._content(), "path": str(self.path)}

    def _content(self) -> dict[str, Any]:
        ends = {"notes": self.notes, "interrupted": self.interrupted}
        return {**self.fields, **ends, "rows": self.rows}

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> bool:
        self.interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if self.rows or self.notes:
            self.add([], [])
        return self.interrupted
