"""Counts votes, vectorised: what a majority, a weighted or a sampled vote pays, and what it would pay without each
voter.

The rules. Votes for the same answer are one class. A tie pays the expected reward under a uniformly random choice among
the tied answers; an abstention is no vote; no votes at all pay 0. Nothing is decoded for the counterfactual of a voter:
it is a re-count (CCPO for voting, arXiv 2603.21563).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

ABSTAIN = -1
_ROWS = 1 << 15  # rows counted at a time: the vectors of one chunk stay in the processor's cache


class VoteKind(StrEnum):
    MAJORITY = "majority"  # the answer with most votes
    WEIGHTED = "weighted"  # the answer with the greatest sum of weights
    SAMPLED = "sampled"  # an answer drawn with its share of the votes, paid its expected reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """``reward_B``: the expected reward. ``winner_BK``: the votes for the winning answer, or answers where they tie."""

    reward_B: Tensor
    winner_BK: Tensor


def tally(answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None = None, kind: str = VoteKind.MAJORITY) -> Tally:
    """Count every row. See :func:`majority_BK`; also says which votes won."""
    votes = _check(answer_BK, score_BK, weight_BK, kind)
    rewards, winners = [], []
    for answer_KB, score_KB, weight_KB in _chunks(*votes):
        total_KB, size_KB = _totals(answer_KB, weight_KB)
        voted_KB = weight_KB > 0
        rewards.append(_reward(total_KB, size_KB, voted_KB, score_KB, weight_KB, kind))
        winners.append(_leaders(total_KB, voted_KB))
    return Tally(reward_B=torch.cat(rewards).to(score_BK.dtype), winner_BK=torch.cat(winners, dim=1).T)


def majority_BK(
    answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None = None, kind: str = VoteKind.MAJORITY
) -> Tensor:
    """Expected reward of a vote.

    ``majority``, ``weighted``: ``R = mean over the tied answers a of s(a)``, tied: those with the greatest ``W(a)``.
    ``sampled``: ``R = sum over answers a of s(a) W(a) / sum W``. Here ``W(a)`` is the number of votes for ``a``
    (``weighted``: their summed weight) and ``s(a)`` the mean score of the votes for ``a`` (they are equal where the
    verifier reads only the answer).

    Args:
        answer_BK: integers, one class per distinct answer of a row; -1 (any negative number) is an abstention.
        score_BK: scores in [0, 1], floating point.
        weight_BK: non-negative weights; needed by ``weighted``, allowed for ``sampled``; a weight of 0 is no vote.
        kind: a :class:`VoteKind`.

    Returns:
        ``reward_B``, in [0, 1], of the dtype of ``score_BK``.

    Raises:
        ValueError: shapes, dtypes, weights or kind do not fit.
    """
    return tally(answer_BK, score_BK, weight_BK, kind).reward_B


def recount_without(
    answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None = None, kind: str = VoteKind.MAJORITY
) -> Tensor:
    """``reward_KB[k]``: what the vote pays when voter ``k`` is removed, for every voter at once. Arguments as
    :func:`majority_BK`."""
    votes = _check(answer_BK, score_BK, weight_BK, kind)
    rewards = []
    for answer_KB, score_KB, weight_KB in _chunks(*votes):
        if kind == VoteKind.MAJORITY:
            rewards.append(_majority_without(answer_KB, score_KB, weight_KB > 0))
            continue
        total_KB, size_KB = _totals(answer_KB, weight_KB)
        rows = []
        for k, (answer_B, weight_B) in enumerate(zip(answer_KB, weight_KB, strict=True)):
            same_KB = answer_KB == answer_B
            voted_KB = weight_KB > 0
            voted_KB[k] = False
            left_KB = torch.where(same_KB, total_KB - weight_B, total_KB)
            size_left_KB = size_KB - (same_KB & (weight_B > 0)).to(size_KB.dtype)
            rows.append(_reward(left_KB, size_left_KB, voted_KB, score_KB, weight_KB, kind))
        rewards.append(torch.stack(rows))
    return torch.cat(rewards, dim=1).to(score_BK.dtype)


def _majority_without(answer_KB: Tensor, score_KB: Tensor, voted_KB: Tensor) -> Tensor:
    """A majority without each voter. Only the answer of the one who leaves loses a vote, so that one count serves all:

    - it did not lead: nothing changes;
    - it led with others: those are left;
    - it led alone, with m votes: now it ties with the answers that have m - 1.
    """
    count_KB, sum_KB = voted_KB.to(score_KB.dtype), score_KB * voted_KB
    each_KB = sum_KB.clone()
    for i in range(len(answer_KB)):
        for j in range(i + 1, len(answer_KB)):
            same_B = (answer_KB[i] == answer_KB[j]).to(score_KB.dtype)
            for a, b in ((i, j), (j, i)):
                count_KB[a].addcmul_(same_B, voted_KB[b])
                sum_KB[a].addcmul_(same_B, each_KB[b])
    mean_KB = sum_KB / count_KB.clamp(min=1)
    most_B = torch.where(voted_KB, count_KB, 0.0).amax(dim=0)

    def answers_with(votes_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Who voted for answers with so many votes; how many such answers there are; the sum of their scores."""
        with_KB = voted_KB & (count_KB == votes_B)
        share_KB = torch.where(with_KB, 1 / count_KB.clamp(min=1), 0.0)
        return with_KB, share_KB.sum(dim=0).round(), (share_KB * mean_KB).sum(dim=0)

    leads_KB, leaders_B, score_B = answers_with(most_B)
    _, next_B, next_score_B = answers_with(most_B - 1)
    rest_KB = (sum_KB - each_KB) / (count_KB - 1).clamp(min=1)  # the mean score of its answer's other votes
    alone_KB = torch.where(most_B > 1, (next_score_B + rest_KB) / (next_B + 1), 0.0)
    tied_KB = (score_B - mean_KB) / (leaders_B - 1).clamp(min=1)
    changed_KB = torch.where(leaders_B > 1, tied_KB, alone_KB)
    return torch.where(leads_KB, changed_KB, score_B / leaders_B.clamp(min=1))


