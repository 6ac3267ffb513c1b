"""The engines: equal to transformers' own forward pass, equal to one another, and indifferent to what is batched."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812

from ccpo.engines import layers, native, prefix
from ccpo.engines.base import batches, make_engine
from ccpo.engines.cache import Cache
from ccpo.engines.finish import decoder
from ccpo.engines.graphs import Arena, rounded
from ccpo.errors import RunFailure, UserError
from ccpo.families import compute_dtype, unsupported
from ccpo.types import FinishReason, Request
from tiny import FAMILIES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
TOKENIZER = tiny_tokenizer(pad=False)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "qwen2": ("qwen2", {}),
    "qwen2-untied-all-heads": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {}),
    "qwen3-one-key-head-bias": ("qwen3", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}),
}


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(5, 101) for _ in range(length)) for length in lengths]


def mixed_requests(count: int = 24, seed: int = 0) -> list[Request]:
    draw = random.Random(seed)
    few = prompts(3, 9, 17, 40, seed=seed)
    return [
        Request(
            prompt_ids=draw.choice(few),
            seed=draw.randrange(-(2**63), 2**64),
            max_tokens=draw.choice((1, 5, 30)),
            temperature=draw.choice((0.0, 0.7, 1.0)),
            top_p=draw.choice((1.0, 0.8)),
            top_k=draw.choice((0, 10)),
            stop=draw.choice(((), ("a", "Z9"))),
        )
        for _ in range(count)
    ]


def forward_logprobs(model, prompt, token_ids, temperature=1.0):
    """What transformers' own forward pass says of a completion."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [layers.PREFILL_TOKENS, 40])
