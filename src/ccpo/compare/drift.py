"""Defaults that have changed since a study was begun: a cell that relied on one is another cell now, and its old result is not taken.

A fingerprint is made of what a recipe says. What it leaves to a default would change in silence, so a study's folder keeps the defaults
of its beginning. A key that is new since then has a default that changes nothing (what does change results raises ``cells.EPOCH``).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from ccpo.config import RunConfig
from ccpo.credit import RULES
from ccpo.tasks import TASKS
from ccpo.teams import TEAMS

TABLES: dict[str, Mapping[str, Any]] = {"credit": RULES, "task": TASKS, "team": TEAMS}
PACE = {"rollout.decode_tokens"}
"""Keys that say how fast a run goes and not where to: a sample does not hang on what is decoded beside it."""
Defaults = dict[str, Any]
"""Values by path: ``optim.lr``, and ``credit:ccpo_v1.alpha`` for an argument of a kind."""


def present_defaults() -> Defaults:
    """The defaults of every key and of every argument of a built-in rule, task or team, as plain JSON."""
    found = flat(RunConfig().model_dump())
    for section, table in TABLES.items():
        for kind, maker in table.items():
            for name, parameter in inspect.signature(maker).parameters.items():
                if parameter.default is not inspect.Parameter.empty:
                    found[f"{section}:{kind}.{name}"] = parameter.default
    return json.loads(json.dumps(found, default=str))


def drifted(then: Defaults, now: Defaults) -> Defaults:
    """The present value of those defaults that were others then."""
    return {key: now[key] for key in then if key in now and key not in PACE and now[key] != then[key]}


def relied_on(drift: Defaults, config: RunConfig) -> Defaults:
    """Those of ``drift`` that a recipe leaves to the default."""
    if not drift:
        return {}
    said = flat(config.model_dump(exclude_unset=True))
    parts = {"credit": config.credit, "task": config.task, "team": config.team}
    found = {}
    for key, value in drift.items():
        section, colon, argument = key.partition(":")
        if colon:
            part, (kind, _, name) = parts[section], argument.partition(".")
            relied = part is not None and part.kind == kind and name not in part.arguments
        else:
            relied = key not in said
        if relied:
            found[key] = value
    return found


def flat(nested: Mapping[str, Any], path: str = "") -> Defaults:
    """``{"optim": {"lr": 1e-4}}`` is ``{"optim.lr": 1e-4}``; an empty mapping is a value."""
    found: Defaults = {}
    for key, value in nested.items():
        place = f"{path}.{key}" if path else str(key)
        found |= flat(value, place) if isinstance(value, Mapping) and value else {place: value}
    return found
