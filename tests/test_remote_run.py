"""Whole runs with an agent behind an endpoint: trained beside it, evaluated, asked, probed; stopped when it gives up, and resumed."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path

import pytest
import torch

import ccpo
from ccpo.chat import ask
from ccpo.diagnose import Effort
from ccpo.diagnose.report import variance_tables
from ccpo.diagnosis import variance
from ccpo.errors import EndpointFailure, EndpointRefusal, UserError
from ccpo.evaluate import Exam, evaluate
from ccpo.rollout import read_episodes
from ccpo.runs import open_crew
from endpoint import Body, serving, slam, status
from test_trainer import TINY, metrics, same, weights

torch.set_num_threads(1)

KEY = "sk-very-secret-0123456789"
PROMPTS = {"thinker": "T{problem}:", "solver": "Sum the digits of {problem}.[[ Notes: {thinker}]]"}


def solve(body: Body) -> str:
    """The right sum where there are notes that the thinker has ended well, else a wrong one."""
    text = body["messages"][-1]["content"]
    digits = re.search(r"of ([\d+]+)\.", text)[1].split("+")
    right = str(sum(map(int, digits)) % 10)
    return right if "Notes" in text and body["seed"] % 2 else str((int(right) + 1) % 10)


def recipe(folder: Path, url: str, *, remote: dict | None = None, **sections: dict) -> dict:
    data = json.loads(json.dumps(TINY))
    data["run"] |= {"dir": str(folder)}
    data["team"] = {"kind": "think_solve", "prompts": PROMPTS}
    data["agents"] = {"solver": {"remote": {"url": url, "model": "big", "key_env": "EXAMPLE_KEY", **(remote or {})}}}
    data["trainer"] = {"steps": 2, "save_every": 1}
    data["eval"] = {"problems": 4, "during": 2, "temperature": 1.0}
    for name, values in sections.items():
        data[name] = {**data[name], **values} if name in TINY and "kind" not in values else values
    return data


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("EXAMPLE_KEY", KEY)
        yield


def everything_in(folder: Path) -> bytes:
    files = [f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()]
    return b"".join(files + [gzip.decompress(f) for f in files if f[:2] == b"\x1f\x8b"])


def test_a_thinker_is_trained_beside_a_solver_behind_an_endpoint(tmp_path, capfd, caplog):
    caplog.set_level(0)
    with serving(say=solve, models=["big"]) as server:
        result = ccpo.train(recipe(tmp_path / "run", server.url))
        heard = len(server.bodies)
        assert result.finished
        assert result.summary["without_solver_after"] == 0

        # the endpoint is asked what the solver reads, and every request has a seed of its own
        assert all(body["messages"][-1]["content"].startswith("Sum the digits of ") for body in server.bodies)
        assert any("Notes:" in body["messages"][-1]["content"] for body in server.bodies)
        assert any("Notes:" not in body["messages"][-1]["content"] for body in server.bodies)  # without the thinker
        assert server.headers[-1]["authorization"] == f"Bearer {KEY}"

        # the thinker alone is paid and updated; what the solver says is in the episodes, without tokens
        line = metrics(tmp_path / "run")[-1]
        assert "credit/thinker/mean" in line and "credit/solver/mean" not in line
        assert "actor/thinker/loss" in line and "actor/solver/loss" not in line
        group, record = next(read_episodes(tmp_path / "run" / "episodes" / "step-000001.jsonl.gz"))
        thought, answer = group.rollouts[0].turns
        assert thought.prompt_ids and thought.completion.counted is None
        assert (answer.prompt_ids, answer.completion.token_ids, answer.completion.logprobs) == ((), (), ())
        assert answer.completion.tokens == record["rollouts"][0]["turns"][1]["counted_tokens"] == 1
        assert answer.policy == "solver@remote"
        assert answer.prompt.startswith("[user]\nSum the digits of ")
        checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
        assert [p.name for p in (checkpoint / "policies").iterdir()] == ["thinker"]

        # what it has cost is kept
        kept = json.loads((tmp_path / "run" / "remotes.json").read_text())["solver"]
        assert kept["requests"] == heard
        assert kept["prompt_tokens"] == 10 * heard
        assert line["remote/solver/requests"] <= heard and line["remote/solver/retries"] == 0

        # evaluated, asked and probed later
        setup, crew, _ = open_crew(tmp_path / "run")
        reports = evaluate(
            setup.team, setup.tests, crew.voices(), setup.limits, Exam(problems=4, samples=2, temperature=0.7)
        )
        assert set(reports["heldout"]["without"]) == {"thinker", "solver"}
        assert server.bodies[-1]["temperature"] == 0.7
        said = ask(tmp_path / "run", "1+2")
        assert said.turns[1].completion.text == solve(server.bodies[-1])
        report = variance(tmp_path / "run", rules=["shared", "removal"], effort=Effort(batches=3, problems=1, truth=2))
        assert set(report["rules"]["removal"]["agents"]) == {"thinker"}
        variance_tables(report)
        (edge,) = report["influence"]  # of the thinker's words on the solver, whose distributions nobody sees
        assert edge["distance"] == {"value": None, "error": None}
    shown = "".join(capfd.readouterr()) + caplog.text
    assert KEY not in shown
    assert KEY.encode() not in everything_in(tmp_path)
    assert b"EXAMPLE_KEY" in everything_in(tmp_path)  # the look through the folder can find something


def test_the_same_seeds_give_the_same_run(tmp_path):
    with serving(say=solve) as server:
        for name in ("a", "b"):
            ccpo.train(recipe(tmp_path / name, server.url, remote={"concurrency": 3 if name == "a" else 1}))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same(weights(tmp_path / "a", 2), weights(tmp_path / "b", 2))


def test_a_spent_budget_stops_a_run_with_its_state_saved_and_it_goes_on_with_a_larger_one(tmp_path):
    folder = tmp_path / "run"
    with serving(say=solve) as server:
        whole = recipe(tmp_path / "whole", server.url, trainer={"steps": 3, "save_every": 0})
        ccpo.train(whole)
        step = 11 * 4 * 8  # four problems, four rollouts and four draws without the thinker
        before = 11 * 4 * 4  # evaluated: joint, without the thinker, with a blank one, alone
        budget = before + step + step // 2
        data = recipe(folder, server.url, remote={"max_total_tokens": budget}, trainer={"steps": 3, "save_every": 0})
        with pytest.raises(
            EndpointFailure, match=rf"max_total_tokens: the budget of {budget} tokens.*step 1 is saved.*--resume"
        ):
            ccpo.train(data)
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]
        spent = json.loads((folder / "remotes.json").read_text())["solver"]
        assert spent["prompt_tokens"] + spent["completion_tokens"] >= budget

        # going on with the same budget ends at once: what is spent is spent
        asked = len(server.bodies)
        with pytest.raises(EndpointFailure, match="is spent"):
            ccpo.resume(folder)
        assert len(server.bodies) == asked
        stored = json.loads((folder / "recipe.json").read_text())
        stored["config"]["agents"]["solver"]["remote"]["max_total_tokens"] = None
        (folder / "recipe.json").write_text(json.dumps(stored))
        assert ccpo.resume(folder).finished

    def learned(run: Path) -> list[dict]:
        return [{k: v for k, v in line.items() if not k.startswith("remote/")} for line in metrics(run)]

    assert learned(folder) == learned(tmp_path / "whole")
    assert same(weights(folder, 3), weights(tmp_path / "whole", 3))


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_an_endpoint_that_gives_up_leaves_a_run_that_goes_on(tmp_path, where):
    trained: list[Body] = []

    def choose(body: Body):
        """Gone in the middle of step 2, or at the evaluation after step 1 (which samples at another temperature)."""
        if body["temperature"] == 1.0:
            trained.append(body)
        dead = len(trained) > 32 + 5 if where == "step" else trained and body["temperature"] == 0.5
        return slam if dead else None

    sections = {
        "trainer": {"steps": 2, "save_every": 0, "eval_every": 1},
        "eval": {"problems": 4, "during": 2, "temperature": 0.5},
    }
    with serving(say=solve, choose=choose) as server:
        data = recipe(tmp_path / "run", server.url, remote={"retries": 0}, **sections)
        with pytest.raises(EndpointFailure, match=r"no usable reply in 1 try.*step 1 is saved: .*--resume"):
            ccpo.train(data)
        assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
        assert ("eval/team" in metrics(tmp_path / "run")[0]) == (where == "step")
        server.choose = lambda body: None
        assert ccpo.resume(tmp_path / "run").finished
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_what_is_wrong_is_found_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path / "empty"))
    clock = time.monotonic()
    with serving(models=["big"]) as server:
        with pytest.raises(
            EndpointRefusal,
            match=r"agents\.solver\.remote\.model: the endpoint does not list 'bog'.*Did you mean 'big'",
        ):
            ccpo.train(recipe(tmp_path / "run", server.url, remote={"model": "bog"}))
        with pytest.raises(
            UserError, match=r"agents\.solver\.remote\.key_env: the environment variable NO_KEY is not set"
        ):
            ccpo.train(recipe(tmp_path / "run", server.url, remote={"key_env": "NO_KEY"}))
        server.models = lambda handler, body: status(401)(handler, body)
        with pytest.raises(EndpointRefusal, match="refuses the key in EXAMPLE_KEY"):
            ccpo.train(recipe(tmp_path / "run", server.url))
        url = server.url
    with pytest.raises(EndpointRefusal, match=r"agents\.solver\.remote\.url: http.* does not answer"):
        ccpo.train(recipe(tmp_path / "run", url))
    assert time.monotonic() - clock < 10
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "empty").exists()  # no base model was made


def refused(tmp_path: Path, **keys) -> str:
    with pytest.raises(UserError) as error:
        ccpo.train(recipe(tmp_path / "run", "http://localhost:1/v1", **keys))
    assert KEY not in str(error.value)
    return str(error.value)


def test_a_recipe_that_makes_no_sense_is_refused(tmp_path):
    def agents(**keys):
        return {"agents": {"solver": {"remote": {"url": "http://localhost:1/v1", "model": "m"}, **keys}}}

    assert "cannot be trained" in refused(tmp_path, **agents(frozen=False))
    assert "lr is set" in refused(tmp_path, **agents(lr=1e-4))
    assert "model is set" in refused(tmp_path, **agents(model="some/model"))
    assert "chat completions know no top-k" in refused(tmp_path, **agents(top_k=5))
    assert "cannot be trained; name another" in refused(
        tmp_path, trainer={"schedule": "alternating", "first": "solver"}
    )
    both = agents()["agents"] | {"thinker": {"remote": {"url": "http://localhost:1/v1", "model": "m"}}}
    assert "nothing can be trained" in refused(tmp_path, agents=both)
    weighted = {
        "team": {"kind": "voting", "k": 3, "decision": "weighted"},
        "task": {"kind": "truth_choice"},
        "agents": {"voter1": agents()["agents"]["solver"]},
    }
    assert "weighs ballots by log-probs" in refused(tmp_path, **weighted)


def test_a_key_in_the_wrong_place_is_refused_and_not_shown(tmp_path):
    assert "name of an environment variable" in refused(tmp_path, remote={"key_env": KEY})
    assert "name or password" in refused(tmp_path, remote={"url": f"http://me:{KEY}@host/v1"})
    assert "query" in refused(tmp_path, remote={"url": f"http://host/v1?key={KEY}"})
    assert "looks like a key" in refused(tmp_path, remote={"extra": {"api_key": KEY}})
    assert "extra.messages is set by the library" in refused(tmp_path, remote={"extra": {"messages": []}})
    assert "unknown key" in refused(tmp_path, remote={"key": KEY})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "team",
    [
        {"team": {"kind": "voting", "k": 3, "prompts": dict.fromkeys(("voter1", "voter2", "voter3"), "{problem}=")}},
        {
            "team": {"kind": "voting", "k": 3, "prompts": dict.fromkeys(("voter1", "voter2", "voter3"), "{problem}=")},
            "credit": {"kind": "sepo"},
        },
    ],
    ids=["vote", "sepo"],
)
def test_voters_behind_one_endpoint_share_its_budget(tmp_path, team):
    with serving(say=lambda body: "A") as server:
        there = {"remote": {"url": server.url, "model": "big"}}
        data = recipe(tmp_path / "run", server.url, agents={"voter1": there, "voter3": there}, **team)
        data["task"] = {"kind": "truth_choice", "options": 3, "literals": 2, "size": 200}
        data["rollout"] |= {"max_prompt_tokens": 2048}
        assert ccpo.train(data).finished
        kept = json.loads((tmp_path / "run" / "remotes.json").read_text())
    assert list(kept) == ["voter1"]
    assert kept["voter1"]["requests"] == len(server.bodies)
    assert "credit/voter2/mean" in metrics(tmp_path / "run")[-1]
