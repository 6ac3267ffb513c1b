"""Agents, turns and the team: a directed acyclic graph of turns with a decision rule at its end."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ccpo.errors import UserError, nearest
from ccpo.teams.decisions import DECISIONS, Decision, Judge, LastTurn
from ccpo.teams.plan import Plan, make_plan
from ccpo.teams.templates import RESERVED, UPSTREAM, Template, Values
from ccpo.types import Coalition, Removal

_AGENT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")  # it becomes a folder, an adapter and part of a metric's name
_TURN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # it is written in braces in templates


@dataclass(frozen=True, slots=True)
class Agent:
    """Who speaks: ``policy`` names the weights (agents with the same policy share them; default: its own name),
    ``system`` its system prompt."""

    name: str
    policy: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.policy is None:
            object.__setattr__(self, "policy", self.name)
        for what, name in (("agent", self.name), ("policy", self.policy)):
            if not isinstance(name, str) or not _AGENT_NAME.fullmatch(name):
                raise UserError(
                    f"{what} name {name!r}: use letters, digits, '_' and '-', beginning with a letter, at most 64"
                )


@dataclass(frozen=True, slots=True)
class TurnSpec:
    """One turn of an agent: the ``template`` of its prompt, and the turns it ``reads`` (default: those that the
    template names, in order of appearance). ``strip_boxed`` takes a trailing boxed answer off before others read the
    turn. ``dropped`` are messages that the template names and that nobody speaks any more."""

    name: str
    agent: str
    template: str
    reads: tuple[str, ...] | None = None
    max_tokens: int | None = None
    strip_boxed: bool = False
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _TURN_NAME.fullmatch(self.name) or self.name in RESERVED:
            raise UserError(
                f"turn name {self.name!r}: use letters, digits and '_', not beginning with a digit, and neither "
                f"of {', '.join(RESERVED)}"
            )
        if not isinstance(self.template, str):
            raise UserError(f"turn {self.name!r}: the template is {self.template!r}; write it as text")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise UserError(
                f"turn {self.name!r}: max_tokens is {self.max_tokens!r}; it is a whole number of at least 1"
            )
        object.__setattr__(self, "reads", self._reads())

    def _reads(self) -> tuple[str, ...]:
        template = self.parsed
        named = tuple(name for name in template.messages if name not in self.dropped)
        if self.reads is None:
            if UPSTREAM in template.names:
                raise UserError(
                    f"turn {self.name!r}: its template shows {{{UPSTREAM}}}; say whose messages these are with "
                    "reads: [turn, …]"
                )
            return named
        if isinstance(self.reads, str):
            raise UserError(f"turn {self.name!r}: reads is the text {self.reads!r}; write a list, [{self.reads}]")
        reads = tuple(dict.fromkeys(self.reads))
        missing = next((name for name in named if name not in reads), None)
        if missing is not None:
            raise UserError(
                f"turn {self.name!r}: its template shows {{{missing}}}, which is not in reads "
                f"({', '.join(reads) or 'empty'}).{nearest(missing, reads)} "
                f"Add it, or write {{{{{missing}}}}} for literal braces"
            )
        unseen = next((name for name in reads if name not in named), None)
        if unseen is not None and UPSTREAM not in template.names:
            raise UserError(
                f"turn {self.name!r} reads {unseen!r} but its template does not show it; add {{{unseen}}} or "
                f"{{{UPSTREAM}}}"
            )
        return reads

    @property
    def parsed(self) -> Template:
        return Template.parse(self.template)

    def with_template(self, template: str) -> TurnSpec:
        """The turn with another prompt. What it reads follows from that prompt: a message that is no longer shown is no
        edge of the graph; ``{upstream}`` stands for what the turn read before."""
        names = Template.parse(template).names
        if UPSTREAM not in names:
            return replace(self, template=template, reads=None)
        named = (name for name in names if name not in RESERVED)
        return replace(self, template=template, reads=tuple(dict.fromkeys((*self.reads, *named))))

    def render(self, values: Values) -> str:
        """The prompt's text for ``problem`` and the messages of ``reads`` (None: dropped)."""
        return self.parsed.render({**values, **dict.fromkeys(self.dropped)}, self.reads)


