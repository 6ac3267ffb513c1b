"""What a credit rule is, and the few steps that every rule shares.

A new rule is one file with a frozen dataclass and one line in ``ccpo.credit.RULES``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ccpo.credit.removal import paired_or_mean
from ccpo.errors import UserError, nearest
from ccpo.types import Coalition, CreditInputs, CreditOutputs, TreePlace

State = dict[str, Any]
"""What a rule remembers between batches: plain JSON, part of the checkpoint."""


class CreditRule(Protocol):
    """Pays each agent of a team for a batch of rollouts.

    A rule is a frozen dataclass whose fields are its settings. It is used in three steps:

    1. ``needs`` names the coalitions whose removal it must see to pay the *active* agents: nothing else is decoded.
       A coalition without the sole decider is never asked for: a team that nobody answers for is paid 0.
    2. ``start`` is the state before the first batch, a JSON-able dict (``{}`` for a rule without memory).
    3. ``rule(inputs, state)`` returns the credit of every active agent ``[P, N]`` and the next state. It is pure:
       neither ``inputs`` nor ``state`` is changed, and statistics carry no gradient. With several processes
       ``inputs`` hold the global batch, so that each process computes the same credit and the same state.

    Attributes a rule may have: ``estimator``, what ``advantage: auto`` means for it ("grpo" where absent); ``branch``, the tree
    of rollouts it wants where the recipe names none; ``swaps``, that it reads ``inputs.swap``; ``rates``, that it reads
    ``inputs.shares``. A credit that differs between an agent's turns goes into ``turn_credit``.
    A rule whose wishes change from batch to batch has ``needs_at`` beside ``needs``; whoever samples asks by :func:`needed`. It is
    given the state that the call will be given too, so that the rule, which is pure, finds in the call what it asked for (orders drawn
    from a counter of batches, say), and so does a resumed run. It is also told whether removals are ``free``: none decodes anything.

    ``pairing`` says how draws meet rollouts (:class:`~ccpo.credit.removal.Pairing`): "paired" wants as many draws of a
    problem as joint rollouts, "mean" any number, "cached" may be served from earlier steps; None needs no draws.

    A rule with ``rates = True`` is given every agent's rating of every rollout (``inputs.shares``). Its ``max_tokens``, ``strict``
    and ``prompt`` say how they are asked for, as those of :class:`~ccpo.credit.self_eval.SelfEval`.
    """

    @property
    def pairing(self) -> str | None: ...

    def needs(self, agents: tuple[str, ...], decider: str | None, active: tuple[str, ...]) -> frozenset[Coalition]: ...

    def start(self) -> State: ...

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]: ...


def needed(
    rule: CreditRule,
    agents: tuple[str, ...],
    decider: str | None,
    active: tuple[str, ...],
    state: Mapping[str, Any],
    *,
    free: bool,
) -> frozenset[Coalition]:
    """The coalitions that ``rule`` must see removed in the batch that it will be called for with ``state``: its ``needs_at``, or
    where it has none its ``needs``. ``free``: no agent's removal decodes anything, so that looking at all costs no token."""
    needs_at = getattr(rule, "needs_at", None)
    if needs_at is None:
        return rule.needs(agents, decider, active)
    return needs_at(agents, decider, active, state, free=free)


class Memoryless:
    """For rules that remember nothing and decode nothing; a rule overrides what differs."""

    __slots__ = ()

    def needs(self, agents: tuple[str, ...], decider: str | None, active: tuple[str, ...]) -> frozenset[Coalition]:
        return frozenset()

    def start(self) -> State:
        return {}


def single_removals(decider: str | None, active: Iterable[str]) -> frozenset[Coalition]:
    """``(agent,)`` for each active agent, but not the sole decider: without it there is no answer to decode."""
    return frozenset((agent,) for agent in active if agent != decider)


def others(agents: Iterable[str], agent: str) -> Coalition:
    """The coalition whose removal leaves ``agent`` alone."""
    return tuple(sorted(a for a in agents if a != agent))


def draws(inputs: CreditInputs, coalition: Coalition) -> Tensor:
    """The counterfactual rewards ``[P, 1 or N, M]`` of a coalition. Raises ValueError where they were not drawn, or are
    not of the joint rewards' problems."""
    if coalition not in inputs.without:
        raise ValueError(f"the rule needs the rewards without {coalition}; given: {sorted(inputs.without)}")
    without_PXM = inputs.without[coalition]
    if without_PXM.dim() != 3 or without_PXM.shape[0] != inputs.reward_PN.shape[0]:
        raise ValueError(
            f"rewards without {coalition} are [P, 1 or N, M] with P = {inputs.reward_PN.shape[0]}; "
            f"got {tuple(without_PXM.shape)}"
        )
    return without_PXM.to(inputs.reward_PN)


def r_without(inputs: CreditInputs, coalition: Coalition, pairing: str) -> Tensor:
    """``R_without`` ``[P, N]`` of a coalition: 0 where the sole decider is in it, else from the draws."""
    if inputs.decider in coalition:
        return torch.zeros_like(inputs.reward_PN)
    return paired_or_mean(draws(inputs, coalition), inputs.reward_PN.shape[1], pairing)


def check_rewards(inputs: CreditInputs) -> None:
    """Raises ValueError unless the joint rewards are ``[P, N]``, floating point and finite."""
    reward_PN = inputs.reward_PN
    if reward_PN.dim() != 2 or not reward_PN.is_floating_point() or not _finite(reward_PN):
        raise ValueError(f"reward_PN must be finite floats [P, N]; got {reward_PN.dtype} {tuple(reward_PN.shape)}")


def _finite(values: Tensor) -> bool:
    """Whether all are: where a sum is finite its terms are, and where large ones are too much for the quick sum, one in 64 bits tells."""
    return math.isfinite(values.sum().item()) or math.isfinite(values.sum(dtype=torch.float64).item())


def mean_credit(credit: Mapping[str, Tensor]) -> dict[str, float]:
    """``credit/AGENT/mean`` of each agent."""
    return {f"credit/{agent}/mean": credit_PN.mean().item() for agent, credit_PN in credit.items()}


def one_of(key: str, value: object, allowed: Collection[str]) -> None:
    """Raises UserError unless ``value`` is one of the ``allowed`` words."""
    if value not in allowed:
        raise UserError(f"{key} is one of {', '.join(allowed)}; found {value!r}.{nearest(str(value), allowed)}")


def number_in(key: str, value: object, low: float, high: float) -> None:
    """Raises UserError unless ``value`` is a number with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{key} is a number from {low:g} to {high:g}; found {value!r}")


def turn_places(inputs: CreditInputs, agent: str) -> dict[str, TreePlace]:
    """Where each turn of ``agent`` stands in the tree of rollouts; for rollouts that share nothing, one text a rollout.

    Raises ValueError where a place does not hold N rollouts.
    """
    N = inputs.reward_PN.shape[1]
    plain = TreePlace(contexts=1, siblings=N, plays=1)
    found = {turn: inputs.tree.get(turn, plain) for turn in inputs.turns.get(agent, (agent,))}
    for turn, place in found.items():
        if place.contexts * place.siblings * place.plays != N:
            raise ValueError(f"turn {turn!r} stands at {place}, which are not N = {N} rollouts")
    return found
