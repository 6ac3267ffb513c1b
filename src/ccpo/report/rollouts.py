"""Rollouts for the page: a sample that fits, in a table of texts and rows of numbers, so that nothing is written twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from ccpo.report.episodes import PROMPTS, Group, Rollout, Text, Turn
from ccpo.report.page import to_json
from ccpo.report.reading import short

MAX_ROLLOUTS = 10_000
MAX_BYTES = 6_500_000  # of the rollouts of a page, as they stand in it

Key = tuple[bytes, int, int]
"""Rank of a problem, step, and place in the step."""
Kept = tuple[Key, int, Group]
"""A group with its key and its size."""


class Sample:
    """Groups of a run, and of more than fit a sample: all rollouts of some problems, chosen by a hash of the problem, so
    that a problem that is kept is kept in every step. Which are chosen does not depend on the order in which they come, and no
    more is held than about twice what fits."""

    def __init__(self, rollouts: int = MAX_ROLLOUTS, size: int = MAX_BYTES) -> None:
        self.limits = (rollouts, size)
        self.kept: list[Kept] = []
        self.bar: Key | None = None  # of the first group that did not fit: neither it nor one behind it ever will
        self.seen = self.held = self.size = 0

    def add(self, groups: Iterable[Group]) -> None:
        for group in groups:
            self.seen += len(group.rollouts)
            key = _key(group)
            if self.bar is not None and key >= self.bar:
                continue
            size = _size(group)
            self.kept.append((key, size, _without_prompts(group)))
            self.held += len(group.rollouts)
            self.size += size
            if self.held > 2 * self.limits[0] or self.size > 2 * self.limits[1]:
                self._cut()

    def _cut(self) -> None:
        """Keep the groups of lowest rank that fit; at least one."""
        self.kept.sort(key=itemgetter(0))
        fits = _fitting(self.kept, *self.limits)
        if len(fits) < len(self.kept):
            self.bar = self.kept[len(fits)][0]
        self.kept, self.held, self.size = fits, *_extent(fits)

    def table(self, agents: Sequence[str]) -> dict[str, Any]:
        """The rollouts that are kept, in order of step, problem and place, within the limit of bytes as they stand in the page."""
        self._cut()
        shown, (rollouts, limit) = self.kept, self.limits
        most = limit
        while True:
            table = _table([group for _, _, group in shown], agents)
            length = len(to_json(table).encode())
            if length <= limit or len(shown) == 1:
                return table | {"seen": self.seen, "shown": len(table["rows"])}
            most = int(min(most, _extent(shown)[1]) * 0.9 * limit / length)
            shown = _fitting(shown, rollouts, most)


def _fitting(ordered: Sequence[Kept], rollouts: int, most: int) -> list[Kept]:
    """The first of the groups up to the one that does not fit; at least one."""
    held = size = count = 0
    for _, more, group in ordered:
        held, size = held + len(group.rollouts), size + more
        if count and (held > rollouts or size > most):
            break
        count += 1
    return list(ordered[:count])


def _extent(kept: Sequence[Kept]) -> tuple[int, int]:
    """Rollouts and size."""
    return sum(len(group.rollouts) for _, _, group in kept), sum(size for _, size, _ in kept)


def _key(group: Group) -> Key:
    return _rank(group), group.step, group.place


def _without_prompts(group: Group) -> Group:
    """A group without what the table does not hold: prompts, and messages beside texts."""
    if group.place >= PROMPTS:
        return group
    rollouts = (
        replace(rollout, turns=tuple(replace(turn, prompt="", message="") for turn in rollout.turns))
        for rollout in group.rollouts
    )
    return replace(group, rollouts=tuple(rollouts))


def _rank(group: Group) -> bytes:
    """The same for a problem in all steps, and else as good as random."""
    name = group.id or repr(group.problem)
    return hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()


def _size(group: Group) -> int:
    """About how many characters a group adds to the table."""
    turns = sum(40 + _length(t.text) for r in group.rollouts for t in r.turns)
    turns += sum(40 + _length(t.text) for p in group.plays for t in p.turns)
    return 100 + _length(group.problem) + turns + 80 * (len(group.rollouts) + len(group.plays))


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[2])


class _Texts:
    """Every text once."""

    def __init__(self) -> None:
        self.place: dict[Text, int] = {}

    def __call__(self, text: Text | None) -> int | None:
        return None if text is None else self.place.setdefault(text, len(self.place))


def _table(groups: Sequence[Group], agents: Sequence[str]) -> dict[str, Any]:
    """``texts``; ``turns``: names and agents; ``groups``: step, place, id, problem, answer, plays; ``rows``: group, n, reward,
    answer, turns, credit, advantage. A text is a place in ``texts``; credit and advantage are in the order of ``agents``."""
    texts, turns = _Texts(), {}
    groups = sorted(groups, key=lambda g: (g.step, g.place))
    heads, rows = [], []
    for group in groups:
        plays = [
            [
                [agents.index(a) for a in play.removed if a in agents],
                play.rollout,
                play.draw,
                short(play.reward),
                texts(play.answer),
                int(play.cached),
                _said(play.turns, texts, turns, {}),
            ]
            for play in group.plays
        ]
        for rollout in group.rollouts:
            rows.append([len(heads), *_row(rollout, agents, texts, turns)])
        heads.append([group.step, group.place, texts(group.id), texts(group.problem), texts(group.answer), plays])
    named = [list(key) for key in turns]
    return {"agents": list(agents), "turns": named, "groups": heads, "rows": rows, "texts": list(texts.place)}


def _row(rollout: Rollout, agents: Sequence[str], texts: _Texts, turns: dict[tuple[str, str], int]) -> list[Any]:
    return [
        rollout.n,
        short(rollout.reward),
        texts(rollout.answer),
        _said(rollout.turns, texts, turns, rollout.scores),
        [short(rollout.credit.get(a)) for a in agents],
        [short(rollout.advantage.get(a)) for a in agents],
    ]


def _said(spoken: Sequence[Turn], texts: _Texts, turns: dict[tuple[str, str], int], scores: Any) -> list[list[Any]]:
    """Of each turn: its place in ``turns``, text, tokens, whether it was cut off, and its score where the decision read it."""
    return [
        [
            turns.setdefault((t.name, t.agent), len(turns)),
            texts(t.text),
            t.tokens,
            int(t.finish == "length"),
            *([short(scores[t.name])] if t.name in scores else []),
        ]
        for t in spoken
    ]
