"""The vLLM adapter against a strict stand-in over a real tiny model: colocated and as a server, full weights and adapters."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from pathlib import Path

import pytest
import torch

import ccpo
import fake_vllm
from ccpo.config import load_recipe
from ccpo.crew import pick_device
from ccpo.engines.vllm import ColocatedHost, Hosts, VllmSettings, check_installed, kernel_rank
from ccpo.engines.vllm_server import ServerHost
from ccpo.errors import EndpointFailure, RunFailure, UserError
from ccpo.learner import PolicySpec, load_policies
from ccpo.types import FinishReason, Request
from fake_vllm import LLM, serving_vllm
from test_trainer import TINY, metrics, same, weights
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
TOKENIZER = tiny_tokenizer()
SETTINGS = VllmSettings(length=64, dtype="float32")


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    fake_vllm.install(monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two models of one shape with other weights, and one of another shape."""
    found = {}
    for name, keys in (("a", {"seed": 0}), ("b", {"seed": 1}), ("wide", {"seed": 0, "intermediate_size": 96})):
        found[name] = str(tmp_path_factory.mktemp("models") / name)
        tiny_model(**keys).save_pretrained(found[name])
        TOKENIZER.save_pretrained(found[name])
    return found


def policies(*paths: str, sharing: str = "separate", **lora):
    specs = [PolicySpec(name=f"p{i}", agents=(f"p{i}",), model_path=path) for i, path in enumerate(paths)]
    return list(load_policies(specs, sharing=sharing, lora={"rank": 2, **lora}).values())


def ask(text: str = "1+2=", seed: int = 5, **keys) -> Request:
    return Request(prompt_ids=tuple(TOKENIZER(text)["input_ids"]), seed=seed, **{"max_tokens": 8, **keys})


