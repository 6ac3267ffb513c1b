"""Two processes of one thread beside one process of two threads, on the demo's shapes; what communication takes of a step at 25M parameters; and
rollouts beside the update.

    python benchmarks/ranks.py [--steps 12] [--rounds 3] [--part demo|25M] [--out FILE]

The sides take turns. Of each turn the median step counts, after the first three; of the turns the median and the range are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIDES = {
    "1 process, 2 threads": (2, []),
    "2 processes, 1 thread": (1, ["--launch", "torchrun:2"]),
    "1 process, 1 thread": (1, []),
    "1 process, 1 thread, rollouts ahead": (1, ["--set", "trainer.async_depth=1"]),
}
SHAPES = {
    # at 25M the base is hardly trained: without the entropy term its rewards, all nought, would make no update
    "demo": {"bootstrap.steps": 1500},
    "25M": {
        "bootstrap.hidden": 512,
        "bootstrap.layers": 8,
        "bootstrap.heads": 8,
        "bootstrap.kv_heads": 4,
        "bootstrap.mlp": 1536,
        "bootstrap.steps": 3,
        "bootstrap.noisy_steps": 0,
        "bootstrap.cooldown": 1,
        "rollout.truncated": "keep",
        "loss.entropy_coef": 1e-9,
    },
}


def turn(folder: Path, shape: str, threads: int, launch: list[str], steps: int) -> dict[str, float]:
    """One run; medians over its steps."""
    run = folder / "run"
    settings = {
        **SHAPES[shape],
        "run.dir": run,
        "run.overwrite": "true",
        "run.threads": threads,
        "trainer.steps": steps,
        "trainer.save_every": 0,
        "trainer.eval_every": 0,
        "eval.problems": 2,
        "eval.ablations": "false",
        "log.tensorboard": "false",
        "log.progress": "false",
    }
    command = [sys.executable, "-m", "ccpo", "train", "demo", *launch]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CCPO_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3_000, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][3:]
    names = ["seconds/step", "seconds/communication", "tokens/joint", "async/updates_behind"]
    return {name: statistics.median(line[name] for line in lines) for name in names if name in lines[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=[*SHAPES])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for shape in [given.part] if given.part else SHAPES:
        sides = found[shape] = {name: [] for name in SIDES}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(given.rounds):
                for name, (threads, launch) in SIDES.items():
                    sides[name].append(turn(Path(folder), shape, threads, launch, given.steps))
        base = statistics.median(t["seconds/step"] for t in sides["1 process, 2 threads"])
        for name, turns in sides.items():
            seconds = [t["seconds/step"] for t in turns]
            shares = [t["seconds/communication"] / t["seconds/step"] for t in turns if "seconds/communication" in t]
            line = (
                f"{shape}: {name}: {statistics.median(seconds):.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f})"
            )
            line += f", throughput {base / statistics.median(seconds):.2f} of one process with two threads"
            print(
                line + (f", communication {100 * statistics.median(shares):.1f}% of it" if shares else ""), flush=True
            )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
