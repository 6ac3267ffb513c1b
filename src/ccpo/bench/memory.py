"""Peak memory of a training step of each side, each in a process of its own: ``python -m ccpo.bench.memory SIDE SIZE``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ccpo.bench import peers
from ccpo.bench.shapes import save
from ccpo.errors import RunFailure

SIDES = {"ccpo, one agent": None, "TRL GRPOTrainer": "trl", "ccpo, two agents": None, "CoMLRL MAGRPOTrainer": "comlrl"}
STEPS = 3
MARK = "peak memory: "  # other libraries print lines of their own


def peak(side: str, size: str) -> dict[str, float]:
    """MiB of a fresh process after three steps of ``side``, and before the model was loaded."""
    command = [sys.executable, "-m", "ccpo.bench.memory", side, size, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise RunFailure(f"the step of {side} failed in its own process: {done.stderr.strip()[-500:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(MARK)).removeprefix(MARK))


def run(mode: str) -> list[dict[str, object]]:
    """A record for each side that is installed."""
    sizes = ("1M", "25M") if mode == "full" else ("1M",)
    present = [side for side, package in SIDES.items() if package is None or peers.missing(package) is None]
    return [{"side": side, "size": size, **peak(side, size)} for size in sizes for side in present]


def _mebibytes(status: Path = Path("/proc/self/status")) -> float:
    """The most this process has held. The system's ``ru_maxrss`` would begin at what the parent held."""
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RunFailure(f"{status} does not say how much memory the process has held; the memory part needs Linux")


def main(side: str, size: str, threads: str) -> None:
    from ccpo.bench.ours import OurStep
    from ccpo.bench.step import PROMPTS, SAMPLES, TOKENS

    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save(size, folder / "base")
        shape = {"prompts": PROMPTS, "samples": SAMPLES, "tokens": TOKENS, "device": "cpu"}
        before = _mebibytes()
        if side == "TRL GRPOTrainer":
            step = peers.TrlStep(base, folder / "trl", steps=STEPS, **shape)
        elif side == "CoMLRL MAGRPOTrainer":
            step = peers.ComlrlStep(base, **shape)
        else:
            step = OurStep(base, folder / "ours", "pair" if "two" in side else "single")
        for _ in range(STEPS):
            step()
        print(MARK + json.dumps({"before": before, "peak": _mebibytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
