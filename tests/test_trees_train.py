"""Whole runs with trees of rollouts, swapped ballots, process rewards and budgets in tokens, on real tiny models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ccpo
from ccpo.build import prepare
from ccpo.config import load_recipe
from ccpo.errors import UserError
from ccpo.planner import PROBE_EVERY, Planner
from ccpo.rollout import read_episodes
from ccpo.runfolder import RunFolder
from ccpo.teams import PlayTeam, chain, think_solve
from test_trainer import VOTE, metrics, recipe, same, weights

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield os.environ["CCPO_CACHE"]


def test_auto_plans_its_trees_and_trains_each_text_once(tmp_path):
    ccpo.train(recipe(tmp_path / "run", credit={"kind": "auto"}))
    lines = metrics(tmp_path / "run")
    assert lines[0]["layout/level1_texts"] == 2  # the probe
    assert all(line["layout/level0_texts"] >= 2 for line in lines)
    for step, line in enumerate(lines, start=1):
        groups = [group for group, _ in read_episodes(RunFolder(tmp_path / "run").episode_file(step))]
        texts = int(line["layout/level0_texts"])
        plays = int(line["layout/level1_texts"])
        assert all(len(group.rollouts) == texts * plays for group in groups)
        assert line["actor/thinker/rows"] == 4 * texts
        assert line["actor/solver/rows"] == 4 * texts * plays
        assert line["tokens/counterfactual"] == 0


def test_a_planned_run_that_was_cut_goes_on_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ccpo.train(recipe(whole, credit={"kind": "auto"}))
    ccpo.train(recipe(cut, credit={"kind": "auto"}, trainer={"steps": 2}))
    ccpo.resume(cut, steps=4)
    assert same(weights(whole), weights(cut))
    assert metrics(whole) == metrics(cut)


def test_replay_takes_the_recipes_tree(tmp_path):
    ccpo.train(recipe(tmp_path / "run", credit={"kind": "replay"}, rollout={"branch": [2, 2]}))
    line = metrics(tmp_path / "run")[0]
    assert (line["actor/thinker/rows"], line["actor/solver/rows"]) == (8, 16)


def test_swapped_ballots_cost_no_token(tmp_path):
    ccpo.train(recipe(tmp_path / "run", **VOTE, credit={"kind": "auto"}))
    lines = metrics(tmp_path / "run")
    assert all(line["tokens/counterfactual"] == 0 for line in lines)
    assert all(0 <= line["credit/voter1/voter1_removal_weight"] <= 1 for line in lines)


def test_process_rewards_change_what_the_thinker_is_paid(tmp_path):
    ccpo.train(recipe(tmp_path / "without", credit={"kind": "shared"}))
    data = recipe(tmp_path / "with", credit={"kind": "shared"})
    ccpo.train(data | {"process": 1.0})
    plain, judged = metrics(tmp_path / "without"), metrics(tmp_path / "with")
    assert 0 <= judged[0]["credit/thinker/process"] <= 1
    assert "credit/thinker/process" not in plain[0]
    assert not same(weights(tmp_path / "without"), weights(tmp_path / "with"))


def test_a_budget_of_tokens_ends_the_run_at_the_step_that_reaches_it(tmp_path):
    data = recipe(tmp_path / "run", credit={"kind": "shared"}, eval={"problems": 8, "during": 4, "every_tokens": 150})
    data["trainer"] = {"tokens": 600, "save_every": 0}
    result = ccpo.train(data)
    lines = metrics(tmp_path / "run")
    totals = [line["tokens/total"] for line in lines]
    assert result.finished
    assert totals[-1] >= 600 > totals[-2]
    examined = [line["tokens/total"] for line in lines if "eval/team" in line]
    crossings = {int(total // 150) for total in totals[:-1] if total >= 150}
    assert {int(total // 150) for total in examined} == crossings
    logged = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert logged[0]["tokens"] == 0
    assert logged[-1]["tokens"] == totals[-1]


def test_a_falling_rate_falls_with_the_budget_of_tokens(tmp_path):
    data = recipe(tmp_path / "run", credit={"kind": "shared"})
    data["trainer"] = {"tokens": 600, "save_every": 0}
    data["optim"] = {"lr": 1e-3, "decay": "linear"}
    ccpo.train(data)
    lines = metrics(tmp_path / "run")
    spent = [line["tokens/total"] - line["tokens/joint"] for line in lines]  # before the step
    assert len(lines) >= 3
    assert any("actor/solver/lr" in line for line in lines[1:])
    for line, before in zip(lines, spent, strict=True):
        # a step counts its own rollouts after its update, and shared reward has no others
        for agent in ("thinker", "solver"):
            rate = line.get(f"actor/{agent}/lr")
            assert rate is None or rate == pytest.approx(1e-3 * (1 - before / 600))


def refused(**sections) -> str:
    with pytest.raises(UserError) as caught:
        prepare(load_recipe(recipe(Path("unused"), **sections)))
    return str(caught.value)


def test_trees_that_do_not_fit_are_refused_before_anything_runs():
    assert "rollout.samples: 6" in refused(rollout={"branch": [3, 2]})
    assert "2 or more" in refused(credit={"kind": "auto"}, rollout={"samples": 1})

    async def play(problem, speak):
        return await speak("solver", problem.text)

    team = PlayTeam("mine", ("solver",), play)
    with pytest.raises(UserError, match="no levels"):
        prepare(load_recipe(recipe(Path("unused"), rollout={"branch": [4]})), team=team)
    assert prepare(load_recipe(recipe(Path("unused"), credit={"kind": "auto"})), team=team).branch == ()


def test_the_planner_probes_and_then_uses_what_it_has_seen():
    planner = Planner(think_solve(), 8)
    assert planner.branch(0) == (4, 2)
    planner.state = {"costs": [20.0, 2.0], "variances": [0.1, 0.1]}
    assert planner.branch(1) == (4, 2)
    planner.state = {"costs": [2.0, 20.0], "variances": [0.1, 0.1]}
    assert planner.branch(1) == (8, 1)
    assert planner.branch(PROBE_EVERY) == (4, 2)
    assert planner.branch(1) == (8, 1)
    assert Planner(chain(1), 8).branch(0) == (8,)


def test_one_step_with_long_texts_does_not_turn_the_layout(monkeypatch):
    """The costs of one step are a sample: what is planned with is their moving mean, which starts at the first step's own."""
    planner, played = Planner(think_solve(), 8), SimpleNamespace(reward_PN=torch.zeros(2, 8))
    planner.state["variances"] = [0.1, 0.1]
    layouts = []
    for costs in ([20.0, 2.0], [20.0, 2.0], [2.0, 20.0], [20.0, 2.0], *[[2.0, 20.0]] * 10):
        monkeypatch.setattr("ccpo.planner._costs", lambda *_, costs=costs: costs)
        planner.learn(played, (8, 1))
        layouts.append(planner.branch(1))
    assert layouts[:4] == [(4, 2)] * 4 and layouts[-1] == (8, 1)


