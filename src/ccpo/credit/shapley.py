"""Shapley value: the team's reward, split among its agents by what each adds to every part of the team.

Why it exists: removal asks what the team loses without one agent, so two agents that could stand in for each other are
both paid nothing. Shapley asks what an agent adds to every smaller team it could join, and is the only split that always
sums to the reward, pays equals equally, pays those who change nothing 0, and adds over games (Shapley, 1953)::

    phi[k] = sum over S without k of |S|! (K - |S| - 1)! / K! * (v(S + k) - v(S))

``v(S)`` is the reward of the team that consists of S: ``R`` for the whole team, ``R_without`` its absentees for a part of it,
0 where nobody is left to answer. The same by permutations: agents enter one by one in a random order, and each is paid
what its entry changes; the mean over all K! orders is ``phi``, the mean over a few is an unbiased estimate of it.

Read with care: this is another objective than the team's reward. An agent's gradient is that of the reward averaged over
the teams it could be in, every size alike; in voting that lies between removal (the whole team) and own correctness (alone).

A majority vote in which a and b are right and c is wrong; one against one is a tie and pays 1/2:

>>> pays = {(): 1, ("c",): 1, ("a",): 0.5, ("b",): 0.5, ("b", "c"): 1, ("a", "c"): 1, ("a", "b"): 0}
>>> value = {removed: torch.tensor([[float(reward)]]) for removed, reward in pays.items()}
>>> {agent: round(phi.item(), 3) for agent, phi in shapley_exact(value, ("a", "b", "c")).items()}
{'a': 0.583, 'b': 0.583, 'c': -0.167}
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from ccpo.credit.base import State, check_rewards, mean_credit, one_of, r_without
from ccpo.credit.removal import Pairing
from ccpo.errors import UserError
from ccpo.types import Coalition, CreditInputs, CreditOutputs

Order = tuple[str, ...]
"""Agents in the order in which they enter the team."""

DECODED = 4  # agents up to which "auto" looks at all coalitions where removals cost tokens,
FREE = 10  # where they cost none,
MOST = 12  # and up to which they can be asked for at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapley:
    """``credit[k]`` is agent k's Shapley value in the game over the team's agents, in units of reward (Shapley, 1953).

    ``method``: "exact" by all ``2^K - 2`` coalitions, "sampled" by ``permutations`` random orders, drawn anew at every step;
    "auto" is exact up to K = 4, and up to K = 10 where no removal decodes anything (voting), else sampled. ``antithetic``:
    every second order is the reverse of the one before it. That takes noise away where one agent can stand in for all others (who
    comes first in one order comes last in the other), and adds some in a majority vote (the same one tips both). ``seed`` is that
    of the orders. Memory: ``step``, the batches seen, from which the orders follow.

    The draws of a coalition are averaged. A team of nobody, or without its sole decider, is worth 0 under every way of removal.
    Metrics: ``credit/AGENT/shapley_error``, the root mean square over rollouts of the credit's standard error; absent where exact.

    Raises :class:`~ccpo.errors.UserError` for settings out of range, and for "exact" with more than 12 agents.
    """

    method: str = "auto"
    permutations: int = 8
    antithetic: bool = False
    seed: int = 0
    pairing: ClassVar[str] = Pairing.MEAN.value

    def __post_init__(self) -> None:
        one_of("credit.method", self.method, ["auto", "exact", "sampled"])
        least = 4 if self.antithetic else 2
        if type(self.permutations) is not int or self.permutations < least or self.permutations % (least // 2):
            kind = (
                "an even number of at least 4 (pairs of an order and its reverse)" if self.antithetic else "at least 2"
            )
            raise UserError(
                f"credit.permutations is {self.permutations!r}; it is {kind}: with fewer there is no standard error"
            )

    def needs(self, agents: tuple[str, ...], decider: str | None, active: tuple[str, ...]) -> frozenset[Coalition]:
        return self.needs_at(agents, decider, active, self.start(), free=False)

    def needs_at(
        self,
        agents: tuple[str, ...],
        decider: str | None,
        active: tuple[str, ...],
        state: Mapping[str, Any],
        *,
        free: bool,
    ) -> frozenset[Coalition]:
        """The coalitions of this batch: all, or those that this batch's orders pass through."""
        if not active:
            return frozenset()
        if self._is_exact(len(agents), free):
            return coalitions(agents, decider)
        return passed_through(agents, self._orders(agents, state)) & coalitions(agents, decider)

    def start(self) -> State:
        return {"step": 0}

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        after = {**state, "step": _step(state) + 1}
        if not inputs.active:
            return CreditOutputs(credit={}), after
        agents, every = inputs.agents, coalitions(inputs.agents, inputs.decider)
        if self.method == "exact" or (self.method == "auto" and every <= inputs.without.keys()):
            value = {removed: _value(inputs, removed) for removed in _subsets(agents)}
            phi, error = shapley_exact(value, agents), {}
        else:
            orders = self._orders(agents, state)
            value = {removed: _value(inputs, removed) for removed in passed_through(agents, orders)}
            phi, error = shapley_permutations(value, agents, orders, antithetic=self.antithetic)
        credit = {agent: phi[agent] for agent in inputs.active}
        metrics = mean_credit(credit) | {
            f"credit/{agent}/shapley_error": error[agent].double().square().mean().sqrt().item()
            for agent in inputs.active
            if agent in error
        }
        return CreditOutputs(credit=credit, metrics=metrics), after

    def _is_exact(self, K: int, free: bool) -> bool:
        if self.method == "exact" and K > MOST:
            raise UserError(
                f"credit.method is 'exact' and the team has {K} agents, which make {2**K - 2} coalitions; "
                f"at most {MOST} agents are counted out: use credit.method: sampled"
            )
        most = FREE if free else DECODED
        return self.method == "exact" or (self.method == "auto" and most >= K)

    def _orders(self, agents: tuple[str, ...], state: Mapping[str, Any]) -> tuple[Order, ...]:
        return draw_orders(agents, self.permutations, f"{self.seed}/{_step(state)}", antithetic=self.antithetic)


