"""Products with a weight, with what follows them: a residual added, a gate multiplied.

On a CPU that multiplies bfloat16, weights are laid out once for its matrix unit (oneDNN's packed format) and what follows is done while
the product is still in the cache. torch's compiler uses the same operators; they are not part of torch's public interface, so
they are tried once, and where they do not do what they should, plain operators take their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

ROWS = 64  # for so many rows is the layout chosen; it serves any number


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


class PackedProduct(Product):
    """A product whose weight is kept packed, and only so."""

    def _allocate(self, weight: Tensor | None) -> None:
        self.packed: Tensor | None = None

    @contextmanager
    def rewritten(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """An empty weight, which is packed when it has been written, and the bias."""
        weight = torch.empty(self.shape, **self.options)
        yield weight, self.bias
        self._keep(weight)

    def _keep(self, weight: Tensor) -> None:
        self.packed = _pack(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def onto(self, hidden: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, hidden, self.packed, self.bias, "add")


class PackedGatedProduct(PackedProduct):
    """The counterpart of :class:`GatedProduct`, as two products."""

    def _allocate(self, weight: Tensor | None) -> None:
        self.halves: tuple[Tensor, ...] = ()
        self.biases = (None, None) if self.bias is None else self.bias.chunk(2)

    def _keep(self, weight: Tensor) -> None:
        self.halves = tuple(_pack(half) for half in weight.chunk(2))

    def __call__(self, x: Tensor) -> Tensor:
        (gate, up), (gate_bias, up_bias) = self.halves, self.biases
        gated = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gated, up, up_bias, "mul")


def products(device: torch.device, dtype: torch.dtype) -> tuple[type[Product], type[Product]]:
    """The classes of plain and of gated products that are fastest there."""
    packed = device.type == "cpu" and dtype == torch.bfloat16 and packing_works()
    return (PackedProduct, PackedGatedProduct) if packed else (Product, GatedProduct)


@cache
def packing_works() -> bool:
    """Whether this torch packs bfloat16 weights, and products with them are right."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu.get_capabilities().get("avx512_bf16"):
        return False
    shape: dict[str, Any] = {"bias": True, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, hidden = (
        torch.randn(s, generator=generator).bfloat16() for s in ((3, 32), (64, 32), (64,), (3, 64))
    )
    try:
        for plain, packed in ((Product, PackedProduct), (GatedProduct, PackedGatedProduct)):
            sides = [kind(64, 32, **shape) for kind in (plain, packed)]
            for side in sides:
                with side.rewritten() as (to, to_bias):
                    to.copy_(weight)
                    to_bias.copy_(bias)
            pairs = [[side(x) for side in sides]]
            if plain is Product:
                pairs.append([side.onto(hidden.clone(), x) for side in sides])
            if not all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.1) for a, b in pairs):
                return False
    except (AttributeError, RuntimeError, TypeError):  # another torch, whose operators have other names or arguments
        return False
    return True


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
