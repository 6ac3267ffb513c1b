"""Seconds of a step on this machine's CPU: the library's own decoder and update, timed on models of one and three layers of a recipe's shapes, on the
requests and rows of :mod:`ccpo.forecast.work`; the rest of the layers, and of the work, in proportion."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ccpo.bench.timing import in_turns
from ccpo.bootstrap import character_tokenizer
from ccpo.config import RunConfig
from ccpo.crew import DTYPES, make_learner
from ccpo.engines import make_engine
from ccpo.engines.budget import without_room
from ccpo.errors import UserError
from ccpo.forecast.roofline import Batch, batch_of, members, prefill_flops, step_work, update_flops
from ccpo.forecast.seconds import StepSeconds, micro_batches
from ccpo.forecast.shapes import Shape
from ccpo.forecast.standin import Asked, Tokens
from ccpo.forecast.work import StepWork, Subject
from ccpo.learner import Policy, TrainRow
from ccpo.learner.lora import lora_config, wrap
from ccpo.types import Request

DEPTHS = (1, 3)  # layers of the models that are timed
REPEATS = 3
OPERATIONS = 6e10  # of one piece that is timed; more is timed in part
LARGEST = 400_000_000  # numbers of a model that is timed
SHORTEST = 1 / 4  # texts are shortened to no less than this before rows are left out


class Endless:
    """A tokenizer that ends no text, so that texts have the length that they are given."""

    eos_token_id = None

    def __init__(self) -> None:
        self.inner = character_tokenizer("".join(map(chr, range(32, 127))))

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return self.inner.decode([i % len(self.inner) for i in ids], **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Something that is timed on a model of each depth. ``times``: how many times as much there is of it, by depth."""

    name: str
    run: Callable[[int], Callable[[], Any]]
    times: Callable[[int], float]


def measured_step(work: StepWork, shapes: Mapping[str, Shape], subject: Subject) -> StepSeconds:
    """What the step will take here, in one process. Raises UserError for models that are too large to be timed in passing."""
    config = subject.setup.config
    for shape in shapes.values():
        size = replace(shape, layers=DEPTHS[-1]).parameters
        if size > LARGEST:
            raise UserError(
                f"--gpu cpu: {DEPTHS[-1]} layers of {shape.name} have {size / 1e6:,.0f}M parameters, too many to be timed here; name a card "
                "with --gpu, for example --gpu h100"
            )
    with _threads(config.run.threads):
        decode = update = refresh = 0.0
        for name, calls in work.calls.items():
            shape = shapes.get(name.removesuffix("@start"))
            if shape is not None:
                found = Bench(shape, config, name).seconds(calls, work.rows.get(name, ()))
                decode, update, refresh = decode + found[0], update + found[1], refresh + found[2]
    return StepSeconds(decode=decode, update=update, refresh=refresh, host=work.host)


