"""SEPO: the team's reward, and a small bonus by what the agents themselves say of who earned it (arXiv 2603.21563v2).

Why it exists: it is the paper's answer where no agent can be removed at a bearable price. No counterfactual is decoded;
instead every agent reads the finished play with its outcome and shares that outcome out (a rating turn: see
``docs/rules.md``). It is as good as the raters are: a rater at chance adds noise, and one that is trained on its own
praise would learn to praise itself, so rating turns are never trained on.

Deviations: any number of agents; rewards with partial credit, where an outcome counts as correct if ``2R - 1 > 0``, as
the raters are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from ccpo.credit.base import Memoryless, State, check_rewards, mean_credit, number_in, one_of
from ccpo.credit.telemetry import correlation
from ccpo.errors import UserError
from ccpo.types import CreditInputs, CreditOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfEval(Memoryless):
    """``S + weight * b_k`` where the outcome is correct, ``S - weight * b_k`` where it is wrong, with ``S = 2R - 1`` (SEPO,
    arXiv 2603.21563v2).

    ``s_k = h * own share + (1 - h) * mean share from the others``, ``h = self_weight``; ``w_k = s_k / sum s``; ``b_k = w_k -``
    its mean over the group (``center="group"``), or ``w_k - 1/K`` (``center="uniform"``). Credit is ``[P, N]``, in units of
    half the reward's range; all ratings invalid pay ``S`` exactly. A rating is at most ``max_tokens`` long; ``strict``
    reads nothing but a lone JSON object; ``prompt`` replaces the library's rating prompt.
    """

    weight: float = 0.2
    self_weight: float = 0.3
    center: str = "group"
    strict: bool = False
    max_tokens: int = 128
    prompt: str | None = None

    pairing: ClassVar[str | None] = None
    rates: ClassVar[bool] = True
    estimator: ClassVar[str] = "dr_grpo"

    def __post_init__(self) -> None:
        number_in("credit.weight", self.weight, 0.0, 1e6)
        number_in("credit.self_weight", self.self_weight, 0.0, 1.0)
        one_of("credit.center", self.center, ["group", "uniform"])
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise UserError(f"credit.max_tokens is a whole number of at least 1; found {self.max_tokens!r}")
        if self.prompt is not None and not (isinstance(self.prompt, str) and self.prompt.strip()):
            raise UserError(f"credit.prompt is a text, or null for the library's own; found {self.prompt!r}")

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        share_KPNK = stacked_shares(inputs)
        weight_PNK = merged_shares(share_KPNK, self.self_weight)
        bonus_PNK = deviation(weight_PNK, self.center)
        signed_PN = 2 * inputs.reward_PN - 1
        toward_PN = torch.where(signed_PN > 0, self.weight, -self.weight).to(bonus_PNK)
        paid_PNK = (signed_PN[..., None] + toward_PN[..., None] * bonus_PNK).to(signed_PN)
        credit = {a: paid_PNK[..., k] for k, a in enumerate(inputs.agents) if a in inputs.active}
        metrics = mean_credit(credit) | _telemetry(inputs, share_KPNK, weight_PNK)
        return CreditOutputs(credit=credit, metrics=metrics), dict(state)


def stacked_shares(inputs: CreditInputs) -> Tensor:
    """Everybody's shares ``[K, P, N, K]``, rater first, in 64 bits. Raises ValueError where a rater is missing, or its shares
    are not ``[P, N, K]``, finite and at least 0."""
    shape = (*inputs.reward_PN.shape, len(inputs.agents))
    for agent in inputs.agents:
        share_PNK = inputs.shares.get(agent)
        if share_PNK is None:
            raise ValueError(f"the rule needs the ratings of every agent; {agent!r} gave none")
        if share_PNK.shape != shape or not torch.isfinite(share_PNK).all() or (share_PNK < 0).any():
            raise ValueError(f"shares of {agent!r} must be finite, at least 0 and [P, N, K] = {shape}")
    return torch.stack([inputs.shares[agent].double() for agent in inputs.agents])


def merged_shares(share_KPNK: Tensor, self_weight: float) -> Tensor:
    """What the agents together say each of them deserves: ``w_PNK``, summing to 1 over the agents.

    ``s_k = h * share_k[k] + (1 - h) * mean over j != k of share_j[k]``; ``w_k = s_k / sum_i s_i`` (equal where the sum is 0).
    """
    K = len(share_KPNK)
    own_PNK = torch.diagonal(share_KPNK, dim1=0, dim2=3)
    peers_PNK = (share_KPNK.sum(0) - own_PNK) / max(1, K - 1)
    merged_PNK = self_weight * own_PNK + (1 - self_weight) * peers_PNK if K > 1 else own_PNK
    total_PN1 = merged_PNK.sum(-1, keepdim=True)
    return torch.where(total_PN1 > 0, merged_PNK / total_PN1.clamp(min=1e-12), 1 / K)


def deviation(weight_PNK: Tensor, center: str) -> Tensor:
    """``b_PNK``: how far each share is from its mean over the group's rollouts, or from ``1/K``; it sums to 0 over the agents,
    and, from the group's mean, over the group."""
    if center == "uniform":
        return weight_PNK - 1 / weight_PNK.shape[-1]
    # from the group's first, so that shares that are all alike give exactly 0
    apart_PNK = weight_PNK - weight_PNK[:, :1]
    return apart_PNK - apart_PNK.mean(1, keepdim=True)


