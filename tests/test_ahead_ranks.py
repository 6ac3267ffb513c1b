"""Rollouts beside the update on several processes: two threads talk on each, and what goes wrong on one ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from test_ranks import RECIPE, ccpo, credit, in_ranks, newest, processes_of, rank_of, same_weights, train, weights

TWO = ("--launch", "torchrun:2")
SETTINGS = {"trainer.async_depth": 1, "trainer.save_every": 0, "trainer.steps": 4, "task.digits": "[1,2]"}
SETTINGS |= {
    "bootstrap.layers": 2,
    "bootstrap.steps": 200,
    "bootstrap.noisy_steps": 2,
    "bootstrap.lr": 3e-3,
    "bootstrap.batch": 32,
}
AHEAD = tuple(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_threads_talk_at_once(tmp_path):
    for found in in_ranks(3, "beside", tmp_path):
        assert found["right"] == [True, True]
        assert all(seconds > 0 for seconds in found["seconds"]), "each counts its own"


def test_an_error_anywhere_in_what_all_do_as_one_reaches_all(tmp_path):
    *others, last = in_ranks(3, "as_one", tmp_path)
    assert last["found"] == [["UserError", "mine"], ["ValueError", "mine"], "done"] * 3
    for found in others:
        assert found["found"] == [["UserError", "mine"], ["RunFailure", "ValueError: mine"], "done"] * 3
    assert all(found["after"] == [0, 1, 2] for found in (*others, last)), "nobody is a word behind"


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_it_is_the_run_of_one_process(shard, cache, tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    train(cache, str(RECIPE), *AHEAD, "--set", f"run.dir={alone}")
    train(cache, str(RECIPE), *AHEAD, "--set", f"run.dir={two}", "--set", f"model.shard={shard}", *TWO)
    for step in (1, 2, 3, 4):
        assert credit(two, step) == credit(alone, step)
    same_weights(two, alone)
    behind = [line["async/updates_behind"] for line in lines(two)]
    assert behind == [line["async/updates_behind"] for line in lines(alone)]
    assert behind[0] == 0 and sum(behind) >= 2, behind
    assert all(line["seconds/communication"] > 0 for line in lines(two))


@pytest.mark.slow
def test_a_run_that_was_cut_at_a_checkpoint_goes_on_bit_for_bit(cache, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = (*AHEAD, "--set", "trainer.save_every=3")
    train(cache, str(RECIPE), *settings, "--set", f"run.dir={whole}", "--set", "trainer.steps=6", *TWO)
    train(cache, str(RECIPE), *settings, "--set", f"run.dir={cut}", "--set", "trainer.steps=3", *TWO)
    train(cache, "--resume", str(cut), "--steps", "6", *TWO)
    behind = [line["async/updates_behind"] for line in lines(cut)]
    assert behind == [line["async/updates_behind"] for line in lines(whole)]
    assert behind[0] == behind[3] == 0 and sum(behind) >= 2, behind
    found, expected = weights(cut), weights(whole)
    assert found and set(found) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "of_last", "of_others"),
    [
        ("user", ["UserError", "the judge has gone home"], ["UserError", "the judge has gone home"]),
        ("other", ["ValueError", "the judge has gone home"], ["RunFailure", "ValueError: the judge has gone home"]),
        ("engine", ["MemoryError", "no room for this cache"], ["RunFailure", "MemoryError: no room for this cache"]),
    ],
)
def test_what_goes_wrong_in_the_thread_of_one_ends_all(kind, of_last, of_others, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("CCPO_CACHE", str(cache))
    first, last = in_ranks(2, f"fail_{kind}", tmp_path)
    assert (first["said"], last["said"]) == (of_others, of_last)
    assert not first["threads"] and not last["threads"]
    assert 1 <= len(lines(tmp_path / "run")) < 50
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_a_user_in_a_hurry_does_not_wait_for_a_slow_judge(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("CCPO_CACHE", str(cache))
    for found in in_ranks(2, "hurry", tmp_path):
        assert found["said"] == ["KeyboardInterrupt", ""]
        assert found["threads"] == ["rollouts"], "it is still at it"
    ended = (tmp_path / "1.json").stat().st_mtime
    assert time.time() - ended < 20, "the processes end all the same, though a judge sleeps for another minute"
    assert not processes_of(tmp_path)


def started(cache: Path, run: Path) -> subprocess.Popen:
    """A long run of two processes that has done two steps."""
    settings = ("--set", f"run.dir={run}", "--set", "trainer.steps=100000")
    process = ccpo(cache, str(RECIPE), *AHEAD, *settings, "--set", "trainer.save_every=2", *TWO)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_signal_ends_all_and_the_run_goes_on(cache, tmp_path):
    process = started(cache, run := tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert "Traceback" not in out, out[-3000:]
    assert not processes_of(run)
    steps = int(newest(run).name.removeprefix("step-")) + 3
    train(cache, "--resume", str(run), "--steps", str(steps), *TWO)
    assert [line["step"] for line in lines(run)] == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_killed_rank_ends_all(cache, tmp_path):
    process = started(cache, run := tmp_path / "run")
    victim = next(pid for pid in processes_of(run) if rank_of(pid) == "1")
    os.kill(victim, signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "--resume" in out, out[-2000:]
    assert not processes_of(run)
