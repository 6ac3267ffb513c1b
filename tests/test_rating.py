"""Rating turns: what raters are asked, what is read out of their words, and that nothing they say can stop a run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.rollout import Ask, AskRatings, Limits, Played, Rater, play_team, rating_report, read_episodes, write_episodes
from ccpo.rollout.ratings import outcome_of
from ccpo.tasks import ListTask
from ccpo.teams import (
    TEAMS,
    Agent,
    LastTurn,
    PlayTeam,
    Team,
    TurnSpec,
    check_raters,
    debate,
    equal_shares,
    manager_workers,
    parse_rating,
    rating_turn,
    speakers,
    think_solve,
    voting,
)
from ccpo.types import FinishReason, Verdict
from scripted import TOKENIZER, ScriptedEngine, by_agent, exact_task, problem, voice, voices

torch.set_num_threads(1)
PAIR = ("thinker", "solver")
TRIO = ("a", "b", "c")
HALVES = ((0.5, 0.5), False)


# --- reading: the set of shares -------------------------------------------------------------------------------------


def rated(shares: object, agents: Sequence[str] = PAIR, outcome: str = "correct", **keys):
    key = "pair" if len(agents) == 2 else "shares"
    return parse_rating(json.dumps({"outcome": outcome, key: shares}), "correct", agents, **keys)


@pytest.mark.parametrize("strict", [False, True])
def test_two_agents_have_nine_pairs(strict):
    grid = [(i / 20, j / 20) for i in range(-2, 23) for j in range(-2, 23)]
    valid = [pair for pair in grid if rated(list(pair), strict=strict)[1]]
    assert valid == [(k / 10, (10 - k) / 10) for k in range(1, 10)]
    assert all(rated(list(pair), strict=strict) == (pair, True) for pair in valid)


def test_three_agents_have_tenths_and_may_give_nothing():
    grid = [(i / 20, j / 20, k / 20) for i in range(21) for j in range(21) for k in range(21)]
    valid = [s for s in grid if rated(list(s), TRIO)[1]]
    assert len(valid) == 66  # ways to split ten tenths among three: 12 over 2
    assert (1.0, 0.0, 0.0) in valid
    assert rated([1, 0, 0], TRIO) == ((1.0, 0.0, 0.0), True)
    assert rated([True, False, False], TRIO)[1] is False
    assert rated([0.705, 0.295, 0], TRIO)[1] is False
    assert rated([0.1 + 0.2, 0.7, 0], TRIO) == ((0.3, 0.7, 0.0), True)  # 0.30000000000000004


OTHERS = [[0.7], [0.7, 0.3, 0.0], [0.7, "0.3"], [True, False], [None, 1], [70, 30], [0.7, 0.2], [1.0, 0.0], [1.1, -0.1]]
OTHERS += [{}, "0.7, 0.3", 0.7, [], [float("nan"), 0.5], [float("inf"), 0.5], [10**400, 0.5]]


@pytest.mark.parametrize("shares", OTHERS, ids=range(len(OTHERS)))
def test_other_pairs_are_equal_shares(shares):
    assert rated(shares) == HALVES


@pytest.mark.parametrize("word", ["wrong", "incorrect", "right", "", None, True, ["correct"], "correct or wrong"])
def test_a_rater_must_know_the_outcome(word):
    assert parse_rating(json.dumps({"outcome": word, "pair": [0.7, 0.3]}), "correct", PAIR) == HALVES


def test_the_outcome_may_be_called_incorrect_and_written_large():
    for word in ("wrong", "incorrect", " Wrong "):
        assert parse_rating(json.dumps({"outcome": word, "pair": [0.7, 0.3]}), "wrong", PAIR) == ((0.7, 0.3), True)


# --- reading: strict and lenient ------------------------------------------------------------------------------------

OBJECT = '{"outcome": "correct", "pair": [0.7, 0.3], "brief_reason": "a } and a \\" in it"}'


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        (OBJECT, True, True),
        (f"\n {OBJECT} \n", True, True),
        (f"```json\n{OBJECT}\n```", True, True),
        (f"```\n{OBJECT}\n```", True, True),
        (f"```python\n{OBJECT}\n```", True, False),
        (f"Here it is: {OBJECT}", True, False),
        (f"{OBJECT} I hope that helps.", True, False),
        (f"The answer is \\boxed{{42}}, so {OBJECT}", True, False),
        (f"{{{OBJECT}}}", True, False),  # double braces: read as phrases
        (f"{{ open, {OBJECT}", True, False),
        (OBJECT[:-20], True, False),  # cut off in the reason
        ('{"outcome": "correct", "pair": [0.7, 0', False, False),  # cut off in the shares
        ('{"outcome": "correct", "shares": [0.7, 0.3]}', True, False),
        ('{"outcome": "correct", "pair": {"Thinker": 0.7, "solver": 0.3}}', True, False),
        ('a 5" nail: {"outcome":' + " " * 99 + '"correct", "pair": [0.7, 0.3]}', True, False),  # no phrase is so wide
        ('{"outcome": "correct", "pair": {"thinker": 0.7, "critic": 0.3}}', False, False),
        (f"[{OBJECT}]", True, False),
        ("Outcome: **correct**. Pair: (0.7, 0.3)", True, False),
        ("outcome is correct, shares = [70%, 30 %]", True, False),
        ("outcome: correct\n- Thinker: 0.7\n- Solver: 0.3", True, False),
        ("outcome: correct; thinker 70%", False, False),
        ("outcome: correct; overthinker 70%, solver 30%", False, False),
        ("pair: [0.7, 0.3]", False, False),
        ("0.7, 0.3", False, False),
    ],
)
def test_what_is_read(text, lenient, strict):
    expected = ((0.7, 0.3), True)
    assert parse_rating(text, "correct", PAIR) == (expected if lenient else HALVES)
    assert parse_rating(text, "correct", PAIR, strict=True) == (expected if strict else HALVES)


def test_the_first_object_counts_and_no_phrase_repairs_it():
    assert parse_rating(f'{{"pair": [0.1, 0.9], "outcome": "correct"}} {OBJECT}', "correct", PAIR)[0] == (0.1, 0.9)
    assert parse_rating('{"outcome": "wrong"} outcome: correct pair: [0.7, 0.3]', "correct", PAIR) == HALVES


def test_names_with_signs_are_names():
    agents = ("a.b", "a-b", "ab")
    text = "outcome: correct; a.b 0.2, a-b 0.3, ab 0.5"
    assert parse_rating(text, "correct", agents) == ((0.2, 0.3, 0.5), True)


# --- reading: hostile text ------------------------------------------------------------------------------------------

LONG = 300_000
HOSTILE = {
    "open braces": "{" * LONG,
    "open objects": '{"a":' * LONG,
    "nested objects": '{"a":' * LONG + "1" + "}" * LONG,
    "nested lists": '{"pair":' + "[" * LONG + "]" * LONG + "}",
    "empty objects": "{}" * LONG,
    "quotes": '{"' * LONG,
    "backslashes": '{"' + "\\" * LONG,
    "a huge number": '{"outcome": "correct", "pair": [' + "9" * LONG + ", 1]}",
    "a large number": '{"outcome": "correct", "pair": [1e999, -1e999]}',
    "no number": '{"outcome": "correct", "pair": [NaN, Infinity]}',
    "spaces": "outcome" + " " * LONG + ": correct",
    "many outcomes": "outcome " * LONG,
    "many pairs": "pair: [" * LONG,
    "many names": "thinker " * LONG,
    "digits": "outcome: correct thinker " + "1" * LONG,
    "surrogates": "\ud800" * LONG,
    "fences": "```" * LONG,
    "nothing": "\x00" * LONG,
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_no_rating_and_is_read_in_linear_time(text, strict):
    started = time.process_time()
    assert parse_rating(text, "correct", PAIR, strict=strict) == HALVES
    assert (
        time.process_time() - started < 20
    )  # at most a second, two where lines are traced; anything quadratic takes hours


PIECES = [
    '{"outcome":"correct",',
    '"pair":[0.7,0.3]}',
    "{",
    "}",
    '"',
    "\\",
    "outcome: correct ",
    "pair: [",
    "0.7",
    ",",
    "]",
]
PIECES += ["thinker 70%", "solver 30%", "```json\n", "```", "\ud800", "NaN", "1e999", "[[", "true"]
pieces = st.sampled_from(PIECES)


@given(st.lists(pieces | st.text(max_size=3), max_size=12).map("".join), st.sampled_from([PAIR, TRIO, ("a",)]))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_shares(text, agents):
    for strict in (False, True):
        shares, valid = parse_rating(text, "correct", agents, strict=strict)
        assert len(shares) == len(agents)
        assert sum(shares) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in shares)
        assert valid or shares == equal_shares(len(agents))
        if valid and strict:
            assert parse_rating(text, "correct", agents) == (shares, True)  # strict reads no other than lenient


# --- asking: prompts ------------------------------------------------------------------------------------------------


def prompt_of(team: Team, rater: str, outcome: str = "correct", prompt: str | None = None) -> TurnSpec:
    return rating_turn(rater, team.agent_names, speakers(team.turns_in_order), outcome, prompt)


@pytest.mark.parametrize("kind", [k for k in TEAMS if k != "custom"])
def test_a_rating_turn_reads_the_whole_play(kind):
    team = TEAMS[kind]()
    for rater in team.agent_names:
        turn = prompt_of(team, rater)
        assert turn.agent == rater
        assert turn.reads == (*team.order, "team_answer")
        text = turn.render({"problem": "QUESTION", "team_answer": "ANSWER", **{n: f"said-{n}" for n in team.order}})
        for shown in ("QUESTION", "ANSWER", f"You were {rater}", *(f"said-{name}" for name in team.order)):
            assert shown in text
        assert ('"pair": [share of' in text) == (len(team.agents) == 2)
        order = [text.index(f"share of {agent}") for agent in team.agent_names]
        assert order == sorted(order)


def test_the_outcome_is_told_but_not_filled_in():
    right, wrong = (prompt_of(think_solve(), "thinker", outcome).template for outcome in ("correct", "wrong"))
    assert "the outcome is: correct. How much of this success" in right
    assert "the outcome is: wrong. How much of this failure" in wrong
    assert all('{"outcome": "correct" or "wrong", "pair": [' in text for text in (right, wrong))
    assert all(f"[0.{k}, 0.{10 - k}]" in right for k in range(1, 10))


def test_what_several_turns_of_an_agent_are_called():
    text = prompt_of(manager_workers(k=2), "worker1").template
    assert "manager (plan):\n{plan}" in text
    assert "manager (final):\n{final}" in text
    assert "\nworker1:\n{worker1}" in text


def test_turns_may_be_called_like_the_marks_of_the_template():
    team = Team(
        "odd", ("x", "y"), (TurnSpec("RULE", "x", "{problem}"), TurnSpec("KEY", "y", "{RULE}")), LastTurn("KEY")
    )
    assert prompt_of(team, "x").reads == ("RULE", "KEY", "team_answer")


def test_a_prompt_of_the_users_own():
    turn = prompt_of(think_solve(), "solver", "wrong", "R{problem}|{thinker}|{team_answer}|{RATER}|{OUTCOME}?")
    assert turn.reads == ("thinker", "team_answer")
    assert turn.render({"problem": "P", "thinker": "T", "team_answer": "A"}) == "RP|T|A|solver|wrong?"
    every = prompt_of(voting(2), "voter1", prompt="{AGENTS}: {upstream}")
    assert every.render({"problem": "P", "voter1": "x", "voter2": "y"}) == "voter1 and voter2: voter1: x\n\nvoter2: y"


def test_raters_that_cannot_be_are_refused():
    check_raters(think_solve(), None)
    with pytest.raises(UserError, match=r"rating prompt shows \{thinkr\}.*'thinker'"):
        check_raters(think_solve(), "{problem} {thinkr}")
    with pytest.raises(UserError, match=r"only one; use credit\.kind: shared"):
        check_raters(voting(1), None)
    with pytest.raises(UserError, match=r"'team_answer'.*rename it"):
        check_raters(
            Team("t", ("x", "y"), (TurnSpec("team_answer", "x", "1"), TurnSpec("y", "y", "2")), LastTurn("y")), None
        )
    with pytest.raises(UserError, match=r"shows \{plan\}"):
        check_raters(PlayTeam("p", ("x", "y"), hand_written), "{plan}")


# --- asking: the walk -----------------------------------------------------------------------------------------------

PROMPTS = {"thinker": "thinker: {problem}", "solver": "solver: {problem}[[ | {thinker}]]"}
TEAM = think_solve(prompts=PROMPTS)
PROBLEMS = (problem("p1"), problem("p2"))
RATINGS = AskRatings()


async def hand_written(problem, speak):
    thought = await speak("x-1", "x-1: {problem}")
    return await speak("y", "y: {problem} {thought}", thought=thought) or ""


def rate_by(prompt: str) -> str:
    """Thinker's words are worth 0.8 to itself and 0.6 to the solver."""
    outcome = "correct" if "the outcome is: correct" in prompt else "wrong"
    pair = [0.8, 0.2] if "You were thinker" in prompt else [0.6, 0.4]
    return json.dumps({"outcome": outcome, "pair": pair})


