"""The update's C code against autograd in float32, on the same bfloat16 numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from ccpo.kernels.compiled import library, why_not
from ccpo.learner import forward, fused, logprobs
from ccpo.learner.layout import Layout
from ccpo.learner.rows import TrainRow
from test_fused import instructions  # noqa: F401  (a fixture)
from tiny import tiny_model

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(library() is None, reason=f"no compiled code here: {why_not()}")


WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, inputs, grads):
    """The outputs and the gradients of all inputs, given those of the outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [o.detach().float() for o in outputs], [x.grad.float() for x in inputs]


def near(found, want, rtol: float) -> None:
    """Each within a share of the largest number there is: bfloat16 keeps 8 bits."""
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= rtol * b.abs().max(), ((a - b).abs().max(), b.abs().max())
        assert b.abs().max() > 0


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize(("M", "H"), [(1, 16), (37, 128), (9, 72), (5, 33), (64, 200)])
@pytest.mark.parametrize("branched", [True, False])
def test_add_norm(M, H, branched, threads):
    stream, branch, weight = (
        numbers(M, H, dtype=torch.float32),
        numbers(M, H, seed=1),
        1 + numbers(H, seed=2).float() / 4,
    )
    grads = [numbers(M, H, seed=3, dtype=torch.float32), numbers(M, H, seed=4)]

    def plain(stream, weight, branch=None):
        total = stream if branch is None else stream + branch
        return total, total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    def ours(stream, weight, branch=None):
        return fused.AddNorm.apply(stream, torch.zeros(()) if branch is None else branch, weight, 1e-5)

    inputs = [stream, weight, branch] if branched else [stream, weight]
    (outputs, found), (want_outputs, want) = (
        gradients(f, [x.to(t) for x, t in zip(inputs, types, strict=False)], grads)
        for f, types in ((ours, (torch.float32, torch.float32, torch.bfloat16)), (plain, (torch.float32,) * 3))
    )
    assert torch.equal(outputs[0], want_outputs[0])
    near(outputs, want_outputs, 5e-3)
    near(found, want, 5e-3)


def test_a_norm_whose_sum_nobody_reads():
    stream, weight = numbers(5, 32, dtype=torch.float32), torch.ones(32)
    grad = numbers(5, 32, seed=1)

    def plain(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    (_, found), (_, want) = (
        gradients(f, [stream], [grad])
        for f in (lambda x: fused.AddNorm.apply(x, torch.zeros(()), weight, 1e-5)[1], plain)
    )
    near(found, want, 5e-3)


@pytest.mark.parametrize(("M", "inner"), [(1, 16), (50, 96), (7, 41)])
def test_swiglu(M, inner, threads):
    gate_up, grad = 3 * numbers(M, 2 * inner), numbers(M, inner, seed=1)

    def plain(x):
        gate, up = x.chunk(2, -1)
        return silu(gate) * up

    (outputs, found), (want_outputs, want) = (
        gradients(f, [x], [grad]) for f, x in ((fused.SwiGLU.apply, gate_up), (plain, gate_up.float()))
    )
    near(outputs, want_outputs, 5e-3)
    near(found, want, 5e-3)


def test_swiglu_of_huge_numbers_is_finite():
    x = torch.tensor([[300.0, -300.0, 0.0, 1.0, 2.0, 3.0]], dtype=torch.bfloat16).requires_grad_()
    out = fused.SwiGLU.apply(x)
    out.sum().backward()
    assert out.tolist() == [[300.0, 0.0, 0.0]]
    assert x.grad.tolist() == [[1.0, 0.0, 1.5, 300.0, 0.0, 0.0]]


@pytest.mark.parametrize("vocab", [2, 45, 101, 1_000])
@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("outputs", ["both", "logprob", "entropy"])
def test_logprobs(vocab, tempered, outputs, threads):
    logits, ids = 4 * numbers(30, vocab), torch.randint(vocab, (30,), generator=torch.Generator().manual_seed(1))
    temperature = torch.linspace(0.5, 1.5, 30) if tempered else None
    grads = [numbers(30, seed=2, dtype=torch.float32), numbers(30, seed=3, dtype=torch.float32)]
    chosen = {"both": [0, 1], "logprob": [0], "entropy": [1]}[outputs]

    def some(function):
        return lambda x: tuple(function(x, ids, temperature)[i] for i in chosen)

    (found_outputs, found), (want_outputs, want) = (
        gradients(some(f), [x], [grads[i] for i in chosen])
        for f, x in ((fused.TokenLogprobs.apply, logits), (logprobs._TokenLogprobs.apply, logits.double()))
    )
    near(found_outputs, want_outputs, 1e-5)
    near(found, want, 5e-3)


def test_logits_of_minus_infinity_weigh_nothing():
    logits = torch.tensor([[0.0, float("-inf"), 1.0, -200.0]], dtype=torch.bfloat16).requires_grad_()
    logprob, entropy = fused.TokenLogprobs.apply(logits, torch.tensor([2]), None)
    (logprob + entropy).sum().backward()
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert logprob.item() == pytest.approx(p[1].log().item(), abs=1e-6)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)
    assert bool(logits.grad.isfinite().all()) and logits.grad[0, 1] == 0 and logits.grad[0, 3] == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(broken):
    logits = torch.zeros(3, 50, dtype=torch.bfloat16)
    logits[1, 7] = broken
    logprob, _ = fused.TokenLogprobs.apply(logits, torch.tensor([1, 2, 3]), None)
    assert logprob.isfinite().tolist() == [True, False, True]


