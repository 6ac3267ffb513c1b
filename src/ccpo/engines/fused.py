"""The decoder's layers in one call: `ccpo.engines.layers` written in C (``decode.c``), for a CPU that multiplies bfloat16.

A step of a small model is hundreds of operations of a few microseconds each, which in torch take most of its time between them. Here a
whole pass is one call, whose threads stay together. A row's result never hangs on the rows beside it. Prompts lie in one cache and
what is said in another: samples of a prompt share it, and rows that have ended leave by no longer being named.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccpo.engines.products import Panels
from ccpo.engines.weights import Weights
from ccpo.families import head_dim
from ccpo.kernels.compiled import address, aligned, library, scratch, structure

PREFILL_TOKENS = 2_048  # prompt tokens that go through a layer at once
# said everywhere, as are the dtypes: a default that somebody has set must not reach the C code
CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"dtype": torch.bfloat16, "device": CPU}
INDEX: dict[str, Any] = {"dtype": torch.int32, "device": CPU}
QUERIES = 16  # tokens of a prompt that attend together


# as in decode.c
CLayer = structure(
    "CLayer",
    "p attention_norm, p qkv, p qkv_bias, p qk_norm, p out, p out_bias, p mlp_norm, p gate_up, p gate_up_bias, p down, p down_bias",
)
CModel = structure(
    "CModel",
    "i layers, i hidden, i heads, i kv_heads, i head_dim, i inner, i vocab, f eps, f scale, p embed, p head, p norm, p rotation, p layer",
)
CCache = structure("CCache", "p keys, p values, i slots, i columns")
CBatch = structure(
    "CBatch", "i tokens, i shift, i groups, i wants, p id, p slot, p column, p origin, p before, p first, p wanted"
)


def fits(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model of this shape runs here, in ``dtype``."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    whole = size % 16 == 0 and heads * size % 32 == 0 and heads % kv_heads == 0
    return whole and device.type == "cpu" and dtype == torch.bfloat16 and library() is not None


class Columns:
    """Keys and values of ``slots`` texts with room for ``columns`` tokens each, as decode.c lays them out."""

    def __init__(self, w: Weights, slots: int, columns: int) -> None:
        self.columns = -(-columns // 32) * 32
        size = len(w.layers) * slots * w.kv_heads * self.columns * w.head_dim
        self.keys = torch.empty(size, **SHORT)
        self.values = torch.zeros(size, **SHORT)  # unused ones are multiplied with 0 and must be numbers
        self.c = CCache(self.keys.data_ptr(), self.values.data_ptr(), slots, self.columns)


@dataclass(slots=True, kw_only=True)
class Rows:
    """The rows that are being decoded: row i says into slot ``slot_B[i]`` of ``said``, after the first ``before_B[i]`` columns of slot
    ``origin_B[i]`` of ``prompts``. ``filled``: columns said so far."""

    prompts: Columns
    said: Columns
    slot_B: Tensor
    origin_B: Tensor
    before_B: Tensor
    filled: int = 0

    def select(self, rows: Tensor) -> Rows:
        """Only these rows, in this order; nothing is copied."""
        self.slot_B, self.origin_B, self.before_B = self.slot_B[rows], self.origin_B[rows], self.before_B[rows]
        return self


class FusedLayers:
    """Runs prompts and steps; see `ccpo.engines.layers.TorchLayers`, whose place it takes."""

    KEEP = 1.0  # leaving is free

    def __init__(self, weights: Weights) -> None:
        self.weights = w = weights
        self.alone = threading.Lock()  # the room below is one, and the interpreter's lock is free in C
        self.room = scratch(0)
        self._layers = (CLayer * len(w.layers))()
        for into, layer in zip(self._layers, w.layers, strict=True):
            into.attention_norm, into.mlp_norm = layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()
            into.qk_norm = address(layer.qk_norm)
            for name in ("qkv", "out", "gate_up", "down"):
                product: Panels = getattr(layer, name)
                setattr(into, name, product.panels.data_ptr())
                setattr(into, f"{name}_bias", address(product.offset))
        config = w.source.config
        self._model = CModel(
            layers=len(w.layers),
            hidden=config.hidden_size,
            heads=w.heads,
            kv_heads=w.kv_heads,
            head_dim=w.head_dim,
            inner=config.intermediate_size,
            vocab=w.vocab,
            eps=w.eps,
            scale=w.scale,
            embed=w.embed.data_ptr(),
            head=w.head.panels.data_ptr(),
            norm=w.norm.data_ptr(),
            layer=ctypes.addressof(self._layers),
        )

    def begin(self, prompts: Sequence[tuple[int, ...]], owner: Sequence[int], steps: int) -> tuple[Rows, Tensor]:
        """Runs distinct prompts; rows of the prompts ``owner``, with room for ``steps`` tokens, and the logits of their first."""
        cache, logits_PV = self._prefill(prompts)
        owner_B = torch.tensor(owner, device=CPU)
        rows = Rows(
            prompts=cache,
            said=Columns(self.weights, len(owner), steps),
            slot_B=torch.arange(len(owner), **INDEX),
            origin_B=owner_B.int(),
            before_B=torch.tensor([len(prompts[i]) for i in owner], **INDEX),
        )
        return rows, logits_PV if len(prompts) == len(owner) else logits_PV[owner_B]

    def logits(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """The logits after each prompt, float32 ``[prompts, vocabulary]``."""
        return self._prefill(prompts)[1]

    def step(self, rows: Rows, token_B: Tensor) -> Tensor:
        """Runs one more token of every row; the logits of those after it, float32."""
        count = len(token_B)
        zeros, order = torch.zeros(count, **INDEX), torch.arange(count + 1, **INDEX)
        batch = CBatch(
            tokens=count,
            shift=rows.filled,
            groups=count,
            wants=count,
            id=token_B.data_ptr(),
            slot=rows.slot_B.data_ptr(),
            column=zeros.data_ptr(),
            origin=rows.origin_B.data_ptr(),
            before=rows.before_B.data_ptr(),
            first=order.data_ptr(),
            wanted=None,
        )
        rows.filled += 1
        return self._forward(rows.prompts, rows.said, batch, rows.prompts.columns + rows.said.columns)

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Columns, Tensor]:
        """Runs the prompts, some at a time, into a cache; the logits of their next tokens."""
        cache = Columns(self.weights, len(prompts), max(map(len, prompts)))
        found, start = [], 0
        while start < len(prompts):
            end, tokens = start + 1, len(prompts[start])
            while end < len(prompts) and tokens + len(prompts[end]) <= PREFILL_TOKENS:
                tokens += len(prompts[end])
                end += 1
            found.append(self._run_prompts(prompts[start:end], start, cache))
            start = end
        return cache, torch.cat(found) if len(found) > 1 else found[0]

    def _run_prompts(self, prompts: Sequence[tuple[int, ...]], start: int, cache: Columns) -> Tensor:
        """These prompts into the cache's slots from ``start`` on; the logits after them."""
        sizes = torch.tensor([len(p) for p in prompts], device=CPU)
        ids = torch.tensor([i for p in prompts for i in p], device=CPU)
        ends = sizes.cumsum(0)
        slot = torch.arange(start, start + len(prompts), **INDEX).repeat_interleave(sizes)
        column = torch.arange(len(ids), **INDEX) - (ends - sizes).int().repeat_interleave(sizes)
        first = (column % QUERIES == 0).nonzero()[:, 0].int()
        first = torch.cat((first, torch.tensor([len(ids)], **INDEX)))
        last, zeros = (ends - 1).int(), torch.zeros(len(ids), **INDEX)
        batch = CBatch(
            tokens=len(ids),
            shift=0,
            groups=len(first) - 1,
            wants=len(prompts),
            id=ids.data_ptr(),
            slot=slot.data_ptr(),
            column=column.data_ptr(),
            origin=zeros.data_ptr(),
            before=zeros.data_ptr(),
            first=first.data_ptr(),
            wanted=last.data_ptr(),
        )
        return self._forward(cache, cache, batch, cache.columns)

    def _forward(self, there: Columns, here: Columns, batch: CBatch, columns: int) -> Tensor:
        with self.alone:
            w, code, threads = self.weights, library(), torch.get_num_threads()
            self._model.rotation = w.rotations(columns).data_ptr()
            model = ctypes.byref(self._model)
            size = code.ccpo_room(model, batch.tokens, columns, threads)
            if self.room.numel() < size + 64:
                self.room = scratch(size)
            logits = torch.empty(batch.wants, w.head.padded[0], dtype=torch.float32, device=CPU)
            code.ccpo_forward(
                model,
                ctypes.byref(there.c),
                ctypes.byref(here.c),
                ctypes.byref(batch),
                logits.data_ptr(),
                columns,
                threads,
                aligned(self.room),
            )
            return logits[:, : w.vocab]
