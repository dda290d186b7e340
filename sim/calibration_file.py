"""Calibration files: JSON, written and read, and checked field by field.

A file may come from anybody, so nothing is taken on trust: a damaged one is refused with one
sentence that names the field.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sim.calibration import Calibration, Part, PhaseCalibration, Residual
from sim.exponential_fit import MAX_B, MIN_POINTS, SPACES, Fit
from sim.geometry import ORDERS
from sim.targets import PHASES, Target

FORMAT = "skip-softmax-lab calibration"
VERSION = 1
MAX_BYTES = 20_000_000


class CalibrationError(ValueError):
    """A calibration file that is damaged or is none; the message is one sentence."""


def to_json(calibration: Calibration) -> str:
    """Write a calibration as JSON text; :func:`from_json` reads it.

    Parameters
    ----------
    calibration : Calibration

    Returns
    -------
    str
    """
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, **asdict(calibration)}, indent=2, ensure_ascii=False
    )
    # Lists of numbers on one line each; within a JSON string no line ends.
    return re.sub(r"\[\n([-+.\de,\s]+)\]", _on_one_line, text) + "\n"


def write_calibration(path: str | os.PathLike[str], calibration: Calibration) -> None:
    """Write a calibration file."""
    Path(path).write_text(to_json(calibration), encoding="utf-8")


def _on_one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers[1].split())}]"


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read and check a calibration file.

    Parameters
    ----------
    path : path

    Returns
    -------
    Calibration

    Raises
    ------
    CalibrationError
        If the file is damaged or is no calibration.
    OSError
        If it cannot be opened.
    """
    with Path(path).open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        return from_json(raw)
    except CalibrationError as error:
        raise CalibrationError(f"{os.fspath(path)}: {error}") from None


def from_json(text: str | bytes) -> Calibration:
    """Read a calibration from JSON text, which may come from anybody.

    Parameters
    ----------
    text : str or bytes

    Returns
    -------
    Calibration

    Raises
    ------
    CalibrationError
        If it is damaged or is no calibration.
    """
    if len(text) > MAX_BYTES:
        raise CalibrationError(f"a calibration has at most {MAX_BYTES} bytes")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise CalibrationError("this is not JSON, so it is no calibration") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CalibrationError(f"this is no calibration: its format is not {FORMAT!r}")
    if body.get("version") != VERSION:
        raise CalibrationError(
            f"this calibration has version {str(body.get('version'))[:40]!r}, "
            f"and version {VERSION} is read"
        )
    top = _Reader(body, "the calibration")
    held = top.object("phases")
    unknown = set(held.values) - set(PHASES)
    if unknown or not held.values:
        raise CalibrationError(
            f"phases must be prefill, decode or both, got {_quote(sorted(unknown))}"
        )
    return Calibration(
        top.text("kernel"),
        {phase: _read_phase(held.object(phase), phase) for phase in PHASES if phase in held.values},
        top.texts("card"),
        top.text("date"),
        top.texts("versions"),
    )


def _read_phase(one: _Reader, phase: str) -> PhaseCalibration:
    made = one.object("target")
    tile = made.whole("tile", at_least=1)
    if len(tile) != 2:
        raise CalibrationError(f"{made.what}: tile must be two whole numbers, got {list(tile)}")
    kernel = Target(
        made.text("name"),
        made.text("phase", (phase,)),
        (tile[0], tile[1]),
        made.text("order", ORDERS),
        made.text("vote", ("head", "group")),
        made.flag("seeded"),
        made.count("splits", at_least=1),
        made.text("split_layout", ("interleaved", "contiguous")),
        made.text("description"),
    )
    return PhaseCalibration(
        kernel,
        _read_fit(one.object("fit")),
        tuple(_read_residual(row) for row in one.objects("by_length")),
        tuple(_read_residual(row) for row in one.objects("by_layer")),
        tuple(_read_part(row) for row in one.objects("parts")),
        one.whole("lengths", at_least=1),
        tuple(one.strings("texts")),
    )


