"""The probe of gradients: rules are given the same rollouts of a real model, and the estimates they would follow are compared.

Batches are independent, so the products of different ones say how long the mean gradient is, and what is left of a batch's own length is
noise (:mod:`ccpo.diagnose.moments`). Rules that want another layout of rollouts have batches of their own. Weights are not changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ccpo.credit import SharedReward
from ccpo.credit.telemetry import correlation
from ccpo.diagnose import moments
from ccpo.diagnose.baseline import baseline
from ccpo.diagnose.bench import Bench, Record
from ccpo.diagnose.contenders import Contender
from ccpo.diagnose.fidelity import Truth, fidelity, measure_truth
from ccpo.diagnose.gradients import BUCKETS, Sketch
from ccpo.diagnose.influence import measure_influence
from ccpo.diagnose.moments import Estimate, Products, jackknife
from ccpo.diagnose.subject import Subject
from ccpo.errors import UserError
from ccpo.pay import Payroll

Note = Callable[[str], None]
REFERENCE = ""  # no contender's name is empty


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured. ``batches``: of P x N rollouts, each an estimate of the gradient; ``warm``: earlier ones, for rules that
    remember; ``exact``: batches whose norms are also taken over all weights. ``problems`` are replayed with ``truth`` draws a
    text for the credit's fidelity (0: none). ``repeat``: every batch has the same problems, so that only sampling is noise and not
    which problems a batch happens to have. ``buckets``: J. Raises UserError for what cannot be measured."""

    batches: int = 32
    warm: int = 4
    exact: int = 2
    problems: int = 16
    truth: int = 32
    repeat: bool = False
    buckets: int = BUCKETS

    def __post_init__(self) -> None:
        for key, least in (("batches", 3), ("warm", 0), ("exact", 0), ("problems", 0), ("truth", 2), ("buckets", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key} is {getattr(self, key)}; the probe needs at least {least}")


def probe_variance(
    subject: Subject, contenders: Sequence[Contender], effort: Effort, note: Note = lambda text: None
) -> dict[str, Any]:
    """Measure ``contenders`` on ``subject``; the report is plain JSON, described in ``docs/diagnose.md``.

    Raises UserError where two contenders have one name, or none of the agents is trained.
    """
    _check(subject, contenders)
    subject = replace(subject, repeat=effort.repeat)
    started = time.monotonic()
    probe = _Probe(subject, contenders, effort)
    for number in range(effort.warm + effort.batches):
        note(f"batch {number + 1} of {effort.warm + effort.batches}")
        for bench in probe.benches:
            (bench.warm if number < effort.warm else bench.measure)(number)
    note("lemma")
    lemma = probe.lemma()
    note("replays")
    probe.replay()
    note("influence")
    influence = [] if subject.walker() is None else measure_influence(subject, probe.plain.groups)
    return {
        "subject": subject.name,
        "batches": effort.batches,
        "prompts": subject.prompts,
        "samples": subject.samples,
        "repeat": subject.repeat,
        "removal": str(subject.removal),
        "weights": {name: sketch.size for name, sketch in probe.sketches.items()},
        "buckets": effort.buckets,
        "rules": {c.name: probe.rule(c.name) for c in contenders},
        "truth": probe.reliability(),
        "baseline": probe.baselines(),
        "lemma": lemma,
        "influence": [edge.to_json() for edge in influence],
        "seconds": round(time.monotonic() - started, 1),
    }


class _Probe:
    def __init__(self, subject: Subject, contenders: Sequence[Contender], effort: Effort) -> None:
        self.subject, self.effort = subject, effort
        names = dict.fromkeys(subject.voices[agent].policy for agent in subject.active)
        self.sketches = {
            name: Sketch(subject.policies[name], buckets=effort.buckets, seed=subject.seed) for name in names
        }
        # the gradient of the expected reward, by the estimate that no baseline bends, from rollouts that share nothing
        reference = Contender(
            name=REFERENCE,
            rule=SharedReward(),
            payroll=Payroll(estimator="rloo" if subject.samples > 1 else "none", boxed_reward={}),
        )
        self.benches = []
        everybody = (reference, *contenders)
        for branch in dict.fromkeys(c.branch for c in everybody):
            members = [c for c in everybody if c.branch == branch]
            # on the first, which is plain, every removal is played: it is where Lemma A.1 is tested
            also = frozenset().union(*(subject.needs(c.rule, c.rule.start()) for c in contenders if not self.benches))
            bench = Bench(subject, members, self.sketches, problems=effort.problems, exact=effort.exact, also=also)
            self.benches.append(bench)
        self.plain = self.benches[0]
        self.home = {name: bench for bench in self.benches for name in bench.records}
        self.truths: dict[int, Truth] = {}

    def replay(self) -> None:
        walker = self.subject.walker()
        if walker is not None and self.effort.problems:
            self.truths = {
                id(bench): measure_truth(walker, bench.groups, self.effort.truth, seed=self.subject.seed)
                for bench in self.benches
            }

    # --- rules -------------------------------------------------------------------------------------------------------

    def rule(self, name: str) -> dict[str, Any]:
        record = self.home[name].records[name]
        rollouts = sum(r.numel() for r in self.home[name].rewards) / self.effort.batches
        return {
            "estimator": record.contender.payroll.estimator,
            "branch": list(self.home[name].layout),
            "tokens": record.tokens_a_batch,
            "agents": {agent: self._agent(record, agent, rollouts) for agent in record.gradient},
        }

    def _agent(self, record: Record, agent: str, rollouts: float) -> dict[str, Any]:
        products = Products.of(torch.stack(record.gradient[agent]), self._gradient(REFERENCE, agent))
        snr2 = jackknife(moments.snr2, products)
        found = {
            "mean": jackknife(moments.signal2, products).root(),
            "deviation": jackknife(moments.variance, products).root(),
            "snr_batch": snr2.root(),
            "snr_rollout": snr2.scaled(1 / rollouts).root(),
            "snr_1000_tokens": snr2.scaled(1000 / record.tokens_a_batch).root(),
            "ratio_to_shared": self._ratio(record, agent),
            "cosine": jackknife(moments.cosine, products),
            "bias": jackknife(moments.bias2, products).root(),
            "fidelity": self._fidelity(record, agent),
        }
        report: dict[str, Any] = {key: value.to_json() for key, value in found.items()}
        report["shared_corr"] = correlation(torch.cat(record.advantage[agent]), torch.cat(record.shared[agent]))
        return report | _exactness(record.exact[agent])

    def _gradient(self, name: str, agent: str) -> Tensor:
        return torch.stack(self.home[name].records[name].gradient[agent])

    def _ratio(self, record: Record, agent: str) -> Estimate:
        """Signal-to-noise at equal tokens over that of the first contender that pays shared reward."""
        shared = next(
            (
                found
                for name, bench in self.home.items()
                if name != REFERENCE and isinstance((found := bench.records[name]).contender.rule, SharedReward)
            ),
            None,
        )
        if shared is None:
            return Estimate(value=None, error=None)
        products = Products.of(torch.stack(record.gradient[agent]), torch.stack(shared.gradient[agent]))
        found = jackknife(moments.ratio2, products)
        return found.scaled(shared.tokens_a_batch / record.tokens_a_batch).root()

    def _fidelity(self, record: Record, agent: str) -> Estimate:
        bench = self.home[record.contender.name]
        truth = self.truths.get(id(bench))
        if truth is None:
            return Estimate(value=None, error=None)
        turns = _turns(self.subject, agent)
        paid = {t: torch.cat([batch[t] for batch in record.by_turn])[: len(bench.groups)] for t in turns}
        return fidelity(paid, truth, turns)

    # --- agents ------------------------------------------------------------------------------------------------------

    def baselines(self) -> dict[str, Any]:
        mean = float(torch.cat(self.plain.rewards).double().mean())
        return {
            agent: baseline(sums, mean, removed=agent in self.plain.evidence).to_json()
            for agent, sums in self.plain.sums.items()
        }

    def lemma(self) -> dict[str, Any]:
        """By agent the test of Lemma A.1, or why there is none."""
        evidence = self.plain.evidence
        found: dict[str, Any] = {}
        for agent in self.subject.active:
            if agent in evidence:
                found[agent] = evidence[agent].weigh(tests=len(evidence), seed=self.subject.seed).to_json()
            elif agent == self.subject.team.decider:
                found[agent] = {"untested": "without it nobody answers: the reward is 0"}
            elif self.subject.samples < 2:
                found[agent] = {"untested": "it needs two rollouts a problem"}
            else:
                found[agent] = {"untested": "no compared rule removes it"}
        return found

    def reliability(self) -> dict[str, Any] | None:
        truth = self.truths.get(id(self.plain))
        if truth is None:
            return None
        found = {agent: truth.reliability(_turns(self.subject, agent)) for agent in self.subject.active}
        return {"problems": len(self.plain.groups), "draws": truth.draws, "reliability": found}


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
