"""Raw removal credit: each agent is paid its marginal contribution, and nothing else is done to it.

Why it exists: it is the unbiased core of counterfactual credit (arXiv 2603.21563, Lemma A.1), without history or
shaping. In voting it costs no token and cuts the gradient's variance 2.5 to 5 times against shared reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ccpo.credit.base import Memoryless, State, check_rewards, mean_credit, one_of, r_without, single_removals
from ccpo.credit.removal import Pairing, marginal
from ccpo.types import Coalition, CreditInputs, CreditOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalCredit(Memoryless):
    """``credit[k] = R - R_without[k]`` (marginal contribution, arXiv 2603.21563).

    The sole decider's removal pays 0, so its credit is ``R``. ``pairing``: see :class:`~ccpo.credit.removal.Pairing`;
    "mean" by default, the reading with the least noise. Credit is in units of reward, in [-1, 1].
    """

    pairing: str = Pairing.MEAN.value

    def __post_init__(self) -> None:
        one_of("credit.pairing", self.pairing, list(Pairing))

    def needs(self, agents: tuple[str, ...], decider: str | None, active: tuple[str, ...]) -> frozenset[Coalition]:
        return single_removals(decider, active)

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        credit = {a: marginal(inputs.reward_PN, r_without(inputs, (a,), self.pairing)) for a in inputs.active}
        return CreditOutputs(credit=credit, metrics=mean_credit(credit)), dict(state)
