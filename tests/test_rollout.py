"""The walk: what is decoded and what is not, what every play is paid, whatever the order of the batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.rollout import Ask, CounterfactualCache, Limits, Played, Walker, play_team
from ccpo.rollout.seeds import seed_of
from ccpo.teams import (
    Agent,
    Function,
    LastTurn,
    Majority,
    Team,
    TurnSpec,
    chain,
    debate,
    manager_workers,
    think_solve,
    voting,
)
from ccpo.types import FinishReason, Removal
from scripted import CountingTask, ScriptedEngine, by_agent, encode, exact_task, pick, problem, voice, voices

PROMPTS = {"thinker": "thinker: {problem}", "solver": "solver: {problem}[[ | {thinker}]]"}
PAIR = think_solve(prompts=PROMPTS)
PROBLEMS = (problem("p1"), problem("p2"))


def voters(k: int, **keys) -> Team:
    names = [f"voter{i}" for i in range(1, k + 1)]
    return voting(k, prompts={name: f"{name}: {{problem}}" for name in names}, **keys)


ASKS = ("draws", "removal", "placeholder", "training", "keep_turns", "branch", "swaps")


def without(*agents: str) -> frozenset[tuple[str, ...]]:
    return frozenset((agent,) for agent in agents)


def play(team: Team, engine, problems=PROBLEMS, *, samples=2, coalitions=frozenset(), seed=1, step=0, **keys) -> Played:
    ask_keys = {k: keys.pop(k) for k in ASKS if k in keys}
    ask = Ask(samples=samples, coalitions=coalitions, **ask_keys)
    said = keys.pop("voices", None) or voices(team.agent_names, engine)
    task = keys.pop("task", None) or exact_task(*problems)
    limits = keys.pop("limits", Limits())
    return play_team(team, task, said, limits, problems, ask, seed=seed, step=step, **keys)


def yes_no(prompt: str, seed: int) -> str:
    return pick(seed, "yes", "no")


def echo(prompt: str, seed: int) -> str:
    return f"{prompt.partition(':')[0]}{seed % 1000}"


def turns(played: Played, slot: int = 0, n: int = 0) -> dict[str, str]:
    return {t.name: t.message for t in played.groups[slot].rollouts[n].turns}


# --- thinker and solver ---------------------------------------------------------------------------------------------


def test_a_joint_rollout_is_two_decodes_and_the_solver_reads_the_thought():
    engine = ScriptedEngine(echo)
    played = play(PAIR, engine, samples=3)
    assert [len(batch) for batch in engine.calls] == [6, 6]
    assert engine.prompts[:6] == ["thinker: p1"] * 3 + ["thinker: p2"] * 3
    for n in range(3):
        spoken = turns(played, 1, n)
        assert engine.prompts[6 + 3 + n] == f"solver: p2 | {spoken['thinker']}"
    assert played.reward_PN.shape == (2, 3)
    assert played.without == {}


def test_solo_answers_are_decoded_only_when_asked_for_and_in_the_solvers_own_batch():
    engine = ScriptedEngine(echo)
    played = play(PAIR, engine, samples=3, coalitions=without("thinker"))
    assert [len(batch) for batch in engine.calls] == [6, 12]  # thoughts, then joint and solo answers in one call
    assert Counter(p for p, _ in engine.calls[1] if "|" not in p) == {"solver: p1": 3, "solver: p2": 3}
    assert played.without[("thinker",)].shape == (2, 1, 3)


def test_joint_and_solo_rewards_are_those_of_their_own_texts():
    def say(prompt: str, seed: int) -> str:
        if prompt.startswith("thinker"):
            return "good" if "p1" in prompt else "bad"
        return "yes" if "good" in prompt else "no" if "bad" in prompt else pick(seed, "yes", "no")

    played = play(PAIR, ScriptedEngine(say), samples=4, coalitions=without("thinker"))
    assert played.reward_PN.tolist() == [[1.0] * 4, [0.0] * 4]
    for slot, group in enumerate(played.groups):
        solos = group.counterfactuals
        assert [c.removed for c in solos] == [("thinker",)] * 4
        assert [c.draw for c in solos] == [0, 1, 2, 3]
        assert all(c.rollout is None and [t.name for t in c.turns] == ["solver"] for c in solos)
        assert [c.reward for c in solos] == [float(c.turns[0].message == "yes") for c in solos]
        assert played.without[("thinker",)][slot, 0].tolist() == [c.reward for c in solos]
    assert 0 < sum(c.reward for g in played.groups for c in g.counterfactuals) < 8


def test_the_number_of_solo_draws_can_be_chosen():
    engine = ScriptedEngine(yes_no)
    assert play(PAIR, engine, coalitions=without("thinker"), draws=5).without[("thinker",)].shape == (2, 1, 5)
    assert sum("|" not in p for p, _ in engine.calls[1]) == 10


def test_the_sole_decider_is_removed_without_decoding_and_pays_nothing():
    for removal in (Removal.DROP, Removal.BLANK, Removal.PLACEHOLDER):
        engine = ScriptedEngine(lambda prompt, seed: "yes")
        played = play(PAIR, engine, coalitions=without("solver"), removal=removal, placeholder="yes")
        assert played.reward_PN.min() == 1.0
        assert played.without[("solver",)].abs().sum() == 0
        assert played.without[("solver",)].shape == (2, 1, 1)
        assert [len(batch) for batch in engine.calls] == [4, 4]
        assert played.tokens["counterfactual"] == 0


def test_every_sample_has_a_seed_of_its_own_and_the_seed_of_the_run_and_step_change_all():
    engine = ScriptedEngine(echo)
    play(PAIR, engine, samples=4, coalitions=without("thinker"))
    first = [request.seed for batch in engine.calls for _, request in batch]
    assert len(set(first)) == len(first) == 24
    for keys in ({"seed": 2}, {"step": 1}):
        other = ScriptedEngine(echo)
        play(PAIR, other, samples=4, coalitions=without("thinker"), **keys)
        assert not set(first) & {request.seed for batch in other.calls for _, request in batch}


def test_seeds_are_fixed_numbers():
    assert seed_of(1, "a") == seed_of(1, "a")
    assert seed_of(1, "a") != seed_of("a", 1)
    assert seed_of("\ud800") >= 0  # a lone surrogate in a problem's id
    assert (
        seed_of(0, 0, "id", "text", "solver", None, 0) == 4988344070755280546
    )  # or else old runs do not resume as they were


def test_an_agents_sampling_reaches_its_requests():
    engine = ScriptedEngine(echo)
    spoken = {
        "thinker": voice("thinker", engine, max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, stop=("\n",)),
        "solver": voice("solver", engine, max_tokens=7),
    }
    played = play(PAIR, engine, voices=spoken)
    thought, answer = engine.calls[0][0][1], engine.calls[1][0][1]
    assert (thought.max_tokens, thought.temperature, thought.top_p, thought.top_k, thought.stop) == (
        9,
        0.5,
        0.9,
        3,
        ("\n",),
    )
    assert (answer.max_tokens, answer.temperature) == (7, 1.0)
    assert played.groups[0].rollouts[0].turn("thinker").temperature == 0.5


def test_a_turn_may_be_shorter_than_its_agents_limit_but_not_longer():
    limited = [
        TurnSpec("thinker", "a", "thinker: {problem}", max_tokens=5),
        TurnSpec("solver", "a", "s{thinker}", max_tokens=99),
    ]
    engine = ScriptedEngine(lambda prompt, seed: "x")
    play(Team("t", ("a",), limited, LastTurn("solver")), engine, voices={"a": voice("a", engine, max_tokens=20)})
    assert [batch[0][1].max_tokens for batch in engine.calls] == [5, 20]


def test_agents_with_engines_of_their_own_are_decoded_by_them():
    mine, yours = ScriptedEngine(echo), ScriptedEngine(echo)
    play(PAIR, None, voices={"thinker": voice("thinker", mine), "solver": voice("solver", yours)})
    assert {p.partition(":")[0] for p in mine.prompts} == {"thinker"}
    assert {p.partition(":")[0] for p in yours.prompts} == {"solver"}


def test_a_boxed_answer_is_stripped_for_the_reader_and_kept_in_the_record():
    team = think_solve(prompts=PROMPTS, strip_boxed=True)
    engine = ScriptedEngine(by_agent({"thinker": lambda *_: r"so \boxed{4}", "solver": lambda *_: "yes"}))
    played = play(team, engine)
    turn = played.groups[0].rollouts[0].turn("thinker")
    assert (turn.completion.text, turn.message) == (r"so \boxed{4}", "so")
    assert engine.calls[1][0][0] == "solver: p1 | so"


def test_long_messages_are_cut_by_the_readers_limit_and_counted():
    engine = ScriptedEngine(by_agent({"thinker": lambda *_: "abcdefgh", "solver": lambda *_: "yes"}))
    played = play(PAIR, engine, PROBLEMS[:1], limits=Limits(max_message_tokens=3))
    assert engine.calls[1][0][0] == "solver: p1 | abc"
    assert played.tokens["cut"] == 2 * 5
    assert played.groups[0].rollouts[0].turn("solver").cut_tokens == 5


def test_a_problem_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"rollout\.max_prompt_tokens"):
        play(PAIR, ScriptedEngine(echo), limits=Limits(max_prompt_tokens=8))


# --- ways to remove -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removal", "prompt"),
    [
        (Removal.DROP, "solver: p1"),
        (Removal.BLANK, "solver: p1 | "),
        (Removal.PLACEHOLDER, "solver: p1 | (gone)"),
    ],
)
def test_what_stands_in_the_place_of_a_removed_message(removal, prompt):
    engine = ScriptedEngine(lambda prompt, seed: "yes")
    play(PAIR, engine, PROBLEMS[:1], samples=1, coalitions=without("thinker"), removal=removal, placeholder="(gone)")
    assert [p for p, _ in engine.calls[1]] == ["solver: p1 | yes", prompt]


def test_a_frozen_agent_speaks_again_with_its_earlier_policy():
    now = ScriptedEngine(by_agent({"thinker": lambda *_: "new", "solver": lambda p, s: "yes" if "old" in p else "no"}))
    then = ScriptedEngine(lambda prompt, seed: "old")
    frozen = {"thinker": voice("thinker", then, policy="thinker@start")}
    played = play(PAIR, now, samples=3, coalitions=without("thinker"), removal=Removal.FROZEN, frozen=frozen)
    assert then.prompts == ["thinker: p1"] * 3 + ["thinker: p2"] * 3
    assert played.reward_PN.sum() == 0
    assert played.without[("thinker",)].tolist() == [[[1.0] * 3]] * 2
    first = played.groups[0].counterfactuals[0]
    assert [(t.name, t.policy) for t in first.turns] == [("thinker", "thinker@start"), ("solver", "solver")]


def test_removal_by_frozen_without_an_earlier_policy_says_so():
    with pytest.raises(UserError, match=r"'frozen' needs an earlier policy of agent 'thinker'"):
        play(PAIR, ScriptedEngine(echo), coalitions=without("thinker"), removal=Removal.FROZEN)


def test_two_agents_can_be_removed_together():
    team = chain(
        3,
        prompts={
            "agent1": "1: {problem}",
            "agent2": "2: {problem}[[ {agent1}]]",
            "agent3": "3: {problem}[[ {agent2}]]",
        },
    )
    engine = ScriptedEngine(lambda prompt, seed: "yes")
    played = play(team, engine, PROBLEMS[:1], samples=1, coalitions=frozenset({("agent1", "agent2")}))
    assert [p for p, _ in engine.calls[2]] == ["3: p1 yes", "3: p1"]
    assert played.without[("agent1", "agent2")].shape == (1, 1, 1)


# --- votes ----------------------------------------------------------------------------------------------------------


def recounted(answers: list[tuple[str, float]]) -> float:
    """The mean score of the most frequent answers, by hand."""
    votes = Counter(a for a, _ in answers)
    if not votes:
        return 0.0
    most = max(votes.values())
    scores = dict(answers)
    return fmean(scores[a] for a, count in votes.items() if count == most)


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 5), samples=st.integers(1, 4), seed=st.integers(0, 99))
def test_votes_are_counted_again_by_hand_and_no_token_is_decoded_for_it(k, samples, seed):
    team = voters(k)
    engine = ScriptedEngine(lambda prompt, s: pick(s, "yes", "yes", "no", "maybe", " "))
    played = play(team, engine, samples=samples, coalitions=without(*team.agent_names), seed=seed)
    assert len(engine.calls) == 1
    assert len(engine.prompts) == 2 * samples * k
    assert played.tokens["counterfactual"] == 0
    assert played.tokens["joint"] == engine.decoded_tokens
    for slot, group in enumerate(played.groups):
        for n, rollout in enumerate(group.rollouts):
            said = {t.agent: t.message.strip() for t in rollout.turns}
            ballots = {a: (text, float(text == "yes")) for a, text in said.items() if text}
            assert played.reward_PN[slot, n].item() == pytest.approx(recounted(list(ballots.values())))
            for agent in team.agent_names:
                left = [b for a, b in ballots.items() if a != agent]
                recount_N1 = played.without[(agent,)][slot].expand(samples, 1)  # one for all without the only voter
                assert recount_N1[n].tolist() == pytest.approx([recounted(left)])
                assert played.score[agent][slot, n].item() == float(said[agent] == "yes")


def test_a_recount_is_counted_once_however_many_draws_are_asked_for():
    played = play(voters(3), ScriptedEngine(yes_no), samples=2, coalitions=without("voter1"), draws=3)
    assert played.without[("voter1",)].shape == (2, 2, 1)
    assert len(played.groups[0].counterfactuals) == 2


def test_everything_is_judged_in_one_call_of_the_verifier():
    task = CountingTask(PROBLEMS)
    played = play(voters(3), ScriptedEngine(yes_no), samples=2, coalitions=without("voter1"), task=task)
    assert played.without[("voter1",)].shape == (2, 2, 1)
    assert [len(batch) for batch in task.judged] == [2 * 2 * 3 + 2 * 2 * 2]
    said = Counter((g.problem.text, t.message) for g in played.groups for r in g.rollouts for t in r.turns)
    assert Counter(task.judged[0][:12]) == said


@pytest.mark.parametrize("removal", [Removal.DROP, Removal.BLANK, Removal.PLACEHOLDER])
def test_a_removed_voter_has_no_vote_whatever_stands_in_its_place(removal):
    said = by_agent({"voter1": lambda *_: "yes", "voter2": lambda *_: "no", "voter3": lambda *_: "yes"})
    engine = ScriptedEngine(said)
    keys = {"coalitions": without("voter1", "voter2"), "removal": removal, "placeholder": "no"}
    played = play(voters(3), engine, PROBLEMS[:1], samples=1, **keys)
    assert played.reward_PN.item() == 1.0
    assert played.without[("voter1",)].item() == 0.5  # "no" against "yes", not two of "no"
    assert played.without[("voter2",)].item() == 1.0


def test_a_weighted_vote_weighs_confidence():
    said = by_agent({"voter1": lambda *_: "yes", "voter2": lambda *_: "no", "voter3": lambda *_: "no"})
    engine = ScriptedEngine(said, logprob=lambda text: -0.1 if text == "yes" else -2.0)
    played = play(voters(3, decision="weighted"), engine, PROBLEMS[:1], samples=1, coalitions=without("voter1"))
    assert played.reward_PN.item() == 1.0  # exp(-0.1) > 2 exp(-2)
    assert played.groups[0].rollouts[0].answer == "yes"
    assert played.without[("voter1",)].item() == 0.0


def test_a_sampled_vote_is_paid_its_expected_reward():
    said = by_agent({"voter1": lambda *_: "yes", "voter2": lambda *_: "no", "voter3": lambda *_: "no"})
    played = play(
        voters(3, decision="sampled"), ScriptedEngine(said), PROBLEMS[:1], samples=1, coalitions=without("voter2")
    )
    assert played.reward_PN.item() == pytest.approx(1 / 3)
    assert played.without[("voter2",)].item() == pytest.approx(1 / 2)


def test_a_decision_function_is_shown_who_is_left_and_is_verified():
    shown = []

    def first(problem, messages):
        shown.append(dict(messages))
        return next(iter(messages.values()))

    turns_ = [TurnSpec(name, name, f"{name}: {{problem}}") for name in ("a", "b")]
    team = Team("t", ("a", "b"), turns_, Function(first, ("a", "b")))
    engine = ScriptedEngine(by_agent({"a": lambda *_: "yes", "b": lambda *_: "no"}))
    played = play(team, engine, PROBLEMS[:1], samples=1, coalitions=frozenset({("a",), ("b",), ("a", "b")}))
    assert played.reward_PN.item() == 1.0
    assert [played.without[c].item() for c in (("a",), ("b",), ("a", "b"))] == [0.0, 1.0, 0.0]
    assert shown == [{"a": "yes", "b": "no"}, {"b": "no"}, {"a": "yes"}]


def test_a_decision_function_that_returns_no_text_is_refused():
    team = Team("t", ("a",), [TurnSpec("a", "a", "{problem}")], Function(lambda problem, messages: None, ("a",)))
    with pytest.raises(UserError, match=r"decision function of team 't' returned None on problem 'id-p1'"):
        play(team, ScriptedEngine(yes_no))


# --- longer graphs --------------------------------------------------------------------------------------------------

CHAIN = chain(
    3, prompts={"agent1": "1: {problem}", "agent2": "2: {problem}[[ {agent1}]]", "agent3": "3: {problem}[[ {agent2}]]"}
)


def test_a_chain_is_spoken_again_from_the_break_on():
    engine = ScriptedEngine(echo)
    played = play(CHAIN, engine, PROBLEMS[:1], samples=2, coalitions=without("agent1", "agent2", "agent3"))
    assert [len(batch) for batch in engine.calls] == [2, 4, 6]
    by_removed = defaultdict(list)
    for c in played.groups[0].counterfactuals:
        by_removed[c.removed].append([t.name for t in c.turns])
    assert by_removed == {("agent1",): [["agent2", "agent3"]] * 2, ("agent2",): [["agent3"]] * 2}
    for c in played.groups[0].counterfactuals:
        if c.removed == ("agent1",):
            assert c.turns[0].prompt == "2: p1"
            assert c.turns[1].prompt == f"3: p1 {c.turns[0].message}"
        else:
            assert c.turns[0].prompt == "3: p1"
    shapes = {c[0]: tuple(r.shape) for c, r in played.without.items()}
    assert shapes == {"agent1": (1, 1, 2), "agent2": (1, 1, 2), "agent3": (1, 1, 1)}


def test_a_debate_keeps_the_first_round_and_redoes_the_answers_to_it():
    shown = "{upstream}"
    names = ["debater1", "debater2"]
    prompts = {f"{n}_round1": f"{n}: {{problem}}" for n in names}
    prompts |= {f"{n}_round2": f"{n}: {{problem}}[[ own {{{n}_round1}}]][[ others {shown}]]" for n in names}
    team = debate(2, 2, prompts=prompts)
    engine = ScriptedEngine(echo)
    played = play(team, engine, PROBLEMS[:1], samples=2, coalitions=without("debater1"))
    assert played.without[("debater1",)].shape == (1, 2, 1)
    assert [len(batch) for batch in engine.calls] == [4, 6]
    for n, c in enumerate(played.groups[0].counterfactuals):
        assert (c.rollout, c.draw) == (n, 0)
        assert [t.name for t in c.turns] == ["debater2_round2"]
        assert c.turns[0].prompt == f"debater2: p1 own {turns(played, 0, n)['debater2_round1']}"  # its own words, kept
        assert c.answer == c.turns[0].message
    assert play(team, ScriptedEngine(echo), coalitions=without("debater1"), draws=3).without[("debater1",)].shape == (
        2,
        2,
        3,
    )


def test_without_a_worker_only_the_managers_last_word_is_spoken_again():
    prompts = {
        "plan": "plan: {problem}",
        "worker1": "w1: {plan}",
        "worker2": "w2: {plan}",
        "final": "final:[[ {worker1}]][[ {worker2}]]",
    }
    team = manager_workers(2, prompts=prompts)
    engine = ScriptedEngine(echo)
    played = play(team, engine, PROBLEMS[:1], samples=2, coalitions=without("worker1", "manager"))
    assert [len(batch) for batch in engine.calls] == [2, 4, 4]
    for n, c in enumerate(played.groups[0].counterfactuals):
        assert c.removed == ("worker1",)
        assert [t.prompt for t in c.turns] == [f"final: {turns(played, 0, n)['worker2']}"]
    assert played.without[("worker1",)].shape == (1, 2, 1)
    assert played.without[("manager",)].tolist() == [[[0.0]]]


def test_turns_of_a_rollout_are_in_topological_order():
    team = Team("t", ("a", "b"), [TurnSpec("z", "b", "b: {y}"), TurnSpec("y", "a", "a: {problem}")], LastTurn("z"))
    played = play(team, ScriptedEngine(echo))
    assert [t.name for t in played.groups[0].rollouts[0].turns] == ["y", "z"]


def test_only_agents_that_the_decision_reads_have_a_score_of_their_own():
    assert set(play(PAIR, ScriptedEngine(yes_no)).score) == {"solver"}
    assert set(play(voters(2), ScriptedEngine(yes_no)).score) == {"voter1", "voter2"}


# --- truncated turns ------------------------------------------------------------------------------------------------


def cut_thinker(prompt: str, seed: int) -> str:
    return "far too long a thought" if prompt.startswith("thinker") else "yes"


def test_an_answer_on_a_cut_off_thought_is_paid_nothing_unless_truncation_is_kept():
    engine = ScriptedEngine(cut_thinker)
    said = {"thinker": voice("thinker", engine, max_tokens=8), "solver": voice("solver", engine)}
    played = play(PAIR, engine, voices=said, coalitions=without("thinker"))
    assert played.groups[0].rollouts[0].turn("thinker").completion.finish is FinishReason.LENGTH
    assert played.reward_PN.sum() == 0
    assert played.score["solver"].min() == 1.0  # its own answer was right
    assert played.without[("thinker",)].min() == 1.0  # the solo play has no cut turn
    kept = play(PAIR, engine, voices=said, limits=Limits(truncated_is_zero=False))
    assert kept.reward_PN.min() == 1.0


def test_a_cut_vote_is_an_abstention_and_spoils_nobody_elses():
    engine = ScriptedEngine(
        by_agent({"voter1": lambda *_: "no", "voter2": lambda *_: "yes", "voter3": lambda *_: "no"})
    )
    said = voices(("voter1", "voter2", "voter3"), engine) | {"voter3": voice("voter3", engine, max_tokens=2)}
    played = play(voters(3), engine, voices=said)
    assert played.reward_PN.tolist() == [[0.5, 0.5]] * 2  # one against one
    assert (
        play(voters(3), engine, voices=said, limits=Limits(truncated_is_zero=False)).groups[0].rollouts[0].answer
        == "no"
    )


# --- whatever the order of the batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("team", [PAIR, CHAIN, voters(3), debate(2, 2), manager_workers(2)], ids=lambda team: team.name)
def test_a_problem_gets_the_same_play_whatever_stands_beside_it(team):
    problems = [problem(f"p{i}") for i in range(4)]
    coalitions = without(*team.agent_names)

    def by_problem(order):
        played = play(
            team,
            ScriptedEngine(lambda p, s: pick(s, "yes", "no", "or")),
            order,
            coalitions=coalitions,
            limits=Limits(max_prompt_tokens=9999),
        )
        rewards = {c: dict(zip([p.id for p in order], r.tolist(), strict=True)) for c, r in played.without.items()}
        return {g.problem.id: g for g in played.groups}, rewards

    straight, rewards = by_problem(problems)
    backwards, same_rewards = by_problem(problems[::-1])
    assert straight == backwards
    assert rewards == same_rewards
    assert by_problem(problems[2:3])[0]["id-p2"] == straight["id-p2"]


def test_problems_with_the_same_text_or_id_alone_are_sampled_on_their_own():
    twins = [problem("same"), problem("same").__class__(id="other", text="same", answer="yes")]
    engine = ScriptedEngine(echo)
    play(PAIR, engine, twins, samples=1)
    assert len({request.seed for _, request in engine.calls[0]}) == 2


# --- counts ---------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_by_what_they_are_for():
    engine = ScriptedEngine(by_agent({"thinker": lambda *_: "abc", "solver": lambda p, s: "yes" if "|" in p else "no"}))
    played = play(PAIR, engine, PROBLEMS[:1], samples=2, coalitions=without("thinker"), draws=3)
    assert played.tokens["joint"] == 2 * (4 + 4)  # "abc" and "yes", an end token each
    assert played.tokens["counterfactual"] == 3 * 3
    assert played.tokens["joint"] + played.tokens["counterfactual"] == engine.decoded_tokens
    prompts = ["thinker: p1"] * 2 + ["solver: p1 | abc"] * 2 + ["solver: p1"] * 3
    assert played.tokens["prefill"] == engine.prefill_tokens == sum(len(encode(p)) for p in prompts)
    assert set(played.seconds) == {"decode", "verify"}
    assert all(s >= 0 for s in played.seconds.values())


# --- the cache ------------------------------------------------------------------------------------------------------


def cached_play(cache, engine, *, step=0, training=(), version=0, samples=2, **keys):
    said = {"thinker": voice("thinker", engine), "solver": voice("solver", engine, version=version)}
    coalitions = without("thinker")
    return play(
        PAIR,
        engine,
        cache=cache,
        voices=said,
        step=step,
        training=training,
        coalitions=coalitions,
        samples=samples,
        **keys,
    )


def solos(engine) -> int:
    return sum(p.startswith("solver") and "|" not in p for p in engine.prompts)


def test_solo_rewards_are_reused_while_the_solver_is_frozen():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    first = cached_play(cache, engine, training=("thinker",))
    assert (solos(engine), cache.report()["cache/hit_rate"]) == (4, 0.0)
    second = cached_play(cache, engine, step=1, training=("thinker",))
    assert solos(engine) == 4
    assert torch.equal(first.without[("thinker",)], second.without[("thinker",)])
    assert cache.report() == {"cache/hits": 2.0, "cache/hit_rate": 1.0}
    assert cache.report() == {"cache/hits": 0.0, "cache/hit_rate": 0.0}
    assert all(c.cached and c.turns == () for g in second.groups for c in g.counterfactuals)
    assert second.tokens["counterfactual"] == 0
    cached_play(cache, engine, step=2, training=("thinker",), version=1)  # the solver has been trained since
    assert solos(engine) == 8


def test_a_part_of_the_batch_may_come_from_the_cache():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    first = cached_play(cache, engine, problems=PROBLEMS[:1], training=("thinker",))
    both = cached_play(cache, engine, step=1, training=("thinker",))
    assert solos(engine) == 2 + 2
    assert both.without[("thinker",)][0].tolist() == first.without[("thinker",)][0].tolist()
    assert [c.cached for g in both.groups for c in g.counterfactuals] == [True, True, False, False]


def test_rewards_of_an_agent_in_training_do_not_last():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    cached_play(cache, engine, training=("thinker", "solver"))
    assert cache.entries == {}
    cached_play(cache, engine, step=1, training=("solver",))
    assert solos(engine) == 8


def test_rewards_against_a_frozen_thinker_last_while_the_thinker_of_today_is_trained():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    keys = {"removal": Removal.FROZEN, "frozen": {"thinker": voice("thinker", engine, policy="thinker@start")}}
    cached_play(cache, engine, training=("thinker",), **keys)
    before = len(engine.prompts)
    cached_play(cache, engine, step=1, training=("thinker",), **keys)
    assert len(engine.prompts) - before == 8  # the joint plays alone


def test_more_draws_than_are_known_are_decoded_and_fewer_are_served():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    cached_play(cache, engine, training=("thinker",), draws=3)
    assert cached_play(cache, engine, step=1, training=("thinker",), draws=2).without[("thinker",)].shape == (2, 1, 2)
    assert solos(engine) == 6
    cached_play(cache, engine, step=2, training=("thinker",), draws=4)
    assert solos(engine) == 6 + 8


def test_turns_that_are_training_data_are_not_served_from_the_cache():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    for step in range(2):
        played = cached_play(cache, engine, step=step, training=("thinker",), keep_turns=without("thinker"))
        assert all(c.turns and not c.cached for g in played.groups for c in g.counterfactuals)
    assert solos(engine) == 8


def test_off_means_off():
    cache, engine = CounterfactualCache(policy="off"), ScriptedEngine(yes_no)
    for step in range(2):
        cached_play(cache, engine, step=step, training=("thinker",))
    assert (solos(engine), cache.entries, cache.report()["cache/hits"]) == (8, {}, 0.0)


def test_another_way_of_removal_is_another_reward():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    cached_play(cache, engine, training=("thinker",))
    cached_play(cache, engine, step=1, training=("thinker",), removal=Removal.BLANK)
    assert sum(p.endswith(" | ") for p in engine.prompts) == 4


def test_recounts_and_rewards_of_one_rollout_are_not_cached():
    cache, engine = CounterfactualCache(policy="auto"), ScriptedEngine(yes_no)
    play(voters(3), engine, cache=cache, coalitions=without("voter1"))
    play(debate(2, 2), engine, cache=cache, coalitions=without("debater1"), limits=Limits(max_prompt_tokens=9999))
    assert cache.entries == {}
    assert cache.report()["cache/hits"] == 0.0


def test_always_reuses_across_updates_draws_a_tenth_again_and_reports_the_drift():
    cache = CounterfactualCache(policy="always")
    names = [f"p{i}" for i in range(400)]
    for name in names:
        assert cache.find(name, ("thinker",), "v0", 2, 0) is None
        cache.store(name, ("thinker",), "v0", [0.0, 1.0], lasting=False)
    assert "cache/drift" not in cache.report()
    again = [name for name in names if cache.find(name, ("thinker",), "v1", 2, 1) is None]
    assert 20 <= len(again) <= 60  # one in ten of 400
    for name in again:
        cache.store(name, ("thinker",), "v1", [1.0, 1.0], lasting=False)
    report = cache.report()
    assert report["cache/drift"] == 0.5
    assert report["cache/hits"] == 400 - len(again)
    assert all(
        cache.find(name, ("thinker",), "v1", 2, step) == [1.0, 1.0] for name in again for step in range(30)
    )  # fresh
    assert [n for n in names if cache.find(n, ("thinker",), "v2", 2, 2) is None] != again  # other ones each step


def test_a_cache_survives_its_checkpoint():
    cache = CounterfactualCache(policy="auto")
    cache.store("p", ("a", "b"), "v0", [0.25, 1.0], lasting=True)
    other = CounterfactualCache(policy="auto")
    other.load_json(cache.to_json())
    assert other.find("p", ("a", "b"), "v0", 2, 0) == [0.25, 1.0]
    assert other.find("p", ("a",), "v0", 2, 0) is None


# --- any graph ------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw) -> Team:
    agents = [f"a{i}" for i in range(draw(st.integers(1, 3)))]
    count = draw(st.integers(len(agents), 6))
    specs = []
    for i in range(count):
        reads = sorted(draw(st.sets(st.sampled_from([t.name for t in specs]), max_size=3))) if specs else []
        owner = agents[i] if i < len(agents) else draw(st.sampled_from(agents))
        specs.append(TurnSpec(f"t{i}", owner, f"t{i}: {{problem}}" + "".join(f"[[ {{{r}}}]]" for r in reads)))
    read = sorted(draw(st.sets(st.sampled_from([t.name for t in specs]), min_size=1, max_size=3)))
    return Team(
        "graph", tuple(Agent(a) for a in agents), specs, LastTurn(read[0]) if len(read) == 1 else Majority(read)
    )


@settings(max_examples=60, deadline=None)
@given(team=graphs(), removal=st.sampled_from([Removal.DROP, Removal.BLANK, Removal.PLACEHOLDER]))
def test_in_any_graph_kept_turns_are_the_joint_ones_and_nobody_hears_a_removed_agent(team, removal):
    engine = ScriptedEngine(lambda prompt, seed: pick(seed, "yes", "no"))
    coalitions = without(*team.agent_names)
    played = play(team, engine, samples=2, coalitions=coalitions, removal=removal, placeholder="(gone)")
    assert len(engine.calls) <= len(team.levels)  # one decode a level
    assert played.tokens["joint"] + played.tokens["counterfactual"] == engine.decoded_tokens
    for coalition in coalitions:
        plan = team.plan(coalition, removal, "(gone)")
        shape = played.without[coalition].shape
        assert shape[:2] == (2, 1) if plan.per_problem or not plan.answerable else (2, 2)
        for slot, group in enumerate(played.groups):
            for c in (c for c in group.counterfactuals if c.removed == coalition):
                assert [t.name for t in c.turns] == [t.name for t in plan.redo]
                assert all(t.agent not in coalition for t in c.turns)
                redone = {t.name: t for t in c.turns}
                for t in c.turns:
                    shown = []
                    for name in team.turn(t.name).reads:
                        if name in redone:
                            shown.append(redone[name].message)
                        elif team.turn(name).agent in coalition:
                            shown += {Removal.DROP: [], Removal.BLANK: [""], Removal.PLACEHOLDER: ["(gone)"]}[removal]
                        elif plan.fates[name] == "keep":
                            shown.append(turns(played, slot, c.rollout)[name])
                    assert t.prompt == " ".join([f"{t.name}: {group.problem.text}", *shown])


def test_levels_are_decoded_in_order():
    engine = ScriptedEngine(echo)
    play(CHAIN, engine, samples=1)
    firsts = [batch[0][0][0] for batch in engine.calls]
    assert all(int(a) < int(b) for a, b in pairwise(firsts))


def test_a_walker_can_be_made_without_voices_of_the_past_or_a_cache():
    engine = ScriptedEngine(yes_no)
    walker = Walker(team=PAIR, task=exact_task(*PROBLEMS), voices=voices(PAIR.agent_names, engine))
    assert walker.play(PROBLEMS, Ask(samples=1, coalitions=without("thinker")), seed=0, step=0).reward_PN.shape == (
        2,
        1,
    )


# --- trees and ballots that change places ---------------------------------------------------------------------------


def test_rollouts_of_a_tree_share_the_thought_and_its_tokens():
    engine = ScriptedEngine(echo)
    played = play(PAIR, engine, samples=4, branch=(2, 2))
    assert [len(batch) for batch in engine.calls] == [4, 8]
    for group in played.groups:
        thoughts = [r.turn("thinker") for r in group.rollouts]
        assert thoughts[0] is thoughts[1]
        assert thoughts[2] is thoughts[3]
        assert thoughts[0].message != thoughts[2].message
        assert len({r.turn("solver").message for r in group.rollouts}) == 4
    assert played.tokens["joint"] == engine.decoded_tokens
    assert played.tokens["prefill"] == engine.prefill_tokens
    assert (played.tree["thinker"].siblings, played.tree["thinker"].plays) == (2, 2)
    assert (played.tree["solver"].contexts, played.tree["solver"].siblings) == (2, 2)


def test_plain_rollouts_are_the_tree_of_one_text_a_context():
    plain, tree = (play(PAIR, ScriptedEngine(echo), samples=3, branch=b) for b in ((), (3,)))
    assert [turns(plain, 1, n) for n in range(3)] == [turns(tree, 1, n) for n in range(3)]


def test_counterfactuals_of_a_tree_are_those_of_its_rollouts():
    team = chain(3, prompts={"agent1": "a: {problem}", "agent2": "b: {agent1}", "agent3": "c: {problem}[[ {agent2}]]"})
    played = play(team, ScriptedEngine(echo), samples=4, branch=(2, 2, 1), coalitions=without("agent2"))
    assert played.without[("agent2",)].shape[:2] == (2, 1)
    assert played.reward_PN.shape == (2, 4)


@pytest.mark.parametrize(("branch", "match"), [((2, 2, 2), "3 levels"), ((3, 2), "rollout.samples: 6")])
def test_a_tree_that_does_not_fit_is_refused(branch, match):
    with pytest.raises(UserError, match=match):
        play(PAIR, ScriptedEngine(echo), samples=4, branch=branch)


def test_every_ballot_meets_every_mixture_of_the_others():
    """Three voters, two rollouts: each ballot's mean over the four mixtures is what counting them by hand gives."""
    engine = ScriptedEngine(yes_no)
    team = voters(3)
    played = play(team, engine, samples=2, swaps=True)
    for p, group in enumerate(played.groups):
        says = [[float(t.message == "yes") for t in r.turns] for r in group.rollouts]
        for k, name in enumerate(("voter1", "voter2", "voter3")):
            a, b = (j for j in range(3) if j != k)
            for n in range(2):
                mixed = [float(says[n][k] + says[i][a] + says[j][b] >= 2) for i in range(2) for j in range(2)]
                assert played.swap[name][p, n].tolist() == mixed
                silent = [(says[i][a] + says[j][b]) / 2 for i in range(2) for j in range(2)]
                assert played.silent[name][p, n].tolist() == silent
    assert played.tokens["counterfactual"] == 0


