"""Data files: real ones as they are, every recognised layout, and what is said of a file that is broken."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.tasks import TASKS, Choice, Exact, Math, load_file, load_hub
from ccpo.tasks import rows as rows_module
from ccpo.tasks.hub import KNOWN
from ccpo.types import Problem, Verdict

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data folder {DATA} is absent")

LETTERS = {"question": "Which is even?", "options": ["3", "4", "5"], "answer": "B"}


def jsonl(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def only(task) -> Problem:
    assert len(task) == 1
    return task[0]


# --- real data ----------------------------------------------------------------------------------------------------


def rate(task, texts) -> float:
    verdicts = task.verify([(task[i], text) for i, text in enumerate(texts)])
    wrong = [
        (task[i].answer, text[-80:], v)
        for i, (text, v) in enumerate(zip(texts, verdicts, strict=True))
        if v.score != 1.0
    ]
    assert not wrong[5:], wrong[:10]
    return sum(v.score for v in verdicts) / len(verdicts)


@needs_data
def test_math500_as_it_is():
    task = load_file(DATA / "math500.parquet")
    assert len(task) == 500
    assert task.verifier == Math()
    first = task[0]
    assert first.id == "test/precalculus/807.json"
    assert first.answer == r"\left( 3, \frac{\pi}{2} \right)"
    assert "boxed" not in first.text  # the plain question, not the prompt with its instruction
    assert first.meta == {"subject": "Precalculus", "level": 2}
    assert rate(task, [f"So \\boxed{{{task[i].answer}}}." for i in range(500)]) == 1.0
    table = pyarrow.parquet.read_table(DATA / "math500.parquet", columns=["groundtruth"])
    assert rate(task, table["groundtruth"].to_pylist()) >= 0.998  # the worked solutions, read like a model's text


@needs_data
def test_math_train_has_four_rows_without_an_answer():
    path = DATA / "math_train.parquet"
    with pytest.raises(
        UserError, match=r"row 1635: 'reward_model.ground_truth' is empty.* 4 rows are broken.*on_bad_row"
    ):
        load_file(path)
    task = load_file(path, on_bad_row="skip")
    assert (len(task), task.skipped_rows) == (7496, 4)
    assert len({task[i].id for i in range(len(task))}) == 7496
    some = load_file(path, limit=200)
    assert rate(some, [f"\\boxed{{{some[i].answer}}}" for i in range(200)]) == 1.0


@needs_data
def test_gsm8k_as_it_is():
    task = load_file(DATA / "gsm8k_test.jsonl")
    assert len(task) == 1319
    assert task.verifier == Math()
    assert task[0].answer == "18"
    train = load_file(DATA / "gsm8k_train.jsonl")
    assert len(train) == 7473
    lines = [json.loads(line)["answer"] for line in (DATA / "gsm8k_train.jsonl").open(encoding="utf-8")][:300]
    some = load_file(DATA / "gsm8k_train.jsonl", limit=300)
    assert rate(some, lines) == 1.0  # whole worked answers, "#### N" at the end
    assert rate(some, [f"\\boxed{{{some[i].answer}}}" for i in range(300)]) == 1.0


@needs_data
def test_logiqa_as_it_is():
    task = load_file(DATA / "logiqa_test.txt")
    assert len(task) == 651
    assert task.verifier == Choice()
    first = task[0]
    assert first.answer == "A"
    assert first.meta["choices"]["D"] == "The business district is southeast of the leisure area"
    assert first.text.endswith("\nD. The business district is southeast of the leisure area")
    assert first.text.count("\nA. ") == 1
    assert task[2].meta["choices"] == {"A": "No dangshen", "B": "No Shouwu", "C": "有 白 术", "D": "不 白 术"}
    assert rate(task, [f"\\boxed{{{task[i].answer}}}" for i in range(651)]) == 1.0
    assert rate(task, [f"It is\n{task[i].meta['choices'][task[i].answer]}" for i in range(651)][:100]) >= 0.95


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text", "answer", "verifier"),
    [
        ({"question": "1+1?", "answer": "2"}, "1+1?", "2", Math()),
        ({"question": "1+1?", "answer": 2.0}, "1+1?", "2", Math()),
        ({"Problem": "1+1?", "Answer": 2}, "1+1?", "2", Math()),
        ({"question": "Capital?", "answer": "Paris"}, "Capital?", "Paris", Exact()),
        ({"question": "True?", "answer": True}, "True?", "true", Exact()),
        ({"question": "q", "answer": "12 - 3 = 9\n#### 1,009"}, "q", "1,009", Math()),
        ({"problem": "p", "solution": r"so \boxed{\frac{1}{2}}"}, "p", r"\frac{1}{2}", Math()),
        ({"problem": "p", "solution": r"\boxed{9}", "answer": r"\frac12"}, "p", r"\frac12", Math()),
        ({"question": "q", "final_answer": ["$3$"]}, "q", "$3$", Math()),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                "reward_model": {"ground_truth": "7"},
            },
            "u",
            "7",
            Math(),
        ),
        (
            {
                "prompt": [{"role": "user", "content": "u, box it"}],
                "question": "u",
                "reward_model": {"ground_truth": "7"},
            },
            "u",
            "7",
            Math(),
        ),
    ],
)
def test_plain_layouts(tmp_path, row, text, answer, verifier):
    task = load_file(jsonl(tmp_path, row))
    assert (only(task).text, only(task).answer) == (text, answer)
    assert task.verifier == verifier


@pytest.mark.parametrize(
    "row",
    [
        LETTERS,
        {**LETTERS, "answer": 1},
        {**LETTERS, "answer": "4"},  # the option's text, not the index 4
        {**LETTERS, "answer": "(b)"},
        {**LETTERS, "options": {"A": "3", "B": "4", "C": "5"}},
        {**LETTERS, "options": {"C": "5", "B": "4", "A": "3"}},
        {**LETTERS, "options": {"A": "3", "B": "4", "C": "5", "D": None}},
        {**LETTERS, "options": ["A) 3", "B) 4", "C) 5"]},
        {**LETTERS, "options": '["3", "4", "5"]'},
        {
            "question": "Which is even?",
            "choices": {"text": ["3", "4", "5"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {"question": "Which is even?", "A": "3", "B": "4", "C": "5", "answer": "B"},
        {"question": "Which is even?", "opa": "3", "opb": "4", "opc": "5", "cop": 1},
        {"question": "Which is even?", "options": {"A": "3", "B": "4", "C": "5"}, "answer": "four", "answer_idx": "B"},
    ],
)
def test_choice_layouts(tmp_path, row):
    task = load_file(jsonl(tmp_path, row))
    problem = only(task)
    assert problem.answer == "B"
    assert problem.meta["choices"] == {"A": "3", "B": "4", "C": "5"}
    assert problem.text == "Which is even?\nA. 3\nB. 4\nC. 5"
    assert task.verifier == Choice()
    assert [v.score for v in task.verify([(problem, "B"), (problem, "C"), (problem, "4")])] == [1.0, 0.0, 1.0]


def test_options_that_the_question_shows_are_not_shown_twice(tmp_path):
    text = "Which is even?\n(A) 3\n(B) 4\n(C) 5"
    assert only(load_file(jsonl(tmp_path, {**LETTERS, "question": text}))).text == text


def test_columns_named_by_the_user(tmp_path):
    row = {"q": {"text": "1+1?"}, "a": {"gold": "2"}, "answer": "wrong", "opts": ["2", "3"], "key": 17}
    problem = only(load_file(jsonl(tmp_path, row), question="q.text", answer="a.gold", id="key"))
    assert (problem.id, problem.text, problem.answer) == ("17", "1+1?", "2")
    problem = only(load_file(jsonl(tmp_path, row), question="q.text", answer="a.gold", choices="opts"))
    assert problem.answer == "A"


def test_every_format_gives_the_same_problems(tmp_path):
    rows = [{"question": 'Größe, "x"\n?', "answer": "2"}, {"question": "b", "answer": "3"}]
    jsonl(tmp_path, *rows)
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "nested.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    for name, delimiter in (("data.csv", ","), ("data.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    for name in ("data.jsonl", "data.json", "nested.json", "lines.json", "data.parquet", "data.csv", "data.tsv"):
        task = load_file(tmp_path / name)
        assert [(p.text, p.answer) for p in task.problems] == [(row["question"], row["answer"]) for row in rows], name


def test_parts_splits_names_and_ids(tmp_path):
    rows = [
        {"question": f"q{i}", "answer": str(i), "split": "test" if i % 2 else "train", "id": i // 2} for i in range(10)
    ]
    path = jsonl(tmp_path, *rows)
    assert [p.answer for p in load_file(path, offset=2, limit=3).problems] == ["2", "3", "4"]
    assert [p.answer for p in load_file(path, split="test", limit=2).problems] == ["1", "3"]
    assert [p.id for p in load_file(path, limit=4).problems] == ["0", "0#2", "1", "1#2"]
    assert load_file(path).name == "data"
    assert load_file(path, name="mine")[0].source == "mine"
    with pytest.raises(UserError, match="no row is of the split 'dev'; there are test, train"):
        load_file(path, split="dev")
    with pytest.raises(UserError, match="no problems after the first 10"):
        load_file(path, offset=10)


def test_a_verifier_by_name_or_of_ones_own(tmp_path):
    path = jsonl(tmp_path, {"question": "q", "answer": "2"})
    assert load_file(path, verifier="exact").verifier == Exact()
    assert load_file(path, seconds=1.5).verifier == Math(seconds=1.5)

    def always(problem: Problem, text: str) -> Verdict:
        return Verdict(score=0.5, answer=text)

    task = load_file(path, verifier=always)
    assert task.verify([(task[0], "x")])[0].score == 0.5
    assert TASKS["file"] is load_file


# --- broken files -------------------------------------------------------------------------------------------------

GOOD = {"question": "q", "answer": "1"}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{not json", r"line 2: it is not JSON: .* at column 2"),
        ('["a", "list"]', "line 2: it is a list"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "line 2: it is not JSON that can be read"),
        ("[" * 100_000, "line 2: it is not JSON"),
        ({"question": "q"}, "line 2: 'answer' is missing"),
        ({"answer": "1"}, "line 2: 'question' is missing"),
        ({"question": " ", "answer": "1"}, "line 2: 'question' is empty"),
        ({"question": "q", "answer": ""}, "line 2: 'answer' is empty"),
        ({"question": "q", "answer": None}, "line 2: 'answer' is missing"),
        ({"question": "q", "answer": float("nan")}, "line 2: 'answer' is nan"),
        ({"question": {"deep": ["junk"]}, "answer": "1"}, "line 2: 'question' is a dict"),
        ({"question": "q", "answer": ["1", "2"]}, "line 2: 'answer' is a list"),
        ({"question": "q", "answer": "x" * 2000}, "line 2: 'answer' has 2,000 characters"),
        ({"question": "q", "answer": "so 5\n####"}, "line 2: 'answer' has nothing after"),
        ('{"question": "half \\ud800 a pair", "answer": "1"}', "line 2: 'question' holds bytes that are not UTF-8"),
    ],
)
def test_a_broken_row_is_named_and_left_out_only_on_demand(tmp_path, broken, said):
    path = jsonl(tmp_path, GOOD, broken, {"question": "r", "answer": "2"})
    with pytest.raises(UserError, match=said) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert "on_bad_row: skip" in str(caught.value)
    task = load_file(path, on_bad_row="skip")
    assert task.skipped_rows == 1
    assert [p.text for p in task.problems] == ["q", "r"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "E"}, "'answer' is 'E': neither a letter up to C"),
        ({"answer": 3}, "'answer' is 3; as an index it lies between 0 and 2"),
        ({"answer": -1}, "'answer' is -1"),
        ({"options": ["only"]}, "must hold 2 to 26 options; found 1"),
        ({"options": None}, "must hold 2 to 26 options; found missing"),
        ({"options": ["3", None, "5"]}, "'options' is missing"),
        ({"options": "[broken"}, "not a JSON list"),
    ],
)
def test_a_broken_choice_is_named(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        load_file(jsonl(tmp_path, LETTERS, {**LETTERS, **change}))


def test_all_broken_rows_are_counted(tmp_path):
    path = jsonl(tmp_path, GOOD, *["{"] * 8)
    with pytest.raises(UserError, match=r"line 2: .* 8 rows are broken: line 2, line 3, line 4, line 5, line 6, …"):
        load_file(path)
    with pytest.raises(UserError, match="every one of 1 rows is broken, the first at line 1: 'answer' is empty"):
        load_file(jsonl(tmp_path, {"question": "q", "answer": ""}), on_bad_row="skip")


def test_columns_that_are_missing_are_named_with_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"no column holds the answer; there is anwser.*Did you mean 'anwser'"):
        load_file(jsonl(tmp_path, {"question": "q", "anwser": "1"}))
    with pytest.raises(UserError, match=r"no column holds the question; there is foo, bar"):
        load_file(jsonl(tmp_path, {"foo": "q", "bar": "1"}))
    with pytest.raises(UserError, match=r"question: there is no column 'qestion'; .*Did you mean 'question'"):
        load_file(jsonl(tmp_path, GOOD), question="qestion")


def test_files_that_cannot_be_read(tmp_path):
    good = jsonl(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"there is no file .*dta.jsonl\. Did you mean 'data.jsonl'"):
        load_file(tmp_path / "dta.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        load_file(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "header.csv").write_text("question,answer\n")
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and no more PAR1")
    (tmp_path / "two.json").write_text('{"a": [1], "b": [2]}')
    (tmp_path / "bad.json").write_text('[\n{"question": }]')
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    (tmp_path / "text.txt").write_text("hello\nworld\n")
    for name, said in {
        "empty.jsonl": "is empty",
        "blank.jsonl": "has no rows",
        "header.csv": "has no rows",
        "data.pkl": "a data file ends in .parquet, .jsonl",
        "data.parquet": "not a parquet file",
        "two.json": "2 lists",
        "bad.json": "line 2: it is not JSON",
        "latin.json": r"not UTF-8 \(byte 3\)",
        "text.txt": "line 1: found 2 lines",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            load_file(tmp_path / name)
        assert name in str(caught.value)
    for arguments, said in (
        ({"limit": 0}, "limit"),
        ({"offset": -1}, "offset"),
        ({"seconds": 0}, "seconds"),
        ({"on_bad_row": "ignore"}, "on_bad_row"),
        ({"verifier": "mth"}, "Did you mean 'math'"),
    ):
        with pytest.raises(UserError, match=said):
            load_file(good, **arguments)


def test_bytes_that_are_not_utf8_and_lines_without_end(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "1"}\n{"question": "\xff", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"line 2: it is not UTF-8"):
        load_file(path)
    monkeypatch.setattr(rows_module, "LONGEST_ROW", 1 << 20)
    path.write_text(json.dumps(GOOD) + "\n" + "x" * (3 << 20) + "\n" + json.dumps(GOOD))
    with pytest.raises(UserError, match="line 2: it is longer than 1 MB"):
        load_file(path)
    assert len(load_file(path, on_bad_row="skip")) == 2
    table = tmp_path / "data.csv"
    table.write_bytes(b'question,answer\nq,1\n\xff,1\nq,1,2\n"a\nb",3\n')
    with pytest.raises(UserError, match=r"line 3: 'question' holds bytes.*2 rows are broken: line 3, line 4"):
        load_file(table)
    assert [p.text for p in load_file(table, on_bad_row="skip").problems] == ["q", "a\nb"]


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries({"question": _JUNK, "answer": _JUNK}, optional={"options": _JUNK}), min_size=1, max_size=4
    )
)
def test_whatever_is_in_the_rows_it_loads_or_says_why(tmp_path, rows):
    path = jsonl(tmp_path, *rows)
    try:
        task = load_file(path, on_bad_row="skip", verifier="exact")
    except UserError as error:
        task, said = None, str(error)
    if task is None:
        assert str(path) in said
        return
    assert len(task) + task.skipped_rows == len(rows)
    assert all(p.text and p.answer for p in task.problems)
    json.dumps([dict(p.meta) for p in task.problems])


# --- the hub ------------------------------------------------------------------------------------------------------


def test_a_local_folder_of_a_data_set(tmp_path):
    pytest.importorskip("datasets")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([LETTERS, LETTERS]), tmp_path / "test-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([LETTERS]), tmp_path / "train-00000-of-00001.parquet")
    task = load_hub(str(tmp_path))
    assert len(task) == 2
    assert task[0].answer == "B"
    assert task.name == tmp_path.name
    assert len(load_hub(str(tmp_path), split="train", name="mine")) == 1
    with pytest.raises(UserError, match=r"split dev\) could not be loaded"):
        load_hub(str(tmp_path), split="dev")
    with pytest.raises(UserError, match="there is no column 'anser'"):
        load_hub(str(tmp_path), answer="anser")


def test_a_name_that_cannot_be_reached(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'nobody/nothing' \(config default, split test\) could not be loaded.*kind: file"
    ):
        load_hub("nobody/nothing")
    with pytest.raises(UserError, match="config main, split test"):
        load_hub("GSM8K")
    with pytest.raises(UserError, match="Did you mean 'math500'"):
        load_hub("math50")
    assert all("/" in known.hub for known in KNOWN.values())
    assert os.environ["HF_HUB_OFFLINE"] == "1"