def test_native_logits_equal_transformers(variant, chunk, monkeypatch):
    monkeypatch.setattr(layers, "PREFILL_TOKENS", chunk)
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, **overrides)
    asked = prompts(2, 17, 90, 131)
    with torch.no_grad():
        want = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in asked])
    engine = make_engine(model, TOKENIZER, kind="native", dtype=torch.float32)
    assert torch.allclose(engine.logits(asked), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_native_logprobs_equal_the_forward_pass(variant):
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, **overrides)
    model.generation_config.eos_token_id = None
    engine = make_engine(model, TOKENIZER, kind="native", dtype=torch.float32)
    for prompt, temperature in zip(prompts(2, 17, 90), (1.0, 0.6, 0.0), strict=True):
        asked = [Request(prompt_ids=prompt, seed=s, max_tokens=40, temperature=temperature) for s in range(3)]
        for done in engine.generate(asked):
            want = forward_logprobs(model, prompt, done.token_ids, temperature or 1.0)
            assert torch.allclose(torch.tensor(done.logprobs), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_agree_and_ignore_the_models_generation_defaults(family):
    model = tiny_model(family)
    model.generation_config.update(repetition_penalty=1.7, temperature=0.2, top_k=3, do_sample=True)
    hf = make_engine(model, TOKENIZER, kind="transformers", max_batch_tokens=400)
    auto = make_engine(model, TOKENIZER, dtype=None if family == "gpt2" else torch.float32)
    assert type(auto).__name__ == ("TransformersEngine" if family == "gpt2" else "NativeEngine")
    asked = mixed_requests()
    for request, a, b in zip(asked, auto.generate(asked), hf.generate(asked), strict=True):
        assert (a.token_ids, a.text, a.finish) == (b.token_ids, b.text, b.finish)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        want = forward_logprobs(model, request.prompt_ids, a.token_ids, request.temperature or 1.0)
        assert a.logprobs == pytest.approx(want.tolist(), abs=1e-4)
        assert all(type(i) is int for i in a.token_ids)
        assert all(type(x) is float for x in a.logprobs)
    assert auto.decoded_tokens == hf.decoded_tokens == sum(len(c.token_ids) for c in auto.generate(asked))
    assert model.generation_config.repetition_penalty == 1.7


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_sample_depends_on_seed_and_prompt_alone(kind):
    engine = make_engine(tiny_model("qwen3"), TOKENIZER, kind=kind, dtype=torch.float32)
    asked = mixed_requests(16, seed=1)
    together = engine.generate(asked)
    assert len({c.token_ids for c in together}) > 8
    assert [engine.generate([r])[0].token_ids for r in asked] == [c.token_ids for c in together]
    assert [c.token_ids for c in engine.generate(asked[::-1])][::-1] == [c.token_ids for c in together]


def test_small_batches_give_the_same(monkeypatch):
    model, asked = tiny_model("llama"), mixed_requests(20, seed=2)
    want = [c.token_ids for c in make_engine(model, TOKENIZER, dtype=torch.float32).generate(asked)]
    monkeypatch.setattr(native, "LOGITS", 101 * 3)  # three rows at a time
    tight = make_engine(model, TOKENIZER, dtype=torch.float32, max_batch_tokens=150)
    assert [c.token_ids for c in tight.generate(asked)] == want


def test_equal_prompts_are_prefilled_once():
    engine = make_engine(tiny_model(), TOKENIZER, dtype=torch.float32)
    (prompt,) = prompts(20)
    asked = [Request(prompt_ids=prompt, seed=s, max_tokens=8) for s in range(16)]
    done = engine.generate(asked)
    assert engine.prefill_tokens == 20
    assert engine.decoded_tokens == sum(len(c.token_ids) for c in done)
    assert len({c.token_ids for c in done}) > 12


def test_finished_rows_leave_the_batch(monkeypatch):
    widths: list[int] = []
    step = layers.TorchLayers.step
    monkeypatch.setattr(layers.TorchLayers, "step", lambda *a: (widths.append(len(a[2])), step(*a))[1])
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = 0  # a logit of 0: with these seeds no row ends early
    engine = make_engine(model, TOKENIZER, dtype=torch.float32)
    asked = [Request(prompt_ids=p, seed=i + 10, max_tokens=4 * i + 4) for i, p in enumerate(prompts(*range(4, 12)))]
    done = engine.generate(asked)
    assert [c.finish for c in done] == [FinishReason.LENGTH] * 8
    assert widths == [8] * 7 + [6] * 8 + [4] * 4 + [3] * 4 + [2] * 4 + [1] * 4
    widths.clear()
    stop = done[-1].text[5:8]
    (done,) = engine.generate([replace(asked[-1], stop=(stop,))])
    assert done.finish is FinishReason.STOP
    assert len(done.token_ids) <= len(widths) + 1 <= len(done.token_ids) + native.CHECK


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixed_addresses_give_the_same(variant):
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, **overrides)
    plain, fixed = (make_engine(model, TOKENIZER, kind="native", dtype=torch.float32) for _ in range(2))
    fixed.layers.arena = Arena(fixed.weights, fixed.layers._step)
    for seed in range(3):  # batches of other shapes in the same memory
        asked = mixed_requests(10 * seed + 14, seed=seed)
        for a, b in zip(plain.generate(asked), fixed.generate(asked), strict=True):
            assert (a.token_ids, a.finish) == (b.token_ids, b.finish)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    shapes = set(fixed.layers.arena.fixed)
    assert len(shapes) > 1 and all(r % 8 == 0 and c % 64 == 0 for r, c in shapes)
    before = {id(f): dict(f.recordings) for f in fixed.layers.arena.fixed.values()}
    fixed.generate(mixed_requests(34, seed=2))
    assert {id(f): f.recordings for f in fixed.layers.arena.fixed.values()} == before  # nothing is recorded twice


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shared_cache_gives_the_same(variant, monkeypatch):
    """Uneven groups, padded prompts, rows and whole prompts that leave, and a prompt with a single row."""
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, **overrides)
    engine = make_engine(model, TOKENIZER, kind="native", dtype=torch.float32)
    left: list[int] = []
    select = prefix.SharedCache.select
    monkeypatch.setattr(prefix.SharedCache, "select", lambda *a: (left.append(len(a[1])), select(*a))[1])
    for seed in range(3):
        asked = [*mixed_requests(30, seed=seed), Request(prompt_ids=prompts(21)[0], seed=1, max_tokens=30)]
        monkeypatch.setattr(prefix, "SAVED", 10**9)
        before, plain = len(left), engine.generate(asked)
        assert len(left) == before
        monkeypatch.setattr(prefix, "SAVED", 0)
        for request, a, b in zip(asked, plain, engine.generate(asked), strict=True):
            assert (a.token_ids, a.text, a.finish) == (b.token_ids, b.text, b.finish)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
            want = forward_logprobs(model, request.prompt_ids, b.token_ids, request.temperature or 1.0)
            assert b.logprobs == pytest.approx(want.tolist(), abs=1e-4)
    assert left, "rows left a shared cache"


