"""Calibration: from gap maps of texts to the scale factor that skips a wanted share of tiles.

A gap map holds the gap of every tile, so one capture gives the sparsity of *every* threshold.
Each text of length L and each trial threshold λ is one point (λ·L, sparsity); through the points
of one phase :mod:`sim.exponential_fit` puts its formula.  The trials and the kept range of 10 to
90 % are Model Optimizer's (``calibrator.py``, NVIDIA/Model-Optimizer at a2fbac7, August 2026).

What a factor buys depends on the decision grid, the visit order and the vote of the kernel, so a
calibration is made for one kernel (:mod:`sim.targets`) and says which; :func:`miss_table` shows
what happens if that is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.exponential_fit import DRAWS, SPACES, Fit, fit
from sim.targets import PHASES, Target, target
from sim.threshold import ln_threshold

if TYPE_CHECKING:
    from sim.gap_maps import GapMaps, Sample

__all__ = [
    "KEPT",
    "SPACES",
    "TRIALS",
    "Calibration",
    "Fit",
    "Measured",
    "Miss",
    "Part",
    "PhaseCalibration",
    "Points",
    "Residual",
    "achieved",
    "calibrate",
    "fit",
    "measure",
    "miss_table",
]

# fmt: off
TRIALS = (
    1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 2e-2,
    5e-2, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99,
)
# fmt: on
"""Model Optimizer's thresholds; each is tried on every text."""

KEPT = (0.10, 0.90)
"""Points outside this range of sparsity are left out of the fit."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The sparsity of every text, layer and vote of one phase, at every trial threshold.

    Made by :func:`measure`.

    Parameters
    ----------
    target : Target
        The kernel whose decisions these are.
    samples : list of Sample
    layers : tuple of int
    votes : tuple of str
        Names of the rows: query heads, or KV heads where GQA groups vote together.
    thresholds : ndarray, shape [trials], float64
    sparsity : ndarray, shape [samples, layers, votes, trials], float64
    """

    target: Target
    samples: list[Sample]
    layers: tuple[int, ...]
    votes: tuple[str, ...]
    thresholds: NDArray[np.float64]
    sparsity: NDArray[np.float64]

    @property
    def scale_factor(self) -> NDArray[np.float64]:
        """λ·L of every sample and trial, [samples, trials]."""
        lengths = np.array([sample.length for sample in self.samples], np.float64)
        return lengths[:, None] * self.thresholds

    def points(self, layer: int | None = None, vote: str | None = None) -> Points:
        """Points of the fit: all layers together, one layer, or one vote of one layer.

        Parameters
        ----------
        layer : int, optional
            As in ``layers``.
        vote : str, optional
            As in ``votes``; only with ``layer``.

        Returns
        -------
        Points
            Those whose sparsity lies within 10 to 90 %.
        """
        chosen = self.sparsity if layer is None else self.sparsity[:, [self.layers.index(layer)]]
        chosen = chosen if vote is None else chosen[:, :, [self.votes.index(vote)]]
        mean = chosen.mean(axis=(1, 2))  # [samples, trials]
        kept = (mean >= KEPT[0]) & (mean <= KEPT[1])
        sample = np.nonzero(kept)[0]
        return Points(
            mean[kept],
            self.scale_factor[kept],
            np.array([self.samples[i].length for i in sample], np.int64),
            [self.samples[i].text for i in sample],
        )


@dataclass(frozen=True, eq=False)
class Points:
    """What a fit goes through: ``sparsity``, ``scale_factor`` and ``length`` [n], ``text``."""

    sparsity: NDArray[np.float64]
    scale_factor: NDArray[np.float64]
    length: NDArray[np.int64]
    text: list[str]

    def fit(self, *, space: str = "log", draws: int = DRAWS) -> Fit:
        """Fit them; see :func:`fit`."""
        return fit(self.sparsity, self.scale_factor, space=space, sample=self.text, draws=draws)


