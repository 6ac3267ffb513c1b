"""The keys and values of the rows that are being decoded.

Prompts are padded on the left, so that every row's next token goes into the same column. Keys lie ``[B, kv_heads, head_dim, columns]``,
so that a step's product runs along memory, and values ``[B, kv_heads, columns, head_dim]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ccpo.engines.weights import Weights
from ccpo.rectangle import Rectangle


@dataclass(slots=True, kw_only=True)
class Cache:
    """A cache whose used part grows by a column a step.

    ``keys``, ``values``: a tensor a layer; the first ``filled`` columns are in use. ``position_B``: the next token's. ``mask``: added to the
    scores, ``[B * kv_heads, 1, columns]``; None where no prompt is padded.
    """

    keys: list[Tensor]
    values: list[Tensor]
    filled: int
    position_B: Tensor
    mask: Tensor | None

    @classmethod
    def empty(cls, w: Weights, sizes: list[int], spare: int) -> Cache:
        """Room for prompts of these sizes and ``spare`` columns more."""
        rows, width, dtype = len(sizes), max(sizes), w.attention_dtype
        size_B = torch.tensor(sizes, device=w.device)
        mask = None
        if min(sizes) < width:
            column_C = torch.arange(width + spare, device=w.device)
            mask_BC = torch.zeros(rows, width + spare, dtype=dtype, device=w.device)
            mask_BC.masked_fill_(column_C < (width - size_B)[:, None], float("-inf"))
            mask = mask_BC.repeat_interleave(w.kv_heads, 0)[:, None]

        def room(*shape: int) -> list[Tensor]:
            # zeros where columns stay unused: what is masked must still be a number
            make = torch.empty if mask is None else torch.zeros
            return [make(rows, w.kv_heads, *shape, dtype=dtype, device=w.device) for _ in w.layers]

        return cls(
            keys=room(w.head_dim, width + spare),
            values=room(width + spare, w.head_dim),
            filled=width,
            position_B=size_B,
            mask=mask,
        )

    def fill(self, layer: int, rows: slice, key: Tensor, value: Tensor) -> None:
        """Writes a prompt's last columns, ``[rows, kv_heads, columns, head_dim]``."""
        columns = slice(self.filled - key.shape[2], self.filled)
        self.keys[layer][rows, :, :, columns] = key.transpose(2, 3)
        self.values[layer][rows, :, columns] = value

    def select(self, rows: Tensor) -> Cache:
        """Only these rows, in this order; layer by layer, so that never two whole caches stand side by side."""
        if self.mask is not None:
            self.mask = self.mask.unflatten(0, (len(self.position_B), -1))[rows].flatten(0, 1)
        self.position_B = self.position_B[rows]
        for cache in (self.keys, self.values):
            for index, layer in enumerate(cache):
                cache[index] = layer.index_select(0, rows)
        return self

    def widen(self, columns: int) -> None:
        """Room for this many more tokens."""
        if self.mask is not None:
            self.mask = pad(self.mask, (0, columns))
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            self.keys[index], self.values[index] = pad(key, (0, columns)), pad(value, (0, 0, 0, columns))

    @property
    def columns(self) -> int:
        """How many there are, used and unused."""
        return self.values[0].shape[2]

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes a token of each row (``[B, kv_heads, head_dim]``) into the next column."""
        self.keys[layer][..., self.filled], self.values[layer][:, :, self.filled] = key, value

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Writes a token of each row (``[B, kv_heads, head_dim]``) into the next column; what its scaled query ``[B, heads, head_dim]``
        finds in all columns up to there: ``[B, heads * head_dim]``."""
        self.put(layer, key, value)
        return self.look(layer, query[:, :, None], self.filled + 1)[0].view(len(query), -1)

    def look(self, layer: int, query: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
        """What scaled queries ``[rows, heads, n, head_dim]`` find in the first ``used`` columns, with their scores and weights:
        ``[rows * kv_heads, heads / kv_heads * n, head_dim]`` and twice ``[..., used]``."""
        keys, values = self.keys[layer], self.values[layer]
        # The query heads of one key head are rows of one matrix: grouped heads need no copies of their keys.
        query = query.reshape(keys.shape[0] * keys.shape[1], -1, query.shape[3])
        scores = torch.bmm(query, keys[..., :used].flatten(0, 1))
        if self.mask is not None:
            scores += self.mask[..., :used]
        weights = scores.softmax(-1)
        return torch.bmm(weights, values[:, :, :used].flatten(0, 1)), scores, weights

    def move_on(self) -> None:
        """The column that was written becomes one of those in use."""
        self.filled += 1
        self.position_B = self.position_B + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """How prompts of these sizes, whose tokens M lie in one run, stand in rectangles: flush ``left``, where a causal attention needs no mask,
    and flush ``right``, as in the cache. ``last_B``: each prompt's last token in the run. ``real_B11C``: where a token stands, flush left;
    None where everywhere."""

    left: Rectangle
    right: Rectangle
    position_M: Tensor
    last_B: Tensor
    real_B11C: Tensor | None

    @classmethod
    def of(cls, sizes: list[int], device: torch.device) -> Block:
        columns, size_B = max(sizes), torch.tensor(sizes)
        column_BC = torch.arange(columns).expand(len(sizes), columns)
        real_BC = column_BC < size_B[:, None]
        left = Rectangle.of(real_BC).to(device)
        return cls(
            left=left,
            right=Rectangle.of(column_BC >= columns - size_B[:, None]).to(device),
            position_M=column_BC[real_BC].to(device),
            last_B=(size_B.cumsum(0) - 1).to(device),
            real_B11C=None if left.place_S is None else real_BC[:, None, None].to(device),
        )
