"""Counts votes, vectorised: what a majority, a weighted or a sampled vote pays, and what it would pay without each
voter.

The rules. Votes for the same answer are one class. A tie pays the expected reward under a uniformly random choice among
the tied answers; an abstention is no vote; no votes at all pay 0. Nothing is decoded for the counterfactual of a voter:
it is a re-count (CCPO for voting, arXiv 2603.21563).

How they are counted. The answers of a row are its options, numbered from 0, at most K of them. What is known of the options is ``[O, B]``
(how many votes each has, with what weight and what score), and both the vote and its re-counts follow from that alone. Yes and no are 1.0 and 0.0 and
are multiplied with: on a CPU a selection by booleans takes ten times as long as a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

ABSTAIN = -1
NOBODY = -2  # an option that no vote is for
EXACT = 1 << 24  # whole numbers below are exact in float32
CELLS = 1 << 16  # votes counted at a time: what is made of them stays in the processor's cache


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
    _check(answer_BK, score_BK, weight_BK, kind)
    reward_B, winner_BK = score_BK.new_empty(len(score_BK)), torch.empty_like(answer_BK, dtype=torch.bool)
    for rows, votes in _pieces(answer_BK, score_BK, weight_BK):
        options = _options(votes)
        reward_B[rows] = _reward(options, kind)
        winner_BK[rows] = _of_votes(_leads(options), votes).T > 0
    return Tally(reward_B=reward_B, winner_BK=winner_BK)


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
    _check(answer_BK, score_BK, weight_BK, kind)
    reward_B = score_BK.new_empty(len(score_BK))
    for rows, votes in _pieces(answer_BK, score_BK, weight_BK):
        reward_B[rows] = _reward(_options(votes), kind)
    return reward_B


def recount_without(
    answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None = None, kind: str = VoteKind.MAJORITY
) -> Tensor:
    """``reward_KB[k]``: what the vote pays when voter ``k`` is removed, for every voter at once. Arguments as
    :func:`majority_BK`."""
    return with_and_without(answer_BK, score_BK, weight_BK, kind)[1]


def with_and_without(
    answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None = None, kind: str = VoteKind.MAJORITY
) -> tuple[Tensor, Tensor]:
    """:func:`majority_BK` and :func:`recount_without`, of one count."""
    _check(answer_BK, score_BK, weight_BK, kind)
    B, K = score_BK.shape
    reward_B, without_KB = score_BK.new_empty(B), score_BK.new_empty(K, B)
    recount = _majority_without if kind == VoteKind.MAJORITY else _each_without
    for rows, votes in _pieces(answer_BK, score_BK, weight_BK):
        options = _options(votes)
        reward_B[rows] = _reward(options, kind)
        without_KB[:, rows] = recount(votes, options, kind)
    return reward_B, without_KB


def _check(answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None, kind: str) -> None:
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
    if weight_BK is None:
        return
    if weight_BK.shape != answer_BK.shape:
        raise ValueError(
            f"weights {tuple(weight_BK.shape)} must have the shape of the answers {tuple(answer_BK.shape)}"
        )
    if not bool(((weight_BK >= 0) & weight_BK.isfinite()).all()):
        raise ValueError("weights must be finite and not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Votes:
    """Some rows' votes, all of one floating dtype. ``option_KB``: which of the row's options the vote is for, ABSTAIN where it is no vote;
    ``weight_KB``: None where every vote weighs 1."""

    option_KB: Tensor
    n_options: int
    score_KB: Tensor
    weight_KB: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What the votes for each option add up to: their number, their weight, their scores."""

    size_OB: Tensor
    weight_OB: Tensor
    score_OB: Tensor

    @property
    def mean_OB(self) -> Tensor:
        """The option's score; 0 where nobody is for it."""
        return self.score_OB / self.size_OB.clamp(min=1)


