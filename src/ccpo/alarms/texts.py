"""What can be seen in a text without understanding it: that it says nothing, that it repeats, that it gives the answer away."""

from __future__ import annotations

import re
from collections.abc import Sequence

MIN_COPY = 20
"""Characters from which a text that is found elsewhere counts as copied; shorter ones are alike by chance."""
LOOKED_AT = 4_000
"""Characters at the end of a text in which a stated answer is looked for."""
MOSTLY = 0.9
"""Share of a text that must be another one for it to be a copy with a frame around it."""

_SIGNS = frozenset("+-*/=<>^\\$")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_STATED = re.compile(
    r"\b(?:final\s+)?answer\s*(?:is|=|:)\s*[:=]?\s*(.{1,80}?)(?:\s*[.;!]?\s*$|[.;!]\s|\n)", re.I | re.M
)
_MARKED = re.compile(r"####\s*(.{1,80}?)\s*$", re.M)
_ASKS = re.compile(r"\\boxed|\bfinal answer\b", re.I)
_FORBIDS = re.compile(r"\b(?:not|never|without|don't)\b[^.!?\n]*(?:\\boxed|\bfinal answer\b)", re.I)


def says_nothing(text: str) -> bool:
    """Whether there is no letter, digit or mathematical sign in a text."""
    return not any(map(str.isalnum, text)) and _SIGNS.isdisjoint(text)


def folded(text: str) -> str:
    """A text with its case and its white space folded."""
    return " ".join(text.casefold().split())


def copied_from(text: str, sources: Sequence[str]) -> bool:
    """Whether a folded text of some length is one of the folded ``sources``, a part of one, or one with a little around it."""
    if len(text) < MIN_COPY:
        return False
    return any(
        text in source or (len(source) >= MIN_COPY and len(source) >= MOSTLY * len(text) and source in text)
        for source in sources
    )


def stated_answers(text: str) -> list[str]:
    """What a text declares to be the answer: in ``\\boxed{}``, after "the answer is", "answer:" or "####"; folded."""
    text = text[-LOOKED_AT:]
    found: list[str] = []
    if "boxed" in text:
        found += _BOXED.findall(text)
    if "nswer" in text or "NSWER" in text:
        found += _STATED.findall(text)
    if "####" in text:
        found += _MARKED.findall(text)
    return [_bare(answer) for answer in found]


def gives_away(text: str, answers: Sequence[str]) -> bool:
    """Whether a text declares one of ``answers`` to be the answer. Arriving at a number is not declaring it."""
    stated = stated_answers(text)
    return bool(stated) and not set(stated).isdisjoint(map(_bare, answers))


def asks_for_answer(template: str) -> bool:
    """Whether the template of a prompt asks for a final answer, and not for the opposite."""
    return _ASKS.search(template) is not None and not forbids_answer(template)


def forbids_answer(template: str) -> bool:
    """Whether the template of a prompt forbids to state the final answer."""
    return _FORBIDS.search(template) is not None


def _bare(answer: str) -> str:
    return folded(answer).strip(" .,;:$*()'\"").replace(" ", "")
