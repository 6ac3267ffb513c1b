"""What holds a run together: who is trained on what, the run's folder, its loggers, what the terminal shows."""

from __future__ import annotations

import json
import logging
import os
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.loggers import Sinks, make_sinks
from ccpo.runfolder import RunFolder, read_json, write_json
from ccpo.schedule import ProblemSampler, Schedule

# --- who is trained ---------------------------------------------------------------------------------------------------


def test_simultaneous_trains_everybody_in_every_step():
    schedule = Schedule(agents=("a", "b"))
    assert {schedule.active(step) for step in range(50)} == {("a", "b")}


def test_alternating_gives_each_its_period_beginning_with_the_first():
    schedule = Schedule(agents=("a", "b", "c"), alternating=True, period=2, first="b")
    assert [schedule.active(step) for step in range(8)] == [
        ("b",),
        ("b",),
        ("c",),
        ("c",),
        ("a",),
        ("a",),
        ("b",),
        ("b",),
    ]


def test_the_papers_schedule_is_ten_steps_each_thinker_first():
    schedule = Schedule(agents=("thinker", "solver"), alternating=True)
    assert [schedule.active(step)[0] for step in (0, 9, 10, 19, 20)] == [
        "thinker",
        "thinker",
        "solver",
        "solver",
        "thinker",
    ]


def test_a_schedule_without_agents_or_with_an_unknown_first_is_refused():
    with pytest.raises(UserError, match="nothing would be trained"):
        Schedule(agents=())
    with pytest.raises(UserError, match=r"not an agent that is trained \(thinker, solver\)\. Did you mean 'thinker'"):
        Schedule(agents=("thinker", "solver"), alternating=True, first="thinkr")


# --- on what ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 40), batch=st.integers(1, 10), seed=st.integers(0, 9))
def test_no_problem_comes_twice_in_an_epoch(total, batch, seed):
    if total < batch:
        with pytest.raises(UserError, match=f"{batch} problems but the task has only {total}"):
            ProblemSampler(total=total, batch=batch, seed=seed)
        return
    sampler = ProblemSampler(total=total, batch=batch, seed=seed)
    steps = total // batch
    for epoch in range(3):
        seen = [i for step in range(epoch * steps, (epoch + 1) * steps) for i in sampler.indices(step)]
        assert len(seen) == steps * batch
        assert max(Counter(seen).values()) == 1
        assert set(seen) <= set(range(total))


