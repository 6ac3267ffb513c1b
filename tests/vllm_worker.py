"""One of several processes that train through a stand-in of vLLM: ``python -m torch.distributed.run … tests/vllm_worker.py RECIPE OUT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import ccpo
import fake_vllm
from ccpo.tasks import ListTask
from ccpo.types import Problem, Verdict

torch.set_num_threads(1)
PAID_BY_LENGTH = ListTask(
    name="length",
    problems=[Problem(id=str(i), text=f"{i}+{i % 3}", answer="") for i in range(16)],
    verifier=lambda problem, text: Verdict(score=len(text) % 7 / 6, answer=text[:1]),
)

if __name__ == "__main__":
    recipe, out = sys.argv[1:3]
    with pytest.MonkeyPatch.context() as patch:
        fake_vllm.install(patch)
        data = json.loads(Path(recipe).read_text())
        ccpo.train(data, task=None if "task" in data else PAID_BY_LENGTH)
        found = [{"place": llm.place, "calls": llm.calls} for llm in fake_vllm.LLM.made]
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
