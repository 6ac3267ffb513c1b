"""Demonstrations of ratings, for a tiny base model that is to play SEPO's raters: who was right, as the task's teacher knows it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ccpo.errors import UserError
from ccpo.rollout.ratings import NO_ANSWER, outcome_of
from ccpo.tasks.procedural import ProceduralTask
from ccpo.teams import Ballot, Function, Team, rating_turn, speakers
from ccpo.teams.rating import ANSWER
from ccpo.teams.rating_parse import key_of
from ccpo.types import Problem

MOST_AGENTS = 10
"""Agents among whom tenths can be shared."""
FEW = 5
"""Up to so many agents, one that had no part in an outcome has a tenth of it: of two, a rating may say no less."""


class RatingLessons:
    """A teacher that rates plays of ``team``: whoever said what a teacher without error would have said after the same words has a part
    in a success, whoever did not has one in a failure. ``prompt`` as ``credit.prompt``; with probability ``noise`` the shares are
    those of a set of agents drawn at random.

    Raises UserError where the prompt does not fit the team, for more than ten agents, and for a team that decides by a function.
    """

    def __init__(self, team: Team, task: ProceduralTask, prompt: str, noise: float) -> None:
        self.team, self.task, self.prompt, self.noise = team, task, prompt, noise
        if len(team.agent_names) > MOST_AGENTS:
            raise UserError(
                f"bootstrap.ratings: team {team.name!r} has {len(team.agent_names)} agents, and tenths are taught to {MOST_AGENTS} at most"
            )
        if isinstance(team.decision, Function):
            raise UserError(
                f"bootstrap.ratings: team {team.name!r} decides by a function, of which nothing is known; use a decision by a turn or a vote"
            )
        self.speakers = speakers(team.turns_in_order)
        for agent in team.agent_names:
            self._spec(agent, "correct")

    def shaped_by(self) -> list[Any]:
        """All that the lessons hang on beside the task and the templates, as plain JSON."""
        turns = [(turn.name, turn.agent, list(turn.reads)) for turn in self.team.turns_in_order]
        decision = [type(self.team.decision).__name__, list(self.team.decision.reads)]
        return [self.prompt, self.noise, list(self.team.agent_names), turns, decision]

    def longest(self) -> int:
        """Characters of the longest rating."""
        return max(map(len, self._ratings()))

    def _ratings(self) -> list[str]:
        agents = self.team.agent_names
        return [rating_text(outcome, tenths(agents, ())) for outcome in ("correct", "wrong")]

    def _spec(self, agent: str, outcome: str):
        return rating_turn(agent, self.team.agent_names, self.speakers, outcome, self.prompt)

    def texts(self) -> list[str]:
        """What holds every character of a rating and its prompt, beside those of the task."""
        answers = [NO_ANSWER] if f"{{{ANSWER}}}" in self.prompt else []
        return [*self.prompts("0"), *answers, *self._ratings(), "0123456789"]

    def prompts(self, said: str = "") -> list[str]:
        """All prompts of a play in which everybody said ``said``."""
        shown = {"problem": said, ANSWER: said, **{name: said for name, _ in self.speakers}}
        agents = self.team.agent_names
        return [self._spec(agent, outcome).render(shown) for agent in agents for outcome in ("correct", "wrong")]

    def lesson(self, problem: Problem, said: Mapping[str, str], rng: random.Random) -> tuple[str, str]:
        """A prompt, and the rating that one of the agents gives after it, of the play in which the turns said ``said``."""
        answer, reward = self._decided(problem, said)
        outcome = outcome_of(reward)
        right = self._right(problem, said, rng)
        agents = self.team.agent_names
        part = [agent for agent in agents if (agent in right) == (outcome == "correct")]
        if rng.random() < self.noise:
            part = [agent for agent in agents if rng.random() < 0.5]
        values = {
            name: said[turn.name] for (name, _), turn in zip(self.speakers, self.team.turns_in_order, strict=True)
        }
        prompt = self._spec(rng.choice(agents), outcome).render({"problem": problem.text, ANSWER: answer, **values})
        return prompt, rating_text(outcome, tenths(agents, part))

    def _decided(self, problem: Problem, said: Mapping[str, str]) -> tuple[str, float]:
        reads = self.team.decision.reads
        verdicts = self.task.verify([(problem, said[name]) for name in reads])
        ballots = [
            Ballot(turn=name, answer=v.answer, score=v.score, weight=1.0)
            for name, v in zip(reads, verdicts, strict=True)
        ]
        decided = self.team.decision.decide(ballots)
        return NO_ANSWER if decided.answer is None else decided.answer, decided.reward

    def _right(self, problem: Problem, said: Mapping[str, str], rng: random.Random) -> Collection[str]:
        """The agents of whose turns none was wrong, given what it had heard."""
        wrong = {
            turn.agent
            for turn in self.team.turns_in_order
            if said[turn.name]
            != self.task.teach(problem, turn.name, {name: said[name] for name in turn.reads}, rng, 0.0)
        }
        return set(self.team.agent_names) - wrong


def rating_text(outcome: str, shares: Sequence[int]) -> str:
    """A rating of ``shares`` in tenths, in the fewest characters that can be read."""
    said = ",".join("1" if share == 10 else f".{share}" if share else "0" for share in shares)
    return f"outcome={outcome} {key_of(len(shares))}=[{said}]"


def tenths(agents: Sequence[str], part: Collection[str]) -> tuple[int, ...]:
    """Tenths for each agent, 10 together. Those in ``part`` (nobody: all) share equally, the first ones one more where it does not
    divide; the others have a tenth each where they are :data:`FEW`, else none."""
    part = part or agents
    least = 1 if len(agents) <= FEW else 0
    each, more = divmod(10 - least * (len(agents) - len(part)), len(part))
    found, given = [], 0
    for agent in agents:
        found.append(each + (given < more) if agent in part else least)
        given += agent in part
    return tuple(found)
