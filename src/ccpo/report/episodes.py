"""The episodes of a run in the form that the page needs: texts, rewards, credit, and counts of tokens in place of tokens.

The schema is that of ``docs/episodes.md``. A problem line that does not follow it is passed over and said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccpo.report.reading import Notes, gzip_lines, integer, items, mapping, number, parse, text

SCHEMA = "ccpo.episodes/1"
MAX_TURNS = 64
MAX_ROLLOUTS = 4096  # of one problem and step
PROMPTS = 2  # problems of a step whose prompts are kept
HEAD, TAIL = 12_000, 4_000  # characters kept of a longer text
_TOKENS = (b'"prompt_ids": [', b'"token_ids": [', b'"logprobs": [')
_NO_NUMBERS = (b'"', b"[", b"{", b"}")

Text = str | tuple[str, int, str]
"""A text, or its beginning, the number of characters left out, and its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """``prompt`` and ``message`` are there for the first problems of a step only: what an agent is shown, and who reads whom."""

    name: str
    agent: str
    text: Text
    message: str
    prompt: str
    finish: str
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    n: int
    reward: float
    answer: str | None
    credit: Mapping[str, float]
    advantage: Mapping[str, float]
    scores: Mapping[str, float]
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """A play without some agents; ``rollout`` as in the schema: the one whose other turns were kept, None for all."""

    removed: tuple[str, ...]
    rollout: int | None
    draw: int
    reward: float
    answer: str | None
    cached: bool
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one problem in one step; ``place`` is the problem's place in the step, counted from 0."""

    step: int
    place: int
    id: str
    problem: Text
    answer: Text
    rollouts: tuple[Rollout, ...]
    plays: tuple[Play, ...]


def read_groups(path: Path, step: int, notes: Notes) -> Iterator[Group]:
    """The groups of one episode file, as far as they can be read."""
    found = gzip_lines(path, notes)
    first = next(found, None)
    if first is None:
        return
    header = _mapping_of(first)
    if header.get("schema") != SCHEMA:
        notes.add(f"{path.name} has another schema than {SCHEMA}; it is left out.")
        return
    place, bad = 0, 0
    for line in found:
        group = _group(_mapping_of(_counted(line)), step, place)
        place += 1
        if group is None:
            bad += 1
        else:
            yield group
    if bad:
        notes.add(f"{path.name}: {bad} problem line{'s are' if bad > 1 else ' is'} damaged and left out.")
    missing = (integer(header.get("problems")) or 0) - place
    if missing > 0:
        notes.add(f"{path.name}: {missing} of its problems are missing.")


def _counted(line: bytes) -> bytes:
    """A line whose lists of tokens have become their numbers. Quotes inside a text are escaped, so that a name after a bare quote is a key."""
    for key in _TOKENS:
        first, *others = line.split(key)
        found, before = [first], first
        for part in others:
            tokens, bracket, after = part.partition(b"]")
            if bracket and not before.endswith(b"\\") and not any(sign in tokens for sign in _NO_NUMBERS):
                count = tokens.count(b",") + 1 if tokens.strip() else 0
                found += (b"%s%d" % (key[:-1], count), after)
            else:
                found += (key, part)
            before = part
        line = b"".join(found)
    return line


def _mapping_of(line: bytes) -> dict[str, Any]:
    try:
        return mapping(parse(line))
    except ValueError:
        return {}


def cut(value: Any) -> Text:
    """A text as the page keeps it."""
    if not isinstance(value, str):
        return ""
    if len(value) <= HEAD + TAIL:
        return value
    return value[:HEAD], len(value) - HEAD - TAIL, value[-TAIL:]


def _group(record: Mapping[str, Any], step: int, place: int) -> Group | None:
    problem = mapping(record.get("problem"))
    found = (_rollout(r, prompts=place < PROMPTS) for r in items(record.get("rollouts"))[:MAX_ROLLOUTS])
    rollouts = tuple(r for r in found if r is not None)
    if not problem or not rollouts:
        return None
    plays = (_play(p) for p in items(record.get("counterfactuals"))[: 8 * MAX_ROLLOUTS])
    return Group(
        step=step,
        place=place,
        id=text(problem.get("id")) or "",
        problem=cut(problem.get("text")),
        answer=cut(problem.get("answer")),
        rollouts=rollouts,
        plays=tuple(p for p in plays if p is not None),
    )


def _rollout(data: Any, *, prompts: bool) -> Rollout | None:
    data = mapping(data)
    n, reward = integer(data.get("n")), number(data.get("reward"))
    if n is None or reward is None:
        return None
    return Rollout(
        n=n,
        reward=reward,
        answer=text(data.get("answer"), 2000),
        credit=_numbers(data.get("credit")),
        advantage=_numbers(data.get("advantage")),
        scores=_numbers(data.get("scores")),
        turns=_turns(data.get("turns"), prompts=prompts),
    )


def _play(data: Any) -> Play | None:
    data = mapping(data)
    reward = number(data.get("reward"))
    removed = tuple(name for name in items(data.get("removed")) if isinstance(name, str))
    if reward is None or not removed:
        return None
    return Play(
        removed=tuple(name[:64] for name in removed),
        rollout=integer(data.get("rollout")),
        draw=integer(data.get("draw")) or 0,
        reward=reward,
        answer=text(data.get("answer"), 2000),
        cached=data.get("cached") is True,
        turns=_turns(data.get("turns"), prompts=False),
    )


def _turns(data: Any, *, prompts: bool) -> tuple[Turn, ...]:
    return tuple(_turn(t, prompts) for t in items(data)[:MAX_TURNS] if isinstance(t, dict))


def _turn(data: Mapping[str, Any], prompts: bool) -> Turn:
    agent = text(data.get("agent"), 64) or "?"
    return Turn(
        name=text(data.get("name"), 64) or agent,
        agent=agent,
        text=cut(data.get("text")),
        message=(text(data.get("message"), 4000) or "") if prompts else "",
        prompt=(text(data.get("prompt"), 6000) or "") if prompts else "",
        finish=text(data.get("finish"), 16) or "",
        tokens=_count(data.get("token_ids")),
    )


def _count(tokens: Any) -> int | None:
    return len(tokens) if isinstance(tokens, list) else integer(tokens)


def _numbers(data: Any) -> dict[str, float]:
    pairs = ((name[:64], number(value)) for name, value in list(mapping(data).items())[:MAX_TURNS])
    return {name: value for name, value in pairs if value is not None}