@contextmanager
def _threads(wanted: int | None) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Bench:
    """Times the pieces of one policy's work."""

    def __init__(self, shape: Shape, config: RunConfig, name: str) -> None:
        self.shape, self.config, self.name = shape, config, name
        self.models = {depth: self._model(depth) for depth in DEPTHS if depth <= shape.layers}

    def seconds(
        self, calls: Sequence[Sequence[Asked]], minibatches: Sequence[Sequence[TrainRow]]
    ) -> tuple[float, float, float]:
        """Seconds of all ``calls``, of the update on ``minibatches``, and of the refresh after it."""
        every = [self._generate(call) for call in calls]
        learned = [*self._update(minibatches), self._refresh()] if minibatches else []
        found = self._timed([*every, *learned])
        update, optimizer, refresh = found[len(every) :] or (0.0, 0.0, 0.0)
        return sum(found[: len(every)]), update + optimizer, refresh

    def _timed(self, pieces: Sequence[Piece]) -> list[float]:
        sides = {(i, depth): piece.run(depth) for i, piece in enumerate(pieces) for depth in self.models}
        taken = in_turns(sides, repeats=REPEATS)  # type: ignore[arg-type]
        found = []
        for i, piece in enumerate(pieces):
            median = {d: statistics.median(taken[i, d]) for d in self.models}  # type: ignore[index]
            low, high = min(median), max(median)
            median[high] = max(median.values())  # more layers are not less
            at = {d: seconds * piece.times(d) for d, seconds in median.items()}
            a_layer = (at[high] - at[low]) / (high - low) if high > low else 0.0
            found.append(at[low] + a_layer * (self.shape.layers - low))
        return found

    def _model(self, depth: int) -> Policy:
        """A random model of so many layers, as a policy."""
        from transformers import AutoConfig, AutoModelForCausalLM

        s = self.shape
        options: dict[str, Any] = {"head_dim": s.head_dim} if s.family != "qwen2" else {}
        if s.family == "llama":
            options |= {"attention_bias": s.out_bias, "mlp_bias": s.mlp_bias}
        config = AutoConfig.for_model(
            s.family,
            vocab_size=s.vocab,
            hidden_size=s.hidden,
            num_hidden_layers=depth,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            intermediate_size=s.mlp,
            max_position_embeddings=1 << 20,  # it costs nothing
            tie_word_embeddings=s.tied,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=None,
            **options,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.config.model.weights])
        model.generation_config.eos_token_id = None
        adapter = None
        if self.config.model.sharing == "lora":
            lora, adapter = self.config.model.lora, self.name
            plan = lora_config("", rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
            model = wrap(model.requires_grad_(False), {adapter: plan})
        return Policy(name=self.name, agents=(), model=model.eval(), tokenizer=Endless(), adapter=adapter, lr=1e-9)

    def _engine(self, depth: int) -> Any:
        policy, config = self.models[depth], self.config
        return make_engine(
            policy.model,
            policy.tokenizer,
            kind=config.model.engine,
            dtype=DTYPES[config.model.decode],
            adapter=policy.adapter,
            max_batch_tokens=1 << 40,
        )

    def _generate(self, call: Sequence[Asked]) -> Piece:
        """One batch of a call, the costliest, or part of it; the others cost in proportion."""
        deep = replace(self.shape, layers=max(self.models))
        parts = members(call, self.shape, without_room(self.config.rollout.decode_tokens))
        every = [batch_of(part) for part in parts]
        sample = shortened(max(parts, key=lambda part: decode_operations(deep, batch_of(part))), deep)
        requests = [
            Request(prompt_ids=real_ids(a.prompt_ids, self.shape.vocab), seed=i, max_tokens=a.length)
            for i, a in enumerate(sample)
        ]
        timed = batch_of(sample)

        def times(depth: int) -> float:
            shape = replace(self.shape, layers=depth)
            return sum(decode_operations(shape, b) for b in every) / decode_operations(shape, timed)

        engines = {depth: self._engine(depth) for depth in self.models}
        return Piece(name="decode", run=lambda depth: lambda: engines[depth].generate(requests), times=times)

    def _update(self, minibatches: Sequence[Sequence[TrainRow]]) -> list[Piece]:
        """All updates of a step, or on part of each mini-batch; and the optimiser alone, whose work does not grow with the rows."""
        epochs, deep = self.config.optim.epochs, replace(self.shape, layers=max(self.models))
        total = epochs * sum(row_operations(deep, part, self.config) for part in minibatches)
        share = min(1.0, OPERATIONS / total)
        samples = [list(part[: max(1, round(share * len(part)))]) for part in minibatches if part]
        real = [[self._real(row) for row in part] for part in samples]
        learners = {d: make_learner(self.config, {self.name: p}) for d, p in self.models.items()}

        def more(depth: int) -> float:
            shape = replace(self.shape, layers=depth)
            counts = [
                sum(row_operations(shape, part, self.config) for part in parts) for parts in (minibatches, samples)
            ]
            return counts[0] / counts[1]

        def learn(depth: int) -> Callable[[], Any]:
            return lambda: learners[depth].step(real, step=0, failure_folder=Path("failure"))

        def optimize(depth: int) -> Callable[[], Any]:
            optimizer = learners[depth].optimizers[self.name]

            def run() -> None:
                for parameter in optimizer.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.clip()
                optimizer.step(1.0)

            return run

        updates = epochs * len(samples)
        return [
            Piece(name="update", run=learn, times=more),
            # what `more` times as many rows do not make more
            Piece(name="optimizer", run=optimize, times=lambda depth: updates * (1 - more(depth))),
        ]

    def _refresh(self) -> Piece:
        engines = {depth: self._engine(depth) for depth in self.models}
        return Piece(name="refresh", run=lambda depth: engines[depth].refresh, times=lambda depth: 1.0)

    def _real(self, row: TrainRow) -> TrainRow:
        vocab, size = self.shape.vocab, len(row.token_ids)
        return replace(
            row,
            policy=self.name,
            prompt_ids=real_ids(row.prompt_ids, vocab),
            token_ids=real_ids(row.token_ids, vocab),
            engine_logprobs=(-3.0,) * size,
            advantage=row.advantage or 1.0,
        )


def decode_operations(shape: Shape, batch: Batch) -> float:
    return prefill_flops(shape, batch) + sum(s.steps * step_work(shape, s.rows, s.columns)[0] for s in batch.spans)


def row_operations(shape: Shape, rows: Sequence[TrainRow], config: RunConfig) -> float:
    parts = micro_batches(rows, config, 1, padded=False)
    return sum(update_flops(shape, m.tokens, m.squares, m.scored, checkpointing=False) for m in parts)


def shortened(asked: Sequence[Asked], shape: Shape) -> list[Asked]:
    """A batch of at most ``OPERATIONS``: its texts made shorter, all in proportion, and then rows left out."""
    share = min(1.0, OPERATIONS / decode_operations(shape, batch_of(asked)))
    shorter = max(SHORTEST, share)
    kept = [replace(a, length=max(1, round(shorter * a.length))) for a in asked]
    rows = max(1, round(len(kept) * min(1.0, OPERATIONS / decode_operations(shape, batch_of(kept)))))
    return kept[:: max(1, len(kept) // rows)]


def real_ids(tokens: Sequence[int], vocab: int) -> tuple[int, ...]:
    """Random tokens in the place of those that nobody reads; equal ones for equal ones."""
    if not isinstance(tokens, Tokens):
        return tuple(tokens)
    rng = random.Random(repr(tokens.key))
    return tuple(rng.randrange(vocab) for _ in range(tokens.size))
