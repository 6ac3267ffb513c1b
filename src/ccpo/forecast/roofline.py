"""Seconds on a GPU, from its maker's figures: the longer of moving bytes and multiplying, over shares that were measured.

The shares below are those that reproduce ``docs/benchmarks/gpu.json`` (one H200), rounded; a test derives them again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ccpo.engines.base import batches
from ccpo.engines.layers import TorchLayers
from ccpo.engines.native import CHECK, LOGITS
from ccpo.forecast.cards import Card
from ccpo.forecast.shapes import Shape
from ccpo.forecast.standin import Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of a card's figures that the library reaches: ``prefill`` and ``update`` of its operations, ``bandwidth`` of its memory's;
    ``launch``: seconds of a layer in one decoding step beside the bytes it moves. ``eager``: the least that a layer of a micro-batch takes,
    whose kernels Python launches one by one; it was not measured."""

    prefill: float = 0.30
    update: float = 0.16
    bandwidth: float = 0.70
    launch: float = 75e-6
    eager: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """``steps`` of decoding with ``rows`` rows, ``columns`` tokens long on average."""

    steps: int
    rows: int
    columns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is decoded together: tokens of its distinct prompts, the sum of their squares, the longest prompt, and spans of equal rows."""

    rows: int
    prompts: int
    prefill: int
    squares: int
    width: int
    new: int
    spans: tuple[Span, ...]


def cut(asked: Sequence[Asked], shape: Shape, budget: int) -> list[Batch]:
    """The batches that the native engine makes of these requests, with the rows leaving as it lets them leave."""
    return [batch_of(part) for part in members(asked, shape, budget)]


def members(asked: Sequence[Asked], shape: Shape, budget: int) -> list[list[Asked]]:
    """The requests of each batch."""
    most = max(1, LOGITS // shape.vocab)
    parts = batches(asked, max_batch_tokens=budget, max_rows=most)  # type: ignore[arg-type]
    return [[asked[i] for i in part] for part in parts]


def batch_of(asked: Sequence[Asked]) -> Batch:
    """One batch: every ``CHECK`` steps rows that have ended are looked for, and leave once at most ``TorchLayers.KEEP`` of them are alive."""
    prompts = {a.prompt_ids: len(a.prompt_ids) for a in asked}
    width, lengths = max(prompts.values()), sorted(a.length for a in asked)
    most, rows, step, spans = max(a.max_tokens for a in asked), len(asked), 0, []
    while rows and step < lengths[-1]:
        steps = min(CHECK, most - step)
        # the first token comes from the prompts
        spans.append(Span(steps=steps - (step == 0), rows=rows, columns=width + step + steps / 2))
        step += steps
        alive = len(lengths) - bisect_right(lengths, step)
        rows = alive if alive <= TorchLayers.KEEP * rows else rows
    return Batch(
        rows=len(asked),
        prompts=len(prompts),
        prefill=sum(prompts.values()),
        squares=sum(n * n for n in prompts.values()),
        width=width,
        new=most,
        spans=tuple(spans),
    )


def prefill_flops(shape: Shape, batch: Batch) -> float:
    """``2`` operations a matrix's number and token, causal attention's ``2 layers heads head_dim n^2``, and one token a prompt through the head."""
    attention = 2 * shape.layers * shape.heads * shape.head_dim * batch.squares
    return 2.0 * shape.body * batch.prefill + attention + 2.0 * shape.embedding * batch.prompts


def step_work(shape: Shape, rows: int, columns: float) -> tuple[float, float]:
    """Operations and bytes of one decoding step: all matrices, once for each row and once from memory, and every row's keys and values."""
    matrices, attended = shape.body + shape.embedding, shape.layers * shape.heads * shape.head_dim
    return rows * (2.0 * matrices + 4.0 * attended * columns), 2.0 * (matrices + rows * columns * shape.cached)


def update_flops(shape: Shape, tokens: int, squares: int, scored: int, *, checkpointing: bool) -> float:
    """Six operations a number and token (forward, and twice as many backward), eight where layers are run twice; ``scored`` tokens reach the
    head, ``squares`` is the sum over texts of their squared length."""
    body = (8.0 if checkpointing else 6.0) * shape.body * tokens
    attention = (4.0 if checkpointing else 3.0) * 2 * shape.layers * shape.heads * shape.head_dim * squares
    return body + attention + 6.0 * shape.embedding * scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Seconds on ``card``."""

    card: Card
    efficiency: Efficiency = Efficiency()

    def prefill(self, shape: Shape, batch: Batch) -> float:
        eager = self.efficiency.eager * shape.layers / 3
        return max(eager, prefill_flops(shape, batch) / (self.card.flops * self.efficiency.prefill))

    def decode(self, shape: Shape, batch: Batch) -> float:
        """All steps. What a step costs is linear in rows and in rows times columns, so that two of them tell all."""
        flops, moved = step_work(shape, 1, 0.0)
        flops_column, moved_column = (b - a for a, b in zip((flops, moved), step_work(shape, 1, 1.0), strict=True))
        speed, width = self.card.flops * self.efficiency.prefill, self.card.bandwidth * self.efficiency.bandwidth
        launch, seconds = shape.layers * self.efficiency.launch, 0.0
        for span in batch.spans:
            work = span.rows * (flops + flops_column * span.columns) / speed
            bytes_moved = (moved + moved_column * span.rows * span.columns) / width
            seconds += span.steps * (launch + max(work, bytes_moved))
        return seconds

    def update(self, shape: Shape, flops: float) -> float:
        """A micro-batch forward and backward."""
        return max(self.efficiency.eager * shape.layers, flops / (self.card.flops * self.efficiency.update))

    def optimizer(self, numbers: float, weight_bytes: int) -> float:
        """The gradient's norm and AdamW: four tensors read, three written, and the gradient once more."""
        return self.moving(8 * weight_bytes * numbers)

    def refresh(self, numbers: float, weight_bytes: int) -> float:
        """The decoder's copy: weights read, bfloat16 written."""
        return self.moving((weight_bytes + 2) * numbers)

    def moving(self, count: float) -> float:
        """Seconds for so many bytes of the card's memory."""
        return count / (self.card.bandwidth * self.efficiency.bandwidth)
