"""What a tiny base model is taught of rating: who was right, in tenths, in words that can be read; and what it has then learnt."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ccpo
from ccpo.bootstrap import Lessons, _fingerprint, base_tokenizer
from ccpo.build import prepare, rating_lessons_of
from ccpo.config import BootstrapSection, load_recipe
from ccpo.errors import UserError
from ccpo.rating_lessons import RatingLessons, rating_text, tenths
from ccpo.rollout import read_episodes
from ccpo.tasks.procedural import ChainSum, DigitSum, TruthChoice
from ccpo.teams import Agent, Function, Sampled, Team, chain, parse_rating, think_solve, voting

torch.set_num_threads(1)
PROMPT = "R{problem}:{upstream}|{OUTCOME}|"
PAIR = think_solve(prompts={"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="})
TRIO = chain(
    k=3, prompts={"agent1": "A{problem}=", "agent2": "B{problem}[[:{agent1}]]=", "agent3": "C{problem}[[:{agent2}]]="}
)
VOTE = voting(k=3, prompts={f"voter{i}": "{problem}=" for i in (1, 2, 3)})


@given(st.integers(2, 10), st.sets(st.integers(0, 9)))
def test_tenths_are_a_rating_that_can_be_read(K: int, chosen: set[int]) -> None:
    agents = tuple(f"a{k}" for k in range(K))
    part = [agents[k] for k in chosen if k < K]
    shares = tenths(agents, part)
    said = rating_text("wrong", shares)
    assert parse_rating(said, "wrong", agents) == (tuple(s / 10 for s in shares), True)
    inside = [s for a, s in zip(agents, shares, strict=True) if a in (part or agents)]
    outside = [s for a, s in zip(agents, shares, strict=True) if a not in (part or agents)]
    assert max(inside) - min(inside) <= 1
    assert set(outside) <= ({1} if K <= 5 else {0}) and min(inside) >= 1


def test_tenths_by_hand() -> None:
    assert tenths(("a", "b"), ["a"]) == (9, 1)
    assert tenths(("a", "b"), []) == tenths(("a", "b"), ["a", "b"]) == (5, 5)
    assert tenths(("a", "b", "c"), ["c"]) == (1, 1, 8)
    assert tenths(("a", "b", "c"), ["a", "c"]) == (5, 1, 4)
    assert tenths(("a", "b", "c"), []) == (4, 3, 3)
    assert tenths("abcdef", "b") == (0, 10, 0, 0, 0, 0)


def rated(team: Team, task: Any, said: dict[str, str], seed: int = 0, noise: float = 0.0) -> tuple[str, str]:
    return RatingLessons(team, task, PROMPT, noise).lesson(task[3], said, random.Random(seed))


def test_who_was_right_is_paid_and_who_was_wrong_is_blamed() -> None:
    task = DigitSum(digits=(3, 3))
    problem = task[3]
    good = task.teach(problem, "thinker", {}, random.Random(0), 0.0)
    bad = good[:-1] + str((int(good[-1]) + 1) % 10)
    for thought, answer, outcome, pair in (
        (good, good[-1], "correct", "[.5,.5]"),
        (good, bad[-1], "wrong", "[.1,.9]"),  # the solver misread
        (bad, bad[-1], "wrong", "[.9,.1]"),  # the solver read what was there
        (bad, good[-1], "correct", "[.5,.5]"),  # nobody was right, and the answer is: all had a part
    ):
        prompt, said = rated(PAIR, task, {"thinker": thought, "solver": answer})
        assert said == f"outcome={outcome} pair={pair}"
        assert prompt.startswith(f"R{problem.text}:") and prompt.endswith(f"|{outcome}|") and thought in prompt


def test_a_wrong_voter_and_a_wrong_link_are_found() -> None:
    task = TruthChoice(options=4, literals=3)
    right = task[3].answer
    wrong = next(letter for letter in "ABCD" if letter != right)
    said = {"voter1": right, "voter2": wrong, "voter3": right}
    assert rated(VOTE, task, said)[1] == "outcome=correct shares=[.5,.1,.4]"
    said = {"voter1": wrong, "voter2": wrong, "voter3": right}
    assert rated(VOTE, task, said)[1] == "outcome=wrong shares=[.5,.4,.1]"
    links = ChainSum(parts=3, digits=(2, 2))
    heard: dict[str, str] = {}
    for turn in TRIO.turns_in_order:
        text = links.teach(links[3], turn.name, heard, random.Random(0), 0.0)
        heard[turn.name] = text[:-1] + str((int(text[-1]) + 1) % 10) if turn.name == "agent2" else text
    assert rated(TRIO, links, heard)[1] == "outcome=wrong shares=[.1,.8,.1]"


def test_noise_draws_sets_of_agents() -> None:
    task = DigitSum(digits=(3, 3))
    good = task.teach(task[3], "thinker", {}, random.Random(0), 0.0)
    play = {"thinker": good, "solver": "x"}
    said = {rated(PAIR, task, play, seed, noise=1.0)[1] for seed in range(40)}
    assert said == {f"outcome=wrong pair={pair}" for pair in ("[.5,.5]", "[.1,.9]", "[.9,.1]")}


def test_the_lessons_of_turns_are_the_same_with_ratings() -> None:
    task, section = DigitSum(digits=(2, 4)), BootstrapSection(batch=16)
    ratings = RatingLessons(PAIR, task, PROMPT, 0.1)
    tokenizer = base_tokenizer(PAIR, task, ratings)
    plain, both = Lessons(PAIR, task, section, tokenizer), Lessons(PAIR, task, section, tokenizer, ratings)
    for noisy in (False, True):
        batch = both.batch(16, noisy=noisy)
        assert batch[:16] == plain.batch(16, noisy=noisy) and len(batch) == 20
        for prompt, said, known in batch[16:]:
            text = tokenizer.decode(said[:-1])
            assert parse_rating(text, text.split()[0].partition("=")[2], PAIR.agent_names)[1]
            assert tokenizer.decode(prompt).startswith("R") and not known


SEPO = {"credit.kind": "sepo", "credit.prompt": PROMPT, "credit.max_tokens": 40}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"credit.kind": "shared", "credit.prompt": None, "credit.max_tokens": None}, "credit.kind: sepo"),
        ({"credit.prompt": None}, "credit.prompt"),
        ({"credit.prompt": "{nobody}"}, "nobody"),
        ({"credit.prompt": "{problem} é"}, "ASCII"),
        ({"credit.prompt": "{problem}" + 200 * "x", "rollout.max_prompt_tokens": 128}, "room for 128"),
        ({"credit.max_tokens": 28}, "credit.max_tokens: 29"),
        ({"credit.strict": True}, "credit.strict: false"),
        ({"model.path": "Qwen/Qwen2.5-0.5B-Instruct"}, "model.path"),
    ],
)
def test_ratings_that_cannot_be_learnt_are_refused_before_anything_runs(settings: dict[str, Any], match: str) -> None:
    wanted = {k: v for k, v in (SEPO | settings).items() if v is not None}
    with pytest.raises(UserError, match=match):
        prepare(load_recipe("demo", ["bootstrap.ratings=true", *(f"{k}={v}" for k, v in wanted.items())]))


def test_ratings_that_can_be_learnt_are_not() -> None:
    setup = prepare(load_recipe("demo", ["bootstrap.ratings=true", *(f"{k}={v}" for k, v in SEPO.items())]))
    assert rating_lessons_of(setup).prompt == PROMPT


def test_teams_whose_ratings_cannot_be_taught_are_refused() -> None:
    task = DigitSum(digits=(3, 3))
    with pytest.raises(UserError, match="11 agents"):
        RatingLessons(voting(k=11, prompts={f"voter{i}": "{problem}=" for i in range(1, 12)}), task, PROMPT, 0.1)
    decides = replace(PAIR, decision=Function(fn=lambda problem, said: said["solver"], turns=("solver",)))
    with pytest.raises(UserError, match="decides by a function"):
        RatingLessons(decides, task, PROMPT, 0.1)


def test_what_shapes_ratings_shapes_the_models_name() -> None:
    task, section = DigitSum(digits=(3, 3)), BootstrapSection()

    def name(team: Team, prompt: str | None = PROMPT, noise: float = 0.1) -> str:
        return _fingerprint(team, task, section, prompt and RatingLessons(team, task, prompt, noise))

    turned = replace(PAIR, agents=PAIR.agents[::-1])
    sampled = replace(VOTE, decision=Sampled(turns=tuple(VOTE.order)))
    names = [
        name(PAIR),
        name(PAIR, None),
        name(PAIR, "{problem}"),
        name(PAIR, noise=0.2),
        name(turned),
        name(VOTE),
        name(sampled),
    ]
    assert len(set(names)) == len(names)
    assert name(turned, None) == name(PAIR, None)


def test_an_agent_is_right_where_all_its_turns_are() -> None:
    task = DigitSum(digits=(3, 3))
    thinker, solver = (replace(turn, agent="both") for turn in PAIR.turns)
    other = replace(PAIR.turns[0], name="other", agent="other", template="O{problem}:")
    team = Team(
        name="mine",
        agents=(Agent(name="both"), Agent(name="other")),
        decision=PAIR.decision,
        turns=(thinker, other, solver),
    )
    good = task.teach(task[3], "thinker", {}, random.Random(0), 0.0)
    misread = str((int(good[-1]) + 1) % 10)
    assert rated(team, task, {"thinker": good, "other": good, "solver": misread})[1] == "outcome=wrong pair=[.9,.1]"


@pytest.mark.slow
def test_a_tiny_model_learns_to_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ratings can be read and name the outcome; successes were mostly everybody's, as it was taught, and failures somebody's."""
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    ccpo.train(
        {
            "run": {"dir": str(run), "threads": 1},
            "team": {"kind": "think_solve", "prompts": {t.name: t.template for t in PAIR.turns}},
            "task": {"kind": "digit_sum", "digits": [2, 3], "misled": 0.5},
            "bootstrap": {
                "hidden": 64,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "mlp": 128,
                "lr": 3e-3,
                "batch": 48,
                "steps": 250,
            }
            | {"noisy_steps": 100, "noisy_lr": 1e-3, "ratings": True, "rating_noise": 0.0},
            "credit": {"kind": "sepo", "prompt": "R{problem}:{thinker}={solver}|{OUTCOME}|", "max_tokens": 40},
            "rollout": {"prompts": 32, "samples": 8, "max_tokens": 16},
            "trainer": {"steps": 1, "eval_every": 0, "save_every": 0},
            "eval": {"problems": 8},
        }
    )
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["rating/valid"] > 0.8
    assert line["credit/thinker/same_as_shared"] == 0
    said: dict[bool, list[bool]] = {True: [], False: []}
    for group, _ in read_episodes(run / "episodes" / "step-000001.jsonl.gz"):
        for rollout in group.rollouts:
            said[rollout.reward == 1] += [r.shares == (0.5, 0.5) for r in rollout.ratings.values() if r.valid]
    even = {outcome: statistics.mean(shares) for outcome, shares in said.items()}
    assert even[True] > 0.8 and even[False] < 0.7, even
