"""The documents against the code: commands parse, examples run, links lead somewhere, tables name what there is."""

from __future__ import annotations

import gzip
import importlib.util
import inspect
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import ccpo
from ccpo.build import build_part
from ccpo.cli import app
from ccpo.compare.cells import check
from ccpo.compare.study import load_study
from ccpo.config import Part, RunConfig, load_recipe
from ccpo.credit import ESTIMATORS, RULES, CCPOv1, RemovalCredit, SharedReward
from ccpo.losses import LOSSES
from ccpo.plain_yaml import parse_yaml
from ccpo.rollout import read_episodes
from ccpo.tasks import PROCEDURAL, TASKS, VERIFIERS
from ccpo.tasks.hub import KNOWN
from ccpo.tasks.rows import READERS
from ccpo.teams import DECISIONS, TEAMS, Fate
from ccpo.types import CreditInputs, Removal
from test_architecture import RULES as IMPORT_RULES
from test_theory import signal_to_noise

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: the page and line where it starts, the words after the fence, its text."""

    page: str
    line: int
    info: str
    text: str


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w[^\n]*)\n(.*?)^```$", text, re.S | re.M):
            if match[1].split()[0] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(page=page.name, line=line, info=match[1], text=match[2]))
    return found


def at(block: Block) -> str:
    return f"{block.page}:{block.line}"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def rows(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose header begins with ``first``."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            break
    else:
        raise AssertionError(f"no table begins with {first!r}")
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def names(text: str, first: str) -> list[str]:
    """The names in backticks in the first column of a table."""
    return [name for row in rows(text, first) for name in re.findall(r"`([^`]+)`", row[0])]


def section(text: str, title: str) -> str:
    return re.split(r"^#{2,3} ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


# ---- commands


def commands() -> list[tuple[str, list[str]]]:
    """Every line of a console block that runs ``ccpo``, in words, without its comment."""
    found = []
    for block in blocks("console", "bash", pages=[*PAGES, ROOT / "README.md"]):
        lines = block.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
        found += [(at(block), w[1:]) for w in words if w and w[0] == "ccpo"]
    return found


def test_there_are_commands_to_check():
    assert len(commands()) >= 2


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_a_command_parses_and_its_recipe_and_settings_are_valid(where: str, words: list[str]):
    command, name, rest = typer.main.get_command(app), "ccpo", words
    while hasattr(command, "commands"):  # a group: the next word is one of its commands
        name, *rest = rest
        assert name in command.commands, where
        command = command.commands[name]
    given = command.make_context(name, rest).params  # raises for an unknown option
    recipe = given.get("recipe") or given.get("source")
    if recipe and not recipe.startswith("runs/"):
        config = load_recipe(recipe, given["set"] or ())  # raises for a recipe or key that is not there
        build_part(RULES, config.credit, "credit")
        build_part(TEAMS, config.team, "team")
    if given.get("study") and given["study"] != "study.yaml":
        check(load_study(given["study"]))


def test_the_check_of_commands_can_fail():
    train = typer.main.get_command(app).commands["train"]
    with pytest.raises(Exception, match="No such option"):
        train.make_context("train", ["demo", "--stepz", "3"])
    with pytest.raises(ccpo.UserError, match="steps"):
        load_recipe("demo", ["trainer.stepz=3"])


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for block in blocks("console", "bash"):
        for target in re.findall(r"^make ([\w-]+)", block.text, re.M):
            assert target in targets, at(block)


# ---- examples


@pytest.mark.parametrize("block", blocks("python"), ids=at)
def test_python_compiles_and_what_is_marked_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = compile(block.text, at(block), "exec", dont_inherit=True)
    if "test" in block.info.split():
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "example"})


def test_examples_are_marked():
    marked = [b for b in blocks("python") if "test" in b.info.split()]
    assert {b.page for b in marked} >= {"teams.md", "data.md", "rules.md"}


@pytest.mark.parametrize("block", blocks("yaml"), ids=at)
def test_yaml_is_part_of_a_valid_recipe(block: Block):
    data = parse_yaml(block.text)
    if "methods" in data:
        check(load_study(data))
        return
    config = load_recipe(data)
    build_part(TEAMS, config.team, "team")
    build_part(RULES, config.credit, "credit")
    for part in [config.task, *config.eval.tasks.values()]:
        if part is not None and ":" not in part.kind:
            inspect.signature(TASKS[part.kind]).bind(**part.arguments)


def build_example(page_name: str, holds: str, file: Path, table: Mapping[str, Any], part: Part) -> Any:
    """What a recipe makes of the class in a page's example, saved as a module."""
    (block,) = (b for b in blocks("python") if b.page == page_name and holds in b.text)
    file.write_text(block.text, encoding="utf-8")
    return build_part(table, part, "part")


