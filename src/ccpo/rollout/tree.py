"""Trees of rollouts: several continuations of one text, so that a text is judged by more than one play of what follows.

A layout is a number of texts for each level of the team's graph: ``(4, 2)`` for Thinker → Solver is four thoughts with two
answers each, eight rollouts that cost four thoughts and eight answers. ``(8, 1)`` is eight rollouts with nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ccpo.errors import UserError
from ccpo.teams import Team
from ccpo.types import TreePlace

Branch = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """``branch[l]`` texts at level ``l`` of the graph in each context. Rollout ``n`` of the ``N = prod(branch)`` is a path:
    rollouts that agree in ``n // stride(l)`` share the turns of level ``l``."""

    branch: Branch

    @property
    def leaves(self) -> int:
        return math.prod(self.branch)

    def stride(self, level: int) -> int:
        return math.prod(self.branch[level + 1 :])

    def owner(self, n: int, level: int) -> int:
        """The first rollout of those that share rollout ``n``'s turns of ``level``: it speaks for them all."""
        return n - n % self.stride(level)

    def place(self, level: int) -> TreePlace:
        return TreePlace(contexts=math.prod(self.branch[:level]), siblings=self.branch[level], plays=self.stride(level))


def plant(team: Team, branch: Sequence[int], samples: int) -> Tree:
    """The tree of ``samples`` rollouts; an empty ``branch`` shares nothing, a short one goes on with one text a context.

    Raises UserError where it has more levels than the team's graph, or its product is not ``samples``.
    """
    levels = len(team.levels)
    if not branch:
        return Tree((samples, *[1] * (levels - 1)))
    if len(branch) > levels:
        raise UserError(
            f"rollout.branch {list(branch)} has {len(branch)} levels, and the graph of team {team.name!r} has {levels}: "
            f"{'; '.join(', '.join(t.name for t in level) for level in team.levels)}"
        )
    tree = Tree((*branch, *[1] * (levels - len(branch))))
    if tree.leaves != samples:
        raise UserError(
            f"rollout.branch {list(branch)} makes {tree.leaves} rollouts a problem and rollout.samples is {samples}; "
            f"set rollout.samples: {tree.leaves}"
        )
    return tree


def places(team: Team, tree: Tree) -> dict[str, TreePlace]:
    """The place of every turn of ``team`` in ``tree``."""
    return {turn.name: tree.place(depth) for depth, level in enumerate(team.levels) for turn in level}
