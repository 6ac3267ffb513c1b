"""What a task is: problems by index, and verdicts in batches."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ccpo.errors import UserError
from ccpo.types import Problem, Verdict, VerdictStatus

Pair = tuple[Problem, str]


@runtime_checkable
class Task(Protocol):
    """Problems and their verifier. ``task[i]`` is the same problem whenever it is asked for; verdicts come in the
    pairs' order.

    A task may also have ``process(triples) -> scores``: for each (problem, turn's name, text) a process reward in [0, 1], or None
    for a turn that it does not judge. Recipes ask for it with ``process: WEIGHT``.
    """

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]: ...


@runtime_checkable
class Verifier(Protocol):
    """``(problem, text) -> Verdict``. One that also has ``verify_many(pairs)`` is given whole batches."""

    def __call__(self, problem: Problem, text: str) -> Verdict: ...


@dataclass(frozen=True, kw_only=True)
class ListTask:
    """Problems in a list and one verifier for all of them. ``skipped_rows`` counts the broken rows that were left
    out.
    """

    name: str
    problems: Sequence[Problem]
    verifier: Verifier
    skipped_rows: int = 0

    def __post_init__(self) -> None:
        if not self.problems:
            raise UserError(f"task {self.name!r} has no problems; a task needs at least one")

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self.problems):
            raise IndexError(index)
        return self.problems[index]

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return verify_all(self.verifier, pairs)


def verify_all(verifier: Verifier, pairs: Sequence[Pair]) -> list[Verdict]:
    """Verdicts in the pairs' order; the same text on the same problem is judged once.

    A verifier of the user's own that raises gives ``VerdictStatus.ERROR`` and score 0, with a warning: one odd text
    must not end a run. Raises UserError where a verifier returns something other than a Verdict with a score in [0,
    1].
    """
    distinct: dict[tuple[str, str, str], Pair] = {}
    keys = []
    for problem, text in pairs:
        key = (problem.id, problem.answer, text)
        distinct.setdefault(key, (problem, text))
        keys.append(key)
    judge: Callable[[Sequence[Pair]], list[Verdict]] = getattr(verifier, "verify_many", None) or _one_by_one(verifier)
    verdicts = judge(list(distinct.values()))
    by_key = {key: _checked(verifier, verdict) for key, verdict in zip(distinct, verdicts, strict=True)}
    return [by_key[key] for key in keys]


def limited(task: Task, seconds: float) -> Task:
    """The task with ``seconds`` as the time limit of one verdict, where it or its verifier has one; else the task
    itself.
    """
    if _has_field(task, "seconds"):
        return dataclasses.replace(task, seconds=seconds)
    if _has_field(task, "verifier") and _has_field(task.verifier, "seconds"):
        return dataclasses.replace(task, verifier=dataclasses.replace(task.verifier, seconds=seconds))
    return task


def _has_field(thing: Any, name: str) -> bool:
    return dataclasses.is_dataclass(thing) and name in {f.name for f in dataclasses.fields(thing)}


def _one_by_one(verifier: Verifier) -> Callable[[Sequence[Pair]], list[Verdict]]:
    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        verdicts = []
        for problem, text in pairs:
            try:
                verdicts.append(verifier(problem, text))
            except Exception as error:
                warnings.warn(
                    f"the verifier {_called(verifier)} raised {type(error).__name__} on {problem.id!r}: {error}",
                    stacklevel=2,
                )
                verdicts.append(Verdict(score=0.0, answer=None, status=VerdictStatus.ERROR))
        return verdicts

    return judge


def _checked(verifier: Verifier, verdict: Verdict) -> Verdict:
    if not isinstance(verdict, Verdict):
        raise UserError(f"the verifier {_called(verifier)} returned {verdict!r}; it must return a ccpo.types.Verdict")
    if not (math.isfinite(verdict.score) and 0.0 <= verdict.score <= 1.0):
        raise UserError(f"the verifier {_called(verifier)} gave the score {verdict.score}; a score lies in [0, 1]")
    return verdict


def _called(verifier: Verifier) -> str:
    return getattr(verifier, "__name__", type(verifier).__name__)
