"""Auto: the credit with the least noise that the team's graph offers, and no bias.

Why it exists: shared reward tells an agent how the whole team fared, so that its gradient carries the luck of everybody else.
Much of that luck can be averaged out or subtracted without a single extra token, because the graph says who can have heard whom:

1. A ballot that nobody read is independent of the other ballots of its context. Its worth is the vote's mean reward with the ballot put
   into each sibling rollout (``inputs.swap``), instead of the one vote it happened to be cast in.
2. A text that is played on several times (a tree of rollouts) is worth the mean of its plays.
3. What is left is held against the mean of other texts: of the same context (siblings) and of other contexts (the group), weighted by
   their expected errors, which follow from the variances seen so far.

In all three what is averaged or subtracted does not depend on the text that is paid, given its context: the expected
gradient is that of shared reward. The idea under 1 is Rao and Blackwell's; that under 3 is replay credit's (C3, arXiv 2603.06859) where contexts
differ much, and leave-one-out's (RLOO, arXiv 2402.14740) where they do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ccpo.credit.base import (
    Memoryless,
    State,
    check_rewards,
    mean_credit,
    number_in,
    one_of,
    turn_places,
)
from ccpo.credit.nested import (
    group_mean,
    node_values,
    node_variances,
    sibling_mean,
    sibling_weight,
    spread_out,
)
from ccpo.errors import UserError
from ccpo.types import CreditInputs, CreditOutputs, TreePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoCredit(Memoryless):
    """``Q[text] - w * siblings - (1 - w) * group``; ``[P, N]``, in units of reward (``scale: none``).

    ``scale: group`` divides by the unbiased deviation of the problem's joint rewards, as GRPO does, which weighs problems by how
    undecided they are. ``decay`` is that of the variances behind ``w``, read as they were before the batch.

    Raises UserError where a trained agent's text has nothing to be compared with (one rollout a problem).
    """

    scale: str = "group"
    decay: float = 0.9

    pairing: ClassVar[str | None] = None
    estimator: ClassVar[str] = "none"
    branch: ClassVar[str] = "auto"
    swaps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("credit.scale", self.scale, ["group", "none"])
        number_in("credit.decay", self.decay, 0.0, 1.0)

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        after = dict(state)
        credit, turn_credit, metrics = {}, {}, {}
        for agent in inputs.active:
            places = turn_places(inputs, agent)
            for turn, place in places.items():
                value_PCS = self._worth(inputs, turn, place)
                within, between = _read(state.get(turn))
                weight = sibling_weight(place, within, between)
                credit_PN = spread_out(value_PCS - _baseline(value_PCS, place, weight), place)
                turn_credit[turn] = self._scaled(credit_PN, inputs.reward_PN)
                after[turn] = _fold(state.get(turn), node_variances(value_PCS), self.decay)
                metrics |= {f"credit/{agent}/{turn}_sibling_weight": weight, f"credit/{agent}/{turn}_within": within}
            credit[agent] = sum(turn_credit[turn] for turn in places) / len(places)
        return CreditOutputs(credit=credit, turn_credit=turn_credit, metrics=metrics | mean_credit(credit)), after

    def _worth(self, inputs: CreditInputs, turn: str, place: TreePlace) -> Tensor:
        """What each text is worth, ``[P, C, S]``: over all plays of it, and over all votes that its ballot could have met."""
        swap_PNS = inputs.swap.get(turn)
        reward_PN = inputs.reward_PN if swap_PNS is None else swap_PNS.to(inputs.reward_PN).mean(2)
        return node_values(reward_PN, place)

    def _scaled(self, credit_PN: Tensor, reward_PN: Tensor) -> Tensor:
        if self.scale == "none":
            return credit_PN
        deviation_P1 = reward_PN.double().std(1, keepdim=True)
        flat_P1 = deviation_P1 < 1e-9
        return torch.where(flat_P1, 0.0, credit_PN / torch.where(flat_P1, 1.0, deviation_P1)).to(credit_PN.dtype)


def _baseline(value_PCS: Tensor, place: TreePlace, weight: float) -> Tensor:
    if place.siblings < 2 and place.contexts < 2:
        raise UserError(
            "credit 'auto' holds a rollout against the others of its problem, and there is one a problem: set rollout.samples to 2 or more"
        )
    baseline_PCS = torch.zeros_like(value_PCS)
    if weight > 0:
        baseline_PCS = baseline_PCS + weight * sibling_mean(value_PCS)
    if weight < 1:
        baseline_PCS = baseline_PCS + (1 - weight) * group_mean(value_PCS)
    return baseline_PCS


def _read(stored: Mapping[str, float] | None) -> tuple[float, float]:
    """(within, between); before anything was seen, as if texts and contexts mattered alike."""
    return (1.0, 1.0) if stored is None else (float(stored["within"]), float(stored["between"]))


def _fold(
    stored: Mapping[str, float] | None, seen: tuple[float | None, float | None], decay: float
) -> dict[str, float]:
    """The moving variances after one more batch; what the batch's layout cannot tell stays as it was."""
    keep = decay if stored is not None else 0.0
    before = _read(stored)
    folded = [old if new is None else keep * old + (1 - keep) * new for old, new in zip(before, seen, strict=True)]
    return {"within": folded[0], "between": folded[1]}
