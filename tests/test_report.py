"""The report without a browser: what is read of a run, what is counted, what is left out and said, and how the page is put together."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import typer.testing

import ccpo
from ccpo.cli import app
from ccpo.errors import UserError
from ccpo.report import write_report
from ccpo.report.document import RunReader, _shown, build_document
from ccpo.report.episodes import HEAD, TAIL, read_groups
from ccpo.report.graph import team_graph
from ccpo.report.page import SCRIPTS, STYLES, page, policy, script, to_json
from ccpo.report.reading import Notes, number, parse, regular_file, short
from ccpo.report.rollouts import Sample
from ccpo.report.series import columns
from ccpo.report.tally import Tally, box, correlation, effect, windows
from ccpo.teams import PlayTeam, describe, think_solve, voting
from hostile_run import HUGE, write_hostile
from run_files import problem_record, turn, write_run, write_steps


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


def data_of(text: str, name: str) -> dict:
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)[1])


# ---- numbers


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"), (1, "1"), (False, "no"), (True, "yes"), (None, "none"), (3e-4 + 1e-19, "0.0003"), (1e-6, "1e-06"),
        (1.0, "1"), ([4, 2], "4, 2"), ([0.9, 0.999], "0.9, 0.999"), ({}, "none"), ([[1]], "…"), ("a", "a"),
    ],
)  # fmt: skip
def test_settings_are_shown_as_they_were_written(value, words):
    assert _shown(value) == words


def test_a_box_is_tukeys():
    found = box([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found["q1"], found["median"], found["q3"]) == (2, 3, 4)
    assert (found["low"], found["high"], found["outside"]) == (1, 4, 1)
    assert (found["mean"], found["n"], found["max"]) == (22, 5, 100)
    assert box([]) is None


def test_effects_are_those_of_the_metrics():
    assert [effect(1, 0), effect(0, 1), effect(1, 1), effect(0, 0)] == [0, 1, 2, 3]
    assert [effect(0.5, 0.25), effect(0.25, 0.5), effect(0.5, 0.5)] == [0, 1, 3]


def test_correlation_has_a_sign_and_needs_spread():
    assert correlation([(0.0, 0.0), (1.0, 2.0), (2.0, 4.0)]) == pytest.approx(1.0)
    assert correlation([(0.0, 4.0), (1.0, 2.0), (2.0, 0.0)]) == pytest.approx(-1.0)
    assert correlation([(1.0, 0.0), (1.0, 1.0)]) is None
    assert correlation([]) is None


def test_windows_are_thirds_in_the_order_of_steps():
    tallies = [Tally(step=step) for step in (6, 5, 4, 3, 2, 1)]
    found = {name: [t.step for t in chosen] for name, chosen in windows(tallies)}
    assert found == {
        "all steps": [1, 2, 3, 4, 5, 6],
        "first third": [1, 2],
        "middle third": [3, 4],
        "last third": [5, 6],
    }
    assert [name for name, _ in windows(tallies[:5])] == ["all steps"]


def test_numbers_that_are_none_are_refused():
    assert [number(v) for v in (True, "1", None, [], 1e101, float("nan"), float("inf"), 10**400)] == [None] * 8
    assert (number(3), number(-0.5)) == (3.0, -0.5)
    assert parse("[NaN, Infinity, 1]") == [None, None, 1]
    assert [short(v) for v in (0.123456789, 2.0, 1e-9, None)] == [0.12346, 2, 1e-9, None]


def test_long_curves_are_thinned_and_it_is_said():
    notes = Notes()
    found = columns([{"step": s, "reward/team": s % 2} for s in range(1, 4001)], notes)
    assert (len(found["step"]), found["every"], set(found["values"]["reward/team"])) == (1000, 4, {0.5})
    assert notes.sentences() == ["4,000 steps: each point of a curve is the mean of 4."]


# ---- what is counted


def test_credit_and_removal_are_counted(tmp_path: Path):
    record = problem_record(random.Random(0), 1, 1, 0, 4, 9)
    for rollout, right in zip(record["rollouts"], (1, 1, 0, 0), strict=True):
        rollout["reward"] = float(right)
        rollout["credit"] = {"thinker": right - 0.25}
        rollout["advantage"] = {"thinker": 0.0, "solver": float(right)}
    record["counterfactuals"] = [
        {**record["counterfactuals"][0], "rollout": n, "reward": reward}
        for n, reward in enumerate((0.0, 1.0, 1.0, 0.0))
    ]
    write_steps(tmp_path / "episodes" / "step-000001.jsonl.gz", 1, [record])
    document, table = RunReader(tmp_path).read()
    window = document["credit"][0]
    thinker, solver = window["agents"]
    assert (thinker["agent"], solver["agent"], window["rollouts"], window["reward"]) == ("thinker", "solver", 4, 0.5)
    assert thinker["pairs"] == [1, 1, 1, 1, 0]
    assert (thinker["correct"]["median"], thinker["wrong"]["median"], thinker["mean"], thinker["corr"]) == (
        0.75,
        -0.25,
        0.25,
        1,
    )
    assert (thinker["signal"], solver["signal"], solver["correct"], solver["pairs"]) == (0, 1, None, None)
    assert [row[2] for row in table["rows"]] == [1, 1, 0, 0]
    said = {note.split()[0] for note in document["notes"]}
    assert said == {"recipe.json", "metrics.jsonl", "evaluations.jsonl", "The"}  # and the alarms, which need a recipe


def test_tokens_are_counted_not_kept_and_a_text_cannot_pass_for_them(tmp_path: Path):
    text = 'it says "token_ids": [1, 2, 3] and \\"logprobs\\": [] \\'
    record = problem_record(random.Random(0), 1, 1, 0, 1, 9)
    record["rollouts"][0]["turns"] = [turn("solver", text, "p", tokens=7), turn("thinker", "", "p", tokens=0)]
    path = tmp_path / "step-000001.jsonl.gz"
    write_steps(path, 1, [record])
    (group,) = read_groups(path, 1, Notes())
    assert [(t.text, t.tokens) for t in group.rollouts[0].turns] == [(text, 7), ("", 0)]


def test_a_long_text_keeps_its_two_ends(tmp_path: Path):
    record = problem_record(random.Random(0), 1, 1, 0, 1, 9)
    record["rollouts"][0]["turns"] = [turn("solver", "a" * HEAD + HUGE + "z" * TAIL, "p")]
    write_steps(tmp_path / "step-000001.jsonl.gz", 1, [record])
    (group,) = read_groups(tmp_path / "step-000001.jsonl.gz", 1, Notes())
    assert group.rollouts[0].turns[0].text == ("a" * HEAD, len(HUGE), "z" * TAIL)


def test_a_sample_keeps_problems_whole_and_in_every_step(tmp_path: Path):
    sample = Sample(rollouts=60, size=10**6)
    shown_before = None
    for step in range(1, 11):
        path = tmp_path / f"step-{step:06d}.jsonl.gz"
        write_steps(path, step, [problem_record(random.Random(p), step, 10, p, 4, 20) for p in range(20)])
        sample.add(list(read_groups(path, step, Notes())))
    table = sample.table(("thinker", "solver"))
    shown_before = len(table["rows"])
    assert table["seen"] == 800
    assert 40 <= table["shown"] == shown_before <= 60
    by_problem: dict[str, set[int]] = {}
    for step, _place, name, *_ in table["groups"]:
        by_problem.setdefault(table["texts"][name], set()).add(step)
    assert sum(steps == set(range(1, 11)) for steps in by_problem.values()) >= len(by_problem) - 1
    steps = [group[0] for group in table["groups"]]
    assert steps == sorted(steps)


def test_a_table_stays_within_its_size(tmp_path: Path):
    path = tmp_path / "step-000001.jsonl.gz"
    records = [problem_record(random.Random(p), 1, 1, p, 4, 1000) for p in range(60)]
    for record in records:
        for rollout in record["rollouts"]:
            rollout["turns"][0]["text"] = (
                "".join(random.Random(rollout["n"]).choices('<"\\é', k=400)) + record["problem"]["id"]
            )
    write_steps(path, 1, records)
    sample = Sample(rollouts=10**6, size=50_000)
    sample.add(list(read_groups(path, 1, Notes())))
    table = sample.table(("thinker", "solver"))
    assert 0 < table["shown"] < table["seen"] == 240
    assert len(to_json({k: table[k] for k in ("agents", "turns", "groups", "rows", "texts")}).encode()) <= 50_000


# ---- the graph


def test_the_graph_is_that_of_the_recipe(run: Path):
    graph = RunReader(run).read()[0]["graph"]
    assert (graph["source"], graph["decider"], graph["decision"]["reads"]) == ("recipe", "solver", ["solver"])
    assert [(t["name"], t["level"], t["reads"]) for t in graph["turns"]] == [
        ("thinker", 0, []),
        ("solver", 1, ["thinker"]),
    ]
    assert graph["windows"][0]["tokens"]["thinker"]["mean"] > 5


def test_a_graph_that_is_not_written_is_heard_from_the_prompts(run: Path):
    reader = RunReader(run)
    tallies, _ = reader._episodes(Notes(), Sample().limits)
    graph = team_graph({}, tallies)
    assert graph["source"] == "prompts"
    assert [(t["name"], t["reads"]) for t in graph["turns"]] == [("thinker", []), ("solver", ["thinker"])]


def test_a_team_that_is_described_can_be_drawn():
    found = team_graph({"team": describe(think_solve())}, [])
    assert [(t["name"], t["agent"], t["reads"]) for t in found["turns"]][1] == ("solver", "solver", ["thinker"])
    assert (found["decider"], found["decision"]) == ("solver", {"kind": "last_turn", "reads": ["solver"]})
    votes = team_graph({"team": describe(voting(k=3))}, [])
    assert votes["decision"]["reads"] == ["voter1", "voter2", "voter3"]

    async def play(problem, speak):
        return await speak("a", "{problem}")

    nothing = team_graph({"team": describe(PlayTeam("p", ("a", "b"), play))}, [])
    assert (nothing["turns"], nothing["decision"], nothing["source"]) == ([], None, None)


def test_a_circle_does_not_stop_the_drawing():
    circle = {"team": {"turns": [{"name": n, "agent": n, "reads": [r]} for n, r in (("a", "b"), ("b", "a"))]}}
    assert {t["name"] for t in team_graph(circle, [])["turns"]} == {"a", "b"}


# ---- free-riding


def test_what_each_agent_contributes_is_shown_where_it_was_measured(run: Path):
    assert RunReader(run).read()[0]["free_riding"] is None
    worth = {"mean": 0.25, "low": 0.1, "high": 0.4, "needed": 300}
    report = {
        "problems": 40,
        "checkpoint": "step-000006",
        "data": "heldout",
        "agents": {
            "thinker": {"removal": worth, "blank": {"mean": "x"}, "replay": None, "verdict": "helps"},
            "solver": 3,
        },
        "untold": ["nothing of replay", 7],
    }
    (run / "free_riding.json").write_text(json.dumps(report))
    found = RunReader(run).read()[0]["free_riding"]
    assert found["agents"][0] == {
        "agent": "thinker",
        "verdict": "helps",
        "removal": [0.25, 0.1, 0.4],
        "blank": None,
        "replay": None,
        "shapley": None,
    }
    assert found["agents"][1]["removal"] is None and found["untold"] == ["nothing of replay"]
    (run / "free_riding.json").write_text("[")
    assert RunReader(run).read()[0]["free_riding"] is None
    (run / "free_riding.json").unlink()


# ---- alarms


def test_alarms_are_shown_and_one_that_breaks_is_said(run: Path, monkeypatch: pytest.MonkeyPatch):
    alarms = ModuleType("ccpo.alarms")
    alarms.__spec__ = type(sys)("spec")
    alarms.find_alarms = lambda path, say: [
        {"level": "warn", "title": f"of {path.name}", "what": "w", "try": "t"},
        {"title": 3},
        "x",
    ]
    monkeypatch.setitem(sys.modules, "ccpo.alarms", alarms)
    assert RunReader(run).read()[0]["warnings"] == [{"level": "warn", "title": "of run", "what": "w", "try": "t"}]

    def broken(path, say):
        raise KeyError("x")

    alarms.find_alarms = broken
    document = RunReader(run).read()[0]
    assert document["warnings"] == []
    assert "The alarms could not be computed (KeyError)." in document["notes"]


def test_alarms_are_computed_of_the_runs_that_these_tests_read(run: Path):
    document = RunReader(run).read()[0]
    assert document["notes"] == []
    assert document["warnings"] == []


@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_file_without_end_does_not_keep_the_report(tmp_path: Path, name: str, what: str):
    path = write_run(tmp_path / "run", steps=2) / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    document = RunReader(tmp_path / "run").read()[0]
    assert document["warnings"] == []
    assert any(note.startswith(f"The alarms are not computed, because {name}") for note in document["notes"])


def test_why_there_are_no_alarms_is_said(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "\xff": 1}\n')
    said = " ".join(RunReader(run).read()[0]["notes"])
    assert "metrics.jsonl: 1 line is damaged" in said
    assert "metrics.jsonl, line 3: it is no UTF-8" in said


# ---- harm


def test_a_hostile_run_is_read_and_what_is_left_out_is_said(tmp_path: Path):
    folder = write_hostile(tmp_path / "run")
    document, table = RunReader(folder).read()
    said = " ".join(document["notes"])
    for what in (
        "metrics.jsonl: 5 lines are damaged",
        "evaluations.jsonl: 1 line is damaged",
        "step-000010.jsonl.gz is damaged",
        "step-000011.jsonl.gz is damaged",
        "step-000012.jsonl.gz has another schema",
        "step-000013.jsonl.gz is a link that leads out",
        "step-000014.jsonl.gz is no regular file",
        "step-000015.jsonl.gz: 4 problem lines are damaged",
    ):
        assert what in said
    assert "root:" not in json.dumps([document, table])
    assert document["metrics"]["values"]["reward/without___proto__"].count(0.5) == 1
    assert document["rollouts"]["seen"] == 73


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    notes = Notes()
    assert not regular_file(tmp_path, tmp_path / "metrics.jsonl", notes)
    assert notes.sentences() == ["metrics.jsonl is no regular file; it is left out."]


def test_a_file_that_never_ends_is_read_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ccpo.report.reading.MAX_BYTES", 100_000)
    path = tmp_path / "episodes" / "step-000001.jsonl.gz"
    path.parent.mkdir()
    with gzip.open(path, "wt") as file:
        file.write('{"schema": "ccpo.episodes/1", "step": 1, "problems": 1}\n' + " " * 10_000_000)
    document, _ = RunReader(tmp_path).read()
    assert any("too long" in note for note in document["notes"])


def test_a_hostile_page_has_no_markup_of_the_run(tmp_path: Path):
    text = write_report([write_hostile(tmp_path / "run")]).read_text()
    seen = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs).get("type")))

    Tags().feed(text)
    assert seen.count(("script", None)) == 1
    assert seen.count(("script", "application/json")) == 2
    assert not {"img", "iframe", "object", "link", "b"} & {tag for tag, _ in seen}
    assert all(
        c
        not in text.split('id="document">')[1]
        .split("<script>")[0]
        .replace("</script>", "")
        .replace('<script type="application/json" id="rollouts-0">', "")
        for c in "<>&\u2028\u2029"
    )


def test_text_in_json_survives_and_cannot_end_its_block():
    value = {"</script>": "<!-- & \u2028 \u2029 \ud800 é"}
    written = to_json(value)
    assert not re.search("[<>&\u2028\u2029\ud800]", written)
    assert json.loads(written) == value
    with pytest.raises(ValueError, match="JSON"):
        to_json(float("nan"))


def test_the_policy_allows_only_the_page_itself(run: Path):
    text = page(*build_document([RunReader(run)]))
    allowed = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert allowed == policy()
    assert "default-src 'none'" in allowed
    assert "unsafe" not in allowed
    assert "connect-src" not in allowed
    assert "connect-src 'self'" in policy(live=True)
    assert not re.search(
        r"""(?:src|href)=["'](?!#)|url\((?!#)|@import|https?://(?!www\.w3\.org/)""",
        text.split('id="document"')[0] + script(),
    )


