"""The noise, the cuts, the draws, the end of a completion: by hand, against plain Python, and by frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.engines import sampling
from ccpo.engines.finish import complete, decoder
from ccpo.engines.sampling import Sampler, cut, inverse_cdf, signed64, uniform
from ccpo.types import FinishReason, Request
from tiny import tiny_tokenizer

torch.set_num_threads(1)
CPU = torch.device("cpu")
MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def request(seed: int = 0, **kwargs) -> Request:
    return Request(prompt_ids=(5,), seed=seed, **{"max_tokens": 4, **kwargs})


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def limit(degrees: int) -> float:
    """A chi-square beyond it has a chance of about one in a million."""
    return degrees + 5 * math.sqrt(2 * degrees) + 10


def test_the_reference_is_splitmix64():
    assert mix(GAMMA) == 0xE220A8397B1DCDAF  # its first published output from state 0


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**20))
def test_uniform_equals_the_integer_reference(seed, position):
    bits = mix((mix((seed + GAMMA) & MASK) + GAMMA * (position + 1)) & MASK)
    got = uniform(torch.tensor([signed64(seed)]), position).item()
    assert got == ((bits >> 16) + 0.5) / 2**48
    assert 0 < got < 1


def test_uniform_is_uniform_and_neighbours_are_independent():
    u = uniform(torch.arange(2000)[:, None], torch.arange(50))
    counts = torch.histc(u, 200, 0, 1)
    assert chi_square(counts, torch.full_like(counts, u.numel() / 200)) < limit(199)
    bound = 5 / math.sqrt(u.numel())
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, :-1], u[:-1, 1:])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < bound


def test_uniform_refuses_other_dtypes():
    with pytest.raises(ValueError, match="int64"):
        uniform(torch.tensor([1.0]), 0)


@pytest.mark.parametrize(
    ("u", "token"), [(0.01, 0), (0.199, 0), (0.25, 2), (0.69, 2), (0.75, 3), (1 - 2.0**-49, 3), (2.0**-49, 0)]
)
def test_inverse_cdf_by_hand(u, token):
    prob = torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]])
    assert inverse_cdf(prob, torch.tensor([u], dtype=torch.float64)).item() == token
    assert inverse_cdf(prob * 7, torch.tensor([u], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("V", [2_049, 4_096, 5_000])
def test_a_large_vocabulary_is_sampled_as_a_small_one(V):
    g = torch.Generator().manual_seed(V)
    prob = torch.softmax(4 * torch.randn(64, V, generator=g), -1)
    prob[:, 100:1_200] = 0  # whole blocks without weight
    prob[0] = 0
    prob[0, V - 1] = 1
    prob[1] = 0
    prob[1, 0] = 1
    u = torch.rand(64, generator=g, dtype=torch.float64)
    u[2:4] = torch.tensor([2.0**-49, 1 - 2.0**-49])
    cumulative = prob.double().cumsum(-1)
    found = inverse_cdf(prob, u)
    assert (prob.gather(1, found[:, None]) > 0).all()
    # the same token but where u falls between two within rounding
    expected = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]
    edge = (cumulative - u[:, None] * cumulative[:, -1:]).abs().amin(1) < 1e-6
    assert ((found == expected) | edge).all() and edge.sum() <= 8


def test_every_edge_of_a_large_vocabulary_has_weight():
    prob = torch.zeros(1, 3_000)
    prob[0, ::7] = 0.1
    cumulative = prob.double().cumsum(-1)[0]
    for at in (cumulative / cumulative[-1]).unique()[:-1]:
        for u in (at, torch.nextafter(at, at - 1), torch.nextafter(at, at + 1)):
            assert prob[0, inverse_cdf(prob, u.clamp(0, 1 - 2.0**-49)[None])] > 0


def test_a_row_that_is_not_a_number_tells():
    prob = torch.full((1, 3_000), float("nan"))
    assert prob[0, inverse_cdf(prob, torch.tensor([0.5]))].isnan()


def test_inverse_cdf_never_draws_weight_zero():
    prob = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    edges = torch.tensor([2.0**-60, 0.5, 1 - 2.0**-49], dtype=torch.float64)
    assert inverse_cdf(prob.expand(3, -1), edges).tolist() == [1, 3, 3]


def reference_cut(prob: list[float], top_k: int, top_p: float) -> list[float]:
    order = sorted(range(len(prob)), key=lambda i: -prob[i])
    if top_k and top_k < len(prob):
        order = [i for i in order if prob[i] >= prob[order[top_k - 1]]]
    kept, mass, total = [], 0.0, sum(prob[i] for i in order)
    for i in order:
        if top_p < 1 and mass >= top_p * total:
            break
        kept.append(i)
        mass += prob[i]
    edge = min(prob[i] for i in kept)
    return [p if i in order and p >= edge else 0.0 for i, p in enumerate(prob)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_cut_equals_the_reference(data):
    # Small numbers over 64: exact sums, ties, and masses that reach top_p exactly.
    weights = data.draw(st.lists(st.lists(st.integers(1, 6), min_size=9, max_size=9), min_size=1, max_size=4))
    rows = len(weights)
    top_k = data.draw(st.lists(st.integers(0, 12), min_size=rows, max_size=rows))
    top_p = data.draw(st.lists(st.sampled_from((0.03, 0.25, 0.5, 0.71, 0.95, 1.0)), min_size=rows, max_size=rows))
    prob = torch.tensor(weights, dtype=torch.float32) / 64
    want = [reference_cut(*row) for row in zip(prob.tolist(), top_k, top_p, strict=True)]
    for head in (512, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_HEAD", head)
            assert cut(prob, torch.tensor(top_k), torch.tensor(top_p)).tolist() == want


def test_cut_by_hand():
    prob = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(5, -1)
    got = cut(prob, torch.tensor([0, 2, 0, 3, 1]), torch.tensor([0.6, 1.0, 1.0, 0.5, 0.01])) > 0
    assert got.int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 1.7, "top_p": 0.9}]
)
def test_frequencies_follow_the_distribution(params):
    draws = 20_000
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0, -1.0])
    sampler = Sampler.of([request(seed, **params) for seed in range(draws)], CPU)
    token_B, prob_B = sampler.draw(logits.expand(draws, -1), 0)
    full = torch.softmax(logits / params.get("temperature", 1.0), -1)
    assert torch.allclose(prob_B, full[token_B], atol=1e-6)  # the probability before the cut
    left = torch.tensor(reference_cut(full.tolist(), params.get("top_k", 0), params.get("top_p", 1.0)))
    counts = torch.bincount(token_B, minlength=6).float()
    assert (counts[left == 0] == 0).all()
    expected = (left / left.sum())[left > 0] * draws
    assert chi_square(counts[left > 0], expected) < limit(len(expected) - 1)


def test_steps_are_independent():
    count = 8_000
    logits = torch.tensor([0.0, 1.0, 0.5])
    sampler = Sampler.of([request(seed) for seed in range(count)], CPU)
    first, second = (sampler.draw(logits.expand(count, -1), step)[0] for step in (0, 1))
    prob = logits.softmax(-1)
    counts = torch.bincount(first * 3 + second, minlength=9).float()
    assert chi_square(counts, torch.outer(prob, prob).flatten() * count) < limit(8)


MIXED = [
    request(11),
    request(12, temperature=0.0),
    request(13, temperature=0.7),
    request(14, top_k=5),
    request(15, top_p=0.6, temperature=1.3),
    request(16, temperature=0.0, top_k=2),
    request(17, top_p=0.9, top_k=20),
]


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(len(MIXED), 50, generator=torch.Generator().manual_seed(0)) * 2
    for step in range(4):
        together = Sampler.of(MIXED, CPU).draw(logits, step)
        for row, alone in enumerate(MIXED):
            token, prob = Sampler.of([alone], CPU).draw(logits[row : row + 1], step)
            assert token.item() == together[0][row].item()
            assert prob.item() == pytest.approx(together[1][row].item(), rel=1e-6)
    order = torch.tensor([6, 0, 3, 5])
    picked = Sampler.of(MIXED, CPU).select(order).draw(logits[order], 3)
    assert picked[0].tolist() == together[0][order].tolist()


def test_greedy_takes_the_best_under_the_plain_softmax():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    for requests in ([request(temperature=0.0)] * 2, [request(temperature=0.0, top_k=1), request(temperature=0.0)]):
        token_B, prob_B = Sampler.of(requests, CPU).draw(logits, 0)
        assert token_B.tolist() == [1, 0]
        assert prob_B.tolist() == pytest.approx(
            [math.exp(3) / (1 + math.e + math.exp(3)), math.exp(2) / (1 + math.e + math.exp(2))]
        )


def test_bfloat16_logits_are_sampled_in_float32():
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    sampler = Sampler.of([request(s) for s in range(64)], CPU)
    token_B, prob_B = sampler.draw(logits, 0)
    assert prob_B.dtype == torch.float32
    assert torch.allclose(prob_B, logits.float().softmax(-1).gather(1, token_B[:, None])[:, 0])


def test_the_end_of_a_completion_by_hand():
    tokenizer = tiny_tokenizer()
    decode = decoder(tokenizer)
    ids = tokenizer("ab##cd")["input_ids"]
    tokens = torch.tensor([*ids, 1, *ids])[:, None]
    probs = torch.full((len(tokens), 1), 0.5)

    def end(**kwargs):
        request = Request(prompt_ids=(5,), seed=0, **{"max_tokens": 9, **kwargs})
        (done,) = complete([request], tokens, probs, (1,), decode)
        assert done.logprobs == pytest.approx([-0.6931472] * len(done.token_ids))
        return done.text, done.finish, len(done.token_ids)

    assert end() == ("ab##cd", FinishReason.EOS, 7)
    assert end(max_tokens=7) == ("ab##cd", FinishReason.EOS, 7)
    assert end(max_tokens=6) == ("ab##cd", FinishReason.LENGTH, 6)
    assert end(stop=("##",)) == ("ab", FinishReason.STOP, 4)
    assert end(stop=("d", "#c")) == ("ab#", FinishReason.STOP, 5)
    assert end(stop=("##", "b##")) == ("a", FinishReason.STOP, 4)
    assert end(stop=("##",), max_tokens=3) == ("ab#", FinishReason.LENGTH, 3)
    assert end(stop=("dab",)) == ("ab##cd", FinishReason.EOS, 7)
