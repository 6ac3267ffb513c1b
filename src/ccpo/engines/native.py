"""The native decoder of Qwen2, Qwen3 and Llama models: what is decoded together, sampled, and when a row ends.

The model itself runs in C where it can (`ccpo.engines.fused`), else in torch (`ccpo.engines.layers`). Equal prompts are prefilled once. Rows
that have finished leave the batch. The device is asked which they are once in `CHECK` steps; what a row samples beyond its end is dropped
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccpo.engines.base import batches, check_requests, distinct
from ccpo.engines.finish import complete, contains, decoder, end_ids, tail_length
from ccpo.engines.fused import FusedLayers, fits
from ccpo.engines.layers import TorchLayers
from ccpo.engines.sampling import Sampler
from ccpo.engines.weights import Weights
from ccpo.families import bare, compute_dtype
from ccpo.types import Completion, Request

CHECK = 4  # steps between two looks at which rows have ended
LOGITS = 2**26  # rows times vocabulary of one step


class NativeEngine:
    """Samples from a fused copy of the model's weights; see `ccpo.engines.base.Engine`."""

    def __init__(
        self, model: Any, tokenizer: Any, *, dtype: torch.dtype | None, adapter: str | None, max_batch_tokens: int
    ) -> None:
        config, device = bare(model).config, bare(model).model.norm.weight.device
        dtype = compute_dtype(device) if dtype is None else dtype
        fused = fits(config, dtype, device)
        self.weights = Weights.of(model, dtype=dtype, adapter=adapter, fused=fused)
        self.layers = FusedLayers(self.weights) if fused else TorchLayers(self.weights)
        self.dtype, self.device = self.weights.dtype, self.weights.device
        self.prefill_tokens = self.decoded_tokens = 0
        self._decode = decoder(tokenizer)
        self._ends = end_ids(self.weights.source, tokenizer)
        self._ends_E = torch.tensor(self._ends, dtype=torch.int64, device=self.device)
        self.positions = self.weights.source.config.max_position_embeddings
        self.max_batch_tokens = max_batch_tokens

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
        """The logits after each prompt, ``[prompts, vocabulary]``: those that its first token is sampled from. Raises UserError as `generate`."""
        check_requests(
            [Request(prompt_ids=tuple(p), seed=0, max_tokens=1) for p in prompts],
            vocab=self.weights.vocab,
            positions=None,
        )
        with torch.inference_mode():
            return self.layers.logits([tuple(p) for p in prompts])

    def _run(self, requests: list[Request]) -> list[Completion]:
        steps = max(r.max_tokens for r in requests)
        prompts, owner = distinct([r.prompt_ids for r in requests])
        self.prefill_tokens += sum(map(len, prompts))
        cache, logits_BV = self.layers.begin(prompts, owner, steps)
        sampler = Sampler.of(requests, self.device)
        rows = torch.arange(len(requests), device=self.device)
        limit_B = torch.tensor([r.max_tokens for r in requests], device=self.device)
        ended_B = torch.zeros(len(requests), dtype=torch.bool, device=self.device)
        tokens_TB = torch.zeros(steps, len(requests), dtype=torch.int64, device=self.device)
        probs_TB = torch.ones(steps, len(requests), dtype=torch.float32, device=self.device)
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
                if len(alive) < len(rows) and len(alive) <= self.layers.KEEP * len(rows):
                    cache = cache.select(alive)
                    token_B, rows, sampler = token_B[alive], rows[alive], sampler.select(alive)
            logits_BV = self.layers.step(cache, token_B)
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
