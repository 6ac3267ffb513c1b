"""Decision rules: how the texts of a play become one answer and one reward.

Every rule has ``kind``, ``reads`` (the turns it reads), ``sole`` (the turn that alone is the answer, or None),
``without(turns)`` (the rule that is left when those turns are gone, or None) and ``decide_many`` / ``decide``. Votes
are counted in :mod:`ccpo.teams.votes` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from ccpo.errors import UserError
from ccpo.teams.votes import ABSTAIN, VoteKind, tally
from ccpo.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """What a turn says to the decision: its normalised ``answer`` (None abstains), the verdict's ``score`` in [0, 1],
    and its ``weight`` in a weighted vote (exp of its mean log-probability)."""

    turn: str
    answer: str | None
    score: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The team's expected reward and its answer (of tied answers the first in alphabetical order; None: no answer)."""

    reward: float
    answer: str | None


NOTHING = Decided(reward=0.0, answer=None)


@dataclass(frozen=True, slots=True)
class LastTurn:
    """One turn is the team's answer."""

    turn: str
    kind: ClassVar[str] = "last_turn"

    def __post_init__(self) -> None:
        if not isinstance(self.turn, str) or not self.turn:
            raise UserError(f"decision {self.kind!r} needs the name of one turn; found {self.turn!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.turn,)

    @property
    def sole(self) -> str | None:
        return self.turn

    def without(self, turns: Collection[str]) -> LastTurn | None:
        return None if self.turn in turns else self

    def decide(self, ballots: Sequence[Ballot]) -> Decided:
        """The verdict on the deciding turn; nothing where it has no ballot."""
        found = next((b for b in ballots if b.turn == self.turn), None)
        return Decided(reward=found.score, answer=found.answer) if found else NOTHING

    def decide_many(self, plays: Sequence[Sequence[Ballot]]) -> list[Decided]:
        return [self.decide(ballots) for ballots in plays]


@dataclass(frozen=True, slots=True)
class Judge(LastTurn):
    """A judge agent's turn is the answer; it reads the others' turns. Without the judge there is no answer."""

    kind: ClassVar[str] = "judge"


class _Several:
    """A rule that reads several turns and of which something is left while one of them is."""

    __slots__ = ()
    turns: tuple[str, ...]
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.turns, str):
            raise UserError(
                f"decision {self.kind!r} needs a list of turns; found the text {self.turns!r}, write [{self.turns}]"
            )
        object.__setattr__(self, "turns", tuple(self.turns))
        if not self.turns:
            raise UserError(f"decision {self.kind!r} reads nothing; list the turns that it decides over")
        twice = next((t for t in self.turns if self.turns.count(t) > 1), None)
        if twice is not None:
            raise UserError(f"decision {self.kind!r} lists turn {twice!r} twice; every turn has one voice")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.turns

    @property
    def sole(self) -> str | None:
        return None

    def without(self, turns: Collection[str]) -> Self | None:
        left = tuple(t for t in self.turns if t not in turns)
        return replace(self, turns=left) if left else None


@dataclass(frozen=True, slots=True)
class _Vote(_Several):
    turns: tuple[str, ...]

    def decide(self, ballots: Sequence[Ballot]) -> Decided:
        """Count the ballots of one play; missing ballots are abstentions."""
        return self.decide_many([ballots])[0]

    def decide_many(self, plays: Sequence[Sequence[Ballot]]) -> list[Decided]:
        """Count the ballots of many plays at once. The order of a play's ballots does not matter."""
        K = max((len(ballots) for ballots in plays), default=0)
        if K == 0:
            return [NOTHING for _ in plays]
        answers = [_classes(ballots, K) for ballots in plays]
        scores = [[b.score for b in ballots] + [0.0] * (K - len(ballots)) for ballots in plays]
        weights = [[b.weight for b in ballots] + [0.0] * (K - len(ballots)) for ballots in plays]
        counted = tally(
            torch.tensor(answers),
            torch.tensor(scores, dtype=torch.float64),
            torch.tensor(weights, dtype=torch.float64) if self.kind == VoteKind.WEIGHTED else None,
            kind=self.kind,
        )
        return [
            Decided(
                reward=reward, answer=min((b.answer for b, w in zip(ballots, won, strict=False) if w), default=None)
            )
            for ballots, reward, won in zip(plays, counted.reward_B.tolist(), counted.winner_BK.tolist(), strict=True)
        ]


def _classes(ballots: Sequence[Ballot], K: int) -> list[int]:
    """A number for each answer of one play, padded with abstentions."""
    numbers: dict[str, int] = {}
    row = [ABSTAIN if b.answer is None else numbers.setdefault(b.answer, len(numbers)) for b in ballots]
    return row + [ABSTAIN] * (K - len(ballots))


@dataclass(frozen=True, slots=True)
class Majority(_Vote):
    """The answer that most turns give; a tie pays the mean over the tied answers."""

    kind: ClassVar[str] = VoteKind.MAJORITY.value


@dataclass(frozen=True, slots=True)
class Weighted(_Vote):
    """The answer with most confidence behind it; a turn's confidence is exp of its mean log-probability."""

    kind: ClassVar[str] = VoteKind.WEIGHTED.value


@dataclass(frozen=True, slots=True)
class Sampled(_Vote):
    """An answer drawn with its share of the votes, paid its expected reward: a smooth signal for every voter."""

    kind: ClassVar[str] = VoteKind.SAMPLED.value


@dataclass(frozen=True, slots=True)
class Function(_Several):
    """A Python function makes the answer's text: ``fn(problem, messages)``, ``messages`` the texts of ``turns`` by name
    without those that are gone. What it returns is verified like any text."""

    fn: Callable[[Problem, Mapping[str, str]], str]
    turns: tuple[str, ...]
    kind: ClassVar[str] = "function"

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise UserError(
                f"decision 'function' needs a Python function fn(problem, messages) -> text; found {self.fn!r}"
            )
        _Several.__post_init__(self)

    def decide(self, ballots: Sequence[Ballot]) -> Decided:
        """The verdict on the function's text, given as the one ballot; nothing where it was not called."""
        if len(ballots) > 1:
            raise ValueError(f"a function decides by one text, its own; found {len(ballots)} ballots")
        return Decided(reward=ballots[0].score, answer=ballots[0].answer) if ballots else NOTHING

    def decide_many(self, plays: Sequence[Sequence[Ballot]]) -> list[Decided]:
        return [self.decide(ballots) for ballots in plays]


Decision = LastTurn | Judge | Majority | Weighted | Sampled | Function

DECISIONS: dict[str, type] = {rule.kind: rule for rule in (LastTurn, Judge, Majority, Weighted, Sampled, Function)}
