"""Alarms of runs whose files are damaged, missing or made to do harm: what can be read is judged, and the rest is said."""

from __future__ import annotations

import copy
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccpo.alarms import find_alarms
from ccpo.alarms.findings import NEED_TEAM
from ccpo.cli import app
from ccpo.errors import UserError
from ccpo.report.document import RunReader
from run_files import write_run

torch.set_num_threads(1)

STEPS = 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose solver is often cut off (told by episodes) and whose engine is off (told by metrics)."""
    return made(tmp_path / "run")


def made(folder: Path) -> Path:
    write_run(folder, steps=STEPS, problems=8)
    change_lines(folder / "metrics.jsonl", lambda line: line | {"actor/solver/mismatch_k3": 0.08})
    return folder


def change_lines(path: Path, change: Callable[[dict], dict]) -> None:
    lines = [json.dumps(change(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


def episodes(run: Path, step: int) -> Path:
    return run / "episodes" / f"step-{step:06d}.jsonl.gz"


def change_episodes(path: Path, place: int, change: Callable[[str], str]) -> None:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[place] = change(lines[place])
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), compresslevel=1))


def found(run: Path) -> tuple[set[str], list[str]]:
    said: list[str] = []
    return {alarm["name"] for alarm in find_alarms(run, said.append)}, said


def test_a_whole_run_leaves_nothing_out(run: Path):
    assert found(run) == ({"truncation", "engine_mismatch"}, [])


# --- episodes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda line: line[: len(line) // 2], "step-000007.jsonl.gz, line 3: not an episode file, or damaged"),
        (lambda line: "[" * 100_000, "step-000007.jsonl.gz does not follow the schema of episodes (RecursionError"),
        (lambda line: line.replace('"rollouts": [', '"rollouts": [], "x": ['), "(ZeroDivisionError"),
        (lambda line: line.replace('"reward": 1.0', '"reward": "full"').replace('"reward": 0.0', '"reward": [1]'), "(TypeError"),
        (lambda line: line.replace('"finish": "eos"', '"finish": "never"'), "line 3: not an episode file, or damaged (ValueError"),
        (lambda line: line.replace('"text": "', '"text": 7, "was": "'), "line 3: not an episode file, or damaged (TypeError"),
        (lambda line: line.replace('"message": "', '"message": 7, "was": "'), "does not follow the schema of episodes ("),
    ],
)  # fmt: skip
def test_one_damaged_line_costs_one_step_and_is_said(run: Path, damage: Callable[[str], str], why: str):
    change_episodes(episodes(run, 7), 2, damage)
    names, (said,) = found(run)
    assert names == {"truncation", "engine_mismatch"}
    assert said.startswith("The alarms leave out the episodes of step 7: ") and why in said


def test_without_any_readable_episodes_the_metrics_still_tell(run: Path):
    for step in range(1, STEPS + 1):
        episodes(run, step).write_bytes(b"this is no gzip file")
    names, said = found(run)
    assert names == {"engine_mismatch"}
    assert len(said) == STEPS


def test_what_is_left_out_of_an_alarm_is_left_out(run: Path):
    """Sixty problems must be told of; with only seven steps of eight problems there are fewer."""
    for step in range(8, STEPS + 1):
        episodes(run, step).write_bytes(episodes(run, step).read_bytes()[:-30])
    assert found(run)[0] == {"engine_mismatch"}


def test_what_is_left_out_is_logged_where_nobody_asks(run: Path, caplog: pytest.LogCaptureFixture):
    episodes(run, 7).write_bytes(b"%s %d")
    with caplog.at_level(logging.WARNING, "ccpo"):
        find_alarms(run)
    assert [r.getMessage().startswith("The alarms leave out the episodes of step 7") for r in caplog.records] == [True]


# --- a recipe that is missing -------------------------------------------------------------------------------------------


def test_without_a_recipe_the_alarms_that_need_none_are_there(run: Path):
    (run / "recipe.json").unlink()
    names, (said,) = found(run)
    assert names == {"truncation", "engine_mismatch"}
    assert said == f"recipe.json is not there: these alarms are not judged: {', '.join(sorted(NEED_TEAM))}."


def leaking(line: str) -> str:
    """The same problem line with the answer at the head of each message."""
    answer = json.loads(line)["problem"]["answer"]
    return line.replace('"message": "', f'"message": "#### {answer}\\n')


def test_what_needs_the_recipe_is_not_guessed_without_it(run: Path):
    """Whose prompts ask for an answer is not known, so that nobody is said to have leaked one."""
    for step in range(1, STEPS + 1):
        for place in range(1, 9):
            change_episodes(episodes(run, step), place, leaking)
    assert "leaked_answer" in found(run)[0]
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({k: v for k, v in recipe.items() if k != "team"}))
    names, (said,) = found(run)
    assert "leaked_answer" not in names
    assert said.startswith("recipe.json does not describe the team: these alarms are not judged: captured_vote,")


# --- said where it is seen ----------------------------------------------------------------------------------------------


def test_the_page_shows_the_alarms_and_what_they_leave_out(run: Path):
    change_episodes(episodes(run, 7), 2, lambda line: line[:-9])
    (run / "recipe.json").unlink()
    document = RunReader(run).read()[0]
    assert {alarm["title"] for alarm in document["warnings"]} == {
        "solver is cut off",
        "solver's engine and learner disagree",
    }
    notes = " ".join(document["notes"])
    assert "The alarms leave out the episodes of step 7: " in notes
    assert "recipe.json is not there: these alarms are not judged: " in notes


def test_the_terminal_says_what_the_alarms_leave_out(run: Path, tmp_path: Path):
    change_episodes(episodes(run, 7), 2, lambda line: line[:-9])
    done = typer.testing.CliRunner().invoke(app, ["diagnose", "alarms", str(run), "--json", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    assert "Left out: The alarms leave out the episodes of step 7: " in done.output
    assert "(engine_mismatch)" in done.output and "(truncation)" in done.output
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2


def test_none_is_said_of_what_is_left_only(run: Path):
    change_lines(run / "metrics.jsonl", lambda line: line | {"actor/solver/mismatch_k3": 0.0})
    for step in range(1, STEPS + 1):
        episodes(run, step).write_bytes(b"")
    done = typer.testing.CliRunner().invoke(app, ["diagnose", "alarms", str(run)])
    assert done.output.splitlines()[-1] == "alarms: none in what is left"


# --- files of another shape ---------------------------------------------------------------------------------------------

TEAM = {"agents": ["a"], "decider": "a", "decision": "last_turn", "reads": ["b"], "turns": [], "free": []}
CONFIG = {"credit": {"kind": "shared"}}
RECIPES = {
    "[]": "recipe.json: a list where a JSON object should be",
    "null": "recipe.json: null where",
    "3": "recipe.json: a number where",
    "{}": "recipe.json: config: this key is required",
    '{"config": 3}': "recipe.json: config: found 3",
    '{"config": {"credit": "shared"}}': "config.credit: found 'shared'",
    json.dumps({"config": CONFIG, "objects": ["x"]}): "recipe.json: objects: found ['x']",
    json.dumps({"config": CONFIG, "objects": {"credit": 3}}): "recipe.json: objects.credit: found 3",
    json.dumps({"config": CONFIG, "team": "x"}): "recipe.json: team: found 'x'",
    json.dumps({"config": CONFIG, "team": TEAM}): "recipe.json: team: the decision reads 'b', which is none of the turns",
    json.dumps({"config": CONFIG, "team": TEAM | {"turns": [7]}}): "team.turns.0: found 7",
    json.dumps({"config": CONFIG, "team": TEAM | {"agents": [5]}}): "team.agents.0: found 5",
    json.dumps({"config": CONFIG, "team": {k: v for k, v in TEAM.items() if k != "free"}}): "team.free: this key is required",
    "{": "recipe.json: not readable as JSON",
    "": "recipe.json: not readable as JSON",
    "[" * 100_000: "recipe.json: not readable as JSON (nested too deeply)",
    '{"config": ' + "9" * 5000 + "}": "recipe.json: not readable as JSON",
}  # fmt: skip


def refused(run: Path, says: str) -> None:
    """In the terminal with a sentence; on the page the same, with all else there."""
    with pytest.raises(UserError) as error:
        find_alarms(run)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    document = RunReader(run).read()[0]
    assert any(note.startswith("The alarms could not be computed: ") and says in note for note in document["notes"])
    assert document["rollouts"]["seen"] == 8 * 4 * STEPS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests change and put right again."""
    return made(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda text: text[:30] or "empty")
