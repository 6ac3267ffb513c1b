"""Packed products against plain ones, and what stands in where this torch cannot pack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ccpo.engines import make_engine, products
from ccpo.engines.products import GatedProduct, PackedGatedProduct, PackedProduct, Product, packing_works
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
TOKENIZER = tiny_tokenizer(pad=False)
PAIRS = [(Product, PackedProduct), (GatedProduct, PackedGatedProduct)]
packs = pytest.mark.skipif(not packing_works(), reason="this CPU or this torch does not pack bfloat16 weights")


def made(kind: type[Product], *, bias: bool, seed: int = 0) -> Product:
    product = kind(48, 40, bias=bias, dtype=torch.bfloat16, device=torch.device("cpu"))
    write(product, seed)
    return product


def write(product: Product, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with product.rewritten() as (weight, offset):
        weight.copy_(torch.randn(weight.shape, generator=generator) * 40**-0.5)
        if offset is not None:
            offset.copy_(torch.randn(offset.shape, generator=generator))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02)


@packs
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", PAIRS)
def test_packed_is_plain(kinds, bias, rows):
    plain, packed = (made(kind, bias=bias) for kind in kinds)
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert close(packed(x), plain(x))
    assert plain(x).abs().mean() > 0.1
    assert not hasattr(packed, "weight")  # no second copy


@packs
@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_is_added(bias):
    plain, packed = (made(kind, bias=bias) for kind in PAIRS[0])
    x, hidden = (torch.randn(5, size, generator=torch.Generator().manual_seed(size)).bfloat16() for size in (40, 48))
    want = hidden.float() + plain(x).float()
    assert close(packed.onto(hidden.clone(), x), want)
    assert close(plain.onto(hidden.clone(), x), want)


@packs
@pytest.mark.parametrize("kinds", PAIRS)
def test_new_weights_are_packed_again(kinds):
    plain, packed = (made(kind, bias=True) for kind in kinds)
    x = torch.randn(4, 40).bfloat16()
    before = packed(x)
    for product in (plain, packed):
        write(product, seed=9)
    assert close(packed(x), plain(x))
    assert not close(packed(x), before)


@packs
@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_says_the_same_either_way(tied, monkeypatch):
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    prompts = [(3, 4, 5), (6, 7, 8, 9, 3)]
    packed = make_engine(model, TOKENIZER, dtype=torch.bfloat16)
    monkeypatch.setattr(products, "packing_works", lambda: False)
    plain = make_engine(model, TOKENIZER, dtype=torch.bfloat16)
    assert isinstance(packed.weights.head, PackedProduct)
    assert not isinstance(plain.weights.head, PackedProduct)
    assert (plain.weights.head.weight is plain.weights.embed) == tied
    assert torch.allclose(packed.logits(prompts).float(), plain.logits(prompts).float(), atol=0.05)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    before = packed.logits(prompts)
    for engine in (packed, plain):
        engine.refresh()
    assert torch.allclose(packed.logits(prompts).float(), plain.logits(prompts).float(), atol=0.05)
    assert not torch.allclose(packed.logits(prompts), before, atol=0.05)


class Shuffled:
    """A packed product of another torch, which gives something else."""

    def __call__(self, x: torch.Tensor, packed: Any, *_: Any) -> torch.Tensor:
        return x.new_zeros(len(x), 64)

    def binary(self, x: torch.Tensor, other: torch.Tensor, *_: Any) -> torch.Tensor:
        return other


@pytest.mark.parametrize(
    "operators",
    [
        SimpleNamespace(),
        SimpleNamespace(_reorder_linear_weight=lambda weight: weight, _linear_pointwise=Shuffled()),
        SimpleNamespace(_reorder_linear_weight=lambda weight, rows: weight, _linear_pointwise=Shuffled()),
    ],
    ids=["absent", "other arguments", "wrong"],
)
def test_a_torch_that_does_not_pack_as_it_should_is_found_out(operators, monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", operators, raising=False)
    packing_works.cache_clear()
    try:
        assert not packing_works()
        assert products.products(torch.device("cpu"), torch.bfloat16) == (Product, GatedProduct)
    finally:
        packing_works.cache_clear()


def test_other_precisions_and_devices_are_plain():
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float16)):
        assert products.products(torch.device(device), dtype) == (Product, GatedProduct)
