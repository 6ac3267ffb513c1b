"""On a CUDA device: the decoder with recorded steps, the update, and a run, against the same on the CPU or in transformers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ccpo.bench import decode, update
from ccpo.cli import app
from ccpo.engines.base import make_engine
from ccpo.learner import TrainRow
from ccpo.learner.logprobs import score
from ccpo.learner.rows import collate
from ccpo.types import Request
from test_engines import TOKENIZER, VARIANTS, mixed_requests, prompts
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_steps_say_what_the_cpu_says(variant):
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, **overrides)
    here = make_engine(model, TOKENIZER, kind="native", dtype=torch.float32)
    there = make_engine(tiny_model(family, **overrides).cuda(), TOKENIZER, kind="native", dtype=torch.float32)
    assert there.layers.arena.record
    for seed in range(3):
        asked = mixed_requests(10 * seed + 14, seed=seed)
        for a, b in zip(here.generate(asked), there.generate(asked), strict=True):
            assert (a.token_ids, a.finish) == (b.token_ids, b.finish)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_recording_reads_refreshed_weights():
    model = tiny_model("qwen3").cuda()
    engine = make_engine(model, TOKENIZER, kind="native", dtype=torch.float32)
    asked = [Request(prompt_ids=p, seed=i, max_tokens=20) for i, p in enumerate(prompts(3, 9, 17))]
    before = [c.token_ids for c in engine.generate(asked)]
    recorded = {id(f): set(f.recordings) for f in engine.layers.arena.fixed.values()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, device="cuda"))
    engine.refresh()
    after = engine.generate(asked)
    assert [c.token_ids for c in after] != before
    assert {id(f): set(f.recordings) for f in engine.layers.arena.fixed.values()} == recorded
    fresh = make_engine(model, TOKENIZER, kind="native", dtype=torch.float32)
    assert [c.token_ids for c in fresh.generate(asked)] == [c.token_ids for c in after]


def test_in_bfloat16_the_decoder_and_the_update_agree():
    model = tiny_model("qwen2", hidden_size=128).cuda()
    engine = make_engine(model, TOKENIZER)
    assert engine.dtype == torch.bfloat16
    asked = [Request(prompt_ids=p, seed=i, max_tokens=40) for i, p in enumerate(prompts(9, 17, 90, 131))]
    said = engine.generate(asked)
    rows = [
        TrainRow(
            policy="a",
            agent="a",
            prompt_ids=request.prompt_ids,
            token_ids=done.token_ids,
            engine_logprobs=done.logprobs,
            advantage=1.0,
            segment=i,
        )
        for i, (request, done) in enumerate(zip(asked, said, strict=True))
    ]
    with torch.no_grad():
        logprob_BT, _ = score(model, collate(rows, range(len(rows)), torch.device("cuda")), torch.bfloat16)
    apart = [
        abs(a - b)
        for row, done in zip(logprob_BT.tolist(), said, strict=True)
        for a, b in zip(row, done.logprobs, strict=False)
    ]
    assert max(apart) < 0.6 and sum(apart) / len(apart) < 0.1


@pytest.mark.parametrize("size", ["1M", "25M"])
def test_exact_in_float32(size):
    assert decode.check(size, "cuda") < decode.TOLERANCE
    assert update.check(size, "cuda") < update.TOLERANCE


def test_a_run(tmp_path):
    run = tmp_path / "run"
    command = ["train", "demo", "--set", "run.device=cuda", "--set", f"run.dir={run}", "--set", "trainer.steps=3"]
    command += ["--set", "bootstrap.steps=60", "--set", "bootstrap.cooldown=10", "--set", "bootstrap.noisy_steps=5"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


RECIPE = Path(__file__).parents[1] / "benchmarks" / "tiny.yaml"


def train(run: Path, *settings: str) -> None:
    """The smallest team that learns, on the GPU, in a process of its own."""
    sets = [f"run.dir={run}", "run.device=cuda", *settings]
    command = ["-m", "ccpo", "train", str(RECIPE), *(word for each in sets for word in ("--set", each))]
    env = {**os.environ, "CCPO_CACHE": str(run.parent.parent / "cache")}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_nccl_adds_gathers_and_copies(tmp_path):
    """What ranks ask of one another, over NCCL where tensors lie on the GPU; a group of one, for a single card."""
    program = """
import torch
from ccpo.comm import Ranks
ranks = Ranks(cuda=True)
there, here = torch.arange(5.0, device="cuda"), torch.arange(3.0)
ranks.add([there]); ranks.copy([there]); ranks.add([here])
assert there.tolist() == [0, 1, 2, 3, 4] and here.tolist() == [0, 1, 2]
assert ranks.gather(b"x" * 5000) == [b"x" * 5000]
beside = ranks.beside()
assert beside.gather(b"y") == [b"y"]
print(torch.distributed.get_backend(), ranks.size)
ranks.close()
"""
    (tmp_path / "program.py").write_text(program)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(tmp_path / "program.py")]
    done = subprocess.run([sys.executable, *launcher], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nccl" in done.stdout


@pytest.mark.parametrize(
    "settings",
    [
        ("trainer.async_depth=1", "trainer.save_every=0"),
        ("model.sharing=lora",),
        ("credit.kind=auto", "rollout.samples=8"),
    ],
    ids=["beside the update", "adapters", "auto"],
)
def test_a_run_of_another_kind(settings, tmp_path):
    run = tmp_path / "runs" / "run"
    train(run, *settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    if settings[0] == "trainer.async_depth=1":
        assert any(line.get("async/updates_behind", 0) > 0 for line in lines)
