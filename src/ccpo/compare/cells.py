"""From a study to its cells: one complete, checked recipe for each method × task × seed × grid point."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ccpo.build import Setup, prepare
from ccpo.compare.drift import relied_on
from ccpo.compare.merge import at, laid_over
from ccpo.compare.study import Grid, Study
from ccpo.config import RunConfig, load_recipe
from ccpo.errors import UserError
from ccpo.tasks import TASKS, ProceduralTask
from ccpo.teams import Team

EPOCH = 1
"""Raise it when the training code changes what a recipe gives. A cell's fingerprint is made of its recipe and this number, and not of
the commit: most commits change no result, and a study is hours of work. (Changed defaults are noticed by themselves: drift.py.)"""

Point = dict[str, Any]
"""A grid point or the value of a sweep: values by key of the recipe."""
Chosen = Mapping[tuple[str, str], Point | None]
"""The grid point of each (method, task); None where tuning has not decided yet."""

OWNED = (
    *("run.name", "run.dir", "run.seed", "run.threads", "run.overwrite"),
    *("trainer.tokens", "trainer.eval_every", "trainer.save_every", "trainer.keep_checkpoints"),
    *("eval.every_tokens", "eval.problems", "eval.samples", "eval.temperature", "eval.ablations", "log"),
)
"""Keys that the study sets itself."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: its recipe (all but names of folders), its exam, and ``fingerprint``, which two cells share only where they are the same run."""

    task: str
    method: str
    seed: int
    point: Point
    recipe: dict[str, Any]
    ood: dict[str, Any] | None
    exam: dict[str, Any]
    fingerprint: str

    @property
    def id(self) -> str:
        return f"{self.task}.{self.method}.s{self.seed}.{self.fingerprint[:12]}"


def tune_cells(study: Study) -> dict[tuple[str, str], list[tuple[Point, list[Cell]]]]:
    """By (method, task) that is tuned: each grid point with its cells."""
    if study.tune is None:
        return {}
    return {
        (method, task): [
            (point, [make_cell(study, method, task, s, point) for s in study.tune.seeds]) for point in grid
        ]
        for method, task in study.applies()
        if (grid := points(grid_of(study, method, task)))
    }


def main_cells(study: Study, chosen: Chosen) -> list[Cell]:
    """The headline pair first. Within it, and within the rest, seeds outermost, so that a study that is stopped has every method at few
    seeds rather than few methods at every seed."""
    cells = []
    for pairs in by_headline(study):
        most = max((len(study.seeds_of(method)) for method, _ in pairs), default=0)
        for place in range(most):
            for method, task in pairs:
                seeds, point = study.seeds_of(method), chosen[method, task]
                if place < len(seeds) and point is not None:
                    cells.append(make_cell(study, method, task, seeds[place], point))
    return cells


def by_headline(study: Study) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(method, task) of the headline pair, and of the rest."""
    first = [pair for pair in study.applies() if pair[0] in (study.headline or ())]
    return first, [pair for pair in study.applies() if pair not in first]


def sweep_cells(study: Study, chosen: Chosen) -> dict[str, list[tuple[Any, list[Cell]]]]:
    """By sweep: each value with its cells. A value that the method was tuned to shares its cells with the main results."""
    found = {}
    for name, sweep in study.sweeps.items():
        point = chosen[sweep.method, sweep.task]
        if point is None:
            continue
        found[name] = [
            (value, [make_cell(study, sweep.method, sweep.task, s, point, {sweep.key: value}) for s in sweep.seeds])
            for value in sweep.values
        ]
    return found


def grid_of(study: Study, method: str, task: str) -> Grid:
    """The grid that a method is tuned over on a task: its own, else the task's, else the study's; empty where it is not tuned."""
    spec = study.methods[method]
    if study.tune is None or not spec.train or not spec.tune:
        return {}
    own, of_task = spec.grid, study.tasks[task].grid
    return own if own is not None else of_task if of_task is not None else study.tune.grid


def points(grid: Grid) -> list[Point]:
    """Every combination of a grid's values; none for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []


def make_cell(study: Study, method: str, task: str, seed: int, point: Point, swept: Point | None = None) -> Cell:
    data = recipe_of(study, method, task, {**point, **(swept or {})})
    data = laid_over(data, {"run": {"seed": seed, "threads": 1}})
    config = load_recipe(data)
    ood = ood_part(study, task, data)
    exam = study.exam.of(single=study.methods[method].single)
    shaping = config.model_dump(exclude_unset=True, exclude={"run": {"name", "dir", "overwrite"}, "log": True})
    identity = json.dumps([EPOCH, shaping, ood, exam, relied_on(study.drift, config)], sort_keys=True, default=str)
    return Cell(
        task=task,
        method=method,
        seed=seed,
        point={**point, **(swept or {})},
        recipe=data,
        ood=ood,
        exam=exam,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )


