"""Captured Q, K and V in one safetensors file: read, write, check.

A trace holds three tensors of one attention layer, as they enter the scores (after rotary
embedding), and text about them:

* ``q`` [Hq, Lq, D], ``k`` [Hkv, Lk, D], ``v`` [Hkv, Lk, Dv], all F16, all BF16 or all F32;
  Lq ≤ Lk, and query i is key i + Lk - Lq;
* metadata, strings as in every safetensors header: ``tokens`` (JSON list of Lk strings),
  ``heads`` (JSON list of Hq strings), ``softmax_scale`` (absent: D**-0.5), ``causal``
  (``true`` or ``false``; absent: ``true``), and any other field (``model``, ``license``,
  ``text``, ``layer``, ``command``, …), which becomes the card.

A trace may come from anybody, so the reader parses the header itself and refuses a damaged
file, in one sentence, before it allocates anything for the arrays.  Text is never interpreted.
The container is described at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 1_000_000
"""Bytes of header accepted."""

MAX_LENGTH = 131_072
"""Tokens accepted."""

MAX_HEADS = 1024
MAX_HEAD_SIZE = 1024

_TENSORS = ("q", "k", "v")
_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
}
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


@dataclass(frozen=True)
class _Entry:
    """One tensor as its header describes it, checked."""

    name: str
    dtype: str
    shape: tuple[int, int, int]
    begin: int
    end: int


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
    paths = sorted((Path(__file__).parent / "data").glob("*.safetensors"))
    return {path.stem: path for path in paths}


def read_trace(source: str | os.PathLike[str] | bytes | BinaryIO) -> Trace:
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
    if isinstance(source, bytes):
        return _read_trace(io.BytesIO(source))
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return _read_trace(file)
    if not hasattr(source, "seek"):
        raise TraceError(
            f"source must be a path, bytes or a binary file, got {type(source).__name__}"
        )
    return _read_trace(source)


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
    from safetensors.numpy import save

    arrays = {"q": q, "k": k, "v": v}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32):
            kind = getattr(array, "dtype", type(array).__name__)
            raise TraceError(f"{name} must be a NumPy array of float16 or float32, got {kind}")
    for key, value in card.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TraceError(f"card must map strings to strings, got {_quote((key, value))}")
        if key in _NOT_CARD:
            raise TraceError(f"card must not hold {key!r}, which is an argument of its own")
    metadata = {
        "softmax_scale": repr(float(softmax_scale)),
        "causal": "true" if causal else "false",
        **card,
    }
    if len(tokens):
        metadata["tokens"] = json.dumps(list(tokens), ensure_ascii=False)
    for key, value in metadata.items():
        _check_text(f"metadata {_quote(key)}", key + value)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        # The library writes whatever memory order it finds, so the order is made plain here.
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        unfinished.write_bytes(save(contiguous, metadata))
        read_trace(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_trace(file: BinaryIO) -> Trace:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    header, start = _read_header(file, length)
    entries = _check_tensors(header, length - start)
    softmax_scale, causal, tokens, card = _check_metadata(header, entries)
    arrays = {name: _read_array(file, start, entry) for name, entry in entries.items()}
    return Trace(**arrays, softmax_scale=softmax_scale, causal=causal, tokens=tokens, card=card)


def _read_header(file: BinaryIO, length: int) -> tuple[dict[str, Any], int]:
    """Return the parsed header and the position where the arrays begin."""
    if length < 8:
        raise TraceError(
            f"the file is {length} bytes long, too short for a safetensors file, "
            "which begins with 8 bytes of header length"
        )
    size = int.from_bytes(_read(file, 8), "little")
    if size > MAX_HEADER:
        raise TraceError(
            f"the header claims {size} bytes; at most {MAX_HEADER} are accepted (either this is "
            "no safetensors file, or its text is too long and tokens should be left out)"
        )
    if 8 + size > length:
        raise TraceError(
            f"the header claims {size} bytes, but only {length - 8} bytes follow: "
            "the file is cut off, or is no safetensors file"
        )
    try:
        text = _read(file, size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(f"the header is not valid UTF-8 (byte {error.start})") from None
    try:
        header = json.loads(
            text, object_pairs_hook=_object_without_duplicates, parse_constant=_no_constant
        )
    except TraceError:
        raise
    except RecursionError:
        raise TraceError("the header is not valid JSON for a trace: nested too deeply") from None
    except ValueError as error:
        raise TraceError(f"the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise TraceError(f"the header must be a JSON object, got {_quote(header)}")
    return header, 8 + size


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise TraceError(f"the header has {_quote(name)} twice (duplicate name)")
        names[name] = value
    return names


def _no_constant(name: str) -> NoReturn:
    raise TraceError(f"the header is not valid JSON: {name} is no JSON number")


def _check_tensors(header: dict[str, Any], available: int) -> dict[str, _Entry]:
    """Check everything about q, k and v that can be known without reading them."""
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        if name not in _TENSORS:
            raise TraceError(f"unknown tensor {_quote(name)}; a trace holds exactly q, k and v")
    for name in _TENSORS:
        if name not in names:
            raise TraceError(f"tensor {name} is missing; a trace holds exactly q, k and v")
    entries = {name: _check_entry(name, header[name]) for name in _TENSORS}
    q, k, v = (entries[name] for name in _TENSORS)
    if not q.dtype == k.dtype == v.dtype:
        raise TraceError(
            f"q, k and v must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    _check_shapes(q.shape, k.shape, v.shape)
    _check_layout(entries, available)
    return entries


def _check_entry(name: str, entry: Any) -> _Entry:
    """Check one tensor's description by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TraceError(
            f"{name} must be described by exactly dtype, shape and data_offsets, "
            f"got {_quote(sorted(entry) if isinstance(entry, dict) else entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise TraceError(f"the dtype of {name} must be F16, BF16 or F32, got {_quote(dtype)}")
    # bool is a kind of int in Python, and 4.0 == 4: only plain integers count.
    if not isinstance(shape, list) or any(type(side) is not int for side in shape):
        raise TraceError(f"the shape of {name} must be a list of integers, got {_quote(shape)}")
    if len(shape) != 3:
        raise TraceError(
            f"{name} must have rank 3, [heads, tokens, head size], got shape {_quote(shape)}"
        )
    limits = (MAX_HEADS, MAX_LENGTH, MAX_HEAD_SIZE)
    for what, side, limit in zip(("heads", "tokens", "head size"), shape, limits, strict=True):
        if not 1 <= side <= limit:
            raise TraceError(
                f"the {what} of {name} must be between 1 and {limit}, got {_quote(side)}"
            )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise TraceError(
            f"the data_offsets of {name} must be two integers, 0 <= begin <= end, "
            f"got {_quote(offsets)}"
        )
    begin, end = offsets
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if size != end - begin:
        raise TraceError(
            f"shape {shape} of {name} needs {size} bytes as {dtype}, "
            f"but its data_offsets span {_quote(end - begin)}"
        )
    return _Entry(name, dtype, (shape[0], shape[1], shape[2]), begin, end)


