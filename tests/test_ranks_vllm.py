"""Several processes that decode with vLLM, against its strict stand-in: an instance each, or one server that the first asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fake_vllm
from ccpo.config import load_recipe
from ccpo.crew import check_sharding
from ccpo.engines.vllm import LAUNCHED_BY, check_launched
from ccpo.errors import UserError
from ccpo.runs import check_ranks
from fake_vllm import LLM, serving_vllm
from test_ranks import HERE, credit, environment, newest
from test_trainer import TINY, metrics
from test_vllm import TOKENIZER
from tiny import tiny_model

LORA = {"sharing": "lora", "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def trained(count: int, cache: Path, folder: Path, **model) -> list[list[dict]]:
    """Two steps in ``count`` processes; what each one's instances were asked. The run is in ``folder / "run"``."""
    folder.mkdir()
    data = json.loads(json.dumps(TINY))
    data["run"] |= {"dir": str(folder / "run")}
    data["model"] = {"engine": "vllm", "decode": "float32", "compute": "float32", **model}
    data["trainer"] = {"steps": 2, "save_every": 1}
    data["eval"] = {"problems": 4, "ablations": False}
    if "path" in model:
        data |= {"credit": {"kind": "shared"}, "rollout": {**data["rollout"], "truncated": "keep"}}
        del data["task"]
    (folder / "recipe.json").write_text(json.dumps(data))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(HERE / "vllm_worker.py"), str(folder / "recipe.json"), str(folder)]
    env = environment() | {"CCPO_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def same_runs(one: Path, two: Path) -> None:
    for step in (1, 2):
        assert credit(one / "run", step) == credit(two / "run", step)
    files = sorted(p.relative_to(newest(one / "run")) for p in newest(one / "run").glob("policies/**/*.safetensors"))
    assert files
    for file in files:
        before, after = (load_file(newest(folder / "run") / file) for folder in (one, two))
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    for line in metrics(two / "run"):  # what each spoke with are the learner's weights
        assert line["actor/thinker/mismatch_max"] < 1e-3
        assert line["actor/solver/mismatch_max"] < 1e-3


def sampled(calls: list[str]) -> int:
    return sum(int(call.split()[1]) for call in calls if call.startswith("generate"))


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"sharing": "separate"}, LORA], ids=["separate", "lora"])
def test_each_process_samples_its_share_with_an_instance_of_its_own(cache, tmp_path, model):
    ((alone,),) = trained(1, cache, tmp_path / "one", **model)
    both = trained(2, cache, tmp_path / "two", **model)
    assert alone["place"] is None
    assert [[instance["place"] for instance in found] for found in both] == [[[0, 0]], [[1, 1]]]
    parts = [sampled(found[0]["calls"]) for found in both]
    assert sum(parts) == sampled(alone["calls"]) and min(parts) > 0.3 * sum(parts)
    assert all(any(call.startswith("sleep") for call in found[0]["calls"]) for found in both)
    same_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_the_first_process_alone_talks_to_a_server(cache, tmp_path):
    base = str(tmp_path / "base")
    tiny_model(seed=0).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    calls = []
    for count, name in ((1, "one"), (2, "two")):
        with serving_vllm(base, length=256, lora=True) as server:
            made = trained(count, cache, tmp_path / name, path=base, vllm={"url": server.url, "concurrency": 4}, **LORA)
            assert made == [[]] * count
            calls.append(server.calls)
    assert calls[0] == calls[1] and calls[1].count("/v1/load_lora_adapter") >= 6
    same_runs(tmp_path / "one", tmp_path / "two")


def test_vllm_goes_with_several_processes_and_not_with_shards():
    config = load_recipe("demo", ["model.engine=vllm"])
    check_ranks(config, 2)
    check_sharding(config)
    with pytest.raises(UserError, match=r"model\.shard does not go with model\.engine: vllm"):
        check_sharding(load_recipe("demo", ["model.engine=vllm", "model.shard=true"]))


def test_rollouts_beside_the_update_have_no_lines_to_what_one_process_asks():
    ahead = ["model.engine=vllm", "trainer.async_depth=1"]
    with pytest.raises(UserError, match=r"model\.engine: vllm with trainer\.async_depth: 1 goes with one process"):
        check_ranks(load_recipe("demo", ahead), 2)
    check_ranks(load_recipe("demo", ahead), 1)
    remote = ["agents.solver.remote.url=http://localhost:1/v1", "agents.solver.remote.model=m", ahead[1]]
    with pytest.raises(UserError, match=r"agents\.solver\.remote with trainer\.async_depth: 1"):
        check_ranks(load_recipe("demo", remote), 2)


def test_a_process_that_vllm_could_not_place_is_refused(monkeypatch):
    for name in LAUNCHED_BY:
        monkeypatch.setenv(name, "1")
    check_launched(2)
    with pytest.raises(UserError, match=r"process 1 of this machine \(LOCAL_RANK\) sees 1"):
        check_launched(1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="lacks MASTER_PORT"):
        check_launched(2)


def test_the_stand_in_wants_to_be_told_who_has_launched_it(tmp_path, monkeypatch):
    fake_vllm.install(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    keys = {"model": "m", "max_model_len": 8, "dtype": "float32", "logprobs_mode": "processed_logprobs"}
    keys |= {"generation_config": "vllm"}
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(KeyError, match="MASTER_ADDR"):
        LLM(**keys, distributed_executor_backend="external_launcher")
    with pytest.raises(ValueError, match="knows no distributed_executor_backend"):
        LLM(**keys, distributed_executor_backend="mp")
    monkeypatch.setattr("fake_vllm.dist.is_initialized", lambda: True)
    monkeypatch.setattr("fake_vllm.dist.get_world_size", lambda: 2)
    with pytest.raises(AssertionError, match="would take itself for rank 0"):
        LLM(**keys)
