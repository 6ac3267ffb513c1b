"""What a cell remembers of its credit: a wrapper around the rule that keeps what was paid, and its quantiles for box plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ccpo.types import CreditInputs, CreditOutputs

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WINDOW = 0.1
"""Share of the steps that counts as early, and as late."""
RIGHT = 0.5
"""A rollout with at least this reward counts as right."""


class Recorder:
    """A credit rule that behaves as ``rule`` and keeps each step's rewards ``[P, N]`` and credit ``[P, N]`` by agent."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.steps: list[tuple[Tensor, Mapping[str, Tensor]]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "rule":  # not there yet: a copy that is being made
            raise AttributeError(name)
        return getattr(self.rule, name)

    def __call__(self, inputs: CreditInputs, state: Any) -> tuple[CreditOutputs, Any]:
        outputs, state = self.rule(inputs, state)
        self.steps.append((inputs.reward_PN.detach(), {a: c.detach() for a, c in outputs.credit.items()}))
        return outputs, state

    def boxes(self) -> dict[str, dict[str, dict[str, Any]]]:
        """``{"early"|"late": {agent: {"right"|"wrong": {"n", "mean", "q"}}}}``, q the quantiles QUANTILES. An agent that was not
        trained in those steps, or a side without rollouts, is absent."""
        width = max(1, round(len(self.steps) * WINDOW))
        return boxes_of(self.steps[:width], self.steps[-width:])


Paid = Sequence[tuple[Tensor, Mapping[str, Tensor]]]
"""Of each step its rewards ``[P, N]`` and by agent its credit ``[P, N]``."""


def boxes_of(early: Paid, late: Paid) -> dict[str, dict[str, dict[str, Any]]]:
    """The boxes of early and of late steps, see :meth:`Recorder.boxes`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for when, steps in (("early", early), ("late", late)):
        agents = dict.fromkeys(agent for _, credit in steps for agent in credit)
        found[when] = {agent: sides for agent in agents if (sides := _sides(agent, steps))}
    return found


def _sides(agent: str, steps: Paid) -> dict[str, Any]:
    paid = [(reward_PN.flatten(), credit[agent].flatten()) for reward_PN, credit in steps if agent in credit]
    reward_B = torch.cat([r for r, _ in paid]).double()
    credit_B = torch.cat([c for _, c in paid]).double()
    right_B = reward_B >= RIGHT
    return {
        side: {
            "n": int(of_side_B.sum()),
            "mean": round(credit_B[of_side_B].mean().item(), 4),
            "q": [round(x, 4) for x in torch.quantile(credit_B[of_side_B], torch.tensor(QUANTILES).double()).tolist()],
        }
        for side, of_side_B in (("right", right_B), ("wrong", ~right_B))
        if of_side_B.any()
    }
