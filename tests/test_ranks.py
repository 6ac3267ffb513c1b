"""Several processes: what they say to one another, that credit and gradients are those of one, and that nothing is lost by a kill."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ccpo.comm import Comm, deal, stretches
from ccpo.config import load_recipe
from ccpo.crew import check_sharding
from ccpo.engines.sharded import _packed, _unpacked, shares
from ccpo.errors import UserError
from ccpo.launch.torchrun import processes
from ccpo.types import Completion, FinishReason, Request

HERE = Path(__file__).parent
RECIPE = HERE.parent / "benchmarks" / "tiny.yaml"


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def in_ranks(count: int, part: str, folder: Path) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(HERE / "ranks_worker.py"), part, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_dealt_work_is_all_dealt_and_even(work, ranks):
    parts = deal(work, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(work)))
    loads = [sum(work[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(work, default=0)


@given(st.lists(st.floats(0, 50), max_size=30), st.integers(1, 6))
def test_stretches_are_neighbours_and_even(work, ranks):
    parts = stretches(work, ranks)
    assert [i for part in parts for i in part] == list(range(len(work)))
    loads = [sum(work[i] for i in part) for part in parts]
    assert max(loads) <= sum(work) / ranks + max(work, default=0) + 1e-6


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=40), st.integers(1, 5))
def test_requests_of_a_prompt_stay_together(asked, ranks):
    requests = [Request(prompt_ids=(7,) * (p + 1), seed=i, max_tokens=m) for i, (p, m) in enumerate(asked)]
    parts = shares(requests, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(requests)))
    most = max(1, -(-len(requests) // ranks))
    for prompt in {r.prompt_ids for r in requests}:
        count = sum(r.prompt_ids == prompt for r in requests)
        speakers = sum(any(requests[i].prompt_ids == prompt for i in part) for part in parts)
        assert speakers <= -(-count // most)


def test_completions_travel_whole():
    done = [
        Completion(token_ids=(1, 2**30), logprobs=(-0.1, -1 / 3), text="né\n\x00😀", finish=FinishReason.EOS),
        Completion(token_ids=(), logprobs=(), text="", finish=FinishReason.STOP),
    ]
    assert _unpacked(_packed(done, 5)) == (done, 5, {})


def test_one_process_is_the_identity():
    comm = Comm()
    tensor = torch.ones(3)
    comm.add([tensor])
    assert tensor.tolist() == [1, 1, 1] and comm.gather(b"a") == [b"a"] and comm.in_order(lambda: 4) == 4
    with pytest.raises(UserError, match="no"):
        comm.together(lambda: (_ for _ in ()).throw(UserError("no")))


@pytest.mark.parametrize("launch", ["torchrn:2", "torchrun", "torchrun:0", "torchrun:two"])
def test_a_launch_that_cannot_be_is_refused(launch):
    with pytest.raises(UserError, match="--launch"):
        processes(launch)


def test_ranks_talk(tmp_path):
    said = in_ranks(3, "talk", tmp_path)
    for rank, found in enumerate(said):
        assert found["gathered"] == ["", "xxx", "xxxxxx"]
        assert found["plain"] == [{"rank": r, "third": 1 / 3} for r in range(3)]
        assert found["sums"] == [9.0, 12.0, 15.0, 3.0]
        assert found["copied"] == [7.0, 7.0]
        assert found["any"] == [False, True]
        assert found["order"] == ["worked"]
        assert found["errors"] == [[k, "of the last", rank != 2] for k in ("UserError", "RunFailure")]


def test_the_gradient_is_that_of_one_process(tmp_path):
    (tmp_path / "one").mkdir()
    (alone,) = in_ranks(1, "gradient", tmp_path / "one")
    for count in (2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        for found in in_ranks(count, "gradient", folder):
            for way, here in found.items():
                assert here["metrics"] == pytest.approx(alone[way]["metrics"], rel=1e-4, abs=1e-6)
                assert set(here["gradient"]) == {"a", "b"}
                for name, updates in here["gradient"].items():
                    assert len(updates) == 4
                    for got, expected in zip(
                        map(torch.tensor, updates), map(torch.tensor, alone[way]["gradient"][name]), strict=True
                    ):
                        assert expected.norm() > 0
                        assert (got - expected).norm() / expected.norm() < 1e-5


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tmp_path):
    said = in_ranks(2, "broken", tmp_path)
    assert said[0]["message"] == said[1]["message"]
    assert "step 3: the loss of policy 'b' is nan (agent 'b', micro-batch 0)" in said[0]["message"]
    assert all(found["unchanged"] and not found["left"] for found in said)
    (told,) = (tmp_path / "failure").glob("rank-*/failure.json")
    assert told.parent.name == "rank-1" and json.loads(told.read_text())["batches"]


# --- whole runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def ccpo(cache: Path, *arguments: str, **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "ccpo", "train", *arguments]
    env = environment() | {"CCPO_CACHE": str(cache)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **more)


def train(cache: Path, *arguments: str) -> str:
    process = ccpo(cache, *arguments)
    out = process.communicate(timeout=400)[0]
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.read_text())
    return path


@pytest.fixture(scope="module")
def alone(cache, recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "alone"
    train(cache, str(recipe), "--set", f"run.dir={run}")
    return run


def credit(run: Path, step: int) -> list:
    with gzip.open(run / "episodes" / f"step-{step:06d}.jsonl.gz", "rt") as file:
        groups = [json.loads(line) for line in file][1:]
    return [[(r["credit"], [t["token_ids"] for t in r["turns"]]) for r in group["rollouts"]] for group in groups]


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(newest(run).glob("policies/*/model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("count", "shard"), [(2, False), (4, False), (2, True), (3, True)])
def test_processes_pay_the_very_same_credit(count, shard, alone, cache, recipe, tmp_path):
    run = tmp_path / "run"
    out = train(
        cache, str(recipe), "--set", f"run.dir={run}", "--set", f"model.shard={shard}", "--launch", f"torchrun:{count}"
    )
    assert out.count("run: ") == 1, "only one process speaks"
    for step in (1, 2, 3, 4):
        assert credit(run, step) == credit(alone, step)
    same_weights(run, alone)
    assert json.loads((run / "summary.json").read_text())["ranks"] == count


def same_weights(run: Path, other: Path) -> None:
    found, expected = weights(run), weights(other)
    assert found and set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5)


def moved(run: Path, to: Path) -> Path:
    """A copy of a run's folder, which goes on in its own place."""
    shutil.copytree(run, to, symlinks=True)
    return to


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_on_other_numbers_of_processes(shard, alone, cache, recipe, tmp_path):
    four = tmp_path / "four"
    sets = ["--set", f"run.dir={four}", "--set", "trainer.steps=1", "--set", f"model.shard={shard}"]
    train(cache, str(recipe), *sets, "--launch", "torchrun:4")
    written = sorted(f.name for f in newest(four).glob("policies/solver/*.safetensors"))
    assert written == (
        [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)] if shard else ["model.safetensors"]
    )
    for count in (1, 2, 3):
        run = moved(four, tmp_path / str(count))
        train(cache, "--resume", str(run), "--steps", "4", *(["--launch", f"torchrun:{count}"] if count > 1 else []))
        same_weights(run, alone)
    plain = AutoModelForCausalLM.from_pretrained(newest(four) / "policies" / "solver")  # as anyone would load it
    assert type(plain).__name__ == "Qwen2ForCausalLM" and plain.config.architectures == ["Qwen2ForCausalLM"]
    stored = {k.removeprefix("solver."): v for k, v in weights(four).items() if k.startswith("solver.")}
    for name, tensor in plain.named_parameters():
        assert torch.equal(tensor, stored[name])
    if shard:
        lost = newest(run := moved(four, tmp_path / "lost")) / "optimizers" / "thinker-00003-of-00004.safetensors"
        lost.unlink()
        started = time.monotonic()
        done = ccpo(cache, "--resume", str(run), "--launch", "torchrun:2")
        said = done.communicate(timeout=60)[0]
        assert done.returncode and f"optimizers/{lost.name} is missing" in said and said.count("damaged") == 1
        assert time.monotonic() - started < 30 and not processes_of(run)


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        ({"model.offload": "true"}, "model.shard"),
        ({"model.shard": "true", "model.sharing": "lora"}, "lora"),
        ({"model.shard": "true", "model.engine": "transformers"}, "transformers"),
        ({"model.shard": "true", "loss.kl": "k3", "loss.kl_coef": "0.1"}, "loss.kl"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(sets, match):
    config = load_recipe("demo", [f"{key}={value}" for key, value in sets.items()])
    with pytest.raises(UserError, match=match):
        check_sharding(config)


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_nothing_is_lost(alone, cache, recipe, tmp_path):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    train(cache, str(recipe), "--set", f"run.dir={undisturbed}", "--launch", "torchrun:2")
    process = ccpo(cache, str(recipe), "--set", f"run.dir={run}", "--launch", "torchrun:2")
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    victim = next(pid for pid in processes_of(run) if rank_of(pid) == "1")
    os.kill(victim, signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "--resume" in out, out[-2000:]
    assert not processes_of(run)
    train(cache, "--resume", str(run), "--launch", "torchrun:2")
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(undisturbed)[name])


def processes_of(run: Path) -> list[int]:
    """Those that have the run's folder in their command line."""
    return processes_where(lambda line: str(run).encode() in line)


def processes_where(wanted: Callable[[bytes], bool]) -> list[int]:
    """Those whose command line is ``wanted``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if wanted(line):
            found.append(int(folder.name))
    return found


def rank_of(pid: int) -> str | None:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return None
    return dict(p.split("=", 1) for p in pairs if "=" in p).get("RANK")
