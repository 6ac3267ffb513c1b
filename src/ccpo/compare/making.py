"""The part of the page that says how it was made: machine, hours, failures, commands, and what the statistics are."""

from __future__ import annotations

import math
from collections import Counter

from ccpo.compare.markdown import cell_text, number, table
from ccpo.compare.stats import DROP, RESAMPLES
from ccpo.compare.summary import Summary


def machine_line(summary: Summary) -> str:
    """How many cells, on what, for how long, with which versions."""
    runs = summary.every_run
    if not runs:
        return "No cell has a result yet."
    minutes = math.fsum(run["seconds"]["wall"] for run in runs) / 60
    time = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
    machines = Counter(f"{run['machine']['cpu']}, {run['machine']['threads']} thread(s) a cell" for run in runs)
    versions = Counter(
        ", ".join(f"{k} {run['versions'][k]}" for k in ("ccpo", "torch", "transformers") if k in run["versions"])
        for run in runs
    )
    tokens = sum(run["tokens"]["total"] for run in runs)
    return (
        f"{len(runs)} runs, {number(tokens)} generated tokens in training, {time} of one core in all "
        f"({'; '.join(machines)}; {'; '.join(versions)})."
    )


def failures(summary: Summary) -> str:
    """Empty cells with their reasons, and failed ones with their errors."""
    study = summary.study
    empty = [
        [cell_text(study.method_label(m)), cell_text(study.task_label(t)), cell_text(reason)]
        for m in study.methods
        for t in study.tasks
        if (reason := study.empty_reason(m, t)) is not None
    ]
    failed = [
        [cell_text(study.method_label(m)), cell_text(study.task_label(t)), str(seed), cell_text(_last(error))[:200]]
        for (m, t), found in summary.failures.items()
        for seed, error in found
    ]
    parts = []
    if empty:
        parts.append("## Empty cells\n\n" + table(["method", "task", "reason"], empty, "lll"))
    if failed:
        parts.append("## Failed cells\n\n" + table(["method", "task", "seed", "error"], failed, "llrl"))
    return "\n\n".join(parts)


def _last(error: str) -> str:
    return (error.strip().splitlines() or ["(no message)"])[-1]


def how_made(summary: Summary, command: str) -> str:
    study, exam = summary.study, summary.study.exam
    budgets = cell_text("; ".join(f"{study.task_label(t)} {spec.tokens:,}" for t, spec in study.tasks.items()))
    lines = [
        f"**Budget**: all sampled tokens count, counterfactual and rating turns included: {budgets}. A run ends with the step that reaches it.",
        f"**Final accuracy**: mean reward of the last weights on {exam.problems} problems × {exam.samples} sample(s)"
        + (f", of a single agent × {exam.votes}," if exam.votes else "")
        + f" at temperature {exam.temperature:g}.",
        "**Estimates** are interquartile means over runs (a quarter cut off at each end, rounded down) with 95% percentile bootstrap "
        f"intervals over seeds, stratified by task where several are pooled, {RESAMPLES} resamples (arXiv 2108.13264).",
        "**P(wins)**, **P(better)**: the probability that a run of one method ends above a run of the other, ties one half, averaged over "
        "tasks.",
        "**Tokens to the mark**: first crossing, linearly interpolated, of the running mean over three evaluations. The mark is taken as "
        "known: its own uncertainty is in no interval.",
        f"**Stability**: a fall of {100 * DROP:.0f} points or more of the same smoothed curve below its highest point so far.",
        f"**The same page again**: `{command}`. Cells whose recipe is unchanged are not run again.",
    ]
    return "## How to read it\n\n" + "\n".join(f"- {line}" for line in lines)