def _pieces(answer_BK: Tensor, score_BK: Tensor, weight_BK: Tensor | None) -> Iterator[tuple[slice, _Votes]]:
    """The votes, some rows at a time."""
    B, K = answer_BK.shape
    step = max(CELLS // K, 1)
    for rows in (slice(start, start + step) for start in range(0, B, step)):
        yield rows, _votes(answer_BK[rows].T, score_BK[rows].T, None if weight_BK is None else weight_BK[rows].T)


def _votes(answer_KB: Tensor, score_KB: Tensor, weight_KB: Tensor | None) -> _Votes:
    dtype = torch.promote_types(score_KB.dtype, torch.float32)
    if weight_KB is not None:
        dtype = torch.float64  # so that equal sums of weights are told from unequal ones
        answer_KB = torch.where(weight_KB > 0, answer_KB, ABSTAIN)
        weight_KB = weight_KB.to(dtype).contiguous()
    K, n_options = len(answer_KB), int(answer_KB.amax()) + 1
    option_KB = torch.empty(answer_KB.shape, dtype=dtype, device=answer_KB.device).copy_(answer_KB)
    if n_options > K:
        option_KB = _renumbered(option_KB if n_options < EXACT else answer_KB.contiguous()).to(dtype)
    return _Votes(
        option_KB=option_KB,
        n_options=min(max(n_options, 1), K),
        score_KB=_yes(torch.ge, option_KB, 0).mul_(score_KB),
        weight_KB=weight_KB,
    )


def _renumbered(answer_KB: Tensor) -> Tensor:
    """Each answer as the first voter who gave it, so that there are K at most."""
    first_KB, same_KB = torch.zeros_like(answer_KB), torch.empty_like(answer_KB)
    for k in reversed(range(len(answer_KB))):
        torch.eq(answer_KB, answer_KB[k], out=same_KB)
        first_KB += same_KB.mul_(k - first_KB)
    return first_KB.mul_(torch.ge(answer_KB, 0, out=same_KB)).add_(same_KB).sub_(1)  # an abstention is ABSTAIN


def _yes(compare: Callable[..., Tensor], left: Tensor, right: Tensor | float) -> Tensor:
    """A comparison as 1 and 0 of the dtype and shape of ``left``."""
    return compare(left, right, out=torch.empty_like(left))


def _each_option(votes: _Votes) -> Iterator[tuple[int, Tensor]]:
    """Each option and which votes are for it, ``[K, B]``: one tensor, filled again for the next option."""
    chose_KB = torch.empty_like(votes.option_KB)
    for option in range(votes.n_options):
        yield option, torch.eq(votes.option_KB, option, out=chose_KB)


def _options(votes: _Votes) -> _Options:
    size_OB = votes.score_KB.new_empty(votes.n_options, votes.score_KB.shape[1])
    score_OB = torch.empty_like(size_OB)
    weight_OB = size_OB if votes.weight_KB is None else torch.empty_like(size_OB)
    for option, chose_KB in _each_option(votes):
        size_OB[option] = chose_KB.sum(0)
        if votes.weight_KB is not None:
            weight_OB[option] = (chose_KB * votes.weight_KB).sum(0)
        score_OB[option] = chose_KB.mul_(votes.score_KB).sum(0)
    return _Options(size_OB=size_OB, weight_OB=weight_OB, score_OB=score_OB)


def _leads(options: _Options) -> Tensor:
    """1 for the options that none beats, ``[O, B]``. Sums of the same weights in another order differ by rounding: 1e-9 is a tie."""
    chosen_OB = _yes(torch.gt, options.size_OB, 0)
    most_B = (options.weight_OB * chosen_OB).amax(0)
    return _yes(torch.ge, options.weight_OB, most_B * (1 - 1e-9)).mul_(chosen_OB)


def _reward(options: _Options, kind: str) -> Tensor:
    if kind == VoteKind.SAMPLED:
        share_OB = options.weight_OB * _yes(torch.gt, options.size_OB, 0)
    else:
        share_OB = _leads(options)
    whole_B = share_OB.sum(0)
    return (share_OB * options.mean_OB).sum(0) / (whole_B + _yes(torch.eq, whole_B, 0))


def _of_votes(value_OB: Tensor, votes: _Votes) -> Tensor:
    """For each vote its option's value, 0 for an abstention, ``[K, B]``."""
    value_KB = torch.zeros_like(votes.option_KB)
    for option, chose_KB in _each_option(votes):
        value_KB.addcmul_(chose_KB, value_OB[option])
    return value_KB


def _each_without(votes: _Votes, options: _Options, kind: str) -> Tensor:
    """The vote without each voter, whose share is taken from what its option has."""
    number_OB = torch.arange(votes.n_options).to(options.size_OB)[:, None].expand_as(options.size_OB)
    rewards = []
    for k, (option_B, score_B) in enumerate(zip(votes.option_KB, votes.score_KB, strict=True)):
        own_OB = _yes(torch.eq, number_OB, option_B)
        size_OB = options.size_OB - own_OB
        left = _Options(
            size_OB=size_OB,
            weight_OB=size_OB if votes.weight_KB is None else options.weight_OB - own_OB * votes.weight_KB[k],
            score_OB=options.score_OB - own_OB * score_B,
        )
        rewards.append(_reward(left, kind))
    return torch.stack(rewards)


def _majority_without(votes: _Votes, options: _Options, kind: str) -> Tensor:
    """A majority without each voter. Only the option of the one who leaves loses a vote, so that one count serves all:

    - it did not lead: nothing changes;
    - it led with others: those are left;
    - it led alone, with m votes: now it ties with the options that have m - 1.
    """
    size_OB, mean_OB, leads_OB = options.size_OB, options.mean_OB, _leads(options)
    most_B, leaders_B, score_B = size_OB.amax(0), leads_OB.sum(0), (leads_OB * mean_OB).sum(0)

    reward_B = score_B / leaders_B.clamp(min=1)
    others_OB = (score_B - mean_OB) / (leaders_B - 1).clamp(min=1)  # 0 where it led alone
    without_KB = _of_votes(leads_OB * others_OB + (1 - leads_OB) * reward_B, votes)
    without_KB.addcmul_(_yes(torch.lt, votes.option_KB, 0), reward_B)

    next_OB = _yes(torch.eq, size_OB, most_B - 1)
    next_B, next_score_B = next_OB.sum(0), (next_OB * mean_OB).sum(0)
    leader_B = torch.arange(len(size_OB)).to(size_OB) @ leads_OB
    sole_B = (leader_B - NOBODY) * _yes(torch.eq, leaders_B, 1) + NOBODY
    rest_KB = (leads_OB * options.score_OB).sum(0) - votes.score_KB  # the scores of its option's other votes
    tied_KB = rest_KB.div_((most_B - 1).clamp(min=1)).add_(next_score_B).div_(next_B + 1)
    return without_KB.addcmul_(_yes(torch.eq, votes.option_KB, sole_B), tied_KB)