def test_long_prompts_of_many_samples_are_shared(monkeypatch):
    made: list[tuple[int, int]] = []
    of = prefix.SharedCache.of
    monkeypatch.setattr(
        prefix.SharedCache,
        "of",
        lambda w, cache, owner, steps: made.append((len(owner), cache.filled)) or of(w, cache, owner, steps),
    )
    engine = make_engine(tiny_model(), TOKENIZER, dtype=torch.float32)
    long, short = prompts(300, 8)
    engine.generate([Request(prompt_ids=short, seed=s, max_tokens=4) for s in range(32)])
    assert made == []
    engine.generate([Request(prompt_ids=long, seed=s, max_tokens=4) for s in range(32)])
    assert made == [(32, 300)]


def test_a_shared_cache_of_extreme_scores_is_finite():
    """The two parts of attention are weighed by differences of logarithms: neither overflows, whichever part has all the weight."""
    w = make_engine(tiny_model(), TOKENIZER, kind="native", dtype=torch.float32).weights
    for sign in (1.0, -1.0):
        cache = Cache.empty(w, [6, 4], 0)
        for layer in range(len(w.layers)):
            cache.keys[layer].normal_(generator=torch.Generator().manual_seed(1))
            cache.values[layer].normal_(generator=torch.Generator().manual_seed(2))
        owner, heads = torch.tensor([0, 0, 1]), (w.kv_heads, w.head_dim)
        shared = prefix.SharedCache.of(w, cache, owner, 3)
        query, value = torch.full((3, w.heads, w.head_dim), 1e3), torch.randn(3, *heads)
        key = torch.full((3, *heads), sign * 10.0)
        found = shared.attend(0, query, key, value)
        plain = Cache.empty(w, [6, 4], 0).select(owner)
        plain.keys, plain.values = [k[owner] for k in cache.keys], [v[owner] for v in cache.values]
        plain.widen(3)
        assert torch.allclose(found, plain.attend(0, query, key, value), atol=1e-5)


def test_rows_and_columns_come_in_few_sizes():
    sizes = sorted({rounded(n, 8) for n in range(1, 1_025)})
    assert sizes[:12] == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert sizes[-4:] == [640, 768, 896, 1_024]
    assert all(n <= rounded(n, 8) <= max(n + 7, 1.25 * n + 8) for n in range(1, 1_025))


def test_end_tokens_of_generation_config_and_tokenizer_both_end():
    model = tiny_model()
    model.generation_config.eos_token_id = [60, 61]
    engine = make_engine(model, TOKENIZER, dtype=torch.float32)
    done = engine.generate([Request(prompt_ids=(9, 9), seed=s, max_tokens=100) for s in range(60)])
    ends = {c.token_ids[-1] for c in done if c.finish is FinishReason.EOS}
    assert ends == {1, 60, 61}
    for c in done:
        assert not {1, 60, 61} & set(c.token_ids[:-1])
        spoken = c.token_ids[:-1] if c.finish is FinishReason.EOS else c.token_ids
        assert c.text == TOKENIZER.decode(spoken, skip_special_tokens=True)
        assert len(c.logprobs) == len(c.token_ids)
        assert c.finish is FinishReason.EOS or len(c.token_ids) == 100


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_stop_string_ends_the_text_before_it(kind):
    tokenizer = tiny_tokenizer(bpe=True)
    model = tiny_model(vocab=len(tokenizer))
    engine = make_engine(model, tokenizer, kind=kind, dtype=torch.float32)
    decode = decoder(tokenizer)
    free = [Request(prompt_ids=(9, 9), seed=s, max_tokens=60) for s in range(12)]
    stopped = 0
    for request, whole in zip(free, engine.generate(free), strict=True):
        found = re.search("[^\ufffd]{3}", whole.text[5:])
        if found is None:
            continue
        stop = found[0]
        before = engine.decoded_tokens
        (done,) = engine.generate([replace(request, stop=("never there", stop))])
        assert done.finish is FinishReason.STOP
        assert done.text == whole.text[: whole.text.index(stop)]
        assert done.token_ids == whole.token_ids[: len(done.token_ids)]
        assert stop in decode(done.token_ids)
        assert stop not in decode(done.token_ids[:-1])
        assert engine.decoded_tokens - before == len(done.token_ids)
        stopped += 1
    assert stopped >= 3


def test_refresh_reads_the_weights_in_place():
    model = tiny_model("qwen3", tie_word_embeddings=False, attention_bias=True)
    engine = make_engine(model, TOKENIZER, dtype=torch.float32)
    asked, old = prompts(5, 9), engine.weights.layers[0].qkv.weight.data_ptr()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        want = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in asked])
    assert not torch.allclose(engine.logits(asked), want, atol=1e-2)
    engine.refresh()
    assert torch.allclose(engine.logits(asked), want, atol=1e-4)
    assert engine.weights.layers[0].qkv.weight.data_ptr() == old


