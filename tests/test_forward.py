"""The update's own pass: what transformers computes, and its gradients, from a run of tokens in which nothing stands twice."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.learner import TrainRow, forward, logprobs
from ccpo.learner.layout import Layout
from ccpo.learner.logprobs import completion_logits, score, token_logprobs, training
from ccpo.learner.rows import collate
from ccpo.rectangle import Rectangle
from tiny import tiny_model

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 101


def row(prompt: tuple[int, ...], text: tuple[int, ...], temperature: float = 1.0) -> TrainRow:
    return TrainRow(
        policy="a",
        agent="a",
        prompt_ids=prompt,
        token_ids=text,
        engine_logprobs=(-1.0,) * len(text),
        advantage=1.0,
        segment=0,
        temperature=temperature,
    )


def ragged_rows(seed: int = 0, prompts: int = 4, samples: int = 4, longest: int = 9) -> list[TrainRow]:
    """Groups of samples, some of one token, some the same, one prompt the beginning of another."""
    rng = random.Random(seed)
    rows = []
    for _ in range(prompts):
        prompt = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 7)))
        texts = [tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))) for _ in range(samples)]
        rows += [row(prompt, text, rng.choice([0.7, 1.0])) for text in [*texts, texts[0]]]
    rows.append(row(rows[0].prompt_ids + rows[0].token_ids, (5, 6)))
    rng.shuffle(rows)
    return rows


def by_transformers(model, rows, compute):
    batch = collate(rows, range(len(rows)), CPU)
    logits = completion_logits(model, batch, compute)
    return token_logprobs(logits, batch.ids_BL[:, -logits.shape[1] :], batch.temperature_B)


def measured(model, rows, compute, scores) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masked log-probs and entropies, and the gradient of a sum over both with weights of their own."""
    batch = collate(rows, range(len(rows)), CPU)
    logprob_BT, entropy_BT = scores(model, rows, compute)
    weight_BT = torch.linspace(-1, 1, batch.mask_BT.numel()).view_as(batch.mask_BT) * batch.mask_BT
    model.zero_grad()
    (weight_BT * (logprob_BT + 0.3 * entropy_BT)).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return (logprob_BT * batch.mask_BT).detach(), (entropy_BT * batch.mask_BT).detach(), gradient


def by_ccpo(model, rows, compute):
    assert forward.runs(model)
    return score(model, collate(rows, range(len(rows)), CPU), compute)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


SHAPES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"num_key_value_heads": 4, "head_dim": 16},
}


@pytest.mark.parametrize("short", [forward.SHORT, 0])
@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_what_transformers_computes(kind, short, monkeypatch):
    monkeypatch.setattr(forward, "SHORT", short)
    model = tiny_model(kind.split("-")[0], VOCAB, **SHAPES[kind])
    rows = ragged_rows()
    ours = measured(model, rows, torch.float32, by_ccpo)
    theirs = measured(model, rows, torch.float32, by_transformers)
    assert (ours[0] - theirs[0]).abs().max() < 1e-5
    assert (ours[1] - theirs[1]).abs().max() < 1e-5
    assert apart(ours[2], theirs[2]) < 2e-6


def test_texts_of_one_token_alone():
    model = tiny_model("qwen2", VOCAB)
    rows = [row((4, 5, 6), (7,)), row((4, 5, 6), (8,)), row((9,), (7,)), row((4, 5, 6), (7,))]
    ours = measured(model, rows, torch.float32, by_ccpo)
    theirs = measured(model, rows, torch.float32, by_transformers)
    assert (ours[0] - theirs[0]).abs().max() < 1e-5 and apart(ours[2], theirs[2]) < 2e-6


def test_in_bfloat16_it_is_no_less_exact_than_autocast():
    model = tiny_model("llama", VOCAB, hidden_size=64, num_hidden_layers=3)
    rows = ragged_rows(2, prompts=8)
    _, _, exact = measured(model, rows, torch.float32, by_transformers)
    ours, theirs = (measured(model, rows, torch.bfloat16, s)[2] for s in (by_ccpo, by_transformers))
    assert 0 < apart(ours, exact) < 1.3 * apart(theirs, exact)


