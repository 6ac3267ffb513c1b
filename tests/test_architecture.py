"""Who may import whom, what an import costs, and how long a file may be."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ccpo.types

SRC = Path(ccpo.types.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
BASE = {"errors", "imports"}
TORCH = {"torch"}
PURE = {"types", "errors"}

RULES: dict[str, tuple[set[str], set[str] | None]] = {
    # part: (what of ccpo it may import beside itself, which other packages; None: any)
    "types": (set(), TORCH),
    "errors": (set(), set()),
    "imports": ({"errors"}, set()),
    "signals": (set(), set()),
    "cachefolder": (set(), set()),
    "kernels": ({"cachefolder"}, TORCH),
    "families": (set(), TORCH),
    "rectangle": (set(), TORCH),
    "comm": ({"errors"}, TORCH),
    "plain_yaml": ({"errors"}, {"yaml"}),
    "explain": ({"errors"}, {"pydantic"}),
    "addresses": (set(), set()),
    "sections": ({"addresses"}, {"pydantic"}),
    "config": ({"errors", "explain", "plain_yaml", "sections"}, {"pydantic", "yaml"}),
    "schedule": ({"errors"}, set()),
    "runfolder": ({"errors"}, set()),
    "loggers": ({"errors"}, TORCH | {"tensorboard"}),
    "credit": (PURE | {"kernels"}, TORCH),
    "losses": (PURE, TORCH),
    "teams": (PURE | BASE, None),
    "tasks": (PURE | BASE | {"comm"}, None),
    "engines": (PURE | BASE | {"comm", "families", "kernels", "rectangle"}, None),
    "rollout": (PURE | BASE | {"teams", "tasks", "engines"}, TORCH),
    "alarms": (PURE | {"explain", "rollout", "runfolder"}, TORCH | {"pydantic"}),
    "learner": (PURE | BASE | {"comm", "families", "kernels", "losses", "rectangle"}, None),
    "diagnose": (
        PURE | {"credit", "learner", "losses", "pay", "planner", "rollout", "schedule", "tasks", "teams"},
        {"torch", "rich"},
    ),
    "report": ({"alarms", "errors", "runfolder"}, set()),
}
WIRING = {"cli", "__main__"}  # imported by nobody
TOP = {
    "bench",
    "compare",
    "bootstrap",
    "build",
    "chat",
    "crew",
    "diagnosis",
    "display",
    "doctor",
    "evaluate",
    "forecast",
    "launch",
    "ahead",
    "pay",
    "planner",
    "rating_lessons",
    "remotes",
    "plot",
    "runs",
    "trainer",
}
TOP |= {"integrations", "__init__"}
STDLIB = set(sys.stdlib_module_names)


def part_of(path: Path) -> str:
    inside = path.relative_to(SRC)
    if inside.stem == "__main__":
        return "__main__"  # `python -m ccpo.bench` is the command line too
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its head or inside a function; ``from ccpo import x`` is ``ccpo.x``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, line {node.lineno}"
            found |= {f"ccpo.{alias.name}" for alias in node.names} if node.module == "ccpo" else {node.module}
    return found


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("ccpo.")} - {part_of(path)}


def others(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)} - STDLIB - {"ccpo"}


def name(path: Path) -> str:
    return str(path.relative_to(SRC))


def test_every_part_has_a_place():
    parts = {part_of(path) for path in FILES}
    assert parts <= set(RULES) | TOP | WIRING, "give the new part its rules here"
    assert set(RULES) <= parts


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in RULES], ids=name)
def test_a_part_imports_only_what_lies_below_it(path):
    parts, packages = RULES[part_of(path)]
    assert ours(path) <= parts
    assert packages is None or others(path) <= packages


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nobody_imports_the_command_line(path):
    assert part_of(path) in WIRING or not ours(path) & WIRING


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_reads_pickles_or_runs_text(path):
    assert not imported(path) & {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system", "os.popen"), f"line {node.lineno}"
            assert not any(k.arg == "shell" for k in node.keywords), f"line {node.lineno}"
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


HEAVY = (
    "transformers",
    "datasets",
    "ray",
    "vllm",
    "peft",
    "trl",
    "verl",
    "reasoning_gym",
    "math_verify",
    "sympy",
    "pandas",
)


def loaded(modules: tuple[str, ...], watched: tuple[str, ...]) -> dict[str, list[str]]:
    """Which of ``watched`` are there after each of ``modules`` has been imported, one after the other."""
    code = (
        "import importlib, json, sys; found = {}\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    found[name] = [m for m in {watched} if m in sys.modules]\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_an_import_pulls_in_nothing_heavy():
    modules = ("ccpo", "ccpo.types", "ccpo.credit", "ccpo.losses", "ccpo.teams", "ccpo.tasks")
    assert loaded(modules, HEAVY) == {module: [] for module in modules}


def test_what_needs_no_torch_does_not_load_it():
    modules = ("ccpo", "ccpo.errors", "ccpo.config", "ccpo.schedule", "ccpo.runfolder", "ccpo.report")
    assert loaded(modules, ("torch",)) == {module: [] for module in modules}
