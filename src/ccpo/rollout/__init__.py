"""Rollout: a team played through engines, with the counterfactuals that a credit rule needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ccpo.rollout.cache import CounterfactualCache
from ccpo.rollout.episodes import SCHEMA, read_episodes, write_episodes
from ccpo.rollout.play import PlayWalker
from ccpo.rollout.replay import replay_turn
from ccpo.rollout.tree import Tree, plant
from ccpo.rollout.voices import Limits, Sampling, Voice
from ccpo.rollout.walk import Ask, Played, Walker
from ccpo.tasks.base import Task
from ccpo.teams import PlayTeam, Team
from ccpo.types import Problem


def play_team(
    team: Team | PlayTeam,
    task: Task,
    voices: Mapping[str, Voice],
    limits: Limits,
    problems: Sequence[Problem],
    ask: Ask,
    *,
    seed: int,
    step: int,
    frozen: Mapping[str, Voice] | None = None,
    cache: CounterfactualCache | None = None,
) -> Played:
    """Play a team of either kind on ``problems``; see :meth:`Walker.play`."""
    if isinstance(team, PlayTeam):
        return PlayWalker(team=team, task=task, voices=voices, limits=limits).play(problems, ask, seed=seed, step=step)
    walker = Walker(
        team=team,
        task=task,
        voices=voices,
        frozen=frozen or {},
        limits=limits,
        cache=cache if cache is not None else CounterfactualCache(policy="off"),
    )
    return walker.play(problems, ask, seed=seed, step=step)


__all__ = [
    "SCHEMA",
    "Ask",
    "CounterfactualCache",
    "Limits",
    "PlayWalker",
    "Played",
    "Sampling",
    "Tree",
    "Voice",
    "Walker",
    "plant",
    "play_team",
    "read_episodes",
    "replay_turn",
    "write_episodes",
]
