"""The alarms of a run that is on disk: its last steps, its metrics and its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ccpo.alarms.base import WINDOW, Shape
from ccpo.alarms.tally import PerAgent, tally
from ccpo.alarms.watch import Watch
from ccpo.errors import UserError
from ccpo.rollout import read_episodes
from ccpo.runfolder import RunFolder, read_json
from ccpo.types import Group

MAX_EPISODES = 512 * 2**20
"""Characters of a step's episodes, all of which are held at once; longer ones are refused."""


def find_alarms(folder: RunFolder | Path | str) -> list[dict[str, Any]]:
    """The alarms that hold at the end of what a run has written so far, warnings first.

    Each is ``{"level": "warn" | "info", "name", "title", "what", "try", "agent": str | None, "evidence": dict}``. Read are the
    metrics, the evaluations, and the episodes of the last 20 steps; what is not there is not judged. Raises UserError for a folder
    that is no run.
    """
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    recipe = read_json(run.recipe)
    lines = run.read_lines(run.metrics)
    shape = _shape(run, recipe, lines)
    watch = Watch(shape, _rule(recipe))
    for line in lines[:-WINDOW]:
        watch.remember(line["step"], tally(shape, (), {}, {}, line))
    for line in lines[-WINDOW:]:
        groups, credit, advantage = _episodes(run.episode_file(line["step"]))
        watch.remember(line["step"], tally(shape, groups, credit, advantage, line))
    exams = [_exam(record) for record in run.read_lines(run.evaluations) if record["reports"]]
    found = [alarm.to_json() for alarm in watch.alarms(exams)]
    return sorted(found, key=lambda alarm: alarm["level"] != "warn")


def _rule(recipe: Mapping[str, Any]) -> str:
    """The rule's kind, or the class of an object that was passed in."""
    given = recipe["objects"].get("credit")
    return given.partition("(")[0] if given else recipe["config"]["credit"]["kind"]


def _exam(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": record["step"], "report": next(iter(record["reports"].values()))}


def _episodes(file: Path) -> tuple[Sequence[Group], PerAgent, PerAgent]:
    """Groups, credit and advantages of a step; nothing where its file is not there."""
    if not file.is_file():
        return (), {}, {}
    read = list(read_episodes(file, most=MAX_EPISODES))
    paid = [record["rollouts"] for _, record in read]
    return [group for group, _ in read], _paid("credit", paid), _paid("advantage", paid)


def _paid(kind: str, rollouts: Sequence[Sequence[Mapping[str, Any]]]) -> PerAgent:
    agents = sorted({agent for group in rollouts for rollout in group for agent in rollout[kind]})
    return {agent: [[rollout[kind].get(agent) for rollout in group] for group in rollouts] for agent in agents}


def _shape(run: RunFolder, recipe: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Shape:
    """The team's shape; of a run from before teams were described, its agents as far as the metrics name them."""
    if "team" in recipe:
        return Shape.of(recipe["team"])
    named = [key.split("/")[1] for line in lines[-1:] for key in line if key.startswith("completions/")]
    if not named:
        raise UserError(f"{run.path} has no metrics yet and its recipe does not describe its team; train it first")
    return Shape(agents=tuple(dict.fromkeys(named)))
