"""What an alarm is, what it is computed from, and the statistics by which it is raised or not.

An alarm looks at a window of steps, never at one. Every figure is a mean over *problems*, the independent units of a step: the
rollouts of one problem share it and are averaged first. What is kept of a step are the moments of those means, so that windows of
any length cost the same. An alarm is raised where a confidence bound, not the mean, lies on the wrong side of its threshold.

The window moves by a step at a time and is looked at after each: a run of 1,000 steps shows 50 separate windows to a dozen alarms. Bounds
are therefore one-sided ones at ``Z`` standard errors, a chance of 1 in 10,000 each, and thresholds lie where no healthy run comes near
(each constant says why it is where it is).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ccpo.alarms.texts import asks_for_answer, forbids_answer

WINDOW = 20
"""Steps that an alarm looks at."""
MIN_STEPS = 10
"""Steps without which nothing is said of figures that a step has one of."""
MIN_PROBLEMS = 60
"""Problems without which nothing is said of a mean over problems: below, a bound at ``Z`` errors excludes next to nothing."""
Z = 3.72
"""One-sided normal quantile of 1e-4, for windows, which are looked at again and again."""
T_STEPS = 6.01
"""The same of Student's t with ``MIN_STEPS - 1`` degrees of freedom, for figures that a step has one of."""
EXAM_Z = 3.09
"""One-sided normal quantile of 1e-3, for an evaluation, which is looked at once for each agent."""

Tally = Mapping[str, "Moments"]
"""Moments by name: ``reward`` of the team, ``effect/AGENT`` of an agent, …"""


class Moments(NamedTuple):
    """Number, sum and sum of squares of values."""

    n: float = 0
    total: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(values: Sequence[float]) -> Moments:
        return Moments(len(values), math.fsum(values), math.fsum([v * v for v in values]))

    @property
    def mean(self) -> float:
        return self.total / self.n

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        if self.n < 2:
            return math.inf
        variance = max(0.0, self.squares - self.total * self.total / self.n) / (self.n - 1)
        return math.sqrt(variance / self.n)

    def bounds(self, z: float = Z) -> tuple[float, float]:
        """The mean, less and plus ``z`` standard errors and 3/n (the rule of three: what was never seen in n problems has a rate below that)."""
        reach = z * self.error + 3 / self.n
        return self.mean - reach, self.mean + reach

    def share_bounds(self, z: float = Z) -> tuple[float, float]:
        """Wilson's interval, for values in [0, 1]. They vary no more than coins of the same mean do, so it is wide enough."""
        n, p = self.n, min(1.0, max(0.0, self.mean))
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def merge(tallies: Iterable[Tally]) -> dict[str, Moments]:
    """The moments of several steps together."""
    parts: dict[str, list[Moments]] = defaultdict(list)
    for tally in tallies:
        for name, moments in tally.items():
            parts[name].append(moments)
    return {name: Moments(*map(sum, zip(*found, strict=True))) for name, found in parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What must be known of a team: its ``agents``, the sole ``decider`` or None, and where agents vote without having heard each
    other, who casts each turn's ballot (``voters``, by turn) and how they are counted (``vote``). ``asked`` are the turns whose prompt asks
    for a final answer, ``forbidden`` those whose prompt forbids to state it."""

    agents: tuple[str, ...]
    decider: str | None = None
    voters: Mapping[str, str] = field(default_factory=dict)
    vote: str = ""
    asked: frozenset[str] = frozenset()
    forbidden: frozenset[str] = frozenset()

    @staticmethod
    def of(described: Mapping[str, Any]) -> Shape:
        """From :func:`ccpo.teams.describe`, or the ``team`` of a run's ``recipe.json``."""
        agents, decider = tuple(described["agents"]), described["decider"]
        speaker = {turn["name"]: turn["agent"] for turn in described["turns"]}
        votes = len(described["reads"]) > 1 and described["decision"] != "function"
        free = decider is None and votes and set(described["free"]) == set(agents)
        return Shape(
            agents=agents,
            decider=decider,
            voters={turn: speaker[turn] for turn in described["reads"]} if free else {},
            vote=described["decision"] if free else "",
            asked=frozenset(turn["name"] for turn in described["turns"] if asks_for_answer(turn["prompt"])),
            forbidden=frozenset(turn["name"] for turn in described["turns"] if forbids_answer(turn["prompt"])),
        )

    @property
    def helpers(self) -> tuple[str, ...]:
        """Agents that work for others: neither the decider nor a voter."""
        return tuple(a for a in self.agents if a != self.decider and a not in self.voters.values())

    def others(self, agent: str) -> tuple[str, ...]:
        return tuple(sorted(a for a in self.agents if a != agent))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What alarms are computed from: the team's shape, the credit ``rule``, the moments of the last ``count`` steps
    (``recent``, of the steps ``span``) and of the first ones (``first``), and the evaluations' reports of the first data set."""

    shape: Shape
    rule: str
    recent: Tally
    first: Tally
    span: tuple[int, int]
    count: int
    exams: Sequence[Mapping[str, Any]] = ()

    def problems(self, name: str, least: float = MIN_PROBLEMS) -> Moments | None:
        """A figure of the window that enough problems tell; else None."""
        found = self.recent.get(name)
        return found if found is not None and found.n >= least else None

    def steps(self, name: str) -> Moments | None:
        """A figure that each step has one of; None where it is too few steps'."""
        return self.problems(name, MIN_STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """``name`` as in ``ALARMS`` and ``alarm/NAME``; ``level`` "warn" or "info"; ``title`` a few words; ``what`` was seen and what it means;
    ``remedy`` what to try; ``agent`` it is about, or None; ``evidence``: the figures behind it."""

    level: str
    name: str
    title: str
    what: str
    remedy: str
    agent: str | None
    evidence: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "name": self.name,
            "title": self.title,
            "what": self.what,
            "try": self.remedy,
            "agent": self.agent,
            "evidence": dict(self.evidence),
        }
