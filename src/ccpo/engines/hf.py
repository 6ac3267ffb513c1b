"""transformers' `generate` as an engine: slower than the native decoder, and for every causal language model.

A logits processor samples with this library's noise and forces its choice, so that seeds, temperatures, top-k and top-p
hold row by row and mean what they mean in the native decoder; a stopping criterion ends each row on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ccpo.engines.base import active_adapters, bare, batches, check_requests
from ccpo.engines.finish import complete, contains, decoder, end_ids, tail_length
from ccpo.engines.sampling import Sampler
from ccpo.errors import UserError
from ccpo.types import Completion, Request

LOGITS = 2**26  # rows times vocabulary of one step


class _Force(LogitsProcessor):
    """Draws a token a row, keeps it and its probability, and leaves no other choice."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.tokens: list[Tensor] = []
        self.probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B, prob_B = self.sampler.draw(scores, len(self.tokens))
        self.tokens.append(token_B)
        self.probs.append(prob_B)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)


class _End(StoppingCriteria):
    """A row ends at an end token, at its own max_tokens, or when a stop string stands in its latest text."""

    def __init__(self, requests: Sequence[Request], ends_E: Tensor, decode: Any) -> None:
        self.requests, self.ends_E, self.decode = requests, ends_E, decode
        self.limit_B = torch.tensor([r.max_tokens for r in requests], device=ends_E.device)
        self.stopped_B = torch.zeros(len(requests), dtype=torch.bool, device=ends_E.device)
        self.stopping = [row for row, r in enumerate(requests) if r.stop]
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.steps += 1
        self.stopped_B |= torch.isin(input_ids[:, -1], self.ends_E) | (self.limit_B <= self.steps)
        for row in self.stopping:
            stop = self.requests[row].stop
            tail = min(self.steps, tail_length(stop, 1))
            if not self.stopped_B[row] and contains(self.decode(input_ids[row, -tail:].tolist()), stop):
                self.stopped_B[row] = True
        return self.stopped_B


class TransformersEngine:
    """Samples by `generate` from the live model; see `ccpo.engines.base.Engine`."""

    def __init__(
        self, model: Any, tokenizer: Any, *, dtype: torch.dtype | None, adapter: str | None, max_batch_tokens: int
    ) -> None:
        weights = bare(model).get_input_embeddings().weight
        self.dtype = weights.dtype if dtype is None else dtype
        if self.dtype not in (weights.dtype, torch.bfloat16, torch.float16):
            raise UserError(
                f"the transformers engine cannot compute a {weights.dtype} model in {self.dtype}; load the model with "
                f"dtype={self.dtype}, or leave the engine's dtype unset."
            )
        self.prefill_tokens = self.decoded_tokens = 0
        self._model, self._adapter, self._device = model, adapter, weights.device
        self._decode = decoder(tokenizer)
        self._ends = end_ids(bare(model), tokenizer)
        self._ends_E = torch.tensor(self._ends, dtype=torch.int64, device=self._device)
        self._vocab = bare(model).config.get_text_config().vocab_size
        self.positions = getattr(bare(model).config.get_text_config(), "max_position_embeddings", None)
        self._max_batch_tokens = max_batch_tokens

    def refresh(self) -> None:
        """Nothing to do: the live model is what speaks."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order. Raises UserError for a request that cannot be decoded."""
        check_requests(requests, vocab=self._vocab, positions=self.positions)
        max_rows = max(1, LOGITS // self._vocab)
        found: dict[int, Completion] = {}
        with torch.no_grad(), _speaking(self._model, self._adapter), self._precision():
            for indices in batches(requests, max_batch_tokens=self._max_batch_tokens, max_rows=max_rows):
                found.update(zip(indices, self._run([requests[i] for i in indices]), strict=True))
        return [found[i] for i in range(len(requests))]

    def _precision(self) -> Any:
        if self.dtype == bare(self._model).get_input_embeddings().weight.dtype:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)

    def _run(self, requests: list[Request]) -> list[Completion]:
        width = max(len(r.prompt_ids) for r in requests)
        ids_BL = torch.tensor(
            [(0,) * (width - len(r.prompt_ids)) + r.prompt_ids for r in requests], device=self._device
        )
        size_B = torch.tensor([len(r.prompt_ids) for r in requests], device=self._device)
        real_BL = torch.arange(width, device=self._device) >= (width - size_B)[:, None]
        force = _Force(Sampler.of(requests, self._device))
        config = GenerationConfig(do_sample=False, max_new_tokens=max(r.max_tokens for r in requests), pad_token_id=0)
        config.eos_token_id = list(self._ends) or None
        bare(self._model).generate(
            input_ids=ids_BL,
            attention_mask=real_BL.long(),
            generation_config=config,
            logits_processor=LogitsProcessorList([force]),
            stopping_criteria=StoppingCriteriaList([_End(requests, self._ends_E, self._decode)]),
        )
        tokens_TB, probs_TB = torch.stack(force.tokens), torch.stack(force.probs)
        done = complete(requests, tokens_TB, probs_TB, self._ends, self._decode)
        self.prefill_tokens += sum(len(r.prompt_ids) for r in requests)
        self.decoded_tokens += sum(len(c.token_ids) for c in done)
        return done


@contextmanager
def _speaking(model: Any, adapter: str | None) -> Iterator[None]:
    """The model in eval mode, with its cache on, with this adapter and without generation defaults of its own (a
    repetition penalty would change the policy that is trained); all is put back afterwards."""
    plain = bare(model)
    training = [module for module in model.modules() if module.training]
    defaults, plain.generation_config = plain.generation_config, GenerationConfig()
    trainable = [(p, p.requires_grad) for p in model.parameters()] if adapter is not None else []
    before = active_adapters(model) if adapter is not None else []
    try:
        model.eval()
        if adapter is not None:
            model.set_adapter(adapter)
        yield
    finally:
        plain.generation_config = defaults
        for module in training:
            module.training = True
        if len(before) == 1:
            model.set_adapter(before[0])
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
