"""The README's picture: team reward in training and accuracy on held-out problems, with and without the thinker.

python benchmarks/plot_demo.py runs/demo docs/demo.png        (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(run: Path, out: Path) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    reports = [(e["step"], next(iter(e["reports"].values()))) for e in evaluations]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    steps = [m["step"] for m in metrics]
    axis.plot(
        steps, [m["reward/team"] for m in metrics], color="#9ec5e8", lw=1, label="reward in training (128 rollouts)"
    )
    axis.plot(
        *zip(*[(s, r["team"]["mean"]) for s, r in reports], strict=True),
        "o-",
        color="#0b5cad",
        label="team, held-out problems",
    )
    bare = [(s, r["without"]["thinker"]["mean"]) for s, r in reports if "without" in r]
    axis.plot(*zip(*bare, strict=True), "s--", color="#d1660a", label="team without its thinker")
    axis.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(loc="center right", frameon=False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
