"""The update's own pass through Qwen2, Qwen3 and Llama models: the live weights, a `Layout` of tokens, gradients by autograd.

It computes what the transformers model computes, and its gradients (a test holds both to it), in fewer passes over memory:
a prompt runs once for all its samples, texts that are equal run once, no matrix sees padding, and what stands between the
matrices is four small functions with backward passes of their own. The residual stream is float32, the matrices multiply
in ``compute``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from ccpo.families import bare, head_dim, is_sharded, unsupported
from ccpo.learner import fused
from ccpo.learner.layout import Layout

SHORT = 64  # columns up to which a CPU attends faster with all scores in memory


def runs(model: nn.Module) -> bool:
    """Whether :func:`hidden_states` can run this model, or this PeftModel with its active adapters."""
    if is_sharded(model):
        return False
    if not hasattr(model, "peft_config"):
        return unsupported(model) is None
    for m in model.modules():
        # modules trained whole beside the adapter, adapted embeddings, adapters merged into the weights
        if hasattr(m, "original_module") or getattr(m, "lora_embedding_A", None) or getattr(m, "merged", False):
            return False
    return all(unsupported(model, name) is None for name in model.active_adapters)


def hidden_states(model: nn.Module, layout: Layout, compute: torch.dtype) -> Tensor:
    """What the head reads to score each token of the layout: ``[N, H]`` in ``compute``, differentiable."""
    source = bare(model)
    body, embed = source.model, source.model.embed_tokens
    turn = _rotation(body.rotary_emb, layout.position_M)
    texts = None
    if fused.usable(compute, body.norm.weight) and fused.attends(source.config):
        texts = fused.Texts.of(layout.prompt_size_G, layout.read_size_R, layout.owner_R, turn)
    else:
        layout = layout.biased(
            torch.promote_types(compute, torch.float32) if layout.ids_M.device.type == "cpu" else compute
        )
    stream = embedding(layout.ids_M, embed.weight, embed.padding_idx)
    stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
    branch = torch.zeros((), dtype=compute, device=stream.device)
    for layer in body.layers:
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            stream, branch = checkpoint(
                _block, layer, stream, branch, layout, turn, texts, compute, use_reentrant=False
            )
        else:
            stream, branch = _block(layer, stream, branch, layout, turn, texts, compute)
    _, normed = _add_norm(body.norm, stream[layout.at_N], branch[layout.at_N], compute)
    return normed


def linear(x: Tensor, *modules: nn.Module) -> Tensor:
    """The modules' outputs side by side, each with its LoRA updates, from one product in the dtype of ``x``."""
    layers = [getattr(module, "base_layer", module) for module in modules]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    y = _Linear.apply(x, len(layers), *[layer.weight for layer in layers], *biases)
    if all(layer is module for layer, module in zip(layers, modules, strict=True)):
        return y
    return y + torch.cat([_low_rank(x, module) for module in modules], -1)


def _low_rank(x: Tensor, module: Any) -> Tensor:
    """``scaling * B A dropout(x)`` of the module's active adapters (arXiv 2106.09685, equation 3); 0 where it has none."""
    total = x.new_zeros(len(x), module.out_features)
    if getattr(module, "disable_adapters", True):
        return total
    for name in module.active_adapters:
        if name in module.lora_A:
            down = linear(module.lora_dropout[name](x), module.lora_A[name])
            total = total + linear(down, module.lora_B[name]) * module.scaling[name]
    return total


