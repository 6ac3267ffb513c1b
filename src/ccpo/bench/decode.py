"""Decoding: the native decoder, transformers' ``generate`` at its best setting, and the products alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from ccpo.bench.limits import decoding_limit
from ccpo.bench.shapes import make_model, tokenizer
from ccpo.bench.timing import Comparison, in_turns
from ccpo.engines import make_engine
from ccpo.errors import RunFailure
from ccpo.types import Request

TOLERANCE = 1e-4  # log-probs in float32 against transformers
TINY = ("1M", "5M")
FULL = [
    # size, rows, prompt, new tokens
    *((size, 64, prompt, 32) for size in ("1M", "5M", "25M") for prompt in (32, 256)),
    *((size, 256, 32, 32) for size in TINY),
    *((size, 64, 32, 256) for size in TINY),
    *((size, 16, 1_024, 32) for size in ("1M", "25M")),
    *((size, 16, 32, 1_024) for size in ("1M",)),
    ("100M", 64, 32, 32),
    ("100M", 16, 256, 32),
]
QUICK = [("1M", 64, 32, 32), ("5M", 64, 32, 32)]
GPU = [("0.5B", 128, 256, 128), ("1.5B", 128, 256, 128)]
SHARED = {"full": ("1M", "5M", "25M"), "quick": ("1M",), "gpu": ("0.5B",)}


def random_prompts(count: int, length: int, *, seed: int = 0, ragged: bool = False) -> list[tuple[int, ...]]:
    rng, words = random.Random(seed), len(tokenizer())
    sizes = [rng.randint(max(1, length // 2), length) if ragged else length for _ in range(count)]
    return [tuple(rng.randrange(2, words) for _ in range(size)) for size in sizes]


def requests(prompts: list[tuple[int, ...]], new: int) -> list[Request]:
    return [Request(prompt_ids=p, max_tokens=new, seed=seed) for seed, p in enumerate(prompts)]


class Generate:
    """``generate`` of one setting: dtype and attention."""

    def __init__(self, model: Any, dtype: torch.dtype, attention: str) -> None:
        self.model = _copy(model, dtype, attention)
        self.pad = tokenizer().pad_token_id

    def __call__(self, prompts: list[tuple[int, ...]], new: int) -> None:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.tensor([(self.pad,) * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts], device=device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0
            )
        if out.shape != (len(prompts), width + new):
            raise RunFailure(
                f"generate made {tuple(out.shape)} tokens where {(len(prompts), width + new)} were asked for"
            )


def _copy(model: Any, dtype: torch.dtype, attention: str) -> Any:
    from copy import deepcopy

    made = deepcopy(model).to(dtype)
    made.set_attn_implementation(attention)
    made.generation_config.pad_token_id = tokenizer().pad_token_id
    return made


def candidates(model: Any, device: str) -> dict[str, Generate]:
    """The settings of ``generate`` that may be its best."""
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.bfloat16, torch.float32)
    return {f"{str(d)[6:]} {a}": Generate(model, d, a) for d, a in product(dtypes, ("sdpa", "eager"))}


def best_generate(model: Any, prompts: list[tuple[int, ...]], new: int, device: str) -> tuple[str, Generate]:
    """The fastest setting of ``generate`` for this shape (the better of two tries each)."""
    every = candidates(model, device)
    few = min(new, 16)
    seconds = in_turns({k: lambda g=g: g(prompts, few) for k, g in every.items()}, repeats=2, warmup=1, device=device)
    best = min(seconds, key=lambda k: min(seconds[k]))
    return best, every[best]


def check(size: str, device: str, *, prompts: int = 6, new: int = 12) -> float:
    """The largest difference between the engine's float32 log-probs and transformers' on the same tokens, for a model that hangs on every
    word and its place. Raises RunFailure beyond ``TOLERANCE``."""
    model = make_model(size, device=device, sharp=True)
    engine = make_engine(model, tokenizer(), dtype=torch.float32)
    asked = requests(random_prompts(prompts, 20, ragged=True), new)
    worst = 0.0
    for request, said in zip(asked, engine.generate(asked), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *said.token_ids]], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0].cpu()
        for error in (expected - torch.tensor(said.logprobs)).abs().tolist():
            if not error <= TOLERANCE:
                raise RunFailure(
                    f"a log-prob of the decoder differs from transformers' by {error:.1e}, more than {TOLERANCE:.0e}"
                )
            worst = max(worst, error)
    return worst


def compare(
    size: str, rows: int, prompt: int, new: int, *, repeats: int, device: str, ragged: bool = False
) -> Comparison:
    """Every row with a prompt of its own."""
    worst = check(size, device)
    model = make_model(size, device=device)
    prompts = random_prompts(rows, prompt, ragged=ragged)
    engine = make_engine(model, tokenizer())
    label, theirs = best_generate(model, prompts, new, device)
    sides = {
        "ccpo": lambda: engine.generate(requests(prompts, new)),
        "generate": lambda: theirs(prompts, new),
        "products alone": decoding_limit(model, [len(p) for p in prompts], new, engine.dtype),
    }
    seconds = in_turns(sides, repeats=repeats, device=device)
    best = {side: min(values) for side, values in seconds.items()}
    return Comparison(
        part="decode",
        name=f"{size}, {rows} x {prompt}{' ragged' if ragged else ''} + {new}",
        shape={"size": size, "rows": rows, "prompt": prompt, "new": new, "ragged": ragged, "generate": label},
        seconds=seconds,
        work=rows * new,
        unit="tokens",
        ours="ccpo",
        base="generate",
        extra={"logprob_error": worst, "of_limit": best["products alone"] / best["ccpo"]},
    )


def shared_prompt(
    size: str, *, samples: int, prompt: int, new: int, repeats: int, device: str, prompts: int = 16
) -> Comparison:
    """N samples of each of some prompts, against as many rows with prompts of their own."""
    model = make_model(size, device=device)
    engine = make_engine(model, tokenizer())
    few = random_prompts(prompts, prompt)
    same = requests([p for p in few for _ in range(samples)], new)
    apart = requests(random_prompts(prompts * samples, prompt), new)
    seconds = in_turns(
        {"one prefill": lambda: engine.generate(same), "a prefill each": lambda: engine.generate(apart)},
        repeats=repeats,
        device=device,
    )
    return Comparison(
        part="decode",
        name=f"{size}, {samples} samples of each of {prompts} prompts, {prompt} + {new}",
        shape={"size": size, "prompts": prompts, "samples": samples, "prompt": prompt, "new": new},
        seconds=seconds,
        work=prompts * samples * new,
        unit="tokens",
        ours="one prefill",
        base="a prefill each",
    )


def run(mode: str, *, repeats: int, device: str) -> Iterator[Comparison]:
    """All comparisons of a mode: full, quick or gpu."""
    for size, rows, prompt, new in {"full": FULL, "quick": QUICK, "gpu": GPU}[mode]:
        yield compare(size, rows, prompt, new, repeats=repeats, device=device)
    if mode == "full":
        yield compare("5M", 64, 256, 32, repeats=repeats, device=device, ragged=True)
    for size in SHARED[mode]:
        yield shared_prompt(size, samples=16, prompt=256, new=32, repeats=repeats, device=device)