def test_the_rule_of_the_example_pays_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    part = Part(kind="my_rules:Mixed", weight=0.25)
    rule = build_example("rules.md", "class Mixed", tmp_path / "my_rules.py", RULES, part)
    inputs = CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker", "solver"),
        reward_PN=torch.tensor([[1.0, 0.0]]),
        without={("thinker",): torch.tensor([[[0.0, 1.0]]])},
    )
    assert rule.needs(inputs.agents, inputs.decider, inputs.active) == {("thinker",)}
    credit = rule(inputs, {})[0].credit
    assert credit["thinker"].tolist() == [[0.875, -0.125]]
    assert credit["solver"].tolist() == [[1.0, 0.0]]


def test_the_task_of_the_example_can_be_named_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    task = build_example(
        "data.md", "class Parity", tmp_path / "my_tasks.py", TASKS, Part(kind="my_tasks:Parity", bits=6)
    )
    assert len(task) == 64


# ---- links


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_paths_of_the_project_exist(path: Path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:benchmarks|docs|src|tests)/[\w./-]+\.(?:py|md|json))`", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_speaks_of_the_project_alone(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bTODO\b|issue \d", text)


# ---- tables


def test_the_recipe_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_recipe_reference", ROOT / "docs" / "make_recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert page("recipes.md") == module.reference(), "run: python docs/make_recipe_reference.py"
    text = page("recipes.md")
    for name in module.MEANINGS:
        assert name in RunConfig.model_fields or f"| `{name}` |" in text, f"{name} is no key any more"


def test_the_tables_of_rules_name_what_there_is():
    text = page("rules.md")
    assert {row[0].strip("`") for row in rows(text, "`credit.kind`")} == set(RULES)
    assert {row[0].strip("`") for row in rows(text, "`advantage`")} == set(ESTIMATORS)
    assert {row[0].strip("`") for row in rows(text, "`loss.kind`")} == set(LOSSES)


def test_the_tables_of_teams_name_what_there_is():
    text = page("teams.md")
    assert {row[0].strip("`") for row in rows(text, "`team.kind`")} == set(TEAMS)
    assert {row[0].strip("`") for row in rows(text, "kind")} == set(DECISIONS)
    assert {row[0].strip("`") for row in rows(text, "`removal`")} == set(Removal)
    assert {row[0].strip("`") for row in rows(text, "fate")} == set(Fate)


def test_the_costs_in_teams_are_those_of_the_plans():
    cost = {}
    for row in rows(page("teams.md"), "team"):
        cost[re.search(r"`(\w+)`", row[0])[1]] = (row[1], row[2].split()[0])
    for kind, (joint, counterfactual) in cost.items():
        team = TEAMS[kind]()
        needed = RemovalCredit().needs(team.agent_names, team.decider, team.agent_names)
        decoded = sum(len(team.plan(coalition).decoded) for coalition in needed)
        assert (joint.replace("K", "3"), int(counterfactual)) == (str(len(team.turns)), decoded), kind


def test_the_tables_of_data_name_what_there_is():
    text = page("data.md")
    assert set(names(text, "ending")) == set(READERS)
    hub = {row[0].strip("`"): (row[1].partition(" ")[0], row[2]) for row in rows(text, "short name")}
    assert hub == {name: (known.hub, known.split) for name, known in KNOWN.items()}
    assert {row[0].strip("`") for row in rows(text, "`task.kind`")} == set(PROCEDURAL)
    assert {row[0].strip("`") for row in rows(text, "`verifier`")} == {*VERIFIERS, "auto"}


def test_the_import_rules_are_those_of_the_test():
    found = {}
    for part, ours, others in rows(page("architecture.md"), "part"):
        allowed = set() if ours == "nothing" else set(ours.split(", "))
        packages = None if others == "any" else set() if others == "none" else set(others.split(", "))
        found[part.strip("`")] = (allowed, packages)
    assert found == IMPORT_RULES