def shapley_exact(value: Mapping[Coalition, Tensor], agents: Sequence[str]) -> dict[str, Tensor]:
    """Shapley value of every agent, ``[P, N]``, from all ``2^K`` coalitions (Shapley, 1953).

    ``value[removed]`` is the reward ``[P, N]`` of the team without ``removed`` (sorted names), ``value[()]`` that of the whole team. The
    empty team is worth 0 where it is not given. The values sum to ``value[()]`` minus the empty team's. Raises ValueError where
    another coalition is missing.
    """
    K = len(agents)
    given = _with_nobody(value, agents)
    every = _subsets(agents)
    missing = [removed for removed in every if removed not in given]
    if missing:
        raise ValueError(f"the Shapley value needs the reward without each coalition; missing: {missing}")
    weight_KC = torch.tensor(
        [[_weight(agent in removed, K - len(removed), K) for removed in every] for agent in agents], dtype=torch.float64
    )
    value_CPN = torch.stack([given[removed] for removed in every])
    phi_KPN = torch.tensordot(weight_KC, value_CPN.double(), dims=1).to(value_CPN.dtype)
    return dict(zip(agents, phi_KPN, strict=True))


def _weight(absent: bool, size: int, K: int) -> float:
    """What the value of a team of ``size`` counts for an agent: against it where the agent is ``absent`` and could enter."""
    if absent:
        return -math.factorial(size) * math.factorial(K - size - 1) / math.factorial(K)
    return math.factorial(size - 1) * math.factorial(K - size) / math.factorial(K)


