"""Ballots put into other rollouts: what a voter's answer is worth whatever the others happened to say. No token is decoded.

Voters who have not heard each other speak independently of each other, given the problem. So the vote of rollout n's ballot with
the other ballots of rollout m is as good a sample of the vote as rollout n itself, and a group of N rollouts holds N such
samples for every ballot, where a plain rollout shows one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccpo.rollout.lanes import Lane
from ccpo.rollout.tree import Tree
from ccpo.teams import ABSTAIN, Ballot, Majority, Sampled, Team, VoteKind, Weighted, majority_BK


def swappable(team: Team) -> tuple[str, ...]:
    """The turns whose ballots may change places: those that a vote counts and that no other turn has read. Whoever speaks
    beside or after such a turn has not heard it."""
    if not isinstance(team.decision, Majority | Weighted | Sampled):
        return ()
    read = {name for turn in team.turns for name in turn.reads}
    return tuple(name for name in team.decision.reads if name not in read)


def swapped(team: Team, joint: Sequence[Lane], tree: Tree, problems: int) -> dict[str, Tensor]:
    """By turn ``[P, N, S]``: the vote's reward when rollout n's ballot stands in its s-th sibling rollout: one that shares
    all that was spoken at earlier levels. Empty where the team has no ballots that may change places."""
    names = swappable(team)
    if not names:
        return {}
    voters = team.decision.reads
    N = tree.leaves
    answer_PNK, score_PNK, weight_PNK = _ballots(joint, voters, problems, N)
    found = {}
    for name in names:
        k = voters.index(name)
        level = next(depth for depth, turns in enumerate(team.levels) if any(t.name == name for t in turns))
        sibling_NS = siblings(tree, level)
        own = torch.zeros(len(voters), dtype=torch.bool)
        own[k] = True
        mixed = [
            torch.where(own, ballot_PNK[:, :, None, :], ballot_PNK[:, sibling_NS, :])
            for ballot_PNK in (answer_PNK, score_PNK, weight_PNK)
        ]
        answer_BK, score_BK, weight_BK = (m.flatten(0, 2) for m in mixed)
        kind = team.decision.kind
        reward_B = majority_BK(answer_BK, score_BK, weight_BK if kind == VoteKind.WEIGHTED else None, kind)
        found[name] = reward_B.reshape(problems, N, -1).float()
    return found


def siblings(tree: Tree, level: int) -> Tensor:
    """``[N, S]``: the rollouts that share with rollout n all that was spoken before ``level``, itself among them."""
    place = tree.place(level)
    size = place.siblings * place.plays
    first_N = torch.arange(tree.leaves) // size * size
    return first_N[:, None] + torch.arange(size)


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
