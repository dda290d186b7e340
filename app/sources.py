"""What can be looked at: a trace named on the command line, bundled traces, workloads, an upload.

Every source is a :class:`sim.traces.Trace`, so that nothing behind this file asks where Q, K and
V came from.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from sim.traces import Trace, bundled, read_trace
from sim.workloads import WORKLOADS

UPLOAD = "upload"
TRACE_VARIABLE = "SKIP_SOFTMAX_TRACE"
"""Environment variable with the path of a trace: ``skip-softmax app TRACE`` sets it."""


@dataclass(frozen=True, eq=False)
class Source:
    """One trace, and a key that names its content in caches."""

    key: str
    trace: Trace


def names() -> list[str]:
    """List the sources in the order of the menu; the first is shown at first paint."""
    given = [f"file: {Path(path).name}"] if (path := os.environ.get(TRACE_VARIABLE)) else []
    uploaded = [UPLOAD] if UPLOAD in st.session_state else []
    return [*given, *bundled(), *(f"workload: {name}" for name in WORKLOADS), *uploaded]


def load(name: str) -> Source:
    """Read the source of this name.

    Raises
    ------
    sim.traces.TraceError
        If the file named on the command line is damaged.
    OSError
        If it cannot be opened.
    """
    if name == UPLOAD:
        return st.session_state[UPLOAD]
    if name.startswith("workload: "):
        return _workload(name.removeprefix("workload: "))
    path = Path(os.environ[TRACE_VARIABLE]) if name.startswith("file: ") else bundled()[name]
    return _file(str(path), path.stat().st_mtime_ns)


def keep_upload(content: bytes) -> None:
    """Check an uploaded file and make it a source of this session.

    Raises
    ------
    sim.traces.TraceError
        If the file is no trace; earlier sources stay as they were.
    """
    trace = read_trace(content)
    st.session_state[UPLOAD] = Source(hashlib.sha256(content).hexdigest(), trace)


@st.cache_resource(max_entries=4, show_spinner=False)
def _file(path: str, changed: int) -> Source:
    return Source(f"{path} {changed}", read_trace(path))


@st.cache_resource(max_entries=4, show_spinner=False)
def _workload(name: str) -> Source:
    made = WORKLOADS[name]()
    card = {"text": made.description}
    trace = Trace(made.q, made.k, made.v, made.softmax_scale, True, [], card)
    return Source(f"workload: {name}", trace)
