"""Cells in processes of their own: resume after a kill, parallel claims, failures, limits; and files that are not mixed in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from ccpo.compare import store as storing
from ccpo.compare.cells import main_cells, make_cell
from ccpo.compare.command import filtered
from ccpo.compare.progress import plan_table, progress_line, progress_table
from ccpo.compare.runner import Runner, Settings
from ccpo.compare.store import Results, Store, read_results, sealed, unsealed, write_results
from ccpo.compare.study import Study, load_study
from ccpo.compare.tuning import choose
from ccpo.errors import UserError
from study_cells import fill, made_up

HERE = Path(__file__).parent
WORKER = (str(HERE / "study_worker.py"),)
STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": {"task": "digit_sum", "rollout": {"prompts": 4, "samples": 4, "max_tokens": 8}, "optim": {"lr": 1e-3}},
    "tasks": {"sums": {"tokens": 5000}},
    "methods": {"shared": {"set": {"credit": "shared"}}, "removal": {"set": {"credit": "removal"}}},
    "seeds": 2,
}
FAILS, DIES, WAITS = 0.5, 0.25, 0.125


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch):
    """Workers find the package and the tests' helpers."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*(p for p in sys.path if p), str(HERE)]))


def study(rates: dict[str, float] | None = None, **changes: Any) -> Study:
    data = deepcopy(STUDY) | changes
    for method, rate in (rates or {}).items():
        data["methods"][method]["set"]["optim"] = {"lr": rate}
    return load_study(data)


def runner(of: Study, folder: Path, **settings: Any) -> Runner:
    store = Store(folder)
    store.create()
    return Runner(of, store, Settings(worker=WORKER, **{"jobs": 2, **settings}))


def ran(folder: Path) -> list[str]:
    """Cells that a worker began, in order."""
    path = folder / "ran.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def cell_of(of: Study, method: str = "shared", seed: int = 0) -> Any:
    return make_cell(of, method, "sums", seed, {})


# --- running and going on ----------------------------------------------------------------------------------------------------


def test_a_study_runs_whole_and_then_has_nothing_left(tmp_path):
    first = runner(study(), tmp_path)
    assert first.run()
    assert len(ran(tmp_path)) == 4
    assert not list((tmp_path / "work").iterdir())  # run folders are temporary
    again = runner(study(), tmp_path)
    assert again.run()
    assert len(ran(tmp_path)) == 4
    assert again.open_cells() == []


@pytest.mark.slow
def test_a_study_that_is_extended_runs_only_what_is_new(tmp_path):
    runner(study(), tmp_path).run()
    more = study(seeds=3)
    assert runner(more, tmp_path).run()
    new = ran(tmp_path)[4:]
    assert sorted(new) == sorted(cell_of(more, m, 2).id for m in ("shared", "removal"))


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path):
    """The command is killed outright while a cell is in hand. Its worker, which needs nobody, finishes; nothing is run twice."""
    of = study({"removal": WAITS}, seeds=1)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_compare_runner as t\n"
        "t.runner(t.study({'removal': t.WAITS}, seeds=1), Path(sys.argv[1]), jobs=1).run()"
    )
    command = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(HERE)])
    waiting = cell_of(of, "removal")
    store = Store(tmp_path)
    wait_for(lambda: waiting.id in ran(tmp_path))
    command.kill()
    command.wait()
    assert store.claimed(waiting)  # the worker still has it
    other = runner(of, tmp_path, minutes=0)
    assert not other.run()
    (tmp_path / "go").touch()
    wait_for(lambda: store.read(waiting) is not None)
    assert runner(of, tmp_path).run()
    assert len(ran(tmp_path)) == 2


@pytest.mark.slow
def test_a_killed_worker_leaves_no_claim_and_its_cell_is_run_again(tmp_path):
    of = study({"shared": WAITS, "removal": WAITS}, seeds=1)
    one = runner(of, tmp_path, jobs=1)
    thread = threading.Thread(target=one.run)
    thread.start()
    first = cell_of(of, "shared")
    wait_for(lambda: first.id in ran(tmp_path))
    assert one.store.claimed(first)
    os.kill(int((tmp_path / "ran.txt").read_text().split()[1]), signal.SIGKILL)
    wait_for(lambda: one.store.failure(first) is not None)
    assert not one.store.claimed(first)
    (tmp_path / "go").touch()
    thread.join()
    assert "signal 9" in one.store.failure(first).error
    assert runner(of, tmp_path, retry_failed=True).run()
    assert ran(tmp_path).count(first.id) == 2
    assert Store(tmp_path).failure(first) is None


