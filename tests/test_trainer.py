"""The whole loop on real tiny models: every schedule, rule and sharing; resume bit for bit; signals; failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ccpo
from ccpo.credit import Shapley
from ccpo.errors import RunFailure, UserError
from ccpo.rollout import read_episodes
from ccpo.teams import Agent, PlayTeam

torch.set_num_threads(1)

TINY = {
    "run": {"name": "tiny", "seed": 3, "threads": 1},
    "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
    "task": {"kind": "digit_sum", "digits": [1, 2], "size": 200},
    "bootstrap": {
        "hidden": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "mlp": 48,
        "steps": 200,
        "noisy_steps": 2,
        "batch": 32,
        "lr": 3e-3,
    },
    "credit": {"kind": "ccpo_v1"},
    "rollout": {"prompts": 4, "samples": 4, "max_tokens": 12, "max_prompt_tokens": 64},
    "optim": {"lr": 1e-3},
    "trainer": {"steps": 4, "save_every": 2},
    "eval": {"problems": 8, "during": 4, "temperature": 1.0},
    "log": {"tensorboard": False},
}

VOTERS = ("voter1", "voter2", "voter3")
VOTE = {
    "team": {"kind": "voting", "k": 3, "prompts": dict.fromkeys(VOTERS, "{problem}=")},
    "task": {"kind": "truth_choice", "options": 3, "literals": 2, "size": 200},
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """One base model for the whole file."""
    before = os.environ.get("CCPO_CACHE")
    os.environ["CCPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield os.environ["CCPO_CACHE"]
    if before is None:
        del os.environ["CCPO_CACHE"]
    else:
        os.environ["CCPO_CACHE"] = before


def recipe(folder: Path, **sections: dict) -> dict:
    data = json.loads(json.dumps(TINY))
    for name, values in sections.items():
        if isinstance(data.get(name), dict) and "kind" not in values:
            data[name] |= values
        else:
            data[name] = values
    data["run"] |= {"dir": str(folder)}
    return data


def metrics(folder: Path) -> list[dict]:
    """The metrics of a run without what a clock makes different."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in lines]


