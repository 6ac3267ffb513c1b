"""Which constant an agent's rewards are best held against, and whether removing it comes near (CCPO, arXiv 2603.21563, Theorem 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.diagnose.moments import Estimate, jackknife_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """With ``g`` the score of an agent's words in one rollout:

    ``best``: ``b* = E[|g|^2 R] / E[|g|^2]``, the constant that, subtracted from ``R``, leaves the least noise. It is the mean reward
    only where right and wrong words have scores of one size. ``mean``: the mean reward. ``change``: what subtracting
    ``R_without`` does to the second moment of ``g R``, ``E[|g|^2 R_without (R_without - 2 R)] / E[|g|^2 R^2]``; below 0 it
    takes noise away. None where no rule removes the agent.
    """

    best: Estimate
    mean: float
    change: Estimate | None

    def to_json(self) -> dict[str, object]:
        return {
            "best": self.best.to_json(),
            "mean": self.mean,
            "change": None if self.change is None else self.change.to_json(),
        }


def weighted_sums(score_PNJ: Tensor, reward_PN: Tensor, without_PN: Tensor | None) -> Tensor:
    """Means over a batch of ``|g|^2`` times 1, ``R``, ``R^2`` and ``R_without (R_without - 2 R)`` (0 where absent); ``[4]``."""
    weight_PN = score_PNJ.double().square().sum(2)
    reward_PN = reward_PN.double()
    change_PN = torch.zeros_like(reward_PN)
    if without_PN is not None:
        change_PN = without_PN.double() * (without_PN.double() - 2 * reward_PN)
    return torch.stack(
        [(weight_PN * x).mean() for x in (torch.ones_like(reward_PN), reward_PN, reward_PN**2, change_PN)]
    )


def baseline(sums: Sequence[Tensor], mean: float, *, removed: bool) -> Baseline:
    """The figures over batches with ``sums`` of their own; errors are the jackknife's over batches."""
    sums_B4 = torch.stack(list(sums))
    change = _ratio(sums_B4[:, 3], sums_B4[:, 2]) if removed else None
    return Baseline(best=_ratio(sums_B4[:, 1], sums_B4[:, 0]), mean=mean, change=change)


def _ratio(over_B: Tensor, under_B: Tensor) -> Estimate:
    if float(under_B.sum()) <= 0:
        return Estimate(value=None, error=None)
    rest = [(over_B.sum() - o, under_B.sum() - u) for o, u in zip(over_B, under_B, strict=True)]
    error = jackknife_error([float(o / u) for o, u in rest]) if all(float(u) > 0 for _, u in rest) else None
    return Estimate(value=float(over_B.sum() / under_B.sum()), error=error)