def test_a_recipe_of_another_shape(whole: Path, recipe: str):
    before = (whole / "recipe.json").read_text()
    try:
        (whole / "recipe.json").write_text(recipe)
        refused(whole, RECIPES[recipe])
    finally:
        (whole / "recipe.json").write_text(before)


LINES = {
    "metrics.jsonl": {
        b"[]": "metrics.jsonl, line 2: a list where a JSON object should be",
        b'"step"': "line 2: a text where",
        b"true": "line 2: true or false where",
        b"{}": "line 2: step: this key is required",
        b'{"reward/team": 1.0}': "line 2: step: this key is required",
        b'{"step": "1"}': "line 2: step: found '1'",
        b'{"step": 1.5}': "line 2: step: found 1.5",
        b'{"step": true}': "line 2: step: found True",
        b'{"step": -1}': "line 2: step: found -1",
        b'{"step": 1' + b"0" * 300 + b"}": "line 2: step: found 1",
        b'{"step": 1, "credit/solver/no_signal": "all"}': "line 2: credit/solver/no_signal: found 'all'",
        b'{"step": 1, "a\\nb": {}}': "line 2: 'a\\nb': found {}",
        b'{"step": 1': "line 2: not readable as JSON",
        b'{"step": 1, "\xff": 1}': "line 2: it is no UTF-8 (invalid start byte at byte 13)",
        b"[" * 100_000: "line 2: not readable as JSON (nested too deeply)",
    },
    "evaluations.jsonl": {
        b"3": "evaluations.jsonl, line 2: a number where",
        b'{"step": 1}': "line 2: reports: this key is required",
        b'{"step": 1, "reports": []}': "line 2: reports: found []",
        b'{"step": 1, "reports": {"x": 3}}': "line 2: reports.x: found 3",
        b'{"step": 1, "reports": {"x": {"problems": 3}}}': "line 2: reports.x.team: this key is required",
        b'{"step": 1, "reports": {"x": {"problems": 3, "team": {"mean": 1, "low": 1, "high": "1"}}}}': "line 2: reports.x.team.high",
        b'{"step": 1, "reports": {"x": {"problems": 3, "team": {"mean": 1, "low": 1, "high": 1}, "alone": {"a": 1}}}}': "alone.a: found 1",
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in LINES for line in LINES[name]], ids=repr)
def test_lines_of_another_shape(whole: Path, name: str, line: bytes):
    path = whole / name
    before = path.read_bytes()
    first, _, rest = before.partition(b"\n")
    try:
        path.write_bytes(b"\n".join((first, line, rest)))
        refused(whole, LINES[name][line])
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("tail", [b'{"step": 21', b'{"step": 21, "\xc3', b"{"])
def test_a_last_line_that_is_being_written_is_no_mistake(whole: Path, tail: bytes):
    path = whole / "metrics.jsonl"
    before = path.read_bytes()
    try:
        path.write_bytes(before + tail)
        assert found(whole) == ({"truncation", "engine_mismatch"}, [])
    finally:
        path.write_bytes(before)


