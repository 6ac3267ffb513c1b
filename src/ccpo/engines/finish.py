"""Where a completion ends: end tokens, stop strings, the length; and its text."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

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
    request: Request, token_ids: list[int], logprobs: list[float], ends: Sequence[int], decode: Decode
) -> Completion:
    """The completion of a request, given at least as many sampled tokens as it has: what lies beyond its end is dropped.

    With a stop string, ``token_ids`` end with the token that completes it and ``text`` ends before it.
    """
    token_ids = token_ids[: request.max_tokens]
    size = min((token_ids.index(e) for e in ends if e in token_ids), default=len(token_ids))
    finish = FinishReason.LENGTH if size == len(token_ids) else FinishReason.EOS
    text = decode(token_ids[:size])
    length = size + (finish is FinishReason.EOS)
    if request.stop and contains(text, request.stop):
        length = bisect.bisect_left(
            range(size), True, key=lambda i: contains(decode(token_ids[: i + 1]), request.stop)
        ) + 1  # fmt: skip
        text = decode(token_ids[:length])
        text = text[: min(text.index(s) for s in request.stop if s in text)]
        finish = FinishReason.STOP
    return Completion(
        token_ids=tuple(token_ids[:length]), logprobs=tuple(logprobs[:length]), text=text, finish=finish
    )  # fmt: skip
