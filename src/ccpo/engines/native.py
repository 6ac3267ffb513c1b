"""The native decoder: Qwen2, Qwen3 and Llama models as a handful of tensor operations a layer.

Equal prompts are prefilled once and their cache (`ccpo.engines.cache`) is dealt out to their rows, or shared by them
(`ccpo.engines.prefix`). Rows that have finished leave the
batch. The device is asked which they are once in `CHECK` steps; what a row samples beyond its end is dropped afterwards. On a GPU a step
is recorded once and then played (`ccpo.engines.graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from ccpo.engines.base import batches, check_requests, distinct
from ccpo.engines.cache import Block, Cache
from ccpo.engines.finish import complete, contains, decoder, end_ids, tail_length
from ccpo.engines.graphs import Arena, Fixed
from ccpo.engines.prefix import SharedCache, worth_sharing
from ccpo.engines.sampling import Sampler
from ccpo.engines.weights import Layer, Weights
from ccpo.types import Completion, Request

CHECK = 4  # steps between two looks at which rows have ended
KEEP = 0.75  # finished rows leave when at most this share of the batch is still alive
PREFILL_TOKENS = 8_192  # prompt tokens that go through a layer at once
LOGITS = 2**26  # rows times vocabulary of one step


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
        self.max_batch_tokens = max_batch_tokens
        self.arena = Arena(self.weights, self.step) if self.device.type == "cuda" else None

    @property
    def token_bytes(self) -> int:
        """What a token takes in the cache."""
        w = self.weights
        return 2 * len(w.layers) * w.kv_heads * w.head_dim * w.attention_dtype.itemsize

    def refresh(self) -> None:
        """Reads the model's weights again."""
        self.weights.refresh()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order. Raises UserError for a request that cannot be decoded."""
        check_requests(requests, vocab=self.weights.vocab, positions=self.positions)
        max_rows = max(1, LOGITS // self.weights.vocab)
        found: dict[int, Completion] = {}
        with torch.inference_mode():
            for indices in batches(requests, max_batch_tokens=self.max_batch_tokens, max_rows=max_rows):
                found.update(zip(indices, self._run([requests[i] for i in indices]), strict=True))
        return [found[i] for i in range(len(requests))]

    def logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits after each prompt, ``[prompts, vocabulary]``: those that its first token is sampled from."""
        with torch.inference_mode():
            return self._prefill([tuple(p) for p in prompts], spare=0)[1]

    def _run(self, requests: list[Request]) -> list[Completion]:
        steps = max(r.max_tokens for r in requests)
        cache, logits_BV = self._begin(requests, steps)
        sampler = Sampler.of(requests, self.device)
        rows = torch.arange(len(requests), device=self.device)
        limit_B = torch.tensor([r.max_tokens for r in requests], device=self.device)
        ended_B = torch.zeros(len(requests), dtype=torch.bool, device=self.device)
        tokens_TB = torch.zeros(steps, len(requests), dtype=torch.int64, device=self.device)
        probs_TB = torch.ones(steps, len(requests), device=self.device)
        fresh: list[tuple[Tensor, Tensor]] = []
        for step in range(steps):
            fresh.append(sampler.draw(logits_BV, step))
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
                    cache = cache.select(alive)
                    token_B, rows, sampler = token_B[alive], rows[alive], sampler.select(alive)
            logits_BV = (self.arena or self).step(cache, token_B)
        done = complete(requests, tokens_TB, probs_TB, self._ends, self._decode)
        self.decoded_tokens += sum(len(c.token_ids) for c in done)
        return done

    def _find_stops(self, requests: list[Request], tokens_TB: Tensor, rows: Tensor, ended_B: Tensor) -> None:
        """Marks the rows in whose latest text a stop string stands. `complete` then finds the exact place."""
        if not any(r.stop for r in requests):
            return
        open_B = rows[~ended_B[rows]]
        longest = max(tail_length(r.stop, CHECK) for r in requests if r.stop)
        tails = tokens_TB[-longest:, open_B].t().tolist()
        found = [
            row
            for row, tail in zip(open_B.tolist(), tails, strict=True)
            if (stop := requests[row].stop) and contains(self._decode(tail[-tail_length(stop, CHECK) :]), stop)
        ]
        ended_B[torch.tensor(found, dtype=torch.int64, device=self.device)] = True

    def _begin(self, requests: list[Request], steps: int) -> tuple[Cache | SharedCache | Fixed, Tensor]:
        """Prefills the distinct prompts and deals their caches out to the requests' rows; the cache and the logits of the first tokens."""
        prompts, owner = distinct([r.prompt_ids for r in requests])
        if len(prompts) == len(requests) and self.arena is None:
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

    def _prefill(self, prompts: Sequence[tuple[int, ...]], *, spare: int) -> tuple[Cache, Tensor]:
        """Runs the prompts, some rows at a time, into a cache with room for ``spare`` more columns; their next tokens' logits."""
        sizes = [len(p) for p in prompts]
        cache = Cache.empty(self.weights, sizes, spare)
        self.prefill_tokens += sum(sizes)
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

    def step(self, cache: Cache | SharedCache | Fixed, token_B: Tensor) -> Tensor:
        """Runs one more token of every row; the logits of those after it."""
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