def test_a_step_has_the_same_problems_whenever_it_is_asked_for():
    sampler = ProblemSampler(total=30, batch=4, seed=3)
    forwards = [sampler.indices(step) for step in range(40)]
    assert [ProblemSampler(total=30, batch=4, seed=3).indices(step) for step in range(39, -1, -1)] == forwards[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    def epoch(seed: int, number: int) -> list[int]:
        sampler = ProblemSampler(total=100, batch=100, seed=seed)
        return sampler.indices(number)

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    assert sorted(epoch(0, 0)) == list(range(100))


def test_without_shuffling_the_order_is_the_files():
    sampler = ProblemSampler(total=7, batch=3, seed=0, shuffle=False)
    assert [sampler.indices(step) for step in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.create(overwrite=False)
    return folder


def test_a_folder_is_made_with_its_parents(folder):
    assert folder.path.is_dir()
    folder.create(overwrite=False)  # empty: nothing to lose


def test_a_run_is_never_overwritten_unasked(folder):
    write_json(folder.recipe, {"config": {}})
    with pytest.raises(UserError) as caught:
        folder.create(overwrite=False)
    for way_out in (f"--resume {folder.path}", "--set run.dir=PATH", "--set run.overwrite=true"):
        assert way_out in str(caught.value)
    assert folder.recipe.exists()


def test_a_run_is_replaced_when_asked_for(folder):
    write_json(folder.recipe, {})
    folder.episodes.mkdir()
    (folder.episodes / "step-000001.jsonl.gz").write_bytes(b"old")
    folder.create(overwrite=True)
    assert list(folder.path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_not_deleted(folder):
    precious = folder.path / "thesis.tex"
    precious.write_text("years of work")
    with pytest.raises(UserError, match=r"no recipe\.json\), so it is not deleted"):
        folder.create(overwrite=True)
    assert precious.read_text() == "years of work"


def test_a_file_or_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file").create(overwrite=True)
    with pytest.raises(UserError, match="cannot make the run folder"):
        RunFolder(tmp_path / "file" / "run").create(overwrite=False)


def test_a_link_to_a_run_is_not_followed_when_deleting(folder, tmp_path):
    write_json(folder.recipe, {})
    link = tmp_path / "link"
    link.symlink_to(folder.path)
    with pytest.raises(UserError, match="is a link"):
        RunFolder(link).create(overwrite=True)
    assert folder.recipe.exists()


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": "é"})
    assert read_json(path) == {"a": "é"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": "é"}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": "é"}


def test_json_that_is_not_there_or_damaged_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is .* the folder of a run"):
        read_json(tmp_path / "recipe.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(UserError, match="not readable as JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_json(tmp_path / "bytes.json")


# --- the logs ---------------------------------------------------------------------------------------------------------


def test_lines_come_back_in_order(folder):
    for step in range(3):
        folder.append(folder.metrics, {"step": step, "text": "a\u2028b\nc"})
    assert folder.read_lines(folder.metrics) == [{"step": step, "text": "a\u2028b\nc"} for step in range(3)]
    assert folder.read_lines(folder.evaluations) == []


def tear(path: Path, text: str = '{"step": 3, "rew') -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_last_line_cut_off_by_a_kill_is_left_out(folder):
    folder.append(folder.metrics, {"step": 1})
    tear(folder.metrics)
    assert folder.read_lines(folder.metrics) == [{"step": 1}]


def test_a_line_after_a_torn_one_is_not_lost(folder):
    folder.append(folder.evaluations, {"step": 1})
    tear(folder.evaluations)
    folder.append(folder.evaluations, {"step": 2})
    assert folder.read_lines(folder.evaluations) == [{"step": 1}, {"step": 2}]


def test_a_line_that_lacks_only_its_end_is_kept(folder):
    tear(folder.metrics, '{"step": 1}')
    folder.append(folder.metrics, {"step": 2})
    assert folder.read_lines(folder.metrics) == [{"step": 1}, {"step": 2}]


def test_rewinding_forgets_what_came_after(folder):
    folder.episodes.mkdir()
    for step in range(1, 6):
        folder.append(folder.metrics, {"step": step})
        folder.append(folder.evaluations, {"step": step})
        folder.episode_file(step).write_bytes(b"x")
    tear(folder.metrics)
    write_json(folder.summary, {})
    folder.rewind(3)
    assert [r["step"] for r in folder.read_lines(folder.metrics)] == [1, 2, 3]
    assert [r["step"] for r in folder.read_lines(folder.evaluations)] == [1, 2, 3]
    assert folder.metrics.read_text().endswith("\n")
    assert sorted(p.name for p in folder.episodes.iterdir()) == [f"step-{s:06d}.jsonl.gz" for s in (1, 2, 3)]
    assert not folder.summary.exists()


def test_rewinding_a_run_that_wrote_nothing_is_no_mistake(folder):
    folder.rewind(0)
    assert list(folder.path.iterdir()) == []


def test_episode_files_sort_by_step(folder):
    names = [folder.episode_file(step).name for step in (2, 10, 100)]
    assert names == sorted(names)


# --- loggers ----------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.seen: list = []

    def write(self, step, metrics):
        self.seen.append((step, dict(metrics)))

    def close(self):
        self.seen.append("closed")


class Failing(Recorder):
    def write(self, step, metrics):
        super().write(step, metrics)
        raise ConnectionError("no network")

    def close(self):
        raise ConnectionError("no network")


def test_a_sink_that_cannot_start_is_left_out_with_a_warning(caplog):
    good = Recorder()

    def broken():
        raise RuntimeError("not logged in")

    with caplog.at_level(logging.WARNING, "ccpo"):
        sinks = Sinks({"broken": broken, "good": lambda: good})
    assert "broken could not be started and is left out: not logged in" in caplog.text
    sinks.write(1, {"a": 1.0})
    sinks.close()
    assert good.seen == [(1, {"a": 1.0}), "closed"]


def test_a_sink_that_fails_is_dropped_and_the_others_go_on(caplog):
    good, bad = Recorder(), Failing()
    sinks = Sinks({"bad": lambda: bad, "good": lambda: good})
    with caplog.at_level(logging.WARNING, "ccpo"):
        for step in (1, 2):
            sinks.write(step, {"a": 1.0})
        sinks.close()
    assert len(bad.seen) == 1
    assert [s for s in good.seen if s != "closed"] == [(1, {"a": 1.0}), (2, {"a": 1.0})]
    assert caplog.text.count("no network") == 1
    assert "bad failed at step 1" in caplog.text


def test_a_sink_that_cannot_be_closed_stops_nothing(caplog):
    bad = Failing()
    sinks = Sinks({"bad": lambda: bad})
    with caplog.at_level(logging.WARNING, "ccpo"):
        sinks.close()
    assert "could not be closed" in caplog.text


OFF = {"tensorboard": False, "wandb": False, "trackio": False, "project": "p", "name": "n", "config": {"a": 1}}


def test_a_logger_that_is_asked_for_and_absent_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ccpo\[wandb\]' or set log\.wandb=false"):
        make_sinks(tmp_path, **OFF | {"wandb": True})
    assert make_sinks(tmp_path, **OFF | {"tensorboard": True}).sinks == {}  # used only where it is there


def test_runs_are_logged_by_name_and_step(tmp_path, monkeypatch):
    said = []
    module = types.ModuleType("trackio")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **keys: said.append(keys)
    module.log = lambda metrics, step: said.append((step, metrics))
    module.finish = lambda: said.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", module)
    sinks = make_sinks(tmp_path, **OFF | {"trackio": True})
    sinks.write(3, {"reward/team": 0.5})
    sinks.close()
    assert said == [{"project": "p", "name": "n", "config": {"a": 1}}, (3, {"reward/team": 0.5}), "finished"]


def test_tensorboard_gets_its_files(tmp_path):
    pytest.importorskip("tensorboard")
    sinks = make_sinks(tmp_path, **OFF | {"tensorboard": True})
    sinks.write(1, {"reward/team": 0.5})
    sinks.close()
    assert list((tmp_path / "tensorboard").iterdir())


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_what_models_say_cannot_move_the_cursor():
    display = pytest.importorskip("ccpo.display")
    assert display.printable("a\tb\nc") == "a\tb\nc"
    assert (
        display.printable("\x1b[2J\x07\r\x00\x9b") == "\N{REPLACEMENT CHARACTER}[2J" + "\N{REPLACEMENT CHARACTER}" * 4
    )
    assert display.printable("\u202eevil\ud800") == "\N{REPLACEMENT CHARACTER}evil\N{REPLACEMENT CHARACTER}"
    assert display.printable("[red]not markup[/red] é🙂") == "[red]not markup[/red] é🙂"


def test_a_conversation_is_shown_as_it_was_said(capsys):
    display = pytest.importorskip("ccpo.display")
    from ccpo.rollout import Ask, Limits, play_team
    from ccpo.teams import think_solve
    from scripted import ScriptedEngine, exact_task, problem, voices

    team = think_solve(prompts={"thinker": "thinker: {problem}", "solver": "solver: {problem}[[ {thinker}]]"})
    engine = ScriptedEngine(lambda prompt, seed: "[bold]yes[/nothing]")
    p = problem("p")
    played = play_team(
        team, exact_task(p), voices(team.agent_names, engine), Limits(), [p], Ask(samples=1), seed=0, step=0
    )
    display.conversation(played.groups[0].rollouts[0])
    shown = capsys.readouterr().out
    assert shown.count("[bold]yes[/nothing]") == 3  # thinker, solver and the answer


def test_a_summary_that_is_written_can_be_read_by_any_tool(tmp_path):
    write_json(tmp_path / "summary.json", {"team_after": 0.95})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"team_after": 0.95}
