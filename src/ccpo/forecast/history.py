"""What a finished run tells of the next: the lengths of its texts, and how many of its rows had no gradient."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ccpo.config import RunConfig, load_recipe
from ccpo.errors import UserError
from ccpo.rollout import read_episodes
from ccpo.runfolder import RunFolder, read_json

LAST = 20  # steps that are looked at
FILES = 5  # of these, the steps whose texts are read


def of_run(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, list[int]], dict[str, float]]:
    """The recipe of a run, the lengths of each agent's texts in its last steps (from its episodes; where there are none, the mean of
    ``completions/AGENT/mean_length`` of its metrics), and the share of each agent's rows without gradient. No lengths where it has made no
    step. Raises UserError for a folder that cannot be read."""
    folder = RunFolder(path, writes=False)
    stored = read_json(folder.recipe)
    if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
        raise UserError(f"{folder.recipe} holds no recipe; give the folder of a run, or a recipe's file")
    if stored.get("objects"):
        raise UserError(
            f"{path} was started from Python with its own {', '.join(stored['objects'])}, which ccpo plan cannot see; plan a recipe that "
            "names them (module:attribute)"
        )
    config = load_recipe(stored["config"], overrides)
    metrics = folder.read_lines(folder.metrics)[-LAST:]
    lengths: dict[str, list[int]] = {}
    for file in sorted(folder.episodes.glob("step-*.jsonl.gz"))[-FILES:] if folder.episodes.is_dir() else ():
        for group, _ in read_episodes(file):
            turns = {id(t): t for r in group.rollouts for t in r.turns} | {
                id(t): t for c in group.counterfactuals for t in c.turns
            }
            for turn in turns.values():
                lengths.setdefault(turn.agent, []).append(turn.completion.tokens)
    if not lengths:
        names = {
            key.split("/")[1]
            for m in metrics
            for key in m
            if key.startswith("completions/") and key.endswith("/mean_length")
        }
        lengths = {a: [round(statistics.fmean(_values(metrics, f"completions/{a}/mean_length")))] for a in names}
    silent = {}
    for agent in lengths:
        rows = sum(_values(metrics, f"actor/{agent}/rows"))
        silent[agent] = sum(_values(metrics, f"actor/{agent}/rows_without_signal")) / rows if rows else 0.0
    return config, lengths, silent


def _values(metrics: Sequence[dict[str, float]], name: str) -> list[float]:
    return [float(m[name]) for m in metrics if name in m]
