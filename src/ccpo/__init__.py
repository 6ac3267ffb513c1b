"""``ccpo`` trains teams of language-model agents by reinforcement learning and pays each agent the credit it earned.

    import ccpo

    team = ccpo.teams.think_solve()
    result = ccpo.train("demo", team=team, credit=ccpo.credit.CCPOv1(alpha=2.0))

Everything heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = {
    "train": "ccpo.runs",
    "resume": "ccpo.runs",
    "open_crew": "ccpo.runs",
    "load_recipe": "ccpo.config",
    "UserError": "ccpo.errors",
    "RunFailure": "ccpo.errors",
}
_MODULES = ("credit", "engines", "learner", "losses", "rollout", "tasks", "teams", "types")

__all__ = ["__version__", *_FUNCTIONS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"ccpo.{name}")
    raise AttributeError(f"module 'ccpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
