"""What is probed: a team as it speaks now, and batches of its rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ccpo.credit.base import needed
from ccpo.learner import Policy
from ccpo.learner.objective import Objective
from ccpo.rollout import Ask, Limits, Played, Voice, Walker, play_team
from ccpo.rollout.seeds import seed_of
from ccpo.schedule import ProblemSampler
from ccpo.tasks import Task
from ccpo.teams import PlayTeam, Team
from ccpo.types import Coalition, Removal


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A team with its weights, and how a training step of it would sample and weigh its rollouts.

    ``active``: the agents whose gradients are measured. ``objective``: the policy loss, without KL and entropy, at the
    sampling policy. ``prompts``, ``samples``, ``draws``: P, N and M of a batch. ``compute``: the dtype of matrix products
    in forward and backward passes. ``free_removals``: no agent's removal decodes anything. ``repeat``: every batch has the problems
    of the first.
    """

    name: str
    team: Team | PlayTeam
    task: Task
    voices: Mapping[str, Voice]
    policies: Mapping[str, Policy]
    objective: Objective
    active: tuple[str, ...]
    prompts: int
    samples: int
    draws: int | None = None
    limits: Limits = Limits()
    removal: Removal = Removal.DROP
    placeholder: str = ""
    frozen: Mapping[str, Voice] = field(default_factory=dict)
    seed: int = 0
    compute: torch.dtype = torch.float32
    free_removals: bool = False
    repeat: bool = False

    def policy_of(self, agent: str) -> Policy:
        return self.policies[self.voices[agent].policy]

    def needs(self, rule: Any, state: Mapping[str, Any]) -> frozenset[Coalition]:
        """The coalitions that ``rule`` must see removed in the batch for which it will be called with ``state``."""
        return needed(rule, self.team.agent_names, self.team.decider, self.active, state, free=self.free_removals)

    def play(
        self, number: int, coalitions: frozenset[Coalition], *, branch: tuple[int, ...] = (), swaps: bool = False
    ) -> Played:
        """Batch ``number``: problems of the training task in an order of the probe's own, never a cached reward. ``branch``: the
        tree of rollouts (empty: N that share nothing); ``swaps``: ballots put into other rollouts, too."""
        seed = seed_of("diagnose", self.seed)
        sampler = ProblemSampler(total=len(self.task), batch=self.prompts, seed=seed)
        return play_team(
            self.team,
            self.task,
            self.voices,
            self.limits,
            [self.task[i] for i in sampler.indices(0 if self.repeat else number)],
            Ask(
                samples=math.prod(branch) if branch else self.samples,
                branch=branch,
                swaps=swaps,
                coalitions=coalitions,
                draws=self.draws,
                removal=self.removal,
                placeholder=self.placeholder,
                keep_turns=coalitions,
                training=self.active,
            ),
            seed=seed,
            step=number,
            frozen=self.frozen,
        )

    def walker(self) -> Walker | None:
        """A walker of the team's graph; None for a team that is a function."""
        if isinstance(self.team, PlayTeam):
            return None
        return Walker(team=self.team, task=self.task, voices=self.voices, frozen=self.frozen, limits=self.limits)
