"""Made-up results of studies, for tests of what is shown: learning curves of a known shape, no model."""

from __future__ import annotations

import math
import random
from typing import Any

from ccpo.compare.cells import main_cells, sweep_cells, tune_cells
from ccpo.compare.store import Store
from ccpo.compare.study import Study

AGENTS = ("thinker", "solver")


def made_up(
    task: str, method: str, seed: int, budget: int, *, speed: float = 1.0, top: float = 0.9, point: Any = None
) -> dict[str, Any]:
    """A result whose accuracy rises from 0.3 to ``top``, the faster the larger ``speed``."""
    rng = random.Random(f"{task}/{method}/{seed}/{point}")
    points = 41
    curve = []
    for i in range(points):
        tokens = budget * i // (points - 1)
        level = top - (top - 0.3) * math.exp(-4 * speed * i / (points - 1))
        curve.append([tokens, 2 * i, round(1.5 * i, 1), round(min(1.0, max(0.0, level + rng.gauss(0, 0.02))), 4)])
    final = curve[-1][3]

    def report(accuracy: float) -> dict[str, Any]:
        return {
            "problems": 100,
            "samples": 4,
            "team": [round(accuracy, 4), round(accuracy - 0.05, 4), round(accuracy + 0.05, 4)],
            "tokens": 22.0,
            "without": {"thinker": round(accuracy * 0.6, 4), "solver": 0.0},
            "blank": {"thinker": round(accuracy * 0.5, 4), "solver": 0.0},
            "alone": {"thinker": 0.1, "solver": round(accuracy * 0.6, 4)},
            "pass@k": {"1": accuracy, "2": accuracy, "4": accuracy},
            "majority@k": {"1": round(accuracy, 4), "2": round(accuracy, 4), "4": round(min(1.0, accuracy + 0.02), 4)},
        }

    def side(shift: float) -> dict[str, Any]:
        return {"n": 64, "mean": shift, "q": [shift - 0.5, shift - 0.2, shift, shift + 0.2, shift + 0.5]}

    boxes = {
        w: {a: {"right": side(0.3 * s), "wrong": side(-0.2 * s)} for a in AGENTS}
        for w, s in (("early", 1.0), ("late", 0.5))
    }
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "point": point or {},
        "curve": curve,
        "train": [[row[0], row[3]] for row in curve[1:]],
        "steps": 2 * (points - 1),
        "tokens": {"joint": budget * 3 // 4, "counterfactual": budget // 4, "rating": 0, "total": budget},
        "seconds": {
            "decode": 20.0,
            "credit": 0.5,
            "update": 30.0,
            "step": 60.0,
            "exam": 2.0,
            "base": 0.0,
            "wall": 70.0,
        },
        "credit": {a: {"shared_corr": 0.8, "no_signal": 0.2, "helped": 0.4, "hurt": 0.1, "share": 0.5} for a in AGENTS},
        "updates": 2 * (points - 1),
        "boxes": boxes,
        "final": {"heldout": report(final), "ood": report(max(0.0, final - 0.2))},
        "budget": budget,
        "versions": {"python": "3.11", "ccpo": "0.1.0", "torch": "2.13.0", "transformers": "5.0"},
        "machine": {"cpu": "a processor", "threads": 1},
    }


def fill(store: Store, study: Study, speeds: dict[str, float], *, leave_out: frozenset[str] = frozenset()) -> None:
    """Give every cell of ``study`` a made-up result, but those of the methods in ``leave_out``; of a grid its first point is the best."""
    store.create()
    chosen: dict[tuple[str, str], Any] = {pair: {} for pair in study.applies()}
    for pair, grid in tune_cells(study).items():
        chosen[pair] = grid[0][0]
        for place, (_, cells) in enumerate(grid):
            for cell in cells:
                _put(store, study, cell, speeds.get(cell.method, 1.0) / (1 + place), leave_out)
    for cell in main_cells(study, chosen):
        _put(store, study, cell, speeds.get(cell.method, 1.0), leave_out)
    for values in sweep_cells(study, chosen).values():
        for place, (_, cells) in enumerate(values):
            for cell in cells:
                _put(store, study, cell, speeds.get(cell.method, 1.0) * (1 + 0.3 * place), leave_out)


def _put(store: Store, study: Study, cell: Any, speed: float, leave_out: frozenset[str]) -> None:
    if cell.method not in leave_out and store.read(cell) is None:
        budget = study.tasks[cell.task].tokens
        top = 0.9 if study.methods[cell.method].train else 0.3
        store.write(cell, made_up(cell.task, cell.method, cell.seed, budget, speed=speed, top=top, point=cell.point))
