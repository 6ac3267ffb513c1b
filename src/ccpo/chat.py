"""One question to a trained team."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ccpo.errors import UserError
from ccpo.rollout import Ask, play_team
from ccpo.runs import open_crew
from ccpo.types import Problem, Rollout


def ask(run: str | Path, question: str, *, temperature: float = 0.0, seed: int = 0) -> Rollout:
    """The team's rollout on ``question``. There is no reference answer, so its reward means nothing. Raises UserError."""
    if not question.strip():
        raise UserError("the question is empty")
    setup, crew, _ = open_crew(run)
    voices = {a: replace(v, sampling=replace(v.sampling, temperature=temperature)) for a, v in crew.voices().items()}
    sample = setup.task[0]
    problem = Problem(id="chat", text=question, answer=sample.answer, source=sample.source, meta=sample.meta)
    played = play_team(setup.team, setup.task, voices, setup.limits, [problem], Ask(samples=1), seed=seed, step=0)
    return played.groups[0].rollouts[0]
