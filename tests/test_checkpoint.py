"""Checkpoints: what goes on from one goes on bit for bit, and what is damaged is refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import RunFailure, UserError
from ccpo.learner import (
    Learner,
    Policy,
    PolicySpec,
    TrainRow,
    checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_policies,
    save_checkpoint,
    verify_checkpoint,
)
from ccpo.learner.state import random_state, read_state, restore_random_state, write_state
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
AGENTS = ("thinker", "solver")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
STATE = {
    "credit": {"mean": 0.1 + 0.2, "tiny": 5e-324, "inf": math.inf},
    "list": [1, None, "x", True],
    "t": torch.arange(3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def make(base: str, sharing: str, frozen: str | None = None) -> tuple[dict[str, Policy], Learner]:
    torch.manual_seed(0)
    if sharing == "shared":
        specs = [PolicySpec(name="shared", agents=AGENTS, model_path=base, lr=1e-2)]
    else:
        specs = [PolicySpec(name=a, agents=(a,), model_path=base, lr=1e-2, frozen=a == frozen) for a in AGENTS]
    policies = load_policies(specs, sharing=sharing, lora=LORA)
    return policies, Learner(policies, total_steps=4, warmup_steps=2, decay="cosine", epochs=2, weight_decay=0.01)


def train(policies: dict[str, Policy], learner: Learner, steps: range, folder: Path) -> list[dict[str, float]]:
    metrics = []
    for step in steps:
        rng = random.Random(step)
        rows = [
            TrainRow(
                policy=name,
                agent=agent,
                prompt_ids=tuple(rng.randrange(5, 101) for _ in range(rng.randint(1, 5))),
                token_ids=(rng.randrange(5, 101), rng.randrange(5, 101)),
                engine_logprobs=(-4.0, -4.0),
                advantage=rng.gauss(0, 1),
                segment=i,
            )
            for name, policy in policies.items()
            if policy.trainable
            for agent in policy.agents
            for i in range(3)
        ]
        metrics.append(dict(learner.step([rows], step=step, failure_folder=folder).metrics))
    return metrics


def everything(policies: dict[str, Policy], learner: Learner) -> dict[str, torch.Tensor]:
    weights = {f"{n}/{k}": v.detach().clone() for n, p in policies.items() for k, v in p.parameters().items()}
    return weights | {f"{n}/{k}": v.clone() for n, o in learner.optimizers.items() for k, v in o.tensors().items()}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(base, tmp_path) -> Path:
    """A run folder with the checkpoints of steps 1 and 2."""
    policies, learner = make(base, "separate")
    for step in (0, 1):
        train(policies, learner, range(step, step + 1), tmp_path)
        save_checkpoint(tmp_path / "run", step + 1, policies, learner, STATE)
    return tmp_path / "run"


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "frozen"),
    [("separate", None), ("shared", None), ("lora", None), ("separate", "solver"), ("lora", "thinker")],
)
def test_a_resumed_run_is_the_same_bit_for_bit(base, tmp_path, sharing, frozen):
    policies, learner = make(base, sharing, frozen)
    metrics = train(policies, learner, range(4), tmp_path)
    straight = everything(policies, learner)

    policies, learner = make(base, sharing, frozen)
    train(policies, learner, range(2), tmp_path)
    half = everything(policies, learner)
    folder = save_checkpoint(tmp_path, 2, policies, learner, {})
    policies, learner = make(base, sharing, frozen)
    assert not identical(everything(policies, learner), half)
    assert load_checkpoint(folder, policies, learner) == (2, {})
    assert identical(everything(policies, learner), half)
    assert {p.version for p in policies.values()} == ({4, 0} if frozen else {4})
    assert train(policies, learner, range(2, 4), tmp_path) == metrics[2:]
    assert identical(everything(policies, learner), straight)


def test_saving_changes_nothing(base, tmp_path):
    policies, learner = make(base, "lora")
    train(policies, learner, range(1), tmp_path)
    before, noise = everything(policies, learner), torch.get_rng_state()
    save_checkpoint(tmp_path, 1, policies, learner, STATE)
    assert identical(everything(policies, learner), before)
    assert torch.equal(torch.get_rng_state(), noise)


def test_weights_are_loaded_into_the_live_model(saved, base):
    policies, _ = make(base, "separate")
    live = policies["solver"].model.model.embed_tokens.weight
    address, before = live.data_ptr(), live.detach().clone()
    load_checkpoint(find_checkpoint(saved), policies)
    assert live.data_ptr() == address
    assert not torch.equal(live, before)
    assert policies["solver"].model.lm_head.weight is policies["solver"].model.model.embed_tokens.weight


def test_untied_weights_come_back_too(tmp_path):
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    policies, learner = make(str(tmp_path / "base"), "separate")
    train(policies, learner, range(1), tmp_path)
    state = everything(policies, learner)
    assert "solver/lm_head.weight" in state
    folder = save_checkpoint(tmp_path, 1, policies, learner, {})
    policies, learner = make(str(tmp_path / "base"), "separate")
    load_checkpoint(folder, policies, learner)
    assert identical(everything(policies, learner), state)


def test_the_random_state_is_restored(saved, base):
    policies, _ = make(base, "separate")
    folder = find_checkpoint(saved)
    load_checkpoint(folder, policies)
    first = torch.rand(3)
    torch.rand(5)
    load_checkpoint(folder, policies)
    assert torch.equal(torch.rand(3), first)


# --- what others can open ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_an_agents_folder_opens_with_transformers(base, tmp_path, sharing):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policies, learner = make(base, sharing)
    train(policies, learner, range(1), tmp_path)
    folder = save_checkpoint(tmp_path, 1, policies, learner, {})
    for agent in AGENTS:
        policy = next(p for p in policies.values() if agent in p.agents)
        model = AutoModelForCausalLM.from_pretrained(folder / "agents" / agent, attn_implementation="eager")
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "agents" / agent).encode("1 + 2")])
        assert torch.equal(model.eval()(ids).logits, policy.model(ids).logits)
        link = folder / "agents" / agent
        assert link.is_symlink()
        assert not link.readlink().is_absolute()


def test_an_adapters_folder_opens_with_peft(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policies, learner = make(base, "lora")
    train(policies, learner, range(2), tmp_path)
    folder = save_checkpoint(tmp_path, 2, policies, learner, {})
    ids = torch.tensor([[7, 8, 9]])
    for agent in AGENTS:
        policies[agent].activate()
        wanted = policies[agent].model(ids).logits
        where = folder / "agents" / agent
        assert json.loads((where / "adapter_config.json").read_text())["base_model_name_or_path"] == base
        for model in (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), where),
            AutoModelForCausalLM.from_pretrained(where),
        ):
            assert torch.allclose(model.eval()(ids).logits, wanted, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    assert not torch.allclose(plain, wanted, atol=1e-3)


@pytest.mark.parametrize("sharing", ["separate", "shared", "lora"])
def test_a_checkpoint_can_be_where_policies_start(base, tmp_path, sharing):
    policies, learner = make(base, sharing)
    train(policies, learner, range(1), tmp_path)
    folder = save_checkpoint(tmp_path, 1, policies, learner, {})
    specs = [PolicySpec(name=n, agents=p.agents, model_path=str(folder / "policies" / n)) for n, p in policies.items()]
    again = load_policies(specs, sharing=sharing, lora=LORA)
    for name, policy in policies.items():
        assert identical(policy.parameters(), again[name].parameters())


def test_without_links_an_agents_folder_is_a_copy(base, tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError("not here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    policies, learner = make(base, "shared")
    folder = save_checkpoint(tmp_path, 1, policies, learner, {})
    assert (folder / "agents" / "solver" / "model.safetensors").is_file()
    assert verify_checkpoint(folder) == 1


def test_there_is_no_pickle(saved):
    kinds = {p.suffix for p in saved.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".safetensors", ".jinja"}


# --- extra state ------------------------------------------------------------------------------------------------------


def test_the_extra_state_comes_back_as_it_was(saved, base):
    policies, _ = make(base, "separate")
    step, state = load_checkpoint(find_checkpoint(saved), policies)
    assert step == 2
    tensor = state.pop("t")
    assert torch.equal(tensor, STATE["t"])
    assert state == {k: v for k, v in STATE.items() if k != "t"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(state=st.dictionaries(st.text(max_size=5), json_values, max_size=3))
@settings(deadline=None, max_examples=60)
def test_any_plain_state_round_trips(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    write_state(folder, state)
    assert read_state(folder) == state
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {1: 2}}, r"extra\.a has the key 1"),
        ({"a": [object()]}, r"extra\.a\[0\]"),
        ({"a": {"__tensor__": "b"}}, r"extra\.a has the key"),
        ({"a": {2, 3}}, "set"),
    ],
)
def test_a_state_that_would_come_back_changed_is_refused(base, tmp_path, state, place):
    policies, learner = make(base, "shared")
    with pytest.raises(ValueError, match=place):
        save_checkpoint(tmp_path, 1, policies, learner, state)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_random_state_is_of_torch():
    state = random_state()
    first = torch.rand(2)
    restore_random_state(state)
    assert torch.equal(torch.rand(2), first)


# --- keeping and finding ----------------------------------------------------------------------------------------------


def test_the_newest_are_kept_in_the_order_of_steps(base, tmp_path):
    policies, learner = make(base, "lora")
    assert find_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path) == []
    for step in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, policies, learner, {}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]
    assert find_checkpoint(tmp_path).name == "step-1000001"
    with pytest.raises(ValueError, match="at least 1"):
        save_checkpoint(tmp_path, 3, policies, learner, {}, keep=0)


def test_the_same_step_may_be_saved_again(base, tmp_path):
    policies, learner = make(base, "lora")
    save_checkpoint(tmp_path, 5, policies, learner, {"x": 1})
    folder = save_checkpoint(tmp_path, 5, policies, learner, {"x": 2})
    assert load_checkpoint(folder, policies, learner) == (5, {"x": 2})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_save_that_breaks_off_leaves_the_last_one(saved, base, monkeypatch, error):
    policies, learner = make(base, "separate")

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "write_manifest", broken)
    with pytest.raises(RunFailure if isinstance(error, OSError) else KeyboardInterrupt) as info:
        save_checkpoint(saved, 3, policies, learner, {})
    if isinstance(error, OSError):
        assert "No space left" in str(info.value)
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert verify_checkpoint(find_checkpoint(saved)) == 2


def test_what_a_kill_left_behind_is_not_taken_for_a_checkpoint_and_goes_with_the_next(saved, base):
    stale = saved / "checkpoints" / ".unfinished-12345"
    shutil.copytree(saved / "checkpoints" / "step-000002", stale, symlinks=True)
    assert find_checkpoint(saved).name == "step-000002"
    policies, learner = make(base, "separate")
    save_checkpoint(saved, 3, policies, learner, {})
    assert not stale.exists()
    assert [p.name for p in list_checkpoints(saved)] == ["step-000002", "step-000003"]


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "file",
    [
        "policies/solver/model.safetensors",
        "policies/thinker/config.json",
        "optimizers/solver.safetensors",
        "state.json",
        "state.safetensors",
    ],
)
def test_one_flipped_bit_is_refused_and_the_one_before_offered(saved, base, file):
    newest = find_checkpoint(saved)
    flip(newest / file)
    policies, learner = make(base, "separate")
    before, state = everything(policies, learner), torch.get_rng_state()
    with pytest.raises(UserError) as info:
        load_checkpoint(newest, policies, learner)
    for part in (str(newest), file, "checksum", "step-000001 before it is sound", f"--resume {saved}"):
        assert part in str(info.value)
    assert identical(everything(policies, learner), before)
    assert torch.equal(torch.get_rng_state(), state)
    shutil.rmtree(newest)  # what the message says to do
    assert load_checkpoint(find_checkpoint(saved), policies, learner)[0] == 1


def test_other_kinds_of_damage_are_named(saved):
    newest = find_checkpoint(saved)

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            verify_checkpoint(newest)

    with (newest / "state.json").open("a") as file:
        file.write(" ")
    refused(r"state\.json has \d+ bytes")
    (newest / "state.json").unlink()
    refused(r"state\.json is missing")
    (newest / "extra.bin").write_text("")
    refused(r"extra\.bin is not listed")
    for text in ("{", "[]", '{"format": 99}', '{"format": 1, "step": "x", "files": {}}'):
        (newest / "manifest.json").write_text(text)
        refused(r"manifest\.json is not readable")
    (newest / "manifest.json").unlink()
    refused(r"manifest\.json is not readable")


def test_when_all_are_damaged_there_is_nothing_to_offer(saved):
    for folder in list_checkpoints(saved):
        flip(folder / "state.json")
    with pytest.raises(UserError, match="no sound checkpoint before it"):
        verify_checkpoint(find_checkpoint(saved))
    with pytest.raises(UserError, match="there is no checkpoint"):
        verify_checkpoint(saved / "checkpoints" / "step-000099")


def test_a_checkpoint_of_another_team_is_refused(saved, base):
    policies, learner = make(base, "shared")
    with pytest.raises(UserError, match="solver, thinker, but the team has shared"):
        load_checkpoint(find_checkpoint(saved), policies, learner)


def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path):
    tiny_model(hidden_size=48).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    policies, learner = make(str(tmp_path / "wide"), "separate")
    with pytest.raises(UserError, match="does not fit the model"):
        load_checkpoint(find_checkpoint(saved), policies, learner)


def test_unfreezing_an_agent_needs_its_optimiser(base, tmp_path):
    policies, learner = make(base, "separate", frozen="solver")
    folder = save_checkpoint(tmp_path, 1, policies, learner, {})
    policies, learner = make(base, "separate")
    with pytest.raises(UserError, match="no optimiser of policy 'solver'"):
        load_checkpoint(folder, policies, learner)


def test_an_optimiser_of_other_parameters_is_refused(base):
    _, learner = make(base, "separate")
    for key, value in (("exp_avg/nobody.weight", torch.zeros(2)), ("exp_avg/model.norm.weight", torch.zeros(3))):
        with pytest.raises(UserError, match="no parameter of its name and shape"):
            learner.optimizers["solver"].load({key: value}, "file")