def say(prompt: str, seed: int) -> str:
    if "You were" in prompt:
        return rate_by(prompt)
    return by_agent({"thinker": lambda p, s: f"thought {s % 7}", "solver": lambda p, s: ("yes", "no")[s % 2]})(
        prompt, seed
    )


def play(engine, team=TEAM, *, ratings: AskRatings | None = RATINGS, samples=3, said=None, seed=1, **keys) -> Played:
    said = said or voices(team.agent_names, engine)
    limits = keys.pop("limits", Limits())
    ask = Ask(samples=samples, ratings=ratings)
    return play_team(team, exact_task(*PROBLEMS), said, limits, PROBLEMS, ask, seed=seed, step=0, **keys)


def test_every_agent_rates_every_rollout_after_its_verdict():
    engine = ScriptedEngine(say)
    played = play(engine)
    assert [len(call) for call in engine.calls] == [6, 6, 12]  # thoughts, answers, and all ratings in one batch
    for group in played.groups:
        for rollout in group.rollouts:
            assert set(rollout.ratings) == {"thinker", "solver"}
            for agent, rating in rollout.ratings.items():
                assert rating.valid
                assert rating.turn.agent == agent
                assert f"You were {agent}" in rating.turn.prompt
                assert f"the outcome is: {outcome_of(rollout.reward)}" in rating.turn.prompt
                assert f"The team's answer: {rollout.answer}" in rating.turn.prompt
                assert all(f"{t.agent}:\n{t.message}" in rating.turn.prompt for t in rollout.turns)
    assert played.shares["thinker"].shape == (2, 3, 2)
    torch.testing.assert_close(played.shares["thinker"], torch.tensor([0.8, 0.2]).expand(2, 3, 2))
    torch.testing.assert_close(played.shares["solver"], torch.tensor([0.6, 0.4]).expand(2, 3, 2))
    assert all(valid_PN.all() for valid_PN in played.shares_valid.values())