def measure(maps: GapMaps, kernel: Target, thresholds: ArrayLike = TRIALS) -> Measured:
    """Count what each trial threshold skips, for every text, layer and vote.

    Parameters
    ----------
    maps : GapMaps
    kernel : Target
        Whose decisions, and which phase.
    thresholds : array, shape [trials]
        λ in (0, 1].

    Returns
    -------
    Measured

    Raises
    ------
    ValueError
        If the maps hold no text of that phase, were not captured for that kernel, or hold counts
        at other thresholds.
    """
    lam = np.asarray(thresholds, np.float64)
    if not ((lam > 0) & (lam <= 1)).all():
        raise ValueError("thresholds must lie in (0, 1]: above 1, gap maps do not decide")
    if maps.thresholds is not None:
        counted = ln_threshold(maps.thresholds)
        if missing := [x for x in lam.tolist() if ln_threshold(x) not in counted]:
            raise ValueError(
                f"these gap maps hold counts, and not at threshold {missing[0]:g}: give full maps"
            )
    samples = _samples(maps, kernel.phase)
    table = [maps.sparsity(kernel, sample, lam) for sample in samples]
    return Measured(kernel, samples, maps.layers, maps.rows(kernel), lam, np.array(table))


def _samples(maps: GapMaps, phase: str) -> list[Sample]:
    samples = [sample for sample in maps.samples if sample.phase == phase]
    if not samples:
        raise ValueError(f"these gap maps hold no text of the {phase} phase")
    return samples


def achieved(maps: GapMaps, kernel: Target, scale_factor: float) -> NDArray[np.float64]:
    """Measure what one scale factor skips of every text, at the text's own length.

    Parameters
    ----------
    maps : GapMaps
    kernel : Target
    scale_factor : float
        At least 0.

    Returns
    -------
    ndarray, shape [samples of the phase, layers, votes], float64
        NaN for a text so short that λ = factor / length exceeds 1.  From maps that hold counts
        (:meth:`sim.gap_maps.GapMaps.counted`) it is interpolated between their thresholds.
    """
    samples = _samples(maps, kernel.phase)
    rows = []
    for sample in samples:
        lam = scale_factor / sample.length
        one = maps.sparsity(kernel, sample, [min(lam, 1.0)])[:, :, 0]
        rows.append(one if lam <= 1 else np.full_like(one, np.nan))
    return np.array(rows)


@dataclass(frozen=True)
class Residual:
    """How far measured sparsity lies above the formula's, over the points of one length or layer.

    Parameters
    ----------
    group : int
        Length or layer.
    mean, worst : float or None
        Measured − formula: mean, and the one of largest size.  None without points.
    points : int
    """

    group: int
    mean: float | None
    worst: float | None
    points: int


@dataclass(frozen=True)
class Part:
    """A fit of one layer, or of one vote of one layer.

    Parameters
    ----------
    layer : int
    vote : str or None
        Such as ``head 3``, or ``KV head 1`` where its GQA group votes together; None: the whole
        layer.
    points : int
        Points within 10 to 90 % sparsity.
    fit : Fit or None
        None where the points do not suffice.
    """

    layer: int
    vote: str | None
    points: int
    fit: Fit | None

    @property
    def name(self) -> str:
        """Such as ``layer 12, head 3``."""
        return f"layer {self.layer}" + (f", {self.vote}" if self.vote is not None else "")


