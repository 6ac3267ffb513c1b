"""What each choice in the decoder and the update gives: the same work with it and without it, beside what one would have predicted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ccpo.bench.decode import random_prompts, requests
from ccpo.bench.limits import forward_limit
from ccpo.bench.shapes import make_model, tokenizer
from ccpo.bench.timing import Comparison, in_turns
from ccpo.bench.update import learner_of, make_rows
from ccpo.engines import make_engine
from ccpo.families import compute_dtype
from ccpo.kernels.compiled import library
from ccpo.learner import TrainRow
from ccpo.learner.layout import Layout

DECODE = {"full": ("1M", "5M", "25M", "100M"), "quick": ("1M",)}
UPDATE = {"full": ("1M", "5M", "25M"), "quick": ("1M",)}
WITH, WITHOUT = "with", "without"
FAILURES = Path("failure")
CPU = torch.device("cpu")


def run(mode: str, *, repeats: int) -> Iterator[Comparison]:
    """On a CPU."""
    bench = _Bench(repeats)
    for size in DECODE[mode]:
        new = 32 if size == "100M" else 64
        yield bench.low_precision(size, new)
        if bench.compute == torch.bfloat16 and library() is not None:
            yield bench.in_c(size, new)
        yield bench.finished_rows(size, new)
    for size in UPDATE[mode]:
        yield bench.prompts_once(size)
        yield bench.no_padding(size)
        yield bench.engine_logprobs(size)
        yield bench.paid_rows(size)


class _Bench:
    """``predicted`` is counted in tokens, columns or passes, or measured on the products alone; never fitted."""

    def __init__(self, repeats: int) -> None:
        self.repeats, self.compute = repeats, compute_dtype(CPU)

    def low_precision(self, size: str, new: int, rows: int = 64) -> Comparison:
        """Both in torch, which is all that float32 has."""
        model = make_model(size)
        asked = requests(random_prompts(rows, 32), new)
        with in_torch():
            ours, base = (make_engine(model, tokenizer(), dtype=t) for t in (self.compute, torch.float32))
            limits = [forward_limit(model, rows, t) for t in (self.compute, torch.float32)]
        return self._compare(
            f"{size}, {str(self.compute)[6:]} for float32",
            lambda: ours.generate(asked),
            lambda: base.generate(asked),
            self._ratio(*limits),
        )

    def in_c(self, size: str, new: int, rows: int = 64) -> Comparison:
        """Without: the same layers in torch."""
        model = make_model(size)
        asked = requests(random_prompts(rows, 32), new)
        ours, limit = make_engine(model, tokenizer()), forward_limit(model, rows, torch.bfloat16)
        with in_torch():
            base, base_limit = make_engine(model, tokenizer()), forward_limit(model, rows, torch.bfloat16)
        return self._compare(
            f"{size}, layers in C",
            lambda: ours.generate(asked),
            lambda: base.generate(asked),
            self._ratio(limit, base_limit),
        )

    def finished_rows(self, size: str, new: int, rows: int = 64) -> Comparison:
        """Without: a decoder whose rows stay until the last one is done."""
        engine, rng = make_engine(make_model(size), tokenizer()), random.Random(0)
        whole = requests(random_prompts(rows, 32), new)
        early = [replace(r, max_tokens=rng.randint(new // 8, new)) for r in whole]
        early[0] = whole[0]
        return self._compare(
            f"{size}, rows leave when done, {new // 8} to {new}",
            lambda: engine.generate(early),
            lambda: engine.generate(whole),
            rows * new / sum(r.max_tokens for r in early),
        )

    def prompts_once(self, size: str) -> Comparison:
        """Without: the same rows, each with a prompt of its own."""
        rows = make_rows(4, 8, 64, 32)
        apart = [
            replace(row, prompt_ids=ids) for row, ids in zip(rows, random_prompts(len(rows), 64, seed=1), strict=True)
        ]
        once, each = (len(Layout.of(r, CPU).ids_M) for r in (rows, apart))
        step = self._step(size)
        return self._compare(
            f"{size}, prompts run once, 64 + 8 x 32",
            lambda: step(rows),
            lambda: step(apart),
            each / once,
        )

    def no_padding(self, size: str) -> Comparison:
        """Without: the update of families that the library does not run itself, transformers over padded rows."""
        rows = make_rows(8, 8, 32, 64, ragged=True)
        ours, base = self._step(size), self._step(size)
        padded = len(rows) * max(len(r.prompt_ids) + len(r.token_ids) for r in rows)
        return self._compare(
            f"{size}, no padding, own forward pass",
            lambda: ours(rows),
            lambda: base(rows, patch("ccpo.learner.forward.runs", return_value=False)),
            padded / len(Layout.of(rows, CPU).ids_M),
        )

    def engine_logprobs(self, size: str) -> Comparison:
        """Without: the learner computes log-probs from before the update, in a forward pass more, a third of a pass forth and back."""
        rows = make_rows(8, 8, 32, 32)
        ours, base = self._step(size, old_logprobs="engine"), self._step(size, old_logprobs="learner")
        return self._compare(
            f"{size}, the engine's old log-probs",
            lambda: ours(rows),
            lambda: base(rows),
            4 / 3,
        )

    def paid_rows(self, size: str) -> Comparison:
        """Without: the rows of half the problems, which are paid nothing, run all the same."""
        rows = make_rows(8, 8, 32, 32)
        unpaid = {row.prompt_ids for row in rows[: len(rows) // 2]}
        half = [replace(r, advantage=0.0) if r.prompt_ids in unpaid else r for r in rows]
        step = self._step(size)
        return self._compare(f"{size}, rows paid nothing do not run", lambda: step(half), lambda: step(rows), 2.0)

    def _step(self, size: str, **options: Any) -> Callable[..., None]:
        model = make_model(size)
        model.set_attn_implementation("eager")  # SDPA's bfloat16 backward pass is slow there
        learner = learner_of(model, self.compute, **options)

        def step(rows: list[TrainRow], within: AbstractContextManager[Any] | None = None) -> None:
            with within or nullcontext():
                learner.step([rows], step=0, failure_folder=FAILURES)

        return step

    def _ratio(self, ours: Callable[[], None], base: Callable[[], None]) -> float:
        best = {k: min(v) for k, v in in_turns({WITH: ours, WITHOUT: base}, repeats=9).items()}
        return best[WITHOUT] / best[WITH]

    def _compare(self, name: str, ours: Callable[[], Any], base: Callable[[], Any], predicted: float) -> Comparison:
        seconds = in_turns({WITH: ours, WITHOUT: base}, repeats=self.repeats, warmup=2)
        return Comparison(
            part="choices",
            name=name,
            shape={},
            seconds=seconds,
            work=1,
            unit="pieces",
            ours=WITH,
            base=WITHOUT,
            extra={"predicted": predicted},
        )


@contextmanager
def in_torch() -> Iterator[None]:
    """What is made in here runs without the code in C."""
    with patch("ccpo.engines.native.fits", return_value=False), patch("ccpo.bench.limits.library", return_value=None):
        yield
