"""What a credit rule costs beside shared reward, by topology: seconds and tokens of whole training steps, all rows trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ccpo.bench.ours import OurStep
from ccpo.bench.shapes import save
from ccpo.bench.timing import Comparison, in_turns

SHARED = "shared reward"
MEAN = {"credit": {"kind": "removal", "pairing": "mean"}, "advantage": "none"}
RULES: dict[str, dict[str, dict[str, Any]]] = {
    "voting": {
        "removal": {"credit": {"kind": "removal", "pairing": "mean"}, "advantage": "none"},
        "v1": {"credit": "ccpo_v1"},
        "Shapley": {"credit": "shapley"},
        "auto": {"credit": "auto"},
    },
    "think_solve": {
        "v1, paired solo": {"credit": "ccpo_v1"},
        "removal, mean of 8 solos": MEAN | {"rollout": {"draws": 8}},
        "removal, mean of 2 solos": MEAN | {"rollout": {"draws": 2}},
        "removal, cached solos": {
            "credit": {"kind": "removal", "pairing": "cached"},
            "advantage": "none",
            "agents": {"solver": {"frozen": True}},
        },
        "auto": {"credit": "auto"},
    },
    "chain": {
        "removal, paired": {"credit": "removal", "advantage": "none"},
        "auto": {"credit": "auto"},
    },
}
QUICK = {"voting": ("removal",), "think_solve": ("removal, mean of 2 solos",)}


def run(mode: str, *, repeats: int, device: str, size: str = "1M") -> Iterator[Comparison]:
    """Each rule against shared reward, with the same agents trained."""
    for team, rules in RULES.items():
        chosen = {name: s for name, s in rules.items() if mode == "full" or name in QUICK.get(team, ())}
        with tempfile.TemporaryDirectory() as folder:
            base = save(size, Path(folder) / "base")
            for number, (name, settings) in enumerate(chosen.items()):
                yield _compare(team, name, settings, base, Path(folder) / str(number), repeats, device)


def _compare(
    team: str, name: str, settings: dict[str, Any], base: Path, folder: Path, repeats: int, device: str
) -> Comparison:
    cached = "cached" in name
    # an entropy term, too small to matter, so that rows that are paid 0 are run on both sides
    common = {"run": {"device": device}, "loss": {"entropy_coef": 1e-12}}
    common |= {"agents": settings["agents"]} if "agents" in settings else {}
    problems = 16 if cached else None
    ours = OurStep(base, folder / "rule", team, common | settings, problems=problems)
    shared = OurStep(base, folder / "shared", team, common, problems=problems)
    warmup = 4 if cached else 2  # until every problem has been seen
    seconds = in_turns({name: ours, SHARED: shared}, repeats=repeats, warmup=warmup, device=device)
    return Comparison(
        part="counterfactuals",
        name=f"{team}, {name}",
        shape={"team": team, "rule": name, "prompts": 8, "samples": 8, "new": 32},
        seconds=seconds,
        work=ours.tokens,
        unit="tokens",
        ours=name,
        base=SHARED,
        extra={"tokens": ours.tokens / shared.tokens},
    )
