"""Every shipped recipe: it parses, it prepares, it says what the paper says, and its whole loop runs two steps on a tiny
random model of the same family, with a byte-level BPE and a chat template, on real rows."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file as load_tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import ccpo
from ccpo.build import prepare
from ccpo.config import RunConfig, find_recipe, load_recipe, shipped_recipes
from ccpo.rollout import read_episodes
from ccpo.runs import Result
from ccpo.tasks import load_file
from ccpo.tasks.hub import KNOWN
from tiny import CHAT_TEMPLATE, SPECIALS, tiny_model

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RECIPES = shipped_recipes()
CPU = ("chain", "debate", "demo", "manager_workers", "vote")
PAPER = tuple(name for name in RECIPES if name not in CPU)
FAMILIES = {"Qwen2.5": "qwen2", "Qwen3": "qwen3", "Llama": "llama", "Olmo": "olmo3"}

SLOW = ("math_llama3.1-8b_v2", "math_olmo3-7b_v2", "math_qwen2.5-7b_v1")  # others run their family and their rule

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real rows are not here: {DATA}")


# --- what a recipe is --------------------------------------------------------------------------------------------------


def test_the_recipes_are_there():
    assert set(CPU) <= set(RECIPES)
    for model in ("qwen2.5-1.5b", "llama3.1-8b", "qwen3-4b"):
        assert {f"math_{model}_v1", f"math_{model}_v2"} <= set(RECIPES)
    assert {"math_qwen2.5-7b_v1", "math_olmo3-7b_v2", "math_olmo3-7b_qwen2.5-1.5b_v2"} <= set(RECIPES)
    assert {"logiqa_qwen2.5-1.5b_vote", "math_qwen2.5-1.5b_sepo"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_described_and_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = load_recipe(RECIPES[name])
    assert config.run.name == name
    first = RECIPES[name].read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# "), "its first line says what it is: `ccpo recipes` shows it"
    assert len(first) > 40
    monkeypatch.chdir(ROOT)
    assert find_recipe(f"recipes/{name}.yaml").resolve() == RECIPES[name].resolve()  # in a clone: through the link
    monkeypatch.chdir(tmp_path)
    assert find_recipe(f"recipes/{name}.yaml") == RECIPES[name]  # elsewhere: in the package


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_prepares(name: str, made_up_data: None):
    setup = prepare(load_recipe(RECIPES[name]))
    assert len(setup.task) >= setup.config.rollout.prompts
    assert setup.tests
    assert set(setup.policy_of) == set(setup.team.agent_names)


def test_the_overrides_that_the_recipes_name_are_right(made_up_data: None):
    text = RECIPES["math_qwen2.5-1.5b_v1"].read_text(encoding="utf-8")
    overrides = [piece.rstrip(".,") for piece in re.findall(r"--set[\s#]+(\S+)", text)]
    assert len(overrides) == 5
    config = load_recipe(RECIPES["math_qwen2.5-1.5b_v1"], overrides)
    assert prepare(config).task.name == "MATH-lighteval"
    assert config.eval.tasks == {}
    assert config.model.sharing == "lora"


@pytest.mark.parametrize("name", PAPER)
def test_the_test_sets_are_known_by_name(name: str):
    for part in load_recipe(RECIPES[name]).eval.tasks.values():
        if part.kind == "hub":
            assert part.arguments["dataset"] in KNOWN


def holds(config: RunConfig, expected: dict[str, Any]) -> None:
    """Every dotted key of ``expected`` has its value in ``config``."""
    data = config.model_dump()
    for path, value in expected.items():
        node = data
        for key in path.split("."):
            node = node[key]
        assert node == value, f"{path}: {node} instead of {value}"


V1 = {
    "rollout.prompts": 64,
    "rollout.samples": 4,
    "rollout.temperature": 1.0,
    "rollout.max_prompt_tokens": 4096,
    "rollout.max_tokens": 2048,
    "rollout.truncated": "zero",
    "advantage": "grpo",
    "loss.kind": "turn",
    "loss.aggregate": "trajectory-mean",
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.2,
    "loss.kl": "none",
    "loss.entropy_coef": 0.0,
    "optim.lr": 1e-6,
    "optim.warmup_steps": 10,
    "trainer.schedule": "alternating",
    "trainer.period": 10,
    "credit.kind": "ccpo_v1",
    "credit.alpha": 1.0,
    "credit.decay": 0.99,
    "credit.eps": 1e-6,
    "credit.min_samples": 10,
    "credit.pairing": "paired",
}
V2 = {
    "rollout.prompts": 192,
    "rollout.samples": 16,
    "rollout.temperature": 1.0,
    "rollout.max_prompt_tokens": 4096,
    "rollout.max_tokens": 6144,
    "agents.thinker.max_tokens": 4096,
    "team.strip_boxed": True,
    "advantage": "dr_grpo",
    "loss.kind": "gspo",
    "loss.clip_low": 3e-4,
    "loss.clip_high": 4e-4,
    "loss.dual_clip": 10.0,
    "loss.kl": "none",
    "optim.lr": 1e-6,
    "optim.minibatches": 192 // 24,
    "trainer.schedule": "alternating",
    "trainer.period": 10,
    "trainer.first": "thinker",
    "credit.kind": "ccpo_v2",
    "credit.weight": 0.2,
    "credit.solo": "mean",
    "credit.bonus": "event",
    "eval.temperature": 1.0,
    "eval.top_p": 0.7,
}
SEPO = {key: value for key, value in V2.items() if key not in ("credit.solo", "credit.bonus")} | {
    "credit.kind": "sepo",
    "credit.self_weight": 0.3,
    "credit.center": "group",
}


@pytest.mark.parametrize("name", PAPER)
def test_a_run_of_the_paper_has_its_constants(name: str):
    config = load_recipe(RECIPES[name])
    holds(config, {"v2": V2, "sepo": SEPO}.get(name.rpartition("_")[2], V1))
    if name.endswith("_v1"):
        holds(config, {"credit.eta": 1.0, "credit.gate": "reward", "trainer.first": "thinker"})
    if name.endswith("_vote"):
        holds(config, {"team.kind": "voting", "team.k": 3})
    if config.credit.kind == "ccpo_v1":
        assert not any(config.credit.arguments.get(guard) for guard in ("skip_flat", "center", "sigma_floor"))


# --- data: made up for preparing, real rows for the loops --------------------------------------------------------------

MATH_COLUMNS = ("question", "answer", "unique_id")


def logiqa_block(answer: str, question: str, options: Sequence[str]) -> str:
    return "\n".join(["", answer, "A passage.", question, *options])


@pytest.fixture
def made_up_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files where the recipes look for them, and a hub that answers from memory."""
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "unique_id": f"{i}"} for i in range(192)]
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "math_train.parquet")
    options = [f"{letter}.It is {letter.lower()}" for letter in "ABCD"]
    blocks = [logiqa_block("abcd"[i % 4], f"Which follows of {i}?", options) for i in range(64)]
    for split in ("train", "test"):
        (folder / f"logiqa_{split}.txt").write_text("\n".join(blocks) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ccpo.tasks.hub._fetch", lambda *_: rows)


def few_answers(rows: list[dict[str, Any]], answer: Callable[[dict], str], length: Callable[[dict], int]) -> list[dict]:
    """Sixteen short rows that share four answers: a random model that writes one of them is right now and then."""
    short = [row for row in rows if length(row) < 500]
    common = [a for a, _ in Counter(answer(row) for row in short).most_common(4)]
    return [row for row in short if answer(row) in common][:16]


def real_math(path: Path, source: str = "math_train.parquet") -> list[str]:
    rows = few_answers(
        pq.read_table(DATA / source).to_pylist(),
        lambda r: r["reward_model"]["ground_truth"],
        lambda r: len(r["question"]),
    )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return [row["question"] + " " + row["answer"] for row in rows]


def real_gsm8k(path: Path) -> list[str]:
    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = few_answers(
        [json.loads(line) for line in lines], lambda r: r["answer"].rsplit("#### ")[-1], lambda r: len(r["question"])
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["question"] + " " + row["answer"] for row in rows]


def real_logiqa(path: Path) -> list[str]:
    lines = (DATA / "logiqa_test.txt").read_text(encoding="utf-8").splitlines()
    blocks = ["\n".join(lines[i : i + 8]) for i in range(0, len(lines) - 7, 8)]
    short = [block for block in blocks if len(block) < 800][:16]
    path.write_text("\n".join(short) + "\n", encoding="utf-8")
    return short


# --- tiny models of the family -----------------------------------------------------------------------------------------


def bpe(texts: Sequence[str], answers: Sequence[str], merges: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``texts``, with a ChatML template and, as tokens of their own, boxes with
    ``answers``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIALS) + len(alphabet) + merges,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    spaces = ("", " ", "  ", "\n", "\n\n", " \n", "\t", "\n ")
    core.add_tokens([f"{before}\\boxed{{{a}}}{after}" for a in answers for before in spaces for after in spaces])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(path: str, folder: Path, texts: Sequence[str], answers: Sequence[str], seed: int = 0) -> Path:
    """A random model of the family of the hub's ``path``, in ``folder``. The tokens that the BPE merged end its turns:
    it must end most of them, since a turn that is cut is paid 0."""
    family = next(f for prefix, f in FAMILIES.items() if prefix in path)
    tokenizer = bpe(texts, answers, merges=120 + 40 * seed)
    end = tokenizer.eos_token_id
    model = tiny_model(
        family, vocab=len(tokenizer), seed=seed, max_position_embeddings=1024, bos_token_id=None, eos_token_id=end
    )
    first = len(SPECIALS) + 256
    model.generation_config.eos_token_id = [end, *range(first, first + 120)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_models(config: RunConfig, folder: Path, texts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Overrides that put tiny models in the place of those that the recipe names, one for each name."""
    named = {"model.path": config.model.path}
    named |= {f"agents.{a}.model": s.model for a, s in config.agents.items() if s.model is not None}
    folders: dict[str, Path] = {}
    for path in named.values():
        if path not in folders:
            folders[path] = save_tiny(path, folder / f"model{len(folders)}", texts, answers, seed=len(folders))
    return [f"{key}={folders[path]}" for key, path in named.items()]


# --- the loops ---------------------------------------------------------------------------------------------------------

SMALL = [
    "run.threads=1",
    "run.device=cpu",
    "rollout.prompts=4",
    "rollout.samples=4",
    "rollout.max_tokens=16",
    "rollout.max_prompt_tokens=700",
    "trainer.steps=2",
    "trainer.period=1",  # so that two steps train two agents
    "eval.problems=2",
    "log.tensorboard=false",
]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trained(metrics: dict[str, Any]) -> list[str]:
    """The agents that an update changed in a step."""
    return [key.split("/")[1] for key in metrics if key.startswith("actor/") and key.endswith("/loss")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_tensors(file).items()}


def check_run(result: Result, config: RunConfig, samples: int = 4) -> list[dict[str, Any]]:
    """What every run must leave behind; returns its metrics."""
    folder = result.folder
    assert result.finished
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] == 2
    metrics = lines_of(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert [key for key, value in line.items() if not math.isfinite(value)] == []
        assert line["tokens/joint"] > 0
    assert any(line["reward/team"] > 0 for line in metrics), "no rollout was right: there was nothing to learn from"
    assert trained(metrics[0]) or trained(metrics[1])
    for step in (1, 2):
        episodes = list(read_episodes(folder / "episodes" / f"step-{step:06d}.jsonl.gz"))
        assert len(episodes) == 4
        assert all(len(group.rollouts) == samples for group, _ in episodes)
    assert result.summary["tokens_joint"] == sum(line["tokens/joint"] for line in metrics)
    assert list(result.summary["datasets"]) == list(config.eval.tasks or ["heldout"])
    return metrics


def run_paper(name: str, folder: Path, texts: Sequence[str], answers: Sequence[str], more: Sequence[str] = ()) -> Any:
    """The recipe's loop on tiny models; returns its configuration, its result and its metrics."""
    config = load_recipe(RECIPES[name])
    overrides = [*SMALL, f"run.dir={folder / 'run'}", *tiny_models(config, folder, texts, answers), *more]
    if name.endswith(("_v2", "_sepo")):
        overrides += ["optim.minibatches=2", "agents.thinker.max_tokens=16"]
    result = ccpo.train(RECIPES[name], overrides)
    return config, result, check_run(result, config)


def changed(result: Result, agent: str, base: Path) -> bool:
    before, after = weights(base), weights(result.folder / "checkpoints" / "step-000002" / "agents" / agent)
    assert before.keys() == after.keys()
    return any(not torch.equal(before[key], after[key]) for key in before)


@pytest.fixture
def real_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Real rows where the recipes look for them, and rows of MATH500 as whatever is asked of the hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    texts = {
        "math": real_math(folder / "math_train.parquet"),
        "logiqa": real_logiqa(folder / "logiqa_train.txt"),
        "gsm8k": real_gsm8k(folder / "gsm8k_train.jsonl"),
    }
    (folder / "logiqa_test.txt").write_bytes((folder / "logiqa_train.txt").read_bytes())
    hub = pq.read_table(DATA / "math500.parquet").slice(0, 40).to_pylist()
    monkeypatch.setattr("ccpo.tasks.hub._fetch", lambda *_: [row for row in hub if len(row["question"]) < 300])
    monkeypatch.chdir(tmp_path)
    return texts


def answers_in(path: Path) -> list[str]:
    task = load_file(path)
    return sorted({task[i].answer for i in range(len(task))})


@needs_data
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in PAPER if n.startswith("math_")],
)
def test_think_solve_on_math(name: str, tmp_path: Path, real_data: dict[str, list[str]]):
    answers = answers_in(tmp_path / "data" / "math_train.parquet")
    config, result, (thinking, solving) = run_paper(name, tmp_path, real_data["math"], answers)
    assert trained(thinking) == ["thinker"]
    assert trained(solving) == ["solver"]
    assert (thinking["tokens/counterfactual"] > 0) == (config.credit.kind != "sepo")
    if config.credit.kind == "sepo":
        assert all(
            line["tokens/rating"] > 0 and line["rating/valid"] < 0.1 for line in (thinking, solving)
        )  # nobody taught them
    elif config.credit.kind == "ccpo_v2":
        assert solving["tokens/counterfactual"] == 0  # a solver that is paid R needs no solo answers
    else:
        assert 0 < solving["credit/solver/gate"] < 1
    assert changed(result, "thinker", tmp_path / ("model1" if config.agents.get("solver") else "model0"))


@needs_data
def test_voting_on_logiqa(tmp_path: Path, real_data: dict[str, list[str]]):
    _, result, metrics = run_paper("logiqa_qwen2.5-1.5b_vote", tmp_path, real_data["logiqa"], "ABCD")
    assert result.summary["tokens_counterfactual"] == 0
    assert [trained(line) for line in metrics] == [["voter1"], ["voter2"]]
    assert changed(result, "voter1", tmp_path / "model0")
    assert not changed(result, "voter3", tmp_path / "model0")


@needs_data
def test_think_solve_on_gsm8k(tmp_path: Path, real_data: dict[str, list[str]]):
    path = tmp_path / "data" / "gsm8k_train.jsonl"
    more = [f"task.path={path}", "eval.tasks={}"]
    config = load_recipe(RECIPES["math_qwen2.5-1.5b_v1"])
    overrides = tiny_models(config, tmp_path, real_data["gsm8k"], answers_in(path))
    result = ccpo.train(RECIPES["math_qwen2.5-1.5b_v1"], [*SMALL, f"run.dir={tmp_path / 'run'}", *overrides, *more])
    assert result.finished
    metrics = lines_of(result.folder / "metrics.jsonl")
    assert any(line["reward/team"] > 0 for line in metrics)
    assert changed(result, "thinker", tmp_path / "model0")
    groups = [group for group, _ in read_episodes(result.folder / "episodes" / "step-000001.jsonl.gz")]
    assert {group.problem.source for group in groups} == {"gsm8k_train"}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCPO_CACHE", os.fspath(tmp_path / "cache"))


TINY_BASE = [
    "bootstrap.steps=80",  # it knows the form of an answer, not the answer: right now and then
    "bootstrap.noisy_steps=1",
    "bootstrap.lr=0.01",
    "bootstrap.hidden=32",
    "bootstrap.layers=2",
    "bootstrap.heads=2",
    "bootstrap.kv_heads=1",
    "bootstrap.mlp=48",
    "bootstrap.batch=16",
]


@pytest.mark.parametrize("name", CPU)
def test_a_recipe_for_the_cpu(name: str, tmp_path: Path, empty_cache: None):
    small = [s for s in SMALL if not s.startswith(("rollout.max_", "trainer.period"))]
    result = ccpo.train(RECIPES[name], [*small, *TINY_BASE, "rollout.samples=8", f"run.dir={tmp_path / 'run'}"])
    config = load_recipe(RECIPES[name])
    metrics = check_run(result, config, samples=8)
    agents = set(prepare(config).team.agent_names)
    assert any(set(trained(line)) == agents for line in metrics)  # all of them, together
    assert (result.summary["tokens_counterfactual"] == 0) == (name == "vote")
