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

from ccpo.comm import Comm, deal
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
class Part:
    """What one rank writes of a sharded policy: some of its weights, and some of its optimiser's tensors (None: it is frozen), each of
    them whole, on the CPU."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] | None


def gather_parts(policies: Mapping[str, Any], optimizers: Mapping[str, Any], comm: Comm) -> dict[str, Part]:
    """This rank's part of each policy that is sharded. Tensors are gathered one at a time, and dealt out so that every rank keeps and
    writes as many bytes as the others. All ranks must ask together."""
    found = {}
    for name, policy in policies.items():
        if is_sharded(policy.model):
            stored, own = policy.model.state_dict(), dict(policy.model.named_parameters())  # tied weights once
            buffers = {k for k, _ in policy.model.named_buffers()}
            weights = {k: v for k, v in stored.items() if k in own or k in buffers}
            state = _dealt(optimizers[name].tensors(), comm) if name in optimizers else None
            found[name] = Part(weights=_dealt(weights, comm), optimizer=state)
    return found


def _dealt(tensors: Mapping[str, Tensor], comm: Comm) -> dict[str, Tensor]:
    mine = set(deal([t.numel() * t.element_size() for t in tensors.values()], comm.size)[comm.rank])
    found = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        tensor = whole(tensor.detach())
        if number in mine:
            found[key] = tensor.cpu().contiguous()
    return found


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