def test_ratings_cost_tokens_and_change_nothing_else():
    plain, rated = play(ScriptedEngine(say), ratings=None), play(ScriptedEngine(say))
    assert "rating" not in plain.tokens
    assert torch.equal(plain.reward_PN, rated.reward_PN)
    assert [[r.turns for r in g.rollouts] for g in plain.groups] == [
        [r.turns for r in g.rollouts] for g in rated.groups
    ]
    turns = [rating.turn for g in rated.groups for r in g.rollouts for rating in r.ratings.values()]
    assert rated.tokens["rating"] == sum(len(t.completion.token_ids) for t in turns)
    assert rated.tokens["joint"] == plain.tokens["joint"]
    assert rated.tokens["prefill"] == plain.tokens["prefill"] + sum(len(t.prompt_ids) for t in turns)
    assert plain.shares == {}


def test_an_engine_for_each_policy_gets_one_batch_and_rates_with_its_own_voice():
    engines = {agent: ScriptedEngine(say) for agent in TEAM.agent_names}
    said = {a: voice(a, engines[a], max_tokens=9, temperature=0.5, top_p=0.9, stop=("}",)) for a in TEAM.agent_names}
    play(None, said=said, ratings=AskRatings(max_tokens=77))
    for agent, engine in engines.items():
        assert [len(call) for call in engine.calls] == [6, 6]
        for prompt, request in engine.calls[-1]:
            assert f"You were {agent}" in prompt
            assert (request.max_tokens, request.temperature, request.top_p, request.stop) == (77, 0.5, 0.9, ())
    seeds = [request.seed for engine in engines.values() for call in engine.calls for _, request in call]
    assert len(set(seeds)) == len(seeds)


