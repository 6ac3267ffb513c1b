"""A model's layers as a handful of tensor operations each, for any device and dtype.

Equal prompts are prefilled once and their cache (`ccpo.engines.cache`) is dealt out to their rows, or shared by them
(`ccpo.engines.prefix`). On a GPU a step is recorded once and then played (`ccpo.engines.graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from ccpo.engines.cache import Block, Cache
from ccpo.engines.graphs import Arena, Fixed
from ccpo.engines.prefix import SharedCache, worth_sharing
from ccpo.engines.weights import Layer, Weights

PREFILL_TOKENS = 8_192  # prompt tokens that go through a layer at once


class TorchLayers:
    """Runs prompts and steps of a decoder over ``weights``."""

    KEEP = 0.75  # rows that have ended leave when at most this share of the batch is still alive

    def __init__(self, weights: Weights) -> None:
        self.weights, self.dtype, self.device = weights, weights.dtype, weights.device
        self.arena = Arena(weights, self._step) if self.device.type == "cuda" else None

    def begin(
        self, prompts: Sequence[tuple[int, ...]], owner: Sequence[int], steps: int
    ) -> tuple[Cache | SharedCache | Fixed, Tensor]:
        """Prefills distinct prompts and deals their caches out to rows, ``owner`` naming each row's prompt; the cache, with room for
        ``steps`` tokens, and the logits of the rows' first tokens."""
        if len(prompts) == len(owner) and self.arena is None:
            return self._prefill(prompts, spare=steps)
        cache, logits_BV = self._prefill(prompts, spare=0)
        owner_B = torch.tensor(owner, device=self.device)
        if self.arena is not None:
            return self.arena.deal(cache, owner_B, steps), logits_BV[owner_B]
        if worth_sharing(cache, owner_B):
            return SharedCache.of(self.weights, cache, owner_B, steps), logits_BV[owner_B]
        cache.select(owner_B)
        cache.widen(steps)
        return cache, logits_BV[owner_B]

    def logits(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """The logits after each prompt, ``[prompts, vocabulary]``."""
        return self._prefill(prompts, spare=0)[1]

    def step(self, cache: Cache | SharedCache | Fixed, token_B: Tensor) -> Tensor:
        """Runs one more token of every row; the logits of those after it."""
        return self._step(cache, token_B) if self.arena is None else self.arena.step(cache, token_B)

    def _prefill(self, prompts: Sequence[tuple[int, ...]], *, spare: int) -> tuple[Cache, Tensor]:
        """Runs the prompts, some rows at a time, into a cache with room for ``spare`` more columns; their next tokens' logits."""
        sizes = [len(p) for p in prompts]
        cache = Cache.empty(self.weights, sizes, spare)
        rows = max(1, PREFILL_TOKENS // max(sizes))
        parts = [slice(start, start + rows) for start in range(0, len(prompts), rows)]
        return cache, self._logits(torch.cat([self._prefill_rows(prompts[part], cache, part) for part in parts]))

    def _prefill_rows(self, prompts: Sequence[tuple[int, ...]], cache: Cache, rows: slice) -> Tensor:
        """Runs these prompts; returns their last tokens' hidden states. Only real tokens go through the matrices."""
        w, block = self.weights, Block.of([len(p) for p in prompts], self.device)
        turn = w.rotations(block.left.columns)[block.position_M][:, None]
        hidden = w.embed[torch.tensor([i for p in prompts for i in p], device=self.device)]
        for number, layer in enumerate(w.layers):
            qkv = self._project(layer, hidden, turn).to(self.dtype)
            query, key, value = block.left.spread(qkv).split(w.split, 1)
            cache.fill(number, rows, *block.right.spread(qkv[:, w.heads :]).split(w.split[1:], 1))
            if layer is not w.layers[-1]:
                mixed = block.left.gather(w.look(query, key, value, causal=True))
            else:  # the last layer is read at each prompt's last token alone
                hidden = hidden[block.last_B]
                query = qkv[block.last_B, : w.heads, None]
                mixed = w.look(query, key, value, mask=block.real_B11C)[:, :, 0]
            hidden = self._absorb(layer, hidden, mixed.flatten(1))
        return hidden

    def _step(self, cache: Cache | SharedCache | Fixed, token_B: Tensor) -> Tensor:
        w = self.weights
        turn = w.rotations(cache.columns)[cache.position_B][:, None]
        hidden = w.embed[token_B]
        for number, layer in enumerate(w.layers):
            query, key, value = self._project(layer, hidden, turn).to(w.attention_dtype).split(w.split, 1)
            hidden = self._absorb(layer, hidden, cache.attend(number, query * w.scale, key, value))
        cache.move_on()
        return self._logits(hidden)

    def _project(self, layer: Layer, hidden: Tensor, turn: Tensor) -> Tensor:
        """Normalised, rotated queries and keys, and values, in float32: ``[tokens, heads + 2 kv_heads, head_dim]``."""
        w = self.weights
        normed = rms_norm(hidden, hidden.shape[-1:], layer.attention_norm, w.eps)
        qkv = layer.qkv(normed).float().unflatten(-1, (-1, w.head_dim))
        turning = qkv[:, : w.heads + w.kv_heads]
        if layer.qk_norm is not None:
            turning.copy_(rms_norm(turning, turning.shape[-1:], None, w.eps)).mul_(layer.qk_norm)
        torch.view_as_complex(turning.unflatten(-1, (-1, 2))).mul_(turn)
        return qkv

    def _absorb(self, layer: Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a block: the attention's output and the MLP's are added to the hidden states."""
        hidden = layer.out.onto(hidden, mixed.to(self.dtype))
        normed = rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.weights.eps)
        return layer.down.onto(hidden, layer.gate_up(normed))

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        w = self.weights
        return w.head(rms_norm(hidden_BH, hidden_BH.shape[-1:], w.norm, w.eps))
