"""Policies: who owns which weights, and what is said of a model that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ccpo
from ccpo.errors import UserError
from ccpo.learner import PolicySpec, Reference, freeze_copy, load_policies
from ccpo.learner.logprobs import training
from ccpo.learner.lora import check_targets
from tiny import FAMILIES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("models") / "base")


def save(folder: Path, family: str = "qwen2", **tokenizer: bool) -> str:
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer(**tokenizer).save_pretrained(folder)
    return str(folder)


def spec(name: str, path: str, **more) -> PolicySpec:
    return PolicySpec(name=name, agents=(name,), model_path=path, **more)


def logits(policy, text: str = "hello") -> torch.Tensor:
    policy.activate()
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([policy.tokenizer.encode(text)])).logits


def test_separate_policies_of_one_path_are_separate_models(base):
    found = load_policies([spec("thinker", base), spec("solver", base)])
    a, b = found["thinker"], found["solver"]
    assert torch.equal(logits(a), logits(b))
    with torch.no_grad():
        next(iter(a.parameters().values())).add_(0.1)
    assert not torch.equal(logits(a), logits(b))
    assert a.trainable
    assert not a.model.training
    assert a.adapter is None


def test_weights_are_float32_unless_told_and_attention_is_eager_on_a_cpu(base):
    assert load_policies([spec("a", base)])["a"].model.dtype == torch.float32
    half = load_policies([spec("a", base)], weights=torch.bfloat16)["a"].model
    assert half.dtype == torch.bfloat16
    assert half.config._attn_implementation == "eager"
    assert load_policies([spec("a", base)], attention="sdpa")["a"].model.config._attn_implementation == "sdpa"


def test_a_shared_policy_serves_all_agents(base):
    shared = PolicySpec(name="shared", agents=("a", "b"), model_path=base)
    assert load_policies([shared], sharing="shared")["shared"].agents == ("a", "b")
    with pytest.raises(UserError, match=r"model\.sharing: separate"):
        load_policies([spec("a", base), spec("b", base)], sharing="shared")


def test_a_frozen_separate_policy_has_no_gradients(base):
    found = load_policies([spec("a", base, frozen=True), spec("b", base)])
    assert not any(p.requires_grad for p in found["a"].model.parameters())
    assert all(p.requires_grad for p in found["b"].model.parameters())


def test_adapters_share_one_frozen_base(base):
    found = load_policies([spec("a", base), spec("b", base)], sharing="lora", lora=LORA)
    a, b = found["a"], found["b"]
    assert a.model is b.model
    plain = load_policies([spec("a", base)])["a"]
    assert torch.equal(logits(a), logits(plain))  # B starts at 0
    with torch.no_grad():
        for name, parameter in a.parameters().items():
            if "lora_B" in name:
                parameter.normal_()
    assert torch.equal(logits(b), logits(plain))
    assert not torch.allclose(logits(a), logits(plain))
    a.activate()
    trained = {n for n, p in a.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".a." in n for n in trained)
    assert not set(map(id, a.parameters().values())) & set(map(id, b.parameters().values()))


def test_a_frozen_adapter_asks_for_no_gradient(base):
    found = load_policies([spec("a", base, frozen=True), spec("b", base)], sharing="lora", lora=LORA)
    found["a"].activate()
    assert not any(p.requires_grad for p in found["a"].model.parameters())


@pytest.mark.parametrize(
    "names", [("model", "layers"), ("mlp", "self_attn"), ("a", "ab"), ("lora_A", "weight"), ("default", "x")]
)
def test_agents_may_be_called_like_modules_or_like_each_other(base, names, tmp_path):
    from ccpo.learner.lora import load_adapter, save_adapter

    found = load_policies([spec(n, base) for n in names], sharing="lora", lora=LORA)
    first, second = (found[n] for n in names)
    assert len(first.parameters()) == len(second.parameters()) == 2 * 2 * 7  # A and B of 7 matrices in 2 layers
    with torch.no_grad():
        for p in first.parameters().values():
            p.normal_()
    save_adapter(first.model, names[0], tmp_path)
    load_adapter(second.model, names[1], tmp_path)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_adapters(family, tmp_path):
    found = load_policies([spec("a", save(tmp_path / family, family))], sharing="lora", lora=LORA)
    assert found["a"].parameters()
    assert logits(found["a"]).isfinite().all()


def test_a_saved_adapter_is_gone_on_from(base, tmp_path):
    from ccpo.learner.lora import save_adapter

    first = load_policies([spec("a", base)], sharing="lora", lora=LORA)["a"]
    with torch.no_grad():
        for p in first.parameters().values():
            p.normal_()
    (tmp_path / "adapter").mkdir()
    save_adapter(first.model, "a", tmp_path / "adapter")
    again = load_policies([spec("a", str(tmp_path / "adapter"))], sharing="lora", lora=LORA | {"rank": 9})["a"]
    assert torch.equal(logits(again), logits(first))
    with pytest.raises(UserError, match=r"model\.sharing: lora"):
        load_policies([spec("a", str(tmp_path / "adapter"))])


def test_another_rank_is_refused_with_the_tensor_named(base, tmp_path):
    from ccpo.learner.lora import load_adapter, save_adapter

    small, large = (load_policies([spec("a", base)], sharing="lora", lora=LORA | {"rank": r})["a"] for r in (2, 4))
    save_adapter(small.model, "a", tmp_path)
    with pytest.raises(UserError, match=r"lora_A.*\[2, 32\] there and \[4, 32\] here"):
        load_adapter(large.model, "a", tmp_path)
    with pytest.raises(UserError, match="not readable"):
        load_adapter(large.model, "a", tmp_path / "nowhere")


@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_a_frozen_copy_stays_as_it_was(base, sharing):
    policy = load_policies([spec("a", base), spec("b", base)], sharing=sharing, lora=LORA)["a"]
    with torch.no_grad():
        for p in policy.parameters().values():
            p.add_(0.05)
    before = logits(policy)
    copy = freeze_copy(policy)
    assert copy.name == "a@start"
    assert not copy.trainable
    assert torch.equal(logits(copy), before)
    with torch.no_grad():
        for p in policy.parameters().values():
            p.add_(0.05)
    assert torch.equal(logits(copy), before)
    assert not torch.equal(logits(policy), before)
    copy.activate()
    assert not any(p.requires_grad for p in copy.parameters().values())
    assert not set(copy.parameters()) ^ set(policy.parameters())


@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_the_reference_is_where_the_policy_began(base, sharing):
    policy = load_policies([spec("a", base)], sharing=sharing, lora=LORA)["a"]
    start, reference = logits(policy), Reference(policy)
    with torch.no_grad():
        for p in policy.parameters().values():
            p.add_(0.05)
    with reference.model() as model, torch.no_grad():
        assert torch.equal(model(input_ids=torch.tensor([policy.tokenizer.encode("hello")])).logits, start)
    assert not torch.equal(logits(policy), start)  # the adapter is on again


def test_only_the_update_has_dropout_and_only_the_adapters(base):
    policy = load_policies([spec("a", base)], sharing="lora", lora=LORA | {"dropout": 0.5})["a"]
    assert not any(m.training for m in policy.model.modules())
    with training(policy.model):
        on = [name for name, m in policy.model.named_modules() if m.training]
        assert on
        assert all(".lora_dropout." in name for name in on)
    assert not any(m.training for m in policy.model.modules())


def test_gradient_checkpointing_gives_the_same_gradient(base):
    grads = []
    for wanted in (False, True):
        policy = load_policies([spec("a", base)], gradient_checkpointing=wanted)["a"]
        calls = []
        policy.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with training(policy.model):
            policy.model(input_ids=torch.tensor([[7, 8, 9]]), use_cache=False).logits.logsumexp(-1).sum().backward()
        grads.append([p.grad for p in policy.parameters().values()])
        assert len(calls) == (2 if wanted else 1)  # computed again in the backward pass
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def refused(match: str, path: str, **options) -> None:
    with pytest.raises(UserError, match=match):
        load_policies([spec("a", path)], **options)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_absent(path):
    refused("does not exist", path)


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    refused(r"huggingface\.co cannot be reached \(no route to host\).*HF_HOME", "some/model")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    refused("cannot be loaded", "some/model-that-is-not-really-cached")


def test_a_hub_name_that_is_unknown_or_gated(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    for kind, text in ((errors.RepositoryNotFoundError, "there is no model"), (errors.GatedRepoError, "gated")):

        def absent(*_, kind=kind, **__):
            error = kind.__new__(kind)
            Exception.__init__(error, "404")
            raise error

        monkeypatch.setattr(huggingface_hub, "model_info", absent)
        refused(text, "some/model")


def test_what_is_neither_a_folder_nor_a_name():
    refused("neither a local folder nor a model name", "not a name!")


def test_a_file_an_empty_folder_and_another_kind_of_model(base, tmp_path):
    refused("is a file", str(Path(base) / "config.json"))
    (tmp_path / "empty").mkdir()
    refused("cannot be loaded", str(tmp_path / "empty"))
    other = shutil.copytree(base, tmp_path / "t5")
    (other / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 101}))
    refused("not a causal language model.*T5Config", str(other))


def test_weights_that_are_pickled_incomplete_or_broken(base, tmp_path):
    pickled = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused("no weights in safetensors", str(pickled))
    lacking = shutil.copytree(base, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    refused(r"incomplete.*model\.layers\.1\.mlp\.up_proj\.weight", str(lacking))
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    refused("broken", str(broken))


def test_a_tokenizer_needs_an_end_but_no_padding(base, tmp_path):
    assert load_policies([spec("a", save(tmp_path / "nopad", pad=False))])["a"].tokenizer.pad_token is None
    endless = shutil.copytree(base, tmp_path / "endless")
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    refused("no end token", str(endless))
    bare = shutil.copytree(base, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused("holds no tokenizer", str(bare))


def test_lora_targets_that_match_nothing(base):
    refused(
        r"match no module; the model has .*q_proj.*Did you mean 'q_proj'",
        base,
        sharing="lora",
        lora=LORA | {"targets": ["q_projj"]},
    )


def test_models_of_their_own_need_separate_weights(base, tmp_path):
    other = save(tmp_path / "other")
    with pytest.raises(UserError, match=r"agents\.b\.model.*model\.sharing: separate"):
        load_policies([spec("a", base), spec("b", other)], sharing="lora", lora=LORA)


def test_settings_that_cannot_be(base):
    refused("Did you mean 'separate'", base, sharing="seperate")
    if not torch.cuda.is_available():
        refused("no CUDA device", base, device="cuda")
    refused("flash_attention_2.*not installed", base, attention="flash_attention_2")
    with pytest.raises(UserError, match="names of their own"):
        load_policies([spec("a", base), spec("a", base)])


def test_an_adapter_that_is_not_one(base, tmp_path):
    for text, match in (
        ("{", "not readable"),
        ("{}", "does not name its base"),
        (json.dumps({"base_model_name_or_path": base}), "not readable|not a LoRA"),
    ):
        folder = tmp_path / str(len(text))
        folder.mkdir()
        (folder / "adapter_config.json").write_text(text)
        refused(match, str(folder), sharing="lora", lora=LORA)
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    (prefix / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base, "peft_type": "PREFIX_TUNING"})
    )
    refused("not a LoRA", str(prefix), sharing="lora", lora=LORA)


def test_sampling_settings_that_transformers_would_not_save(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "sampling")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 1})
    )
    model = load_policies([spec("a", str(folder))])["a"].model
    model.save_pretrained(tmp_path / "again")
    assert model.generation_config.eos_token_id == 1


def test_loading_is_silent(base, capfd):
    load_policies([spec("a", base), spec("b", base)], sharing="lora", lora=LORA)
    out, err = capfd.readouterr()
    assert not out + err


def test_targets_of_a_tiny_base_are_looked_at_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path / "cache"))
    sets = [f"run.dir={tmp_path / 'run'}", "model.sharing=lora", "model.lora.targets=[q_pro]"]
    with pytest.raises(UserError, match=r"'q_pro' match no module; .*Did you mean 'q_proj'"):
        ccpo.train("demo", sets)
    assert not list((tmp_path / "cache").glob("base-*"))


def test_a_look_at_targets_draws_no_random_numbers():
    model = tiny_model()
    state = torch.random.get_rng_state()
    check_targets(model, rank=2, alpha=4.0, dropout=0.0, targets="all-linear")
    assert torch.equal(torch.random.get_rng_state(), state)
