"""What an engine is, which one a model gets, and what every engine checks before it works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ccpo.engines.budget import LEAST
from ccpo.errors import UserError, nearest
from ccpo.families import bare, unsupported
from ccpo.types import Completion, Request

KINDS = ("auto", "native", "transformers")
COLDEST = 1e-4  # below it logits / temperature leave the range of floats


class Engine(Protocol):
    """Samples completions from one policy.

    ``generate`` answers in the order of the requests and samples each from its seed and prompt alone. ``refresh`` reads
    the weights of the torch module that the engine was made from again, after an optimiser step. ``prefill_tokens`` and
    ``decoded_tokens`` count, since the engine was made, the prompt tokens that were run and the tokens returned.
    ``positions`` is the most tokens that a prompt and its completion can have together; None where nothing bounds them.
    """

    prefill_tokens: int
    decoded_tokens: int
    positions: int | None

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def refresh(self) -> None: ...


def make_engine(
    model: Any,
    tokenizer: Any,
    *,
    kind: str = "auto",
    dtype: torch.dtype | None = None,
    adapter: str | None = None,
    max_batch_tokens: int = LEAST,
) -> Engine:
    """An engine over a live causal language model, or a PeftModel speaking with ``adapter`` (default: its active one).

    ``kind="auto"`` is the native decoder for the Qwen2, Qwen3 and Llama families and transformers' ``generate`` for all
    else. ``dtype`` is what the engine computes in: by default the native decoder takes bfloat16 where the hardware has
    it, and transformers the model's own. ``max_batch_tokens`` bounds the cache: rows times (longest prompt + longest
    completion) of what is decoded together. Raises UserError for an unknown kind or adapter, and for ``kind="native"``
    with a model that the native decoder does not support.
    """
    if kind not in KINDS:
        raise UserError(f"engine kind {kind!r} is unknown; it is one of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if max_batch_tokens < 1:
        raise UserError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1.")
    if bare(model).config.is_encoder_decoder:
        raise UserError("the model is an encoder-decoder; agents speak with causal (decoder-only) language models.")
    adapter = _adapter(model, adapter)
    reason = unsupported(model, adapter)
    if kind == "native" and reason is not None:
        raise UserError(f"the native engine cannot run this model: {reason}. Use engine kind 'transformers' or 'auto'.")
    if kind == "transformers" or reason is not None:
        from ccpo.engines.hf import TransformersEngine

        return TransformersEngine(model, tokenizer, dtype=dtype, adapter=adapter, max_batch_tokens=max_batch_tokens)
    from ccpo.engines.native import NativeEngine

    return NativeEngine(model, tokenizer, dtype=dtype, adapter=adapter, max_batch_tokens=max_batch_tokens)


def _adapter(model: Any, adapter: str | None) -> str | None:
    """The adapter's name, checked; None for a model without adapters."""
    known = list(getattr(model, "peft_config", None) or ())
    if not known:
        if adapter is not None:
            raise UserError(
                f"adapter {adapter!r} was asked for, but the model has no adapters; wrap it with peft first."
            )
        return None
    if adapter is None:
        active = active_adapters(model)
        if len(active) != 1:
            raise UserError(f"the model has the active adapters {active}; name one of {known}.")
        return active[0]
    if adapter not in known:
        raise UserError(f"adapter {adapter!r} is unknown; the model has {known}.{nearest(adapter, known)}")
    return adapter


def active_adapters(model: Any) -> list[str]:
    """The adapters that a model speaks with now: a property of a PeftModel, a method of a transformers model."""
    return list(model.active_adapters() if callable(model.active_adapters) else model.active_adapters)


def check_requests(requests: Sequence[Request], *, vocab: int, positions: int | None) -> None:
    """Refuses, before any work, what cannot be decoded. Raises UserError naming the request, the value and the fix."""
    checked: set[tuple[int, ...]] = set()
    for number, request in enumerate(requests):
        at = f"request {number}"
        if not request.prompt_ids:
            raise UserError(f"{at} has an empty prompt; give it at least one token (a template without text?).")
        if request.max_tokens < 1:
            raise UserError(f"{at} has max_tokens {request.max_tokens}; it must be at least 1.")
        if positions is not None and len(request.prompt_ids) + request.max_tokens > positions:
            raise UserError(
                f"{at} has a prompt of {len(request.prompt_ids)} tokens and asks for {request.max_tokens} more, but "
                f"the model has {positions} positions; shorten the prompt (cut long messages) or lower max_tokens."
            )
        if request.temperature != 0 and not COLDEST <= request.temperature < float("inf"):
            raise UserError(f"{at} has temperature {request.temperature}; it must be 0 (greedy) or at least {COLDEST}.")
        if not 0 < request.top_p <= 1:
            raise UserError(f"{at} has top_p {request.top_p}; it must lie in (0, 1], and 1 cuts nothing.")
        if request.top_k < 0:
            raise UserError(f"{at} has top_k {request.top_k}; it must be 0 (cuts nothing) or more.")
        if "" in request.stop:
            raise UserError(f"{at} has an empty stop string, which every text contains; remove it.")
        if request.prompt_ids not in checked:
            if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab:
                wrong = next(i for i in request.prompt_ids if not 0 <= i < vocab)
                raise UserError(
                    f"{at} has token id {wrong}, but the model knows ids 0 to {vocab - 1}; encode the prompt with the "
                    "model's own tokenizer, or resize the model's embeddings after adding tokens."
                )
            checked.add(request.prompt_ids)


def batches(requests: Sequence[Request], *, max_batch_tokens: int, max_rows: int) -> list[list[int]]:
    """Indices of the requests, cut into batches of similar prompt length, equal prompts side by side.

    A batch of ``n`` rows has ``n * (longest prompt + longest max_tokens) <= max_batch_tokens`` and ``n <= max_rows``,
    unless it is one single request.
    """
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids))
    found: list[list[int]] = []
    new = 0
    for index in order:
        request = requests[index]
        rows = len(found[-1]) + 1 if found else max_rows + 1
        width = len(request.prompt_ids) + max(new, request.max_tokens)  # this prompt is the longest so far
        if rows > max_rows or rows * width > max_batch_tokens:
            found.append([])
            new = 0
        found[-1].append(index)
        new = max(new, request.max_tokens)
    return found


def distinct(prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different prompts in order of first appearance, and for each prompt its place among them."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return list(places), [places[prompt] for prompt in prompts]