def test_a_log_that_is_no_file_is_refused(run: Path):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is no regular file"):
        find_alarms(run)


# --- anything -----------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 2), st.just(10**400), st.floats(), st.sampled_from([1e308, -1e308, 5e-324, 2**53, 2**63])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5))
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in pairs for place in places(inner, (*path, key)))]


def changed(value: Any, data: st.DataObject) -> Any:
    """A value with something in it replaced by anything, or left out."""
    place = data.draw(st.sampled_from(places(value)))
    if not place:
        return data.draw(JSON)
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[place[-1]]
    else:
        inner[place[-1]] = data.draw(JSON)
    return value


def judged_or_refused(run: Path, name: str) -> None:
    try:
        json.dumps(find_alarms(run, lambda sentence: None))
        refusal = name
    except UserError as error:
        refusal = str(error)
    assert name in refusal


@QUICK
@given(data=st.data())
def test_any_recipe_is_judged_or_refused_in_words(whole: Path, data: st.DataObject):
    path = whole / "recipe.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(changed(json.loads(before), data)))
        judged_or_refused(whole, "recipe.json")
    finally:
        path.write_text(before)


@QUICK
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@given(data=st.data())
def test_any_line_is_judged_or_refused_in_words(whole: Path, name: str, data: st.DataObject):
    path = whole / name
    before = path.read_text()
    lines = before.splitlines()
    place = data.draw(st.integers(0, len(lines) - 1))
    try:
        lines[place] = json.dumps(changed(json.loads(lines[place]), data))
        path.write_text("\n".join(lines) + "\n")
        judged_or_refused(whole, f"{name}, line {place + 1}: ")
    finally:
        path.write_text(before)


@QUICK
@given(data=st.data())
def test_any_metrics_of_every_step_are_judged(whole: Path, data: st.DataObject):
    """Numbers of any size, in each line."""
    path = whole / "metrics.jsonl"
    before = path.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    wild = st.dictionaries(
        st.sampled_from([key for key in lines[0] if key.startswith(("credit/", "actor/", "reward/"))]),
        st.one_of(st.none(), st.floats(), st.sampled_from([1e308, -1e308, 0, 10**300])),
    )
    try:
        path.write_text("".join(json.dumps(line | data.draw(wild)) + "\n" for line in lines))
        find_alarms(whole, lambda sentence: None)
    finally:
        path.write_text(before)


@QUICK
@given(data=st.data())
def test_any_episodes_leave_the_alarms_there(whole: Path, data: st.DataObject):
    path = episodes(whole, 7)
    before = path.read_bytes()
    try:
        change_episodes(path, 2, lambda line: json.dumps(changed(json.loads(line), data)))
        assert found(whole)[0] == {"truncation", "engine_mismatch"}
    finally:
        path.write_bytes(before)
