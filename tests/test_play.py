"""The escape hatch: teams that are async Python functions, played, removed from, and hostile."""

from __future__ import annotations

import asyncio

import pytest

from ccpo.errors import UserError
from ccpo.rollout import Ask, Limits, Played, play_team
from ccpo.teams import Agent, PlayTeam
from ccpo.types import Removal
from scripted import EOS, ScriptedEngine, encode, exact_task, pick, problem, voice, voices

PROBLEMS = (problem("p1"), problem("p2"))


async def think_then_solve(problem, speak):
    thought = await speak("thinker", "thinker: {problem}")
    return await speak("solver", "solver: {problem}[[ | {thought}]]", thought=thought) or ""


PAIR = PlayTeam("pair", ("thinker", "solver"), think_then_solve)


def without(*agents: str) -> frozenset[tuple[str, ...]]:
    return frozenset((agent,) for agent in agents)


def play(
    team: PlayTeam, engine, problems=PROBLEMS, *, samples=2, coalitions=frozenset(), seed=1, step=0, **keys
) -> Played:
    limits = keys.pop("limits", Limits())
    said = keys.pop("voices", None) or voices(team.agent_names, engine)
    ask = Ask(samples=samples, coalitions=coalitions, **keys)
    return play_team(team, exact_task(*problems), said, limits, problems, ask, seed=seed, step=step)


def one(function, *agents: str, engine=None, **keys) -> Played:
    """A play of ``function`` on one problem, once."""
    return play(
        PlayTeam("t", agents or ("a",), function), engine or ScriptedEngine(echo), PROBLEMS[:1], samples=1, **keys
    )


def yes_no(prompt: str, seed: int) -> str:
    return pick(seed, "yes", "no")


def echo(prompt: str, seed: int) -> str:
    return f"{prompt.partition(':')[0]}{seed % 1000}"


# --- joint plays ----------------------------------------------------------------------------------------------------


def test_what_all_plays_ask_is_decoded_together():
    engine = ScriptedEngine(echo)
    played = play(PAIR, engine, samples=3)
    assert [len(batch) for batch in engine.calls] == [6, 6]
    for group in played.groups:
        for rollout in group.rollouts:
            thought, answer = rollout.turns
            assert (thought.name, answer.name) == ("thinker_1", "solver_2")
            assert answer.prompt == f"solver: {group.problem.text} | {thought.message}"
            assert rollout.answer == answer.message
    assert len({request.seed for batch in engine.calls for _, request in batch}) == 12


def test_the_returned_text_is_verified():
    played = play(PAIR, ScriptedEngine(lambda prompt, seed: "yes" if "p1" in prompt else "no"))
    assert played.reward_PN.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert played.score == {}


def test_loops_and_branches_may_depend_on_what_was_said():
    async def until_yes(problem, speak):
        for _ in range(50):
            if (said := await speak("a", "a: {problem}")) == "yes":
                return said
        return "never"

    engine = ScriptedEngine(yes_no)
    played = play(PlayTeam("loop", ("a",), until_yes), engine, samples=8)
    assert played.reward_PN.min() == 1.0
    lengths = {len(r.turns) for g in played.groups for r in g.rollouts}
    assert len(lengths) > 1  # the same question is another sample each time
    assert all(r.turns[-1].message == "yes" for g in played.groups for r in g.rollouts)


def test_questions_that_are_asked_at_once_get_names_and_samples_of_their_own():
    async def both(problem, speak):
        return "+".join(await asyncio.gather(speak("a", "a: {problem}"), speak("a", "a: {problem}")))

    engine = ScriptedEngine(echo)
    played = one(both, engine=engine)
    assert [len(batch) for batch in engine.calls] == [2]
    first, second = played.groups[0].rollouts[0].turns
    assert [first.name, second.name] == ["a_1", "a_2"]
    assert first.message != second.message


def test_a_play_may_wait_for_something_else():
    async def slow(problem, speak):
        await asyncio.sleep(0.01)
        said = await speak("a", "a: {problem}")
        await asyncio.sleep(0.01)
        return said

    assert one(slow, engine=ScriptedEngine(lambda *_: "yes")).reward_PN.item() == 1.0


def test_a_play_that_never_speaks_costs_nothing_and_is_paid_by_its_answer():
    async def silent(problem, speak):
        return "yes" if problem.text == "p1" else "no"

    engine = ScriptedEngine(echo)
    played = play(PlayTeam("silent", ("a",), silent), engine, coalitions=without("a"))
    assert engine.calls == []
    assert played.reward_PN.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert played.without[("a",)].tolist() == [[[1.0], [1.0]], [[0.0], [0.0]]]
    assert played.tokens == {"joint": 0, "counterfactual": 0, "prefill": 0, "cut": 0}


