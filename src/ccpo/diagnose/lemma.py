"""Lemma A.1, tested on the run at hand: does the reward without an agent move with what that agent says?

Removal credit has the gradient of shared reward only if ``R_without[k]`` does not depend on agent k's own sampled text (CCPO, arXiv
2603.21563, Lemma A.1). Where it does, the gradient is bent by exactly ``-Cov(grad log pi_k, R_without[k])`` within problems
(:mod:`ccpo.credit.dependence`). Two tests look at that covariance: one along the gradient of the reward, where a bias hurts, and one in
all directions at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccpo.credit.dependence import dependence
from ccpo.diagnose.moments import Estimate, between, jackknife_error

FLIPS = 4999
LEVEL = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How ``R_without`` moves with the agent's own text, as a fraction of the shared-reward gradient ``g``.

    ``along``: ``<Cov(score, R_without), g> / |g|^2``, the part of the signal that removal credit loses (negative: adds).
    ``size``: ``|Cov(score, R_without)| / |g|``, in all directions. Both None where ``R_without`` is one number a problem.
    ``p_along``, ``p_anywhere``: the chance of as much where there is none, along the gradient and in all directions.
    ``alarm``: one of them is below the level. ``problems``: how many were seen.
    """

    along: Estimate
    size: Estimate
    p_along: float
    p_anywhere: float | None
    alarm: bool
    problems: int

    def to_json(self) -> dict[str, object]:
        return {
            "along": self.along.to_json(),
            "size": self.size.to_json(),
            "p_along": self.p_along,
            "p_anywhere": self.p_anywhere,
            "alarm": self.alarm,
            "problems": self.problems,
        }


@dataclass(slots=True)
class Evidence:
    """What batches have shown of one agent: each problem's covariance of scores with ``R`` and ``R_without``, and of each batch
    but the first the scores along the reward's gradient, as the batches before it estimate it, beside ``R_without``."""

    shared_QJ: list[Tensor] = field(default_factory=list)
    without_QJ: list[Tensor] = field(default_factory=list)
    score_PN1: list[Tensor] = field(default_factory=list)
    reward_PX: list[Tensor] = field(default_factory=list)

    def add(self, score_PNJ: Tensor, reward_PN: Tensor, without_PXM: Tensor) -> None:
        """Take in a batch: an agent's scores, the rewards, and those without it."""
        drawn_PN = paired_draws(without_PXM, reward_PN.shape[1])
        if self.shared_QJ:
            direction_J = torch.cat(self.shared_QJ).mean(0)
            self.score_PN1.append((score_PNJ.double() @ direction_J)[..., None])
            self.reward_PX.append(without_PXM.mean(2) if drawn_PN is None else drawn_PN)
        self.shared_QJ.append(covariance(score_PNJ, reward_PN))
        if drawn_PN is not None:
            self.without_QJ.append(covariance(score_PNJ, drawn_PN))

    def weigh(self, *, tests: int = 1, seed: int = 0) -> Finding:
        """Both tests. The level of each is such that of ``tests`` agents without dependence one in 100 studies raises an alarm."""
        level = LEVEL / (2 * tests)
        shared_QJ = torch.cat(self.shared_QJ)
        test = dependence(torch.cat(self.score_PN1), torch.cat(self.reward_PX), level=level)
        along = size = Estimate(value=None, error=None)
        p_anywhere = None
        if self.without_QJ:
            without_QJ = torch.cat(self.without_QJ)
            along, size = fractions(without_QJ, shared_QJ)
            p_anywhere = sign_flips(without_QJ, seed=seed)
        alarm = test.alarm or (p_anywhere is not None and p_anywhere < level)
        return Finding(
            along=along,
            size=size,
            p_along=test.p_value,
            p_anywhere=p_anywhere,
            alarm=alarm,
            problems=len(shared_QJ),
        )


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
    where it is one number a problem."""
    _, X, M = without_PXM.shape
    if X == N and N > 1:
        return without_PXM.mean(2)
    return without_PXM[:, 0, :] if X == 1 and M == N and N > 1 else None


def fractions(without_QJ: Tensor, shared_QJ: Tensor) -> tuple[Estimate, Estimate]:
    """``along`` and ``size`` of a :class:`Finding` from covariances with ``R_without`` and with ``R``, a problem a row.

    ``<E w, E s> / |E s|^2`` and ``|E w| / |E s|``, all by products of different problems; errors are the jackknife's over
    problems. Raises ValueError for fewer than 3 problems.
    """
    if without_QJ.shape != shared_QJ.shape or len(without_QJ) < 3:
        raise ValueError(
            f"covariances are [Q, J], Q >= 3, twice; got {tuple(without_QJ.shape)} and {tuple(shared_QJ.shape)}"
        )
    ss, ws, ww = (x @ y.T for x, y in ((shared_QJ, shared_QJ), (without_QJ, shared_QJ), (without_QJ, without_QJ)))
    return _ratio(ws, ss), _ratio(ww, ss).root()


def sign_flips(without_QJ: Tensor, *, seed: int = 0, flips: int = FLIPS) -> float:
    """The p-value of a mean covariance of 0 in all directions: the share of random sign patterns of whole problems (the true one
    among them) that make the U-statistic of its squared length as large as it is."""
    gram_QQ = without_QJ @ without_QJ.T
    off = gram_QQ - torch.diag(gram_QQ.diagonal())
    generator = torch.Generator().manual_seed(seed)
    signs_FQ = torch.randint(0, 2, (flips, len(off)), generator=generator).double() * 2 - 1
    flipped_F = ((signs_FQ @ off) * signs_FQ).sum(1)
    # patterns that are equal but for rounding count as equal: all of them where nothing moves at all
    slack = 1e-9 * float(off.abs().sum())
    return (1 + int((flipped_F >= float(off.sum()) - slack).sum())) / (flips + 1)


def _ratio(over_QQ: Tensor, under_QQ: Tensor) -> Estimate:
    """The ratio of two U-statistics; neither value nor error where the lower one is not positive whatever problem is left out."""
    value, unit = between(over_QQ), between(under_QQ)
    parts = list(zip(_delete_one(over_QQ), _delete_one(under_QQ), strict=True))
    if unit <= 0 or any(under <= 0 for _, under in parts):
        return Estimate(value=None, error=None)
    return Estimate(value=value / unit, error=jackknife_error([over / under for over, under in parts]))


def _delete_one(gram_QQ: Tensor) -> list[float]:
    """:func:`~ccpo.diagnose.moments.between` of the rest, with each row and column left out in turn."""
    Q = len(gram_QQ)
    off = gram_QQ - torch.diag(gram_QQ.diagonal())
    rest_Q = off.sum() - off.sum(0) - off.sum(1)
    return (rest_Q / ((Q - 1) * (Q - 2))).tolist()
