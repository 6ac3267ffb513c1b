"""The alarms while a run goes on: a window of tallies, looked at after each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ccpo.alarms.base import MIN_STEPS, WINDOW, Alarm, Moments, Shape, Tally, View, merge
from ccpo.alarms.findings import ALARMS
from ccpo.alarms.tally import PerAgent, tally
from ccpo.types import Group

FIRST = ("alone/",)
"""What is remembered of the first steps: what may be lost later."""


class Watch:
    """Sees every step of a run. ``shape``: the team's; ``rule``: the credit rule's kind."""

    def __init__(self, shape: Shape, rule: str) -> None:
        self.shape, self.rule = shape, rule
        self.window: deque[tuple[int, Tally]] = deque(maxlen=WINDOW)
        self.first: dict[str, Moments] = {}
        self.told: set[tuple[str, str | None]] = set()

    def see(
        self,
        step: int,
        groups: Sequence[Group],
        credit: PerAgent,
        advantage: PerAgent,
        metrics: Mapping[str, float],
    ) -> list[Alarm]:
        """The alarms that hold after ``step``, from its groups, what was paid, and its metrics."""
        return self.add(step, tally(self.shape, groups, credit, advantage, metrics))

    def add(self, step: int, found: Tally) -> list[Alarm]:
        """The same from a step's tally."""
        self.remember(step, found)
        return self.alarms() if len(self.window) >= MIN_STEPS else []

    def remember(self, step: int, found: Tally) -> None:
        """Take a step's tally in, and judge nothing."""
        self.window.append((step, found))
        for name, moments in found.items():
            if name.startswith(FIRST):
                self.first[name] = _early(self.first.get(name, Moments()), moments)

    def alarms(
        self, exams: Sequence[Mapping[str, Any]] = (), *, unjudged: Collection[str] = frozenset()
    ) -> list[Alarm]:
        """The alarms that hold now, but for those named in ``unjudged``."""
        view = View(
            shape=self.shape,
            rule=self.rule,
            recent=merge(tally for _, tally in self.window),
            first=self.first,
            span=(self.window[0][0], self.window[-1][0]) if self.window else (0, 0),
            count=len(self.window),
            exams=exams,
        )
        return [alarm for name, find in ALARMS.items() if name not in unjudged for alarm in find(view)]

    def news(self, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Those of ``alarms`` that have not been told of in this run."""
        fresh = [alarm for alarm in alarms if (alarm.name, alarm.agent) not in self.told]
        self.told |= {(alarm.name, alarm.agent) for alarm in fresh}
        return fresh

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run raises the alarms that it would have raised."""
        return {
            "window": [[step, _plain(tally)] for step, tally in self.window],
            "first": _plain(self.first),
            "told": [list(pair) for pair in sorted(self.told, key=str)],
        }

    def load_json(self, data: Mapping[str, Any]) -> None:
        self.window.clear()
        self.window.extend((step, _moments(tally)) for step, tally in data["window"])
        self.first = _moments(data["first"])
        self.told = {(name, agent) for name, agent in data["told"]}


def _early(known: Moments, more: Moments) -> Moments:
    """The moments of the first steps that have the figure; later ones add nothing."""
    if known.n >= WINDOW:
        return known
    return Moments(known.n + more.n, known.total + more.total, known.squares + more.squares)


def _plain(tally: Tally) -> dict[str, list[float]]:
    return {name: [m.n, m.total, m.squares] for name, m in tally.items()}


def _moments(data: Mapping[str, Sequence[float]]) -> dict[str, Moments]:
    return {name: Moments(*entry) for name, entry in data.items()}
