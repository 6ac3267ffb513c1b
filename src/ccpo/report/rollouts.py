"""Rollouts for the page: a sample that fits, in a table of texts and rows of numbers, so that nothing is written twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ccpo.report.episodes import Group, Rollout, Text, Turn
from ccpo.report.page import to_json
from ccpo.report.reading import short

MAX_ROLLOUTS = 10_000
MAX_BYTES = 6_500_000  # of the rollouts of a page, as they stand in it


class Sample:
    """Groups of a run, and of more than fit a sample: all rollouts of some problems, chosen by a hash of the problem, so
    that a problem that is kept is kept in every step."""

    def __init__(self, rollouts: int = MAX_ROLLOUTS, size: int = MAX_BYTES) -> None:
        self.limits = (rollouts, size)
        self.kept: list[tuple[bytes, int, Group]] = []
        self.seen = self.held = self.size = 0

    def add(self, groups: Sequence[Group]) -> None:
        for group in groups:
            size = _size(group)
            self.kept.append((_rank(group), size, group))
            self.seen += len(group.rollouts)
            self.held += len(group.rollouts)
            self.size += size
        if self.held > 2 * self.limits[0] or self.size > 2 * self.limits[1]:
            self._cut(*self.limits)

    def _cut(self, rollouts: int, most: int) -> None:
        """Keep the groups of lowest rank that fit; at least one."""
        self.kept.sort(key=lambda k: (k[0], k[2].step, k[2].place))
        held = size = count = 0
        for _, more, group in self.kept:
            if count and (held + len(group.rollouts) > rollouts or size + more > most):
                break
            held, size, count = held + len(group.rollouts), size + more, count + 1
        self.kept, self.held, self.size = self.kept[:count], held, size

    def table(self, agents: Sequence[str]) -> dict[str, Any]:
        """The rollouts that are kept, in order of step, problem and place, within the limit of bytes as they stand in the page."""
        self._cut(*self.limits)
        most = self.limits[1]
        while True:
            table = _table([group for _, _, group in self.kept], agents)
            length = len(to_json(table).encode())
            if length <= self.limits[1] or len(self.kept) == 1:
                return table | {"seen": self.seen, "shown": len(table["rows"])}
            most = int(min(most, self.size) * 0.9 * self.limits[1] / length)
            self._cut(self.limits[0], most)


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