def _read_fit(one: _Reader) -> Fit:
    span = one.numbers("range", 0, 1)
    if len(span) != 2 or span[0] > span[1]:
        raise CalibrationError(f"{one.what}: range must be two rising numbers, got {list(span)}")
    draws = one.pairs("draws")
    return Fit(
        one.number("a", above=0),
        one.number("b", above=0, at_most=MAX_B),
        one.number("r_squared", at_most=1),
        (span[0], span[1]),
        one.text("space", SPACES),
        one.count("points", at_least=MIN_POINTS),
        draws,
    )


def _read_residual(one: _Reader) -> Residual:
    return Residual(
        one.count("group"),
        None if one.is_null("mean") else one.number("mean"),
        None if one.is_null("worst") else one.number("worst"),
        one.count("points"),
    )


def _read_part(one: _Reader) -> Part:
    return Part(
        one.count("layer"),
        None if one.is_null("vote") else one.text("vote"),
        one.count("points"),
        None if one.is_null("fit") else _read_fit(one.object("fit")),
    )


class _Reader:
    """One JSON object of a calibration, whose fields are checked as they are read."""

    def __init__(self, values: Any, what: str) -> None:
        if not isinstance(values, dict):
            raise CalibrationError(f"{what} must be a JSON object, got {_quote(values)}")
        self.values: dict[str, Any] = values
        self.what = what

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise CalibrationError(f"{self.what} lacks {name}")
        return self.values[name]

    def _fail(self, name: str, wanted: str) -> CalibrationError:
        got = _quote(self.values[name])
        return CalibrationError(f"{self.what}: {name} must be {wanted}, got {got}")

    def is_null(self, name: str) -> bool:
        return self._get(name) is None

    def object(self, name: str) -> _Reader:
        return _Reader(self._get(name), name)

    def objects(self, name: str) -> list[_Reader]:
        return [_Reader(row, f"a row of {name}") for row in self._list(name)]

    def _list(self, name: str) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list):
            raise self._fail(name, "a list")
        return value

    def text(self, name: str, accepted: Sequence[str] | None = None) -> str:
        value = self._get(name)
        if not isinstance(value, str) or (accepted is not None and value not in accepted):
            raise self._fail(name, f"one of {', '.join(accepted)}" if accepted else "text")
        _check_text(name, value)
        return value

    def texts(self, name: str) -> dict[str, str]:
        one = self.object(name)
        for key in one.values:
            _check_text(name, key)
        return {key: one.text(key) for key in one.values}

    def strings(self, name: str) -> list[str]:
        value = self._list(name)
        if any(not isinstance(one, str) for one in value):
            raise self._fail(name, "a list of text")
        for one in value:
            _check_text(name, one)
        return value

    def flag(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise self._fail(name, "true or false")
        return value

    def count(self, name: str, at_least: int = 0) -> int:
        value = self._get(name)
        if not _is_whole(value) or value < at_least:
            raise self._fail(name, f"a whole number of at least {at_least}")
        return value

    def whole(self, name: str, at_least: int) -> tuple[int, ...]:
        value = self._list(name)
        if any(not _is_whole(one) or one < at_least for one in value):
            raise self._fail(name, f"whole numbers of at least {at_least}")
        return tuple(value)

    def number(self, name: str, *, above: float = -math.inf, at_most: float = math.inf) -> float:
        value = self._get(name)
        if not _is_number(value) or not above < value <= at_most:
            limits = f" above {above:g}" if above > -math.inf else ""
            limits += f" of at most {at_most:g}" if at_most < math.inf else ""
            raise self._fail(name, f"a number{limits}")
        return float(value)

    def numbers(self, name: str, low: float, high: float) -> tuple[float, ...]:
        value = self._list(name)
        if any(not _is_number(one) or not low <= one <= high for one in value):
            raise self._fail(name, f"numbers between {low:g} and {high:g}")
        return tuple(float(one) for one in value)

    def pairs(self, name: str) -> tuple[tuple[float, float], ...]:
        value = self._list(name)
        for one in value:
            if not (isinstance(one, list) and len(one) == 2 and all(map(_is_number, one))):
                raise self._fail(name, "pairs of numbers")
        return tuple((float(a), float(b)) for a, b in value)


def _check_text(name: str, text: str) -> None:
    # JSON can spell half of a surrogate pair, which no terminal or file can take.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CalibrationError(f"{name} is not valid text: it holds a lone surrogate") from None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value < 2**53


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _quote(value: object) -> str:
    """Text from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
