"""Two sides of one piece of work, in turns, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of each side, repeat by repeat. ``work``: what one repeat makes, in ``unit`` (tokens, rollouts). ``ours`` and
    ``base`` name the sides that the ratio is of; without a ``base`` there is nothing to compare with."""

    part: str
    name: str
    shape: Mapping[str, Any]
    seconds: Mapping[str, list[float]]
    work: float
    unit: str
    ours: str
    base: str | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        return {side: statistics.median(values) for side, values in self.seconds.items()}

    @property
    def ratios(self) -> tuple[float, float, float] | None:
        """How many times as long the base takes: median and quartiles of the ratios of neighbouring repeats."""
        if self.base is None:
            return None
        pairs = sorted(b / o for b, o in zip(self.seconds[self.base], self.seconds[self.ours], strict=True))
        return statistics.median(pairs), pairs[len(pairs) // 4], pairs[(3 * len(pairs)) // 4]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"medians": self.medians, "ratio_of_base": self.ratios}


def in_turns(
    sides: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each side, ``repeats`` times, one side after the other; the order turns round in every repeat."""
    order = list(sides)
    for _ in range(warmup):
        for side in order:
            sides[side]()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in order:
            _wait(device)
            started = time.perf_counter()
            sides[side]()
            _wait(device)
            seconds[side].append(time.perf_counter() - started)
        order.reverse()
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
