"""Weights, gradients and optimiser state in shards over the ranks: torch's FSDP2 (`fully_shard`; arXiv 2304.11277 describes the idea).

A rank holds its part of every tensor; a block's weights are gathered when they are used. FSDP's hooks sit in the modules' forward
passes, so that sharded models go through transformers, with padding, and every rank must run as many micro-batches as the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccpo.families import is_sharded, whole


def shard(model: Any, *, compute: torch.dtype, offload: bool = False) -> None:
    """Shards a transformers model in place, a group for each of its blocks and one for the rest. Products are in ``compute``, gradients are
    summed over ranks in float32; ``offload`` keeps shards in the CPU's memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    low = None if compute == torch.float32 else compute
    options = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, output_dtype=low),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if is_sharded(module):
            module.set_gradient_divide_factor(1.0)  # denominators are global already
            module.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeState:
    """All of a sharded policy on the CPU of the first rank: its weights, and its optimiser's tensors."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def gather_states(policies: Mapping[str, Any], optimizers: Mapping[str, Any], *, keep: bool) -> dict[str, WholeState]:
    """The states of those policies that are sharded; ranks that do not ``keep`` them only help. All ranks must ask together."""
    found = {}
    for name, policy in policies.items():
        if is_sharded(policy.model):
            stored, own = policy.model.state_dict(), dict(policy.model.named_parameters())  # tied weights once
            buffers = {k for k, _ in policy.model.named_buffers()}
            weights = {k: _kept(v, keep) for k, v in stored.items() if k in own or k in buffers}
            own = optimizers[name].tensors() if name in optimizers else {}
            found[name] = WholeState(weights=weights, optimizer={k: _kept(v, keep) for k, v in own.items()})
    return found


def _kept(tensor: Tensor, keep: bool) -> Tensor:
    tensor = whole(tensor.detach())
    return tensor.cpu().contiguous() if keep else tensor.new_empty(0)


def plain_class(model: Any) -> type:
    """The model's class before it was sharded."""
    return type(model).__bases__[1] if is_sharded(model) else type(model)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What of a whole ``tensor`` belongs where ``like`` is: this rank's shard, if that is one."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    on_mesh = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(on_mesh, like.device_mesh, like.placements, src_data_rank=None).to(like.device)