def _check(answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The votes as ``[K, B]``: answers, scores, weights, where an abstention weighs 0."""
    if kind not in list(VoteKind):
        raise ValueError(f"kind is {kind!r}; a vote is counted as one of {', '.join(VoteKind)}")
    if answer_BK.ndim != 2 or answer_BK.shape[1] == 0 or answer_BK.shape != score_BK.shape:
        raise ValueError(
            f"answers {tuple(answer_BK.shape)} and scores {tuple(score_BK.shape)} must both be [B, K] with at "
            "least one voter"
        )
    if answer_BK.is_floating_point() or answer_BK.dtype == torch.bool or not score_BK.is_floating_point():
        raise ValueError(f"answers must be integers and scores floats; found {answer_BK.dtype} and {score_BK.dtype}")
    if kind == VoteKind.MAJORITY and weight_BK is not None:
        raise ValueError("a majority counts every vote once and takes no weights; use kind='weighted'")
    if kind == VoteKind.WEIGHTED and weight_BK is None:
        raise ValueError("a weighted vote needs weight_BK")
    voted_BK = answer_BK >= 0
    if weight_BK is None:
        weight_BK = voted_BK.to(torch.promote_types(score_BK.dtype, torch.float32))
    else:
        if weight_BK.shape != answer_BK.shape:
            raise ValueError(
                f"weights {tuple(weight_BK.shape)} must have the shape of the answers {tuple(answer_BK.shape)}"
            )
        if not bool(((weight_BK >= 0) & weight_BK.isfinite()).all()):
            raise ValueError("weights must be finite and not negative")
        # float64, so that equal sums of weights are told from unequal ones
        weight_BK = torch.where(voted_BK, weight_BK.double(), 0.0)
    return answer_BK.T, score_BK.T, weight_BK.T


def _chunks(answer_KB: Tensor, score_KB: Tensor, weight_KB: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (a.contiguous(), s.to(w.dtype).contiguous(), w.contiguous())
        for a, s, w in zip(
            answer_KB.split(_ROWS, dim=1), score_KB.split(_ROWS, dim=1), weight_KB.split(_ROWS, dim=1), strict=True
        )
    ]


def _totals(answer_KB: Tensor, weight_KB: Tensor) -> tuple[Tensor, Tensor]:
    """For each vote, the summed weight and the number of the votes for its answer."""
    total_KB = weight_KB.clone()
    voted_KB = (weight_KB > 0).to(weight_KB.dtype)
    alike = torch.equal(voted_KB, weight_KB)  # every vote weighs 1: the sum is the number
    size_KB = total_KB if alike else voted_KB.clone()
    K = len(answer_KB)
    for i in range(K):
        for j in range(i + 1, K):
            same_B = (answer_KB[i] == answer_KB[j]).to(weight_KB.dtype)
            total_KB[i].addcmul_(same_B, weight_KB[j])
            total_KB[j].addcmul_(same_B, weight_KB[i])
            if not alike:
                size_KB[i].addcmul_(same_B, voted_KB[j])
                size_KB[j].addcmul_(same_B, voted_KB[i])
    return total_KB, size_KB


def _leaders(total_KB: Tensor, voted_KB: Tensor) -> Tensor:
    """The votes whose answer nobody beats. Sums of the same weights in another order differ by rounding: 1e-9 is a
    tie."""
    most_B = torch.where(voted_KB, total_KB, -1.0).amax(dim=0)
    return voted_KB & (total_KB >= most_B * (1 - 1e-9))


def _reward(
    total_KB: Tensor, size_KB: Tensor, voted_KB: Tensor, score_KB: Tensor, weight_KB: Tensor, kind: str
) -> Tensor:
    # 1/size makes the votes for one answer count as one together, so that sums over votes are sums over answers.
    inverse_KB = size_KB.clamp(min=1).reciprocal()
    if kind == VoteKind.SAMPLED:
        share_KB = torch.where(voted_KB, total_KB * inverse_KB, 0.0)
        whole_B = torch.where(voted_KB, weight_KB, 0.0).sum(dim=0)
    else:
        share_KB = torch.where(_leaders(total_KB, voted_KB), inverse_KB, 0.0)
        whole_B = share_KB.sum(dim=0)
    paid_B = (share_KB * score_KB).sum(dim=0)
    return torch.where(whole_B > 0, paid_B / whole_B, 0.0)
