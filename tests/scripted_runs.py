"""Runs of scripted agents: the trainer's own loop and files, with engines that say what a test wants and a learner that learns nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ccpo.alarms import Alarm
from ccpo.build import Setup, prepare
from ccpo.comm import Comm
from ccpo.config import load_recipe
from ccpo.evaluate import Exam, evaluate
from ccpo.learner.update import UpdateStats
from ccpo.loggers import Sinks
from ccpo.rollout import Limits, Voice
from ccpo.runfolder import RunFolder, write_json
from ccpo.tasks import ListTask, Task, exact_verdict
from ccpo.teams import PlayTeam, Team, describe, think_solve, voting
from ccpo.trainer import Trainer
from ccpo.types import Problem
from scripted import ScriptedEngine, by_agent, voices

PAIR = think_solve(prompts={"thinker": "thinker: {problem}", "solver": "solver: {problem}[[ | {thinker}]]"})
VOTERS = voting(3, prompts={f"voter{i}": f"voter{i}: {{problem}}" for i in (1, 2, 3)})

Say = Callable[[str, int], str]


def task_of(
    count: int = 400, verifier: Any = exact_verdict, answer: Callable[[int], str] = lambda i: "yes"
) -> ListTask:
    problems = [
        Problem(id=f"p{i}", text=f"question number {i} of the long list", answer=answer(i)) for i in range(count)
    ]
    return ListTask(name="scripted", problems=problems, verifier=verifier)


class StillLearner:
    """Trains nothing; its metrics are ``metrics`` by name."""

    def __init__(self, metrics: Mapping[str, float]) -> None:
        self.metrics = dict(metrics)

    def step(self, rows: Any, **_: Any) -> UpdateStats:
        return UpdateStats(metrics=dict(self.metrics), seconds=0.0)


class NoRemotes:
    def __bool__(self) -> bool:
        return False

    def metrics(self) -> dict[str, float]:
        return {}


class ScriptedCrew:
    def __init__(self, spoken: Mapping[str, Voice], metrics: Mapping[str, float]) -> None:
        self.spoken, self.frozen_voices, self.learner = dict(spoken), {}, StillLearner(metrics)
        self.comm, self.remotes, self.policies = Comm(), NoRemotes(), {}
        self.beside = self.comm

    def rest(self) -> None:
        pass

    def voices(self) -> dict[str, Voice]:
        return self.spoken

    def refresh(self) -> None:
        pass


def scripted_run(
    folder: Path,
    team: Team | PlayTeam,
    say: Say | Mapping[str, Voice],
    *,
    steps: int = 12,
    task: Task | None = None,
    metrics: Mapping[str, float] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    warn: Callable[[int, Alarm], None] = lambda step, alarm: None,
    max_tokens: int = 64,
    **sections: Any,
) -> RunFolder:
    """A run's folder after ``steps`` steps of 16 problems x 4 rollouts, under raw removal credit unless ``credit`` says otherwise."""
    recipe = {
        "run": {"dir": str(folder)},
        "credit": {"kind": "removal"},
        "advantage": "none",
        "rollout": {"prompts": 16, "samples": 4},
        "log": {"tensorboard": False},
    }
    config = load_recipe(recipe | sections)
    setup = prepare(config, team=team, task=task or task_of())
    spoken = say if isinstance(say, Mapping) else voices(team.agent_names, ScriptedEngine(say), max_tokens=max_tokens)
    run = RunFolder(folder)
    run.create(overwrite=False)
    write_recipe(run, setup)
    trainer = Trainer(setup, ScriptedCrew(spoken, metrics or {}), run, Sinks({}), warn=warn)
    for step in range(steps):
        before_step(step)
        run.append(run.metrics, {"step": step + 1, **trainer.train_step()})
    return run


def write_recipe(run: RunFolder, setup: Setup) -> None:
    write_json(
        run.recipe,
        {
            "config": setup.config.model_dump(),
            "team": describe(setup.team),
            "objects": {},
            "made_with": {},
            "command": [],
        },
    )


def chance(seed: int, *what: Any) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    return random.Random(f"{seed}/{what}").random()


def names(alarms: Sequence[Mapping[str, Any]]) -> set[str]:
    return {alarm["name"] for alarm in alarms}


HINTS = "yes yes go", "no no stop"


def hinting(prompt: str, seed: int) -> str:
    """A thinker that is right in 70% of the cases."""
    return f"I think of it as {HINTS[0] if chance(seed, 'hint') < 0.7 else HINTS[1]}"


def following(prompt: str, seed: int) -> str:
    """A solver that needs its thinker: 90% right after a right hint, 10% otherwise."""
    return "yes" if chance(seed, "follow") < (0.9 if HINTS[0] in prompt else 0.1) else "no"


def voter(right: float):
    return lambda prompt, seed: "yes" if chance(seed, prompt) < right else "no"


HEALTHY = by_agent({"thinker": hinting, "solver": following})
HEALTHY_VOTE = by_agent({f"voter{i}": voter(0.7) for i in (1, 2, 3)})


def examine(run: RunFolder, team: Team, say: Say, *, step: int, problems: int = 400, **exam: Any) -> None:
    """An evaluation as the trainer logs it."""
    engine = ScriptedEngine(say)
    settings = Exam(problems=problems, temperature=1.0, seed=step, **exam)
    reports = evaluate(team, {"heldout": task_of(problems)}, voices(team.agent_names, engine), Limits(), settings)
    run.append(run.evaluations, {"step": step, "tokens": 0, "reports": reports})
