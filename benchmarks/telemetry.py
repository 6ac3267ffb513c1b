"""What telemetry costs of a training step, on the demo's shapes: alarms, credit's figures, the metrics' line, TensorBoard, episodes.

    python benchmarks/telemetry.py [--steps 40] [--recipe demo]

Trains the recipe in a temporary folder (its base model is made once and cached) and prints each part's share of the median step. Processor
time of this process, so that another one on the same machine does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ccpo
from ccpo import credit, trainer
from ccpo.alarms import Watch
from ccpo.loggers import Sinks
from ccpo.runfolder import RunFolder

PARTS: dict[str, list[float]] = defaultdict(list)


def timed(owner: Any, name: str, part: str) -> None:
    """Let a function note the processor seconds of each of its calls."""
    call: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **keys: Any) -> Any:
        started = time.process_time()
        try:
            return call(*arguments, **keys)
        finally:
            PARTS[part].append(time.process_time() - started)

    setattr(owner, name, wrapped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    timed(trainer.Trainer, "train_step", "step")
    timed(Watch, "see", "alarms")
    timed(credit, "telemetry", "credit's figures")
    timed(trainer, "turn_lengths", "lengths")
    timed(RunFolder, "append", "the metrics' line")
    timed(Sinks, "write", "loggers")
    timed(trainer, "write_episodes", "episodes (no telemetry: the rollouts themselves)")
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.dir={folder}/run", f"trainer.steps={given.steps}", "eval.problems=20", "trainer.eval_every=0"]
        ccpo.train(given.recipe, [*settings, f"run.threads={given.threads}"])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        wall = statistics.median(json.loads(line)["seconds/step"] for line in lines[12:])
    medians = {part: statistics.median(values[12:] or values) for part, values in PARTS.items()}
    step = medians.pop("step")
    print(f"step: {step * 1e3:.1f} ms of processor time, {wall * 1e3:.1f} ms on the clock; {given.threads} thread(s)")
    for part, seconds in medians.items():
        print(f"{part}: {seconds * 1e3:.2f} ms, {seconds / step:.2%} of a step's processor time")
    telemetry = sum(seconds for part, seconds in medians.items() if not part.startswith("episodes"))
    print(f"telemetry together: {telemetry * 1e3:.2f} ms, {telemetry / step:.2%}")


if __name__ == "__main__":
    main()
