"""How a training step grows: its time against one number at a time, and the exponent of the power law that fits."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ccpo.bench.ours import TEAMS, OurStep
from ccpo.bench.shapes import make_model, parameters, save
from ccpo.bench.timing import Comparison, in_turns

VOTERS = (2, 4, 8)
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "prompts": ("rollout.prompts", (4, 8, 16, 32)),
    "N, samples": ("rollout.samples", (4, 8, 16, 32)),
    "new tokens": ("rollout.max_tokens", (16, 32, 64, 128)),
}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares: 1 is linear."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def run(mode: str, *, repeats: int, device: str) -> Iterator[Comparison]:
    """One record an axis: a side for each value; ``extra`` has the exponent."""
    axes = AXES if mode == "full" else {"prompts": ("rollout.prompts", (4, 8))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save("1M", folder / "base")
        for axis, (key, values) in axes.items():
            part, _, leaf = key.partition(".")
            steps = {
                v: OurStep(base, folder / f"{leaf}{v}", "single", {"run": {"device": device}, part: {leaf: v}})
                for v in values
            }
            yield _fitted(axis, steps, repeats, device)
        if mode != "full":
            return
        voters = {k: OurStep(base, folder / f"k{k}", "pair", of_voters(k)) for k in VOTERS}
        yield _fitted("K, agents", voters, repeats, device)
        sizes = {}
        for size in ("1M", "5M", "25M"):
            path = save(size, folder / size)
            sizes[parameters(make_model(size))] = OurStep(
                path, folder / f"of{size}", "single", {"run": {"device": device}}
            )
        yield _fitted("parameters", sizes, repeats, device)


def of_voters(k: int) -> dict[str, Any]:
    """Settings that make ``k`` voters, at least two, of the pair."""
    return {"team": {"k": k, "prompts": {f"voter{i + 1}": "T{problem}:" for i in range(k)}}}


def _fitted(axis: str, steps: dict[int, OurStep], repeats: int, device: str) -> Comparison:
    seconds = in_turns({str(v): step for v, step in steps.items()}, repeats=repeats, device=device)
    best = [statistics.median(seconds[str(v)]) for v in steps]
    last = str(list(steps)[-1])
    return Comparison(
        part="scaling",
        name=f"step time by {axis}",
        shape={"axis": axis, "values": list(steps), "teams": sorted(TEAMS)},
        seconds=seconds,
        work=steps[list(steps)[-1]].tokens,
        unit="tokens",
        ours=last,
        extra={"exponent": exponent(list(steps), best)},
    )
