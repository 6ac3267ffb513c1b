"""Ballots put into other rollouts: what a voter's answer is worth whatever the others happened to say. No token is decoded.

Voters who have not heard each other speak independently of each other, given the problem. So rollout n's ballot with the other
voters' ballots of any rollouts, each voter's from another, is as good a sample of the vote as rollout n itself. A group of N rollouts
of K voters holds N^(K-1) such samples for every ballot, where a plain rollout shows one.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ccpo.rollout.lanes import Lane
from ccpo.rollout.tree import Tree
from ccpo.teams import ABSTAIN, Ballot, Majority, Sampled, Team, VoteKind, Weighted, majority_BK

MIXTURES = 128  # mixtures of the others' ballots that a ballot is tried in


def swappable(team: Team) -> tuple[str, ...]:
    """The turns whose ballots may change places: those that a vote counts and that no other turn has read. Whoever speaks
    beside or after such a turn has not heard it."""
    if not isinstance(team.decision, Majority | Weighted | Sampled):
        return ()
    read = {name for turn in team.turns for name in turn.reads}
    return tuple(name for name in team.decision.reads if name not in read)


def swapped(
    team: Team, joint: Sequence[Lane], tree: Tree, problems: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By turn ``[P, N, S]``: the vote's reward when rollout n's ballot meets the s-th mixture of the other ballots that were
    cast in its context; and the same when it abstains. Both empty where the team has no ballots that may change places."""
    names = swappable(team)
    if not names:
        return {}, {}
    voters = team.decision.reads
    level = {turn.name: depth for depth, turns in enumerate(team.levels) for turn in turns}
    ballots = _ballots(joint, voters, problems, tree.leaves)
    found, without = {}, {}
    for name in names:
        # ballots of other levels may hang together: they move as one; the own ballot's column is not looked at
        alone = [v for v in voters if level[v] == level[name] and v != name]
        column_K = [alone.index(v) if v in alone else 0 if v == name else len(alone) for v in voters]
        source_NSK = _sources(tree, level[name], column_K)
        own_K = torch.tensor([v == name for v in voters])
        columns = torch.arange(len(voters))
        mixed = [
            torch.where(own_K, ballot_PNK[:, :, None, :], ballot_PNK[:, source_NSK, columns]) for ballot_PNK in ballots
        ]
        answer_BK, score_BK, weight_BK = (m.flatten(0, 2) for m in mixed)
        kind = team.decision.kind
        weight_BK = weight_BK if kind == VoteKind.WEIGHTED else None
        shape = (problems, tree.leaves, -1)
        found[name] = majority_BK(answer_BK, score_BK, weight_BK, kind).reshape(shape).float()
        silent_BK = answer_BK.masked_fill(own_K, ABSTAIN)
        without[name] = majority_BK(silent_BK, score_BK, weight_BK, kind).reshape(shape).float()
    return found, without


def _sources(tree: Tree, level: int, column_K: Sequence[int]) -> Tensor:
    """``[N, S, K]``: from which rollout the s-th mixture takes each ballot; equal columns come from the same rollout."""
    place = tree.place(level)
    size = place.siblings * place.plays  # rollouts that share all that was spoken before the level
    first_N = torch.arange(tree.leaves) // size * size
    mixture_SC = mixtures(size, max(column_K) + 1)
    return first_N[:, None, None] + mixture_SC[:, list(column_K)]


def mixtures(size: int, columns: int, most: int = MIXTURES) -> Tensor:
    """``[S, columns]``: which of ``size`` rollouts each column comes from. All combinations where they are few, else ``most`` or a
    little more in which every rollout is used equally often, in orders that are always the same."""
    if size**columns <= most:
        return torch.tensor(list(itertools.product(range(size), repeat=columns)))
    rng = random.Random(f"mixtures/{size}/{columns}")
    rounds = math.ceil(most / size)
    order = [[i for _ in range(rounds) for i in rng.sample(range(size), size)] for _ in range(columns)]
    return torch.tensor(order).T


def _ballots(joint: Sequence[Lane], voters: Sequence[str], P: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Answers as numbers that are equal within a problem where the answers are, scores and weights: each ``[P, N, K]``."""
    numbers: list[dict[str, int]] = [{} for _ in range(P)]
    answers, scores, weights = [], [], []
    for lane in joint:
        by_turn: dict[str, Ballot] = {ballot.turn: ballot for ballot in lane.ballots}
        for name in voters:
            ballot = by_turn.get(name)
            voted = ballot is not None and ballot.answer is not None
            classes = numbers[lane.slot]
            answers.append(classes.setdefault(ballot.answer, len(classes)) if voted else ABSTAIN)
            scores.append(ballot.score if voted else 0.0)
            weights.append(ballot.weight if voted else 0.0)
    shape = (P, N, len(voters))
    return (
        torch.tensor(answers).reshape(shape),
        torch.tensor(scores, dtype=torch.float64).reshape(shape),
        torch.tensor(weights, dtype=torch.float64).reshape(shape),
    )
