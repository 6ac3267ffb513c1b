"""The page, the figures and the results file, from made-up cells: every number is where it belongs, and what is missing has its reason."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ccpo.cli import app
from ccpo.compare.cells import make_cell
from ccpo.compare.extract import cpu_model, training_record
from ccpo.compare.figures import draw_all
from ccpo.compare.markdown import cell_text, estimate, marked, number, ratio, table
from ccpo.compare.page import page
from ccpo.compare.record import Recorder
from ccpo.compare.report import collect, write_report
from ccpo.compare.runner import Runner, Settings
from ccpo.compare.stats import Estimate
from ccpo.compare.store import Store, read_results
from ccpo.compare.study import Study, load_study
from ccpo.compare.summary import Marked, Summary, summarise, vote_at
from ccpo.credit import RULES
from ccpo.errors import UserError
from ccpo.runfolder import RunFolder
from ccpo.types import CreditInputs
from study_cells import AGENTS, fill, made_up

torch.set_num_threads(1)
TASK = {"recipe": {"task": "digit_sum"}, "tokens": 40_000, "label": "digit sums"}
STUDY: dict[str, Any] = {
    "name": "pages",
    "title": "Which | rule?",
    "notes": "Read **this** first.",
    "base": {"rollout": {"prompts": 4, "samples": 4}},
    "tasks": {
        "sums": TASK,
        "long": TASK | {"label": "long sums", "recipe": {"task": {"kind": "digit_sum", "digits": [5, 6]}}},
    },
    "methods": {
        "untrained": {"train": False, "set": {"credit": "shared"}},
        "single": {"single": True, "set": {"credit": "shared", "loss": {"kind": "gspo"}}},
        "shared": {"label": "shared reward", "set": {"credit": "shared"}},
        "removal": {"label": "removal credit", "set": {"credit": "removal"}},
        "own": {"set": {"credit": "own"}, "why_empty": {"sums": "the thinker has no answer"}},
    },
    "seeds": 5,
    "headline": ["removal", "shared"],
    "headline_seeds": 10,
    "tune": {"grid": {"optim.lr": [1e-3, 1e-4, 1e-5]}, "seeds": [50]},
    "sweeps": {"rate": {"method": "removal", "task": "sums", "key": "optim.eps", "values": [1e-8, 1e-6], "seeds": 2}},
}
SPEEDS = {"removal": 2.0, "shared": 1.0, "single": 0.5}


def study(**changes: Any) -> Study:
    return load_study(deepcopy(STUDY) | changes)


def summary_of(folder: Path, of: Study | None = None, **kwargs: Any) -> Summary:
    of = of or study()
    store = Store(folder)
    fill(store, of, SPEEDS, **kwargs)
    return collect(of, Runner(of, store, Settings()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summary_of(tmp_path_factory.mktemp("pages"))


# --- what is computed --------------------------------------------------------------------------------------------------------


def runs(method: str, count: int = 5, **kwargs: Any) -> list[dict[str, Any]]:
    return [made_up("sums", method, seed, 40_000, **kwargs) for seed in range(count)]


def test_the_mark_is_nine_tenths_of_the_yardsticks_final_accuracy(whole):
    finals = sorted(run["final"]["heldout"]["team"][0] for run in whole.entry("shared", "sums").runs)
    assert len(finals) == 10
    assert whole.marks["sums"] == pytest.approx(0.9 * sum(finals[2:-2]) / 6)


def test_a_method_that_learns_twice_as_fast_needs_half_the_tokens(whole):
    contest = whole.contest("removal", "shared", "sums")
    assert contest.ratio.value == pytest.approx(0.5, abs=0.06)
    assert contest.ratio.low <= contest.ratio.value <= contest.ratio.high
    assert contest.apart is True
    assert contest.bound == ""
    back = whole.contest("shared", "removal", "sums")
    assert back.ratio.value == pytest.approx(1 / contest.ratio.value)
    assert back.wins.value == pytest.approx(1 - contest.wins.value)


def test_runs_that_never_reach_the_mark_make_a_bound():
    of = study()
    found = summarise(of, {("shared", "sums"): runs("shared"), ("removal", "sums"): runs("removal", top=0.5)})
    slow = found.entry("removal", "sums")
    assert slow.to_mark.censored == 5
    assert slow.to_mark.estimate.value == 40_000
    assert slow.to_mark.beyond
    assert not slow.to_own.beyond
    assert found.contest("removal", "shared", "sums").bound == "≥"
    assert found.contest("shared", "removal", "sums").bound == "≤"
    assert found.contest("removal", "removal", "sums").bound == "?"


def test_a_task_is_fair_where_the_yardstick_has_something_to_learn_for_long():
    of = study()
    good = summarise(of, {("shared", "sums"): runs("shared")}).field_of("sums")
    assert good.fair
    assert (good.start, good.final) == (pytest.approx(0.3, abs=0.05), pytest.approx(0.9, abs=0.05))
    assert 30 <= good.steps.estimate.value <= 45  # 0.81 is reached at 1.9/4 of 80 steps
    assert not summarise(of, {("shared", "sums"): runs("shared", speed=3.0)}).field_of("sums").fair  # too soon
    assert not summarise(of, {("shared", "sums"): runs("shared", top=0.45)}).field_of("sums").fair  # too little


def test_costs_and_parts_are_means_over_runs(whole):
    entry = whole.entry("shared", "sums")
    assert entry.tokens == {"joint": 30_000, "counterfactual": 10_000, "rating": 0, "total": 40_000}
    assert (entry.updates, entry.seconds["update"], entry.play_tokens) == (80, 30.0, 22.0)
    assert entry.part("blank")["solver"] == 0
    assert entry.part("blank")["thinker"] == pytest.approx(entry.final.value / 2, abs=1e-3)


def test_over_all_tasks_only_where_no_task_is_missing(whole):
    assert whole.overall("own") is None
    assert whole.overall("shared").runs == 20
    estimate_of, tasks = whole.beats("own", "shared")
    assert tasks == 1
    assert 0 <= estimate_of.value <= 1


def test_the_single_agents_vote_gets_at_least_the_teams_tokens(whole):
    entry = whole.entry("single", "sums")  # 22 tokens a sample, at most 4 samples
    assert [(vote_at(entry, t).samples, vote_at(entry, t).enough) for t in (10, 22, 23, 44, 88, 89)] == [
        (1, True),
        (1, True),
        (2, True),
        (2, True),
        (4, True),
        (4, False),
    ]
    assert vote_at(entry, 60).tokens == 88


# --- the page ----------------------------------------------------------------------------------------------------------------


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table under a heading."""
    lines = text.split(f"{heading}\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    lines = list(takewhile(lambda line: line.startswith("| "), lines[first:]))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "---" not in line]


def test_the_page_has_every_part(whole):
    text = page(whole, {"curves": "figures/curves.png"}, "ccpo compare pages.yaml")
    assert text.startswith("# Which \\| rule?\n")
    assert "\n\nRead **this** first.\n\n## " in text
    for heading in (
        *(
            "removal credit against shared reward",
            "Final accuracy",
            "Learning curves",
            "Tokens to the mark",
            "What it cost",
        ),
        *("Stability", "Removing agents", "The team against one agent's majority vote", "Credit", "Sweeps"),
        *("Tuned hyperparameters", "Is the field fair?", "Empty cells", "How to read it"),
    ):
        assert f"## {heading}\n" in text, heading
    assert "![Held-out accuracy" in text
    assert "final.png" not in text
    assert "`ccpo compare pages.yaml`" in text
    assert "hours of one core in all (a processor, 1 thread(s) a cell; ccpo 0.1.0, torch 2.13.0" in text


def test_the_page_shows_each_number_in_its_place(whole):
    text = page(whole, {}, "x")
    final = {row[0]: row[1:] for row in rows_of(text, "### Held-out problems")}
    assert final["**shared reward**"][0] == estimate(whole.entry("shared", "sums").final)
    assert final["**shared reward**"][1] == estimate(whole.entry("shared", "long").final)
    assert final["own"][0] == "– ([why](#empty-cells))"
    assert final["own"][3].endswith("(1 tasks)")
    tokens = {row[0]: row[1:] for row in rows_of(text, "## Tokens to the mark")}
    assert tokens["**removal credit**"][:2] == [
        marked(whole.entry("removal", "sums").to_mark),
        ratio(whole.contest("removal", "shared", "sums")),
    ]
    assert tokens["**shared reward**"][1] == "1"
    assert "untrained" not in tokens
    costs = [row for row in rows_of(text, "## What it cost") if row[0] == "digit sums"]
    assert costs[0][2:8] == ["30.0k", "10.0k", "0", "40.0k", "33.3%", "80"]
    assert ["digit sums", "**removal credit**", "`optim.lr=0.001`"] in [
        r[:3] for r in rows_of(text, "## Tuned hyperparameters")
    ]
    assert {r[-1] for r in rows_of(text, "## Tuned hyperparameters")[1:]} == {"`optim.lr`"}  # the first of three values
    assert [r[3] for r in rows_of(text, "## Sweeps")[1:]] == ["`1e-08`", "`1e-06`"]
    assert rows_of(text, "## Empty cells")[1] == ["own", "digit sums", "the thinker has no answer"]


def test_an_unfinished_study_says_so(tmp_path):
    text = page(summary_of(tmp_path, leave_out=frozenset({"own", "removal"})), {}, "x")
    assert "> The study is not finished: 3 of its entries have no result yet." in text
    assert "– (not run yet)" in text
    assert "removal credit against" not in text


def test_few_seeds_are_no_evidence(tmp_path):
    text = page(summary_of(tmp_path, study(seeds=2, headline_seeds=None)), {}, "x")
    assert "only 2 runs" in text
    assert "headline pair has 2 runs" in text


def test_failed_cells_show_their_error_and_nothing_breaks_out_of_a_table(tmp_path):
    of = study(tune=None)
    store = Store(tmp_path)
    fill(store, of, SPEEDS, leave_out=frozenset({"own"}))
    for seed in range(5):
        store.fail(make_cell(of, "own", "long", seed, {}), "Traceback\nboom | <b>`x`</b>", 1.0)
    text = page(collect(of, Runner(of, store, Settings())), {}, "x")
    assert rows_of(text, "## Failed cells")[1] == ["own", "long sums", "0", "boom \\| &lt;b>'x'&lt;/b>"]
    assert "– (failed)" in text


def test_a_study_without_results_still_has_a_page(tmp_path):
    of = study()
    store = Store(tmp_path)
    store.create()
    summary = collect(of, Runner(of, store, Settings()))
    assert "No cell has a result yet." in page(summary, {}, "x")
    assert draw_all(summary, tmp_path / "figures") == {}


# --- figures and files -------------------------------------------------------------------------------------------------------


def test_figures_are_the_same_for_the_same_results(whole, tmp_path):
    pytest.importorskip("matplotlib")
    first, second = draw_all(whole, tmp_path / "a"), draw_all(whole, tmp_path / "b")
    assert list(first) == ["curves", "final", "tokens", "credit", "lazy", "sweeps"]
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), name
        assert 5_000 < path.stat().st_size < 200_000


