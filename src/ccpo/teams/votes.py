"""Counting votes, as pure functions of tensors. ``B`` plays, ``K`` ballots each.

An abstention (-1) is no vote; no votes at all pay 0. A tie pays what a uniformly random tie-break would: the mean score of the tied answers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["majority", "weighted", "sampled"]


def vote_shares(answer_BK: Tensor, weight_BK: Tensor | None = None, kind: Kind = "majority") -> Tensor:
    """The probability ``[B, K]`` with which each ballot's answer is drawn as the team's, spread over the equal ballots.

    ``answer_BK``: integer class of each ballot's answer, -1 for an abstention. ``majority``: the most frequent answer; ``weighted``: the answer of most weight;
    ``sampled``: an answer drawn in proportion to its weight. Rows sum to 1, or to 0 without votes.
    Raises ValueError for shapes that differ or negative weights.
    """
    if answer_BK.ndim != 2:
        raise ValueError(f"answer_BK must be [plays, ballots], got shape {tuple(answer_BK.shape)}")
    valid_BK = answer_BK >= 0
    weight_BK = torch.ones(answer_BK.shape) if weight_BK is None or kind == "majority" else weight_BK
    if weight_BK.shape != answer_BK.shape or bool((weight_BK < 0).any()):
        raise ValueError("weight_BK must be non-negative and of the shape of answer_BK")
    weight_BK = weight_BK * valid_BK
    if kind == "sampled":
        total_B1 = weight_BK.sum(-1, keepdim=True)
        return torch.where(total_B1 > 0, weight_BK / total_B1.clamp_min(1e-300), torch.zeros_like(weight_BK))
    support_BK, equal_BK = torch.zeros_like(weight_BK), torch.zeros_like(weight_BK)
    for k in range(answer_BK.shape[1]):  # K passes over [B, K] rather than one over [B, K, K]
        same_BK = (answer_BK == answer_BK[:, k : k + 1]) & valid_BK
        support_BK += same_BK * weight_BK[:, k : k + 1]
        equal_BK += same_BK
    best_B1 = torch.where(valid_BK, support_BK, -torch.inf).amax(-1, keepdim=True)
    winner_BK = valid_BK & (support_BK >= best_B1 * (1 - 1e-6))
    each_BK = torch.where(winner_BK, 1.0 / equal_BK.clamp_min(1), torch.zeros_like(weight_BK))
    return each_BK / each_BK.sum(-1, keepdim=True).clamp_min(1e-12)


def vote_reward(answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None = None, kind: Kind = "majority") -> Tensor:
    """The expected reward ``[B]`` of the vote, given each ballot's score in [0, 1]."""
    return (vote_shares(answer_BK, weight_BK, kind) * score_BK).sum(-1)


def recount_without(answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None = None, kind: Kind = "majority") -> Tensor:
    """The reward ``[K, B]`` when ballot k is taken away: every voter's counterfactual, with nothing decoded."""
    rewards = []
    for k in range(answer_BK.shape[1]):
        left_BK = answer_BK.clone()
        left_BK[:, k] = -1
        rewards.append(vote_reward(left_BK, score_BK, weight_BK, kind))
    return torch.stack(rewards)
