"""How many continuations a text is worth: the tree of rollouts that tells most for its tokens (METHODS of nested sampling).

For two levels the textbook answer to "how many answers a thought" is ``sqrt((c1/c2) (s_w^2/s_b^2))`` with the costs of a thought and an
answer and the variances within and between thoughts (Cochran, *Sampling Techniques*, 1977, section 10.6). It minimises the
variance of one mean. Here every agent is trained from the same tree, so all of them are asked: a layout is scored by the sum over levels of
the logarithm of that level's precision, and the few layouts there are are tried out.
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


def best_branch(variances: Sequence[float], costs: Sequence[float], budget: float, most: int = MOST) -> tuple[int, ...]:
    """The layout of greatest :func:`precision` among those that cost at most ``budget`` tokens, with 1 to ``most`` texts in each
    context below the first level and as many at the first as the rest of the budget allows, at least two.

    Raises ValueError where variances and costs are not one a level, or not even two plain rollouts fit.
    """
    if len(variances) != len(costs) or not costs or min(costs) < 0 or max(costs) <= 0:
        raise ValueError(f"one variance and one cost a level, costs not negative; got {variances} and {costs}")
    candidates = []
    for lower in itertools.product(range(1, most + 1), repeat=len(costs) - 1):
        first = int(budget / tree_cost((1, *lower), costs) + 1e-9)
        if first >= 2:
            candidates.append((first, *lower))
    if not candidates:
        raise ValueError(f"a budget of {budget:g} tokens is less than two rollouts of {sum(costs):g}")
    return max(candidates, key=lambda branch: precision(branch, variances))


def probe_branch(costs: Sequence[float], budget: float) -> tuple[int, ...]:
    """The layout that tells every level's variance apart: two texts in each context, as many first ones as fit (at least two)."""
    lower = (2,) * (len(costs) - 1)
    return (max(2, int(budget / tree_cost((1, *lower), costs) + 1e-9)), *lower)
