"""Process rewards: a task judges turns, and the rule's credit takes them in."""

from __future__ import annotations

import pytest
import torch

from ccpo.build import prepare
from ccpo.config import load_recipe
from ccpo.credit import join_process
from ccpo.credit.process import centred
from ccpo.errors import UserError
from ccpo.rollout import Ask, Limits, play_team
from ccpo.tasks import PROCEDURAL
from ccpo.teams import think_solve
from ccpo.types import CreditInputs, CreditOutputs, Problem, TreePlace
from scripted import ScriptedEngine, exact_task, problem, voices

torch.set_num_threads(1)
PROMPTS = {"thinker": "thinker: {problem}", "solver": "solver: {problem}[[ | {thinker}]]"}
PLAIN = TreePlace(contexts=1, siblings=3, plays=1)


def test_a_process_reward_is_held_against_the_other_texts():
    assert centred(torch.tensor([[1.0, 0.0, 0.5]]), PLAIN).tolist() == [[0.75, -0.75, 0.0]]
    shared = TreePlace(contexts=1, siblings=2, plays=2)
    assert centred(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), shared).tolist() == [[1.0, 1.0, -1.0, -1.0]]
    assert centred(torch.tensor([[0.7]]), TreePlace(contexts=1, siblings=1, plays=1)).tolist() == [[0.0]]


def test_it_joins_the_credit_of_its_turn_alone():
    inputs = CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker", "solver"),
        reward_PN=torch.zeros(1, 3),
        process={"thinker": torch.tensor([[1.0, 0.0, 0.5]])},
    )
    credit = {agent: torch.tensor([[1.0, 0.0, 0.0]]) for agent in inputs.agents}
    joined = join_process(CreditOutputs(credit=credit), inputs, 2.0)
    assert joined.turn_credit["thinker"].tolist() == [[2.5, -1.5, 0.0]]
    assert set(joined.turn_credit) == {"thinker"}
    assert joined.metrics["credit/thinker/process"] == pytest.approx(0.5)


def test_a_process_reward_of_another_shape_is_refused():
    inputs = CreditInputs(
        agents=("a",), decider="a", active=("a",), reward_PN=torch.zeros(1, 3), process={"a": torch.zeros(1, 2)}
    )
    with pytest.raises(ValueError, match=r"\[P, N\] = \(1, 3\)"):
        join_process(CreditOutputs(credit={"a": torch.zeros(1, 3)}), inputs, 1.0)


def judged(scores):
    class Judging:
        def __init__(self):
            self.inner = exact_task(problem("p"))
            self.name = "judging"
            self.asked: list[tuple[Problem, str, str]] = []

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return self.inner[index]

        def verify(self, pairs):
            return self.inner.verify(pairs)

        def process(self, triples):
            self.asked += triples
            return [scores(turn, text) for _, turn, text in triples]

    return Judging()


def play(task, **keys):
    engine = ScriptedEngine(lambda prompt, seed: f"{prompt.partition(':')[0]} {seed % 2}")
    team = think_solve(prompts=PROMPTS)
    return play_team(
        team, task, voices(team.agent_names, engine), Limits(), [problem("p")], Ask(samples=4, **keys), seed=1, step=0
    )


def test_the_walk_asks_for_every_turn_and_keeps_those_that_are_judged():
    task = judged(lambda turn, text: float(text[-1]) if turn == "thinker" else None)
    played = play(task, process=True)
    assert {turn for _, turn, _ in task.asked} == {"thinker", "solver"}
    said = [float(r.turn("thinker").completion.text[-1]) for r in played.groups[0].rollouts]
    assert played.process["thinker"].tolist() == [said]
    assert set(played.process) == {"thinker"}
    assert play(task).process == {}


@pytest.mark.parametrize("scores", [lambda *_: 1.5, lambda *_: float("nan")])
def test_a_score_out_of_range_is_refused(scores):
    with pytest.raises(UserError, match=r"lies in \[0, 1\]"):
        play(judged(scores), process=True)


def test_the_scratchpads_steps_are_judged_one_by_one():
    task = PROCEDURAL["digit_sum"](digits=(3, 3))
    sums = Problem(id="x", text="3+7+1", answer="1")
    texts = ["33 70 11", "33 71 12", "33 70 12", "", "33"]
    found = task.process([(sums, "thinker", text) for text in texts] + [(sums, "solver", "1")])
    assert found == pytest.approx([1.0, 1 / 3, 2 / 3, 0.0, 1 / 3, None])


def test_a_task_that_judges_no_turns_is_refused_before_anything_runs():
    recipe = {"team": "voting", "task": "truth_choice", "process": 0.5, "rollout": {"prompts": 2, "samples": 2}}
    with pytest.raises(UserError, match="judges no turns"):
        prepare(load_recipe(recipe))
