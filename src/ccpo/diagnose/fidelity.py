"""Credit fidelity: does a rule pay an agent for what its words were worth?

The truth is measured, not modelled: what a turn heard is kept, what it said is kept, and the rest of the play is spoken again many
times. The mean reward is what the text was worth there, ``Q``; the mean with the turn itself spoken again is what its place was
worth, ``V``. The credit that a text deserves is ``Q - V``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.diagnose.moments import Estimate, bootstrap_error, rank_correlation
from ccpo.rollout import Walker, replay_turn
from ccpo.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """``worth[turn]``: ``Q - V`` of each text of the turn, ``[P, N]``. ``noise[turn]``: the sampling variance of that figure, mean over
    texts. ``draws`` a text."""

    worth: Mapping[str, Tensor]
    noise: Mapping[str, float]
    draws: int

    def reliability(self, turns: Sequence[str]) -> float | None:
        """The share of the variance of ``worth`` that is not sampling noise; None where all texts are alike."""
        spread = torch.stack([self.worth[t] for t in turns]).double().var()
        noise = sum(self.noise[t] for t in turns) / len(turns)
        return max(0.0, 1.0 - noise / float(spread)) if spread > 0 else None


def measure_truth(walker: Walker, groups: Sequence[Group], draws: int, *, seed: int) -> Truth:
    """Replay every turn of every rollout of ``groups``, with ``draws`` for Q and as many for V. ``draws`` is at least 2."""
    plays = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    worth, noise = {}, {}
    for spec in walker.team.turns_in_order:
        said_BM = replay_turn(walker, plays, spec.name, draws, seed=seed).double()
        heard_BM = replay_turn(walker, plays, spec.name, draws, seed=seed, again=True).double()
        worth[spec.name] = (said_BM.mean(1) - heard_BM.mean(1)).reshape(len(groups), -1)
        noise[spec.name] = float(((said_BM.var(1) + heard_BM.var(1)) / draws).mean())
    return Truth(worth=worth, noise=noise, draws=draws)


def fidelity(paid: Mapping[str, Tensor], truth: Truth, turns: Sequence[str]) -> Estimate:
    """Spearman's correlation of the advantages ``paid[turn]`` ``[P, N]`` with the truth, over all texts of an agent's ``turns``.

    The error is a bootstrap over problems.
    """
    paid_TPN = torch.stack([paid[t] for t in turns]).double()
    true_TPN = torch.stack([truth.worth[t] for t in turns])

    def statistic(problems: Tensor) -> float | None:
        return rank_correlation(paid_TPN[:, problems].flatten(), true_TPN[:, problems].flatten())

    P = paid_TPN.shape[1]
    return Estimate(value=statistic(torch.arange(P)), error=bootstrap_error(statistic, P))
