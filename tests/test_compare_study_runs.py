"""A whole study with real tiny models, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ccpo.compare.study import load_study

STUDY = {
    "name": "real",
    "base": {
        "bootstrap": {
            "hidden": 32,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "mlp": 48,
            "steps": 60,
            "cooldown": 10,
            "noisy_steps": 2,
            "batch": 32,
            "lr": 3e-3,
        },
        "rollout": {"prompts": 4, "samples": 4, "max_tokens": 12, "max_prompt_tokens": 64},
        "optim": {"lr": 1e-3},
        "eval": {"during": 10},
    },
    "tasks": {
        "sums": {
            "recipe": {
                "team": {
                    "kind": "think_solve",
                    "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="},
                },
                "task": {"kind": "digit_sum", "digits": [1, 2]},
            },
            "ood": {"digits": [3, 3]},
            "tokens": 1500,
            "every": 500,
        }
    },
    "methods": {
        "untrained": {"train": False, "set": {"credit": "shared"}},
        "v1": {"set": {"credit": "ccpo_v1"}},
        "greedy": {"set": {"credit": "shared", "model": {"path": "no/such/model"}}},
    },
    "seeds": 1,
    "exam": {"problems": 10, "samples": 2},
}


@pytest.mark.slow
def test_a_study_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A trained method, an untrained one, and one whose model does not exist: two results, one failure, a page."""
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    file, folder = tmp_path / "real.yaml", tmp_path / "study"
    file.write_text(json.dumps(STUDY))
    command = [sys.executable, "-m", "ccpo", "compare", str(file), "--folder", str(folder), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr  # a cell failed
    assert "no/such/model" in done.stdout
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert lines[0]["cells"] == 2
    found = {line["result"]["method"]: line["result"] for line in lines[1:]}
    trained, untrained = found["v1"], found["untrained"]

    tokens = trained["tokens"]
    assert tokens["total"] == tokens["joint"] + tokens["counterfactual"] >= 1500
    assert tokens["counterfactual"] > 0
    curve = trained["curve"]
    assert [curve[0][0], curve[-1][0]] == [0, tokens["total"]]
    assert len(curve) == 4  # before, at 500 and 1,000, after
    assert trained["steps"] == trained["updates"] == curve[-1][1] > 1
    assert set(trained["boxes"]["late"]) == {"thinker", "solver"}
    assert list(trained["final"]) == ["heldout", "ood"]
    assert trained["final"]["heldout"]["blank"]["solver"] == 0
    assert set(trained["final"]["ood"]["majority@k"]) == {"1", "2"}
    assert trained["final"]["heldout"]["tokens"] > 2
    assert trained["machine"]["threads"] == 1

    assert (untrained["steps"], untrained["tokens"]["total"], len(untrained["curve"])) == (0, 0, 1)
    assert untrained["curve"][0][3] == curve[0][3]  # the same base model before training
    assert all(path.stat().st_size < 6 * 1024 for path in (folder / "cells").glob("*.json"))
    assert list((folder / "work").iterdir()) == []
    text = (folder / "report.md").read_text()
    assert "## Failed cells" in text
    assert "– (failed)" in text

    before = (folder / "results.jsonl").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert (folder / "results.jsonl").read_bytes() == before


def test_the_short_study_is_small():
    of = load_study("short")
    cells = sum(len(of.seeds_of(method)) for method, _ in of.applies())
    assert cells <= 6
    assert all(task.tokens <= 10_000 for task in of.tasks.values())
