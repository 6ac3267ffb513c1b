"""The update: one optimiser step of the learner, of a plain loop over transformers and autograd, and the products alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ccpo.bench.decode import random_prompts
from ccpo.bench.limits import training_limit
from ccpo.bench.shapes import make_model, tokenizer
from ccpo.bench.timing import Comparison, in_turns
from ccpo.errors import RunFailure
from ccpo.families import compute_dtype
from ccpo.learner import Learner, Policy, TrainRow
from ccpo.learner.layout import Layout

FULL = [
    # size, prompts, samples, prompt tokens, new tokens
    ("1M", 8, 8, 16, 32),
    ("1M", 4, 8, 32, 4),
    ("1M", 4, 8, 64, 256),
    ("5M", 8, 8, 64, 32),
    ("5M", 4, 8, 64, 128),
    ("25M", 4, 8, 64, 64),
    ("100M", 2, 8, 64, 64),
]
QUICK = [("1M", 8, 8, 16, 32), ("1M", 4, 8, 32, 4)]
GPU = [("0.5B", 8, 8, 256, 128), ("1.5B", 2, 8, 256, 128)]
TOLERANCE = 1e-4  # relative distance of the gradients in float32


def make_rows(
    prompts: int, samples: int, prompt: int, new: int, seed: int = 0, *, ragged: bool = False
) -> list[TrainRow]:
    """Rows of random words; ``ragged``: a quarter of the length to all of it."""
    rng, words = random.Random(seed), len(tokenizer())
    rows = []
    for p, ids in enumerate(random_prompts(prompts, prompt, seed=seed)):
        for n in range(samples):
            length = rng.randint(new // 4, new) if ragged else new
            rows.append(
                TrainRow(
                    policy="a",
                    agent="a",
                    prompt_ids=ids,
                    token_ids=tuple(rng.randrange(2, words) for _ in range(length)),
                    engine_logprobs=(-3.0,) * length,
                    advantage=rng.choice((-1.0, 1.0)),
                    segment=p * samples + n,
                )
            )
    return rows


class Plain:
    """What one writes first: padded rows through the transformers model, log-softmax of the completions' logits, mean over
    tokens, AdamW. Its attention is eager on a CPU, where SDPA's bfloat16 backward pass is slow."""

    def __init__(self, model: Any, compute: torch.dtype) -> None:
        self.model = deepcopy(model)
        device = next(self.model.parameters()).device
        self.model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
        self.compute, self.device = compute, device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def loss(self, rows: list[TrainRow]) -> torch.Tensor:
        T = max(len(r.token_ids) for r in rows)
        size_B = torch.tensor([len(r.token_ids) for r in rows], device=self.device)
        ids_BL = torch.tensor(
            [[*r.prompt_ids, *r.token_ids, *[0] * (T - len(r.token_ids))] for r in rows], device=self.device
        )
        mask_BT = torch.arange(T, device=self.device) < size_B[:, None]
        advantage_B1 = torch.tensor([[r.advantage] for r in rows], device=self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16):
            logits_BTV = self.model(input_ids=ids_BL[:, :-1], use_cache=False, logits_to_keep=T).logits
        logprob_BT = logits_BTV.float().log_softmax(-1).gather(-1, ids_BL[:, -T:, None])[..., 0]
        return -(advantage_B1 * (logprob_BT - logprob_BT.detach()).exp() * mask_BT).sum() / mask_BT.sum()

    def step(self, rows: list[TrainRow]) -> None:
        self.loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def learner_of(model: Any, compute: torch.dtype, **options: Any) -> Learner:
    policy = Policy(name="a", agents=("a",), model=deepcopy(model), tokenizer=tokenizer(), lr=1e-6)
    return Learner({"a": policy}, total_steps=10**6, compute=compute, **options)


def check(size: str, device: str) -> float:
    """The relative distance of the two float32 gradients, for a model that hangs on every word and its place. Raises RunFailure beyond
    ``TOLERANCE``."""
    model, rows = make_model(size, device=device, sharp=True), make_rows(2, 4, 12, 8)
    plain, ours = Plain(model, torch.float32), learner_of(model, torch.float32)
    plain.loss(rows).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.model.parameters()])
    optimizer = ours.optimizers["a"]
    optimizer.max_grad_norm = float("inf")
    found: list[torch.Tensor] = []
    step = optimizer.step

    def spy(factor: float) -> float:
        found.extend(p.grad.flatten().clone() for p in optimizer.parameters.values())
        return step(factor)

    optimizer.step = spy  # type: ignore[method-assign]
    ours.step([rows], step=0, failure_folder=Path("failure"))
    apart = ((torch.cat(found) - expected).norm() / expected.norm()).item()
    if not apart < TOLERANCE:
        raise RunFailure(f"the update's gradient is {apart:.1e} from autograd's, more than {TOLERANCE:.0e}")
    return apart


def compare(
    size: str, prompts: int, samples: int, prompt: int, new: int, *, repeats: int, device: str, ragged: bool = False
) -> Comparison:
    model = make_model(size, device=device)
    rows = make_rows(prompts, samples, prompt, new, ragged=ragged)
    apart = check(size, device)
    compute = compute_dtype(torch.device(device))
    plain, ours = Plain(model, compute), learner_of(model, compute)
    layout = Layout.of(rows, torch.device(device))
    limit = training_limit(model, len(layout.ids_M), len(layout.target_N), compute)
    seconds = in_turns(
        {
            "ccpo": lambda: ours.step([rows], step=0, failure_folder=Path("failure")),
            "transformers and autograd": lambda: plain.step(rows),
            "products alone": limit,
        },
        repeats=repeats,
        warmup=2,
        device=device,
    )
    best = {side: min(values) for side, values in seconds.items()}
    return Comparison(
        part="update",
        name=f"{size}, {prompts} x {samples} rows, {prompt} + {new}{' ragged' if ragged else ''}",
        shape={
            "size": size,
            "prompts": prompts,
            "samples": samples,
            "prompt": prompt,
            "new": new,
            "dtype": str(compute),
        },
        seconds=seconds,
        work=sum(len(r.token_ids) for r in rows),
        unit="tokens",
        ours="ccpo",
        base="transformers and autograd",
        extra={"gradient_error": apart, "of_limit": best["products alone"] / best["ccpo"]},
    )


def run(mode: str, *, repeats: int, device: str) -> Iterator[Comparison]:
    for size, prompts, samples, prompt, new in {"full": FULL, "quick": QUICK, "gpu": GPU}[mode]:
        yield compare(size, prompts, samples, prompt, new, repeats=repeats, device=device)
    if mode == "full":
        yield compare("5M", 16, 8, 64, 128, repeats=repeats, device=device, ragged=True)
