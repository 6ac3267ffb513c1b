"""Who helps and who coasts: an agent's contribution to a team that can be played, in four ways.

- *removal*: the team's reward, less that of the team without the agent's messages (for votes a re-count);
- *blank*: the same with its messages there and empty: the lazy-agent test of arXiv 2603.21563;
- *replay*: how far the reward moves with what it says. What it heard and said is kept and the rest spoken again, against the same with its
  own text spoken again; the standard deviation of that difference over its texts;
- *Shapley*: what it adds to every part of the team that it could join, on average.

All are in points of reward, with 95% intervals over problems.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ccpo.credit.shapley import (
    DECODED,
    FREE,
    coalitions,
    draw_orders,
    passed_through,
    shapley_exact,
    shapley_permutations,
)
from ccpo.diagnose.fidelity import measure_truth
from ccpo.diagnose.worth import Worth, spread_of, verdict, worth_of
from ccpo.errors import UserError
from ccpo.rollout import Ask, Limits, Played, Voice, Walker, play_team
from ccpo.tasks import Task
from ccpo.teams import PlayTeam, Team
from ccpo.types import Coalition, Problem, Removal

SCHEMA = "ccpo.free_riding/1"
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Thoroughness:
    """How much is played. ``problems`` × ``samples`` joint rollouts; ``replayed`` of these problems with ``replays`` of each text (0: none);
    ``orders`` of entry where a team is too large for all coalitions; ``half_width``: what an interval's half-width is to be."""

    problems: int = 100
    samples: int = 4
    replayed: int = 16
    replays: int = 16
    orders: int = 16
    half_width: float = 0.05

    def __post_init__(self) -> None:
        if self.problems < 2:
            raise UserError(f"problems is {self.problems}; an interval over problems needs at least 2")
        if self.replayed and self.replays < 2:
            raise UserError(
                f"replays is {self.replays}; with fewer than 2 its noise cannot be told: 0 replayed problems for none"
            )
        if not 0 < self.half_width < 1:
            raise UserError(f"half_width is {self.half_width}; it is in points of reward, between 0 and 1")


