"""A bench: batches of rollouts of one layout, and the contenders that are all given the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ccpo.diagnose.baseline import weighted_sums
from ccpo.diagnose.contenders import Contender, Paid, coefficients, pay, tokens_of
from ccpo.diagnose.gradients import Scores, Sketch, exact_gradient
from ccpo.diagnose.lemma import Evidence
from ccpo.diagnose.subject import Subject
from ccpo.learner import TrainRow
from ccpo.pay import credit_inputs, row_of
from ccpo.planner import Planner
from ccpo.rollout import Played
from ccpo.types import Coalition, Group


@dataclass(slots=True)
class Record:
    """What one contender has made of the batches: by agent a list with an entry a batch. ``exact`` has squared norms: of the
    gradient over all weights, of its sketch, and of what the sketch of the sum and the sum of sketches differ by."""

    contender: Contender
    state: dict[str, Any]
    needs: frozenset[Coalition] = frozenset()
    tokens: list[int] = field(default_factory=list)
    gradient: dict[str, list[Tensor]] = field(default_factory=dict)
    advantage: dict[str, list[Tensor]] = field(default_factory=dict)
    shared: dict[str, list[Tensor]] = field(default_factory=dict)
    by_turn: list[Mapping[str, Tensor]] = field(default_factory=list)
    exact: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)

    @property
    def tokens_a_batch(self) -> float:
        return sum(self.tokens) / len(self.tokens)


class Bench:
    """Plays and pays. ``also``: coalitions to remove beside those that its contenders need. ``groups``: the first ``problems``
    problems of the measured batches. Of what does not hang on a rule it keeps, by agent with an entry a batch: ``sums`` for the
    baseline, and the ``evidence`` on Lemma A.1."""

    def __init__(
        self,
        subject: Subject,
        contenders: Sequence[Contender],
        sketches: Mapping[str, Sketch],
        *,
        problems: int,
        exact: int,
        also: frozenset[Coalition] = frozenset(),
    ) -> None:
        self.subject, self.sketches, self.problems, self.exact = subject, sketches, problems, exact
        self.also = also
        self.records = {c.name: Record(c, c.rule.start()) for c in contenders}
        self.swaps = any(c.swaps for c in contenders)
        self.branch = contenders[0].branch
        self.planner = Planner(subject.team, subject.samples) if self.branch == "auto" else None
        self.groups: list[Group] = []
        self.rewards: list[Tensor] = []
        self.sums: dict[str, list[Tensor]] = {}
        self.evidence: dict[str, Evidence] = {}

    def warm(self, number: int) -> None:
        """A batch for rules that remember, and for the planner: it probes, so that its layout is known before anything is measured."""
        branch = self._layout(0)
        played = self._play(number, branch)
        if self.planner is not None:
            self.planner.learn(played, branch)
        self._outputs(played)

    def measure(self, number: int) -> None:
        """A batch whose gradients count."""
        played = self._play(number, self.layout)
        paid = {
            name: pay(self.records[name].contender.payroll, played, outputs)
            for name, outputs in self._outputs(played).items()
        }
        scores = Scores(self.sketches, self.subject.compute)
        for agent in self.subject.active:
            scores.learn(row for rows in _texts(played, agent) for row in rows)
        scores.learn(row for p in paid.values() for rows in p.rows.values() for row in rows)
        for name, record in self.records.items():
            self._keep(record, paid[name], played, scores)
        self.rewards.append(played.reward_PN)
        for agent in self.subject.active:
            self._keep_agent(agent, played, scores)
        self.groups += played.groups[: max(0, self.problems - len(self.groups))]

    @property
    def layout(self) -> tuple[int, ...]:
        """The tree of the measured batches; empty where rollouts share nothing."""
        return self._layout(1)

    def _layout(self, step: int) -> tuple[int, ...]:
        """The tree of a batch; of a planner the one of ``step``: 0 probes, 1 is what it has come to think best."""
        return self.planner.branch(step) if self.planner is not None else self.branch

    def _play(self, number: int, branch: tuple[int, ...]) -> Played:
        for record in self.records.values():
            record.needs = self.subject.needs(record.contender.rule, record.state)
        coalitions = self.also.union(*(record.needs for record in self.records.values()))
        return self.subject.play(number, coalitions, branch=branch, swaps=self.swaps)

    def _outputs(self, played: Played) -> dict[str, Any]:
        inputs = credit_inputs(self.subject.team, self.subject.active, played)
        found = {}
        for name, record in self.records.items():
            found[name], record.state = record.contender.rule(inputs, record.state)
        return found

    def _keep(self, record: Record, paid: Paid, played: Played, scores: Scores) -> None:
        record.tokens.append(tokens_of(record.needs, played))
        record.by_turn.append(paid.by_turn)
        for agent, rows in paid.rows.items():
            gradient_J = coefficients(self.subject.objective, rows) @ scores.of(rows)
            record.gradient.setdefault(agent, []).append(gradient_J)
            record.advantage.setdefault(agent, []).append(paid.advantage[agent])
            record.shared.setdefault(agent, []).append(paid.shared[agent])
            found = record.exact.setdefault(agent, [])
            if len(found) < self.exact:
                found.append(self._exact(agent, rows, gradient_J))

    def _exact(self, agent: str, rows: Sequence[TrainRow], gradient_J: Tensor) -> tuple[float, float, float]:
        policy = self.subject.policy_of(agent)
        gradient = exact_gradient(policy, self.subject.objective, rows, self.subject.compute)
        norm2 = sum(float(part.double().square().sum()) for part in gradient)
        sketched_J = self.sketches[policy.name](gradient)
        return norm2, float(gradient_J.square().sum()), float((sketched_J - gradient_J).square().sum())

    def _keep_agent(self, agent: str, played: Played, scores: Scores) -> None:
        """How an agent's scores go with the reward, and with the reward without it."""
        P, N = played.reward_PN.shape
        score_PNJ = torch.stack([scores.of(rows).sum(0) for rows in _texts(played, agent)]).reshape(P, N, -1)
        removed = agent != self.subject.team.decider and (agent,) in played.without
        without_PXM = played.without[(agent,)] if removed else None
        without_PN = None if without_PXM is None else without_PXM.mean(2).expand(P, N)
        self.sums.setdefault(agent, []).append(weighted_sums(score_PNJ, played.reward_PN, without_PN))
        if without_PXM is not None and N > 1:
            self.evidence.setdefault(agent, Evidence()).add(score_PNJ, played.reward_PN, without_PXM)


def _texts(played: Played, agent: str) -> list[list[TrainRow]]:
    """What ``agent`` said in each rollout."""
    return [
        [row_of(turn, 0.0, 0) for turn in rollout.turns if turn.agent == agent]
        for group in played.groups
        for rollout in group.rollouts
    ]
