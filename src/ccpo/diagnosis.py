"""``ccpo diagnose``: opens a run or a recipe and hands its team to the probes of :mod:`ccpo.diagnose`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccpo import credit as credit_rules
from ccpo.build import Setup, branch_of, build_part, prepare
from ccpo.config import Part, RunConfig, load_recipe
from ccpo.credit.base import one_of
from ccpo.crew import DTYPES, Crew, policy_loss
from ccpo.diagnose import Contender, Effort, Subject, probe_variance
from ccpo.diagnose.free_riding import Thoroughness, measure_free_riding
from ccpo.diagnose.log_free_riding import free_riding_of_log
from ccpo.diagnose.logged import read_log
from ccpo.errors import UserError
from ccpo.families import compute_dtype
from ccpo.learner.objective import Objective
from ccpo.pay import Payroll
from ccpo.remotes import reach
from ccpo.rollout import Voice
from ccpo.runfolder import RunFolder, write_json
from ccpo.runs import Reporter, load_crew, model_paths, open_setup
from ccpo.tasks import Task
from ccpo.teams import PlayTeam

Note = Callable[[str], None]
Source = str | Path | Mapping[str, Any]
"""A run's folder, or a recipe: a file, a shipped recipe's name, a mapping."""


def variance(
    source: Source,
    *,
    rules: Sequence[str] = (),
    advantage: str | None = None,
    overrides: Sequence[str] = (),
    effort: Effort | None = None,
    note: Note = lambda text: None,
    **objects: Any,
) -> dict[str, Any]:
    """The report of :func:`ccpo.diagnose.probe_variance` on a run's newest checkpoint, or on a recipe as it starts.

    ``rules``: names of credit rules, each with an estimator if wanted (``removal/none``); default: shared reward, the recipe's
    rule and those that cost nothing more. ``advantage``: the estimator of those without. ``objects``: as for
    :func:`ccpo.train`. Raises UserError for the user's mistakes, before any model is loaded where that can be known.
    """
    setup, folder = open_source(source, overrides, **objects)
    rivals = contenders(setup, rules, advantage)
    return probe_variance(load_subject(setup, folder, note), rivals, effort or Effort(), note)


def free_riding(
    source: str | Path,
    *,
    data: Task | None = None,
    effort: Thoroughness | None = None,
    overrides: Sequence[str] = (),
    note: Note = lambda text: None,
    **objects: Any,
) -> dict[str, Any]:
    """What each agent contributes: of a run's folder, played on its held-out problems (or ``data``) with its newest weights, or of a file of
    logged episodes, from what is in it. The report (``docs/free-riding.md``) of a run is also written to its ``free_riding.json``.

    Raises UserError for what is neither, and for a log that cannot be read.
    """
    effort = effort or Thoroughness()
    if Path(source).is_file():
        return free_riding_of_log(read_log(Path(source)), effort.half_width)
    if not Path(source).is_dir():
        raise UserError(f"{source} is neither a run's folder nor a file of episodes")
    folder = RunFolder(source)
    setup = open_setup(folder, overrides=overrides, **objects)
    if setup.config.run.threads is not None:
        torch.set_num_threads(setup.config.run.threads)
    crew, checkpoint = load_crew(setup, folder)
    name, task = next(iter(setup.tests.items())) if data is None else (data.name, data)
    report = measure_free_riding(
        setup.team, task, crew.voices(), setup.limits, effort, seed=setup.config.run.seed, note=note
    )
    report = {**report, "source": str(folder.path), "checkpoint": checkpoint.name, "data": name}
    write_json(folder.path / "free_riding.json", report)
    return report


def open_source(source: Source, overrides: Sequence[str] = (), **objects: Any) -> tuple[Setup, RunFolder | None]:
    """The setup of a run's folder, or of a recipe (then there is no folder)."""
    if not isinstance(source, Mapping) and Path(source).is_dir():
        folder = RunFolder(source)
        return open_setup(folder, overrides=overrides, **objects), folder
    return prepare(load_recipe(source, overrides), **objects), None