# ---- the files of the page


def test_the_assets_are_listed_short_and_make_no_markup():
    there = {p.name for p in (files("ccpo.report") / "assets").iterdir()}
    assert there == {"page.html", *(f"{n}.css" for n in STYLES), *(f"{n}.js" for n in SCRIPTS)}
    for name in there:
        text = (files("ccpo.report") / "assets" / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 400, name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text
        ), name


# ---- the commands


def invoke(*words: str):
    return typer.testing.CliRunner().invoke(app, list(words))


def test_a_report_is_written_where_it_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = invoke("report", str(run))
    assert (done.exit_code, done.output) == (0, f"report: {run / 'report.html'}\n")
    document = data_of((run / "report.html").read_text(), "document")
    assert document["runs"][0]["made"]["command"] == "ccpo train sums"
    assert document["runs"][0]["progress"]["finished"] is True
    monkeypatch.chdir(tmp_path)
    assert write_report([run, run]) == Path("report.html")
    text = Path("report.html").read_text()
    assert len(data_of(text, "document")["runs"]) == 2
    assert data_of(text, "rollouts-1")["shown"] == 192
    assert invoke("report", str(run), "--out", str(tmp_path / "new" / "page.html")).exit_code == 0
    assert (tmp_path / "new" / "page.html").is_file()


