"""The formula of a calibration: ``threshold_scale_factor = a · exp(b · sparsity)``.

Fitted in ``log`` space (the default: least squares on the factor's logarithm, all points weigh
alike) or in the ``linear`` space that Model Optimizer uses by default (least squares on the factor
itself, which the largest factors dominate), with 0 ≤ b ≤ 20 as there.
Source: ``calibrator.py`` of NVIDIA/Model-Optimizer at a2fbac7, August 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPACES = ("log", "linear")
MAX_B = 20.0
MIN_POINTS = 3
DRAWS = 400

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """``threshold_scale_factor = a · exp(b · sparsity)`` through measured points.

    Made by :func:`fit`.

    Parameters
    ----------
    a, b : float
    r_squared : float
        Share of the variance explained, in the space of the fit.
    range : (float, float)
        Lowest and highest sparsity among the points: where the formula may be used.
    space : {"log", "linear"}
    points : int
    draws : tuple of (float, float)
        a and b of bootstrap draws over texts; empty if there was only one text.
    """

    a: float
    b: float
    r_squared: float
    range: tuple[float, float]
    space: str
    points: int
    draws: tuple[tuple[float, float], ...] = ()

    def scale_factor(self, target_sparsity: float, *, extrapolate: bool = False) -> float:
        """Give the scale factor that skips this share of visited tiles.

        Parameters
        ----------
        target_sparsity : float
            In [0, 1]; 0 is dense attention, factor 0.
        extrapolate : bool
            Use the formula outside the range that it was fitted on too.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If the target lies outside the fitted range and ``extrapolate`` is not given.
        """
        if not 0 <= target_sparsity <= 1:
            raise ValueError(f"target_sparsity must lie in [0, 1], got {target_sparsity!r}")
        if target_sparsity == 0:
            return 0.0
        self._check_range(target_sparsity, "target_sparsity", extrapolate)
        return self.a * math.exp(self.b * target_sparsity)

    def sparsity(self, scale_factor: float, *, extrapolate: bool = False) -> float:
        """Give the sparsity that the formula expects of a scale factor.

        Parameters
        ----------
        scale_factor : float
            At least 0.
        extrapolate : bool

        Returns
        -------
        float
            In [0, 1].

        Raises
        ------
        ValueError
            If it lies outside the fitted range and ``extrapolate`` is not given.
        """
        if not (math.isfinite(scale_factor) and scale_factor >= 0):
            raise ValueError(f"scale_factor must be finite and at least 0, got {scale_factor!r}")
        if scale_factor == 0:
            return 0.0
        expected = math.log(scale_factor / self.a) / self.b
        self._check_range(
            expected, f"the sparsity that scale factor {scale_factor:g} stands for", extrapolate
        )
        return min(max(expected, 0.0), 1.0)

    def interval(self, target_sparsity: float) -> tuple[float, float] | None:
        """95 % bootstrap interval of the factor for this sparsity; None without draws."""
        if not self.draws:
            return None
        a, b = np.array(self.draws).T
        low, high = np.percentile(a * np.exp(b * target_sparsity), [2.5, 97.5])
        return float(low), float(high)

    def coefficient_intervals(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """95 % bootstrap intervals of a and of b, which vary together; None without draws."""
        if not self.draws:
            return None
        (a_low, b_low), (a_high, b_high) = np.percentile(self.draws, [2.5, 97.5], axis=0)
        return (float(a_low), float(a_high)), (float(b_low), float(b_high))

    def _check_range(self, sparsity: float, what: str, extrapolate: bool) -> None:
        low, high = self.range
        # A target read off the range that is printed with four digits is inside it.
        if not extrapolate and not low - 5e-5 <= sparsity <= high + 5e-5:
            raise ValueError(
                f"{what} must lie between {low:.4g} and {high:.4g}, where the formula was fitted, "
                f"got {sparsity:.4g}; from Python, extrapolate=True goes on"
            )


def fit(
    sparsity: ArrayLike,
    scale_factor: ArrayLike,
    *,
    space: str = "log",
    sample: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Fit:
    """Fit ``scale_factor = a · exp(b · sparsity)``, with 0 ≤ b ≤ 20.

    Parameters
    ----------
    sparsity : array, shape [n]
        Skipped ÷ visited tiles, in [0, 1].
    scale_factor : array, shape [n]
        λ times the KV length; finite and above 0.
    space : {"log", "linear"}
        Least squares on ln factor, or on the factor as Model Optimizer does by default.
    sample : sequence of n labels, optional
        The text each point comes from.  Whole texts are drawn for the bootstrap, since points
        of one text vary together; with few texts its intervals are too narrow.
    draws : int
        Bootstrap draws.
    seed : int

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        If there are fewer than 3 points, if all have one sparsity, if values are out of range, or
        if the sparsity does not grow with the factor.

    Examples
    --------
    NVIDIA's published factors of Qwen3-30B-A3B (TensorRT-LLM, tech blog 16) are this formula:

    >>> target = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    >>> prefill = [18.76, 44.37, 104.97, 248.40, 587.18, 1390.63, 3293.04, 7799.91, 18471.56]
    >>> one = fit(target, prefill)
    >>> round(one.a, 2), round(one.b, 3), round(one.r_squared, 5)
    (7.92, 8.615, 1.0)
    >>> round(one.scale_factor(0.5))
    588
    >>> one.scale_factor(0.95)
    Traceback (most recent call last):
    ValueError: target_sparsity must lie between 0.1 and 0.9, where the formula was fitted, \
