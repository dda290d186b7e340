"""Safetensors files read with suspicion: all is checked before anything is allocated.

Traces and gap maps are such files, and may come from anybody.  What is common to both stands
here: the header, each tensor's description, that the tensors fill the file exactly once, and a
write that an interruption cannot spoil.  Text is never interpreted.
The container is described at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 1_000_000
"""Bytes of header accepted."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
}

Source = str | os.PathLike[str] | bytes | BinaryIO


class ContainerError(ValueError):
    """A file that is damaged; the message is one sentence.

    The sentence may quote text from the file: show it as text, never as markup.
    """


@dataclass(frozen=True)
class Entry:
    """One tensor as its header describes it, checked.

    Parameters
    ----------
    name : str
    dtype : str
        As safetensors names it.
    shape : tuple of int
    begin, end : int
        Bytes of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """Open a path, bytes, or a seekable binary file (an upload), for reading.

    Raises
    ------
    ContainerError
        If ``source`` is none of these.
    OSError
        If a file cannot be opened.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file
    elif hasattr(source, "seek"):
        yield source
    else:
        raise ContainerError(
            f"source must be a path, bytes or a binary file, got {type(source).__name__}"
        )


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Parse the header.

    Returns
    -------
    header : dict
        Tensor name → description, and ``__metadata__``, a dict of strings.
    start : int
        Where the data begin.
    available : int
        Bytes of data.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if length < 8:
        raise ContainerError(
            f"the file is {length} bytes long, too short for a safetensors file, "
            "which begins with 8 bytes of header length"
        )
    size = int.from_bytes(_read(file, 8), "little")
    if size > MAX_HEADER:
        raise ContainerError(
            f"the header claims {size} bytes; at most {MAX_HEADER} are accepted (either this is "
            "no safetensors file, or its text is too long and tokens should be left out)"
        )
    if 8 + size > length:
        raise ContainerError(
            f"the header claims {size} bytes, but only {length - 8} bytes follow: "
            "the file is cut off, or is no safetensors file"
        )
    try:
        text = _read(file, size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ContainerError(f"the header is not valid UTF-8 (byte {error.start})") from None
    header = parse_json("the header", text)
    if not isinstance(header, dict):
        raise ContainerError(f"the header must be a JSON object, got {quote(header)}")
    metadata = header.setdefault("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ContainerError(f"__metadata__ must be a JSON object, got {quote(metadata)}")
    return header, 8 + size, length - 8 - size


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise ContainerError unless every field is a string that can be shown and stored."""
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ContainerError(f"metadata {quote(key)} must be a string, got {quote(value)}")
        check_text(f"metadata {quote(key)}", key + value)


def parse_json(what: str, text: str) -> Any:
    """Parse JSON without duplicate names, NaN or endless nesting.

    Raises
    ------
    ContainerError
        If it is no such JSON.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object_without_duplicates, parse_constant=_no_constant
        )
    except ContainerError as error:
        raise ContainerError(f"{what} {error}") from None
    except RecursionError:
        raise ContainerError(f"{what} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ContainerError(f"{what} is not valid JSON: {error}") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ContainerError(f"has {quote(name)} twice (duplicate name)")
        names[name] = value
    return names


def _no_constant(name: str) -> NoReturn:
    raise ContainerError(f"is not valid JSON: {name} is no JSON number")


def check_entry(
    name: str, entry: Any, dtypes: tuple[str, ...], check_shape: Callable[[list[int]], None]
) -> Entry:
    """Check one tensor's description by itself.

    Parameters
    ----------
    name : str
        Of the tensor, as messages name it.
    entry : object
        From the header.
    dtypes : tuple of str
        Those accepted.
    check_shape : callable
        Is given the shape, a list of int; raises ContainerError if it is not accepted.

    Raises
    ------
    ContainerError
        If anything about it is not as it must be.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ContainerError(
            f"{name} must be described by exactly dtype, shape and data_offsets, "
            f"got {quote(sorted(entry) if isinstance(entry, dict) else entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        *others, last = dtypes
        accepted = f"{', '.join(others)} or {last}" if others else last
        raise ContainerError(f"the dtype of {name} must be {accepted}, got {quote(dtype)}")
    # bool is a kind of int in Python, and 4.0 == 4: only plain integers count.
    if not isinstance(shape, list) or any(type(side) is not int for side in shape):
        raise ContainerError(f"the shape of {name} must be a list of integers, got {quote(shape)}")
    check_shape(shape)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise ContainerError(
            f"the data_offsets of {name} must be two integers, 0 <= begin <= end, "
            f"got {quote(offsets)}"
        )
    begin, end = offsets
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if size != end - begin:
        raise ContainerError(
            f"shape {shape} of {name} needs {size} bytes as {dtype}, "
            f"but its data_offsets span {quote(end - begin)}"
        )
    return Entry(name, dtype, tuple(shape), begin, end)


def check_layout(entries: Iterable[Entry], available: int) -> None:
    """Raise ContainerError unless the arrays fill the data exactly once."""
    entries = sorted(entries, key=lambda entry: entry.begin)
    for entry in entries:
        if entry.end > available:
            raise ContainerError(
                f"{entry.name} ends at byte {quote(entry.end)} of the data, "
                f"but the file has only {available}: it is cut off"
            )
    position, previous = 0, "the header"
    for entry in entries:
        if entry.begin < position:
            raise ContainerError(f"{previous} and {entry.name} overlap at byte {entry.begin}")
        if entry.begin > position:
            raise ContainerError(
                f"there is a hole of {entry.begin - position} bytes "
                f"between {previous} and {entry.name}"
            )
        position, previous = entry.end, entry.name
    if position != available:
        raise ContainerError(f"{available - position} bytes are left over after {previous}")


def read_array(file: BinaryIO, start: int, entry: Entry) -> NDArray[Any]:
    """Read one tensor; BF16 is widened to float32, everything else keeps its dtype."""
    file.seek(start + entry.begin)
    raw = np.frombuffer(_read(file, entry.end - entry.begin), DTYPES[entry.dtype])
    array: NDArray[Any] = raw.reshape(entry.shape)
    if entry.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        array = (array.astype(np.uint32) << 16).view(np.float32)
    array.setflags(write=False)
    return array


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    metadata: dict[str, str],
    check: Callable[[Path], object],
) -> None:
    """Write a file beside ``path``, have it checked, and only then let it take its place.

    Parameters
    ----------
    path : path
        The file to write.  An interruption leaves whatever was there before.
    arrays : mapping of str to ndarray
    metadata : dict of str to str
    check : callable
        Is given the unfinished file; what it raises ends the write.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        # The library writes whatever memory order it finds, so the order is made plain here.
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        unfinished.write_bytes(save(contiguous, metadata))
        check(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_text(what: str, text: str) -> None:
    """Raise ContainerError if the text holds half of a surrogate pair, as JSON can spell.

    No page, terminal or file can take that.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ContainerError(f"{what} is not valid text: it holds a lone surrogate") from None


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if not isinstance(data, bytes):
        raise ContainerError(f"source must be opened in binary mode, got {type(data).__name__}")
    if len(data) != size:
        raise ContainerError(f"the file ended {size - len(data)} bytes early while it was read")
    return data


def quote(value: object) -> str:
    """Quote text from a file briefly; it may be a megabyte long."""
    # An integer of thousands of digits cannot be printed at all.
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "an integer beyond 64 bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
