"""What a credit rule would make of a batch: advantages, and the weight of each turn's score in its gradient estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccpo.credit import ESTIMATORS, has_spread
from ccpo.diagnose.gradients import row_of
from ccpo.learner import TrainRow
from ccpo.learner.objective import Objective
from ccpo.learner.rows import collate, number_segments
from ccpo.losses import denominators
from ccpo.rollout import Played
from ccpo.teams import PlayTeam, Team
from ccpo.types import Coalition, CreditInputs, CreditOutputs, Turn


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A credit rule with the advantage estimator that follows it."""

    name: str
    rule: Any
    estimator: str

    def needs(self, team: Team | PlayTeam, active: tuple[str, ...]) -> frozenset[Coalition]:
        return self.rule.needs(team.agent_names, team.decider, active)


@dataclass(frozen=True, kw_only=True)
class Paid:
    """``advantage[agent]`` ``[P, N]``; ``by_turn`` the same for each turn's rows; ``turns`` and ``rows`` are all that an agent
    would be trained on, in one order."""

    advantage: Mapping[str, Tensor]
    by_turn: Mapping[str, Tensor]
    turns: Mapping[str, Sequence[Turn]]
    rows: Mapping[str, Sequence[TrainRow]]


def credit_inputs(team: Team | PlayTeam, active: tuple[str, ...], played: Played) -> CreditInputs:
    return CreditInputs(
        agents=team.agent_names,
        decider=team.decider,
        active=active,
        reward_PN=played.reward_PN,
        without=played.without,
        score=played.score,
    )


def pay(contender: Contender, played: Played, outputs: CreditOutputs) -> Paid:
    """Advantages and training rows under a rule's ``outputs``, as the trainer makes them (format rewards are left out)."""
    advantage, by_turn, turns, rows = {}, {}, {}, {}
    for agent, credit_PN in outputs.credit.items():
        advantage[agent] = estimate(contender, credit_PN, played, agent)
        weight = outputs.weight.get(agent, 1.0)
        turns[agent], rows[agent] = [], []
        for p, group in enumerate(played.groups):
            for n, rollout in enumerate(group.rollouts):
                segment = p * len(group.rollouts) + n
                for turn in rollout.turns:
                    if turn.agent == agent:
                        by_turn[turn.name] = advantage[agent]
                        turns[agent].append(turn)
                        rows[agent].append(row_of(turn, float(advantage[agent][p, n]) * weight, segment))
        for turn, value, segment in _solo(contender, played, outputs, agent):
            turns[agent].append(turn)
            rows[agent].append(row_of(turn, value, segment))
    return Paid(advantage=advantage, by_turn=by_turn, turns=turns, rows=rows)


def estimate(contender: Contender, credit_PN: Tensor, played: Played, agent: str) -> Tensor:
    """From credit to advantage, ``[P, N]``: 0 where the agent said nothing."""
    P, N = credit_PN.shape
    tokens_PN = torch.tensor(
        [
            [sum(len(t.completion.token_ids) for t in r.turns if t.agent == agent) for r in g.rollouts]
            for g in played.groups
        ]
    )
    counted_PN = tokens_PN
    if contender.estimator == "reinforce++" and getattr(contender.rule, "skip_flat", False):
        counted_PN = tokens_PN * has_spread(played.reward_PN)[:, None]
    group_B = torch.arange(P).repeat_interleave(N)
    advantage_B = ESTIMATORS[contender.estimator](credit_PN.flatten(), group_B, counted_PN.flatten())
    return advantage_B.reshape(P, N) * (counted_PN > 0)


def _solo(contender: Contender, played: Played, outputs: CreditOutputs, agent: str) -> list[tuple[Turn, float, int]]:
    """The counterfactual answers that the rule trains the agent on: turn, weighted advantage, segment."""
    if agent not in outputs.solo_credit:
        return []
    credit_PD = outputs.solo_credit[agent].flatten(1)
    P, D = credit_PD.shape
    group_B = torch.arange(P).repeat_interleave(D)
    ones_B = torch.ones(P * D, dtype=torch.long)
    advantage_PD = ESTIMATORS[contender.estimator](credit_PD.flatten(), group_B, ones_B).reshape(P, D)
    found = []
    for p, group in enumerate(played.groups):
        solos = [c for c in group.counterfactuals if c.removed == outputs.solo_coalition[agent]]
        for d, solo in enumerate(solos):
            value = float(advantage_PD[p, d]) * outputs.solo_weight[agent]
            segment = played.reward_PN.numel() + p * D + d
            found += [(turn, value, segment) for turn in solo.turns if turn.agent == agent]
    return found


def coefficients(objective: Objective, rows: Sequence[TrainRow]) -> Tensor:
    """``c_B`` with ``-grad loss = sum over rows of c_B * grad log pi(row)``, at the sampling policy.

    There every importance ratio is 1, so that the loss reaches all tokens of a row alike, whatever its kind; what is left of
    it is the advantage and how the rows are averaged. Rows without a token have 0.
    """
    spoken = [i for i, row in enumerate(rows) if row.token_ids]
    found_B = torch.zeros(len(rows), dtype=torch.float64)
    if not spoken:
        return found_B
    chosen = [rows[i] for i in spoken]
    segments = number_segments(chosen)
    batch = collate(chosen, segments, torch.device("cpu"))
    counts = denominators(batch.mask_BT.sum(1), torch.tensor(segments), objective.constant)
    logprob_BT = batch.engine_BT.double().clone().requires_grad_()
    loss, _ = objective(logprob_BT, torch.zeros_like(logprob_BT), batch, counts)
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    found_B[spoken] = -gradient_BT[:, 0]
    return found_B


def tokens_of(contender: Contender, needs: frozenset[Coalition], played: Played) -> int:
    """Generated tokens that this rule's batch costs: the joint rollouts and the counterfactuals that it asks for."""
    counterfactual = sum(
        len(turn.completion.token_ids)
        for group in played.groups
        for play in group.counterfactuals
        if play.removed in needs
        for turn in play.turns
    )
    return played.tokens["joint"] + counterfactual
