"""Captured Q, K and V in one safetensors file: read, write, check.

A trace holds three tensors of one attention layer, as they enter the scores (after rotary
embedding), and text about them:

* ``q`` [Hq, Lq, D], ``k`` [Hkv, Lk, D], ``v`` [Hkv, Lk, Dv], all F16, all BF16 or all F32;
  Lq ≤ Lk, and query i is key i + Lk - Lq;
* metadata, strings as in every safetensors header: ``tokens`` (JSON list of Lk strings),
  ``heads`` (JSON list of Hq strings), ``softmax_scale`` (absent: D**-0.5), ``causal``
  (``true`` or ``false``; absent: ``true``), and any other field (``model``, ``license``,
  ``text``, ``layer``, ``command``, …), which becomes the card.

A trace may come from anybody, so the reader refuses a damaged file, in one sentence, before it
allocates anything for the arrays (:mod:`sim.container`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sim import container
from sim.container import ContainerError, Entry, Source, check_text, quote

MAX_LENGTH = 131_072
"""Tokens accepted."""

MAX_HEADS = 1024
MAX_HEAD_SIZE = 1024

_TENSORS = ("q", "k", "v")
_DTYPES = ("F16", "BF16", "F32")
_NOT_CARD = ("tokens", "softmax_scale", "causal")


class TraceError(ValueError):
    """A trace file that is damaged or is no trace; the message is one sentence.

    The sentence may quote text from the file: show it as text, never as markup.
    """


@dataclass(frozen=True, eq=False)
class Trace:
    """Q, K and V of one attention layer, with the words that they belong to.

    Attributes
    ----------
    q : array [Hq, Lq, D]
    k : array [Hkv, Lk, D]
    v : array [Hkv, Lk, Dv]
        float16 or float32 as stored; BF16 is widened to float32.  Read-only.
    softmax_scale : float
        What q·k is multiplied with before the softmax.
    causal : bool
        Whether query i saw only keys ≤ i + Lk - Lq.
    tokens : list of str
        The text of each key, Lk of them, or empty if the file has none.  A token that only
        completes a character begun by the one before it is an empty string.
    card : dict
        Every other metadata field, in alphabetical order.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    softmax_scale: float
    causal: bool
    tokens: list[str]
    card: dict[str, str]

    @property
    def head_names(self) -> list[str]:
        """A name for each query head, such as ``layer 12, head 4``.

        Without ``heads`` in the card the heads are counted from 0.
        """
        layer = f"layer {self.card['layer']}, " if "layer" in self.card else ""
        if "heads" in self.card:
            numbers = json.loads(self.card["heads"])
        else:
            numbers = [str(head) for head in range(len(self.q))]
        return [f"{layer}head {number}" for number in numbers]


def bundled() -> dict[str, Path]:
    """Traces of a real model that come with this package.

    Returns
    -------
    dict
        Name → path, in alphabetical order.  ``sim/data/README.md`` says what they are.

    Examples
    --------
    >>> [read_trace(path).q.shape for path in bundled().values()]
    [(3, 4096, 64), (3, 4096, 64)]
    """
    paths = sorted((Path(__file__).parent / "data").glob("*-layer*.safetensors"))
    return {path.stem: path for path in paths}


def read_trace(source: Source) -> Trace:
    """Read and check a trace.

    Parameters
    ----------
    source : path, bytes or binary file
        A path, the content of a file, or a seekable binary file (an upload), which is read
        from its beginning.

    Returns
    -------
    Trace
        Arrays are read-only; F16 and F32 keep their dtype, BF16 is widened to float32.

    Raises
    ------
    TraceError
        If the file is damaged or is no trace; nothing has been allocated for the arrays then,
        unless the fault is a value that is not finite.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> trace = read_trace(next(iter(bundled().values())))
    >>> trace.q.dtype, trace.causal, trace.softmax_scale
    (dtype('float16'), True, 0.125)
    """
    try:
        with container.opened(source) as file:
            return _read_trace(file)
    except ContainerError as error:
        raise TraceError(str(error)) from None


def write_trace(
    path: str | os.PathLike[str],
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    tokens: Sequence[str] = (),
    softmax_scale: float,
    causal: bool = True,
    card: Mapping[str, str],
) -> None:
    """Write a trace; what :func:`read_trace` would refuse is not written.

    The file is written beside ``path``, read back, and only then takes its place, so that an
    interruption leaves whatever was there before.

    Parameters
    ----------
    path : path
        The file to write.
    q : array [Hq, Lq, D]
    k : array [Hkv, Lk, D]
    v : array [Hkv, Lk, Dv]
        All float16 or all float32.
    tokens : sequence of str
        The text of each key, or nothing.
    softmax_scale : float
        What q·k is multiplied with before the softmax.
    causal : bool
        Whether the attention was causal.
    card : mapping of str to str
        Where the arrays come from: ``model``, ``license``, ``text``, ``layer``, ``heads`` (a
        JSON list of Hq strings), ``command``, …

    Raises
    ------
    TraceError
        If an argument does not make a valid trace.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> x = np.ones((1, 4, 8), np.float16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "ones.safetensors"
    ...     write_trace(path, x, x, x, tokens=list("word"), softmax_scale=1, card={"layer": "3"})
    ...     read_trace(path).head_names
    ['layer 3, head 0']
    """
    arrays = {"q": q, "k": k, "v": v}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32):
            kind = getattr(array, "dtype", type(array).__name__)
            raise TraceError(f"{name} must be a NumPy array of float16 or float32, got {kind}")
    for key, value in card.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TraceError(f"card must map strings to strings, got {quote((key, value))}")
        if key in _NOT_CARD:
            raise TraceError(f"card must not hold {key!r}, which is an argument of its own")
    metadata = {
        "softmax_scale": repr(float(softmax_scale)),
        "causal": "true" if causal else "false",
        **card,
    }
    if len(tokens):
        metadata["tokens"] = json.dumps(list(tokens), ensure_ascii=False)
    try:
        container.check_metadata(metadata)
    except ContainerError as error:
        raise TraceError(str(error)) from None
    container.write(path, arrays, metadata, read_trace)


