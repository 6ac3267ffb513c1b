"""The team: agents, their turns as an acyclic graph, a decision rule; and what is left of it when agents are removed.

Removing an agent deletes its turns. Turns that are not downstream of it keep the text they had; turns downstream are answered again
without its messages; the decision then reads what is left. So the cost of a counterfactual follows from the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from ccpo.errors import UserError, nearest
from ccpo.teams.decisions import Decision, Function, Judge, LastTurn, Vote
from ccpo.teams.templates import PROBLEM, UPSTREAM, Filled, Template, upstream
from ccpo.types import Coalition, Removal

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Fate(StrEnum):
    """What becomes of a turn when a coalition is removed."""

    KEEP = "keep"  # not downstream: it keeps the text it had
    GONE = "gone"  # removed: its readers do not see it
    GIVEN = "given"  # removed: a fixed text stands in its place
    FROZEN = "frozen"  # removed: an earlier policy speaks in its place
    REDO = "redo"  # downstream: answered again
    IDLE = "idle"  # downstream, but nothing that counts reads it


@dataclass(frozen=True, kw_only=True)
class Agent:
    """One who speaks. Agents with the same ``policy`` share weights; ``system`` is its system prompt."""

    name: str
    policy: str | None = None
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class TurnSpec:
    """One turn of the graph: who speaks, on which template, reading which earlier turns (by default those named in the template).

    ``max_tokens`` lowers the agent's own limit. ``strip_boxed``: a trailing ``\\boxed{…}`` is not shown to readers.
    """

    name: str
    agent: str
    template: str
    reads: tuple[str, ...] | None = None
    max_tokens: int | None = None
    strip_boxed: bool = False
    parsed: Template = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed", Template.parse(self.template))
        if self.reads is None:
            named = tuple(n for n in self.parsed.names if n not in (PROBLEM, UPSTREAM))
            object.__setattr__(self, "reads", named)

    def values(self, problem: str, messages: Mapping[str, str | None]) -> dict[str, str | None]:
        """What the template's names stand for; a turn that was taken out of the graph is a dropped message."""
        seen = {name: messages.get(name) for name in (*self.reads, *self.parsed.names) if name not in (PROBLEM, UPSTREAM)}
        return {PROBLEM: problem, UPSTREAM: upstream({n: messages.get(n) for n in self.reads}), **seen}

    def fill(self, problem: str, messages: Mapping[str, str | None]) -> list[Filled]:
        return self.parsed.fill(self.values(problem, messages))

    def render(self, problem: str, messages: Mapping[str, str | None]) -> str:
        return self.parsed.render(self.values(problem, messages))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a counterfactual takes.

    ``fates``: of every turn. ``redo``: turns to decode, in topological order (an earlier policy's included).
    ``answerable``: False where the sole decider is gone; the reward then is 0 and nothing is decoded.
    ``per_problem``: nothing that is read comes from a rollout, so that draws belong to the problem (Think–Solve's solo answers).
    ``given``: the text in the place of a removed message. ``free``: nothing is decoded.
    """

    removed: Coalition
    how: Removal
    fates: Mapping[str, Fate]
    redo: tuple[TurnSpec, ...]
    answerable: bool
    per_problem: bool
    given: str | None

    @property
    def free(self) -> bool:
        return not self.redo


@dataclass(frozen=True, kw_only=True)
class Team:
    """Agents, turns, and the rule that makes an answer of them. Raises UserError for a cycle, an unknown name, a missing decision."""

    name: str
    agents: tuple[Agent, ...]
    turns: tuple[TurnSpec, ...]
    decision: Decision

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def levels(self) -> tuple[tuple[TurnSpec, ...], ...]:
        """Turns by topological level: a turn comes after all that it reads."""
        depth: dict[str, int] = {}
        waiting = list(self.turns)
        while waiting:
            ready = [t for t in waiting if all(r in depth for r in t.reads)]
            if not ready:
                raise UserError(f"team {self.name!r}: the turns read each other in a circle: {' → '.join(_cycle(waiting))}")
            for turn in ready:
                depth[turn.name] = 1 + max((depth[r] for r in turn.reads), default=-1)
            waiting = [t for t in waiting if t.name not in depth]
        return tuple(
            tuple(t for t in self.turns if depth[t.name] == level) for level in range(max(depth.values(), default=-1) + 1)
        )

    @cached_property
    def turns_in_order(self) -> tuple[TurnSpec, ...]:
        return tuple(turn for level in self.levels for turn in level)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(agent.name for agent in self.agents)

    @property
    def decider(self) -> str | None:
        """The agent whose turn is the answer, or None where several are read."""
        if isinstance(self.decision, LastTurn | Judge):
            return self.turn(self.decision.reads[0]).agent
        return None

    def agent(self, name: str) -> Agent:
        return next(a for a in self.agents if a.name == name)

    def turn(self, name: str) -> TurnSpec:
        return next(t for t in self.turns if t.name == name)

    def without(self, *removed: str) -> Team:
        """The team that is left: again a team. Raises UserError where nothing is left to decide."""
        self._known(removed)
        gone = {t.name for t in self.turns if t.agent in removed}
        decision = self.decision.without(gone)
        if decision is None:
            raise UserError(f"team {self.name!r} has no answer without {' and '.join(removed)}: the decision reads no other turn")
        return Team(
            name=f"{self.name} without {', '.join(removed)}",
            agents=tuple(a for a in self.agents if a.name not in removed),
            turns=tuple(
                replace(t, reads=tuple(r for r in t.reads if r not in gone)) for t in self.turns if t.name not in gone
            ),
            decision=decision,
        )

    def alone(self, agent: str) -> Team:
        """``agent`` by itself: its last turn, without anybody's messages, is the answer."""
        self._known((agent,))
        own = [t for t in self.turns_in_order if t.agent == agent]
        kept = {t.name for t in own}
        return Team(
            name=f"{agent} alone",
            agents=(self.agent(agent),),
            turns=tuple(replace(t, reads=tuple(r for r in t.reads if r in kept), strip_boxed=False) for t in own),
            decision=LastTurn(own[-1].name),
        )

    def plan(self, removed: Iterable[str], how: Removal = Removal.DROP, placeholder: str = "") -> Plan:
        """What it takes to play the team without ``removed``. Only turns downstream of a removed one, and needed by the
        decision, are decoded again."""
        coalition = tuple(sorted(removed))
        self._known(coalition)
        gone = {t.name for t in self.turns if t.agent in coalition}
        downstream = self._downstream(gone)
        readable = how in (Removal.PLACEHOLDER, Removal.FROZEN)  # what replaces a ballot can itself be read as one
        reads = [name for name in self.decision.reads if readable or name not in gone]
        needed = self._upstream(reads)
        fates: dict[str, Fate] = {}
        for turn in self.turns:
            if turn.name in gone:
                if how is Removal.DROP:
                    fates[turn.name] = Fate.GONE
                elif how is Removal.FROZEN:
                    fates[turn.name] = Fate.FROZEN if turn.name in needed else Fate.IDLE
                else:
                    fates[turn.name] = Fate.GIVEN
            elif turn.name in downstream:
                fates[turn.name] = Fate.REDO if turn.name in needed else Fate.IDLE
            else:
                fates[turn.name] = Fate.KEEP
        redo = tuple(t for t in self.turns_in_order if fates[t.name] in (Fate.REDO, Fate.FROZEN))
        read = {r for t in redo for r in t.reads} | set(reads)
        return Plan(
            removed=coalition,
            how=how,
            fates=fates,
            redo=redo if reads else (),
            answerable=bool(reads) and (self.decider is None or readable or self.decider not in coalition),
            per_problem=not any(fates[name] is Fate.KEEP for name in read),
            given={Removal.BLANK: "", Removal.PLACEHOLDER: placeholder}.get(how),
        )

    def _downstream(self, gone: set[str]) -> set[str]:
        found: set[str] = set()
        for turn in self.turns_in_order:
            if turn.name not in gone and any(r in gone or r in found for r in turn.reads):
                found.add(turn.name)
        return found

    def _upstream(self, names: Iterable[str]) -> set[str]:
        found = set(names)
        for turn in reversed(self.turns_in_order):
            if turn.name in found:
                found.update(turn.reads)
        return found

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.names:
                raise UserError(
                    f"team {self.name!r} has no agent {name!r}; its agents are {', '.join(self.names)}." + nearest(name, self.names)
                )


def _check(team: Team) -> None:
    where = f"team {team.name!r}"
    if not team.agents:
        raise UserError(f"{where} has no agents")
    for kind, names in (("agent", team.names), ("turn", tuple(t.name for t in team.turns))):
        for name in names:
            if not _NAME.fullmatch(name):
                raise UserError(f"{where}: {kind} name {name!r}; a name is letters, digits and underscores, not first a digit")
            if names.count(name) > 1:
                raise UserError(f"{where}: two {kind}s are called {name!r}")
    turns = [t.name for t in team.turns]
    for reserved in (PROBLEM, UPSTREAM):
        if reserved in turns:
            raise UserError(f"{where}: a turn may not be called {reserved!r}, which templates use for something else")
    for turn in team.turns:
        if turn.agent not in team.names:
            raise UserError(f"{where}: turn {turn.name!r} is spoken by {turn.agent!r}, who is no agent." + nearest(turn.agent, team.names))
        for name in turn.reads:
            if name not in turns:
                raise UserError(
                    f"{where}: turn {turn.name!r} reads {name!r}, which is no turn; turns are {', '.join(turns)} "
                    f"(a literal brace is written '{{{{')." + nearest(name, turns)
                )
    for agent in team.names:
        if all(t.agent != agent for t in team.turns):
            raise UserError(f"{where}: agent {agent!r} has no turn; give it one or leave it out")
    if team.decision is None:
        raise UserError(f"{where} has no decision: say which turn or vote is its answer, for example decision: {{kind: last, turn: NAME}}")
    if not team.decision.reads:
        raise UserError(f"{where}: the decision reads no turn")
    for name in team.decision.reads:
        if name not in turns:
            raise UserError(f"{where}: the decision reads {name!r}, which is no turn." + nearest(name, turns))
    if isinstance(team.decision, Vote | Function):
        last = [team.turn(name).agent for name in team.decision.reads]
        if isinstance(team.decision, Vote) and len(set(last)) != len(last):
            raise UserError(f"{where}: an agent has two ballots in the vote; let the decision read one turn of each")
    _ = team.levels  # raises on a cycle


def _cycle(waiting: list[TurnSpec]) -> list[str]:
    by_name = {t.name: t for t in waiting}
    path = [waiting[0].name]
    while True:
        following = next(r for r in by_name[path[-1]].reads if r in by_name)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)
