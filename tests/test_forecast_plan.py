"""``ccpo plan`` as a person uses it: the commands of its page, every mistake, this CPU's rates, and the simulated cluster."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import ccpo
from ccpo.cli import app
from ccpo.errors import UserError
from ccpo.forecast.cards import CARDS
from ccpo.forecast.cluster import Weather, simulate, slowness
from ccpo.forecast.command import Wishes, plan
from ccpo.forecast.history import of_run
from ccpo.forecast.measure import OPERATIONS, decode_operations, shortened
from ccpo.forecast.roofline import batch_of
from ccpo.forecast.seconds import StepSeconds
from ccpo.forecast.shapes import PRESETS
from test_docs import blocks, section
from test_forecast import asked_for

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
QUICK = ["rollout.prompts=4", "rollout.samples=2", "run.threads=1"]
SHORT = ("rollout.prompts=32", "rollout.samples=2", "rollout.max_tokens=512", "agents.thinker.max_tokens=512")
PAIR = ("math_qwen2.5-7b_v1", SHORT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a short demo has run, with fixed lengths: its model knows nothing and is stopped."""
    folder = tmp_path_factory.mktemp("home")
    recipe = {
        "run": {"name": "demo", "dir": str(folder / "runs/demo"), "threads": 1},
        "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
        "task": {"kind": "digit_sum", "digits": [3, 7]},
        "bootstrap": {"hidden": 32, "layers": 1, "mlp": 48, "steps": 2, "noisy_steps": 1},
        "credit": "ccpo_v1",
        "rollout": {"prompts": 8, "samples": 2, "max_tokens": 8, "truncated": "keep"},
        "trainer": {"steps": 3},
        "eval": {"problems": 4},
        "log": {"tensorboard": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(folder / "cache"))
        ccpo.train(recipe)
    return folder


# ---- the page and the command line


def commands() -> list[list[str]]:
    lines = [line for b in blocks("console", pages=[ROOT / "docs/plan.md"]) for line in b.text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_page_has_commands():
    assert len(commands()) >= 5
    assert all(words[:2] == ["ccpo", "plan"] for words in commands())


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_page_runs(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    done = CliRunner().invoke(app, words[1:], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "tokens generated" in done.stdout
    if "cpu" not in words:
        assert "Best: " in done.stdout
    if "--simulate" in words:
        assert "1,024" in done.stdout
    if "--json" in words:
        written = json.loads((home / words[words.index("--json") + 1]).read_text())
        assert written["best"] in ("ddp", "lora")
        assert written["total"]["gpu_hours"] > 0


@pytest.mark.parametrize(
    ("source", "overrides", "wishes", "says"),
    [
        ("demo", [], {"gpu": "h10"}, r"--gpu: found 'h10'.*Did you mean 'h100'"),
        ("demo", [], {"gpus": 0}, "--gpus: found 0"),
        ("demo", [], {"gpus": -3}, "--gpus: found -3"),
        (
            "demo",
            [],
            {"gpus": 17},
            r"--gpus: found 17, but a step has only rollout.prompts = 16.*--set rollout.prompts=17",
        ),
        ("demo", [], {"gpu": "cpu", "gpus": 2}, "--gpus: found 2 with --gpu cpu"),
        ("demo", [], {"gpu": "cpu", "simulate": True}, "--simulate is for GPUs"),
        ("demo", [], {"length_share": 0.0}, "--length-share: found 0"),
        ("demo", [], {"length_share": 1.5}, "--length-share: found 1.5"),
        ("demo", [], {"length_spread": -1.0}, "--length-spread: found -1"),
        ("demo", [], {"length_share": math.nan}, "--length-share: found nan"),
        ("demo", [], {"problem_tokens": 0}, "--problem-tokens: found 0"),
        ("demo", [], {"network": 0.0}, "--network: found 0"),
        ("demo", [], {"weather": Weather(mtbf=0.0)}, "--mtbf: found 0"),
        ("demo", [], {"weather": Weather(spread=-1.0)}, "--slowness: found -1"),
        ("demo", [], {"problem_tokens": 9}, "model.path is 'bootstrap'.*--problem-tokens"),
        ("demmo", [], {}, "Did you mean 'demo'"),
        ("demo", ["trainer.stepz=3"], {}, "Did you mean 'steps'"),
        (
            "demo",
            ["rollout.max_tokens=600"],
            {},
            "the model has 512 positions; shorten the prompt .* or lower max_tokens",
        ),
        ("demo", ["model.path=/no/such/model"], {}, "model.path: the model folder '/no/such/model' does not exist"),
        (
            "demo",
            ["model.path=nobody/nothing"],
            {},
            r"model.path: the config of 'nobody/nothing' is not.*hf download.*--shape",
        ),
        ("demo", ["agents.solver.model=nobody/nothing"], {}, r"agents.solver.model: the config of"),
        (
            "demo",
            ["model.path=nobody/nothing"],
            {"shape": ("qwen2.5-1b",)},
            "--shape: found 'qwen2.5-1b'.*Did you mean",
        ),
        (
            "demo",
            ["model.path=nobody/x"],
            {"shape": ("solvr=qwen2.5-7b",)},
            "--shape solvr=qwen2.5-7b: the team has no agent",
        ),
        ("demo", ["model.path=Qwen/Qwen2.5-7B"], {"gpu": "cpu"}, "3 layers of qwen2.5-7b have .* too many"),
        ("demo", ["model.engine=vllm"], {}, "--set model.engine=native"),
        ("math_qwen2.5-1.5b_v2", [], {}, "math_train.parquet.*--problem-tokens N"),
        ("math_olmo3-7b_v2", [], {"problem_tokens": 100}, "model.path: the config of 'allenai/Olmo-3-7B-Instruct'"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_mistake_gets_one_sentence(
    source: str,
    overrides: list[str],
    wishes: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"(?s){says}") as raised:
        plan(source, overrides, Wishes(**wishes))
    assert "\n" not in str(raised.value)


def test_a_config_that_cannot_be_read(tmp_path: Path):
    file = tmp_path / "config.json"
    for text, says in (
        ("{", r"config.json is not readable as a model's config"),
        ("[]", r"config.json is not readable as a model's config"),
        ('{"model_type": "gpt2"}', r"of family 'gpt2', and ccpo plan knows the formulas of llama, qwen2, qwen3"),
        ('{"model_type": "qwen2", "num_attention_heads": 4}', "does not say 'hidden_size' as a number"),
        ('{"model_type": "qwen2", "num_attention_heads": "x"}', "does not say 'num_attention_heads' as a number"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"(?s)model.path: .*{says}.*--shape"):
            plan("demo", [f"model.path={tmp_path}"])
    file.unlink()
    with pytest.raises(UserError, match=r"model.path: there is no .*config.json"):
        plan("demo", [f"model.path={tmp_path}"])


def test_a_function_has_no_plan():
    with pytest.raises(UserError, match="needs a team that is a graph"):
        plan("demo", ["team={kind: 'test_forecast_plan:a_play'}"])


def a_play():
    from ccpo.teams import PlayTeam

    async def play(problem, speak):
        return await speak("one", problem)

    return PlayTeam("play", ("one",), play)


# ---- placements


def found(*options: str, gpus: int = 8, gpu: str = "h100", recipe: tuple = PAIR) -> dict[str, Any]:
    return plan(recipe[0], [*recipe[1], *options], Wishes(gpus=gpus, gpu=gpu, problem_tokens=100))


def by_name(made: dict[str, Any]) -> dict[str, Any]:
    return {o["placement"]: o for o in made["placements"]}


def test_two_agents_of_7b_need_shards():
    made = found()
    every = by_name(made)
    P = PRESETS["qwen2.5-7b"].parameters
    assert every["ddp"]["memory"]["weights"] == 8 * P  # 61 GB; with AdamW's 122 it fits on no card here
    assert not every["ddp"]["fits"]
    assert every["fsdp2"]["memory"]["optimizer"] == 16 * P / 8
    assert every["fsdp2"]["seconds"]["communication"] > every["ddp"]["seconds"]["communication"]
    assert made["best"] in ("fsdp2", "offload")
    one = found(gpus=1)
    assert "nothing to share" in by_name(one)["fsdp2"]["why"]
    assert one["best"] in ("lora", None)


def test_what_a_recipe_forbids_is_said():
    every = by_name(found("loss.kl=k3", "loss.kl_coef=0.1"))
    assert "loss.kl" in every["fsdp2"]["why"]
    assert every["ddp"]["memory"]["references"] == 8 * PRESETS["qwen2.5-7b"].parameters
    mixed = by_name(found("agents.solver.model=Qwen/Qwen2.5-1.5B"))
    assert "different models" in mixed["lora"]["why"]


def test_a_shape_in_the_place_of_a_model():
    made = plan("demo", QUICK, Wishes(shape=("qwen2.5-0.5b", "solver=llama-3.2-1b")))
    assert [p["parameters"] for p in made["policies"]] == [494_032_768, 1_235_814_400]


def test_a_budget_of_tokens_bounds_the_steps():
    made = plan("demo", [*QUICK, "trainer={tokens: 100000}"])
    assert made["total"]["steps"] == -(-100_000 // round(made["tokens"]["generated"]))


def test_a_recipe_of_adapters_stays_one():
    made = found("model.sharing=lora", recipe=("math_qwen2.5-1.5b_v2", SHORT), gpu="h200")
    assert made["best"] == "lora"
    assert by_name(made)["ddp"]["fits"]
    assert 1 < made["lora"]["ratio"] < 1.15


def test_nothing_fits_is_said(capsys: pytest.CaptureFixture):
    from ccpo.forecast.report import show

    made = found(gpus=1, gpu="l4")
    assert made["best"] is None
    assert made["total"] is None
    show(made)
    assert "Nothing fits" in capsys.readouterr().out


def test_frozen_and_remote_agents_cost_less(monkeypatch: pytest.MonkeyPatch):
    recipe = ("math_qwen2.5-1.5b_v2", SHORT)
    P = PRESETS["qwen2.5-1.5b"].parameters
    both = by_name(found("trainer.first=null", "trainer.schedule=simultaneous", recipe=recipe))["ddp"]
    frozen = by_name(
        found("trainer.first=null", "trainer.schedule=simultaneous", "agents.solver.frozen=true", recipe=recipe)
    )
    assert both["memory"]["optimizer"] - frozen["ddp"]["memory"]["optimizer"] == 8 * P
    remote = "agents.solver.remote={url: 'https://example.com/v1', model: m}"
    away = by_name(found("trainer.first=null", "trainer.schedule=simultaneous", remote, recipe=recipe, gpus=1))["ddp"]
    assert away["memory"]["weights"] == 4 * P


@given(n=st.sampled_from(sorted(CARDS)), more=st.sampled_from([2, 4, 8]))
@settings(max_examples=6, deadline=None)
def test_more_gpus_take_less_of_each(n: str, more: int):
    settings = [*QUICK, "rollout.prompts=8"]
    one, many = (by_name(plan("demo", settings, Wishes(gpus=g, gpu=n)))["ddp"] for g in (1, more))
    assert many["seconds"]["decode"] <= one["seconds"]["decode"]
    assert many["seconds"]["update"] <= one["seconds"]["update"]
    assert many["memory"]["cache"] <= one["memory"]["cache"]


# ---- a run that has been


def test_a_run_tells_its_lengths(home: Path):
    folder = home / "runs/demo"
    _, lengths, silent = of_run(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for agent in ("thinker", "solver"):
        assert all(1 <= n <= 8 for n in lengths[agent])
        rows = sum(m.get(f"actor/{agent}/rows", 0) for m in metrics)
        dead = sum(m.get(f"actor/{agent}/rows_without_signal", 0) for m in metrics)
        assert silent[agent] == pytest.approx(dead / rows if rows else 0)
    made = plan(str(folder))
    real = sum(m["tokens/joint"] + m["tokens/counterfactual"] for m in metrics) / len(metrics)
    assert made["tokens"]["generated"] == pytest.approx(real, rel=0.25)  # drawn anew from three steps' lengths
    assert any("last steps" in line for line in made["assumed"])


def test_without_episodes_the_metrics_tell(home: Path, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.json", "metrics.jsonl"):
        (folder / name).write_bytes((home / "runs/demo" / name).read_bytes())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mean = sum(m["completions/thinker/mean_length"] for m in metrics) / len(metrics)
    assert of_run(folder)[1]["thinker"] == [round(mean)]
    (folder / "metrics.jsonl").unlink()
    made = plan(str(folder))  # a run without a step has only its recipe
    assert any("of their most tokens" in line for line in made["assumed"])
    stored = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**stored, "objects": {"team": "a team"}}))
    with pytest.raises(UserError, match="was started from Python with its own team"):
        plan(str(folder))
    (folder / "recipe.json").write_text('{"x": 1}')
    with pytest.raises(UserError, match="holds no recipe"):
        plan(str(folder))


# ---- this CPU


def test_a_step_of_this_cpu_is_about_as_long_as_planned(home: Path):
    """Within a factor of four: a test may run beside others. The benchmark tells how near it is (docs/plan.md)."""
    made = plan(str(home / "runs/demo"), (), Wishes(gpu="cpu"))
    metrics = [json.loads(line) for line in (home / "runs/demo/metrics.jsonl").read_text().splitlines()]
    measured = min(m["seconds/step"] for m in metrics)
    assert measured / 4 < made["total"]["step"] < 4 * max(m["seconds/step"] for m in metrics)
    every = plan("demo", QUICK, Wishes(gpu="cpu"))["seconds"]
    assert {k for k, v in every.items() if v} == {"decode", "update", "refresh", "host", "total"}
    assert every["total"] == pytest.approx(sum(v for k, v in every.items() if k != "total"))


def test_what_is_too_long_to_be_timed_is_shortened():
    shape = replace(PRESETS["qwen2.5-0.5b"], layers=2)
    asked = asked_for(8, 16, 50, 400)
    short = shortened(asked, shape)
    assert decode_operations(shape, batch_of(short)) < 2 * OPERATIONS < decode_operations(shape, batch_of(asked))
    assert shortened(asked_for(1, 1, 5, 3), shape) == asked_for(1, 1, 5, 3)


# ---- many GPUs


def undisturbed(ranks: int, problems: int) -> tuple[StepSeconds, int]:
    return StepSeconds(host=1.0, decode=99.0 * problems / ranks), 1


CALM = Weather(spread=0.0, mtbf=1e9, write=0.0, steps=100)


def test_without_weather_it_is_amdahls_law():
    rows = simulate(undisturbed, 1, Weather(spread=0.0, mtbf=1e12, write=0.0, steps=50), (1,))
    assert rows[0].step == pytest.approx(100.0)

    def amdahl(ranks: int, problems: int) -> tuple[StepSeconds, int]:
        return StepSeconds(host=1.0, decode=99.0 / ranks), 1

    for row in simulate(amdahl, 1_024, CALM):
        assert row.step == pytest.approx(1 + 99 / row.ranks)
        assert row.efficiency == pytest.approx(100 / (row.ranks + 99), rel=1e-6)
        assert row.alone == pytest.approx(1 / (1 + 99 / row.ranks))
        assert (row.failures, row.lost) == (0, pytest.approx(0.0, abs=1e-9))


def test_problems_are_added_where_there_are_more_gpus():
    rows = simulate(undisturbed, 100, CALM, (1, 100, 128, 1_024))
    assert [row.problems for row in rows] == [100, 100, 200, 1_100]


def test_the_slowest_of_many_by_its_expectation():
    """The largest of two log-normal numbers of mean 1: 2 Phi(sigma / sqrt 2)."""
    sigma = 0.3
    mean = slowness(2, 1, Weather(spread=sigma, steps=40_000)).mean().item()
    assert mean == pytest.approx(1 + math.erf(sigma / 2), abs=0.01)
    assert slowness(1, 1, Weather(spread=sigma, steps=40_000)).mean().item() == pytest.approx(1.0, abs=0.01)
    means = [slowness(n, 4, Weather(spread=sigma)).mean().item() for n in (1, 8, 64, 512)]
    assert means == sorted(means)


def test_failures_cost_what_they_should():
    """A failure every 100 steps on average, checkpoints every 10: each costs a restart and about half an interval."""
    weather = Weather(spread=0.0, mtbf=100 * 10 / 3600, every=10, write=0.0, restart=50.0, steps=20_000)
    (row,) = simulate(lambda n, p: (StepSeconds(decode=10.0), 1), 1, weather, (1,))
    rate, part = 1 / 1000, 100.0
    # an interval of length s is tried until it succeeds: (1/rate + restart) (e^(rate s) - 1) seconds
    expected = (1 / rate + 50) * (math.exp(rate * part) - 1) * 2_000
    assert row.rate == pytest.approx(20_000 / expected * 3600, rel=0.03)
    assert row.failures == pytest.approx(2_000 * (math.exp(rate * part) - 1), rel=0.1)
    assert simulate(lambda n, p: (StepSeconds(decode=10.0), 1), 1, weather, (1,)) == [row]


def test_a_cluster_that_never_gets_on_has_no_goodput():
    weather = Weather(spread=0.0, mtbf=0.01, every=50, restart=0.0, write=0.0, steps=50)
    (row,) = simulate(lambda n, p: (StepSeconds(decode=100.0), 1), 1, weather, (1,))
    assert (row.rate, row.lost) == (0.0, 1.0)


# ---- the page's numbers


def test_the_tables_of_the_page_are_what_the_code_says():
    from ccpo.forecast.memory import lora_ratio

    text = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    for agents in (2, 4, 7):
        now, then = (lora_ratio(PRESETS["qwen2.5-1.5b"], agents, own_decoders=s) for s in (False, True))
        assert f"| {agents} | {now:.2f} | {then:.2f} |" in text
    for name in CARDS:
        assert name in text.partition("## ")[0]
    for case in json.loads((ROOT / "docs/benchmarks/plan.json").read_text())["cases"]:
        assert f"{case['measured']:.2f} s | {case['ratio']:.2f} |" in section(text, "Seconds on this CPU")


def test_rollouts_ahead_are_counted_once():
    ahead, one = (found(f"trainer.async_depth={depth}") for depth in (1, 0))
    assert ahead["tokens"] == one["tokens"]
