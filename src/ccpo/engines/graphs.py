"""Decoding on a GPU: a step of the native decoder, recorded as a CUDA graph and then only played.

A step launches some twenty small kernels a layer, and launching them from Python takes several times as long as they run. A recording
replays all of them at once, but its shapes and addresses are fixed. So keys and values lie in one *arena* that all batches use; a batch
has one of a few numbers of rows, and its step looks at one of a few numbers of columns (`rounded`), what is not in use masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ccpo.engines.cache import Cache
from ccpo.engines.weights import Weights

ROWS, COLUMNS = 8, 64  # rows and columns come in multiples of these, and above in quarters of a power of two


def rounded(count: int, unit: int) -> int:
    """The smallest of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... units that holds ``count``."""
    units = -(-count // unit)
    step = max(1, (1 << (units - 1).bit_length()) // 8)
    return -(-units // step) * step * unit


@dataclass(slots=True, kw_only=True)
class Fixed:
    """A cache at fixed addresses, for recordings: what a step reads lies in its tensors, and it looks at ``looked`` columns.

    It stands in for a `Cache` whose first ``rows`` of R rows are in use; ``filled``, ``keys`` and ``values`` are as there.
    ``column_1``: the column that is written next; ``token_R``, ``position_B``: of the next token, so that a row's first column that is no
    padding is ``column_1 - position_B``. ``bias_R1C``: added to the scores of a step.
    """

    arena: Arena
    keys: list[Tensor]
    values: list[Tensor]
    token_R: Tensor
    position_B: Tensor
    column_1: Tensor
    rows: int = 0
    filled: int = 0
    bias_R1C: Tensor | None = None
    recordings: dict[int, Callable[[], None]] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """How many there are, used and unused."""
        return self.values[0].shape[2]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Cache.attend`."""
        keys, values, (R, H, D) = self.keys[layer], self.values[layer], query.shape
        keys.index_copy_(3, self.column_1, key[..., None])
        values.index_copy_(2, self.column_1, value[:, :, None])
        looked = self.bias_R1C.shape[2]
        scores = _product(query.reshape(R * key.shape[1], -1, D), keys[..., :looked].flatten(0, 1))
        weights = (scores.view(R, H, looked) + self.bias_R1C).softmax(-1).to(values.dtype)
        return torch.bmm(weights.view(len(scores), -1, looked), values[:, :, :looked].flatten(0, 1)).view(R, -1)

    def move_on(self) -> None:
        """Nothing: a recording must not change what its next playing reads. `Arena.step` moves on."""

    def select(self, rows: Tensor) -> Fixed:
        """As `Cache.select`."""
        return self.arena.take(self, rows, columns=self.columns, filled=self.filled)


