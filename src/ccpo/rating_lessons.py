"""Demonstrations of ratings, for a tiny base model that is to play SEPO's raters: who was right, as the task's teacher knows it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from ccpo.rollout.ratings import outcome_of
from ccpo.tasks.procedural import ProceduralTask
from ccpo.teams import Ballot, Function, Team, rating_turn, speakers
from ccpo.teams.rating import ANSWER
from ccpo.teams.rating_parse import key_of
from ccpo.types import Problem

LEAST = 1
"""Tenths of an outcome that an agent has which had no part in it; for two agents the least that a rating may say."""


class RatingLessons:
    """A teacher that rates plays of ``team``: whoever said what a teacher without error would have said after the same words has a part
    in a success, whoever did not has one in a failure. ``prompt`` as ``credit.prompt``; with probability ``noise`` the shares are
    those of a set of agents drawn at random.

    Raises UserError where the prompt does not fit the team.
    """

    def __init__(self, team: Team, task: ProceduralTask, prompt: str, noise: float) -> None:
        self.team, self.task, self.prompt, self.noise = team, task, prompt, noise
        self.speakers = speakers(team.turns_in_order)
        for agent in team.agent_names:
            self._spec(agent, "correct")

    def _spec(self, agent: str, outcome: str):
        return rating_turn(agent, self.team.agent_names, self.speakers, outcome, self.prompt)

    def texts(self) -> list[str]:
        """What holds every character of a rating and its prompt, beside those of the task."""
        agents, outcomes = self.team.agent_names, ("correct", "wrong")
        shown = {"problem": "0", ANSWER: "0", **{name: "0" for name, _ in self.speakers}}
        prompts = [self._spec(agent, outcome).render(shown) for agent in agents for outcome in outcomes]
        return [*prompts, *(self.rating(outcome, (5,) * len(agents)) for outcome in outcomes), "0123456789"]

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
        return prompt, self.rating(outcome, tenths(agents, part))

    def rating(self, outcome: str, shares: Sequence[int]) -> str:
        """A rating in the fewest characters that can be read."""
        said = ",".join("1" if share == 10 else f".{share}" for share in shares)
        return f"outcome={outcome} {key_of(len(shares))}=[{said}]"

    def _decided(self, problem: Problem, said: Mapping[str, str]) -> tuple[str, float]:
        if isinstance(self.team.decision, Function):
            text = self.team.decision.fn(problem, said)
            (verdict,) = self.task.verify([(problem, text)])
            return text, verdict.score
        reads = self.team.decision.reads
        verdicts = self.task.verify([(problem, said[name]) for name in reads])
        ballots = [
            Ballot(turn=name, answer=v.answer, score=v.score, weight=1.0)
            for name, v in zip(reads, verdicts, strict=True)
        ]
        decided = self.team.decision.decide(ballots)
        return decided.answer or "", decided.reward

    def _right(self, problem: Problem, said: Mapping[str, str], rng: random.Random) -> Collection[str]:
        """The agents of whose turns none was wrong, given what it had heard."""
        wrong = {
            turn.agent
            for turn in self.team.turns_in_order
            if said[turn.name]
            != self.task.teach(problem, turn.name, {name: said[name] for name in turn.reads}, rng, 0.0)
        }
        return set(self.team.agent_names) - wrong


def tenths(agents: Sequence[str], part: Collection[str]) -> tuple[int, ...]:
    """Tenths for each agent, 10 together: those in ``part`` (nobody: all) share equally what the others' least leaves, the first ones
    one more where it does not divide."""
    part = part or agents
    rest = 10 - LEAST * (len(agents) - len(part))
    each, more = divmod(rest, len(part))
    found, given = [], 0
    for agent in agents:
        found.append(each + (given < more) if agent in part else LEAST)
        given += agent in part
    return tuple(found)
