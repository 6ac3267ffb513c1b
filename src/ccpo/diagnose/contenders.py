"""Who is compared: credit rules with the advantage estimators that follow them, and what their payments weigh in a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccpo.learner import TrainRow
from ccpo.learner.objective import Objective
from ccpo.learner.rows import collate, number_segments
from ccpo.losses import denominators
from ccpo.pay import Payroll, training_rows
from ccpo.rollout import Played
from ccpo.types import Coalition, CreditOutputs


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A credit rule, how its credit becomes advantage, and the tree of rollouts it is given ("auto": a planner's)."""

    name: str
    rule: Any
    payroll: Payroll
    branch: tuple[int, ...] | str = ()

    @property
    def swaps(self) -> bool:
        return getattr(self.rule, "swaps", False)


@dataclass(frozen=True, kw_only=True)
class Paid:
    """By agent ``[P, N]``: ``advantage``, and what it would be under shared reward; ``by_turn``: the advantage of each turn's texts;
    ``rows``: all that an agent would be trained on."""

    advantage: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    by_turn: Mapping[str, Tensor]
    rows: Mapping[str, Sequence[TrainRow]]


def pay(payroll: Payroll, played: Played, outputs: CreditOutputs) -> Paid:
    """What the trainer would make of a rule's ``outputs``."""
    credit = payroll.credit(outputs, played)
    advantage = {agent: payroll.advantage(credit_PN, agent, played) for agent, credit_PN in credit.items()}
    apart = {turn: a for agent in credit for turn, a in payroll.by_turn(outputs, agent, played).items()}
    (rows,) = training_rows(played, outputs, advantage, apart, payroll.solo(outputs), 1)
    return Paid(
        advantage=advantage,
        shared={agent: payroll.advantage(played.reward_PN, agent, played) for agent in credit},
        by_turn={turn: apart.get(turn, advantage[agent]) for agent in credit for turn in played.turns[agent]},
        rows={agent: [row for row in rows if row.agent == agent] for agent in credit},
    )


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


def tokens_of(needs: frozenset[Coalition], played: Played) -> int:
    """Generated tokens that a rule's batch costs: the joint rollouts and the counterfactuals that it asks for."""
    counterfactual = sum(
        turn.completion.tokens
        for group in played.groups
        for play in group.counterfactuals
        if play.removed in needs
        for turn in play.turns
    )
    return played.tokens["joint"] + counterfactual
