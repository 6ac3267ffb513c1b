"""Removal: what the team's reward owes to one agent.

Take agent ``k`` out of the team, play again what its absence changes, and compare (arXiv 2603.21563)::

    delta[k, p, n] = R[p, n] - R_without[k, p, n]

``R`` is the joint reward of rollout ``n`` of problem ``p``; ``R_without[k]`` is the reward of the team that never heard
``k``. A thinker whose thought turned a wrong answer into a right one earns +1; one that talked a solver out of a right
answer earns -1; one whose thought changed nothing earns 0, whether or not the team succeeded.

Three joint rollouts of one problem, and what the solver scored when asked three times without the thinker:

>>> joint_PN = torch.tensor([[1.0, 1.0, 0.0]])
>>> solo_PXM = torch.tensor([[[0.0, 1.0, 0.0]]])
>>> marginal(joint_PN, paired_or_mean(solo_PXM, 3, "paired"))
tensor([[1., 0., 0.]])
>>> marginal(joint_PN, paired_or_mean(solo_PXM, 3, "mean"))
tensor([[ 0.6667,  0.6667, -0.3333]])

Both are unbiased for the same gradient (Lemma A.1). ``paired`` is the authors' code; ``mean`` says the same with less
noise, because it averages the draws before it subtracts. A mean that is one number for the whole group disappears
without a trace once an estimator subtracts the group's mean: :mod:`ccpo.credit.telemetry` shows when that happens.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from ccpo.errors import UserError, nearest


class Pairing(StrEnum):
    """How the counterfactual draws meet the joint rollouts."""

    PAIRED = "paired"  # the n-th draw stands against the n-th joint rollout: the authors' code
    MEAN = "mean"  # the mean of the draws stands against every rollout: less noise
    CACHED = "cached"  # the same mean, and the rollout may reuse draws from an earlier step


def marginal(reward_PN: Tensor, r_without_PN: Tensor) -> Tensor:
    """What the agent added to each rollout: ``delta = R - R_without`` (marginal contribution, arXiv 2603.21563).

    Shapes: both ``[P, N]``, result ``[P, N]``, in units of reward. Raises ValueError where the shapes differ.
    """
    if reward_PN.shape != r_without_PN.shape or reward_PN.dim() != 2:
        raise ValueError(
            f"marginal needs two tensors [P, N]; got {tuple(reward_PN.shape)} and {tuple(r_without_PN.shape)}"
        )
    return reward_PN - r_without_PN


def paired_or_mean(without_PXM: Tensor, n_rollouts: int, pairing: str) -> Tensor:
    """One counterfactual reward for each joint rollout, from the draws that there are: ``R_without`` ``[P, N]``.

    ``without_PXM`` is ``[P, N, M]`` where each rollout has draws of its own (the rest of the team's words are kept),
    and ``[P, 1, M]`` where the draws belong to the problem (nothing of the joint rollout is kept, as in Think–Solve).
    ``paired`` takes draw n for rollout n; ``mean`` and ``cached`` take the mean over M.

    Raises :class:`~ccpo.errors.UserError` where ``paired`` has no draw, or more than one, for a rollout, and for an
    unknown ``pairing``; ValueError for a wrong shape.
    """
    if without_PXM.dim() != 3 or without_PXM.shape[1] not in (1, n_rollouts) or without_PXM.shape[2] == 0:
        raise ValueError(
            f"counterfactual rewards are [P, 1 or N, M], N = {n_rollouts} and M >= 1; got {tuple(without_PXM.shape)}"
        )
    if pairing not in list(Pairing):
        raise UserError(f"pairing is one of {', '.join(Pairing)}; found {pairing!r}.{nearest(pairing, Pairing)}")
    if pairing == Pairing.PAIRED:
        return _pair(without_PXM, n_rollouts)
    return without_PXM.mean(dim=2).expand(-1, n_rollouts)


def _pair(without_PXM: Tensor, n_rollouts: int) -> Tensor:
    _, n_own, n_draws = without_PXM.shape
    if n_own == n_rollouts and n_draws == 1:
        return without_PXM[:, :, 0]
    if n_own == 1 and n_draws == n_rollouts:
        return without_PXM[:, 0, :]
    owner, needed = ("rollout", 1) if n_own == n_rollouts else ("problem", n_rollouts)
    raise UserError(
        f"pairing 'paired' needs {needed} counterfactual draw(s) a {owner}, and there are {n_draws}: "
        f"set rollout.draws to {needed}, or pairing to 'mean'"
    )


def has_spread(reward_PN: Tensor) -> Tensor:
    """Which groups tell their members apart: ``max_n R > min_n R``, bool ``[P]``, from rewards ``[P, N]``."""
    return torch.amax(reward_PN, dim=1) > torch.amin(reward_PN, dim=1)
