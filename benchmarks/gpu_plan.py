"""How far ``ccpo plan`` is from the truth on the GPU at hand: seconds and memory predicted from the card's figures, then measured.

    python benchmarks/gpu_plan.py [--steps 5] [--cases 0.5B,1.5B-lora] [--out docs/benchmarks/gpu_plan.json] [--page docs/plan.md]

Random models of the shapes of Qwen2.5-0.5B and 1.5B that never end a turn: whole training steps of thinker and solver under CCPO v1, and of a
single agent under shared reward. Nothing of the plan is fitted to these steps. Memory is torch's peak of what was allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from plan_accuracy import recipe, write_section

from ccpo.bench.ours import TEAMS, OurStep
from ccpo.bench.report import machine
from ccpo.bench.shapes import save
from ccpo.compare.merge import laid_over
from ccpo.forecast.cards import CARDS
from ccpo.forecast.command import Wishes, plan

WARM = 2  # steps in which graphs are recorded

CASES: dict[str, dict[str, Any]] = {
    "0.5B": {"size": "0.5B", "rollout": (16, 8, 128)},
    "0.5B-checkpointing": {"size": "0.5B", "rollout": (16, 8, 128), "model": {"gradient_checkpointing": True}},
    "1.5B-checkpointing": {"size": "1.5B", "rollout": (8, 8, 128), "model": {"gradient_checkpointing": True}},
    "1.5B-lora": {"size": "1.5B", "rollout": (8, 8, 128), "model": {"sharing": "lora"}, "placement": "lora"},
    "1.5B-lora-single": {
        "size": "1.5B",
        "rollout": (8, 8, 128),
        "model": {"sharing": "lora"},
        "placement": "lora",
        "team": "single",
        "credit": "shared",
    },
}


def settings_of(case: dict[str, Any], base: Path, folder: Path) -> dict[str, Any]:
    """What both sides are given."""
    own = {
        "team": TEAMS[case.get("team", "think_solve")],
        "model": case.get("model", {}),
        "credit": {"kind": case.get("credit", "ccpo_v1")},
    }
    return laid_over(recipe(base, folder, *case["rollout"], device="cuda"), own)


def card() -> str:
    """The plan's name of the GPU at hand. Raises SystemExit for one whose figures it does not have."""
    here, memory = torch.cuda.get_device_name().lower(), torch.cuda.mem_get_info()[1]
    fitting = [card for name, card in CARDS.items() if name.split("-")[0] in here]
    if not fitting:
        raise SystemExit(f"ccpo plan has no figures of a {here}; it has those of {', '.join(CARDS)}")
    return min(fitting, key=lambda card: abs(card.memory - memory)).name


def measured(name: str, base: Path, work: Path, steps: int) -> dict[str, Any]:
    case = CASES[name]
    settings = settings_of(case, base, work / name)
    source = work / f"{name}.json"
    source.write_text(json.dumps(settings))
    found = plan(str(source), (), Wishes(gpu=card(), length_share=1.0, length_spread=0.0))
    placed = next(p for p in found["placements"] if p["placement"] == case.get("placement", "ddp"))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = OurStep(base, work / name, case.get("team", "think_solve"), settings)
    lines = []
    for _ in range(WARM + steps):
        step()
        lines.append({k: v for k, v in step.metrics.items() if k.startswith("seconds/")})
    peak, tokens = torch.cuda.max_memory_allocated(), step.tokens
    if tokens != found["tokens"]["generated"]:
        raise SystemExit(f"{name}: {tokens} tokens were generated and {found['tokens']['generated']} were planned")
    took = {k: statistics.median(line[k] for line in lines[WARM:]) for k in lines[0]}
    result = {
        "name": name,
        "rollout": case["rollout"],
        "parameters": found["policies"][0]["parameters"],
        "predicted": placed["seconds"],
        "measured": took,
        "steps": [line["seconds/step"] for line in lines[WARM:]],
        "ratio": placed["seconds"]["total"] / took["seconds/step"],
        "memory_predicted": placed["memory"],
        "memory_measured": peak,
        "memory_ratio": placed["memory"]["peak"] / peak,
    }
    print(
        f"{name}: predicted {placed['seconds']['total']:.3f} s and {placed['memory']['peak'] / 1e9:.1f} GB, measured "
        f"{took['seconds/step']:.3f} s and {peak / 1e9:.1f} GB; ratios {result['ratio']:.2f} and {result['memory_ratio']:.2f}",
        flush=True,
    )
    print(json.dumps({"predicted": placed["seconds"], "measured": took}), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if unknown := set(given.cases.split(",")) - set(CASES):
        raise SystemExit(f"--cases: no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch sees none; on a CPU: python benchmarks/plan_accuracy.py")
    results: dict[str, Any] = {"machine": machine("cuda"), "card": card(), "steps": given.steps, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        work, bases = Path(folder), {}
        for name in given.cases.split(","):
            size = CASES[name]["size"]
            if size not in bases:
                bases[size] = save(size, work / f"base-{size}", "cuda")
            results["cases"].append(measured(name, bases[size], work, given.steps))
            if given.out is not None:
                given.out.write_text(json.dumps(results, indent=1) + "\n")
    if given.page is not None:
        write_section(given.page, BEGIN, END, table(results))


BEGIN, END = "<!-- gpu: written by benchmarks/gpu_plan.py -->", "<!-- end of gpu -->"


def table(results: dict[str, Any]) -> str:
    """The results as the page shows them."""
    lines = [
        f"On one {results['machine']['device']}:",
        "",
        "| | problems × rollouts, tokens | seconds: predicted | measured | ratio | GB: predicted | measured | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in results["cases"]:
        P, N, T = c["rollout"]
        lines.append(
            f"| {c['name']} | {P} × {N}, {T} | {c['predicted']['total']:.2f} | {c['measured']['seconds/step']:.2f} | {c['ratio']:.2f} "
            f"| {c['memory_predicted']['peak'] / 1e9:.1f} | {c['memory_measured'] / 1e9:.1f} | {c['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
