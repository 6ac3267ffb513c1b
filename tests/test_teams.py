"""The graph, its surgery, its plan, the ready-made teams and teams as data."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.teams import (
    DECISIONS,
    TEAMS,
    Agent,
    Ballot,
    Decided,
    Fate,
    Function,
    Judge,
    LastTurn,
    Majority,
    PlayTeam,
    Sampled,
    Team,
    TurnSpec,
    Weighted,
    chain,
    debate,
    manager_workers,
    team_from_dict,
    think_solve,
    voting,
)
from ccpo.types import Removal

READY = [think_solve(), voting(3), voting(1), chain(3), debate(3, 2), debate(2, 3), manager_workers(3)]


def turn(name: str, agent: str, *reads: str) -> TurnSpec:
    return TurnSpec(name=name, agent=agent, template="{problem} " + " ".join(f"{{{r}}}" for r in reads))


def team(decision, *turns: TurnSpec) -> Team:
    agents = tuple(Agent(name=a) for a in dict.fromkeys(t.agent for t in turns))
    return Team(name="t", agents=agents, turns=turns, decision=decision)


def redo(plan) -> list[str]:
    return [t.name for t in plan.redo]


# --- plans --------------------------------------------------------------------------------------------------------


def test_without_the_thinker_the_solver_answers_alone_and_draws_belong_to_the_problem():
    plan = think_solve().plan(("thinker",))
    assert plan.fates == {"thinker": Fate.GONE, "solver": Fate.REDO}
    assert redo(plan) == ["solver"]
    assert plan.per_problem
    assert plan.answerable
    assert not plan.free


def test_without_the_solver_there_is_no_answer_and_nothing_is_decoded():
    plan = think_solve().plan(("solver",))
    assert not plan.answerable
    assert plan.free


@pytest.mark.parametrize("rule", ["majority", "weighted", "sampled"])
def test_without_a_voter_the_votes_are_counted_again_and_no_token_is_decoded(rule):
    plan = voting(3, decision=rule).plan(("voter2",))
    assert plan.fates == {"voter1": Fate.KEEP, "voter2": Fate.GONE, "voter3": Fate.KEEP}
    assert plan.free
    assert plan.answerable
    assert not plan.per_problem
    assert not voting(3).plan(("voter1", "voter2", "voter3")).answerable


def test_a_chain_is_answered_again_from_the_break_on():
    first, middle = chain(3).plan(("agent1",)), chain(3).plan(("agent2",))
    assert redo(first) == ["agent2", "agent3"]
    assert redo(middle) == ["agent3"]
    assert first.per_problem
    assert middle.per_problem  # agent3 hears nobody: agent1 spoke to agent2 alone
    assert not chain(3).plan(("agent3",)).answerable


def test_a_debate_redoes_the_later_rounds_of_the_others():
    plan = debate(3, 2).plan(("debater1",))
    assert redo(plan) == ["debater2_round2", "debater3_round2"]
    assert plan.fates["debater2_round1"] is Fate.KEEP
    assert not plan.per_problem


def test_a_manager_decides_and_a_worker_does_not():
    team = manager_workers(2)
    assert team.decider == "manager"
    assert not team.plan(("manager",)).answerable
    assert team.plan(("manager",)).free
    plan = team.plan(("worker1",))
    assert redo(plan) == ["final"]
    assert not plan.per_problem  # worker2's report is the joint rollout's


@pytest.mark.parametrize(("how", "fate"), [(Removal.BLANK, Fate.GIVEN), (Removal.PLACEHOLDER, Fate.GIVEN)])
def test_a_given_text_stands_in_the_place_of_a_message(how, fate):
    plan = think_solve().plan(("thinker",), how=how, placeholder="(none)")
    assert plan.fates == {"thinker": fate, "solver": Fate.REDO}
    assert plan.given == ("" if how is Removal.BLANK else "(none)")
    assert plan.per_problem


def test_a_frozen_agent_speaks_with_its_earlier_policy():
    plan = think_solve().plan(("thinker",), how=Removal.FROZEN)
    assert plan.fates == {"thinker": Fate.FROZEN, "solver": Fate.REDO}
    assert redo(plan) == ["solver"]
    assert [t.name for t in plan.decoded] == ["thinker", "solver"]
    assert plan.per_problem  # both are drawn anew
    ballot = voting(3).plan(("voter1",), how=Removal.FROZEN)
    assert ballot.fates["voter1"] is Fate.FROZEN
    assert ballot.redo == ()
    assert not ballot.free
    assert not ballot.per_problem  # the other ballots are the joint rollout's
    assert think_solve().plan(("solver",), how=Removal.FROZEN).answerable
    row = team(LastTurn("c"), turn("a", "A"), turn("b", "B", "a"), turn("c", "C", "b"))
    assert [t.name for t in row.plan(("A", "B"), how=Removal.FROZEN).decoded] == ["a", "b", "c"]  # b hears the frozen a


def test_an_agent_that_nobody_needs_is_a_null_player():
    idle = team(LastTurn("b"), turn("a", "A"), turn("b", "B"), turn("c", "C", "a"))
    assert idle.plan(("A",)).free  # c heard it, but the answer did not
    assert idle.plan(("A",)).fates["b"] is Fate.KEEP


def test_a_turn_that_only_a_removed_turn_reads_is_not_decoded():
    loop = team(LastTurn("c"), turn("a1", "A"), turn("b", "B", "a1"), turn("a2", "A", "b"), turn("c", "C", "a2"))
    assert redo(loop.plan(("A",))) == ["c"]


def test_a_coalition_is_sorted_and_its_names_are_known():
    assert voting(3).plan(("voter3", "voter1", "voter3")).removed == ("voter1", "voter3")
    assert think_solve().plan("thinker").removed == ("thinker",)  # one name is not its letters
    with pytest.raises(UserError, match="Did you mean 'thinker'"):
        think_solve().plan(("thinkr",))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_plans_keep_their_promises_on_any_graph(data):
    """Kept turns are not downstream; whatever is decoded reads only texts that exist; the order is topological."""
    size = data.draw(st.integers(1, 7))
    turns = []
    for i in range(size):
        reads = data.draw(st.lists(st.integers(0, i - 1), unique=True, max_size=3)) if i else []
        turns.append(turn(f"t{i}", data.draw(st.sampled_from("ABC")), *(f"t{r}" for r in reads)))
    some = team(LastTurn(f"t{size - 1}"), *data.draw(st.permutations(turns)))
    place = {t.name: i for i, t in enumerate(some.turns_in_order)}
    assert all(place[r] < place[t.name] for t in some.turns for r in t.reads)
    names = data.draw(st.sets(st.sampled_from(some.agent_names), max_size=3))
    plan = some.plan(tuple(names), how=data.draw(st.sampled_from(list(Removal))))
    removed = {t.name for t in some.turns if t.agent in names}
    for t in some.turns:
        fate = plan.fates[t.name]
        if t.name in removed:
            assert fate in (Fate.GONE, Fate.GIVEN, Fate.FROZEN)
        else:
            assert fate in (Fate.KEEP, Fate.GONE, Fate.REDO)
        if fate is Fate.KEEP:
            assert all(plan.fates[r] is Fate.KEEP for r in t.reads)
        if fate is Fate.REDO:
            assert any(r in removed or plan.fates[r] is Fate.REDO for r in t.reads)
            heard = [r for r in t.reads if r not in removed]
            assert all(plan.fates[r] in (Fate.KEEP, Fate.REDO) for r in heard)
    heard = {r for t in plan.decoded for r in t.reads} | set(some.decision.reads)
    for t in plan.decoded:  # nothing is decoded that nobody hears
        assert t.name in heard
    assert plan.per_problem == all(plan.fates[r] is not Fate.KEEP for r in heard)
    assert plan.answerable == (plan.fates[some.decision.turn] is not Fate.GONE)
    assert plan.answerable or plan.free
    if not names:
        assert set(plan.fates.values()) == {Fate.KEEP}


# --- surgery ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", READY, ids=lambda t: f"{t.name}{len(t.agent_names)}")
def test_without_is_again_a_team_or_says_that_nothing_is_left(whole):
    for size in range(1, len(whole.agent_names)):
        for names in combinations(whole.agent_names, size):
            if not whole.plan(names).answerable:
                with pytest.raises(UserError, match="no answer"):
                    whole.without(*names)
                continue
            left = whole.without(*names)
            assert left.agent_names == tuple(n for n in whole.agent_names if n not in names)
            assert all(left.turn(r) for t in left.turns for r in t.reads)


def test_the_rest_of_a_team_sees_what_a_plan_shows():
    left = think_solve(prompts={"solver": "{problem}[[ T: {thinker}]]"}).without("thinker")
    assert left.turn("solver").render({"problem": "P"}) == "P"
    assert left.turn("solver").reads == ()
    assert left.name == "think_solve-without-thinker"
    assert left.decider == "solver"
    rest = debate(3, 2).without("debater1")
    second = rest.turn("debater2_round2")
    assert second.reads == ("debater2_round1", "debater3_round1")
    shown = second.render({"problem": "P", "debater2_round1": "mine", "debater3_round1": "x"})
    whole = debate(3, 2).turn("debater2_round2")
    messages = {"debater1_round1": None, "debater2_round1": "mine", "debater3_round1": "x"}
    assert shown == whole.render({"problem": "P", **messages})
    assert rest.without("debater3").turn("debater2_round2").reads == ("debater2_round1",)
    assert rest.decision == Majority(("debater2_round2", "debater3_round2"))
    with pytest.raises(UserError, match="only removal by 'drop'"):
        think_solve().without("thinker", how=Removal.BLANK)


def test_alone_is_one_agents_last_turn():
    assert think_solve().alone("solver").decider == "solver"
    assert think_solve().alone("thinker").decision == LastTurn("thinker")
    assert manager_workers(2).alone("manager").turn("final").reads == ("plan",)
    assert voting(3).alone("voter2").agent_names == ("voter2",)
    assert voting(3).alone("voter2").decision == Majority(("voter2",))
    judged = team(Judge("j"), turn("a", "A"), turn("j", "J", "a"))
    assert judged.alone("J").decision == LastTurn("j")  # a judge with nobody to judge just answers
    with pytest.raises(UserError, match="no agent 'nobody'"):
        think_solve().alone("nobody")


# --- what bad input gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: turn("problem", "A"), "'problem'"),
        (lambda: turn("a-b", "A"), "letters, digits"),
        (lambda: Agent("../up"), "agent name '../up'"),
        (lambda: Agent("a", policy="a b"), "policy name 'a b'"),
        (lambda: TurnSpec("a", "A", None), "write it as text"),
        (lambda: TurnSpec("a", "A", "x", max_tokens=0), "at least 1"),
        (lambda: TurnSpec("a", "A", "x", max_tokens="9"), "at least 1"),
        (lambda: TurnSpec("a", "A", "{b}", reads="b"), r"write a list, \[b\]"),
        (lambda: TurnSpec("a", "A", "{bb}", reads=("b",)), "{bb}, which is not in reads .*Did you mean 'b'"),
        (lambda: TurnSpec("a", "A", "{problem}", reads=("b",)), "reads 'b' but its template does not show it"),
        (lambda: TurnSpec("a", "A", "{upstream}"), "whose messages"),
        (lambda: LastTurn(""), "one turn"),
        (lambda: Majority(()), "reads nothing"),
        (lambda: Majority("ab"), "a list of turns"),
        (lambda: Weighted(("a", "a")), "'a' twice"),
        (lambda: Function("text", ("a",)), "Python function"),
        (lambda: Function(len, ()), "reads nothing"),
    ],
)
def test_parts_that_cannot_be_made(make, word):
    with pytest.raises(UserError, match=word):
        make()


@pytest.mark.parametrize(
    ("decision", "turns", "words"),
    [
        (LastTurn("b"), [turn("a", "A", "b"), turn("b", "B", "a")], ["circle", "a", "b"]),
        (LastTurn("a"), [turn("a", "A", "a")], ["circle", "a → a"]),
        (LastTurn("b"), [turn("a", "A"), turn("b", "B", "aa")], ["'aa'", "Did you mean 'a'"]),
        (LastTurn("solvr"), [turn("solver", "A")], ["'solvr'", "Did you mean 'solver'"]),
        (LastTurn("a"), [turn("a", "A"), turn("a", "A")], ["two turns", "'a'"]),
        (None, [turn("a", "A")], ["no decision"]),
        ("majority", [turn("a", "A")], ["no decision", "majority"]),
        (LastTurn("a"), [], ["no agents"]),
    ],
)
def test_a_broken_graph_is_named(decision, turns, words):
    with pytest.raises(UserError) as error:
        team(decision, *turns)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_agents_that_are_unknown_silent_or_twice():
    a, b = Agent(name="A"), Agent(name="B")
    with pytest.raises(UserError, match="'B' has no turn"):
        Team(name="t", agents=(a, b), turns=(turn("a", "A"),), decision=LastTurn("a"))
    with pytest.raises(UserError, match=r"'thinkr', which is no agent .* Did you mean 'thinker'"):
        Team(name="t", agents=(Agent(name="thinker"),), turns=(turn("a", "thinkr"),), decision=LastTurn("a"))
    with pytest.raises(UserError, match="two agents"):
        Team(name="t", agents=(a, a), turns=(turn("a", "A"),), decision=LastTurn("a"))
    with pytest.raises(UserError, match="no agents"):
        Team(name="t", agents=(), turns=(), decision=LastTurn("a"))


def test_a_prompt_that_names_an_unknown_message_is_refused():
    with pytest.raises(UserError, match="thnker"):
        think_solve(prompts={"solver": "{problem} {thnker}"})


def test_a_judge_that_reads_nobody_is_refused():
    with pytest.raises(UserError, match="judge"):
        team(Judge("j"), turn("a", "A"), turn("j", "J"))


# --- decisions ----------------------------------------------------------------------------------------------------


def test_one_turn_a_judge_and_a_function():
    ballot = Ballot(turn="j", answer="5", score=0.5)
    assert LastTurn("j").decide([ballot]) == Decided(reward=0.5, answer="5")
    assert LastTurn("j").decide([]) == Decided(reward=0.0, answer=None)
    judged = team(Judge("j"), turn("a", "A"), turn("b", "B"), turn("j", "J", "a", "b"))
    assert judged.decider == "J"
    assert not judged.plan(("J",)).answerable
    assert redo(judged.plan(("A",))) == ["j"]

    def longest(problem, messages):
        return max(messages.values(), key=len)

    by_function = team(Function(longest, ("a", "b")), turn("a", "A"), turn("b", "B"))
    assert by_function.decider is None
    assert by_function.plan(("A",)).free
    assert by_function.plan(("A",)).answerable
    assert by_function.without("A").decision == Function(longest, ("b",))
    assert Function(longest, ("a",)).without({"a"}) is None
    assert by_function.decision.decide_many([[ballot], []]) == [
        Decided(reward=0.5, answer="5"),
        LastTurn("j").decide([]),
    ]
    with pytest.raises(ValueError, match="one text"):
        by_function.decision.decide([ballot, ballot])
    assert LastTurn("j").decide_many([[ballot], []])[0].answer == "5"


# --- ready-made teams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", READY, ids=lambda t: f"{t.name}{len(t.agent_names)}")
def test_ready_made_prompts_read_well_with_and_without_messages(whole):
    for t in whole.turns:
        full = t.render({"problem": "PROBLEM", **{name: f"<{name}>" for name in t.reads}})
        bare = t.render({"problem": "PROBLEM", **dict.fromkeys(t.reads)})
        assert "PROBLEM" in full
        assert all(f"<{name}>" in full for name in t.reads)
        assert "PROBLEM" in bare
        assert "<" not in bare
        assert not any(mark in full + bare for mark in ("[[", "]]", "{{"))
    for name in whole.decision.reads:
        assert whole.turn(name).template.endswith("final answer within \\boxed{}.")


def test_prompts_systems_and_sharing_can_be_set():
    by_turn = think_solve(prompts={"solver": "{problem}|{thinker}"}, system={"thinker": "Think."}, shared_policy="both")
    assert by_turn.turn("solver").render({"problem": "P", "thinker": "x"}) == "P|x"
    assert by_turn.agent("thinker").system == "Think."
    assert {a.policy for a in by_turn.agents} == {"both"}
    by_agent = debate(2, 2, prompts={"debater1": "{problem}[[ {upstream}]]"})
    assert by_agent.turn("debater1_round1").template == by_agent.turn("debater1_round2").template
    assert by_agent.turn("debater1_round2").reads == ("debater1_round1", "debater2_round1")
    unheard = think_solve(prompts={"solver": "{problem}"})
    assert unheard.plan(("thinker",)).free  # a message that no prompt shows is no edge of the graph
    assert {a.system for a in voting(2, system="Vote.").agents} == {"Vote."}
    assert [a.policy for a in voting(2).agents] == ["voter1", "voter2"]
    assert [len(t) for t in debate(3, 2).levels] == [3, 3]
    assert think_solve().turn("thinker").strip_boxed is False
    assert think_solve(strip_boxed=True).turn("thinker").strip_boxed is True
    assert [t.strip_boxed for t in chain(3, strip_boxed=True).turns] == [True, True, False]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: think_solve(prompts={"solvr": "x"}), "Did you mean 'solver'"),
        (lambda: think_solve(system={"thinkr": "x"}), "Did you mean 'thinker'"),
        (lambda: voting(3, decision="majorty"), "Did you mean 'majority'"),
        (lambda: voting(0), "at least 1"),
        (lambda: chain(0), "at least 1"),
        (lambda: debate(0), "at least 1"),
        (lambda: voting("3"), "at least 1"),
        (lambda: debate(2, 0), "at least 1"),
        (lambda: manager_workers(0), "at least 1"),
    ],
)
def test_ready_made_teams_name_the_users_mistake(make, word):
    with pytest.raises(UserError, match=word):
        make()


# --- teams as data ------------------------------------------------------------------------------------------------

CRITIC = """
name: critic
agents: {writer: , critic: {system: You are strict.}}
turns:
  draft:  {agent: writer, template: "{problem}"}
  review: {agent: critic, template: "{problem}[[ Draft: {draft}]]"}
  final:  {agent: writer, template: "{problem}[[ Draft: {draft}]][[ Review: {review}]]"}
