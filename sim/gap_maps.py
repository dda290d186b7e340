"""Gap maps of a whole model: for each text, kernel and layer, the gap and mass of every tile.

What calibration needs of Q and K is only the gap of every visited tile, and the attention that a
skip would drop: a few megabytes for a model, where Q, K and V are gigabytes.  A *sample* is one
text at one length in one phase.

A gap-map file is a safetensors file.  Its metadata has one field ``gap_maps``, a JSON object:
``format`` (1), ``samples``, ``layers``, ``heads``, ``kv_heads``, ``targets``, ``thresholds`` and
``card``, as in :class:`GapMaps`.  For every sample and every target of its phase it holds two
tensors, whose rows are the target's votes:

* ``<sample>/<target>/gap`` [layers, rows, tiles] F32, natural-log units, +inf for a first visited
  tile: the visited tiles in row-major order, vote group by vote group (prefill) or step by step
  (decode).  Or, if ``thresholds`` is a list of λ rather than null, *counts*:
  ``<sample>/<target>/count`` [layers, rows, thresholds + 1] U8, U16 or U32: tiles with gap below
  the first ln λ, between the first and the second, …, not below the last.
* ``<sample>/<target>/mass``, same shape, F32 (F16 beside counts): the share of all the row's
  attention that lies in these tiles, so that a row's sum is 1, and the sum over skipped tiles is
  the mean dropped mass.

Counts are exact at their thresholds and a hundredth of the size; nothing else differs.  A file
may come from anybody, so a damaged one is refused in one sentence (:mod:`sim.container`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim import container
from sim.calibration import TRIALS
from sim.container import ContainerError, Source, quote
from sim.geometry import Grid
from sim.targets import KERNELS, PHASES, TARGETS, Target
from sim.threshold import ln_threshold
from sim.traces import MAX_HEADS, MAX_LENGTH, Trace, read_trace

FORMAT = 1
_SAMPLE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")
_FIELDS = ("format", "samples", "layers", "heads", "kv_heads", "targets", "thresholds", "card")


class GapMapError(ValueError):
    """A gap-map file that is damaged, foreign or does not fit; the message is one sentence.

    The sentence may quote text from the file: show it as text, never as markup.
    """


@dataclass(frozen=True)
class Sample:
    """One text at one length in one phase.

    Parameters
    ----------
    name : str
        Unique among the samples; lower-case letters, digits, dots and hyphens.
    text : str
        Title of the text.
    license : str
        Of the text.
    length : int
        Tokens of the text, the length that λ = threshold_scale_factor / length refers to.
    phase : {"prefill", "decode"}
    steps : tuple of int
        Decode: keys that each step sees, its own included.  Empty in prefill.
    """

    name: str
    text: str
    license: str
    length: int
    phase: str
    steps: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class GapMaps:
    """Gap maps of some layers of a model over some samples, for some kernels.

    Made by :func:`read_gap_maps`, :meth:`from_traces` or ``skip-softmax capture``.

    Parameters
    ----------
    samples : tuple of Sample
    layers : tuple of int
    heads, kv_heads : tuple of str
        Names of the query heads and of the KV heads, the same in every layer.
    targets : tuple of Target
        Each sample has maps for every one of its phase.
    thresholds : tuple of float, or None
        λ where counts are exact, in ascending order.  None: every λ ≤ 1, these are full maps.
    card : dict of str to str
        ``model``, ``license``, ``command``, ``date``, ``versions``, ``head_dim``, …
    arrays : mapping
        (sample name, target name) → gaps or counts, and masses; both [layers, rows, …].
    """

    samples: tuple[Sample, ...]
    layers: tuple[int, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    targets: tuple[Target, ...]
    thresholds: tuple[float, ...] | None
    card: Mapping[str, str]
    arrays: Mapping[tuple[str, str], tuple[NDArray[Any], NDArray[Any]]]

    def rows(self, target: Target) -> tuple[str, ...]:
        """Name each row that :meth:`gaps` gives for a target: who votes alone.

        Examples
        --------
        >>> from sim.traces import bundled
        >>> maps = GapMaps.from_traces([next(iter(bundled().values()))], lengths=[512])
        >>> maps.rows(TARGETS["nvidia", "prefill"]), maps.rows(TARGETS["nvidia", "decode"])
        (('head 0', 'head 1', 'head 2'), ('KV head 0',))
        """
        if target.vote == "group":
            return tuple(f"KV head {name}" for name in self.kv_heads)
        return tuple(f"head {name}" for name in self.heads)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels whose decisions these maps hold, in every phase that they hold.

        Examples
        --------
        >>> read_gap_maps(bundled_gap_maps()).kernels
        ('ours', 'nvidia', 'model-optimizer')
        """
        phases = _phases(self)
        return tuple(
            name
            for name in KERNELS
            if all(TARGETS[name, phase] in self.targets for phase in phases)
        )

    def gaps(self, target: Target, sample: Sample, layer: int) -> NDArray[np.float32]:
        """Give the gap of every visited tile of one layer.

        Parameters
        ----------
        target : Target
            Of the sample's phase.
        sample : Sample
        layer : int

        Returns
        -------
        ndarray, shape [rows, tiles], float32
            A row a vote (:meth:`rows`), no NaN; +inf for a tile that is never skipped.  The
            sparsity at λ is the share below ln λ (:func:`sim.threshold.ln_threshold`).
            From counts: in ascending order, spread evenly between their thresholds, so exact
            at these.

        Raises
        ------
        ValueError
            If there is no such sample, layer or target.

        Examples
        --------
        >>> from sim.traces import bundled
        >>> maps = GapMaps.from_traces([next(iter(bundled().values()))], lengths=[512])
        >>> sample = maps.samples[0]
        >>> gaps = maps.gaps(TARGETS["ours", sample.phase], sample, maps.layers[0])
        >>> gaps.shape, int(np.isinf(gaps).sum())  # each of 8 vote groups keeps its first tile
        ((3, 20), 24)
        """
        values = self._find(target, sample)[0][self._index(layer)]
        if self.thresholds is None:
            return values
        return _spread(values, ln_threshold(self.thresholds))

    def sparsity(
        self, target: Target, sample: Sample, thresholds: ArrayLike
    ) -> NDArray[np.float64]:
        """Give the share of tiles that thresholds skip, in every layer and row.

        Parameters
        ----------
        target : Target
            Of the sample's phase.
        sample : Sample
        thresholds : array, shape [n]
            λ in [0, 1], in any order.

        Returns
        -------
        ndarray, shape [layers, rows, n], float64
            Share of visited tiles whose gap lies below ln λ.  From counts: exact at their
            thresholds, interpolated along ln λ between them; below the first thinning out over
            one natural-log unit, above the last no more.

        Raises
        ------
        ValueError
            If there is no such sample or target.

        Examples
        --------
        >>> from sim.traces import bundled
        >>> maps = GapMaps.from_traces([next(iter(bundled().values()))], lengths=[1024])
        >>> ours = TARGETS["ours", "prefill"]
        >>> maps.sparsity(ours, maps.samples[0], [0.01, 0.1])[0].round(3).tolist()
        [[0.069, 0.319], [0.014, 0.306], [0.0, 0.028]]
        """
        values = self._find(target, sample)[0]
        ln = ln_threshold(np.asarray(thresholds, np.float64).ravel())
        if self.thresholds is None:
            edges, place = np.unique(ln, return_inverse=True)
            return _place(values, edges)[0].cumsum(-1)[..., place] / values.shape[-1]
        # skipped at one unit below the first threshold, which is none, and at each threshold
        skipped = np.zeros(values.shape)
        np.cumsum(values[..., :-1], -1, out=skipped[..., 1:])
        counted = ln_threshold(self.thresholds).astype(np.float64)
        edges = np.concatenate([counted[:1] - 1, counted])
        at = np.clip(ln.astype(np.float64), edges[0], edges[-1])
        right = np.searchsorted(edges, at).clip(1)
        part = (at - edges[right - 1]) / (edges[right] - edges[right - 1])
        between = skipped[..., right - 1] * (1 - part) + skipped[..., right] * part
        return between / values.sum(-1, keepdims=True, dtype=np.int64)

    def mass(self, target: Target, sample: Sample, layer: int) -> NDArray[np.float32]:
        """Give the share of the row's attention that lies in each tile, as :meth:`gaps` does.

        Returns
        -------
        ndarray, shape [rows, tiles], float32
            Sums to 1 over each row.  ``mass[r][gaps[r] < ln λ].sum()`` is the mean dropped mass
            of row r at λ.

        Raises
        ------
        ValueError
            If there is no such sample, layer or target.
        """
        counts, mass = (array[self._index(layer)] for array in self._find(target, sample))
        if self.thresholds is None:
            return mass
        each = mass.astype(np.float32) / np.maximum(counts, 1)
        spread = [np.repeat(one, count) for one, count in zip(each, counts, strict=True)]
        return np.stack(spread)

    def counted(self, thresholds: ArrayLike = TRIALS) -> GapMaps:
        """Count the tiles between thresholds, which is all that calibration needs.

        Parameters
        ----------
        thresholds : array, shape [n]
            λ in ascending order, above 0 and at most 1; default Model Optimizer's trials.

        Returns
        -------
        GapMaps
            A hundredth of the size; exact at these thresholds.

        Raises
        ------
        ValueError
            If the thresholds are out of order or out of range, or these are counts already.

        Examples
        --------
        >>> from sim.traces import bundled
        >>> full = GapMaps.from_traces([next(iter(bundled().values()))], lengths=[1024])
        >>> counts = full.counted([0.001, 0.01, 0.1])
        >>> of = TARGETS["ours", "prefill"], full.samples[0], 12
        >>> [int((maps.gaps(*of) < ln_threshold(0.01)).sum()) for maps in (full, counts)]
        [6, 6]
        """
        if self.thresholds is not None:
            raise ValueError("these are counts already; only full maps can be counted")
        lam = tuple(float(x) for x in np.asarray(thresholds, np.float64).ravel())
        _check_thresholds(lam)
        ln = ln_threshold(lam)
        arrays = {name: count_gaps(*packed, ln) for name, packed in self.arrays.items()}
        return replace(self, thresholds=lam, arrays=arrays)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write one file; what :func:`read_gap_maps` would refuse is not written.

        The file is written beside ``path``, read back, and only then takes its place, so that
        an interruption leaves whatever was there before.

        Raises
        ------
        GapMapError
            If the maps are not valid.
        OSError
            If the file cannot be written.
        """
        about = {
            "format": FORMAT,
            "samples": [asdict(sample) for sample in self.samples],
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "targets": [_definition(target) for target in self.targets],
            "thresholds": self.thresholds,
            "card": dict(self.card),
        }
        arrays = {
            f"{sample}/{target}/{kind}": array
            for (sample, target), pair in self.arrays.items()
            for kind, array in zip((_kind(self.thresholds), "mass"), pair, strict=True)
        }
        metadata = {"gap_maps": json.dumps(about, ensure_ascii=False)}
        try:
            container.check_metadata(metadata)
        except ContainerError as error:
            raise GapMapError(str(error)) from None
        container.write(path, arrays, metadata, read_gap_maps)

    @classmethod
    def from_traces(
        cls,
        traces: Iterable[Trace | Source],
        *,
        lengths: Sequence[int] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> GapMaps:
        """Scan traces for every kernel: calibration with no model at hand.

        Parameters
        ----------
        traces : iterable of Trace, path, bytes or binary file
            Of one model; for every text the same layers, each once, and the same heads.
        lengths : sequence of int, optional
            Prefill is cropped to the first so many tokens, which is exact, since no token sees
            what follows.  Default each trace's own length, its half, … down to 512.
        progress : callable
            Is given the share done, in (0, 1].

        Returns
        -------
        GapMaps
            A trace of a whole text gives a prefill sample per length, and, unless there are
            traces of decoded tokens too, a decode sample: the last 16 rows, each of which sees
            what a decoded token would.

        Raises
        ------
        GapMapError
            If the traces do not belong together.
        sim.traces.TraceError
            If a trace is damaged.
        OSError
            If a file cannot be opened.

        Examples
        --------
        >>> from sim.traces import bundled
        >>> maps = GapMaps.from_traces(bundled().values(), lengths=[512])
        >>> maps.layers, [(sample.length, sample.phase) for sample in maps.samples]
        ((12, 23), [(512, 'prefill'), (512, 'decode')])
        """
        loaded = [one if isinstance(one, Trace) else read_trace(one) for one in traces]
        if not loaded:
            raise GapMapError("traces must be at least one, got none")
        from sim.gap_scans import scan_traces  # which needs this class

        return scan_traces(loaded, lengths, progress)

    def _index(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {listed(self.layers)}, got {layer}")
        return self.layers.index(layer)

    def _find(self, target: Target, sample: Sample) -> tuple[NDArray[Any], NDArray[Any]]:
        """Gaps or counts, and masses, [layers, rows, …]."""
        if target.phase != sample.phase:
            raise ValueError(f"target is for {target.phase}, but the sample is of {sample.phase}")
        if not any(_definition(one) == _definition(target) for one in self.targets):
            rows, keys = target.tile
            raise ValueError(
                f"these gap maps were made for {listed([_name(one) for one in self.targets])}, "
                f"not for {_name(target)} with its tiles of {rows} × {keys}: capture again"
            )
        if (sample.name, target.name) not in self.arrays:
            raise ValueError(f"there is no sample {sample.name!r} in these maps")
        return self.arrays[sample.name, target.name]


def read_gap_maps(source: Source | Iterable[Source]) -> GapMaps:
    """Read and check gap maps.

    Parameters
    ----------
    source : path, bytes or binary file, or an iterable of these
        A gap-map file, or the folder of a finished capture, or several files of one capture.

    Returns
    -------
    GapMaps
        Arrays are read-only.

    Raises
    ------
    GapMapError
        If a file is damaged or holds no gap maps, if files do not belong together, or if a
        capture is unfinished.
    OSError
        If a file cannot be opened.
    """
    if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
        return _join([read_gap_maps(path) for path in _finished(Path(source))])
    if isinstance(source, (str, os.PathLike, bytes)) or hasattr(source, "seek"):
        try:
            with container.opened(cast(Source, source)) as file:
                return _read(file)
        except ContainerError as error:
            raise GapMapError(str(error)) from None
    if not isinstance(source, Iterable):
        raise GapMapError(
            f"source must be a path, bytes, a binary file or several, got {type(source).__name__}"
        )
    return _join([read_gap_maps(one) for one in source])


def bundled_gap_maps() -> Path:
    """Counts of a real model that come with this package; ``sim/data/README.md`` says which.

    Returns
    -------
    Path

    Examples
    --------
    >>> maps = read_gap_maps(bundled_gap_maps())
    >>> len(maps.layers), len(maps.heads), sorted({sample.length for sample in maps.samples})
    (30, 9, [1024, 2048, 4096])
    """
    return Path(__file__).parent / "data" / "smollm2-135m-gaps.safetensors"


def count_gaps(
    gap: NDArray[np.float32], mass: NDArray[np.float32], ln: NDArray[np.float32]
) -> tuple[NDArray[Any], NDArray[np.float16]]:
    """Count tiles, and sum their masses, between thresholds.

    Parameters
    ----------
    gap, mass : ndarray, shape [..., tiles], float32
    ln : ndarray, shape [n], float32
        Logarithms of thresholds, ascending.

    Returns
    -------
    count : ndarray, shape [..., n + 1], the smallest of uint8, uint16 and uint32 that holds it
        Tiles with ln[i − 1] ≤ gap < ln[i].
    mass : ndarray, same shape, float16

    Examples
    --------
    >>> gap = np.array([[-3, -2, -1, np.inf]], np.float32)
    >>> count_gaps(gap, np.full((1, 4), 0.25, np.float32), np.array([-2, 0], np.float32))[0]
    array([[1, 2, 1]], dtype=uint8)
    """
    count, place = _place(gap, ln)
    total = np.bincount(place, weights=mass.ravel(), minlength=count.size)
    dtype = np.min_scalar_type(int(count.max(initial=0)))
    return count.astype(dtype), total.astype(np.float16).reshape(count.shape)


def _place(
    gap: NDArray[np.float32], ln: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count tiles between thresholds, [..., n + 1], and say in which count each tile is, flat."""
    rows, bins = gap.reshape(-1, gap.shape[-1]), ln.size + 1
    # right: gap == ln λ is not skipped at λ, so it lies above that threshold
    place = np.searchsorted(ln, rows, side="right") + bins * np.arange(len(rows))[:, None]
    count = np.bincount(place.ravel(), minlength=bins * len(rows))
    return count.reshape(*gap.shape[:-1], bins), place.ravel()