def scripted_shares(
    named_PN: Tensor, agents: int, reliability: float, generator: torch.Generator, *, high: float = 0.9
) -> Tensor:
    """What a rater of a given reliability says: ``[P, N, K]``.

    ``named_PN`` is the number of the agent to whom the outcome is truly due. With probability ``reliability`` it gets the share
    ``high``, else another agent does, each with the same chance; the rest is split evenly. At ``reliability = 1/K`` the
    rater knows nothing. For studies of how good raters must be.
    """
    right_PN = torch.rand(named_PN.shape, generator=generator, dtype=torch.float64) < reliability
    step_PN = torch.randint(1, max(2, agents), named_PN.shape, generator=generator)
    chosen_PN = torch.where(right_PN, named_PN, (named_PN + step_PN) % agents)
    low = (1 - high) / max(1, agents - 1)
    share_PNK = torch.full((*named_PN.shape, agents), low, dtype=torch.float64)
    return share_PNK.scatter(-1, chosen_PN[..., None], high)


def _telemetry(inputs: CreditInputs, share_KPNK: Tensor, weight_PNK: Tensor) -> dict[str, float]:
    """How many ratings could be read, what they say, and whether raters agree (over ratings that both gave)."""
    valid = [inputs.shares_valid.get(a, torch.ones_like(inputs.reward_PN, dtype=torch.bool)) for a in inputs.agents]
    found = {"rating/valid": torch.stack(valid).double().mean().item()}
    for k, agent in enumerate(inputs.agents):
        found[f"credit/{agent}/rating_valid"] = valid[k].double().mean().item()
        found[f"credit/{agent}/rated_share"] = weight_PNK[..., k].mean().item()
        if valid[k].any():
            found |= _self_praise(agent, k, valid, share_KPNK)
    agreement = _agreement(valid, share_KPNK)
    return found if agreement is None else found | {"rating/agreement": agreement}


def _self_praise(agent: str, k: int, valid: Sequence[Tensor], share_KPNK: Tensor) -> dict[str, float]:
    """How much more an agent gives itself than the others give it, where both could be read."""
    gaps = [(share_KPNK[k, ..., k] - share_KPNK[j, ..., k])[valid[k] & valid[j]] for j in range(len(valid)) if j != k]
    gap = torch.cat(gaps) if gaps else torch.empty(0)
    return {f"credit/{agent}/self_praise": gap.mean().item()} if gap.numel() else {}


def _agreement(valid: Sequence[Tensor], share_KPNK: Tensor) -> float | None:
    """Mean over pairs of raters of the correlation of their shares over the plays that both rated; None where no pair has any
    spread. Each agent's mean share is taken away first: that both praise the same agent in every play says nothing."""
    found = []
    for i, j in combinations(range(len(valid)), 2):
        both_PN = valid[i] & valid[j]
        if both_PN.any():
            one_BK, other_BK = share_KPNK[i][both_PN], share_KPNK[j][both_PN]
            found.append(correlation(_centred(one_BK), _centred(other_BK)))
    told = [value for value in found if value is not None]
    return sum(told) / len(told) if told else None


def _centred(share_BK: Tensor) -> Tensor:
    """From the first row's, so that rows that are all alike give exactly 0."""
    apart_BK = share_BK - share_BK[:1]
    return apart_BK - apart_BK.mean(0)
