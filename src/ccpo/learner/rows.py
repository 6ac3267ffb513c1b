"""Rows to train on, and how they are cut into micro-batches."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPREAD = 4  # what attention spreads a prompt over its rows is no more than so many times the tokens of a micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """One turn that an agent has spoken and what it is paid for it.

    ``engine_logprobs`` are the sampler's, at the row's ``temperature`` (0, greedy, counts as 1). Rows with equal
    ``segment`` are the turns of one agent in one rollout. Raises ValueError for an empty prompt, log-probs that do not
    fit the tokens, or a negative temperature.
    """

    policy: str
    agent: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    engine_logprobs: tuple[float, ...]
    advantage: float
    segment: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompt_ids or len(self.token_ids) != len(self.engine_logprobs) or not self.temperature >= 0:
            raise ValueError(
                f"a row needs a prompt, a log-prob for each token and a temperature >= 0; got {len(self.prompt_ids)} "
                "prompt "
                f"tokens, {len(self.token_ids)} tokens, {len(self.engine_logprobs)} log-probs, temperature "
                f"{self.temperature}"
            )


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """Rows side by side: prompts padded on the left and completions on the right, so that the first tokens of all
    completions share column ``L - T``. ``old_BT`` and ``ref_BT`` are filled where the objective needs them."""

    rows: tuple[TrainRow, ...]
    ids_BL: Tensor
    attention_BL: Tensor
    position_BL: Tensor
    mask_BT: Tensor
    engine_BT: Tensor
    advantage_B: Tensor
    segment_B: Tensor
    temperature_B: Tensor
    old_BT: Tensor | None = None
    ref_BT: Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


def number_segments(rows: Sequence[TrainRow]) -> list[int]:
    """The rows' segments as small ids, counted from 0 in order of first appearance."""
    seen: dict[int, int] = {}
    return [seen.setdefault(row.segment, len(seen)) for row in rows]


def pack(rows: Sequence[TrainRow], segments: Sequence[int], budget: int, *, shared: bool = False) -> list[list[int]]:
    """Indices of ``rows`` in micro-batches of similar length.

    A micro-batch of ``n`` rows has ``n * (longest prompt + longest completion) <= budget``, unless it is one segment
    alone: the rows of a segment stay together, since they may share an importance ratio. The order depends on lengths
    and positions only. With ``shared``, rows of one prompt stand together, a prompt counts once for all its rows, and the
    rectangle above may have ``SPREAD`` times the budget. Raises ValueError for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"the token budget of a micro-batch is at least 1; got {budget}")
    members: dict[int, list[int]] = {}
    for index, segment in enumerate(segments):
        members.setdefault(segment, []).append(index)
    packed: list[list[int]] = []
    load = _Load()
    for indices in sorted(members.values(), key=lambda indices: _place([rows[i] for i in indices], shared)):
        more = [rows[i] for i in indices]
        if packed and load.fits(more, budget, shared):
            packed[-1] += indices
        else:
            packed.append(list(indices))
            load = _Load()
        load.add(more)
    return packed


def _place(rows: Sequence[TrainRow], shared: bool) -> tuple[object, ...]:
    """By what segments are sorted."""
    prompt, completion = max(len(r.prompt_ids) for r in rows), max(len(r.token_ids) for r in rows)
    if shared:
        return prompt, rows[0].prompt_ids, completion
    return prompt + completion, prompt, completion


@dataclass(slots=True)
class _Load:
    """What a micro-batch holds."""

    rows: int = 0
    prompt: int = 0
    completion: int = 0
    tokens: int = 0
    prompts: set[tuple[int, ...]] = field(default_factory=set)

    def fits(self, more: Sequence[TrainRow], budget: int, shared: bool) -> bool:
        rows, prompt, completion = self._with(more)
        if not shared:
            return rows * (prompt + completion) <= budget
        return self.tokens + self._new(more) <= budget and rows * (prompt + completion) <= SPREAD * budget

    def add(self, more: Sequence[TrainRow]) -> None:
        self.rows, self.prompt, self.completion = self._with(more)
        self.tokens += self._new(more)
        self.prompts |= {r.prompt_ids for r in more}

    def _new(self, more: Sequence[TrainRow]) -> int:
        """Tokens that these rows add, prompts that are there already apart."""
        return sum(len(r.token_ids) for r in more) + sum(map(len, {r.prompt_ids for r in more} - self.prompts))

    def _with(self, more: Sequence[TrainRow]) -> tuple[int, int, int]:
        prompt, completion = (
            max(map(len, ids)) for ids in zip(*((r.prompt_ids, r.token_ids) for r in more), strict=True)
        )
        return self.rows + len(more), max(self.prompt, prompt), max(self.completion, completion)


def collate(rows: Sequence[TrainRow], segments: Sequence[int], device: torch.device) -> MicroBatch:
    """The tensors of one micro-batch. Padding is token 0, seen by no other token and trained nowhere."""
    prompt_B, text_B = (
        torch.tensor([len(x) for x in ids]) for ids in zip(*((r.prompt_ids, r.token_ids) for r in rows), strict=True)
    )
    P, T = int(prompt_B.max()), int(text_B.max())
    column_L = torch.arange(P + T)
    attention_BL = (column_L >= P - prompt_B[:, None]) & (column_L < P + text_B[:, None])
    mask_BT = attention_BL[:, P:]
    ids_BL = torch.zeros(len(rows), P + T, dtype=torch.int64)
    ids_BL[attention_BL] = whole_numbers(i for row in rows for i in (*row.prompt_ids, *row.token_ids))
    engine_BT = torch.zeros(len(rows), T)
    engine_BT[mask_BT] = torch.frombuffer(
        array("f", [x for row in rows for x in row.engine_logprobs]), dtype=torch.float32
    )
    return MicroBatch(
        rows=tuple(rows),
        ids_BL=ids_BL.to(device),
        attention_BL=attention_BL.long().to(device),
        position_BL=(attention_BL.cumsum(1) - 1).clamp(min=0).to(device),
        mask_BT=mask_BT.to(device),
        engine_BT=engine_BT.to(device),
        advantage_B=torch.tensor([row.advantage for row in rows]).to(device),
        segment_B=torch.tensor(list(segments)).to(device),
        temperature_B=torch.tensor([row.temperature or 1.0 for row in rows]).to(device),
    )


def whole_numbers(values: Iterable[int]) -> Tensor:
    """``torch.tensor`` of many int64, several times as fast; at least one."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
