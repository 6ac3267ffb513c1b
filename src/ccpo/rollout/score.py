"""Scores plays: the verifier reads every text that the decision reads, and the decision makes them one reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ccpo.errors import UserError
from ccpo.rollout.lanes import Lane
from ccpo.rollout.voices import Limits
from ccpo.tasks.base import Task
from ccpo.teams import Ballot, Function, Team
from ccpo.types import FinishReason, Problem, Turn, Verdict


def score_lanes(team: Team, task: Task, lanes: Sequence[Lane], limits: Limits) -> None:
    """Set reward, answer and scores of every lane.

    A truncated turn, where truncation is paid nothing, makes its ballot an abstention, and takes the whole reward where one turn
    decides: an answer that rests on a cut-off thought is not paid either.
    """
    if isinstance(team.decision, Function):
        _score_function(team, task, lanes, limits)
        return
    pairs: list[tuple[Problem, str]] = []
    places: list[tuple[Lane, str]] = []
    for lane in lanes:
        for name in team.decision.reads:
            turn = lane.turn(name)  # a text that stands in a removed agent's place is heard, but has no vote
            if turn is not None and not (limits.truncated_is_zero and _truncated(turn)):
                pairs.append((lane.problem, turn.completion.text))
                places.append((lane, name))
    verdicts: dict[tuple[int, str], Verdict] = {
        (id(lane), name): verdict for (lane, name), verdict in zip(places, task.verify(pairs), strict=True)
    }
    for lane in lanes:
        read = {name: verdicts.get((id(lane), name)) for name in team.decision.reads}
        lane.scores = {name: verdict.score if verdict else 0.0 for name, verdict in read.items()}
        lane.answers = {name: verdict.answer if verdict else None for name, verdict in read.items()}
        lane.ballots = [
            Ballot(turn=name, answer=v.answer, score=v.score, weight=_confidence(lane.turn(name)))
            for name, v in read.items()
            if v is not None
        ]
    for lane, decided in zip(lanes, team.decision.decide_many([lane.ballots for lane in lanes]), strict=True):
        lane.answer = decided.answer
        lane.reward = 0.0 if _void(team, lane, limits) else decided.reward


def score_turns(team: Team, task: Task, joint: Sequence[Lane], problems: int) -> dict[str, Tensor]:
    """The task's process rewards by turn, ``[P, N]``; only turns that it judges in every play. Raises UserError for a score that is
    not a number in [0, 1]."""
    places = [(lane, spec.name) for spec in team.turns_in_order for lane in joint]
    scores = task.process([(lane.problem, name, lane.turn(name).completion.text) for lane, name in places])
    if len(scores) != len(places):
        raise UserError(f"task {task.name!r}: process gave {len(scores)} scores for {len(places)} turns; one for each")
    by_turn: dict[str, list[float | None]] = {}
    for (_, name), score in zip(places, scores, strict=True):
        if score is not None and not 0 <= score <= 1:
            raise UserError(f"task {task.name!r}: process gave turn {name!r} the score {score}; a score lies in [0, 1]")
        by_turn.setdefault(name, []).append(score)
    return {name: torch.tensor(s).reshape(problems, -1) for name, s in by_turn.items() if None not in s}


def _score_function(team: Team, task: Task, lanes: Sequence[Lane], limits: Limits) -> None:
    texts = []
    for lane in lanes:
        messages = {name: text for name in team.decision.reads if (text := _ballot_text(lane, name)) is not None}
        texts.append(_called(team, lane.problem, messages) if messages else "")
    verdicts = task.verify([(lane.problem, text) for lane, text in zip(lanes, texts, strict=True)])
    for lane, verdict in zip(lanes, verdicts, strict=True):
        lane.answer = verdict.answer
        lane.reward = 0.0 if _void(team, lane, limits) else verdict.score


def _called(team: Team, problem: Problem, messages: Mapping[str, str]) -> str:
    text = team.decision.fn(problem, messages)
    if not isinstance(text, str):
        raise UserError(
            f"the decision function of team {team.name!r} returned {text!r} on problem {problem.id!r}; it must return the "
            "answer's text"
        )
    return text


def _void(team: Team, lane: Lane, limits: Limits) -> bool:
    one_decides = team.decider is not None or isinstance(team.decision, Function)
    return limits.truncated_is_zero and one_decides and any(_truncated(turn) for turn in lane.all_turns(team))


def _truncated(turn: Turn | None) -> bool:
    return turn is not None and turn.completion.finish is FinishReason.LENGTH


def _ballot_text(lane: Lane, name: str) -> str | None:
    """What a decision function is shown: the turn's raw text, or what stands in its place; None where it is gone."""
    turn = lane.turn(name)
    return turn.completion.text if turn is not None else lane.message(name)


def _confidence(turn: Turn | None) -> float:
    """exp of the mean log-probability of the turn's tokens; 1 for a text that nobody sampled."""
    if turn is None or not turn.completion.logprobs:
        return 1.0
    return math.exp(math.fsum(turn.completion.logprobs) / len(turn.completion.logprobs))
