"""What the page and the figures show, computed once from the cells' results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ccpo.compare.cells import Chosen
from ccpo.compare.stats import (
    Crossing,
    Estimate,
    improvement,
    iqm,
    iqm_estimate,
    ratio_estimate,
    tokens_to,
    unstable_share,
)
from ccpo.compare.study import Study
from ccpo.compare.tuning import Tuned

MARK = 0.9
"""Tokens are counted to this part of a final accuracy."""
FAIR_STEPS, FAIR_RISE = 30, 0.25
"""A task can tell rules apart where the yardstick needs so many steps to the mark and starts so far below its final accuracy."""

Result = Mapping[str, Any]
Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Marked:
    """Tokens (or steps) to a mark, IQM over runs; ``censored`` runs never reached it and count with the whole budget."""

    estimate: Estimate
    censored: int
    each: tuple[float, ...]

    @property
    def beyond(self) -> bool:
        """Whether so many runs are censored that the IQM itself is no more than a lower bound."""
        return self.censored > len(self.each) // 4


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method on one task. Costs are means over runs. ``to_mark``: to 90% of the yardstick's final accuracy; ``to_own``: of its own."""

    runs: tuple[Result, ...]
    final: Estimate
    ood: Estimate | None
    to_mark: Marked | None
    to_own: Marked | None
    unstable: float | None
    tokens: Mapping[str, float]
    updates: float
    seconds: Mapping[str, float]
    play_tokens: float

    def part(self, kind: str, data: str = "heldout") -> dict[str, float]:
        """IQM over runs of the ``without``, ``blank`` or ``alone`` accuracies, by agent."""
        reports = [report(run, data) for run in self.runs]
        agents = reports[0].get(kind, {})
        return {agent: float(iqm([r[kind][agent] for r in reports])) for agent in agents}

    def credit(self, agent: str, what: str) -> float | None:
        """Mean over runs of an agent's telemetry."""
        found = [run["credit"][agent][what] for run in self.runs if what in run["credit"].get(agent, {})]
        return math.fsum(found) / len(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two methods on one task. ``ratio``: tokens to the mark of the first over those of the second, and which ``bound`` it is where
    most runs of one never reach the mark: "≤", "≥", "?" where it is both, else "". ``apart``: whether the intervals of the tokens
    do not overlap."""

    wins: Estimate
    ratio: Estimate | None
    bound: str
    apart: bool | None


@dataclass(frozen=True, kw_only=True)
class Field:
    """Whether a task can tell rules apart: the yardstick's first and final accuracy and its steps to the mark."""

    start: float
    final: float
    steps: Marked

    @property
    def fair(self) -> bool:
        return (
            self.steps.estimate.value >= FAIR_STEPS and self.final - self.start >= FAIR_RISE and not self.steps.beyond
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    study: Study
    entries: Mapping[Pair, Entry]
    marks: Mapping[str, float]
    failures: Mapping[Pair, Sequence[tuple[int, str]]] = field(default_factory=dict)
    chosen: Chosen = field(default_factory=dict)
    tuned: Mapping[Pair, Sequence[Tuned]] = field(default_factory=dict)
    sweeps: Mapping[str, Sequence[tuple[Any, Entry | None]]] = field(default_factory=dict)
    every_run: Sequence[Result] = ()

    def entry(self, method: str, task: str) -> Entry | None:
        return self.entries.get((method, task))

    def contest(self, first: str, second: str, task: str) -> Contest | None:
        """None where one of them has no result on the task."""
        a, b = self.entry(first, task), self.entry(second, task)
        if a is None or b is None:
            return None
        ratio, bound, apart = None, "", None
        if a.to_mark is not None and b.to_mark is not None:
            if min(b.to_mark.each) > 0:  # else it stood at the mark before training
                ratio = ratio_estimate(a.to_mark.each, b.to_mark.each)
            x, y = a.to_mark.estimate, b.to_mark.estimate
            apart = x.high < y.low or y.high < x.low
            bound = {(False, False): "", (False, True): "≤", (True, False): "≥", (True, True): "?"}[
                a.to_mark.beyond, b.to_mark.beyond
            ]
        return Contest(wins=improvement([finals(a.runs)], [finals(b.runs)]), ratio=ratio, bound=bound, apart=apart)

    def overall(self, method: str) -> Estimate | None:
        """IQM of final accuracies over all tasks, stratified; None where a task is missing."""
        found = [self.entry(method, task) for task in self.study.tasks]
        if any(entry is None for entry in found):
            return None
        return iqm_estimate([finals(entry.runs) for entry in found if entry is not None])

    def beats(self, method: str, other: str) -> tuple[Estimate, int] | None:
        """Probability of improvement over ``other``, over the tasks that both have, and how many those are."""
        pairs = [(self.entry(method, task), self.entry(other, task)) for task in self.study.tasks]
        both = [(finals(a.runs), finals(b.runs)) for a, b in pairs if a is not None and b is not None]
        if not both:
            return None
        return improvement([a for a, _ in both], [b for _, b in both]), len(both)

    def field_of(self, task: str) -> Field | None:
        entry = self.entry(self.study.yardstick, task) if self.study.yardstick else None
        if entry is None or task not in self.marks or not self.study.methods[self.study.yardstick].train:
            return None
        by_step = [[[row[1], *row[1:]] for row in run["curve"]] for run in entry.runs]
        crossings = [tokens_to(curve, self.marks[task], curve[-1][0]) for curve in by_step]
        start = float(iqm([run["curve"][0][3] for run in entry.runs]))
        return Field(start=start, final=entry.final.value, steps=_marked(crossings))


def report(run: Result, data: str = "heldout") -> Mapping[str, Any]:
    """The final report on the out-of-distribution set, or on the one in distribution, whatever its name."""
    return run["final"]["ood"] if data == "ood" else next(iter(run["final"].values()))


def finals(runs: Sequence[Result], data: str = "heldout") -> list[float]:
    """Final accuracies of runs."""
    return [report(run, data)["team"][0] for run in runs]


def summarise(
    study: Study,
    runs: Mapping[Pair, Sequence[Result]],
    *,
    sweeps: Mapping[str, Sequence[tuple[Any, Sequence[Result]]]] | None = None,
    every_run: Sequence[Result] = (),
    **others: Any,
) -> Summary:
    """All figures from results by (method, task), and by sweep and value. What has no result is absent."""
    yardstick = study.yardstick
    marks = {
        task: MARK * float(iqm(finals(runs[yardstick, task])))
        for task in study.tasks
        if yardstick is not None and runs.get((yardstick, task))
    }
    entries = {pair: _entry(study, pair, found, marks.get(pair[1])) for pair, found in runs.items() if found}
    swept = {}
    for name, values in (sweeps or {}).items():
        pair = (study.sweeps[name].method, study.sweeps[name].task)
        swept[name] = [(v, _entry(study, pair, found, marks.get(pair[1])) if found else None) for v, found in values]
    return Summary(study=study, entries=entries, marks=marks, sweeps=swept, every_run=every_run, **others)


def _entry(study: Study, pair: Pair, runs: Sequence[Result], mark: float | None) -> Entry:
    method, task = pair
    budget, trained = study.tasks[task].tokens, study.methods[method].train
    has_ood = all("ood" in run["final"] for run in runs)
    own = MARK * float(iqm(finals(runs)))
    curves = [run["curve"] for run in runs]

    def to(level: float | None) -> Marked | None:
        return _marked([tokens_to(c, level, budget) for c in curves]) if trained and level is not None else None

    return Entry(
        runs=tuple(runs),
        final=iqm_estimate([finals(runs)]),
        ood=iqm_estimate([finals(runs, "ood")]) if has_ood else None,
        to_mark=to(mark),
        to_own=to(own),
        unstable=unstable_share(curves) if trained else None,
        tokens=_means([run["tokens"] for run in runs]),
        updates=_mean([run["updates"] for run in runs]),
        seconds=_means([run["seconds"] for run in runs]),
        play_tokens=_mean([report(run)["tokens"] for run in runs]),
    )


def _marked(crossings: Sequence[Crossing]) -> Marked:
    each = tuple(crossing.tokens for crossing in crossings)
    return Marked(estimate=iqm_estimate([each]), censored=sum(c.censored for c in crossings), each=each)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means by key; a key that a record lacks counts as 0."""
    return {key: _mean([r.get(key, 0.0) for r in records]) for key in dict.fromkeys(k for r in records for k in r)}


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A single agent's majority vote with as many tokens a problem as the team: the fewest samples that cost at least as much. ``enough``: whether
    the exam drew that many; where not, ``accuracy`` is that of the most it drew."""

    samples: int
    accuracy: Estimate
    tokens: float
    enough: bool


def vote_at(entry: Entry, team_tokens: float) -> Vote:
    """The majority vote of ``entry``'s single agent at a team's ``team_tokens`` a problem."""
    drawn = sorted(int(k) for k in report(entry.runs[0])["majority@k"])
    fitting = [k for k in drawn if k * entry.play_tokens >= team_tokens]
    k = fitting[0] if fitting else drawn[-1]
    accuracy = iqm_estimate([[report(run)["majority@k"][str(k)] for run in entry.runs]])
    return Vote(samples=k, accuracy=accuracy, tokens=k * entry.play_tokens, enough=bool(fitting))


# --- what the page and the figures call things -------------------------------------------------------------------------------


def shown_tasks(summary: Summary) -> list[str]:
    """Tasks with a result."""
    return [task for task in summary.study.tasks if any(pair[1] == task for pair in summary.entries)]


def label_of(summary: Summary, method: str) -> str:
    """A method's name in a table; the headline pair's are bold."""
    label = cell_text(summary.study.method_label(method))
    return f"**{label}**" if method in (summary.study.headline or ()) else label


def missing(summary: Summary, method: str, task: str) -> str:
    """What stands in the place of a result."""
    if summary.study.empty_reason(method, task) is not None:
        return "– ([why](#empty-cells))"
    return "– (failed)" if summary.failures.get((method, task)) else "– (not run yet)"


def cell_text(text: str) -> str:
    """Text that cannot break out of its table cell: study files and errors are not markup."""
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