def measure_free_riding(
    team: Team | PlayTeam,
    task: Task,
    voices: Mapping[str, Voice],
    limits: Limits,
    effort: Thoroughness,
    *,
    seed: int = 0,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Play the team on the first problems of ``task`` and measure what each agent is worth. The report: ``docs/free-riding.md``."""
    clock = time.monotonic()
    problems = [task[i] for i in range(min(effort.problems, len(task)))]
    if len(problems) < 2:
        raise UserError(
            f"task {task.name!r} has {len(problems)} problem(s); an interval over problems needs at least 2"
        )
    agents, decider = team.agent_names, team.decider
    singles = frozenset((agent,) for agent in agents if agent != decider and len(agents) > 1)
    orders = _orders(team, effort, seed)
    parts = passed_through(agents, orders) & coalitions(agents, decider) if orders else coalitions(agents, decider)
    play = _Player(team, task, voices, limits, problems, effort.samples, seed)
    note(f"playing {len(problems)} problems × {effort.samples}, without {len(singles | parts)} coalitions")
    joint = play(singles | parts, Removal.DROP)
    note("playing with blank messages")
    blank = play(singles, Removal.BLANK) if singles else joint
    removal = _losses(joint, singles, effort)
    shapley = _shapley(joint, agents, orders, effort)
    note("replaying")
    replay = _replays(team, task, voices, limits, joint, effort, seed)
    blanks = _losses(blank, singles, effort)
    report = {
        "schema": SCHEMA,
        "kind": "run",
        "problems": len(problems),
        "samples": effort.samples,
        "half_width": effort.half_width,
        "team": worth_of(joint.reward_PN.double().mean(1).tolist(), effort.half_width).to_json(),
        "agents": {
            agent: {
                "removal": _json(removal.get(agent)),
                "blank": _json(blanks.get(agent)),
                "replay": _json(replay.get(agent)),
                "shapley": _json(shapley.get(agent)),
                "verdict": verdict(removal.get(agent), effort.half_width, decides=agent == decider),
            }
            for agent in agents
        },
        "untold": _untold(team, effort, orders),
    }
    return report | {"seconds": round(time.monotonic() - clock, 2)}


@dataclass(frozen=True)
class _Player:
    team: Team | PlayTeam
    task: Task
    voices: Mapping[str, Voice]
    limits: Limits
    problems: Sequence[Problem]
    samples: int
    seed: int

    def __call__(self, removals: frozenset[Coalition], how: Removal) -> Played:
        ask = Ask(samples=self.samples, coalitions=removals, removal=how, keep_turns=removals)
        return play_team(self.team, self.task, self.voices, self.limits, self.problems, ask, seed=self.seed, step=0)


def _orders(team: Team | PlayTeam, effort: Thoroughness, seed: int) -> tuple[tuple[str, ...], ...]:
    """Orders of entry for a team that is too large to be counted out; none where it is not."""
    K = len(team.agent_names)
    free = isinstance(team, Team) and all(team.plan((name,)).free for name in team.agent_names if name != team.decider)
    if (FREE if free and team.decider is None else DECODED) >= K:
        return ()
    return draw_orders(team.agent_names, max(2, effort.orders), f"free-riding/{seed}")


def _losses(played: Played, singles: frozenset[Coalition], effort: Thoroughness) -> dict[str, Worth | None]:
    """By agent what the team loses without it, paired by problem."""
    reward_P = played.reward_PN.double().mean(1)
    return {c[0]: worth_of((reward_P - _without(played, c)).tolist(), effort.half_width) for c in singles}


def _without(played: Played, coalition: Coalition) -> Tensor:
    """Mean reward ``[P]`` without a coalition."""
    return played.without[coalition].double().mean((1, 2)).expand(len(played.reward_PN))


def _shapley(played: Played, agents: Sequence[str], orders: Any, effort: Thoroughness) -> dict[str, Worth | None]:
    reward_P1 = played.reward_PN.double().mean(1, keepdim=True)
    value = {(): reward_P1} | {c: _without(played, c)[:, None] for c in played.without}
    if orders:
        for removed in passed_through(agents, orders):
            value.setdefault(removed, torch.zeros_like(reward_P1))  # nobody is left, or not the one who decides
        phi = shapley_permutations(value, agents, orders)[0]
    else:
        phi = shapley_of(value, agents)
    return {agent: worth_of(phi_P1[:, 0].tolist(), effort.half_width) for agent, phi_P1 in phi.items()}


def shapley_of(value: Mapping[Coalition, Tensor], agents: Sequence[str]) -> dict[str, Tensor]:
    """Shapley values ``[P, 1]`` from the rewards without every coalition of :func:`~ccpo.credit.shapley.coalitions`; the others leave nobody who
    answers, and are worth 0."""
    zero_P1 = torch.zeros_like(value[()])
    every = [c for size in range(len(agents) + 1) for c in combinations(sorted(agents), size)]
    return shapley_exact({c: value.get(c, zero_P1) for c in every}, agents)


def _replays(
    team: Team | PlayTeam,
    task: Task,
    voices: Mapping[str, Voice],
    limits: Limits,
    joint: Played,
    effort: Thoroughness,
    seed: int,
) -> dict[str, Worth | None]:
    if isinstance(team, PlayTeam) or not effort.replayed:
        return {}
    walker = Walker(team=team, task=task, voices=voices, limits=limits)
    truth = measure_truth(walker, joint.groups[: effort.replayed], effort.replays, seed=seed)
    found = {}
    for agent in team.agent_names:
        turns = [t.name for t in team.turns_of(agent)]
        worth_PN = torch.cat([truth.worth[t] for t in turns], dim=1)
        noise = sum(truth.noise[t] for t in turns) / len(turns)
        found[agent] = spread_of(worth_PN, noise, effort.half_width)
    return found


def _json(worth: Worth | None) -> dict[str, float] | None:
    return None if worth is None else worth.to_json()


def _untold(team: Team | PlayTeam, effort: Thoroughness, orders: Any) -> list[str]:
    found = []
    if team.decider is not None and len(team.agent_names) > 1:
        found.append(
            f"{team.decider} decides: without it there is no answer, so that its removal would say only how good the team is"
        )
    if isinstance(team, PlayTeam):
        found.append("a team that is a Python function cannot be replayed from the middle")
    elif not effort.replayed:
        found.append("nothing was replayed, as asked")
    if orders:
        found.append(
            f"Shapley values are estimates from {len(orders)} orders of entry; their intervals are those over problems alone"
        )
    return found
