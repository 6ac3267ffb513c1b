"""How far ``ccpo plan --gpu cpu`` is from the truth: predicted before anything is run, then measured.

    python benchmarks/plan_accuracy.py [--threads 1] [--steps 7] [--cpu-time] [--out docs/benchmarks/plan.json] [--page docs/plan.md]

Four sizes of a random model that never ends a turn, so that all texts have their full length: thinker and solver under CCPO v1, whole training
steps. Each size is planned first, and then the median of its steps is measured. Last, the demo is trained for some steps and planned by the
lengths of that run. Nothing of the plan is fitted to the steps. ``--cpu-time``: both sides are timed by what this process has got of the CPU, for
a machine that does something else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ccpo.bench.ours import TEAMS, OurStep
from ccpo.bench.report import machine
from ccpo.bench.shapes import SIZES, Size, save
from ccpo.display import TerminalReporter
from ccpo.forecast.command import Wishes, plan
from ccpo.runs import train

SIZES["12M"] = Size(384, 6, 6, 2, 1_152, 1_024)
CASES = {"1M": (16, 8, 32), "5M": (8, 8, 32), "12M": (8, 8, 32), "25M": (4, 8, 32)}  # problems, samples, tokens
DEMO_STEPS = 12


def recipe(base: Path, folder: Path, prompts: int, samples: int, tokens: int, **run: Any) -> dict[str, Any]:
    """What both sides are given; `OurStep` lays it over the same plain recipe."""
    return {
        "run": {"dir": str(folder), **run},
        "team": TEAMS["think_solve"],
        "task": {"kind": "digit_sum", "digits": [7, 7]},
        "model": {"path": str(base)},
        "credit": {"kind": "ccpo_v1"},
        "rollout": {
            "prompts": prompts,
            "samples": samples,
            "max_tokens": tokens,
            "max_prompt_tokens": 512,
            "truncated": "keep",
        },
        "optim": {"lr": 1e-6},
    }


def compared(name: str, plan: dict[str, Any], seconds: list[float], planning: float, parts: dict[str, float]) -> dict:
    measured = statistics.median(seconds)
    ratio = plan["total"]["step"] / measured
    print(f"{name}: predicted {plan['total']['step']:.3f} s, measured {measured:.3f} s, ratio {ratio:.2f}", flush=True)
    return {
        "name": name,
        "policies": plan["policies"],
        "tokens": plan["tokens"],
        "predicted": plan["seconds"],
        "measured": measured,
        "measured_parts": parts,
        "steps": seconds,
        "ratio": ratio,
        "planning_seconds": planning,
    }


def of_size(name: str, work: Path, threads: int, steps: int) -> dict:
    base = save(name, work / name / "base")
    settings = recipe(base, work / name / "run", *CASES[name], threads=threads)
    source = work / name / "recipe.json"
    source.write_text(json.dumps(settings))
    started = time.monotonic()
    found = plan(str(source), (), Wishes(gpu="cpu", length_share=1.0, length_spread=0.0))
    planning = time.monotonic() - started
    ours = OurStep(base, work / name / "run", "think_solve", settings)
    seconds, parts = [], []
    for number in range(steps + 2):
        ours()
        if number >= 2:
            seconds.append(ours.metrics["seconds/step"])
            parts.append({k: v for k, v in ours.metrics.items() if k.startswith("seconds/")})
    if ours.tokens != found["tokens"]["generated"]:
        raise SystemExit(f"{name}: {ours.tokens} tokens were generated and {found['tokens']['generated']} were planned")
    return compared(name, found, seconds, planning, {k: statistics.median(p[k] for p in parts) for k in parts[0]})


def of_demo(work: Path, threads: int) -> dict:
    """The demo itself, whose texts end when they end; planned with the lengths of its first steps, measured on the others."""
    settings = ["trainer.steps=6", "trainer.eval_every=0", "eval.problems=8", f"run.threads={threads}"]
    first, second = work / "first", work / "second"
    with TerminalReporter() as reporter:
        train("demo", [*settings, f"run.dir={first}"], reporter=reporter)
    started = time.monotonic()
    found = plan(str(first), (), Wishes(gpu="cpu"))
    planning = time.monotonic() - started
    with TerminalReporter() as reporter:
        train("demo", [*settings, "run.seed=1", f"trainer.steps={DEMO_STEPS}", f"run.dir={second}"], reporter=reporter)
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()][2:]
    parts = {k: statistics.median(line[k] for line in lines) for k in lines[0] if k.startswith("seconds/")}
    return compared("demo", found, [line["seconds/step"] for line in lines], planning, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--sizes", default=",".join(CASES))
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.cpu_time:
        time.perf_counter = time.monotonic = time.process_time
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        cases = [of_size(size, work, given.threads, given.steps) for size in given.sizes.split(",")]
        if not given.no_demo:
            cases.append(of_demo(work, given.threads))
    worst = max(max(c["ratio"], 1 / c["ratio"]) for c in cases)
    print(f"the worst of {len(cases)} is off by a factor of {worst:.2f}")
    results = {
        "machine": machine("cpu"),
        "threads": given.threads,
        "clock": "CPU time" if given.cpu_time else "wall",
        "worst": worst,
        "cases": cases,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    if given.page is not None:
        write_section(given.page, BEGIN, END, table(results))


def write_section(page: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two marks of a page, in the place of what is there."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


BEGIN, END = "<!-- accuracy: written by benchmarks/plan_accuracy.py -->", "<!-- end -->"


def table(results: dict[str, Any]) -> str:
    """The results as the page shows them."""
    lines = [
        f"On {results['machine']['processor']}, {results['threads']} thread, in {results['clock']}:",
        "",
        "| | parameters of a policy | predicted | measured | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for c in results["cases"]:
        size = c["policies"][0]["parameters"] / 1e6
        lines.append(
            f"| {c['name']} | {size:.1f}M | {c['predicted']['total']:.2f} s | {c['measured']:.2f} s | {c['ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
