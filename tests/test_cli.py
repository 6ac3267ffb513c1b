"""The command line as a person types it: exit codes, sentences, no tracebacks; and the README's commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = [
    "bootstrap.steps=2",
    "bootstrap.noisy_steps=1",
    "bootstrap.hidden=32",
    "bootstrap.layers=1",
    "bootstrap.mlp=48",
    "trainer.steps=2",
    "trainer.eval_every=0",
    "rollout.prompts=4",
    "rollout.samples=2",
    "eval.problems=6",
    "run.threads=1",
]


def ccpo(*arguments: str, cwd: Path, cache: Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CCPO_CACHE": str(cache),
        "COLUMNS": "80",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "ccpo", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def settings() -> list[str]:
    return [part for setting in SMALL for part in ("--set", setting)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A folder in which ``ccpo train demo`` has run, and the cache."""
    folder, cache = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cache")
    done = ccpo("train", "demo", *settings(), cwd=folder, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs/demo" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    return folder, cache


def test_the_summary_has_the_promised_keys(trained):
    summary = json.loads((trained[0] / "runs/demo/summary.json").read_text())
    promised = (
        "team_before team_after without_thinker_after blank_thinker_after solo_after seconds_total seconds_bootstrap "
        "tokens_joint tokens_counterfactual"
    )
    assert set(promised.split()) <= summary.keys()


def test_what_goes_wrong_who_helps_and_figures(trained):
    folder, cache = trained
    done = ccpo("diagnose", "alarms", "runs/demo", "--json", "alarms.json", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "alarms: none" in done.stdout  # two steps are too few to say anything
    assert json.loads((folder / "alarms.json").read_text()) == []
    little = ("--problems", "4", "--samples", "2", "--replayed", "2", "--replays", "2")
    done = ccpo("diagnose", "free-riding", "runs/demo", *little, "--json", "fr.json", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert json.loads((folder / "fr.json").read_text()) == json.loads(
        (folder / "runs/demo/free_riding.json").read_text()
    )
    log = "runs/demo/episodes/step-000001.jsonl.gz"
    done = ccpo("diagnose", "free-riding", log, cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "decides" in done.stdout
    done = ccpo("plot", "runs/demo", "--kind", "lazy", "--out", "lazy.pdf", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert (folder / "lazy.pdf").read_bytes().startswith(b"%PDF")


def test_eval_chat_resume_doctor_and_recipes(trained):
    folder, cache = trained
    done = ccpo("eval", "runs/demo", "--samples", "2", "--problems", "5", "--json", "out.json", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out.json").read_text())["reports"]["heldout"]
    assert set(report["pass@k"]) == {"1", "2"}
    assert set(report["without"]) == {"thinker", "solver"}
    done = ccpo("chat", "runs/demo", "3+7+1+4", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "thinker" in done.stdout
    assert "solver" in done.stdout
    done = ccpo("train", "--resume", "runs/demo", "--steps", "3", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert len((folder / "runs/demo/metrics.jsonl").read_text().splitlines()) == 3
    assert ccpo("doctor", cwd=folder, cache=cache).returncode == 0
    assert "demo" in ccpo("recipes", cwd=folder, cache=cache).stdout


def test_diagnose_variance_of_a_run_and_of_a_recipe(trained):
    folder, cache = trained
    little = ["--batches", "3", "--problems", "2", "--truth", "2", "--rules", "shared, removal/none"]
    done = ccpo("diagnose", "variance", "runs/demo", *little, "--json", "variance.json", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    report = json.loads((folder / "variance.json").read_text())
    assert set(report["rules"]) == {"shared", "removal/none"}
    for word in ("removal/none", "fidelity", "Lemma A.1", "thinker → solver"):
        assert word in done.stdout
    done = ccpo("diagnose", "variance", "demo", *settings(), *little[:4], "--rules", "shard", cwd=folder, cache=cache)
    assert done.returncode == 2
    assert "Did you mean 'shared'?" in done.stderr
    done = ccpo("diagnose", "variance", "demo", *settings(), *little, cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "demo at its start" in done.stdout


def test_eval_reads_a_file_of_the_users(trained):
    folder, cache = trained
    (folder / "mine.jsonl").write_text('{"question": "3+4", "answer": "7"}\n{"question": "1+1", "answer": "2"}\n')
    done = ccpo("eval", "runs/demo", "--data", "mine.jsonl", cwd=folder, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "either a recipe"),
        (["train", "demmo"], "Did you mean 'demo'"),
        (["train", "demo", "--set", "trainer.stepz=3"], "Did you mean 'steps'"),
        (["train", "demo", "--set", "trainer.steps=many"], "trainer.steps"),
        (["train", "demo", "--set", "credit.kind=ccpo_v3"], "Did you mean"),
        (["train", "demo", "--set", "agents.solvr.lr=1"], "Did you mean 'solver'"),
        (["train", "demo", "--set", "model.path=/no/such/model"], "/no/such/model"),
        (["train", "demo", "--set", "run.device=cuda"], "run.device"),
        (["train", "demo", "--set", "task={kind: file, path: none.jsonl}", "--set", "model.path=x"], "none.jsonl"),
        (["train", "--resume", "runs/none"], "recipe.json"),
        (["train", "demo", "--steps", "3"], "--resume"),
        (["eval", "runs/none"], "recipe.json"),
        (["chat", "runs/none", "hi"], "recipe.json"),
        (["diagnose", "alarms", "runs/none"], "recipe.json"),
        (["diagnose", "free-riding", "runs/none"], "neither a run's folder nor a file"),
        (["plan", "demo", "--gpu", "h10"], "Did you mean 'h100'"),
        (["plan", "demo", "--gpus", "0"], "--gpus: found 0"),
        (["plot", "runs/none", "--kind", "curve", "--out", "a.pdf"], "Did you mean 'curves'"),
        (["plot", "runs/none", "--kind", "curves", "--out", "a.docx"], ".pdf, .svg, .png"),
        (["plot", "runs/none", "--kind", "curves", "--out", "a.pdf"], "recipe.json"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(arguments, says, tmp_path):
    done = ccpo(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_an_existing_run_is_not_overwritten(trained):
    folder, cache = trained
    before = (folder / "runs/demo/recipe.json").read_bytes()
    done = ccpo("train", "demo", *settings(), cwd=folder, cache=cache)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert (folder / "runs/demo/recipe.json").read_bytes() == before


def test_hostile_text_cannot_drive_the_terminal():
    from ccpo.display import printable

    assert printable("\x1b[2J\x07evil\u202e\nline\t") == "\ufffd[2J\ufffdevil\ufffd\nline\t"


def test_the_readme_example_runs(tmp_path, monkeypatch):
    import ccpo as library

    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 18
    train = library.train
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def small(recipe, **objects):
        recipe = {
            **recipe,
            "bootstrap": {"steps": 2, "noisy_steps": 1, "hidden": 32, "layers": 1, "mlp": 48},
            "eval": {"problems": 4},
        }
        recipe["trainer"] = {"steps": 2}
        return train(recipe, **objects)

    monkeypatch.setattr(library, "train", small)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/mine/summary.json").is_file()


def test_the_readme_names_what_is_there():
    for path in re.findall(r"\]\((docs/[a-z_]+\.md)\)", README):
        assert (ROOT / path).is_file(), path
    for recipe in re.findall(r"recipes/([\w.\-]+\.yaml)", README):
        assert (ROOT / "recipes" / recipe).is_file(), recipe
    from ccpo.credit import RULES

    table = README.split("## Credit rules")[1].split("Advantages:")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) == set(RULES)
