"""Own correctness: an agent that gave an answer is paid for that answer.

Why it exists: in voting it is the strong rival of removal credit (its gradient has less noise), but it is another
objective: it trains voters to be right, not to be useful to the vote. It needs no counterfactual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ccpo.credit.base import Memoryless, State, check_rewards, mean_credit
from ccpo.types import CreditInputs, CreditOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCorrectness(Memoryless):
    """``credit[k] = score[k]`` where agent ``k`` has an answer of its own, else ``R``; ``[P, N]``, in units of reward.

    Raises ValueError where a score's shape is not that of the rewards.
    """

    pairing: ClassVar[str | None] = None

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        credit = {agent: inputs.score.get(agent, inputs.reward_PN).to(inputs.reward_PN) for agent in inputs.active}
        for agent, credit_PN in credit.items():
            if credit_PN.shape != inputs.reward_PN.shape:
                raise ValueError(
                    f"score of {agent!r} is [P, N] = {tuple(inputs.reward_PN.shape)}; got {tuple(credit_PN.shape)}"
                )
        return CreditOutputs(credit=credit, metrics=mean_credit(credit)), dict(state)