def recipe_of(study: Study, method: str, task: str, point: Point) -> dict[str, Any]:
    """The recipe of a method on a task: base, task, the task's ``single`` for a single agent, the method, its ``on`` for this
    task, the grid point; and what the study itself sets."""
    spec, field = study.methods[method], study.tasks[task]
    layers = [study.base, field.recipe, *([field.single] if spec.single else []), spec.set, spec.by_task.get(task, {})]
    layers += [at(key.strip(), value) for keys, value in point.items() for key in keys.split(",")]
    data: dict[str, Any] = {}
    for layer in layers:
        data = laid_over(data, layer)
    budget: dict[str, Any] = {"tokens": field.tokens} if spec.train else {"steps": 0}
    during = data.get("eval", {}).get("during", 200)
    return laid_over(
        data,
        {
            "trainer": {**budget, "save_every": 0},
            "eval": {"problems": during, "samples": 1, "temperature": study.exam.temperature, "ablations": False}
            | ({"every_tokens": field.interval} if spec.train else {}),
            "log": {"tensorboard": False, "episodes": False, "progress": True},
        },
    )


def ood_part(study: Study, task: str, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The out-of-distribution set as a part of a recipe; of a procedural task its test split."""
    changes = study.tasks[task].ood
    if changes is None:
        return None
    part = laid_over({"task": data.get("task")}, {"task": changes})["task"]
    maker = TASKS.get(part.get("kind"))
    if isinstance(maker, type) and issubclass(maker, ProceduralTask):
        part.setdefault("split", "test")
    return part


# --- the check before anything runs ------------------------------------------------------------------------------------------


def check(study: Study) -> None:
    """Refuse a study with an unknown kind, key or value anywhere, with duplicate cells, or with a budget too small for one step.

    Raises UserError; nothing has run by then, and no model has been loaded.
    """
    _check_owned(study)
    for method, task in study.applies():
        _check_twice(f"the grid of method {method!r} on task {task!r}", points(grid_of(study, method, task)))
    for name, sweep in study.sweeps.items():
        _check_twice(f"sweeps.{name}.values", sweep.values)
    owner: dict[str, str] = {}
    for method, task in study.applies():
        grid = points(grid_of(study, method, task)) or [{}]
        for point in grid:
            cell = _check_cell(study, method, task, point)
            other = owner.setdefault(cell.fingerprint, method)
            if other != method:
                raise UserError(
                    f"duplicate cells: the methods {other!r} and {method!r} are the same recipe on task {task!r}; remove one, or let its "
                    "`set` make a difference"
                )
        for name, sweep in study.sweeps.items():
            if (sweep.method, sweep.task) == (method, task):
                for value in sweep.values:
                    _check_cell(study, method, task, {**grid[0], sweep.key: value}, f"sweeps.{name}: ")


def _check_owned(study: Study) -> None:
    places = {"base": study.base}
    for name, task in study.tasks.items():
        places |= {f"tasks.{name}.recipe": task.recipe, f"tasks.{name}.single": task.single}
    for name, method in study.methods.items():
        places[f"methods.{name}.set"] = method.set
        places |= {f"methods.{name}.by_task.{task}": nested for task, nested in method.by_task.items()}
    for where, nested in places.items():
        for key in OWNED:
            found: Any = nested
            for step in key.split("."):
                found = found.get(step) if isinstance(found, Mapping) else None
            if found is not None:
                raise UserError(
                    f"{where}.{key}: the study sets this key itself (tasks.NAME.tokens, tasks.NAME.every, seeds, exam); remove it"
                )


def _check_twice(where: str, values: Iterable[Any]) -> None:
    seen: list[Any] = []
    for value in values:
        if value in seen:
            raise UserError(f"duplicate cells: {where} has {value!r} twice")
        seen.append(value)


def _check_cell(study: Study, method: str, task: str, point: Point, where: str = "") -> Cell:
    place = f"{where}method {method!r} on task {task!r}" + (f" at {point}" if point else "")
    try:
        cell = make_cell(study, method, task, 0, point)
        setup = setup_of(cell)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    budget, least = study.tasks[task].tokens, fewest_tokens(setup)
    if study.methods[method].train and budget < least:
        raise UserError(
            f"{place}: the budget tasks.{task}.tokens is {budget}, but one step takes at least {least} tokens "
            f"({setup.config.rollout.prompts} problems, a token a turn); raise it"
        )
    return cell


def setup_of(cell: Cell) -> Setup:
    """The objects of a cell's recipe; its ``tests`` are the held-out set and ``ood``. Raises UserError."""
    config = load_recipe(cell.recipe)
    setup = prepare(config)
    name, heldout = next(iter(setup.tests.items()))
    tests = {name: heldout}
    if cell.ood is not None:
        data = laid_over(cell.recipe, {"eval": {"tasks": {}}})
        data["eval"]["tasks"] = {"ood": cell.ood}
        tests["ood"] = prepare(load_recipe(data)).tests["ood"]
    return replace(setup, tests=tests)


def fewest_tokens(setup: Setup) -> int:
    """The fewest tokens that one step can take: one for each turn of each joint rollout; rollouts of a tree share turns, so one each."""
    config: RunConfig = setup.config
    if setup.branch == "auto":
        return config.rollout.prompts
    if setup.branch:
        return config.rollout.prompts * math.prod(setup.branch)
    return (
        config.rollout.prompts * config.rollout.samples * (len(setup.team.turns) if isinstance(setup.team, Team) else 1)
    )
