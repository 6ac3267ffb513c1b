"""Makes the prompt of a turn for the reader's tokenizer: chat template, lengths, and no special tokens out of foreign text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ccpo.errors import UserError
from ccpo.teams.graph import TurnSpec
from ccpo.teams.templates import Filled

_MARK = "ccpo7f3a{}body"  # stands for the user's text while the chat template is rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """``cut_tokens`` counts the reader's tokens that were cut from over-long messages."""

    text: str
    ids: tuple[int, ...]
    cut_tokens: int


def render_prompt(
    spec: TurnSpec,
    problem: str,
    messages: Mapping[str, str | None],
    tokenizer: Any,
    *,
    system: str | None = None,
    budget: int = 4096,
    max_message_tokens: int | None = None,
) -> Prompt:
    """The prompt of ``spec`` in the tokens of the one who is to speak.

    The reader's tokenizer cuts each message to ``max_message_tokens``, then the longest messages to what fits in ``budget`` tokens; a
    message loses its end, the problem is never cut. Special tokens written out in a problem or message are read as plain text.
    Raises UserError when the prompt does not fit even without any message.
    """
    head, tail = _frame(tokenizer, system)
    known = {name: text for name, text in messages.items() if text is not None}
    caps = {name: max_message_tokens for name in known}
    cut = _cut(known, caps, tokenizer)
    prompt = _assemble(head, spec.fill(problem, {**messages, **cut.texts}), tail, tokenizer, cut.tokens)
    while len(prompt.ids) > budget:
        longest = max(cut.lengths, key=lambda name: cut.lengths[name], default=None)
        if longest is None or cut.lengths[longest] == 0:
            raise UserError(
                f"turn {spec.name!r}: the prompt has {len(prompt.ids)} tokens even without any message, more than the {budget} allowed; "
                "raise rollout.max_prompt_tokens (within the model's context) or leave long problems out. "
                f"The problem begins: {problem[:60]!r}"
            )
        caps[longest] = max(0, cut.lengths[longest] - max(1, len(prompt.ids) - budget))
        cut = _cut(known, caps, tokenizer)
        prompt = _assemble(head, spec.fill(problem, {**messages, **cut.texts}), tail, tokenizer, cut.tokens)
    return prompt


@dataclass(frozen=True, slots=True)
class _Cut:
    texts: Mapping[str, str]
    lengths: Mapping[str, int]
    tokens: int


def _cut(messages: Mapping[str, str], caps: Mapping[str, int | None], tokenizer: Any) -> _Cut:
    texts, lengths, lost = {}, {}, 0
    for name, text in messages.items():
        ids = _plain_ids(text, tokenizer)
        cap = caps[name]
        if cap is not None and len(ids) > cap:
            lost += len(ids) - cap
            ids = ids[:cap]
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
        texts[name], lengths[name] = text, len(ids)
    return _Cut(texts, lengths, lost)


def _frame(tokenizer: Any, system: str | None) -> tuple[str, str]:
    """What the chat template writes before and after the user's text."""
    if not getattr(tokenizer, "chat_template", None):
        return (f"{system}\n\n" if system else ""), ""
    return _chat_frame(tokenizer, tokenizer.chat_template, system)


@lru_cache(maxsize=64)
def _chat_frame(tokenizer: Any, template: str, system: str | None) -> tuple[str, str]:
    mark = _MARK.format("user")
    user = {"role": "user", "content": mark}
    chats: list[list[dict[str, str]]] = [[{"role": "system", "content": system}, user]] if system else [[user]]
    if system:  # templates without a system role (Gemma): the system text goes before the user's
        chats.append([{"role": "user", "content": f"{system}\n\n{mark}"}])
    for i, chat in enumerate(chats):
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        except Exception as error:  # a template is the model author's program: whatever it raises says that it refused
            if i + 1 == len(chats):
                raise UserError(f"the tokenizer's chat template failed: {error}") from None
            continue
        head, found, tail = text.partition(mark)
        if found:
            return head, tail
    raise UserError("the tokenizer's chat template drops the user's message; give the tokenizer another template")


def _assemble(head: str, pieces: Sequence[Filled], tail: str, tokenizer: Any, cut: int) -> Prompt:
    """Join the pieces. Text from outside is encoded apart wherever it writes out a special token, so that it cannot act as one."""
    special = _special_tokens(tokenizer)
    foreign = [p for p in pieces if p.name is not None and any(s in p.text for s in special)]
    text = head + "".join(p.text for p in pieces) + tail
    chat = bool(getattr(tokenizer, "chat_template", None))
    if not foreign:
        ids = tokenizer.encode(text, add_special_tokens=not chat)
        if not chat:
            ids = _without_end(ids, tokenizer)
        return Prompt(text=text, ids=tuple(ids), cut_tokens=cut)
    ids = list(tokenizer.encode(head, add_special_tokens=False)) if head else []
    if not chat and getattr(tokenizer, "bos_token_id", None) is not None and tokenizer.encode("", add_special_tokens=True):
        ids.insert(0, tokenizer.bos_token_id)
    for piece in pieces:
        if piece.text:
            ids += _plain_ids(piece.text, tokenizer) if piece.name is not None else tokenizer.encode(piece.text, add_special_tokens=False)
    ids += tokenizer.encode(tail, add_special_tokens=False) if tail else []
    return Prompt(text=text, ids=tuple(ids), cut_tokens=cut)


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers close a text with an end token, which would end the turn before it begins."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    return tuple(t for t in tokenizer.get_added_vocab() if t) + tuple(tokenizer.all_special_tokens)


def _plain_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of foreign text; where it writes out a special token, that is spelt in ordinary tokens."""
    if not text:
        return []
    special = [t for t in _special_tokens(tokenizer) if t in text]
    if not special:
        return tokenizer.encode(text, add_special_tokens=False)
    ids: list[int] = []
    rest = text
    while rest:
        hits = [(rest.find(t), t) for t in special if t in rest]
        if not hits:
            return ids + tokenizer.encode(rest, add_special_tokens=False)
        place, token = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
        # one character away from the rest, the marker is no longer one: encode it in two halves
        ids += tokenizer.encode(rest[: place + 1], add_special_tokens=False)
        rest = rest[place + 1 :]
        if len(token) == 1:
            continue
    return ids