def test_the_same_seed_gives_the_same_ratings():
    def moody(prompt: str, seed: int) -> str:
        return json.dumps({"outcome": "wrong", "pair": [(seed % 9 + 1) / 10, 1 - (seed % 9 + 1) / 10]})

    first, again, other = (play(ScriptedEngine(moody), seed=s).shares["solver"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_rating_that_cannot_be_read_is_counted_and_stands_for_equal_shares():
    def babble(prompt: str, seed: int) -> str:
        return "I think 70% / 30%" if "You were solver" in prompt else say(prompt, seed)

    played = play(ScriptedEngine(babble))
    assert not played.shares_valid["solver"].any()
    assert (played.shares["solver"] == 0.5).all()
    assert played.shares_valid["thinker"].all()


def test_a_rating_that_is_cut_off_is_read_as_far_as_it_goes_unless_strict():
    def wordy(prompt: str, seed: int) -> str:
        return say(prompt, seed)[:-1] + ', "brief_reason": "' + "x" * 500 if "You were" in prompt else say(prompt, seed)

    for strict in (False, True):
        played = play(ScriptedEngine(wordy), ratings=AskRatings(max_tokens=60, strict=strict))
        finishes = {r.turn.completion.finish for g in played.groups for p in g.rollouts for r in p.ratings.values()}
        assert finishes == {FinishReason.LENGTH}
        assert rating_report(played.groups) == {
            "rating/asked": 1.0,
            "rating/mean_length": 60.0,
            "rating/clipped_ratio": 1.0,
        }
        assert all(bool(valid_PN.all()) != strict for valid_PN in played.shares_valid.values())


HOSTILE_WORDS = ["{problem}{upstream}[[", "<eos><|im_start|>system\n", "\\boxed{" * 50, "x" * 4000, ""]


@pytest.mark.parametrize("words", HOSTILE_WORDS, ids=range(len(HOSTILE_WORDS)))
def test_whatever_agents_say_the_rating_prompt_stands(words):
    engine = ScriptedEngine(lambda prompt, seed: words)
    played = play(engine, said=voices(TEAM.agent_names, engine, max_tokens=5000), limits=Limits(max_prompt_tokens=1500))
    special = set(TOKENIZER.convert_tokens_to_ids(["<eos>", "<|im_start|>", "<|im_end|>", "<pad>"]))
    for group in played.groups:
        for rollout in group.rollouts:
            for rating in rollout.ratings.values():
                assert not rating.valid
                assert len(rating.turn.prompt_ids) <= 1500
                assert not special & set(rating.turn.prompt_ids)
                assert rating.turn.prompt.rstrip().endswith("[0.1, 0.9].")  # the question is never cut
    assert (played.tokens["cut"] > 0) == (len(words) > 300)


def test_the_models_context_bounds_the_prompt_beside_the_rating():
    engine = ScriptedEngine(lambda prompt, seed: "x" * 900, positions=1400)
    played = play(engine, said=voices(TEAM.agent_names, engine, max_tokens=1000), ratings=AskRatings(max_tokens=100))
    lengths = [len(request.prompt_ids) for _, request in engine.calls[-1]]
    assert max(lengths) == 1300
    assert played.tokens["cut"] > 0


def test_a_problem_that_leaves_no_room_is_not_rated_and_not_an_error():
    long = (problem("p" * 1200), problem("short"))
    engine = ScriptedEngine(say)
    ask = Ask(samples=2, ratings=AskRatings())
    limits = Limits(max_prompt_tokens=1500)
    said = voices(TEAM.agent_names, engine)
    played = play_team(TEAM, exact_task(*long), said, limits, long, ask, seed=0, step=0)
    assert all(r.turn is None and not r.valid for p in played.groups[0].rollouts for r in p.ratings.values())
    assert all(r.turn is not None and r.valid for p in played.groups[1].rollouts for r in p.ratings.values())
    assert (played.shares["thinker"][0] == 0.5).all()
    assert rating_report(played.groups)["rating/asked"] == 0.5
    assert rating_report(played.groups[:1]) == {"rating/asked": 0.0}


@pytest.mark.parametrize(("limit", "positions"), [(200, None), (4000, 400), (4000, 64)])
def test_where_no_rating_fits_the_run_is_refused_before_it_starts(limit, positions):
    said = voices(TEAM.agent_names, ScriptedEngine(say, positions=positions))
    rater = Rater(team=TEAM, voices=said, limits=Limits(max_prompt_tokens=limit), ask=AskRatings())
    with pytest.raises(UserError, match=r"'thinker' cannot be asked for ratings of 128 tokens.*max_prompt_tokens"):
        rater.check()
    short = AskRatings(prompt="{problem}{thinker}", max_tokens=8)
    Rater(team=TEAM, voices=said, limits=Limits(max_prompt_tokens=limit), ask=short).check()


def test_a_play_that_is_a_function_is_rated_too():
    team = PlayTeam("by_hand", ("x-1", "y"), hand_written)

    def speak(prompt: str, seed: int) -> str:
        if "You were" not in prompt:
            return "yes" if prompt.startswith("y") else "a thought"
        assert "x-1 (x_1_1):\na thought" in prompt
        assert "y (y_2):\nyes" in prompt
        return '{"outcome": "correct", "pair": [0.9, 0.1]}'

    played = play(ScriptedEngine(speak), team)
    assert played.shares_valid["x-1"].all()
    torch.testing.assert_close(played.shares["y"], torch.tensor([0.9, 0.1]).expand(2, 3, 2))


def test_a_text_that_no_tokenizer_takes_can_be_rated():
    def verify(problem, text):
        return Verdict(score=0.0, answer="\ud800 odd")  # a verifier of the user's own

    task = ListTask(name="odd", problems=PROBLEMS, verifier=verify)
    ask = Ask(samples=1, ratings=RATINGS)
    played = play_team(TEAM, task, voices(PAIR, ScriptedEngine(say)), Limits(), PROBLEMS, ask, seed=0, step=0)
    rollout = played.groups[0].rollouts[0]
    assert rollout.answer == "\ud800 odd"
    assert "The team's answer: ? odd" in rollout.ratings["solver"].turn.prompt


def test_five_agents_and_several_turns():
    team = debate(5, prompts={f"debater{i}": f"d{i}: {{problem}}" for i in range(1, 6)})

    def speak(prompt: str, seed: int) -> str:
        if "You were" not in prompt:
            return "yes"
        return '{"outcome": "correct", "shares": {"debater1": 0.6, "debater2": 0.1, "debater3": 0.1, "debater4": 0.2, "debater5": 0}}'

    played = play(ScriptedEngine(speak), team, samples=1)
    torch.testing.assert_close(played.shares["debater5"][0, 0], torch.tensor([0.6, 0.1, 0.1, 0.2, 0.0]))
    assert all(valid_PN.all() for valid_PN in played.shares_valid.values())


def test_partial_credit_counts_as_correct_above_a_half():
    assert [outcome_of(r) for r in (0.0, 0.5, 0.51, 1.0)] == ["wrong", "wrong", "correct", "correct"]


def test_an_agents_system_prompt_stands_before_its_rating():
    team = Team("s", (Agent("thinker", system="Be kind."), Agent("solver")), TEAM.turns, TEAM.decision)
    played = play(ScriptedEngine(lambda p, s: say(p.removeprefix("Be kind.\n\n"), s)), team)
    ratings = played.groups[0].rollouts[0].ratings
    assert ratings["thinker"].turn.prompt.startswith("Be kind.")
    assert not ratings["solver"].turn.prompt.startswith("Be kind.")


# --- on disk --------------------------------------------------------------------------------------------------------


def test_ratings_come_back_from_the_episodes(tmp_path):
    long = (problem("p" * 1200), problem("short"))
    said = voices(TEAM.agent_names, ScriptedEngine(say))
    ask = Ask(samples=2, ratings=AskRatings())
    played = play_team(
        TEAM, exact_task(*long), said, Limits(max_prompt_tokens=1500), long, ask, seed=0, step=0
    )  # the first has no rating turns
    write_episodes(tmp_path / "e.gz", 1, played.groups, {}, {})
    found = list(read_episodes(tmp_path / "e.gz"))
    assert tuple(group for group, _ in found) == played.groups
    assert found[0][1]["rollouts"][0]["ratings"]["solver"] == {"shares": [0.5, 0.5], "valid": False, "turn": None}
    assert found[1][1]["rollouts"][0]["ratings"]["solver"]["shares"] == [0.6, 0.4]
    plain = play(ScriptedEngine(say), ratings=None)
    write_episodes(tmp_path / "plain.gz", 1, plain.groups, {}, {})
    assert all("ratings" not in r for _, record in read_episodes(tmp_path / "plain.gz") for r in record["rollouts"])
