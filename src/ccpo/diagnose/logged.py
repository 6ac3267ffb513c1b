"""Episodes that somebody logged, of a team trained or prompted anywhere: read leniently, complained about exactly.

Read is what ``docs/free-riding.md`` says: lines of ``ccpo.episodes/1``, of which only the rewards are indispensable.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ccpo.errors import UserError
from ccpo.rollout import SCHEMA
from ccpo.types import Coalition, Completion, FinishReason, Rollout, Turn


@dataclass(slots=True, kw_only=True)
class LoggedProblem:
    """All that the log has of one problem: its rollouts, and by removed coalition the rewards without it."""

    rollouts: list[Rollout] = field(default_factory=list)
    without: dict[Coalition, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Log:
    """A read log. ``team``: what its header says of the team, may be empty; ``removal``: what stood in a removed agent's place, by the header."""

    path: Path
    team: Mapping[str, Any]
    removal: str
    problems: Mapping[str, LoggedProblem]

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for problem in self.problems.values() for rollout in problem.rollouts]


def read_log(path: Path) -> Log:
    """The log at ``path``, plain or gzip-compressed; several files of one team may follow each other in it. Raises UserError that names the
    line and what is wrong with it."""
    team: Mapping[str, Any] = {}
    removal = ""
    problems: dict[str, LoggedProblem] = {}
    number = 0
    for number, record in _records(path):
        if "schema" in record:
            if record["schema"] != SCHEMA:
                raise UserError(f"{path}, line {number}: schema {record['schema']!r}; this version reads {SCHEMA!r}")
            team, removal = record.get("team") or team, record.get("removal") or removal
            continue
        if number == 1:
            raise UserError(f'{path}: the first line is no header; begin with {{"schema": "{SCHEMA}"}}')
        try:
            _add(record, problems)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, line {number}: {said}; the fields of a line are in docs/free-riding.md") from None
    if not problems:
        raise UserError(f"{path} has no problem in it ({number} lines); there is nothing to look at")
    return Log(path=path, team=team or _team_of_run(path), removal=removal or _removal_of_run(path), problems=problems)


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"a line is an object; found {type(record).__name__}")
                    yield number, record
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}, line {number}: cannot be read as JSON lines ({error})") from None


def _add(record: Mapping[str, Any], problems: dict[str, LoggedProblem]) -> None:
    problem = record["problem"]
    name = str(problem["id"] if isinstance(problem, Mapping) else problem)
    entry = problems.setdefault(name, LoggedProblem())
    if not record["rollouts"]:
        raise ValueError("rollouts is empty")
    entry.rollouts += [_rollout(r) for r in record["rollouts"]]
    for play in record.get("counterfactuals", ()):
        removed = tuple(sorted(map(str, play["removed"])))
        if not removed:
            raise ValueError("a counterfactual's removed is empty")
        entry.without.setdefault(removed, []).append(_reward(play))


def _rollout(record: Mapping[str, Any]) -> Rollout:
    scores = {str(turn): float(score) for turn, score in (record.get("scores") or {}).items()}
    return Rollout(
        turns=tuple(_turn(t) for t in record.get("turns", ())),
        answer=record.get("answer"),
        reward=_reward(record),
        scores=scores,
        answers={str(turn): answer for turn, answer in (record.get("answers") or {}).items()},
    )


def _reward(record: Mapping[str, Any]) -> float:
    reward = record["reward"]
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not -1e9 < reward < 1e9:
        raise ValueError(f"reward is {reward!r}; it is a number")
    return float(reward)


def _turn(record: Mapping[str, Any]) -> Turn:
    agent = str(record["agent"])
    logprobs = tuple(float(x) for x in record.get("logprobs", ()))
    completion = Completion(token_ids=(), logprobs=logprobs, text=str(record.get("text", "")), finish=FinishReason.EOS)
    return Turn(
        name=str(record.get("name", agent)),
        agent=agent,
        policy="",
        prompt="",
        prompt_ids=(),
        completion=completion,
        message=str(record.get("message", completion.text)),
    )


def agents_of(log: Log) -> tuple[str, ...]:
    """The agents: those of the header, else all that are named anywhere, in order of appearance."""
    if log.team.get("agents"):
        return tuple(map(str, log.team["agents"]))
    spoke = [turn.agent for rollout in log.rollouts for turn in rollout.turns]
    gone = [agent for problem in log.problems.values() for removed in sorted(problem.without) for agent in removed]
    judged = [] if spoke else [turn for rollout in log.rollouts for turn in rollout.scores]
    found = tuple(dict.fromkeys([*spoke, *judged, *gone]))
    if not found:
        raise UserError(
            f"{log.path} names no agents: give its header team: {{agents: [...]}}, or its rollouts turns with an agent each"
        )
    return found


def decider_of(log: Log, agents: Sequence[str]) -> str | None:
    """The one agent whose turn is the answer: the header's, else whose turn alone is judged in every rollout."""
    if "decider" in log.team:
        return log.team["decider"]
    judged = {turn for rollout in log.rollouts for turn in rollout.scores}
    if len(judged) != 1 or len(agents) < 2:
        return None
    (turn,) = judged
    speakers = {t.agent for rollout in log.rollouts for t in rollout.turns if t.name == turn} or {turn}
    return next(iter(speakers)) if len(speakers) == 1 and speakers <= set(agents) else None


def voters_of(log: Log) -> tuple[dict[str, str], bool]:
    """The voters by turn, and whether that they did not hear each other had to be assumed. Empty where there is no vote, or its voters heard
    each other."""
    described = log.team.get("turns")
    judged = list(dict.fromkeys(turn for rollout in log.rollouts for turn in rollout.scores))
    if described:
        speaker = {turn["name"]: turn["agent"] for turn in described}
        alone = not any(turn.get("reads") for turn in described) and set(judged) <= set(speaker)
        return ({turn: speaker[turn] for turn in judged} if alone and len(judged) > 1 else {}), False
    spoken = {t.name: t.agent for rollout in log.rollouts for t in rollout.turns}
    if len(judged) < 2 or not set(spoken) <= set(judged):
        return {}, False
    return {turn: spoken.get(turn, turn) for turn in judged}, True


def _of_run(path: Path) -> Mapping[str, Any]:
    """The recipe of the run whose episodes these are; empty where they are nobody's."""
    recipe = path.parent.parent / "recipe.json"
    if path.parent.name != "episodes" or not recipe.is_file():
        return {}
    return json.loads(recipe.read_text(encoding="utf-8"))


def _team_of_run(path: Path) -> Mapping[str, Any]:
    return _of_run(path).get("team", {})


def _removal_of_run(path: Path) -> str:
    return _of_run(path).get("config", {}).get("rollout", {}).get("removal", "")
