"""``ccpo.train``: from a recipe to a trained team and its run folder. And how a run is opened again."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ccpo.bootstrap import bootstrap
from ccpo.build import Setup, prepare
from ccpo.config import RunConfig, load_recipe
from ccpo.crew import Crew, pick_device
from ccpo.errors import UserError
from ccpo.evaluate import headline
from ccpo.learner import find_checkpoint, verify_checkpoint
from ccpo.loggers import make_sinks
from ccpo.runfolder import RunFolder, read_json, write_json
from ccpo.teams import outline
from ccpo.trainer import Trainer


class Reporter:
    """What a run tells while it goes; the CLI has one that draws."""

    def note(self, text: str) -> None:
        """A line about what is being done."""

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where the run is, whether it reached its last step, and its summary (empty where it was stopped)."""

    folder: Path
    finished: bool
    summary: Mapping[str, Any]


def train(
    recipe: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    team: Any = None,
    task: Any = None,
    tests: Mapping[str, Any] | None = None,
    credit: Any = None,
    reporter: Reporter | None = None,
) -> Result:
    """Train a team.

    ``recipe``: a YAML file, the name of a shipped recipe, a mapping, or a :class:`RunConfig`; ``overrides`` as for the
    command line (``"trainer.steps=50"``). ``team``, ``task``, ``tests`` and ``credit`` are objects that take the
    place of what the recipe names. Raises UserError for the user's mistakes, before any model is loaded where that
    can be known, and RunFailure when a run cannot go on.
    """
    config = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, overrides)
    setup = prepare(config, team=team, task=task, tests=tests, credit=credit)
    folder = RunFolder(config.run.folder)
    pick_device(config)
    folder.create(overwrite=config.run.overwrite)
    objects = {
        k: repr(v) for k, v in {"team": team, "task": task, "tests": tests, "credit": credit}.items() if v is not None
    }
    write_json(
        folder.recipe,
        {
            "config": config.model_dump(),
            "objects": objects,
            "graph": outline(setup.team),
            "made_with": versions(),
            "commit": commit(),
            "command": sys.argv,
        },
    )
    return _train(setup, folder, reporter or Reporter(), checkpoint=None)


def resume(
    run: str | Path,
    *,
    steps: int | None = None,
    team: Any = None,
    task: Any = None,
    tests: Mapping[str, Any] | None = None,
    credit: Any = None,
    reporter: Reporter | None = None,
) -> Result:
    """Go on with a run from its newest checkpoint; ``steps`` raises its last step. Raises UserError where there is nothing to go on from."""
    folder = RunFolder(run)
    setup = open_setup(folder, steps=steps, team=team, task=task, tests=tests, credit=credit)
    checkpoint = find_checkpoint(folder.path) if folder.checkpoints.is_dir() else None
    return _train(setup, folder, reporter or Reporter(), checkpoint=checkpoint)


def open_setup(folder: RunFolder, *, steps: int | None = None, overrides: Sequence[str] = (), **objects: Any) -> Setup:
    """The setup of a run that exists, with ``overrides`` of its recipe. Objects that were passed in from Python must be passed again."""
    stored = read_json(folder.recipe)
    missing = [name for name in stored["objects"] if objects.get(name) is None]
    if missing:
        raise UserError(
            f"{folder.path} was started from Python with its own {', '.join(missing)} ({stored['objects'][missing[0]][:80]}); "
            f"go on from Python too: ccpo.resume({str(folder.path)!r}, {', '.join(f'{m}=…' for m in missing)})"
        )
    data = stored["config"]
    data["run"]["dir"] = str(folder.path)
    if steps is not None:
        data["trainer"]["steps"] = steps
    return prepare(load_recipe(data, overrides), **objects)


