"""What a step leaves behind for the alarms: moments of means over problems, a few dozen numbers whatever the step's size."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.alarms.base import Moments, Shape
from ccpo.alarms.texts import MIN_COPY, copied_from, folded, gives_away, says_nothing
from ccpo.rollout import Ballots, ballots_of
from ccpo.types import FinishReason, Group, Rollout, Turn

PASSED = 0.999
"""A score from which on an answer counts as passed."""
KEYS = 3
"""References that one and the same text must pass against in a step to be a skeleton key."""
EXPLODED = 20.0
"""Size of a normalised signal from which on its normalisation has broken down; or what the step's size allows, if that is more. Among n values none
is further than sqrt(n) of their own standard deviations from their mean, and a reward over its mean among N is at most N: beyond that, what
it was divided by is not theirs."""

DRIFT = 0.01
"""Nats of KL a token between engine and learner: after 100 tokens the sequence's probability is off by a factor of e. Rounding alone in bfloat16
gives 1e-4 to 1e-3."""
PROBLEMS = 16
"""Problems of a step whose texts are read and whose votes are counted again, or up to half as many more: 320 in a window tell what can be told."""
READ = 3
"""Rollouts of a problem whose texts are read and whose votes are counted again, or one more. Problems are what counts, and reading costs time."""

PerAgent = Mapping[str, Sequence[Sequence[float | None]]]
"""Credit or advantages by agent, then problem, then rollout; None is a value that was not finite."""


def tally(
    shape: Shape, groups: Sequence[Group], credit: PerAgent, advantage: PerAgent, metrics: Mapping[str, float]
) -> dict[str, Moments]:
    """The moments of one step, from its groups, what was paid, and its metrics. What they cannot tell is absent."""
    values: dict[str, list[float]] = defaultdict(list)
    keys: dict[str, set[str]] = defaultdict(set)
    looked_at = groups[:: max(1, round(len(groups) / PROBLEMS))]
    for group in groups:
        reward = math.fsum([r.reward for r in group.rollouts]) / len(group.rollouts)
        values["reward"].append(reward)
        if not shape.voters:
            _effects(group, reward, values)
    for group in looked_at:
        _texts(shape, group, values, keys)
    if shape.voters and groups:
        _votes(shape, looked_at, values)
    values["hack/keys"].append(float(sum(len(references) >= KEYS for references in keys.values())))
    _paid(credit, advantage, values)
    found = {name: Moments.of(entries) for name, entries in values.items()}
    return found | _from_metrics(shape, len(groups), metrics)


def _some(group: Group) -> Sequence[Rollout]:
    """The rollouts that are looked at closely, from all parts of the group."""
    return group.rollouts[:: max(1, round(len(group.rollouts) / READ))]


def _effects(group: Group, reward: float, values: dict[str, list[float]]) -> None:
    """``effect/AGENT``: the mean reward of the problem, less that without the agent."""
    without: dict[str, list[float]] = {}
    for play in group.counterfactuals:
        if len(play.removed) == 1:
            without.setdefault(play.removed[0], []).append(play.reward)
    for agent, rewards in without.items():
        values[f"effect/{agent}"].append(reward - math.fsum(rewards) / len(rewards))


def _votes(shape: Shape, groups: Sequence[Group], values: dict[str, list[float]]) -> None:
    """By voter, from a re-count of every vote: ``effect``; ``changed``, how often its absence changes the reward; ``relative``, its effect
    less the others'; ``won``, how often its answer is the team's where the voters are not of one mind."""
    looked_at = [_some(group) for group in groups]
    rollouts = [rollout for chosen in looked_at for rollout in chosen]
    ballots = ballots_of(rollouts, shape.voters, shape.vote)
    if ballots is None:
        return
    without = ballots.without_each()
    sizes = list(map(len, looked_at))
    paid_B = ballots.score_BK.new_tensor([rollout.reward for rollout in rollouts])
    loss_KB = paid_B - torch.stack(list(without.values()))
    effects, changes = _by_problem(loss_KB, sizes), _by_problem((loss_KB.abs() > 1e-9).double(), sizes)
    total = [math.fsum(effect) for effect in zip(*effects, strict=True)]
    for agent, effect, changed in zip(without, effects, changes, strict=True):
        values[f"effect/{agent}"], values[f"changed/{agent}"] = effect, changed
        if len(without) > 1:
            rest = len(without) - 1
            values[f"relative/{agent}"] = [own - (t - own) / rest for own, t in zip(effect, total, strict=True)]
    _wins(ballots, sizes, values)


def _wins(ballots: Ballots, sizes: Sequence[int], values: dict[str, list[float]]) -> None:
    """``won/AGENT`` over the contested votes of each problem that has some."""
    answer_BK = ballots.answer_BK
    contested_B = (answer_BK != answer_BK[:, :1]).any(1) & (ballots.chosen_B >= 0)
    if not contested_B.any():
        return
    agents = list(dict.fromkeys(ballots.voters))
    won_BK = (answer_BK == ballots.chosen_B[:, None]) & contested_B[:, None]
    own = [won_BK[:, [voter == agent for voter in ballots.voters]].any(1) for agent in agents]
    share, *won = _by_problem(torch.stack([contested_B, *own]).double(), sizes)
    for agent, wins in zip(agents, won, strict=True):
        values[f"won/{agent}"] = [w / c for w, c in zip(wins, share, strict=True) if c > 0]


def _by_problem(value_XB: Tensor, sizes: Sequence[int]) -> list[list[float]]:
    """Means over the rollouts of each problem, a row each."""
    if len(set(sizes)) == 1:
        return value_XB.view(len(value_XB), len(sizes), -1).mean(2).tolist()
    return torch.stack([part.mean(1) for part in value_XB.split(list(sizes), dim=1)], dim=1).tolist()


def _texts(shape: Shape, group: Group, values: dict[str, list[float]], keys: dict[str, set[str]]) -> None:
    """``truncated/AGENT`` of all its turns; ``empty``, ``copied`` and ``leaked/AGENT`` of the messages that others hear; ``hack/…`` of the
    answers that passed, and by text in ``keys`` the references that it passed against."""
    counts: dict[str, _Count] = defaultdict(_Count)
    problem, answer = "", group.problem.answer
    read = unread = empty = 0
    for rollout in _some(group):
        judged = rollout.scores or {turn.name: 0.0 for turn in rollout.turns[-1:]}
        answers, heard = rollout.answers, []
        for turn in rollout.turns:
            name, completion = turn.name, turn.completion
            count = counts[turn.agent]
            count.turns += 1
            count.truncated += completion.finish is FinishReason.LENGTH
            score = judged.get(name)
            if score is None:
                problem = problem or folded(group.problem.text)
                _message(shape, group, rollout, turn, problem, heard, count)
            elif score >= PASSED:
                keys[completion.text].add(answer)
                empty += says_nothing(completion.text)
                if name in answers:
                    read += answers[name] is not None
                    unread += answers[name] is None
    for agent, count in counts.items():
        values[f"truncated/{agent}"].append(count.truncated / count.turns)
        if count.messages:
            values[f"empty/{agent}"].append(count.empty / count.messages)
            values[f"copied/{agent}"].append(count.copied / count.messages)
        if count.unasked:
            values[f"leaked/{agent}"].append(count.leaked / count.unasked)
    for name, number in (("read", read), ("unread", unread), ("empty", empty)):
        values[f"hack/{name}"].append(float(number > 0))


@dataclass(slots=True)
class _Count:
    """Of an agent's turns on one problem: how many, and of its messages how many say nothing, repeat, and of those ``unasked`` for
    an answer, give it away."""

    turns: int = 0
    truncated: int = 0
    messages: int = 0
    empty: int = 0
    copied: int = 0
    unasked: int = 0
    leaked: int = 0


def _message(
    shape: Shape,
    group: Group,
    rollout: Rollout,
    turn: Turn,
    problem: str,
    heard: list[tuple[str, str]],
    count: _Count,
) -> None:
    """Add one message to its agent's counts, and its folded text to what later ones may have been copied from."""
    count.messages += 1
    message = turn.message
    if says_nothing(message):
        count.empty += 1
        return
    if len(message) >= MIN_COPY:
        plain = folded(message)
        count.copied += copied_from(plain, [problem, *(text for agent, text in heard if agent != turn.agent)])
        heard.append((turn.agent, plain))
    if turn.name not in shape.asked:
        count.unasked += 1
        count.leaked += gives_away(message, [group.problem.answer, rollout.answer or group.problem.answer])


