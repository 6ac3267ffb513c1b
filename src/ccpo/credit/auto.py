"""Auto: the credit with the least noise that the team's graph offers, and no bias.

Why it exists: shared reward tells an agent how the whole team fared, so that its gradient carries the luck of everybody else.
Much of that luck can be averaged out or subtracted without a single extra token, because the graph says who can have heard whom:

1. A ballot that nobody read is independent of the other ballots of its context. Its worth is the vote's mean reward over all mixtures of
   those (``inputs.swap``), instead of the one vote it happened to be cast in.
2. A text that is played on several times (a tree of rollouts) is worth the mean of its plays.
3. What is left is held against what the text had no part in: the mean of other texts of the same context (siblings), of other contexts
   (the group), for a ballot the vote without it (removal; ``inputs.silent``), and, if ``pairing`` asks for them, the mean of
   counterfactual plays without the agent. Each weighs by the inverse of its expected squared error, which follows from the
   variances seen in earlier batches.

In all three what is averaged or subtracted does not depend on the text that is paid, given its context: with ``scale: none`` the
expected gradient is that of shared reward, and a scale changes how much each problem counts, as it does for shared reward.
The idea under 1 is Rao and Blackwell's; that under 3 is replay credit's (C3, arXiv 2603.06859) where contexts differ much, and
leave-one-out's (RLOO, arXiv 2402.14740) where they do not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ccpo.credit.base import (
    Memoryless,
    State,
    check_rewards,
    draws,
    mean_credit,
    number_in,
    one_of,
    single_removals,
    turn_places,
)
from ccpo.credit.nested import (
    baseline_errors,
    group_mean,
    inverse_weights,
    node_values,
    node_variances,
    sibling_mean,
    spread_out,
)
from ccpo.credit.removal import Pairing
from ccpo.errors import UserError
from ccpo.types import Coalition, CreditInputs, CreditOutputs, TreePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoCredit(Memoryless):
    """``Q[text] - sum of w_i b_i`` over the baselines b_i; ``[P, N]``, in units of reward (``scale: none``).

    ``scale`` weighs problems by how undecided they are. With ``m`` the problem's mean reward, of a ballot over all mixtures: ``mean`` divides
    by ``m``, as MaxRL does (arXiv 2602.02710: the gradient of the logarithm of success); ``deviation`` by ``sqrt(m (1 - m))``, the deviation
    of a reward of 0 or 1, as GRPO does with its estimate from N samples; ``none`` by nothing; ``auto`` is ``deviation`` for
    ballots and ``mean`` for other texts, which is what learned fastest (docs/log.md).
    ``decay`` is that of the variances behind the weights, read as they were before the batch. ``pairing``: null, or "mean" or "cached" for
    counterfactual plays as a further baseline (:class:`~ccpo.credit.removal.Pairing`), the one that costs tokens unless it is cached.

    Raises UserError where a trained agent's text has nothing to be compared with (one rollout a problem, and no vote).
    """

    scale: str = "auto"
    decay: float = 0.9
    pairing: str | None = None

    estimator: ClassVar[str] = "none"
    branch: ClassVar[str] = "auto"
    swaps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("credit.scale", self.scale, ["auto", "deviation", "mean", "none"])
        number_in("credit.decay", self.decay, 0.0, 1.0)
        if self.pairing is not None:
            one_of("credit.pairing", self.pairing, [Pairing.MEAN.value, Pairing.CACHED.value])

    def needs(self, agents: tuple[str, ...], decider: str | None, active: tuple[str, ...]) -> frozenset[Coalition]:
        return frozenset() if self.pairing is None else single_removals(decider, active)

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        after = dict(state)
        credit, turn_credit, metrics = {}, {}, {}
        for agent in inputs.active:
            places = turn_places(inputs, agent)
            for turn, place in places.items():
                worth_PN = _worth(inputs, turn)
                value_PCS = node_values(worth_PN, place)
                removed = self._removed(inputs, agent, turn, place)
                weights = _weights(place, _read(state.get(turn)), removed)
                credit_PCS = value_PCS - _baseline(value_PCS, removed, weights)
                turn_credit[turn] = self._scaled(
                    spread_out(credit_PCS, place), worth_PN, is_ballot=turn in inputs.silent
                )
                after[turn] = _fold(state.get(turn), _seen(value_PCS, removed), self.decay)
                metrics |= {f"credit/{agent}/{turn}_{name}_weight": weight for name, weight in weights.items()}
            credit[agent] = sum(turn_credit[turn] for turn in places) / len(places)
        return CreditOutputs(credit=credit, turn_credit=turn_credit, metrics=metrics | mean_credit(credit)), after

    def _removed(self, inputs: CreditInputs, agent: str, turn: str, place: TreePlace) -> dict[str, Tensor]:
        """What the team is worth without the text, ``[P, C or 1, 1]``, by how it was found out: "removal" is the vote without the ballot,
        "without" the mean of counterfactual plays without the agent. Only what there is."""
        silent_PNS = inputs.silent.get(turn)
        if silent_PNS is not None:
            return {"removal": node_values(silent_PNS.to(inputs.reward_PN).mean(2), place).mean(2, keepdim=True)}
        if self.pairing is not None and agent != inputs.decider:
            return {"without": draws(inputs, (agent,)).mean((1, 2))[:, None, None]}
        return {}

    def _scaled(self, credit_PN: Tensor, worth_PN: Tensor, *, is_ballot: bool) -> Tensor:
        scale = self.scale if self.scale != "auto" else "deviation" if is_ballot else "mean"
        if scale == "none":
            return credit_PN
        mean_P1 = worth_PN.double().mean(1, keepdim=True)
        unit_P1 = (mean_P1 * (1 - mean_P1)).clamp(min=0).sqrt() if scale == "deviation" else mean_P1
        flat_P1 = unit_P1 < 1e-9
        return torch.where(flat_P1, 0.0, credit_PN / torch.where(flat_P1, 1.0, unit_P1)).to(credit_PN.dtype)


def _worth(inputs: CreditInputs, turn: str) -> Tensor:
    """What the text of each rollout is worth, ``[P, N]``: over all votes that its ballot could have met, else as it was played."""
    swap_PNS = inputs.swap.get(turn)
    return inputs.reward_PN if swap_PNS is None else swap_PNS.to(inputs.reward_PN).mean(2)


def _weights(place: TreePlace, known: Mapping[str, float], removed: Collection[str]) -> dict[str, float]:
    errors = baseline_errors(place, known["within"], known["between"]) | {name: known[name] for name in removed}
    if not errors:
        raise UserError(
            "credit 'auto' holds a rollout against the others of its problem, and there is one a problem: set "
            "rollout.samples to 2 or more"
        )
    return inverse_weights(errors)


def _baseline(value_PCS: Tensor, removed: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    guesses = {"siblings": lambda: sibling_mean(value_PCS), "group": lambda: group_mean(value_PCS)}
    return sum(  # type: ignore[return-value]
        weight * (removed[name] if name in removed else guesses[name]()) for name, weight in weights.items()
    )


def _seen(value_PCS: Tensor, removed: Mapping[str, Tensor]) -> dict[str, float]:
    """This batch's unbiased estimates, of what its layout can tell: the variances of node values within and between contexts, and the
    squared error of what the team is worth without a text as a guess of its context's mean worth."""
    within, between = node_variances(value_PCS)
    seen = {"within": within, "between": between}
    if within is not None:
        context_PC1 = value_PCS.mean(2, keepdim=True)
        for name, guess in removed.items():
            gap = (context_PC1 - guess).double().square().mean().item()
            seen[name] = max(0.0, gap - within / value_PCS.shape[2])
    return {name: value for name, value in seen.items() if value is not None}


def _read(stored: Mapping[str, float] | None) -> dict[str, float]:
    """What is known of a turn; before anything was seen, as if everything mattered alike."""
    return {"within": 1.0, "between": 1.0, "removal": 1.0, "without": 1.0} | {
        name: float(value) for name, value in (stored or {}).items()
    }


def _fold(stored: Mapping[str, float] | None, seen: Mapping[str, float], decay: float) -> dict[str, float]:
    """The moving variances after one more batch; what the batch's layout cannot tell stays as it was."""
    kept = dict(stored or {})
    for name, value in seen.items():
        kept[name] = decay * kept[name] + (1 - decay) * value if name in kept else value
    return kept
