"""From a run's folder to a cell's result: a few kilobytes of what the comparison needs."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ccpo.runfolder import RunFolder
from ccpo.runs import versions

TRAIN_POINTS = 40
TOKENS = ("joint", "counterfactual", "rating")
AVERAGED = ("shared_corr", "same_as_shared", "no_signal", "helped", "hurt", "no_effect", "share")


def training_record(folder: RunFolder) -> dict[str, Any]:
    """Curves and costs of a finished run.

    ``curve``: ``[tokens, step, seconds, accuracy]`` of each evaluation, tokens and seconds those of training up to there;
    ``train``: ``[tokens, reward]``, the mean team reward of training rollouts in at most 40 stretches of steps; ``tokens``,
    ``seconds`` by kind and phase; ``steps``; ``credit``: telemetry by agent, averaged over steps.
    """
    metrics = folder.read_lines(folder.metrics)
    spent = {0: (0, 0.0)}
    tokens, seconds = 0, 0.0
    for line in metrics:
        tokens = int(line["tokens/total"])
        seconds += line["seconds/step"]
        spent[line["step"]] = (tokens, seconds)
    evaluations = {e["step"]: e["reports"] for e in folder.read_lines(folder.evaluations)}
    curve = [
        [spent[step][0], step, round(spent[step][1], 1), round(next(iter(reports.values()))["team"]["mean"], 4)]
        for step, reports in sorted(evaluations.items())
        if step in spent  # of a run that goes on, an evaluation may be there before its step's metrics are
    ]
    return {
        "curve": curve,
        "train": _train_curve(metrics),
        "steps": len(metrics),
        "tokens": {kind: int(sum(line.get(f"tokens/{kind}", 0) for line in metrics)) for kind in TOKENS}
        | {"total": tokens},
        "seconds": {phase: round(total, 2) for phase, total in _phases(metrics).items()},
        "credit": _telemetry(metrics),
    }


def _train_curve(metrics: Sequence[Mapping[str, float]]) -> list[list[float]]:
    width = max(1, math.ceil(len(metrics) / TRAIN_POINTS))
    stretches = [metrics[i : i + width] for i in range(0, len(metrics), width)]
    return [[int(s[-1]["tokens/total"]), round(_mean([m["reward/team"] for m in s]), 4)] for s in stretches]


def _phases(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(key for line in metrics for key in line if key.startswith("seconds/"))
    return {name.removeprefix("seconds/"): sum(line.get(name, 0.0) for line in metrics) for name in names}


def _telemetry(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key in dict.fromkeys(key for line in metrics for key in line if key.startswith("credit/")):
        agent, _, what = key.removeprefix("credit/").rpartition("/")
        values = [line[key] for line in metrics if key in line and math.isfinite(line[key])]
        if agent and what in AVERAGED and values:
            found.setdefault(agent, {})[what] = round(_mean(values), 4)
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def exam_record(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The final reports, rounded: team ``[mean, low, high]``, means of the ablations, pass@k, majority@k, tokens a problem."""
    found = {}
    for name, report in reports.items():
        team = report["team"]
        short: dict[str, Any] = {
            "problems": report["problems"],
            "samples": report["samples"],
            "team": [round(team[k], 4) for k in ("mean", "low", "high")],
            "tokens": round(report["tokens"], 2),
        }
        for kind in ("without", "blank", "alone"):
            if kind in report:
                short[kind] = {agent: round(value["mean"], 4) for agent, value in report[kind].items()}
        for kind in ("pass@k", "majority@k"):
            short[kind] = {k: round(value, 4) for k, value in report[kind].items()}
        found[name] = short
    return found


def made_by() -> dict[str, Any]:
    """Versions and the machine."""
    return {"versions": versions(), "machine": {"cpu": cpu_model(), "threads": torch.get_num_threads()}}


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name where the system tells it."""
    try:
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass  # not Linux: the platform's own word below
    return platform.processor() or platform.machine()
