"""From results of single jobs to rows with intervals, and to three answers.

Intervals are 95 % bootstrap intervals over texts: texts are drawn with replacement, and what is
compared is drawn together.  How much can be skipped before the perplexity moves; does another
visit order skip more at equal quality; how does the threshold that does so depend on the length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.sweep import Job

DRAWS = 1000
CHANGES = (0.001, 0.01)
"""Relative changes of perplexity that count as having moved."""

SPARSITIES = (0.2, 0.3, 0.4)
"""Sparsities at which thresholds of different lengths are compared."""

SPARSITY = "skipped ÷ visited tiles; first tiles count as visited"

Interval = list[float]
"""Value, lower and upper end."""

Result = Mapping[str, Any]


class Curve(NamedTuple):
    """Thresholds of one kernel at one length, ascending, and what they did to each text.

    ``ln_threshold`` [n]; ``sparsity`` and ``change`` [texts, n], the latter of the next-token
    loss in nats.
    """

    ln_threshold: NDArray[np.float64]
    sparsity: NDArray[np.float64]
    change: NDArray[np.float64]


def report_of(results: Sequence[tuple[Job, Result]], card: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the results of all jobs together.

    Parameters
    ----------
    results : sequence of (job, result)
        From :class:`sim.evaluation.Evaluator`, in any order.
    card : mapping
        Model, texts, versions, date, command.

    Returns
    -------
    dict
        The card; ``rows``, one per kernel, length and setting; ``needle`` likewise;
        ``answers``; and ``sparsity_definition``.  An interval is [value, lower, upper].
    """
    results = sorted(results, key=_order)
    rows = [_row(job, of) for job, of in _grouped(results, "text")]
    needles = [_needle_row(job, of) for job, of in _grouped(results, "needle")]
    needles = [row for row in needles if row["texts"]]  # of a sweep that is not finished
    return {
        **card,
        "sparsity_definition": SPARSITY,
        "interval": f"95 %, bootstrap over texts, {DRAWS} draws",
        "rows": rows,
        "needle": needles,
        "answers": answers(results),
    }


def bundled_evaluation() -> dict[str, Any]:
    """Read the recorded evaluation of SmolLM2-135M that comes with this package.

    Returns
    -------
    dict
        As :func:`report_of` gives it.

    Examples
    --------
    >>> sorted({row["length"] for row in bundled_evaluation()["rows"]})
    [1024, 2048, 4096]
    """
    path = Path(__file__).with_name("data") / "smollm2-135m-evaluation.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def interval(
    statistic: Callable[[NDArray[np.int64]], float | None], count: int, draws: int = DRAWS
) -> Interval | None:
    """Give a statistic of all texts, and its 95 % bootstrap interval.

    Parameters
    ----------
    statistic : callable
        Is given the numbers of the texts drawn, [count]; None where it has no value.
    count : int
        How many texts there are.
    draws : int

    Returns
    -------
    [value, lower, upper] or None
        None if the statistic has no value.

    Examples
    --------
    >>> values = np.array([1.0, 2.0, 3.0])
    >>> interval(lambda drawn: values[drawn].mean(), 3)
    [2.0, 1.0, 3.0]
    """
    value = statistic(np.arange(count))
    if value is None:
        return None
    rng = np.random.default_rng(0)
    drawn = (statistic(rng.integers(0, count, count)) for _ in range(draws))
    ends = np.percentile([x for x in drawn if x is not None], [2.5, 97.5])
    return [_short(x) for x in (value, *ends)]


def mean_interval(values: NDArray[np.float64]) -> Interval:
    """Give the mean over texts, and its 95 % bootstrap interval.

    Parameters
    ----------
    values : ndarray, shape [texts]

    Returns
    -------
    [value, lower, upper]

    Examples
    --------
    >>> mean_interval(np.array([1.0, 2.0, 3.0]))
    [2.0, 1.0, 3.0]
    """
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    ends = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return [_short(x) for x in (values.mean(), *ends)]


def sparsity_at(sparsity: NDArray, change: NDArray, most: float) -> tuple[float, bool]:
    """Give the sparsity at which a change is first reached, between the settings measured.

    Parameters
    ----------
    sparsity, change : ndarray, shape [n]
        By ascending threshold; nothing skipped changes nothing.
    most : float
        Change to reach, above 0.

    Returns
    -------
    sparsity : float
        The largest measured if it is never reached.
    reached : bool

    Examples
    --------
    >>> sparsity_at(np.array([0.2, 0.4]), np.array([0.0, 0.01]), 0.005)
    (0.30000000000000004, True)
    """
    s, d = (np.concatenate([[0.0], x]) for x in (sparsity, change))
    d = np.maximum.accumulate(d)  # a change that shrinks again is noise
    if d[-1] < most:
        return float(s[-1]), False
    i = int(np.searchsorted(d, most))
    return float(s[i - 1] + (s[i] - s[i - 1]) * (most - d[i - 1]) / (d[i] - d[i - 1])), True


