"""A run's metrics by column, thinned where there are more steps than a chart can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccpo.report.reading import Notes, integer, number, short

MAX_SERIES = 600
MAX_POINTS = 1000
MAX_NUMBERS = 300_000


def columns(records: Sequence[Mapping[str, Any]], notes: Notes) -> dict[str, Any]:
    """``step``: the steps in order, of each the last record; ``values``: by metric, a number or null for each step; ``every``:
    how many steps are averaged into one point (then ``step`` is the last of them)."""
    by_step = {record["step"]: record for record in records}
    steps = sorted(by_step)
    names: dict[str, None] = {}
    for step in steps:
        names.update(dict.fromkeys(by_step[step]))
    chosen = [name for name in names if name != "step" and len(name) <= 200]
    if len(chosen) > MAX_SERIES:
        notes.add(f"metrics.jsonl has {len(chosen)} metrics; the first {MAX_SERIES} are shown.")
        chosen = chosen[:MAX_SERIES]
    most = max(50, min(MAX_POINTS, MAX_NUMBERS // max(1, len(chosen))))
    every = -(-len(steps) // most) if steps else 1
    if every > 1:
        notes.add(f"{len(steps):,} steps: each point of a curve is the mean of {every}.")
    buckets = [steps[i : i + every] for i in range(0, len(steps), every)]
    values = {}
    for name in chosen:
        column = [_mean([number(by_step[step].get(name)) for step in bucket]) for bucket in buckets]
        if any(value is not None for value in column):
            values[name] = column
    return {"step": [bucket[-1] for bucket in buckets], "values": values, "every": every}


def _mean(found: Sequence[float | None]) -> float | int | None:
    there = [value for value in found if value is not None]
    return short(sum(there) / len(there)) if there else None


def totals(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums over steps of what was spent: ``joint``, ``counterfactual``, ``rating`` tokens and ``seconds``."""
    by_step = {record["step"]: record for record in records}
    spent = {kind: f"tokens/{kind}" for kind in ("joint", "counterfactual", "rating")} | {"seconds": "seconds/step"}
    return {key: sum(number(record.get(name)) or 0.0 for record in by_step.values()) for key, name in spent.items()}


def evaluations(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations in order of steps, of each step the last; only what follows the documented form."""
    found = {}
    for record in records:
        reports = record.get("reports")
        if isinstance(reports, dict):
            sets = {
                name[:100]: _report(report) for name, report in list(reports.items())[:20] if isinstance(report, dict)
            }
            found[record["step"]] = {
                "step": record["step"],
                "tokens": number(record.get("tokens")),
                "reports": {name: report for name, report in sets.items() if report["team"] is not None},
            }
    return [found[step] for step in sorted(found) if found[step]["reports"]]


def _report(report: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"problems": integer(report.get("problems")), "samples": integer(report.get("samples"))}
    kept |= {"tokens": short(number(report.get("tokens"))), "team": _interval(report.get("team"))}
    for kind in ("without", "blank", "alone"):
        pairs = report.get(kind)
        pairs = list(pairs.items())[:64] if isinstance(pairs, dict) else ()
        kept[kind] = {agent[:64]: value for agent, data in pairs if (value := _interval(data)) is not None}
    for kind in ("pass@k", "majority@k"):
        pairs = report.get(kind)
        pairs = list(pairs.items())[:20] if isinstance(pairs, dict) else ()
        kept[kind] = {k[:8]: short(value) for k, v in pairs if (value := number(v)) is not None}
    return kept


def _interval(data: Any) -> list[float | int | None] | None:
    """Mean, low, high."""
    if not isinstance(data, dict):
        return None
    found = [number(data.get(key)) for key in ("mean", "low", "high")]
    return None if None in found else [short(value) for value in found]
