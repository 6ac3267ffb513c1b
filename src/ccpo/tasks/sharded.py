"""A task whose verdicts several ranks share out: each judges a part of the texts, and all get all verdicts.

It is not only faster: a verifier that runs out of time on one rank and not on another would have them pay different credit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ccpo.comm import Comm
from ccpo.tasks.base import Pair, Task
from ccpo.types import Problem, Verdict, VerdictStatus


class ShardedTask:
    """``inner`` on every rank, as one; see `ccpo.tasks.base.Task`."""

    def __init__(self, inner: Task, comm: Comm) -> None:
        self.inner, self.comm, self.name = inner, comm, inner.name
        if hasattr(inner, "process"):
            self.process = self._process

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Problem:
        return self.inner[index]

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Verdicts in the pairs' order. What is raised on one rank is raised on all."""
        keys = [(problem.id, problem.answer, text) for problem, text in pairs]

        def judge(mine: list[int]) -> list[Any]:
            return [[v.score, v.answer, v.status] for v in self.inner.verify([pairs[i] for i in mine])]

        return [
            Verdict(score=score, answer=answer, status=VerdictStatus(status))
            for score, answer, status in self._share_out(keys, judge)
        ]

    def _process(self, triples: Sequence[tuple[Problem, str, str]]) -> list[float | None]:
        keys = [(problem.id, name, text) for problem, name, text in triples]
        return self._share_out(keys, lambda mine: list(self.inner.process([triples[i] for i in mine])))  # type: ignore[attr-defined]

    def _share_out(self, keys: Sequence[Hashable], judge: Callable[[list[int]], list[Any]]) -> list[Any]:
        """``judge`` of each index, equal keys judged once, by one rank."""
        firsts = list({key: i for i, key in reversed(list(enumerate(keys)))}.values())
        mine = firsts[self.comm.rank :: self.comm.size]
        said = self.comm.everywhere(lambda: json.dumps(judge(mine)).encode())
        by_key: dict[Hashable, Any] = {}
        for rank, data in enumerate(said):
            values = json.loads(data)
            by_key.update(zip((keys[i] for i in firsts[rank :: self.comm.size]), values, strict=True))
        return [by_key[key] for key in keys]
