"""Evaluation: pass@k, majority@k, intervals against hand numbers and brute force; agents alone, removed and blank."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.evaluate import Exam, evaluate, headline, interval, pass_at_k
from ccpo.rollout import Limits
from ccpo.teams import PlayTeam, Team, think_solve, voting
from scripted import ScriptedEngine, by_agent, exact_task, pick, problem, voice, voices

PAIR = think_solve(prompts={"thinker": "thinker: {problem}", "solver": "solver: {problem}[[ | {thinker}]]"})
VOTERS = voting(3, prompts={f"voter{i}": f"voter{i}: {{problem}}" for i in (1, 2, 3)})
TEN = tuple(problem(f"p{i}", "yes" if i < 7 else "no") for i in range(10))


def report(team: Team | PlayTeam, say, problems=TEN, **exam) -> dict:
    engine = ScriptedEngine(say)
    tests = {"ten": exact_task(*problems)}
    return evaluate(team, tests, voices(team.agent_names, engine), Limits(), Exam(**exam))["ten"]


def yes(prompt: str, seed: int) -> str:
    return "yes"


# --- pass@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "solved", "k", "chance"),
    [
        (4, 0, 4, 0.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),
        (4, 2, 2, 5 / 6),
        (4, 4, 1, 1.0),
        (4, 1, 4, 1.0),
        (10, 3, 5, 11 / 12),
    ],
)
def test_pass_at_k_by_hand(samples, solved, k, chance):
    assert pass_at_k(samples, solved, k) == pytest.approx(chance, abs=1e-12)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(case):
    samples, solved, k = case
    outcomes = [1] * solved + [0] * (samples - solved)
    hits = sum(any(chosen) for chosen in combinations(outcomes, k))
    assert pass_at_k(samples, solved, k) == pytest.approx(hits / comb(samples, k), abs=1e-12)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_k_of_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match="k must be from 1 to the samples"):
        pass_at_k(4, 2, k)


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (8, 10, 0.49016, 0.94332),
        (0, 10, 0.0, 0.27754),
        (10, 10, 0.72246, 1.0),
        (50, 100, 0.40383, 0.59617),
        (1, 1, 0.20654, 1.0),
    ],
)
def test_wilsons_interval(right, total, low, high):
    found = interval([1.0] * right + [0.0] * (total - right))
    assert found["mean"] == right / total
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-4)


def test_partial_credit_has_the_normal_interval():
    found = interval([0.25, 0.5, 0.75])  # deviation 0.25 of three: 1.96 * 0.25 / sqrt(3)
    assert (found["low"], found["mean"], found["high"]) == pytest.approx((0.21710, 0.5, 0.78290), abs=1e-4)
    assert interval([0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert interval([0.99, 0.2, 1.0, 0.95])["high"] == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_an_interval_holds_its_mean_within_zero_and_one(values):
    found = interval(values)
    assert 0 <= found["low"] <= found["mean"] + 1e-12
    assert found["mean"] - 1e-12 <= found["high"] <= 1


# --- reports ----------------------------------------------------------------------------------------------------------


def test_accuracy_and_its_interval():
    found = report(PAIR, yes, ablations=False)
    assert found["team"]["mean"] == pytest.approx(0.7)
    assert found["team"]["low"] == pytest.approx(0.39678, abs=1e-4)
    assert (found["problems"], found["samples"]) == (10, 1)
    assert (found["pass@k"], found["majority@k"]) == ({"1": pytest.approx(0.7)}, {"1": pytest.approx(0.7)})
    assert "without" not in found
    assert "alone" not in found


def test_only_so_many_problems_are_asked():
    assert report(PAIR, yes, problems=TEN, ablations=False)["problems"] == 10
    engine = ScriptedEngine(yes)
    tests = {"a": exact_task(*TEN), "b": exact_task(*TEN[7:])}
    found = evaluate(PAIR, tests, voices(PAIR.agent_names, engine), Limits(), Exam(problems=4, ablations=False))
    assert (found["a"]["problems"], found["b"]["problems"]) == (4, 3)
    assert (found["a"]["team"]["mean"], found["b"]["team"]["mean"]) == (1.0, 0.0)
    assert {p for p in engine.prompts if p.startswith("thinker")} == {f"thinker: p{i}" for i in (0, 1, 2, 3, 7, 8, 9)}


def test_an_empty_data_set_is_refused_by_name():
    class Empty:
        name = "empty"

        def __len__(self):
            return 0

    with pytest.raises(UserError, match="data set 'hard' is empty"):
        evaluate(PAIR, {"hard": Empty()}, {}, Limits(), Exam())


def test_the_exam_sets_how_everybody_samples():
    engine = ScriptedEngine(yes)
    spoken = {
        name: voice(name, engine, max_tokens=9, temperature=1.0, top_k=5, stop=("\n",)) for name in PAIR.agent_names
    }
    tests = {"ten": exact_task(*TEN)}
    evaluate(PAIR, tests, spoken, Limits(), Exam(problems=1, temperature=0.6, top_p=0.7, ablations=False))
    for batch in engine.calls:
        for _, r in batch:
            assert (r.temperature, r.top_p, r.top_k, r.max_tokens, r.stop) == (0.6, 0.7, 0, 9, ("\n",))


def test_the_same_exam_gives_the_same_report_and_another_seed_another():
    def say(prompt, seed):
        return pick(seed, "yes", "no")

    first = report(PAIR, say, samples=4, seed=1)
    assert report(PAIR, say, samples=4, seed=1) == first
    assert report(PAIR, say, samples=4, seed=2) != first


def test_pass_at_k_grows_and_majority_at_k_votes():
    said = iter(["no", "yes", "yes", "no", "yes", "yes", "yes", "no"])  # one problem, eight samples in order
    solvers = by_agent({"thinker": lambda *_: "", "solver": lambda *_: next(said)})
    found = report(PAIR, solvers, problems=TEN[:1], samples=8, ablations=False)
    assert list(found["pass@k"]) == list(found["majority@k"]) == ["1", "2", "4", "8"]
    assert found["team"]["mean"] == 5 / 8
    assert found["pass@k"] == {
        k: pytest.approx(v) for k, v in {"1": 5 / 8, "2": 1 - 3 / 28, "4": 1.0, "8": 1.0}.items()
    }
    assert found["majority@k"] == {"1": 0.0, "2": 0.5, "4": 0.5, "8": 1.0}  # no | no yes: tie | 2 : 2 | 5 : 3


def test_abstentions_have_no_majority():
    found = report(PAIR, lambda prompt, seed: " ", problems=TEN[:1], samples=2, ablations=False)
    assert found["majority@k"] == {"1": 0.0, "2": 0.0}
    said = iter([" ", "yes", " ", "no"])
    mixed = by_agent({"thinker": lambda *_: "", "solver": lambda *_: next(said)})
    assert report(PAIR, mixed, problems=TEN[:1], samples=4, ablations=False)["majority@k"] == {
        "1": 0.0,
        "2": 1.0,
        "4": 0.5,
    }


def test_k_goes_in_powers_of_two_up_to_the_samples():
    assert list(report(PAIR, yes, samples=3, ablations=False)["pass@k"]) == ["1", "2"]


# --- agents alone, removed, blank -------------------------------------------------------------------------------------


def lazy_solver(prompt: str, seed: int) -> str:
    """Right with a thought, right half of the time alone, wrong with an empty thought."""
    if prompt.startswith("thinker"):
        return "think"
    if prompt.endswith(" | "):
        return "wrong"
    return "yes" if "| think" in prompt else pick(int(prompt.rpartition("p")[2]), "yes", "wrong")


def test_without_blank_and_alone_are_three_questions():
    ask = TEN[:7]  # the answer is yes
    found = report(PAIR, lazy_solver, problems=ask)
    assert found["team"]["mean"] == 1.0
    assert found["without"]["thinker"]["mean"] == pytest.approx(4 / 7)  # p0, p2, p4, p6
    assert found["blank"]["thinker"]["mean"] == 0.0
    assert found["alone"]["solver"]["mean"] == pytest.approx(4 / 7)
    assert found["alone"]["thinker"]["mean"] == 0.0  # "think" is no answer
    assert (
        found["without"]["solver"]
        == found["blank"]["solver"]
        == {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.35433, abs=1e-4)}
    )


def test_a_voter_alone_and_a_vote_without_it():
    said = by_agent({"voter1": lambda *_: "yes", "voter2": lambda *_: "no", "voter3": lambda *_: "yes"})
    engine = ScriptedEngine(said)
    found = evaluate(VOTERS, {"ten": exact_task(*TEN)}, voices(VOTERS.agent_names, engine), Limits(), Exam())["ten"]
    assert found["team"]["mean"] == pytest.approx(0.7)
    assert {name: r["mean"] for name, r in found["alone"].items()} == pytest.approx(
        {"voter1": 0.7, "voter2": 0.3, "voter3": 0.7}
    )
    assert found["without"]["voter2"]["mean"] == pytest.approx(0.7)
    assert found["without"]["voter1"]["mean"] == pytest.approx(0.5)  # a tie pays half either way
    assert {k: v["mean"] for k, v in found["blank"].items()} == {k: v["mean"] for k, v in found["without"].items()}


def test_a_python_function_team_is_evaluated_without_its_agents_alone():
    async def play(problem, speak):
        thought = await speak("thinker", "thinker: {problem}")
        return await speak("solver", "solver: {problem}[[ | {thought}]]", thought=thought) or ""

    team = PlayTeam("pair", ("thinker", "solver"), play)
    found = report(team, lazy_solver, problems=TEN[:7])
    assert found["team"]["mean"] == 1.0
    assert found["without"]["thinker"]["mean"] == pytest.approx(4 / 7)
    assert found["blank"]["thinker"]["mean"] == 0.0
    assert found["without"]["solver"]["mean"] == 0.0
    assert "alone" not in found
    assert "solo_after" not in headline({"ten": found}, team, "after")


# --- the headline -----------------------------------------------------------------------------------------------------


def test_the_headline_is_flat():
    flat = headline({"ten": report(PAIR, lazy_solver, problems=TEN[:7]), "other": {}}, PAIR, "after")
    assert flat == {
        "team_after": 1.0,
        "without_thinker_after": pytest.approx(4 / 7),
        "without_solver_after": 0.0,
        "blank_thinker_after": 0.0,
        "blank_solver_after": 0.0,
        "alone_thinker_after": 0.0,
        "alone_solver_after": pytest.approx(4 / 7),
        "solo_after": pytest.approx(4 / 7),
    }


def test_solo_is_the_mean_over_voters_where_nobody_decides_alone():
    said = by_agent({"voter1": lambda *_: "yes", "voter2": lambda *_: "no", "voter3": lambda *_: "yes"})
    assert headline({"ten": report(VOTERS, said)}, VOTERS, "x")["solo_x"] == pytest.approx((0.7 + 0.3 + 0.7) / 3)


def test_a_report_without_ablations_has_the_teams_accuracy_alone():
    assert headline({"ten": report(PAIR, yes, ablations=False)}, PAIR, "before") == {"team_before": pytest.approx(0.7)}
