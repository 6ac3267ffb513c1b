"""Votes of finished rollouts, counted again without some of the voters. No token is decoded, and the figures are exact.

What is counted are the ballots that rollouts carry: ``answers`` and ``scores`` of the turns that the decision read. Before a
re-count is believed, the whole vote is counted and held against the rewards that were paid.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.teams import ABSTAIN, VoteKind, majority_BK, recount_without
from ccpo.types import Rollout, Turn

NEAR = 1e-4  # rewards of a log may be rounded
NOBODY = -2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballots:
    """The ballots of B rollouts in K turns. ``voters``: who cast those of each turn; ``kind``: how they are counted;
    ``answer_BK`` as :func:`~ccpo.teams.majority_BK` takes them; ``chosen_B``: the team's answer among them, NOBODY where it is none of theirs;
    ``weight_BK`` for ``weighted`` alone."""

    voters: tuple[str, ...]
    kind: str
    answer_BK: Tensor
    score_BK: Tensor
    chosen_B: Tensor
    weight_BK: Tensor | None = None

    def count(self) -> Tensor:
        """``reward_B`` of the whole vote."""
        return majority_BK(self.answer_BK, self.score_BK, self.weight_BK, self.kind)

    def without(self, agents: Collection[str]) -> Tensor:
        """``reward_B`` of the vote without ``agents``; 0 where nobody is left."""
        gone_K = torch.tensor([voter in agents for voter in self.voters])
        answer_BK = self.answer_BK.masked_fill(gone_K, ABSTAIN)
        return majority_BK(answer_BK, self.score_BK, self.weight_BK, self.kind)

    def without_each(self) -> dict[str, Tensor]:
        """``reward_B`` without each agent."""
        if len(set(self.voters)) < len(self.voters):
            return {agent: self.without({agent}) for agent in dict.fromkeys(self.voters)}
        reward_KB = recount_without(self.answer_BK, self.score_BK, self.weight_BK, self.kind)
        return dict(zip(self.voters, reward_KB, strict=True))


def ballots_of(rollouts: Sequence[Rollout], voters: Mapping[str, str], kind: str) -> Ballots | None:
    """The ballots of ``rollouts``. ``voters``: agent by turn, of the turns that the decision read; ``kind``: the vote's. None
    where a rollout does not say what was read in those turns, and where a weighted vote's weights are not known.
    """
    if not rollouts or not all(r.answers and r.scores for r in rollouts):
        return None
    answers, scores, chosen = [], [], []
    try:
        for rollout in rollouts:
            numbers: dict[str | None, int] = {None: ABSTAIN}
            said, judged = rollout.answers, rollout.scores
            answers.append([numbers.setdefault(said[turn], len(numbers)) for turn in voters])
            scores.append([judged[turn] for turn in voters])
            chosen.append(NOBODY if rollout.answer is None else numbers.get(rollout.answer, NOBODY))
    except KeyError:
        return None
    weight_BK = None
    if kind == VoteKind.WEIGHTED:
        weights = [_weights(rollout, voters) for rollout in rollouts]
        if any(w is None for w in weights):
            return None
        weight_BK = torch.tensor(weights, dtype=torch.float64)
    return Ballots(
        voters=tuple(voters.values()),
        kind=str(kind),
        answer_BK=torch.tensor(answers),
        score_BK=torch.tensor(scores, dtype=torch.float64),
        weight_BK=weight_BK,
        chosen_B=torch.tensor(chosen),
    )


def reproduces(ballots: Ballots, rollouts: Sequence[Rollout]) -> bool:
    """Whether counting the ballots gives the rewards that the rollouts were paid."""
    paid_B = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    return bool((ballots.count() - paid_B).abs().max() <= NEAR)


def _weights(rollout: Rollout, voters: Mapping[str, str]) -> list[float] | None:
    """The weight of each turn's ballot, exp of its mean log-probability; None where they are not there."""
    by_name: dict[str, Turn] = {turn.name: turn for turn in rollout.turns}
    spoken = [by_name.get(turn) for turn in voters]
    if any(turn is None or not turn.completion.logprobs for turn in spoken):
        return None
    return [math.exp(math.fsum(t.completion.logprobs) / len(t.completion.logprobs)) for t in spoken]
