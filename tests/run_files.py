"""Run folders in the documented formats, of any size, for tests of what reads them: no model is trained for them."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AGENTS = ("thinker", "solver")
GRAPH = {
    "agents": list(AGENTS),
    "decider": "solver",
    "turns": [
        {"name": "thinker", "agent": "thinker", "prompt": "Think about: {problem}", "reads": []},
        {
            "name": "solver",
            "agent": "solver",
            "prompt": "{problem}[[\nThought: {thinker}]]",
            "reads": ["thinker"],
        },
    ],
    "decision": "last_turn",
    "reads": ["solver"],
    "free": [],
}
MATHS = (
    "so \\(x^2 + \\frac{1}{2}\\) is at most $\\sqrt{a+b}$",
    "hence \\[\\sum_{i=1}^{n} i = \\frac{n(n+1)}{2}\\]",
    "which leaves \\boxed{42}",
    "a matrix $\\begin{pmatrix}1 & 0\\\\0 & 1\\end{pmatrix}$",
)


def turn(name: str, text: str, prompt: str, *, finish: str = "eos", tokens: int | None = None) -> dict[str, Any]:
    count = len(text.split()) + 1 if tokens is None else tokens
    return {
        "name": name,
        "agent": name,
        "policy": name,
        "prompt": prompt,
        "text": text,
        "message": text,
        "finish": finish,
        "cut_tokens": 0,
        "temperature": 1.0,
        "prompt_ids": list(range(len(prompt.split()))),
        "token_ids": list(range(count)),
        "logprobs": [-0.25] * count,
    }


def write_steps(path: Path, step: int, records: Sequence[dict[str, Any]]) -> None:
    """An episode file with these problem lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": "ccpo.episodes/1", "step": step, "problems": len(records)}
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for record in (header, *records):
            file.write(json.dumps(record) + "\n")


def problem_record(
    rng: random.Random, step: int, steps: int, place: int, samples: int, problems: int
) -> dict[str, Any]:
    """A problem whose team is right more often in later steps."""
    number = rng.randrange(problems)
    a, b = number % 97, number // 3
    text = f"Problem {number}: what is {a} + {b}?"
    rollouts = []
    for n in range(samples):
        right = rng.random() < 0.3 + 0.6 * step / steps
        answer = str(a + b if right else a + b + rng.randrange(1, 9))
        thought = f"{a} and {b} make about {a + b + rng.randrange(-2, 3)}; {rng.choice(MATHS)}"
        credit = round((0.7 if right else -0.6) + rng.gauss(0, 0.3), 4)
        rollouts.append(
            {
                "n": n,
                "reward": float(right),
                "answer": answer,
                "scores": {"solver": float(right)},
                "credit": {"thinker": credit, "solver": float(right)},
                "advantage": {"thinker": credit / 2, "solver": float(right) - 0.5},
                "turns": [
                    turn("thinker", thought, f"Think about: {text}"),
                    turn("solver", answer, f"{text}\nThought: {thought}", finish=rng.choice(("eos", "eos", "length"))),
                ],
            }
        )
    without = []
    for draw in range(2):
        solo = rng.random() < 0.25
        guess = str(a + b if solo else a + b + rng.randrange(1, 9))
        without.append(
            {
                "removed": ["thinker"],
                "rollout": None,
                "draw": draw,
                "reward": float(solo),
                "answer": guess,
                "cached": False,
                "turns": [turn("solver", guess, text)],
            }
        )
    problem = {"id": f"sum-{number}", "text": text, "answer": str(a + b), "source": "sums", "meta": {}}
    return {"step": step, "problem": problem, "rollouts": rollouts, "counterfactuals": without}


def metrics_of(step: int, steps: int, rng: random.Random) -> dict[str, float]:
    reward = 0.3 + 0.6 * step / steps + rng.gauss(0, 0.03)
    found = {"step": step, "reward/team": reward, "reward/without_thinker": 0.25, "reward/solver_own": reward}
    for agent in AGENTS:
        found |= {
            f"credit/{agent}/mean": 0.2 + rng.gauss(0, 0.05),
            f"credit/{agent}/share": 0.5,
            f"credit/{agent}/helped": 0.3,
            f"credit/{agent}/hurt": 0.05,
            f"credit/{agent}/shared_corr": 0.8,
            f"credit/{agent}/no_signal": 0.4 * step / steps,
            f"actor/{agent}/entropy": 0.5 * math.exp(-step / steps),
            f"actor/{agent}/approx_kl": 0.001,
            f"actor/{agent}/grad_norm": 0.3,
            f"actor/{agent}/loss": 0.1,
            f"completions/{agent}/mean_length": 12.0,
            f"completions/{agent}/clipped_ratio": 0.01,
        }
    found |= {"credit/solver/gate": 0.5, "tokens/joint": 2000.0, "tokens/counterfactual": 200.0, "tokens/rating": 0.0}
    found |= {"tokens/total": 2200.0 * step, "seconds/decode": 0.2, "seconds/update": 0.3, "seconds/step": 0.6}
    return found


def report_of(mean: float) -> dict[str, Any]:
    def around(value: float) -> dict[str, float]:
        return {"mean": value, "low": max(0.0, value - 0.04), "high": min(1.0, value + 0.04)}

    return {
        "problems": 500,
        "samples": 1,
        "team": around(mean),
        "tokens": 24.0,
        "pass@k": {"1": mean},
        "majority@k": {"1": mean},
        "without": {"thinker": around(0.25), "solver": around(0.0)},
        "blank": {"thinker": around(0.24), "solver": around(0.0)},
        "alone": {"thinker": around(0.0), "solver": around(0.25)},
    }


def write_run(
    folder: Path,
    *,
    steps: int = 12,
    problems: int = 4,
    samples: int = 4,
    name: str = "made",
    seed: int = 0,
    pool: int = 60,
) -> Path:
    """A finished run of Think–Solve on sums: ``steps`` × ``problems`` × ``samples`` rollouts of ``pool`` problems."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"name": name, "dir": str(folder), "seed": seed},
        "team": {"kind": "think_solve"},
        "task": {"kind": "sums"},
        "credit": {"kind": "ccpo_v1"},
        "advantage": "grpo",
        "trainer": {"steps": steps},
        "optim": {"lr": 1e-4 * (seed + 1)},
    }
    recipe = {
        "config": config,
        "objects": {},
        "team": GRAPH,
        "made_with": {"python": "3.11.0", "ccpo": "0.1.0"},
        "commit": "0123abc",
        "command": ["/somewhere/bin/ccpo", "train", "sums"],
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    lines = [json.dumps(metrics_of(step, steps, rng)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    exams = [
        {"step": s, "tokens": 2200 * s, "reports": {"heldout": report_of(0.3 + 0.6 * s / steps)}} for s in (0, steps)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(exam) + "\n" for exam in exams))
    for step in range(1, steps + 1):
        records = [problem_record(rng, step, steps, p, samples, pool) for p in range(problems)]
        write_steps(folder / "episodes" / f"step-{step:06d}.jsonl.gz", step, records)
    summary = {"name": name, "steps": steps, "tokens_joint": 2000 * steps, "tokens_counterfactual": 200 * steps}
    summary |= {
        "tokens_rating": 0,
        "seconds_bootstrap": 4.0,
        "seconds_training": 0.6 * steps,
        "seconds_total": steps + 4.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