def _block(
    layer: Any,
    stream: Tensor,
    branch: Tensor,
    layout: Layout,
    turn: Tensor,
    texts: fused.Texts | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """A decoder layer. ``branch`` is what the layer before still has to add to the ``stream``."""
    attention, mlp = layer.self_attn, layer.mlp
    stream, normed = _add_norm(layer.input_layernorm, stream, branch, compute)
    qkv = linear(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    branch = linear(_attend(attention, qkv, layout, turn, texts).to(compute), attention.o_proj)
    stream, normed = _add_norm(layer.post_attention_layernorm, stream, branch, compute)
    return stream, linear(_swiglu(linear(normed, mlp.gate_proj, mlp.up_proj)), mlp.down_proj)


def _add_norm(norm: Any, stream: Tensor, branch: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """``s = stream + branch``, and ``w * s / rms(s)`` in ``compute`` (RMSNorm, arXiv 1910.07467)."""
    if stream.is_cuda:  # torch has it in one kernel there
        stream = stream + branch
        weight = norm.weight.to(stream.dtype)
        return stream, rms_norm(stream, weight.shape, weight, norm.variance_epsilon).to(compute)
    if fused.usable(compute, stream, norm.weight) and branch.dtype == compute:
        return fused.AddNorm.apply(stream, branch, norm.weight, norm.variance_epsilon)
    return _AddNorm.apply(stream, branch, norm.weight, norm.variance_epsilon, compute)


def _swiglu(gate_up: Tensor) -> Tensor:
    return (fused.SwiGLU if gate_up.device.type == "cpu" and fused.usable(gate_up.dtype) else _SwiGLU).apply(gate_up)


def _attend(attention: Any, qkv: Tensor, layout: Layout, turn: Tensor, texts: fused.Texts | None) -> Tensor:
    """Causal attention: every prompt by itself, every text over its prompt and itself. ``[M, heads * head_dim]``."""
    size, config = head_dim(attention.config), attention.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    split = [heads, kv_heads, kv_heads]
    qkv = qkv.unflatten(-1, (-1, size))
    if hasattr(attention, "q_norm"):
        query, key, value = qkv.split(split, 1)
        qkv = torch.cat((_normed(attention.q_norm, query), _normed(attention.k_norm, key), value), 1)
    if texts is not None:
        return fused.Attend.apply(qkv, texts, kv_heads, attention.scaling).flatten(1)
    qkv = _Rotate.apply(qkv, heads + kv_heads, turn)
    prompts, texts = qkv.split([layout.prompts.size, layout.texts.size])
    query, key, value = layout.prompts.spread(prompts).split(split, 1)
    mixed = [layout.prompts.gather(_look(query, key, value, layout.before_11PP, attention.scaling))]
    if layout.texts.size:
        query, *own = layout.texts.spread(texts).split(split, 1)
        key, value = (torch.cat((x[layout.owner_R], o), 2) for x, o in zip((key, value), own, strict=True))
        mixed.append(layout.texts.gather(_look(query, key, value, layout.before_R1TC, attention.scaling)))
    return torch.cat(mixed).flatten(1)


def _look(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    if query.device.type == "cpu" and key.shape[2] <= SHORT:
        return _Short.apply(query, key, value, bias, scale)
    groups = query.shape[1] // key.shape[1]
    causal = query.shape[2] == key.shape[2]  # padding stands behind what is read
    if query.is_cuda and groups > 1 and not causal:  # its fused kernels know masks or shared key heads, not both
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    mask = None if causal else bias
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)


def _normed(norm: Any, heads: Tensor) -> Tensor:
    """RMS norm of each head, in the dtype it came in."""
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32)).flatten(0, 1)
    return _add_norm(norm, wide, heads.new_zeros(()), heads.dtype)[1].view_as(heads)


def _rotation(rotary: Any, position_M: Tensor) -> Tensor:
    """``scale * exp(i * angle)`` at each token, ``[M, 1, head_dim / 2]``."""
    angle = position_M[:, None, None] * rotary.inv_freq.float()
    return torch.polar(torch.full_like(angle, rotary.attention_scaling), angle)


class _Linear(torch.autograd.Function):
    """``x W^T + b`` with several modules' weights below one another."""

    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, count: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        weight = _fused(weights, x_MH.dtype)
        # a copy in a smaller dtype is worth keeping; any other is made again in the backward pass
        kept = (weight,) if weight.element_size() < weights[0].element_size() else weights
        ctx.save_for_backward(x_MH, *kept)
        ctx.rows, ctx.dtype, ctx.biased = [len(w) for w in weights], weights[0].dtype, bool(biases)
        if not biases:
            return x_MH @ weight.t()
        return torch.addmm(torch.cat([b.to(x_MH.dtype) for b in biases]), x_MH, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_MH, *kept = ctx.saved_tensors
        dx = grad @ _fused(kept, grad.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return dx, None, *[None] * (len(ctx.needs_input_grad) - 2)
        dw = (grad.t() @ x_MH).to(ctx.dtype).split(ctx.rows)
        if not ctx.biased:
            return dx, None, *dw
        db = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.dtype).split(ctx.rows)
        return dx, None, *dw, *db


def _fused(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights below one another."""
    return torch.cat([w.to(dtype) for w in weights]) if len(weights) > 1 else weights[0].to(dtype)


class _AddNorm(torch.autograd.Function):
    """What `_add_norm` says."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, branch: Tensor, weight: Tensor, eps: float, compute: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        stream = stream + branch.to(stream.dtype)
        mean_square = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).square_().div_(stream.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        unit = stream * scale
        ctx.save_for_backward(unit, scale, weight)
        ctx.branch = branch.dtype, branch.dim()
        return stream, (unit * weight).to(compute)

    @staticmethod
    def backward(ctx: Any, grad_stream: Tensor, grad_normed: Tensor) -> tuple[Any, ...]:
        unit, scale, weight = ctx.saved_tensors
        grad = grad_normed.to(unit.dtype)
        along = grad * unit
        dw = along.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        mean = torch.mv(along, weight.to(unit.dtype)).div_(unit.shape[-1])[:, None]
        ds = (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale).add_(grad_stream)
        dtype, dim = ctx.branch
        return ds, (ds.to(dtype) if dim else None), dw, None, None


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (arXiv 2002.05202) of the two side by side."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        active = silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(active, grad, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return out


class _Rotate(torch.autograd.Function):
    """The first ``turning`` heads rotated (RoPE, arXiv 2104.09864), as complex numbers whose real parts are a head's first half and whose
    imaginary parts are its second. They come out side by side: queries and keys alike, so that their products are the same.

    On a CPU the result is float32: its small bfloat16 products are slower.
    """

    @staticmethod
    def forward(ctx: Any, qkv_MHD: Tensor, turning: int, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        ctx.turning, ctx.dtype = turning, qkv_MHD.dtype
        out = torch.empty_like(qkv_MHD, dtype=torch.promote_types(qkv_MHD.dtype, torch.float32))
        out[:, turning:] = qkv_MHD[:, turning:]
        pairs = _pairs(out[:, :turning])
        first, second = qkv_MHD[:, :turning].chunk(2, -1)
        pairs[..., 0], pairs[..., 1] = first, second
        torch.view_as_complex(pairs).mul_(turn)
        return out if out.device.type == "cpu" else out.to(qkv_MHD.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (turn,) = ctx.saved_tensors
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        out = torch.empty_like(grad, dtype=ctx.dtype)
        out[:, ctx.turning :] = grad[:, ctx.turning :]
        pairs = torch.view_as_real(
            torch.view_as_complex(_pairs(grad[:, : ctx.turning])) * turn.conj()
        )  # the rotation back
        first, second = out[:, : ctx.turning].chunk(2, -1)
        first.copy_(pairs[..., 0])
        second.copy_(pairs[..., 1])
        return out, None, None


def _pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2))


class _Short(torch.autograd.Function):
    """Attention with its scores in memory, which for short texts on a CPU is faster than SDPA. ``bias`` is added to the scores,
    ``[1 or R, 1, T, C]``; query heads that share a key head are rows of one matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        (R, H, T, D), (_, K, C, _) = query.shape, key.shape
        q, k, v = (query * scale).reshape(R * K, -1, D), key.reshape(R * K, C, D), value.reshape(R * K, C, D)
        scores = torch.bmm(q, k.mT)
        scores.view(R, H, T, C).add_(bias)
        p = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return torch.bmm(p, v).view(R, H, T, D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        of_query, of_key = ctx.shapes
        grad = grad.reshape(q.shape)
        dv = torch.bmm(p.mT, grad)
        ds = torch._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype)
        dq, dk = torch.bmm(ds, k).mul_(ctx.scale), torch.bmm(ds.mT, q)
        return dq.view(of_query), dk.view(of_key), dv.view(of_key), None, None
