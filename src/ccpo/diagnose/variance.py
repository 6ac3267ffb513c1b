"""The probe of gradients: every rule is given the same rollouts of a real model, and the estimates it would follow are compared.

Batches are independent, so the products of different ones say how long the mean gradient is, and what is left of a batch's own length is noise
(:mod:`ccpo.diagnose.moments`). Weights are not changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ccpo.credit import SharedReward
from ccpo.credit.telemetry import correlation
from ccpo.diagnose import moments
from ccpo.diagnose.baseline import baseline, weighted_sums
from ccpo.diagnose.fidelity import Truth, fidelity, measure_truth
from ccpo.diagnose.gradients import BUCKETS, Scores, Sketch, exact_gradient
from ccpo.diagnose.influence import measure_influence
from ccpo.diagnose.lemma import covariance, dependence, paired_draws
from ccpo.diagnose.moments import Products, jackknife
from ccpo.diagnose.payments import Contender, Paid, coefficients, credit_inputs, estimate, pay, tokens_of
from ccpo.diagnose.subject import Subject
from ccpo.errors import UserError
from ccpo.rollout import Played
from ccpo.types import Coalition, Group

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured. ``batches``: of P x N rollouts, each an estimate of the gradient; ``warm``: earlier ones, for rules that
    remember; ``exact``: batches whose norms are also taken over all weights. ``problems`` are replayed with ``truth`` draws a
    text for the credit's fidelity (0: none). ``buckets``: J. Raises UserError for what cannot be measured."""

    batches: int = 32
    warm: int = 2
    exact: int = 2
    problems: int = 16
    truth: int = 32
    buckets: int = BUCKETS

    def __post_init__(self) -> None:
        for key, least in (("batches", 3), ("warm", 0), ("exact", 0), ("problems", 0), ("truth", 2), ("buckets", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key} is {getattr(self, key)}; the probe needs at least {least}")


@dataclass(slots=True)
class _Record:
    """What one contender has done so far."""

    contender: Contender
    needs: frozenset[Coalition]
    state: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    gradient: dict[str, list[Tensor]] = field(default_factory=dict)
    advantage: dict[str, list[Tensor]] = field(default_factory=dict)
    shared: dict[str, list[Tensor]] = field(default_factory=dict)
    by_turn: list[Mapping[str, Tensor]] = field(default_factory=list)
    exact: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)


def probe_variance(
    subject: Subject, contenders: Sequence[Contender], effort: Effort, note: Note = lambda text: None
) -> dict[str, Any]:
    """Measure ``contenders`` on ``subject``; the report is plain JSON, described in ``docs/diagnose.md``.

    Raises UserError where two contenders have one name, or none of the agents is trained.
    """
    _check(subject, contenders)
    started = time.monotonic()
    probe = _Probe(subject, contenders, effort)
    for number in range(effort.warm + effort.batches):
        note(f"batch {number + 1} of {effort.warm + effort.batches}")
        probe.batch(number)
    note("lemma")
    lemma = probe.lemma()
    note("replays")
    truth = probe.truth()
    note("influence")
    influence = [] if subject.walker() is None else measure_influence(subject, probe.groups)
    return {
        "subject": subject.name,
        "batches": effort.batches,
        "prompts": subject.prompts,
        "samples": subject.samples,
        "removal": str(subject.removal),
        "weights": {name: sketch.size for name, sketch in probe.sketches.items()},
        "buckets": effort.buckets,
        "rules": {c.name: probe.report(c.name, truth) for c in contenders},
        "truth": _truth_report(subject, truth, len(probe.groups)),
        "baseline": probe.baselines(),
        "lemma": lemma,
        "influence": [edge.to_json() for edge in influence],
        "seconds": round(time.monotonic() - started, 1),
    }