def _train(setup: Setup, folder: RunFolder, reporter: Reporter, *, checkpoint: Path | None) -> Result:
    config = setup.config
    clock = time.monotonic()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    paths, bootstrap_seconds = model_paths(setup, reporter)
    reporter.note("loading models")
    crew = Crew(setup, paths)
    if not config.eval.tasks and "train" in setup.tests:
        reporter.note("no eval.tasks: the team is judged on problems that it is trained on")
    sinks = make_sinks(
        folder.path,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        trackio=config.log.trackio,
        project=config.log.project,
        name=config.run.name,
        config=config.model_dump(),
    )
    show = reporter.step if config.log.progress else Reporter().step
    trainer = Trainer(setup, crew, folder, sinks, lambda step, metrics: show(step, config.trainer.steps, metrics))
    if checkpoint is not None:
        reporter.note(f"going on from {checkpoint.name}")
        trainer.load(checkpoint)
    elif (folder.path / "metrics.jsonl").exists():
        folder.rewind(0)
    started = [r for r in folder.read_lines(folder.evaluations) if r["step"] == 0]
    if not started:
        reporter.note("evaluating the team before training")
        trainer.evaluate_now(config.eval.problems, ablations=config.eval.ablations)
        started = [r for r in folder.read_lines(folder.evaluations) if r["step"] == 0]
    try:
        finished = trainer.run()
    finally:
        sinks.close()
    if not finished:
        return Result(folder=folder.path, finished=False, summary={})
    reporter.note("evaluating the team after training")
    trainer.evaluate_now(config.eval.problems, ablations=config.eval.ablations)
    ended = folder.read_lines(folder.evaluations)[-1]["reports"]
    summary = {
        "name": config.run.name,
        "steps": trainer.step,
        **headline(started[0]["reports"], setup.team, "before"),
        **headline(ended, setup.team, "after"),
        "tokens_joint": trainer.totals["joint"],
        "tokens_counterfactual": trainer.totals["counterfactual"],
        "tokens_rating": trainer.totals["rating"],
        "seconds_bootstrap": round(bootstrap_seconds, 2),
        "seconds_training": round(trainer.totals["seconds"], 2),
        "seconds_total": round(time.monotonic() - clock, 2),
        "datasets": ended,
        "seed": config.run.seed,
        "made_with": versions(),
    }
    write_json(folder.summary, summary)
    return Result(folder=folder.path, finished=True, summary=summary)


def model_paths(setup: Setup, reporter: Reporter) -> tuple[dict[str, str], float]:
    """The model of each agent, and the seconds spent on making a tiny base where one was asked for and not cached."""
    config = setup.config
    wanted = {
        name: (config.agents[name].model if name in config.agents and config.agents[name].model else config.model.path)
        for name in setup.team.agent_names
    }
    if "bootstrap" not in wanted.values():
        return wanted, 0.0
    folder, seconds = bootstrap(setup.team, setup.task, config.bootstrap, reporter.note)
    return {name: str(folder) if path == "bootstrap" else path for name, path in wanted.items()}, seconds


def versions() -> dict[str, str]:
    """Versions of what shaped a run."""
    found = {"python": platform.python_version()}
    for package in ("ccpo", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the repository in the current folder, with ``-dirty`` where files differ from it; None where there is none."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a repository too large to look through
        return None
    return done.stdout.strip() or None


def open_crew(run: str | Path, **objects: Any) -> tuple[Setup, Crew, Path]:
    """A trained run's setup and crew, loaded from its newest checkpoint, for evaluation and chat."""
    folder = RunFolder(run)
    setup = open_setup(folder, **objects)
    crew, checkpoint = load_crew(setup, folder)
    return setup, crew, checkpoint


def load_crew(setup: Setup, folder: RunFolder) -> tuple[Crew, Path]:
    """The crew of a run's newest checkpoint, without a learner. Raises UserError where there is none."""
    checkpoint = find_checkpoint(folder.path)
    if checkpoint is None:
        raise UserError(f"{folder.path} has no checkpoint yet; train it first (ccpo train --resume {folder.path})")
    verify_checkpoint(checkpoint)
    return Crew(setup, checkpoint_paths(setup, checkpoint), train=False), checkpoint


def checkpoint_paths(setup: Setup, checkpoint: Path) -> dict[str, str]:
    return {agent: str(checkpoint / "policies" / policy) for agent, policy in setup.policy_of.items()}