def shapley_permutations(
    value: Mapping[Coalition, Tensor], agents: Sequence[str], orders: Sequence[Order], *, antithetic: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Estimates of the Shapley values and their standard errors, both ``[P, N]`` per agent, from ``orders`` of entry.

    ``phi[k] = mean over orders of v(those before k, and k) - v(those before k)``: unbiased for random orders; the values sum to
    ``v(all) - v(nobody)`` whatever the orders. The standard error is ``std / sqrt(samples)`` over orders; with ``antithetic``
    over pairs of orders, whose mean is one sample. It is that of the value for the rewards at hand and says nothing of
    the rewards' own noise. ``value`` as for :func:`shapley_exact`, with the coalitions of :func:`passed_through` alone.

    Raises ValueError for fewer than two samples, for an order that does not name every agent once, and for a missing coalition.
    """
    size = 2 if antithetic else 1
    if len(orders) < 2 * size or len(orders) % size:
        raise ValueError(f"a standard error needs two samples of {size} order(s) each; got {len(orders)} orders")
    wrong = [order for order in orders if sorted(order) != sorted(agents)]
    if wrong:
        raise ValueError(f"an order names every agent once; got {wrong[0]} of {tuple(agents)}")
    given = _with_nobody(value, agents)
    missing = passed_through(agents, orders) - given.keys()
    if missing:
        raise ValueError(f"these orders need the reward without each coalition they pass; missing: {sorted(missing)}")
    entries: dict[str, list[Tensor]] = {agent: [] for agent in agents}
    for order in orders:
        path = [given[_absent(agents, order[:n])] for n in range(len(order) + 1)]
        for agent, before_PN, after_PN in zip(order, path, path[1:], strict=False):
            entries[agent].append(after_PN - before_PN)
    phi, error = {}, {}
    for agent, deltas in entries.items():
        sample_SPN = torch.stack(deltas).unflatten(0, (-1, size)).mean(1)
        phi[agent] = sample_SPN.mean(0)
        error[agent] = sample_SPN.std(0) / math.sqrt(len(sample_SPN))
    return phi, error


def passed_through(agents: Sequence[str], orders: Sequence[Order]) -> frozenset[Coalition]:
    """The coalitions that are absent on the way from nobody to the whole team, both ends included."""
    return frozenset(_absent(agents, order[:n]) for order in orders for n in range(len(order) + 1))


def draw_orders(agents: Sequence[str], count: int, seed: str, *, antithetic: bool = False) -> tuple[Order, ...]:
    """``count`` random orders of the agents, a function of the arguments alone; with ``antithetic`` each second one is the
    reverse of the one before it."""
    generator = random.Random(seed)
    orders: list[Order] = []
    while len(orders) < count:
        order = tuple(generator.sample(list(agents), len(agents)))
        orders += [order, order[::-1]] if antithetic else [order]
    return tuple(orders[:count])


def coalitions(agents: Sequence[str], decider: str | None) -> frozenset[Coalition]:
    """All coalitions whose removal takes somebody away and leaves somebody, the sole decider among them."""
    return frozenset(c for c in _subsets(agents) if 0 < len(c) < len(agents) and decider not in c)


def _subsets(agents: Sequence[str]) -> list[Coalition]:
    names = sorted(agents)
    return [removed for size in range(len(names) + 1) for removed in combinations(names, size)]


def _absent(agents: Sequence[str], present: Sequence[str]) -> Coalition:
    return tuple(sorted(set(agents).difference(present)))


def _with_nobody(value: Mapping[Coalition, Tensor], agents: Sequence[str]) -> Mapping[Coalition, Tensor]:
    if () not in value:
        raise ValueError("the Shapley value needs the whole team's reward, value[()]")
    return {_absent(agents, ()): torch.zeros_like(value[()]), **value}


def _value(inputs: CreditInputs, removed: Coalition) -> Tensor:
    """The reward without ``removed``: a team of nobody, or without its sole decider, is worth 0."""
    if not removed:
        return inputs.reward_PN
    if len(removed) == len(inputs.agents):
        return torch.zeros_like(inputs.reward_PN)
    return r_without(inputs, removed, Pairing.MEAN)


def _step(state: Mapping[str, Any]) -> int:
    return int(state.get("step", 0))
