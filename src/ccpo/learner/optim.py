"""The optimiser of one policy, its learning rate over the run, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ccpo.comm import Comm
from ccpo.errors import UserError, nearest
from ccpo.families import is_sharded, whole
from ccpo.learner.policies import Policy
from ccpo.learner.sharding import part_of

DECAYS = ("constant", "linear", "cosine")
FUSED = ("cpu", "cuda")


def lr_factor(step: int, *, warmup_steps: int, decay: str, total_steps: int, spent: float = 0.0) -> float:
    """The factor of the learning rate in trainer step ``step``, counted from 0.

    Rises as ``(step + 1) / warmup_steps`` to 1, then stays ("constant"), or falls with
    ``x = (step - warmup_steps) / (total_steps - warmup_steps)`` as ``1 - x`` ("linear") or ``(1 + cos(pi x)) / 2``
    ("cosine"), to reach 0 at ``total_steps``, which is not run. ``spent`` is the share of another budget that is gone, of generated
    tokens: ``x`` is no less than it. Raises UserError for an unknown decay.
    """
    if decay not in DECAYS:
        raise UserError(f"optim.decay is {decay!r}; it is one of {', '.join(DECAYS)}.{nearest(decay, DECAYS)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    x = min(1.0, max(spent, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    return 1.0 - x if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))


STATES = 2  # tensors that AdamW keeps of each weight, in its dtype


class PolicyOptimizer:
    """AdamW (arXiv 1711.05101) over a policy's own weights, fused where the device has it."""

    def __init__(
        self, policy: Policy, *, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float
    ) -> None:
        self.policy, self.max_grad_norm = policy, max_grad_norm
        self.parameters = policy.parameters()
        policy.activate()
        fused = all(p.device.type in FUSED for p in self.parameters.values()) and not is_sharded(policy.model)
        self.adamw = torch.optim.AdamW(
            list(self.parameters.values()), lr=policy.lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        )

    def sum_over(self, comm: Comm, others: list[Tensor]) -> None:
        """The gradients, and ``others`` (float64), become their sums over ranks. A weight that has a gradient on no rank is left without."""
        if comm.size == 1 or is_sharded(self.policy.model):
            comm.add(others)  # FSDP has summed the gradients
            return
        parameters = list(self.parameters.values())
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64, device=others[0].device)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        comm.add([*others, there, *(p.grad for p in parameters if p.grad is not None)])
        for parameter, count in zip(parameters, there.tolist(), strict=True):
            if not count:
                parameter.grad = None

    def clip(self) -> Tensor:
        """Scale the gradients to the largest norm allowed; returns the norm before."""
        return whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))

    def step(self, factor: float) -> float:
        """One update at ``factor`` times the policy's learning rate, which it returns."""
        for group in self.adamw.param_groups:
            group["lr"] = self.policy.lr * factor
        self.adamw.step()
        self.policy.version += 1
        self.clear()
        return self.policy.lr * factor

    def clear(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state by ``kind/parameter``; empty before the first update."""
        return {
            f"{kind}/{name}": value
            for name, parameter in self.parameters.items()
            for kind, value in self.adamw.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Take over a state of :meth:`tensors`. Raises UserError where it belongs to other parameters."""
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if name not in self.parameters or value.shape not in (self.parameters[name].shape, torch.Size([])):
                raise UserError(
                    f"{where} does not fit the model: {key!r} has no parameter of its name and shape. Was the model "
                    "changed?"
                )
            state.setdefault(name, {})[kind] = value
        self.adamw.state.clear()
        for name, values in state.items():
            parameter = self.parameters[name]
            # the count of steps stays where AdamW keeps it: beside the weights if fused
            self.adamw.state[parameter] = {
                kind: part_of(value.clone(), parameter) if value.shape else value.clone().to(_count_place(parameter))
                for kind, value in values.items()
            }


def _count_place(parameter: Tensor) -> torch.device:
    return torch.device("cpu") if hasattr(parameter, "full_tensor") else parameter.device
