"""What can be calibrated on: bundled gap counts, the trace of the command line, an upload."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from app.command_calibrate import Source, read_maps
from app.sources import TRACE_VARIABLE
from sim.gap_maps import GapMaps, bundled_gap_maps

BUNDLED = "SmolLM2-135M, all layers"
UPLOAD = "upload"
_FILES = "uploaded_maps"
_MOST = 4


@dataclass(frozen=True, eq=False)
class MapsSource:
    """Gap maps, and a key that names their content in caches."""

    key: str
    maps: GapMaps


def names() -> list[str]:
    """List the sources in the order of the menu; the first is shown at first paint."""
    given = [f"file: {Path(path).name}"] if (path := os.environ.get(TRACE_VARIABLE)) else []
    uploaded = [UPLOAD] if _FILES in st.session_state else []
    return [BUNDLED, *given, *uploaded]


def load(name: str, progress: Callable[[float], None]) -> MapsSource:
    """Read the source of this name, or scan its traces for every kernel.

    Raises
    ------
    ValueError
        If a file is damaged or holds neither gap maps nor a trace, or files do not belong
        together.
    OSError
        If a file cannot be opened.
    """
    if name == UPLOAD:
        files: list[Source] = list(st.session_state[_FILES])
        key = " ".join(hashlib.sha256(file).hexdigest() for file in st.session_state[_FILES])
    else:
        path = bundled_gap_maps() if name == BUNDLED else Path(os.environ[TRACE_VARIABLE])
        files, key = [path], f"{path} {path.stat().st_mtime_ns}"
    kept = _kept()
    if key not in kept:
        kept[key] = read_maps(files, progress)
        while len(kept) > _MOST:
            kept.pop(next(iter(kept)))
    return MapsSource(key, kept[key])


def keep_upload(files: list[bytes]) -> None:
    """Make uploaded files a source of this session."""
    st.session_state[_FILES] = files


# Not the result but a shelf is cached: a progress bar cannot be moved inside a cached function.
@st.cache_resource(show_spinner=False)
def _kept() -> dict[str, GapMaps]:
    return {}
