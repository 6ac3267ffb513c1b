"""Adapters that speak through one decoder say what they would say through decoders of their own."""

from __future__ import annotations

import pytest
import torch

import ccpo
from ccpo.build import prepare
from ccpo.config import load_recipe
from ccpo.crew import Crew
from ccpo.engines import make_engine
from ccpo.engines.adapters import AdapterEngine, SharedDecoder
from ccpo.engines.budget import LEAST, decode_budget
from ccpo.kernels.compiled import library
from ccpo.runs import Reporter, model_paths
from ccpo.types import Request
from test_ahead import said
from test_engines import TOKENIZER, prompts, two_adapters
from test_trainer import metrics, recipe

torch.set_num_threads(1)
LORA = {"sharing": "lora", "lora": {"rank": 2}}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def asked() -> list[Request]:
    return [Request(prompt_ids=tuple(p), max_tokens=6, seed=seed) for seed, p in enumerate(prompts(5, 9, 7))]


def test_one_decoder_speaks_for_each_adapter():
    model = two_adapters()
    shared = SharedDecoder(make_engine(model, TOKENIZER, dtype=torch.float32, adapter="thinker"))
    names = ("thinker", "solver", "solver", "thinker")
    own = {n: make_engine(model, TOKENIZER, dtype=torch.float32, adapter=n) for n in set(names)}
    engines = {n: AdapterEngine(shared, n) for n in own}
    for name in names:
        told, want = engines[name].generate(asked()), own[name].generate(asked())
        assert [c.token_ids for c in told] == [c.token_ids for c in want]
        assert [c.logprobs for c in told] == [c.logprobs for c in want]
    assert engines["thinker"].decoded_tokens == own["thinker"].decoded_tokens
    assert engines["thinker"].prefill_tokens == own["thinker"].prefill_tokens


def test_an_update_is_heard_whoever_spoke_last():
    model = two_adapters()
    shared = SharedDecoder(make_engine(model, TOKENIZER, dtype=torch.float32, adapter="thinker"))
    engines = {n: AdapterEngine(shared, n) for n in ("thinker", "solver")}
    for last in engines:
        engines[last].generate(asked())
        before = {n: e.generate(asked()) for n, e in sorted(engines.items(), key=lambda pair: pair[0] == last)}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.solver" in name:
                    parameter.add_(1.0)
        engines["solver"].refresh()
        after = {n: e.generate(asked()) for n, e in engines.items()}
        assert after["thinker"] == before["thinker"]
        assert after["solver"] != before["solver"]
        assert after["solver"] == make_engine(model, TOKENIZER, dtype=torch.float32, adapter="solver").generate(asked())


def held(crew: Crew) -> int:
    """Bytes of all tensors that policies and decoders hold; each storage once."""
    bodies = {id(e.shared.body if isinstance(e, AdapterEngine) else e): e for e in crew.engines.values()}
    found: dict[int, int] = {}
    for engine in bodies.values():
        weights = (engine.shared.body if isinstance(engine, AdapterEngine) else engine).weights
        tensors = [weights.embed, weights.norm]
        for product in [
            weights.head,
            *(p for layer in weights.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)),
        ]:
            tensors += [t for t in (product.weight, product.bias) if t is not None]
        found |= {t.data_ptr(): t.nbytes for t in tensors}
    for policy in crew.policies.values():
        found |= {p.data_ptr(): p.nbytes for p in policy.model.parameters()}
    return sum(found.values())


def test_a_second_agent_is_nearly_free(tmp_path):
    def crew(kind: str, **options: object) -> Crew:
        team = {"kind": kind, "prompts": None} if kind == "single" else {"kind": kind, "k": 4}
        settings = recipe(
            tmp_path / kind, team=team, model={**LORA, "decode": "float32"}, credit={"kind": "shared"}, **options
        )
        setup = prepare(load_recipe(settings))
        return Crew(setup, model_paths(setup, Reporter())[0])

    wide = {
        "bootstrap": {
            "hidden": 128,
            "mlp": 384,
            "steps": 1,
            "noisy_steps": 0,
            "batch": 4,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
        }
    }
    one, four = crew("single", **wide), crew("chain", **wide)
    assert len(four.engines) == 4
    assert held(four) <= 1.15 * held(one)


def test_a_team_of_adapters_trains_and_goes_on_bit_for_bit(tmp_path):
    ccpo.train(recipe(tmp_path / "whole", model=LORA))
    ccpo.train(recipe(tmp_path / "cut", model=LORA, trainer={"steps": 2}))
    ccpo.resume(tmp_path / "cut", steps=4)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert said(tmp_path / "whole", 4) == said(tmp_path / "cut", 4)


def test_adapters_that_are_changed_while_they_speak_have_decoders_of_their_own(tmp_path):
    setup = prepare(load_recipe(recipe(tmp_path / "run", model=LORA, trainer={"async_depth": 1})))
    crew = Crew(setup, model_paths(setup, Reporter())[0])
    assert not any(isinstance(engine, AdapterEngine) for engine in crew.engines.values())
    assert len({id(engine) for engine in crew.engines.values()}) == 2


# ---- what decoders may hold


def test_a_budget_by_hand():
    rest = {"total": 80e9, "coming": 30e9, "token": 57_344}
    assert decode_budget(free=66e9, **rest) == int(0.8 * 16e9 / 57_344) == 223_214
    assert decode_budget(free=20e9, **rest) == LEAST  # nothing is left: what it always was


@pytest.mark.parametrize(("sharing", "decoders"), [("separate", 2), ("lora", 1), ("shared", 1)])
def test_decoders_share_what_training_leaves(tmp_path, sharing, decoders):
    setup = prepare(load_recipe(recipe(tmp_path / "run", model={**LORA, "sharing": sharing})))
    crew = Crew(setup, model_paths(setup, Reporter())[0])
    engines = {id(e): e for e in crew._natives}.values()
    assert len(engines) == decoders
    assert {e.max_batch_tokens for e in engines} == {LEAST}  # a CPU
    crew._share_out(10**9, 2 * 10**9)
    trained = [sum(p.nbytes for p in policy.parameters().values()) for policy in crew.policies.values()]
    width = crew._natives[0].weights.attention_dtype.itemsize
    assert width == (2 if library() else 4)
    token = decoders * 2 * 2 * 1 * 16 * width  # keys and values, layers, key heads, channels
    want = int(0.8 * (10**9 - 2 * sum(trained) - max(trained) - 0.25 * 2 * 10**9) / token)
    assert {e.max_batch_tokens for e in engines} == {want}


def test_a_recipe_can_say_how_many(tmp_path):
    setup = prepare(load_recipe(recipe(tmp_path / "run", rollout={"decode_tokens": 300})))
    crew = Crew(setup, model_paths(setup, Reporter())[0], train=False)
    assert {e.max_batch_tokens for e in crew._natives} == {300}
