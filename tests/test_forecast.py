"""What ``ccpo plan`` counts: parameters by hand, bytes against real tensors, tokens against real steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from ccpo.bench.ours import TEAMS, OurStep
from ccpo.bench.shapes import SIZES, Size, save, tokenizer
from ccpo.config import load_recipe
from ccpo.engines.products import Product
from ccpo.engines.weights import Weights
from ccpo.errors import UserError
from ccpo.forecast import memory
from ccpo.forecast.cards import CARDS
from ccpo.forecast.memory import Held, Placement, lora_ratio, standing
from ccpo.forecast.roofline import Roofline, batch_of, cut, prefill_flops, update_flops
from ccpo.forecast.seconds import Machine, micro_batches, of_rank
from ccpo.forecast.shapes import PRESETS, Shape, known_by, shape_of
from ccpo.forecast.standin import Asked, Lengths, Tokens
from ccpo.forecast.work import make_subject, work_of
from ccpo.learner import PolicySpec, TrainRow, forward, load_policies
from ccpo.learner.layout import Layout
from ccpo.learner.optim import PolicyOptimizer

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
TINY = Size(64, 2, 4, 2, 96)
SMALL = Shape(
    name="small",
    family="qwen2",
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=96,
    vocab=44,
    tied=False,
    biases=True,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the shape ``SMALL`` that never ends a turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", TINY)
        return save("tiny", tmp_path_factory.mktemp("models") / "base")


# ---- shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # the numbers that the models' files on the hub hold
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_parameters_of_well_known_models(name: str, parameters: int):
    assert PRESETS[name].parameters == parameters


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers(family: str, tied: bool, tmp_path: Path):
    options = {"head_dim": 16} if family != "qwen2" else {}
    if family == "llama":
        options |= {"attention_bias": True, "mlp_bias": True}
    config = AutoConfig.for_model(
        family,
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    assert shape_of(str(tmp_path), "model.path").parameters == sum(p.numel() for p in model.parameters())


def test_hub_names_of_well_known_models():
    assert known_by("Qwen/Qwen2.5-1.5B-Instruct") is PRESETS["qwen2.5-1.5b"]
    assert known_by("meta-llama/Llama-3.1-8B") is PRESETS["llama-3.1-8b"]
    assert known_by("Qwen/Qwen2.5-14B-Instruct") is PRESETS["qwen2.5-14b"]
    assert known_by("someone/Qwen2.5-1.5Bx") is None


def test_an_adapter_by_hand():
    # rank 16 at 1.5B: q and o 1536+1536, k and v 1536+256, gate, up and down 1536+8960, in 28 layers
    assert PRESETS["qwen2.5-1.5b"].adapter(16) == 28 * 16 * (2 * 3072 + 2 * 1792 + 3 * 10496) == 18_464_768
    assert SMALL.adapter(4, ["q_proj"]) == 2 * 4 * 128
    with pytest.raises(UserError, match=r"model\.lora\.targets.*Did you mean 'q_proj'"):
        SMALL.adapter(4, "q_pro")


# ---- memory


def test_what_stays_on_a_gpu_by_hand():
    shape = PRESETS["qwen2.5-1.5b"]
    pair = {name: Held(shape=shape, trained=True) for name in ("thinker", "solver")}
    P = shape.parameters
    rest = {"weight_bytes": 4, "decoder_bytes": 2, "copies": True}
    assert standing(pair, Placement.DDP, 8, **rest) == (8 * P, 16 * P, 4 * P, 4 * P)
    assert standing(pair, Placement.FSDP2, 8, **rest) == (P, 2 * P, 4 * P, P / 2)
    assert standing(pair, Placement.OFFLOAD, 8, **rest) == (0, 0, 4 * P, 0)
    frozen = pair | {"solver": Held(shape=shape, trained=False)}
    assert standing(frozen, Placement.DDP, 1, **rest) == (8 * P, 8 * P, 4 * P, 4 * P)
    adapters = {name: Held(shape=shape, trained=True, adapter=1_000) for name in pair}
    assert standing(adapters, Placement.LORA, 8, **rest) == (4 * P + 8_000, 16_000, 2 * P, 4_000)
    assert standing(adapters, Placement.LORA, 8, **rest, own_decoders=True) == (4 * P + 8_000, 16_000, 4 * P, 4_000)


def decoder_bytes(copy: Weights) -> int:
    tensors = [copy.embed, copy.norm, copy.head.weight]
    for layer in copy.layers:
        for name in layer.__slots__:
            part = getattr(layer, name)
            tensors += [part.weight, part.bias] if isinstance(part, Product) else [part]
    return sum({id(t): t.nbytes for t in tensors if t is not None}.values())


def real_bytes(policies: dict) -> tuple[int, int, int]:
    """Weights, optimiser and decoders of loaded policies after one update of each, as the tensors have them."""
    weights = {id(p): p for policy in policies.values() for p in policy.model.parameters()}
    optimizer = decoders = 0
    for policy in policies.values():
        made = PolicyOptimizer(policy, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
        for p in made.parameters.values():
            p.grad = torch.ones_like(p)
        made.step(1.0)
        optimizer += sum(t.nbytes for t in made.tensors().values() if t.dim())
        if policy.adapter is None or not decoders:
            decoders += decoder_bytes(Weights.of(policy.model, dtype=torch.bfloat16, adapter=policy.adapter))
    return sum(p.nbytes for p in weights.values()), optimizer, decoders


@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_what_stays_is_what_real_tensors_take(base: Path, sharing: str, agents: int):
    specs = [PolicySpec(name=f"a{i}", agents=(f"a{i}",), model_path=str(base)) for i in range(agents)]
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
    policies = load_policies(specs, sharing=sharing, lora=lora)
    placement = Placement.LORA if sharing == "lora" else Placement.DDP
    adapter = SMALL.adapter(4) if sharing == "lora" else 0
    held = {name: Held(shape=SMALL, trained=True, adapter=adapter) for name in policies}
    assert real_bytes(policies) == standing(held, placement, 1, weight_bytes=4, decoder_bytes=2, copies=True)[:3]


def test_adapters_at_1_5b_are_nearly_free():
    """One decoder for all: within 1.15 of one agent's memory up to seven agents. A decoder for each would not be, at two."""
    shape = PRESETS["qwen2.5-1.5b"]
    P, a = shape.parameters, shape.adapter(16)
    assert lora_ratio(shape, 2) == pytest.approx((6 * P + 28 * a) / (6 * P + 16 * a))
    assert lora_ratio(shape, 2, own_decoders=True) == pytest.approx((8 * P + 28 * a) / (6 * P + 16 * a))
    assert lora_ratio(shape, 2, own_decoders=True) == pytest.approx(1.346, abs=1e-3)
    assert [lora_ratio(shape, k) <= 1.15 for k in (2, 4, 7, 8)] == [True, True, True, False]


