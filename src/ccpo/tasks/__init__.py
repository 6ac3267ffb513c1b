"""Problems and verifiers: procedural tasks, files, the hub, reasoning-gym."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ccpo.tasks.base import ListTask, Pair, Task, Verifier, limited, verify_all
from ccpo.tasks.files import load_file
from ccpo.tasks.gym import GymTask, GymVerifier, gym_names
from ccpo.tasks.hub import load_hub
from ccpo.tasks.procedural import PROCEDURAL, ProceduralTask
from ccpo.tasks.verifiers import VERIFIERS, Choice, Exact, Math, choice_verdict, exact_verdict, make_verifier

TASKS: dict[str, Callable[..., Any]] = {**PROCEDURAL, "file": load_file, "hub": load_hub, "gym": GymTask}
"""What a recipe's ``task.kind`` may name."""

__all__ = [
    "PROCEDURAL",
    "TASKS",
    "VERIFIERS",
    "Choice",
    "Exact",
    "GymTask",
    "GymVerifier",
    "ListTask",
    "Math",
    "Pair",
    "ProceduralTask",
    "Task",
    "Verifier",
    "choice_verdict",
    "exact_verdict",
    "gym_names",
    "limited",
    "load_file",
    "load_hub",
    "make_verifier",
    "verify_all",
]
