"""Does the counterfactual reward move with what the removed agent said? The assumption behind removal, tested.

Lemma A.1 (arXiv 2603.21563) says that removal credit does not bend an agent's gradient if ``R_without[k]`` does not depend on
agent k's own sampled text, given the problem. If it does, the bias is known::

    E[g (R - R_without)] - E[g R] = -E[g R_without] = -Cov(g, R_without),      g = grad log pi_k(own text)

The last step because a score has mean 0. Here that covariance is estimated along a few directions of the gradient, with
its standard error, and an alarm is raised where it is too large to be chance.

A plan of a team's graph fulfils the assumption by construction. It can fail where a hand-written play remembers what was said,
where the text that stands in a removed agent's place follows the sampled one, or where joint and counterfactual plays share an
agent's sampling noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependence:
    """``covariance_J``: estimate of ``Cov(g_j, R_without)``, the mean over problems; minus the bias of the removal gradient along
    direction j. ``error_J``: its standard error. ``p_value``: the chance of a covariance as large as the largest of the J (in standard
    errors) where there is none. ``alarm``: it is below the level. ``problems``: how many could tell; with fewer than two there is
    no test, the p-value is 1 and nothing is raised."""

    covariance_J: Tensor
    error_J: Tensor
    p_value: float
    alarm: bool
    problems: int


def dependence(score_PNJ: Tensor, without_PX: Tensor, *, level: float = 0.05) -> Dependence:
    """Estimate ``Cov(g_j, R_without)`` given the problem, and test whether it is 0.

    ``score_PNJ``: along J directions v, ``v . grad log pi(own text)`` of each joint rollout of P problems, under the policy that
    sampled it. Directions are fixed before these rollouts are seen: random ones look everywhere and find little; the
    reward's gradient, estimated on other rollouts, is where a bias hurts. ``without_PX``: the counterfactual reward of each
    rollout ``[P, N]``, or ``[P, 1]`` where it belongs to the problem.

    ``[P, N]``: a problem's covariance is that of its rollouts, both means removed; problems whose ``R_without`` has no spread
    cannot tell. ``[P, 1]``: ``mean_n g * (R_without - mean of the other problems')``, which has mean 0 because the score has. Either
    way problems are independent, so the standard error is that of a mean over problems and needs no assumption on what
    happens within one (both may depend on what the agent was told). Student's t with one degree less than the problems that can
    tell; Bonferroni over the J directions, so that without dependence the alarm is raised at most at about the rate ``level``.

    Raises ValueError for shapes that do not fit, values that are not finite, and a level outside (0, 1).
    """
    _check(score_PNJ, without_PX, level)
    score_PNJ, without_PX = score_PNJ.double(), without_PX.double()
    P, N, J = score_PNJ.shape
    if without_PX.shape[1] == N > 1:
        centred_PN = without_PX - without_PX.mean(1, keepdim=True)
        own_PJ = torch.einsum("pnj,pn->pj", score_PNJ, centred_PN) / (N - 1)
        tells_P = without_PX.amax(1) > without_PX.amin(1)
    else:
        rest_P1 = (without_PX.sum(0) - without_PX) / max(P - 1, 1)
        own_PJ = score_PNJ.mean(1) * (without_PX - rest_P1)
        tells_P = (without_PX.amax() > without_PX.amin()).expand(P)
    told = int(tells_P.sum())
    if told < 2:
        zero_J = torch.zeros(J, dtype=torch.float64)
        return Dependence(covariance_J=zero_J, error_J=zero_J, p_value=1.0, alarm=False, problems=told)
    told_J, error_J = own_PJ[tells_P].mean(0), own_PJ[tells_P].std(0) / math.sqrt(told)
    t_J = torch.where(told_J == 0, 0.0, told_J / error_J)
    p_value = min(1.0, J * student_p(float(t_J.abs().max()), told - 1))
    share = told / P  # the problems that cannot tell have covariance 0
    return Dependence(
        covariance_J=told_J * share, error_J=error_J * share, p_value=p_value, alarm=p_value < level, problems=told
    )


def student_p(t: float, dof: int) -> float:
    """``P(|T| >= |t|)`` of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    angle = math.atan2(abs(t), math.sqrt(dof))
    cosine = math.cos(angle)
    odd = dof % 2
    term = cosine if odd else 1.0
    total = term if dof > 1 else 0.0
    for k in range(2 + odd, dof - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    return max(0.0, 1.0 - (2 / math.pi * (angle + inside) if odd else inside))


def _check(score_PNJ: Tensor, without_PX: Tensor, level: float) -> None:
    shapes = f"got {tuple(score_PNJ.shape)} and {tuple(without_PX.shape)}"
    if score_PNJ.dim() != 3 or without_PX.dim() != 2 or 0 in score_PNJ.shape:
        raise ValueError(f"dependence needs scores [P, N, J] and rewards [P, N or 1]; {shapes}")
    if len(score_PNJ) != len(without_PX) or without_PX.shape[1] not in (1, score_PNJ.shape[1]):
        raise ValueError(f"scores [P, N, J] and rewards [P, N or 1] must be of the same rollouts; {shapes}")
    if not (torch.isfinite(score_PNJ).all() and torch.isfinite(without_PX).all()):
        raise ValueError("scores and rewards must be finite")
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1; got {level}")
