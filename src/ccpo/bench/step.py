"""A whole training step beside other libraries' trainers: same model, prompts, rollouts, tokens and reward."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ccpo.bench import peers
from ccpo.bench.ours import OurStep
from ccpo.bench.shapes import save
from ccpo.bench.timing import Comparison, in_turns
from ccpo.errors import RunFailure

PROMPTS, SAMPLES, TOKENS = 8, 8, 32
ON_GPU = {"prompts": 16, "samples": 8, "tokens": 128}
DTYPES = {
    ("cpu", "TRL GRPOTrainer"): "bfloat16 on both sides",
    ("cuda", "TRL GRPOTrainer"): "bfloat16 on both sides, there the weights too",
    ("cpu", "CoMLRL MAGRPOTrainer"): "bfloat16, and float32 there",
    ("cuda", "CoMLRL MAGRPOTrainer"): "bfloat16, and float32 there",
}
SIZES = {"full": ("1M", "5M", "25M"), "quick": ("1M",), "gpu": ("0.5B",)}


def run(mode: str, *, repeats: int, device: str, note: Callable[[str], None]) -> Iterator[Comparison]:
    """Against each peer that is installed; what is not is told by ``note``."""
    shape = ON_GPU if mode == "gpu" else {"prompts": PROMPTS, "samples": SAMPLES, "tokens": TOKENS}
    for package, against in (("trl", _trl), ("comlrl", _comlrl)):
        how = peers.missing(package)
        if how is not None:
            note(f"step: {package} is not installed, so nothing is compared with it ({how})")
            continue
        for size in SIZES[mode]:
            with tempfile.TemporaryDirectory() as folder:
                base = save(size, Path(folder) / "base")
                yield against(size, base, Path(folder), shape, repeats, device)


def _trl(size: str, base: Path, folder: Path, shape: Mapping[str, int], repeats: int, device: str) -> Comparison:
    warmup = 2
    ours = OurStep(base, folder / "ours", "single", _settings(shape, device))
    theirs = peers.TrlStep(base, folder / "trl", **shape, steps=repeats + warmup, device=device)
    return _compared(f"{size}, one agent", "TRL GRPOTrainer", ours, theirs, shape, repeats, warmup, device, agents=1)


def _comlrl(size: str, base: Path, folder: Path, shape: Mapping[str, int], repeats: int, device: str) -> Comparison:
    ours = OurStep(base, folder / "ours", "pair", _settings(shape, device))
    theirs = peers.ComlrlStep(base, **shape, device=device)
    return _compared(f"{size}, two agents", "CoMLRL MAGRPOTrainer", ours, theirs, shape, repeats, 1, device, agents=2)


def _settings(shape: Mapping[str, int], device: str) -> dict[str, Any]:
    rollout = {"prompts": shape["prompts"], "samples": shape["samples"], "max_tokens": shape["tokens"]}
    return {"run": {"device": device}, "rollout": rollout}


def _compared(
    name: str,
    label: str,
    ours: OurStep,
    theirs: Any,
    shape: Mapping[str, int],
    repeats: int,
    warmup: int,
    device: str,
    *,
    agents: int,
) -> Comparison:
    seconds = in_turns({"ccpo": ours, label: theirs}, repeats=repeats, warmup=warmup, device=device)
    expected = agents * shape["prompts"] * shape["samples"] * shape["tokens"]
    if ours.tokens != expected or theirs.tokens != expected:
        raise RunFailure(f"{name}: {expected} tokens were to be made; ccpo made {ours.tokens}, {label} {theirs.tokens}")
    return Comparison(
        part="step",
        name=f"{name}; {DTYPES[device, label]}",
        shape={**shape, "agents": agents, "dtype": DTYPES[device, label]},
        seconds=seconds,
        work=expected,
        unit="tokens",
        ours="ccpo",
        base=label,
    )
