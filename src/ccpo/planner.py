"""Plans the tree of rollouts of each step from the variances and token costs measured in earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccpo.credit.allocation import best_branch, probe_branch
from ccpo.credit.nested import components
from ccpo.rollout import Played
from ccpo.teams import Team

PROBE_EVERY = 20
DECAY = 0.8  # of the moving means: of the variances by probe, of the costs by step


class Planner:
    """``rollout.branch: auto``: a tree of ``samples`` plays, which share texts where that teaches more for the tokens.

    Only a tree with two texts at every level can tell the levels' variances apart, so the first step and every twentieth
    after it is such a probe; in between the best layout for what is known is used: moving means of the variances and of
    the costs. The state is plain JSON and part of the checkpoint.
    """

    def __init__(self, team: Team, samples: int) -> None:
        self.team, self.samples = team, samples
        self.state: dict[str, Any] = {}

    def branch(self, step: int) -> tuple[int, ...]:
        """The layout of ``step``: a pure function of the step and the state."""
        levels = len(self.team.levels)
        if levels == 1:
            return (self.samples,)
        if "variances" not in self.state or step % PROBE_EVERY == 0:
            return probe_branch(levels, self.samples)
        return best_branch(self.state["variances"], self.state["costs"], self.samples)

    def learn(self, played: Played, branch: Sequence[int]) -> None:
        """Take in what a step has shown."""
        if len(branch) == 1:
            return
        self._move("costs", _costs(self.team, played))
        if min(branch) >= 2:
            self._move("variances", components(played.reward_PN, branch))

    def _move(self, name: str, seen: Sequence[float]) -> None:
        """Move a mean towards what was seen. By the figures of one step alone, two layouts that are nearly as good would take turns."""
        before = self.state.get(name, seen)
        self.state[name] = [DECAY * b + (1 - DECAY) * s for b, s in zip(before, seen, strict=True)]

    def metrics(self, branch: Sequence[int]) -> dict[str, float]:
        found = {f"layout/level{depth}_texts": float(count) for depth, count in enumerate(branch)}
        variances: Mapping[int, float] = dict(enumerate(self.state.get("variances", ())))
        return found | {f"layout/level{depth}_variance": value for depth, value in variances.items()}


def _costs(team: Team, played: Played) -> list[float]:
    """Mean generated tokens of one text at each turn of a level, summed over the level's turns."""
    length: dict[str, list[int]] = {}
    for group in played.groups:
        turns = {id(turn): turn for rollout in group.rollouts for turn in rollout.turns}
        for turn in turns.values():
            length.setdefault(turn.name, []).append(turn.completion.tokens)
    return [sum(sum(length[t.name]) / len(length[t.name]) for t in level) for level in team.levels]
