"""Several processes with an agent behind an endpoint: the first alone asks, all hear, and all end when it gives up."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ccpo.comm import Comm, _packed, _unpacked
from ccpo.config import load_recipe
from ccpo.engines import sharded
from ccpo.engines.remote import BudgetSpent
from ccpo.errors import EndpointFailure, EndpointRefusal, LostContact, RunFailure, UserError
from ccpo.remotes import Remotes
from ccpo.types import Completion, FinishReason, Request
from endpoint import Body, Server, serving, status
from test_ranks import RECIPE, ccpo, newest, processes_of, same_weights, train
from test_remote_run import KEY, PROMPTS, solve


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXAMPLE_KEY", KEY)
        yield tmp_path_factory.mktemp("cache")


def recipe(path: Path, url: str, **remote) -> Path:
    data = yaml.safe_load(RECIPE.read_text())
    data["team"]["prompts"] = PROMPTS
    remote = {"url": url, "model": "big", "key_env": "EXAMPLE_KEY", "concurrency": 3, **remote}
    data["agents"] = {"solver": {"remote": remote}}
    data["trainer"]["steps"] = 2
    data["eval"] = {"problems": 4, "temperature": 0.5}
    path.write_text(yaml.safe_dump(data))
    return path


def paid(run: Path) -> list:
    """What was said and paid in two steps."""
    found = []
    for step in (1, 2):
        with gzip.open(run / "episodes" / f"step-{step:06d}.jsonl.gz", "rt") as file:
            groups = [json.loads(line) for line in file][1:]
        found += [(r["credit"], [t["text"] for t in r["turns"]]) for group in groups for r in group["rollouts"]]
    return found


def heard(server: Server) -> Counter:
    return Counter(json.dumps(body, sort_keys=True) for body in server.bodies)


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("remote/", "credit/", "tokens/"))} for line in lines]


@pytest.mark.slow
def test_the_first_process_alone_asks_and_the_credit_is_that_of_one_process(cache, tmp_path):
    asked = []
    for count in (1, 2):
        run = tmp_path / str(count)
        with serving(say=solve, models=["big"]) as server:
            where = recipe(tmp_path / "recipe.yaml", server.url)
            launch = ["--launch", f"torchrun:{count}"] if count > 1 else []
            train(cache, str(where), "--set", f"run.dir={run}", *launch)
            asked.append(heard(server))
            assert server.most_busy <= 3
            assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
            assert len(server.headers) - len(server.bodies) == 1, "the list of models is asked for once"
    one, two = tmp_path / "1", tmp_path / "2"
    assert asked[0] == asked[1]
    assert paid(one) == paid(two) and any(credit for credit, _ in paid(two))
    assert logged(one) == logged(two)
    same_weights(one, two)
    spent = [json.loads((run / "remotes.json").read_text()) for run in (one, two)]
    assert spent[0] == spent[1] and spent[1]["solver"]["requests"] == asked[1].total()
    assert json.loads((two / "summary.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_a_refusal_ends_all_processes_with_the_step_before_saved(cache, tmp_path):
    trained: list[Body] = []

    def choose(body: Body):
        """Refused in the middle of step 2 (an evaluation samples at another temperature)."""
        if body["temperature"] == 1.0:
            trained.append(body)
        return status(401) if len(trained) > 32 + 5 else None

    run, whole = tmp_path / "run", tmp_path / "whole"
    with serving(say=solve, choose=choose) as server:
        where = recipe(tmp_path / "recipe.yaml", server.url)
        process = ccpo(cache, str(where), "--set", f"run.dir={run}", "--launch", "torchrun:2")
        out = process.communicate(timeout=200)[0]
        assert process.returncode == 2, out[-3000:]
        assert out.count("refuses the key in EXAMPLE_KEY (status 401)") == out.count("step 1 is saved") == 1
        assert "Traceback" not in out and not processes_of(run)
        assert newest(run).name == "step-000001"
        kept = json.loads((run / "remotes.json").read_text())["solver"]["requests"]
        assert (
            len(server.bodies) <= kept < len(server.bodies) + 3
        )  # those under way are cut, maybe before they are read
        server.choose = lambda body: None
        train(cache, "--resume", str(run), "--launch", "torchrun:2")
        train(cache, str(where), "--set", f"run.dir={whole}")
    assert paid(run) == paid(whole)
    same_weights(run, whole)


@pytest.mark.slow
def test_a_wrong_key_is_told_once_before_anything_is_made(cache, tmp_path):
    run = tmp_path / "run"
    with serving(models=lambda handler, body: status(401)(handler, body)) as server:
        where = recipe(tmp_path / "recipe.yaml", server.url)
        process = ccpo(cache, str(where), "--set", f"run.dir={run}", "--launch", "torchrun:2")
        out = process.communicate(timeout=100)[0]
        assert len(server.headers) == 1
    assert process.returncode == 2 and out.count("refuses the key in EXAMPLE_KEY") == 1, out[-3000:]
    assert not processes_of(run) and not (run / "checkpoints").exists()


# --- what travels


class Second(Comm):
    """The second of two ranks; the first has said ``said``."""

    rank, size, said = 1, 2, b""

    def gather(self, data: bytes) -> list[bytes]:
        return [self.said, data]


def test_a_completion_without_tokens_and_the_counts_travel_whole():
    done = [Completion(token_ids=(), logprobs=(), text="é\n", finish=FinishReason.LENGTH, counted=7)]
    assert sharded._unpacked(sharded._packed(done, 12, {"requests": 3})) == (done, 12, {"requests": 3})
    assert done[0].tokens == 7


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BudgetSpent("spent"), EndpointFailure),
        (EndpointRefusal("no"), EndpointRefusal),
        (LostContact("gone"), RunFailure),
        (UserError("x"), UserError),
    ],
)
def test_an_endpoints_end_is_one_on_all_ranks(error, kind):
    again = _unpacked(_packed(error))
    assert type(again) is kind and str(again) == str(error) and again.told


def test_the_second_rank_needs_no_key_asks_nobody_and_counts_what_the_first_has_spent(tmp_path, monkeypatch):
    monkeypatch.delenv("EXAMPLE_KEY", raising=False)
    config = load_recipe(recipe(tmp_path / "recipe.yaml", "http://127.0.0.1:1/v1"))
    with pytest.raises(UserError, match="EXAMPLE_KEY"):
        Remotes(config, ("thinker", "solver"))
    comm = Second()
    remotes = Remotes(config, ("thinker", "solver"), comm)
    voice = remotes.voices["solver"]
    done = [Completion(token_ids=(), logprobs=(), text="6", finish=FinishReason.EOS, counted=1)]
    spent = {"requests": 2, "retries": 1, "prompt_tokens": 10, "completion_tokens": 1, "estimated_tokens": 4}
    comm.said = b"+" + sharded._packed(done, 10, spent)
    request = Request(prompt_ids=(), seed=1, max_tokens=4, messages=(("user", "Sum of 1+2+3."),))
    assert voice.generate([request]) == done
    assert remotes.spent() == {"solver": spent}
    assert (voice.prefill_tokens, voice.decoded_tokens) == (10, 1)
    comm.said = b"-" + _packed(EndpointRefusal("refused"))
    with pytest.raises(EndpointRefusal, match="refused"):
        voice.generate([request])
    assert voice.generate([]) == []
