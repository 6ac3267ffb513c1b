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
import ccpo.trainer
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
        (("log",), ConnectionError("no network"), 2, [0, 1], "failed at step 2"),
        (("log", "finish"), SystemExit(1), 3, [0, 1, 2], "failed at step 3"),
        (("finish",), OSError("disk full"), 0, [0, 1, 2, 3], "could not be closed"),
    ],
)
def test_a_logger_that_fails_never_stops_a_run(tmp_path, cache, monkeypatch, caplog, broken, error, since, steps, said):
    bad, good = Fake("wandb", broken, error, since), Fake("trackio")
    monkeypatch.setitem(sys.modules, "wandb", bad)
    monkeypatch.setitem(sys.modules, "trackio", good)
    with caplog.at_level(logging.WARNING, "ccpo"):
        result = ccpo.train(TINY, [f"run.dir={tmp_path}/run"])
    assert result.finished
    assert len((result.folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert [step for what, step in bad.said if what == "log"] == steps
    assert [what for what, _ in good.said] == ["init", "log", "log", "log", "log", "finish"]
    assert [r.getMessage().count(said) for r in caplog.records if "wandb" in r.getMessage()] == [1]


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path_factory.getbasetemp() / "loggers-cache"))


def told_tensorboard(run: Path) -> tuple[dict[str, dict[int, float]], list[int]]:
    """What TensorBoard reads of a run: by name, the figures by step; and the steps of all events, one after the other."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    figures = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    files = sorted((run / "tensorboard").iterdir())
    return figures, [e.step for file in files for e in EventFileLoader(str(file)).Load() if e.summary.value]


def evaluated(run: Path) -> dict[int, float]:
    """The team's accuracy by step, as ``evaluations.jsonl`` has it."""
    lines = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    return {line["step"]: line["reports"]["heldout"]["team"]["mean"] for line in lines}


WITH_TENSORBOARD = {
    **TINY,
    "trainer": {"steps": 3, "eval_every": 2},
    "eval": {"problems": 8, "during": 4},
    "log": {"tensorboard": True},
}


def test_every_evaluation_reaches_the_loggers_and_no_step_is_logged_twice(tmp_path, cache):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    ccpo.train(WITH_TENSORBOARD, [f"run.dir={run}"])
    figures, steps = told_tensorboard(run)
    assert steps == [0, 1, 2, 3]
    assert figures["eval/team"] == pytest.approx(evaluated(run))
    assert list(figures["eval/team"]) == [0, 2, 3]
    assert list(figures["eval/alone_solver"]) == [0, 3]  # with ablations, which those during training leave out
    assert list(figures["reward/team"]) == [1, 2, 3]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["reward/team"][3] == pytest.approx(last["reward/team"])
    assert "eval/team" not in last


def test_a_run_that_goes_on_logs_no_evaluation_again(tmp_path, cache):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    ccpo.train(WITH_TENSORBOARD, [f"run.dir={run}"])
    ccpo.resume(run)
    assert told_tensorboard(run)[1] == [0, 1, 2, 3]
    ccpo.resume(run, steps=5)
    figures, steps = told_tensorboard(run)
    assert steps == [0, 1, 2, 3, 4, 5]
    assert list(figures["eval/team"]) == [0, 2, 3, 4, 5]
    assert list(figures["eval/alone_solver"]) == [0, 3, 5]


def test_the_last_step_is_logged_where_the_evaluation_after_it_fails(tmp_path, cache, monkeypatch):
    pytest.importorskip("tensorboard")
    evaluate = ccpo.trainer.evaluate

    def fails_at_the_end(team, tests, voices, limits, exam):
        if (tmp_path / "run" / "metrics.jsonl").exists():
            raise OSError("no space")
        return evaluate(team, tests, voices, limits, exam)

    monkeypatch.setattr("ccpo.trainer.evaluate", fails_at_the_end)
    with pytest.raises(OSError, match="no space"):
        ccpo.train(WITH_TENSORBOARD, [f"run.dir={tmp_path}/run", "trainer.eval_every=0"])
    figures, steps = told_tensorboard(tmp_path / "run")
    assert steps == [0, 1, 2, 3]
    assert list(figures["eval/team"]) == [0]


def test_an_interrupt_is_the_users_and_is_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks({"any": interrupted})
