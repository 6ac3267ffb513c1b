"""What the machine could do at most: the matrix products of a model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ccpo.engines.fused import PREFILL_TOKENS
from ccpo.engines.products import Panels, Product
from ccpo.kernels.compiled import library

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
    """One pass of ``rows`` tokens through all matrices, packed where that is faster."""
    every = [_product(w) for w in matrices(model, dtype)]
    inputs = _inputs(model, every, [rows], dtype)
    return lambda: _multiply(every, inputs, rows)


def decoding_limit(model: Any, sizes: Sequence[int], new: int, dtype: torch.dtype) -> Callable[[], None]:
    """The products that decoding cannot do without: all prompt tokens (``sizes`` of each row) through the matrices, of the last layer only
    through those of its keys and values, and of the head at each row's last; then ``new - 1`` passes of a token a row."""
    every, rows = [_product(w) for w in matrices(model, dtype)], len(sizes)
    prompts = [*every[:-LAST], _product(_keys_values(model, dtype))]
    parts = [min(PREFILL_TOKENS, sum(sizes) - start) for start in range(0, sum(sizes), PREFILL_TOKENS)]
    inputs = _inputs(model, every, [*parts, rows], dtype)

    def run() -> None:
        for count in parts:
            _multiply(prompts, inputs, count)
        _multiply(every[-1:], inputs, rows)
        for _ in range(new - 1):
            _multiply(every, inputs, rows)

    return run


def _inputs(
    model: Any, every: Sequence[Product], counts: Sequence[int], dtype: torch.dtype
) -> dict[tuple[int, int], Tensor]:
    """Random tokens, by their number and width."""
    device = next(model.parameters()).device
    widths = {p.shape[1] for p in every}
    return {(n, w): torch.randn(n, w, device=device).to(dtype) for n in {*counts} for w in widths}


def _multiply(every: Sequence[Product], inputs: Mapping[tuple[int, int], Tensor], count: int) -> None:
    with torch.inference_mode():
        for product in every:
            product(inputs[count, product.shape[1]])


def _keys_values(model: Any, dtype: torch.dtype) -> Tensor:
    attention = model.model.layers[-1].self_attn
    return torch.cat([m.weight.detach().to(dtype) for m in (attention.k_proj, attention.v_proj)])


def _product(weight: Tensor) -> Product:
    compiled = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and library() is not None
    made = (Panels if compiled else Product)(*weight.shape, bias=False, dtype=weight.dtype, device=weight.device)
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
