"""Rollout: a team played through engines, with the counterfactuals that a credit rule needs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ccpo.rollout.cache import CounterfactualCache
from ccpo.rollout.episodes import SCHEMA, read_episodes, write_episodes
from ccpo.rollout.play import PlayWalker
from ccpo.rollout.ratings import AskRatings, Rater, rating_report, shares_of
from ccpo.rollout.recount import Ballots, ballots_of, reproduces
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
    """Play a team of either kind on ``problems``, see :meth:`Walker.play`; and let it rate its plays where that was asked."""
    if isinstance(team, PlayTeam):
        played = PlayWalker(team=team, task=task, voices=voices, limits=limits).play(
            problems, ask, seed=seed, step=step
        )
    else:
        walker = Walker(
            team=team,
            task=task,
            voices=voices,
            frozen=frozen or {},
            limits=limits,
            cache=cache if cache is not None else CounterfactualCache(policy="off"),
        )
        played = walker.play(problems, ask, seed=seed, step=step)
    if ask.ratings is None:
        return played
    return _rated(played, Rater(team=team, voices=voices, limits=limits, ask=ask.ratings), seed=seed, step=step)


def _rated(played: Played, rater: Rater, *, seed: int, step: int) -> Played:
    clock = time.monotonic()
    groups, tokens = rater.rate(played.groups, seed=seed, step=step)
    shares, valid = shares_of(groups, rater.team.agent_names)
    return replace(
        played,
        groups=groups,
        tokens={kind: played.tokens.get(kind, 0) + tokens.get(kind, 0) for kind in {**played.tokens, **tokens}},
        seconds={**played.seconds, "rate": time.monotonic() - clock},
        shares=shares,
        shares_valid=valid,
    )


__all__ = [
    "SCHEMA",
    "Ask",
    "AskRatings",
    "Ballots",
    "CounterfactualCache",
    "Limits",
    "PlayWalker",
    "Played",
    "Rater",
    "Sampling",
    "Tree",
    "Voice",
    "Walker",
    "ballots_of",
    "plant",
    "play_team",
    "rating_report",
    "read_episodes",
    "replay_turn",
    "reproduces",
    "write_episodes",
]