def two_adapters():
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
    thinker = LoraConfig(r=4, lora_alpha=16, target_modules=everything, init_lora_weights=False)
    solver = LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(tie_word_embeddings=False), thinker, adapter_name="thinker")
    model.add_adapter("solver", solver)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_each_adapter_speaks_for_itself():
    model = two_adapters()
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # frozen by the user
    asked, said = mixed_requests(8, seed=3), []
    for name in ("thinker", "solver"):
        auto = make_engine(model, TOKENIZER, dtype=torch.float32, adapter=name)
        assert isinstance(auto, native.NativeEngine)
        hf = make_engine(model, TOKENIZER, kind="transformers", adapter=name)
        said.append([c.token_ids for c in auto.generate(asked)])
        trained = [p.requires_grad for p in model.parameters()]
        assert said[-1] == [c.token_ids for c in hf.generate(asked)]
        assert model.active_adapters == ["thinker"]
        assert trained == [p.requires_grad for p in model.parameters()]
        model.set_adapter(name)
        with torch.no_grad():
            want = model(torch.tensor([asked[0].prompt_ids])).logits[0, -1]
        assert torch.allclose(auto.logits([asked[0].prompt_ids])[0], want, atol=1e-4)
        model.set_adapter("thinker")
    assert said[0] != said[1]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_adapters_that_cannot_be_merged_go_to_transformers():
    plan = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(tiny_model(), plan, adapter_name="thinker")
    assert "variant" in unsupported(model, "thinker")
    assert type(make_engine(model, TOKENIZER)).__name__ == "TransformersEngine"
    with pytest.raises(UserError, match=r"'thinkr' is unknown.*Did you mean 'thinker'"):
        make_engine(model, TOKENIZER, adapter="thinkr")
    with pytest.raises(UserError, match="has no adapters"):
        make_engine(tiny_model(), TOKENIZER, adapter="thinker")


def test_the_transformers_engine_leaves_the_model_as_it_was():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    engine = make_engine(model, TOKENIZER)
    asked = [Request(prompt_ids=(9, 9), seed=1, max_tokens=20)]
    assert engine.generate(asked) == engine.generate(asked)  # no dropout
    assert modes == [m.training for m in model.modules()]
    engine.refresh()


def test_bfloat16_stays_near_float32():
    model = tiny_model()
    asked = prompts(4, 20, 33)
    exact = make_engine(model, TOKENIZER, dtype=torch.float32).logits(asked).log_softmax(-1)
    for kind in ("native", "transformers"):
        engine = make_engine(model, TOKENIZER, kind=kind, dtype=torch.bfloat16)
        assert engine.dtype == torch.bfloat16
        done = engine.generate([Request(prompt_ids=p, seed=0, max_tokens=1) for p in asked])
        for row, completion in enumerate(done):
            assert completion.logprobs[0] == pytest.approx(exact[row, completion.token_ids[0]].item(), abs=0.1)


def test_default_dtypes():
    assert make_engine(tiny_model(), TOKENIZER).dtype == compute_dtype(torch.device("cpu"))
    assert compute_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert make_engine(tiny_model("gpt2"), TOKENIZER).dtype == torch.float32
    with pytest.raises(UserError, match="leave the engine's dtype unset"):
        make_engine(tiny_model("gpt2").bfloat16(), TOKENIZER, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "overrides", "word"),
    [
        ("gpt2", {}, "family 'gpt2'"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
    ],
)
def test_unsupported_models_are_named_and_still_run(family, overrides, word):
    model = tiny_model(family, **overrides)
    assert word in unsupported(model)
    with pytest.raises(UserError, match=word):
        make_engine(model, TOKENIZER, kind="native")
    (done,) = make_engine(model, TOKENIZER).generate([Request(prompt_ids=(9, 10, 11), seed=0, max_tokens=12)])
    want = forward_logprobs(model, (9, 10, 11), done.token_ids)
    assert done.logprobs == pytest.approx(want.tolist(), abs=1e-3)


