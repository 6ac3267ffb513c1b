"""Reads the JSON of chat completions and model lists from an endpoint that is not trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ccpo.types import FinishReason

MOST_TOKENS = 10**9  # of one reply
MOST_NAMES = 10_000
FINISHES = {
    "stop": FinishReason.EOS,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.LENGTH,  # cut short, if not by us
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a reply says. ``trouble``: why it cannot be used, or empty. ``prompt`` and ``generated``: tokens as it reports them, or None."""

    text: str = ""
    finish: FinishReason = FinishReason.LENGTH
    prompt: int | None = None
    generated: int | None = None
    trouble: str = ""


def read_reply(body: bytes, stop: Sequence[str]) -> Said:
    """The text of a chat completion, cut at the first stop string. Never raises: what is wrong is in ``trouble``."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return Said(trouble="a reply that is not JSON")
    if not isinstance(data, dict):
        return Said(trouble="a reply that is not a JSON object")
    usage, trouble = _usage(data.get("usage"))
    if not trouble:
        text, finish, trouble = _choice(data.get("choices"), stop)
    if trouble:
        return Said(prompt=usage[0], generated=usage[1], trouble=f"a reply {trouble}")
    return Said(text=text, finish=finish, prompt=usage[0], generated=usage[1])


def _usage(usage: Any) -> tuple[tuple[int | None, int | None], str]:
    if usage is None:
        return (None, None), ""
    if not isinstance(usage, dict):
        return (None, None), "whose usage is not an object"
    counts = tuple(usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    for count in counts:
        if count is not None and (type(count) is not int or not 0 <= count <= MOST_TOKENS):
            return (None, None), "whose usage is not a number of tokens"
    return counts, ""


def _choice(choices: Any, stop: Sequence[str]) -> tuple[str, FinishReason, str]:
    nothing = ("", FinishReason.LENGTH)
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return *nothing, "without a list of choices"
    message, reason = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(reason, str) or reason not in FINISHES:
        return *nothing, "without a finish_reason of stop, length or content_filter"
    if not isinstance(message, dict):
        return *nothing, "without a message"
    text, finish = message.get("content"), FINISHES[reason]
    if text is None and finish is FinishReason.LENGTH:  # a model that thinks in silence, and was cut while it thought
        text = ""
    if not isinstance(text, str):
        return *nothing, "whose message has no text"
    places = [place for s in stop if (place := text.find(s)) >= 0]
    if places:
        return text[: min(places)], FinishReason.STOP, ""
    if choices[0].get("stop_reason") in stop:  # as vLLM says it
        finish = FinishReason.STOP
    return text, finish, ""


def model_names(body: bytes) -> list[str]:
    """The names in a list of models; empty where it is none."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return []
    listed = data.get("data") if isinstance(data, dict) else None
    if not isinstance(listed, list) or len(listed) > MOST_NAMES:
        return []
    return [m["id"] for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str) and m["id"].isprintable()]
