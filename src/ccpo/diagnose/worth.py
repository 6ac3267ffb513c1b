"""What an agent is worth to its team, as means over problems with intervals. Pure functions of numbers by problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.credit.dependence import student_p

LEVEL = 0.95
ROUNDS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """A mean over ``problems`` with its 95% interval, and ``needed``: about how many problems, sampled as these were, make half its
    width the one that was asked for."""

    mean: float
    low: float
    high: float
    problems: int
    needed: int

    def to_json(self) -> dict[str, float]:
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "problems": self.problems,
            "needed": self.needed,
        }


def worth_of(values: Sequence[float], half_width: float) -> Worth | None:
    """Student's interval of a mean over problems; None for fewer than two.

    Where all values are equal it is 3/n wide to each side: what was never seen in n problems has a rate below that (the rule of three).
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    if deviation == 0.0:
        return Worth(mean=mean, low=mean - 3 / n, high=mean + 3 / n, problems=n, needed=math.ceil(3 / half_width))
    reach = student_quantile(n - 1) * deviation / math.sqrt(n)
    needed = math.ceil((1.959964 * deviation / half_width) ** 2)
    return Worth(mean=mean, low=mean - reach, high=mean + reach, problems=n, needed=max(2, needed))


def spread_of(worth_PN: Tensor, noise: float, half_width: float) -> Worth | None:
    """The standard deviation of what an agent's texts are worth, beyond the ``noise`` (a variance) of measuring it.

    ``worth_PN``: ``Q - V`` of each text, whose mean is 0 whatever the agent says; its spread is 0 where nobody minds what it says. The
    interval is the percentile bootstrap's over problems. None for fewer than two problems.
    """
    P = len(worth_PN)
    if P < 2:
        return None
    square_P = worth_PN.double().square().mean(1)
    drawn_R = square_P[torch.randint(P, (ROUNDS, P), generator=torch.Generator().manual_seed(0))].mean(1)
    spread_R = (drawn_R - noise).clamp(min=0).sqrt()
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=spread_R.dtype)
    low, high = torch.quantile(spread_R, edges).tolist()
    mean = math.sqrt(max(0.0, square_P.mean().item() - noise))
    needed = math.ceil(P * ((high - low) / 2 / half_width) ** 2)
    return Worth(mean=mean, low=low, high=high, problems=P, needed=max(2, needed))


def student_quantile(dof: int, level: float = LEVEL) -> float:
    """``t`` with ``P(|T| < t) = level`` for Student's T, by bisection."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, dof) > 1 - level else (low, middle)
    return high


def verdict(removal: Worth | None, half_width: float, *, decides: bool) -> str:
    """In a word: ``decides`` (without it there is no answer), ``helps``, ``hurts``, ``free-rides`` (its removal changes the reward by less than
    the half-width asked for, for certain), ``unclear`` or ``untold``."""
    if decides:
        return "decides"
    if removal is None:
        return "untold"
    if -half_width < removal.low and removal.high < half_width:
        return "free-rides"
    if removal.low > 0:
        return "helps"
    if removal.high < 0:
        return "hurts"
    return "unclear"