def test_activations_are_what_autograd_saves(base: Path):
    """In float32 the CPU's and the GPU's passes save nearly the same; texts long enough for the fused attention."""
    policy = load_policies([PolicySpec(name="a", agents=("a",), model_path=str(base))])["a"]
    rows = [
        TrainRow(
            policy="a",
            agent="a",
            prompt_ids=(5,) * 100,
            token_ids=(7, *range(2, 30), n + 2) * 4,
            engine_logprobs=(-1.0,) * 120,
            advantage=1.0,
            segment=n,
        )
        for n in range(8)
    ]
    layout, saved = Layout.of(rows, torch.device("cpu")), {}
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        forward.hidden_states(policy.model, layout, torch.float32)
    real = sum(storage.nbytes() for storage in saved.values())
    expected = memory.activation_bytes(SMALL, len(layout.ids_M), checkpointing=False, compute=4)
    assert 0.7 < real / expected < 1.4


def test_checkpointing_and_shards_save_memory():
    shape = PRESETS["qwen2.5-1.5b"]
    plain, again = (memory.activation_bytes(shape, 16_384, checkpointing=c) for c in (False, True))
    assert again < plain / 5
    # (4 + 2) * 1536 a layer, and once 2 * 6 * 1536 + 2 * ((36 + 4) * 128 + 4 * 8960)
    assert again == 16_384 * (28 * 6 * 1536 + 2 * 6 * 1536 + 2 * ((3 * 12 + 2 * 2) * 128 + 4 * 8960))
    copied = {"compute": 2, "weight_bytes": 4}
    assert memory.copied_bytes(shape, checkpointing=False, **copied) == 2 * (shape.body + shape.embedding)
    assert memory.copied_bytes(shape, checkpointing=False, compute=2, weight_bytes=2) == 0


