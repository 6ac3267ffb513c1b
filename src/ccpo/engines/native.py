"""The native decoder: Qwen2, Qwen3 and Llama models as a handful of tensor operations a layer.

Prompts are padded on the left, so that the cache grows by one column a step for all rows. Equal prompts are prefilled
once and their cache is dealt out to their rows. Rows that have finished leave the batch. The device is asked which they
are once in `CHECK` steps; what a row samples beyond its end is dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention, silu

from ccpo.engines.base import batches, check_requests, distinct
from ccpo.engines.finish import complete, contains, decoder, end_ids, tail_length
from ccpo.engines.sampling import Sampler
from ccpo.engines.weights import Layer, Weights
from ccpo.types import Completion, Request

CHECK = 4  # steps between two looks at which rows have ended
KEEP = 0.75  # finished rows leave when at most this share of the batch is still alive
PREFILL_TOKENS = 8_192  # prompt tokens that go through a layer at once
LOGITS = 2**26  # rows times vocabulary of one step


@dataclass(slots=True, kw_only=True)
class Batch:
    """The rows that are being decoded.

    ``hidden_BH``: the last hidden states. ``keys``, ``values``: per layer ``[B, kv_heads, head_dim, columns]`` (so that a step's
    product runs along memory) and ``[B, kv_heads, columns, head_dim]``; the first ``filled`` columns are in use.
    ``mask``: added to the scores, ``[B * kv_heads, 1, columns]``; None where no prompt is padded. ``position_B``: the next token's.
    """

    hidden_BH: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    filled: int
    mask: Tensor | None
    position_B: Tensor

    def select(self, rows: Tensor) -> None:
        """Only these rows, in this order; layer by layer, so that never two whole caches stand side by side."""
        if self.mask is not None:
            self.mask = self.mask.unflatten(0, (len(self.hidden_BH), -1))[rows].flatten(0, 1)
        self.hidden_BH, self.position_B = self.hidden_BH[rows], self.position_B[rows]
        for cache in (self.keys, self.values):
            for index, layer in enumerate(cache):
                cache[index] = layer.index_select(0, rows)

    def widen(self, columns: int) -> None:
        """Room for this many more tokens."""
        if self.mask is not None:
            self.mask = pad(self.mask, (0, columns))
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            self.keys[index], self.values[index] = pad(key, (0, columns)), pad(value, (0, 0, 0, columns))


class NativeEngine:
    """Samples from a fused copy of the model's weights; see `ccpo.engines.base.Engine`."""

    def __init__(
        self, model: Any, tokenizer: Any, *, dtype: torch.dtype | None, adapter: str | None, max_batch_tokens: int
    ) -> None:
        self.weights = Weights.of(model, dtype=dtype, adapter=adapter)
        self.dtype, self.device = self.weights.dtype, self.weights.device
        self.prefill_tokens = self.decoded_tokens = 0
        self._decode = decoder(tokenizer)
        self._ends = end_ids(self.weights.source, tokenizer)
        self._ends_E = torch.tensor(self._ends, dtype=torch.int64, device=self.device)
        self.positions = self.weights.source.config.max_position_embeddings
        self._max_batch_tokens = max_batch_tokens

    def refresh(self) -> None:
        """Reads the model's weights again."""
        self.weights.refresh()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order. Raises UserError for a request that cannot be decoded."""
        check_requests(requests, vocab=self.weights.vocab, positions=self.positions)
        max_rows = max(1, LOGITS // self.weights.vocab)
        found: dict[int, Completion] = {}
        with torch.inference_mode():
            for indices in batches(requests, max_batch_tokens=self._max_batch_tokens, max_rows=max_rows):
                found.update(zip(indices, self._run([requests[i] for i in indices]), strict=True))
        return [found[i] for i in range(len(requests))]

    def logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits after each prompt, ``[prompts, vocabulary]``: those that its first token is sampled from."""
        with torch.inference_mode():
            return self._logits(self._prefill([tuple(p) for p in prompts], spare=0).hidden_BH)

    def _run(self, requests: list[Request]) -> list[Completion]:
        steps = max(r.max_tokens for r in requests)
        batch = self._begin(requests, steps)
        sampler = Sampler.of(requests, self.device)
        rows = torch.arange(len(requests), device=self.device)
        limit_B = torch.tensor([r.max_tokens for r in requests], device=self.device)
        ended_B = torch.zeros(len(requests), dtype=torch.bool, device=self.device)
        tokens_TB = torch.zeros(steps, len(requests), dtype=torch.int64, device=self.device)
        probs_TB = torch.ones(steps, len(requests), device=self.device)
        fresh: list[tuple[Tensor, Tensor]] = []
        for step in range(steps):
            fresh.append(sampler.draw(self._logits(batch.hidden_BH), step))
            token_B = fresh[-1][0]
            if len(fresh) == CHECK or step + 1 == steps:
                span = slice(step + 1 - len(fresh), step + 1)
                tokens_TB[span, rows], probs_TB[span, rows] = map(torch.stack, zip(*fresh, strict=True))
                fresh.clear()
                ended_B |= torch.isin(tokens_TB[span], self._ends_E).any(0) | (limit_B <= step + 1)
                self._find_stops(requests, tokens_TB[: step + 1], rows, ended_B)
                alive = (~ended_B[rows]).nonzero()[:, 0]
                if len(alive) == 0 or step + 1 == steps:
                    break
                if len(alive) <= KEEP * len(rows):
                    batch.select(alive)
                    token_B, rows, sampler = token_B[alive], rows[alive], sampler.select(alive)
            self._step(batch, token_B)
        done = complete(requests, tokens_TB, probs_TB, self._ends, self._decode)
        self.decoded_tokens += sum(len(c.token_ids) for c in done)
        return done

    def _find_stops(self, requests: list[Request], tokens_TB: Tensor, rows: Tensor, ended_B: Tensor) -> None:
        """Marks the rows in whose latest text a stop string stands. `complete` then finds the exact place."""
        if not any(r.stop for r in requests):
            return
        for row in rows[~ended_B[rows]].tolist():
            stop = requests[row].stop
            if stop and contains(self._decode(tokens_TB[-tail_length(stop, CHECK) :, row].tolist()), stop):
                ended_B[row] = True

    def _begin(self, requests: list[Request], steps: int) -> Batch:
        """Prefills the distinct prompts and deals their caches out to the requests' rows."""
        prompts, owner = distinct([r.prompt_ids for r in requests])
        if len(prompts) == len(requests):
            return self._prefill(prompts, spare=steps)
        batch = self._prefill(prompts, spare=0)
        batch.select(torch.tensor(owner, device=self.device))
        batch.widen(steps)
        return batch

    def _prefill(self, prompts: Sequence[tuple[int, ...]], *, spare: int) -> Batch:
        """Runs the prompts, a chunk of columns at a time, into caches with room for ``spare`` more columns."""
        w, width, count = self.weights, max(map(len, prompts)), len(prompts)
        size_B = torch.tensor([len(p) for p in prompts], device=self.device)
        ids_BL = torch.tensor([(0,) * (width - len(p)) + p for p in prompts], device=self.device)
        self.prefill_tokens += sum(map(len, prompts))
        real_BL = torch.arange(width, device=self.device) >= (width - size_B)[:, None]
        dtype = w.attention_dtype

        def cache(*shape: int) -> list[Tensor]:
            return [torch.empty(count, w.kv_heads, *shape, dtype=dtype, device=self.device) for _ in w.layers]

        mask = None
        if not bool(real_BL.all()):
            mask_BL = torch.zeros(count, width + spare, dtype=dtype, device=self.device)
            mask_BL[:, :width].masked_fill_(~real_BL, float("-inf"))
            mask = mask_BL.repeat_interleave(w.kv_heads, 0)[:, None]
        batch = Batch(
            hidden_BH=w.embed.new_empty(0),
            keys=cache(w.head_dim, width + spare),
            values=cache(width + spare, w.head_dim),
            filled=width,
            mask=mask,
            position_B=size_B,
        )
        chunk = max(1, PREFILL_TOKENS // count)
        for start in range(0, width, chunk):
            columns = slice(start, min(start + chunk, width))
            batch.hidden_BH = self._prefill_chunk(ids_BL[:, columns], real_BL, batch, columns)
        return batch

    def _prefill_chunk(self, ids_BC: Tensor, real_BL: Tensor, batch: Batch, columns: slice) -> Tensor:
        """Runs these columns against all before them; after the last chunk, returns the last column's hidden states.

        Only real tokens, packed, go through the matrices; padding takes part in the attention alone, masked.
        """
        w, (rows, count), (_, width) = self.weights, ids_BC.shape, real_BL.shape
        place_C = torch.arange(columns.start, columns.stop, device=self.device)
        packed = real_BL[:, columns].flatten().nonzero()[:, 0]
        position = (place_C - (~real_BL).sum(-1, keepdim=True)).flatten()[packed]
        turn = w.rotations(width)[position][:, None]
        # A padding column sees itself, so that no softmax is over nothing; no real column sees it.
        seen_C = torch.arange(columns.stop, device=self.device)
        earlier, itself = seen_C <= place_C[:, None], seen_C == place_C[:, None]
        allowed = ((earlier & real_BL[:, None, : columns.stop]) | itself)[:, None]
        hidden = w.embed[ids_BC.flatten()[packed]]
        for layer, keys, values in zip(w.layers, batch.keys, batch.values, strict=True):
            qkv = keys.new_zeros(rows * count, w.heads + 2 * w.kv_heads, w.head_dim)
            qkv.index_copy_(0, packed, self._project(layer, hidden, turn).to(keys.dtype))
            query, key, value = qkv.unflatten(0, (rows, count)).transpose(1, 2).split(w.split, 1)
            keys[..., columns], values[:, :, columns] = key.transpose(2, 3), value
            if layer is w.layers[-1]:  # only the last column of the whole prompt is read from the last layer
                if columns.stop < width:
                    break
                hidden = hidden[real_BL[:, columns].sum(-1).cumsum(0) - 1]
                query, allowed, packed = query[:, :, -1:], allowed[:, :, -1:], slice(None)
            if columns.start:
                key, value = keys[..., : columns.stop].transpose(2, 3), values[:, :, : columns.stop]
            mixed = scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, scale=w.scale, enable_gqa=w.heads != w.kv_heads
            )
            hidden = self._absorb(layer, hidden, mixed.transpose(1, 2).flatten(2).flatten(0, 1)[packed])
        return hidden

    def _step(self, batch: Batch, token_B: Tensor) -> None:
        """Runs one more token of every row and writes it into the caches' next column."""
        w, rows, column = self.weights, len(token_B), batch.filled
        batch.filled += 1
        turn = w.rotations(batch.values[0].shape[2])[batch.position_B][:, None]
        hidden = w.embed[token_B]
        for layer, keys, values in zip(w.layers, batch.keys, batch.values, strict=True):
            query, key, value = self._project(layer, hidden, turn).to(keys.dtype).split(w.split, 1)
            keys[..., column], values[:, :, column] = key, value
            # The query heads of one key head are rows of one matrix: grouped heads need no copies of their keys.
            query = (query * w.scale).reshape(rows * w.kv_heads, -1, w.head_dim)
            scores = torch.bmm(query, keys[..., : batch.filled].flatten(0, 1))
            if batch.mask is not None:
                scores += batch.mask[..., : batch.filled]
            mixed = torch.bmm(scores.softmax(-1), values[:, :, : batch.filled].flatten(0, 1))
            hidden = self._absorb(layer, hidden, mixed.view(rows, -1))
        batch.hidden_BH = hidden
        batch.position_B = batch.position_B + 1

    def _project(self, layer: Layer, hidden: Tensor, turn: Tensor) -> Tensor:
        """Normalised, rotated queries and keys, and values, in float32: ``[tokens, heads + 2 kv_heads, head_dim]``."""
        w = self.weights
        normed = rms_norm(hidden, hidden.shape[-1:], layer.attention_norm, w.eps)
        qkv = linear(normed, layer.qkv, layer.qkv_bias).float().unflatten(-1, (-1, w.head_dim))
        turning = qkv[:, : w.heads + w.kv_heads]
        if layer.qk_norm is not None:
            turning.copy_(rms_norm(turning, turning.shape[-1:], None, w.eps)).mul_(layer.qk_norm)
        torch.view_as_complex(turning.unflatten(-1, (-1, 2))).mul_(turn)
        return qkv

    def _absorb(self, layer: Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a block: the attention's output and the MLP's are added to the hidden states."""
        hidden = torch.addmm(hidden, mixed.to(self.dtype), layer.out.t())
        if layer.out_bias is not None:
            hidden += layer.out_bias
        normed = rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.weights.eps)
        gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        hidden.addmm_(silu(gate).mul_(up), layer.down.t())
        if layer.down_bias is not None:
            hidden += layer.down_bias
        return hidden

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        w = self.weights
        return linear(rms_norm(hidden_BH, hidden_BH.shape[-1:], w.norm, w.eps), w.head)