def _paid(credit: PerAgent, advantage: PerAgent, values: dict[str, list[float]]) -> None:
    """``largest/AGENT``: the largest size of a credit or advantage in the step; ``exploded/AGENT``: whether it is too large."""
    for agent in advantage:
        rows = [row for table in (credit, advantage) for row in table.get(agent, ()) if row]
        broken = any(None in row for row in rows)
        largest = math.inf if broken else max((max(max(row), -min(row)) for row in rows), default=0.0)
        P, N = len(advantage[agent]), max(map(len, advantage[agent]), default=0)
        values[f"exploded/{agent}"].append(float(largest > max(EXPLODED, N, math.sqrt(P * N))))
        values[f"largest/{agent}"].append(min(largest, 1e9))


def _from_metrics(shape: Shape, problems: int, metrics: Mapping[str, float]) -> dict[str, Moments]:
    """Figures that a step's metrics have: a share of its problems, or one number for the step."""
    found: dict[str, Moments] = {}
    for agent in shape.agents:
        same, drift = metrics.get(f"credit/{agent}/same_as_shared"), metrics.get(f"actor/{agent}/mismatch_k3")
        if same is not None:
            found[f"same/{agent}"] = Moments.of([same])
        if drift is not None:
            found[f"drift/{agent}"] = Moments.of([drift])
            found[f"drifted/{agent}"] = Moments.of([float(drift > DRIFT)])
        silent = metrics.get(f"credit/{agent}/no_signal")
        if silent is not None and problems:
            found[f"silent/{agent}"] = Moments(problems, silent * problems, silent * problems)
        rest = shape.others(agent)
        alone = metrics.get(f"reward/without_{'_'.join(rest)}") if rest else None
        if alone is not None and agent not in shape.helpers:
            found[f"alone/{agent}"] = Moments.of([alone])
    return found
