"""Who is trained in a step, and on which problems: both pure functions of the step, so that a resumed run goes on as it would have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ccpo.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``simultaneous``: every trainable agent in every step. ``alternating``: one at a time, ``period`` steps each, ``first`` first
    (the paper's runs: 10 steps, starting with the thinker)."""

    agents: tuple[str, ...]
    alternating: bool = False
    period: int = 10
    first: str | None = None

    def __post_init__(self) -> None:
        if not self.agents:
            raise UserError(
                "every agent is frozen: nothing would be trained. Unfreeze one (agents.NAME.frozen: false) or use ccpo eval"
            )
        if self.first is not None and self.first not in self.agents:
            raise UserError(
                f"trainer.first is {self.first!r}, which is not an agent that is trained ({', '.join(self.agents)})."
                + nearest(self.first, self.agents)
            )

    def active(self, step: int) -> tuple[str, ...]:
        """The agents trained in ``step`` (counted from 0)."""
        if not self.alternating:
            return self.agents
        start = self.agents.index(self.first) if self.first is not None else 0
        return (self.agents[(start + step // self.period) % len(self.agents)],)


@dataclass(frozen=True, kw_only=True)
class ProblemSampler:
    """The problems of each step: epochs over ``total`` problems, each in an order of its own; no problem twice in an epoch."""

    total: int
    batch: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.total < self.batch:
            raise UserError(
                f"a step takes rollout.prompts = {self.batch} problems but the task has only {self.total}; "
                "lower rollout.prompts or add problems"
            )

    def indices(self, step: int) -> list[int]:
        per_epoch = self.total // self.batch
        epoch, place = divmod(step, per_epoch)
        order = _order(self.total, self.seed, epoch) if self.shuffle else range(self.total)
        return list(order[place * self.batch : (place + 1) * self.batch])


@lru_cache(maxsize=2)
def _order(total: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(total))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order
