"""What stands between the matrices of the update's pass, in C (``kernels/learn.c``, ``kernels/attend.c``): each a function with a backward pass.

They take the place of `ccpo.learner.forward`'s own where products are bfloat16, the processor multiplies it, and streams and norms are float32:
one pass over memory for each, and attention that builds no rectangles. What they compute is the same.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ccpo.families import head_dim
from ccpo.kernels.compiled import address, aligned, library, scratch, structure

CTexts = structure(
    "CTexts",
    "i tokens, i prompts, i heads, i kv_heads, i head_dim, f scale, p start, p size, p first_text, p texts, p rotation",
)


FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def usable(compute: torch.dtype, *tensors: Tensor) -> bool:
    """Whether these functions run on a CPU in ``compute`` with these float32 tensors."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return plain and compute == torch.bfloat16 and library() is not None


def attends(config: Any) -> bool:
    """Whether `Attend` runs a model of this shape."""
    size = head_dim(config)
    return size % 16 == 0 and size <= 1_024 and config.num_attention_heads % config.num_key_value_heads == 0


class AddNorm(torch.autograd.Function):
    """``s = stream + branch``, and ``w * s / rms(s)`` in bfloat16. ``branch``: bfloat16, or a 0 without dimensions."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        (M, H), stream = stream.shape, stream.contiguous()
        total, scale, normed = (
            torch.empty_like(stream),
            stream.new_empty(M),
            stream.new_empty(M, H, dtype=torch.bfloat16),
        )
        branch = branch.contiguous() if branch.dim() else None
        library().ccpo_add_norm(
            M,
            H,
            address(stream),
            address(branch),
            address(weight),
            eps,
            address(total),
            address(scale),
            address(normed),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(total, scale, weight)
        ctx.set_materialize_grads(False)
        ctx.branched = branch is not None
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None) -> tuple[Any, ...]:
        total, scale, weight = ctx.saved_tensors
        (M, H), threads = total.shape, torch.get_num_threads()
        d_normed = torch.zeros(M, H, dtype=torch.bfloat16, device="cpu") if d_normed is None else d_normed.contiguous()
        d_stream = None if d_stream is None else d_stream.contiguous()
        d_total, d_branch = torch.empty_like(total), torch.empty_like(d_normed) if ctx.branched else None
        d_weight = torch.zeros(threads, H, **FLOATS) if ctx.needs_input_grad[2] else None
        library().ccpo_add_norm_back(
            M,
            H,
            address(total),
            address(scale),
            address(weight),
            address(d_normed),
            address(d_stream),
            address(d_total),
            address(d_branch),
            address(d_weight),
            threads,
        )
        return d_total, d_branch, None if d_weight is None else d_weight.sum(0), None


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of bfloat16 rows ``[gate | up]``."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        M, I = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(M, I)
        library().ccpo_swiglu(M, I, address(gate_up), address(out), torch.get_num_threads())
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(gate_up)
        library().ccpo_swiglu_back(*grad.shape, address(gate_up), address(grad), address(out), torch.get_num_threads())
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Where prompts and texts lie in a run of tokens, for `Attend`: segments, the prompts first. ``texts_T``: the segments of texts, by
    prompt; those of prompt p are ``first_text_P[p]`` to ``first_text_P[p + 1]``. All int32. ``turn``: each token's rotation, complex."""

    start_S: Tensor
    size_S: Tensor
    first_text_P: Tensor
    texts_T: Tensor
    turn: Tensor

    @classmethod
    def of(cls, prompt_sizes: Tensor, text_sizes: Tensor, owner_R: Tensor, turn: Tensor) -> Texts:
        """``owner_R``: each text's prompt."""
        size_S = torch.cat((prompt_sizes, text_sizes))
        count_P = owner_R.bincount(minlength=len(prompt_sizes))
        return cls(
            start_S=(size_S.cumsum(0) - size_S).int(),
            size_S=size_S.int(),
            first_text_P=torch.cat((count_P.new_zeros(1), count_P.cumsum(0))).int(),
            texts_T=(len(prompt_sizes) + owner_R.argsort(stable=True)).int(),
            turn=turn.contiguous(),
        )

    def c(self, heads: int, kv_heads: int, head_dim: int, scale: float) -> Any:
        """As ``attend.c`` takes it; lives no longer than this."""
        return CTexts(
            tokens=len(self.turn),
            prompts=len(self.first_text_P) - 1,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            start=address(self.start_S),
            size=address(self.size_S),
            first_text=address(self.first_text_P),
            texts=address(self.texts_T),
            rotation=address(self.turn),
        )


class Attend(torch.autograd.Function):
    """Rotated, causal attention: every prompt by itself, every text over its prompt and itself. bfloat16 ``[M, heads + 2 kv_heads, head_dim]``
    to ``[M, heads, head_dim]``; what is saved is the input, and a number a query."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, texts: Texts, kv_heads: int, scale: float) -> Tensor:
        qkv = qkv.contiguous()
        M, every, head_dim = qkv.shape
        heads = every - 2 * kv_heads
        c = texts.c(heads, kv_heads, head_dim, scale)
        mixed, total = qkv.new_empty(M, heads, head_dim), torch.empty(M, heads, **FLOATS)
        threads, code = torch.get_num_threads(), library()
        room = scratch(code.ccpo_attend_room(ctypes.byref(c), threads))
        code.ccpo_attend(ctypes.byref(c), address(qkv), address(mixed), address(total), aligned(room), threads)
        ctx.save_for_backward(qkv, total)
        ctx.texts, ctx.shape = texts, (heads, kv_heads, head_dim, scale)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qkv, total = ctx.saved_tensors
        c, grad, out = ctx.texts.c(*ctx.shape), grad.contiguous(), torch.empty_like(qkv)
        threads, code = torch.get_num_threads(), library()
        room = scratch(code.ccpo_attend_room(ctypes.byref(c), threads))
        code.ccpo_attend_back(
            ctypes.byref(c), address(qkv), address(total), address(grad), address(out), aligned(room), threads
        )
        return out, None, None, None


class TokenLogprobs(torch.autograd.Function):
    """Log-probs and entropies of bfloat16 ``[N, V]`` logits; see `ccpo.learner.logprobs`."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_N: Tensor, temperature_N: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_NV, ids_N = logits_NV.contiguous(), ids_N.contiguous()
        if len(ids_N) and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < logits_NV.shape[1]:
            raise IndexError(
                f"token ids {int(ids_N.min())} to {int(ids_N.max())} are scored, and the model has {logits_NV.shape[1]}"
            )
        cold_N = None if temperature_N is None else 1 / temperature_N.float()
        logprob_N, entropy_N, total_N = (torch.empty(len(ids_N), **FLOATS) for _ in range(3))
        library().ccpo_logprobs(
            *logits_NV.shape,
            address(logits_NV),
            address(ids_N),
            address(cold_N),
            address(logprob_N),
            address(entropy_N),
            address(total_N),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(logits_NV, ids_N, cold_N, entropy_N, total_N)
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, None, None]:
        if d_logprob is None and d_entropy is None:
            return None, None, None
        logits_NV, ids_N, cold_N, entropy_N, total_N = ctx.saved_tensors
        d_logprob, d_entropy = (None if d is None else d.float().contiguous() for d in (d_logprob, d_entropy))
        out = torch.empty_like(logits_NV)
        library().ccpo_logprobs_back(
            *logits_NV.shape,
            *map(address, (logits_NV, ids_N, cold_N, entropy_N, total_N, d_logprob, d_entropy, out)),
            torch.get_num_threads(),
        )
        return out, None, None