@dataclass(frozen=True, slots=True)
class Team:
    """A team: agents, the turns they speak, and the rule that decides. Checked when it is made.

    ``levels`` are the turns in topological levels: a level reads only earlier ones, so that its turns can be spoken
    together; ``turns_in_order`` the same in one row. ``decider`` is the one agent whose turn is the answer, or None
    (votes, functions).

    Raises :class:`~ccpo.errors.UserError` for a cycle, an unknown agent or turn, a name given twice, a missing
    decision, an agent without a turn.
    """

    name: str
    agents: tuple[Agent, ...]
    turns: tuple[TurnSpec, ...]
    decision: Decision
    levels: tuple[tuple[TurnSpec, ...], ...] = field(init=False, repr=False, compare=False)
    _turn: Mapping[str, TurnSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        agents = tuple(Agent(a) if isinstance(a, str) else a for a in self.agents)
        object.__setattr__(self, "agents", agents)
        object.__setattr__(self, "turns", tuple(self.turns))
        object.__setattr__(self, "_turn", {t.name: t for t in self.turns})
        self._check_names()
        self._check_reads()
        self._check_decision()
        object.__setattr__(self, "levels", _levels(self))

    @property
    def agent_names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.agents)

    @property
    def turns_in_order(self) -> tuple[TurnSpec, ...]:
        return tuple(turn for level in self.levels for turn in level)

    @property
    def order(self) -> tuple[str, ...]:
        """The turns' names in topological order."""
        return tuple(turn.name for turn in self.turns_in_order)

    @property
    def decider(self) -> str | None:
        return self.turn(self.decision.sole).agent if self.decision.sole else None

    def agent(self, name: str) -> Agent:
        found = next((a for a in self.agents if a.name == name), None)
        if found is None:
            raise UserError(
                f"{self._here} has no agent {name!r}; it has "
                f"{', '.join(self.agent_names)}.{nearest(name, self.agent_names)}"
            )
        return found

    def turn(self, name: str) -> TurnSpec:
        if name not in self._turn:
            raise UserError(
                f"{self._here} has no turn {name!r}; it has {', '.join(self._turn)}.{nearest(name, self._turn)}"
            )
        return self._turn[name]

    def turns_of(self, agent: str) -> tuple[TurnSpec, ...]:
        """The turns of ``agent`` in topological order."""
        self.agent(agent)
        return tuple(t for t in self.turns_in_order if t.agent == agent)

    def coalition(self, names: str | Iterable[str]) -> Coalition:
        """``names`` as a coalition: known agents, sorted, each once."""
        chosen = {names} if isinstance(names, str) else set(names)
        return tuple(sorted(self.agent(name).name for name in chosen))

    def plan(self, removed: Coalition, how: Removal = Removal.DROP, placeholder: str = "") -> Plan:
        """What becomes of every turn when ``removed`` are gone, and what must be decoded for it."""
        return make_plan(self, self.coalition(removed), Removal(how), placeholder)

    def without(self, *names: str, how: Removal = Removal.DROP) -> Team:
        """The team that is left without the agents ``names``: their turns are gone and templates show them as dropped.

        Raises UserError where nothing is left to decide on, and for another ``how``: then something stands in their
        place, which a plan can say and a smaller team cannot.
        """
        removed = self.coalition(names)
        if how != Removal.DROP:
            raise UserError(
                f"only removal by 'drop' makes a smaller team, {str(how)!r} does not; use team.plan({removed!r}, "
                f"how={str(how)!r})"
            )
        gone = {t.name for t in self.turns if t.agent in removed}
        decision = self.decision.without(gone)
        if decision is None:
            raise UserError(
                f"{self._here} without {', '.join(removed)} has no answer: decision {str(self.decision.kind)!r} "
                "reads only what they say"
            )
        return self._rest(removed, gone, decision)

    def alone(self, agent: str) -> Team:
        """Only ``agent``, with every message of the others dropped. Where the decision reads none of its turns, its
        last turn is the answer."""
        last = self.turns_of(agent)[-1].name
        others = self.coalition(a for a in self.agent_names if a != agent)
        gone = {t.name for t in self.turns if t.agent != agent}
        return self._rest(others, gone, self.decision.without(gone) or LastTurn(last))

    def _rest(self, removed: Coalition, gone: Collection[str], decision: Decision) -> Team:
        turns = tuple(_forget(t, gone) for t in self.turns if t.name not in gone)
        agents = tuple(a for a in self.agents if a.name not in removed)
        if isinstance(decision, Judge) and not _hears_others(turns, decision.turn):
            decision = LastTurn(decision.turn)
        return Team(f"{self.name}-without-{'-'.join(removed)}" if removed else self.name, agents, turns, decision)

    @property
    def _here(self) -> str:
        return f"team {self.name!r}"

    def _check_names(self) -> None:
        names = self.agent_names
        for what, given in (("agents", names), ("turns", tuple(t.name for t in self.turns))):
            if not given:
                raise UserError(f"{self._here} has no {what}; it needs at least one")
            twice = next((n for n in given if given.count(n) > 1), None)
            if twice is not None:
                raise UserError(f"{self._here}: two {what} have the name {twice!r}; rename one")
        for turn in self.turns:
            if turn.agent not in names:
                raise UserError(
                    f"{self._here}: turn {turn.name!r} belongs to {turn.agent!r}, which is no agent of it "
                    f"({', '.join(names)}).{nearest(turn.agent, names)}"
                )
        silent = next((n for n in names if all(t.agent != n for t in self.turns)), None)
        if silent is not None:
            raise UserError(f"{self._here}: agent {silent!r} has no turn; give it one or leave it out")

    def _check_reads(self) -> None:
        for turn in self.turns:
            for name in turn.reads:
                if name not in self._turn:
                    raise UserError(
                        f"{self._here}: the template of turn {turn.name!r} reads {name!r}, which is no turn of "
                        f"it ({', '.join(self._turn)})."
                        f"{nearest(name, self._turn)} For literal braces write {{{{{name}}}}}"
                    )

    def _check_decision(self) -> None:
        if not isinstance(self.decision, tuple(DECISIONS.values())):
            raise UserError(
                f"{self._here} has no decision (found {self.decision!r}); say how its answer is made: "
                f"{', '.join(DECISIONS)}"
            )
        for name in self.decision.reads:
            if name not in self._turn:
                raise UserError(
                    f"{self._here}: decision {str(self.decision.kind)!r} reads {name!r}, which is no turn of it "
                    f"({', '.join(self._turn)})."
                    f"{nearest(name, self._turn)}"
                )
        if isinstance(self.decision, Judge) and not _hears_others(self.turns, self.decision.turn):
            raise UserError(
                f"{self._here}: the judge's turn {self.decision.turn!r} reads nobody else; let its template show "
                "what it judges, or use last_turn"
            )


