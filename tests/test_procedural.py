"""Procedural tasks: their problems, their teachers, and the lessons from which a tiny base model is made."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo import bootstrap as base
from ccpo.config import BootstrapSection
from ccpo.errors import UserError
from ccpo.tasks.procedural import ChainSum, DigitSum, ProceduralTask, TruthChoice, scratchpad
from ccpo.teams import PlayTeam, Team, chain, manager_workers, single, think_solve, voting
from ccpo.types import Problem

PLAYED = [
    (think_solve(), DigitSum()),
    (voting(3), TruthChoice()),
    (chain(3), ChainSum()),
    (chain(4), ChainSum(parts=4)),
    (manager_workers(3), ChainSum()),
    (manager_workers(2), ChainSum(parts=2, digits=(2, 5))),
    (single(), DigitSum()),
    (single(), DigitSum(graded=True)),
    (single(), TruthChoice()),
    (single(), ChainSum()),
]
IDS = [f"{number}-{team.name}{len(team.agents)}-{task.name}" for number, (team, task) in enumerate(PLAYED)]
TASKS = [DigitSum, TruthChoice, ChainSum]


def taught(
    team: Team, task: ProceduralTask, problem: Problem, rng: random.Random, noise: Mapping[str, float], gone=()
) -> dict[str, str]:
    """What the teacher says in every turn, the turns in ``gone`` unheard."""
    said: dict[str, str] = {}
    for turn in team.turns_in_order:
        heard = {name: None if name in gone else said[name] for name in turn.reads}
        said[turn.name] = task.teach(problem, turn.name, heard, rng, noise.get(turn.name, 0.0))
    return said


def answered(
    team: Team, task: ProceduralTask, count: int = 200, noise: Mapping[str, float] | None = None, gone=()
) -> float:
    """The mean score of what the teacher says in the turns that decide."""
    rng = random.Random(5)
    pairs = []
    for problem in islice(task, count):
        said = taught(team, task, problem, rng, noise or {}, gone)
        pairs += [(problem, said[name]) for name in team.decision.reads]
    return sum(v.score for v in task.verify(pairs)) / len(pairs)


# --- problems ---------------------------------------------------------------------------------------------------------


def test_answers_by_hand():
    for problem in islice(DigitSum(), 100):
        assert int(problem.answer) == sum(map(int, problem.text.split("+"))) % 10
    for problem in islice(ChainSum(), 100):
        assert int(problem.answer) == sum(int(c) for c in problem.text if c != "|") % 10
        assert problem.text.count("|") == 2


def test_exactly_one_statement_is_true():
    def true(statement: str) -> bool:
        value = statement[0] == "T"
        for operator, literal in zip(statement[1::2], statement[2::2], strict=True):
            other = literal == "T"
            value = {"&": value and other, "|": value or other, "^": value != other}[operator]
        return value

    for problem in islice(TruthChoice(), 200):
        words = problem.text.split()
        statements = dict(zip(words[::2], words[1::2], strict=True))
        assert dict(problem.meta["choices"]) == statements
        assert [letter for letter, statement in statements.items() if true(statement)] == [problem.answer]


def test_sizes_are_as_asked():
    lengths = {p.text.count("+") + 1 for p in islice(DigitSum(digits=(2, 4)), 200)}
    assert lengths == {2, 3, 4}
    assert {len(part) for p in islice(ChainSum(parts=4, digits=(1, 3)), 100) for part in p.text.split("|")} == {1, 2, 3}
    assert {len(p.meta["choices"]) for p in islice(TruthChoice(options=6), 20)} == {6}
    assert {len(s) for p in islice(TruthChoice(literals=2), 20) for s in p.meta["choices"].values()} == {3}


@pytest.mark.parametrize("kind", TASKS)
def test_train_and_test_never_share_a_problem(kind):
    train = {p.text for p in islice(kind(), 1500)}
    test = {p.text for p in islice(kind(split="test"), 500)}
    elsewhere = {p.text for p in islice(kind(split="test", seed=9), 500)}
    assert not train & (test | elsewhere)
    assert len(test) > 300


@pytest.mark.parametrize("kind", TASKS)
def test_a_problem_is_a_function_of_seed_split_and_index(kind):
    task = kind()
    assert [task[i] for i in (5, 0, 5)] == [kind()[5], kind()[0], kind()[5]]
    assert kind(seed=1)[0].text != task[0].text
    assert kind(size=10)[3] == kind(size=99)[3]
    ids = (
        [p.id for p in islice(task, 50)]
        + [p.id for p in islice(kind(seed=1), 50)]
        + [p.id for p in islice(kind(split="test"), 50)]
    )
    assert len(set(ids)) == 150


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_ends_where_it_says(kind):
    task = kind(size=3)
    assert (len(task), len(list(task))) == (3, 3)
    for index in (3, -1):
        with pytest.raises(IndexError):
            task[index]


def test_problems_are_fixed_for_ever():
    # a change here makes every run and every cached base model another one
    assert (DigitSum()[0].text, TruthChoice()[0].text, ChainSum()[0].text) == FIRST


FIRST = ("8+6+9+0+0+4+3", "A F^F^F B F^T&F C F^F&F D T&T|T", "5|754|0")


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (DigitSum, {"size": 0}, "task.size is 0"),
        (DigitSum, {"digits": (9, 3)}, r"task.digits is \[9, 3\]"),
        (DigitSum, {"digits": (0, 3)}, r"task.digits is \[0, 3\]"),
        (ChainSum, {"digits": (0, 0)}, r"task.digits is \[0, 0\]"),
        (ChainSum, {"parts": 0}, "task.parts is 0"),
        (TruthChoice, {"options": 1}, "2 to 8 options"),
        (TruthChoice, {"options": 9}, "2 to 8 options"),
        (TruthChoice, {"literals": 0}, "of 1 literal or more"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(kind, arguments, said):
    with pytest.raises(UserError, match=said):
        kind(**arguments)


def test_a_form_too_short_for_a_test_split_says_so():
    with pytest.raises(UserError, match="the test split has no problem of this form"):
        list(TruthChoice(options=2, literals=1, split="test", size=5))


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_a_scratchpad_by_hand():
    quiet = random.Random(0)
    assert scratchpad([3, 7, 1, 4], quiet, 0.0) == "33 70 11 45"
    assert scratchpad([9, 9], quiet, 0.0, start=5) == "94 93"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 99), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_a_slip_is_made_once_and_carried_on(numbers, seed, start):
    steps = scratchpad(numbers, random.Random(seed), 1.0, start).split()
    total, slips = start, []
    for step, number in zip(steps, numbers, strict=True):
        assert step[0] == str(number)  # what is copied is right
        slips.append((int(step[1]) - total - number) % 10)
        total = int(step[1])
    assert sum(s != 0 for s in slips) == 1
    assert total != (start + sum(numbers)) % 10


@pytest.mark.parametrize(("team", "task"), PLAYED, ids=IDS)
def test_without_noise_the_teachers_are_right(team, task):
    assert answered(team, task) == 1.0


@pytest.mark.parametrize(("team", "task"), PLAYED, ids=IDS)
def test_without_noise_the_teachers_are_right_alone_too(team, task):
    assert answered(team, task, gone=team.order) == 1.0


@pytest.mark.parametrize(
    ("team", "task", "turn"),
    [
        (think_solve(), DigitSum(), "thinker"),
        (chain(3), ChainSum(), "agent1"),
        (chain(3), ChainSum(), "agent2"),
        (chain(3), ChainSum(), "agent3"),
        (manager_workers(3), ChainSum(), "worker2"),
        (manager_workers(3), ChainSum(), "final"),
        (manager_workers(3), ChainSum(), "plan"),
    ],
)
def test_noise_in_one_turn_makes_the_answer_wrong_at_its_rate(team, task, turn):
    for noise in (0.3, 0.6, 1.0):
        wrong = 1 - answered(team, task, 800, {turn: noise})
        assert wrong == pytest.approx(noise, abs=0.055)  # three standard errors of 800


def test_a_careless_voter_says_a_letter_at_random():
    task, team = TruthChoice(options=4), voting(1)
    for noise in (0.4, 1.0):
        wrong = 1 - answered(team, task, 800, {"voter1": noise})
        assert wrong == pytest.approx(noise * 3 / 4, abs=0.055)  # one letter in four is right by luck


@pytest.mark.parametrize(("team", "task"), PLAYED, ids=IDS)
def test_an_alphabet_has_all_that_is_shown_and_said(team, task):
    rng = random.Random(0)
    for problem in islice(task, 100):
        noisy = taught(team, task, problem, rng, dict.fromkeys(team.order, 0.5))
        assert set(problem.text + "".join(noisy.values())) <= set(task.alphabet)


# --- lessons and the base model ---------------------------------------------------------------------------------------

TEAM = think_solve(prompts={"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="})
TINY = BootstrapSection(hidden=8, layers=1, heads=2, kv_heads=1, mlp=8, steps=2, noisy_steps=1, batch=4)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path))
    return tmp_path


def lessons(**section):
    task = DigitSum(digits=(2, 3))
    tokenizer = base.character_tokenizer(task.alphabet + "TS:=")
    return base.Lessons(TEAM, task, BootstrapSection(**section), tokenizer), tokenizer


def spelled(tokenizer, pairs) -> list[tuple[str, str]]:
    return [(tokenizer.decode(p), tokenizer.decode(t[:-1])) for p, t, _ in pairs]


def test_a_lesson_is_every_turn_through_the_teams_own_prompts():
    made, tokenizer = lessons(solo=0.0)
    for number, problem in enumerate(islice(DigitSum(digits=(2, 3)), 20)):
        pairs = made.lesson(noisy=False)
        thought = scratchpad([int(d) for d in problem.text.split("+")], random.Random(0), 0.0)
        assert spelled(tokenizer, pairs) == [
            (f"T{problem.text}:", thought),
            (f"S{problem.text}:{thought}=", problem.answer),
        ], number
        assert all(target[-1] == tokenizer.eos_token_id for _, target, _ in pairs)


def test_a_lesson_that_the_base_model_could_not_write_is_refused():
    """A character that the tokenizer does not know is dropped by it in silence, and would never be learned."""
    made = base.Lessons(TEAM, DigitSum(), BootstrapSection(), base.character_tokenizer("0123456789+TS:"))
    with pytest.raises(ValueError, match="alphabet"):
        made.lesson(noisy=False)


def test_the_share_of_lessons_without_the_thought_is_as_asked():
    made, tokenizer = lessons(solo=0.25)
    solvers = [spelled(tokenizer, made.lesson(noisy=False))[1][0] for _ in range(600)]
    assert sum(":" not in prompt for prompt in solvers) / 600 == pytest.approx(0.25, abs=0.055)


def test_a_lesson_says_whether_its_prompt_says_all_that_is_needed():
    for solo, heard in ((0.0, True), (1.0, False)):
        made, _ = lessons(solo=solo)
        (_, _, thinker), (_, _, solver) = made.lesson(noisy=False)
        assert thinker  # reads nobody
        assert solver is heard


def test_noise_is_for_all_turns_or_for_each():
    def wrong(noise) -> float:
        made, tokenizer = lessons(noise=noise, solo=0.0)
        found = 0
        for _ in range(400):
            (prompt, thought), _ = spelled(tokenizer, made.lesson(noisy=True))
            found += int(thought[-1]) != sum(map(int, prompt[1:-1].split("+"))) % 10
        return found / 400

    assert wrong(0.6) == pytest.approx(0.6, abs=0.08)
    assert wrong({"thinker": 0.3}) == pytest.approx(0.3, abs=0.08)
    assert wrong({"solver": 0.9}) == 0.0


def test_a_character_tokenizer_spells(tmp_path):
    tokenizer = base.character_tokenizer("abc +")
    assert tokenizer.decode(tokenizer("a b+c")["input_ids"]) == "a b+c"
    assert len(tokenizer("abc", add_special_tokens=False)["input_ids"]) == 3
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_base_model_is_made_once_and_then_taken_from_the_cache(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    notes = []
    folder, seconds = base.bootstrap(TEAM, DigitSum(), TINY, notes.append)
    assert folder.parent == cache
    assert seconds > 0
    assert notes
    assert json.loads((folder / "done.json").read_text())["section"]["hidden"] == 8
    assert base.bootstrap(TEAM, DigitSum(), TINY) == (folder, 0.0)
    assert [p.name for p in cache.iterdir()] == [folder.name]
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 8
    text = "T3+7:"
    assert (
        AutoTokenizer.from_pretrained(folder).decode(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]) == text
    )


def test_what_shapes_the_model_shapes_its_name():
    def name(team=TEAM, task=DigitSum(), **section) -> str:  # noqa: B008
        return base._fingerprint(team, task, TINY.model_copy(update=section))

    assert name() == name(cache=False)
    others = [name(steps=3), name(seed=1), name(task=DigitSum(seed=1)), name(team=think_solve()), name(noise=0.5)]
    assert len({name(), *others}) == 6


def test_the_same_section_makes_the_same_weights():
    import torch

    first, _ = base.train_base(TEAM, DigitSum(), TINY, print)
    second, _ = base.train_base(TEAM, DigitSum(), TINY, print)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_half_made_model_in_the_cache_is_made_again(cache):
    folder, _ = base.bootstrap(TEAM, DigitSum(), TINY)
    (folder / "done.json").unlink()
    again, seconds = base.bootstrap(TEAM, DigitSum(), TINY)
    assert again == folder
    assert seconds > 0
    assert (folder / "done.json").is_file()


def test_a_model_that_another_run_finished_meanwhile_is_left_in_place(cache, monkeypatch):
    train, made = base.train_base, []

    def overtaken(*arguments):
        monkeypatch.setattr(base, "train_base", train)
        other, _ = base.bootstrap(TEAM, DigitSum(), TINY)  # a second run, faster than this one
        made.append((other / "done.json").stat().st_ino)
        return train(*arguments)

    monkeypatch.setattr(base, "train_base", overtaken)
    folder, _ = base.bootstrap(TEAM, DigitSum(), TINY)
    assert [(folder / "done.json").stat().st_ino] == made
    assert [p.name for p in cache.iterdir()] == [folder.name]


def test_a_task_or_team_without_a_teacher_is_refused(cache):
    with pytest.raises(UserError, match=r"set model\.path to a Hugging Face model"):
        base.bootstrap(TEAM, ["no task"], TINY)

    async def play(problem, speak):
        return ""

    with pytest.raises(UserError, match=r"a Python function.*set model\.path to a Hugging Face model"):
        base.bootstrap(PlayTeam("loop", ("a",), play), DigitSum(), TINY)
