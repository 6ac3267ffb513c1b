"""The update: gradients that do not depend on how rows are cut, and what is counted, skipped and refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ccpo.errors import RunFailure, UserError
from ccpo.families import compute_dtype
from ccpo.learner import Learner, Policy, TrainRow, logprobs
from ccpo.learner.logprobs import score, token_logprobs
from ccpo.learner.meters import Meters
from ccpo.learner.objective import Objective, mismatch
from ccpo.learner.optim import lr_factor
from ccpo.learner.rows import SPREAD, collate, number_segments, pack
from ccpo.losses import AGGREGATES, LOSSES
from tiny import FAMILIES, tiny_model

torch.set_num_threads(1)
VOCAB = 101
CPU = torch.device("cpu")


def policy(
    name: str = "a", agents: tuple[str, ...] = ("a",), family: str = "qwen2", seed: int = 0, lr: float = 1e-2, **more
) -> Policy:
    model = tiny_model(family, VOCAB, seed)
    model.set_attn_implementation("eager")
    return Policy(name=name, agents=agents, model=model, tokenizer=None, lr=lr, **more)


def make_rows(
    count: int = 12, seed: int = 0, name: str = "a", agent: str = "a", turns: int = 1, temperature: float = 1.0, **fixed
) -> list[TrainRow]:
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high)))

    rows = []
    for i in range(count):
        token_ids = ids(1, 9)
        values = {
            "policy": name,
            "agent": agent,
            "prompt_ids": ids(1, 7),
            "token_ids": token_ids,
            "engine_logprobs": tuple(-2.0 - rng.random() for _ in token_ids),
            "advantage": rng.gauss(0, 1),
            "segment": 1000 * seed + i // turns,
            "temperature": temperature,
        }
        rows.append(TrainRow(**{**values, **fixed}))
    return rows


def learner(*policies: Policy, **more) -> Learner:
    return Learner({p.name: p for p in policies}, **{"total_steps": 10, "compute": torch.float32, **more})


def gradient(p: Policy, minibatch: list[TrainRow], monkeypatch, **more) -> dict[str, torch.Tensor]:
    """The gradient that one update would step along."""
    found = {}
    made = learner(p, **{"max_grad_norm": 1e9, **more})
    optimizer = made.optimizers[p.name]
    monkeypatch.setattr(
        optimizer,
        "step",
        lambda factor: found.update({n: q.grad.clone() for n, q in optimizer.parameters.items()}) or 0.0,
    )
    made.step([minibatch], step=0, failure_folder=Path("/nowhere"))
    return found


def weights(p: Policy) -> dict[str, torch.Tensor]:
    return {n: q.detach().clone() for n, q in p.parameters().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> bool:
    return all(torch.allclose(a[n], b[n], rtol=0, atol=atol) for n in a | b)


# --- rows and micro-batches -------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_and_completions_on_the_right():
    rows = [
        TrainRow(
            policy="a",
            agent="a",
            prompt_ids=(5,),
            token_ids=(6, 7),
            engine_logprobs=(-1.0, -2.0),
            advantage=1.0,
            segment=3,
        ),
        TrainRow(
            policy="a",
            agent="a",
            prompt_ids=(8, 9),
            token_ids=(4,),
            engine_logprobs=(-3.0,),
            advantage=-1.0,
            segment=4,
            temperature=0.0,
        ),
    ]
    batch = collate(rows, number_segments(rows), CPU)
    assert batch.ids_BL.tolist() == [[0, 5, 6, 7], [8, 9, 4, 0]]
    assert batch.attention_BL.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.position_BL.tolist() == [[0, 0, 1, 2], [0, 1, 2, 2]]
    assert batch.mask_BT.tolist() == [[True, True], [True, False]]
    assert batch.engine_BT.tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
    assert batch.segment_B.tolist() == [0, 1]
    assert batch.temperature_B.tolist() == [1.0, 1.0]  # greedy rows: the plain softmax
    assert batch.tokens == 3


@pytest.mark.parametrize(
    "wrong", [{"prompt_ids": ()}, {"engine_logprobs": (-1.0,) * 30}, {"temperature": -1.0}, {"temperature": math.nan}]
)
def test_a_row_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="a row needs"):
        make_rows(1, **wrong)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(1, 300),
)
@settings(deadline=None)
def test_packing_keeps_segments_together_and_the_budget(shapes, budget):
    rows = [
        TrainRow(
            policy="a",
            agent="a",
            prompt_ids=(1,) * p,
            token_ids=(1,) * t,
            engine_logprobs=(0.0,) * t,
            advantage=1.0,
            segment=s,
        )
        for p, t, s in shapes
    ]
    segments = number_segments(rows)
    packed = pack(rows, segments, budget)
    assert sorted(i for part in packed for i in part) == list(range(len(rows)))
    where = [{number for number, part in enumerate(packed) for i in part if segments[i] == s} for s in set(segments)]
    assert all(len(numbers) == 1 for numbers in where)
    for part in packed:
        padded = len(part) * (max(len(rows[i].prompt_ids) for i in part) + max(len(rows[i].token_ids) for i in part))
        assert padded <= budget or len({segments[i] for i in part}) == 1
    assert packed == pack(rows, segments, budget)


def test_packing_keeps_the_rows_of_a_prompt_together():
    rows = [
        row
        for p in range(6)
        for row in make_rows(8, seed=p, prompt_ids=tuple(range(3, 43 + p)), engine_logprobs=(), token_ids=())
    ]
    rng = random.Random(0)
    sized = []
    for row in rows:
        ids = tuple(range(3, 3 + rng.randint(1, 9)))
        sized.append(replace(row, token_ids=ids, engine_logprobs=(-1.0,) * len(ids)))
    rng.shuffle(sized)
    packed = pack(sized, range(len(sized)), 200, shared=True)
    assert sorted(i for part in packed for i in part) == list(range(len(sized)))
    passes = sum(len({sized[i].prompt_ids for i in part}) for part in packed)
    assert passes <= 6 + len(packed) - 1  # a prompt is cut in two at most where a micro-batch ends
    for part in packed:
        prompts = {sized[i].prompt_ids for i in part}
        assert sum(map(len, prompts)) + sum(len(sized[i].token_ids) for i in part) <= 200
    assert len(packed) < len(pack(sized, range(len(sized)), 200))


def test_a_prompt_is_not_spread_over_too_many_rows():
    rows = make_rows(400, prompt_ids=tuple(range(3, 63)), token_ids=(5,), engine_logprobs=(-1.0,))
    packed = pack(rows, range(400), 300, shared=True)
    assert max(map(len, packed)) == SPREAD * 300 // 61


def test_packing_sorts_by_length_and_needs_a_budget():
    rows = make_rows(20)
    lengths = [[len(rows[i].prompt_ids) + len(rows[i].token_ids) for i in part] for part in pack(rows, range(20), 40)]
    flat = [n for part in lengths for n in part]
    assert flat == sorted(flat)
    assert len(lengths) > 1
    with pytest.raises(ValueError, match="at least 1"):
        pack(rows, range(20), 0)


# --- log-probs --------------------------------------------------------------------------------------------------------


def test_token_logprobs_against_the_plain_formula(monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 7 * 4)  # four tokens a chunk: several chunks, the last one short
    logits = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([1.0, 0.5, 2.0])
    found, entropy = token_logprobs(logits, ids, temperature)
    full = (logits / temperature[:, None, None]).log_softmax(-1)
    torch.testing.assert_close(found, full.gather(2, ids[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, temperature), logits)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, temperature)[1], logits)


def test_logits_are_not_changed_by_the_backward_pass():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    before = logits.detach().clone()
    sum(t.sum() for t in token_logprobs(logits, torch.tensor([[1, 2]]), torch.ones(1))).backward()
    assert torch.equal(logits, before)


def test_a_forbidden_token_has_no_share_in_the_entropy():
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    logprob, entropy = token_logprobs(logits, torch.tensor([[0]]), torch.ones(1))
    assert entropy.item() == pytest.approx(math.log(2))
    (logprob + entropy).sum().backward()
    assert logits.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="logits are"):
        token_logprobs(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.long), torch.ones(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_padding(family):
    p, rows = policy(family=family), make_rows(5, temperature=0.7)
    with torch.no_grad():
        together, _ = score(p.model, collate(rows, range(5), CPU), torch.float32)
        for i, row in enumerate(rows):
            ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
            full = (p.model(input_ids=ids).logits[0] / 0.7).log_softmax(-1)
            P = len(row.prompt_ids)
            plain = full[P - 1 : -1].gather(1, ids[0, P:, None])[:, 0]
            torch.testing.assert_close(together[i, : len(row.token_ids)], plain, atol=2e-5, rtol=0)


def test_compute_is_bfloat16_only_where_the_cpu_multiplies_it():
    able = torch.cpu.get_capabilities()
    expected = torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    assert compute_dtype(CPU) == expected
    p, rows = policy(), make_rows(4)
    with torch.no_grad():
        exact, _ = score(p.model, collate(rows, range(4), CPU), torch.float32)
        rough, _ = score(p.model, collate(rows, range(4), CPU), torch.bfloat16)
    assert rough.dtype == torch.float32
    assert 1e-5 < (exact - rough).abs().max() < 0.5


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "turn"])
def test_the_gradient_does_not_depend_on_the_micro_batch(loss, aggregate, monkeypatch):
    rows = make_rows(12, turns=3)
    options = {"loss": loss, "aggregate": aggregate, "constant": 9.0, "kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.01}
    whole = gradient(policy(), rows, monkeypatch, **options)
    cut = gradient(policy(), rows, monkeypatch, microbatch_tokens=50, **options)
    assert sum(len(pack(rows, number_segments(rows), budget)) for budget in (50, 16384)) == 1 + 4
    assert max(g.abs().max() for g in whole.values()) > 1e-2
    assert same(whole, cut, atol=1e-6)


def test_the_gradient_is_that_of_reinforce(monkeypatch):
    """With old = new, the gradient of the clipped loss is that of -A log pi, averaged over tokens."""
    p, rows = policy(), make_rows(6, temperature=0.8)
    found = gradient(p, rows, monkeypatch)
    p.model.zero_grad()
    total = sum(len(r.token_ids) for r in rows)
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        full = (p.model(input_ids=ids).logits[0] / 0.8).log_softmax(-1)
        chosen = full[len(row.prompt_ids) - 1 : -1].gather(1, ids[0, len(row.prompt_ids) :, None])
        (-row.advantage * chosen.sum() / total).backward()
    assert same(found, {n: q.grad for n, q in p.parameters().items()}, atol=1e-5)


def test_an_update_raises_the_probability_of_what_was_paid(tmp_path):
    p = policy(lr=1e-3)
    rows = [
        TrainRow(
            policy="a", agent="a", prompt_ids=(5,), token_ids=(t,), engine_logprobs=(-3.0,), advantage=a, segment=t
        )
        for t, a in ((7, 1.0), (8, -1.0))
    ]
    batch = collate(rows, [0, 1], CPU)
    with torch.no_grad():
        before, _ = score(p.model, batch, torch.float32)
    learner(p).step([rows], step=0, failure_folder=tmp_path)
    with torch.no_grad():
        after, _ = score(p.model, batch, torch.float32)
    assert after[0, 0] > before[0, 0]
    assert after[1, 0] < before[1, 0]


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_rows_without_advantage_are_counted_and_not_run(aggregate, monkeypatch):
    rows = make_rows(12, turns=2)
    rows = [
        r if r.segment % 2 else TrainRow(**{f: getattr(r, f) for f in r.__slots__} | {"advantage": 0.0}) for r in rows
    ]
    lazy = gradient(policy(), rows, monkeypatch, aggregate=aggregate, constant=9.0)
    seen = []
    monkeypatch.setattr(Objective, "needs_all_rows", property(lambda self: seen.append(1) or True))
    full = gradient(policy(), rows, monkeypatch, aggregate=aggregate, constant=9.0)
    assert seen
    assert same(lazy, full, atol=1e-6)
    assert max(g.abs().max() for g in full.values()) > 1e-3


def test_the_means_count_rows_without_advantage(tmp_path):
    rows = make_rows(4)
    idle = make_rows(4, seed=1, advantage=0.0)
    made = learner(policy(), max_grad_norm=1e9)
    stats = made.step([rows + idle], step=0, failure_folder=tmp_path).metrics
    alone = learner(policy(), max_grad_norm=1e9).step([rows], step=0, failure_folder=tmp_path).metrics
    tokens = [sum(len(r.token_ids) for r in part) for part in (rows, rows + idle)]
    assert stats["actor/a/rows_without_signal"] == 4
    assert stats["actor/a/rows"] == 8
    assert stats["actor/a/tokens"] == tokens[1]
    assert stats["actor/a/grad_norm"] == pytest.approx(alone["actor/a/grad_norm"] * tokens[0] / tokens[1], rel=1e-5)


def test_without_any_signal_nothing_moves_not_even_by_momentum(tmp_path):
    p = policy()
    made = learner(p, weight_decay=0.1)
    made.step([make_rows()], step=0, failure_folder=tmp_path)
    before, version = weights(p), p.version
    metrics = made.step([make_rows(advantage=0.0)], step=1, failure_folder=tmp_path).metrics
    assert metrics["actor/a/updates_skipped"] == 1
    assert same(weights(p), before)
    assert p.version == version == 1
    metrics = made.step([[]], step=2, failure_folder=tmp_path).metrics  # an agent that is not trained has no rows
    assert metrics == {}
    assert same(weights(p), before)


def test_with_a_reference_rows_without_advantage_pull_back(tmp_path):
    p = policy()
    start = weights(p)
    made = learner(p, kl="k3", kl_coef=1.0)
    with torch.no_grad():
        for q in p.parameters().values():
            q.add_(0.02 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0)))
    made.optimizers["a"].policy.lr = 1e-3
    kls = [
        made.step([make_rows(advantage=0.0)], step=0, failure_folder=tmp_path).metrics["actor/a/kl"] for _ in range(8)
    ]
    assert kls[-1] < 0.7 * kls[0]
    assert not same(weights(p), start)


def test_an_entropy_bonus_raises_entropy(tmp_path):
    made = learner(policy(lr=3e-3), entropy_coef=1.0)
    found = [
        made.step([make_rows(advantage=0.0)], step=0, failure_folder=tmp_path).metrics["actor/a/entropy"]
        for _ in range(5)
    ]
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.05


def test_agents_that_share_weights_sum_their_losses(monkeypatch):
    both = make_rows(6, agent="a", name="s") + make_rows(3, seed=1, agent="b", name="s")
    shared = gradient(policy("s", ("a", "b")), both, monkeypatch)
    parts = [gradient(policy("s", ("a", "b")), [r for r in both if r.agent == agent], monkeypatch) for agent in "ab"]
    assert same(shared, {n: parts[0][n] + parts[1][n] for n in shared}, atol=1e-6)


def test_policies_have_learning_rates_of_their_own(tmp_path):
    slow, fast = policy("a", ("a",), lr=1e-5), policy("b", ("b",), lr=1e-3)
    before = weights(slow), weights(fast)
    metrics = (
        learner(slow, fast)
        .step([make_rows() + make_rows(name="b", agent="b")], step=0, failure_folder=tmp_path)
        .metrics
    )
    assert metrics["actor/a/lr"] == 1e-5
    assert metrics["actor/b/lr"] == 1e-3
    moved = [
        max((w[n] - b[n]).abs().max().item() for n in b)
        for w, b in zip((weights(slow), weights(fast)), before, strict=True)
    ]
    assert moved[0] == pytest.approx(1e-5, rel=0.1)  # AdamW's first step is the learning rate
    assert moved[1] == pytest.approx(1e-3, rel=0.1)


def test_the_gradient_is_clipped_and_its_norm_reported(tmp_path, monkeypatch):
    rows = make_rows()
    free = gradient(policy(), rows, monkeypatch, max_grad_norm=1e9)
    norm = math.sqrt(sum(g.square().sum().item() for g in free.values()))
    clipped = gradient(policy(), rows, monkeypatch, max_grad_norm=0.01)
    assert math.sqrt(sum(g.square().sum().item() for g in clipped.values())) == pytest.approx(0.01, rel=1e-3)
    metrics = learner(policy(), max_grad_norm=0.01).step([rows], step=0, failure_folder=tmp_path).metrics
    assert metrics["actor/a/grad_norm"] == pytest.approx(norm, rel=1e-4)


# --- old log-probs, mismatch, importance ------------------------------------------------------------------------------


def exact_rows(p: Policy, rows: list[TrainRow], shift: float = 0.0) -> list[TrainRow]:
    """The rows with the policy's own log-probs, plus ``shift``, as the engine's."""
    batch = collate(rows, range(len(rows)), CPU)
    with torch.no_grad():
        logprob, _ = score(p.model, batch, torch.float32)
    return [
        TrainRow(
            **{f: getattr(r, f) for f in r.__slots__}
            | {"engine_logprobs": tuple(x + shift for x in line[: len(r.token_ids)])}
        )
        for r, line in zip(rows, logprob.tolist(), strict=True)
    ]


def test_one_update_a_step_has_a_ratio_of_exactly_one(tmp_path):
    metrics = learner(policy()).step([make_rows()], step=0, failure_folder=tmp_path).metrics
    assert metrics["actor/a/ratio_mean"] == metrics["actor/a/ratio_max"] == 1.0
    assert metrics["actor/a/clip_frac"] == metrics["actor/a/approx_kl"] == 0.0


@pytest.mark.parametrize("shape", [{"epochs": 3}, {"minibatches": 2}])
def test_several_updates_measure_the_ratio_from_before_the_first(shape, tmp_path, monkeypatch):
    rows, seen = make_rows(8), []
    p = policy(lr=1e-3)
    before = exact_rows(p, rows)
    whole = Objective.__call__
    monkeypatch.setattr(
        Objective,
        "__call__",
        lambda self, logprob, entropy, batch, counts: (
            seen.append(batch) or whole(self, logprob, entropy, batch, counts)
        ),
    )
    parts = [rows[:4], rows[4:]] if "minibatches" in shape else [rows]
    made = learner(p, epochs=shape.get("epochs", 1))
    metrics = made.step(parts, step=0, failure_folder=tmp_path).metrics
    expected = {r.token_ids: r.engine_logprobs for r in before}
    for batch in seen:
        for i, row in enumerate(batch.rows):
            torch.testing.assert_close(
                batch.old_BT[i, : len(row.token_ids)], torch.tensor(expected[row.token_ids]), atol=1e-5, rtol=0
            )
    assert metrics["actor/a/ratio_max"] > 1.0
    assert metrics["actor/a/updates"] == len(seen) == max(shape.values())
    assert p.version == len(seen)


def test_the_mismatch_with_the_engine_by_hand(tmp_path):
    """The engine says 0.1 nats too little everywhere: |d| = 0.1, ratio e^0.1, k3 = e^0.1 - 1 - 0.1."""
    for options in ({}, {"epochs": 2}, {"old_logprobs": "learner"}, {"old_logprobs": "engine"}):
        p = policy()
        rows = exact_rows(p, make_rows(), shift=-0.1)
        metrics = learner(p, **options).step([rows], step=0, failure_folder=tmp_path).metrics
        assert metrics["actor/a/mismatch_mean"] == pytest.approx(0.1, abs=1e-4)
        assert metrics["actor/a/mismatch_max"] == pytest.approx(0.1, abs=1e-4)
        assert metrics["actor/a/mismatch_ratio"] == pytest.approx(math.exp(0.1), abs=1e-4)
        assert metrics["actor/a/mismatch_k3"] == pytest.approx(math.exp(0.1) - 1.1, abs=1e-4)


def test_the_mismatch_is_measured_before_any_update_of_the_step(tmp_path):
    p = policy(lr=0.05)
    rows = exact_rows(p, make_rows(8))
    for source in ("engine", "auto"):
        metrics = learner(p, old_logprobs=source).step([rows[:4], rows[4:]], step=0, failure_folder=tmp_path).metrics
        assert metrics["actor/a/mismatch_max"] < 1e-4
        p = policy(lr=0.05)


def test_old_logprobs_of_the_engine_make_the_ratio(tmp_path):
    p = policy()
    rows = exact_rows(p, make_rows(), shift=-0.1)
    metrics = learner(p, old_logprobs="engine").step([rows], step=0, failure_folder=tmp_path).metrics
    assert metrics["actor/a/ratio_mean"] == pytest.approx(math.exp(0.1), abs=1e-4)


def test_importance_weights_scale_the_gradient_up_to_their_cap(monkeypatch):
    p = policy()
    rows = make_rows()
    plain, low, high = (
        gradient(policy(), exact_rows(p, rows, shift), monkeypatch, importance_cap=cap)
        for shift, cap in ((0.0, None), (0.5, 2.0), (-3.0, 2.0))
    )
    assert same(low, {n: g * math.exp(-0.5) for n, g in plain.items()}, atol=1e-5)
    assert same(high, {n: g * 2.0 for n, g in plain.items()}, atol=1e-5)


def test_mismatch_ignores_padding():
    found = mismatch(torch.tensor([[0.0, math.nan]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([[True, False]]))
    assert found["mismatch_mean"].item() == 1.0
    assert found["mismatch_k3"].item() == pytest.approx(math.e - 2, rel=1e-6)


@pytest.mark.parametrize("ratio_over", ["agent", "turn"])
def test_a_sequence_ratio_spans_the_turns_it_is_told_to(ratio_over, tmp_path, monkeypatch):
    seen = []
    plain = LOSSES["gspo"]

    def spy(*args, **more):
        seen.append(more["segment_B"])
        return plain(*args, **more)

    monkeypatch.setitem(LOSSES, "gspo", spy)
    learner(policy(), loss="gspo", ratio_over=ratio_over).step([make_rows(4, turns=2)], step=0, failure_folder=tmp_path)
    assert (sorted(seen[0].tolist()) == [0, 0, 1, 1]) if ratio_over == "agent" else seen[0] is None


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_learning_rate_over_a_run():
    linear = [lr_factor(s, warmup_steps=2, decay="linear", total_steps=6) for s in range(6)]
    assert linear == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = [lr_factor(s, warmup_steps=0, decay="cosine", total_steps=4) for s in (0, 2, 4, 9)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert {lr_factor(s, warmup_steps=0, decay="constant", total_steps=4) for s in (0, 3, 99)} == {1.0}
    by_tokens = [lr_factor(s, warmup_steps=1, decay="linear", total_steps=100, spent=s / 4) for s in range(5)]
    assert by_tokens == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        lr_factor(0, warmup_steps=0, decay="cosin", total_steps=1)


def test_the_schedule_goes_by_steps_and_not_by_updates(tmp_path):
    made = learner(policy(lr=0.1), warmup_steps=4, epochs=2)
    rates = [made.step([make_rows(4)], step=s, failure_folder=tmp_path).metrics["actor/a/lr"] for s in range(3)]
    assert rates == pytest.approx([0.025, 0.05, 0.075])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"loss": "ppo_clop"}, r"loss\.kind.*Did you mean 'ppo_clip'"),
        ({"aggregate": "token_mean"}, r"loss\.aggregate.*Did you mean 'token-mean'"),
        ({"kl": "k4"}, r"loss\.kl is"),
        ({"old_logprobs": "none"}, r"loss\.old_logprobs"),
        ({"ratio_over": "agents"}, r"Did you mean 'agent'"),
        ({"aggregate": "constant"}, r"loss\.constant"),
        ({"kl_coef": 0.1}, "set loss.kl"),
        ({"loss": "cispo", "dual_clip": 3.0}, "nothing to bound"),
        ({"old_logprobs": "engine", "importance_cap": 2.0}, "remove one"),
        ({"decay": "exponential"}, r"optim\.decay"),
    ],
)
def test_settings_that_contradict_each_other(settings, match):
    with pytest.raises(UserError, match=match):
        learner(policy(), **settings)


def test_rows_of_a_policy_that_is_not_trained(tmp_path):
    frozen = policy("f", ("f",), trainable=False)
    made = learner(policy(), frozen)
    assert set(made.optimizers) == {"a"}
    with pytest.raises(ValueError, match="is not trained"):
        made.step([make_rows(name="f", agent="f")], step=0, failure_folder=tmp_path)
    with pytest.raises(ValueError, match="is unknown"):
        made.step([make_rows(name="x")], step=0, failure_folder=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path):
    p = policy()
    rows = make_rows(12)
    bad = TrainRow(**{f: getattr(rows[5], f) for f in rows[5].__slots__} | {"advantage": math.nan})
    made = learner(p, microbatch_tokens=50)
    made.step([rows], step=0, failure_folder=tmp_path / "failure")
    assert not (tmp_path / "failure").exists()
    before, state = weights(p), {k: v.clone() for k, v in made.optimizers["a"].tensors().items()}
    with pytest.raises(
        RunFailure, match=r"step 7: the loss of policy 'a' is nan \(agent 'a', micro-batch \d\).*not changed"
    ) as info:
        made.step([[*rows[:5], bad, *rows[6:]]], step=7, failure_folder=tmp_path / "failure")
    assert str(tmp_path / "failure") in str(info.value)
    assert same(weights(p), before)
    assert same(made.optimizers["a"].tensors(), state)
    assert all(q.grad is None for q in p.parameters().values())
    record = json.loads((tmp_path / "failure" / "failure.json").read_text())
    assert record["step"] == 7
    assert [b["agent"] for b in record["batches"]] == ["a"]
    saved = load_file(tmp_path / "failure" / record["batches"][0]["file"])
    assert saved["advantage_B"].isnan().sum() == 1
    assert set(saved) >= {"ids_BL", "mask_BT", "engine_BT", "temperature_B"}


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    p = policy()
    next(iter(p.parameters().values())).register_hook(lambda grad: grad * math.inf)
    made = learner(p, microbatch_tokens=50)
    before = weights(p)
    with pytest.raises(RunFailure, match=r"the gradient norm of policy 'a' is (nan|inf)"):
        made.step([make_rows()], step=3, failure_folder=tmp_path)
    assert same(weights(p), before)
    assert len(json.loads((tmp_path / "failure.json").read_text())["batches"]) > 1


def test_a_batch_that_cannot_be_kept_is_still_a_clear_failure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match="could not be written"):
        learner(policy()).step([make_rows(advantage=math.inf)], step=0, failure_folder=tmp_path / "file" / "failure")


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_meters_weigh_means_and_keep_maxima():
    meters = Meters()
    meters.tokens("a", {"x": torch.tensor(1.0), "y_max": torch.tensor(2.0)}, 3)
    meters.tokens("a", {"x": torch.tensor(5.0), "y_max": torch.tensor(-1.0)}, 1)
    meters.add("a", "n", 2)
    meters.add("a", "n", 3)
    assert meters.read() == {"actor/a/n": 5, "actor/a/x": 2.0, "actor/a/y_max": 2.0}
    assert Meters().read() == {}


def test_the_metrics_of_a_step(tmp_path):
    stats = learner(policy(), kl="k3", kl_coef=0.1, importance_cap=2.0).step(
        [make_rows()], step=0, failure_folder=tmp_path
    )
    names = {n.removeprefix("actor/a/") for n in stats.metrics}
    assert names >= {"loss", "grad_norm", "clip_frac", "entropy", "kl", "lr", "ratio_mean", "ratio_max", "mismatch_k3"}
    assert names >= {
        "mismatch_mean",
        "mismatch_max",
        "mismatch_ratio",
        "tokens",
        "rows",
        "updates",
        "importance_weight",
    }
    assert all(type(v) in (int, float) and math.isfinite(v) for v in stats.metrics.values())
    assert stats.seconds > 0


def test_the_same_rows_give_the_same_weights():
    found = []
    for _ in range(2):
        p = policy()
        made = learner(p, epochs=2, microbatch_tokens=60, compute=None)
        for step in range(2):
            made.step([make_rows(seed=step)], step=step, failure_folder=Path("/nowhere"))
        found.append(weights(p))
    assert same(*found)