def _spread(counts: NDArray[Any], ln: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gaps in ascending order that have these counts [rows, bins] between thresholds."""
    low = np.concatenate([ln[:1] - 1, ln]).astype(np.float64)
    high = np.concatenate([ln, [np.inf]])
    gaps = []
    for row in counts.astype(np.int64):
        bin_of = np.repeat(np.arange(row.size), row)
        place = np.arange(bin_of.size) - np.repeat(row.cumsum() - row, row)
        part = (place + 0.5) / row[bin_of]
        width = np.where(np.isfinite(high), high - low, 0)
        one = (low[bin_of] + width[bin_of] * part).astype(np.float32)
        ceiling = np.nextafter(high.astype(np.float32), np.float32(-np.inf))
        gaps.append(np.where(bin_of == ln.size, np.inf, np.minimum(one, ceiling[bin_of])))
    return np.stack(gaps).astype(np.float32)


def _finished(folder: Path) -> list[Path]:
    """Files of a capture's folder, all of which must be there."""
    record = folder / "capture.json"
    if not record.is_file():
        raise GapMapError(f"{folder.name!r} is no capture: it holds no capture.json")
    if record.stat().st_size > container.MAX_HEADER:
        raise GapMapError(f"capture.json of {folder.name!r} is longer than a capture's")
    try:
        about = container.parse_json("capture.json", record.read_text(encoding="utf-8"))
    except (ContainerError, UnicodeDecodeError) as error:
        raise GapMapError(str(error)) from None
    files = about.get("files") if isinstance(about, dict) else None
    if (
        not isinstance(files, list)
        or not files
        or not all(isinstance(name, str) and Path(name).name == name for name in files)
    ):
        raise GapMapError(f"capture.json of {folder.name!r} must list its files")
    if about.get("keep") == "qkv":
        raise GapMapError(f"{folder.name!r} holds traces, no gap maps: give its .safetensors files")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise GapMapError(
            f"the capture {folder.name!r} is unfinished, {len(missing)} of {len(files)} samples "
            "are missing: run the same command again, or give the finished files"
        )
    return [folder / name for name in files]


def _join(parts: Sequence[GapMaps]) -> GapMaps:
    """One object for the samples of several files."""
    if not parts:
        raise GapMapError("source must be at least one file, got none")
    first = parts[0]
    for what in ("layers", "heads", "kv_heads", "thresholds"):
        if len({getattr(part, what) for part in parts}) > 1:
            raise GapMapError(f"files must be of one capture, but their {what} differ")
    for key in ("model", "model_config"):
        if len({part.card.get(key) for part in parts}) > 1:
            raise GapMapError("files must be of one capture, but their models differ")
    samples = [sample for part in parts for sample in part.samples]
    if len({sample.name for sample in samples}) < len(samples):
        raise GapMapError("files must be of different samples, got one twice")
    # A capture that an older version began lacks a kernel in some of its files.
    common = {
        (target.phase, target.name): target
        for one in parts
        for target in one.targets
        if all(target in part.targets for part in parts if target.phase in _phases(part))
    }
    return replace(
        first,
        samples=tuple(samples),
        targets=tuple(common.values()),
        card={
            key: value
            for key, value in first.card.items()
            if all(part.card.get(key) == value for part in parts)
        },
        arrays={
            (sample.name, name): part.arrays[sample.name, name]
            for part in parts
            for sample in part.samples
            for phase, name in common
            if phase == sample.phase
        },
    )


def _phases(maps: GapMaps) -> set[str]:
    return {sample.phase for sample in maps.samples}


def _read(file: BinaryIO) -> GapMaps:
    header, start, available = container.read_header(file)
    metadata = header.pop("__metadata__")
    container.check_metadata(metadata)
    if set(metadata) != {"gap_maps"}:
        raise GapMapError("the file holds no gap maps: its metadata must be one field gap_maps")
    maps = _check_about(container.parse_json("gap_maps", metadata["gap_maps"]))
    expected = {}
    for sample in maps.samples:
        for target in maps.targets:
            if target.phase == sample.phase:
                shape = (len(maps.layers), len(maps.rows(target)), tiles_of_row(target, sample))
                expected[sample.name, target.name] = shape
    kinds = (_kind(maps.thresholds), "mass")
    names = {f"{s}/{t}/{kind}": (s, t) for s, t in expected for kind in kinds}
    if missing := sorted(set(names) - set(header)):
        raise GapMapError(f"tensor {missing[0]} is missing")
    if unknown := sorted(set(header) - set(names)):
        raise GapMapError(f"unknown tensor {quote(unknown[0])}")
    entries = {}
    for name, key in names.items():
        shape = expected[key]
        if maps.thresholds is not None:
            shape = (*shape[:2], len(maps.thresholds) + 1)
        dtypes: tuple[str, ...] = ("F32",)
        if maps.thresholds is not None:
            dtypes = ("F16",) if name.endswith("/mass") else ("U8", "U16", "U32")
        check = partial(_check_shape, name, shape)
        entries[name] = container.check_entry(name, header[name], dtypes, check)
    container.check_layout(entries.values(), available)
    arrays = {}
    for (s, t), shape in expected.items():
        values, mass = (
            container.read_array(file, start, entries[f"{s}/{t}/{kind}"]) for kind in kinds
        )
        _check_values(f"{s}/{t}", values, mass, shape[2])
        arrays[s, t] = values, mass
    return replace(maps, arrays=arrays)


def _check_shape(name: str, expected: tuple[int, ...], shape: list[int]) -> None:
    if shape != list(expected):
        raise GapMapError(f"the shape of {name} must be {list(expected)}, got {quote(shape)}")


def _check_values(name: str, values: NDArray[Any], mass: NDArray[Any], tiles: int) -> None:
    if values.dtype == np.float32:
        if not (values > -np.inf).all():
            raise GapMapError(f"{name} has a gap that is NaN or −inf")
    elif (values.sum(axis=2, dtype=np.int64) != tiles).any():
        raise GapMapError(f"the counts of {name} must add up to {tiles} tiles a row")
    if not ((mass >= 0) & (mass <= 1.01)).all():
        raise GapMapError(f"{name} has a mass outside 0 to 1")


def _check_about(about: Any) -> GapMaps:
    """Turn the metadata into maps without arrays; everything in it is checked."""
    if not isinstance(about, dict) or set(about) != set(_FIELDS):
        got = sorted(about) if isinstance(about, dict) else about
        raise GapMapError(f"gap_maps must hold exactly {listed(_FIELDS)}, got {quote(got)}")
    if about["format"] != FORMAT:
        raise GapMapError(f"format must be {FORMAT}, got {quote(about['format'])}")
    layers = tuple(_items("layers", about["layers"], int, 1000))
    if list(layers) != sorted(set(layers)) or not all(0 <= layer < 10_000 for layer in layers):
        raise GapMapError(f"layers must be ascending numbers, got {quote(about['layers'])}")
    heads, kv_heads = (
        tuple(_items(key, about[key], str, MAX_HEADS)) for key in ("heads", "kv_heads")
    )
    if len(heads) % len(kv_heads):
        raise GapMapError(
            f"heads must be a multiple of kv_heads, got {len(heads)} and {len(kv_heads)}"
        )
    thresholds = about["thresholds"]
    if thresholds is not None:
        thresholds = tuple(_items("thresholds", thresholds, float, 10_000))
        _check_thresholds(thresholds)
    card = about["card"]
    if not isinstance(card, dict):
        raise GapMapError(f"card must be a JSON object, got {quote(card)}")
    container.check_metadata(card)
    samples = tuple(_sample(one) for one in _items("samples", about["samples"], dict, 10_000))
    if len({sample.name for sample in samples}) < len(samples):
        raise GapMapError("samples must have different names")
    targets = tuple(_target(one) for one in _items("targets", about["targets"], dict, 100))
    if len(set(targets)) < len(targets):
        raise GapMapError("targets must differ")
    return GapMaps(samples, layers, heads, kv_heads, targets, thresholds, card, {})


def _items(name: str, value: Any, kind: type, limit: int) -> list[Any]:
    """Check that a value is a list of so many of one type."""
    if not isinstance(value, list) or not 1 <= len(value) <= limit:
        raise GapMapError(f"{name} must be a list of 1 to {limit}, got {quote(value)}")
    for item in value:
        if type(item) is not kind:
            raise GapMapError(f"{name} must be a list of {kind.__name__}, got {quote(item)} in it")
        if isinstance(item, str):
            container.check_text(name, item)
    return value


def _check_thresholds(thresholds: tuple[float, ...]) -> None:
    ascending = all(a < b for a, b in pairwise(thresholds))
    if not thresholds or not ascending or not (thresholds[0] > 0 and thresholds[-1] <= 1):
        raise GapMapError(
            f"thresholds must be ascending, above 0 and at most 1, got {quote(list(thresholds))}"
        )
    if (np.diff(ln_threshold(thresholds)) <= 0).any():
        raise GapMapError("thresholds must differ in float32")


def _sample(one: dict[str, Any]) -> Sample:
    kinds: dict[str, type] = {
        "name": str,
        "text": str,
        "license": str,
        "length": int,
        "phase": str,
        "steps": list,
    }
    if set(one) != set(kinds) or any(type(one[key]) is not kind for key, kind in kinds.items()):
        raise GapMapError(f"a sample must have {listed(kinds)}, got {quote(one)}")
    for key in ("name", "text", "license"):
        container.check_text(f"{key} of a sample", one[key])
    if not _SAMPLE_NAME.fullmatch(one["name"]):
        raise GapMapError(
            "the name of a sample must be lower-case letters, digits, dots and hyphens, "
            f"got {quote(one['name'])}"
        )
    if one["phase"] not in PHASES:
        raise GapMapError(f"phase must be one of {listed(PHASES)}, got {quote(one['phase'])}")
    if not 1 <= one["length"] <= MAX_LENGTH:
        raise GapMapError(f"length must be between 1 and {MAX_LENGTH}, got {quote(one['length'])}")
    steps = one["steps"]
    if one["phase"] == "decode":
        _items("steps", steps, int, MAX_LENGTH)
        if not all(1 <= step <= MAX_LENGTH for step in steps):
            raise GapMapError(f"steps must be between 1 and {MAX_LENGTH}, got {quote(steps)}")
    elif steps:
        raise GapMapError(f"steps must be empty in prefill, got {quote(steps)}")
    return Sample(**{**one, "steps": tuple(steps)})


def _target(one: dict[str, Any]) -> Target:
    for target in TARGETS.values():
        if _definition(target) == one:
            return target
    raise GapMapError(f"the file was made for a kernel that this version lacks: {quote(one)}")


def _definition(target: Target) -> dict[str, Any]:
    """What makes a target another one, as JSON has it."""
    fields = {**asdict(target), "tile": list(target.tile)}
    del fields["description"]
    return fields


def tiles_of_row(target: Target, sample: Sample) -> int:
    """Count the visited tiles of one row: a head, or a vote over all steps."""
    keys = target.tile[1]
    if sample.phase == "decode":
        return sum(-(-step // keys) for step in sample.steps)
    return int(Grid(target.tile, sample.length, sample.length, causal=True).visited().sum())


def _kind(thresholds: tuple[float, ...] | None) -> str:
    return "gap" if thresholds is None else "count"


def _name(target: Target) -> str:
    return f"{target.name} ({target.phase})"


def listed(items: Iterable[object]) -> str:
    """Join items by commas, for a message."""
    return ", ".join(map(str, items))