def test_a_truncated_turn_takes_the_reward():
    async def ignores_it(problem, speak):
        await speak("a", "a: {problem}")
        return "yes"

    short = {"a": voice("a", ScriptedEngine(lambda *_: "too long"), max_tokens=3)}
    assert one(ignores_it, voices=short).reward_PN.item() == 0.0
    assert one(ignores_it, voices=short, limits=Limits(truncated_is_zero=False)).reward_PN.item() == 1.0


def test_a_problem_gets_the_same_play_whatever_stands_beside_it():
    def by_problem(problems):
        played = play(PAIR, ScriptedEngine(yes_no), problems, samples=4, coalitions=without("thinker"))
        return {g.problem.id: g for g in played.groups}

    assert by_problem(PROBLEMS) == by_problem(PROBLEMS[::-1])
    assert by_problem(PROBLEMS[:1])["id-p1"] == by_problem(PROBLEMS)["id-p1"]


def test_system_prompts_and_limits_reach_the_prompt():
    team = PlayTeam("pair", (Agent("thinker", system="Be brief."), "solver"), think_then_solve)
    engine = ScriptedEngine(lambda prompt, seed: "abcdef")
    played = play(team, engine, PROBLEMS[:1], samples=1, limits=Limits(max_message_tokens=4))
    assert engine.prompts == ["Be brief.\n\nthinker: p1", "solver: p1 | abcd"]
    assert played.tokens["cut"] == 2


def test_a_notebook_that_runs_a_loop_already_may_play_too():
    async def notebook():
        return play(PAIR, ScriptedEngine(lambda *_: "yes"))

    assert asyncio.run(notebook()).reward_PN.min() == 1.0


# --- removal --------------------------------------------------------------------------------------------------------


def test_unchanged_questions_keep_their_answers_and_changed_ones_are_decoded_again():
    async def three(problem, speak):
        plan = await speak("planner", "planner: {problem}")
        thought = await speak("thinker", "thinker: {problem}")
        return await speak("solver", "solver:[[ {plan}]][[ {thought}]]", plan=plan, thought=thought) or ""

    engine = ScriptedEngine(echo)
    played = play(
        PlayTeam("three", ("planner", "thinker", "solver"), three), engine, PROBLEMS[:1], coalitions=without("planner")
    )
    assert played.without[("planner",)].shape == (1, 2, 1)
    for n, c in enumerate(played.groups[0].counterfactuals):
        joint = {t.agent: t for t in played.groups[0].rollouts[n].turns}
        assert (c.rollout, c.draw, c.removed) == (n, 0, ("planner",))
        assert [t.agent for t in c.turns] == ["solver"]
        assert c.turns[0].prompt == f"solver: {joint['thinker'].message}"
        assert c.turns[0].message != joint["solver"].message
        assert c.answer == c.turns[0].message
    assert len(engine.prompts) == 2 * 3 + 2


def test_a_play_that_does_not_need_the_removed_agent_decodes_nothing():
    async def deaf(problem, speak):
        await speak("thinker", "thinker: {problem}")
        return await speak("solver", "solver: {problem}")

    engine = ScriptedEngine(yes_no)
    played = play(PlayTeam("deaf", ("thinker", "solver"), deaf), engine, samples=4, coalitions=without("thinker"))
    assert len(engine.prompts) == 16
    assert played.tokens["counterfactual"] == 0
    assert played.without[("thinker",)].squeeze(2).tolist() == played.reward_PN.tolist()


@pytest.mark.parametrize(
    ("removal", "heard"), [(Removal.DROP, None), (Removal.BLANK, ""), (Removal.PLACEHOLDER, "(gone)")]
)
def test_what_a_play_hears_of_a_removed_agent(removal, heard):
    answers = []

    async def listens(problem, speak):
        answers.append(await speak("a", "a: {problem}"))
        return "yes" if answers[-1] == "said" else "no"

    engine = ScriptedEngine(lambda *_: "said")
    played = one(listens, engine=engine, coalitions=without("a"), removal=removal, placeholder="(gone)")
    assert answers == ["said", heard]
    assert (played.reward_PN.item(), played.without[("a",)].item()) == (1.0, 0.0)
    assert played.tokens["counterfactual"] == 0


def test_a_prompt_shows_what_is_left_of_a_message():
    for removal, prompt in ((Removal.DROP, "solver: p1"), (Removal.BLANK, "solver: p1 | ")):
        engine = ScriptedEngine(yes_no)
        play(PAIR, engine, PROBLEMS[:1], samples=1, coalitions=without("thinker"), removal=removal)
        assert engine.prompts[-1] == prompt


def test_draws_are_of_each_rollout_and_differ():
    engine = ScriptedEngine(echo)
    played = play(PAIR, engine, coalitions=without("thinker"), draws=3)
    assert played.without[("thinker",)].shape == (2, 2, 3)
    solos = [(c.rollout, c.draw, c.turns[0].message) for c in played.groups[0].counterfactuals]
    assert [s[:2] for s in solos] == [(n, m) for n in range(2) for m in range(3)]
    assert len({s[2] for s in solos}) == 6


