"""Decision rules: what makes one answer, and one reward, of what the team said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ccpo.teams.votes import vote_shares
from ccpo.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """A text that the decision reads, once verified. ``answer`` None is an abstention; ``weight`` is the speaker's confidence."""

    turn: str
    answer: str | None
    score: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    reward: float
    answer: str | None


class Decision(Protocol):
    """``reads``: the turns that count. ``without``: the rule that is left when turns are gone, or None where none is."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    def without(self, gone: set[str]) -> Decision | None: ...

    def decide(self, ballots: Sequence[Ballot]) -> Decided: ...


@dataclass(frozen=True)
class LastTurn:
    """The named turn is the answer."""

    turn: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.turn,)

    def without(self, gone: set[str]) -> LastTurn | None:
        return None if self.turn in gone else self

    def decide(self, ballots: Sequence[Ballot]) -> Decided:
        return Decided(reward=ballots[0].score, answer=ballots[0].answer) if ballots else Decided(reward=0.0, answer=None)


@dataclass(frozen=True)
class Judge(LastTurn):
    """A judge agent's turn, which reads the others', is the answer."""


@dataclass(frozen=True)
class Vote:
    """The turns' answers are votes (see :mod:`ccpo.teams.votes`): ``majority``, ``weighted`` by confidence (exp of the mean
    log-probability), or ``sampled`` in proportion to confidence and paid its expected reward."""

    turns: tuple[str, ...]
    kind: Literal["majority", "weighted", "sampled"] = "majority"

    @property
    def reads(self) -> tuple[str, ...]:
        return self.turns

    def without(self, gone: set[str]) -> Vote | None:
        left = tuple(t for t in self.turns if t not in gone)
        return Vote(left, self.kind) if left else None

    def decide(self, ballots: Sequence[Ballot]) -> Decided:
        votes = [b for b in ballots if b.answer is not None]
        if not votes:
            return Decided(reward=0.0, answer=None)
        classes = {answer: i for i, answer in enumerate(dict.fromkeys(b.answer for b in votes))}
        shares = vote_shares(
            torch.tensor([[classes[b.answer] for b in votes]]),
            torch.tensor([[b.weight for b in votes]], dtype=torch.float64),
            self.kind,
        )[0].tolist()
        total: dict[str | None, float] = {}
        for ballot, share in zip(votes, shares, strict=True):
            total[ballot.answer] = total.get(ballot.answer, 0.0) + share
        reward = sum(share * b.score for b, share in zip(votes, shares, strict=True))
        return Decided(reward=reward, answer=max(total, key=lambda answer: total[answer]))


@dataclass(frozen=True)
class Function:
    """A Python function ``fn(problem, messages) -> text`` makes the answer, which is then verified. ``messages`` has the turns that are there."""

    fn: Callable[[Problem, Mapping[str, str]], str]
    turns: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.turns

    def without(self, gone: set[str]) -> Function | None:
        left = tuple(t for t in self.turns if t not in gone)
        return Function(self.fn, left) if left else None

    def decide(self, ballots: Sequence[Ballot]) -> Decided:
        raise TypeError("a Function decides on texts, before they are verified; it has no ballots to count")
