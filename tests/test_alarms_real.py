"""Alarms on real tiny models with a setting that is wrong: each is raised by the training itself and not by a script."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ccpo
from ccpo.alarms import Alarm, find_alarms
from ccpo.crew import Crew
from ccpo.runfolder import RunFolder
from ccpo.runs import Reporter

torch.set_num_threads(1)

TINY = {
    "run": {"name": "tiny", "seed": 3, "threads": 1},
    "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
    "task": {"kind": "digit_sum", "digits": [1, 2], "size": 400},
    "bootstrap": {
        "hidden": 32,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "mlp": 48,
        "steps": 200,
        "batch": 32,
        "noisy_steps": 1,
        "lr": 3e-3,
    },
    "credit": {"kind": "removal"},
    "advantage": "none",
    "rollout": {"prompts": 8, "samples": 4, "max_tokens": 12, "max_prompt_tokens": 64},
    "optim": {"lr": 1e-4},
    "trainer": {"steps": 12, "save_every": 6},
    "eval": {"problems": 8, "temperature": 1.0, "ablations": False},
    "log": {"tensorboard": False},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One base model for the whole file."""
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path_factory.getbasetemp() / "alarms-cache"))


class Heard(Reporter):
    def __init__(self) -> None:
        self.alarms: list[tuple[int, Alarm]] = []

    def alarm(self, step: int, alarm: Alarm) -> None:
        self.alarms.append((step, alarm))


def told(folder: Path, *overrides: str) -> tuple[set[str], set[str]]:
    """The alarms that were told of while a run went on, and those that hold at its end."""
    heard = Heard()
    ccpo.train(TINY, [f"run.dir={folder}", *overrides], reporter=heard)
    return {alarm.name for _, alarm in heard.alarms}, {alarm["name"] for alarm in find_alarms(folder)}


def test_too_few_tokens_truncate(tmp_path):
    during, after = told(tmp_path / "run", "rollout.max_tokens=3")
    assert "truncation" in during & after
    whole, end = told(tmp_path / "whole", "rollout.max_tokens=40")
    assert "truncation" not in whole | end


def test_an_engine_that_is_never_given_the_new_weights_drifts(tmp_path, monkeypatch):
    fast = "optim.lr=0.01"
    during, _ = told(tmp_path / "sound", fast)
    assert "engine_mismatch" not in during
    monkeypatch.setattr(Crew, "refresh", lambda self, everything=False: None)
    during, after = told(tmp_path / "stale", fast)
    assert "engine_mismatch" in during & after


def test_a_resumed_run_raises_the_alarms_that_it_would_have_raised(tmp_path):
    told(tmp_path / "whole", "rollout.max_tokens=3")
    told(tmp_path / "parts", "rollout.max_tokens=3", "trainer.steps=6")
    ccpo.resume(tmp_path / "parts", steps=12)
    whole, parts = (
        [
            {k: v for k, v in line.items() if k == "step" or k.startswith("alarm/")}
            for line in run.read_lines(run.metrics)
        ]
        for run in (RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts"))
    )
    assert parts == whole
    assert any(key.startswith("alarm/") for line in whole for key in line)
