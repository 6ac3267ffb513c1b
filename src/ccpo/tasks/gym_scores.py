"""Makes and scores reasoning-gym problems. Runs inside the sandbox: some scorers evaluate the text that they are
given.

The scorers' ``eval`` is replaced by one that reads literals, and sympy's ``parse_expr``, which evaluates too, by
one that takes numbers, operators and names of mathematics alone; what they refuse scores as any unreadable answer
does. Needs reasoning-gym.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from functools import lru_cache
from typing import Any

import reasoning_gym
import sympy
import sympy.physics.units  # simplify() loads it when it first needs it, too late for the fork
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS

LONGEST = 20_000
_OWN_EVAL = re.compile(
    r"basic_arithmetic|bitwise_arithmetic|gsm_symbolic"
)  # these evaluate expressions that they have made themselves
_EXPRESSION = re.compile(r"(?:[\s\d+\-*/^(),=!]|\d\.\d*|\.\d|[A-Za-z]\w*)*")
_FUNCTIONS = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs pi Integral"
_NAMES = frozenset(re.findall(r"\w+", _FUNCTIONS))
_evaluate = sympy.parse_expr


def answer(item: dict[str, Any]) -> Any:
    """Serve one request: ``names``, ``make`` (a problem of an index) or ``score``."""
    if item["do"] == "names":
        return sorted(DATASETS)
    dataset = _dataset(item["dataset"], item["seed"], item["size"], _frozen(item["config"]))
    if item["do"] == "check":
        return len(dataset)
    entry = _entry(dataset, item["index"])
    if item["do"] == "make":
        return {"question": str(entry["question"]), "answer": None if entry["answer"] is None else str(entry["answer"])}
    score = float(dataset.score_answer(item["answer"][:LONGEST], entry))
    if not math.isfinite(score):
        raise ValueError(f"the scorer gave {score}")
    return min(1.0, max(0.0, score))


@lru_cache(maxsize=128)
def _dataset(name: str, seed: int, size: int, config: tuple) -> Any:
    settings = _thawed(config)
    if name == "composite":
        settings["datasets"] = [
            DatasetSpec(**{"weight": 1.0, "config": {}, **part}) for part in settings.get("datasets", [])
        ]
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)


@lru_cache(maxsize=4096)
def _entry(dataset: Any, index: int) -> dict[str, Any]:
    return dataset[index]


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return ("dict", *((key, _frozen(value[key])) for key in sorted(value)))
    return ("list", *map(_frozen, value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    kind, *parts = value
    return {key: _thawed(part) for key, part in parts} if kind == "dict" else [_thawed(part) for part in parts]


def _read_expression(text: str, *args: Any, **kwargs: Any) -> Any:
    """sympy's ``parse_expr`` for arithmetic only: no strings, no attributes, no names but those of mathematics and
    single letters.
    """
    names = set(re.findall(r"[A-Za-z_]\w*", text)) if isinstance(text, str) else {"?"}
    if not all(len(name) == 1 or name in _NAMES for name in names) or not _EXPRESSION.fullmatch(text):
        raise SyntaxError("not an arithmetic expression")
    return _evaluate(text, *args, **kwargs)


def _disarm() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            if not _OWN_EVAL.search(name):
                module.eval = ast.literal_eval
            if getattr(module, "parse_expr", None) is _evaluate:
                module.parse_expr = _read_expression
    sympy.parse_expr = _read_expression  # not the parser module's own, which sympy itself calls


_disarm()