def test_the_metrics_of_trees_votes_and_process_rewards_are_documented(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    ccpo.train(recipe(tmp_path / "pair", credit={"kind": "auto"}) | {"process": 0.5})
    ccpo.train(recipe(tmp_path / "vote", **VOTE, credit={"kind": "auto"}))
    named = {
        name.replace("thinker_", "TURN_")
        .replace("thinker", "AGENT")
        .replace("voter1_", "TURN_")
        .replace("voter1", "AGENT")
        for folder in ("pair", "vote")
        for name in metrics(tmp_path / folder)[0]
        if name.startswith(("credit/thinker/", "credit/voter1/", "layout/"))
    }
    named = {name.replace("level0", "levelL").replace("level1", "levelL") for name in named}
    assert {"credit/AGENT/TURN_removal_weight", "layout/levelL_variance", "credit/AGENT/process"} <= named
    assert {name for name in named if f"`{name}`" not in text} == set()


def test_auto_with_cached_plays_without_the_thinker(tmp_path):
    ccpo.train(recipe(tmp_path / "run", credit={"kind": "auto", "pairing": "cached"}))
    lines = metrics(tmp_path / "run")
    assert all(line["tokens/counterfactual"] > 0 for line in lines)
    assert all(0 <= line["credit/thinker/thinker_without_weight"] <= 1 for line in lines)
    assert not any("credit/solver/solver_without_weight" in line for line in lines)
