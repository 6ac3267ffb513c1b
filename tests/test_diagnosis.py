"""``ccpo diagnose`` on recipes and runs of tiny real models, and what it shows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

import ccpo
from ccpo.build import prepare
from ccpo.config import load_recipe
from ccpo.diagnose import Effort
from ccpo.diagnose.free_riding import Thoroughness
from ccpo.diagnose.report import sentences, variance_tables
from ccpo.diagnosis import contenders, free_riding, variance
from ccpo.errors import UserError
from test_docs import names

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]

TINY = {
    "run": {"name": "tiny", "seed": 3, "threads": 1},
    "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
    "task": {"kind": "digit_sum", "digits": [1, 2], "size": 200},
    "bootstrap": {"hidden": 32, "layers": 2, "mlp": 48, "steps": 200, "noisy_steps": 2, "batch": 32, "lr": 3e-3},
    "credit": {"kind": "ccpo_v1", "pairing": "mean"},
    "advantage": "grpo",
    "rollout": {"prompts": 3, "samples": 4, "max_tokens": 12, "max_prompt_tokens": 64},
    "optim": {"lr": 1e-2},
    "trainer": {"steps": 2, "save_every": 2},
    "eval": {"problems": 4, "during": 4, "ablations": False},
    "log": {"tensorboard": False},
}
LITTLE = Effort(batches=4, warm=1, exact=1, problems=2, truth=3)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """One base model for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield os.environ["CCPO_CACHE"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    ccpo.train(TINY, [f"run.dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def report() -> dict:
    return variance(TINY, rules=["shared", "ccpo_v1", "removal/none"], effort=LITTLE)


def test_a_recipe_is_probed_as_it_starts_and_leaves_nothing_behind(report: dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = variance(TINY, rules=["shared", "ccpo_v1", "removal/none"], effort=LITTLE)
    assert list(tmp_path.iterdir()) == []
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    assert report["subject"] == "tiny at its start"
    assert set(report["rules"]) == {"shared", "ccpo_v1", "removal/none"}
    assert [rule["estimator"] for rule in report["rules"].values()] == ["grpo", "grpo", "none"]
    shared, v1 = report["rules"]["shared"], report["rules"]["ccpo_v1"]
    assert v1["tokens"] > shared["tokens"] > 0
    for agent in ("thinker", "solver"):
        assert shared["agents"][agent]["shared_corr"] == pytest.approx(1)
        assert shared["agents"][agent]["norm_exact"] == pytest.approx(shared["agents"][agent]["norm_sketch"], rel=0.2)
        assert shared["agents"][agent]["sum_error"] < 1e-4
    json.dumps(report, allow_nan=False)


def test_another_seed_is_other_rollouts(report: dict):
    other = variance(TINY, rules=["shared"], overrides=["run.seed=4"], effort=LITTLE)
    assert other["rules"]["shared"]["agents"] != report["rules"]["shared"]["agents"]


def test_a_run_is_probed_with_its_newest_weights(run: Path, report: dict):
    found = variance(run, rules=["shared"], effort=LITTLE)
    assert found["subject"] == str(run)
    assert (
        found["rules"]["shared"]["agents"]["thinker"]["mean"] != report["rules"]["shared"]["agents"]["thinker"]["mean"]
    )
    larger = variance(run, rules=["shared"], overrides=["rollout.samples=6"], effort=LITTLE)
    assert larger["samples"] == 6
    assert larger["rules"]["shared"]["tokens"] > found["rules"]["shared"]["tokens"]


@pytest.mark.parametrize(
    "override", [["model.sharing=lora"], ["model.sharing=shared"], ["rollout.removal=frozen", "rollout.draws=1"]]
)
def test_every_sharing_and_a_frozen_removal(run: Path, override: list[str]):
    rules = ["shared", "removal"]
    found = variance(TINY, rules=rules, overrides=override, effort=LITTLE)
    for rule in found["rules"].values():
        assert set(rule["agents"]) == {"thinker", "solver"}
        assert rule["agents"]["thinker"]["sum_error"] < 1e-3
    assert set(found["weights"]) == ({"shared"} if "model.sharing=shared" in override else {"thinker", "solver"})
    if "rollout.removal=frozen" in override:
        assert found["removal"] == "frozen"
        trained = variance(run, rules=rules, overrides=override, effort=LITTLE)
        assert trained["rules"]["removal"]["tokens"] > trained["rules"]["shared"]["tokens"]


def test_an_agent_that_is_frozen_has_no_gradient_to_measure():
    found = variance(TINY, rules=["shared"], overrides=["agents.thinker.frozen=true"], effort=LITTLE)
    assert set(found["rules"]["shared"]["agents"]) == {"solver"}


def test_the_rules_by_default():
    def names(*overrides: str, recipe: object = TINY) -> list[str]:
        return [c.name for c in contenders(prepare(load_recipe(recipe, overrides)), ())]

    assert names()[0] == "shared"
    assert names()[-1] == "ccpo_v1"
    assert "removal" in names()
    assert "own" not in names()
    assert "own" in names(recipe="vote")
    assert names("credit={kind: shared}").count("shared") == 1


def test_the_recipes_rule_keeps_its_settings_and_estimators_are_chosen_in_turn():
    setup = prepare(load_recipe({**TINY, "advantage": "rloo"}))
    own, other, third = contenders(setup, ["ccpo_v1", "removal/none", "removal"], "dr_grpo")
    assert own.rule is setup.rule
    assert tuple(c.payroll.estimator for c in (own, other, third)) == ("dr_grpo", "none", "dr_grpo")
    assert contenders(setup, ["shared"])[0].payroll.estimator == "rloo"
    assert contenders(setup, ["auto"])[0].payroll.estimator == "none"  # its own


@pytest.mark.parametrize(
    ("rules", "advantage", "says"),
    [
        (["shard"], None, "shared"),
        (["shared/nine"], None, "nine"),
        (["shared"], "grop", "grpo"),
        (["shared", "shared"], None, "twice"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(rules, advantage, says, monkeypatch):
    monkeypatch.setattr("ccpo.diagnosis.load_subject", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=says):
        variance(TINY, rules=rules, advantage=advantage, effort=LITTLE)


# ---- what is shown


def shown(report: dict, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    variance_tables(report, console)
    return console.export_text()


def test_the_tables_fit_eighty_columns(report: dict):
    text = shown(report)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("removal/none", "thinker", "solver", "fidelity", "Lemma A.1", "thinker → solver", "±"):
        assert word in text
    name = "a_rule_with_a_name_of_more_than_thirty_characters/reinforce++"
    odd = {**report, "rules": {name: report["rules"]["shared"]}, "subject": "[red]" * 30}
    assert max(map(len, shown(odd).splitlines())) <= 80
    assert "[red]" in shown(odd)  # names are never markup


def test_what_is_wrong_is_said_in_words(report: dict):
    along = {"value": 0.9, "error": 0.1}
    alarm = {"along": along, "size": along, "p_along": 0.5, "p_anywhere": 0.0002, "alarm": True, "problems": 9}
    unsure = {"problems": 2, "draws": 2, "reliability": {"thinker": 0.25}}
    lines = sentences({**report, "lemma": {"thinker": alarm}, "truth": unsure})
    (first, second) = [line for line in lines if line.startswith("Warning")]
    assert "moves with its own text" in first
    assert "0.90 ± 0.10" in first
    assert "75%" in second
    assert not [line for line in sentences({**report, "truth": None}) if line.startswith("Warning")]


# ---- what is documented


def test_every_key_of_the_report_is_documented(report: dict):
    text = (Path(__file__).parents[1] / "docs" / "diagnose.md").read_text(encoding="utf-8")
    assert set(names(text, "key")) == set(report)
    figures = set(names(text, "figure"))
    for rule in report["rules"].values():
        assert set(rule) == {"estimator", "branch", "tokens", "agents"}
        for found in rule["agents"].values():
            assert set(found) == figures
    parts = [*report["baseline"].values(), *report["lemma"].values(), report["truth"], *report["influence"]]
    for part in parts:
        assert {key for key in part if f"`{key}`" not in text} == set()


def test_a_run_keeps_what_its_agents_contribute(run: Path):
    report = free_riding(run, effort=Thoroughness(problems=6, samples=2, replayed=2, replays=2))
    assert report == json.loads((run / "free_riding.json").read_text())
    assert (report["kind"], report["checkpoint"], report["data"]) == ("run", "step-000002", "heldout")
    assert set(report["agents"]) == {"thinker", "solver"}
    for figure in ("removal", "blank", "replay", "shapley"):
        assert set(report["agents"]["thinker"][figure]) == {"mean", "low", "high", "problems", "needed"}
    assert set(report) <= set(names((ROOT / "docs" / "free-riding.md").read_text(), "key"))


def test_a_run_without_a_checkpoint_is_refused(run: Path, tmp_path: Path):
    (tmp_path / "recipe.json").write_text((run / "recipe.json").read_text())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        free_riding(tmp_path)
