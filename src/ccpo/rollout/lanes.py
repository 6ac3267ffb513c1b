"""A lane is one play of the team in progress: a joint rollout, or the counterfactual play of a coalition's removal."""

from __future__ import annotations

from dataclasses import dataclass, field

from ccpo.teams import Ballot, Fate, Plan, Team, TurnSpec
from ccpo.types import Coalition, Problem, Turn


@dataclass(slots=True, kw_only=True)
class Lane:
    """``slot``: place of the problem in the batch. Joint lanes have ``plan`` None. A counterfactual lane knows the joint lane
    whose other turns it keeps (``source``), or has none where its play does not depend on a rollout."""

    slot: int
    problem: Problem
    rollout: int | None
    draw: int = 0
    plan: Plan | None = None
    source: Lane | None = None
    spoken: dict[str, Turn] = field(default_factory=dict)
    reward: float = 0.0
    answer: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    answers: dict[str, str | None] = field(default_factory=dict)
    ballots: list[Ballot] = field(default_factory=list)

    @property
    def removed(self) -> Coalition:
        return self.plan.removed if self.plan else ()

    def fate(self, turn: str) -> Fate:
        return self.plan.fates[turn] if self.plan else Fate.REDO

    def turn(self, name: str) -> Turn | None:
        """The turn as it stands in this play: spoken here, kept from the joint rollout, or not there."""
        if name in self.spoken:
            return self.spoken[name]
        if self.source is not None and self.fate(name) is Fate.KEEP:
            return self.source.turn(name)
        return None

    def message(self, name: str) -> str | None:
        """What readers see of a turn: its message, the text that stands in its place, or None where it is gone."""
        if self.plan is not None and self.fate(name) is Fate.GIVEN:
            return self.plan.given
        turn = self.turn(name)
        return turn.message if turn else None

    def decodes(self, turn: TurnSpec) -> bool:
        return self.fate(turn.name) in (Fate.REDO, Fate.FROZEN)

    def all_turns(self, team: Team) -> list[Turn]:
        return [turn for spec in team.turns_in_order if (turn := self.turn(spec.name)) is not None]