@dataclass(frozen=True)
class PhaseCalibration:
    """Calibration of one phase.

    Parameters
    ----------
    target : Target
        Decision grid, visit order and vote that it was made on.
    fit : Fit
        All layers together.
    by_length, by_layer : tuple of Residual
    parts : tuple of Part
        Fits of layers, heads, or both; empty unless asked for.
    lengths : tuple of int
        Those of the texts, ascending, each once.
    texts : tuple of str
        Names of the texts, each once.
    """

    target: Target
    fit: Fit
    by_length: tuple[Residual, ...]
    by_layer: tuple[Residual, ...]
    parts: tuple[Part, ...]
    lengths: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """Scale factors of one model for one kernel, and what they rest on.

    Made by :func:`calibrate` or :func:`sim.calibration_file.read_calibration`.

    Parameters
    ----------
    kernel : str
        Name of the targets.
    phases : dict
        Phase → PhaseCalibration.
    card : dict of str
        Of the gap maps: model, command, and so on.
    date : str
        Year-month-day.
    versions : dict of str
        Package → version.
    """

    kernel: str
    phases: dict[str, PhaseCalibration]
    card: dict[str, str]
    date: str
    versions: dict[str, str]

    def scale_factor(
        self, target_sparsity: float | Mapping[str, float], *, extrapolate: bool = False
    ) -> dict[str, float]:
        """Give the factor of each phase for a target sparsity.

        Parameters
        ----------
        target_sparsity : float or dict
            One for every calibrated phase, or phase → target.
        extrapolate : bool
            As in :meth:`Fit.scale_factor`.

        Returns
        -------
        dict
            Phase → factor.

        Raises
        ------
        ValueError
            If a phase was not calibrated, or its target lies outside its range.
        """
        factors = {}
        for phase, wanted in self.targets(target_sparsity).items():
            try:
                factors[phase] = self.phases[phase].fit.scale_factor(
                    wanted, extrapolate=extrapolate
                )
            except ValueError as error:
                raise ValueError(f"{phase}: {error}") from None
        return factors

    def targets(self, target_sparsity: float | Mapping[str, float]) -> dict[str, float]:
        """Give a target sparsity as phase → target."""
        if not isinstance(target_sparsity, Mapping):
            return dict.fromkeys(self.phases, float(target_sparsity))
        for phase in target_sparsity:
            if phase not in self.phases:
                raise ValueError(
                    f"target_sparsity names {phase!r}, but this calibration is of "
                    f"{' and '.join(self.phases)}"
                )
        return {phase: float(wanted) for phase, wanted in target_sparsity.items()}


def calibrate(
    maps: GapMaps,
    kernel: str = "ours",
    *,
    space: str = "log",
    phases: Sequence[str] | None = None,
    per_layer: bool = False,
    per_head: bool = False,
) -> Calibration:
    """Fit the scale factor of each phase for one kernel.

    Parameters
    ----------
    maps : GapMaps
        Gap maps of texts; :func:`sim.gap_maps.read_gap_maps`.
    kernel : {"ours", "nvidia", "nvidia-256", "model-optimizer"}
        Whose decision grid, visit order and vote.
    space : {"log", "linear"}
        As in :func:`fit`.
    phases : sequence of {"prefill", "decode"}, optional
        Default those the maps hold.
    per_layer, per_head : bool
        Also a fit for every layer, or for every vote of every layer.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        If the kernel is unknown, the maps lack a phase or were not captured for the kernel, or
        too few points lie within 10 to 90 % sparsity.
    """
    held = {sample.phase for sample in maps.samples}
    wanted = [phase for phase in PHASES if phase in held] if phases is None else list(phases)
    if not wanted:
        raise ValueError("these gap maps hold no text")
    return Calibration(
        kernel,
        {
            phase: _calibrate(measure(maps, target(kernel, phase)), space, per_layer, per_head)
            for phase in wanted
        },
        dict(maps.card),
        date.today().isoformat(),
        {"numpy": np.__version__, "skip-softmax-lab": _own_version()},
    )


def _own_version() -> str:
    try:
        return version("skip-softmax-lab")
    except PackageNotFoundError:
        return "not installed"


