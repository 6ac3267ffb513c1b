"""A run folder that was made to do harm: markup in every text, endless and invisible characters, broken files."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from run_files import GRAPH, problem_record, turn, write_run, write_steps

SCRIPTS = (
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<img src=x onerror='window.pwned = 3'>",
    "<!--<script>",
    "]]><svg onload=window.pwned=4>",
    "javascript:window.pwned=5",
    "{{style}}{{data}}",
)
RIGHT_TO_LEFT = "\u202eright to left\u202c \u2067isolated \u200f\u200b\u200d\ufeff\u2060zero \u0000\u0007\u001b[31m width\u2028\u2029"
LONE = "lone \ud800 surrogate \udfff"
BROKEN_LATEX = (
    "$\\frac{1}{$",
    "\\[\\begin{pmatrix} 1 & 2 \\]",
    "$" + "{" * 500 + "$",
    "$" + "\\sqrt" * 900 + " x$",
    "$\\constructor{a}$ $\\__proto__$ $\\href{javascript:window.pwned=6}{x}$ $\\text{<img src=x onerror=window.pwned=7>}$",
    "\\boxed{unclosed",
    "$a^b^c_d_e$ $$ $$ $\\left( x$ \\(\\)",
    "$\\style{color:red}{x}$ $\\unicode{0}$ $\\require{y}$",
)
HUGE = "a long message, " * 70_000  # more than a megabyte
NAMES = ("__proto__", "constructor", "<b>bold</b>")


def write_hostile(folder: Path) -> Path:
    write_run(folder, steps=8, problems=2, samples=2)
    (folder / "recipe.json").write_text(json.dumps(hostile_recipe()))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(broken_metrics())
    (folder / "evaluations.jsonl").write_text(broken_evaluations())
    (folder / "summary.json").write_text('{"name": [], "steps": "many", "tokens_joint": 1e999, "seconds_total": {}}')
    write_steps(folder / "episodes" / "step-000009.jsonl.gz", 9, hostile_records())
    episodes = folder / "episodes"
    (episodes / "step-000010.jsonl.gz").write_bytes(b"this is no gzip file")
    whole = (episodes / "step-000002.jsonl.gz").read_bytes()
    (episodes / "step-000011.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with gzip.open(episodes / "step-000012.jsonl.gz", "wt") as file:
        file.write('{"schema": "ccpo.episodes/99", "step": 12, "problems": 1}\n{}\n')
    (episodes / "step-000013.jsonl.gz").symlink_to("/etc/passwd")
    (episodes / "step-000014.jsonl.gz").mkdir()
    with gzip.open(episodes / "step-000015.jsonl.gz", "wt") as file:
        file.write('{"schema": "ccpo.episodes/1", "step": 15, "problems": 9}\n' + "[" * 100_000 + "\n" + broken_lines())
    return folder


def hostile_recipe() -> dict[str, Any]:
    evil = " ".join(SCRIPTS)
    turns = [{"name": name, "agent": name, "reads": [*NAMES, 7, None]} for name in NAMES]
    return {
        "config": {
            "run": {"name": evil, "dir": 3},
            "trainer": {"steps": "x"},
            evil: {"a": {"b": evil}},
            "task": [1],
            "team": None,
        },
        "objects": {"task": evil},
        "team": {**GRAPH, "agents": [*NAMES, "thinker", "solver", 5], "turns": [*turns, *GRAPH["turns"], "no turn"]},
        "made_with": {evil: evil, "python": 3},
        "commit": evil,
        "command": ["python", evil, 7, None],
    }


def broken_metrics() -> str:
    lines = [
        "{not json",
        '"a text"',
        '{"step": "nine"}',
        '{"step": 1e400}',
        '{"step": 9, "reward/team": NaN, "reward/without___proto__": 0.5, "credit/__proto__/mean": Infinity}',
        json.dumps(
            {"step": 10, "reward/team": 10**400, "credit/<b>bold</b>/mean": 1e308, "reward/<img src=x>_own": -1e308}
        ),
        json.dumps({"step": 2**80, "reward/team": 1.0}),
        '{"step": 11, "reward/tea',
    ]
    return "\n".join(lines)


def broken_evaluations() -> str:
    good = {"mean": 0.5, "low": 0.4, "high": 0.6}
    lines = [
        {
            "step": 0,
            "reports": {
                "<script>window.pwned=8</script>": {"problems": "x", "team": good, "blank": {"__proto__": good}}
            },
        },
        {"step": 4, "reports": []},
        {"step": 5, "reports": {"__proto__": {"team": {"mean": "high"}}}},
        {
            "step": 9,
            "reports": {
                "constructor": {
                    "problems": 3,
                    "team": good,
                    "without": 7,
                    "alone": {"constructor": good},
                    "pass@k": {"1": "x", "2": 0.5, "4": 0.6},
                }
            },
        },
    ]
    return "\n".join(json.dumps(line) for line in lines) + "\nnull\n"


def hostile_records() -> list[dict[str, Any]]:
    rng = random.Random(0)
    texts = [*SCRIPTS, RIGHT_TO_LEFT, LONE, *BROKEN_LATEX, HUGE, ""]
    records = []
    for i, text in enumerate(texts):
        record = problem_record(rng, 9, 9, i, 2, 60)
        record["problem"] |= {"id": text[:50], "text": text, "answer": text[:2000]}
        for rollout in record["rollouts"]:
            rollout["answer"] = text[:2000]
            rollout["credit"] |= dict.fromkeys(NAMES, 0.5) | {"solver": 1e308}
            speakers = (*NAMES, "thinker", "solver") if text is not HUGE else NAMES[:1]
            rollout["turns"] = [turn(name, text, text[:9000], tokens=3) for name in speakers]
        for play in record["counterfactuals"]:
            play["removed"] = [rng.choice(NAMES)]
            play["answer"] = text[:2000]
            play["turns"] = [turn("solver", text[:90_000], "", tokens=3)]
        records.append(record)
    return records


def broken_lines() -> str:
    good = problem_record(random.Random(1), 15, 15, 0, 2, 60)
    lines = [
        {**good, "rollouts": "none"},
        {**good, "problem": None},
        {**good, "rollouts": [{"n": 0, "reward": "high"}, None, 3]},
        {**good, "counterfactuals": [None, {"removed": "thinker"}, {"removed": [1], "reward": 0}]},
        {
            **good,
            "rollouts": [
                {"n": 0, "reward": 1.0, "credit": [], "advantage": 3, "turns": [None, {}, {"name": 4, "text": 5}]}
            ],
        },
    ]
    return "\n".join(json.dumps(line) for line in lines) + "\n"


def test_the_hostile_run_is_hostile(tmp_path):
    folder = write_hostile(tmp_path / "run")
    assert (folder / "episodes" / "step-000013.jsonl.gz").is_symlink()
    assert len(HUGE) > 2**20
