"""Loggers on the real packages where they are installed, and a real run whose loggers fail at every point."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import ccpo
from ccpo.loggers import Sinks, make_sinks

torch.set_num_threads(1)

NONE = {"tensorboard": False, "wandb": False, "trackio": False, "project": "project", "name": "name"}
METRICS = {"reward/team": 0.5, "credit/thinker/mean": -0.25, "alarm/truncation": 1.0}


def logged(folder: Path, **wanted: bool) -> None:
    """Three steps, logged as a run does."""
    sinks = make_sinks(folder, **NONE | wanted, config={"optim": {"lr": 0.1}})
    assert set(sinks.sinks) == {name for name, is_wanted in wanted.items() if is_wanted}
    for step in (1, 2, 3):
        sinks.write(step, {name: value * step for name, value in METRICS.items()})
    sinks.close()


def test_what_tensorboard_was_told_can_be_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    for name, value in METRICS.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(step, value * step) for step in (1, 2, 3)]


def log_elsewhere(folder: Path, logger: str, **environment: str) -> None:
    """:func:`logged` in a process of its own: these loggers read the environment when they are imported, and write the rest at its end."""
    code = f"from pathlib import Path; from test_loggers import logged; logged(Path({str(folder)!r}), {logger}=True)"
    environment = {**os.environ, **environment, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wandb_offline_keeps_a_run(tmp_path):
    pytest.importorskip("wandb")
    log_elsewhere(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (kept,) = tmp_path.rglob("*.wandb")
    data = kept.read_bytes()
    for name in METRICS:
        assert name.encode() in data
    assert b"1.5" in data  # the third step's reward


@pytest.mark.slow
def test_trackio_keeps_a_run(tmp_path):
    pytest.importorskip("trackio")
    log_elsewhere(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path))
    with sqlite3.connect(tmp_path / "project.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(m)["reward/team"]) for step, m in rows] == [(1, 0.5), (2, 1.0), (3, 1.5)]


# --- a run goes on ------------------------------------------------------------------------------------------------------

TINY = {
    "run": {"name": "tiny", "threads": 1},
    "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
    "task": {"kind": "digit_sum", "digits": [1, 2], "size": 50},
    "bootstrap": {"hidden": 32, "layers": 1, "mlp": 48, "steps": 2, "noisy_steps": 1, "batch": 8},
    "credit": "removal",
    "rollout": {"prompts": 2, "samples": 2, "max_tokens": 4, "max_prompt_tokens": 64},
    "trainer": {"steps": 3},
    "eval": {"problems": 2, "ablations": False},
    "log": {"tensorboard": False, "wandb": True, "trackio": True},
}


class Fake(types.ModuleType):
    """A logger's module that raises ``error`` in the functions named in ``broken``, from step ``since`` on."""

    def __init__(
        self, name: str, broken: tuple[str, ...] = (), error: BaseException | None = None, since: int = 0
    ) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace()
        self.broken, self.error, self.since, self.said = broken, error, since, []

    def _do(self, what: str, step: int = 10**9) -> None:
        if what in self.broken and step >= self.since:
            raise self.error
        self.said.append((what, step))

    def init(self, **_: object) -> None:
        self._do("init")

    def log(self, metrics: dict[str, float], step: int) -> None:
        assert all(type(value) is float for value in metrics.values())
        self._do("log", step)

    def finish(self) -> None:
        self._do("finish")


@pytest.mark.parametrize(
    ("broken", "error", "since", "steps", "said"),
    [
        (("init",), RuntimeError("not logged in"), 0, [], "could not be started"),
        (("init",), SystemExit(1), 0, [], "could not be started"),
        (("log",), ConnectionError("no network"), 2, [1], "failed at step 2"),
        (("log", "finish"), SystemExit(1), 3, [1, 2], "failed at step 3"),
        (("finish",), OSError("disk full"), 0, [1, 2, 3], "could not be closed"),
    ],
)
def test_a_logger_that_fails_never_stops_a_run(
    tmp_path, tmp_path_factory, monkeypatch, caplog, broken, error, since, steps, said
):
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path_factory.getbasetemp() / "loggers-cache"))
    bad, good = Fake("wandb", broken, error, since), Fake("trackio")
    monkeypatch.setitem(sys.modules, "wandb", bad)
    monkeypatch.setitem(sys.modules, "trackio", good)
    with caplog.at_level(logging.WARNING, "ccpo"):
        result = ccpo.train(TINY, [f"run.dir={tmp_path}/run"])
    assert result.finished
    assert len((result.folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert [step for what, step in bad.said if what == "log"] == steps
    assert [what for what, _ in good.said] == ["init", "log", "log", "log", "finish"]
    assert [r.getMessage().count(said) for r in caplog.records if "wandb" in r.getMessage()] == [1]


def test_an_interrupt_is_the_users_and_is_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks({"any": interrupted})
