"""A prompt as its reader takes it: token ids for a model of ours, messages for an endpoint; and the reader of messages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ccpo.types import Message

CHARACTERS = 4  # of one token, where no tokenizer counts
FRAME = 4  # tokens that a chat's frame adds to a message
MARKS = re.compile(r"<\|[^\s|<>]{1,64}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<[be]os>")
"""What the common chat formats mark roles and ends with: many servers read it as such inside a message, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as text. ``ids`` for a model of ours, or ``messages`` for an endpoint: the other one is empty. ``tokens`` is how
    long it is, for an endpoint as its reader counts; ``cut_tokens`` counts the tokens that messages lost to fit."""

    text: str
    tokens: int
    ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    cut_tokens: int = 0


@dataclass(kw_only=True)
class ChatReader:
    """The counterpart of :class:`ccpo.teams.reader.Reader` for agents that read messages. Lengths are those of ``counter``, the reader of
    a tokenizer like the endpoint's; without one, four characters are a token."""

    counter: Any = None
    expected: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    def prompt(self, user: str, system: str | None) -> Prompt:
        """The messages; their text is what the episodes show."""
        messages: tuple[Message, ...] = (("user", user),) if not system else (("system", system), ("user", user))
        return Prompt(
            text="\n\n".join(f"[{role}]\n{text}" for role, text in messages),
            tokens=sum(self.length(text) + FRAME for _, text in messages),
            messages=messages,
        )

    def marks(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """No token is seen here."""
        return ()

    def length(self, text: str) -> int:
        return self.counter.length(text) if self.counter else -(-len(text) // CHARACTERS)

    def cut(self, text: str, limit: int, *, tail: bool = False) -> str:
        """The head (or tail) of ``text`` that has at most ``limit`` tokens."""
        if self.counter:
            return self.counter.cut(text, limit, tail=tail)
        if limit < 1:
            return ""
        return text[-limit * CHARACTERS :] if tail else text[: limit * CHARACTERS]

    def defuse(self, text: str) -> str:
        """``text`` with a space inside all that the common chat formats, or the counter's tokenizer, would read as a mark."""
        text = self.counter.defuse(text) if self.counter else text
        while MARKS.search(text):
            text = MARKS.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text