def load_subject(setup: Setup, folder: RunFolder | None, note: Note = lambda text: None) -> Subject:
    """The team with its weights: those of the run's newest checkpoint, or those that the recipe starts from."""
    config = setup.config
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    reporter = Reporter()
    reporter.note = note
    if folder is None:
        reach(config, setup.team.agent_names)
        crew = Crew(setup, model_paths(setup, reporter)[0], train=False)
    else:
        crew, _ = load_crew(setup, folder)
    return Subject(
        name=str(folder.path) if folder is not None else f"{config.run.name} at its start",
        team=setup.team,
        task=setup.task,
        voices=crew.voices(),
        policies=crew.policies,
        objective=_objective(config),
        active=setup.schedule.agents,
        prompts=config.rollout.prompts,
        samples=config.rollout.samples,
        draws=config.rollout.draws,
        limits=setup.limits,
        removal=setup.removal,
        placeholder=config.rollout.placeholder,
        frozen=_frozen(setup, crew, folder, reporter) if config.rollout.removal == "frozen" else {},
        seed=config.run.seed,
        free_removals=setup.free_removals,
        compute=DTYPES[config.model.compute]
        or (torch.float32 if crew.device.type == "cpu" else compute_dtype(crew.device)),
    )


def _frozen(setup: Setup, crew: Crew, folder: RunFolder | None, reporter: Reporter) -> dict[str, Voice]:
    """The voices of the policies as the run started: what removal by ``frozen`` puts in an agent's place."""
    start = crew if folder is None else Crew(setup, model_paths(setup, reporter)[0], train=False)
    return {agent: replace(voice, policy=f"{voice.policy}@start") for agent, voice in start.voices().items()}


def _objective(config: RunConfig) -> Objective:
    """The recipe's policy loss alone: KL and entropy are no part of the credit's gradient."""
    return Objective(**policy_loss(config))


def contenders(setup: Setup, names: Sequence[str], advantage: str | None = None) -> list[Contender]:
    """The rules of ``names``. The recipe's own rule keeps its settings, others have their defaults. Raises UserError for an unknown
    rule or estimator, and for a name given twice."""
    chosen = list(names or _default(setup))
    twice = next((name for name in chosen if chosen.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"rule {twice!r} is named twice; name each once, or with different estimators: {twice}/none")
    return [_contender(setup, name, advantage) for name in chosen]


def _default(setup: Setup) -> list[str]:
    """Shared reward first, then what the graph offers, then the recipe's rule."""
    votes = setup.team.decider is None and not isinstance(setup.team, PlayTeam)
    offered = ["shared", "removal", *(["own"] if votes else []), "auto", setup.config.credit.kind]
    own = setup.config.credit.kind
    return list(dict.fromkeys(name for name in offered if name in credit_rules.RULES or name == own))


def _contender(setup: Setup, name: str, advantage: str | None) -> Contender:
    config = setup.config
    kind, _, ending = name.rpartition("/")
    kind, estimator = (kind, ending) if ending in credit_rules.ESTIMATORS else (name, advantage)
    own = kind == config.credit.kind
    rule = setup.rule if own else build_part(credit_rules.RULES, Part(kind=kind), "rules")
    if estimator is None:
        # a rule with an estimator of its own has it, unless it is the recipe's rule and the recipe says otherwise
        fallback = config.advantage if config.advantage != "auto" else "grpo"
        declared = getattr(rule, "estimator", fallback)
        estimator = fallback if own and config.advantage != "auto" else declared
    one_of("advantage", estimator, credit_rules.ESTIMATORS)
    payroll = Payroll(
        estimator=estimator,
        skip_flat=getattr(rule, "skip_flat", False),
        boxed_reward=config.rollout.boxed_reward,
    )
    return Contender(name=name, rule=rule, payroll=payroll, branch=branch_of(config, setup.team, rule))