@pytest.mark.parametrize(
    ("weights", "compute"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_no_copy_of_the_weights_is_kept_that_is_not_smaller(weights, compute):
    model = tiny_model("qwen2", VOCAB).to(weights)
    own = {p.data_ptr() for p in model.parameters()}
    sizes = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        by_ccpo(model, ragged_rows(), compute)
    copies = [t for t in kept if t.dim() == 2 and tuple(sorted(t.shape)) in sizes and t.data_ptr() not in own]
    assert all(t.element_size() < torch.finfo(weights).bits // 8 for t in copies if t.shape[1] in (32, 64))


def test_recomputed_activations_give_the_same_gradient():
    model = tiny_model("qwen2", VOCAB)
    rows = ragged_rows()
    plain = measured(model, rows, torch.float32, by_ccpo)[2]
    model.gradient_checkpointing_enable()
    calls = []
    block = forward._block

    def counted(*args):
        calls.append(1)
        return block(*args)

    with pytest.MonkeyPatch.context() as patch, training(model):
        patch.setattr(forward, "_block", counted)
        again = measured(model, rows, torch.float32, by_ccpo)[2]
    assert len(calls) == 2 * len(model.model.layers)  # forward, and once more in the backward pass
    assert torch.equal(again, plain)


def test_logits_that_are_too_many_to_keep(monkeypatch):
    model, rows = tiny_model("qwen2", VOCAB), ragged_rows()
    whole = measured(model, rows, torch.float32, by_ccpo)
    monkeypatch.setitem(logprobs.LOGITS, "cpu", 7 * VOCAB)
    parts = measured(model, rows, torch.float32, by_ccpo)
    for part, all_ in zip(parts, whole, strict=True):
        assert torch.allclose(part, all_, atol=1e-5)


@pytest.mark.parametrize("state", ["one", "other", "off", "head too"])
def test_adapters(state):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"] + ["lm_head"] * (state == "head too")
    torch.manual_seed(0)  # the adapters are drawn at random, and some draws round worse than others
    plan = peft.LoraConfig(r=3, lora_alpha=12, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen2", VOCAB, tie_word_embeddings=False), plan, adapter_name="one").eval()
    model.add_adapter("other", plan)
    model.set_adapter("other" if state == "other" else "one")
    rows = ragged_rows()
    if state == "off":
        with model.disable_adapter(), torch.no_grad():
            ours, theirs = by_ccpo(model, rows, torch.float32)[0], by_transformers(model, rows, torch.float32)[0]
        mask = collate(rows, range(len(rows)), CPU).mask_BT
        assert ((ours - theirs) * mask).abs().max() < 1e-5
        return
    ours = measured(model, rows, torch.float32, by_ccpo)
    theirs = measured(model, rows, torch.float32, by_transformers)
    assert (ours[0] - theirs[0]).abs().max() < 1e-5 and apart(ours[2], theirs[2]) < 2e-6


def test_what_it_does_not_run():
    peft = pytest.importorskip("peft")
    assert not forward.runs(tiny_model("gpt2", VOCAB))
    assert not forward.runs(tiny_model("qwen2", VOCAB, hidden_act="gelu"))
    assert not forward.runs(torch.nn.Linear(2, 2))
    saved = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not forward.runs(peft.get_peft_model(tiny_model("qwen2", VOCAB), saved))
    embedded = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    assert not forward.runs(peft.get_peft_model(tiny_model("qwen2", VOCAB, tie_word_embeddings=False), embedded))
    merged = peft.get_peft_model(tiny_model("qwen2", VOCAB), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert forward.runs(merged)
    merged.merge_adapter()
    assert not forward.runs(merged)
    dora = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    assert not forward.runs(peft.get_peft_model(tiny_model("qwen2", VOCAB), dora))


def test_the_layout_by_hand():
    layout = Layout.of([row((1, 2), (3, 4, 5)), row((6,), (7,)), row((1, 2), (8,)), row((1, 2), (3, 4, 5))], CPU)
    assert layout.ids_M.tolist() == [1, 2, 6, 3, 4]
    assert layout.position_M.tolist() == [0, 1, 0, 2, 3]
    assert layout.owner_R.tolist() == [0, 1, 0]
    assert layout.at_N.tolist() == [1, 3, 4, 2, 1]  # 3 is drawn after 2, 4 after 3, 5 after 4; 7 after 6; 8 after 2
    assert layout.target_N.tolist() == [3, 4, 5, 7, 8]
    assert layout.scored_BT.tolist() == [[0, 1, 2], [3, 0, 0], [4, 0, 0], [0, 1, 2]]
    assert (layout.before_R1TC[:, 0] == 0).int().tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 1, 0], [1, 0, 1, 1]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


def test_the_temperature_is_part_of_what_is_scored_and_greedy_counts_as_one():
    layout = Layout.of([row((1,), (2,), 0.5), row((1,), (2,), 0.0), row((1,), (2,), 0.5)], CPU)
    assert layout.temperature_N.tolist() == [0.5, 1.0] and layout.scored_BT.tolist() == [[0], [1], [0]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=8))
def test_nothing_stands_twice_and_nothing_is_lost(shapes):
    rows = [row(tuple(range(p)), tuple(range(kind, kind + t))) for p, t, kind in shapes]
    layout = Layout.of(rows, CPU)
    prompts = {r.prompt_ids for r in rows}
    texts = {(r.prompt_ids, r.token_ids) for r in rows}
    assert len(layout.ids_M) == sum(map(len, prompts)) + sum(len(t) - 1 for _, t in texts)
    assert len(layout.target_N) == sum(len(t) for _, t in texts)
    for r, scored_T in zip(rows, layout.scored_BT, strict=True):
        assert tuple(layout.target_N[scored_T[: len(r.token_ids)]].tolist()) == r.token_ids


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_a_block_gathers_what_it_spread(sizes):
    real = torch.tensor([[c < size for c in range(max(sizes))] for size in sizes]).reshape(len(sizes), -1)
    block = Rectangle.of(real)
    x = torch.randn(block.size, 3, 2)
    spread = block.spread(x)
    assert spread.shape == (len(sizes), 3, max(sizes), 2)
    assert torch.equal(block.gather(spread), x)
    for r, c in product(range(real.shape[0]), range(real.shape[1])):
        if not real[r, c]:
            assert not spread[r, :, c].any()
