"""Renders the prompt of a turn for the tokenizer that will read it, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from ccpo.errors import UserError
from ccpo.teams.graph import TurnSpec
from ccpo.teams.messages import ChatReader, Prompt
from ccpo.teams.reader import Reader, reader_of, scatter
from ccpo.teams.templates import Values


class PromptTooLong(UserError):
    """A prompt that is over its budget without any message."""


def render_prompt(
    turn: TurnSpec,
    values: Values,
    tokenizer: Any,
    *,
    system: str | None = None,
    budget: int,
    max_message_tokens: int | None = None,
    keep_tail: bool = False,
) -> Prompt:
    """The prompt of ``turn``: its template with ``values``, the system prompt, the tokenizer's chat template where it
    has one. A :class:`~ccpo.teams.messages.ChatReader` in the tokenizer's place gives messages.

    Messages longer than ``max_message_tokens`` are cut to it, and while the prompt is longer than ``budget`` tokens the
    longest messages are cut further, evenly, keeping their heads (or tails). The problem is never cut. Nothing in
    ``values`` can put a special token into the prompt: text that imitates one gets a space inside it.

    Raises :class:`PromptTooLong` (a UserError) where the prompt is too long without any message.
    """
    reader = reader_of(tokenizer)
    given = {name: text and reader.defuse(text) for name, text in values.items()}
    job = _Job(turn=turn, reader=reader, system=system, budget=budget, cap=max_message_tokens, tail=keep_tail)
    prompt = job.fit(given)
    if reader.marks(prompt.ids) == job.expected_marks(given):
        return prompt
    # A token was made across a border (a message "<|im_" before a message "end|>"), or by the tokenizer itself.
    return job.fit({name: text and scatter(text) for name, text in given.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    turn: TurnSpec
    reader: Reader | ChatReader
    system: str | None
    budget: int
    cap: int | None
    tail: bool

    def fit(self, values: Values) -> Prompt:
        shown, cut = dict(values), 0
        messages = [name for name in self.turn.reads if shown.get(name)]
        if self.cap is not None:
            cut += self._cut_to(self.cap, shown, messages)
        prompt = self._prompt(shown)
        while prompt.tokens > self.budget:
            lengths = [self.reader.length(shown[name]) for name in messages]
            if not any(lengths):
                raise PromptTooLong(
                    f"the prompt of turn {self.turn.name!r} has {prompt.tokens} tokens without any message, and the "
                    f"budget is {self.budget}; "
                    "raise rollout.max_prompt_tokens, shorten the template or leave out such long problems"
                )
            cut += self._cut_to(_level(lengths, prompt.tokens - self.budget), shown, messages)
            prompt = self._prompt(shown)
        return replace(prompt, cut_tokens=cut) if cut else prompt

    def expected_marks(self, values: Values) -> tuple[int, ...]:
        """The special tokens that the frame and the template bring themselves."""
        present = tuple(sorted(name for name, text in values.items() if text is not None))
        key = (self.turn.template, self.turn.reads, self.turn.dropped, present, self.system)
        known = self.reader.expected
        if key not in known:
            if len(known) >= 1024:
                known.clear()
            bare = {name: None if text is None else "x" for name, text in values.items()}
            known[key] = self.reader.marks(self._prompt(bare).ids)
        return known[key]

    def _prompt(self, values: Values) -> Prompt:
        return self.reader.prompt(self.turn.render(values), self.system)

    def _cut_to(self, limit: int, shown: dict[str, str | None], messages: Collection[str]) -> int:
        """Cut ``messages`` in ``shown`` to ``limit`` tokens each; returns the number of tokens cut."""
        cut = 0
        for name in messages:
            before = self.reader.length(shown[name])
            if before > limit:
                shown[name] = self.reader.cut(shown[name], limit, tail=self.tail)
                cut += before - self.reader.length(shown[name])
        return cut


def _level(lengths: Collection[int], excess: int) -> int:
    """The greatest length to which the longest can be cut so that ``excess`` tokens go; 0 where all of them are not
    enough."""
    ordered = sorted(lengths, reverse=True)
    for count, following in enumerate([*ordered[1:], 0], start=1):
        if sum(ordered[:count]) - count * following >= excess:
            return (sum(ordered[:count]) - excess) // count
    return 0
