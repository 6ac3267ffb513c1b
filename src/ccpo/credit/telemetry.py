"""What a step's credit looks like, per agent: the numbers that show whether a counterfactual still says anything.

The one to watch is ``shared_corr``: where it is 1, the estimator has cancelled the counterfactual and the agent is
trained on plain shared reward, whatever the rule is called and whatever its rollouts cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ccpo.types import CreditInputs, CreditOutputs

SAME = 1 - 1e-6


def telemetry(
    inputs: CreditInputs,
    outputs: CreditOutputs,
    advantages: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Plain floats named ``credit/AGENT/...`` for every agent that was paid.

    ``advantages``: what the policy loss will see, per agent ``[P, N]``; ``shared``: the same estimator applied to the
    joint reward. Both are optional. Keys that the data cannot tell are absent, never NaN.

    - ``mean``: mean credit; ``share``: its part of the mean absolute credit of all (0 where nobody is paid);
    - ``helped``, ``hurt``, ``no_effect``: how often ``R`` is above, below, equal to ``R_without``, over all pairs of a
      rollout and a draw; they sum to 1;
    - ``no_signal``: fraction of problems on which every advantage is 0 (without ``advantages``: on which credit has
      no spread);
    - ``shared_corr``: correlation of the advantages with those under shared reward; ``same_as_shared``: 1 where it is 1
      to 1e-6, else 0. Absent where either has no spread.
    """
    size = {agent: credit_PN.double().abs().mean().item() for agent, credit_PN in outputs.credit.items()}
    total = sum(size.values())
    metrics: dict[str, float] = {}
    for agent, credit_PN in outputs.credit.items():
        found = {"mean": credit_PN.double().mean().item(), "share": size[agent] / total if total > 0 else 0.0}
        found |= effect_rates(inputs, agent)
        paid_PN = credit_PN if advantages is None else advantages[agent]
        found["no_signal"] = no_signal(paid_PN, is_advantage=advantages is not None)
        if advantages is not None and shared is not None:
            found |= _likeness(correlation(advantages[agent], shared[agent]))
        metrics |= {f"credit/{agent}/{key}": value for key, value in found.items()}
    return metrics


def effect_rates(inputs: CreditInputs, agent: str) -> dict[str, float]:
    """``helped``, ``hurt`` and ``no_effect`` rates of an agent; empty where its removal was not played."""
    if agent == inputs.decider:
        without_PXM = torch.zeros_like(inputs.reward_PN)[:, :, None]
    elif (agent,) in inputs.without:
        without_PXM = inputs.without[(agent,)].to(inputs.reward_PN)
    else:
        return {}
    delta_PNM = inputs.reward_PN[:, :, None] - without_PXM
    helped = (delta_PNM > 0).double().mean().item()
    hurt = (delta_PNM < 0).double().mean().item()
    return {"helped": helped, "hurt": hurt, "no_effect": (delta_PNM == 0).double().mean().item()}


def no_signal(paid_PN: Tensor, *, is_advantage: bool) -> float:
    """Fraction of groups that move nothing: all advantages 0, or, of credit, no spread."""
    silent_P = (paid_PN == 0).all(dim=1) if is_advantage else torch.amax(paid_PN, 1) == torch.amin(paid_PN, 1)
    return silent_P.double().mean().item()


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of two tensors of one shape, None where one of them is constant."""
    if x.shape != y.shape:
        raise ValueError(f"correlation needs two tensors of one shape; got {tuple(x.shape)} and {tuple(y.shape)}")
    x64, y64 = x.double().flatten(), y.double().flatten()
    if x64.numel() == 0 or x64.amax() == x64.amin() or y64.amax() == y64.amin():
        return None
    return torch.dot(_unit(x64 - x64.mean()), _unit(y64 - y64.mean())).clamp(-1, 1).item()


def _unit(x: Tensor) -> Tensor:
    """``x`` with norm 1. Scaled by its largest part first: squares of very small or large numbers are 0 or infinite."""
    scaled = x / x.abs().amax()
    return scaled / scaled.norm()


def _likeness(corr: float | None) -> dict[str, float]:
    return {} if corr is None else {"shared_corr": corr, "same_as_shared": float(corr >= SAME)}