class _Probe:
    def __init__(self, subject: Subject, contenders: Sequence[Contender], effort: Effort) -> None:
        self.subject, self.effort = subject, effort
        # the gradient of the expected reward, by the estimate that no baseline bends: what the others are held against
        self.reference = Contender(name="", rule=SharedReward(), estimator="rloo" if subject.samples > 1 else "none")
        self.records = {
            c.name: _Record(c, c.needs(subject.team, subject.active), c.rule.start())
            for c in (self.reference, *contenders)
        }
        self.coalitions = frozenset().union(*(r.needs for r in self.records.values()))
        names = dict.fromkeys(subject.voices[agent].policy for agent in subject.active)
        self.sketches = {
            name: Sketch(subject.policies[name], buckets=effort.buckets, seed=subject.seed) for name in names
        }
        self.groups: list[Group] = []
        self.rewards: list[Tensor] = []
        self.sums: dict[str, list[Tensor]] = {}
        self.without_QJ: dict[str, list[Tensor]] = {}
        self.shared_QJ: dict[str, list[Tensor]] = {}

    # --- one batch ---------------------------------------------------------------------------------------------------

    def batch(self, number: int) -> None:
        played = self.subject.play(number, self.coalitions)
        inputs = credit_inputs(self.subject.team, self.subject.active, played)
        paid: dict[str, Paid] = {}
        for name, record in self.records.items():
            outputs, record.state = record.contender.rule(inputs, record.state)
            if number >= self.effort.warm:
                paid[name] = pay(record.contender, played, outputs)
        if number < self.effort.warm:
            return
        scores = Scores(self.sketches, self.subject.compute)
        scores.learn(turn for g in played.groups for r in g.rollouts for turn in r.turns if self._active(turn))
        scores.learn(turn for p in paid.values() for turns in p.turns.values() for turn in turns)
        for name, record in self.records.items():
            self._keep(record, paid[name], played, scores, exact=number - self.effort.warm < self.effort.exact)
        self._agents(played, scores)
        missing = self.effort.problems - len(self.groups)
        self.groups += played.groups[: max(0, missing)]

    def _active(self, turn: Any) -> bool:
        return turn.agent in self.subject.active

    def _keep(self, record: _Record, paid: Paid, played: Played, scores: Scores, *, exact: bool) -> None:
        record.tokens.append(tokens_of(record.contender, record.needs, played))
        record.by_turn.append(paid.by_turn)
        for agent, rows in paid.rows.items():
            gradient_J = coefficients(self.subject.objective, rows) @ scores.of(paid.turns[agent])
            record.gradient.setdefault(agent, []).append(gradient_J)
            record.advantage.setdefault(agent, []).append(paid.advantage[agent])
            shared_PN = estimate(record.contender, played.reward_PN, played, agent)
            record.shared.setdefault(agent, []).append(shared_PN)
            if exact and record.contender is not self.reference:
                record.exact.setdefault(agent, []).append(self._exact(agent, rows, gradient_J))

    def _exact(self, agent: str, rows: Sequence[Any], gradient_J: Tensor) -> tuple[float, float, float]:
        """Squared norms of the learner's own gradient and of its sketch, and of what the sketch of the sum and the sum of sketches
        differ by."""
        policy = self.subject.policy_of(agent)
        gradient = exact_gradient(policy, self.subject.objective, rows, self.subject.compute)
        norm2 = sum(float(part.double().square().sum()) for part in gradient)
        sketched_J = self.sketches[policy.name](gradient)
        return norm2, float(gradient_J.square().sum()), float((sketched_J - gradient_J).square().sum())

    def _agents(self, played: Played, scores: Scores) -> None:
        """What does not hang on a rule: how an agent's scores go with the reward, and with the reward without it."""
        P, N = played.reward_PN.shape
        self.rewards.append(played.reward_PN)
        for agent in self.subject.active:
            score_PNJ = torch.stack(
                [
                    scores.of(own).sum(0) if (own := [t for t in r.turns if t.agent == agent]) else self._zero()
                    for g in played.groups
                    for r in g.rollouts
                ]
            ).reshape(P, N, -1)
            removed = agent != self.subject.team.decider and (agent,) in played.without
            without_PXM = played.without[(agent,)] if removed else None
            without_PN = None if without_PXM is None else without_PXM.mean(2).expand(P, N)
            self.sums.setdefault(agent, []).append(weighted_sums(score_PNJ, played.reward_PN, without_PN))
            drawn_PN = None if without_PXM is None else paired_draws(without_PXM, N)
            if drawn_PN is not None:
                self.without_QJ.setdefault(agent, []).append(covariance(score_PNJ, drawn_PN))
                self.shared_QJ.setdefault(agent, []).append(covariance(score_PNJ, played.reward_PN))

    def _zero(self) -> Tensor:
        return torch.zeros(self.effort.buckets, dtype=torch.float64)

    # --- what came out -----------------------------------------------------------------------------------------------

    def report(self, name: str, truth: Truth | None) -> dict[str, Any]:
        record = self.records[name]
        tokens = sum(record.tokens) / len(record.tokens)
        return {
            "estimator": record.contender.estimator,
            "tokens": tokens,
            "agents": {agent: self._agent(record, agent, tokens, truth) for agent in record.gradient},
        }

    def _agent(self, record: _Record, agent: str, tokens: float, truth: Truth | None) -> dict[str, Any]:
        gradient_BJ = torch.stack(record.gradient[agent])
        products = Products.of(gradient_BJ, torch.stack(self.records[""].gradient[agent]))
        rollouts = self.subject.prompts * self.subject.samples
        snr2 = jackknife(moments.snr2, products)
        found = {
            "mean": jackknife(moments.signal2, products).root(),
            "deviation": jackknife(moments.variance, products).root(),
            "snr_batch": snr2.root(),
            "snr_rollout": snr2.scaled(1 / rollouts).root(),
            "snr_1000_tokens": snr2.scaled(1000 / tokens).root(),
            "cosine": jackknife(moments.cosine, products),
            "bias": jackknife(moments.bias2, products).root(),
        }
        report: dict[str, Any] = {key: value.to_json() for key, value in found.items()}
        report["ratio_to_shared"] = self._ratio(record, agent, gradient_BJ, tokens).to_json()
        report["shared_corr"] = correlation(torch.cat(record.advantage[agent]), torch.cat(record.shared[agent]))
        report["fidelity"] = self._fidelity(record, agent, truth).to_json()
        return report | _exactness(record.exact.get(agent, []))

    def _ratio(self, record: _Record, agent: str, gradient_BJ: Tensor, tokens: float) -> moments.Estimate:
        """Signal-to-noise at equal tokens over that of the first contender that pays shared reward."""
        shared = next((r for n, r in self.records.items() if n and isinstance(r.contender.rule, SharedReward)), None)
        if shared is None:
            return moments.Estimate(value=None, error=None)
        products = Products.of(gradient_BJ, torch.stack(shared.gradient[agent]))
        found = jackknife(moments.ratio2, products)
        return found.scaled(sum(shared.tokens) / len(shared.tokens) / tokens).root()

    def baselines(self) -> dict[str, Any]:
        mean = float(torch.cat(self.rewards).double().mean())
        found = {}
        for agent, sums in self.sums.items():
            removed = agent != self.subject.team.decider and (agent,) in self.coalitions
            found[agent] = baseline(sums, mean, removed=removed).to_json()
        return found

    def lemma(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for agent in self.subject.active:
            if agent in self.without_QJ:
                found[agent] = dependence(
                    torch.cat(self.without_QJ[agent]),
                    torch.cat(self.shared_QJ[agent]),
                    tests=len(self.without_QJ),
                    seed=self.subject.seed,
                ).to_json()
            else:
                found[agent] = {"untested": self._untested(agent)}
        return found

    def _untested(self, agent: str) -> str:
        if agent == self.subject.team.decider:
            return "without it nobody answers: the reward is 0"
        if (agent,) not in self.coalitions:
            return "no compared rule removes it"
        return "its reward without it is one number a problem, which moves with nothing"

    def truth(self) -> Truth | None:
        walker = self.subject.walker()
        if walker is None or not self.groups:
            return None
        return measure_truth(walker, self.groups, self.effort.truth, seed=self.subject.seed)

    def _fidelity(self, record: _Record, agent: str, truth: Truth | None) -> moments.Estimate:
        if truth is None:
            return moments.Estimate(value=None, error=None)
        turns = _turns(self.subject, agent)
        paid = {t: torch.cat([b[t] for b in record.by_turn])[: len(self.groups)] for t in turns}
        return fidelity(paid, truth, turns)


def _check(subject: Subject, contenders: Sequence[Contender]) -> None:
    names = [c.name for c in contenders]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"contender {twice!r} is named twice; give each a name of its own")
    if not names:
        raise UserError("there is no rule to probe; name at least one")
    if not subject.active:
        raise UserError("every agent is frozen, so that there is no gradient to measure")


def _turns(subject: Subject, agent: str) -> list[str]:
    return [t.name for t in subject.team.turns_of(agent)]


def _exactness(found: Sequence[tuple[float, float, float]]) -> dict[str, float | None]:
    """Norms over all weights beside those of the sketch, root mean squares over the batches that have both."""
    if not found:
        return {"norm_exact": None, "norm_sketch": None, "sum_error": None}
    exact, sketch, difference = (sum(column) / len(found) for column in zip(*found, strict=True))
    return {
        "norm_exact": exact**0.5,
        "norm_sketch": sketch**0.5,
        "sum_error": (difference / exact) ** 0.5 if exact > 0 else 0.0,
    }


def _truth_report(subject: Subject, truth: Truth | None, problems: int) -> dict[str, Any] | None:
    if truth is None:
        return None
    reliability = {agent: truth.reliability(_turns(subject, agent)) for agent in subject.active}
    return {"problems": problems, "draws": truth.draws, "reliability": reliability}
