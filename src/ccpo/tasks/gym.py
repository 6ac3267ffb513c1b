"""All data sets of reasoning-gym, each with its own scorer; partial credit is kept."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ccpo.errors import RunFailure, UserError, nearest
from ccpo.tasks.base import Pair, verify_all
from ccpo.tasks.extract import LONGEST_ANSWER, same
from ccpo.tasks.sandbox import Outcome, run_shared, shared
from ccpo.tasks.verifiers import gym_answer
from ccpo.types import Problem, Verdict, VerdictStatus

MAKE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class GymTask:
    """``size`` problems of reasoning-gym's ``dataset``; ``config`` holds the data set's own options. Another
    ``seed`` is another stream, so that a held-out set is the same task with another seed.

    Problems are made one by one when they are asked for, in the sandbox where they are scored, since some scorers
    evaluate what they are given. Raises UserError if reasoning-gym is not installed, for an unknown data set, and
    for options that it refuses.
    """

    dataset: str
    size: int = 1000
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"task.size is {self.size}; a task needs at least one problem")
        names = gym_names()
        if self.dataset not in names:
            raise UserError(
                f"reasoning-gym has no data set {self.dataset!r}; it has {', '.join(names)}."
                + nearest(self.dataset, names)
            )
        try:
            json.dumps(self.config, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"task.config of {self.dataset!r} must be plain numbers, strings, lists and mappings: {error}"
            ) from None
        checked = self._ask("check")
        if checked.status is not VerdictStatus.OK:
            raise UserError(
                f"reasoning-gym's {self.dataset!r} refuses size {self.size} with {self.config or 'no options'}: "
                f"{checked.detail}"
            )

    @property
    def name(self) -> str:
        return self.dataset

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(index)
        made = self._ask("make", index=index)
        if made.status is not VerdictStatus.OK:
            raise RunFailure(
                f"reasoning-gym's {self.dataset!r} could not make problem {index} of seed {self.seed}: {made.detail}"
            )
        return Problem(
            id=f"{self.dataset}-{self.seed}-{index}",
            text=made.value["question"],
            answer=made.value["answer"] or "",
            source=f"reasoning_gym/{self.dataset}",
            meta={**self._spec(), "index": index},
        )

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return verify_all(GymVerifier(seconds=self.seconds), pairs)

    def _spec(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "seed": self.seed, "size": self.size, "config": self.config}

    def _ask(self, do: str, **more: Any) -> Outcome:
        return shared("gym").run([{"do": do, **self._spec(), **more}], MAKE_SECONDS)[0]


@dataclass(frozen=True, kw_only=True)
class GymVerifier:
    r"""reasoning-gym's own score of the last ``<answer>``, else ``\boxed{}``, else line after a marker, else the
    whole text.
    """

    seconds: float = 5.0

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return self.verify_many([(problem, text)])[0]

    def verify_many(self, pairs: Sequence[Pair]) -> list[Verdict]:
        answers = [gym_answer(text) for _, text in pairs]
        items = [
            {"do": "score", **problem.meta, "answer": answer}
            for (problem, _), answer in zip(pairs, answers, strict=True)
            if answer is not None
        ]
        outcomes = iter(run_shared("gym", items, self.seconds) if items else [])
        return [_ABSTAINED if answer is None else _verdict(next(outcomes), answer) for answer in answers]


_ABSTAINED = Verdict(score=0.0, answer=None, status=VerdictStatus.NO_ANSWER)


def _verdict(outcome: Outcome, answer: str) -> Verdict:
    if outcome.status is not VerdictStatus.OK:
        return Verdict(score=0.0, answer=None, status=outcome.status)
    return Verdict(score=outcome.value, answer=same(answer)[:LONGEST_ANSWER])


def gym_names() -> list[str]:
    """The data sets that the installed reasoning-gym has."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("reasoning-gym is not installed; install it with: pip install 'ccpo[gym]'")
    names = shared("gym").run([{"do": "names"}], MAKE_SECONDS)[0]
    if names.status is not VerdictStatus.OK:
        raise RunFailure(f"reasoning-gym could not be asked for its data sets: {names.detail}")
    return names.value
