"""Products for decode.c against torch's."""

from __future__ import annotations

import pytest
import torch

from ccpo.engines.products import GatedPanels, GatedProduct, Panels, Product
from ccpo.kernels.compiled import library, why_not
from test_fused import instructions  # noqa: F401  (a fixture)

torch.set_num_threads(1)
compiled = pytest.mark.skipif(library() is None, reason=f"no compiled code here: {why_not()}")


def made(kind: type[Product], outputs: int, inputs: int, *, bias: bool, seed: int = 0) -> Product:
    product = kind(outputs, inputs, bias=bias, dtype=torch.bfloat16, device=torch.device("cpu"))
    write(product, seed)
    return product


def write(product: Product, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with product.rewritten() as (weight, offset):
        weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        if offset is not None:
            offset.copy_(torch.randn(offset.shape, generator=generator))


def exact(product: Product, x: torch.Tensor) -> torch.Tensor:
    """The product of the same numbers in float32."""
    found = x.float() @ product.weight.float().t()
    return found if product.bias is None else found + product.bias.float()


@compiled
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 33, 63, 64, 127, 129, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 40), (32, 32), (101, 64), (96, 130)])
@pytest.mark.parametrize("bias", [False, True])
def test_panels_multiply_as_torch(instructions, outputs, inputs, bias, rows):  # noqa: F811
    plain, laid_out = (made(kind, outputs, inputs, bias=bias) for kind in (Product, Panels))
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, want = laid_out(x), exact(plain, x)
    assert found.shape == (rows, outputs) and found.dtype == torch.float32
    assert torch.allclose(found, want, rtol=1e-5, atol=1e-5)
    assert want.abs().mean() > 0.1
    assert not hasattr(laid_out, "weight")  # no second copy


@compiled
def test_a_row_does_not_hang_on_those_beside_it(instructions):  # noqa: F811
    product = made(Panels, 96, 64, bias=True)
    x = torch.randn(77, 64).bfloat16()
    together = product(x)
    assert all(torch.equal(product(x[i : i + 1])[0], together[i]) for i in range(0, 77, 5))
    assert torch.equal(product(x.flip(0)).flip(0), together)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work(threads):
    product, x = made(Panels, 320, 64, bias=True), torch.randn(300, 64).bfloat16()
    want = product(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(x), want)
    finally:
        torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("inner", [24, 32, 40, 96])
def test_gates_stand_beside_what_goes_through_them(inner):
    plain, gated = (made(kind, 2 * inner, 40, bias=True) for kind in (GatedProduct, GatedPanels))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.cat((gated.panels.transpose(1, 2).flatten(2).flatten(0, 1)[:, :40].float(), gated.offset[:, None]), 1)
    gate, up = rows.view(-1, 2, 16, 41).unbind(1)
    for half, want in ((gate, plain.weight[:inner]), (up, plain.weight[inner:])):
        assert torch.equal(half.flatten(0, 1)[:inner, :40], want.float())
        assert half.flatten(0, 1)[inner:].count_nonzero() == 0
    assert torch.equal(gate.flatten(0, 1)[:inner, 40], plain.bias[:inner].float())
    assert torch.equal(up.flatten(0, 1)[:inner, 40], plain.bias[inner:].float())
    a, b = exact(plain, x).chunk(2, -1)
    assert torch.allclose(plain(x).float(), torch.nn.functional.silu(a) * b, rtol=0.03, atol=0.03)


@compiled
@pytest.mark.parametrize("kind", [Panels, GatedPanels])
def test_new_weights_go_to_the_same_place(kind):
    product = made(kind, 64, 64, bias=True)
    before, at = product.panels.clone(), (product.panels.data_ptr(), product.offset.data_ptr())
    write(product, seed=9)
    assert at == (product.panels.data_ptr(), product.offset.data_ptr())
    assert not torch.equal(product.panels, before)
    write(product, seed=0)
    assert torch.equal(product.panels, before)
