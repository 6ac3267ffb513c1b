"""Does v1 fall apart once a task is solved, and does the guard prevent it? 300 steps of the demo, several seeds, with and without.

A run *reaches* when an evaluation on 500 held-out problems gives 0.95 or more, and *falls* when a later one gives less than 0.90. Every run is a
folder, so that the study can be stopped, resumed and run by several processes at once; finished runs are read, not run again.

    python benchmarks/guard_study.py --seeds 10 --steps 300 --runs runs/guard --out docs/guard.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

CONSTANT = ["optim.decay=constant", "optim.max_grad_norm=0.3"]
ARMS = {
    "guard": [],  # the demo as it ships
    "credit_half": CONSTANT,  # its credit settings alone, with a constant learning rate
    "faithful": ["credit.skip_flat=false", "credit.center=false", "credit.pairing=paired", *CONSTANT],
}


def run(folder: Path, arm: str, seed: int, steps: int, every: int) -> None:
    import torch

    import ccpo

    torch.set_num_threads(1)
    if not claim(folder.with_suffix(".claimed")):
        return  # another process has it
    settings = [
        f"run.dir={folder}",
        "run.overwrite=true",  # what a process that was killed had begun
        f"run.seed={seed}",
        "run.threads=1",
        f"trainer.steps={steps}",
        f"trainer.eval_every={every}",
        "trainer.save_every=0",
        "eval.during=500",
        "log.episodes=false",
        "log.tensorboard=false",
    ]
    ccpo.train("demo", settings + ARMS[arm])


def claim(file: Path) -> bool:
    """Whether this run is ours now: nobody has it, or the process that had it is dead."""
    try:
        with file.open("x") as claimed:
            claimed.write(str(os.getpid()))
        return True
    except FileExistsError:
        holder = file.read_text()
    if holder and Path(f"/proc/{holder}").exists():
        return False
    file.write_text(str(os.getpid()))
    return True


def curve(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [(line["step"], next(iter(line["reports"].values()))["team"]["mean"]) for line in lines]


def verdict(points: list[tuple[int, float]]) -> dict:
    reached = next((step for step, value in points if value >= 0.95), None)
    later = [value for step, value in points if reached is not None and step > reached]
    lowest = min(later, default=None)
    return {
        "curve": points,
        "reached_at": reached,
        "lowest_after": lowest,
        "fell": lowest is not None and lowest < 0.90,
        "last": points[-1][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/guard"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read-only", action="store_true", help="run nothing, sum up what is there")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    cells = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
    for arm, seed in cells:
        folder = args.runs / f"{arm}-{seed}"
        if not args.read_only and not (folder / "summary.json").exists():
            run(folder, arm, seed, args.steps, args.every)
    done = [(arm, seed) for arm, seed in cells if (args.runs / f"{arm}-{seed}" / "summary.json").exists()]
    report = {
        arm: {seed: verdict(curve(args.runs / f"{arm}-{seed}")) for a, seed in done if a == arm} for arm in args.arms
    }
    for arm, seeds in report.items():
        reached = [v for v in seeds.values() if v["reached_at"] is not None]
        fell = sum(v["fell"] for v in reached)
        lows = [v["lowest_after"] for v in reached if v["lowest_after"] is not None]
        print(
            f"{arm}: {len(seeds)} seeds, {len(reached)} reached 0.95, {fell} fell below 0.90 later; lowest later {min(lows, default=None)}"
        )
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
