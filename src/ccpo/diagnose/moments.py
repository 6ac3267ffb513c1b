"""Mean, noise and likeness of gradient estimates, from the inner products of independent batches. Pure functions of tensors.

For batches ``b`` with gradient estimates ``g_b`` every figure is made of two kinds of products: the mean over pairs of *different*
batches, ``<g_b, h_b'>``, is an unbiased estimate of ``<E g, E h>`` (a U-statistic); the mean of ``|g_b|^2`` is that of the second
moment. Errors are the jackknife's over batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its standard error; either is None where the data cannot tell."""

    value: float | None
    error: float | None

    def root(self) -> Estimate:
        """The square root of an estimate that may have come out negative: ``sqrt(max(x, 0))``, and by the delta method the
        error ``e / (2 sqrt(max(x, e)))``, which stays finite at 0."""
        if self.value is None or self.error is None:
            return self if self.value is None else Estimate(value=math.sqrt(max(self.value, 0.0)), error=None)
        reach = max(self.value, self.error)
        error = self.error / (2 * math.sqrt(reach)) if reach > 0 else 0.0
        return Estimate(value=math.sqrt(max(self.value, 0.0)), error=error)

    def scaled(self, factor: float) -> Estimate:
        return Estimate(
            value=None if self.value is None else self.value * factor,
            error=None if self.error is None else self.error * abs(factor),
        )

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "error": self.error}


@dataclass(frozen=True, slots=True)
class Products:
    """All inner products of a rule's batches ``g`` and a reference's ``r``, each ``[B, B]``."""

    gg: Tensor
    gr: Tensor
    rr: Tensor

    @staticmethod
    def of(g_BJ: Tensor, r_BJ: Tensor) -> Products:
        if g_BJ.dim() != 2 or g_BJ.shape != r_BJ.shape or len(g_BJ) < 3:
            raise ValueError(f"gradients are [B, J] with B >= 3; got {tuple(g_BJ.shape)} and {tuple(r_BJ.shape)}")
        return Products(g_BJ @ g_BJ.T, g_BJ @ r_BJ.T, r_BJ @ r_BJ.T)

    def take(self, keep: Tensor) -> Products:
        return Products(*(m[keep][:, keep] for m in (self.gg, self.gr, self.rr)))

    @property
    def batches(self) -> int:
        return len(self.gg)


def between(gram_BB: Tensor) -> float:
    """Mean over pairs of different batches: ``sum over b != b' of <g_b, h_b'> / (B (B - 1))``, unbiased for ``<E g, E h>``."""
    B = len(gram_BB)
    return float((gram_BB.sum() - gram_BB.diagonal().sum()) / (B * (B - 1)))


def signal2(p: Products) -> float:
    """``|E g|^2``, unbiased; may come out negative where there is little signal."""
    return between(p.gg)


def variance(p: Products) -> float:
    """``E |g - E g|^2``, the trace of the covariance of a batch's gradient, unbiased."""
    return float(p.gg.diagonal().mean()) - between(p.gg)


def snr2(p: Products) -> float | None:
    """``|E g|^2 / E |g - E g|^2``: the squared signal-to-noise ratio of one batch; grows linearly with the data."""
    noise = variance(p)
    return between(p.gg) / noise if noise > 0 else None


def ratio2(p: Products) -> float | None:
    """The squared signal-to-noise ratio over that of the reference."""
    own, other = snr2(p), snr2(Products(p.rr, p.gr, p.rr))
    return own / other if own is not None and other is not None and other > 0 else None


def cosine(p: Products) -> float | None:
    """``<E g, E r> / (|E g| |E r|)``; None where either length does not rise from the noise."""
    lengths = between(p.gg) * between(p.rr)
    if between(p.gg) <= 0 or lengths <= 0:
        return None
    return between(p.gr) / math.sqrt(lengths)


def bias2(p: Products) -> float | None:
    """``min over c of |c E g - E r|^2 / |E r|^2 = 1 - cosine^2``: what no learning rate can make up for."""
    found = cosine(p)
    return None if found is None else 1.0 - found * found


def jackknife(statistic: Callable[[Products], float | None], products: Products) -> Estimate:
    """The statistic and its delete-one-batch jackknife error; neither where leaving a batch out makes it undefined (an angle of
    a gradient that hardly rises from the noise)."""
    value = statistic(products)
    B = products.batches
    known = [part for b in range(B) if (part := statistic(products.take(_without(B, b)))) is not None]
    if value is None or len(known) < B:
        return Estimate(value=None, error=None)
    return Estimate(value=value, error=jackknife_error(known))


def jackknife_error(parts: Sequence[float]) -> float:
    """``sqrt((n - 1)/n * sum (x_i - mean)^2)`` over the delete-one estimates."""
    n, mean = len(parts), math.fsum(parts) / len(parts)
    return math.sqrt((n - 1) / n * math.fsum((x - mean) ** 2 for x in parts))


def rank_correlation(x_B: Tensor, y_B: Tensor) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, ties sharing their mean rank. None where either is constant."""
    ranks = [_ranks(values.double()) for values in (x_B, y_B)]
    a, b = (r - r.mean() for r in ranks)
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else None


def bootstrap_error(
    statistic: Callable[[Tensor], float | None], units: int, *, seed: int = 0, rounds: int = 200
) -> float | None:
    """Standard deviation of ``statistic(units drawn with replacement)``, their indices ``[units]``; None where too few
    rounds can tell."""
    generator = torch.Generator().manual_seed(seed)
    found = [statistic(torch.randint(units, (units,), generator=generator)) for _ in range(rounds)]
    known = torch.tensor([x for x in found if x is not None], dtype=torch.float64)
    return float(known.std()) if len(known) > rounds // 2 else None


def _ranks(x_B: Tensor) -> Tensor:
    _, inverse_B, count_V = torch.unique(x_B, return_inverse=True, return_counts=True)
    last_V = count_V.cumsum(0).double()
    return (last_V - (count_V - 1) / 2)[inverse_B]


def _without(n: int, one: int) -> Tensor:
    return torch.tensor([i for i in range(n) if i != one])
