"""What agents contribute: scripted teams of known worth, votes counted by hand, and logs of teams from elsewhere."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ccpo.diagnose.free_riding import Thoroughness, measure_free_riding
from ccpo.diagnose.free_riding_report import free_riding_table
from ccpo.diagnose.log_free_riding import free_riding_of_log
from ccpo.diagnose.logged import read_log
from ccpo.diagnose.worth import spread_of, student_quantile, verdict, worth_of
from ccpo.diagnosis import free_riding
from ccpo.errors import UserError
from ccpo.rollout import Limits
from ccpo.teams import PlayTeam, chain, single
from scripted import ScriptedEngine, by_agent, voices
from scripted_runs import HEALTHY, HEALTHY_VOTE, HINTS, PAIR, VOTERS, chance, hinting, scripted_run, task_of, voter

LITTLE = Thoroughness(problems=60, samples=4, replayed=20, replays=12)


def measure(team: Any, say: Any, effort: Thoroughness = LITTLE) -> dict[str, Any]:
    engine = ScriptedEngine(say)
    return measure_free_riding(team, task_of(), voices(team.agent_names, engine), Limits(), effort)


def near(worth: dict[str, float], truth: float) -> bool:
    """Within the interval, a little widened: a twentieth of all intervals miss."""
    half = (worth["high"] - worth["low"]) / 2
    return abs(worth["mean"] - truth) < 1.5 * half


@pytest.fixture(scope="module")
def pair() -> dict[str, Any]:
    return measure(PAIR, HEALTHY)


def test_a_thinker_that_helps(pair):
    """Right hints in 70%: 0.9 after a right one, 0.1 after a wrong one and alone."""
    thinker, solver = pair["agents"]["thinker"], pair["agents"]["solver"]
    assert near(pair["team"], 0.66)
    assert near(thinker["removal"], 0.56)
    assert near(thinker["blank"], 0.56)
    assert near(thinker["shapley"], 0.28)
    assert near(solver["shapley"], 0.38)
    assert near(thinker["replay"], 0.8 * math.sqrt(0.21))
    assert (thinker["verdict"], solver["verdict"]) == ("helps", "decides")
    assert solver["removal"] is solver["blank"] is None
    assert any("solver decides" in line for line in pair["untold"])
    total = thinker["shapley"]["mean"] + solver["shapley"]["mean"]
    assert total == pytest.approx(pair["team"]["mean"])  # the values sum to the reward
    json.dumps(pair, allow_nan=False)


def test_a_thinker_that_free_rides_is_called_so():
    lazy = measure(
        PAIR, by_agent({"thinker": hinting, "solver": lambda p, s: "yes"}), Thoroughness(problems=80, half_width=0.05)
    )
    thinker = lazy["agents"]["thinker"]
    assert thinker["verdict"] == "free-rides"
    assert thinker["removal"]["mean"] == thinker["shapley"]["mean"] == thinker["replay"]["mean"] == 0


def test_a_thinker_of_whom_too_little_is_known_is_unclear():
    few = measure(
        PAIR, by_agent({"thinker": hinting, "solver": voter(0.5)}), Thoroughness(problems=10, samples=1, replayed=0)
    )
    thinker = few["agents"]["thinker"]
    assert thinker["verdict"] == "unclear"
    assert thinker["removal"]["needed"] > 200  # deviation about 0.7: (1.96 x 0.7 / 0.05)^2 = 753
    assert thinker["replay"] is None
    assert any("nothing was replayed" in line for line in few["untold"])


def test_a_thinker_that_misleads_hurts():
    say = by_agent({"thinker": hinting, "solver": lambda p, s: "no" if "|" in p else "yes"})
    assert measure(PAIR, say)["agents"]["thinker"]["verdict"] == "hurts"


def test_voters_are_counted_out():
    """Three voters of 70%: 3p^2 - 2p^3 = 0.784 together and 0.7 in pairs (ties pay half)."""
    report = measure(VOTERS, HEALTHY_VOTE, Thoroughness(problems=200, samples=4, replayed=0))
    for found in report["agents"].values():
        assert near(found["removal"], 0.084)
        assert near(found["shapley"], 0.784 / 3)
        assert found["verdict"] == "helps"
    assert not any("decides" in line for line in report["untold"])


def test_a_large_team_is_sampled_and_says_so():
    prompts = {"agent1": "1: {problem}"} | {
        f"agent{i}": f"{i}: {{problem}}[[ | {{agent{i - 1}}}]]" for i in range(2, 6)
    }
    team = chain(5, prompts=prompts)
    said = {str(i): lambda p, s: p.partition("| ")[2] or hinting(p, s) for i in range(1, 5)}
    say = by_agent(said | {"5": lambda p, s: "yes" if HINTS[0] in p else "no"})
    report = measure(team, say, Thoroughness(problems=20, samples=2, replayed=0, orders=6))
    assert any("6 orders of entry" in line for line in report["untold"])
    total = sum(found["shapley"]["mean"] for found in report["agents"].values())
    assert total == pytest.approx(report["team"]["mean"])


def test_a_single_agent_is_the_team():
    report = measure(single(prompts={"single": "single: {problem}"}), by_agent({"single": voter(0.6)}))
    assert report["agents"]["single"]["shapley"]["mean"] == pytest.approx(report["team"]["mean"])


def test_a_team_that_is_a_function_is_measured_as_far_as_it_goes():
    async def play(problem, speak):
        thought = await speak("thinker", "thinker: {problem}")
        return await speak("solver", "solver: {problem}[[ | {thought}]]", thought=thought) or ""

    report = measure(PlayTeam("loop", ("thinker", "solver"), play), HEALTHY, Thoroughness(problems=40, samples=2))
    assert near(report["agents"]["thinker"]["removal"], 0.56)
    assert report["agents"]["thinker"]["replay"] is None
    assert any("Python function" in line for line in report["untold"])


def test_effort_that_tells_nothing_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        Thoroughness(problems=1)
    with pytest.raises(UserError, match="fewer than 2"):
        Thoroughness(replays=1)
    with pytest.raises(UserError, match="points of reward"):
        Thoroughness(half_width=0)
    with pytest.raises(UserError, match="an interval over problems needs at least 2"):
        measure_free_riding(PAIR, task_of(1), {}, Limits(), LITTLE)


# --- intervals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dof", "t"), [(1, 12.7062), (9, 2.26216), (59, 2.00100)])
def test_students_quantile(dof, t):
    assert student_quantile(dof) == pytest.approx(t, abs=1e-4)


def test_an_interval_by_hand():
    worth = worth_of([0.0, 1.0, 0.0, 1.0, 0.5], 0.1)
    assert worth.mean == 0.5
    assert worth.high - 0.5 == pytest.approx(2.77645 * 0.5 / math.sqrt(5), abs=1e-4)
    assert worth.needed == math.ceil((1.959964 * 0.5 / 0.1) ** 2) == 97
    assert worth_of([0.3], 0.1) is None


def test_the_number_needed_gives_the_width_that_was_asked_for():
    values = [float(chance(i) < 0.4) for i in range(4000)]
    few = worth_of(values[:100], 0.05)
    enough = worth_of(values[: few.needed], 0.05)
    assert (enough.high - enough.low) / 2 == pytest.approx(0.05, rel=0.1)


def test_problems_that_all_say_the_same_leave_room_for_those_that_were_not_seen():
    worth = worth_of([0.0] * 30, 0.05)
    assert (worth.low, worth.high) == (-0.1, 0.1)
    assert worth.needed == 60


def test_the_spread_of_worth_is_free_of_sampling_noise():
    generator = torch.Generator().manual_seed(1)
    true_PN = 0.3 * (2 * torch.randint(2, (400, 4), generator=generator) - 1).double()
    noisy_PN = true_PN + 0.2 * torch.randn(true_PN.shape, generator=generator, dtype=torch.float64)
    spread = spread_of(noisy_PN, 0.04, 0.05)
    assert spread.low < 0.3 < spread.high
    assert spread.mean == pytest.approx(0.3, abs=0.02)
    assert spread_of(0 * true_PN, 0.0, 0.05).mean == 0
    assert spread_of(true_PN[:1], 0.0, 0.05) is None


def test_verdicts():
    assert verdict(None, 0.05, decides=False) == "untold"
    assert verdict(worth_of([0.04, 0.03] * 50, 0.05), 0.05, decides=False) == "free-rides"
    assert verdict(worth_of([0.04, 0.03] * 50, 0.01), 0.01, decides=False) == "helps"


# --- logs ---------------------------------------------------------------------------------------------------------------

HEADER = {
    "schema": "ccpo.episodes/1",
    "team": {"agents": ["planner", "writer"], "decider": "writer"},
    "removal": "drop",
}


def write(path: Path, *records: Any) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def asked(number: int, rewards: list[float], without: list[float], removed: str = "planner") -> dict[str, Any]:
    return {
        "problem": {"id": f"q{number}"},
        "rollouts": [{"reward": r} for r in rewards],
        "counterfactuals": [{"removed": [removed], "reward": r} for r in without],
    }


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_log_from_elsewhere_by_hand(tmp_path, name):
    """Losses of the two problems: 1/2 - 0 and 1 - 1/2."""
    path = write(tmp_path / name, HEADER, asked(1, [1.0, 0.0], [0.0]), asked(2, [1.0], [1.0, 0.0]))
    report = free_riding(path)
    planner, writer = report["agents"]["planner"], report["agents"]["writer"]
    assert (report["kind"], report["problems"], report["samples"]) == ("log", 2, 1.5)
    assert report["team"]["mean"] == 0.75
    assert planner["removal"]["mean"] == 0.5
    assert planner["shapley"]["mean"] == 0.25  # (v(both) - v(writer)) / 2
    assert writer["shapley"]["mean"] == 0.5
    assert planner["blank"] is planner["replay"] is None
    assert writer["verdict"] == "decides"
    assert [line.partition(":")[0] for line in report["untold"]] == ["writer decides", "blank messages", "replay"]


def test_lines_of_one_problem_are_one_problem(tmp_path):
    path = write(
        tmp_path / "log.jsonl", HEADER, asked(1, [1.0], [0.0]), HEADER, asked(1, [0.0], [0.0]), asked(2, [1.0], [1.0])
    )
    report = free_riding(path)
    assert report["problems"] == 2
    assert report["agents"]["planner"]["removal"]["mean"] == 0.25


def test_plays_with_blank_messages_are_told_as_such(tmp_path):
    path = write(tmp_path / "log.jsonl", HEADER | {"removal": "blank"}, *(asked(i, [1.0], [0.0]) for i in range(4)))
    planner = free_riding(path)["agents"]["planner"]
    assert planner["blank"]["mean"] == 1
    assert planner["removal"] is None
    assert planner["verdict"] == "helps"


def ballots(*votes: tuple[str | None, ...], right: str = "a") -> list[dict[str, Any]]:
    """Rollouts of a majority vote over what each voter said."""
    rollouts = []
    for cast in votes:
        counts = {answer: cast.count(answer) for answer in cast if answer is not None}
        top = [a for a, n in counts.items() if n == max(counts.values())]
        names = [f"v{i}" for i in range(len(cast))]
        rollouts.append(
            {
                "reward": sum(a == right for a in top) / len(top) if top else 0.0,
                "answers": dict(zip(names, cast, strict=True)),
                "scores": {n: float(a == right) for n, a in zip(names, cast, strict=True)},
            }
        )
    return rollouts


def test_logged_votes_are_counted_again_exactly(tmp_path):
    lines = [
        {"problem": {"id": "q1"}, "rollouts": ballots(("a", "a", "b"), ("a", "b", "c"))},
        {"problem": {"id": "q2"}, "rollouts": ballots(("b", "b", "a"), (None, "a", "b"))},
    ]
    report = free_riding(write(tmp_path / "log.jsonl", {"schema": "ccpo.episodes/1"}, *lines))
    # rewards 1, 1/3 and 0, 1/2; without v0: a|b 1/2, b|c 0 and b|a 1/2, a|b 1/2
    assert report["agents"]["v0"]["removal"]["mean"] == pytest.approx((4 / 3 - 0.5) / 4 + (0.5 - 1.0) / 4)
    # without v2: a|a 1, a|b 1/2 and b|b 0, a 1
    assert report["agents"]["v2"]["removal"]["mean"] == pytest.approx((4 / 3 - 1.5) / 4 + (0.5 - 1.0) / 4)
    total = sum(found["shapley"]["mean"] for found in report["agents"].values())
    assert total == pytest.approx(report["team"]["mean"])
    assert any("assumed" in line for line in report["untold"])


def test_votes_whose_count_is_not_what_was_paid_are_not_believed(tmp_path):
    rollouts = [{**r, "reward": 1.0} for r in ballots(("b", "b", "a"), ("b", "b", "b"))]
    lines = [{"problem": {"id": f"q{i}"}, "rollouts": rollouts} for i in range(3)]
    report = free_riding(write(tmp_path / "log.jsonl", {"schema": "ccpo.episodes/1"}, *lines))
    assert {found["verdict"] for found in report["agents"].values()} == {"untold"}
    assert any("cannot be counted again" in line for line in report["untold"])


def test_voters_that_heard_each_other_are_not_counted_out(tmp_path):
    turns = [{"name": f"v{i}", "agent": f"v{i}", "reads": ["v0"] if i else []} for i in range(3)]
    header = {"schema": "ccpo.episodes/1", "team": {"agents": ["v0", "v1", "v2"], "decider": None, "turns": turns}}
    lines = [{"problem": {"id": f"q{i}"}, "rollouts": ballots(("a", "a", "b"))} for i in range(3)]
    report = free_riding(write(tmp_path / "log.jsonl", header, *lines))
    assert {found["verdict"] for found in report["agents"].values()} == {"untold"}


def test_a_runs_own_episodes_are_a_log(tmp_path):
    vote = scripted_run(tmp_path / "vote", VOTERS, HEALTHY_VOTE, steps=2, credit={"kind": "shared"})
    report = free_riding(vote.episode_file(2))
    assert report["problems"] == 16
    assert all(found["removal"] and found["shapley"] for found in report["agents"].values())
    assert not any("assumed" in line for line in report["untold"])
    pair = scripted_run(
        tmp_path / "pair", PAIR, HEALTHY, steps=2, rollout={"prompts": 16, "samples": 4, "removal": "blank"}
    )
    found = free_riding(pair.episode_file(1))["agents"]
    assert found["solver"]["verdict"] == "decides"
    assert found["thinker"]["removal"] is None
    assert found["thinker"]["blank"]["mean"] > 0.3


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "no problem in it"),
        ([HEADER], "no problem in it"),
        ([{"schema": "other/1"}], "schema 'other/1'"),
        ([asked(1, [1.0], [])], "no header"),
        ([HEADER, {"rollouts": []}], "line 2: 'problem' is missing"),
        ([HEADER, {"problem": {"id": "q"}, "rollouts": []}], "rollouts is empty"),
        ([HEADER, {"problem": {"id": "q"}, "rollouts": [{"reward": "good"}]}], "reward is 'good'"),
        ([HEADER, {"problem": {"id": "q"}, "rollouts": [{"reward": True}]}], "reward is True"),
        ([HEADER, asked(1, [1.0], [0.0]) | {"counterfactuals": [{"removed": [], "reward": 1}]}], "removed is empty"),
        ([HEADER, [1]], "a line is an object"),
        ([{"schema": "ccpo.episodes/1"}, {"problem": {"id": "q"}, "rollouts": [{"reward": 1}]}], "names no agents"),
    ],
)
def test_a_log_that_cannot_be_read_is_refused_with_the_reason(tmp_path, records, said):
    with pytest.raises(UserError) as caught:
        free_riding(write(tmp_path / "log.jsonl", *records))
    assert said in str(caught.value)


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run's folder nor a file"):
        free_riding(tmp_path / "nothing")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"schema": "ccpo.episodes/1"}\n' * 100)[:40])
    with pytest.raises(UserError, match="cannot be read as JSON lines"):
        free_riding(tmp_path / "cut.gz")


# --- on a terminal ------------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns(pair):
    console = Console(width=80, record=True, force_terminal=False)
    free_riding_table(pair | {"source": "runs/[red]demo"}, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "runs/[red]demo" in text
    for word in ("thinker", "helps", "decides", "Not told: solver decides", "needs"):
        assert word in text


def test_a_report_of_a_log_is_read_from_the_same_table(tmp_path):
    log = read_log(write(tmp_path / "log.jsonl", HEADER, *(asked(i, [1.0], [0.0]) for i in range(3))))
    console = Console(width=80, record=True, force_terminal=False)
    free_riding_table(free_riding_of_log(log, 0.05), console)
    assert "planner  1.00 ± 1.00" in console.export_text()


def test_names_in_a_log_cannot_drive_the_terminal(tmp_path):
    header = {
        "schema": "ccpo.episodes/1",
        "team": {"agents": ["\x1b[2Jplanner", "[red]writer"], "decider": "[red]writer"},
    }
    lines = [asked(i, [1.0], [0.0], removed="\x1b[2Jplanner") for i in range(3)]
    report = free_riding(write(tmp_path / "log.jsonl", header, *lines))
    console = Console(width=80, record=True, force_terminal=False)
    free_riding_table(report, console)
    text = console.export_text()
    assert "\x1b" not in text
    assert "[red]writer" in text
