"""Shared reward: every agent is paid the team's reward.

Why it exists: it is the baseline that any credit rule must beat (known as MAGRPO; ReMA is the same credit with agents
trained in turn and a turn-level ratio). It needs no counterfactual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ccpo.credit.base import Memoryless, State, check_rewards, mean_credit
from ccpo.types import CreditInputs, CreditOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedReward(Memoryless):
    """``credit[k] = R`` for every agent ``k``, ``[P, N]``, in units of reward."""

    pairing: ClassVar[str | None] = None

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        credit = dict.fromkeys(inputs.active, inputs.reward_PN)
        return CreditOutputs(credit=credit, metrics=mean_credit(credit)), dict(state)
