"""What a team can do: its accuracy, pass@k and majority@k, each agent alone, and the team without each agent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ccpo.errors import UserError
from ccpo.rollout import Ask, Limits, Played, Voice, play_team
from ccpo.tasks import Task
from ccpo.teams import PlayTeam, Team
from ccpo.types import Coalition, Problem, Removal

SOLVED = 0.999  # a reward from here on counts as solved in pass@k


@dataclass(frozen=True, kw_only=True)
class Exam:
    """How an evaluation samples: problems of each data set, samples a problem, temperature, top-p, whether agents are removed too."""

    problems: int = 500
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    ablations: bool = True
    seed: int = 0


def evaluate(
    team: Team | PlayTeam, tests: Mapping[str, Task], voices: Mapping[str, Voice], limits: Limits, exam: Exam
) -> dict[str, dict[str, Any]]:
    """A report for each data set.

    ``team``: mean reward with its 95% interval; ``tokens``: generated tokens of one joint play; ``pass@k``, ``majority@k`` for
    k = 1, 2, 4, … up to the samples; ``alone``: each agent by itself; ``without``: the team with an agent's messages dropped, and
    ``blank``: with them empty (the lazy-agent test of arXiv 2603.21563, Table 3). Raises UserError for an empty data set.
    """
    heard = {agent: _speaking(voice, exam) for agent, voice in voices.items()}
    reports = {}
    for name, task in tests.items():
        count = min(exam.problems, len(task))
        if count == 0:
            raise UserError(f"data set {name!r} is empty; there is nothing to evaluate")
        problems = [task[i] for i in range(count)]
        reports[name] = _report(team, task, problems, heard, limits, exam)
    return reports


def _speaking(voice: Voice, exam: Exam) -> Voice:
    sampling = replace(voice.sampling, temperature=exam.temperature, top_p=exam.top_p, top_k=0)
    return replace(voice, sampling=sampling)


def _report(
    team: Team | PlayTeam,
    task: Task,
    problems: Sequence[Problem],
    voices: Mapping[str, Voice],
    limits: Limits,
    exam: Exam,
) -> dict[str, Any]:
    removals: frozenset[Coalition] = frozenset((name,) for name in team.agent_names) if exam.ablations else frozenset()

    def play(team: Team | PlayTeam, coalitions: frozenset[Coalition], how: Removal) -> Played:
        ask = Ask(samples=exam.samples, coalitions=coalitions, draws=None, removal=how)
        return play_team(team, task, voices, limits, problems, ask, seed=exam.seed, step=0)

    joint = play(team, removals, Removal.DROP)
    report: dict[str, Any] = {
        "problems": len(problems),
        "samples": exam.samples,
        "team": interval(joint.reward_PN.mean(1).tolist()),
        "tokens": joint.tokens["joint"] / (len(problems) * exam.samples),
    }
    ks = [2**i for i in range(exam.samples.bit_length()) if 2**i <= exam.samples]
    solved = [int(c) for c in (joint.reward_PN >= SOLVED).sum(1)]
    report["pass@k"] = {str(k): sum(pass_at_k(exam.samples, c, k) for c in solved) / len(solved) for k in ks}
    report["majority@k"] = {
        str(k): sum(_majority(group.rollouts[:k]) for group in joint.groups) / len(problems) for k in ks
    }
    if not exam.ablations:
        return report
    blank = play(team, removals, Removal.BLANK)
    report["without"] = {c[0]: interval(_means(joint, c)) for c in sorted(removals)}
    report["blank"] = {c[0]: interval(_means(blank, c)) for c in sorted(removals)}
    if isinstance(team, Team):
        report["alone"] = {
            name: interval(play(team.alone(name), frozenset(), Removal.DROP).reward_PN.mean(1).tolist())
            for name in team.agent_names
        }
    return report


def _means(played: Played, coalition: Coalition) -> list[float]:
    return played.without[coalition].mean((1, 2)).tolist()


def _majority(rollouts: Sequence[Any]) -> float:
    """The mean reward of the most frequent answer; a tie pays the mean over the tied answers, no answer 0."""
    by_answer: dict[str, list[float]] = {}
    for rollout in rollouts:
        if rollout.answer is not None:
            by_answer.setdefault(rollout.answer, []).append(rollout.reward)
    most = max(map(len, by_answer.values()), default=0)
    tied = [sum(r) / len(r) for r in by_answer.values() if len(r) == most]
    return sum(tied) / len(tied) if tied else 0.0


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: ``1 - C(n-c, k)/C(n, k)`` (arXiv 2107.03374, Eq. 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: k must be from 1 to the samples")
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over problems and its 95% interval: Wilson's score interval where every value is 0 or 1, else the normal one, clipped to [0, 1]."""
    n, z = len(values), 1.959964
    mean = math.fsum(values) / n
    if all(v in (0.0, 1.0) for v in values):
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    else:
        variance = math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1)
        centre, half = mean, z * math.sqrt(variance / n)
    return {"mean": mean, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def headline(reports: Mapping[str, Mapping[str, Any]], team: Team | PlayTeam, suffix: str) -> dict[str, float]:
    """The first data set's figures as flat keys: ``team_after``, ``without_thinker_after``, ``blank_…``, ``alone_…``, ``solo_after``.

    ``solo`` is the deciding agent by itself; where several vote, the mean over them.
    """
    report = next(iter(reports.values()))
    flat = {f"team_{suffix}": report["team"]["mean"]}
    for kind in ("without", "blank", "alone"):
        flat |= {f"{kind}_{agent}_{suffix}": value["mean"] for agent, value in report.get(kind, {}).items()}
    alone = report.get("alone", {})
    if alone:
        solo = alone[team.decider]["mean"] if team.decider else sum(v["mean"] for v in alone.values()) / len(alone)
        flat[f"solo_{suffix}"] = solo
    return flat
