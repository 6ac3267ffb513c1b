"""How many continuations a text is worth: the tree of rollouts that teaches most for its tokens (METHODS of nested sampling).

For two levels the textbook answer to "how many answers a thought" is ``sqrt((c1/c2) (s_w^2/s_b^2))`` with the costs of a thought and an
answer and the variances within and between thoughts (Cochran, *Sampling Techniques*, 1977, section 10.6). It minimises the
variance of one mean. Here every agent is trained from the same tree, so all of them are asked, and a tree that shares texts costs fewer tokens, which
are left for more steps. A layout is scored by what it teaches for a token, and the few layouts there are are tried out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ccpo.credit.nested import baseline_errors, inverse_weights
from ccpo.types import TreePlace

MOST = 4  # continuations of one text that are considered
SAME_CONTEXT = 0.5
"""How alike are the lessons of two texts after the same words. The gradient differs from context to context, so that eight answers to
four thoughts teach a solver less than eight answers to eight: ``S`` texts of a context count as ``S / (1 + 0.5 (S - 1))``. The number is a
choice; with 0, trees were too bushy where texts cost alike (``docs/log.md``)."""


def tree_cost(branch: Sequence[int], costs: Sequence[float]) -> float:
    """Tokens of one tree; ``costs[l]`` are those of one text at each turn of level ``l``, summed."""
    return sum(math.prod(branch[: depth + 1]) * cost for depth, cost in enumerate(costs))


def precision(branch: Sequence[int], variances: Sequence[float]) -> float:
    """Sum over levels of ``log(texts / variance of their advantage)`` under the best baseline. Higher is better.

    A text's advantage has the variance of its own worth, of what follows it (less the more often it is played on), and of the
    baseline it is held against. Texts of one context count for less (:data:`SAME_CONTEXT`).
    """
    total, texts = 0.0, 1.0
    for depth, siblings in enumerate(branch):
        texts *= siblings / (1 + (SAME_CONTEXT * (siblings - 1) if depth else 0.0))
        noise, plays = 0.0, 1
        for below in range(depth + 1, len(branch)):
            plays *= branch[below]
            noise += variances[below] / plays
        within = variances[depth] + noise
        between = sum(variances[:depth])
        place = TreePlace(contexts=math.prod(branch[:depth]), siblings=branch[depth], plays=plays)
        total += math.log(texts / (within + _baseline_error(place, within, between) + 1e-12))
    return total


def _baseline_error(place: TreePlace, within: float, between: float) -> float:
    errors = baseline_errors(place, within, between)
    if not errors:
        return between + within  # nothing to compare with
    weights = inverse_weights(errors)
    return sum(weights[name] ** 2 * error for name, error in errors.items())


def efficiency(branch: Sequence[int], variances: Sequence[float], costs: Sequence[float]) -> float:
    """The logarithm of what a tree tells for a token: ``log(precision / cost)``, on average over levels. Higher is better.

    It is how estimators are compared in Monte Carlo, one over variance times labour (Hammersley and Handscomb, *Monte Carlo
    Methods*, 1964, section 5.1): where most of a gradient is noise, half the tokens a step and twice the steps are worth the same.
    """
    return precision(branch, variances) / len(branch) - math.log(tree_cost(branch, costs))


def best_branch(variances: Sequence[float], costs: Sequence[float], plays: int, most: int = MOST) -> tuple[int, ...]:
    """The layout of greatest :func:`efficiency` among those of at most ``plays`` plays, with 1 to ``most`` texts in each context below the
    first level and as many at the first as the plays allow, at least two.

    Raises ValueError where variances and costs are not one a level, or there are fewer than two plays.
    """
    if len(variances) != len(costs) or not costs or min(costs) < 0 or max(costs) <= 0:
        raise ValueError(f"one variance and one cost a level, costs not negative; got {variances} and {costs}")
    if plays < 2:
        raise ValueError(f"a tree has at least two plays, got {plays}")
    lowers = itertools.product(range(1, most + 1), repeat=len(costs) - 1)
    candidates = [(plays // math.prod(lower), *lower) for lower in lowers if plays // math.prod(lower) >= 2]
    return max(candidates, key=lambda branch: efficiency(branch, variances, costs))


def probe_branch(levels: int, plays: int) -> tuple[int, ...]:
    """The layout that tells every level's variance apart: two texts in each context, as many first ones as the plays allow (at least two)."""
    lower = (2,) * (levels - 1)
    return (max(2, plays // math.prod(lower)), *lower)