def _product(query: Tensor, keys: Tensor) -> Tensor:
    """Scores in float32, also of bfloat16 queries and keys."""
    if query.is_cuda and query.dtype != torch.float32:
        return torch.bmm(query, keys, out_dtype=torch.float32)
    return torch.bmm(query, keys).float()


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph, and what must stay at the addresses that it knows."""

    graph: Any
    kept: tuple[Tensor, ...]

    def __call__(self) -> None:
        self.graph.replay()


class Arena:
    """The memory that all batches of an engine decode in, and the recordings made in it. ``step`` is the decoder's own.

    It is as large as the largest batch so far; to grow, it forgets its recordings.
    """

    def __init__(self, weights: Weights, step: Callable[[Any, Tensor], Tensor]) -> None:
        self.weights, self._decode = weights, step
        self.record = weights.device.type == "cuda"
        self.pool: Any = None
        self.fixed: dict[tuple[int, int], Fixed] = {}
        self.size = self.rows = 0
        self.flat: list[tuple[Tensor, Tensor]] = []
        self.logits_RV = weights.embed.new_empty(0)

    def deal(self, cache: Cache, owner_B: Tensor, steps: int) -> Fixed:
        """Prompts' caches, each to its rows, with room for ``steps`` tokens more."""
        columns = rounded(cache.filled + steps, COLUMNS)
        self._grow(rounded(len(owner_B), ROWS), columns)
        return self.take(cache, owner_B, columns=columns, filled=cache.filled)

    def take(self, source: Cache | Fixed, rows_B: Tensor, *, columns: int, filled: int) -> Fixed:
        """These rows of a cache; it may itself lie in the arena."""
        count = len(rows_B)
        position_B = source.position_B[rows_B]
        into = self._place(rounded(count, ROWS), columns)
        for layer in range(len(self.flat)):
            key = source.keys[layer][..., :filled].index_select(0, rows_B)
            value = source.values[layer][:, :, :filled].index_select(0, rows_B)
            into.keys[layer].zero_()[:count, ..., :filled] = key
            into.values[layer].zero_()[:count, :, :filled] = value
        into.position_B.fill_(filled)[:count] = position_B
        into.token_R.zero_()
        into.column_1.fill_(filled)
        into.rows, into.filled = count, filled
        return into

    def step(self, fixed: Fixed, token_B: Tensor) -> Tensor:
        """Runs one more token of every row; the logits of those after it, which the next step overwrites."""
        fixed.token_R[: fixed.rows] = token_B
        looked = min(rounded(fixed.filled + 1, COLUMNS), fixed.columns)
        if looked not in fixed.recordings:
            fixed.recordings[looked] = self._recording(fixed, looked)
        fixed.recordings[looked]()
        fixed.filled += 1
        fixed.column_1 += 1
        fixed.position_B += 1
        return self.logits_RV[: fixed.rows]

    def _recording(self, fixed: Fixed, looked: int) -> Callable[[], None]:
        column_C = torch.arange(looked, device=self.weights.device)
        rotation = self.weights.rotations(fixed.columns)

        def run() -> None:
            first_R = fixed.column_1 - fixed.position_B
            used_RC = (column_C >= first_R[:, None]) & (column_C <= fixed.column_1)
            bias_RC = torch.zeros(used_RC.shape, device=used_RC.device).masked_fill_(~used_RC, float("-inf"))
            fixed.bias_R1C = bias_RC[:, None]
            self.logits_RV[: len(fixed.token_R)] = self._decode(fixed, fixed.token_R)

        if not self.record:
            return run
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            run()  # loads the kernels; it writes what the first playing writes again
            aside.synchronize()
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            run()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(aside)
        return Recording(graph, (column_C, rotation))

    def _grow(self, rows: int, columns: int) -> None:
        w = self.weights
        if rows * columns > self.size or rows > self.rows:
            self.size, self.rows = max(self.size, rows * columns), max(self.rows, rows)
            self.fixed, self.flat = {}, []  # first let go of the old
            self.pool = torch.cuda.graph_pool_handle() if self.record else None
            cells = self.size * w.kv_heads * w.head_dim
            self.flat = [
                tuple(torch.zeros(cells, dtype=w.attention_dtype, device=w.device) for _ in range(2)) for _ in w.layers
            ]
            self.logits_RV = torch.empty(self.rows, w.vocab, dtype=w.dtype, device=w.device)

    def _place(self, rows: int, columns: int) -> Fixed:
        """The arena as a cache of this shape."""
        if (rows, columns) not in self.fixed:
            w, device = self.weights, self.weights.device
            cells = rows * columns * w.kv_heads * w.head_dim

            def whole(size: int = rows) -> Tensor:
                return torch.zeros(size, dtype=torch.int64, device=device)

            self.fixed[rows, columns] = Fixed(
                arena=self,
                keys=[key[:cells].view(rows, w.kv_heads, w.head_dim, columns) for key, _ in self.flat],
                values=[value[:cells].view(rows, w.kv_heads, columns, w.head_dim) for _, value in self.flat],
                token_R=whole(),
                position_B=whole(),
                column_1=whole(1),
            )
        return self.fixed[rows, columns]
