"""Peak memory of a training step of each side, each in a process of its own: ``python -m ccpo.bench.memory SIDE SIZE``."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ccpo.bench import peers
from ccpo.bench.shapes import save
from ccpo.errors import RunFailure

SIDES = {"ccpo, one agent": None, "TRL GRPOTrainer": "trl", "ccpo, two agents": None, "CoMLRL MAGRPOTrainer": "comlrl"}
IMPORTS = {
    "ccpo, one agent": ("ccpo.bench.ours", "transformers.models.qwen2.modeling_qwen2"),
    "ccpo, two agents": ("ccpo.bench.ours", "transformers.models.qwen2.modeling_qwen2"),
    "TRL GRPOTrainer": ("datasets", "trl", "trl.trainer.grpo_trainer", "transformers.models.qwen2.modeling_qwen2"),
    "CoMLRL MAGRPOTrainer": (
        "datasets",
        "comlrl.trainers.reinforce.magrpo",
        "transformers.models.qwen2.modeling_qwen2",
    ),
}
STEPS = 3
MARK = "peak memory: "  # other libraries print lines of their own


def peak(side: str, size: str) -> dict[str, float]:
    """MiB that a fresh process has held after three steps of ``side``, and before it loaded the model, its imports done."""
    with tempfile.TemporaryDirectory() as name:
        save(size, Path(name) / "base")
        command = [sys.executable, "-m", "ccpo.bench.memory", side, name, str(torch.get_num_threads())]
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


def main(side: str, folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    base, run = Path(folder) / "base", Path(folder) / "run"
    for module in IMPORTS[side]:
        importlib.import_module(module)
    before = _mebibytes()
    print(MARK + json.dumps({"before": before, "peak": _after_steps(side, base, run)}))


def _after_steps(side: str, base: Path, run: Path) -> float:
    from ccpo.bench.step import PROMPTS, SAMPLES, TOKENS

    shape = {"prompts": PROMPTS, "samples": SAMPLES, "tokens": TOKENS, "device": "cpu"}
    step: Callable[[], None]
    if side == "TRL GRPOTrainer":
        step = peers.TrlStep(base, run, steps=STEPS, **shape)
    elif side == "CoMLRL MAGRPOTrainer":
        step = peers.ComlrlStep(base, **shape)
    else:
        from ccpo.bench.ours import OurStep

        step = OurStep(base, run, "pair" if "two" in side else "single")
    for _ in range(STEPS):
        step()
    return _mebibytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
