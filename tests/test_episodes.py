"""Episodes on disk: what is written is what is read, whatever the models said, and a damaged file is refused."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.rollout import SCHEMA, read_episodes, write_episodes
from ccpo.types import Completion, Counterfactual, FinishReason, Group, Problem, Rollout, Turn


def turn(name: str, text: str, **keys) -> Turn:
    completion = Completion(token_ids=(4, 5, 1), logprobs=(-0.25, -1.5, -0.0), text=text, finish=FinishReason.EOS)
    return Turn(
        name=name, agent=name, policy="p", prompt="q", prompt_ids=(7, 8), completion=completion, message=text, **keys
    )


def group(text: str = "one", reward: float = 0.5) -> Group:
    problem = Problem(
        id=f"id {text}", text=text, answer="4", source="made up", meta={"choices": {"A": text}, "n": [1, 2.5, None]}
    )
    rollouts = (
        Rollout(
            turns=(turn("thinker", text), turn("solver", "4", cut_tokens=3, temperature=0.7)), answer="4", reward=reward
        ),
        Rollout(turns=(turn("thinker", text),), answer=None, reward=0.0, scores={"thinker": 1.0}),
    )
    others = (
        Counterfactual(
            removed=("thinker",), rollout=None, draw=1, turns=(turn("solver", text),), answer="3", reward=0.25
        ),
        Counterfactual(removed=("a", "b"), rollout=1, draw=0, turns=(), answer=None, reward=1.0, cached=True),
    )
    return Group(problem=problem, rollouts=rollouts, counterfactuals=others)


def write(path: Path, groups, credit=None, **keys) -> Path:
    zeros = {"thinker": [[0.0, 0.0] for _ in groups]}
    write_episodes(path, 7, groups, credit or zeros, zeros, **keys)
    return path


def read(path: Path) -> list[Group]:
    return [g for g, _ in read_episodes(path)]


def plain(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_episodes(path))
    return str(caught.value)


# --- what is written is what is read --------------------------------------------------------------------------------


def test_groups_come_back_as_they_were(tmp_path):
    groups = [group("one"), group("two", reward=1.0)]
    assert read(write(tmp_path / "e.gz", groups)) == groups


def test_credit_and_advantage_stand_beside_each_rollout(tmp_path):
    path = tmp_path / "e.gz"
    write_episodes(path, 7, [group()], {"thinker": [[0.5, -1.0]]}, {"thinker": [[2.0, -2.0]], "solver": [[1.0, 3.0]]})
    _, record = next(iter(read_episodes(path)))
    assert [r["credit"] for r in record["rollouts"]] == [{"thinker": 0.5}, {"thinker": -1.0}]
    assert [r["advantage"] for r in record["rollouts"]] == [
        {"thinker": 2.0, "solver": 1.0},
        {"thinker": -2.0, "solver": 3.0},
    ]
    assert [r["n"] for r in record["rollouts"]] == [0, 1]
    assert record["step"] == 7


def test_a_credit_that_is_no_number_is_written_as_null(tmp_path):
    path = write(tmp_path / "e.gz", [group()], credit={"a": [[math.nan, math.inf]]})
    _, record = next(iter(read_episodes(path)))
    assert [r["credit"]["a"] for r in record["rollouts"]] == [None, None]
    assert "NaN" not in plain(path)


def test_tokens_can_be_left_out(tmp_path):
    found = read(write(tmp_path / "e.gz", [group()], tokens=False))[0]
    assert found.rollouts[0].turns[0].completion.token_ids == ()
    assert found.rollouts[0].turns[0].prompt_ids == ()
    assert found.rollouts[0].turns[0].completion.text == "one"
    assert found.rollouts[0].reward == 0.5


def test_log_probabilities_keep_six_places(tmp_path):
    spoken = turn("a", "x")
    exact = Completion(token_ids=(1,), logprobs=(-1.23456789,), text="x", finish=FinishReason.STOP)
    spoken = Turn(**{f: getattr(spoken, f) for f in Turn.__slots__} | {"completion": exact})
    path = write(
        tmp_path / "e.gz",
        [Group(problem=group().problem, rollouts=(Rollout(turns=(spoken,), answer=None, reward=0.0),))],
    )
    completion = read(path)[0].rollouts[0].turns[0].completion
    assert completion.logprobs == (-1.234568,)
    assert completion.finish is FinishReason.STOP


def test_a_file_is_plain_lines_that_any_tool_can_read(tmp_path):
    lines = plain(write(tmp_path / "e.gz", [group(), group("two")])).splitlines()
    assert json.loads(lines[0]) == {"schema": SCHEMA, "step": 7, "problems": 2}
    assert [json.loads(line)["problem"]["text"] for line in lines[1:]] == ["one", "two"]


def test_the_same_step_is_the_same_file(tmp_path):
    assert write(tmp_path / "a.gz", [group()]).read_bytes() == write(tmp_path / "b.gz", [group()]).read_bytes()


def test_a_step_without_problems_is_a_header_alone(tmp_path):
    assert read(write(tmp_path / "e.gz", [])) == []


# --- hostile text ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "\ud800 alone",
    "\x00 nul \x1b[31m",
    "line\nbreak\r\n\u2028\u2029\x85\x0b",
    '"}\n{"schema": "other"}',
    "x" * 1_000_000,
    "é€🙂\ufeff",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_a_model_says_comes_back(tmp_path, text):
    assert read(write(tmp_path / "e.gz", [group(text)])) == [group(text)]


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=30), st.text(["\ud800", "\udbff", "\x00", "\x1b", "\u2028", "\u2029", "\x85", "\\"], max_size=10)
)
def test_any_text_comes_back(tmp_path_factory, text, odd):
    path = tmp_path_factory.mktemp("episodes") / "e.gz"
    assert read(write(path, [group(text + odd), group(odd)])) == [group(text + odd), group(odd)]


# --- whole or not at all --------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "deep" / "e.gz", [group("old")])

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(path, [group("new")])
    assert read(path) == [group("old")]


def test_a_group_that_cannot_be_written_leaves_no_file(tmp_path):
    broken = Group(problem=Problem(id="x", text="x", answer="x", meta={"f": object()}), rollouts=())
    with pytest.raises(TypeError):
        write(tmp_path / "e.gz", [broken])
    assert list(tmp_path.iterdir()) == []


# --- what is refused ------------------------------------------------------------------------------------------------


def compressed(path: Path, text: str) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def test_another_schema_is_refused_by_name(tmp_path):
    path = compressed(tmp_path / "e.gz", '{"schema": "ccpo.episodes/99", "problems": 0}\n')
    assert f"schema 'ccpo.episodes/99'; this version reads '{SCHEMA}'" in refused(path)


@pytest.mark.parametrize("header", ["", "[]", "{}", "7", "null"])
def test_a_file_without_a_header_is_refused(tmp_path, header):
    assert "schema None" in refused(compressed(tmp_path / "e.gz", header))


@pytest.mark.parametrize("line", ["{", "[]", "{}", "3", '{"problem": {"id": "x"}}', '{"problem": 3, "rollouts": []}'])
def test_a_broken_line_is_named(tmp_path, line):
    text = f'{{"schema": "{SCHEMA}", "step": 1, "problems": 1}}\n{line}\n'
    assert "line 2: not an episode file, or damaged" in refused(compressed(tmp_path / "e.gz", text))


def test_a_finish_reason_that_does_not_exist_is_refused(tmp_path):
    text = plain(write(tmp_path / "e.gz", [group()])).replace('"eos"', '"tired"')
    assert "'tired' is not a valid FinishReason" in refused(compressed(tmp_path / "e.gz", text))


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = write(tmp_path / "e.gz", [group("x" * 5000), group("two")])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused(path)
    lines = gzip.decompress(whole).decode().splitlines(keepends=True)
    assert "2 problems were written, 1 are there" in refused(compressed(path, "".join(lines[:2])))


def test_a_file_that_is_no_gzip_or_not_there_is_refused(tmp_path):
    (tmp_path / "plain").write_text("hello")
    assert "plain" in refused(tmp_path / "plain")
    assert "nowhere" in refused(tmp_path / "nowhere")