def rescore(policy, request: Request, token_ids) -> torch.Tensor:
    """The live model's own log-probs of the tokens, at the request's temperature."""
    policy.activate()
    ids = torch.tensor([[*request.prompt_ids, *token_ids]])
    with torch.no_grad():
        logits_TV = policy.model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    logprob_TV = (logits_TV / (request.temperature or 1.0)).log_softmax(-1)
    return logprob_TV.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def nudge(policy, seed: int) -> None:
    """What an update does: other weights in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def check_speaks_as(policy, engine, **keys) -> None:
    requests = [ask(seed=s, **keys) for s in range(4)]
    for request, done in zip(requests, engine.generate(requests), strict=True):
        expected = rescore(policy, request, done.token_ids)
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)


# --- colocated


def test_policies_of_one_shape_share_an_instance_and_each_speaks_with_its_own_present_weights(folders):
    a, b = policies(folders["a"], folders["b"])
    hosts = Hosts(SETTINGS)
    first, second = (hosts.engine(p.model, p.tokenizer, None) for p in (a, b))
    assert len(LLM.made) == 1
    for _ in range(2):
        check_speaks_as(a, first)
        check_speaks_as(b, second, temperature=0.7)
    nudge(a, 1)
    first.refresh()
    check_speaks_as(a, first, temperature=0.0)
    check_speaks_as(a, first)
    calls = LLM.made[0].calls
    assert calls.count("reload_weights") == 5  # a b a b, and a after its update; then a speaks again as it is
    assert calls[-5:] == ["generate 4", "reload_weights", "reset", "generate 4", "generate 4"]


def test_weights_are_not_handed_over_twice(folders):
    (a,) = policies(folders["a"])
    engine = Hosts(SETTINGS).engine(a.model, a.tokenizer, None)
    for _ in range(3):
        engine.generate([ask()])
    assert LLM.made[0].calls == ["reload_weights", "reset", *["generate 1"] * 3]


def test_an_instance_sleeps_during_updates_and_gets_its_weights_before_its_cache(folders):
    (a,) = policies(folders["a"])
    hosts = Hosts(SETTINGS)
    engine = hosts.engine(a.model, a.tokenizer, None)
    check_speaks_as(a, engine)
    hosts.rest()
    hosts.rest()  # asleep already
    nudge(a, 2)
    engine.refresh()
    check_speaks_as(a, engine)
    hosts.rest()
    check_speaks_as(a, engine)  # not updated, but what sleeps at level 2 is gone
    awake = ["wake weights", "reload_weights", "wake kv_cache", "reset", "generate 4"]
    assert LLM.made[0].calls == ["reload_weights", "reset", "generate 4", "sleep 2", *awake, "sleep 2", *awake]


def test_without_sleep_nothing_sleeps(folders):
    (a,) = policies(folders["a"])
    hosts = Hosts(VllmSettings(length=64, dtype="float32", sleep=False))
    engine = hosts.engine(a.model, a.tokenizer, None)
    engine.generate([ask()])
    hosts.rest()
    engine.generate([ask()])
    assert not any(call.startswith(("sleep", "wake")) for call in LLM.made[0].calls)


def test_models_of_two_shapes_need_two_instances_which_cannot_sleep(folders):
    a, wide = policies(folders["a"], folders["wide"])
    hosts = Hosts(SETTINGS)
    hosts.engine(a.model, a.tokenizer, None)
    with pytest.raises(UserError, match=r"different shapes or tokenizers.*set model\.vllm\.sleep: false"):
        hosts.engine(wide.model, wide.tokenizer, None)
    LLM.made.clear()
    hosts = Hosts(VllmSettings(length=64, dtype="float32", sleep=False))
    for policy in (a, wide):
        check_speaks_as(policy, hosts.engine(policy.model, policy.tokenizer, None))
    assert len(LLM.made) == 2


def test_adapters_sit_on_one_base_and_every_version_has_a_number_of_its_own(folders):
    a, b = policies(folders["a"], folders["a"], sharing="lora")
    for i, policy in enumerate((a, b)):
        nudge(policy, i)
    hosts = Hosts(VllmSettings(length=64, dtype="float32", adapters=2, rank=2))
    engines = [hosts.engine(p.model, p.tokenizer, p.adapter) for p in (a, b)]
    for policy, engine in zip((a, b), engines, strict=True):
        check_speaks_as(policy, engine)
    hosts.rest()
    nudge(a, 7)
    engines[0].refresh()
    for policy, engine in zip((a, b), engines, strict=True):
        check_speaks_as(policy, engine)
    (llm,) = LLM.made
    assert {number: name for number, (name, _) in llm.core.adapters.items()} == {1: "p0#1", 2: "p1#2", 3: "p0#3"}
    assert llm.calls == [
        "generate 4",
        "generate 4",
        "sleep 1",
        "wake weights",
        "wake kv_cache",
        "generate 4",
        "generate 4",
    ]
    paths = [Path(path) for _, path in llm.core.adapters.values()]
    assert [p.exists() for p in paths] == [False, True, True]  # an old version is deleted
    hosts.close()
    assert not any(p.exists() for p in paths)


def test_the_stand_in_notices_an_adapters_number_that_is_used_again(folders):
    (a,) = policies(folders["a"], sharing="lora")
    hosts = Hosts(VllmSettings(length=64, dtype="float32", adapters=1, rank=2))
    engine = hosts.engine(a.model, a.tokenizer, a.adapter)
    engine.generate([ask()])
    LLM.made[0].core.adapters[2] = ("another", "elsewhere")
    engine.refresh()
    with pytest.raises(AssertionError, match="go on with the adapter"):
        engine.generate([ask()])


def test_the_stand_in_notices_old_weights_and_old_prefixes(folders):
    (a,) = policies(folders["a"])
    llm = Hosts(SETTINGS).engine(a.model, a.tokenizer, None).host.llm
    params = [fake_vllm.SamplingParams(seed=1, logprobs=0)]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(a.model.named_parameters())})
    with pytest.raises(AssertionError, match="reset_prefix_cache was forgotten"):
        llm.generate([{"prompt_token_ids": [5]}], params)
    llm.sleep(level=2)
    with pytest.raises(RuntimeError, match="asleep"):
        llm.generate([{"prompt_token_ids": [5]}], params)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter([])})
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fake_vllm.SamplingParams(best_of=2)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        LLM(model=folders["a"], swap_space=4)


def test_equal_prompts_with_other_seeds_are_other_samples_and_equal_seeds_the_same(folders):
    (a,) = policies(folders["a"])
    engine = Hosts(SETTINGS).engine(a.model, a.tokenizer, None)
    done = engine.generate([ask(seed=s) for s in (1, 2, 3, 1)])
    assert done[0] == done[3]
    assert len({c.token_ids for c in done}) == 3
    assert (engine.prefill_tokens, engine.decoded_tokens) == (16, sum(len(c.token_ids) for c in done))


def test_completions_end_as_they_do_in_the_other_engines(folders):
    (a,) = policies(folders["a"])
    engine = Hosts(SETTINGS).engine(a.model, a.tokenizer, None)
    done = engine.generate([ask(seed=s, max_tokens=40) for s in range(40)])
    by_finish = {c.finish: c for c in done}
    assert {FinishReason.EOS, FinishReason.LENGTH} <= set(by_finish)
    assert by_finish[FinishReason.EOS].token_ids[-1] == TOKENIZER.eos_token_id
    assert "<eos>" not in by_finish[FinishReason.EOS].text
    assert len(by_finish[FinishReason.LENGTH].token_ids) == 40
    whole = by_finish[FinishReason.LENGTH]
    stop = next(
        whole.text[i : i + 2]
        for i in range(10, 30)
        if whole.text[i : i + 2].isprintable() and len(whole.text[i : i + 2]) == 2
    )
    seed = done.index(whole)
    (cut,) = engine.generate([ask(seed=seed, max_tokens=40, stop=(stop,))])
    assert cut.finish is FinishReason.STOP
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_requests_that_vllm_cannot_decode_are_refused(folders):
    (a,) = policies(folders["a"])
    engine = Hosts(SETTINGS).engine(a.model, a.tokenizer, None)
    assert engine.positions == 64
    for keys, says in (
        ({"temperature": 2.5}, r"vLLM takes 0 \(greedy\) and 0.01 to 2"),
        ({"max_tokens": 61}, "64 positions"),
        ({"temperature": 0.005}, r"0\.01"),
    ):
        with pytest.raises(UserError, match=says):
            engine.generate([ask(**keys)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"finish_reason": "abort"}, "ended a completion with 'abort'"),
        ({"finish_reason": "stop"}, "without an end token or stop string"),
        ({"logprobs": float("nan")}, "log-probs that are none"),
        ({"logprobs": -9999.0}, "log-probs that are none"),
    ],
)
def test_a_completion_that_cannot_be_is_a_failure(folders, monkeypatch, change, says):
    (a,) = policies(folders["a"])
    engine = Hosts(SETTINGS).engine(a.model, a.tokenizer, None)
    real = fake_vllm.Core.sample

    def sample(self, ids, params, lora):
        out = real(self, ids, params, lora)
        out.token_ids, out.finish_reason = out.token_ids[:3], change.get("finish_reason", "length")
        value = change.get("logprobs", -1.0)
        out.logprobs = [{t: fake_vllm.Logprob(value)} for t in out.token_ids]
        return out

    monkeypatch.setattr(fake_vllm.Core, "sample", sample)
    with pytest.raises(RunFailure, match=says):
        engine.generate([ask(seed=3)])


def test_vllm_in_another_process_is_refused(folders, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    (a,) = policies(folders["a"])
    with pytest.raises(UserError, match="could not be handed weights; unset it"):
        ColocatedHost(a.model, SETTINGS)


def test_ranks_are_those_that_have_kernels():
    assert [kernel_rank(r) for r in (1, 2, 8, 17, 512)] == [1, 8, 8, 32, 512]
    with pytest.raises(UserError, match=r"model\.lora\.rank is 600"):
        kernel_rank(600)


# --- a server


def hosts_of(server, **keys) -> Hosts:
    def make(model, settings):
        return ServerHost(model, settings, url=server.url, address="127.0.0.1", concurrency=4)

    return Hosts(VllmSettings(length=64, dtype="float32", **keys), make)


def test_a_server_gets_each_policys_weights_before_it_speaks(folders):
    a, b = policies(folders["a"], folders["b"])
    with serving_vllm(folders["a"]) as server:
        hosts = hosts_of(server)
        first, second = (hosts.engine(p.model, p.tokenizer, None) for p in (a, b))
        check_speaks_as(a, first)
        check_speaks_as(b, second)
        hosts.rest()
        check_speaks_as(b, second)
        nudge(a, 3)
        first.refresh()
        check_speaks_as(a, first, temperature=0.5)
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert server.calls == ["/init_weight_transfer_engine", *update * 3]


def test_a_server_loads_each_version_of_an_adapter_and_drops_the_one_before(folders):
    a, b = policies(folders["a"], folders["a"], sharing="lora")
    with serving_vllm(folders["a"], lora=True) as server:
        hosts = hosts_of(server, adapters=2, rank=2)
        engines = [hosts.engine(p.model, p.tokenizer, p.adapter) for p in (a, b)]
        for policy, engine in zip((a, b), engines, strict=True):
            nudge(policy, 5)
            check_speaks_as(policy, engine)
        nudge(a, 6)
        engines[0].refresh()
        check_speaks_as(a, engines[0])
        assert set(server.named) == {"p1#2", "p0#3"}
        hosts.close()


def test_a_server_that_refuses_or_goes_is_a_failure_that_says_how_to_start_it(folders):
    (a,) = policies(folders["a"])
    with serving_vllm(folders["a"]) as server:
        engine = hosts_of(server).engine(a.model, a.tokenizer, None)
        del server.routes["/inference/v1/generate"]
        with pytest.raises(
            EndpointFailure, match=r"refuses /inference/v1/generate \(status 404.*VLLM_SERVER_DEV_MODE=1"
        ):
            engine.generate([ask()])
        server.routes["/inference/v1/generate"] = lambda **_: {
            "choices": [{"token_ids": [5], "logprobs": None, "finish_reason": "stop"}]
        }
        with pytest.raises(EndpointFailure, match="cannot be read"):
            engine.generate([ask()])
    with pytest.raises(EndpointFailure, match="does not answer"):
        engine.generate([ask()])


# --- from a recipe


def recipe(folder: Path, **sections) -> dict:
    data = json.loads(json.dumps(TINY))
    data["run"] |= {"dir": str(folder)}
    data["model"] = {"engine": "vllm", "decode": "float32", "compute": "float32"}
    data["trainer"] = {"steps": 2, "save_every": 1}
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return data


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("sharing", ["separate", "shared", "lora"])
def test_a_team_is_trained_through_vllm(tmp_path, sharing):
    model = {"sharing": sharing, **({"lora": {"rank": 2}} if sharing == "lora" else {})}
    ccpo.train(recipe(tmp_path / "run", model=model))
    assert len(LLM.made) == 1
    for line in metrics(tmp_path / "run"):  # the learner's log-probs are those of what spoke: every weight arrived
        assert line["actor/thinker/mismatch_max"] < 1e-3
        assert line["actor/solver/mismatch_max"] < 1e-3
    sleeps = [c for c in LLM.made[0].calls if c.startswith("sleep")]
    assert sleeps == ["sleep 1" if sharing == "lora" else "sleep 2"] * 2  # once an update
    # and a run that goes on is the same
    LLM.made.clear()
    ccpo.train(recipe(tmp_path / "cut", model=model, trainer={"steps": 1}))
    LLM.made.clear()
    ccpo.resume(tmp_path / "cut", steps=2)
    assert same(weights(tmp_path / "run", 2), weights(tmp_path / "cut", 2))
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def script():
    file = Path(__file__).parents[1] / "benchmarks" / "check_vllm.py"
    spec = importlib.util.spec_from_file_location("check_vllm", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_team_is_trained_through_a_server(tmp_path, folders):
    with serving_vllm(folders["a"], length=256) as server:
        data = recipe(tmp_path / "run", model={"path": folders["a"], "vllm": {"url": server.url}}, trainer={"steps": 1})
        data |= {"eval": {"problems": 2, "ablations": False}, "credit": {"kind": "shared"}}
        data["rollout"] |= {"truncated": "keep"}
        del data["task"]
        ccpo.train(data, task=script().PAID_BY_LENGTH)
    (line,) = metrics(tmp_path / "run")
    assert line["actor/thinker/mismatch_max"] < 1e-3
    assert line["actor/solver/mismatch_max"] < 1e-3
    assert server.calls.count("/finish_weight_update") == 6  # thinker and solver: before the step, in it, after it
    assert LLM.made == []


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_script_for_a_real_gpu_runs_on_the_stand_in(tmp_path, capsys, lora):
    path = str(tmp_path / "model")
    tiny_model(max_position_embeddings=2048).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    options = [path, "--dtype", "float32", "--tokens", "4", *(["--lora"] if lora else [])]
    check = script()
    assert check.main(options) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["logprobs"]) == {
        "as loaded",
        "after an update",
        "the other policy",
        "back again",
        "greedy",
        "cool",
    }
    assert max(v["max"] for v in report["logprobs"].values()) < 1e-3
    assert len(report["steps"]) == 2
    assert not check.agrees({"x": {"mean": 0.2}}, [{"mismatch_mean": 0.0}], 0.1)
    assert not check.agrees({"x": {"mean": float("nan")}}, [], 0.1)


def test_a_recipe_that_vllm_cannot_serve_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"rollout\.top_p and \.top_k: agent 'thinker' is trained on samples that are cut"
    ):
        ccpo.train(recipe(tmp_path / "run", rollout={"top_p": 0.9}))
    with pytest.raises(UserError, match=r"rollout\.temperature: it is 3; vLLM takes 0 and 0.01 to 2"):
        ccpo.train(recipe(tmp_path / "run", rollout={"temperature": 3.0}))
    with pytest.raises(UserError, match=r"model\.vllm: url cannot be used"):
        ccpo.train(recipe(tmp_path / "run", model={"vllm": {"url": "nonsense"}}))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(UserError, match=r"model\.vllm\.url: .* does not answer .*start the server \(.*vllm serve"):
        ccpo.train(recipe(tmp_path / "run", model={"vllm": {"url": f"http://127.0.0.1:{port}"}}))
    assert not (tmp_path / "run").exists()


def test_vllm_that_is_not_there_or_a_machine_without_a_gpu_is_found_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ccpo.engines.vllm.DEVICES", ("cuda",))
    with pytest.raises(
        UserError,
        match=r"model\.engine is 'vllm', which runs on a GPU, and this run is on cpu; set model\.engine: auto",
    ):
        ccpo.train(recipe(tmp_path / "run", run={"device": "cpu"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; .*pip install 'ccpo\[vllm\]'"):
        check_installed("cuda")
    with pytest.raises(UserError, match="not installed"):
        pick_device(load_recipe("demo", ["model.engine=vllm"]))
    assert not (tmp_path / "run").exists()