got 0.95; from Python, extrapolate=True goes on
    """
    s, f = _check_points(sparsity, scale_factor)
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    if sample is not None and len(sample) != s.size:
        raise ValueError(f"sample must name each of {s.size} points, got {len(sample)} labels")
    solve = _fit_log if space == "log" else _fit_linear
    a, b = solve(s, f, np.ones_like(s))
    if b <= 1e-9:
        raise ValueError(
            f"sparsity must grow with scale_factor, but over these {s.size} points it does not"
        )
    seen = np.log(f) if space == "log" else f
    told = math.log(a) + b * s if space == "log" else a * np.exp(b * s)
    spread = float(((seen - seen.mean()) ** 2).sum())
    r_squared = 1 - float(((seen - told) ** 2).sum()) / spread
    drawn = _bootstrap(s, f, solve, sample, draws, seed) if sample is not None else ()
    return Fit(a, b, r_squared, (float(s.min()), float(s.max())), space, s.size, drawn)


def _check_points(sparsity: ArrayLike, scale_factor: ArrayLike) -> tuple[Array, Array]:
    s, f = np.asarray(sparsity, np.float64), np.asarray(scale_factor, np.float64)
    if s.ndim != 1 or s.shape != f.shape:
        raise ValueError(
            "sparsity and scale_factor must be two lists of one length, "
            f"got shapes {s.shape} and {f.shape}"
        )
    if not ((s >= 0) & (s <= 1)).all():
        raise ValueError("sparsity must lie in [0, 1] everywhere")
    if not (np.isfinite(f) & (f > 0)).all():
        raise ValueError("scale_factor must be finite and above 0 everywhere")
    if s.size < MIN_POINTS or np.ptp(s) < 1e-9:
        raise ValueError(
            f"a fit needs at least {MIN_POINTS} points of more than one sparsity, got {s.size}"
        )
    return s, f


def _fit_log(s: Array, f: Array, weight: Array) -> tuple[float, float]:
    """Weighted regression of ln f on s."""
    total, y = weight.sum(), np.log(f)
    s_mean, y_mean = (weight * s).sum() / total, (weight * y).sum() / total
    slope = (weight * (s - s_mean) * (y - y_mean)).sum() / (weight * (s - s_mean) ** 2).sum()
    b = min(max(float(slope), 0.0), MAX_B)
    return math.exp(float(y_mean) - b * float(s_mean)), b


def _fit_linear(s: Array, f: Array, weight: Array) -> tuple[float, float]:
    """Weighted least squares on f itself.

    For any b the best a is known, Σfe / Σe² with e = exp(b·s), so the search is over b alone and
    cannot end in a local minimum: a coarse grid over all of [0, 20], then finer ones around its
    best.
    """
    origin = float(s.max())  # e ≤ 1 whatever b is

    def best_a(b: Array) -> tuple[Array, Array]:
        e = np.exp(b[:, None] * (s - origin))  # [trials, points]
        fe, ee = e @ (weight * f), (e * e) @ weight
        return fe / ee, fe * fe / ee  # a, and the part of Σf² that it explains

    low, high, count = 0.0, MAX_B, 401
    while high - low > 1e-9:
        trials = np.linspace(low, high, count)
        best = int(best_a(trials)[1].argmax())
        low, high = float(trials[max(best - 1, 0)]), float(trials[min(best + 1, count - 1)])
        count = 21
    b = (low + high) / 2
    return float(best_a(np.array([b]))[0][0]) * math.exp(-b * origin), b


def _bootstrap(
    s: Array,
    f: Array,
    solve: Callable[[Array, Array, Array], tuple[float, float]],
    sample: Sequence[Hashable],
    draws: int,
    seed: int,
) -> tuple[tuple[float, float], ...]:
    names = {name: index for index, name in enumerate(dict.fromkeys(sample))}
    of_point = np.array([names[name] for name in sample])
    if len(names) < 2:
        return ()
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        weight = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[
            of_point
        ].astype(np.float64)
        if np.ptp(s[weight > 0]) > 1e-9:  # else the drawn texts say nothing about b
            found.append(solve(s, f, weight))
    return tuple((float(f"{a:.6g}"), float(f"{b:.6g}")) for a, b in found)