def _forget(turn: TurnSpec, gone: Collection[str]) -> TurnSpec:
    return replace(
        turn,
        reads=tuple(name for name in turn.reads if name not in gone),
        dropped=(*turn.dropped, *(name for name in turn.reads if name in gone)),
    )


def _hears_others(turns: Collection[TurnSpec], judge: str) -> bool:
    by_name = {t.name: t for t in turns}
    turn = by_name[judge]
    return any(by_name[name].agent != turn.agent for name in turn.reads)


def _levels(team: Team) -> tuple[tuple[TurnSpec, ...], ...]:
    """Kahn's algorithm by level; the order within a level is the team's own."""
    levels: list[tuple[TurnSpec, ...]] = []
    done: set[str] = set()
    waiting = list(team.turns)
    while waiting:
        level = tuple(t for t in waiting if done.issuperset(t.reads))
        if not level:
            raise UserError(
                f"team {team.name!r}: the turns {' → '.join(_cycle(waiting))} read each other in a circle; cut "
                "one of these reads"
            )
        levels.append(level)
        done.update(t.name for t in level)
        waiting = [t for t in waiting if t.name not in done]
    return tuple(levels)


def _cycle(waiting: Collection[TurnSpec]) -> list[str]:
    """A circle among ``waiting``, every one of which reads another of them: reader after speaker, the first name again
    at the end."""
    reads = {t.name: t.reads for t in waiting}
    path = [next(iter(reads))]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in reads[path[-1]] if name in reads))
    return path[path.index(path[-1]) :][::-1]