def test_the_layout_names_every_file():
    layout = section(page("architecture.md"), "Layout")
    folder, named = "", set()
    for line in layout.splitlines():
        if match := re.match(r"^ {2,4}(\w+/|\w+\.py)(?: |$)", line):
            if match[1].endswith("/"):
                folder = match[1]
            else:
                named.add((folder if line.startswith("    ") else "") + match[1])
    src = ROOT / "src" / "ccpo"
    there = {p.relative_to(src).as_posix() for p in src.rglob("*.py") if p.name != "__init__.py"} | {"__init__.py"}
    assert named == there


# ---- a real run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two steps of Think–Solve with as much switched on as goes together."""
    folder = tmp_path_factory.mktemp("documented")
    recipe = {
        "run": {"dir": str(folder / "run"), "threads": 1},
        "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
        "task": {"kind": "digit_sum", "digits": [2, 3], "size": 50},
        "bootstrap": {"hidden": 32, "layers": 1, "mlp": 48, "steps": 10, "noisy_steps": 1, "batch": 16},
        "credit": "ccpo_v1",
        "rollout": {"prompts": 4, "samples": 4, "max_tokens": 10, "max_prompt_tokens": 64, "cache": "always"},
        "loss": {"kl": "k3", "kl_coef": 0.01, "importance_cap": 2.0},
        "optim": {"lr": 1e-3, "epochs": 2},
        "trainer": {"steps": 2, "eval_every": 1, "async_depth": 1},
        "eval": {"problems": 4, "during": 2, "temperature": 1.0},
        "log": {"tensorboard": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(folder / "cache"))
        ccpo.train(recipe)
    return folder / "run"


def covers(pattern: str, name: str) -> bool:
    """Whether a documented name, where AGENT stands for an agent's name, is this one."""
    return re.fullmatch(re.escape(pattern).replace("AGENT", r"[A-Za-z][\w-]*"), name) is not None


def test_every_metric_of_a_run_is_documented(run: Path):
    text = page("metrics.md")
    documented = re.findall(r"`([a-z]+/[\w/]+)`", text)
    written = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)} - {
        "step"
    }
    assert len(written) > 50
    assert {name for name in written if not any(covers(pattern, name) for pattern in documented)} == set()
    # and the other way round: what this run cannot write is what is said to need other settings
    elsewhere = {"credit/AGENT/bonus", "credit/AGENT/shapley_error", "cache/drift", "actor/AGENT/updates_skipped"}
    elsewhere |= {"credit/AGENT/shared_corr", "credit/AGENT/same_as_shared"}  # absent where there is no spread
    # of a rule that asks for ratings
    elsewhere |= {f"rating/{name}" for name in ("valid", "agreement", "asked", "mean_length", "clipped_ratio")}
    elsewhere |= {"seconds/rate"} | {f"credit/AGENT/{name}" for name in ("rating_valid", "rated_share", "self_praise")}
    # of auto, its planner, and process rewards
    elsewhere |= {f"credit/AGENT/TURN_{name}_weight" for name in ("siblings", "group", "removal", "without")}
    elsewhere |= {"alarm/NAME"}  # no alarm in two steps
    elsewhere |= {"credit/AGENT/process", "layout/levelL_texts", "layout/levelL_variance"}
    elsewhere |= {"seconds/communication"}  # of several processes
    # of an agent behind an endpoint
    elsewhere |= {f"remote/AGENT/{name}" for name in ("requests", "retries", "tokens", "estimated_tokens")}
    unwritten = {pattern for pattern in documented if not any(covers(pattern, name) for name in written)}
    assert unwritten <= elsewhere


def test_every_key_of_the_reports_and_the_summary_is_documented(run: Path):
    text = page("metrics.md")
    summary = json.loads((run / "summary.json").read_text())
    documented = re.findall(r"`(\w+)`", section(text, "Summary"))
    assert {key for key in summary if not any(covers(pattern, key) for pattern in documented)} == set()
    assert {pattern for pattern in documented if not any(covers(pattern, key) for key in summary)} == set()
    report = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])["reports"]["heldout"]
    assert set(report) == set(names(section(text, "Evaluation"), "key"))