def test_cache_and_logits_by_hand():
    shape = PRESETS["qwen2.5-1.5b"]
    assert memory.cache_bytes(shape, 10, 100, 2) == 10 * 100 * 28 * 2 * 2 * 128 * 2
    assert memory.logit_bytes(shape, 100) == 4 * 100 * 151_936 + 8 * 100 * 151_936
    assert memory.logit_bytes(shape, 10**6) == 4 * 2**31 + 8 * 2**26


# ---- work


def asked_for(prompts: int, samples: int, prompt: int, length: int, most: int | None = None) -> list[Asked]:
    return [
        Asked(prompt_ids=Tokens(prompt, (0, i)), max_tokens=most or length, length=length)
        for i in range(prompts)
        for _ in range(samples)
    ]


CASES = {
    "think_solve v1": ("think_solve", {"kind": "ccpo_v1"}, {}),
    "think_solve v2": ("think_solve", {"kind": "ccpo_v2"}, {}),
    "think_solve shared": ("think_solve", {"kind": "shared"}, {}),
    "think_solve draws": ("think_solve", {"kind": "removal", "pairing": "mean"}, {"rollout": {"draws": 3}}),
    "think_solve tree": ("think_solve", {"kind": "auto"}, {"rollout": {"branch": [2, 2]}}),
    "chain": ("chain", {"kind": "removal"}, {}),
    "chain shapley": ("chain", {"kind": "shapley"}, {}),
    "voting": ("voting", {"kind": "ccpo_v1"}, {}),
    "alternating": ("think_solve", {"kind": "ccpo_v2"}, {"trainer": {"schedule": "alternating"}}),
    "blank": ("think_solve", {"kind": "removal"}, {"rollout": {"removal": "blank"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_a_real_step(case: str, base: Path, tmp_path: Path):
    team, credit, settings = CASES[case]
    recipe = {
        "run": {"dir": str(tmp_path / "run")},
        "team": TEAMS[team],
        "task": {"kind": "digit_sum", "digits": [7, 7]},
        "model": {"path": str(base)},
        "credit": credit,
        "trainer": {"steps": 5, **settings.get("trainer", {})},
        "rollout": {
            "prompts": 3,
            "samples": 4,
            "max_tokens": 6,
            "max_prompt_tokens": 512,
            "truncated": "keep",
            **settings.get("rollout", {}),
        },
        "optim": {"lr": 1e-6},
    }
    subject = make_subject(load_recipe(recipe))
    work = work_of(subject, Lengths(share=1.0, spread=0.0))[0]
    step = OurStep(base, tmp_path / "run", team, recipe)
    step()
    for kind in ("joint", "counterfactual", "prefill"):
        assert work.tokens[kind] == step.metrics[f"tokens/{kind}"], kind
    assert work.generated == step.tokens
    lengths = [a.length for calls in work.calls.values() for call in calls for a in call]
    assert sum(lengths) == work.generated
    trained = sum(v for k, v in step.metrics.items() if k.startswith("actor/") and k.endswith("/tokens"))
    assert 0 < work.trained <= trained


def test_a_large_step_is_played_in_part_and_repeated(base: Path):
    recipe = {
        "team": TEAMS["think_solve"],
        "task": {"kind": "digit_sum", "digits": [7, 7]},
        "model": {"path": str(base)},
        "credit": "ccpo_v1",
        "rollout": {"prompts": 96, "samples": 2, "max_tokens": 6, "truncated": "keep"},
        "optim": {"minibatches": 4},
    }
    subject = make_subject(load_recipe(recipe))
    (work,) = work_of(subject, Lengths(share=1.0, spread=0.0))
    assert (work.problems, work.played) == (96, 32)
    assert work.tokens == {
        "joint": 96 * 2 * 12,
        "counterfactual": 96 * 2 * 6,
        "rating": 0,
        "prefill": work.tokens["prefill"],
    }
    assert [len(call) for call in work.calls["solver"]] == [384]
    assert len({a.prompt_ids for a in work.calls["thinker"][0]}) == 96
    parts = work.rows["thinker"]
    assert len(parts) == 4
    assert len({row.segment for rows in parts for row in rows}) == sum(map(len, parts))


def test_lengths_are_drawn_as_asked():
    import random

    rng = random.Random(0)
    many = [Lengths(share=0.25, spread=0.5).draw("a", 1_000, rng) for _ in range(4_000)]
    assert sum(many) / len(many) == pytest.approx(250, rel=0.03)
    assert torch.tensor(many).double().std().item() == pytest.approx(125, rel=0.1)
    assert Lengths(share=1.0, spread=0.0).draw("a", 7, rng) == 7
    assert {Lengths(seen={"a": [3, 5]}).draw("a", 4, rng) for _ in range(30)} == {3, 4}


def test_batches_are_those_of_the_decoder():
    asked = asked_for(4, 8, 20, 10, most=12)
    parts = cut(asked, SMALL, 256)  # 256 // 32 = 8 rows
    assert [p.rows for p in parts] == [8, 8, 8, 8]
    assert [p.prefill for p in parts] == [20, 20, 20, 20]
    # the first token comes from the prompt; ended rows are looked for every fourth token
    assert sum(s.steps for s in parts[0].spans) == 11
    ragged = batch_of([replace(a, length=4 if i % 2 else 12) for i, a in enumerate(asked)])
    assert [(s.rows, s.steps) for s in ragged.spans] == [(32, 3), (16, 4), (16, 4)]


def test_rows_are_dealt_as_the_learner_deals_them(base: Path):
    rows = [
        TrainRow(
            policy="a",
            agent="a",
            prompt_ids=Tokens(10, (0, i // 4)),
            token_ids=Tokens(6, i),
            engine_logprobs=(0.0,) * 6,
            advantage=1.0,
            segment=i,
        )
        for i in range(16)
    ]
    config = load_recipe({})
    (one,) = micro_batches(rows, config, 1, padded=False)
    assert (one.tokens, one.scored) == (4 * 10 + 16 * 5, 96)
    assert one.squares == 4 * 100 + 16 * (16**2 - 10**2)
    (padded,) = micro_batches(rows, config, 1, padded=True)
    assert (padded.tokens, padded.scored) == (256, 96)
    assert sum(m.scored for m in micro_batches(rows, config, 4, padded=False)) == 24


# ---- seconds


@given(
    rows=st.integers(1, 64),
    length=st.integers(1, 200),
    prompt=st.integers(1, 300),
    more=st.integers(1, 50),
    ranks=st.integers(1, 16),
)
@settings(max_examples=60, deadline=None)
def test_more_work_takes_longer_and_more_cards_do_not(rows: int, length: int, prompt: int, more: int, ranks: int):
    shape, roof = PRESETS["qwen2.5-0.5b"], Roofline(card=CARDS["h100"])

    def seconds(asked: list[Asked]) -> float:
        return sum(roof.prefill(shape, b) + roof.decode(shape, b) for b in cut(asked, shape, 1 << 40))

    asked = asked_for(rows, 1, prompt, length)
    assert seconds(asked) <= seconds(asked_for(rows + more, 1, prompt, length))
    assert seconds(asked) <= seconds(asked_for(rows, 1, prompt, length + more))
    assert seconds(asked) <= seconds(asked_for(rows, 1, prompt + more, length)) * (1 + 1e-9)
    assert seconds(of_rank(asked, ranks)) <= seconds(asked)
    faster = Roofline(card=CARDS["b200"])
    assert faster.decode(shape, batch_of(asked)) <= roof.decode(shape, batch_of(asked))


@given(count=st.floats(1, 1e12), ranks=st.integers(1, 1_024))
def test_a_ring_by_its_formula(count: float, ranks: int):
    machine = Machine(roof=Roofline(card=CARDS["h100"]), ranks=ranks, network=50e9)
    wire = 450e9 if ranks <= 8 else 50e9
    expected = 0.0 if ranks == 1 else 2 * (ranks - 1) / ranks * count / wire + 2 * (ranks - 1) * 5e-6
    assert machine.all_reduce(count) == pytest.approx(expected)


def test_operations_by_hand():
    shape = PRESETS["qwen2.5-0.5b"]
    # q 896^2, k and v 896*128, o 896^2, three of 896*4864, in 24 layers
    body = 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert shape.body == body == 357_826_560
    batch = batch_of(asked_for(2, 3, 100, 5))
    assert prefill_flops(shape, batch) == 2 * body * 200 + 2 * 24 * 14 * 64 * 2 * 100**2 + 2 * 151_936 * 896 * 2
    plain = update_flops(shape, 1_000, 0, 300, checkpointing=False)
    assert plain == 6 * body * 1_000 + 6 * 151_936 * 896 * 300
    assert update_flops(shape, 1_000, 0, 300, checkpointing=True) - plain == 2 * body * 1_000


def on_h200(case: dict) -> float:
    """What the roofline says of a measurement in ``docs/benchmarks/gpu.json``, over what was measured."""
    s, roof = case["shape"], Roofline(card=CARDS["h200"])
    size = SIZES[s.get("size", "0.5B")]
    shape = Shape(
        name="", family="qwen2", hidden=size.hidden, layers=size.layers, heads=size.heads, kv_heads=size.kv_heads,
        head_dim=size.hidden // size.heads, mlp=size.mlp, vocab=size.vocab, tied=False, biases=True,
    )  # fmt: skip
    measured = case["medians"].get("ccpo") or case["medians"]["one prefill"]
    seconds = 0.0
    if case["part"] in ("decode", "step"):
        new, prompt = s.get("new") or s["tokens"], s.get("prompt", 11)
        asked = asked_for(s.get("prompts") or s["rows"], s.get("samples", 1), prompt, new)
        seconds += sum(roof.prefill(shape, b) + roof.decode(shape, b) for b in cut(asked, shape, 65_536))
    if case["part"] in ("update", "step"):
        P, N, p, n = s["prompts"], s["samples"], s.get("prompt", 11), s.get("new") or s["tokens"]
        squares = P * p * p + P * N * (n * n + 2 * p * n)
        flops = update_flops(shape, P * p + P * N * (n - 1), squares, P * N * n, checkpointing=False)
        seconds += roof.update(shape, flops) + roof.optimizer(shape.parameters, 2 if case["part"] == "step" else 4)
    return seconds / measured


def test_the_shares_of_the_cards_figures_reproduce_the_measurements():
    """Four numbers for six measurements; the whole step has work beside the model that the roofline leaves out."""
    cases = json.loads((ROOT / "docs/benchmarks/gpu.json").read_text())["comparisons"]
    found = {case["name"].split(";")[0]: round(on_h200(case), 2) for case in cases}
    assert len(found) == 6
    assert all(0.75 < ratio < 1.15 for ratio in found.values()), found
    page = (ROOT / "docs/plan.md").read_text()
    for name, ratio in found.items():
        assert f"| {name} | {ratio:.2f} |" in page, (name, ratio)


def test_the_tokenizer_of_the_random_models_is_read(base: Path):
    subject = make_subject(load_recipe({"model": {"path": str(base)}, "task": {"kind": "digit_sum"}}))
    ask = "12+3"
    assert subject.readers["thinker"].encode(ask) == tokenizer().encode(ask)
    assert not subject.assumed
