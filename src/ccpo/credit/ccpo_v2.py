"""CCPO v2: the team's reward, and a small bonus where the thinker made the difference (arXiv 2603.21563v2).

Why it exists: it is the paper's second form. It needs no history and no squashing; it is meant for the estimator that
takes the group's mean away and does not divide (``dr_grpo``) and for the sequence ratio (``gspo``).

Read with care: with binary rewards and the mean solo reward, the bonus is one number per problem times an indicator
of ``R``, so the credit is an increasing function of ``R`` within a group. Under ``grpo`` the advantage is then
that of shared reward, exactly; under ``dr_grpo`` it is 1.1 times that.

Deviations: rewards with partial credit take the difference bonus unless told otherwise; any number of agents: all but
the sole decider get the bonus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ccpo.credit.base import (
    Memoryless,
    State,
    check_rewards,
    mean_credit,
    number_in,
    one_of,
    r_without,
    single_removals,
)
from ccpo.credit.removal import Pairing
from ccpo.types import Coalition, CreditInputs, CreditOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class CCPOv2(Memoryless):
    """``S + weight * bonus`` for those who help, ``S`` for the sole decider, with ``S = 2R - 1`` (arXiv 2603.21563v2).

    ``bonus="event"``: ``[S>0 and solo<0] - [S<0 and solo>0]``; ``"difference"``: ``(S - solo) / 2``; ``"auto"``:
    event as long as every joint reward seen has been 0 or 1. ``solo = 2 R_without - 1`` by the "mean" of the draws
    ("cached": draws may be from earlier steps), or "paired". Credit is ``[P, N]``, in units of half the reward's
    range.
    """

    weight: float = 0.2
    solo: str = Pairing.MEAN.value
    bonus: str = "auto"

    def __post_init__(self) -> None:
        one_of("credit.solo", self.solo, list(Pairing))
        one_of("credit.bonus", self.bonus, ["auto", "event", "difference"])
        number_in("credit.weight", self.weight, 0.0, 1e6)

    @property
    def pairing(self) -> str:
        return self.solo

    def needs(self, agents: tuple[str, ...], decider: str | None, active: tuple[str, ...]) -> frozenset[Coalition]:
        return single_removals(decider, active)

    def start(self) -> State:
        return {"partial_credit_seen": False}

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        signed_PN = 2 * inputs.reward_PN - 1
        partial = bool(state.get("partial_credit_seen", False)) or not _is_binary(inputs.reward_PN)
        kind = self.bonus if self.bonus != "auto" else "difference" if partial else "event"
        bonus = {
            agent: _BONUSES[kind](signed_PN, 2 * r_without(inputs, (agent,), self.solo) - 1)
            for agent in inputs.active
            if agent != inputs.decider
        }
        credit = {a: signed_PN + self.weight * bonus[a] if a in bonus else signed_PN for a in inputs.active}
        metrics = mean_credit(credit) | {f"credit/{a}/bonus": b.double().mean().item() for a, b in bonus.items()}
        return CreditOutputs(credit=credit, metrics=metrics), {**state, "partial_credit_seen": partial}


def event_bonus(signed_PN: Tensor, solo_PN: Tensor) -> Tensor:
    """+1 where the team is right and would be wrong without the agent, -1 the other way round, else 0; ``[P, N]``."""
    saved_PN = (signed_PN > 0) & (solo_PN < 0)
    spoiled_PN = (signed_PN < 0) & (solo_PN > 0)
    return saved_PN.to(signed_PN) - spoiled_PN.to(signed_PN)


def difference_bonus(signed_PN: Tensor, solo_PN: Tensor) -> Tensor:
    """``(S - solo) / 2 = R - R_without``, in [-1, 1]; ``[P, N]``."""
    return (signed_PN - solo_PN) / 2


def _is_binary(reward_PN: Tensor) -> bool:
    return bool(((reward_PN == 0) | (reward_PN == 1)).all())


_BONUSES = {"event": event_bonus, "difference": difference_bonus}
