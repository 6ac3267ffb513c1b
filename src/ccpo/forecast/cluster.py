"""Many GPUs, simulated: ranks that are slower now and then, failures, checkpoints, and what is not shared out.

A step on ``n`` ranks is

    host + gather(n) + sum over its barriers of ``work / n * max_r(x_r)`` + communication(n)

with ``x_r`` log-normal of mean 1, drawn for each rank and barrier: all wait for the slowest. Failures come at ``n / mtbf``; one throws
away what came after the last checkpoint and costs a restart. Beyond as many ranks as a step has problems, problems are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ccpo.forecast.seconds import StepSeconds

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What goes wrong. ``spread``: deviation of the logarithm of a rank's slowness; ``mtbf``: hours between failures of one GPU; ``restart``:
    seconds until a run goes on after one; ``every``: steps between checkpoints; ``write``: seconds of one; ``steps``: how many are simulated."""

    spread: float = 0.08
    mtbf: float = 50_000.0
    restart: float = 300.0
    every: int = 50
    write: float = 30.0
    steps: int = 400
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One size of cluster. ``problems`` of a step; ``step``: mean seconds of one that succeeds; ``rate``: problems an hour that count, after
    failures; ``efficiency``: that of a GPU, beside one of the first row.

    Shares of the time: ``straggling``, waiting for the slowest; ``alone``, what is not shared out, with communication; ``lost``, failures and
    checkpoints. ``failures``: how many there were.
    """

    ranks: int
    problems: int
    step: float
    rate: float
    efficiency: float
    straggling: float
    alone: float
    lost: float
    failures: int


def simulate(
    cost: Callable[[int, int], tuple[StepSeconds, int]], problems: int, weather: Weather, sizes: Sequence[int] = SIZES
) -> list[Simulated]:
    """A row for each of ``sizes``. ``cost(ranks, problems)``: the undisturbed step and its barriers."""
    found: list[Simulated] = []
    single = 0.0
    for ranks in sizes:
        count = problems * -(-ranks // problems)
        seconds, barriers = cost(ranks, count)
        row = _simulated(ranks, count, seconds, barriers, weather, single)
        single = single or row.rate / ranks
        found.append(row if row.efficiency else _simulated(ranks, count, seconds, barriers, weather, single))
    return found


def _simulated(
    ranks: int, problems: int, seconds: StepSeconds, barriers: int, weather: Weather, single: float
) -> Simulated:
    slow_S = slowness(ranks, barriers, weather)
    alone = seconds.total - seconds.shared_out
    step_S = (alone + seconds.shared_out * slow_S).tolist()
    span, failures = _with_failures(step_S, ranks, weather)
    useful = sum(step_S)
    if span == math.inf:
        kept = {"rate": 0.0, "efficiency": 0.0, "straggling": 0.0, "alone": 0.0, "lost": 1.0}
        return Simulated(ranks=ranks, problems=problems, step=useful / len(step_S), failures=failures, **kept)
    rate = problems * len(step_S) / span * 3600
    return Simulated(
        ranks=ranks,
        problems=problems,
        step=useful / len(step_S),
        rate=rate,
        efficiency=rate / (ranks * single) if single else 0.0,
        straggling=(useful - seconds.total * len(step_S)) / span,
        alone=alone * len(step_S) / span,
        lost=(span - useful) / span,
        failures=failures,
    )


def slowness(ranks: int, barriers: int, weather: Weather) -> torch.Tensor:
    """By step, how many times as long the shared work takes: the mean over barriers of the largest of ``ranks`` log-normal numbers of mean 1."""
    generator = torch.Generator().manual_seed(weather.seed)
    normal = torch.randn(weather.steps, max(1, barriers), ranks, generator=generator, dtype=torch.float64)
    return (weather.spread * normal - weather.spread**2 / 2).exp().amax(-1).mean(-1)


def _with_failures(step_S: Sequence[float], ranks: int, weather: Weather) -> tuple[float, int]:
    """Seconds until all steps are done and saved, and the failures on the way; they come as a Poisson process."""
    generator = torch.Generator().manual_seed(weather.seed + 1)
    rate = ranks / (weather.mtbf * 3600)

    def wait() -> float:
        draw = torch.rand((), generator=generator, dtype=torch.float64).item()
        return -math.log1p(-draw) / rate

    clock, done, failures, left = 0.0, 0, 0, wait()
    while done < len(step_S):
        part = step_S[done : done + weather.every]
        length = sum(part) + weather.write
        if left >= length:
            clock, left, done = clock + length, left - length, done + len(part)
            continue
        failures += 1
        clock, left = clock + left + weather.restart, wait()
        if failures > 100 * len(step_S):
            return math.inf, failures  # it never gets from one checkpoint to the next
    return clock, failures
