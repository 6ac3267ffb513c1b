"""CCPO v1: removal credit measured against its global history (arXiv 2603.21563v1; history: Eq. 2-4).

Why it exists: it is the paper's first form, for Think–Solve and voting. An agent whose words feed another's is paid
the squashed, history-normalised difference that its presence made; the agent that decides is paid by a gate between
how well the team does and how well it does alone, opened by how much the others have helped so far.

With more than two agents: the sole decider gets the gate, with all others removed as its "alone"; all others the
squashed credit. In voting nobody decides and all get the squashed credit.

Deviations from the paper, each off by default:

1. ``gate="trajectory"``: the decider is trained on its joint answers with weight g and on its solo answers with
   weight 1-g, each paid its own z (the paper's text; the authors' code pays the joint answers both terms).
2. ``gate=0.3``: a fixed gate; ``history=False``: signals are not normalised (the gate still follows the history).
3. ``pairing="mean"`` or ``"cached"``: the mean solo reward in the place of the n-th draw.
4. The guard against the collapse of a solved task: ``sigma_floor`` (a lower bound of sigma), ``skip_flat`` (a group
   whose own reward has no spread is paid 0, where a paired draw would only add noise), ``center`` (signals are
   centred by their own batch, where the lagging mean would pay right answers negatively). REINFORCE++ whitens over
   the whole batch and would move a credit of 0: rows of such groups (:func:`~ccpo.credit.removal.has_spread`) are to
   be left out of its batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccpo.credit.base import (
    State,
    check_rewards,
    draws,
    mean_credit,
    number_in,
    one_of,
    others,
    r_without,
    single_removals,
)
from ccpo.credit.history import Ema, fold, is_warm, normalise, sigma, trust
from ccpo.credit.removal import Pairing, has_spread, marginal
from ccpo.errors import UserError
from ccpo.types import Coalition, CreditInputs, CreditOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class CCPOv1:
    """History-normalised counterfactual credit (arXiv 2603.21563v1; history: Eq. 2-4).

    Agents that do not decide: ``tanh(alpha * z_delta)``. The sole decider: ``g * z_joint + (1 - g) * z_solo`` with
    ``g = sigmoid(eta * mu_delta / (sigma_delta + eps))``. Each ``z`` by its own history, see
    :mod:`ccpo.credit.history`. Until ``min_samples`` values were seen: ``delta``, and ``R`` for the decider. Credit
    is ``[P, N]`` and has no unit.

    Raises UserError for a setting out of range, ValueError where the inputs lack a coalition that ``needs`` names.
    """

    alpha: float = 1.0
    eta: float = 1.0
    decay: float = 0.99
    eps: float = 1e-6
    min_samples: int = 10
    gate: str | float = "reward"
    pairing: str = Pairing.PAIRED.value
    history: bool = True
    sigma_floor: float = 0.0
    skip_flat: bool = False
    center: bool = False

    def __post_init__(self) -> None:
        one_of("credit.pairing", self.pairing, list(Pairing))
        if isinstance(self.gate, str):
            one_of("credit.gate (or a number from 0 to 1)", self.gate, ["reward", "trajectory"])
        else:
            number_in("credit.gate", self.gate, 0.0, 1.0)
        number_in("credit.alpha", self.alpha, 0.0, 1e6)
        number_in("credit.eta", self.eta, 0.0, 1e6)
        number_in("credit.decay", self.decay, 0.0, 1.0)
        number_in("credit.eps", self.eps, 1e-30, 1.0)
        number_in("credit.min_samples", self.min_samples, 0, 1e12)
        number_in("credit.sigma_floor", self.sigma_floor, 0.0, 1e6)
        if self.gate == "trajectory" and self.pairing == Pairing.CACHED:
            raise UserError(
                "credit.gate 'trajectory' trains on the solo answers, and a cache keeps only their rewards: "
                "set credit.pairing to 'mean' or 'paired'"
            )

    def needs(self, agents: tuple[str, ...], decider: str | None, active: tuple[str, ...]) -> frozenset[Coalition]:
        coalitions = single_removals(decider, active)
        if decider in active and self._weighs_solo and others(agents, decider):
            coalitions |= {others(agents, decider)}
        return coalitions

    def start(self) -> State:
        return {}

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        for coalition in self.needs(inputs.agents, inputs.decider, inputs.active):
            draws(inputs, coalition)
        before = {name: Ema.from_json(data) for name, data in state.items()}
        signals = self._signals(inputs)
        after = {name: fold(before.get(name, Ema()), values, self.decay) for name, values in signals.items()}
        outputs = self._pay(inputs, signals, before)
        return outputs, {**state, **{name: ema.to_json() for name, ema in after.items()}}

    @property
    def _weighs_solo(self) -> bool:
        return self.gate != 1.0

    def _signals(self, inputs: CreditInputs) -> dict[str, Tensor]:
        """Every signal that this batch can tell, of agents at rest too: their histories stay as fresh as the data."""
        signals: dict[str, Tensor] = {}
        for agent in inputs.agents:
            if agent == inputs.decider:
                signals |= self._decider_signals(inputs, agent)
            elif (agent,) in inputs.without:
                signals[f"{agent}/delta"] = marginal(inputs.reward_PN, r_without(inputs, (agent,), self.pairing))
        return signals

    def _decider_signals(self, inputs: CreditInputs, agent: str) -> dict[str, Tensor]:
        rest = others(inputs.agents, agent)
        if not rest:  # a team of one: alone is the team
            solo_PN = inputs.reward_PN
        elif rest in inputs.without:
            solo_PN = r_without(inputs, rest, self.pairing)
        else:
            # joint and solo are folded from the same batch or not at all, unless solo weighs nothing
            return {} if self._weighs_solo else {f"{agent}/joint": inputs.reward_PN}
        own_answers = self.gate == "trajectory" and bool(rest)
        return {
            f"{agent}/joint": inputs.reward_PN,
            f"{agent}/solo": draws(inputs, rest) if own_answers else solo_PN,
            f"{agent}/delta": marginal(inputs.reward_PN, solo_PN),
        }

    def _pay(self, inputs: CreditInputs, signals: Mapping[str, Tensor], before: Mapping[str, Ema]) -> CreditOutputs:
        decider, reward_PN = inputs.decider, inputs.reward_PN
        credit = {
            agent: self._skip(self._squashed(f"{agent}/delta", signals, before), reward_PN)
            for agent in inputs.active
            if agent != decider
        }
        metrics = self._statistics(signals, before)
        if decider is None:
            return CreditOutputs(credit=credit, metrics=metrics | mean_credit(credit))
        g = self._gate(before.get(f"{decider}/delta", Ema()))
        metrics[f"credit/{decider}/gate"] = g
        if decider not in inputs.active:
            return CreditOutputs(credit=credit, metrics=metrics | mean_credit(credit))
        joint_PN, solo_PXM = self._gated(decider, g, signals, before)
        credit[decider] = self._skip(joint_PN, reward_PN)
        metrics |= mean_credit(credit)
        if solo_PXM is None:
            return CreditOutputs(credit=credit, metrics=metrics)
        draws_PD = signals[f"{decider}/solo"].flatten(1)
        return CreditOutputs(
            credit=credit,
            weight={decider: g},
            solo_credit={decider: self._skip(solo_PXM.flatten(1), draws_PD).view_as(solo_PXM)},
            solo_weight={decider: 1 - g},
            solo_coalition={decider: others(inputs.agents, decider)},
            metrics=metrics,
        )

    def _squashed(self, name: str, signals: Mapping[str, Tensor], before: Mapping[str, Ema]) -> Tensor:
        delta_PN = signals[name]
        if not self._warm(name, before):
            return delta_PN
        return torch.tanh(self.alpha * self._z(name, delta_PN, before))

    def _gated(
        self, agent: str, g: float, signals: Mapping[str, Tensor], before: Mapping[str, Ema]
    ) -> tuple[Tensor, Tensor | None]:
        """The decider's credit for its joint answers, and for its solo answers where those are trained on."""
        joint, solo = f"{agent}/joint", f"{agent}/solo"
        used = (joint, solo) if self._weighs_solo else (joint,)
        if not all(self._warm(name, before) for name in used):
            return signals[joint], None
        z_joint_PN = self._z(joint, signals[joint], before)
        if not self._weighs_solo:
            return z_joint_PN, None
        z_solo = self._z(solo, signals[solo], before)
        if z_solo.dim() == 3:  # draws of its own, not one number for each joint rollout
            return z_joint_PN, z_solo
        return g * z_joint_PN + (1 - g) * z_solo, None

    def _warm(self, name: str, before: Mapping[str, Ema]) -> bool:
        return not self.history or is_warm(before.get(name, Ema()), self.min_samples)

    def _z(self, name: str, values: Tensor, before: Mapping[str, Ema]) -> Tensor:
        if not self.history:
            return values
        ema = before.get(name, Ema())
        return normalise(
            values, ema, eps=self.eps, min_samples=self.min_samples, floor=self.sigma_floor, center=self.center
        )

    def _gate(self, ema: Ema) -> float:
        if isinstance(self.gate, str):
            return trust(ema, eta=self.eta, eps=self.eps, floor=self.sigma_floor)
        return float(self.gate)

    def _skip(self, credit_PN: Tensor, reward_PN: Tensor) -> Tensor:
        if not self.skip_flat:
            return credit_PN
        return torch.where(has_spread(reward_PN)[:, None], credit_PN, torch.zeros_like(credit_PN))

    def _statistics(self, signals: Mapping[str, Tensor], before: Mapping[str, Ema]) -> dict[str, float]:
        """The statistics that this batch was normalised with."""
        metrics: dict[str, float] = {}
        for name in signals:
            agent, _, signal = name.rpartition("/")
            ema = before.get(name, Ema())
            metrics[f"credit/{agent}/mu_{signal}"] = ema.mean
            metrics[f"credit/{agent}/sigma_{signal}"] = sigma(ema, self.eps, self.sigma_floor)
        return metrics
