"""Replays a turn: the words that led to it stay, and the rest of the play is spoken again, many times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccpo.errors import UserError
from ccpo.rollout.lanes import Lane
from ccpo.rollout.seeds import seed_of
from ccpo.rollout.walk import Walker
from ccpo.teams import Fate, Plan, Team
from ccpo.types import Problem, Removal, Rollout


def replay_turn(
    walker: Walker,
    plays: Sequence[tuple[Problem, Rollout]],
    turn: str,
    draws: int,
    *,
    seed: int,
    again: bool = False,
) -> Tensor:
    """Rewards ``[len(plays), draws]`` of the rest of each play, spoken anew after ``turn``: samples of ``R`` given what the turn
    heard and what it said. With ``again`` the turn itself is spoken anew too: samples of ``R`` given what it heard.

    Kept are the turn's ancestors (everything that can have shaped its prompt) and, unless ``again``, the turn. Everything else
    is the rest, also what stands beside the turn. Plays that are alike in all that is kept share their draws. Where nothing
    is left to be spoken all draws are the one reward. Raises UserError for fewer than one draw.
    """
    if draws < 1:
        raise UserError(f"a replay needs at least one draw; found {draws}")
    plan = _plan(walker.team, turn, again)
    count = 1 if plan.free else draws
    first: dict[tuple[object, ...], int] = {}
    lanes: list[Lane] = []
    places = []
    for number, (problem, rollout) in enumerate(plays):
        key = (
            problem.id,
            *(
                (t.name, t.completion.token_ids, t.completion.text)
                for t in rollout.turns
                if plan.fates[t.name] is Fate.KEEP
            ),
        )
        if key not in first:
            first[key] = len(lanes)
            source = Lane(slot=number, problem=problem, rollout=number, spoken={t.name: t for t in rollout.turns})
            lanes += [
                Lane(slot=number, problem=problem, rollout=number, draw=m, plan=plan, source=source)
                for m in range(count)
            ]
        places.append(first[key])
    walker.finish(lanes, seed=seed_of("replay", seed, turn, again), step=0)
    rewards = torch.tensor([lane.reward for lane in lanes])
    found = torch.stack([rewards[place : place + count] for place in places])
    return found.expand(-1, draws)


def ancestors(team: Team, turn: str) -> set[str]:
    """The turns that ``turn`` heard, at first or second hand."""
    found: set[str] = set()
    waiting = list(team.turn(turn).reads)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += team.turn(name).reads
    return found


def _plan(team: Team, turn: str, again: bool) -> Plan:
    kept = ancestors(team, turn) | (set() if again else {turn})
    redo = tuple(t for t in team.turns_in_order if t.name not in kept)
    return Plan(
        removed=(),
        how=Removal.DROP,
        given="",
        fates={t.name: Fate.KEEP if t.name in kept else Fate.REDO for t in team.turns_in_order},
        redo=redo,
        decoded=redo,
        per_problem=False,
        answerable=True,
    )