def test_the_same_question_asked_twice_keeps_the_first_answer_first():
    async def twice(problem, speak):
        first = await speak("a", "a: {problem}")
        await speak("b", "b: {problem}")
        second = await speak("a", "a: {problem}")
        return f"{first} {second}"

    engine = ScriptedEngine(echo)
    played = one(twice, "a", "b", engine=engine, coalitions=without("b"))
    assert len(engine.prompts) == 3
    assert played.groups[0].counterfactuals[0].answer == played.groups[0].rollouts[0].answer


def test_tokens_are_counted_where_they_were_sampled():
    engine = ScriptedEngine(lambda prompt, seed: "yes" if "|" in prompt else "four")
    played = play(PAIR, engine, PROBLEMS[:1], coalitions=without("thinker"))
    assert played.tokens["joint"] == 2 * (5 + 4)
    assert played.tokens["counterfactual"] == 2 * 5
    assert played.tokens["prefill"] == engine.prefill_tokens
    assert played.groups[0].rollouts[0].turns[1].completion.token_ids == (*encode("yes"), EOS)


def test_removal_by_frozen_is_refused():
    with pytest.raises(UserError, match="not available for a team that is a Python function"):
        play(PAIR, ScriptedEngine(echo), coalitions=without("thinker"), removal=Removal.FROZEN)


# --- hostile plays --------------------------------------------------------------------------------------------------


def refused(function, *agents: str, **keys) -> str:
    with pytest.raises(UserError) as caught:
        one(function, *agents, **keys)
    return str(caught.value)


def test_an_unknown_agent_is_named_with_the_nearest():
    async def wrong(problem, speak):
        return await speak("sovler", "{problem}")

    message = refused(wrong, "thinker", "solver")
    assert message == "play asked for agent 'sovler'; the team has thinker, solver. Did you mean 'solver'?"


@pytest.mark.parametrize(("returned", "kind"), [(None, "NoneType"), (42, "int"), (b"yes", "bytes"), (["yes"], "list")])
def test_a_play_that_returns_no_text_is_refused(returned, kind):
    async def wrong(problem, speak):
        return returned

    assert f"play of team 't' returned {kind}; it must return the answer's text" in refused(wrong)


def test_a_play_that_forgets_a_removed_agent_may_be_silent_is_told_so():
    async def forgets(problem, speak):
        return await speak("a", "a: {problem}")

    assert "returned NoneType" in refused(forgets, coalitions=without("a"))


def test_an_exception_inside_a_play_names_the_team_the_problem_and_the_error():
    async def broken(problem, speak):
        await speak("a", "a: {problem}")
        return {}["answer"]

    message = refused(broken)
    assert "play of team 't' raised KeyError on problem 'id-p1': 'answer'" in message
    with pytest.raises(UserError) as caught:
        one(broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_one_broken_play_among_many_ends_all_of_them():
    async def sometimes(problem, speak):
        if problem.text == "p2":
            raise ValueError("no")
        return await speak("a", "a: {problem}")

    with pytest.raises(UserError, match="on problem 'id-p2'"):
        play(PlayTeam("t", ("a",), sometimes), ScriptedEngine(echo))


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, {}, "the template None"),
        (b"x", {}, "the template b'x'"),
        ("{thought}", {"thought": 3}, "the message thought = 3"),
        ("{thought}", {"thought": ["x"]}, "the message thought = ['x']"),
        ("{thought}", {}, "thought"),
        ("[[{thought}", {"thought": "x"}, "the section that opens with [[ has no ]]"),
        ("no name", {"thought": "x"}, "does not show it"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(template, messages, said):
    async def wrong(problem, speak):
        return await speak("a", template, **messages)

    assert said in refused(wrong)


def test_a_message_cannot_stand_in_for_the_problem():
    async def wrong(problem, speak):
        return await speak("a", "{problem}", problem="another")

    assert "problem" in refused(wrong)


def test_what_a_model_says_is_never_read_as_a_template():
    engine = ScriptedEngine(lambda prompt, seed: "{problem} [[{x}]]" if prompt.startswith("thinker") else "yes")
    play(PAIR, engine, PROBLEMS[:1], samples=1)
    assert engine.prompts[1] == "solver: p1 | {problem} [[{x}]]"


def test_a_play_that_catches_everything_cannot_hide_an_unknown_agent_from_its_own_answer():
    async def stubborn(problem, speak):
        try:
            return await speak("nobody", "{problem}")
        except Exception:
            return "yes"

    assert one(stubborn).reward_PN.item() == 1.0  # its own business


def test_a_question_that_is_given_up_neither_hangs_nor_breaks_the_play():
    async def leaves(problem, speak):
        question = asyncio.ensure_future(speak("a", "a: {problem}"))
        await asyncio.sleep(0)
        question.cancel()
        return "yes"

    assert one(leaves).reward_PN.item() == 1.0
