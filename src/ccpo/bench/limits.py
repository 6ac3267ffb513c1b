"""What the machine could do at most: the matrix products of a model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ccpo.bench.timing import in_turns
from ccpo.engines.products import Panels, Product
from ccpo.kernels.compiled import library

TOGETHER = 8_192  # prompt tokens that go through the matrices at once
LAST = 5  # the matrices of the last layer, and the head


def matrices(model: Any, dtype: torch.dtype) -> list[Tensor]:
    """Every matrix that a token is multiplied with, fused as decoders fuse them: ``[out, in]``."""
    found: list[Tensor] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups: list[tuple[nn.Module, ...]] = [
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ]
        found += [torch.cat([module.weight.detach().to(dtype) for module in group]) for group in groups]
    return [*found, model.lm_head.weight.detach().to(dtype)]


def forward_limit(model: Any, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """One pass of ``rows`` tokens through all matrices."""
    weights = matrices(model, dtype)
    inputs = _inputs(weights, [rows])
    every = [_Fastest(w, inputs) for w in weights]
    return lambda: _multiply(every, inputs, rows)


def decoding_limit(model: Any, sizes: Sequence[int], new: int, dtype: torch.dtype) -> Callable[[], None]:
    """The products that decoding cannot do without: all prompt tokens (``sizes`` of each row) through the matrices, of the last layer only
    through those of its keys and values, and of the head at each row's last; then ``new - 1`` passes of a token a row."""
    rows = len(sizes)
    parts = [min(TOGETHER, sum(sizes) - start) for start in range(0, sum(sizes), TOGETHER)]
    weights = matrices(model, dtype)
    inputs = _inputs(weights, [*parts, rows])
    every = [_Fastest(w, inputs) for w in weights]
    prompts = [*every[:-LAST], _Fastest(_keys_values(model, dtype), inputs)]

    def run() -> None:
        for count in parts:
            _multiply(prompts, inputs, count)
        _multiply(every[-1:], inputs, rows)
        for _ in range(new - 1):
            _multiply(every, inputs, rows)

    return run


Inputs = Mapping[tuple[int, int], Tensor]
"""Random tokens, by their number and width."""


def _inputs(weights: Sequence[Tensor], counts: Sequence[int]) -> Inputs:
    widths, like = {w.shape[1] for w in weights}, weights[0]
    return {(n, w): torch.randn(n, w, device=like.device).to(like.dtype) for n in {*counts} for w in widths}


class _Fastest:
    """A product by torch or by our own code, whichever is faster for so many tokens: the limit is what the machine can do."""

    def __init__(self, weight: Tensor, inputs: Inputs) -> None:
        kinds = [Product]
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and library() is not None:
            kinds.append(Panels)
        self.width = weight.shape[1]
        tried = [_made(kind, weight) for kind in kinds]
        self.best = {
            n: min(tried, key=lambda p, x=x: _seconds(p, x)) for (n, w), x in inputs.items() if w == self.width
        }


def _seconds(product: Product, x: Tensor) -> float:
    with torch.inference_mode():
        return min(in_turns({"": lambda: product(x)}, repeats=5, device=str(x.device.type))[""])


def _multiply(every: Sequence[_Fastest], inputs: Inputs, count: int) -> None:
    with torch.inference_mode():
        for product in every:
            product.best[count](inputs[count, product.width])


def _keys_values(model: Any, dtype: torch.dtype) -> Tensor:
    attention = model.model.layers[-1].self_attn
    return torch.cat([m.weight.detach().to(dtype) for m in (attention.k_proj, attention.v_proj)])


def _made(kind: type[Product], weight: Tensor) -> Product:
    made = kind(*weight.shape, bias=False, dtype=weight.dtype, device=weight.device)
    with made.rewritten() as (rows, _):
        rows.copy_(weight)
    return made


def training_limit(model: Any, rows: int, scored: int, dtype: torch.dtype) -> Callable[[], None]:
    """The products of a forward and a backward pass of ``rows`` tokens, of which ``scored`` reach the head."""
    every = matrices(model, dtype)
    sizes = [rows] * (len(every) - 1) + [scored]
    inputs = [torch.randn(n, w.shape[1], device=w.device).to(dtype) for n, w in zip(sizes, every, strict=True)]
    grads = [torch.randn(n, w.shape[0], device=w.device).to(dtype) for n, w in zip(sizes, every, strict=True)]

    def run() -> None:
        with torch.inference_mode():
            for w, x, dy in zip(every, inputs, grads, strict=True):
                torch.nn.functional.linear(x, w)
                torch.mm(dy, w)
                torch.mm(dy.t(), x)

    return run


def gemm_rate(dtype: torch.dtype, device: str, *, seconds: float = 0.5, size: int = 1_024) -> float:
    """Floating point operations a second in a large square product."""
    import time

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        torch.mm(a, b)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(8):
                torch.mm(a, b)
            if device == "cuda":
                torch.cuda.synchronize()
            count += 8
        return 2 * size**3 * count / (time.perf_counter() - started)


def bandwidth(device: str, *, seconds: float = 0.5, size: int = 1 << 27) -> float:
    """Bytes a second, read and written, in a copy of ``size`` bytes."""
    import time

    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        b.copy_(a)
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
    return 2 * size * count / (time.perf_counter() - started)
