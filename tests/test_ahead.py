"""Rollouts that are played while the step before is learned from: by which weights, how far behind, and what goes wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ccpo
from ccpo.ahead import Ahead
from ccpo.build import prepare
from ccpo.config import load_recipe
from ccpo.crew import BEHIND_CAP, importance_cap
from ccpo.errors import UserError
from ccpo.rollout import read_episodes
from ccpo.runs import Reporter
from ccpo.tasks.procedural import DigitSum
from test_trainer import metrics, recipe, same, weights

torch.set_num_threads(1)

AHEAD = {"steps": 4, "save_every": 0, "async_depth": 1}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield os.environ["CCPO_CACHE"]


def said(run: Path, step: int) -> list[str]:
    file = run / "episodes" / f"step-{step:06d}.jsonl.gz"
    return [t.completion.text for group, _ in read_episodes(file) for r in group.rollouts for t in r.turns]


def test_rollouts_are_one_update_behind(tmp_path):
    ccpo.train(recipe(tmp_path / "ahead", trainer=AHEAD))
    ccpo.train(recipe(tmp_path / "still", optim={"lr": 1e-12}))
    ccpo.train(recipe(tmp_path / "sync"))
    ahead, still, sync = (tmp_path / name for name in ("ahead", "still", "sync"))
    for step in (1, 2):  # both by the weights of the start
        assert said(ahead, step) == said(still, step)
    assert said(ahead, 2) != said(sync, 2)
    assert said(ahead, 3) != said(still, 3)
    assert [line["async/updates_behind"] for line in metrics(ahead)] == [0, 1, 1, 1]
    assert all("async/updates_behind" not in line for line in metrics(sync))
    drift = [line["actor/solver/mismatch_k3"] for line in metrics(ahead)]
    assert 10 * drift[0] < min(drift[1:])  # what lies between is the update, not only how the two sides round
    assert all(line["actor/solver/importance_weight"] <= BEHIND_CAP for line in metrics(ahead))


def test_where_nothing_is_learned_it_is_the_same_run(tmp_path):
    frozen = {"optim": {"lr": 1e-12}, "loss": {"importance_cap": BEHIND_CAP}}
    ccpo.train(recipe(tmp_path / "ahead", trainer=AHEAD, **frozen))
    ccpo.train(recipe(tmp_path / "sync", trainer={"save_every": 0}, **frozen))
    lines = [{k: v for k, v in line.items() if not k.startswith("async/")} for line in metrics(tmp_path / "ahead")]
    paid = [k for k in lines[0] if k.split("/")[0] in ("reward", "credit", "tokens", "completions")]
    assert len(paid) > 20
    assert [[a[k] for k in paid] for a in lines] == [[b[k] for k in paid] for b in metrics(tmp_path / "sync")]


def test_a_run_that_was_cut_at_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer = {"steps": 6, "save_every": 3, "async_depth": 1}
    ccpo.train(recipe(whole, trainer=trainer))
    ccpo.train(recipe(cut, trainer=trainer | {"steps": 3}))
    ccpo.resume(cut, steps=6)
    assert [line["async/updates_behind"] for line in metrics(whole)] == [0, 1, 1, 0, 1, 1]
    assert metrics(whole) == metrics(cut)
    assert same(weights(whole, 6), weights(cut, 6))


def test_nobody_is_examined_while_speaking(tmp_path):
    ccpo.train(recipe(tmp_path / "run", trainer=AHEAD | {"eval_every": 2}, rollout={"cache": "always"}))
    assert [line["async/updates_behind"] for line in metrics(tmp_path / "run")] == [0, 1, 0, 1]


def test_a_budget_of_tokens_ends_it(tmp_path):
    result = ccpo.train(recipe(tmp_path / "run", trainer={"tokens": 500, "save_every": 0, "async_depth": 1}))
    totals = [line["tokens/total"] for line in metrics(tmp_path / "run")]
    assert result.finished
    assert totals[-1] >= 500 > totals[-2]


class Failing(DigitSum):
    """Judges the first steps' answers, and then no more."""

    calls = 0

    def verify(self, pairs: Any) -> Any:
        type(self).calls += 1
        if type(self).calls > 4:
            raise UserError("the judge has gone home")
        return super().verify(pairs)


def test_what_goes_wrong_in_the_thread_ends_the_run_in_the_main_one(tmp_path):
    Failing.calls = 0
    with pytest.raises(UserError, match="the judge has gone home"):
        ccpo.train(
            recipe(tmp_path / "run", trainer=AHEAD | {"steps": 20}, eval={"problems": 8, "ablations": False}),
            task=Failing(digits=(1, 2), size=200),
            tests={"test": DigitSum(digits=(1, 2), size=50)},
        )
    assert not [t for t in threading.enumerate() if t.name == "rollouts"]


def test_a_signal_lets_the_step_finish_and_leaves_no_thread(tmp_path):
    class Stopping(Reporter):
        def step(self, step: int, total: int, metrics: Any) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    result = ccpo.train(recipe(tmp_path / "run", trainer=AHEAD | {"steps": 50}), reporter=Stopping())
    assert not result.finished
    assert not [t for t in threading.enumerate() if t.name == "rollouts"]
    assert ccpo.resume(tmp_path / "run", steps=5).finished
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_play_runs_beside_who_began_it():
    gate = threading.Event()

    def play() -> Any:
        assert gate.wait(20)
        return "played"

    with Ahead({}) as ahead:
        ahead.begin(play)  # would hang here if it ran in this thread
        assert ahead.running
        gate.set()
    assert not ahead.running


def test_a_hurried_end_does_not_wait():
    ahead = Ahead({})
    ahead.begin(lambda: time.sleep(5))
    started = time.monotonic()
    ahead.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"engine": "transformers"}, "speaks with the very weights"),
        ({"engine": "vllm"}, "sleeps during an update"),
    ],
)
def test_engines_that_share_the_learners_weights_are_refused(tmp_path, model, words):
    with pytest.raises(UserError, match=words) as caught:
        prepare(load_recipe(recipe(tmp_path / "run", trainer=AHEAD, model=model)))
    assert "trainer.async_depth: 0" in str(caught.value)


def test_importance_is_weighed_unless_the_ratio_does_it(tmp_path):
    def cap(**loss: Any) -> float | None:
        return importance_cap(load_recipe(recipe(tmp_path / "run", trainer=AHEAD, loss=loss)))

    assert cap() == BEHIND_CAP
    assert cap(importance_cap=5.0) == 5.0
    assert cap(old_logprobs="engine") is None
    assert importance_cap(load_recipe(recipe(tmp_path / "run"))) is None
