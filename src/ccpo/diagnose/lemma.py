"""Lemma A.1, tested on the run at hand: does the reward without an agent move with what that agent says?

Removal credit has the gradient of shared reward only if ``R_without[k]`` does not depend on agent k's own sampled text (CCPO, arXiv
2603.21563, Lemma A.1). Where it does, the gradient is bent by exactly ``-E[grad log pi_k * R_without[k]]``, and since scores have
mean 0 on every problem that is minus the covariance of the two. It is estimated here within problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.diagnose.moments import Estimate, between, jackknife_error

FLIPS = 4999
ALARM = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependence:
    """How ``R_without`` moves with the agent's own text, as a fraction of the shared-reward gradient ``g``.

    ``along``: ``<Cov(score, R_without), g> / |g|^2``, the part of the signal that removal credit loses (negative: adds).
    ``size``: ``|Cov(score, R_without)| / |g|``, in all directions. ``p_value``: of no covariance at all; ``alarm`` where it
    is below the threshold. ``problems``: how many the covariance is a mean over.
    """

    along: Estimate
    size: Estimate
    p_value: float
    alarm: bool
    problems: int

    def to_json(self) -> dict[str, object]:
        return {
            "along": self.along.to_json(),
            "size": self.size.to_json(),
            "p_value": self.p_value,
            "alarm": self.alarm,
            "problems": self.problems,
        }


def covariance(score_PNJ: Tensor, value_PN: Tensor) -> Tensor:
    """``1/(N-1) * sum_n (s_n - mean s)(v_n - mean v)`` of each problem, ``[P, J]``: unbiased for ``Cov(s, v)`` given the problem.

    For ``v = R`` it is the leave-one-out policy gradient (RLOO, arXiv 2402.14740). Raises ValueError for one rollout a problem.
    """
    P, N, _ = score_PNJ.shape
    if value_PN.shape != (P, N) or N < 2:
        raise ValueError(
            f"a covariance needs scores [P, N, J] and values [P, N], N >= 2; got {tuple(score_PNJ.shape)}, "
            f"{tuple(value_PN.shape)}"
        )
    value64_PN = value_PN.double()
    centred_PN = value64_PN - value64_PN.mean(1, keepdim=True)
    return torch.einsum("pnj,pn->pj", score_PNJ.double(), centred_PN) / (N - 1)


def paired_draws(without_PXM: Tensor, N: int) -> Tensor | None:
    """``R_without`` of each rollout, ``[P, N]``, where each has draws of its own, or the problem has as many as rollouts; None
    where it is one number a problem, which moves with nothing."""
    _, X, M = without_PXM.shape
    if X == N and N > 1:
        return without_PXM.mean(2)
    return without_PXM[:, 0, :] if X == 1 and M == N and N > 1 else None


def dependence(
    without_QJ: Tensor, shared_QJ: Tensor, *, tests: int = 1, seed: int = 0, flips: int = FLIPS
) -> Dependence:
    """Whether the mean of the covariances ``without_QJ`` (a problem a row) is 0, held against those of ``R``, ``shared_QJ``.

    The squared length of the mean is estimated by the U-statistic over pairs of problems. Its p-value comes from flipping the
    sign of whole problems at random, which changes nothing where there is no covariance. The alarm's threshold is
    ``0.01 / tests``. Errors are the jackknife's over problems. Raises ValueError for fewer than 3 problems.
    """
    Q = len(without_QJ)
    if without_QJ.shape != shared_QJ.shape or Q < 3:
        raise ValueError(
            f"covariances are [Q, J], Q >= 3, twice; got {tuple(without_QJ.shape)} and {tuple(shared_QJ.shape)}"
        )
    ww, ws, ss = without_QJ @ without_QJ.T, without_QJ @ shared_QJ.T, shared_QJ @ shared_QJ.T
    p_value = _sign_flips(ww, seed, flips)
    full = _ratios(*(between(m) for m in (ww, ws, ss)))
    parts = [_ratios(*values) for values in zip(*(_delete_one(m) for m in (ww, ws, ss)), strict=True)]
    along, size2 = (
        Estimate(
            value=full[i],
            error=None
            if any(part[i] is None for part in parts)
            else jackknife_error([part[i] for part in parts if part[i] is not None]),
        )
        for i in (0, 1)
    )
    return Dependence(along=along, size=size2.root(), p_value=p_value, alarm=p_value < ALARM / tests, problems=Q)


def _ratios(ww: float, ws: float, ss: float) -> tuple[float | None, float | None]:
    return (ws / ss, ww / ss) if ss > 0 else (None, None)


def _delete_one(gram_QQ: Tensor) -> list[float]:
    """:func:`between` of the rest, with each row and column left out in turn."""
    Q = len(gram_QQ)
    off = gram_QQ - torch.diag(gram_QQ.diagonal())
    rest_Q = off.sum() - off.sum(0) - off.sum(1)
    return (rest_Q / ((Q - 1) * (Q - 2))).tolist()


def _sign_flips(gram_QQ: Tensor, seed: int, flips: int) -> float:
    """Share of sign patterns (the true one among them) whose U-statistic is as large as the one seen."""
    off = gram_QQ - torch.diag(gram_QQ.diagonal())
    generator = torch.Generator().manual_seed(seed)
    signs_FQ = torch.randint(0, 2, (flips, len(off)), generator=generator).double() * 2 - 1
    seen = float(off.sum())
    flipped_F = ((signs_FQ @ off) * signs_FQ).sum(1)
    # patterns that are equal but for rounding count as equal: all of them where nothing moves at all
    slack = 1e-9 * float(off.abs().sum())
    return (1 + int((flipped_F >= seen - slack).sum())) / (flips + 1)