BAD = [
    ({"prompt_ids": ()}, "request 1 has an empty prompt"),
    ({"max_tokens": 0}, "max_tokens 0"),
    ({"prompt_ids": (5,) * 500, "max_tokens": 13}, "prompt of 500 tokens and asks for 13 more, but the model has 512"),
    ({"prompt_ids": (5, 101)}, "token id 101, but the model knows ids 0 to 100"),
    ({"prompt_ids": (5, -1)}, "token id -1"),
    ({"temperature": -0.5}, "temperature -0.5"),
    ({"temperature": float("nan")}, "temperature nan"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"top_p": 1.5}, "top_p 1.5"),
    ({"top_k": -1}, "top_k -1"),
    ({"stop": ("a", "")}, "empty stop string"),
]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_bad_requests_are_refused_before_any_work(family):
    engine = make_engine(tiny_model(family), TOKENIZER)
    good = {"prompt_ids": (5, 6), "seed": 0, "max_tokens": 4}
    for wrong, words in BAD:
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            engine.generate([Request(**good), Request(**{**good, **wrong})])
    assert engine.prefill_tokens == engine.decoded_tokens == 0
    assert engine.generate([]) == []
    (edge,) = engine.generate([Request(prompt_ids=(5,) * 500, seed=0, max_tokens=12)])
    assert 1 <= len(edge.token_ids) <= 12


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_a_failure_not_a_text(family, temperature):
    model = tiny_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    engine = make_engine(model, TOKENIZER)
    with pytest.raises(RunFailure, match="not finite"):
        engine.generate([Request(prompt_ids=(7, 8), seed=0, max_tokens=6, temperature=temperature)])


def test_unknown_kinds_and_budgets():
    with pytest.raises(UserError, match="Did you mean 'native'"):
        make_engine(tiny_model(), TOKENIZER, kind="nativ")
    with pytest.raises(UserError, match="max_batch_tokens is 0"):
        make_engine(tiny_model(), TOKENIZER, max_batch_tokens=0)


def test_batches_keep_the_budget_and_lose_nothing():
    draw = random.Random(0)
    sizes = [draw.randrange(1, 30) for _ in range(200)]
    asked = [Request(prompt_ids=(5,) * n, seed=0, max_tokens=draw.randrange(1, 20)) for n in sizes]
    cut = batches(asked, max_batch_tokens=120, max_rows=7)
    assert sorted(itertools.chain(*cut)) == list(range(200))
    for indices in cut:
        rows = [asked[i] for i in indices]
        cost = len(rows) * (max(len(r.prompt_ids) for r in rows) + max(r.max_tokens for r in rows))
        assert len(rows) <= 7
        assert cost <= 120 or len(rows) == 1
    assert len(cut) < 120


def test_sampled_tokens_follow_the_models_distribution():
    engine = make_engine(tiny_model(), TOKENIZER, dtype=torch.float32)
    prompt, count = (9, 20, 33), 4000
    done = engine.generate([Request(prompt_ids=prompt, seed=s, max_tokens=1) for s in range(count)])
    expected = engine.logits([prompt])[0].softmax(-1) * count
    observed = F.one_hot(torch.tensor([c.token_ids[0] for c in done]), 101).sum(0)
    frequent = expected >= 5
    statistic = ((observed - expected)[frequent] ** 2 / expected[frequent]).sum().item()
    degrees = int(frequent.sum())
    assert degrees > 50
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_the_seams_import_no_transformers():
    code = "import sys, ccpo.engines.base, ccpo.engines.native; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_in_bfloat16_hangs_on_the_model_alone_and_is_nearly_as_exact(monkeypatch):
    model = tiny_model("qwen2", hidden_size=64)
    requests = [Request(prompt_ids=tuple(range(5, 15 + i % 7)), max_tokens=8, seed=i) for i in range(24)]
    errors = {}
    for wide in (0, 10**6):
        monkeypatch.setattr("ccpo.engines.weights.WIDE", wide)
        monkeypatch.setattr(native, "fits", lambda *_: False)
        engine = make_engine(model, tiny_tokenizer(), dtype=torch.bfloat16)
        assert engine.weights.attention_dtype == (torch.float32 if wide else torch.bfloat16)
        apart = []
        for request, said in zip(requests, engine.generate(requests), strict=True):
            ids = torch.tensor([[*request.prompt_ids, *said.token_ids]])
            logprobs = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
            exact = logprobs.gather(1, torch.tensor(said.token_ids)[:, None])[:, 0]
            apart.append((exact - torch.tensor(said.logprobs)).abs())
        errors[wide] = torch.cat(apart).mean().item()
    assert 0 < errors[0] < 2 * errors[10**6] < 0.2