def weights(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((folder / "checkpoints" / f"step-{step:06d}" / "policies").glob("*/*.safetensors")):
        found |= {f"{file.parent.name}/{k}": v for k, v in load_file(file).items()}
    assert found
    return found


def base_model() -> Path:
    """The base model of the digit sums in the cache."""
    folders = Path(os.environ["CCPO_CACHE"]).glob("base-*")
    return next(f for f in folders if "DigitSum" in (f / "done.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_everything_a_reader_needs(tmp_path):
    result = ccpo.train(recipe(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.finished
    for key in ("team_before", "team_after", "without_thinker_after", "blank_thinker_after", "solo_after"):
        assert 0 <= summary[key] <= 1
    assert summary["without_solver_after"] == 0  # nobody else answers
    assert summary["tokens_joint"] > 0
    assert summary["tokens_counterfactual"] > 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for key in (
        "reward/team",
        "reward/without_thinker",
        "credit/thinker/mean",
        "credit/thinker/share",
        "credit/thinker/helped",
        "credit/thinker/no_signal",
        "credit/solver/gate",
        "tokens/joint",
        "tokens/counterfactual",
    ):
        assert key in lines[-1], key
    groups = list(read_episodes(tmp_path / "run" / "episodes" / "step-000001.jsonl.gz"))
    assert len(groups) == 4
    group, record = groups[0]
    assert [t.agent for t in group.rollouts[0].turns] == ["thinker", "solver"]
    assert {c.removed for c in group.counterfactuals} == {("thinker",)}
    assert set(record["rollouts"][0]["credit"]) == {"thinker", "solver"}
    assert sum(line["tokens/joint"] for line in lines) == summary["tokens_joint"]


def test_the_trained_agents_load_with_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ccpo.train(recipe(tmp_path / "run", trainer={"steps": 1}))
    for agent in ("thinker", "solver"):
        folder = tmp_path / "run" / "checkpoints" / "step-000001" / "agents" / agent
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer.encode("1+2")) == "1+2"
        assert model.config.hidden_size == 32


def test_the_same_seed_gives_the_same_result_and_another_one_does_not(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ccpo.train(recipe(tmp_path / name, run={"seed": seed}))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "trainer": {"schedule": "alternating", "period": 1, "first": "thinker"},
            "credit": {"kind": "ccpo_v1", "pairing": "cached"},
        },
        pytest.param(
            {"model": {"sharing": "shared"}, "optim": {"lr": 1e-3, "minibatches": 2, "epochs": 2}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"model": {"sharing": "lora", "lora": {"rank": 2}}}, marks=pytest.mark.slow),
    ],
    ids=["separate", "alternating-cached", "shared-minibatches", "lora"],
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path, sections):
    sections = {k: dict(v) for k, v in sections.items()}
    whole = {**sections, "trainer": {**sections.get("trainer", {}), "steps": 4, "save_every": 2}}
    ccpo.train(recipe(tmp_path / "whole", **whole))
    ccpo.train(recipe(tmp_path / "cut", **whole))
    # as after a kill -9 in the middle of step 4: the last checkpoint is gone, the logs are ahead of the one before it
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    (tmp_path / "cut" / "summary.json").unlink()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    result = ccpo.resume(tmp_path / "cut")
    assert result.finished
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    for step in range(1, 5):
        name = f"step-{step:06d}.jsonl.gz"
        assert (tmp_path / "cut" / "episodes" / name).read_bytes() == (
            tmp_path / "whole" / "episodes" / name
        ).read_bytes()


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    ccpo.train(recipe(tmp_path / "whole"))
    ccpo.train(recipe(tmp_path / "cut"))
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    ccpo.resume(tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(tmp_path):
    ccpo.train(recipe(tmp_path / "run"))
    file = next((tmp_path / "run" / "checkpoints" / "step-000004" / "policies" / "thinker").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"step-000002"):
        ccpo.resume(tmp_path / "run")


def test_nothing_is_decoded_that_the_active_agents_do_not_need(tmp_path):
    ccpo.train(
        recipe(
            tmp_path / "run",
            credit={"kind": "ccpo_v2"},
            trainer={"schedule": "alternating", "period": 1, "first": "solver", "steps": 2},
        )
    )
    solver, thinker = metrics(tmp_path / "run")
    assert solver["tokens/counterfactual"] == 0  # a solver that is paid R needs no solo answer
    assert thinker["tokens/counterfactual"] > 0
    assert "actor/thinker/loss" not in solver
    assert "actor/solver/loss" not in thinker


def test_voting_costs_no_counterfactual_token(tmp_path):
    ccpo.train(recipe(tmp_path / "run", **VOTE, trainer={"steps": 2}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens_counterfactual"] == 0
    assert {f"without_{voter}_after" for voter in VOTERS} <= summary.keys()


def test_shapley_values_of_a_vote_cost_no_token_and_sum_to_the_reward(tmp_path):
    ccpo.train(recipe(tmp_path / "run", **VOTE, credit={"kind": "shapley"}, trainer={"steps": 2}))
    lines = metrics(tmp_path / "run")
    assert [line["tokens/counterfactual"] for line in lines] == [0, 0]
    for line in lines:
        paid = sum(line[f"credit/voter{i}/mean"] for i in (1, 2, 3))
        assert paid == pytest.approx(line["reward/team"], abs=1e-6)
        assert {"reward/without_voter1", "reward/without_voter1_voter2"} <= line.keys()
    [(group, record), *_] = read_episodes(tmp_path / "run" / "episodes" / "step-000001.jsonl.gz")
    assert {c.removed for c in group.counterfactuals} == set(Shapley().needs(VOTERS, None, VOTERS))
    for rollout, paid in zip(group.rollouts, record["rollouts"], strict=True):
        assert sum(paid["credit"].values()) == pytest.approx(rollout.reward, abs=1e-6)


def test_sampled_orders_go_on_where_they_were_after_a_resume(tmp_path):
    sampled = {**VOTE, "credit": {"kind": "shapley", "method": "sampled", "permutations": 2}}
    for name in ("whole", "cut"):
        ccpo.train(recipe(tmp_path / name, **sampled))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    (tmp_path / "cut" / "summary.json").unlink()
    ccpo.resume(tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    asked = []
    for step, line in enumerate(metrics(tmp_path / "whole"), 1):
        assert all(f"credit/{voter}/shapley_error" in line for voter in VOTERS)
        [(group, _), *_] = read_episodes(tmp_path / "whole" / "episodes" / f"step-{step:06d}.jsonl.gz")
        asked.append({c.removed for c in group.counterfactuals})
        assert asked[-1] == Shapley(method="sampled", permutations=2).needs_at(
            VOTERS, None, VOTERS, {"step": step - 1}, free=True
        )
    assert any(one != asked[0] for one in asked)


def test_a_team_with_too_many_coalitions_is_refused_before_anything_is_loaded(tmp_path):
    large = {"kind": "voting", "k": 13}
    with pytest.raises(UserError, match=r"credit\.method: sampled"):
        ccpo.train(recipe(tmp_path / "run", team=large, credit={"kind": "shapley", "method": "exact"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sections",
    [
        {"credit": {"kind": "shared"}, "advantage": "rloo"},
        {"credit": {"kind": "ccpo_v1", "gate": "trajectory"}, "advantage": "none"},
        {
            "credit": {"kind": "ccpo_v1", "skip_flat": True, "center": True},
            "advantage": "reinforce++",
            "loss": {"kind": "reinforce++"},
        },
        {
            "credit": {"kind": "ccpo_v2"},
            "advantage": "dr_grpo",
            "loss": {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": 10.0},
        },
        {
            "credit": {"kind": "removal"},
            "loss": {"kind": "turn", "aggregate": "trajectory-mean", "kl": "k3", "kl_coef": 0.1},
        },
        {"credit": {"kind": "shapley"}, "advantage": "dr_grpo"},
        {"credit": {"kind": "own"}, "loss": {"kind": "cispo", "importance_cap": 2.0, "entropy_coef": 0.01}},
        {"rollout": {"removal": "blank"}},
        {"rollout": {"removal": "placeholder", "placeholder": "12"}},
        {"rollout": {"removal": "frozen"}},
        {"rollout": {"boxed_reward": {"thinker": -0.25}}, "agents": {"solver": {"frozen": True}}},
        {"model": {"engine": "transformers"}},
    ],
    ids=lambda s: "-".join(f"{k}:{v.get('kind', next(iter(v))) if isinstance(v, dict) else v}" for k, v in s.items()),
)
def test_every_rule_loss_and_removal_trains(tmp_path, sections):
    data = recipe(tmp_path / "run", **{k: v for k, v in sections.items() if isinstance(v, dict)}, trainer={"steps": 2})
    data |= {k: v for k, v in sections.items() if not isinstance(v, dict)}
    ccpo.train(data)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    assert all(v == v for line in lines for v in line.values())  # no NaN anywhere


def test_a_frozen_agent_keeps_its_weights(tmp_path):
    ccpo.train(recipe(tmp_path / "run", agents={"solver": {"frozen": True}}))
    after = weights(tmp_path / "run")
    before = load_file(base_model() / "model.safetensors")
    assert all(torch.equal(after[f"solver/{k}"], v) for k, v in before.items())
    assert any(not torch.equal(after[f"thinker/{k}"], v) for k, v in before.items())


def test_a_hand_written_play_trains(tmp_path):
    async def play(problem, speak):
        thought = await speak("thinker", "T{problem}:")
        return await speak("solver", "S{problem}[[:{thought}]]=", thought=thought) or ""

    team = PlayTeam("by_hand", (Agent("thinker"), Agent("solver")), play)
    data = recipe(tmp_path / "run", credit={"kind": "removal"}, trainer={"steps": 2})
    data["model"] = {"path": str(base_model())}
    ccpo.train(data, team=team)
    lines = metrics(tmp_path / "run")
    assert lines[0]["tokens/counterfactual"] > 0
    with pytest.raises(UserError, match="go on from Python"):
        ccpo.resume(tmp_path / "run", steps=3)
    assert ccpo.resume(tmp_path / "run", steps=3, team=team).finished


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path, monkeypatch):
    from ccpo.pay import Payroll

    advantage, calls = Payroll.advantage, []

    def poisoned(self, credit_PN, agent, played):
        calls.append(agent)  # two agents, each asked for its own advantage and that under shared reward: four a step
        value_PN = advantage(self, credit_PN, agent, played)
        return torch.full_like(value_PN, float("nan")) if len(calls) > 8 else value_PN

    monkeypatch.setattr(Payroll, "advantage", poisoned)
    with pytest.raises(RunFailure, match=r"step"):
        ccpo.train(recipe(tmp_path / "run"))
    assert any((tmp_path / "run" / "failure").rglob("*.safetensors"))
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def test_a_run_folder_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(UserError, match=r"not empty"):
        ccpo.train(recipe(tmp_path / "run"))
    with pytest.raises(UserError, match="not deleted"):
        ccpo.train(recipe(tmp_path / "run", run={"overwrite": True}))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "irreplaceable"


def start(folder: Path, steps: int) -> subprocess.Popen:
    file = folder.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe(folder, trainer={"steps": steps, "save_every": 2})))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ccpo", "train", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    while len((folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_in_the_middle_loses_nothing(tmp_path, number):
    process = start(tmp_path / "run", steps=400)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    done = len(metrics_until_torn(tmp_path / "run"))
    assert 3 <= done < 400
    if number != signal.SIGKILL:
        assert process.returncode == 0
        assert f"--resume {tmp_path / 'run'}" in output.replace("\n", "")
        assert (tmp_path / "run" / "checkpoints" / f"step-{done:06d}").is_dir()
    last = done + 2
    ccpo.resume(tmp_path / "run", steps=last)
    ccpo.train(recipe(tmp_path / "whole", trainer={"steps": last, "save_every": 2}))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same(weights(tmp_path / "run", last), weights(tmp_path / "whole", last))


def metrics_until_torn(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