decision: {kind: last_turn, turn: final}
"""


def test_a_team_in_ten_lines_of_python_and_in_yaml():
    critic = Team(
        "critic",
        agents=("writer", Agent("critic", system="You are strict.")),
        turns=(
            TurnSpec("draft", "writer", "{problem}"),
            TurnSpec("review", "critic", "{problem}[[ Draft: {draft}]]"),
            TurnSpec("final", "writer", "{problem}[[ Draft: {draft}]][[ Review: {review}]]"),
        ),
        decision=LastTurn("final"),
    )
    assert redo(critic.plan(("critic",))) == ["final"]
    assert [t.name for t in critic.turns_of("writer")] == ["draft", "final"]
    assert critic.order == ("draft", "review", "final")
    assert team_from_dict(yaml.safe_load(CRITIC)) == critic
    as_lists = {
        "name": "critic",
        "agents": ["writer", {"name": "critic", "system": "You are strict."}],
        "turns": [{"name": t.name, "agent": t.agent, "template": t.template} for t in critic.turns],
        "decision": {"kind": "last_turn", "turn": "final"},
    }
    assert team_from_dict(as_lists) == critic
    assert TEAMS["custom"](**as_lists) == critic


DATA = {
    "agents": ["A"],
    "turns": {"a": {"agent": "A", "template": "{problem}"}},
    "decision": {"kind": "last_turn", "turn": "a"},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decision": None}, ["team.decision is None", "mapping"]),
        ({"decision": {"kind": "last_trn", "turn": "a"}}, ["team.decision.kind", "Did you mean 'last_turn'"]),
        ({"decision": {"kind": "last_turn", "turns": ["a"]}}, ["team.decision.turns", "Did you mean 'turn'"]),
        ({"decision": {"kind": "last_turn"}}, ["team.decision.turn", "required"]),
        ({"decision": {"kind": "majority", "turns": 3}}, ["team.decision.turns is 3", "list"]),
        ({"decision": {"kind": "function", "fn": "nowhere", "turns": ["a"]}}, ["module:attribute"]),
        ({"decision": {"kind": "function", "fn": "no_such:f", "turns": ["a"]}}, ["'no_such:f'", "cannot be imported"]),
        ({"turns": {"a": {"agent": "A", "tmplate": "x"}}}, ["team.turns.a.tmplate", "Did you mean 'template'"]),
        ({"turns": {"a": {"agent": "A"}}}, ["team.turns.a.template", "required"]),
        ({"turns": {"a": {"agent": "A", "template": 3}}}, ["template is 3", "text"]),
        ({"turns": {"a": {"agent": "A", "template": "x", "strip_boxed": "no"}}}, ["strip_boxed", "true or false"]),
        ({"turns": [{"agent": "A", "template": "x"}]}, ["team.turns", "no name"]),
        ({"turns": "a"}, ["team.turns is 'a'", "list"]),
        ({"turns": {"a": "x"}}, ["team.turns.a is 'x'", "mapping"]),
        ({"agents": [3]}, ["team.agents is 3", "mapping"]),
        ({"agents": {"A": {"sytem": "x"}}}, ["team.agents.A.sytem", "Did you mean 'system'"]),
        ({"agnts": []}, ["team.agnts", "Did you mean 'agents'"]),
    ],
)
def test_data_that_makes_no_team(change, words):
    team_from_dict(DATA)
    with pytest.raises(UserError) as error:
        team_from_dict({**DATA, **change})
    assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(UserError, match=r"team\.decision: this key is required"):
        team_from_dict({key: value for key, value in DATA.items() if key != "decision"})


def test_every_kind_of_decision_can_be_written():
    turns = {n: {"agent": n, "template": "{problem}"} for n in "ab"} | {"j": {"agent": "j", "template": "{a} {b}"}}

    def decision(**data):
        return team_from_dict({"agents": list("abj"), "turns": turns, "decision": data}).decision

    for kind, rule in (("majority", Majority), ("weighted", Weighted), ("sampled", Sampled)):
        assert decision(kind=kind, turns=["a", "b"]) == rule(("a", "b"))
    assert decision(kind="judge", turn="j") == Judge("j")
    assert decision(kind="function", fn="json:dumps", turns=["a"]) == Function(json.dumps, ("a",))
    assert set(DECISIONS) == {"last_turn", "judge", "majority", "weighted", "sampled", "function"}


# --- the escape hatch ---------------------------------------------------------------------------------------------


def test_a_play_is_an_async_function_of_two_arguments():
    async def play(problem, speak):
        return await speak("a", "{problem}") or ""

    class Callable:
        async def __call__(self, problem, speak):
            return ""

    async def lonely(problem):
        return problem.text

    by_hand = PlayTeam("loop", ("a", Agent("b")), play)
    assert by_hand.agent_names == ("a", "b")
    assert by_hand.decider is None
    assert by_hand.agent("a") == Agent("a")
    assert PlayTeam("loop", ("a",), Callable()).agent_names == ("a",)
    for broken in (lambda problem, speak: "x", lonely, "play", None):
        with pytest.raises(UserError, match="async def play"):
            PlayTeam("loop", ("a",), broken)
    with pytest.raises(UserError, match="no agents"):
        PlayTeam("loop", (), play)
    with pytest.raises(UserError, match="two agents have the name 'a'"):
        PlayTeam("loop", ("a", "a"), play)
    with pytest.raises(UserError, match="Did you mean 'a1'"):
        PlayTeam("loop", ("a1",), play).agent("a2")
