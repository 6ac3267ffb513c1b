"""reasoning-gym's data sets: problems that can be made again, and their own scores."""

from __future__ import annotations

import json
import time

import pytest

from ccpo.errors import UserError
from ccpo.tasks import TASKS, GymTask, gym_names
from ccpo.tasks import gym as gym_module
from ccpo.tasks.sandbox import close_all, shared
from ccpo.types import VerdictStatus

pytest.importorskip("reasoning_gym")

NO_REFERENCE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Many answers are right; reasoning-gym names none."""


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    close_all()


def scores(task, *texts):
    return [v.score for v in task.verify([(task[0], text) for text in texts])]


def test_a_problem_is_a_function_of_seed_and_index():
    task = GymTask(dataset="chain_sum", size=20, seed=5, config={"min_terms": 2, "max_terms": 2})
    assert len(task) == 20
    assert task.name == "chain_sum"
    assert task[3] == task[3]
    before = [task[i] for i in range(20)]
    close_all()
    assert [task[i] for i in range(20)] == before
    assert len({p.id for p in before}) == 20
    assert before != [GymTask(dataset="chain_sum", size=20, seed=6, config=task.config)[i] for i in range(20)]
    json.dumps(dict(before[0].meta))
    with pytest.raises(IndexError):
        task[20]
    assert TASKS["gym"] is GymTask


def test_answers_are_read_and_scored():
    task = GymTask(dataset="chain_sum", size=3)
    right = task[0].answer
    found = scores(
        task,
        f"hm <answer>{right}</answer>",
        f"\\boxed{{{right}}}",
        f"the answer is {right}",
        right,
        "<answer>x</answer>",
        "",
    )
    assert found[:4] == [1.0] * 4
    assert found[4] < 0.5
    assert task.verify([(task[0], " ")])[0].status is VerdictStatus.NO_ANSWER
    assert task.verify([(task[0], f"<answer> {right} </answer>")])[0].answer == right.lower()


def test_partial_credit_is_kept():
    task = GymTask(dataset="leg_counting", size=2)
    right, wordy, wrong = scores(
        task, task[0].answer, f"<answer>about {task[0].answer} legs</answer>", "<answer>no</answer>"
    )
    assert right == 1.0
    assert 0.0 < wordy < 1.0  # the scorer pays the share of the text that is the answer
    assert wrong < wordy


def test_a_scorer_without_one_right_answer():
    task = GymTask(dataset="countdown", size=2)
    target = task[0].answer
    assert scores(task, f"<answer>{target}</answer>", "<answer>1+1</answer>") == [1.0, pytest.approx(0.05, abs=0.05)]
    assert GymTask(dataset="graph_color", size=1)[0].answer == ""


def test_a_composite_of_data_sets():
    task = GymTask(
        dataset="composite", size=10, config={"datasets": [{"name": "gcd"}, {"name": "chain_sum", "weight": 3.0}]}
    )
    problems = [task[i] for i in range(10)]
    assert [v.score for v in task.verify([(p, p.answer) for p in problems])] == [1.0] * 10


@pytest.mark.parametrize(
    "dataset", ["spiral_matrix", "n_queens", "string_insertion", "binary_matrix", "countdown", "simple_integration"]
)
@pytest.mark.parametrize(
    "call", ["__import__('os').system('touch {}')", "open('{}', 'w')", "[open('{}', 'w').write('x')]"]
)
def test_a_scorer_that_evaluates_its_text_runs_nothing(tmp_path, dataset, call):
    target = tmp_path / "written"
    task = GymTask(dataset=dataset, size=2)
    assert scores(task, f"<answer>{call.format(target)}</answer>")[0] < 0.5
    assert not target.exists()
    assert scores(task, f"<answer>{task[0].answer}</answer>") == [1.0]


@pytest.mark.parametrize(
    "text", ["9**9**9**9", "(" * 10**6, "[" * 10**5, "\0\ud800\u202e", "1e999999999", "x" * 10**6, "9" * 10**5]
)
def test_no_text_takes_a_scorer_down(text):
    for dataset in ("countdown", "spiral_matrix", "decimal_arithmetic", "simple_integration", "zebra_puzzles"):
        task = GymTask(dataset=dataset, size=2, seconds=0.5)
        began = time.monotonic()
        (verdict,) = task.verify([(task[0], f"<answer>{text}</answer>")])
        assert time.monotonic() - began < 4.0
        assert 0.0 <= verdict.score < 0.5
        assert scores(task, task[0].answer) == [1.0]


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"no data set 'chainsum'.*Did you mean 'chain_sum'"):
        GymTask(dataset="chainsum")
    with pytest.raises(UserError, match=r"'chain_sum' refuses .*min_trms"):
        GymTask(dataset="chain_sum", config={"min_trms": 3})
    with pytest.raises(UserError, match=r"'chain_sum' refuses"):
        GymTask(dataset="chain_sum", config={"min_terms": 9, "max_terms": 2})
    with pytest.raises(UserError, match="at least one problem"):
        GymTask(dataset="chain_sum", size=0)
    with pytest.raises(UserError, match="plain numbers"):
        GymTask(dataset="chain_sum", config={"min_terms": object()})


def test_without_reasoning_gym_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(gym_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ccpo\[gym\]'"):
        gym_names()


@pytest.mark.slow
def test_every_data_set_is_made_and_scored():
    config = {"composite": {"datasets": [{"name": "gcd"}]}}
    tasks = {name: GymTask(dataset=name, size=4, seed=11, config=config.get(name, {})) for name in gym_names()}
    assert len(tasks) > 100
    made = {name: [task[i] for i in range(3)] for name, task in tasks.items()}
    shared("gym").close()
    assert {name: [task[i] for i in range(3)] for name, task in tasks.items()} == made  # in another process too
    for name, task in tasks.items():
        problems = made[name]
        assert all(p.text for p in problems), name
        verdicts = task.verify([(p, f"<answer>{p.answer}</answer>") for p in problems])
        nonsense = task.verify([(p, "<answer>zzz</answer>") for p in problems])
        if name in NO_REFERENCE:
            assert all(v.score < 0.5 for v in nonsense), name
            assert not any(p.answer for p in problems), name
            continue
        assert [v.score for v in verdicts] == [1.0] * 3, name
        if name != "game_of_life_halting":  # its scorer takes any text for "False"
            assert all(v.score < 0.5 for v in nonsense), name
