"""Log-probabilities of sampled tokens under a live model, without a copy of the logits in float32."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ccpo.families import bare
from ccpo.learner import forward, fused
from ccpo.learner.layout import Layout
from ccpo.learner.rows import MicroBatch

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # logits that are held in float32 at a time
LOGITS = {"cpu": 1 << 28, "cuda": 1 << 31}  # logits that are kept for the backward pass


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature_B: Tensor) -> tuple[Tensor, Tensor]:
    """``log softmax(logits / temperature)[id]`` and the entropy ``-sum p log p``, in nats; both ``[B, T]`` and
    differentiable.

    Computed in float32 (float64 for float64 logits) a chunk of tokens at a time, forward and backward: what stays in
    memory is the logits in their own dtype, and their gradient. Raises ValueError for shapes that do not fit or a
    temperature that is not positive.
    """
    if logits_BTV.dim() != 3 or ids_BT.shape != logits_BTV.shape[:2] or temperature_B.shape != ids_BT.shape[:1]:
        raise ValueError(
            f"logits are [B, T, V], ids [B, T], temperature [B]; got {tuple(logits_BTV.shape)}, {tuple(ids_BT.shape)}, "
            f"{tuple(temperature_B.shape)}"
        )
    B, T, V = logits_BTV.shape
    temperature_N = temperature_B.repeat_interleave(T)
    logprob_N, entropy_N = _TokenLogprobs.apply(logits_BTV.reshape(B * T, V), ids_BT.reshape(-1), temperature_N)
    return logprob_N.view(B, T), entropy_N.view(B, T)


class _TokenLogprobs(torch.autograd.Function):
    """Per token of ``[N, V]`` logits. With ``z = logits / t`` and ``p = softmax(z)``:
    ``d logp[id] / dz = onehot - p`` and ``d H / dz = -p (log p + H)``. Without temperatures ``t`` is 1."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_N: Tensor, temperature_N: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        entropy_N, logprob_N = (torch.empty(len(ids_N), dtype=dtype, device=ids_N.device) for _ in range(2))
        for part in _chunks(logits_NV):
            logp_CV = torch.log_softmax(_scaled(logits_NV, temperature_N, part), -1, dtype=dtype)
            logprob_N[part] = logp_CV.gather(1, ids_N[part, None]).squeeze(1)
            entropy_N[part] = torch.special.entr(logp_CV.exp_()).sum(1)
        ctx.save_for_backward(logits_NV, ids_N, temperature_N, entropy_N)
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, grad_logprob_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        logits_NV, ids_N, temperature_N, entropy_N = ctx.saved_tensors
        if grad_logprob_N is None and grad_entropy_N is None:
            return None, None, None
        grad_NV = torch.empty_like(logits_NV)
        for part in _chunks(logits_NV):
            p_CV = torch.softmax(_scaled(logits_NV, temperature_N, part), -1, dtype=entropy_N.dtype)
            factor = 0.0
            if grad_entropy_N is not None:
                # -p (log p + H): the first is an entropy's own term, which is 0 where p is
                surprise_CV = torch.special.entr(p_CV).mul_(grad_entropy_N[part, None])
                factor = grad_entropy_N[part, None] * entropy_N[part, None]
            if grad_logprob_N is not None:
                factor = factor + grad_logprob_N[part, None]
            total_CV = p_CV.mul_(-factor)
            if grad_entropy_N is not None:
                total_CV.add_(surprise_CV)
            if grad_logprob_N is not None:
                total_CV.scatter_add_(1, ids_N[part, None], grad_logprob_N[part, None])
            if temperature_N is not None:
                total_CV.div_(temperature_N[part, None])
            grad_NV[part] = total_CV
        return grad_NV, None, None


def _scaled(logits_NV: Tensor, temperature_N: Tensor | None, part: slice) -> Tensor:
    if temperature_N is None:
        return logits_NV[part]
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return logits_NV[part].to(dtype) / temperature_N[part, None].to(dtype)


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK.get(logits_NV.device.type, CHUNK["cpu"]) // max(1, logits_NV.shape[1]))
    for start in range(0, logits_NV.shape[0], rows):
        yield slice(start, start + rows)


def score(model: nn.Module, batch: MicroBatch, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each completion token of a micro-batch, both ``[B, T]``.

    ``compute`` is the dtype of matrix products; transformers knows bfloat16, by autocast, and the weights' own. To it are left the models
    that :mod:`ccpo.learner.forward` does not run, with padding.
    """
    if forward.runs(model):
        layout = Layout.of(batch.rows, batch.ids_BL.device)
        logprob_N, entropy_N = _scored(bare(model).lm_head, forward.hidden_states(model, layout, compute), layout)
        return logprob_N[layout.scored_BT], entropy_N[layout.scored_BT]
    logits_BTV = completion_logits(model, batch, compute)
    return token_logprobs(logits_BTV, batch.ids_BL[:, -logits_BTV.shape[1] :], batch.temperature_B)


def _logprobs(logits_NV: Tensor, ids_N: Tensor, temperature_N: Tensor | None) -> tuple[Tensor, Tensor]:
    in_c = logits_NV.device.type == "cpu" and fused.usable(logits_NV.dtype)
    return (fused.TokenLogprobs if in_c else _TokenLogprobs).apply(logits_NV, ids_N, temperature_N)


def _scored(head: nn.Module, hidden_NH: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the scored tokens. Where their logits are too many to keep, they are computed again, part by
    part, in the backward pass."""

    def part(hidden: Tensor, ids: Tensor, temperature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _logprobs(forward.linear(hidden, head), ids, temperature)

    rows = max(1, LOGITS.get(hidden_NH.device.type, LOGITS["cpu"]) // head.out_features)
    inputs = [hidden_NH, layout.target_N]
    if layout.temperature_N is not None:
        inputs.append(layout.temperature_N)
    if len(hidden_NH) <= rows:
        return part(*inputs)
    parts = zip(*(x.split(rows) for x in inputs), strict=True)
    return tuple(map(torch.cat, zip(*(checkpoint(part, *p, use_reentrant=False) for p in parts), strict=True)))


def completion_logits(model: nn.Module, batch: MicroBatch, compute: torch.dtype) -> Tensor:
    """The logits ``[B, T, V]`` that the completion tokens of a micro-batch were drawn from; only their positions reach the
    head."""
    T = batch.mask_BT.shape[1]
    inputs = {"input_ids": batch.ids_BL[:, :-1], "attention_mask": batch.attention_BL[:, :-1], "use_cache": False}
    accepted = _accepts(model)
    if "position_ids" in accepted:
        inputs["position_ids"] = batch.position_BL[:, :-1]
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = T
    with torch.autocast(batch.ids_BL.device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
        return model(**inputs).logits[:, -T:]


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """A model in eval mode but for what an update needs: layers that recompute their activations look at their training
    flag, and a LoRA's own dropout, which its user asked for, works in the update alone.

    The model's other dropout stays off: log-probs that are noisy would make the importance ratios noise.
    """
    switched = [
        module
        for name, module in model.named_modules()
        if getattr(module, "gradient_checkpointing", False) or ".lora_dropout." in name
    ]
    for module in switched:
        module.training = True
    try:
        yield
    finally:
        for module in switched:
            module.training = False


def _accepts(model: Any) -> frozenset[str]:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(bare.forward).parameters)
