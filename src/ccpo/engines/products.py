"""Products with a weight, with what follows them: in torch, or laid out for ``decode.c``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from ccpo.kernels.compiled import address, in_panels, library


class Product:
    """``x W^T + b``, with ``W`` ``[out, in]`` as in `torch.nn.Linear`. ``weight``: the tensor that it is kept in, where it is kept as it is."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        weight: Tensor | None = None,
    ) -> None:
        self.shape = (outputs, inputs)
        self.options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.bias = torch.empty(outputs, **self.options) if bias else None
        self._allocate(weight)

    def _allocate(self, weight: Tensor | None) -> None:
        self.weight = torch.empty(self.shape, **self.options) if weight is None else weight

    @contextmanager
    def rewritten(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The weight and the bias, to be written whole; both stay at their addresses."""
        yield self.weight, self.bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def onto(self, hidden: Tensor, x: Tensor) -> Tensor:
        """``hidden + x W^T + b``, which may be written over ``hidden``."""
        hidden.addmm_(x, self.weight.t())
        if self.bias is not None:
            hidden += self.bias
        return hidden


class GatedProduct(Product):
    """``silu(gate) * up``, where the first half of the rows of ``W`` makes the gate and the second what goes through it."""

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.weight, self.bias).chunk(2, -1)
        return silu(gate).mul_(up)


class Panels(Product):
    """A product whose weight is kept in panels, and only so, for ``decode.c``: both sizes up to multiples of 32, with zeros."""

    HALVES = 1

    def _allocate(self, weight: Tensor | None) -> None:
        outputs, inputs = self.shape
        self.padded = (self.HALVES * _up(outputs // self.HALVES), _up(inputs))
        self.panels = torch.zeros(self.padded[0] // 16, self.padded[1] // 2, 16, 2, dtype=torch.bfloat16, device="cpu")
        self.offset = None if self.bias is None else torch.zeros(self.padded[0], dtype=torch.float32, device="cpu")

    @contextmanager
    def rewritten(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """An empty weight and bias, which are laid out when they have been written."""
        weight = torch.empty(self.shape, **self.options)
        yield weight, self.bias
        self.panels.copy_(in_panels(self._ordered(weight)))
        if self.bias is not None:
            self.offset.copy_(self._ordered(self.bias[:, None])[:, 0])

    def _ordered(self, rows: Tensor) -> Tensor:
        return _padded(rows, self.padded[0])

    def __call__(self, x: Tensor) -> Tensor:
        """Float32 ``[rows, out]`` of bfloat16 rows; decoding does not come here, it runs whole models."""
        rows, (outputs, inputs) = len(x), self.padded
        left = pad(x, (0, inputs - x.shape[1], 0, -rows % 32)).contiguous()
        into = torch.empty(rows, outputs, dtype=torch.float32, device="cpu")
        library().ccpo_product(
            rows,
            outputs,
            inputs,
            left.data_ptr(),
            self.panels.data_ptr(),
            address(self.offset),
            into.data_ptr(),
            torch.get_num_threads(),
        )
        return into[:, : self.shape[0]]


class GatedPanels(Panels):
    """A panel of gates, the panel of what goes through them, and so on."""

    HALVES = 2

    def _ordered(self, rows: Tensor) -> Tensor:
        gate, up = (_padded(half, self.padded[0] // 2) for half in rows.chunk(2))
        return torch.stack((gate.unflatten(0, (-1, 16)), up.unflatten(0, (-1, 16))), 1).flatten(0, 2)


def _padded(rows: Tensor, outputs: int) -> Tensor:
    """Zeros to the right, up to a multiple of 32, and below."""
    return pad(rows, (0, _up(rows.shape[1]) - rows.shape[1], 0, outputs - len(rows)))


def _up(n: int) -> int:
    return -(-n // 32) * 32