@pytest.mark.slow
def test_two_commands_on_one_folder_share_the_cells(tmp_path):
    of = study()
    both = [runner(of, tmp_path, jobs=1) for _ in range(2)]
    threads = [threading.Thread(target=r.run) for r in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begun = ran(tmp_path)
    assert len(begun) == len(set(begun)) == 4  # none was run by both
    assert all(r.open_cells() == [] for r in both)


@pytest.mark.slow
def test_a_cell_that_another_process_holds_is_waited_for(tmp_path):
    of = study(seeds=1)
    one = runner(of, tmp_path)
    cell = cell_of(of)
    handle = one.store.claim(cell)
    thread = threading.Thread(target=one.run)
    thread.start()
    wait_for(lambda: cell_of(of, "removal").id in ran(tmp_path))
    time.sleep(0.5)
    assert thread.is_alive()
    one.store.write(cell, made_up("sums", "shared", 0, 5000))
    os.close(handle)
    thread.join(20)
    assert not thread.is_alive()
    assert cell.id not in ran(tmp_path)


@pytest.mark.slow
def test_the_first_interrupt_finishes_the_cell_in_hand(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_compare_runner as t\n"
        "print(t.runner(t.study({'shared': t.WAITS}), Path(sys.argv[1]), jobs=1).run())"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(HERE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: ran(tmp_path))
    command.send_signal(signal.SIGINT)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    out, err = command.communicate(timeout=30)
    assert out.strip() == "False"
    assert "1 cell(s) in hand" in err
    assert len(ran(tmp_path)) == 1
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1


@pytest.mark.slow
def test_a_second_interrupt_ends_the_cell_and_records_no_failure(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_compare_runner as t\n"
        "t.runner(t.study({'shared': t.WAITS}), Path(sys.argv[1]), jobs=1).run()"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(HERE)], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: ran(tmp_path))
    for _ in range(2):
        command.send_signal(signal.SIGINT)
        time.sleep(0.3)
    command.communicate(timeout=30)
    assert list((tmp_path / "cells").iterdir()) == []
    assert not Store(tmp_path).claimed(cell_of(study({"shared": WAITS})))


def test_no_cell_is_started_after_the_time_is_up(tmp_path):
    one = runner(study(), tmp_path, minutes=0)
    assert not one.run()
    assert ran(tmp_path) == []


@pytest.mark.slow
def test_tuning_that_another_command_finishes_is_noticed(tmp_path):
    """This command finds every tuning cell done by another, with none of its own left, and goes on to the results."""
    of = study(
        tune={"grid": {"optim.lr": [1e-3, 1e-4]}, "seeds": [50]},
        seeds=1,
        methods={"shared": STUDY["methods"]["shared"]},
    )
    one = runner(of, tmp_path, jobs=1)
    tune = one.state.cells["tune"]
    handles = [one.store.claim(cell) for cell in tune]
    thread = threading.Thread(target=one.run)
    thread.start()
    time.sleep(0.3)
    for cell, handle in zip(tune, handles, strict=True):
        one.store.write(cell, made_up("sums", "shared", 50, 5000, point=cell.point))
        os.close(handle)
    thread.join(30)
    assert [".s0." in name for name in ran(tmp_path)] == [True]


# --- failures ----------------------------------------------------------------------------------------------------------------


def test_a_failed_cell_is_recorded_with_its_error_and_the_rest_goes_on(tmp_path):
    of = study({"shared": FAILS}, seeds=1)
    one = runner(of, tmp_path)
    assert one.run()
    assert "this cell cannot be run" in one.store.failure(cell_of(of)).error
    assert one.result(cell_of(of, "removal")) is not None
    assert runner(of, tmp_path).run()
    assert len(ran(tmp_path)) == 2  # failures stand
    assert runner(of, tmp_path, retry_failed=True).run()
    assert len(ran(tmp_path)) == 3
    assert "1 failed" in progress_line(one, 1)


@pytest.mark.slow
def test_a_worker_that_dies_without_a_word_is_a_failure_too(tmp_path):
    of = study({"shared": DIES}, seeds=1)
    one = runner(of, tmp_path)
    one.run()
    error = one.store.failure(cell_of(of)).error
    assert "signal 9" in error
    assert "last words" in error


@pytest.mark.slow
def test_a_cell_that_takes_too_long_has_failed(tmp_path):
    of = study({"shared": WAITS}, seeds=1)
    one = runner(of, tmp_path, cell_minutes=0.01)
    one.run()
    assert "longer than its limit" in one.store.failure(cell_of(of)).error


# --- filters and phases ------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_runs(tmp_path):
    of = study()
    one = runner(of, tmp_path, only=filtered(of, ["method=removal,seed=1"]))
    assert one.run()
    assert ran(tmp_path) == [cell_of(of, "removal", 1).id]


@pytest.mark.parametrize(
    ("word", "said"),
    [("method=removl", "Did you mean 'removal'"), ("colour=red", "expected method=NAME"), ("method", "expected")],
)
def test_filters_that_name_nothing_are_refused(word, said):
    with pytest.raises(UserError, match=said):
        filtered(study(), [word])


def tuned_study() -> Study:
    return study(tune={"grid": {"optim.lr": [1e-3, 1e-4]}, "seeds": [50, 51]}, seeds=1)


def test_the_headline_pair_comes_first_and_sweeps_last(tmp_path):
    methods = STUDY["methods"] | {"own": {"set": {"credit": "own"}}, "v2": {"set": {"credit": "ccpo_v2"}}}
    sweep = {"rate": {"method": "own", "task": "sums", "key": "optim.eps", "values": [1e-6], "seeds": 1}}
    tune = {"grid": {"optim.lr": [1e-3, 1e-4]}, "seeds": [50]}
    of = study(methods=methods, headline=["own", "v2"], tune=tune, sweeps=sweep, seeds=1)
    store = Store(tmp_path)
    fill(store, of, {})
    for path in store.cells.glob("*.s0.*"):
        path.unlink()
    for path in store.cells.glob("*.removal.s50.*"):
        path.unlink()
    one = runner(of, tmp_path)
    order = [(cell.method, cell.seed, "optim.eps" in cell.point) for cell in one.open_cells()]
    pair = [("own", 0, False), ("v2", 0, False)]
    rest = [("removal", 50, False), ("removal", 50, False), ("shared", 0, False)]
    assert order[:2] == pair
    assert order[2:5] == rest
    assert order[5:] == [("own", 0, True)]


@pytest.mark.slow
def test_tuning_comes_first_and_decides_what_runs_next(tmp_path):
    of = study(
        tune={"grid": {"optim.lr": [1e-3, 1e-4]}, "seeds": [50]},
        seeds=1,
        methods={"shared": STUDY["methods"]["shared"]},
    )
    one = runner(of, tmp_path)
    assert one.state.waiting == [("shared", "sums")]
    assert one.state.cells["main"] == []
    assert one.run()
    assert [".s0." in name for name in ran(tmp_path)] == [False, False, True]


def test_the_best_area_is_taken_and_a_point_that_failed_is_out(tmp_path):
    of = tuned_study()
    store = Store(tmp_path)
    fill(store, of, {"shared": 1.0, "removal": 1.0})  # the first point is the better one
    failed: set[str] = set()

    def look(cell: Any) -> Any:
        return None if cell.id in failed else store.read(cell)

    chosen, scores = choose(of, look, lambda cell: cell.id in failed)
    assert chosen["shared", "sums"] == {"optim.lr": 1e-3}
    assert scores["shared", "sums"][0].score > scores["shared", "sums"][1].score
    failed.add(make_cell(of, "shared", "sums", 51, {"optim.lr": 1e-3}).id)
    chosen, scores = choose(of, look, lambda cell: cell.id in failed)
    assert chosen["shared", "sums"] == {"optim.lr": 1e-4}
    assert scores["shared", "sums"][0].score is None
    chosen, _ = choose(of, look, lambda cell: False)
    assert chosen["shared", "sums"] is None  # a cell is missing: not decided


def test_the_plan_tells_what_is_left_and_what_it_costs(tmp_path):
    from rich.console import Console

    of = tuned_study()
    one = runner(of, tmp_path)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(plan_table(one))
    console.print(progress_table(one, 1))
    text = console.export_text()
    assert "after tuning" in text
    assert "40,000" in text  # 8 cells of 5,000 tokens
    assert "0/4+" in text


# --- files that are not mixed in ---------------------------------------------------------------------------------------------


def test_results_of_another_recipe_are_left_alone(tmp_path):
    of = study()
    fill(Store(tmp_path), of, {})
    other = study({"shared": 1e-5})
    one = runner(other, tmp_path)
    assert one.result(cell_of(other)) is None
    assert one.result(cell_of(other, "removal")) is not None
    strangers = one.store.strangers(main_cells(other, {pair: {} for pair in other.applies()}))
    assert strangers == sorted(f"{cell_of(of, 'shared', s).id}.json" for s in range(2))


@pytest.mark.parametrize("damage", ["cut", "changed", "format", "empty", "recipe"])
def test_a_damaged_result_counts_as_none_and_is_named(tmp_path, damage):
    of = study()
    store = Store(tmp_path)
    fill(store, of, {})
    path = store.result_file(cell_of(of))
    record = json.loads(path.read_text())
    if damage == "changed":
        record["result"]["final"]["heldout"]["team"][0] = 0.999
    if damage == "format":
        record["format"] = "ccpo.study/0"
    if damage == "recipe":
        record["fingerprint"] = "0" * 64
    text = json.dumps(record)
    path.write_text({"cut": text[: len(text) // 2], "empty": "[]"}.get(damage, text))
    assert store.read(cell_of(of)) is None
    assert cell_of(of).id in store.damaged[0]
    assert store.read(cell_of(of, "removal")) is not None


def test_a_seal_holds_what_was_sealed():
    record = sealed({"a": [1, 0.25]}, "f")
    assert unsealed(json.loads(json.dumps(record)), "f") == {"a": [1, 0.25]}


def results_file(path: Path, of: Study, **header: Any) -> Path:
    records = {cell_of(of, m).fingerprint: made_up("sums", m, 0, 5000) for m in ("shared", "removal")}
    write_results(path, "tiny", "0.1.0", Results(records=records, defaults={"optim.lr": 1e-6}), {})
    lines = path.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | header)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_results_file_comes_back_as_it_was(tmp_path):
    of = study()
    found = read_results(results_file(tmp_path / "r.jsonl", of), "tiny")
    assert found.records[cell_of(of).fingerprint] == made_up("sums", "shared", 0, 5000)
    assert found.defaults == {"optim.lr": 1e-6}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"format": "ccpo.study/0"}, "this version reads 'ccpo.study/1'"),
        ({"study": "another"}, "results of the study 'another', not of 'tiny'"),
        ({"epoch": 0}, "training code gave other results"),
        ({"cells": 3}, "3 cells were written, 2 are there"),
    ],
)
def test_a_results_file_of_another_kind_is_refused(tmp_path, header, words):
    with pytest.raises(UserError, match=words):
        read_results(results_file(tmp_path / "r.jsonl", study(), **header), "tiny")


def test_a_damaged_results_file_is_refused_with_the_line(tmp_path):
    path = results_file(tmp_path / "r.jsonl", study())
    text = path.read_text()
    path.write_text(text[:-40])
    with pytest.raises(UserError, match="line 3: damaged"):
        read_results(path, "tiny")
    path.write_text("not one")
    with pytest.raises(UserError, match="is not a results file"):
        read_results(path, "tiny")
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path / "none.jsonl", "tiny")


def test_an_older_epoch_is_not_read_as_this_one(tmp_path, monkeypatch):
    path = results_file(tmp_path / "r.jsonl", study())
    monkeypatch.setattr(storing, "EPOCH", storing.EPOCH + 1)
    with pytest.raises(UserError, match="epoch"):
        read_results(path, "tiny")
