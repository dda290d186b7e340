"""Calibrations that are kept, so that a slider waits for nothing that it does not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import streamlit as st

from app.command_calibrate import at_lengths
from app.gap_map_sources import MapsSource
from sim.calibration import Calibration, Measured, Miss, calibrate, measure, miss_table
from sim.gap_maps import GapMaps
from sim.targets import target


def calibration_of(source: MapsSource, kernel: str, phase: str, space: str) -> Calibration:
    """Calibrate one phase; see :func:`sim.calibration.calibrate`.

    Raises
    ------
    ValueError
        If too few points can be fitted.
    """
    return _calibration(source.key, kernel, phase, space, source.maps)


def joined(phases: Mapping[str, Calibration]) -> Calibration:
    """Make calibrations of single phases one; at least one."""
    first = next(iter(phases.values()))
    return replace(first, phases={phase: one.phases[phase] for phase, one in phases.items()})


def measured_of(source: MapsSource, kernel: str, phase: str) -> Measured:
    """Count what every trial threshold skips; see :func:`sim.calibration.measure`."""
    return _measured(source.key, kernel, phase, source.maps)


def achieved_of(source: MapsSource, one: Calibration, phase: str, factor: float) -> list[dict]:
    """Say what a factor skips at each length; see :func:`app.command_calibrate.at_lengths`."""
    return _achieved(source.key, one.kernel, phase, factor, source.maps, one)


def misses_of(source: MapsSource, phase: str, target_sparsity: float, space: str) -> list[Miss]:
    """Set a target on every kernel's decisions; see :func:`sim.calibration.miss_table`."""
    return _misses(source.key, phase, target_sparsity, space, source.maps)


@st.cache_resource(max_entries=64, show_spinner=False)
def _calibration(key: str, kernel: str, phase: str, space: str, _maps: GapMaps) -> Calibration:
    return calibrate(_maps, kernel, space=space, phases=[phase])


@st.cache_resource(max_entries=16, show_spinner=False)
def _measured(key: str, kernel: str, phase: str, _maps: GapMaps) -> Measured:
    return measure(_maps, target(kernel, phase))


@st.cache_resource(max_entries=256, show_spinner=False)
def _achieved(
    key: str, kernel: str, phase: str, factor: float, _maps: GapMaps, _one: Calibration
) -> list[dict[str, Any]]:
    return at_lengths(_maps, _one.phases[phase], factor)


@st.cache_resource(max_entries=256, show_spinner=False)
def _misses(key: str, phase: str, target_sparsity: float, space: str, _maps: GapMaps) -> list[Miss]:
    return miss_table(_maps, phase, target_sparsity, space=space)
