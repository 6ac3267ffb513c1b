"""Random kills: does a run that is killed again and again end with the weights of one that is not?

    python benchmarks/kills.py [--launch torchrun|ray] [--trials 20] [--seed 0]

Each trial trains a tiny team on two processes, kills one of them (SIGKILL) at a random moment of the training, lets the run go on (torchrun: by
``--resume``; Ray: by itself) and compares the last checkpoint, tensor by tensor, with that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

RECIPE = Path(__file__).with_name("tiny.yaml")
STEPS = 30
FRESH = [str(RECIPE), "--set", f"trainer.steps={STEPS}", "--set", "trainer.save_every=3"]


def start(launch: str, *arguments: str) -> subprocess.Popen:
    how = ["--launch", "torchrun:2"] if launch == "torchrun" else ["--launch", "ray", "--workers", "2"]
    command = [sys.executable, "-m", "ccpo", "train", *arguments, *how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(launch: str, run: Path) -> list[int]:
    """The processes that train: of torchrun those with a rank and the run in their command line, of Ray its workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, names = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        mine = (
            line.startswith(b"ray::RayTrainWorker")
            if launch == "ray"
            else str(run).encode() in line and b"\0RANK=" in names
        )
        if mine:
            found.append(int(folder.name))
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = sorted(newest.glob("policies/*/model*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def finished(process: subprocess.Popen) -> bool:
    out = process.communicate(timeout=600)[0]
    if process.returncode:
        print(out[-1500:])
    return process.returncode == 0


def trial(launch: str, run: Path, rng: random.Random, span: float) -> str:
    """ "same", "other" (weights), "lost" (the run did not end), or "missed" (it had ended before the kill)."""
    process = start(launch, *FRESH, "--set", f"run.dir={run}")
    while not (run / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, span))
    victims = workers(launch, run)
    if process.poll() is not None or not victims:
        process.communicate()
        return "missed"
    os.kill(rng.choice(victims), signal.SIGKILL)
    if launch == "torchrun":
        process.communicate(timeout=120)
        if process.returncode and not finished(start(launch, "--resume", str(run))):
            return "lost"
    elif not finished(process):
        return "lost"
    return "same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launch", choices=("torchrun", "ray"), default="torchrun")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rng, counts = random.Random(given.seed), {"same": 0, "other": 0, "lost": 0, "missed": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CCPO_CACHE"] = str(folder / "cache")
        quiet = folder / "undisturbed"
        if not finished(start(given.launch, *FRESH, "--set", f"run.dir={quiet}")):
            raise SystemExit("the undisturbed run failed")
        expected = weights(quiet)
        first, last = (quiet / "episodes" / f"step-{step:06d}.jsonl.gz" for step in (1, STEPS))
        span = last.stat().st_mtime - first.stat().st_mtime
        while counts["same"] + counts["other"] + counts["lost"] < given.trials:
            run = folder / f"run-{sum(counts.values())}"
            outcome = trial(given.launch, run, rng, span)
            if outcome == "same" and any(not torch.equal(t, expected[n]) for n, t in weights(run).items()):
                outcome = "other"
            counts[outcome] += 1
            print(", ".join(f"{count} {word}" for word, count in counts.items()), flush=True)
    print(
        f"{given.launch}: {counts['same']} of {given.trials} kills ended with the very weights of the undisturbed run"
    )


if __name__ == "__main__":
    main()
