"""What figures are drawn from: runs read from their folders, and those of one recipe together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ccpo.compare.extract import training_record
from ccpo.compare.record import WINDOW, boxes_of
from ccpo.errors import UserError
from ccpo.rollout import read_episodes
from ccpo.runfolder import RunFolder, read_json

ITS_OWN = ("seed", "dir", "name", "overwrite", "threads")
"""Keys of a recipe's section ``run`` that make no other method of a run."""


class RunData:
    """A run's folder, read as far as it is asked for. Raises UserError for a folder that is no run or has no steps yet."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        recipe = read_json(self.folder.recipe)
        self.config: Mapping[str, Any] = recipe["config"]
        self.objects = {name: re.sub(r" at 0x[0-9a-f]+", "", said) for name, said in recipe["objects"].items()}
        self.team = recipe.get("team")
        if not self.folder.read_lines(self.folder.metrics):
            raise UserError(f"{path} has no metrics yet; there is nothing to draw before its first step is done")

    @property
    def name(self) -> str:
        return str(self.folder.path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """``curve``, ``train`` and costs, see :func:`ccpo.compare.extract.training_record`."""
        return training_record(self.folder)

    @cached_property
    def reports(self) -> list[tuple[int, Mapping[str, Any]]]:
        """``(step, report)`` of the first data set of each evaluation."""
        lines = self.folder.read_lines(self.folder.evaluations)
        return [(line["step"], next(iter(line["reports"].values()))) for line in lines if line["reports"]]

    @cached_property
    def boxes(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Quantiles of each agent's credit in right and wrong rollouts of the first and the last tenth of the steps; empty where no episodes
        were kept."""
        files = sorted(self.folder.episodes.glob("step-*.jsonl.gz"))
        width = max(1, round(len(files) * WINDOW))
        return boxes_of([_paid(f) for f in files[:width]], [_paid(f) for f in files[-width:]]) if files else {}

    @property
    def last_with(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Of each kind of ablation the newest report that has it."""
        for kind in ("without", "blank", "alone"):
            found = next((report for _, report in reversed(self.reports) if report.get(kind)), None)
            if found is not None:
                yield kind, found


def _paid(file: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rewards ``[P, N]`` and by agent the credit ``[P, N]`` of a step; what was not finite counts as 0."""
    records = [record for _, record in read_episodes(file)]
    reward_PN = torch.tensor([[r["reward"] for r in record["rollouts"]] for record in records])
    agents = records[0]["rollouts"][0]["credit"] if records else {}
    credit = {
        agent: torch.tensor([[r["credit"][agent] or 0.0 for r in record["rollouts"]] for record in records])
        for agent in agents
    }
    return reward_PN, credit


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs of one recipe that differ in their seeds at most, and what a legend calls them."""

    label: str
    runs: Sequence[RunData]


def methods_of(runs: Sequence[RunData]) -> list[Method]:
    """``runs`` by recipe, in the order given. A label is the runs' name; of methods with one name also what their recipes differ in, or where
    that is too much their folder."""
    by_recipe: dict[str, list[RunData]] = {}
    for run in runs:
        by_recipe.setdefault(_key(run), []).append(run)
    groups = list(by_recipe.values())
    names = ["/".join(sorted({run.config["run"]["name"] for run in group})) for group in groups]
    labels = []
    for name, group in zip(names, groups, strict=True):
        namesakes = [g[0] for n, g in zip(names, groups, strict=True) if n == name]
        if len(namesakes) > 1:
            name = f"{name}, {_differences(group[0], namesakes)}"
        labels.append(name)
    return [Method(label=label, runs=group) for label, group in zip(labels, groups, strict=True)]


def _key(run: RunData) -> str:
    kept = {name: value for name, value in run.config.items() if name != "log"}
    kept["run"] = {name: value for name, value in run.config["run"].items() if name not in ITS_OWN}
    return json.dumps([kept, run.objects, run.team], sort_keys=True)


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for name, child in value.items():
            found |= _leaves(child, f"{path}.{name}" if path else name)
        return found
    return {path: str(value)}


def _differences(run: RunData, among: Sequence[RunData]) -> str:
    """What the run's recipe says at the few keys that tell it from the others'; its folder where it takes more than two."""
    configs = [_leaves(other.config) for other in among]
    mine = _leaves(run.config)
    own = tuple(f"run.{name}" for name in ITS_OWN)
    keys = [k for k in dict.fromkeys(key for c in configs for key in c) if not k.startswith(("log.", *own))]
    differ = sorted(
        (k for k in keys if len({c.get(k) for c in configs}) > 1), key=lambda key: (key != "credit.kind", len(key))
    )
    for shown in [*([key] for key in differ), *([differ[0], key] for key in differ[1:])]:
        if len({tuple(config.get(key) for key in shown) for config in configs}) == len(configs):
            return ", ".join(f"{key} {mine.get(key, '–')}" for key in shown)
    return str(run.folder.path)