@pytest.mark.parametrize("command", ["report", "watch"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, says in (("none", "does not exist"), ("file", "is a file"), ("empty", "holds no run")):
        found = invoke(command, str(tmp_path / name)).exception
        assert isinstance(found, UserError)
        assert says in str(found)


def test_a_place_that_cannot_be_written_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is a folder; name a file"):
        write_report([run], tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")


def test_a_run_that_has_only_begun(tmp_path: Path):
    run = write_run(tmp_path / "run")
    for name in ("summary.json", "evaluations.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    for file in (run / "episodes").iterdir():
        file.unlink()
    document, table = RunReader(run).read()
    assert document["progress"] == {
        "step": 0,
        "steps": 12,
        "budget": None,
        "finished": False,
        "failed": False,
        "written": None,
    }
    assert (document["credit"], table["rows"]) == ([], [])
    assert document["agents"] == ["thinker", "solver"]
    write_report([run])


def test_a_trained_run_says_its_graph_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path / "cache"))
    small = {"hidden": 32, "layers": 1, "mlp": 48, "steps": 2, "noisy_steps": 1, "batch": 8}
    overrides = {"run": {"dir": str(tmp_path / "run"), "threads": 1}, "bootstrap": small, "log": {"tensorboard": False}}
    recipe = overrides | {
        "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
        "task": {"kind": "digit_sum", "digits": [2, 3], "size": 20},
        "credit": "ccpo_v1",
        "rollout": {"prompts": 2, "samples": 2, "max_tokens": 8, "max_prompt_tokens": 64},
        "trainer": {"steps": 2},
        "eval": {"problems": 4},
    }
    ccpo.train(recipe)
    document, table = RunReader(tmp_path / "run").read()
    assert document["graph"]["source"] == "recipe"
    assert document["made"]["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", document["made"]["commit"])
    assert document["notes"] == []
    assert table["shown"] == 8
    assert document["evaluations"][-1]["reports"]["heldout"]["blank"].keys() == {"thinker", "solver"}
