"""Alarms: each on a run that was made to have the fault, and on one that has not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ccpo.alarms import ALARMS, Moments, Shape, Watch, find_alarms
from ccpo.alarms.texts import copied_from, folded, forbids_answer, gives_away, says_nothing, stated_answers
from ccpo.errors import UserError
from ccpo.rollout import Limits, ballots_of, read_episodes, reproduces
from ccpo.runfolder import RunFolder
from ccpo.tasks import exact_verdict
from ccpo.teams import chain, describe, think_solve, voting
from ccpo.types import Verdict
from scripted import ScriptedEngine, by_agent, exact_task, pick, problem, voice, voices
from scripted_runs import (
    HEALTHY,
    HEALTHY_VOTE,
    HINTS,
    PAIR,
    VOTERS,
    chance,
    examine,
    following,
    hinting,
    names,
    scripted_run,
    task_of,
    voter,
)

LONG = {"steps": 20, "rollout": {"prompts": 16, "samples": 8}}
"""Enough to say that an agent is worth nothing."""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> list[dict]:
    return find_alarms(scripted_run(tmp_path_factory.mktemp("healthy") / "run", PAIR, HEALTHY))


@pytest.fixture(scope="module")
def healthy_vote(tmp_path_factory) -> list[dict]:
    return find_alarms(scripted_run(tmp_path_factory.mktemp("healthy") / "run", VOTERS, HEALTHY_VOTE))


def test_a_healthy_pair_raises_nothing(healthy):
    assert healthy == []


def test_a_healthy_vote_raises_nothing(healthy_vote):
    assert healthy_vote == []


def one(alarms: list[dict], name: str) -> dict:
    (found,) = [alarm for alarm in alarms if alarm["name"] == name]
    assert set(found) == {"level", "name", "title", "what", "try", "agent", "evidence"}
    assert found["level"] in ("warn", "info")
    assert name in ALARMS
    return found


# --- what an agent is worth ---------------------------------------------------------------------------------------------


def test_a_thinker_that_nobody_needs_is_idle(tmp_path):
    say = by_agent({"thinker": hinting, "solver": voter(0.6)})
    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, say, **LONG))
    alarm = one(alarms, "idle_agent")
    assert alarm["agent"] == "thinker"
    assert abs(alarm["evidence"]["effect"]) < 0.02
    assert names(alarms) == {"idle_agent"}


def test_a_lazy_thinker_beside_a_solver_that_is_always_right_is_idle(tmp_path):
    say = by_agent({"thinker": hinting, "solver": lambda prompt, seed: "yes"})
    assert one(find_alarms(scripted_run(tmp_path / "run", PAIR, say)), "idle_agent")["agent"] == "thinker"


def test_nobody_is_idle_where_nobody_can_win(tmp_path):
    say = by_agent({"thinker": hinting, "solver": lambda prompt, seed: "no"})
    assert names(find_alarms(scripted_run(tmp_path / "run", PAIR, say))) == {"no_signal"}


def test_an_evaluation_tells_of_an_idle_thinker_where_training_plays_nothing_without_it(tmp_path):
    alone = by_agent({"thinker": hinting, "solver": voter(0.97)})
    run = scripted_run(tmp_path / "run", PAIR, alone, credit={"kind": "shared"}, steps=1)
    assert find_alarms(run) == []
    examine(run, PAIR, alone, step=1, problems=800)
    alarm = one(find_alarms(run), "idle_agent")
    assert alarm["evidence"]["from"] == "evaluation after step 1"
    healthy = scripted_run(tmp_path / "healthy", PAIR, HEALTHY, credit={"kind": "shared"}, steps=1)
    examine(healthy, PAIR, HEALTHY, step=1)
    assert find_alarms(healthy) == []


def test_a_thinker_that_misleads_hurts(tmp_path):
    def misled(prompt, seed):
        return "yes" if chance(seed, "m") < (0.8 if "|" not in prompt else 0.4) else "no"

    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, by_agent({"thinker": hinting, "solver": misled})))
    alarm = one(alarms, "harmful_agent")
    assert alarm["agent"] == "thinker"
    assert alarm["evidence"]["effect"] == pytest.approx(-0.4, abs=0.05)
    assert names(alarms) == {"harmful_agent"}


def test_a_voter_that_is_always_wrong_hurts_and_the_others_do_not(tmp_path):
    say = by_agent({"voter1": voter(0.9), "voter2": voter(0.9), "voter3": voter(0.05)})
    alarm = one(find_alarms(scripted_run(tmp_path / "run", VOTERS, say)), "harmful_agent")
    assert alarm["agent"] == "voter3"


def test_where_all_voters_are_mostly_wrong_none_is_to_blame(tmp_path):
    say = by_agent({f"voter{i}": voter(0.3) for i in (1, 2, 3)})
    run = scripted_run(tmp_path / "run", VOTERS, say)
    assert find_alarms(run) == []
    effect = [line["credit/voter1/mean"] for line in run.read_lines(run.metrics)]
    assert sum(effect) < 0  # each makes the vote worse


def test_a_voter_whose_voice_never_counts_is_idle(tmp_path):
    say = by_agent({"voter1": voter(0.7), "voter2": voter(0.7), "voter3": lambda prompt, seed: " "})
    alarms = find_alarms(scripted_run(tmp_path / "run", VOTERS, say, steps=20))
    assert one(alarms, "idle_agent")["agent"] == "voter3"


def test_in_a_vote_that_is_always_right_nobody_is_idle(tmp_path):
    say = by_agent({f"voter{i}": voter(1.0) for i in (1, 2, 3)})
    assert find_alarms(scripted_run(tmp_path / "run", VOTERS, say)) == []


def test_a_vote_is_captured_by_a_voter_that_is_always_surer(tmp_path):
    team = voting(3, decision="weighted", prompts={f"voter{i}": f"voter{i}: {{problem}}" for i in (1, 2, 3)})

    def crew(sure: float):
        said = HEALTHY_VOTE
        loud, meek = ScriptedEngine(said, logprob=lambda text: sure), ScriptedEngine(said, logprob=lambda text: -3.0)
        return {"voter1": voice("voter1", loud), **voices(("voter2", "voter3"), meek)}

    alarm = one(find_alarms(scripted_run(tmp_path / "loud", team, crew(-0.01))), "captured_vote")
    assert alarm["agent"] == "voter1"
    assert alarm["evidence"]["won"] == 1
    assert find_alarms(scripted_run(tmp_path / "even", team, crew(-3.0))) == []


def test_a_voter_that_is_never_wrong_has_not_captured_the_vote(tmp_path):
    say = by_agent({"voter1": voter(1.0), "voter2": voter(0.6), "voter3": voter(0.6)})
    assert "captured_vote" not in names(find_alarms(scripted_run(tmp_path / "run", VOTERS, say)))


def test_a_solver_that_unlearns_to_work_alone_is_told_of(tmp_path):
    now = {"step": 0}

    def forgetful(prompt, seed):
        alone = 0.5 if now["step"] < 20 else 0.02
        return "yes" if chance(seed, "f") < (0.9 if HINTS[0] in prompt else alone) else "no"

    say = by_agent({"thinker": hinting, "solver": forgetful})
    run = scripted_run(tmp_path / "run", PAIR, say, steps=45, before_step=lambda step: now.update(step=step))
    alarm = one(find_alarms(run), "solo_lost")
    assert alarm["agent"] == "solver"
    assert alarm["evidence"]["before"] > 0.4
    assert alarm["evidence"]["after"] < 0.1


def test_evaluations_tell_of_a_lost_solo_skill(tmp_path):
    run = scripted_run(tmp_path / "run", PAIR, HEALTHY, credit={"kind": "shared"}, steps=1)
    examine(
        run,
        PAIR,
        by_agent({"thinker": hinting, "solver": lambda p, s: following(p, s) if "|" in p else voter(0.5)(p, s)}),
        step=0,
    )
    examine(run, PAIR, HEALTHY, step=1)
    assert one(find_alarms(run), "solo_lost")["evidence"]["from"] == "evaluations"


# --- what is said -------------------------------------------------------------------------------------------------------


def thinker_that(says: str, share: float):
    def think(prompt, seed):
        return says if chance(seed, "s") < share else hinting(prompt, seed)

    return by_agent({"thinker": think, "solver": following})


def test_empty_thoughts_are_told_of(tmp_path):
    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, thinker_that(" ... ", 0.3)))
    assert one(alarms, "empty_messages")["agent"] == "thinker"
    assert one(alarms, "empty_messages")["evidence"]["share"] == pytest.approx(0.3, abs=0.05)


def test_copied_thoughts_are_told_of(tmp_path):
    def parrot(prompt, seed):
        return prompt.partition(": ")[2]

    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, by_agent({"thinker": parrot, "solver": voter(0.5)})))
    assert one(alarms, "copied_messages")["agent"] == "thinker"


def test_a_link_that_hands_on_what_it_was_given_has_copied(tmp_path):
    prompts = {
        "agent1": "a: {problem}",
        "agent2": "b: {problem}[[ | {agent1}]]",
        "agent3": "c: {problem}[[ | {agent2}]]",
    }
    team = chain(3, prompts=prompts)
    say = by_agent({"a": hinting, "b": lambda p, s: p.partition("| ")[2] or hinting(p, s), "c": following})
    alarms = find_alarms(scripted_run(tmp_path / "run", team, say))
    assert one(alarms, "copied_messages")["agent"] == "agent2"


FORBID = {"thinker": "thinker: {problem} Do not state the final answer.", "solver": "solver: {problem}[[ | {thinker}]]"}
ASK = {"thinker": "thinker: {problem} Put it into \\boxed{{}}.", "solver": "solver: {problem}[[ | {thinker}]]"}


@pytest.mark.parametrize(("prompts", "level"), [(FORBID, "warn"), (None, "info"), (ASK, None)])
def test_thoughts_that_give_the_answer_away(tmp_path, prompts, level):
    team = think_solve(prompts=prompts) if prompts else PAIR
    alarms = find_alarms(scripted_run(tmp_path / "run", team, thinker_that("So the answer is yes.", 0.5)))
    assert [a["level"] for a in alarms if a["name"] == "leaked_answer"] == ([level] if level else [])


def test_truncated_turns_are_told_of(tmp_path):
    say = thinker_that("a thought without end " * 5, 0.3)
    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, say))
    assert one(alarms, "truncation")["agent"] == "thinker"
    assert "agents.thinker.max_tokens" in one(alarms, "truncation")["try"]


def passes(what: str):
    """A verifier with a hole."""

    def verify(p, text):
        if text.strip() == what:
            return Verdict(score=1.0, answer=None if not what else text)
        return exact_verdict(p, text)

    return verify


def test_a_verifier_that_passes_an_empty_answer_is_told_of(tmp_path):
    say = by_agent({"thinker": hinting, "solver": lambda p, s: "" if chance(s, "e") < 0.2 else following(p, s)})
    alarm = one(
        find_alarms(scripted_run(tmp_path / "run", PAIR, say, task=task_of(verifier=passes("")))), "reward_hacking"
    )
    assert alarm["evidence"]["empty"] >= 5
    assert alarm["evidence"]["unread"] >= 5
    sound = find_alarms(scripted_run(tmp_path / "sound", PAIR, say))
    assert "reward_hacking" not in names(sound)


def test_a_text_that_passes_against_every_reference_is_told_of(tmp_path):
    references = task_of(answer=lambda i: f"{i % 50}", verifier=passes("sesame"))
    say = by_agent({"thinker": hinting, "solver": lambda p, s: pick(s, "sesame", "7")})
    alarm = one(find_alarms(scripted_run(tmp_path / "run", PAIR, say, task=references)), "reward_hacking")
    assert alarm["evidence"]["keys"] >= 5
    assert alarm["evidence"]["empty"] == 0


def test_a_verifier_that_never_reports_answers_is_not_hacked(tmp_path):
    def grader(p, text):
        return Verdict(score=float(text == "yes"), answer=None)

    assert find_alarms(scripted_run(tmp_path / "run", PAIR, HEALTHY, task=task_of(verifier=grader))) == []


# --- from reward to gradient ---------------------------------------------------------------------------------------------


def test_problems_that_nobody_solves_teach_nothing(tmp_path):
    say = by_agent({"thinker": hinting, "solver": voter(0.01)})
    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, say, advantage="grpo", credit={"kind": "shared"}))
    assert {a["agent"] for a in alarms if a["name"] == "no_signal"} == {"thinker", "solver"}
    assert "too hard" in next(a for a in alarms if a["name"] == "no_signal")["what"]


def test_a_solved_task_is_no_fault(tmp_path):
    say = by_agent({"thinker": hinting, "solver": voter(0.995)})
    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, say, advantage="grpo", credit={"kind": "shared"}))
    assert alarms == []


def test_a_rule_that_group_baselines_turn_into_shared_reward_is_named(tmp_path):
    alarms = find_alarms(
        scripted_run(tmp_path / "run", PAIR, HEALTHY, credit={"kind": "removal", "pairing": "mean"}, advantage="grpo")
    )
    alarm = one(alarms, "same_as_shared")
    assert alarm["level"] == "info"
    assert alarm["evidence"]["agents"] == ["thinker", "solver"]
    shared = scripted_run(tmp_path / "shared", PAIR, HEALTHY, credit={"kind": "shared"}, advantage="grpo")
    assert find_alarms(shared) == []  # that is what was asked for


def test_a_deviation_that_has_collapsed_explodes_credit(tmp_path):
    now = {"step": 0}

    def late(prompt, seed):
        return "yes" if now["step"] in (1, 8, 15) and chance(seed, "late") < 0.05 else "no"

    rule = {"kind": "ccpo_v1", "decay": 0.3}
    keys = {"before_step": lambda step: now.update(step=step), "advantage": "none", "steps": 20}
    say = by_agent({"thinker": hinting, "solver": late})
    alarms = find_alarms(scripted_run(tmp_path / "run", PAIR, say, credit=rule, **keys))
    assert one(alarms, "exploding_normalisation")["agent"] == "solver"
    bounded = scripted_run(tmp_path / "bounded", PAIR, say, credit=rule | {"sigma_floor": 0.1}, **keys)
    assert "exploding_normalisation" not in names(find_alarms(bounded))


def test_an_engine_that_samples_another_policy_is_told_of(tmp_path):
    off = {"actor/solver/mismatch_k3": 0.08, "actor/thinker/mismatch_k3": 1e-4}
    assert (
        one(find_alarms(scripted_run(tmp_path / "run", PAIR, HEALTHY, metrics=off)), "engine_mismatch")["agent"]
        == "solver"
    )


# --- while it goes on ---------------------------------------------------------------------------------------------------


def test_the_loop_writes_and_tells_of_an_alarm_once(tmp_path):
    told = []
    say = by_agent({"thinker": hinting, "solver": lambda p, s: ""})
    run = scripted_run(
        tmp_path / "run", PAIR, say, steps=14, warn=lambda step, alarm: told.append((step, alarm.name, alarm.agent))
    )
    lines = run.read_lines(run.metrics)
    holds = [line["step"] for line in lines if line.get("alarm/no_signal") == 1.0]
    assert holds == [10, 11, 12, 13, 14]  # not before there are ten steps
    assert told == [(10, "no_signal", "thinker"), (10, "no_signal", "solver")]


def test_what_the_loop_saw_is_what_the_folder_says(tmp_path):
    say = by_agent({"thinker": hinting, "solver": voter(0.6)})
    run = scripted_run(tmp_path / "run", PAIR, say, **LONG | {"steps": 22})
    last = {key.removeprefix("alarm/") for key in run.read_lines(run.metrics)[-1] if key.startswith("alarm/")}
    assert last == names(find_alarms(run)) == {"idle_agent"}


def test_a_watch_goes_on_from_what_a_checkpoint_kept(tmp_path):
    run = scripted_run(tmp_path / "run", PAIR, thinker_that("", 0.5), steps=12)
    shape = Shape.of(describe(PAIR))
    whole, first = Watch(shape, "removal"), Watch(shape, "removal")
    steps = [whole_step(run, shape, step) for step in range(1, 13)]
    for number, found in enumerate(steps, start=1):
        whole.add(number, found)
    for number, found in enumerate(steps[:6], start=1):
        first.add(number, found)
    second = Watch(shape, "removal")
    second.load_json(first.to_json())
    for number, found in enumerate(steps[6:], start=7):
        last = second.add(number, found)
    assert last == whole.alarms() != []
    assert second.to_json() == whole.to_json()


def whole_step(run: RunFolder, shape: Shape, step: int):
    from ccpo.alarms.tally import tally

    return tally(shape, [g for g, _ in read_episodes(run.episode_file(step))], {}, {}, {})


def test_without_episodes_the_metrics_still_tell(tmp_path):
    off = {"actor/solver/mismatch_k3": 0.08}
    run = scripted_run(tmp_path / "run", PAIR, HEALTHY, metrics=off, log={"episodes": False, "tensorboard": False})
    assert not run.episodes.exists()
    assert names(find_alarms(run)) == {"engine_mismatch"}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is .* the folder of a run"):
        find_alarms(tmp_path)


def test_endless_episodes_are_left_out_and_damaged_logs_refused_in_words(tmp_path, monkeypatch):
    run = scripted_run(tmp_path / "run", PAIR, HEALTHY, steps=2)
    monkeypatch.setattr("ccpo.alarms.find.MAX_EPISODES", 1000)
    said = []
    assert find_alarms(run, said.append) == []
    assert [sentence.endswith("is too long to be held in memory") for sentence in said] == [True, True]
    run.metrics.write_bytes(b'{"step": 1, "\xff": 1}\n')
    with pytest.raises(UserError, match="it is no UTF-8"):
        find_alarms(run)


def test_a_folder_from_before_teams_were_described_is_read(tmp_path):
    import json

    run = scripted_run(tmp_path / "run", PAIR, thinker_that("", 0.5))
    recipe = json.loads(run.recipe.read_text())
    del recipe["team"]
    run.recipe.write_text(json.dumps(recipe))
    assert "empty_messages" in names(find_alarms(run))


# --- the statistics -----------------------------------------------------------------------------------------------------


def test_moments_by_hand():
    m = Moments.of([0.0, 1.0, 1.0, 0.0])
    assert (m.n, m.mean) == (4, 0.5)
    assert m.error == pytest.approx((1 / 3 / 4) ** 0.5)
    low, high = m.bounds(z=2.0)
    assert high - 0.5 == pytest.approx(2 * m.error + 0.75)
    assert low == pytest.approx(1.0 - high)


@pytest.mark.parametrize(("right", "total", "low", "high"), [(8, 10, 0.49016, 0.94332), (0, 10, 0.0, 0.27754)])
def test_bounds_of_a_share_are_wilsons(right, total, low, high):
    share = Moments.of([1.0] * right + [0.0] * (total - right))
    assert share.share_bounds(1.959964) == pytest.approx((low, high), abs=1e-5)


def test_a_few_problems_or_steps_raise_nothing(tmp_path):
    say = by_agent({"thinker": lambda p, s: "", "solver": voter(0.5)})
    few = {"rollout": {"prompts": 2, "samples": 4}}
    assert find_alarms(scripted_run(tmp_path / "run", PAIR, say, steps=5, **few)) == []


# --- texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nothing"),
    [("", True), (" \n", True), ("...", True), ("5", False), ("é", False), ("=", False), ("答", False)],
)
def test_texts_that_say_nothing(text, nothing):
    assert says_nothing(text) is nothing


def test_copies_need_length_and_likeness():
    source = folded("What is  the SUM of 17 and 25?")
    assert copied_from(folded("what is the sum of 17 and 25?"), [source])
    assert copied_from(folded("the sum of 17 and 25?"), [source])  # a part
    assert copied_from(folded("Ok: What is the sum of 17 and 25?"), [source]) is False  # 28 of 32 characters
    assert copied_from(folded("- What is the sum of 17 and 25?"), [source])
    assert not copied_from("17 and 25", [source])
    assert not copied_from(folded("first add 17 and 20, then 5 more"), [source])


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (r"so \boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        ("The final answer is 42.", ["42"]),
        ("Answer: $42$\nmore", ["42"]),
        ("#### 42", ["42"]),
        ("33 70 11 45", []),
        ("the answer depends on x", []),
        ("\\boxed{" * 2000, []),
    ],
)
def test_stated_answers(text, stated):
    assert stated_answers(text) == stated


def test_giving_away_needs_the_answer_itself():
    assert gives_away("the answer is 42", ["42"])
    assert not gives_away("the answer is 41", ["42"])
    assert not gives_away("17 + 25 = 42", ["42"])


def test_prompts_that_forbid():
    assert forbids_answer(think_solve().turn("thinker").template)
    assert not forbids_answer(think_solve().turn("solver").template)


# --- re-counted votes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["majority", "weighted", "sampled"])
def test_a_recount_is_what_the_counterfactual_plays_paid(tmp_path, kind):
    team = voting(3, decision=kind, prompts={f"voter{i}": f"voter{i}: {{problem}}" for i in (1, 2, 3)})
    unsure = ScriptedEngine(
        by_agent({f"voter{i}": lambda p, s: pick(s, "yes", "no", "", "maybe") for i in (1, 2, 3)}),
        logprob=lambda text: -0.1 * (1 + len(text)),
    )
    run = scripted_run(tmp_path / "run", team, voices(team.agent_names, unsure), steps=2)
    voters = {turn.name: turn.agent for turn in team.turns}
    for group, _ in read_episodes(run.episode_file(2)):
        ballots = ballots_of(group.rollouts, voters, kind)
        assert reproduces(ballots, group.rollouts)
        again = ballots.without_each()
        for play in group.counterfactuals:
            assert again[play.removed[0]][play.rollout].item() == pytest.approx(play.reward, abs=1e-6)
            assert ballots.without(play.removed)[play.rollout].item() == pytest.approx(play.reward, abs=1e-6)
        assert ballots.without(team.agent_names).tolist() == [0.0] * len(group.rollouts)


def test_a_recount_of_rollouts_that_do_not_say_what_was_read_is_none():
    from ccpo.rollout import Ask, play_team

    p = problem("p")
    played = play_team(
        VOTERS,
        exact_task(p),
        voices(VOTERS.agent_names, ScriptedEngine(HEALTHY_VOTE)),
        Limits(),
        [p],
        Ask(samples=4),
        seed=0,
        step=0,
    )
    voters = {turn.name: turn.agent for turn in VOTERS.turns}
    rollouts = played.groups[0].rollouts
    assert ballots_of(rollouts, voters, "majority") is not None
    assert ballots_of([replace(rollouts[0], answers={})], voters, "majority") is None
    other = [replace(r, reward=1.0 - r.reward) for r in rollouts]
    assert not reproduces(ballots_of(other, voters, "majority"), other)


def test_the_table_in_the_docs_names_every_alarm():
    text = (Path(__file__).parents[1] / "docs" / "alarms.md").read_text()
    assert [name for name in ALARMS if f"| `{name}` |" not in text] == []
