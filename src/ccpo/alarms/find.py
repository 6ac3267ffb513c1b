"""The alarms of a run that is on disk: its last steps, its metrics and its evaluations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ccpo.alarms.base import WINDOW, Moments, Shape
from ccpo.alarms.findings import NEED_TEAM
from ccpo.alarms.reading import RecipeForm, read_exams, read_metrics, read_recipe
from ccpo.alarms.tally import PerAgent, tally
from ccpo.alarms.watch import Watch
from ccpo.errors import UserError
from ccpo.rollout import read_episodes
from ccpo.runfolder import RunFolder
from ccpo.types import Group

log = logging.getLogger("ccpo")

MAX_EPISODES = 512 * 2**20
"""Characters of a step's episodes, all of which are held at once; longer ones are left out."""
MISFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What counting raises where episodes are JSON and hold values of other kinds than a run writes, or are nested without end."""

Say = Callable[[str], None]


def find_alarms(folder: RunFolder | Path | str, say: Say = log.warning) -> list[dict[str, Any]]:
    """The alarms that hold at the end of what a run has written so far, warnings first.

    Each is ``{"level": "warn" | "info", "name", "title", "what", "try", "agent": str | None, "evidence": dict}``. Read are the
    metrics, the evaluations, and the episodes of the last 20 steps; what is not there is not judged. ``say`` is given a sentence for
    each step whose episodes are damaged, and where the recipe is not there, for the alarms that need it. Raises UserError for a folder
    that is no run, and for a recipe, metrics or evaluations that are not what a run writes, with the line.
    """
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    recipe, lines, exams = read_recipe(run), read_metrics(run), read_exams(run)
    if recipe is None and not lines:
        raise UserError(f"{run.recipe} does not exist; is {str(run.path)!r} the folder of a run?")
    shape, unjudged = _shape(run, recipe, lines, say)
    watch = Watch(shape, recipe.rule if recipe else "")
    for line in lines[:-WINDOW]:
        watch.remember(line["step"], tally(shape, (), {}, {}, line))
    for line in lines[-WINDOW:]:
        watch.remember(line["step"], _step(run, shape, line, say))
    found = [alarm.to_json() for alarm in watch.alarms(exams, unjudged=unjudged)]
    return sorted(found, key=lambda alarm: alarm["level"] != "warn")


def _step(run: RunFolder, shape: Shape, line: Mapping[str, Any], say: Say) -> dict[str, Moments]:
    """The moments of a step; from its metrics alone where its episodes are damaged."""
    file = run.episode_file(line["step"])
    try:
        return tally(shape, *_episodes(file), line)
    except UserError as error:
        why = str(error)
    except MISFIT as error:
        why = f"{file} does not follow the schema of episodes ({type(error).__name__}: {error})"
    say(f"The alarms leave out the episodes of step {line['step']}: {why[:500]}")
    return tally(shape, (), {}, {}, line)


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


def _shape(
    run: RunFolder, recipe: RecipeForm | None, lines: Sequence[Mapping[str, Any]], say: Say
) -> tuple[Shape, frozenset[str]]:
    """The team's shape, and the alarms that cannot be judged by it. Where no recipe describes the team that is its agents as far as the
    metrics name them."""
    if recipe is not None and recipe.team is not None:
        return Shape.of(recipe.team.model_dump()), frozenset()
    named = [key.split("/")[1] for line in lines[-1:] for key in line if key.startswith("completions/")]
    if not named:
        raise UserError(f"{run.path} has no metrics yet and no recipe that describes its team; train it first")
    why = "is not there" if recipe is None else "does not describe the team"
    say(f"{run.recipe.name} {why}: these alarms are not judged: {', '.join(sorted(NEED_TEAM))}.")
    return Shape(agents=tuple(dict.fromkeys(named))), NEED_TEAM