def answers(results: Sequence[tuple[Job, Result]]) -> dict[str, Any]:
    """Answer the three questions from the prefill results.

    Returns
    -------
    dict
        ``skippable``: sparsity before the perplexity has moved, per kernel, length and change;
        ``gains``: what ours skips more than each other kernel at that change;
        ``thresholds``: the threshold at equal sparsity, and at equal change, per length, and
        the exponent of the length that fits them (−1 if λ ∝ 1 / length).
    """
    curves = _curves(sorted(results, key=_order))
    return {
        "skippable": [_skippable(*item) for item in curves.items()],
        "gains": [
            _gain(kernel, length, curves["ours", length], curve)
            for (kernel, length), curve in curves.items()
            if kernel != "ours" and ("ours", length) in curves
        ],
        "thresholds": [
            _thresholds(kernel, {n: curve for (name, n), curve in curves.items() if name == kernel})
            for kernel in dict.fromkeys(name for name, _ in curves)
        ],
    }


def _curves(results: Iterable[tuple[Job, Result]]) -> dict[tuple[str, int], Curve]:
    """Curves of each kernel and length, over the texts that all its thresholds have.

    A threshold with fewer texts than another is left out.  At one length all kernels' curves are
    over the same texts, so that they can be drawn together.
    """
    values: dict[tuple[str, int], dict[float, dict[int, tuple[float, float]]]] = {}
    for job, result in results:
        if job["kind"] == "text" and result["prefill"]["threshold"] > 0:
            one = result["prefill"]
            of_threshold = values.setdefault((job["kernel"], job["length"]), {})
            of_threshold.setdefault(one["threshold"], {})[job["text"]] = (
                float(np.mean(one["sparsity"])),
                one["loss"] - one["loss_dense"],
            )
    shared: dict[int, set[int]] = {}
    for (_, length), of_threshold in values.items():
        most = max(map(len, of_threshold.values()))
        for threshold in [one for one, of in of_threshold.items() if len(of) < most]:
            del of_threshold[threshold]
        texts = set.intersection(*map(set, of_threshold.values()))
        shared[length] = shared.get(length, texts) & texts
    curves = {}
    for key, of_threshold in values.items():
        kept = sorted(of_threshold)
        if len(kept) > 1 and shared[key[1]]:
            array = np.array(
                [[of_threshold[one][text] for one in kept] for text in sorted(shared[key[1]])]
            )
            curves[key] = Curve(np.log(kept), array[..., 0], array[..., 1])
    return curves


def _skippable(key: tuple[str, int], curve: Curve) -> dict[str, Any]:
    def entry(change: float) -> dict[str, Any]:
        return {
            "perplexity_change": change,
            "sparsity": interval(lambda drawn: _at(curve, drawn, change)[0], _texts(curve)),
            "reached": _at(curve, np.arange(_texts(curve)), change)[1],
        }

    return {"kernel": key[0], "length": key[1], "changes": [entry(change) for change in CHANGES]}


def _gain(kernel: str, length: int, ours: Curve, theirs: Curve) -> dict[str, Any]:
    def entry(change: float) -> dict[str, Any]:
        def more(drawn: NDArray[np.int64]) -> float:
            return _at(ours, drawn, change)[0] - _at(theirs, drawn, change)[0]

        return {"perplexity_change": change, "more_sparsity": interval(more, _texts(ours))}

    return {"kernel": kernel, "length": length, "changes": [entry(change) for change in CHANGES]}


def _thresholds(kernel: str, curves: Mapping[int, Curve]) -> dict[str, Any]:
    count = min(_texts(curve) for curve in curves.values())

    def entry(name: str, wanted: float) -> dict[str, Any]:
        def found(drawn: NDArray[np.int64]) -> list[float | None]:
            return [_ln_threshold_at(curve, drawn, name, wanted) for curve in curves.values()]

        def exponent(drawn: NDArray[np.int64]) -> float | None:
            ln = found(drawn)
            if len(ln) < 2 or None in ln:
                return None
            return float(np.polyfit(np.log(list(curves)), np.array(ln, float), 1)[0])

        thresholds = zip(curves, found(np.arange(count)), strict=True)
        return {
            name: wanted,
            "thresholds": {
                str(length): None if ln is None else _short(np.exp(ln), 4)
                for length, ln in thresholds
            },
            "exponent": interval(exponent, count),
        }

    at = [entry("sparsity", sparsity) for sparsity in SPARSITIES]
    at += [entry("perplexity_change", change) for change in CHANGES]
    return {"kernel": kernel, "at": at}