def _calibrate(measured: Measured, space: str, per_layer: bool, per_head: bool) -> PhaseCalibration:
    points = measured.points()
    try:
        one = points.fit(space=space)
    except ValueError as error:
        tried = measured.scale_factor.size
        raise ValueError(
            f"{measured.target.phase}: {error}; {points.sparsity.size} of {tried} points lie "
            f"within {KEPT[0]:.0%} to {KEPT[1]:.0%} sparsity, which longer texts widen"
        ) from None
    lengths = np.array([sample.length for sample in measured.samples])
    formula = np.log(measured.scale_factor / one.a) / one.b  # [samples, trials]
    mean = measured.sparsity.mean(axis=(1, 2))
    kept = (mean >= KEPT[0]) & (mean <= KEPT[1])
    of_layer = measured.sparsity.mean(axis=2) - formula[:, None]  # [samples, layers, trials]
    parts: list[Part] = []
    for layer in measured.layers:
        votes: list[str | None] = [None] if per_layer else []
        votes += measured.votes if per_head else []
        parts += [_part(measured, layer, vote, space) for vote in votes]
    return PhaseCalibration(
        measured.target,
        one,
        tuple(
            _residual(int(length), (mean - formula)[lengths == length][kept[lengths == length]])
            for length in np.unique(lengths)
        ),
        tuple(
            _residual(layer, of_layer[:, row][kept]) for row, layer in enumerate(measured.layers)
        ),
        tuple(parts),
        tuple(int(length) for length in np.unique(lengths)),
        tuple(dict.fromkeys(sample.text for sample in measured.samples)),
    )


def _residual(group: int, difference: NDArray[np.float64]) -> Residual:
    if not difference.size:  # no trial puts this length inside the kept range
        return Residual(group, None, None, 0)
    worst = float(difference[np.abs(difference).argmax()])
    return Residual(group, float(difference.mean()), worst, difference.size)


def _part(measured: Measured, layer: int, vote: str | None, space: str) -> Part:
    points = measured.points(layer, vote)
    try:
        one = points.fit(space=space, draws=0)
    except ValueError:
        return Part(layer, vote, points.sparsity.size, None)
    return Part(layer, vote, points.sparsity.size, one)


@dataclass(frozen=True)
class Miss:
    """What a target set on one kernel's decisions achieves on every kernel's.

    Parameters
    ----------
    kernel : str
        Calibrated on this one.
    scale_factor : float or None
        None where no formula holds.
    achieved : dict
        Kernel → mean sparsity over texts, layers and votes; None where no text is long enough
        for λ ≤ 1, or there is no factor.
    why_not : str
        Why there is no factor; else empty.
    """

    kernel: str
    scale_factor: float | None
    achieved: dict[str, float | None]
    why_not: str = ""


def miss_table(
    maps: GapMaps,
    phase: str,
    target_sparsity: float,
    *,
    space: str = "log",
    kernels: Sequence[str] | None = None,
) -> list[Miss]:
    """Show how far a target set on one grid, order and vote misses on another.

    Parameters
    ----------
    maps : GapMaps
    phase : {"prefill", "decode"}
    target_sparsity : float
    space : {"log", "linear"}
    kernels : sequence of str, optional
        Default every kernel that the maps were made for.

    Returns
    -------
    list of Miss
        One row for each kernel calibrated on.

    Raises
    ------
    ValueError
        If a kernel is unknown, or the maps were not captured for it or lack the phase.
    """
    made = [one.name for one in maps.targets if one.phase == phase]
    names = made if kernels is None else list(kernels)
    measured = {name: measure(maps, target(name, phase)) for name in names}
    table = []
    for name in names:
        factor, why_not = None, ""
        try:
            one = measured[name].points().fit(space=space, draws=0)
            factor = one.scale_factor(target_sparsity)
        except ValueError as error:  # this row has no factor; the others stand
            why_not = str(error)
        achieves = {other: _mean(maps, other, phase, factor) for other in names}
        table.append(Miss(name, factor, achieves, why_not))
    return table


def _mean(maps: GapMaps, kernel: str, phase: str, scale_factor: float | None) -> float | None:
    if scale_factor is None:
        return None
    one = achieved(maps, target(kernel, phase), scale_factor)
    decided = one[~np.isnan(one).any(axis=(1, 2))]
    return float(decided.mean()) if decided.size else None
