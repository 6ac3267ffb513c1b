"""Where a completion ends: end tokens, stop strings, the length; and its text."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ccpo.errors import RunFailure
from ccpo.types import Completion, FinishReason, Request

Decode = Callable[[Sequence[int]], str]

_UTF8 = 4  # a byte-level token may hold one byte of a character: this many tokens for one character of a stop string
_SLACK = 8  # tokens that decode to nothing, such as special ones, within the tail that is searched


def decoder(tokenizer: Any) -> Decode:
    """Token ids to text, without special tokens and without clean-up of spaces."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a turn: the generation config's (one or a list) and the tokenizer's, sorted."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None}))


def tail_length(stop: Sequence[str], fresh: int) -> int:
    """How many last tokens must be decoded to see every stop string that ends within the last ``fresh`` ones."""
    return fresh + _SLACK + _UTF8 * max(map(len, stop))


def contains(text: str, stop: Sequence[str]) -> bool:
    return any(s in text for s in stop)


def complete(
    requests: Sequence[Request], tokens_TB: Tensor, probs_TB: Tensor, ends: Sequence[int], decode: Decode
) -> list[Completion]:
    """The requests' completions, given at least as many sampled tokens as each has: what lies beyond an end is dropped.

    Raises RunFailure where a probability is not a number: the model's weights are broken.
    """
    if bool(probs_TB.isnan().any()):
        raise RunFailure("the model's logits are not finite, so nothing can be sampled; its weights have diverged.")
    rows = zip(requests, tokens_TB.t().tolist(), probs_TB.log().t().tolist(), strict=True)
    return [complete_row(request, ids, logprobs, ends, decode) for request, ids, logprobs in rows]


def complete_row(
    request: Request, token_ids: list[int], logprobs: list[float], ends: Sequence[int], decode: Decode
) -> Completion:
    """One request's completion, cut where it ends."""
    token_ids = token_ids[: request.max_tokens]
    spoken = min((token_ids.index(end) for end in ends if end in token_ids), default=len(token_ids))
    ended = spoken < len(token_ids)
    length, finish = spoken + ended, FinishReason.EOS if ended else FinishReason.LENGTH
    text = decode(token_ids[:spoken])
    if contains(text, request.stop):
        length = _first_stop(request.stop, token_ids[:spoken], decode)
        text = decode(token_ids[:length])
        text, finish = text[: min(text.index(s) for s in request.stop if s in text)], FinishReason.STOP
    return Completion(token_ids=tuple(token_ids[:length]), logprobs=tuple(logprobs[:length]), text=text, finish=finish)


def _first_stop(stop: Sequence[str], token_ids: list[int], decode: Decode) -> int:
    """How many tokens it takes until a stop string stands in the text: its last token is the last of the completion."""
    return bisect.bisect_left(range(len(token_ids)), True, key=lambda n: contains(decode(token_ids[:n]), stop))
