"""Who helps and who coasts, from logged episodes alone: what they can tell, and in words what they cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ccpo.credit.shapley import FREE, coalitions
from ccpo.diagnose.free_riding import SCHEMA, shapley_of
from ccpo.diagnose.logged import Log, agents_of, decider_of, voters_of
from ccpo.diagnose.worth import Worth, verdict, worth_of
from ccpo.rollout import Ballots, ballots_of, reproduces
from ccpo.teams import VoteKind
from ccpo.types import Coalition, Removal

ByProblem = Mapping[str, float]


def free_riding_of_log(log: Log, half_width: float) -> dict[str, Any]:
    """The report of ``docs/free-riding.md`` from a log: removal from its counterfactual plays, votes re-counted exactly, Shapley values where every
    coalition was played or can be counted."""
    agents = agents_of(log)
    decider = decider_of(log, agents)
    untold: list[str] = []
    recount = _recount(log, agents, untold) if decider is None else None
    value = recount if recount is not None else _played(log)
    reward = {name: _mean([r.reward for r in entry.rollouts]) for name, entry in log.problems.items()}
    losses = {agent: _loss(reward, value.get((agent,), {}), half_width) for agent in agents if agent != decider}
    blank = log.removal == Removal.BLANK and recount is None
    shapley = _shapley(reward, value, agents, decider, half_width, untold)
    _say_what_is_untold(log, losses, blank, decider, untold)
    shown: dict[str, Worth | None] = {} if blank else losses
    return {
        "schema": SCHEMA,
        "kind": "log",
        "source": str(log.path),
        "problems": len(log.problems),
        "samples": len(log.rollouts) / len(log.problems),
        "half_width": half_width,
        "team": _json(worth_of(list(reward.values()), half_width)),
        "agents": {
            agent: {
                "removal": _json(shown.get(agent)),
                "blank": _json(losses.get(agent)) if blank else None,
                "replay": None,
                "shapley": _json(shapley.get(agent)),
                "verdict": verdict(losses.get(agent), half_width, decides=agent == decider),
            }
            for agent in agents
        },
        "untold": untold,
    }


def _recount(log: Log, agents: tuple[str, ...], untold: list[str]) -> dict[Coalition, dict[str, float]] | None:
    """By coalition and problem the mean reward of the vote without it, counted again; None where there is no vote to count."""
    voters, assumed = voters_of(log)
    if not voters:
        return None
    ballots = _ballots(log, voters)
    if ballots is None:
        untold.append(
            "the votes cannot be counted again: rollouts lack answers and scores of every voter, or counting them (majority, sampled, "
            "weighted) does not give the rewards that were paid"
        )
        return None
    if assumed:
        untold.append(
            "that the voters had not heard each other was assumed; a header with team.turns says what each reads"
        )
    every = coalitions(agents, None) if len(agents) <= FREE else frozenset((agent,) for agent in agents)
    places = {}
    start = 0
    for name, entry in log.problems.items():
        places[name] = slice(start, start + len(entry.rollouts))
        start += len(entry.rollouts)
    found = {}
    for removed in every:
        reward_B = ballots.without(removed).double()
        found[removed] = {name: float(reward_B[place].mean()) for name, place in places.items()}
    return found


def _ballots(log: Log, voters: Mapping[str, str]) -> Ballots | None:
    """The log's ballots under the first way of counting that gives the rewards that were paid."""
    said = log.team.get("decision")
    kinds = [said] if said in list(VoteKind) else [VoteKind.MAJORITY, VoteKind.SAMPLED, VoteKind.WEIGHTED]
    for kind in kinds:
        ballots = ballots_of(log.rollouts, voters, kind)
        if ballots is not None and reproduces(ballots, log.rollouts):
            return ballots
    return None


def _played(log: Log) -> dict[Coalition, dict[str, float]]:
    """By coalition and problem the mean reward of the counterfactual plays without it."""
    found: dict[Coalition, dict[str, float]] = {}
    for name, entry in log.problems.items():
        for removed, rewards in entry.without.items():
            found.setdefault(removed, {})[name] = _mean(rewards)
    return found


def _loss(reward: ByProblem, without: ByProblem, half_width: float) -> Worth | None:
    return worth_of([reward[name] - without[name] for name in without], half_width)


def _shapley(
    reward: ByProblem,
    value: Mapping[Coalition, ByProblem],
    agents: tuple[str, ...],
    decider: str | None,
    half_width: float,
    untold: list[str],
) -> dict[str, Worth | None]:
    needed = coalitions(agents, decider)
    there = [name for name in reward if all(name in value.get(removed, {}) for removed in needed)]
    if len(there) < 2:
        known = sum(removed in value for removed in needed)
        untold.append(
            f"Shapley values: they need plays without each of {len(needed)} coalitions on the same problems; the log has {known}"
        )
        return {}
    tables = {(): reward, **{removed: value[removed] for removed in needed}}
    rewards = {
        removed: torch.tensor([[table[name]] for name in there], dtype=torch.float64)
        for removed, table in tables.items()
    }
    phi = shapley_of(rewards, agents)
    return {agent: worth_of(phi_P1[:, 0].tolist(), half_width) for agent, phi_P1 in phi.items()}


def _say_what_is_untold(
    log: Log, losses: Mapping[str, Worth | None], blank: bool, decider: str | None, untold: list[str]
) -> None:
    silent = [agent for agent, loss in losses.items() if loss is None]
    if silent:
        untold.append(f"removal of {', '.join(silent)}: on fewer than two problems the log has plays without it")
    if decider is not None:
        untold.append(f"{decider} decides: without it there is no answer")
    if blank:
        untold.append("removal: the log's plays without an agent show its messages blank")
    else:
        untold.append("blank messages: the log does not say that any play had them (header: removal: blank)")
    untold.append("replay: what was said cannot be said again without the team; ccpo diagnose free-riding RUN plays it")


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _json(worth: Worth | None) -> dict[str, float] | None:
    return None if worth is None else worth.to_json()
