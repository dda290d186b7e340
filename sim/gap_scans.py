"""From Q and K to gap maps: one layer for several kernels at once, or a set of traces.

A layer's Q·Kᵀ is formed once for all prefill kernels: they differ in order and vote rows, and
row maxima replay in any order, on any rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sim.container import quote
from sim.gap_maps import GapMapError, GapMaps, Sample, listed
from sim.skip_softmax import Scan, scan
from sim.targets import PHASES, Target, targets_of
from sim.traces import Trace

DECODE_STEPS = 16
"""Last rows of a trace that stand for decode steps: each sees what a decoded token would."""

MIN_LENGTH = 512
"""Shortest text that traces are cropped to."""

Packed = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Gaps and masses of one layer, both [rows, tiles]."""


def prefill_gaps(
    q: NDArray,
    k: NDArray,
    targets: Sequence[Target],
    *,
    softmax_scale: float,
    lengths: Sequence[int],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[tuple[int, str], Packed]:
    """Give gaps and masses of one layer for several prefill kernels, from one pass over Q·Kᵀ.

    Parameters
    ----------
    q : ndarray, shape [Hq, L, D]
    k : ndarray, shape [Hkv, L, D]
    targets : sequence of Target
        Of the prefill phase.
    softmax_scale : float
    lengths : sequence of int
        First so many tokens.
    progress : callable
        Is given the share done, in (0, 1].

    Returns
    -------
    dict
        (length, target name) → gaps and masses [Hq, tiles], float32.

    Raises
    ------
    ValueError
        If shapes do not fit or values are not finite.
    """
    keys = math.gcd(*(target.tile[1] for target in targets))
    share = q.shape[0] // k.shape[0]
    heads: dict[tuple[int, str], list[Packed]] = {}
    for h in range(q.shape[0]):  # one at a time: row maxima of all would be the largest array
        whole = scan(
            q[h : h + 1],
            k[h // share : h // share + 1],
            tile=(64, keys),
            softmax_scale=softmax_scale,
            mass=True,
        )
        for length in lengths:
            one = whole if length == q.shape[1] else whole.crop(length)
            for target in targets:
                packed = _pack(one.replay(order=target.order, tile=target.tile))
                heads.setdefault((length, target.name), []).append(packed)
        progress((h + 1) / q.shape[0])
    return {name: stacked(packed) for name, packed in heads.items()}


def decode_gaps(
    q: NDArray,
    k: NDArray,
    steps: Sequence[int],
    targets: Sequence[Target],
    *,
    softmax_scale: float,
) -> dict[str, Packed]:
    """Give gaps and masses of one layer for several decode kernels.

    Parameters
    ----------
    q : ndarray, shape [Hq, steps, D]
    k : ndarray, shape [Hkv, L, D]
        As it is after the last step.
    steps : sequence of int
        Keys that each step sees, its own included.
    targets : sequence of Target
        Of the decode phase.
    softmax_scale : float

    Returns
    -------
    dict
        Target name → gaps and masses [votes, tiles of all steps], float32.

    Raises
    ------
    ValueError
        If shapes do not fit or values are not finite.
    """
    packed = {}
    for target in targets:
        one = target.scan(
            q.swapaxes(0, 1), k, softmax_scale=softmax_scale, mass=True, lengths=np.array(steps)
        )
        assert not isinstance(one, Scan)
        assert one.mass is not None
        visited, votes = one.grid.visited_tiles(), one.gap.shape[1]  # [steps, key_tiles]
        by_vote = one.mass.reshape(len(steps), votes, -1, visited.shape[1]).mean(axis=2)
        packed[target.name] = (
            one.gap.swapaxes(0, 1)[:, visited],
            (by_vote / np.float32(len(steps))).swapaxes(0, 1)[:, visited],
        )
    return packed


def stacked(parts: Sequence[Packed]) -> Packed:
    """Stack gaps and masses along a new first axis."""
    return np.stack([gap for gap, _ in parts]), np.stack([mass for _, mass in parts])


def _pack(one: Scan) -> Packed:
    """Gaps and masses of the visited tiles of a scan of one head, [tiles]."""
    assert one.mass is not None
    visited = one.grid.visited_tiles()
    starts = np.arange(0, one.grid.lq, one.grid.rows)
    share = np.add.reduceat(one.mass[0], starts, axis=0) / one.grid.lq
    return one.gap[0][visited], share[visited].astype(np.float32)


def scan_traces(
    traces: list[Trace], lengths: Sequence[int] | None, progress: Callable[[float], None]
) -> GapMaps:
    """Scan traces for every kernel: the body of :meth:`sim.gap_maps.GapMaps.from_traces`."""
    decoded = any(trace.q.shape[1] < trace.k.shape[1] for trace in traces)
    names = {_names(trace) for trace in traces}
    if len(names) > 1:
        raise GapMapError(
            f"traces must be of the same heads, got {listed(sorted(map(str, names)))}"
        )
    models = {trace.card.get("model", "not stated") for trace in traces}
    if len(models) > 1:
        raise GapMapError(f"traces must be of one model, got {listed(sorted(map(ascii, models)))}")
    found: dict[Sample, dict[int, dict[str, Packed]]] = {}
    texts: dict[str, int] = {}
    for n, trace in enumerate(traces):
        layer = _layer(trace)
        text = trace.card.get("text", "not stated")
        number = texts.setdefault(text, len(texts))
        for sample, packed in _scan_trace(
            trace,
            f"text{number}",
            text,
            lengths,
            not decoded,
            lambda share, n=n: progress((n + share) / len(traces)),  # type: ignore[misc]
        ):
            by_layer = found.setdefault(sample, {})
            if layer in by_layer:
                raise GapMapError(f"there are two traces of layer {layer} over {quote(text)}")
            by_layer[layer] = packed
    layers = tuple(sorted({_layer(trace) for trace in traces}))
    for sample, by_layer in found.items():
        if missing := [layer for layer in layers if layer not in by_layer]:
            raise GapMapError(
                f"traces must have the same layers for every text and length, but "
                f"{listed(missing)} is missing for {sample.length} tokens of {quote(sample.text)}"
            )
    heads, kv_heads = names.pop()
    phases = {sample.phase for sample in found}
    first = traces[0].card
    return GapMaps(
        tuple(found),
        layers,
        heads,
        kv_heads,
        targets_of(*phases),
        None,
        {
            **{key: first[key] for key in ("model", "license", "date", "versions") if key in first},
            **head_dim_field(trace.q.shape[2] for trace in traces),
        },
        {
            (sample.name, name): stacked([by_layer[layer][name] for layer in layers])
            for sample, by_layer in found.items()
            for name in by_layer[layers[0]]
        },
    )


def head_dim_field(head_dims: Iterable[int]) -> dict[str, str]:
    """Field of the card that states the head_dim of Q and K; empty if layers differ."""
    different = set(head_dims)
    return {"head_dim": str(different.pop())} if len(different) == 1 else {}


def _scan_trace(
    trace: Trace,
    name: str,
    text: str,
    lengths: Sequence[int] | None,
    decode: bool,
    progress: Callable[[float], None],
) -> list[tuple[Sample, dict[str, Packed]]]:
    """Samples of one trace: prefill at each length, and decode steps."""
    if not trace.causal:
        raise GapMapError("traces must be causal, got one that is not")
    prefill, steps = map(targets_of, PHASES)
    rows, keys = trace.q.shape[1], trace.k.shape[1]
    of_text = (text, trace.card.get("text_license", "not stated"))
    done: list[tuple[Sample, dict[str, Packed]]] = []
    if rows < keys:
        seen = tuple(range(keys - rows + 1, keys + 1))
        sample = Sample(f"{name}-{keys - rows}-decode", *of_text, keys - rows, "decode", seen)
        scale = trace.softmax_scale
        done.append((sample, decode_gaps(trace.q, trace.k, seen, steps, softmax_scale=scale)))
        progress(1)
        return done
    wanted = _halves(keys) if lengths is None else list(lengths)
    if not wanted or not all(2 <= length <= keys for length in wanted):
        raise GapMapError(f"lengths must be between 2 and a trace's {keys} tokens, got {wanted}")
    scanned = prefill_gaps(
        trace.q,
        trace.k,
        prefill,
        softmax_scale=trace.softmax_scale,
        lengths=wanted,
        progress=progress,
    )
    for length in wanted:
        sample = Sample(f"{name}-{length}-prefill", *of_text, length, "prefill")
        done.append((sample, {target.name: scanned[length, target.name] for target in prefill}))
        if decode:
            first = max(length - DECODE_STEPS, 0)
            seen = tuple(range(first + 1, length + 1))
            sample = Sample(f"{name}-{length}-decode", *of_text, length, "decode", seen)
            packed = decode_gaps(
                trace.q[:, first:length],
                trace.k[:, :length],
                seen,
                steps,
                softmax_scale=trace.softmax_scale,
            )
            done.append((sample, packed))
    return done


def _halves(length: int) -> list[int]:
    lengths = [length]
    while lengths[-1] // 2 >= MIN_LENGTH:
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def _layer(trace: Trace) -> int:
    text = trace.card.get("layer", "")
    if not re.fullmatch(r"\d{1,4}", text, re.ASCII):
        raise GapMapError(f"traces must say their layer, a number, in the card, got {quote(text)}")
    return int(text)


def _names(trace: Trace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a trace's query heads and KV heads."""
    names = []
    for key, count in (("heads", len(trace.q)), ("kv_heads", len(trace.k))):
        try:
            value = json.loads(trace.card[key])
            assert isinstance(value, list)
            assert len(value) == count
        except (KeyError, ValueError, RecursionError, AssertionError):
            value = range(count)  # as in Trace.head_names
        names.append(tuple(str(name) for name in value))
    return names[0], names[1]