def test_a_ballot_that_was_read_does_not_change_places():
    from ccpo.rollout.swap import swappable

    assert swappable(voters(3)) == ("voter1", "voter2", "voter3")
    assert swappable(PAIR) == ()
    later = Team(
        "heard",
        ("x", "y"),
        (TurnSpec("x", "x", "{problem}"), TurnSpec("y", "y", "{problem} {x}")),
        Majority(("x", "y")),
    )
    assert swappable(later) == ("y",)


def test_in_a_debate_ballots_change_places_only_within_their_context():
    team = debate(2, 2)
    played = play(team, ScriptedEngine(yes_no), samples=4, branch=(2, 2), swaps=True)
    assert set(played.swap) == {"debater1_round2", "debater2_round2"}
    for p, group in enumerate(played.groups):
        says = [[float(r.turn(f"debater{i}_round2").message == "yes") for i in (1, 2)] for r in group.rollouts]
        for n in range(4):
            context = range(n // 2 * 2, n // 2 * 2 + 2)
            expected = [(says[n][0] + says[s][1]) / 2 for s in context]
            assert played.swap["debater1_round2"][p, n].tolist() == expected


def test_many_mixtures_use_every_rollout_equally_often():
    from ccpo.rollout.swap import mixtures

    table = mixtures(8, 4)
    assert table.shape == (128, 4)
    assert all(torch.bincount(table[:, c], minlength=8).tolist() == [16] * 8 for c in range(4))
    assert torch.equal(table, mixtures(8, 4))
    assert len(mixtures(3, 2).unique(dim=0)) == 9