def _texts(curve: Curve) -> int:
    return len(curve.sparsity)


def _at(curve: Curve, drawn: NDArray[np.int64], change: float) -> tuple[float, bool]:
    return sparsity_at(
        curve.sparsity[drawn].mean(0), curve.change[drawn].mean(0), float(np.log1p(change))
    )


def _ln_threshold_at(
    curve: Curve, drawn: NDArray[np.int64], name: str, wanted: float
) -> float | None:
    """Where a curve reaches ``wanted``; None outside what was measured."""
    if name == "sparsity":
        values = curve.sparsity[drawn].mean(0)
    else:
        values = np.expm1(np.maximum.accumulate(curve.change[drawn].mean(0)))
    if not values[0] <= wanted <= values[-1]:
        return None
    return float(np.interp(wanted, values, curve.ln_threshold))


def _grouped(
    results: Iterable[tuple[Job, Result]], kind: str
) -> list[tuple[Job, list[tuple[Job, Result]]]]:
    """Results of all texts (and depths) of each kernel, length and setting."""
    groups: dict[str, list[tuple[Job, Result]]] = {}
    for job, result in results:
        if job["kind"] == kind:
            key = {k: v for k, v in job.items() if k not in ("text", "depth")}
            groups.setdefault(repr(key), []).append((job, result))
    return [(of[0][0], of) for of in groups.values()]


def _order(one: tuple[Job, Result]) -> tuple[Any, ...]:
    """Ours first; then by length, by setting, by text."""
    job = one[0]
    given = job["threshold"] or job["threshold_scale_factor"]
    setting = job["threshold"] is None, given["prefill"], given["decode"]
    return (
        job["kernel"] != "ours",
        job["kernel"],
        job["length"],
        *setting,
        job["depth"] or 0,
        job["text"],
    )


def _setting(job: Job) -> dict[str, Any]:
    return {k: job[k] for k in ("kernel", "length", "threshold", "threshold_scale_factor")}


def _row(job: Job, of: list[tuple[Job, Result]]) -> dict[str, Any]:
    row: dict[str, Any] = {**_setting(job), "texts": len(of)}
    for phase in ("prefill", "decode"):
        found = [result[phase] for _, result in of if phase in result]
        if found:
            row[phase] = _phase_row(found)
    return row


def _phase_row(of: list[Result]) -> dict[str, Any]:
    def column(name: str) -> NDArray[np.float64]:
        return np.array([one[name] for one in of], float)

    loss, dense, kl = column("loss"), column("loss_dense"), column("kl_mean")
    layers, errors = column("sparsity"), column("output_error")  # [texts, layers]
    return {
        "applied_threshold": of[0]["threshold"],
        "sparsity": mean_interval(layers.mean(1)),
        "perplexity_dense": _short(np.exp(dense.mean())),
        "perplexity": _short(np.exp(loss.mean())),
        "perplexity_change": [_short(np.expm1(x)) for x in mean_interval(loss - dense)],
        "kl_mean": mean_interval(kl),
        "kl_worst": _short(column("kl_worst").max()),
        "same_token": _short(column("same_token").mean()),
        "output_error": _short(errors.mean()),
        "sparsity_of_layers": [_short(x, 3) for x in layers.mean(0)],
        "output_error_of_layers": [_short(x, 3) for x in errors.mean(0)],
    }


def _needle_row(job: Job, of: list[tuple[Job, Result]]) -> dict[str, Any]:
    at = {(one["text"], one["depth"]): result for one, result in of}
    depths = sorted({depth for _, depth in at})
    texts = sorted({text for text, _ in at if all((text, depth) in at for depth in depths)})

    def values(name: str, of_depths: Sequence[float] = depths) -> NDArray[np.float64]:
        return np.array([np.mean([at[text, depth][name] for depth in of_depths]) for text in texts])

    if not texts:
        return {**_setting(job), "texts": 0}
    names = ("probability_dense", "probability", "found_dense", "found")
    return {
        **_setting(job),
        "texts": len(texts),
        "sparsity": _short(values("sparsity").mean()),
        **{name: mean_interval(values(name)) for name in names},
        "depths": [
            {"depth": depth} | {name: _short(values(name, [depth]).mean()) for name in names}
            for depth in depths
        ],
    }


def _short(value: Any, digits: int = 5) -> float:
    return float(f"{float(value):.{digits}g}")
