"""``ccpo.train``: from a recipe to a trained team and its run folder. And how a run is opened again."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ccpo.alarms import Alarm
from ccpo.bootstrap import bootstrap
from ccpo.build import Setup, is_remote, prepare, rating_lessons_of
from ccpo.comm import Comm, connect
from ccpo.config import RunConfig, load_recipe
from ccpo.crew import Crew, pick_device
from ccpo.errors import UserError
from ccpo.evaluate import headline
from ccpo.kernels.compiled import instructions, why_not
from ccpo.learner import find_checkpoint, verify_checkpoint
from ccpo.learner.lora import check_targets
from ccpo.loggers import Sinks, make_sinks
from ccpo.remotes import reach
from ccpo.runfolder import RunFolder, read_json
from ccpo.tasks.sharded import ShardedTask
from ccpo.teams import describe
from ccpo.trainer import Trainer


class Reporter:
    """What a run tells while it goes; the CLI has one that draws."""

    def note(self, text: str) -> None:
        """A line about what is being done."""

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""

    def alarm(self, step: int, alarm: Alarm) -> None:
        """Something is going wrong. Told once in a run for each alarm and agent."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where the run is, whether it reached its last step, and its summary (empty where it was stopped). ``first``: whether this is the
    rank that writes and speaks."""

    folder: Path
    finished: bool
    summary: Mapping[str, Any]
    first: bool = True


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
    objects = {"team": team, "task": task, "tests": tests, "credit": credit}
    config = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, overrides)
    with connect(cuda=pick_device(config).type == "cuda") as comm:
        folder = RunFolder(config.run.folder, writes=comm.first)

        def begin() -> Setup:
            setup = prepare(config, **objects)
            check_ranks(config, comm.size)
            if comm.first:
                reach(config, setup.team.agent_names)
            folder.create(overwrite=config.run.overwrite)
            given = {name: repr(value) for name, value in objects.items() if value is not None}
            made = {
                "config": config.model_dump(),
                "team": describe(setup.team),
                "objects": given,
                "made_with": versions(),
                "commit": commit(),
                "command": sys.argv,
            }
            folder.write(folder.recipe, made)
            return setup

        return _train(comm, comm.together(begin), folder, reporter, resumed=False)


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
    objects = {"team": team, "task": task, "tests": tests, "credit": credit}
    setup = open_setup(RunFolder(run), steps=steps, **objects)
    with connect(cuda=pick_device(setup.config).type == "cuda") as comm:
        comm.together(lambda: check_ranks(setup.config, comm.size))
        comm.first_alone(lambda: reach(setup.config, setup.team.agent_names))
        return _train(comm, setup, RunFolder(run, writes=comm.first), reporter, resumed=True)


def begin_or_go_on(
    recipe: str | None,
    overrides: Sequence[str],
    run: Path,
    *,
    steps: int | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """For launchers that start workers again: :func:`train` the recipe into ``run``, or :func:`resume` what an earlier start (or, without
    a recipe, an earlier run) has left there. All ranks do the same."""
    with connect(cuda=torch.cuda.is_available()) as comm:
        if recipe is None or comm.any(comm.first and (run / "recipe.json").is_file()):
            return resume(run, steps=steps, reporter=reporter)
        return train(recipe, [*overrides, f"run.dir={run}", "run.overwrite=false"], reporter=reporter)


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


def _train(comm: Comm, setup: Setup, folder: RunFolder, speaker: Reporter | None, *, resumed: bool) -> Result:
    reporter = speaker if speaker and comm.first else Reporter()
    config = setup.config
    clock = time.monotonic()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    paths, bootstrap_seconds = comm.in_order(lambda: model_paths(setup, reporter))
    beside = comm.beside() if config.trainer.async_depth else comm
    if comm.size > 1:
        setup = shared_out(setup, beside)
    reporter.note("loading models")
    crew = Crew(setup, paths, comm=comm, beside=beside)
    if not config.eval.tasks and "train" in setup.tests:
        reporter.note("no eval.tasks: the team is judged on problems that it is trained on")
    sinks = _sinks(config, folder)
    show = reporter.step if config.log.progress else Reporter().step
    trainer = Trainer(
        setup, crew, folder, sinks, lambda step, metrics: show(step, config.trainer.steps, metrics), reporter.alarm
    )
    checkpoint = find_checkpoint(folder.path) if resumed and folder.checkpoints.is_dir() else None
    if checkpoint is not None:
        reporter.note(f"going on from {checkpoint.name}")
        trainer.load(checkpoint)
    elif folder.metrics.exists():
        folder.rewind(0)
    try:
        if comm.any(comm.first and not folder.evaluated(0)):
            reporter.note("evaluating the team before training")
            trainer.examine()
        finished = trainer.run()
        if finished:
            reporter.note("evaluating the team after training")
            trainer.examine()
    finally:
        trainer.tell()
        sinks.close()
    if not finished:
        return Result(folder=folder.path, finished=False, summary={}, first=comm.first)
    if not comm.first:
        return Result(folder=folder.path, finished=True, summary={}, first=False)
    ended = folder.read_lines(folder.evaluations)[-1]["reports"]
    summary = {
        "name": config.run.name,
        "steps": trainer.step,
        **headline(folder.evaluated(0)[0]["reports"], setup.team, "before"),
        **headline(ended, setup.team, "after"),
        "tokens_joint": trainer.totals["joint"],
        "tokens_counterfactual": trainer.totals["counterfactual"],
        "tokens_rating": trainer.totals["rating"],
        "seconds_bootstrap": round(bootstrap_seconds, 2),
        "seconds_training": round(trainer.totals["seconds"], 2),
        "seconds_total": round(time.monotonic() - clock, 2),
        "datasets": ended,
        "seed": config.run.seed,
        "ranks": comm.size,
        "made_with": versions(),
    }
    folder.write(folder.summary, summary)
    return Result(folder=folder.path, finished=True, summary=summary)


def _sinks(config: RunConfig, folder: RunFolder) -> Sinks:
    if not folder.writes:
        return Sinks({})
    return make_sinks(
        folder.path,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        trackio=config.log.trackio,
        project=config.log.project,
        name=config.run.name,
        config=config.model_dump(),
    )


def shared_out(setup: Setup, comm: Comm) -> Setup:
    """The setup of one of several ranks: verdicts are shared out among them."""
    tests = {name: ShardedTask(task, comm) for name, task in setup.tests.items()}
    return replace(setup, task=ShardedTask(setup.task, comm), tests=tests)


def check_launch(source: str | Path, overrides: Sequence[str], ranks: int, *, here: bool) -> RunConfig:
    """The recipe of a run of ``ranks`` processes (``here``: of this machine), with its folder made. What is wrong with it raises here,
    before any is started, the UserError that they would."""
    fresh = not isinstance(source, Path)
    config = load_recipe(source, overrides) if fresh else open_setup(RunFolder(source)).config
    if fresh:
        prepare(config)
    check_ranks(config, ranks)
    if here and pick_device(config).type == "cuda" and ranks > torch.cuda.device_count():
        raise UserError(
            f"--launch asks for {ranks} processes, one for each GPU, but this machine has {torch.cuda.device_count()}; ask for fewer"
        )
    if fresh:
        RunFolder(config.run.folder).create(overwrite=config.run.overwrite)
    return config


def check_ranks(config: RunConfig, ranks: int) -> None:
    """Raises UserError for more ranks than a step has problems, and for what only one process can do."""
    if ranks > 1 and config.trainer.async_depth:
        remote = next((f"agents.{a}.remote" for a, section in config.agents.items() if section.remote), None)
        beside = remote or ("model.engine: vllm" if config.model.engine == "vllm" else None)
        if beside is not None:
            raise UserError(
                f"{beside} with trainer.async_depth: 1 goes with one process so far, and there are {ranks}; leave one of the two out, or --launch"
            )
    prompts = config.rollout.prompts
    if ranks > prompts:
        raise UserError(
            f"there are {ranks} processes, but a step has only rollout.prompts = {prompts} problems; start at most {prompts}, or raise "
            "rollout.prompts"
        )


def model_paths(setup: Setup, reporter: Reporter) -> tuple[dict[str, str], float]:
    """The model of each agent, and the seconds spent on making a tiny base where one was asked for and not cached."""
    config = setup.config
    wanted = {
        name: (config.agents[name].model if name in config.agents and config.agents[name].model else config.model.path)
        for name in setup.team.agent_names
        if not is_remote(config, name)
    }
    if "bootstrap" not in wanted.values():
        return wanted, 0.0
    folder, seconds = bootstrap(
        setup.team,
        setup.task,
        config.bootstrap,
        reporter.note,
        ratings=rating_lessons_of(setup),
        check=_adapters_fit(config),
    )
    return {name: str(folder) if path == "bootstrap" else path for name, path in wanted.items()}, seconds


def _adapters_fit(config: RunConfig) -> Callable[[Any], None] | None:
    """Refuses, with a UserError, a base model that has no place for the adapters asked for."""
    if config.model.sharing != "lora":
        return None
    return lambda model: check_targets(model, **config.model.lora.model_dump())


def versions() -> dict[str, str]:
    """Versions of what shaped a run, and what multiplied where C code did."""
    found = {"python": platform.python_version(), "c_code": instructions() if why_not() is None else "not used"}
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
    reach(setup.config, setup.team.agent_names)
    return Crew(setup, checkpoint_paths(setup, checkpoint), train=False), checkpoint


def checkpoint_paths(setup: Setup, checkpoint: Path) -> dict[str, str]:
    local = {a: policy for a, policy in setup.policy_of.items() if not is_remote(setup.config, a)}
    return {agent: str(checkpoint / "policies" / policy) for agent, policy in local.items()}