def _check_shapes(
    q: tuple[int, int, int], k: tuple[int, int, int], v: tuple[int, int, int]
) -> None:
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


def _check_layout(entries: dict[str, _Entry], available: int) -> None:
    """Check that the arrays fill the rest of the file exactly once."""
    for entry in entries.values():
        if entry.end > available:
            raise TraceError(
                f"{entry.name} ends at byte {_quote(entry.end)} of the data, "
                f"but the file has only {available}: it is cut off"
            )
    position, previous = 0, "the header"
    for entry in sorted(entries.values(), key=lambda entry: entry.begin):
        if entry.begin < position:
            raise TraceError(f"{previous} and {entry.name} overlap at byte {entry.begin}")
        if entry.begin > position:
            raise TraceError(
                f"there is a hole of {entry.begin - position} bytes "
                f"between {previous} and {entry.name}"
            )
        position, previous = entry.end, entry.name
    if position != available:
        raise TraceError(f"{available - position} bytes are left over after {previous}")


def _check_metadata(
    header: dict[str, Any], entries: dict[str, _Entry]
) -> tuple[float, bool, list[str], dict[str, str]]:
    """Return softmax scale, causal, tokens and card."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise TraceError(f"__metadata__ must be a JSON object, got {_quote(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TraceError(f"metadata {_quote(key)} must be a string, got {_quote(value)}")
        _check_text(f"metadata {_quote(key)}", key + value)

    heads, _, head_size = entries["q"].shape
    text = metadata.get("softmax_scale", str(head_size**-0.5))
    try:
        softmax_scale = float(text)
    except ValueError:
        softmax_scale = math.nan
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise TraceError(f"softmax_scale must be a finite number above 0, got {_quote(text)}")

    causal = metadata.get("causal", "true")
    if causal not in ("true", "false"):
        raise TraceError(f"causal must be 'true' or 'false', got {_quote(causal)}")

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
        raise TraceError(f"{name} must be a JSON list of strings, got {_quote(text)}")
    if len(value) != count:
        raise TraceError(f"{name} must be {count} strings, got {len(value)}")
    for item in value:
        _check_text(name, item)
    return value


def _check_text(what: str, text: str) -> None:
    # JSON can spell half of a surrogate pair, which no page, terminal or file can take.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise TraceError(f"{what} is not valid text: it holds a lone surrogate") from None


def _read_array(file: BinaryIO, start: int, entry: _Entry) -> NDArray[Any]:
    file.seek(start + entry.begin)
    raw = np.frombuffer(_read(file, entry.end - entry.begin), _DTYPES[entry.dtype])
    array: NDArray[Any] = raw.reshape(entry.shape)
    if entry.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        array = (array.astype(np.uint32) << 16).view(np.float32)
    for head, rows in enumerate(array):
        finite = np.isfinite(rows)
        if not finite.all():
            token = int(np.argmin(finite.all(axis=1)))
            raise TraceError(
                f"{entry.name} has a value that is not finite at head {head}, token {token}"
            )
    array.setflags(write=False)
    return array


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if not isinstance(data, bytes):
        raise TraceError(f"source must be opened in binary mode, got {type(data).__name__}")
    if len(data) != size:
        raise TraceError(f"the file ended {size - len(data)} bytes early while it was read")
    return data


def _quote(value: object) -> str:
    """Quote text from a file briefly; it may be a megabyte long."""
    # An integer of thousands of digits cannot be printed at all.
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "an integer beyond 64 bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
