"""Whole training steps of this library, on a recipe that a random model can run: paid by the parity of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ccpo.build import prepare
from ccpo.compare.merge import laid_over
from ccpo.config import load_recipe
from ccpo.crew import Crew
from ccpo.loggers import Sinks
from ccpo.runfolder import RunFolder
from ccpo.tasks.base import Task
from ccpo.trainer import Trainer
from ccpo.types import Problem, Verdict


def parity(text: str) -> float:
    """1 for a text with an even number of sevens: a reward with spread, for a model that knows nothing."""
    return float(text.count("7") % 2 == 0)


class ParityTask:
    """The problems of another task, paid by parity; the answer is the count of sevens."""

    def __init__(self, inner: Task, problems: int | None = None) -> None:
        self.inner, self.name, self.size = inner, "parity", problems or len(inner)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        return self.inner[index]

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return [Verdict(score=parity(text), answer=str(text.count("7"))) for _, text in pairs]


TEAMS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single", "prompts": {"single": "T{problem}:"}},
    "pair": {"kind": "voting", "k": 2, "prompts": {"voter1": "T{problem}:", "voter2": "S{problem}:"}},
    "voting": {"kind": "voting", "k": 3, "prompts": {f"voter{i}": "T{problem}:" for i in (1, 2, 3)}},
    "think_solve": {
        "kind": "think_solve",
        "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="},
    },
    "chain": {
        "kind": "chain",
        "k": 3,
        "prompts": {
            "agent1": "T{problem}:",
            "agent2": "S{problem}[[:{agent1}]]=",
            "agent3": "S{problem}[[:{agent2}]]=",
        },
    },
}


class OurStep:
    """A trainer that makes one step a call. ``problems``: how many there are before they come again. ``tokens``: those of the last
    step, of all agents and counterfactuals."""

    def __init__(
        self,
        base: Path,
        folder: Path,
        team: str,
        settings: Mapping[str, Any] | None = None,
        *,
        problems: int | None = None,
    ) -> None:
        plain: dict[str, Any] = {
            "run": {"name": folder.name, "dir": str(folder)},
            "team": TEAMS[team],
            "task": {"kind": "digit_sum", "digits": [7, 7]},
            "model": {"path": str(base)},
            "credit": {"kind": "shared"},
            "rollout": {"prompts": 8, "samples": 8, "max_tokens": 32, "max_prompt_tokens": 512, "truncated": "keep"},
            "optim": {"lr": 1e-6},
            "trainer": {"steps": 10**6},
        }
        config = load_recipe(laid_over(plain, settings or {}))
        run = RunFolder(config.run.folder)
        run.create(overwrite=False)
        setup = prepare(config)
        object.__setattr__(setup, "task", ParityTask(setup.task, problems))
        paths = {agent: str(base) for agent in setup.team.agent_names}
        self.trainer = Trainer(setup, Crew(setup, paths), run, Sinks({}))
        self.metrics: dict[str, float] = {}

    def __call__(self) -> None:
        self.metrics = dict(self.trainer.train_step())

    @property
    def tokens(self) -> int:
        return int(
            sum(value for name, value in self.metrics.items() if name in ("tokens/joint", "tokens/counterfactual"))
        )
