"""Means, baselines and variances on a tree of rollouts (:class:`~ccpo.types.TreePlace`). Pure functions of tensors.

A turn's *node value* is the mean reward of the plays that go through one text of it: an estimate of what the text is worth that
does not hang on how one continuation happened to go. Two baselines do not depend on the text itself, so that neither bends the
gradient: the text's *siblings* (other texts after the same words) and the *group* (texts after other words).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ccpo.types import TreePlace


def node_values(reward_PN: Tensor, place: TreePlace) -> Tensor:
    """Mean reward of each text of a turn, ``[P, C, S]`` (contexts, siblings), in units of reward."""
    return reward_PN.reshape(reward_PN.shape[0], place.contexts, place.siblings, place.plays).mean(3)


def spread_out(value_PCS: Tensor, place: TreePlace) -> Tensor:
    """A value for each text, given to every play of it: ``[P, N]``."""
    return value_PCS[..., None].expand(*value_PCS.shape, place.plays).reshape(value_PCS.shape[0], -1)


def sibling_mean(value_PCS: Tensor) -> Tensor:
    """The mean of a text's siblings without itself, ``[P, C, S]``. Raises ValueError where a context has one text only."""
    S = value_PCS.shape[2]
    if S < 2:
        raise ValueError("a text without siblings has no sibling mean")
    return (value_PCS.sum(2, keepdim=True) - value_PCS) / (S - 1)


def group_mean(value_PCS: Tensor) -> Tensor:
    """The mean over the texts of *other* contexts, ``[P, C, 1]``. Raises ValueError where there is one context only."""
    C = value_PCS.shape[1]
    if C < 2:
        raise ValueError("a single context has no group")
    mean_PC1 = value_PCS.mean(2, keepdim=True)
    return (mean_PC1.sum(1, keepdim=True) - mean_PC1) / (C - 1)


def baseline_errors(place: TreePlace, within: float, between: float) -> dict[str, float]:
    """Expected squared error of the "siblings" and of the "group" mean as a guess of a text's expected value; only what exists.

    ``within``: variance of node values in one context; ``between``: variance of contexts' worth on one problem. The sibling mean is
    wrong by ``within / (S - 1)``; the group mean by the context's own departure and its sampling error,
    ``between * C / (C - 1) + within / (S (C - 1))``.
    """
    C, S = place.contexts, place.siblings
    errors = {}
    if S >= 2:
        errors["siblings"] = within / (S - 1)
    if C >= 2:
        errors["group"] = between * C / (C - 1) + within / (S * (C - 1))
    return errors


def inverse_weights(errors: Mapping[str, float]) -> dict[str, float]:
    """Weights of independent guesses that make the least expected squared error: each by the inverse of its own. They sum to 1."""
    inverse = {name: 1.0 / (error + 1e-9) for name, error in errors.items()}
    total = sum(inverse.values())
    return {name: value / total for name, value in inverse.items()}


def node_variances(value_PCS: Tensor) -> tuple[float | None, float | None]:
    """Unbiased estimates of (within, between) as :func:`baseline_errors` takes them; None for what the layout cannot tell."""
    _, C, S = value_PCS.shape
    value64 = value_PCS.double()
    within = value64.var(2).mean().item() if S >= 2 else None
    if C < 2 or within is None:
        return within, None
    return within, max(0.0, value64.mean(2).var(1).mean().item() - within / S)


def components(reward_PN: Tensor, branch: Sequence[int]) -> tuple[float, ...]:
    """What each level of the graph adds to the variance of the reward on one problem (nested analysis of variance).

    ``v[l]`` is the expected variance of the reward's mean given levels up to ``l`` over the texts of level ``l``; estimates are
    unbiased, then held at 0 from below. Raises ValueError unless every level has at least two texts a context: else levels are
    confounded.
    """
    if min(branch) < 2:
        raise ValueError(f"every level needs two texts a context to be told apart; the tree is {tuple(branch)}")
    found: list[float] = []
    sampling = 0.0  # variance that a mean over the lower levels still has
    for depth in reversed(range(len(branch))):
        place = TreePlace(
            contexts=math.prod(branch[:depth]), siblings=branch[depth], plays=math.prod(branch[depth + 1 :])
        )
        within = node_values(reward_PN.double(), place).var(2).mean().item()
        found.append(max(0.0, within - sampling))
        sampling = within / branch[depth]
    return tuple(reversed(found))
