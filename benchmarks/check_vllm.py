"""Runs the vLLM adapter for real, on a machine with a GPU and vLLM: its log-probs against transformers', and two training steps.

python benchmarks/check_vllm.py [MODEL] [--lora] [--url http://host:8000]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import ccpo
from ccpo.engines.vllm import COOLEST, Hosts, VllmEngine, VllmSettings, check_installed
from ccpo.engines.vllm_server import ServerHost, reach_server
from ccpo.learner import Policy, PolicySpec, load_policies
from ccpo.tasks import ListTask
from ccpo.types import Problem, Request, Verdict

PAID_BY_LENGTH = ListTask(
    name="length",
    problems=[Problem(id=str(i), text=f"What is {i} + {2 * i}?", answer="") for i in range(16)],
    verifier=lambda problem, text: Verdict(score=len(text) % 7 / 6, answer=text[:1]),
)
PROMPTS = ("What is 17 + 25?", "Name three rivers.", "The capital of France is", "1+2+3=")


def main(arguments: list[str]) -> int:
    """Print what is measured; returns 0 where every log-prob agrees within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--lora", action="store_true", help="agents as adapters on one base")
    parser.add_argument("--url", help="a vLLM server; default: within this process")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tolerance", type=float, default=0.05, help="mean |difference| of a token's log-prob")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--memory", type=float, default=0.4)
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_installed(device)
    worst = check_logprobs(given, device)
    steps = train(given)
    print(json.dumps({"model": given.model, "device": device, "logprobs": worst, "steps": steps}, indent=2))
    return 0 if agrees(worst, steps, given.tolerance) else 1


def agrees(logprobs: dict[str, dict[str, float]], steps: list[dict[str, float]], tolerance: float) -> bool:
    """Whether no mean difference is above the tolerance, or not a number."""
    means = [value["mean"] for value in logprobs.values()] + [step["mismatch_mean"] for step in steps]
    return all(value <= tolerance for value in means)


def check_logprobs(given: Any, device: str) -> dict[str, dict[str, float]]:
    """Mean and largest difference as loaded, after an update in place, after another policy spoke, and when greedy and cool."""
    names = ("a", "b")
    specs = [PolicySpec(name=name, agents=(name,), model_path=given.model) for name in names]
    a, b = load_policies(specs, sharing="lora" if given.lora else "separate", device=device).values()
    settings = VllmSettings(
        memory=given.memory,
        sleep=False,  # vLLM lets one instance of a process sleep: that of the training steps
        length=256 + given.tokens,
        dtype=given.dtype,
        adapters=2 if given.lora else 0,
        rank=16 if given.lora else 0,
    )
    if given.url:
        reach_server(given.url)
        hosts = Hosts(settings, lambda model, settings: ServerHost(model, settings, url=given.url))
    else:
        hosts = Hosts(settings)
    first, second = (hosts.engine(p.model, p.tokenizer, p.adapter) for p in (a, b))
    found = {"as loaded": difference(a, first, given.tokens)}
    with torch.no_grad():
        for parameter in a.parameters().values():
            parameter.mul_(1.01).add_(1e-3)
    first.refresh()
    found["after an update"] = difference(a, first, given.tokens)
    found["the other policy"] = difference(b, second, given.tokens)
    found["back again"] = difference(a, first, given.tokens)
    found["greedy"] = difference(a, first, given.tokens, temperature=0.0)
    found["cool"] = difference(a, first, given.tokens, temperature=max(COOLEST, 0.5))
    hosts.close()
    del first, second, hosts
    gc.collect()
    torch.cuda.empty_cache()
    return found


def difference(policy: Policy, engine: VllmEngine, tokens: int, temperature: float = 1.0) -> dict[str, float]:
    """How far the engine's log-probs are from those of the live module, in nats a token."""
    prompts = [tuple(policy.tokenizer(text)["input_ids"]) for text in PROMPTS]
    requests = [
        Request(prompt_ids=p, seed=s, max_tokens=tokens, temperature=temperature) for p in prompts for s in range(4)
    ]
    policy.activate()
    gaps = []
    for request, done in zip(requests, engine.generate(requests), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *done.token_ids]], device=policy.device)
        with torch.no_grad():
            logits_TV = policy.model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
        logprob_TV = (logits_TV / (temperature or 1.0)).log_softmax(-1)
        expected_T = logprob_TV.gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0].cpu()
        gaps.append((expected_T - torch.tensor(done.logprobs)).abs())
    gap_T = torch.cat(gaps)
    return {"mean": gap_T.mean().item(), "max": gap_T.max().item(), "tokens": len(gap_T)}


def train(given: Any) -> list[dict[str, float]]:
    """Two steps of a thinker and a solver, and how far vLLM's log-probs were from the learner's. Texts are paid by their length, so that
    any model's rewards have a spread."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "run": {"dir": f"{folder}/run"},
            "model": {
                "path": given.model,
                "engine": "vllm",
                "decode": given.dtype,
                "sharing": "lora" if given.lora else "separate",
                "vllm": {"memory": given.memory, "url": given.url},
            },
            "team": {"kind": "think_solve"},
            "rollout": {
                "prompts": 4,
                "samples": 4,
                "max_tokens": given.tokens,
                "max_prompt_tokens": 1024,
                "truncated": "keep",
            },
            "trainer": {"steps": 2},
            "eval": {"problems": 4, "ablations": False},
            "log": {"tensorboard": False, "progress": False},
        }
        ccpo.train(recipe, task=PAID_BY_LENGTH)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "seconds": line["seconds/step"],
            "decode": line["seconds/decode"],
            "mismatch_mean": line["actor/solver/mismatch_mean"],
            "mismatch_max": line["actor/solver/mismatch_max"],
        }
        for line in lines
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
