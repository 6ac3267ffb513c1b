"""What becomes of every turn when agents are removed: the counterfactual of a team (CCPO, arXiv 2603.21563).

Removing an agent deletes its turns. Turns that are not downstream of it keep the text they had; turns that are
downstream, and that the decision needs, are spoken again without its messages; the decision then reads what is left. So
the number of new tokens follows from the graph: none for a vote, one solo answer for thinker and solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ccpo.types import Coalition, Removal

if TYPE_CHECKING:
    from ccpo.teams.graph import Team, TurnSpec


class Fate(StrEnum):
    """What becomes of a turn in a counterfactual play."""

    KEEP = "keep"  # not downstream of a removed agent: the text of the joint rollout stays
    GONE = "gone"  # removed, or downstream and needed by nobody
    GIVEN = "given"  # removed, and a fixed text stands in its place
    FROZEN = "frozen"  # spoken by the agent's earlier, frozen policy
    REDO = "redo"  # downstream and needed: spoken again


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The counterfactual without ``removed``.

    ``fates`` has every turn of the team; ``given`` is the text of turns whose fate is GIVEN; ``redo`` are the turns
    spoken again by their own policies, ``decoded`` these and the frozen ones, in topological order. ``per_problem``:
    nothing that is decoded or decided on reads a text of the joint rollout, so draws belong to the problem and not to a
    rollout. ``answerable``: something is left to decide on; where it is not, the reward is 0 and nothing is decoded.
    ``free``: nothing is decoded.
    """

    removed: Coalition
    how: Removal
    given: str
    fates: Mapping[str, Fate]
    redo: tuple[TurnSpec, ...]
    decoded: tuple[TurnSpec, ...]
    per_problem: bool
    answerable: bool

    @property
    def free(self) -> bool:
        return not self.decoded


def make_plan(team: Team, removed: Coalition, how: Removal, placeholder: str) -> Plan:
    """The plan for ``removed``, agents of ``team`` in sorted order."""
    deleted = {t.name for t in team.turns if t.agent in removed}
    needed = _needed(team, set() if how is Removal.FROZEN else deleted)
    stale = _downstream(team, deleted)
    fates = {t.name: _fate(t.name, deleted, stale, needed, how) for t in team.turns_in_order}
    decoded = tuple(t for t in team.turns_in_order if fates[t.name] in (Fate.REDO, Fate.FROZEN))
    heard = {name for t in decoded for name in t.reads} | set(team.decision.reads)
    return Plan(
        removed=removed,
        how=how,
        given=placeholder if how is Removal.PLACEHOLDER else "",
        fates=fates,
        redo=tuple(t for t in decoded if fates[t.name] is Fate.REDO),
        decoded=decoded,
        per_problem=all(fates[name] is not Fate.KEEP for name in heard),
        answerable=any(fates[name] is not Fate.GONE for name in team.decision.reads),
    )


def _fate(name: str, deleted: set[str], stale: set[str], needed: set[str], how: Removal) -> Fate:
    if name in deleted:
        if how is Removal.DROP:
            return Fate.GONE
        if how is Removal.FROZEN:
            return Fate.FROZEN if name in needed else Fate.GONE
        return Fate.GIVEN
    if name not in stale:
        return Fate.KEEP
    return Fate.REDO if name in needed else Fate.GONE


def _needed(team: Team, silent: set[str]) -> set[str]:
    """The turns whose text the decision depends on; ``silent`` ones listen to nobody."""
    found: set[str] = set()
    open_turns = list(team.decision.reads)
    while open_turns:
        name = open_turns.pop()
        if name not in found:
            found.add(name)
            open_turns += () if name in silent else team.turn(name).reads
    return found


def _downstream(team: Team, sources: set[str]) -> set[str]:
    """The turns that heard one of ``sources``, at first or second hand."""
    found: set[str] = set()
    for turn in team.turns_in_order:
        if any(name in sources or name in found for name in turn.reads):
            found.add(turn.name)
    return found