def test_a_target_beyond_the_vocabulary_is_refused():
    for wrong in (50, 10**9, -1):
        with pytest.raises(IndexError, match="50"):
            fused.TokenLogprobs.apply(torch.zeros(2, 50, dtype=torch.bfloat16), torch.tensor([3, wrong]), None)


def test_an_impossible_target_spoils_nothing():
    """A token that cannot be drawn, in a row that is paid nothing: its gradient is 0, not no number."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], dtype=torch.bfloat16).requires_grad_()
    logprob, _ = fused.TokenLogprobs.apply(logits, torch.tensor([1]), None)
    assert logprob.item() == float("-inf")
    logprob.backward(torch.zeros(1))
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_second_derivatives_are_refused_not_wrong():
    x = numbers(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(fused.SwiGLU.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_heads_that_share_unevenly_run_in_torch():
    config = tiny_model("qwen2", **WIDE).config
    assert fused.attends(config)
    config.num_attention_heads = 5
    assert not fused.attends(config)


# ---- attention ----


def plain_attention(qkv, sizes, owner, turn, kv_heads, scale):
    """Token by token, in the dtype of ``qkv``."""
    prompt_sizes, text_sizes = sizes
    heads = qkv.shape[1] - 2 * kv_heads
    half = qkv.shape[2] // 2
    turning = torch.complex(qkv[:, : heads + kv_heads, :half], qkv[:, : heads + kv_heads, half:]) * turn
    turning = torch.cat((turning.real, turning.imag), -1)
    query, key, value = turning[:, :heads] * scale, turning[:, heads:], qkv[:, heads + kv_heads :]
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    bounds = torch.tensor([0, *prompt_sizes, *text_sizes]).cumsum(0).tolist()
    prompts = [list(range(bounds[i], bounds[i + 1])) for i in range(len(prompt_sizes))]
    seen = [(prompts[g], []) for g in range(len(prompts))]
    seen += [
        (list(range(bounds[len(prompts) + r], bounds[len(prompts) + r + 1])), prompts[g]) for r, g in enumerate(owner)
    ]
    rows = {}
    for own, before in seen:
        for place, token in enumerate(own):
            at = [*before, *own[: place + 1]]
            scores = torch.einsum("hd,chd->hc", query[token], key[at])
            rows[token] = torch.einsum("hc,chd->hd", scores.softmax(-1), value[at])
    return torch.stack([rows[i] for i in range(len(qkv))])


def check_attention(prompt_sizes, text_sizes, owner, heads, kv_heads, head_dim, seed=0):
    tokens = sum(prompt_sizes) + sum(text_sizes)
    qkv, grad = (
        numbers(tokens, heads + 2 * kv_heads, head_dim, seed=seed),
        numbers(tokens, heads, head_dim, seed=seed + 1),
    )
    angle = 3 * numbers(tokens, 1, head_dim // 2, seed=seed + 2, dtype=torch.float32)
    turn = torch.polar(torch.ones_like(angle), angle)
    texts = fused.Texts.of(
        torch.tensor(prompt_sizes),
        torch.tensor(text_sizes, dtype=torch.int64),
        torch.tensor(owner, dtype=torch.int64),
        turn,
    )
    scale = head_dim**-0.5
    outputs, found = gradients(lambda x: fused.Attend.apply(x, texts, kv_heads, scale), [qkv], [grad])
    want_outputs, want = gradients(
        lambda x: plain_attention(x, (prompt_sizes, text_sizes), owner, turn.to(torch.complex128), kv_heads, scale),
        [qkv.double()],
        [grad],
    )
    near(outputs, want_outputs, 1.5e-2)
    near(found, want, 1.5e-2)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (2, 2, 16), (7, 1, 64), (3, 1, 48)])
def test_attention(heads, kv_heads, head_dim, instructions, threads):  # noqa: F811
    check_attention([5, 33, 1], [4, 17, 1, 70, 3], [2, 0, 0, 1, 2], heads, kv_heads, head_dim)


def test_attention_of_long_texts(instructions):  # noqa: F811
    """Several blocks of queries, in the prompt and in a text."""
    check_attention([130, 64], [65, 128, 2], [0, 1, 1], 2, 1, 32)


def test_attention_of_prompts_alone():
    """Texts of one token have none that is read."""
    check_attention([3, 40], [0, 0], [0, 1], 2, 1, 32)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attention_of_any_layout(data):
    prompts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    texts = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, len(prompts) - 1)), max_size=6))
    check_attention(prompts, [n for n, _ in texts], [g for _, g in texts], 2, 1, 16, seed=data.draw(st.integers(0, 99)))


# ---- the whole pass ----


def rows(seed: int = 0) -> list[TrainRow]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(5, 100, (n,), generator=generator).tolist())  # noqa: E731
    prompts = [draw(n) for n in (3, 21, 40)]
    return [
        TrainRow(
            policy="a",
            agent="a",
            prompt_ids=prompts[i % 3],
            token_ids=draw(1 + 5 * i),
            engine_logprobs=(-1.0,) * (1 + 5 * i),
            advantage=1.0,
            segment=i,
        )
        for i in range(9)
    ]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2", WIDE),
        ("qwen3", {**WIDE, "head_dim": 32}),
        (
            "llama",
            {
                **WIDE,
                "hidden_size": 72,
                "head_dim": 16,
                "intermediate_size": 90,
                "mlp_bias": True,
                "attention_bias": True,
            },
        ),
    ],
)
def test_a_models_gradients_are_as_exact_as_in_torch(family, overrides, instructions, monkeypatch):  # noqa: F811
    model = tiny_model(family, **overrides)
    layout = Layout.of(rows(), torch.device("cpu"))
    pull = numbers(len(layout.at_N), seed=5, dtype=torch.float32)
    used = []
    attend = fused.Attend.apply
    monkeypatch.setattr(fused.Attend, "apply", lambda *given: used.append(1) or attend(*given))

    def found(compute, in_c):
        monkeypatch.setattr(fused, "usable", (lambda *_: True) if in_c else (lambda *_: False))
        model.zero_grad()
        logprob, entropy = logprobs._scored(model.lm_head, forward.hidden_states(model, layout, compute), layout)
        (logprob @ pull + 0.3 * entropy.sum()).backward()
        return logprob.detach(), [p.grad.clone() for p in model.parameters()]

    exact, ours, torchs = found(torch.float32, False), found(torch.bfloat16, True), found(torch.bfloat16, False)
    assert len(used) == 2, "one a layer"

    def apart(some):
        return sum(((a - b).norm() / b.norm()).item() for a, b in zip(some[1], exact[1], strict=True)) / len(exact[1])

    assert 0 < apart(ours) < 1.25 * apart(torchs) < 0.1
    assert (ours[0] - exact[0]).abs().mean() < 1.25 * (torchs[0] - exact[0]).abs().mean() < 0.1


def test_it_is_used_in_bfloat16_on_a_cpu_alone():
    weight = torch.ones(4)
    assert fused.usable(torch.bfloat16, weight)
    assert not fused.usable(torch.float32, weight)
    assert not fused.usable(torch.bfloat16, weight.bfloat16())
    assert not fused.usable(torch.bfloat16, weight.to("meta"))
