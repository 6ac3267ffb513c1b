"""The statistics of a comparison: interquartile means, bootstrap intervals, probability of improvement (arXiv 2108.13264), tokens to a mark.

A *curve* is ``[tokens, step, seconds, accuracy]`` a row, tokens increasing. *Strata* are the tasks: their scores are resampled apart.
All resampling has a fixed seed, so that the same results give the same page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
DROP = 0.10

Curve = Sequence[Sequence[float]]
Strata = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95% bootstrap interval, and from how many runs."""

    value: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Tokens at which a curve first reaches a mark; ``censored``: it never did, and ``tokens`` is the budget."""

    tokens: float
    censored: bool


def iqm(values: Sequence[float] | Tensor) -> float | Tensor:
    """Interquartile mean: the mean after ``floor(n/4)`` values were cut off at each end (arXiv 2108.13264). Of a tensor ``[B, n]``, by
    row."""
    if isinstance(values, Tensor):
        n = values.shape[-1]
        cut = n // 4
        return values.sort(-1).values[..., cut : n - cut].mean(-1)
    if not values:
        raise ValueError("the interquartile mean of no values")
    return float(iqm(torch.tensor([values], dtype=torch.float64))[0])


def _resampled(strata: Strata, generator: torch.Generator) -> list[Tensor]:
    """Of each stratum ``[RESAMPLES, n]``: its values drawn with replacement."""
    drawn = []
    for values in strata:
        values_n = torch.tensor(values, dtype=torch.float64)
        drawn.append(values_n[torch.randint(len(values_n), (RESAMPLES, len(values_n)), generator=generator)])
    return drawn


def _interval(samples: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(samples, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=samples.dtype)).tolist()
    return low, high


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def iqm_estimate(strata: Strata) -> Estimate:
    """IQM of all runs together and its stratified percentile bootstrap interval; one stratum: the plain bootstrap over seeds."""
    pooled = [value for values in strata for value in values]
    low, high = _interval(iqm(torch.cat(_resampled(strata, _generator()), dim=1)))
    return Estimate(value=iqm(pooled), low=low, high=high, runs=len(pooled))


def ratio_estimate(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """Ratio of two IQMs, with the interval of independent resampling."""
    generator = _generator()
    top, bottom = (iqm(_resampled([values], generator)[0]) for values in (over, under))
    low, high = _interval(top / bottom)
    return Estimate(value=iqm(over) / iqm(under), low=low, high=high, runs=len(over) + len(under))


def improvement(first: Strata, second: Strata) -> Estimate:
    """Probability that a run of ``first`` beats one of ``second``: per stratum the share of pairs that it wins, ties one half, averaged over strata
    (arXiv 2108.13264, Section 4.3); stratified bootstrap interval."""
    if len(first) != len(second):
        raise ValueError(
            f"probability of improvement needs the same strata of both; got {len(first)} and {len(second)}"
        )
    generator = _generator()
    value = [_wins(*(torch.tensor([v], dtype=torch.float64) for v in pair)) for pair in zip(first, second, strict=True)]
    drawn = zip(_resampled(first, generator), _resampled(second, generator), strict=True)
    low, high = _interval(torch.stack([_wins(x, y) for x, y in drawn]).mean(0))
    runs = sum(map(len, first)) + sum(map(len, second))
    return Estimate(value=float(torch.stack(value).mean()), low=low, high=high, runs=runs)


def _wins(x_Bn: Tensor, y_Bm: Tensor) -> Tensor:
    difference = x_Bn[:, :, None] - y_Bm[:, None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean((1, 2))


# --- curves ------------------------------------------------------------------------------------------------------------------


def smoothed(curve: Curve) -> list[tuple[float, float]]:
    """``(tokens, accuracy)``, each accuracy the mean over itself and its neighbours (three evaluations; two at the ends)."""
    accuracy = [row[3] for row in curve]
    return [
        (row[0], math.fsum(window) / len(window))
        for i, row in enumerate(curve)
        if (window := accuracy[max(0, i - 1) : i + 2])
    ]


def tokens_to(curve: Curve, mark: float, budget: float) -> Crossing:
    """Tokens at which the smoothed curve first reaches ``mark``, linearly interpolated between two evaluations; the budget where it
    never does."""
    before: tuple[float, float] | None = None
    for tokens, accuracy in smoothed(curve):
        if accuracy >= mark:
            if before is None or accuracy == before[1]:
                return Crossing(tokens=tokens, censored=False)
            part = (mark - before[1]) / (accuracy - before[1])
            return Crossing(tokens=before[0] + part * (tokens - before[0]), censored=False)
        before = (tokens, accuracy)
    return Crossing(tokens=budget, censored=True)


def area_under(curve: Curve, budget: float) -> float:
    """Mean accuracy over the budget: the area under the curve from 0 to ``budget`` tokens (trapezoids) divided by ``budget``. Before
    the first and after the last evaluation the accuracy is held; what lies beyond the budget is cut off."""
    if not curve:
        raise ValueError("the area under a curve without points")
    points = [(0.0, curve[0][3]), *((row[0], row[3]) for row in curve), (math.inf, curve[-1][3])]
    area = 0.0
    for (left, low), (right, high) in itertools.pairwise(points):
        if left >= budget:
            break
        if right > budget:
            high = low if math.isinf(right) else low + (high - low) * (budget - left) / (right - left)
            right = budget
        area += (right - left) * (low + high) / 2
    return area / budget


def lost_after_peak(curve: Curve) -> float:
    """The largest fall of the smoothed curve below its highest point so far."""
    highest, lost = -math.inf, 0.0
    for _, accuracy in smoothed(curve):
        highest = max(highest, accuracy)
        lost = max(lost, highest - accuracy)
    return lost


def unstable_share(curves: Sequence[Curve]) -> float:
    """Share of runs that lose at least 10 points after their peak."""
    return sum(lost_after_peak(curve) >= DROP - 1e-12 for curve in curves) / len(curves)


def band(
    curves: Sequence[Curve], grid: Sequence[float], statistic: Callable[[Strata], Estimate] = iqm_estimate
) -> list[Estimate]:
    """The statistic over runs at each number of tokens of ``grid``, every curve interpolated linearly and held at its ends."""
    return [statistic([[_at(curve, tokens) for curve in curves]]) for tokens in grid]


def _at(curve: Curve, tokens: float) -> float:
    before = curve[0]
    if tokens <= before[0]:
        return before[3]
    for row in curve[1:]:
        if tokens <= row[0]:
            return before[3] + (row[3] - before[3]) * (tokens - before[0]) / (row[0] - before[0])
        before = row
    return before[3]