def _read_trace(file: BinaryIO) -> Trace:
    header, start, available = container.read_header(file)
    entries = _check_tensors(header, available)
    softmax_scale, causal, tokens, card = _check_metadata(header, entries)
    arrays = {name: _read_array(file, start, entry) for name, entry in entries.items()}
    return Trace(**arrays, softmax_scale=softmax_scale, causal=causal, tokens=tokens, card=card)


def _check_tensors(header: dict[str, Any], available: int) -> dict[str, Entry]:
    """Check everything about q, k and v that can be known without reading them."""
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        if name not in _TENSORS:
            raise TraceError(f"unknown tensor {quote(name)}; a trace holds exactly q, k and v")
    for name in _TENSORS:
        if name not in names:
            raise TraceError(f"tensor {name} is missing; a trace holds exactly q, k and v")
    entries = {
        name: container.check_entry(name, header[name], _DTYPES, partial(_check_sides, name))
        for name in _TENSORS
    }
    q, k, v = (entries[name] for name in _TENSORS)
    if not q.dtype == k.dtype == v.dtype:
        raise TraceError(
            f"q, k and v must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    _check_shapes(q.shape, k.shape, v.shape)
    container.check_layout(entries.values(), available)
    return entries


def _check_sides(name: str, shape: list[int]) -> None:
    """Check one tensor's shape by itself."""
    if len(shape) != 3:
        raise TraceError(
            f"{name} must have rank 3, [heads, tokens, head size], got shape {quote(shape)}"
        )
    limits = (MAX_HEADS, MAX_LENGTH, MAX_HEAD_SIZE)
    for what, side, limit in zip(("heads", "tokens", "head size"), shape, limits, strict=True):
        if not 1 <= side <= limit:
            raise TraceError(
                f"the {what} of {name} must be between 1 and {limit}, got {quote(side)}"
            )


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Check that three shapes make one attention layer."""
    if k[1] != v[1]:
        raise TraceError(f"k and v must have the same tokens, got {k[1]} and {v[1]}")
    if k[0] != v[0]:
        raise TraceError(f"k and v must have the same heads, got {k[0]} and {v[0]}")
    if q[2] != k[2]:
        raise TraceError(f"q and k must have the same head size, got {q[2]} and {k[2]}")
    if q[1] > k[1]:
        raise TraceError(f"q must not have more tokens than k, got {q[1]} and {k[1]}")
    if q[0] % k[0]:
        raise TraceError(f"the heads of q must be a multiple of those of k, got {q[0]} and {k[0]}")


def _check_metadata(
    header: dict[str, Any], entries: dict[str, Entry]
) -> tuple[float, bool, list[str], dict[str, str]]:
    """Return softmax scale, causal, tokens and card."""
    metadata = header["__metadata__"]
    container.check_metadata(metadata)
    heads, _, head_size = entries["q"].shape
    text = metadata.get("softmax_scale", str(head_size**-0.5))
    try:
        softmax_scale = float(text)
    except ValueError:
        softmax_scale = math.nan
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise TraceError(f"softmax_scale must be a finite number above 0, got {quote(text)}")

    causal = metadata.get("causal", "true")
    if causal not in ("true", "false"):
        raise TraceError(f"causal must be 'true' or 'false', got {quote(causal)}")

    tokens = []
    if "tokens" in metadata:
        tokens = _strings("tokens", metadata["tokens"], entries["k"].shape[1])
    if "heads" in metadata:
        _strings("heads", metadata["heads"], heads)
    # Sorted, since the library writes the fields in an order that changes from run to run.
    card = {key: metadata[key] for key in sorted(metadata) if key not in _NOT_CARD}
    return softmax_scale, causal == "true", tokens, card


def _strings(name: str, text: str, count: int) -> list[str]:
    """Parse a JSON list of ``count`` strings."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
        raise TraceError(f"{name} must be a JSON list of strings, got {quote(text)}")
    if len(value) != count:
        raise TraceError(f"{name} must be {count} strings, got {len(value)}")
    for item in value:
        check_text(name, item)
    return value


def _read_array(file: BinaryIO, start: int, entry: Entry) -> NDArray[Any]:
    array = container.read_array(file, start, entry)
    for head, rows in enumerate(array):
        finite = np.isfinite(rows)
        if not finite.all():
            token = int(np.argmin(finite.all(axis=1)))
            raise TraceError(
                f"{entry.name} has a value that is not finite at head {head}, token {token}"
            )
    return array