def test_every_field_of_the_episodes_is_documented(run: Path):
    text = page("episodes.md")
    file = run / "episodes" / "step-000001.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        header, record, *_ = map(json.loads, lines)
    rollout, counterfactual = record["rollouts"][0], record["counterfactuals"][0]
    for title, value in (
        ("Header", header),
        ("Problem line", record),
        ("`problem`", record["problem"]),
        ("Each of `rollouts`", rollout),
        ("Each of `counterfactuals`", counterfactual),
        ("A turn", rollout["turns"][0]),
    ):
        table = {row[0].strip("`"): row[1] for row in rows(section(text, title), "field")}
        assert set(table) == set(value), title
        for field, kind in table.items():
            assert fits(value[field], kind), f"{title}, {field}: {value[field]!r} is no {kind}"
    assert header["schema"] in text
    assert len(list(read_episodes(file))) == header["problems"]


KINDS = {"string": str, "int": int, "float": float, "bool": bool, "object": dict, "list": list, "null": type(None)}


def fits(value: Any, kind: str) -> bool:
    return any(type(value) is KINDS[re.split(r"[ :]", option)[0]] for option in kind.split(" | "))


def test_the_check_of_types_can_fail():
    assert fits(None, "int | null")
    assert not fits(None, "int")
    assert not fits(True, "int")


# ---- numbers


def test_the_think_solve_table_is_what_the_rules_give():
    """A thought is good with probability 1/2; an answer is right with 0.75 after a good one, 0.45 after a bad one, 0.35 alone."""
    P, N = 40_000, 8
    u = torch.rand(3, P, N, generator=torch.Generator().manual_seed(7))
    good = (u[0] < 0.5).float()
    inputs = CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker",),
        reward_PN=(u[1] < 0.45 + 0.3 * good).float(),
        without={("thinker",): (u[2] < 0.35).float()[:, None, :]},
    )
    group = torch.arange(P).repeat_interleave(N)

    def ratio(rule: Any, how: str) -> float:
        state = rule(inputs, {})[1]  # a history that has seen one batch
        credit = rule(inputs, state)[0].credit["thinker"]
        if how == "grpo":
            credit = ESTIMATORS["grpo"](credit.flatten(), group).view(P, N)
        return signal_to_noise(good - 0.5, credit, centred=how == "centred")

    found = [
        ratio(SharedReward(), "raw"),
        ratio(SharedReward(), "centred"),
        ratio(RemovalCredit(pairing="paired"), "raw"),
        ratio(RemovalCredit(pairing="paired"), "centred"),
        ratio(RemovalCredit(pairing="mean"), "raw"),
        ratio(RemovalCredit(pairing="mean"), "centred"),
        ratio(CCPOv1(pairing="paired"), "raw"),
        ratio(CCPOv1(pairing="paired"), "grpo"),
        ratio(CCPOv1(pairing="mean"), "raw"),
    ]
    table = [float(row[1]) for row in rows(page("rules.md"), "Think–Solve, credit of the thinker")]
    assert found == pytest.approx(table, rel=0.04)


def test_the_voting_table_is_the_one_that_the_theory_tests_compute():
    from test_theory import test_voting_table as computed

    (mark,) = (m for m in computed.pytestmark if m.name == "parametrize")
    columns = {f"p = {p}": numbers for p, *numbers in mark.args[1]}
    table = rows(page("rules.md"), "voting")
    assert "| voting | " + " | ".join(columns) + " |" in page("rules.md")
    for i, numbers in enumerate(columns.values(), start=1):
        assert [float(row[i]) for row in table] == numbers


def test_the_shapley_table_is_the_one_that_the_theory_tests_compute():
    from test_theory import test_voting_table_of_the_shapley_value as computed

    (mark,) = (m for m in computed.pytestmark if m.name == "parametrize")
    columns = {f"p = {p}": numbers for p, *numbers in mark.args[1]}
    table = rows(page("rules.md"), "Shapley value, voting")
    assert "| Shapley value, voting | " + " | ".join(columns) + " |" in page("rules.md")
    for i, numbers in enumerate(columns.values(), start=1):
        assert [float(row[i]) for row in table] == numbers


# ---- the headline


def test_the_intervals_in_the_readme_are_those_of_the_evidence():
    claims = re.findall(r"\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]", (ROOT / "README.md").read_text())
    assert claims, "the README states the headline result with its interval"
    evidence = page("evidence.md")
    assert [claim for claim in claims if claim not in evidence] == []
