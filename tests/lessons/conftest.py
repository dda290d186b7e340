"""Run lessons as a learner does: as programs, in a process of their own."""

import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from lessons.helpers import ROOT, child_environment

SLACK = 3
"""How much slower than two idle cores a machine that runs the tests may be."""

GAP = re.compile(r"^ *# FILL ME IN \(roughly (\d+) lines?\)\n(.*?)^ *# END\n", re.M | re.S)


class Run(NamedTuple):
    status: int
    stdout: str
    stderr: str
    seconds: float


@cache
def run(path: Path) -> Run:
    """Run a program, from another directory than its own."""
    start = time.perf_counter()
    environment = child_environment() | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        env=environment,
        cwd=ROOT.parent,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    return Run(done.returncode, done.stdout, done.stderr, time.perf_counter() - start)


@pytest.fixture(scope="session")
def program():
    """Give the function that runs a program, each path once."""
    return run


@pytest.fixture(scope="session")
def gap():
    """Give the pattern of a gap: the number of lines it announces, and what is in it."""
    return GAP


@pytest.fixture(scope="session")
def slack():
    return SLACK