def test_without_matplotlib_there_is_a_page_and_a_word(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    of, store, said = study(), Store(tmp_path), []
    fill(store, of, SPEEDS)
    write_report(of, Runner(of, store, Settings()), store, source="pages.yaml", page=None, say=said.append)
    assert "pip install 'ccpo[plots]'" in said[0]
    assert "![" not in store.page.read_text()


def test_a_page_elsewhere_has_its_results_and_figures_beside_it_and_can_be_made_from_them(tmp_path):
    """As in a fresh clone: the committed results file is all there is."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "pages.yaml"
    file.write_text(json.dumps(STUDY))  # JSON is YAML
    fill(Store(tmp_path / "one"), study(), SPEEDS)
    call = CliRunner()
    where = tmp_path / "docs" / "evidence.md"
    done = call.invoke(app, ["compare", str(file), "--folder", str(tmp_path / "one"), "--report", "--page", str(where)])
    assert done.exit_code == 0, done.output
    text = where.read_text()
    assert "![" in text
    assert "](evidence/curves.png)" in text
    results = tmp_path / "docs" / "evidence" / "results.jsonl"
    header = json.loads(results.read_text().splitlines()[0])
    assert header["cells"] == len(read_results(results, "pages").records)
    again = [
        "compare",
        str(file),
        "--folder",
        str(tmp_path / "two"),
        "--report",
        "--page",
        str(where),
        "--results",
        str(results),
    ]
    before = {p: p.read_bytes() for p in where.parent.rglob("*.*")}
    done = call.invoke(app, again)
    assert done.exit_code == 0, done.output
    assert f"{header['cells']} cells taken over" in done.output
    assert {p: p.read_bytes() for p in where.parent.rglob("*.*")} == before


def test_stale_cells_of_a_results_file_are_named_and_not_mixed_in(tmp_path):
    old, file = tmp_path / "old", tmp_path / "pages.yaml"
    of = study(tune=None, sweeps={})
    store = Store(old)
    fill(store, of, SPEEDS)
    write_report(of, Runner(of, store, Settings()), store, source="x", page=None, say=lambda text: None)
    changed = deepcopy(STUDY) | {"tune": None, "sweeps": {}}
    changed["methods"]["shared"]["set"]["optim"] = {"eps": 1e-6}
    file.write_text(json.dumps(changed))
    new = tmp_path / "new"
    done = CliRunner().invoke(
        app, ["compare", str(file), "--folder", str(new), "--report", "--results", str(store.results)]
    )
    assert done.exit_code == 0, done.output
    assert "not taken, made by another recipe: shared on" in done.output
    text = (new / "report.md").read_text()
    assert "– (not run yet)" in text
    assert not list((new / "cells").glob("*.shared.*"))
    assert list((new / "cells").glob("*.removal.*"))


def test_results_that_began_with_other_defaults_do_not_go_into_a_folder(tmp_path):
    of, file = study(), tmp_path / "pages.yaml"
    file.write_text(json.dumps(STUDY))
    store = Store(tmp_path / "old")
    fill(store, of, SPEEDS)
    write_report(of, Runner(of, store, Settings()), store, source="x", page=None, say=lambda text: None)
    lines = store.results.read_text().splitlines()
    header = json.loads(lines[0])
    header["defaults"]["optim.eps"] = 0.5
    store.results.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "defaults.json").write_text(json.dumps(header["defaults"] | {"optim.eps": 1e-8}))
    done = CliRunner().invoke(
        app, ["compare", str(file), "--folder", str(tmp_path / "new"), "--report", "--results", str(store.results)]
    )
    assert isinstance(done.exception, UserError)
    assert "optim.eps" in str(done.exception)


def test_the_command_lists_without_running(tmp_path):
    file = tmp_path / "pages.yaml"
    file.write_text(json.dumps(STUDY))
    done = CliRunner().invoke(app, ["compare", str(file), "--folder", str(tmp_path / "f"), "--list"])
    assert done.exit_code == 0, done.output
    assert "after tuning" in done.output
    assert list((tmp_path / "f" / "cells").iterdir()) == []


def test_the_command_refuses_an_unknown_phase(tmp_path):
    file = tmp_path / "pages.yaml"
    file.write_text(json.dumps(STUDY))
    done = CliRunner().invoke(app, ["compare", str(file), "--folder", str(tmp_path / "f"), "--phase", "tun"])
    assert isinstance(done.exception, UserError)
    assert "Did you mean 'tune'" in str(done.exception)
    assert not (tmp_path / "f").exists()


# --- small things ------------------------------------------------------------------------------------------------------------


def test_numbers_as_text():
    assert [number(x) for x in (0, 950, 1000, 12_345, 999_499, 1_250_000)] == [
        "0",
        "950",
        "1.0k",
        "12.3k",
        "999.5k",
        "1.25M",
    ]
    found = Estimate(value=0.712, low=0.68, high=0.7415, runs=5)
    assert estimate(found) == "71.2 [68.0, 74.2]%"
    assert estimate(found, "{:.2f}") == "0.71 [0.68, 0.74]"
    late = Marked(estimate=Estimate(value=9000, low=8000, high=9000, runs=4), censored=2, each=(7000, 8000, 9000, 9000))
    assert marked(late) == "> 9.0k [8.0k, 9.0k] (2 of 4 not)"


def test_a_table_has_as_many_columns_as_its_head():
    assert table(["a", "b"], [["1", "2"]], "lr") == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    with pytest.raises(ValueError, match="2 columns"):
        table(["a", "b"], [["1"]], "lr")


def test_cell_text_is_one_line():
    assert cell_text("a\nb | c") == "a b \\| c"


def test_a_recorder_pays_as_the_rule_and_remembers_by_side():
    rule = RULES["shared"]()
    recorder = Recorder(rule)
    inputs = CreditInputs(
        agents=AGENTS, decider="solver", active=AGENTS, reward_PN=torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    )
    outputs, _ = recorder(inputs, recorder.start())
    assert torch.equal(outputs.credit["thinker"], rule(inputs, rule.start())[0].credit["thinker"])
    assert recorder.needs(AGENTS, "solver", AGENTS) == rule.needs(AGENTS, "solver", AGENTS)
    boxes = recorder.boxes()["early"]["thinker"]
    assert (boxes["right"]["n"], boxes["wrong"]["n"]) == (3, 1)
    assert boxes["right"]["mean"] == 1.0
    assert boxes["wrong"]["q"] == [0.0] * 5


def test_early_and_late_are_the_first_and_the_last_tenth():
    recorder = Recorder(RULES["shared"]())
    for step in range(20):
        reward = torch.full((1, 2), 0.5 + step / 100)
        recorder(CreditInputs(agents=("a",), decider="a", active=("a",), reward_PN=reward), {})
    boxes = recorder.boxes()
    assert boxes["early"]["a"]["right"]["mean"] == pytest.approx(0.505)  # steps 0 and 1
    assert boxes["late"]["a"]["right"]["mean"] == pytest.approx(0.685)  # steps 18 and 19


def test_the_record_of_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        line = {
            "step": step,
            "reward/team": step / 10,
            "tokens/joint": 80.0,
            "tokens/counterfactual": 20.0,
            "tokens/total": 100.0 * step,
            "seconds/step": 2.0,
            "seconds/update": 1.5,
            "credit/thinker/share": 0.5,
            "credit/solver/share": float(step),
            "credit/solver/mean": 9.0,
        }
        folder.append(folder.metrics, line)
    for step, accuracy in ((0, 0.25), (2, 0.5), (3, 0.75)):
        folder.append(folder.evaluations, {"step": step, "reports": {"heldout": {"team": {"mean": accuracy}}}})
    found = training_record(folder)
    assert found["curve"] == [[0, 0, 0.0, 0.25], [200, 2, 4.0, 0.5], [300, 3, 6.0, 0.75]]
    assert found["train"] == [[100, 0.1], [200, 0.2], [300, 0.3]]
    assert found["tokens"] == {"joint": 240, "counterfactual": 60, "rating": 0, "total": 300}
    assert found["seconds"] == {"step": 6.0, "update": 4.5}
    assert found["credit"] == {"thinker": {"share": 0.5}, "solver": {"share": 2.0}}
    assert found["steps"] == 3


def test_the_processors_name(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A  Processor (tm)\n")
    assert cpu_model(info) == "A Processor (tm)"
    assert cpu_model(tmp_path / "none")
